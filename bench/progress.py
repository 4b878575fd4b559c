"""Says what is being measured, how many jobs are done and how long the others may take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Plain lines."""

    def __init__(self) -> None:
        self._done, self._total = 0, 0
        self._weight_done, self._weight_total = 0.0, 0.0
        self._began = time.perf_counter()

    def begin(self, total: int, weight: float) -> None:
        """Start to count to `total` jobs, which all together weigh so much."""
        self._total, self._weight_total = total, weight
        self._began = time.perf_counter()

    def advance(self, weight: float) -> None:
        """Count a job of such a weight as done."""
        self._done += 1
        self._weight_done += weight

    def __call__(self, text: str, keep: bool = False) -> None:
        """Say what is being done; `keep` marks what is to stay in sight."""
        print(text if keep else f"{self._where()}{text}", file=sys.stderr, flush=True)

    def left(self) -> str:
        """Say how long the rest may take."""
        if not self._weight_done:
            return ""
        each = (time.perf_counter() - self._began) / self._weight_done
        return f"{each * (self._weight_total - self._weight_done) / 60:.0f} min left"

    def _where(self) -> str:
        if not self._total:
            return ""
        return f"[{', '.join(filter(None, (f'{self._done}/{self._total}', self.left())))}] "


class Bar(Progress):
    """The same on a terminal: a bar in the last line."""

    def __init__(self, bar: Any) -> None:
        super().__init__()
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def begin(self, total: int, weight: float) -> None:
        super().begin(total, weight)
        self._bar.reset(self._task, total=total)

    def advance(self, weight: float) -> None:
        super().advance(weight)
        self._bar.advance(self._task)

    def __call__(self, text: str, keep: bool = False) -> None:
        if keep:
            self._bar.console.print(text, markup=False)
        else:
            self._bar.update(self._task, description=f"{self.left()} {text}".strip())


@contextmanager
def progress() -> Iterator[Progress]:
    """Show a bar where there are a terminal and rich, else lines."""
    try:
        from rich import progress as rich
        from rich.console import Console
    except ImportError:
        yield Progress()
        return
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield Progress()
        return
    columns = (rich.BarColumn(), rich.MofNCompleteColumn())
    with rich.Progress(*columns, rich.TextColumn("{task.description}"), console=console) as bar:
        yield Bar(bar)
