"""The command line: what it prints, its exit codes, and its manners."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import kvz
from kvz import bench, cli, completion, selftest
from kvz.errors import CoreError, InvalidArgumentError
from kvz.options import PRECISIONS, WARM_PRECISIONS


@pytest.mark.parametrize(
    "command", [None, "demo", "chat", "plan", "inspect", "bench", "info", "completion"]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"] if command else ["--help"])
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
        ["plan", "--layers", "0"],
        ["plan", "--memory", "8 bananas"],
        ["plan", "qwen3-8b", "--warm-length", "-1"],
        ["plan", "qwen3-8b", "--warm-length", "64", "--warm-precision", "q4k"],
        ["bench", "--store", "q9"],
        ["bench", "--heads", "0"],
        ["completion", "csh"],
    ],
)
def test_a_wrong_command_line_is_code_2(options, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(options)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_command_line_knows_the_precisions_of_a_config():
    assert set(PRECISIONS) == {str(one) for one in kvz.Precision}
    for precision in PRECISIONS:
        fields = {"num_kv_heads": 1, "head_dim": 64, "warm_precision": precision}
        if precision in WARM_PRECISIONS:
            kvz.CacheConfig(**fields)
        else:
            with pytest.raises(InvalidArgumentError):
                kvz.CacheConfig(**fields)


SMALL = [
    "--tokens",
    "512",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--head-dim",
    "32",
    "--memory",
    "1MB",
]


def test_bench(core, capsys, monkeypatch):
    """Every figure is there, and bytes are those of the format; how fast it is is not a test."""
    monkeypatch.setattr(bench, "memory_bytes_per_second", lambda threads, seconds: 1e10)
    small = [*SMALL, "--seconds", "0", "--core", core]
    assert cli.main(["bench", *small, "--store", "f32", "--store", "q8/q4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["info"]["core"] == core
    first, second = found["rows"]
    assert (first["store"], second["store"]) == ("f32", "q8/q4")
    assert first["bits_per_value"] > second["bits_per_value"] > 6.5
    figures = [row[name] for row in found["rows"] for name in row if name != "store"]
    assert len(figures) == 12
    assert min(figures) > 0
    assert cli.main(["bench", *small, "--store", "q4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["store", "q4"]


def test_bench_measures_memory():
    assert bench.memory_bytes_per_second(2, 0.01, nbytes=1 << 20) > 1e6


@pytest.mark.parametrize("options", [["--tokens", "100"], ["--heads", "5"]])
def test_bench_refuses_what_it_cannot_measure(options, capsys):
    assert cli.main(["bench", *SMALL, "--seconds", "0", *options]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("kvz: error: ")


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


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion(shell, capsys):
    """The script names every command and option; bash itself completes with it."""
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name, (_, options) in completion.commands_of(cli.parser()).items():
        assert name in script
        for option in options:
            words = option.flags[-1:] or option.choices
            assert all((x.lstrip("-") if shell == "fish" else x) in script for x in words)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["kvz", "pl"], "plan"),
        (["kvz", "info", "--j"], "--json"),
        (["kvz", "info", "--core", "w"], "wasm"),
        (["kvz", "completion", "z"], "zsh"),
        (["kvz", "info", "--nothing"], ""),
    ],
)
def test_completion_in_bash(words, expected, capsys):
    cli.main(["completion", "bash"])
    line = " ".join(words)
    code = (
        f"{capsys.readouterr().out}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _kvz; "
        'echo "${COMPREPLY[*]}"'
    )
    ran = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == expected


def test_as_a_module():
    ran = subprocess.run(
        [sys.executable, "-m", "kvz", "--help"], capture_output=True, text=True, check=True
    )
    assert "demo" in ran.stdout
    assert "info" in ran.stdout


def test_help_needs_no_numpy_and_no_core():
    """The command line is quick because it imports only what a command needs."""
    code = (
        "import sys; from kvz import cli; cli.parser(); "
        "print([name for name in sys.modules if name.startswith(('kvz.demo', 'gguf', 'wasmtime', "
        "'tokenizers', 'rich', 'kvz.selftest', 'numpy', 'ctypes'))])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_inspect(core, tmp_path, capsys):
    """A whole file is described, a damaged one is an error in one line."""
    model = kvz.ModelCache(num_layers=2, core=core, num_kv_heads=1, head_dim=32, tail_length=64)
    rows = np.random.default_rng(0).standard_normal((300, 1, 32), dtype=np.float32)
    for layer in range(2):
        model[layer].append(rows, rows)
    path = tmp_path / "cache.kvz"
    model.save(path, fingerprint={"model": "none"})
    assert cli.main(["inspect", str(path), "--core", core]) == 0
    printed = capsys.readouterr().out
    assert "checksums passed" in printed
    assert model[0].digest() in printed
    assert cli.main(["inspect", str(path), "--core", core, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [layer["stats"]["total_tokens"] for layer in result["layers"]] == [300, 300]
    assert result["fingerprint"] == {"model": "none"}
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    assert cli.main(["inspect", str(path), "--core", core]) == 1
    assert capsys.readouterr().err.startswith("kvz: error: ")
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err
