"""kvz as the cache and the attention of Hugging Face models, on the CPU.

Two lines change a program that generates text:

    from kvz.integrations.transformers import cache_for
    model.generate(**inputs, past_key_values=cache_for(model, store_precision="q4"))

Every layer and every sequence of the batch has a `kvz.TwoTierCache`; attention reads its packed
bytes, and keys and values are never unpacked to tensors. What cannot work so is refused when the
cache is made, or by the first layer that meets it; nothing falls back to another way.

Importing this module registers "kvz" as an attention implementation of transformers. Needs
transformers 5 (`pip install "kvz[transformers]"`).
"""

from transformers import AttentionInterface, AttentionMaskInterface

from kvz.integrations.transformers.attention import kvz_attention
from kvz.integrations.transformers.cache import NAME, KvzCache, cache_for
from kvz.integrations.transformers.layer import KvzLayer
from kvz.integrations.transformers.mask import kvz_mask

AttentionInterface.register(NAME, kvz_attention)
AttentionMaskInterface.register(NAME, kvz_mask)

__all__ = ["NAME", "KvzCache", "KvzLayer", "cache_for", "kvz_attention", "kvz_mask"]
