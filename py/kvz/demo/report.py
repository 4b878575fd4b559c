"""What the demo shows: progress on stderr, a table on stdout. Called by run.py.

The progress is drawn with rich if that is installed and stderr is a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from kvz.presets import Store, as_preset


@contextmanager
def progress(label: str, total: int, unit: str = "tokens") -> Iterator[Callable[[int], None]]:
    """Show how far something is while the block runs; the block is given `advance(count)`."""
    if not sys.stderr.isatty() or find_spec("rich") is None:
        print(f"{label}: {total} {unit}", file=sys.stderr)
        yield lambda _: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn(f"{unit},"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(label, total=total)
        yield lambda count: shown.advance(task, count)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    split = [title.split("\n") for title in head]
    lines = [*zip(*split, strict=True), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    print(f"\n{caption}")


def store_name(store: Store) -> str:
    """Return "q4", or "q8/q4" for a pair, or the name of a preset."""
    return as_preset(store).name
