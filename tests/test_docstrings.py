"""The examples in the docstrings run, and every public name is documented."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import kvz

# Importing the others asks for packages that kvz does not need, or runs the program.
MODULES = [info.name for info in pkgutil.iter_modules(kvz.__path__) if info.name != "__main__"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    """Exactly as they are printed."""
    if name == "_wasm":
        pytest.importorskip("wasmtime")
    module = importlib.import_module(f"kvz.{name}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", kvz.__all__)
def test_public_names_are_documented(name: str) -> None:
    """And so are the public methods and properties of public classes."""
    thing = getattr(kvz, name)
    assert thing.__doc__
    if inspect.isclass(thing):
        members = inspect.getmembers(thing, lambda x: inspect.isfunction(x) or type(x) is property)
        bare = [key for key, member in members if key[0] != "_" and not inspect.getdoc(member)]
        assert bare == []
