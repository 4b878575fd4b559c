"""What a cache holds, in numbers. Made by cache.py from the core's own counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStats:
    """Tokens and bytes of a `TwoTierCache` at one moment.

    Bytes are those of the pages as allocated: values, codes, scales, and slots not yet filled.

    Attributes
    ----------
    total_tokens, sink_tokens, store_tokens, warm_tokens, tail_tokens : int
        Tokens held: together, and by where they are.
    next_position : int
        The position that the next token will have.
    evicted_tokens, migrated_tokens : int
        Tokens that left the cache, and that moved from the tail to the store or the warm tier,
        since it was made or cleared.
    sink_bytes, store_bytes, warm_bytes, tail_bytes : int
    shared_bytes : int
        Those of them that are in pages which forks and open transactions hold too.
    overhead_bytes : int
        Page tables and the cache object, besides the pages.
    page_count : int
    compression_ratio : float
        Bytes that these tokens would take at `tail_precision`, over the bytes they take; 1 when
        there are none.
    bits_per_value : float
        Bits taken per value held; 0 when there are none.
    """

    total_tokens: int = 0
    sink_tokens: int = 0
    store_tokens: int = 0
    warm_tokens: int = 0
    tail_tokens: int = 0
    next_position: int = 0
    evicted_tokens: int = 0
    migrated_tokens: int = 0
    sink_bytes: int = 0
    store_bytes: int = 0
    warm_bytes: int = 0
    tail_bytes: int = 0
    shared_bytes: int = 0
    overhead_bytes: int = 0
    page_count: int = 0
    compression_ratio: float = 1.0
    bits_per_value: float = 0.0

    @property
    def total_bytes(self) -> int:
        """Bytes of all pages."""
        return self.sink_bytes + self.store_bytes + self.warm_bytes + self.tail_bytes

    @property
    def own_bytes(self) -> int:
        """Bytes of the pages that nobody else holds: what closing this cache would free."""
        return self.total_bytes - self.shared_bytes

    def _repr_html_(self) -> str:
        """Show a bar of the tiers in a notebook."""
        from kvz.html import stats_html

        return stats_html(self, "CacheStats")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, `total_bytes` and `own_bytes`, as plain values."""
        return {**asdict(self), "total_bytes": self.total_bytes, "own_bytes": self.own_bytes}


def format_bytes(count: float) -> str:
    """Return a size for people, in binary units.

    Examples
    --------
    >>> format_bytes(640), format_bytes(3250586)
    ('640 B', '3.1 MiB')
    """
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
