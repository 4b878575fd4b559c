"""The rules of style that a machine can check, on every file that is kept."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE_LINES, LINE_COLUMNS, FUNCTION_LINES = 500, 100, 70
SOURCES = {".py", ".zig"}
FOLDERS = {"py", "zig", "tests", "tools", "bench", "examples", "docs", "include"}


def kept_files() -> list[Path]:
    """The files of the repository or, in an unpacked sdist, of its folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        listing = subprocess.check_output(command, cwd=ROOT, text=True)
        paths = [ROOT / name for name in listing.split("\0") if name]
    else:
        paths = [*ROOT.iterdir(), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*"))]
        paths = [path for path in paths if not {"_native", "__pycache__"} & set(path.parts)]
    return sorted(path for path in paths if path.is_file())


def text_of(path: Path) -> str:
    return path.read_text("utf-8", errors="replace")


KEPT = kept_files()
CODE = [path for path in KEPT if path.suffix in SOURCES]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", CODE, ids=name)
def test_a_file_fits_its_limits(path: Path) -> None:
    lines = text_of(path).splitlines()
    assert len(lines) <= FILE_LINES
    assert [i for i, line in enumerate(lines, 1) if len(line) > LINE_COLUMNS] == []
    assert [i for i, line in enumerate(lines, 1) if line != line.rstrip()] == []


@pytest.mark.parametrize("path", CODE, ids=name)
def test_a_function_fits_a_screen(path: Path) -> None:
    functions = python_functions if path.suffix == ".py" else zig_functions
    assert [item for item in functions(text_of(path)) if item[1] > FUNCTION_LINES] == []


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """Name and length in lines of every function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            yield node.name, node.end_lineno - node.lineno + 1


def zig_functions(text: str) -> Iterator[tuple[str, int]]:
    """The same for Zig, where `zig fmt` puts the closing brace under the first letter.

    A name in title case is a type with parameters: its functions count, it does not.
    """
    lines = text.splitlines()
    for start, line in enumerate(lines):
        found = re.match(r"( *)(?:pub |inline |noinline |export )*fn ([a-z]\w*)", line)
        if not found or line.endswith(("}", ";")):
            continue
        indent, function = found.groups()
        end = next(i for i in range(start + 1, len(lines)) if lines[i].rstrip(";") == indent + "}")
        yield function, end - start + 1


def test_every_zig_file_is_tested() -> None:
    """A file that the test block of root.zig does not name is never compiled for its tests."""
    root = text_of(ROOT / "zig" / "root.zig")
    block = root[root.index("\ntest {") :]
    named = set(re.findall(r'@import\("(\w+\.zig)"\)', block))
    aliases = dict(re.findall(r'^const (\w+) = @import\("(\w+\.zig)"\);', root, re.MULTILINE))
    named |= {aliases[alias] for alias in re.findall(r"_ = (\w+);", block)}
    # root.zig holds the block; isa.zig is the root of an object of its own.
    expected = {path.name for path in (ROOT / "zig").glob("*.zig")} - {"root.zig", "isa.zig"}
    assert named == expected


# Split, so that this file may be checked too.
UNFINISHED = "TO" + "DO|FIX" + "ME|XX" + "X"
UNWANTED = ["hel" + "pers?", r"sess" + r"ion \d", "/wo" + "rk/", "/t" + "mp/", "/ro" + "ot/"]


@pytest.mark.parametrize("path", [p for p in KEPT if p.name != "LICENSE"], ids=name)
def test_nothing_is_left_behind(path: Path) -> None:
    """No loose ends, no vague names, no path of anybody's machine."""
    pattern = re.compile(rf"\b(?:{UNFINISHED})\b|{'|'.join(UNWANTED)}", re.IGNORECASE)
    if b"\0" not in path.read_bytes():
        assert pattern.findall(text_of(path)) == []
