"""Writes golden/stored_values.json with the reference: run it, then review the diff.

    python tests/make_goldens.py

The inputs come from integer arithmetic alone: no library's random numbers are part of the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvz.reference import Format
from kvz.reference.formats import offset_of

PATH = Path(__file__).parent / "golden" / "stored_values.json"
Floats = NDArray[np.float32]


def as_hex(x: Floats) -> list[str]:
    """Each row as the hexadecimal digits of its values, eight for each, most significant first."""
    return [row.astype(">f4").tobytes().hex() for row in x]


def from_hex(lines: list[str]) -> Floats:
    """The opposite of `as_hex`."""
    found = [np.frombuffer(bytes.fromhex(line), ">f4") for line in lines]
    return np.array(found).astype(np.float32)


def inputs(dim: int) -> Floats:
    """Four rows: bell-shaped values, one with an outlier, tiny ones with zeros, and exact ties."""
    state, x = 12345, np.zeros((4, dim), np.float32)
    for i in np.ndindex(3, dim):
        total = 0
        for _ in range(4):  # four dice of -32768..32767 are bell-shaped
            state = (state * 1103515245 + 12345) % 2**31
            total += state // 2**15 - 2**15
        x[i] = np.float32(total) / np.float32(2**16)
    x[1, dim // 3] *= 40
    x[2] *= np.float32(2**-21)
    x[2, dim // 2 :] = 0
    x[3] = (np.arange(dim) % 16 - 7.5) / 8  # halfway between codes, if nothing rotates them
    return x


def cases() -> list[dict[str, Any]]:
    """Every format, rotated or not, at widths with and without padding."""
    made = []
    for precision in ("f16", "bf16", "q8", "q4", "q6k", "q5k", "q4k", "q3k", "q2k"):
        for rotation in ("on", "off") if precision.startswith("q") else ("off",):
            for dim in (1, 33, 80):
                given = inputs(dim)
                kept = Format.of(precision, rotation)
                case = {
                    "name": f"{precision}-{rotation}-{dim}",
                    "precision": precision,
                    "rotation": rotation,
                    "given": as_hex(given),
                    "stored": as_hex(kept.stored(given)),
                }
                if kept.centred:  # keys, when the first row alone makes the offset
                    case["keys"] = as_hex(kept.stored(given, offset_of(kept.spread(given[:1]))))
                made.append(case)
    return made


if __name__ == "__main__":
    PATH.write_text(json.dumps(cases(), indent=1) + "\n")
