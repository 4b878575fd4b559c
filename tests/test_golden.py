"""Stored values against files that the reference wrote: neither may drift, nor both together."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import kvz
from make_goldens import PATH, WARM_PATH, as_hex, cases, from_hex, warm_cases
from support import f32, make, make_from, same_bits

GOLDEN = json.loads(PATH.read_text())
WARM = json.loads(WARM_PATH.read_text())


def test_the_reference_still_writes_the_same_files() -> None:
    """Regenerating gives the files to the byte; a change of them is a change of the format."""
    assert cases() == GOLDEN
    assert warm_cases() == WARM


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


@pytest.mark.parametrize("case", WARM["cases"], ids=lambda case: case["config"]["rotation"])
@pytest.mark.parametrize("step", [100, 1])
def test_the_core_stores_what_the_file_says_on_the_way_through_the_warm_tier(
    core: Any, case: dict[str, Any], step: int
) -> None:
    """Sinks and tail, what is warm, and what was warm, in one append or token by token."""
    given, stored = from_hex(WARM["given"])[:, None], from_hex(case["stored"])
    cache = make_from(core, kvz.CacheConfig.from_dict(case["config"]))
    for start in range(0, len(given), step):
        cache.append(given[start : start + step], given[start : start + step])
    counts = cache.stats()
    assert {name: getattr(counts, name) for name in case["stats"]} == case["stats"]
    for held in cache.get_all_kv():
        same_bits(held[:, 0], stored)


def test_hex_is_exact() -> None:
    """The notation of the file keeps every bit."""
    x = f32([[0.0, -0.0, 1e-45, 3.4e38, -1 / 3]])
    same_bits(from_hex(as_hex(x)), x)
