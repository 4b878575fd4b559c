"""Measures side by side what is compared with each other. Called by run.py.

Everything in a heat is built first. Then all take turns, several times, so that whatever the
machine does meanwhile, it does to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import limits
import numpy as np
from crew import Worker
from plan import ROUNDS, Entrant, expected_seconds, too_slow, weight
from progress import Progress

from workload import Job

BUSY = 0.15  # cores that others used: a turn is taken once more
EXTRA_ROUNDS = 1
SAMPLES_KEPT = 4096  # of a turn

Crew = Mapping[tuple[str, int], Worker]


class Heat:
    """What is measured side by side: each entrant goes by its number.

    Parameters
    ----------
    entrants : list of (str, Job)
    crew : dict of Worker
        By name and number of threads.
    run : dict
        What came of all heats; this one adds of every entrant something.
    folder : Path
        Where the program that measures the machine is.
    say : Progress
    """

    def __init__(
        self,
        entrants: Sequence[Entrant],
        crew: Crew,
        run: dict[str, Any],
        folder: Path,
        say: Progress,
    ) -> None:
        self._entrants, self._crew, self._run = entrants, crew, run
        self._folder, self._say = folder, say
        self._built: dict[int, dict[str, Any]] = {}
        self._turns: dict[int, list[dict[str, Any]]] = {}
        self._beside: dict[tuple[str, int], list[float]] = {}  # by what and number of threads

    def hold(self) -> None:
        """Build everything, let all take turns, and add the results to those of the run."""
        for number, (name, job) in enumerate(self._entrants):
            self._say(f"{describe(name, job)}: checking")
            facts = build(number, name, job, self._crew, self._run)
            if not self._gone(number, facts):
                self._built[number] = facts
                self._turns[number] = []
        for count in range(ROUNDS if self._built else 0):
            more = f" and {len(self._built) - 1} more" if len(self._built) > 1 else ""
            which = f"round {count + 1} of {ROUNDS}"
            self._say(f"{describe(*self._entrants[min(self._built)])}{more}: {which}")
            if count in (0, ROUNDS - 1):
                self._measure_beside()
            for number in list(self._turns):
                self._turn(number)
        self._repeat_busy()
        for name, job in self._entrants:
            self._crew[name, job.threads].drop()
            self._say.advance(weight(job))
        self._run["results"] += [self._result(number) for number in self._turns]

    def _gone(self, number: int, answer: Mapping[str, Any]) -> bool:
        """Whether an entrant is out of the heat, and if so, note why."""
        kind = next((kind for kind in ("left_out", "failed") if kind in answer), None)
        if not kind:
            return False
        name, job = self._entrants[number]
        seconds = {"seconds": answer["seconds"]} if "seconds" in answer else {}
        noted = {"name": name, "job": job.to_dict(), "why": answer[kind], **seconds}
        self._run[kind].append(noted)
        text = f"{describe(name, job)}: {kind.replace('_', ' ')}: {answer[kind]}"
        self._say(text, keep=True)
        return True

    def _turn(self, number: int) -> None:
        name, job = self._entrants[number]
        answer = self._crew[name, job.threads].time(number, job)
        if self._gone(number, answer):
            del self._turns[number]
        else:
            self._turns[number].append(answer)

    def _measure_beside(self) -> None:
        """Measure what results are compared with, among them and once per number of threads."""
        done = set()
        for number in self._built:
            name, job = self._entrants[number]
            if job.threads in done:
                continue
            done.add(job.threads)
            if job.case in ("decode", "linear"):
                self._note("read", job, read_bandwidth(job.threads, self._folder))
            if job.case == "append" and job.new > 1:
                self._note("copy", job, self._crew[name, job.threads].copy(number))

    def _note(self, what: str, job: Job, figure: float | None) -> None:
        if figure:
            self._beside.setdefault((what, job.threads), []).append(figure)

    def _repeat_busy(self) -> None:
        """Let those whose turns others disturbed take more, and keep the quietest of each."""
        for _ in range(EXTRA_ROUNDS):
            for number, taken in list(self._turns.items()):
                if sum(one["busy"] <= BUSY for one in taken) < ROUNDS:
                    self._turn(number)
        for taken in self._turns.values():
            taken.sort(key=lambda one: one["busy"])
            del taken[ROUNDS:]

    def _result(self, number: int) -> dict[str, Any]:
        name, job = self._entrants[number]
        beside = {
            what: float(np.mean(figures))
            for (what, threads), figures in self._beside.items()
            if threads == job.threads
        }
        facts = {"name": name, "job": job.to_dict(), **self._built[number], **beside}
        return {**facts, **summarize(self._turns[number])}


def build(number: int, name: str, job: Job, crew: Crew, run: Mapping[str, Any]) -> dict[str, Any]:
    """Build an entrant's caches; says `left_out` if its steps take, or would take, too long."""
    seen = [(one, one["median"]) for one in run["results"]]
    seen += [(one, one["seconds"]) for one in run["left_out"]]
    earlier = [(Job(**one["job"]), seconds) for one, seconds in seen if one["name"] == name]
    expected = expected_seconds(job, earlier)
    if expected and too_slow(job, expected):
        return {"left_out": f"a step would take {expected:.1f} s", "seconds": expected}
    answer = crew[name, job.threads].build(number, job)
    if "step" in answer and too_slow(job, answer["step"]):
        text = f"a step takes {answer['step']:.1f} s"
        return {"left_out": text, "seconds": answer["step"]}
    return answer


def read_bandwidth(threads: int, folder: Path) -> float | None:
    try:
        found = limits.measure([threads], folder, quick=True)
    except (limits.NoLimitsError, OSError):
        return None  # run.py has said why
    return limits.limit(found, "read", threads)


def summarize(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put all turns together; of turns with many samples, every n-th counts, and the largest."""
    samples: list[float] = []
    for one in turns:
        samples += one["samples"][:: 1 + (len(one["samples"]) - 1) // SAMPLES_KEPT]
    names = ("p10", "quartile", "median", "p90", "p99")
    found = dict(zip(names, np.percentile(samples, (10, 25, 50, 90, 99)).tolist(), strict=True))
    found["max"] = max(max(one["samples"]) for one in turns)
    count = sum(len(one["samples"]) for one in turns)
    return {**found, "samples": count, "busy": max(one["busy"] for one in turns)}


def describe(name: str, job: Job) -> str:
    new = f", {job.new} new" if job.new > 1 else ""
    return (
        f"{name} {job.kv}: {job.case}, {job.past} tokens{new}, "
        f"{job.heads}/{job.kv_heads} heads of {job.head_dim}, {job.threads} threads"
    )
