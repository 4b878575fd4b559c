"""Forks: what they share, what they copy, and that nobody sees what another does."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import kvz
from support import (
    KINDS,
    STORES,
    make,
    make_from,
    queries,
    same_bits,
    same_state,
    stream,
    together,
    twins,
    unchanged,
)


def part(config, start, stop, seed=0):
    """Tokens `start` to `stop` of a stream of 2000."""
    keys, values = stream(config, 2000, seed)
    return keys[start:stop], values[start:stop]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", STORES)
def test_a_fork_that_goes_on_is_the_cache_that_went_on(core, kind, store):
    """Each fork has the state, to the bit, of a cache that saw its tokens and no others."""
    root = make(core, kind, store_precision=store, sink_tokens=3, max_tokens=256)
    root.append(*part(root.config, 0, 133))
    forks = [root.fork() for _ in range(3)]
    for seed, cache in enumerate([root, *forks]):
        for start in range(133, 400, 7):
            cache.append(*part(root.config, start, min(start + 7, 400), seed))
    for seed, cache in enumerate([root, *forks]):
        alone = make(core, kind, store_precision=store, sink_tokens=3, max_tokens=256)
        alone.append(*part(root.config, 0, 133))
        alone.append(*part(root.config, 133, 400, seed))
        assert cache.digest() == alone.digest()
        query = queries(root.config, 5, 2)
        same_bits(cache.attend(query), alone.attend(query))
        cache.check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_of_a_length_is_a_trimmed_cache(core, kind):
    real, model = twins(core, kind, 100, sink_tokens=3)
    for length in range(101):
        child, trimmed = real.fork(length), real.fork()
        trimmed.trim(100 - length)
        same_state(child, model.fork(length))
        assert child.digest() == trimmed.digest()


def test_a_fork_has_no_tokens_that_were_evicted(core):
    cache = make(core, sink_tokens=4, max_tokens=64)
    cache.append(*part(cache.config, 0, 200))
    for length in (5, 139, 201):
        with unchanged(cache), pytest.raises(kvz.InvalidArgumentError, match="length"):
            cache.fork(length)
    assert len(cache.fork(4)) == 4
    assert len(cache.fork(140)) == 4
    assert len(cache.fork(170)) == 34
    with pytest.raises(kvz.InvalidTypeError, match="length"):
        cache.fork("all")


def test_a_fork_takes_no_memory_until_pages_differ(core):
    pool = kvz.BufferPool(core=core)
    cache = make(core, pool=pool)
    cache.append(*part(cache.config, 0, 500))
    before = pool.stats()
    forks = [cache.fork() for _ in range(10)]
    now = pool.stats()
    assert (now.bytes_in_use, now.allocations) == (before.bytes_in_use, before.allocations)
    for one in (cache, *forks):
        counts = one.stats()
        assert counts.shared_bytes == counts.total_bytes == before.bytes_in_use
        assert counts.own_bytes == 0
    cache.close()
    for one in forks[1:]:
        one.close()
    assert forks[0].stats().own_bytes == pool.stats().bytes_in_use == before.bytes_in_use
    forks[0].close()
    assert pool.stats().bytes_in_use == 0


def test_the_second_to_append_copies_one_page_of_every_head(core):
    """Tokens 500 to 503 stay in the tail, so the tail's last page is all that can differ."""
    pool = kvz.BufferPool(core=core)
    cache = make(core, pool=pool, tail_length=64, migration_batch=64)
    cache.append(*part(cache.config, 0, 500))
    before = pool.stats().bytes_in_use
    tail = cache.stats()
    row = tail.tail_bytes // (tail.tail_tokens // 64 + 1)  # the pages of all heads
    first, second = cache.fork(), cache.fork()
    first.append(*part(cache.config, 500, 504, seed=1))
    assert pool.stats().bytes_in_use == before
    second.append(*part(cache.config, 500, 504, seed=2))
    assert pool.stats().bytes_in_use == before + row
    assert second.stats().own_bytes == row
    cache.append(*part(cache.config, 500, 504))
    assert pool.stats().bytes_in_use == before + 2 * row
    assert cache.get_kv(0, 500)[0].tobytes() == first.get_kv(0, 500)[0].tobytes()
    same_bits(first.get_kv(0, 500)[1], second.get_kv(0, 500)[1])


