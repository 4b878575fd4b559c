"""The outcome as a table, as Markdown, as JSON and as a plot. Called by run.py."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvz.errors import KvzError
from kvz.evaluate.measure import Row

HEAD = (
    "\nformat",
    "bits/\nvalue",
    "KL\nnats",
    "KL\n99 %",
    "same\ntop-1",
    "per-\nplexity",
    "copy\nKL",
    "copied\n",
    "needle\nKL",
    "codes\nfound",
)
TITLE = "SmolLM2-135M: what packing the KV cache changes"
UNPACKED_BITS = 16  # formats of so many bits would take most of the plot, and show nothing
LABEL_WIDTH, LABEL_HEIGHT = 45, 9  # points
KVZ_COLOR, PEER_COLOR = "#1b6ca8", "#8a8f98"


class PlotError(KvzError, RuntimeError):
    """The plot cannot be drawn."""


def cells(row: Row) -> list[str]:
    """Return what the table shows of a row, in the order of `HEAD`."""
    return [
        row.name,
        f"{row.bits_per_value:.2f}",
        number(row.kl),
        number(row.kl99),
        f"{row.top1:.1%}",
        f"{row.perplexity:.3f}",
        number(row.copy_kl),
        "-" if math.isnan(row.copied) else f"{row.copied:.1%}",
        number(row.needle_kl),
        "-" if math.isnan(row.found) else f"{row.found:.0%}",
    ]


def number(value: float) -> str:
    """Show a divergence; what rounding in float32 may make is no divergence."""
    if math.isnan(value):
        return "-"
    return f"{value:.5f}" if value >= 1e-5 else "<0.00001"


def markdown(rows: Sequence[Row], caption: str) -> str:
    """Return the table in Markdown, peers in italics.

    Examples
    --------
    >>> print(markdown([], "No formats."))
    | format | bits/value | KL nats | KL 99 % | same top-1 | perplexity | copy KL | copied | \
needle KL | codes found |
    |---|---|---|---|---|---|---|---|---|---|
    <BLANKLINE>
    No formats.
    """
    titles = [title.replace("-\n", "").replace("/\n", "/").replace("\n", " ") for title in HEAD]
    lines = [[title.strip() for title in titles], ["---"] * len(HEAD)]
    for row in rows:
        first, *others = cells(row)
        lines.append([f"*{first}*" if row.simulated else first, *others])
    table = ["| " + " | ".join(line) + " |" for line in lines]
    table[1] = "|" + "---|" * len(HEAD)
    return "\n".join([*table, "", caption])


def to_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Return everything as one JSON object; what is not a number is null."""
    results = [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(row).items()
        }
        for row in rows
    ]
    return json.dumps({**about, "results": results}, indent=2)


def check_plot() -> None:
    """Refuse early if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise PlotError('a plot needs matplotlib: pip install "kvz[eval]"')


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the divergence over bits per value; the file's ending says the kind."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    axes.margins(x=0.15)  # room for names
    packed = [row for row in rows if row.kl > 0 and row.bits_per_value < UNPACKED_BITS]
    sides = [
        ([row for row in packed if row.simulated], PEER_COLOR, "s", "other projects, simulated"),
        ([row for row in packed if not row.simulated], KVZ_COLOR, "o", "kvz"),
    ]
    for shown, color, marker, label in sides:
        bits, kl = [row.bits_per_value for row in shown], [row.kl for row in shown]
        axes.scatter(bits, kl, c=color, marker=marker, label=label, zorder=3)
    axes.set_xlabel("bits per value of the packed tokens, scales and offsets included")
    axes.set_ylabel("mean KL divergence per token, nats")
    axes.set_title(TITLE)
    axes.grid(True, which="major", color="#e4e6ea", zorder=0)
    axes.legend(frameon=False)
    figure.draw_without_rendering()  # so that it is known where the points are
    for shown, color, *_ in sides:
        label_points(axes, shown, color)
    # A date would make every drawing of the same figures another file.
    about = {"Title": TITLE, **({"Date": None} if path.suffix == ".svg" else {})}
    with rc_context({"svg.hashsalt": "kvz"}):  # names of parts, which else are random
        figure.savefig(path, dpi=150, metadata=about)


def label_points(axes: Any, rows: Sequence[Row], color: str) -> None:
    """Write names beside their points: ours to the left, others to the right, none over another."""
    points_per_pixel = 72 / axes.figure.dpi
    taken: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: -row.kl):
        x, y = axes.transData.transform((row.bits_per_value, row.kl)) * points_per_pixel
        wanted = y + (4 if row.simulated else -11)
        for other_x, other_y in taken:  # from the top down
            if abs(x - other_x) < LABEL_WIDTH and wanted > other_y - LABEL_HEIGHT:
                wanted = other_y - LABEL_HEIGHT
        taken.append((x, wanted))
        axes.annotate(
            row.name,
            (row.bits_per_value, row.kl),
            xytext=(6 if row.simulated else -6, wanted - y),
            textcoords="offset points",
            ha="left" if row.simulated else "right",
            fontsize=8,
            color=color,
        )
