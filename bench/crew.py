"""The processes in which contestants run, seen by who gives the orders. Called by run.py."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workload import Job

SCRIPT = Path(__file__).with_name("worker.py")
STARTING_SECONDS = 900  # some compile something first


class DiedError(Exception):
    """The process ended, or was ended because it said nothing for too long."""


class Worker:
    """One contestant at one number of threads, in a process that is started again if it dies.

    Attributes
    ----------
    skipped : str
        Why the contestant cannot run; empty if it can.
    versions : dict
        Of the libraries.
    jobs : list of Job
        What it can do.
    """

    def __init__(self, task: dict[str, Any], patience_seconds: float) -> None:
        self.name: str = task["name"]
        self._task, self._patience = task, patience_seconds
        self._child: subprocess.Popen[str] | None = None
        self._built: set[int] = set()
        try:
            found = self._start()
        except DiedError as error:
            found = {"skipped": str(error)}
        self.skipped: str = found.get("skipped", "")
        self.versions: dict[str, str] = found.get("versions", {})
        self.jobs = [Job(**given) for given in found.get("jobs", ())]
        if not self.jobs:
            self.close()

    def build(self, number: int, job: Job) -> dict[str, Any]:
        """Make what a job needs and check its answer; returns its bytes and errors."""
        answer = self._ask({"do": "build", "number": number, "job": job.to_dict()})
        if "failed" not in answer:
            self._built.add(number)
        return answer

    def time(self, number: int, job: Job) -> dict[str, Any]:
        """Time a job for a round; it is built again if the process died since."""
        if number not in self._built:
            answer = self.build(number, job)
            if "failed" in answer:
                return answer
        return self._ask({"do": "time", "number": number})

    def copy(self, number: int) -> float | None:
        """Time copying the float32 input of what was built."""
        answer = self._ask({"do": "copy", "number": number})
        return answer.get("copy")

    def drop(self) -> None:
        """Give back the memory of everything built."""
        if self._built:
            self._ask({"do": "drop"})
            self._built.clear()

    def close(self) -> None:
        if self._child:
            self._child.kill()
            self._child.communicate()
            self._child = None
        self._built.clear()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        try:
            if self._child is None:
                self._start()
            return self._exchange(order, self._patience)
        except DiedError as error:
            return {"failed": str(error)}

    def _start(self) -> dict[str, Any]:
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
        command: Sequence[str] = [sys.executable, str(SCRIPT)]
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True)
        return self._exchange(self._task, STARTING_SECONDS)

    def _exchange(self, order: dict[str, Any], patience: float) -> dict[str, Any]:
        child = self._child
        assert child
        assert child.stdin
        assert child.stdout
        watchdog = threading.Timer(patience, child.kill)
        watchdog.start()
        try:
            print(json.dumps(order), file=child.stdin, flush=True)
            line = child.stdout.readline()
        except OSError:
            line = ""
        watchdog.cancel()
        if not line:
            self.close()
            raise DiedError("the process died or hung")
        answer: dict[str, Any] = json.loads(line)
        return answer
