"""Compare kvz with what else attends to a KV cache on a CPU.

Run as `python bench/run.py`, with whichever of the other libraries are installed; `--quick` takes
a minute and shows that everything runs, not how fast it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import heat
import limits
import report
from contestants import FORWARD, NAMES, VARIANTS
from crew import Worker
from plan import CASES, QUICK_CASES, Entrant, heats, weight
from progress import Progress, progress

import data


def main() -> None:
    options = parse(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.json or options.out / "results.json"
    began = time.perf_counter()
    with progress() as say:
        going_on = options.resume and results.exists()
        run = resumed(results, options) if going_on else fresh(options)
        measure_limits(run, options, say)
        crew = gather(options, run, say)
        try:
            contest(crew, options, run, results, say)
        finally:
            for worker in crew.values():
                worker.close()
            shutil.rmtree(options.out / "data", ignore_errors=True)
    run["minutes"] = round(run.get("minutes", 0) + (time.perf_counter() - began) / 60, 1)
    save(run, results)
    report.write(run, options.out)
    ours = ("kvz", *VARIANTS)
    if "kvz" in run["skipped"] or any(one["name"] in ours for one in run["failed"]):
        sys.exit("kvz itself did not run, or was wrong")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    quick = {"dest": "size", "action": "store_const", "const": "quick", "default": "whole"}
    parser.add_argument("--quick", help="little of everything", **quick)
    parser.add_argument("--resume", action="store_true", help="go on with what the folder has")
    parser.add_argument("--threads", nargs="+", type=int, help="by default 1 and 2")
    peers = [name for name in NAMES if name != "kvz"]
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers, metavar="NAME")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE")
    parser.add_argument("--json", type=Path, help="by default results.json in the folder")
    parser.add_argument("--out", type=Path, default=Path("build", "bench"), help="the folder")
    options = parser.parse_args(arguments)
    options.cases = options.cases or (QUICK_CASES if options.size == "quick" else CASES)
    options.threads = options.threads or [n for n in (1, 2) if n <= (os.cpu_count() or 1)]
    return options


def fresh(options: argparse.Namespace) -> dict[str, Any]:
    empty: dict[str, Any] = {"results": [], "left_out": [], "failed": []}
    return {"machine": machine(), "size": options.size, "limits": [], **empty}


def resumed(results: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what an earlier run left, if it was one of the same size on the same machine."""
    run: dict[str, Any] = json.loads(results.read_text("utf-8"))
    here = {**machine(), "date": run["machine"]["date"]}
    if (run["machine"], run["size"]) != (here, options.size):
        raise SystemExit(f"{results}: of another machine or size; run without --resume")
    return run


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return {"cpu": name, "count": os.cpu_count(), "system": platform.platform(terse=True)} | {
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def measure_limits(run: dict[str, Any], options: argparse.Namespace, say: Progress) -> None:
    say("measuring the machine")
    try:
        quick = options.size == "quick"
        found = limits.measure(options.threads, options.out, quick=quick)
    except (limits.NoLimitsError, OSError) as error:
        say(f"limits: skipped: {error}", keep=True)
    else:
        run["limits"] = run["limits"] or found


def gather(options: argparse.Namespace, run: dict[str, Any], say: Progress) -> heat.Crew:
    """Start every library that is there, once at each number of threads."""
    run |= {"versions": {}, "skipped": {}}
    crew = {}
    asked = {"cases": options.cases, "size": options.size}
    asked |= {"data": str((options.out / "data").resolve())}
    patience = 60 if options.size == "quick" else 300

    def start(name: str, threads: int) -> Worker:
        task = {"name": name, "threads": threads, "counts": options.threads, **asked}
        return Worker(task, patience)

    for name in dict.fromkeys(("kvz", *VARIANTS, *options.peers)):
        if name in FORWARD and "forward" not in options.cases:
            continue
        say(f"starting {name}")
        with ThreadPoolExecutor() as pool:
            workers = list(pool.map(partial(start, name), options.threads))
        why = next((one.skipped for one in workers if one.skipped), None)
        if why:
            run["skipped"][name] = why
            say(f"{name}: skipped: {why}", keep=True)
        for threads, worker in zip(options.threads, workers, strict=True):
            if worker.jobs:
                run["versions"].update(worker.versions)
                crew[name, threads] = worker
    return crew


def contest(
    crew: heat.Crew,
    options: argparse.Namespace,
    run: dict[str, Any],
    results: Path,
    say: Progress,
) -> None:
    """Hold all heats, and save the results after each."""
    entrants = [(name, job) for (name, _), worker in crew.items() for job in worker.jobs]
    done = [one for kind in ("results", "left_out", "failed") for one in run[kind]]
    ended = {entry_key(one["name"], one["job"]) for one in done}
    wanted: list[Entrant] = [x for x in entrants if entry_key(x[0], x[1].to_dict()) not in ended]
    say("making data")
    data.make((job for _, job in wanted), options.out / "data")
    say.begin(len(wanted), sum(weight(job) for _, job in wanted))
    for group in heats(wanted):
        heat.Heat(group, crew, run, options.out, say).hold()
        save(run, results)


def entry_key(name: str, job: dict[str, Any]) -> str:
    return json.dumps([name, job], sort_keys=True)


def save(run: dict[str, Any], results: Path) -> None:
    """Write the file anew beside the old one, so that one of them is always whole."""
    draft = results.with_suffix(".new")
    draft.write_text(json.dumps(run, indent=1) + "\n", "utf-8")
    draft.replace(results)


if __name__ == "__main__":
    main()
