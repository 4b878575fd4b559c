"""Shapes of known models, and what their caches take for each format. Called by cli.py.

The command `kvz plan` shows it; the function `kvz.plan`, how many tokens of one configuration fit
into a pool to the byte, is plan.py.

A model is a name of the table below, a transformers `config.json`, a folder with one, or the name
of a model that the Hugging Face cache on this machine holds; nothing is fetched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kvz.config import CacheConfig, PrecisionLike
from kvz.errors import InvalidArgumentError
from kvz.presets import STORES, Preset, Store, as_preset


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Attention layers that are alike.

    Attributes
    ----------
    count, num_kv_heads, head_dim : int
    window : int, optional
        Tokens that a layer with a sliding window holds.
    """

    count: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None


def _full(layers: int, heads: int, dim: int) -> tuple[Layers, ...]:
    return (Layers(count=layers, num_kv_heads=heads, head_dim=dim),)


def _mixed(full: int, sliding: int, heads: int, dim: int, window: int) -> tuple[Layers, ...]:
    return (
        *_full(full, heads, dim),
        Layers(count=sliding, num_kv_heads=heads, head_dim=dim, window=window),
    )


MODELS: dict[str, tuple[Layers, ...]] = {
    "smollm2-135m": _full(30, 3, 64),
    "llama-3.2-1b": _full(16, 8, 64),
    "llama-3.2-3b": _full(28, 8, 128),
    "llama-3.1-8b": _full(32, 8, 128),
    "llama-3.1-70b": _full(80, 8, 128),
    "mistral-7b-v0.3": _full(32, 8, 128),
    "qwen2.5-0.5b": _full(24, 2, 64),
    "qwen2.5-7b": _full(28, 4, 128),
    "qwen3-0.6b": _full(28, 8, 128),
    "qwen3-4b": _full(36, 8, 128),
    "qwen3-8b": _full(36, 8, 128),
    "gemma-2-9b": _mixed(21, 21, 8, 256, 4096),
    "gemma-3-1b": _mixed(4, 22, 1, 256, 512),
    "gemma-3-4b": _mixed(5, 29, 4, 256, 1024),
    "phi-3-mini": _full(32, 32, 96),
    "gpt-oss-20b": _mixed(12, 12, 8, 64, 128),
}


def layers_of(model: str) -> tuple[Layers, ...]:
    """Find the layers of a model.

    Raises
    ------
    InvalidArgumentError
        There is no such model here, or its configuration does not say what is needed.
    """
    if model.lower() in MODELS:
        return MODELS[model.lower()]
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists():
        found = _in_hugging_face_cache(model)
        if found is None:
            raise InvalidArgumentError(
                f"model: expected a config.json, a folder with one, or one of "
                f"{', '.join(MODELS)}, got {model!r}"
            )
        path = found
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InvalidArgumentError(f"{path}: not JSON: {error}") from error
    return layers_of_config(config, str(path))


def _in_hugging_face_cache(name: str) -> Path | None:
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    files = hub.glob(f"models--{name.replace('/', '--')}/snapshots/*/config.json")
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def layers_of_config(config: Any, what: str) -> tuple[Layers, ...]:
    """Read the layers out of the configuration of a transformers model.

    Examples
    --------
    >>> layers_of_config({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, "c")
    (Layers(count=2, num_kv_heads=4, head_dim=16, window=None),)
    """
    if not isinstance(config, Mapping):
        raise InvalidArgumentError(f"{what}: expected the configuration of a model")
    config = config.get("text_config") or config
    if config.get("kv_lora_rank"):
        raise InvalidArgumentError(f"{what}: multi-head latent attention is not supported")
    count = _number(config, what, "num_hidden_layers", "n_layer")
    query_heads = _number(config, what, "num_attention_heads", "n_head")
    heads = config.get("num_key_value_heads") or query_heads
    dim = config.get("head_dim") or _number(config, what, "hidden_size", "n_embd") // query_heads
    window = config.get("sliding_window") or config.get("attention_chunk_size")
    kinds = config.get("layer_types") or _kinds(config, count, window)
    made = []
    for kind, size in (("full", None), ("sliding", window)):
        names = {"full": ("full_attention",), "sliding": ("sliding_attention", "chunked_attention")}
        alike = sum(kinds.count(name) for name in names[kind])
        if alike:
            made.append(Layers(count=alike, num_kv_heads=heads, head_dim=dim, window=size))
    if not made:
        raise InvalidArgumentError(f"{what}: no layer of this model has keys and values")
    return tuple(made)


