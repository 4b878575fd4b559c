"""The bugs of the original system, each by its number, and each shown to be gone: 27 to 43.

Inputs, configuration, concurrency, and what was missing; test_origin_bugs.py has the others.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvz
from kvz._core import load
from support import agree, leaving, make, queries, stream, together, twins, wait_for_more

# -- D. Input and configuration ------------------------------------------------------------------


def test_bug_27_a_remainder_is_refused(core: Any) -> None:
    """Seven numbers are not a token of eight with one left out."""
    for kind in ("two_tier", "pooled"):
        cache = make(core, kind, num_kv_heads=1, head_dim=4)
        for count in (3, 7):
            with pytest.raises(kvz.InvalidArgumentError, match=rf"keys.*\({count},\)"):
                cache.append(np.ones(count, np.float32), np.ones(count, np.float32))
        assert len(cache) == 0
        assert cache.nbytes == 0


def test_bug_28_lengths_are_compared_and_zero_sizes_refused(core: Any) -> None:
    """Different lengths are an error, and so is a head_dim or a number of heads of zero."""
    cache = make(core)
    keys, values = stream(cache.config, 3)
    with pytest.raises(kvz.InvalidArgumentError, match="values"):
        cache.append(keys, values[:2])
    for field in ("head_dim", "num_kv_heads"):
        with pytest.raises(kvz.ConfigError, match=field):
            make(core, **{field: 0})


def test_bug_29_zero_lengths_are_refused_or_work(core: Any) -> None:
    """No panic, no endless loop: such a configuration cannot be made, or means what it says."""
    for fields in ({"migration_batch": 0}, {"max_tokens": 8, "tail_length": 9}):
        with pytest.raises(kvz.ConfigError, match=next(iter(fields))):
            make(core, **fields)
    cache = make(core, tail_length=0, migration_batch=2, num_kv_heads=1, head_dim=4)
    cache.append(np.ones((5, 1, 4)), np.ones((5, 1, 4)))
    assert (cache.stats().store_tokens, cache.stats().tail_tokens) == (4, 1)


def test_bug_30_a_block_takes_both_or_none(core: Any) -> None:
    """Short values stop a block's append before any key is written."""
    block = kvz.PooledBlock(kvz.BufferPool(core=core), 8, num_kv_heads=2, head_dim=4)
    with pytest.raises(kvz.InvalidArgumentError, match="values"):
        block.append(np.ones((3, 2, 4)), np.ones((2, 2, 4)))
    assert block.token_count == 0
    assert block.append(np.ones((3, 2, 4)), np.ones((3, 2, 4))) == 3


