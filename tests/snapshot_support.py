"""What the tests of snapshots share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from support import make, same_bits, stream


def filled(core: str, kind: str = "two_tier", tokens: int = 150, **fields: Any) -> Any:
    """Make a cache that holds tokens in every tier."""
    cache = make(core, kind, **{"sink_tokens": 3, **fields})
    cache.append(*stream(cache.config, tokens))
    return cache


def same_cache(got: Any, expected: Any) -> None:
    """Assert that two caches are the same, now and after the same appends."""
    assert got.config == expected.config
    got.check()
    for _ in range(2):
        assert got.digest() == expected.digest()
        assert got.stats().evicted_tokens == expected.stats().evicted_tokens
        np.testing.assert_array_equal(got.positions, expected.positions)
        for a, b in zip(got.get_all_kv(), expected.get_all_kv(), strict=True):
            same_bits(a, b)
        more = stream(expected.config, 70, seed=9)
        got.append(*more)
        expected.append(*more)


def corrupt(path: Path, at: int) -> None:
    """Flip a bit in place, as a disk might."""
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
