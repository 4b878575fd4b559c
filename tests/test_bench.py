"""The short version of the benchmark runs, checks every answer and writes its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
CASES = {"decode", "linear", "prefill", "append", "stream", "overhead", "shapes", "wasm"}


@pytest.mark.skipif(os.environ.get("KVZ_CORE") == "wasm", reason="it runs both cores itself")
@pytest.mark.skipif(sys.version_info < (3, 13), reason="takes half a minute: one Python is enough")
def test_quick_benchmark(tmp_path):
    command = [sys.executable, str(BENCH / "run.py"), "--quick", "--out", str(tmp_path)]
    command += ["--peers", "numpy", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert not run["failed"]
    names = {one["name"] for one in run["results"]}
    assert names >= {"kvz", "kvz-128", "numpy"}
    missing = CASES - {one["job"]["case"] for one in run["results"]}
    assert not missing
    assert all(one["error_data"] >= 0 and one["samples"] >= 5 for one in run["results"])
    assert "| **kvz q4** |" in (tmp_path / "report.md").read_text("utf-8")
    assert not (tmp_path / "data").exists()

    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=600)
    assert resumed.returncode == 0, resumed.stderr
    again = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert again["results"] == run["results"]
