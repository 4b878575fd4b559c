"""Writes the files of golden/ with the reference: run it, then review the diff.

    python tests/make_goldens.py

The inputs come from integer arithmetic alone: no library's random numbers are part of a file.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvz
from kvz.reference import Format, ReferenceCache
from kvz.reference.formats import offset_of

FOLDER = Path(__file__).parent / "golden"
PATH = FOLDER / "stored_values.json"
WARM_PATH = FOLDER / "warm_tier.json"
Floats = NDArray[np.float32]


def as_hex(x: Floats) -> list[str]:
    """Each row as the hexadecimal digits of its values, eight for each, most significant first."""
    return [row.astype(">f4").tobytes().hex() for row in x]


def from_hex(lines: list[str]) -> Floats:
    """The opposite of `as_hex`."""
    found = [np.frombuffer(bytes.fromhex(line), ">f4") for line in lines]
    return np.array(found).astype(np.float32)


def bell_shaped(rows: int, dim: int) -> Floats:
    """Rows of values that are multiples of 2^-16: sums of four dice of -32768..32767."""
    state, x = 12345, np.zeros((rows, dim), np.float32)
    for i in np.ndindex(rows, dim):
        total = 0
        for _ in range(4):
            state = (state * 1103515245 + 12345) % 2**31
            total += state // 2**15 - 2**15
        x[i] = np.float32(total) / np.float32(2**16)
    return x


def inputs(dim: int) -> Floats:
    """Four rows: bell-shaped values, one with an outlier, tiny ones with zeros, and exact ties."""
    x = np.zeros((4, dim), np.float32)
    x[:3] = bell_shaped(3, dim)
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


def warm_cases() -> dict[str, Any]:
    """One stream through sinks, store, warm tier and tail, where q8 becomes q4, rotated or not."""
    given = bell_shaped(100, 33)
    given[::7, 11] *= 40  # outliers
    made = []
    for rotation in ("auto", "on", "off"):  # "auto" rotates on the way from one to the other
        config = {  # what a config gets later must not change this file
            "num_kv_heads": 1,
            "head_dim": 33,
            "max_tokens": 4096,
            "tail_length": 5,
            "tail_precision": "f16",
            "store_precision": "q4",
            "migration_batch": 4,
            "warm_length": 20,
            "warm_precision": "q8",
            "sink_tokens": 3,
            "rotation": rotation,
        }
        cache = ReferenceCache(kvz.CacheConfig.from_dict(config))
        cache.append(given[:, None], given[:, None])
        keys, values = cache.get_all_kv()
        assert np.array_equal(keys, values)
        made.append(
            {
                "config": config,
                "stats": asdict(cache.stats()),
                "stored": as_hex(keys[:, 0]),
            }
        )
    return {"given": as_hex(given), "cases": made}


if __name__ == "__main__":
    PATH.write_text(json.dumps(cases(), indent=1) + "\n")
    WARM_PATH.write_text(json.dumps(warm_cases(), indent=1) + "\n")
