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
        f"{row.copied:.1%}",
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for simulated, color, marker, label in (
        (True, PEER_COLOR, "s", "other projects, simulated"),
        (False, KVZ_COLOR, "o", "kvz"),
    ):
        shown = [row for row in rows if row.simulated == simulated and row.kl > 0]
        bits, kl = [row.bits_per_value for row in shown], [row.kl for row in shown]
        axes.scatter(bits, kl, c=color, marker=marker, label=label, zorder=3)
        for row in shown:
            offset = (6, 4) if simulated else (-6, -11)
            side = "left" if simulated else "right"
            axes.annotate(
                row.name,
                (row.bits_per_value, row.kl),
                xytext=offset,
                textcoords="offset points",
                ha=side,
                fontsize=8,
                color=color,
            )
    axes.set_yscale("log")
    axes.margins(x=0.15)  # room for names
    axes.set_xlabel("bits per value of the packed tokens, scales and offsets included")
    axes.set_ylabel("mean KL divergence per token, nats")
    axes.set_title("SmolLM2-135M: what packing the KV cache changes")
    axes.grid(True, which="major", color="#e4e6ea", zorder=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
