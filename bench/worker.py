"""One contestant at one number of threads, in a process of its own. Started by run.py.

Reads one JSON object with `name`, `threads`, `cases`, `size` and `done`, the number of jobs to pass
over because an earlier process did them; `count` asks for nothing but the number of jobs. Prints a
line of JSON before and after each job, so that a library that takes the process down loses only the
job it died on.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from dataclasses import asdict
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main() -> None:
    task = json.load(sys.stdin)
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
    except (ImportError, OSError, AttributeError) as error:
        say(skipped=f"{type(error).__name__}: {first_line(error)}")
        return
    if task.get("count"):
        getattr(module, "compile_now", lambda: None)()
        say(versions=module.versions(), jobs=len(planned(module, task)))
        os._exit(0)
    for given in planned(module, task)[task["done"] :]:
        say(starts=given)
        try:
            say(**run(module, given))
        except Exception as error:  # whatever a library raises costs its own result, nothing else
            say(job=given, failed=f"{type(error).__name__}: {first_line(error)}")
        gc.collect()
    lines.flush()
    os._exit(0)  # some libraries crash while they are taken down


def planned(module: Any, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the jobs that this contestant can do."""
    from plan import SIZES, jobs

    size = SIZES[task["size"]]
    every = (job for kv in module.KVS for job in jobs(task["cases"], kv, task["threads"], size))
    return [job.to_dict() for job in every if job.case in module.CASES]


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]


def run(module: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Check the contestant's answer, then time it."""
    from plan import STREAM_CALLS

    from workload import Job, check, make_data, measure, measure_copy, measure_stream

    job = Job(**given)
    data, bits = make_data(job), module.KVS[job.kv]
    one = module.Entry(job, data)
    errors = check(job, one, data, module.TOLERANCE[job.kv], bits)
    if job.case == "stream":
        timing = measure_stream(one, STREAM_CALLS)
    else:
        timing = measure(one, job.seconds)
    copy = {"copy": measure_copy(job, data)} if job.case == "append" else {}
    return {
        "job": given,
        **copy,
        "caches": one.caches,
        "bytes": one.bytes,
        "bits": one.bytes * 8 / (job.tokens * job.kv_heads * job.head_dim * 2),
        **errors,
        **asdict(timing),
    }


if __name__ == "__main__":
    main()
