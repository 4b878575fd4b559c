"""Pools with a spill: the bits of a pool without limit, in the memory of one with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvz
from support import KINDS, make, queries, same_bits, stream, unchanged

pytestmark = pytest.mark.skipif(os.name != "posix", reason="spills need a POSIX system")

BUDGET = 400 << 10
TOKENS = 24_000
RUN = 400  # tokens per append
FIELDS: dict[str, Any] = {"num_kv_heads": 1, "max_tokens": 100_000, "sink_tokens": 4}


def spilling(path: Path, budget: int = BUDGET, **options: Any) -> kvz.BufferPool:
    return kvz.BufferPool(max_bytes=budget, spill=path / "spill", core="native", **options)


def fill(cache: Any, tokens: int = TOKENS, seed: int = 0) -> None:
    keys, values = stream(cache.config, tokens, seed)
    for start in range(0, tokens, RUN):
        cache.append(keys[start : start + RUN], values[start : start + RUN])


def same_as(cache: Any, plain: Any) -> None:
    """Assert that two caches hold and give the same bits."""
    cache.check()
    for n, ratio in ((None, 1), (None, 4), (3, 2)):
        query = queries(cache.config, n, ratio)
        for got, expected in zip(
            cache.attend(query, return_lse=True, return_mass=True, window=20_000),
            plain.attend(query, return_lse=True, return_mass=True, window=20_000),
            strict=True,
        ):
            same_bits(got, expected)
        same_bits(cache.attend(query), plain.attend(query))
    assert cache.digest() == plain.digest()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", ["q4", "q8", ("q8", "q4"), "f16"])
def test_a_spilled_cache_has_the_same_bits(kind: str, store: Any, tmp_path: Path) -> None:
    pool = spilling(tmp_path)
    with (
        make("native", kind, pool=pool, store_precision=store, **FIELDS) as cache,
        make("native", kind, store_precision=store, **FIELDS) as plain,
    ):
        fill(cache)
        fill(plain)
        assert pool.stats().bytes_in_use <= BUDGET
        assert cache.nbytes > 2 * BUDGET
        assert cache.mapped_bytes > cache.nbytes - BUDGET
        assert pool.stats().bytes_spilled >= cache.mapped_bytes
        same_as(cache, plain)
    assert pool.stats().bytes_in_use == 0
    assert pool.stats().bytes_spilled == 0
    assert not list(tmp_path.iterdir())


def test_what_is_spilled_can_be_taken_back_and_written_over(tmp_path: Path) -> None:
    """A trim into the file, then other tokens: the row is copied, the file stays as it is."""
    pool = spilling(tmp_path)
    with make("native", pool=pool, **FIELDS) as cache, make("native", **FIELDS) as plain:
        for one in (cache, plain):
            fill(one)
            one.trim(TOKENS - 5_000)
            fill(one, 9_000, seed=1)
        assert cache.mapped_bytes > 0
        same_as(cache, plain)


def test_a_window_slides_over_the_file(tmp_path: Path) -> None:
    """What the window leaves behind makes room in the file."""
    pool = spilling(tmp_path)
    fields = {**FIELDS, "max_tokens": 16_000}
    with make("native", pool=pool, **fields) as cache, make("native", **fields) as plain:
        for seed in range(3):
            fill(cache, seed=seed)
            fill(plain, seed=seed)
            same_as(cache, plain)
            assert pool.stats().bytes_spilled < 2 * cache.nbytes
        assert pool.stats().bytes_written > 2 * pool.stats().bytes_spilled


def test_forks_share_what_is_in_the_file(tmp_path: Path) -> None:
    pool = spilling(tmp_path)
    with make("native", pool=pool, **FIELDS) as cache, make("native", **FIELDS) as plain:
        fill(cache)
        fill(plain)
        before = pool.stats().bytes_spilled
        with cache.fork(10_000) as fork, plain.fork(10_000) as expected:
            assert pool.stats().bytes_spilled == before
            cache.close()
            for one in (fork, expected):
                fill(one, 6_000, seed=2)
            same_as(fork, expected)
    assert pool.stats().bytes_spilled == 0


def test_a_spilled_cache_is_saved_and_loaded(tmp_path: Path) -> None:
    pool = spilling(tmp_path)
    with make("native", pool=pool, **FIELDS) as cache:
        fill(cache)
        cache.save(tmp_path / "x")
        with kvz.TwoTierCache.load(tmp_path / "x") as loaded:
            assert loaded.digest() == cache.digest()
        other = spilling(tmp_path)
        with kvz.TwoTierCache.load(tmp_path / "x", mmap=True, pool=other) as mapped:
            fill(mapped, 8_000, seed=3)
            fill(cache, 8_000, seed=3)
            same_as(mapped, cache)


def test_layers_share_a_budget(tmp_path: Path) -> None:
    pool = spilling(tmp_path, budget=3 * BUDGET)
    fields = {**FIELDS, "head_dim": 32}
    with (
        kvz.ModelCache(None, 3, pool=pool, **fields) as model,
        kvz.ModelCache(None, 3, core="native", **fields) as plain,
    ):
        keys, values = stream(model[0].config, TOKENS)
        for start in range(0, TOKENS, RUN):
            for one in (model, plain):
                for layer in one:
                    layer.append(keys[start : start + RUN], values[start : start + RUN])
        assert pool.stats().bytes_in_use <= 3 * BUDGET
        assert model.digest() == plain.digest()


@pytest.mark.parametrize("limit", [1, BUDGET])
def test_the_write_limit_holds_and_nothing_is_lost(limit: int, tmp_path: Path) -> None:
    """Then the pool is full as any other, and room comes with what is taken back."""
    pool = spilling(tmp_path, spill_write_bytes=limit)
    with make("native", pool=pool, **FIELDS) as cache, make("native", **FIELDS) as plain:
        keys, values = stream(cache.config, TOKENS)
        with pytest.raises(kvz.PoolExhaustedError, match=f"spill may write no more than {limit} "):
            fill(cache)
        assert pool.stats().bytes_written <= limit
        held = len(cache)
        plain.append(keys[:held], values[:held])
        for _ in range(2):
            with unchanged(cache), pytest.raises(kvz.PoolExhaustedError):
                cache.append(keys[:RUN], values[:RUN])
        assert cache.digest() == plain.digest()
        cache.trim(2 * RUN)
        cache.append(keys[:RUN], values[:RUN])


def test_pages_that_forks_share_are_not_moved(tmp_path: Path) -> None:
    """Moving them would free nothing: the pool is full until the fork goes."""
    pool = spilling(tmp_path)
    with make("native", pool=pool, **FIELDS) as cache:
        fill(cache, 6_000)
        fork = cache.fork()
        with unchanged(cache, fork), pytest.raises(kvz.PoolExhaustedError):
            cache.append(*stream(cache.config, 30_000))
        fork.close()
        fill(cache, 6_000)
        cache.check()


@pytest.mark.usefixtures("native_core")
def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "spill"
    refuse = kvz.InvalidArgumentError
    with pytest.raises(refuse, match="max_bytes"):
        kvz.BufferPool(spill=path)
    with pytest.raises(refuse, match="beside spill"):
        kvz.BufferPool(max_bytes=1, spill_write_bytes=1)
    with pytest.raises(refuse, match="spill_write_bytes"):
        kvz.BufferPool(max_bytes=1, spill=path, spill_write_bytes=0)
    assert not path.exists()
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        kvz.BufferPool(max_bytes=1, spill=path)
    assert path.read_bytes() == b"precious"
    pytest.importorskip("wasmtime")
    with pytest.raises(refuse, match="wasm"):
        kvz.BufferPool(max_bytes=1, spill=tmp_path / "other", core="wasm")


RESIDENT = """
import sys
import numpy as np
import kvz

def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

budget = 48 << 20
pool = kvz.BufferPool(max_bytes=budget, spill=sys.argv[1])
cache = kvz.TwoTierCache(num_kv_heads=8, head_dim=128, max_tokens=1 << 20, pool=pool)
x = np.random.default_rng(0).standard_normal((256, 8, 128)).astype(np.float32)
query = np.ones((32, 128), np.float32)
cache.append(x, x)
cache.attend(query)
start, most = resident(), 0
while cache.nbytes < 4 * budget:
    cache.append(x, x)
    most = max(most, resident())
for _ in range(5):
    cache.attend(query)
    most = max(most, resident())
print((most - start) / budget)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """A cache four times as large as its budget takes a tenth more than that at most."""
    command = [sys.executable, "-c", RESIDENT, str(tmp_path / "spill")]
    environment = {**os.environ, "KVZ_CORE": "native", "KVZ_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert 0.5 < float(done.stdout) <= 1.1