def test_a_fork_of_a_full_pool_is_free_and_its_copy_is_refused(core):
    """The append that needs a page is refused whole; room comes back when a fork closes."""
    probe = make(core, pool=kvz.BufferPool(core=core))
    probe.append(*part(probe.config, 0, 100))
    pool = kvz.BufferPool(max_bytes=probe.nbytes, core=core)
    cache = make(core, pool=pool)
    cache.append(*part(cache.config, 0, 100))
    child = cache.fork()
    child.append(*part(cache.config, 100, 102, seed=1))
    with unchanged(cache, child), pytest.raises(kvz.PoolExhaustedError, match="no room"):
        cache.append(*part(cache.config, 100, 102))
    child.close()
    cache.append(*part(cache.config, 100, 102))
    assert len(cache) == 102


def test_forks_may_be_deep(core):
    """A fork of a fork of a fork, each one token longer, and all of them alive."""
    chain = [make(core, store_precision="q4", rotation="on")]
    for n in range(150):
        chain[-1].append(*part(chain[0].config, n, n + 1))
        chain.append(chain[-1].fork())
    for n in (1, 17, 64, 65, 130, 150):
        alone = make(core, store_precision="q4", rotation="on")
        alone.append(*part(chain[0].config, 0, n))
        assert chain[n - 1].digest() == alone.digest()
        chain[n - 1].check()


def test_trim_and_append_leave_the_other_fork_alone(core):
    """Slots that a fork still reads are not written again by one that went back."""
    real, model = twins(core, tokens=120)
    child, child_model = real.fork(), model.fork()
    with unchanged(child):
        for n, seed in ((7, 1), (40, 2), (90, 3)):
            real.trim(n)
            model.trim(n)
            tokens = stream(real.config, n, seed)
            real.append(*tokens)
            model.append(*tokens)
            same_state(real, model)
    same_state(child, child_model)
    with unchanged(real):
        child.clear()
    assert len(child) == 0


def test_a_fork_keeps_what_its_class_knows(core):
    cache = make(core)
    cache.update_policy(kvz.QuantizedStore(precision="q4"))
    child = cache.fork()
    assert type(child) is kvz.TwoTierCache
    assert (child.config, child.policy, child.memory_pool) == (
        cache.config,
        cache.policy,
        cache.memory_pool,
    )
    cache.close()
    child.append(*part(child.config, 0, 10))
    assert len(child) == 10
    with pytest.raises(kvz.ClosedError):
        cache.fork()
    pooled = make(core, "pooled").fork()
    assert type(pooled) is kvz.PooledCache
    assert pooled.tokens_per_block == 64


def test_forks_go_on_in_threads_of_their_own():
    """Forks share pages while each is written and read by a thread of its own."""
    config = kvz.CacheConfig(num_kv_heads=2, head_dim=64, tail_length=32, store_precision="q8")
    root = make_from("native", config)
    root.append(*part(config, 0, 300))
    query = queries(config)

    def walk(cache, seed):
        keys, values = part(config, 300, 700, seed)
        alone = make_from("native", config)
        alone.append(*part(config, 0, 300))
        for start in range(0, 400, 5):
            tokens = keys[start : start + 5], values[start : start + 5]
            cache.append(*tokens)
            alone.append(*tokens)
            same_bits(cache.attend(query), alone.attend(query))
        assert cache.digest() == alone.digest()

    def read():
        return {root.attend(query).tobytes() for _ in range(200)}

    expected = root.attend(query).tobytes()
    walks = [partial(walk, root.fork(), seed) for seed in range(4)]
    assert together(read, *walks)[0] == {expected}


def test_dead_slots_do_not_show(core):
    """What another fork wrote behind the end of this one changes no bit of its attention."""
    for store in STORES:
        cache = make(core, store_precision=store, tail_precision="f32", rotation="on")
        cache.append(*part(cache.config, 0, 97))
        query = queries(cache.config, 3, 2)
        before = cache.attend(query, return_lse=True, return_mass=True)
        child = cache.fork()
        keys, values = part(cache.config, 97, 170)
        child.append(keys * np.float32(1000), values * np.float32(-1000))
        for got, expected in zip(
            cache.attend(query, return_lse=True, return_mass=True), before, strict=True
        ):
            same_bits(got, expected)
