"""kvz's native kernels for vectors of 128 bits: what its WebAssembly core is compared with."""

from __future__ import annotations

import os
import platform
from typing import Any

x86 = platform.machine().lower() in ("x86_64", "amd64")
os.environ["KVZ_ISA"] = "x86_64_v2" if x86 else "neon"

from contestants.with_kvz import TOLERANCE, Entry  # noqa: E402
from contestants.with_kvz import versions as kvz_versions  # noqa: E402

__all__ = ["CASES", "KVS", "TOLERANCE", "Entry", "versions"]

KVS = {"q8": 8.5, "q4": 4.5}
CASES = ("wasm",)


def versions() -> dict[str, Any]:
    return kvz_versions("kvz-128")
