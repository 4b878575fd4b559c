"""The self-test of ``kvz info``: the native and the wasm core must give the same bits.

Called by cli.py; calls cache.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from kvz.cache import TwoTierCache
from kvz.config import CacheConfig, StorePrecision
from kvz.errors import CoreError

CORES = ("native", "wasm")
STORES: tuple[StorePrecision, ...] = (
    "f32",
    "f16",
    "bf16",
    "q8",
    "q4",
    ("q8", "q4"),
    ("q5k", "q4k"),
)
TOKENS, HEADS, QUERIES_PER_HEAD, HEAD_DIM = 300, 2, 3, 80


class Outcome(NamedTuple):
    """What a self-test found, and in words."""

    result: Literal["passed", "failed", "skipped"]
    detail: str


def compare_cores() -> Outcome:
    """Run the same tokens through both cores, in every format."""
    for store in STORES:
        config = CacheConfig(
            num_kv_heads=HEADS,
            head_dim=HEAD_DIM,
            tail_length=64,
            sink_tokens=4,
            store_precision=store,
        )
        try:
            native, wasm = (results(config, core) for core in CORES)
            for ours, theirs in zip(native, wasm, strict=True):
                if ours != theirs:
                    return Outcome("failed", f"native and wasm differ in the store {store!r}")
        except CoreError as error:
            return Outcome("skipped", str(error))
    return Outcome("passed", f"native and wasm give the same bits, {len(STORES)} stores")


def results(config: CacheConfig, core: str) -> Iterator[bytes]:
    """Yield the bytes of everything that can be read of a cache."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((32, HEADS * QUERIES_PER_HEAD, HEAD_DIM), np.float32)
    with TwoTierCache(config, core=core) as cache:
        for tokens in (TOKENS - 1, 1):
            shape = (tokens, HEADS, HEAD_DIM)
            cache.append(rng.standard_normal(shape), rng.standard_normal(shape))
        for part in (*cache.get_all_kv(), *cache.attend(query, return_lse=True)):
            yield part.tobytes()
