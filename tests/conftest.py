"""The cores that behaviour tests run on. Imports the effort of hypothesis from profiles.py."""

from __future__ import annotations

import importlib.util
import os

import pytest

import foreign
import profiles  # noqa: F401 -- registers and loads the profile

foreign.stand_in()

CORES = [os.environ["KVZ_CORE"]] if os.environ.get("KVZ_CORE") else ["native", "wasm"]


@pytest.fixture(params=CORES)
def core(request: pytest.FixtureRequest) -> str:
    """Name a core: every test that takes this runs on each, or on the one that KVZ_CORE names.

    In CI a missing wasmtime is a failure, elsewhere the tests of that core are skipped.
    """
    name: str = request.param
    missing = name == "wasm" and importlib.util.find_spec("wasmtime") is None
    if missing and not os.environ.get("CI"):
        pytest.skip("wasmtime is not installed: pip install 'kvz[wasm]'")
    return name


@pytest.fixture
def native_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the native core the default, for what only that can do: files in memory."""
    monkeypatch.setenv("KVZ_CORE", "native")
