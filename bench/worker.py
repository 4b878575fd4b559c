"""One contestant at one number of threads, in a process of its own. Started by crew.py.

Reads one JSON object with `name`, `threads`, `counts` (all that are measured), `cases`, `size` and
`data` (a folder), and answers with `versions` and `jobs`. Then it answers one order at a time:

- `build`: make what a job needs, do the step once, check the answer; keep it under a number
- `time`: time the step of what is kept under a number
- `copy`: time the copying of its float32 input
- `drop`: keep nothing
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main() -> None:
    task = json.loads(sys.stdin.readline())
    threads = task["threads"]
    os.environ.update(dict.fromkeys(THREADS, str(threads)))  # read when the libraries are loaded
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    lines = os.fdopen(os.dup(1), "w")  # what the libraries print must not come between
    os.dup2(2, 1)

    def say(**line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    try:
        from contestants import MODULES

        module = importlib.import_module(MODULES[task["name"]])
        getattr(module, "compile_now", lambda: None)()
    except (ImportError, OSError, AttributeError) as error:
        say(skipped=f"{type(error).__name__}: {first_line(error)}")
        return
    say(versions=module.versions(), jobs=planned(module, task))
    worker = Worker(module, Path(task["data"]))
    for line in sys.stdin:
        try:
            answer = worker.obey(json.loads(line))
        except Exception as error:  # whatever a library raises costs its own result, nothing else
            answer = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        settle()
        say(**answer)
    os._exit(0)  # some libraries crash while they are taken down


def planned(module: Any, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the jobs that this contestant can do."""
    from plan import SIZES, jobs

    size, fixed = SIZES[task["size"]], (task["threads"], task["counts"])
    every = (job for kv in module.KVS for job in jobs(task["cases"], kv, *fixed, size))
    return [job.to_dict() for job in every if job.case in module.CASES]


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]


def step_seconds(one: Any) -> float:
    one.prepare()
    start = time.perf_counter()
    one.run()
    return float((time.perf_counter() - start) / one.caches)


def settle() -> None:
    """Wait until the library's threads sleep: some spin for a while, into the next one's turn."""
    for _ in range(100):
        before = time.process_time()
        time.sleep(0.009)  # the system may count in steps of 4 ms
        if time.process_time() - before < 0.001:
            return


class Worker:
    """What a contestant has built, by number."""

    def __init__(self, module: Any, folder: Path) -> None:
        self._module, self._folder = module, folder
        self._built: dict[int, tuple[Any, Any]] = {}

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        if order["do"] == "build":
            return self._build(order["number"], order["job"])
        if order["do"] == "time":
            return self._time(*self._built[order["number"]])
        if order["do"] == "copy":
            return self._copy(*self._built[order["number"]])
        self._built.clear()
        gc.collect()
        return {}

    def _build(self, number: int, given: dict[str, Any]) -> dict[str, Any]:
        import data
        from workload import Job

        job = Job(**given)
        rows = data.load(job, self._folder)
        one = self._module.Entry(job, rows)
        step = step_seconds(one)
        errors = self._errors(job, one, rows)
        if step > 0.5:  # the first may have to get things ready
            step = min(step, step_seconds(one))
        self._built[number] = job, one
        facts = {"caches": one.caches, "bytes": one.bytes, "step": step}
        return {**facts, "bits": one.bytes / job.bytes(1), **errors}

    def _errors(self, job: Any, one: Any, rows: Any) -> dict[str, float]:
        import data
        from workload import check, check_model

        tolerance = self._module.TOLERANCE[job.kv]
        if job.case == "forward":
            right = data.right_logits(job, one.exact, self._folder)
            return check_model(one, right, tolerance)
        right = None if job.appends else data.right_answer(job, rows, self._folder)
        return check(job, one, rows, right, tolerance, self._module.KVS[job.kv])

    def _time(self, job: Any, one: Any) -> dict[str, Any]:
        from plan import ROUNDS, STREAM_CALLS

        import data
        from workload import measure, measure_stream

        if job.case == "stream":
            return asdict(measure_stream(one, STREAM_CALLS))
        cold = one.caches * one.bytes > 0.9 * job.cold_bytes
        between = (lambda: None) if cold or job.appends else data.reader(self._folder)
        return asdict(measure(one, job.seconds / ROUNDS, between))

    def _copy(self, job: Any, _one: Any) -> dict[str, Any]:
        import data
        from workload import measure_copy

        return {"copy": measure_copy(job, data.load(job, self._folder))}


if __name__ == "__main__":
    main()
