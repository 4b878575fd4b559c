"""What notebooks show of caches and counts: a bar of the tiers and a few numbers.

Plain HTML with its styles inline; text takes the colour of the page, light or dark. Called by
`_repr_html_` of the caches and of `CacheStats`.
"""

from __future__ import annotations

from html import escape
from typing import Any

from kvz.stats import CacheStats, format_bytes

#: Of the tiers, in the order of their positions; readable on white and on black.
COLORS = {"sinks": "#c2554d", "store": "#4878a8", "warm": "#7a9a4a", "tail": "#d99a2b"}
_BAR = "display:flex;height:14px;width:100%;max-width:560px;border-radius:3px;overflow:hidden"
_BOX = "font-family:sans-serif;font-size:13px;line-height:1.5"


def stats_html(stats: CacheStats, title: str, names: dict[str, str] | None = None) -> str:
    """Return one bar with its numbers.

    Parameters
    ----------
    stats : CacheStats
    title : str
    names : dict, optional
        What to call the tiers, such as ``{"store": "q4"}``.
    """
    facts = (
        f"{stats.total_tokens:,} tokens, {format_bytes(stats.total_bytes)}, "
        f"{stats.bits_per_value:.2f} bits per value, {stats.compression_ratio:.2f}x smaller"
    )
    return (
        f'<div style="{_BOX}"><b>{escape(title)}</b><br>{tier_bar(stats)}'
        f"{_legend(stats, names or {})}<br>{facts}</div>"
    )


def tier_bar(stats: Any) -> str:
    """Return a bar whose parts are as wide as the bytes of the tiers."""
    total = sum(_bytes_of(stats))
    parts = (
        (name, size) for name, size in zip(COLORS, _bytes_of(stats), strict=True) if size and total
    )
    inner = "".join(
        f'<div title="{name}: {format_bytes(size)}" '
        f'style="width:{100 * size / total:.2f}%;background:{COLORS[name]}"></div>'
        for name, size in parts
    )
    return f'<div style="{_BAR};background:#8884">{inner}</div>'


def _legend(stats: CacheStats, names: dict[str, str]) -> str:
    counts = (stats.sink_tokens, stats.store_tokens, stats.warm_tokens, stats.tail_tokens)
    return " ".join(
        f'<span style="color:{COLORS[tier]}">&#9632;</span> {escape(names.get(tier, tier))}: '
        f"{count:,} tokens, {format_bytes(size)}&nbsp;"
        for tier, count, size in zip(COLORS, counts, _bytes_of(stats), strict=True)
        if size
    )


def _bytes_of(stats: Any) -> tuple[int, int, int, int]:
    return stats.sink_bytes, stats.store_bytes, stats.warm_bytes, stats.tail_bytes


def layers_html(layers: Any, title: str) -> str:
    """Return a bar for each layer of a model."""
    rows = "".join(
        f'<tr><td style="text-align:right">{index}</td><td style="width:400px">{tier_bar(now)}</td>'
        f'<td style="text-align:right">{now.total_tokens:,}</td>'
        f'<td style="text-align:right">{format_bytes(now.total_bytes)}</td></tr>'
        for index, now in enumerate(layers)
    )
    head = "<tr><th>layer</th><th>tiers</th><th>tokens</th><th>bytes</th></tr>"
    return f'<div style="{_BOX}"><b>{escape(title)}</b><table>{head}{rows}</table></div>'
