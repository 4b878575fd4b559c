"""The two-tier cache: the newest tokens as they came, older ones packed. Calls _persist.py."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvz._persist import PersistentCache
from kvz.config import CacheConfig, HighPrecisionTail, Hybrid, Policy, QuantizedStore
from kvz.errors import InvalidArgumentError, InvalidTypeError
from kvz.html import stats_html
from kvz.pool import BufferPool
from kvz.stats import CacheStats, format_bytes


class TwoTierCache(PersistentCache):
    """A KV cache of one sequence and one layer.

    The newest tokens (the tail) and the first ones (the sinks) stay at `tail_precision`. Older
    tokens move in batches to the store, packed at `store_precision`. Attention reads the packed
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
        nbytes = now.sink_bytes + now.store_bytes + now.tail_bytes
        values = now.total_tokens * self._heads * (self._head_dim + self._value_dim)
        plain = now.total_tokens * self._config.tail_bytes_per_token
        return CacheStats(
            total_tokens=now.total_tokens,
            sink_tokens=now.sink_tokens,
            store_tokens=now.store_tokens,
            tail_tokens=now.tail_tokens,
            next_position=now.next_position,
            evicted_tokens=now.evicted_tokens,
            migrated_tokens=now.migrated_tokens,
            sink_bytes=now.sink_bytes,
            store_bytes=now.store_bytes,
            tail_bytes=now.tail_bytes,
            shared_bytes=shared,
            overhead_bytes=now.overhead_bytes,
            page_count=now.page_count,
            compression_ratio=plain / nbytes if nbytes and plain else 1.0,
            bits_per_value=nbytes * 8 / values if values else 0.0,
        )

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
        """Change tail or store of an empty cache.

        Parameters
        ----------
        policy : HighPrecisionTail, QuantizedStore or Hybrid

        Raises
        ------
        InvalidArgumentError
            The cache holds tokens, or the policy does not fit the configuration.
        """
        if not isinstance(policy, (HighPrecisionTail, QuantizedStore, Hybrid)):
            raise InvalidTypeError(
                f"policy: expected HighPrecisionTail, QuantizedStore or Hybrid, got {policy!r}"
            )
        with self._lock:
            held = len(self)
            if held:
                raise InvalidArgumentError(
                    f"policy: expected an empty cache, this one holds {held} tokens; clear() first"
                )
            self._configure(policy.apply(self._config))
            self._policy = policy

    def _repr_html_(self) -> str:
        """Show a bar of the tiers in a notebook."""
        if self.closed:
            return escape(repr(self))
        stored = {self._config.key_precision: 0, self._config.value_precision: 0}
        names = {
            "sinks": f"sinks, {self._config.tail_precision}",
            "store": f"store, {'/'.join(map(str, stored))}",
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
        tiers += [f"{now.store_tokens} {stored}", f"{now.tail_tokens} {config.tail_precision}"]
        return (
            f"TwoTierCache({self._shape_text()}, {now.total_tokens} tokens: {' + '.join(tiers)}, "
            f"{format_bytes(now.total_bytes)}, {now.bits_per_value:.1f} bits/value)"
        )
