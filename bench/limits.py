"""What this machine can do at most, by limits.zig. Called by run.py.

The program is compiled here, by the `ziglang` package, for the CPU that it runs on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("limits.zig")
SUFFIX = ".exe" if os.name == "nt" else ""


class NoLimitsError(Exception):
    """They could not be measured; the message says why."""


def measure(threads: Sequence[int], folder: Path, *, quick: bool = False) -> list[dict[str, Any]]:
    """Measure reading and multiplying at each number of threads.

    Returns
    -------
    list of dict
        With `what` ("read" in GB/s; "f32_multiply_add" and, where the CPU has it, "int8_dot" in
        1e9 operations per second), `threads` and `per_second`; of "read" the best way is kept.

    Raises
    ------
    NoLimitsError
        The program does not compile or run.
    """
    program = _compiled(folder)
    mebibytes, repeats = ("256", "3") if quick else ("1024", "7")
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for count in threads:
        for line in _run([str(program), str(count), mebibytes, repeats]).splitlines():
            found = json.loads(line)
            key = found["what"], count
            best[key] = max(best.get(key, found), found, key=lambda one: one["per_second"])
    return list(best.values())


def _compiled(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    program = (folder / f"limits{SUFFIX}").resolve()
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        command = [sys.executable, "-m", "ziglang", "build-exe", str(SOURCE), "-lc"]
        _run([*command, "-OReleaseFast", "-mcpu=native", f"-femit-bin={program}"])
    return program


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        raise NoLimitsError(said[-1]) from None
    return done.stdout


def limit(limits: Sequence[dict[str, Any]], what: str, threads: int) -> float | None:
    """Return the figure for `what` at this number of threads, if it was measured."""
    found = (x["per_second"] for x in limits if (x["what"], x["threads"]) == (what, threads))
    return next(found, None)


if __name__ == "__main__":
    for measured in measure((1, 2), Path("build", "bench")):
        print(json.dumps(measured))
