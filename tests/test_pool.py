"""Memory: size classes, counters, limits, who owns what and for how long."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import numpy as np
import pytest

import kvz
from kvz import AlignedBuffer, BufferPool, BufferSize, PooledBlock
from support import make, rows, same_bits, stream, together

SIZES = {"KB1": 1024, "KB4": 4096, "KB16": 16384, "KB64": 65536, "KB256": 262144}


# -- Size classes ----------------------------------------------------------------------------------


def test_size_classes_are_their_bytes() -> None:
    """Five classes, four times as large each."""
    assert {size.name: int(size) for size in BufferSize} == SIZES


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [(0, "KB1"), (1, "KB1"), (1024, "KB1"), (1025, "KB4"), (65536, "KB64"), (262144, "KB256")],
)
def test_the_smallest_class_that_fits(core: Any, nbytes: int, expected: str) -> None:
    """for_size and acquire_for_size agree."""
    assert BufferSize.for_size(nbytes) is BufferSize[expected]
    buffer = BufferPool(core=core).acquire_for_size(nbytes)
    assert (buffer.capacity, buffer.size_class) == (SIZES[expected], BufferSize[expected])


def test_larger_than_all_classes_is_no_error(core: Any) -> None:
    """Such a buffer has its own size, in whole 4 KB."""
    assert BufferSize.for_size(262145) is None
    buffer = BufferPool(core=core).acquire_for_size(262145)
    assert (buffer.capacity, buffer.size_class) == (262144 + 4096, None)


@pytest.mark.parametrize("size", [0, 1000, -1, 262145])
def test_only_classes_can_be_asked_for_as_classes(core: Any, size: int) -> None:
    """Acquire and prewarm take a class, not any size."""
    pool = BufferPool(core=core)
    for call in (pool.acquire, lambda size: pool.prewarm(size, 1)):
        with pytest.raises(ValueError, match=r"^size_class: expected"):
            call(size)


# -- The pool --------------------------------------------------------------------------------------


def test_a_new_pool_holds_nothing(core: Any) -> None:
    """All counters are zero; the hit rate of no requests is zero."""
    stats = BufferPool(core=core, max_bytes=1 << 20).stats()
    assert stats == kvz.PoolStats(max_bytes=1 << 20, huge_pages=stats.huge_pages)
    assert stats.hit_rate == 0.0
    assert set(stats.to_dict()) >= {"hits", "bytes_in_use", "free_buffers", "hit_rate"}


@pytest.mark.parametrize("size", BufferSize)
def test_a_buffer_is_a_miss_then_a_hit(core: Any, size: BufferSize) -> None:
    """The first request allocates, the next one reuses what came back."""
    pool = BufferPool(core=core)
    first = pool.acquire(size)
    now = pool.stats()
    assert (now.hits, now.misses, now.allocations, now.returns) == (0, 1, 1, 0)
    assert (now.bytes_in_use, now.bytes_free, now.bytes_high_water) == (size, 0, size)
    assert now.bytes_reserved >= size
    address = first.address
    first.release()
    now = pool.stats()
    assert (now.returns, now.drops, now.bytes_in_use, now.bytes_free) == (1, 0, 0, size)
    assert now.free_buffers == tuple(int(size == other) for other in BufferSize)
    again = pool.acquire(size)
    assert again.address == address
    now = pool.stats()
    assert (now.hits, now.misses, now.allocations, now.hit_rate) == (1, 1, 1, 0.5)


@pytest.mark.parametrize("nbytes", [*BufferSize, 300_000])
def test_buffers_are_aligned_and_zero_at_first(core: Any, nbytes: int) -> None:
    """Every buffer starts at a multiple of 64 in the memory of its core."""
    buffer = BufferPool(core=core).acquire_for_size(nbytes)
    assert buffer.address % 64 == 0
    assert not buffer.view().any()
    assert len(buffer) == buffer.view().nbytes == buffer.capacity


def test_buffers_do_not_overlap(core: Any) -> None:
    """Each keeps what was written to it while others come and go."""
    pool = BufferPool(core=core)
    rng = np.random.default_rng(0)
    held: dict[int, Any] = {}
    for step in range(300):
        if held and rng.random() < 0.4:
            mark, buffer = held.popitem() if step % 2 else (min(held), held.pop(min(held)))
            assert (buffer.view(np.int64) == mark).all()
            buffer.release()
        else:
            buffer = pool.acquire_for_size(int(rng.integers(0, 70_000)))
            buffer.view(np.int64)[:] = step
            held[step] = buffer
    for mark, buffer in held.items():
        assert (buffer.view(np.int64) == mark).all()
    assert pool.stats().bytes_in_use == sum(buffer.capacity for buffer in held.values())


def test_reused_buffers_are_cleared_on_request(core: Any) -> None:
    """With zero_on_release nothing of the last holder can be read."""
    for clear in (False, True):
        pool = BufferPool(core=core, zero_on_release=clear)
        with pool.acquire(BufferSize.KB4) as buffer:
            buffer.view()[:] = 7
        assert pool.acquire(BufferSize.KB4).view().any() != clear


def test_clear_fills_a_buffer_with_zeros(core: Any) -> None:
    """By hand, whenever one likes."""
    buffer = BufferPool(core=core).acquire(BufferSize.KB1)
    buffer.view()[:] = 7
    buffer.clear()
    assert not buffer.view().any()


def test_free_buffers_are_limited_per_class(core: Any) -> None:
    """What comes back beyond max_free_per_class is dropped, and counted."""
    pool = BufferPool(core=core, max_free_per_class=2)
    buffers = [pool.acquire(BufferSize.KB4) for _ in range(5)]
    for buffer in buffers:
        buffer.release()
    now = pool.stats()
    assert (now.returns, now.drops, now.free_buffers[1], now.bytes_free) == (2, 3, 2, 2 * 4096)
    none = BufferPool(core=core, max_free_per_class=0)
    none.acquire(BufferSize.KB4).release()
    assert (none.stats().drops, none.stats().bytes_free) == (1, 0)


def test_prewarm_makes_hits(core: Any) -> None:
    """Prewarmed buffers are free, and the next requests are hits."""
    pool = BufferPool(core=core, max_free_per_class=3)
    pool.prewarm(BufferSize.KB16, 2)
    assert pool.stats().free_buffers == (0, 0, 2, 0, 0)
    held = [pool.acquire(BufferSize.KB16) for _ in range(2)]
    assert (pool.stats().hits, pool.stats().misses) == (2, 0)
    pool.prewarm_all(10**9)  # as far as the free list goes
    assert pool.stats().free_buffers == (3, 3, 3, 3, 3)
    del held


def test_clear_gives_free_buffers_back(core: Any) -> None:
    """Those in use stay, and so do the counters."""
    pool = BufferPool(core=core)
    pool.prewarm_all(2)
    buffer = pool.acquire(BufferSize.KB1)
    buffer.view()[:] = 5
    pool.clear()
    now = pool.stats()
    assert (now.bytes_free, now.bytes_in_use, now.hits) == (0, 1024, 1)
    assert (buffer.view() == 5).all()


def test_the_limit_is_hard(core: Any) -> None:
    """A request beyond max_bytes fails and changes nothing; free buffers make room for others."""
    pool = BufferPool(core=core, max_bytes=10 * 1024)
    held = [pool.acquire(BufferSize.KB4) for _ in range(2)]
    before = pool.stats()
    with pytest.raises(kvz.PoolExhaustedError) as caught:
        pool.acquire(BufferSize.KB4)
    assert isinstance(caught.value, MemoryError)
    assert str(10 * 1024) in str(caught.value)
    after = pool.stats()
    assert (after.bytes_in_use, after.bytes_free) == (before.bytes_in_use, before.bytes_free)
    held.pop().release()
    smalls = [pool.acquire(BufferSize.KB1) for _ in range(6)]  # the free KB4 has to go
    now = pool.stats()
    assert now.bytes_in_use + now.bytes_free <= 10 * 1024
    assert now.bytes_high_water == 4096 + len(smalls) * 1024


def test_a_limit_below_the_smallest_class_allows_nothing(core: Any) -> None:
    """Not even one buffer; the pool itself is fine."""
    pool = BufferPool(core=core, max_bytes=1)
    with pytest.raises(MemoryError):
        pool.acquire(BufferSize.KB1)
    with pytest.raises(MemoryError):
        pool.prewarm(BufferSize.KB1, 1)
    assert pool.stats().bytes_in_use == 0


@pytest.mark.parametrize("nbytes", [1 << 45, (1 << 63) - 1])
def test_absurd_sizes_are_refused(core: Any, nbytes: int) -> None:
    """As out of memory, not as a crash."""
    pool = BufferPool(core=core)
    with pytest.raises(MemoryError):
        pool.acquire_for_size(nbytes)
    assert pool.stats().bytes_in_use == 0


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"max_free_per_class": -1}, ValueError),
        ({"max_free_per_class": 1 << 32}, ValueError),
        ({"max_free_per_class": 1.5}, TypeError),
        ({"max_bytes": 0}, ValueError),
        ({"max_bytes": -5}, ValueError),
        ({"max_bytes": "1 GB"}, TypeError),
        ({"zero_on_release": "yes"}, TypeError),
        ({"core": "cuda"}, ValueError),
        ({"core": 3}, TypeError),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], error: type[Exception]) -> None:
    """The argument is named."""
    with pytest.raises(error, match=rf"^{next(iter(fields))}: expected") as caught:
        BufferPool(**fields)
    assert isinstance(caught.value, kvz.KvzError)


# -- Who owns what ---------------------------------------------------------------------------------


def test_release_is_once(core: Any) -> None:
    """A released buffer cannot be used; a second release does nothing."""
    pool = BufferPool(core=core)
    buffer = pool.acquire(BufferSize.KB1)
    buffer.release()
    buffer.release()
    assert buffer.released
    assert "released" in repr(buffer)
    assert pool.stats().returns == 1
    for use in (buffer.view, buffer.clear, lambda: buffer.address, lambda: np.asarray(buffer)):
        with pytest.raises(kvz.ClosedError):
            use()


def test_the_garbage_collector_releases(core: Any) -> None:
    """A buffer that nobody holds goes back by itself."""
    pool = BufferPool(core=core)
    pool.acquire(BufferSize.KB1)
    gc.collect()
    assert (pool.stats().bytes_in_use, pool.stats().returns) == (0, 1)


def test_views_keep_the_memory(core: Any) -> None:
    """The memory goes back only when the last array that looks at it is gone."""
    pool = BufferPool(core=core)
    buffer = pool.acquire(BufferSize.KB1)
    part = buffer.view(np.float32)[10:20].reshape(2, 5)
    part[:] = 3
    buffer.release()
    del buffer
    other = pool.acquire(BufferSize.KB1)
    other.view()[:] = 9
    assert (part == 3).all()
    assert pool.stats().bytes_in_use == 2048
    del part
    assert pool.stats().bytes_in_use == 1024


def test_buffers_outlive_their_pool(core: Any) -> None:
    """A closed or forgotten pool keeps its memory until the last buffer and view are gone."""
    pool = BufferPool(core=core)
    first, second = pool.acquire(BufferSize.KB1), pool.acquire(BufferSize.KB256)
    view = second.view()
    pool.close()
    pool.close()
    assert pool.closed
    assert repr(pool) == "BufferPool(closed)"
    with pytest.raises(kvz.ClosedError, match="BufferPool is closed"):
        pool.acquire(BufferSize.KB1)
    with pytest.raises(kvz.ClosedError):
        pool.stats()
    del pool, second
    gc.collect()
    view[:] = 1
    first.view()[:] = 2
    assert view.all()


def test_caches_outlive_their_pool(core: Any) -> None:
    """A cache goes on working when its pool was closed, and new ones are refused."""
    pool = BufferPool(core=core)
    cache = make(core, pool=pool)
    pool.close()
    cache.append(*stream(cache.config, 100))
    cache.check()
    assert len(cache) == 100
    with pytest.raises(kvz.ClosedError):
        make(core, pool=pool)
    cache.close()


def test_pools_and_caches_of_one_core_stay_together() -> None:
    """Memory of one core is of no use to the other."""
    pytest.importorskip("wasmtime")
    pool = BufferPool(core="wasm")
    with pytest.raises(ValueError, match=r"^pool: expected memory of the native core, got wasm"):
        make("native", pool=pool)
    assert kvz.TwoTierCache(pool=pool).core == "wasm"
    with pytest.raises(TypeError, match=r"^pool: expected a BufferPool"):
        make("native", pool=17)


def test_caches_share_the_pool_of_the_process(core: Any) -> None:
    """Without a pool of their own, caches use one per core."""
    first, second = make(core), make(core)
    assert first.memory_pool is second.memory_pool is kvz.default_pool(core)
    assert first.pool_stats().bytes_in_use == kvz.default_pool(core).stats().bytes_in_use
    own = BufferPool(core=core)
    assert make(core, pool=own).memory_pool is own


def test_threads_may_share_a_pool(core: Any) -> None:
    """Buffers of several threads never overlap, and the counters add up."""
    pool = BufferPool(core=core, max_free_per_class=4)
    wrong: list[int] = []

    def work(mark: int) -> None:
        for step in range(150):
            with pool.acquire_for_size(500 * (step % 9)) as buffer:
                view = buffer.view()
                view[:] = mark
                if not (view == mark).all():
                    wrong.append(step)

    together(*(partial(work, mark) for mark in range(4)))
    now = pool.stats()
    assert wrong == []
    assert (now.bytes_in_use, now.hits + now.misses, now.returns + now.drops) == (0, 600, 600)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, "<i8", np.float16, np.dtype("3f4")])
def test_a_buffer_is_a_numpy_array_of_any_dtype(core: Any, dtype: Any) -> None:
    """Writable, without a copy."""
    buffer = BufferPool(core=core).acquire(BufferSize.KB1)
    view = buffer.view(dtype)
    assert view.flags.writeable
    assert view.__array_interface__["data"][0] == buffer.address
    assert np.asarray(buffer).dtype == np.uint8
    assert np.asarray(buffer).__array_interface__["data"][0] == buffer.address


@pytest.mark.parametrize("dtype", [object, "V0", [("x", "O")]])
def test_a_buffer_holds_no_objects(core: Any, dtype: Any) -> None:
    """Python objects cannot live in it."""
    with pytest.raises(TypeError, match=r"^dtype: expected"):
        BufferPool(core=core).acquire(BufferSize.KB1).view(dtype)


# -- PooledBlock -----------------------------------------------------------------------------------


def test_a_block_takes_what_fits(core: Any) -> None:
    """It holds exactly max_tokens tokens, whatever its buffers could hold."""
    pool = BufferPool(core=core)
    block = PooledBlock(pool, 5, num_kv_heads=2, head_dim=4, value_dim=3)
    keys, values = rows(8, 2, 4, 1), rows(8, 2, 3, 2)
    assert block.append(keys[:3], values[:3]) == 3
    assert (block.token_count, block.remaining_tokens, block.is_full) == (3, 2, False)
    assert block.append(keys[3:].reshape(5, -1), values[3:].reshape(5, -1)) == 2
    assert (len(block), block.remaining_tokens, block.is_full) == (5, 0, True)
    assert block.append(keys, values) == 0
    same_bits(block.keys, keys[:5])
    same_bits(block.values, values[:5])
    block.clear()
    assert (len(block), block.keys.shape) == (0, (0, 2, 4))
    block.release()
    assert pool.stats().bytes_in_use == 0
    with pytest.raises(kvz.KvzError, match="released"):
        block.append(keys, values)


def test_a_block_may_be_larger_than_every_class(core: Any) -> None:
    """The default shape with 128 tokens needs 512 KB for each side."""
    block = PooledBlock(BufferPool(core=core), 128, num_kv_heads=8, head_dim=128)
    keys = rows(128, 8, 128, 1)
    assert block.append(keys, keys) == 128
    same_bits(block.values, keys)


def test_a_block_checks_its_input(core: Any) -> None:
    """Nothing is written when one side does not fit the other."""
    block = PooledBlock(BufferPool(core=core), 4, num_kv_heads=2, head_dim=4)
    keys = rows(3, 2, 4, 1)
    with pytest.raises(ValueError, match=r"^values: expected as many tokens as keys, 3, got 2"):
        block.append(keys, keys[:2])
    with pytest.raises(ValueError, match=r"^keys: expected shape \(T, 2, 4\)"):
        block.append(keys[:, :1], keys)
    with pytest.raises(ValueError, match=r"^values: expected finite"):
        block.append(keys, keys * np.inf)
    with pytest.raises(TypeError, match=r"^keys: expected an array"):
        block.append(keys.astype(int), keys)
    assert len(block) == 0
    with pytest.raises(MemoryError):
        PooledBlock(BufferPool(core=core), 1 << 40, num_kv_heads=1 << 10, head_dim=4096)


# -- AlignedBuffer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, 1, 15, 16, 17, 1000])
def test_an_aligned_buffer_is_aligned(capacity: int) -> None:
    """At a multiple of 64, empty, of exactly the capacity asked for."""
    buffer = AlignedBuffer(capacity)
    assert (len(buffer), buffer.capacity, buffer.address % 64) == (0, capacity, 0)
    buffer.extend(np.arange(capacity, dtype=np.float32))
    assert buffer.array.__array_interface__["data"][0] % 64 == 0
    same_bits(buffer.array, np.arange(capacity, dtype=np.float32))


def test_an_aligned_buffer_grows_to_its_capacity() -> None:
    """What does not fit is refused whole."""
    buffer = AlignedBuffer(5)
    buffer.extend([1.0, 2.0])
    buffer.extend(np.float16([[3.0], [4.0]]))
    with pytest.raises(ValueError, match=r"^values: expected at most 1, got 2"):
        buffer.extend([5.0, 6.0])
    assert buffer.array.tolist() == [1, 2, 3, 4]
    buffer.clear()
    assert (len(buffer), buffer.capacity) == (0, 5)
    buffer.resize(3)
    with pytest.raises(ValueError, match=r"^length: expected at most 5, got 6"):
        buffer.resize(6)
    assert repr(buffer) == "AlignedBuffer(3 of 5 float32 values)"


def test_an_aligned_buffer_is_seen_without_a_copy() -> None:
    """numpy looks at the memory itself; a copy is another buffer."""
    buffer = AlignedBuffer(4)
    buffer.extend([1.0, 2.0, 3.0])
    other = buffer.copy()
    np.asarray(buffer)[0] = 9
    assert buffer.array.tolist() == [9, 2, 3]
    assert (other.array.tolist(), other.capacity) == ([1, 2, 3], 4)
    assert np.asarray(buffer, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match=r"^copy: "):
        buffer.__array__(np.float64, copy=False)  # as numpy 2 asks for it


@pytest.mark.parametrize("capacity", [(1 << 62) + 3, 1 << 60, (1 << 63) - 1])
def test_an_absurd_capacity_is_out_of_memory(capacity: int) -> None:
    """Its bytes do not wrap around."""
    with pytest.raises(MemoryError):
        AlignedBuffer(capacity)


@pytest.mark.parametrize("capacity", [-1, 1.0, None])
def test_a_capacity_is_a_count(capacity: Any) -> None:
    """Negative numbers and floats are not."""
    with pytest.raises((ValueError, TypeError), match=r"^capacity: expected"):
        AlignedBuffer(capacity)
