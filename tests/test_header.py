"""include/kvz.h is what the library says of itself, and C programs compile and run against it."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

from kvz._core import load
from tools import make_header

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "c" / "attend.c"


@pytest.fixture(scope="module")
def native() -> object:
    return load("native")


def test_the_header_is_up_to_date(native):
    """`python -m tools.make_header` writes it anew."""
    assert make_header.HEADER.read_text("utf-8") == make_header.header(native.abi)


def test_the_header_declares_every_function_and_type(native):
    text = make_header.HEADER.read_text("utf-8")
    for name in native.abi["functions"]:
        assert f"kvz_{name}(" in text
    for name in native.abi["types"]:
        assert f"kvz_{make_header.snake(name)}_t;" in text
    assert doctest.testmod(make_header).failed == 0


def compile_c(source: Path, target: Path, *options: str) -> None:
    pytest.importorskip("ziglang")
    compiler = [sys.executable, "-m", "ziglang", "cc", "-std=c99", "-Wall", "-Wextra", "-Werror"]
    command = [*compiler, f"-I{ROOT / 'include'}", str(source), *options, "-o", str(target)]
    subprocess.run(command, check=True)


def test_structs_have_the_sizes_and_offsets_of_the_library(native, tmp_path):
    """A C compiler lays them out as the core does."""
    lines = ['#include "kvz.h"', "#define SAME(n, a, b) typedef char n[(a) == (b) ? 1 : -1]"]
    for name, spec in native.abi["types"].items():
        kind = f"kvz_{make_header.snake(name)}_t"
        for field, (_, offset) in spec.get("fields", {}).items():
            lines.append(f"SAME(at_{kind}_{field}, offsetof({kind}, {field}), {offset});")
        if "size" in spec and "fields" in spec:
            lines.append(f"SAME(size_of_{kind}, sizeof({kind}), {spec['size']});")
    source = tmp_path / "layout.c"
    source.write_text("\n".join([*lines, "int main(void) { return 0; }", ""]))
    compile_c(source, tmp_path / "layout")


def test_the_c_example_runs(native, tmp_path):
    program = tmp_path / "attend"
    compile_c(EXAMPLE, program, native.path, f"-Wl,-rpath,{Path(native.path).parent}")
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(
        "head 0: 1.00, head 7: 2.00\n500 tokens: 384 packed, 116 in the tail\nrefused: keys"
    )
