"""The cache without a store: everything stays as it came, in pages. Calls _persist.py, pool.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kvz._persist import PersistentCache
from kvz.arrays import Floats, as_count, as_float32
from kvz.config import CacheConfig
from kvz.errors import ConfigError, InvalidArgumentError, InvalidTypeError
from kvz.pool import BufferPool, PooledBuffer, PoolStats
from kvz.stats import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledCacheStats:
    """Tokens and bytes of a `PooledCache` at one moment.

    Attributes
    ----------
    total_tokens, sink_tokens, next_position, evicted_tokens : int
        As in `CacheStats`.
    tokens_per_block : int
    block_count : int
        Runs of `tokens_per_block` tokens that hold what is not a sink.
    total_bytes : int
        Bytes of all pages as allocated.
    shared_bytes : int
        Those of them that are in pages which forks and open transactions hold too.
    overhead_bytes : int
        Page tables and the cache object, besides the pages.
    pool_stats : PoolStats
    """

    total_tokens: int = 0
    sink_tokens: int = 0
    next_position: int = 0
    evicted_tokens: int = 0
    tokens_per_block: int = 0
    block_count: int = 0
    total_bytes: int = 0
    shared_bytes: int = 0
    overhead_bytes: int = 0
    pool_stats: PoolStats = field(default_factory=PoolStats)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


class PooledCache(PersistentCache):
    """A KV cache of one sequence and one layer that packs nothing.

    All tokens stay at `tail_precision`, in blocks of the pool. `max_tokens` is exact to the token
    here too, and the first `sink_tokens` never leave.

    Parameters
    ----------
    config : CacheConfig, optional
        `tail_length`, `store_precision`, `warm_precision`, `migration_batch` and `rotation` have
        no effect; `warm_length` must be 0.
    pool : BufferPool, optional
    tokens_per_block : int
        Tokens per page of one head.
    core : {"native", "wasm"}, optional
    **config_fields
        Fields of `CacheConfig`, instead of `config` or to change it.

    Examples
    --------
    >>> import numpy as np
    >>> cache = PooledCache(num_kv_heads=1, head_dim=64, tokens_per_block=32)
    >>> cache.append(np.ones((100, 1, 64)), np.ones((100, 1, 64)))
    >>> cache
    PooledCache(1 head x 64, 100 tokens: f16 in 4 blocks of 32, 32.0 KiB)
    """

    _kind = "pooled"

    def __init__(
        self,
        config: CacheConfig | None = None,
        pool: BufferPool | None = None,
        tokens_per_block: int = 64,
        *,
        core: str | None = None,
        **config_fields: Any,
    ) -> None:
        if config is None:  # what has no effect here need not fit into max_tokens
            config_fields = {"tail_length": 0, "migration_batch": 1, **config_fields}
        super().__init__(config, pool, core, config_fields, tokens_per_block)

    def _configure(self, config: CacheConfig) -> None:
        if config.warm_length:
            raise ConfigError(
                f"warm_length: expected 0, as a PooledCache has one tier, got {config.warm_length}"
            )
        super()._configure(config)

    @classmethod
    def _make(
        cls,
        config: CacheConfig,
        tokens_per_block: int,
        pool: BufferPool | None,
        core: str | None,
    ) -> PooledCache:
        return cls(config, pool, tokens_per_block, core=core)

    @property
    def tokens_per_block(self) -> int:
        """Tokens per page of one head."""
        return self._tokens_per_block

    def stats(self) -> PooledCacheStats:
        """Return what is held, all of one moment; the pool's part may be of a later one."""
        with self._lock:
            now, shared = self._core_stats(), self._shared_bytes()
        # Blocks are aligned to position 0, so the first and the last may be partly used.
        first = now.next_position - (now.total_tokens - now.sink_tokens)
        size = self._tokens_per_block
        blocks = -(-now.next_position // size) - first // size if now.next_position > first else 0
        return PooledCacheStats(
            total_tokens=now.total_tokens,
            sink_tokens=now.sink_tokens,
            next_position=now.next_position,
            evicted_tokens=now.evicted_tokens,
            tokens_per_block=size,
            block_count=blocks,
            total_bytes=now.sink_bytes + now.store_bytes + now.tail_bytes,
            shared_bytes=shared,
            overhead_bytes=now.overhead_bytes,
            pool_stats=self.pool_stats(),
        )

    def __repr__(self) -> str:
        if self.closed:
            return "PooledCache(closed)"
        now, precision = self.stats(), self._config.tail_precision
        sinks = f"{now.sink_tokens} sinks + " if now.sink_tokens else ""
        return (
            f"PooledCache({self._shape_text()}, {now.total_tokens} tokens: {sinks}{precision} in "
            f"{now.block_count} blocks of {now.tokens_per_block}, {format_bytes(now.total_bytes)})"
        )


_BYTES_MAX = (1 << 63) - 1  # no pool has that many, and says so


class PooledBlock:
    """Float32 keys and values of a few tokens, in two buffers of a pool.

    Parameters
    ----------
    pool : BufferPool
    max_tokens : int
        Tokens that fit, whatever the size class of the buffers.
    num_kv_heads, head_dim : int
    value_dim : int, optional
        `head_dim` by default.

    Examples
    --------
    >>> import numpy as np
    >>> block = PooledBlock(BufferPool(), 4, num_kv_heads=2, head_dim=8)
    >>> block.append(np.ones((6, 2, 8)), np.ones((6, 2, 8)))
    4
    >>> block
    PooledBlock(4 of 4 tokens, 2 heads x 8)
    """

    def __init__(
        self,
        pool: BufferPool,
        max_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
    ) -> None:
        if not isinstance(pool, BufferPool):
            raise InvalidTypeError(f"pool: expected a BufferPool, got {type(pool).__name__}")
        self._max_tokens = as_count(max_tokens, "max_tokens", 1)
        heads, key_dim = (
            as_count(num_kv_heads, "num_kv_heads", 1),
            as_count(head_dim, "head_dim", 1),
        )
        dim = key_dim if value_dim is None else as_count(value_dim, "value_dim", 1)
        self._buffers: list[PooledBuffer] = []
        self._rows: list[Floats] = []
        for shape in ((self._max_tokens, heads, key_dim), (self._max_tokens, heads, dim)):
            count = int(np.prod(shape, dtype=object))
            buffer = pool.acquire_for_size(min(count * 4, _BYTES_MAX))
            self._buffers.append(buffer)
            self._rows.append(buffer.view(np.float32)[:count].reshape(shape))
        self._token_count = 0

    def append(self, keys: Any, values: Any) -> int:
        """Take as many tokens as fit.

        Parameters
        ----------
        keys, values : (T, H, D) and (T, H, Dv), or flat (T, H*D) and (T, H*Dv)

        Returns
        -------
        int
            How many of the T tokens were taken.
        """
        k, v = self._tokens(keys, "keys", 0), self._tokens(values, "values", 1)
        if len(k) != len(v):
            raise InvalidArgumentError(
                f"values: expected as many tokens as keys, {len(k)}, got {len(v)}"
            )
        start = self._token_count
        taken = min(len(k), self.remaining_tokens)
        for rows, given in zip(self._rows, (k, v), strict=True):
            rows[start : start + taken] = given[:taken]
        self._token_count += taken
        return taken

    def _tokens(self, given: Any, what: str, which: int) -> Floats:
        array = as_float32(given, what)
        heads, dim = self._held(which).shape[1:]
        if array.shape[1:] not in ((heads, dim), (heads * dim,)):
            raise InvalidArgumentError(
                f"{what}: expected shape (T, {heads}, {dim}) or (T, {heads * dim}), "
                f"got {array.shape}"
            )
        if not np.isfinite(array).all():
            raise InvalidArgumentError(f"{what}: expected finite numbers")
        return array.reshape(-1, heads, dim)

    def _held(self, which: int) -> Floats:
        if not self._rows:
            raise InvalidArgumentError("this PooledBlock was released")
        return self._rows[which]

    @property
    def keys(self) -> Floats:
        """A view of the keys held: (token_count, H, D) float32."""
        return self._held(0)[: self._token_count]

    @property
    def values(self) -> Floats:
        """A view of the values held: (token_count, H, Dv) float32."""
        return self._held(1)[: self._token_count]

    @property
    def token_count(self) -> int:
        """Tokens held."""
        return self._token_count

    @property
    def remaining_tokens(self) -> int:
        """Tokens that still fit."""
        return self._max_tokens - self._token_count

    @property
    def is_full(self) -> bool:
        """Whether no token fits any more."""
        return not self.remaining_tokens

    def clear(self) -> None:
        """Hold no tokens; the buffers stay."""
        self._token_count = 0

    def release(self) -> None:
        """Give the buffers back to the pool; the block cannot be used afterwards."""
        self._token_count = self._max_tokens = 0
        self._rows.clear()
        self._buffers.clear()

    def __len__(self) -> int:
        return self._token_count

    def __repr__(self) -> str:
        if not self._rows:
            return "PooledBlock(released)"
        heads, dim = self._rows[0].shape[1:]
        return (
            f"PooledBlock({self._token_count} of {self._max_tokens} tokens, "
            f"{heads} head{'s' * (heads > 1)} x {dim})"
        )
