"""The two-tier cache: the newest tokens as they came, older ones packed. Calls _persist.py."""

from __future__ import annotations

import ctypes
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvz._persist import PersistentCache
from kvz._state import config_struct
from kvz.arrays import address_of, as_count, as_float32, as_number
from kvz.config import CacheConfig, CacheTier, HighPrecisionTail, Hybrid, Policy, QuantizedStore
from kvz.errors import InvalidArgumentError, InvalidTypeError
from kvz.html import stats_html
from kvz.pool import BufferPool
from kvz.quality import CacheQuality
from kvz.stats import CacheStats, format_bytes


class TwoTierCache(PersistentCache):
    """A KV cache of one sequence and one layer.

    The newest tokens (the tail) and the first ones (the sinks) stay at `tail_precision`. Older
    tokens move in batches to the store, packed at `store_precision`, where `warm_length` is given
    through a warm tier of so many tokens at `warm_precision`. Attention reads the packed
    bytes. Methods may be called from several threads: readers never see half an append.

    Parameters
    ----------
    config : CacheConfig, optional
    pool : BufferPool, optional
        Where the memory comes from; by default one pool per process and core.
    core : {"native", "wasm"}, optional
        By default the pool's, else what KVZ_CORE says, else "native".
    **config_fields
        Fields of `CacheConfig`, instead of `config` or to change it.

    Examples
    --------
    >>> import numpy as np
    >>> cache = TwoTierCache(num_kv_heads=2, head_dim=64, tail_length=64)
    >>> rng = np.random.default_rng(0)
    >>> cache.append(rng.standard_normal((500, 2, 64)), rng.standard_normal((500, 2, 64)))
    >>> cache
    TwoTierCache(2 heads x 64, 500 tokens: 384 q4 + 116 f16, 118.0 KiB, 7.6 bits/value)
    >>> cache.attend(np.ones((8, 64), np.float32)).shape  # 4 query heads per head
    (8, 64)
    >>> cache.trim(10), len(cache)
    (10, 490)
    """

    _kind = "two_tier"

    def __init__(
        self,
        config: CacheConfig | None = None,
        *,
        pool: BufferPool | None = None,
        core: str | None = None,
        **config_fields: Any,
    ) -> None:
        super().__init__(config, pool, core, config_fields)
        self._policy = self._policy_of(self._config)

    @classmethod
    def _make(
        cls,
        config: CacheConfig,
        tokens_per_block: int,
        pool: BufferPool | None,
        core: str | None,
    ) -> TwoTierCache:
        return cls(config, pool=pool, core=core)

    @staticmethod
    def _policy_of(config: CacheConfig) -> Policy:
        return Hybrid(
            tail_length=config.tail_length,
            tail_precision=config.tail_precision,
            store_precision=config.store_precision,
        )

    def stats(self) -> CacheStats:
        """Return what is held, all of one moment."""
        with self._lock:
            now, shared = self._core_stats(), self._shared_bytes()
        nbytes = now.sink_bytes + now.store_bytes + now.warm_bytes + now.tail_bytes
        values = now.total_tokens * self._heads * (self._head_dim + self._value_dim)
        plain = now.total_tokens * self._config.tail_bytes_per_token
        return CacheStats(
            total_tokens=now.total_tokens,
            sink_tokens=now.sink_tokens,
            store_tokens=now.store_tokens,
            warm_tokens=now.warm_tokens,
            tail_tokens=now.tail_tokens,
            next_position=now.next_position,
            evicted_tokens=now.evicted_tokens,
            migrated_tokens=now.migrated_tokens,
            sink_bytes=now.sink_bytes,
            store_bytes=now.store_bytes,
            warm_bytes=now.warm_bytes,
            tail_bytes=now.tail_bytes,
            shared_bytes=shared,
            overhead_bytes=now.overhead_bytes,
            page_count=now.page_count,
            compression_ratio=plain / nbytes if nbytes and plain else 1.0,
            bits_per_value=nbytes * 8 / values if values else 0.0,
        )

    def tier_of(self, position: int) -> CacheTier:
        """Tell where the token at a position is: hot in sinks and tail, warm, or cold in the store.

        Raises
        ------
        InvalidArgumentError
            The position was evicted, or is yet to come.

        Examples
        --------
        >>> import numpy as np
        >>> cache = TwoTierCache(num_kv_heads=1, head_dim=64, tail_length=64, warm_length=128)
        >>> cache.append(np.ones((500, 1, 64)), np.ones((500, 1, 64)))
        >>> [str(cache.tier_of(position)) for position in (0, 300, 499)]
        ['cold', 'warm', 'hot']
        """
        wanted = as_count(position, "position")
        runs = self._ranges(self._core.cache_runs)
        for index, (start, stop) in enumerate(runs):
            if start <= wanted < stop:
                if index == len(runs) - 2:
                    return CacheTier.WARM
                return CacheTier.HOT if index in (0, len(runs) - 1) else CacheTier.COLD
        raise InvalidArgumentError(f"position: expected one that is held, got {wanted}")

    def tail_view(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return a read-only snapshot of the tail: later appends do not show in it.

        Returns
        -------
        keys, values : (tail tokens, H, D) and (tail tokens, H, Dv)
            float16 or float32, as `tail_precision` says; bfloat16 comes as float32.
        """
        with self._lock:
            now = self._core_stats()
            pair = self._get(now.total_tokens - now.tail_tokens, now.tail_tokens)
        half = self._config.tail_precision == "f16"
        views = tuple(x.astype(np.float16) if half else x for x in pair)
        for view in views:
            view.flags.writeable = False
        return views[0], views[1]

    @property
    def policy(self) -> Policy:
        """The policy given last, or a `Hybrid` of the configuration."""
        policy: Policy = self._policy
        return policy

    def update_policy(self, policy: Policy) -> None:
        """Change tail, store or warm tier, of what is held and of what comes after.

        Every token goes where the new configuration puts it, as in a stream of this length. Where
        its precision there is the one that it had, it keeps its bits; else it is decoded and
        encoded anew. So precision that is lost does not come back: q4 made q8 is q4 still, in more
        bytes. Tokens behind the window, which eviction has passed, stay with the store.

        All pages are there before any is given up: at the peak, a tier that changes takes its old
        bytes and its new ones. Tiers that keep their precision share their pages where they do not
        grow; a shorter tail alone takes no more than the tokens that migrate.

        Parameters
        ----------
        policy : HighPrecisionTail, QuantizedStore or Hybrid

        Raises
        ------
        ConfigError
            The policy does not fit the configuration.
        InvalidArgumentError
            It leaves no room beside pinned tokens.
        NotRepresentableError
            A value that is held is too large for the new precisions.
        PoolExhaustedError
            The pool has no room.

            Nothing has changed then.

        Examples
        --------
        >>> import kvz, numpy as np
        >>> cache = kvz.TwoTierCache(num_kv_heads=1, head_dim=64, store_precision="q8")
        >>> cache.append(np.ones((2000, 1, 64)), np.ones((2000, 1, 64)))
        >>> before = cache.nbytes
        >>> cache.update_policy(kvz.QuantizedStore(precision="q4"))
        >>> cache
        TwoTierCache(1 head x 64, 2000 tokens: 1728 q4 + 272 f16, 201.5 KiB, 6.4 bits/value)
        >>> cache.nbytes < before
        True
        """
        if not isinstance(policy, (HighPrecisionTail, QuantizedStore, Hybrid)):
            raise InvalidTypeError(
                f"policy: expected HighPrecisionTail, QuantizedStore or Hybrid, got {policy!r}"
            )
        with self._lock:
            config, core = policy.apply(self._config), self._core
            given = config_struct(core, config, self._kind, self._tokens_per_block)
            with self._handle as pointer, core.frame() as frame:
                core.check(core.cache_convert(pointer, frame.ref(given)))
            self._config, self._policy = config, policy

    def quality(
        self, query: Any = None, scale: float | None = None, *, tokens: int = 64
    ) -> CacheQuality:
        """Measure what the store is going to make of tokens that are still exact.

        The oldest ones of the tail, which leave it next, are packed in working memory as they will
        be in the store, and compared with what they are. Nothing changes. The cost is that
        of packing so many tokens, and does not grow with the cache; docs/numerics.md has figures.

        Parameters
        ----------
        query : (Hq, D) or (N, Hq, D) array of floats, optional
            Of tokens, such as those that were last given to `attend`: to measure logits.
        scale : float, by default 1 / sqrt(D)
        tokens : int
            How many tokens to measure, 64 at most.

        Returns
        -------
        CacheQuality

        Examples
        --------
        >>> import numpy as np
        >>> cache = TwoTierCache(num_kv_heads=2, head_dim=64)
        >>> rng = np.random.default_rng(0)
        >>> cache.append(rng.standard_normal((500, 2, 64)), rng.standard_normal((500, 2, 64)))
        >>> cache.quality()
        CacheQuality(64 tokens on the way to q4, worst head: keys 8.7 %, values 8.7 %)
        >>> cache.quality(rng.standard_normal((8, 64))).logits.shape
        (2,)
        """
        count = as_count(tokens, "tokens", 1)
        factor = self._scale if scale is None else as_number(scale, "scale")
        rows = np.zeros((0, self._heads, self._head_dim), np.float32)
        if query is not None:
            rows = as_float32(query, "query")
            shape = rows.shape
            if not 1 < rows.ndim < 4 or shape[-1] != self._head_dim or shape[-2] % self._heads:
                raise self._query_error(shape)
            if not rows.size:
                raise self._query_error(shape)
            rows = rows.reshape(-1, *shape[-2:])
        errors, measured = np.empty((self._heads, 4)), ctypes.c_uint64()
        with self._handle as pointer, self._core.frame() as frame:
            status = self._core.cache_quality(
                pointer,
                frame.put(address_of(rows), rows.nbytes) if len(rows) else 0,
                len(rows),
                rows.shape[-2],
                factor,
                count,
                frame.out(address_of(errors), errors.nbytes),
                frame.ref(measured),
            )
            self._core.check(status)
        if not measured.value:
            errors[:] = np.nan
        found = errors.T.copy()
        stored = dict.fromkeys((self._config.key_precision, self._config.value_precision))
        return CacheQuality(
            tokens=measured.value,
            precision="/".join(map(str, stored)),
            keys=found[0],
            values=found[1],
            logits=found[2] if len(rows) else None,
            logit_rms=found[3] if len(rows) else None,
        )

    def _repr_html_(self) -> str:
        """Show a bar of the tiers in a notebook."""
        if self.closed:
            return escape(repr(self))
        stored = {self._config.key_precision: 0, self._config.value_precision: 0}
        names = {
            "sinks": f"sinks, {self._config.tail_precision}",
            "store": f"store, {'/'.join(map(str, stored))}",
            "warm": f"warm, {self._config.warm_precision}",
            "tail": f"tail, {self._config.tail_precision}",
        }
        return stats_html(self.stats(), f"TwoTierCache, {self._shape_text()}", names)

    def __repr__(self) -> str:
        if self.closed:
            return "TwoTierCache(closed)"
        now, config = self.stats(), self._config
        stored = str(config.key_precision)
        if config.value_precision != config.key_precision:
            stored += f"/{config.value_precision}"
        tiers = [f"{now.sink_tokens} {config.tail_precision} sinks"] if now.sink_tokens else []
        tiers += [f"{now.store_tokens} {stored}"]
        tiers += [f"{now.warm_tokens} {config.warm_precision}"] if config.warm_length else []
        tiers += [f"{now.tail_tokens} {config.tail_precision}"]
        return (
            f"TwoTierCache({self._shape_text()}, {now.total_tokens} tokens: {' + '.join(tiers)}, "
            f"{format_bytes(now.total_bytes)}, {now.bits_per_value:.1f} bits/value)"
        )
