"""Transactions: tokens that may be taken back without a trace. Made by _state.py and model.py."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from kvz.errors import ClosedError

if TYPE_CHECKING:
    from kvz._core import Handle
    from kvz._state import CacheState
    from kvz.config import CacheConfig


class Saved(NamedTuple):
    """The state of a cache at one moment, held by a fork in the core."""

    cache: CacheState
    handle: Handle
    config: CacheConfig
    policy: Any


class Transaction:
    """Remembers the states of caches, and gives them back. Returned by ``cache.transaction()``.

    Used with ``with``: when the block ends, what was done in it stays; when it ends by an
    exception, or by `rollback`, the caches are to the bit what they were when it began: appended
    tokens are gone, and what they displaced (batches that migrated, tokens that were evicted,
    trimmed or cleared) is back. Nothing is copied for that but pages that a change would overwrite.

    Transactions nest. They do not hide anything: other threads see each change at once, and what
    they append meanwhile is rolled back with the rest. While a transaction is open it holds on to
    the pages of its state, so pages that a window gives up return to the pool only at its end.

    Examples
    --------
    A draft of which a model accepts the first 3 tokens:

    >>> import kvz, numpy as np
    >>> cache = kvz.TwoTierCache(num_kv_heads=1, head_dim=64)
    >>> cache.append(np.ones((500, 1, 64)), np.ones((500, 1, 64)))
    >>> draft = np.ones((8, 1, 64), np.float32)
    >>> with cache.transaction() as step:
    ...     cache.append(draft, draft)
    ...     scores = cache.attend(np.ones((8, 4, 64)))  # judge the draft
    ...     step.rollback()
    ...     cache.append(draft[:3], draft[:3])
    >>> len(cache)
    503
    """

    __slots__ = ("_open", "_saved")

    def __init__(self, *caches: CacheState) -> None:
        self._saved = [cache._save() for cache in caches]
        self._open = True

    def rollback(self) -> None:
        """Make the caches what they were when the transaction began. It goes on: do what you like.

        Raises
        ------
        ClosedError
            The transaction has ended, or one of the caches was closed.
        """
        if not self._open:
            raise ClosedError("this transaction has ended")
        for saved in self._saved:
            saved.cache._restore(saved)

    def close(self) -> None:
        """End the transaction; what was done since it began, or since `rollback`, stays."""
        self._open = False
        for saved in self._saved:
            saved.handle.close()
        self._saved = []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                for saved in self._saved:
                    if not saved.cache.closed:
                        saved.cache._restore(saved)
        finally:
            self.close()
