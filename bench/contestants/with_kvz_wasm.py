"""kvz's WebAssembly core, under wasmtime. Chosen before kvz loads one, as a user would."""

from __future__ import annotations

import os
from typing import Any

os.environ["KVZ_CORE"] = "wasm"

from contestants.with_kvz import TOLERANCE, Entry
from contestants.with_kvz import versions as kvz_versions

__all__ = ["CASES", "KVS", "TOLERANCE", "Entry", "versions"]

KVS = {"q8": 8.5, "q4": 4.5}
CASES = ("wasm",)


def versions() -> dict[str, Any]:
    return kvz_versions("kvz-wasm")
