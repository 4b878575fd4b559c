"""kvz's WebAssembly core, under wasmtime. Chosen before kvz loads one, as a user would."""

from __future__ import annotations

import os

os.environ["KVZ_CORE"] = "wasm"

from contestants.with_kvz import TOLERANCE, Entry, versions

__all__ = ["CASES", "KVS", "TOLERANCE", "Entry", "versions"]

KVS = {"q8": 8.5, "q4": 4.5}
CASES = ("wasm",)
