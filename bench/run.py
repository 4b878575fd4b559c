"""Compare kvz with what else attends to a KV cache on a CPU.

Run as `python bench/run.py`, with whichever of the other libraries are installed; `--quick` takes
less than two minutes and shows that everything runs, not how fast it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import limits
import report
from contestants import NAMES, VARIANTS
from plan import CASES

HERE = Path(__file__).parent


def main() -> None:
    options = parse(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.json or options.out / "results.json"
    run: dict[str, Any] = {"machine": machine(), "size": options.size, "results": []}
    run |= {"versions": {}, "skipped": {}, "failed": []}
    with progress() as say:
        try:
            say("measuring the machine")
            quick = options.size == "quick"
            run["limits"] = limits.measure(options.threads, options.out, quick=quick)
        except (limits.NoLimitsError, OSError) as error:
            run["limits"] = []
            say(f"limits: skipped: {error}", keep=True)
        entrants = survey(options, run, say)
        say.begin(sum(count for _, _, count in entrants))
        for name, threads, _ in entrants:
            contest(name, threads, options, run, say)
            results.write_text(json.dumps(run, indent=1) + "\n", "utf-8")
    report.write(run, options.out)
    ours = ("kvz", *VARIANTS)
    if "kvz" in run["skipped"] or any(one["name"] in ours for one in run["failed"]):
        sys.exit("kvz itself did not run, or was wrong")


def survey(
    options: argparse.Namespace, run: dict[str, Any], say: Progress
) -> list[tuple[str, int, int]]:
    """Ask every library whether it is there, and how many jobs it has at each number of threads."""
    entrants = []
    for name in dict.fromkeys(("kvz", *VARIANTS, *options.peers)):
        for threads in options.threads:
            say(f"asking {name}")
            task = {"name": name, "threads": threads, "count": True}
            task |= {"cases": options.cases, "size": options.size}
            for line in talk(task, 600):  # some compile something first
                if "skipped" in line:
                    run["skipped"][name] = line["skipped"]
                elif line["jobs"]:
                    run["versions"].update(line["versions"])
                    entrants.append((name, threads, line["jobs"]))
            if name in run["skipped"]:
                say(f"{name}: skipped: {run['skipped'][name]}", keep=True)
                break
    return entrants


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    for name, about in (("quick", "little of everything"), ("full", "up to 131072 tokens")):
        size.add_argument(f"--{name}", dest="size", action="store_const", const=name, help=about)
    parser.set_defaults(size="normal")
    parser.add_argument("--threads", nargs="+", type=int, help="by default 1 and 2")
    peers = [name for name in NAMES if name != "kvz"]
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers, metavar="NAME")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument("--json", type=Path, help="by default results.json in the folder")
    parser.add_argument("--out", type=Path, default=Path("build", "bench"), help="the folder")
    options = parser.parse_args(arguments)
    options.threads = options.threads or [n for n in (1, 2) if n <= (os.cpu_count() or 1)]
    return options


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return {"cpu": name, "count": os.cpu_count(), "system": platform.platform(terse=True)} | {
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def contest(
    name: str, threads: int, options: argparse.Namespace, run: dict[str, Any], say: Progress
) -> None:
    """Do all jobs of one contestant, in a new process after each crash."""
    task = {"name": name, "threads": threads, "cases": options.cases, "size": options.size}
    done = 0
    while True:
        unfinished = None
        for line in talk({**task, "done": done}, 60 if options.size == "quick" else 600):
            if "starts" in line:
                unfinished = line["starts"]
                say(describe(name, unfinished))
            if "job" in line:
                unfinished, done = None, done + 1
                add(name, line, run, say)
        if unfinished is None:
            return
        add(name, {"job": unfinished, "failed": "the process died or hung"}, run, say)
        done += 1


def add(name: str, line: dict[str, Any], run: dict[str, Any], say: Progress) -> None:
    say.advance()
    run["failed" if "failed" in line else "results"].append({"name": name, **line})
    if "failed" in line:
        say(f"{describe(name, line['job'])}: failed: {line['failed']}", keep=True)


def describe(name: str, job: dict[str, Any]) -> str:
    new = f", {job['new']} new" if job["new"] > 1 else ""
    return (
        f"{name} {job['kv']}: {job['case']}, {job['past']} tokens{new}, "
        f"heads of {job['head_dim']}, {job['threads']} threads"
    )


def talk(task: dict[str, Any], patience: float) -> Iterator[dict[str, Any]]:
    """Start a worker and yield what it says; end it if it says nothing for `patience` seconds."""
    command = [sys.executable, str(HERE / "worker.py")]
    pipe = subprocess.PIPE
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        json.dump(task, child.stdin)
        child.stdin.close()
        while True:
            watchdog = threading.Timer(patience, child.kill)
            watchdog.start()
            line = child.stdout.readline()
            watchdog.cancel()
            if not line:
                return
            yield json.loads(line)


class Progress:
    """Says in plain lines what is being done, with the count of jobs and the time left."""

    def __init__(self) -> None:
        self._done, self._total, self._began = 0, 0, 0.0

    def begin(self, total: int) -> None:
        """Start to count to `total` jobs."""
        self._total, self._began = total, time.perf_counter()

    def advance(self) -> None:
        self._done += 1

    def __call__(self, text: str, keep: bool = False) -> None:
        """Say what is being done; `keep` marks what is to stay in sight."""
        print(text if keep else f"{self._where()}{text}", file=sys.stderr, flush=True)

    def _where(self) -> str:
        if not self._total:
            return ""
        left = ""
        if self._done:
            each = (time.perf_counter() - self._began) / self._done
            left = f", {each * (self._total - self._done) / 60:.0f} min left"
        return f"[{self._done + 1}/{self._total}{left}] "


class Bar(Progress):
    """The same on a terminal: a bar in the last line."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def begin(self, total: int) -> None:
        self._bar.reset(self._task, total=total)

    def advance(self) -> None:
        self._bar.advance(self._task)

    def __call__(self, text: str, keep: bool = False) -> None:
        if keep:
            self._bar.console.print(text, markup=False)
        else:
            self._bar.update(self._task, description=text)


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
    columns = (rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn())
    with rich.Progress(*columns, rich.TextColumn("{task.description}"), console=console) as bar:
        yield Bar(bar)


if __name__ == "__main__":
    main()
