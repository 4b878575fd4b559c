"""What a cache is, whatever is done with it: its configuration, its owner in the core, its counts.

Called by _cache.py; calls pool.py and _core.py.
"""

from __future__ import annotations

import ctypes
import math
import threading
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvz._closing import Closing
from kvz._core import Core, Handle, load
from kvz.arrays import as_count
from kvz.config import CacheConfig
from kvz.errors import InvalidArgumentError, InvalidTypeError
from kvz.pool import BufferPool, PoolStats, default_pool
from kvz.transaction import Saved, Transaction

_WHOLE = (1 << 64) - 1  # the length of a fork that has all tokens

Self = TypeVar("Self", bound="CacheState")


class CacheState(Closing):
    """Owns one cache of the core. The base of both caches; not for direct use."""

    _kind = ""  # of abi.CacheKind
    _policy: Any = None

    def __init__(
        self,
        config: CacheConfig | None,
        pool: BufferPool | None,
        core: str | None,
        config_fields: dict[str, Any],
        tokens_per_block: int = 64,
    ) -> None:
        if config is not None and not isinstance(config, CacheConfig):
            raise InvalidTypeError(f"config: expected a CacheConfig, got {type(config).__name__}")
        if pool is not None and not isinstance(pool, BufferPool):
            raise InvalidTypeError(f"pool: expected a BufferPool, got {type(pool).__name__}")
        if config is None:
            config = CacheConfig(**config_fields)
        elif config_fields:
            config = replace(config, **config_fields)
        self._core: Core = load(core if core is not None or pool is None else pool.core)
        if pool is not None and pool.core != self._core.name:
            raise InvalidArgumentError(
                f"pool: expected memory of the {self._core.name} core, got {pool.core}"
            )
        self._pool = default_pool(self._core.name) if pool is None else pool
        self._tokens_per_block = as_count(tokens_per_block, "tokens_per_block", 1)
        # Appends, and the readers that need more than one call of the core.
        self._lock = threading.RLock()
        self._direct = self._core.shares_memory
        self._core_append = self._core.cache_append
        self._core_attend = self._core.cache_attend
        self._configure(config)

    def _configure(self, config: CacheConfig) -> None:
        """Make the cache in the core, empty."""
        core = self._core
        self._heads, self._head_dim = config.num_kv_heads, config.head_dim
        self._value_dim = config.value_dim or config.head_dim
        self._scale = 1 / math.sqrt(self._head_dim)
        self._token = (self._heads, self._head_dim), (self._heads, self._value_dim)
        given = config_struct(core, config, self._kind, self._tokens_per_block)
        with self._pool._handle as pool, core.frame() as frame:
            pointer = core.create("cache_new", frame.ref(given), pool)
        self._handle = Handle(type(self).__name__, pointer, core.cache_free)
        self._config = config

    def trim(self, n: int) -> int:
        """Take back the `n` newest tokens, or all there are.

        What stays keeps its bits and its tier: a token that was packed is not unpacked, and one
        that was evicted does not come back. So an append that is trimmed leaves no trace if it made
        nothing migrate and evicted nothing; where it must never leave one, use `transaction`.
        After a trim the tail may be shorter than `tail_length`, until enough tokens follow.

        Returns
        -------
        int
            How many tokens were removed.
        """
        count, removed = as_count(n, "n"), ctypes.c_uint64()
        with self._lock, self._handle as pointer, self._core.frame() as frame:
            self._core.check(self._core.cache_trim(pointer, count, frame.ref(removed)))
        return removed.value

    def _cut(self, length: int) -> None:
        """Take back the tokens from position `length` on."""
        with self._lock, self._handle as pointer, self._core.frame():
            self._core.check(self._core.cache_cut(pointer, length))

    def clear(self) -> None:
        """Forget everything and give the pages back; the next token has position 0."""
        with self._lock, self._handle as pointer, self._core.frame():
            self._core.check(self._core.cache_clear(pointer))

    def fork(self: Self, length: int | None = None) -> Self:
        """Return another cache of the same tokens, which from now on goes its own way.

        The two share their pages, whatever their number and precision. Who appends first writes
        on where the tokens end; who appends after that copies the one page of every head that
        would differ. The pool counts shared pages once. A fork may be forked, and outlive the
        cache it was made of.

        Parameters
        ----------
        length : int, optional
            Take only the tokens at positions below this, as `trim` would leave them; by default
            all.

        Returns
        -------
        TwoTierCache or PooledCache

        Raises
        ------
        InvalidArgumentError
            `length` lies beyond the next position, or in the gap that eviction left.

        Examples
        --------
        >>> import kvz, numpy as np
        >>> cache = kvz.TwoTierCache(num_kv_heads=1, head_dim=64)
        >>> cache.append(np.ones((100, 1, 64)), np.ones((100, 1, 64)))
        >>> other = cache.fork(length=70)
        >>> len(cache), len(other), cache.stats().own_bytes
        (100, 70, 0)
        """
        count = _WHOLE if length is None else as_count(length, "length")
        with self._lock:
            handle = self._fork(count)
            other = object.__new__(type(self))
            other.__dict__.update(self.__dict__)
        other._handle = handle
        other._lock = threading.RLock()
        return other

    def _fork(self, length: int) -> Handle:
        """Fork in the core."""
        core = self._core
        with self._handle as pointer:
            made = core.create("cache_fork", pointer, length)
        return Handle(type(self).__name__, made, core.cache_free)

    def transaction(self) -> Transaction:
        """Begin something that may be undone without a trace, as a draft of tokens.

        Returns
        -------
        Transaction
            To be used with ``with``: it rolls back on an exception, or when its `rollback` is
            called.
        """
        return Transaction(self)

    def _save(self) -> Saved:
        """Keep the present state, for `_restore`."""
        with self._lock:
            return Saved(self, self._fork(_WHOLE), self._config, self._policy)

    def _restore(self, saved: Saved) -> None:
        """Become what this cache was when `saved` was made."""
        with self._lock, saved.handle as source:
            if self._config is not saved.config and not self.closed:
                self._configure(saved.config)
            with self._handle as pointer:
                status = self._core.cache_restore(pointer, source)
                if status:
                    self._core.check(status)
            self._policy = saved.policy

    def _shared_bytes(self) -> int:
        """Bytes of the pages that forks hold too."""
        out = ctypes.c_uint64()
        with self._handle as pointer, self._core.frame() as frame:
            self._core.check(self._core.cache_shared_bytes(pointer, frame.ref(out)))
        return out.value

    def _core_stats(self) -> Any:
        """Return abi.CacheStats, all of one moment."""
        out = self._core.new("CacheStats")
        with self._handle as pointer, self._core.frame() as frame:
            self._core.check(self._core.cache_stats(pointer, frame.ref(out)))
        return out

    def __len__(self) -> int:
        """Return the number of tokens held."""
        return int(self._core_stats().total_tokens)

    @property
    def next_position(self) -> int:
        """The position that the next token will have."""
        return int(self._core_stats().next_position)

    @property
    def positions(self) -> NDArray[np.int64]:
        """The positions of the tokens held, oldest first: (T,) int64."""
        runs = [np.arange(start, stop, dtype=np.int64) for start, stop in self._runs()]
        return np.concatenate(runs) if runs else np.zeros(0, np.int64)

    def _runs(self) -> list[tuple[int, int]]:
        """Return the ranges of positions held, in order and apart from each other."""
        joined: list[tuple[int, int]] = []
        for start, stop in self._ranges(self._core.cache_runs):
            if joined and joined[-1][1] == start:
                joined[-1] = joined[-1][0], stop
            elif start < stop:
                joined.append((start, stop))
        return joined

    def _ranges(self, function: Any) -> list[tuple[int, int]]:
        """Ask the core for ranges of which it alone knows how many there are."""
        count, capacity = ctypes.c_uint64(4), 0
        with self._lock, self._handle as pointer:  # no append may come in between
            while count.value > capacity:
                capacity = count.value
                out = np.zeros((capacity, 2), np.uint64)
                with self._core.frame() as frame:
                    target = frame.out(out.ctypes.data, out.nbytes)
                    self._core.check(function(pointer, target, capacity, frame.ref(count)))
        return [(int(start), int(stop)) for start, stop in out[: count.value]]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held, with the slots not yet filled."""
        now = self._core_stats()
        return int(now.sink_bytes + now.store_bytes + now.warm_bytes + now.tail_bytes)

    @property
    def config(self) -> CacheConfig:
        """What the cache was made with."""
        return self._config

    @property
    def core(self) -> str:
        """The name of the core that the cache lives in."""
        return self._core.name

    @property
    def memory_pool(self) -> BufferPool:
        """The pool that the pages come from."""
        return self._pool

    def pool_stats(self) -> PoolStats:
        """Return the counters of the pool."""
        return self._pool.stats()

    def check(self) -> None:
        """Verify every invariant of the state.

        Raises
        ------
        CorruptError
            One does not hold; please report it.
        """
        with self._handle as pointer, self._core.frame():
            self._core.check(self._core.cache_check(pointer))

    def digest(self) -> str:
        """Return a hash of the state as 16 hex digits: equal digests mean equal bits.

        It does not depend on the core, the kernels, or how the stream was cut into appends.
        """
        out = ctypes.c_uint64()
        with self._handle as pointer, self._core.frame() as frame:
            self._core.check(self._core.cache_digest(pointer, frame.ref(out)))
        return f"{out.value:016x}"

    def close(self) -> None:
        """Give the memory back. Any later use but `close` raises `ClosedError`."""
        self._handle.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._handle.pointer

    def _shape_text(self) -> str:
        """Return "8 heads x 128", for the repr."""
        dims = f"{self._head_dim}"
        if self._value_dim != self._head_dim:
            dims += f"/{self._value_dim}"
        return f"{self._heads} head{'s' * (self._heads > 1)} x {dims}"


def config_struct(core: Core, config: CacheConfig, kind: str, tokens_per_block: int) -> Any:
    """Make an abi.CacheConfig; `kind` is one of abi.CacheKind."""
    formats = core.enums["Format"]
    return core.new(
        "CacheConfig",
        kind=core.enums["CacheKind"][kind],
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        value_dim=config.value_dim or config.head_dim,
        tail_format=formats[str(config.tail_precision)],
        key_format=formats[str(config.key_precision)],
        value_format=formats[str(config.value_precision)],
        max_tokens=config.max_tokens,
        tail_length=config.tail_length,
        migration_batch=config.migration_batch,
        sink_tokens=config.sink_tokens,
        tokens_per_block=tokens_per_block,
        rotation=core.enums["Rotation"][config.rotation],
        warm_format=formats[str(config.warm_precision)],
        warm_length=config.warm_length,
    )
