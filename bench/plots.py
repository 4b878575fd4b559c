"""Three pictures of the decode: time, share of the bandwidth, and bytes against time.

Called by report.py, where matplotlib is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contestants import FORWARD, NAMES, width
from limits import limit

DRAWN = [name for name in NAMES if name not in FORWARD]  # who decodes
COLOURS = dict(zip(DRAWN, (f"C{i}" for i in (3, 7, 1, 0, 2, 4, 5, 6, 8)), strict=True))
STYLES = {32: ":", 16: "-.", 8: "--", 4: "-"}
MARKERS = {32: "s", 16: "^", 8: "o", 4: "D"}

Line = tuple[str, str, list[dict[str, Any]]]


def draw(run: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures as SVG, and return their names; none if no decode was measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    decodes = [one for one in run["results"] if one["job"]["case"] == "decode"]
    if not decodes:
        return []
    head_dim = max(one["job"]["head_dim"] for one in decodes)
    threads = max(one["job"]["threads"] for one in decodes)
    wanted = head_dim, threads
    chosen = [x for x in decodes if (x["job"]["head_dim"], x["job"]["threads"]) == wanted]
    lines = list(grouped(chosen))
    title = f"One decode step of one layer, {threads} threads"
    bandwidth = limit(run["limits"], "read", threads)
    drawn = [time_by_tokens(lines, title, folder)]
    if bandwidth:
        drawn.append(share_by_tokens(lines, title, bandwidth, folder))
    drawn.append(time_by_bytes(lines, title, bandwidth, folder))
    return drawn


def grouped(results: list[dict[str, Any]]) -> Iterator[Line]:
    keys = dict.fromkeys((one["name"], one["job"]["kv"]) for one in results)
    for name, kv in keys:
        mine = (x for x in results if (x["name"], x["job"]["kv"]) == (name, kv))
        yield name, kv, sorted(mine, key=lambda one: one["job"]["past"])


def look(name: str, kv: str) -> dict[str, Any]:
    """Tell libraries apart by colour and widths by line and marker; kvz stands out."""
    bits = width(kv)
    return {
        "label": f"{name} {kv}",
        "color": COLOURS[name],
        "linestyle": STYLES[bits],
        "marker": "P" if "+" in kv else MARKERS[bits],
        "linewidth": 2.5 if name == "kvz" else 1.2,
        "markersize": 5,
        "zorder": 3 if name == "kvz" else 2,
    }


def time_by_tokens(lines: list[Line], title: str, folder: Path) -> Path:
    figure, axes = new(title, "tokens in the cache", "microseconds")
    for name, kv, found in lines:
        times = [one["median"] * 1e6 for one in found]
        axes.plot([one["job"]["past"] for one in found], times, **look(name, kv))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    return save(figure, axes, folder / "decode_time.svg")


def share_by_tokens(lines: list[Line], title: str, bandwidth: float, folder: Path) -> Path:
    figure, axes = new(title, "tokens in the cache", "% of the measured read bandwidth")
    for name, kv, found in lines:
        rates = [one["bytes"] / one["median"] / 1e9 / one.get("read", bandwidth) for one in found]
        shares = [100 * rate for rate in rates]
        axes.plot([one["job"]["past"] for one in found], shares, **look(name, kv))
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    return save(figure, axes, folder / "decode_bandwidth.svg")


def time_by_bytes(lines: list[Line], title: str, bandwidth: float | None, folder: Path) -> Path:
    """Show the largest cache that every library was given; nothing can be below the line."""
    tokens = max(one["job"]["past"] for _, _, found in lines for one in found)
    figure, axes = new(f"{title}, {tokens} tokens", "MB of keys and values", "microseconds")
    bytes_seen = []
    for name, kv, found in lines:
        last = found[-1]
        if last["job"]["past"] == tokens:
            bytes_seen.append(last["bytes"])
            shown = look(name, kv) | {"linestyle": "none"}
            axes.plot([last["bytes"] / 1e6], [last["median"] * 1e6], **shown)
    if bandwidth:
        ends = [min(bytes_seen), max(bytes_seen)]
        bound = [count / bandwidth / 1e3 for count in ends]
        axes.plot([count / 1e6 for count in ends], bound, "k-", label="read bandwidth")
    axes.set_xscale("log")
    axes.set_yscale("log")
    return save(figure, axes, folder / "decode_bytes.svg")


def new(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(which="both", alpha=0.25)
    return figure, axes


def save(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib import pyplot

    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    # What a picture is called where it cannot be seen.
    figure.savefig(path, metadata={"Title": f"{axes.get_ylabel()}: {axes.get_title()}"})
    pyplot.close(figure)
    return path
