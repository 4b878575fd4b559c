"""Who stays when a cache is full: pins, and eviction by a policy of one's own.

Called by _cache.py; calls _state.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvz._attend import put
from kvz._state import CacheState
from kvz.arrays import as_count
from kvz.errors import InvalidArgumentError, InvalidTypeError


class EvictingCache(CacheState):
    """Pins and evictions. The base of both caches; not for direct use."""

    def pin(self, start: int, stop: int) -> None:
        """Never evict the positions `start` to `stop` - 1, as those of a system prompt.

        A full cache then evicts the oldest tokens that are not pinned. Pinned tokens are packed
        like others; only sinks stay exact. Positions may be yet to come.

        Raises
        ------
        InvalidArgumentError
            Some of these positions were evicted, or so many are pinned that, with the sinks and
            the longest tail, `max_tokens` leaves no token to evict.

        Examples
        --------
        >>> import kvz, numpy as np
        >>> cache = kvz.TwoTierCache(head_dim=64, num_kv_heads=1, max_tokens=512)
        >>> cache.pin(0, 40)
        >>> cache.append(np.ones((2000, 1, 64)), np.ones((2000, 1, 64)))
        >>> len(cache), cache.positions[38:42].tolist()
        (512, [38, 39, 1528, 1529])
        """
        first, last = as_count(start, "start"), as_count(stop, "stop")
        with self._lock, self._handle as pointer, self._core.frame():
            self._core.check(self._core.cache_pin(pointer, first, last))

    def unpin(self, start: int, stop: int) -> None:
        """Undo `pin` for the positions `start` to `stop` - 1: they are evicted in their turn."""
        first, last = as_count(start, "start"), as_count(stop, "stop")
        with self._lock, self._handle as pointer, self._core.frame():
            self._core.check(self._core.cache_unpin(pointer, first, last))

    @property
    def pinned(self) -> list[tuple[int, int]]:
        """The pinned ranges (start, stop), in order."""
        return self._ranges(self._core.cache_pins)

    def evict(self, positions: Any) -> int:
        """Evict the tokens at these positions, all or, if one may not go, none.

        Those that may go are `evictable`. What stays keeps its bits and its position. Pages return
        to the pool when none of their 64 tokens is left, and attention is fast where tokens stay
        in runs: best evict whole pages.

        Parameters
        ----------
        positions : array of int
            In any order.

        Returns
        -------
        int
            How many tokens went.

        Raises
        ------
        InvalidArgumentError
            A position is not evictable.
        """
        array = np.unique(np.asarray(positions))
        if array.size and array.dtype.kind not in "iu":
            raise InvalidTypeError(f"positions: expected integers, got {array.dtype}")
        if array.size and array[0] < 0:
            raise InvalidArgumentError(f"positions: expected 0 or more, got {array[0]}")
        ranges = np.ascontiguousarray(_ranges_of(array.astype(np.uint64)))
        with self._lock, self._handle as pointer, self._core.frame() as frame:
            status = self._core.cache_evict(pointer, put(frame, ranges), len(ranges))
            self._core.check(status)
        return len(array)

    @property
    def evictable(self) -> NDArray[np.int64]:
        """The positions that `evict` takes, oldest first: packed, and not pinned.

        Of a `PooledCache`, which packs nothing: all but sinks and pinned ones.
        """
        with self._lock:
            positions, now = self.positions, self._core_stats()
            pinned = self.pinned
        if now.store_tokens or self._kind == "two_tier":
            positions = positions[: now.sink_tokens + now.store_tokens]
        positions = positions[now.sink_tokens :]
        for start, stop in pinned:
            positions = positions[(positions < start) | (positions >= stop)]
        return positions


def _ranges_of(positions: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the runs of sorted positions: (runs, 2), start and stop."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    runs = np.split(positions, breaks) if len(positions) else []
    return np.array([(run[0], run[-1] + np.uint64(1)) for run in runs], np.uint64).reshape(-1, 2)
