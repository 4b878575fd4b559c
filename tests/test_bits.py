"""One stream, one result: to the bit, on any core, any kernels, any threads, any cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvz
import workload
from support import KINDS, cuts, make, queries, same_bits, stream

kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def native() -> dict[str, str]:
    """What the kernels of this machine's choice give."""
    return workload.fingerprint("native")


def kernels() -> list[str]:
    """Every name that KVZ_ISA may have here; none if there is no native core to ask."""
    try:
        return list(kvz.info("native").available_isas)
    except kvz.CoreError:
        return []


def test_wasm_gives_the_bits_of_the_native_core() -> None:
    """The WebAssembly module computes what the native library computes."""
    assert workload.fingerprint("wasm") == native()


@pytest.mark.parametrize("isa", kernels())
def test_all_kernels_give_the_same_bits(isa: str) -> None:
    """Whatever the processor offers, the result is the same; the kernels asked for did run."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("workload.py")],
        env={**os.environ, "KVZ_CORE": "native", "KVZ_ISA": isa},
        capture_output=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["isa"] == isa
    assert found["hashes"] == native()


@pytest.fixture
def threads() -> Iterator[Any]:
    """Let a test choose the number of threads, and put it back."""
    before = kvz.get_num_threads("native")
    yield lambda count: kvz.set_num_threads(count, "native")
    kvz.set_num_threads(before, "native")


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_number_of_threads_does_not_show(threads: Any, count: int) -> None:
    """The work is cut in the same way however many threads share it."""
    threads(count)
    assert kvz.get_num_threads("native") == count
    assert workload.fingerprint("native") == native()


@kinds
@pytest.mark.parametrize("store", ["f16", "q8", "q4", "q5k", "q2k"])
def test_a_thousand_appends_are_one(core: Any, kind: str, store: str) -> None:
    """One append of 1000 tokens, 1000 of one, and random cuts end in the same bits."""
    fields = {"store_precision": store, "max_tokens": 700, "sink_tokens": 4, "head_dim": 33}
    whole, single, parts = (make(core, kind, **fields) for _ in range(3))
    keys, values = stream(whole.config, 1000)
    whole.append(keys, values)
    for i in range(1000):
        single.append(keys[i], values[i])
    for part in cuts(1000, seed=5):
        parts.append(keys[part], values[part])
    query = queries(whole.config, 3, 2)
    expected = (*whole.get_all_kv(), whole.attend(query))
    for other in (single, parts):
        assert other.digest() == whole.digest()
        for got, wanted in zip((*other.get_all_kv(), other.attend(query)), expected, strict=True):
            same_bits(got, wanted)


@pytest.mark.parametrize("store", ["f32", "f16", "q8", "q4", "q4k"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *((kind, {}) for kind in KINDS),
        *((kind, {"max_tokens": 250, "sink_tokens": 70}) for kind in KINDS),
        ("two_tier", {"warm_length": 64}),
    ],
)
def test_a_long_append_is_many_short_ones(
    core: Any, kind: str, store: str, fields: dict[str, Any]
) -> None:
    """What goes into whole new pages at once has the bits of tokens that come in small numbers."""
    fields = {"store_precision": store, "max_tokens": 900, "tail_length": 40, **fields}
    long, short = (make(core, kind, num_kv_heads=8, head_dim=128, **fields) for _ in range(2))
    keys, values = stream(long.config, 700)
    for part in (slice(0, 70), slice(70, 400), slice(400, 700)):
        long.append(keys[part], values[part])
    for first in range(0, 700, 35):
        short.append(keys[first : first + 35], values[first : first + 35])
    assert long.digest() == short.digest()
    for one in (long, short):
        one.check()
    query = queries(long.config, 3, 2)
    same_bits(long.attend(query), short.attend(query))


@kinds
@pytest.mark.parametrize("store", ["f16", "q8", "q4", "q5k", "q2k"])
@pytest.mark.parametrize("ratio", [1, 2, 3, 7])
def test_a_query_gives_the_same_bits_alone_and_in_a_batch(
    core: Any, kind: str, store: str, ratio: int
) -> None:
    """N queries at once are any suffix of them, and the cache of that moment asked one by one."""
    fields = {"store_precision": store, "max_tokens": 300, "sink_tokens": 1}
    held = make(core, kind, **fields)
    keys, values = stream(held.config, 200)
    held.append(keys, values)
    query = queries(held.config, 80, ratio)
    for options in ({}, {"window": 30}, {"softcap": 2.0, "alibi_slopes": np.full(2 * ratio, 0.1)}):
        out, lse = held.attend(query, return_lse=True, **options)
        for i in (1, 15, 16, 17, 40, 78, 79):
            part, part_lse = held.attend(query[i:], return_lse=True, **options)
            same_bits(part, out[i:])
            same_bits(part_lse, lse[i:])
        same_bits(held.attend(query[-1], **options), out[-1])


@kinds
def test_query_heads_do_not_depend_on_their_neighbours(core: Any, kind: str) -> None:
    """A query head gives the same bits with any other heads beside it."""
    held = make(core, kind, store_precision="q4", num_kv_heads=1)
    keys, values = stream(held.config, 200)
    held.append(keys, values)
    query = queries(held.config, 5, 7)
    out = held.attend(query)
    for head in range(7):
        same_bits(held.attend(query[:, head : head + 1]), out[:, head : head + 1])


@kinds
def test_what_is_masked_does_not_show(core: Any, kind: str) -> None:
    """A mask that hides what causality hides already changes no bit."""
    held = make(core, kind, store_precision="q4")
    keys, values = stream(held.config, 150)
    held.append(keys, values)
    query = queries(held.config, 70, 2)
    causal = np.arange(150) <= np.arange(80, 150)[:, None]
    expected = held.attend(query)
    same_bits(held.attend(query, mask=causal), expected)
    same_bits(held.attend(query, mask=causal, causal=False), expected)
    same_bits(held.attend(query, mask=np.ones(150, bool)), expected)
    same_bits(held.attend(query, mask=np.zeros(150, np.float32)), expected)


@kinds
def test_a_cache_of_one_head_is_a_head_of_a_cache(core: Any, kind: str) -> None:
    """KV heads do not depend on each other."""
    both = make(core, kind, store_precision="q4")
    keys, values = stream(both.config, 150)
    both.append(keys, values)
    query = queries(both.config, 4, 3)
    out = both.attend(query)
    for head in range(2):
        one = make(core, kind, store_precision="q4", num_kv_heads=1)
        one.append(keys[:, head : head + 1], values[:, head : head + 1])
        same_bits(one.attend(query[:, 3 * head : 3 * head + 3]), out[:, 3 * head : 3 * head + 3])
