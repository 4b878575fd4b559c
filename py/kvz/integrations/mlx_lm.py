"""kvz as the prompt cache of mlx-lm models, on the CPU.

    from kvz.integrations.mlx_lm import make_prompt_cache
    cache = make_prompt_cache(model, store_precision="q4")
    for token, _ in generate_step(prompt, model, prompt_cache=cache): ...

The caches speak the protocol of mlx-lm (update_and_fetch, offset, make_mask, trim, ...), and the
attention of the model's own modules is switched to one that reads their packed bytes; other caches
go on working. Keys, values and queries are evaluated layer by layer, so this pays on the CPU
device of MLX. Needs mlx-lm (`pip install "kvz[mlx]"`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_cache

from kvz.batch import append_many, attend_many
from kvz.cache import TwoTierCache
from kvz.config import CacheConfig
from kvz.errors import InvalidArgumentError, UnsupportedError
from kvz.integrations.align import align_mask
from kvz.pool import BufferPool
from kvz.presets import Preset, layer_configs

_TOKENS_MAX = 1 << 40
_SLIDE_TOKENS = 64  # that come between two times that a window slides
_NAME = "scaled_dot_product_attention"


class PackedStates(NamedTuple):
    """What stands for the keys or the values of a layer on their way to attention."""

    cache: KvzPromptCache
    shape: tuple[int, ...]
    dtype: Any


class KvzPromptCache(mlx_cache._BaseCache):
    """Keys and values of one layer, packed; one `TwoTierCache` for each sequence of the batch.

    Parameters
    ----------
    config : CacheConfig
        Of each sequence; heads and dims are those of the first keys and values.
    max_size : int, optional
        Of a sliding window: tokens that the next one may see, itself included.
    pool : BufferPool, optional
    core : {"native", "wasm"}, optional

    Attributes
    ----------
    rows : list of TwoTierCache
    """

    def __init__(
        self,
        config: CacheConfig,
        max_size: int | None = None,
        pool: BufferPool | None = None,
        core: str | None = None,
    ) -> None:
        if max_size is not None:  # a window would hide them
            config = replace(config, sink_tokens=0)
        self.config, self.max_size = config, max_size
        self._slid_at = 0  # the length when the window slid last
        self.pool, self.core = pool, core
        self.rows: list[TwoTierCache] = []
        TwoTierCache(config, pool=pool, core=core).close()  # refuses what is wrong now

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append tokens: (batch, heads, tokens, dim) each; all of them or none."""
        batch, heads, _, dim = keys.shape
        if not self.rows:
            config = replace(
                self.config, num_kv_heads=heads, head_dim=dim, value_dim=values.shape[-1]
            )
            self.rows = [TwoTierCache(config, pool=self.pool, core=self.core) for _ in range(batch)]
        if len(self.rows) != batch:
            raise InvalidArgumentError(
                f"keys: expected a batch of {len(self.rows)} as before, got {batch}"
            )
        mx.eval(keys, values)
        self._slide()
        given = [keys.swapaxes(1, 2), values.swapaxes(1, 2)]
        if batch == 1:
            self.rows[0].append(given[0][0], given[1][0])
        else:
            append_many(self.rows, *given)
        held = len(self.rows[0])
        return (
            PackedStates(self, (batch, heads, held, dim), keys.dtype),
            PackedStates(self, (batch, heads, held, values.shape[-1]), values.dtype),
        )

    def _slide(self) -> None:
        """Drop what is packed and the next token cannot see, a page of tokens or more at a time."""
        if self.max_size is None or self.offset - self._slid_at < _SLIDE_TOKENS:
            return
        self._slid_at = self.offset
        for row in self.rows:
            evictable = row.evictable
            row.evict(evictable[evictable <= self.offset - self.max_size])

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: Any) -> mx.array:
        """Attend with the newest queries, (batch, query heads, tokens, dim)."""
        given = np.array(queries.astype(mx.float32)).transpose(0, 2, 1, 3)
        options: dict[str, Any] = {"causal": isinstance(mask, str), "window": self.max_size}
        if sinks is not None:
            options["sinks"] = sinks.astype(mx.float32)
        seen = None if mask is None or isinstance(mask, str) else _mask_of(mask)
        if given.shape[1] == 1:
            options["causal"] = True  # the only query is the newest token
        masks = None
        if seen is not None:
            each = [seen[number if len(seen) > 1 else 0] for number in range(len(self.rows))]
            masks = [
                align_mask(one, len(row)).transpose(1, 0, 2)
                for one, row in zip(each, self.rows, strict=True)
            ]
        out = attend_many(self.rows, given, scale, masks=masks, **options)
        return mx.array(out.transpose(0, 2, 1, 3)).astype(queries.dtype)

    # -- The rest of the protocol ----------------------------------------------------------------

    @property
    def offset(self) -> int:
        """Tokens that came, those that went included: the position of the next one."""
        return self.rows[0].next_position if self.rows else 0

    def make_mask(
        self,
        N: int,  # noqa: N803
        return_array: bool = False,
        window_size: int | None = None,
    ) -> Any:
        """Make the mask of `N` tokens that are about to come."""
        if self.max_size is None:
            return mlx_cache.create_attention_mask(N, self.offset, return_array, window_size)
        window = min(window_size or self.max_size, self.max_size)
        if not return_array and window == self.max_size:
            return None if N == 1 else "causal"  # `attend` knows the window
        return mlx_cache.create_attention_mask(N, min(self.offset, self.max_size - 1), True, window)

    @property
    def state(self) -> list[mx.array]:
        """Nothing: MLX has no part of it to evaluate. `save_prompt_cache` cannot save it."""
        return []

    @state.setter
    def state(self, given: Any) -> None:
        if given:
            raise UnsupportedError("state: a packed cache is not made of arrays of MLX")

    @property
    def meta_state(self) -> str:
        """Nothing, as `state`."""
        return ""

    def is_trimmable(self) -> bool:
        """Whether `trim` leaves what it should: unless tokens that would be seen again went."""
        return self.max_size is None or self._slid_at < self.max_size

    def trim(self, n: int) -> int:
        """Take back the `n` newest tokens, or all; return how many."""
        return max((row.trim(n) for row in self.rows), default=0)

    def size(self) -> int:
        """Return how many tokens are held."""
        return len(self.rows[0]) if self.rows else 0

    def empty(self) -> bool:
        """Whether nothing came yet."""
        return not self.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held."""
        return sum(row.nbytes for row in self.rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> KvzPromptCache:
        """Fork: pages are shared until one of the two writes to them."""
        copy = KvzPromptCache(self.config, self.max_size, self.pool, self.core)
        copy.rows = [row.fork() for row in self.rows]
        copy._slid_at = self._slid_at
        return copy


def make_prompt_cache(
    model: Any,
    *,
    pool: BufferPool | None = None,
    core: str | None = None,
    preset: Preset | str | None = None,
    **config_fields: Any,
) -> list[KvzPromptCache]:
    """Switch the attention of a model's modules to kvz and return a cache for each layer.

    Parameters
    ----------
    model : mlx.nn.Module
        A language model of mlx-lm.
    pool : BufferPool, optional
    core : {"native", "wasm"}, optional
    preset : Preset or str, optional
        The formats of all layers, one of `kvz.presets` or its name, instead of `store_precision`.
    **config_fields
        Fields of `kvz.CacheConfig`, such as `store_precision`.

    Raises
    ------
    UnsupportedError
        The model wants a cache that kvz cannot be, or computes attention on its own; or
        `max_kv_size` was given, which would forget the middle of a text.
    """
    if config_fields.pop("max_kv_size", None) is not None:
        raise UnsupportedError(
            "max_kv_size: rotating caches are not supported; leave it out, and limit the bytes of "
            "all layers by pool=kvz.BufferPool(max_bytes=...)"
        )
    wanted = mlx_cache.make_prompt_cache(model)
    kinds = sorted({type(one).__name__ for one in wanted} - {"KVCache", "RotatingKVCache"})
    if kinds:
        raise UnsupportedError(f"model: it wants caches of the kind {', '.join(kinds)}")
    if any(getattr(one, "keep", 0) for one in wanted):
        raise UnsupportedError("model: it wants caches that keep the first tokens of a window")
    fields = {"num_kv_heads": 1, "head_dim": 1, "max_tokens": _TOKENS_MAX, **config_fields}
    made = [
        KvzPromptCache(config, getattr(one, "max_size", None), pool, core)
        for one, config in zip(wanted, layer_configs(len(wanted), preset, **fields), strict=True)
    ]
    _switch_attention(model)
    return made


def _switch_attention(model: Any) -> None:
    """Put our attention under its name into the modules that the model is made of."""
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    ours = [module for module in modules if hasattr(module, _NAME) and module is not base]
    if not ours:
        raise UnsupportedError(f"model: none of its modules calls {_NAME}")
    for module in ours:
        _switch(module)


def _switch(module: ModuleType) -> None:
    theirs: Callable[..., mx.array] = getattr(module, _NAME)
    if getattr(theirs, "of_kvz", False):
        return

    def attention(queries: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> mx.array:
        if isinstance(keys, PackedStates):
            return _attention(queries, keys, *args, **kwargs)
        return theirs(queries, keys, values, *args, **kwargs)

    attention.of_kvz = True  # type: ignore[attr-defined]
    setattr(module, _NAME, attention)


def _attention(
    queries: mx.array,
    keys: PackedStates,
    cache: Any = None,
    scale: float = 1.0,
    mask: Any = None,
    sinks: Any = None,
) -> mx.array:
    """Attend with the arguments of mlx-lm's own function."""
    return keys.cache.attend(queries, scale, mask, sinks)


def _mask_of(mask: mx.array) -> Any:
    """Bring a mask to (batch or 1, heads or 1, queries, keys) in numpy."""
    array = np.array(mask if mask.dtype == mx.bool_ else mask.astype(mx.float32))
    return array.reshape((1,) * (4 - array.ndim) + array.shape)
