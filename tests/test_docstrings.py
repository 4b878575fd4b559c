"""The examples in the docstrings run, and every public name is documented."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import kvz

PACKAGE = Path(kvz.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text("utf-8"))
#: What modules may import that kvz does not need.
OPTIONAL = {"gguf", "tokenizers", "torch", "transformers", "mlx"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_examples_run(path: Path) -> None:
    """Exactly as they are printed."""
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("name", kvz.__all__)
def test_public_names_are_documented(name: str) -> None:
    """And so are the public methods and properties of public classes."""
    thing = getattr(kvz, name)
    assert thing.__doc__
    if inspect.isclass(thing):
        members = inspect.getmembers(thing, lambda x: inspect.isfunction(x) or type(x) is property)
        bare = [key for key, member in members if key[0] != "_" and not inspect.getdoc(member)]
        assert bare == []
