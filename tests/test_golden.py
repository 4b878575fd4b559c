"""Stored values against a file that the reference wrote: neither may drift, nor both together."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from make_goldens import PATH, as_hex, cases, from_hex
from support import f32, make, same_bits

GOLDEN = json.loads(PATH.read_text())


def test_the_reference_still_writes_the_same_file() -> None:
    """Regenerating gives the file to the byte; a change of it is a change of the format."""
    assert cases() == GOLDEN


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_the_core_stores_what_the_file_says(core: Any, case: dict[str, Any]) -> None:
    """A store reads back the golden bits, for keys and for values."""
    given, stored = from_hex(case["given"]), from_hex(case["stored"])
    tokens, dim = given.shape
    cache = make(
        core,
        num_kv_heads=1,
        head_dim=dim,
        tail_precision="f32",
        store_precision=case["precision"],
        rotation=case["rotation"],
        tail_length=1,
        migration_batch=1,
    )
    cache.append(given[:, None], given[:, None])
    cache.append(np.zeros((1, 1, dim), np.float32), np.zeros((1, 1, dim), np.float32))
    assert cache.stats().store_tokens == tokens
    keys, values = cache.get_all_kv()
    same_bits(values[:tokens, 0], stored)
    same_bits(keys[:tokens, 0], from_hex(case["keys"]) if "keys" in case else stored)


def test_hex_is_exact() -> None:
    """The notation of the file keeps every bit."""
    x = f32([[0.0, -0.0, 1e-45, 3.4e38, -1 / 3]])
    same_bits(from_hex(as_hex(x)), x)