@pytest.mark.parametrize("size", [1, 2, 16, 63, 100])
def test_bug_31_blocks_hold_what_was_asked(core: Any, size: int) -> None:
    """The number of tokens per block is the one given, in blocks and in caches."""
    block = kvz.PooledBlock(kvz.BufferPool(core=core), size, num_kv_heads=2, head_dim=4)
    assert block.append(np.ones((200, 2, 4)), np.ones((200, 2, 4))) == size
    assert block.is_full
    cache = kvz.PooledCache(num_kv_heads=2, head_dim=4, tokens_per_block=size, core=core)
    cache.append(np.ones((200, 2, 4)), np.ones((200, 2, 4)))
    assert cache.stats().tokens_per_block == size
    assert cache.stats().block_count == -(-200 // size)


def test_bug_32_blocks_may_be_large(core: Any) -> None:
    """The default shape with 128 or 1024 tokens per block works, as does a buffer beyond 256 KB."""
    for size in (128, 1024):
        cache = kvz.PooledCache(tokens_per_block=size, core=core)
        cache.append(np.ones((10, 8, 128), np.float32), np.ones((10, 8, 128), np.float32))
        assert len(cache) == 10
    assert kvz.BufferPool(core=core).acquire_for_size(1 << 20).capacity == 1 << 20


def test_bug_33_an_append_is_whole_or_not(core: Any) -> None:
    """A pool that ends in the middle of an append leaves the cache as it was."""
    pool = kvz.BufferPool(core=core, max_bytes=1 << 16)
    cache = make(core, "pooled", pool=pool, max_tokens=10_000)
    cache.append(*stream(cache.config, 70))
    digest, used = cache.digest(), pool.stats().bytes_in_use
    with pytest.raises(kvz.PoolExhaustedError):
        cache.append(*stream(cache.config, 5_000))
    assert (cache.digest(), pool.stats().bytes_in_use) == (digest, used)


def test_bug_34_huge_capacities_are_refused() -> None:
    """No product of sizes wraps around to a small buffer."""
    for capacity in (2**62, 2**63 - 1, 2**64 // 4 + 3):
        with pytest.raises(kvz.KvzError):
            kvz.AlignedBuffer(capacity)
    buffer = kvz.AlignedBuffer(2)
    with pytest.raises(kvz.InvalidArgumentError, match="values"):
        buffer.extend(np.ones(3))
    assert len(buffer) == 0


def test_bug_35_a_pool_takes_its_own_buffers_only(core: Any) -> None:
    """Another pool's buffer, and a buffer given back twice, are refused by the core itself."""
    abi = load(core)
    foreign = abi.enums["Status"]["foreign_buffer"]
    mine, other = kvz.BufferPool(core=core), kvz.BufferPool(core=core)
    pointer, size = abi.ctypes["ptr"](), ctypes.c_uint64()
    with mine._handle as pool, abi.frame() as frame:
        abi.check(abi.pool_acquire(pool, 1000, frame.ref(pointer), frame.ref(size)))
    with mine._handle as pool, other._handle as wrong, abi.frame():
        assert abi.pool_release(wrong, pointer.value) == foreign
        assert abi.pool_release(pool, pointer.value + 64) == foreign
        assert mine.stats().bytes_in_use == size.value == 1024
        assert abi.pool_release(pool, pointer.value) == 0
        assert abi.pool_release(pool, pointer.value) == foreign
    assert (mine.stats().returns, other.stats().returns) == (1, 0)
    strange = kvz.BufferPool(core="wasm" if core == "native" else "native")
    with pytest.raises(kvz.InvalidArgumentError, match="pool"):
        make(core, pool=strange)


def test_bug_36_no_memory_is_an_error(core: Any) -> None:
    """What cannot be had is a MemoryError, and the pool goes on."""
    pool = kvz.BufferPool(core=core, max_bytes=4096)
    for size in (1 << 13, 1 << 45, (1 << 63) - 1):
        with pytest.raises(MemoryError):
            pool.acquire_for_size(size)
    assert pool.stats().bytes_in_use == 0
    assert pool.acquire_for_size(4096).capacity == 4096


# -- E. Concurrency ------------------------------------------------------------------------------


def beside_a_writer(cache: Any, read: Callable[[], None], tokens: int = 3000) -> None:
    """Call `read` again and again while another thread appends tokens that are their position."""
    finished = threading.Event()
    looked: list[None] = []

    @leaving(finished)
    def write() -> None:
        for first in range(0, tokens, 3):
            numbers = np.arange(first, first + 3, dtype=np.float32)[:, None, None]
            both = np.ascontiguousarray(np.broadcast_to(numbers, (3, 2, 32)))
            cache.append(both, both)
            if first % 30 == 0:
                wait_for_more(looked, finished)

    @leaving(finished)
    def look() -> None:
        while not finished.is_set():
            read()
            looked.append(None)

    together(write, look)
    assert cache.next_position == tokens
    assert len(looked) >= tokens / 30


def exact(core: Any, **fields: Any) -> Any:
    """Make a cache that keeps whole numbers as they are."""
    return make(core, store_precision="f32", tail_precision="f32", **fields)


def test_bug_37_no_token_is_missed_on_its_way_to_the_store(core: Any) -> None:
    """While tokens migrate, what is read has neither holes nor doubles."""
    cache = exact(core, max_tokens=4096)

    def read() -> None:
        keys = cache.get_all_kv()[0][:, 0, 0]
        np.testing.assert_array_equal(keys, np.arange(len(keys)))

    beside_a_writer(cache, read)


def test_bug_38_aligned_copies_fit_under_a_writer(core: Any) -> None:
    """The buffers are as long as what is read into them, however the cache grows meanwhile."""
    cache = exact(core, max_tokens=4096)

    def read() -> None:
        keys, values = cache.get_all_kv_aligned()
        assert len(keys) == len(values)
        numbers = np.asarray(keys).reshape(-1, 2 * 32)[:, 0]
        np.testing.assert_array_equal(numbers, np.arange(len(numbers)))

    beside_a_writer(cache, read)


def test_bug_39_four_writers_get_distinct_positions(core: Any) -> None:
    """As many positions as tokens, whoever appended them."""
    cache = exact(core, max_tokens=4096)
    one = np.ones((1, 2, 32), np.float32)
    together(*[lambda: [cache.append(one, one) for _ in range(200)]] * 4)
    assert len(cache) == cache.next_position == 800
    assert len(set(cache.positions.tolist())) == 800


def test_bug_40_readers_and_an_evicting_writer_do_not_deadlock(core: Any) -> None:
    """Appends that evict, attention, reads and counts go on beside each other to the end."""
    cache = exact(core, max_tokens=20)
    query = queries(cache.config)
    until = time.monotonic() + 60

    def read() -> None:
        cache.attend(query, return_mass=True)
        cache.get_all_kv()
        assert cache.stats().total_tokens <= 20
        assert time.monotonic() < until

    beside_a_writer(cache, read)


def test_bug_41_counters_are_of_one_moment_and_fall_again(core: Any) -> None:
    """In one snapshot bytes and counts agree; what is in use falls when it is given back."""
    pool = kvz.BufferPool(core=core)
    finished = threading.Event()
    looked: list[None] = []
    churned: list[None] = []

    def churn() -> None:
        try:
            for step in range(200):
                pool.acquire(kvz.BufferSize.KB4).release()
                if step % 10 == 0:
                    wait_for_more(looked, finished)
        finally:
            churned.append(None)

    @leaving(finished)
    def look() -> None:
        while len(churned) < 3:
            now = pool.stats()
            assert now.hits + now.misses - now.returns - now.drops == now.bytes_in_use // 4096
            assert now.bytes_free == now.free_buffers[1] * 4096
            assert now.bytes_in_use <= now.bytes_high_water <= 3 * 4096
            looked.append(None)

    together(look, churn, churn, churn)
    assert len(looked) >= 20
    now = pool.stats()
    assert now.hits + now.misses == now.returns + now.drops == 600
    assert (now.bytes_in_use, now.allocations) == (0, now.misses)


# -- F. What was missing, and tests that said little ---------------------------------------------


def test_bug_42_what_was_missing_is_there(core: Any) -> None:
    """Several causal queries, GQA, window, softcap, rollback, ranges, tiers, a budget, privacy."""
    pool = kvz.BufferPool(core=core, max_bytes=1 << 20, zero_on_release=True)
    real, model = twins(core, tokens=100, sink_tokens=2)
    agree(real, model, queries(real.config, 9, 3), window=40, softcap=5.0)
    assert real.trim(10) == model.trim(10) == 10
    assert len(real.get_kv(20, 30)[0]) == 10
    assert len(real.tail_view()[0]) == real.stats().tail_tokens
    assert pool.stats().max_bytes == 1 << 20
    buffer = pool.acquire(kvz.BufferSize.KB1)
    buffer.view()[:] = 255
    buffer.release()
    assert not pool.acquire(kvz.BufferSize.KB1).view().any()
    assert pool.stats().hits == 1
    assert kvz.quantize(np.ones((64, 64)), "q4").bits_per_value == 4.5


def test_bug_43_prewarmed_buffers_are_used_and_counted(core: Any) -> None:
    """Prewarming makes hits; every counter has one exact value."""
    pool = kvz.BufferPool(core=core, max_free_per_class=3)
    pool.prewarm(kvz.BufferSize.KB4, 2)
    assert pool.stats().free_buffers == (0, 2, 0, 0, 0)
    before = pool.stats()
    buffers = [pool.acquire_for_size(4000) for _ in range(5)]
    taken = pool.stats()
    assert (taken.hits - before.hits, taken.misses - before.misses) == (2, 3)
    assert taken.allocations - before.allocations == 3
    assert taken.bytes_in_use == 5 * 4096
    for buffer in buffers:
        buffer.release()
    after = pool.stats()
    assert (after.returns - taken.returns, after.drops - taken.drops) == (3, 2)
    assert (after.bytes_in_use, after.bytes_free) == (0, 3 * 4096)
    with pytest.raises(kvz.KvzError):
        pool.prewarm(kvz.BufferSize.KB4, -1)
    tight = kvz.BufferPool(core=core, max_bytes=8192)
    with pytest.raises(MemoryError):
        tight.prewarm(kvz.BufferSize.KB4, 3)
