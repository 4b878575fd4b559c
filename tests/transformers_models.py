"""Small random models of many architectures, for test_transformers*.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers", minversion="5.0")
integration = pytest.importorskip("kvz.integrations.transformers")
KvzCache, KvzLayer = integration.KvzCache, integration.KvzLayer
cache_for, kvz_attention, kvz_mask = (
    integration.cache_for,
    integration.kvz_attention,
    integration.kvz_mask,
)

torch.set_num_threads(1)  # the models are too small for more

VOCABULARY = 199
#: Wide weights, so that the best token stands out and rounding does not choose it.
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
WINDOW = 16
SLIDING = ["sliding_attention", "full_attention"]
SHARED = {"num_hidden_layers": 4, "layer_types": SLIDING * 2, "num_kv_shared_layers": 2}
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}


def _of(name: str, **fields: Any) -> Callable[[], Any]:
    """A model by the stem of its classes, with fields beside those of BASE."""

    def make() -> Any:
        for suffix in ("TextConfig", "Config"):
            if config := getattr(hf, name + suffix, None):
                break
        return getattr(hf, name + "ForCausalLM")(config(**{**BASE, **fields}))

    return make


def _gpt2() -> Any:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


_WIDE = {"head_dim": 16}
_GEMMA = {**_WIDE, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "layer_types": SLIDING}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": _of("Llama"),
    "smollm3": _of("SmolLM3"),
    "mistral": _of("Mistral", sliding_window=WINDOW),
    "qwen2": _of("Qwen2"),
    "qwen3": _of("Qwen3", **_WIDE),
    "qwen3-sliding": _of(
        "Qwen3", **_WIDE, use_sliding_window=True, sliding_window=WINDOW, layer_types=SLIDING
    ),
    "gemma": _of("Gemma", **_WIDE),
    "gemma2": _of("Gemma2", **_GEMMA, attn_logit_softcapping=20.0),
    "gemma3": _of("Gemma3", **_GEMMA),
    "gemma3n": _of(
        "Gemma3n", **_WIDE, sliding_window=WINDOW, **SHARED, **PER_LAYER, laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4": _of(
        "Gemma4", **_WIDE, global_head_dim=16, sliding_window=WINDOW, **SHARED, **PER_LAYER
    ),
    "gpt-oss": _of(
        "GptOss", **_WIDE, sliding_window=WINDOW, layer_types=SLIDING, num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "phi": _of("Phi"),
    "phi3": _of("Phi3"),
    "gpt2": _gpt2,
    "gpt-neox": _of("GPTNeoX"),
    "starcoder2": _of("Starcoder2", sliding_window=WINDOW),
    "llama4": _of(
        "Llama4", **_WIDE, num_hidden_layers=4, attention_chunk_size=WINDOW, num_local_experts=2,
        intermediate_size_mlp=128,
    ),
    "olmo3": _of("Olmo3", sliding_window=WINDOW, layer_types=SLIDING),
    "cohere2": _of("Cohere2", sliding_window=WINDOW, layer_types=SLIDING),
    "granite": _of("Granite"),
    "lfm2": _of("Lfm2", num_hidden_layers=4, full_attn_idxs=[1, 3]),
    "qwen3-next": _of(
        "Qwen3Next", **_WIDE, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
}  # fmt: skip

#: Their linear or convolutional layers cannot be taken back, so no candidate can be rejected.
RECURRENT = {"lfm2", "qwen3-next"}
#: What stands for the storage of DynamicCache in float32: the same numbers, in both tiers.
EXACT: dict[str, Any] = {
    "store_precision": "f32",
    "tail_precision": "f32",
    "tail_length": 16,
    "migration_batch": 8,
}

_made: dict[str, Any] = {}


def model_of(name: str) -> Any:
    """A model, made once; its weights come from a fixed seed."""
    if name not in _made:
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        model.generation_config.eos_token_id = None  # random models stop where they like
        _made[name] = model
    return _made[name]


def prompt(batch: int, tokens: int, seed: int = 1) -> Any:
    """Random token ids, (batch, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)


def padded_prompt(tokens: int = 30) -> tuple[Any, Any]:
    """Three prompts of different lengths, padded on the left: ids and attention mask."""
    ids = prompt(3, tokens, seed=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, : tokens - 9] = 0
    ids[mask == 0] = 0
    return ids, mask
