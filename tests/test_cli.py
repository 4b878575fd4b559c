"""The command line: what it prints, its exit codes, and its manners."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kvz import cli, selftest
from kvz.errors import CoreError


@pytest.mark.parametrize("options", [["--help"], ["demo", "--help"], ["info", "--help"]])
def test_help(options, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(options)
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: kvz")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("kvz ")


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["nonsense"],
        ["info", "--core", "fortran"],
        ["demo", "--store", "q9"],
        ["demo", "--store", "q8/q4/q4"],
        ["demo", "--tokens", "-1"],
        ["demo", "--tail", "many"],
    ],
)
def test_a_wrong_command_line_is_code_2(options, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(options)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_info(core, capsys):
    assert cli.main(["info", "--core", core]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["core"].startswith(f"{core}, ")
    assert lines["self-test"].startswith(("passed", "skipped"))


def test_info_as_json(core, capsys):
    assert cli.main(["info", "--core", core, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["core"] == core
    assert printed["self_test"]["result"] in ("passed", "skipped")


def test_a_failed_self_test_is_code_1(monkeypatch, capsys):
    outputs = iter([b"one", b"other"])
    monkeypatch.setattr(selftest, "results", lambda *_: iter([next(outputs)]))
    assert cli.main(["info"]) == 1
    assert "failed: native and wasm differ" in capsys.readouterr().out


def test_a_missing_core_skips_the_self_test(monkeypatch, capsys):
    def missing(*_):
        raise CoreError("the wasm core needs wasmtime")

    monkeypatch.setattr(selftest, "results", missing)
    assert cli.main(["info"]) == 0
    assert "skipped: the wasm core needs wasmtime" in capsys.readouterr().out


def test_errors_of_kvz_are_one_line(monkeypatch, capsys):
    monkeypatch.setenv("KVZ_CORE", "fortran")
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err.startswith("kvz: error: KVZ_CORE: expected 'native' or 'wasm'")


def test_errors_that_nobody_expected_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(selftest, "compare_cores", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


def test_as_a_module():
    ran = subprocess.run(
        [sys.executable, "-m", "kvz", "--help"], capture_output=True, text=True, check=True
    )
    assert "demo" in ran.stdout
    assert "info" in ran.stdout


def test_help_needs_no_demo_and_no_core():
    """The command line is quick because it imports only what a command needs."""
    code = (
        "import sys; from kvz import cli; cli.parser(); "
        "print([name for name in sys.modules if name.startswith(('kvz.demo', 'gguf', 'wasmtime', "
        "'tokenizers', 'rich', 'kvz.selftest'))])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
