"""The cache of a whole model, as `generate(past_key_values=...)` takes it. Calls layer.py."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    get_layer_types_and_kwargs,
)

from kvz.cache import TwoTierCache
from kvz.config import CacheConfig
from kvz.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from kvz.html import layers_html
from kvz.integrations.transformers.layer import KvzLayer
from kvz.pool import BufferPool
from kvz.presets import Preset, layer_configs
from kvz.stats import CacheStats, format_bytes

#: The name of the attention implementation: ``model.set_attn_implementation("kvz")``.
NAME = "kvz"

#: Layers with keys and values: kvz holds them.
_OURS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
#: Layers without keys and values: transformers holds their states, if there are any.
_THEIRS = frozenset({"linear_attention", "conv", "dummy"})
#: What a model says about its shape, or what is not a choice here.
_FIXED = frozenset({"num_kv_heads", "head_dim", "value_dim", "max_tokens"})
_TOKENS_MAX = 1 << 40


class KvzCache(Cache):
    """A `transformers.Cache` of packed keys and values.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's own; its attention must be "kvz" already. `cache_for` sees to that.
    pool : BufferPool, optional
        Where the memory comes from; its limit is the limit of this cache.
    core : {"native", "wasm"}, optional
    preset : Preset or str, optional
        The formats of all layers, one of `kvz.presets` or its name, instead of `store_precision`.
    **config_fields
        Fields of `kvz.CacheConfig`: `store_precision`, `tail_length`, `sink_tokens`, ...

    Raises
    ------
    UnsupportedError
        kvz cannot hold the keys and values of this model, or attend for it.
    ConfigError, InvalidArgumentError
        A field is not valid.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from kvz.integrations.transformers import KvzCache
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> model.set_attn_implementation("kvz")
    >>> cache = KvzCache(model.config, store_precision="q8", tail_length=64)
    >>> ids = torch.arange(40)[None]
    >>> out = model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    >>> out.shape, cache.get_seq_length(), len(cache)
    (torch.Size([1, 43]), 42, 2)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        pool: BufferPool | None = None,
        core: str | None = None,
        preset: Preset | str | None = None,
        **config_fields: Any,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise InvalidTypeError(
                f"config: expected a transformers configuration, got {type(config).__name__}"
            )
        text_config = config.get_text_config(decoder=True)
        _check_model(config, text_config)
        _check_fields(config_fields)
        types, arguments = get_layer_types_and_kwargs(text_config)
        _check_layer_types(types)
        fields = {"num_kv_heads": 1, "head_dim": 1, "max_tokens": _TOKENS_MAX, **config_fields}
        given = layer_configs(max(1, sum(kind in _OURS for kind in types)), preset, **fields)
        TwoTierCache(given[0], pool=pool, core=core).close()  # refuses a wrong pool or core now
        own = iter(given)
        super().__init__(
            layers=[
                KvzLayer(next(own), argument.get("sliding_window"), pool, core)
                if kind in _OURS
                else DYNAMIC_LAYER_TYPE_MAPPING[kind](**argument)
                for kind, argument in zip(types, arguments, strict=True)
            ]
        )

    def _own(self) -> list[KvzLayer]:
        return [layer for layer in self.layers if isinstance(layer, KvzLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held, over all layers and sequences."""
        return sum(layer.nbytes for layer in self._own())

    def stats(self) -> list[list[CacheStats]]:
        """Return the counts of each layer that holds keys and values, for each sequence."""
        return [[row.stats() for row in layer.rows] for layer in self._own()]

    def fork(self) -> KvzCache:
        """Return a copy that shares its pages until one of the two writes to them."""
        return copy.deepcopy(self)

    def _repr_html_(self) -> str:
        """Show a bar of the tiers of every layer in a notebook, those of the first sequence."""
        return layers_html([layer[0] for layer in self.stats() if layer], repr(self))

    def __repr__(self) -> str:
        own = self._own()
        batch = max((len(layer.rows) for layer in own), default=0)
        return (
            f"KvzCache({len(own)} layers, {batch} sequences of {self.get_seq_length()} tokens, "
            f"{format_bytes(self.nbytes)})"
        )


def cache_for(model: PreTrainedModel, **options: Any) -> KvzCache:
    """Switch a model's attention to kvz and return a new cache for it.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder on the CPU.
    **options
        What `KvzCache` takes.

    Returns
    -------
    KvzCache
        For ``model.generate(past_key_values=...)`` or ``model(past_key_values=...)``.

    Raises
    ------
    UnsupportedError
        kvz cannot attend for this model; its attention is left as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise InvalidTypeError(f"model: expected a PreTrainedModel, got {type(model).__name__}")
    if model.device.type != "cpu":
        raise UnsupportedError(f"model: expected one on the CPU, got one on {model.device}")
    if not model._can_set_attn_implementation():
        raise UnsupportedError(
            f"{type(model).__name__}: this model does not let its attention be replaced"
        )
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        return KvzCache(model.config, **options)
    except Exception:
        model.set_attn_implementation(before)
        raise


# -- What is refused at set-up ---------------------------------------------------------------------


def _check_model(config: PreTrainedConfig, text_config: PreTrainedConfig) -> None:
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{name}: expected a decoder, got an encoder with a decoder")
    if getattr(text_config, "kv_lora_rank", None):
        raise UnsupportedError(
            f"{name}: multi-head latent attention computes with the cached states outside of "
            "attention"
        )
    if text_config._attn_implementation != NAME:
        raise UnsupportedError(
            f"{name}: expected a model whose attention is {NAME!r}, got "
            f"{text_config._attn_implementation!r}; call model.set_attn_implementation({NAME!r}) "
            "first, or make the cache by cache_for(model)"
        )


def _check_fields(config_fields: dict[str, Any]) -> None:
    fixed = sorted(_FIXED & set(config_fields))
    if fixed:
        raise InvalidArgumentError(f"{', '.join(fixed)}: the model decides on this")
    known = set(CacheConfig.__dataclass_fields__) - _FIXED
    unknown = sorted(set(config_fields) - known)
    if unknown:
        raise InvalidArgumentError(
            f"{', '.join(unknown)}: expected fields of CacheConfig: {', '.join(sorted(known))}"
        )


def _check_layer_types(types: list[str]) -> None:
    foreign = sorted(set(types) - _OURS - _THEIRS)
    if foreign:
        raise UnsupportedError(
            f"layer types {', '.join(foreign)}: expected {', '.join(sorted(_OURS | _THEIRS))}"
        )
    if not _OURS & set(types):
        raise UnsupportedError("this model has no layer with keys and values")
