"""What the demo shows: progress on stderr, a table on stdout. Called by run.py.

Drawn with rich if it is installed and the stream is a terminal; as plain text otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TextIO


def is_rich(stream: TextIO) -> bool:
    """Whether what goes to `stream` may be drawn with rich."""
    return stream.isatty() and find_spec("rich") is not None


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far something is while the block runs; the block is given `advance(count)`."""
    if not is_rich(sys.stderr):
        print(f"{label}: {total} tokens", file=sys.stderr)
        yield lambda _: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("tokens,"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(label, total=total)
        yield lambda count: shown.advance(task, count)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    if is_rich(sys.stdout):
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
        for index, title in enumerate(head):
            table.add_column(title, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    split = [title.split("\n") for title in head]
    lines = [*zip(*split, strict=True), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    print(f"\n{caption}")