def _kinds(config: Mapping[str, Any], count: int, window: int | None) -> list[str]:
    """Say what the layers are where the configuration does not list them."""
    pattern = config.get("sliding_window_pattern")
    if not window or config.get("use_sliding_window") is False:
        return ["full_attention"] * count
    if not pattern:
        return ["sliding_attention"] * count
    return [
        "sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(count)
    ]


def _number(config: Mapping[str, Any], what: str, *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise InvalidArgumentError(f"{what}: expected {' or '.join(names)}, which is not there")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one store comes to, over all layers and sequences.

    Attributes
    ----------
    store : str
    bytes_per_token : int
        Of one sequence, in the store, where every layer holds the token.
    cache_bytes : int
        Of `batch` sequences of `context` tokens, sinks, tail and warm tier included; pages that
        are not yet full come on top.
    tokens_per_gb : int
        Tokens that the store holds in 10^9 bytes.
    fitting_context : int, optional
        The longest context of every sequence that `memory` bytes hold.
    has_warm_tier : bool
        Whether any layer has one: its store takes fewer bits than `warm_precision`.
    """

    store: str
    bytes_per_token: int
    cache_bytes: int
    tokens_per_gb: int
    fitting_context: int | None
    has_warm_tier: bool


def plan_rows(
    layers: Sequence[Layers],
    *,
    context: int,
    batch: int,
    tail: int,
    sinks: int,
    memory: int | None,
    warm_length: int = 0,
    warm_precision: PrecisionLike = "q8",
    stores: Sequence[Store] = STORES,
) -> list[Row]:
    """Work out a table, one row for each store."""
    tiers = {"tail_length": tail, "warm_length": warm_length, "warm_precision": warm_precision}
    rows = []
    for store in stores:
        preset = as_preset(store)
        pairs = [each for one in layers for each in _configs(one, preset, sinks, tiers)]
        needed = partial(_bytes_of_all, pairs, batch)
        per_token = sum(one.count * config.store_bytes_per_token for one, config in pairs)
        rows.append(
            Row(
                store=preset.name,
                bytes_per_token=per_token,
                cache_bytes=needed(context),
                tokens_per_gb=10**9 // per_token,
                fitting_context=None if memory is None else _most(needed, memory),
                has_warm_tier=any(config.warm_length for _, config in pairs),
            )
        )
    return rows


def _bytes_of_all(pairs: Sequence[tuple[Layers, CacheConfig]], batch: int, tokens: int) -> int:
    return batch * sum(one.count * _bytes(one, config, tokens) for one, config in pairs)


def _configs(
    layers: Layers, preset: Preset, sinks: int, tiers: Mapping[str, Any]
) -> Iterator[tuple[Layers, CacheConfig]]:
    """Give those of the layers that are stored alike; layers of one kind take stores in turn."""
    for index, store in enumerate(preset.stores):
        count = len(range(index, layers.count, len(preset.stores)))
        if count:
            config = preset.config(
                index,
                num_kv_heads=layers.num_kv_heads,
                head_dim=layers.head_dim,
                max_tokens=1 << 40,
                tail_precision="f32" if store == "f32" else "f16",
                sink_tokens=0 if layers.window else sinks,
                **tiers,
            )
            # A warm tier is a step on the way to fewer bits; there is none before a wider store.
            if config.warm_bytes_per_token <= config.store_bytes_per_token:
                config = replace(config, warm_length=0)
            yield replace(layers, count=count), config


def _bytes(layers: Layers, config: CacheConfig, tokens: int) -> int:
    """Bytes of one layer of one sequence."""
    held = min(tokens, layers.window or tokens)
    exact = min(held, config.tail_length + config.sink_tokens)
    warm = min(held - exact, config.warm_length)
    return (
        exact * config.tail_bytes_per_token
        + warm * config.warm_bytes_per_token
        + (held - exact - warm) * config.store_bytes_per_token
    )


def _most(needed: Callable[[int], int], memory: int) -> int:
    """Find the longest context that fits, up to 2^40 tokens."""
    fits, too_many = 0, 1 << 40
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if needed(middle) <= memory else (fits, middle)
    return fits
