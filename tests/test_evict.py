"""Pins that eviction skips, and eviction by a policy: exact to the token, bits kept."""

from __future__ import annotations

import numpy as np
import pytest

import kvz
from support import (
    KINDS,
    STORES,
    agree,
    configure,
    make,
    model_of,
    queries,
    same_bits,
    same_state,
    stream,
    unchanged,
)

WINDOW = {"max_tokens": 200, "sink_tokens": 4, "tail_length": 16, "migration_batch": 8}


def pair(core, kind="two_tier", **fields):
    real = make(core, kind, **{**WINDOW, **fields})
    return real, model_of(real.config, kind)


def feed(caches, total, cut=None, seed=0):
    """Append a stream to all of them, the first one in runs of `cut`."""
    keys, values = stream(caches[0].config, total, seed)
    for start in range(0, total, cut or total):
        caches[0].append(
            keys[start : start + (cut or total)], values[start : start + (cut or total)]
        )
    for cache in caches[1:]:
        cache.append(keys, values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 7, 64, None])
def test_pinned_ranges_stay(core, kind, cut):
    """However the stream is cut: sinks, pinned ranges, and as many of the newest as fit."""
    real, model = pair(core, kind, store_precision="q4")
    for cache in (real, model):
        for start, stop in ((20, 50), (2, 6), (90, 91), (600, 640)):
            cache.pin(start, stop)
    assert real.pinned == [(2, 6), (20, 50), (90, 91), (600, 640)]
    feed([real, model], 1000, cut)
    same_state(real, model)
    kept = [*range(6), *range(20, 50), 90, *range(600, 640)]
    assert real.positions.tolist() == kept + list(range(1000 - (200 - len(kept)), 1000))
    agree(real, model, queries(real.config, 3, 2))
    agree(real, model, queries(real.config, 3), window=150, alibi_slopes=np.full(2, 0.01))
    mask = np.arange(200) % 3 > 0
    agree(real, model, queries(real.config), mask=mask)
    for got, expected in zip(real.get_kv(600, 640), model.get_kv(600, 640), strict=True):
        same_bits(got, expected)
    with pytest.raises(kvz.InvalidArgumentError, match="0 to 6 and 20 to 50 and 90 to 91 and"):
        real.get_kv(5, 21)
    real.check()


def test_what_may_not_be_pinned(core):
    """What is gone, and so much that nothing could be evicted."""
    cache = make(core, **WINDOW)
    feed([cache], 500)
    with unchanged(cache):
        with pytest.raises(kvz.InvalidArgumentError, match="196 of the positions 4 to 200"):
            cache.pin(4, 200)
        with pytest.raises(kvz.InvalidArgumentError, match="leave no room"):
            cache.pin(1000, 1000 + 200 - 4 - 23)
        with pytest.raises(kvz.InvalidArgumentError, match="in order"):
            cache.pin(400, 399)
        for bad in (-1, "x", 2.5):
            with pytest.raises(kvz.KvzError, match="start"):
                cache.pin(bad, 10)
    cache.pin(1000, 1000 + 200 - 4 - 23 - 1)
    feed([cache], 700)
    assert cache.positions[4:176].tolist() == list(range(1000, 1172))
    assert len(cache) == 200


def test_an_unpinned_range_goes_in_its_turn(core):
    real, model = pair(core)
    for cache in (real, model):
        cache.pin(10, 40)
    feed([real, model], 400, 16)
    for cache in (real, model):
        cache.unpin(20, 30)
    assert real.pinned == [(10, 20), (30, 40)]
    same_state(real, model)
    feed([real, model], 5, seed=1)
    assert real.positions[:25].tolist() == [*range(4), *range(10, 20), *range(25, 36)]
    same_state(real, model)
    real.clear()
    assert real.pinned == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", STORES)
def test_evicted_tokens_are_gone_and_the_others_as_they_were(core, kind, store):
    """Scattered tokens and whole runs, beside forks and transactions that still hold them."""
    real, model = pair(core, kind, store_precision=store)
    feed([real, model], 180)
    fork, before = real.fork(), real.digest()
    rng = np.random.default_rng(5)
    for part in (0.1, 0.3):
        may = real.evictable
        np.testing.assert_array_equal(may, model.evictable())
        gone = may[rng.random(len(may)) < part]
        assert real.evict(gone) == len(gone)
        model.evict(gone)
        same_state(real, model)
        agree(real, model, queries(real.config, 2, 2))
        real.check()
    assert fork.digest() == before
    with unchanged(real), real.transaction() as step:
        real.evict(real.evictable)
        feed([real], 50, seed=3)
        step.rollback()
    feed([real, model], 300, 7, seed=1)
    same_state(real, model)
    assert real.trim(60) == model.trim(60) == 60
    same_state(real, model)


def test_what_may_not_be_evicted(core):
    """Sinks, the tail, pinned tokens, and those that are not there."""
    cache = make(core, **WINDOW)
    feed([cache], 150)
    cache.pin(30, 40)
    assert cache.evictable.tolist() == [*range(4, 30), *range(40, 128)]
    with unchanged(cache):
        for bad in ([3], [128], [35], [10, 11, 30], [999], [10, 9, 149]):
            with pytest.raises(kvz.InvalidArgumentError, match="evict"):
                cache.evict(bad)
        with pytest.raises(kvz.InvalidTypeError, match="integers"):
            cache.evict([1.5])
        with pytest.raises(kvz.InvalidArgumentError, match="positions"):
            cache.evict([-1])
        assert cache.evict([]) == 0
    assert cache.evict([5, 5, 6]) == 2
    with pytest.raises(kvz.InvalidArgumentError, match="evict"):
        cache.evict([5])
    assert cache.stats().evicted_tokens == 2


def test_pages_return_to_the_pool_as_they_empty(core):
    """All tokens of a page evicted: its memory is free. One of them pinned: it stays."""
    pool = kvz.BufferPool(core=core)
    cache = make(core, pool=pool, tail_length=64, migration_batch=64, max_tokens=5000)
    feed([cache], 1000)
    page = cache.stats().store_bytes // (cache.stats().store_tokens // 64)
    before = pool.stats().bytes_in_use
    cache.evict(np.arange(64, 128))
    assert pool.stats().bytes_in_use == cache.nbytes == before - page
    cache.evict(np.arange(128, 191))
    assert pool.stats().bytes_in_use == cache.nbytes == before - page
    assert cache.stats().own_bytes == cache.nbytes
    cache.evict([191])
    assert pool.stats().bytes_in_use == cache.nbytes == before - 2 * page
    cache.pin(300, 301)
    cache.evict(np.setdiff1d(cache.evictable, [300]))
    assert pool.stats().bytes_in_use == cache.nbytes
    assert cache.stats().store_bytes == page
    fork = cache.fork()
    assert fork.stats().own_bytes == 0
    cache.close()
    assert fork.stats().own_bytes == pool.stats().bytes_in_use
    fork.close()
    assert pool.stats().bytes_in_use == 0


def test_a_full_pool_refuses_a_long_append_whole(core):
    """With pins a long append goes in pieces: all of them or none."""
    probe = make(core, pool=kvz.BufferPool(core=core), **WINDOW)
    feed([probe], 120)
    pool = kvz.BufferPool(max_bytes=probe.nbytes, core=core)
    caches = [make(core, pool=pool, **WINDOW), make(core, pool=pool, **WINDOW)]
    for cache in caches:
        cache.pin(5, 100)
    feed(caches[:1], 20)
    with unchanged(*caches):
        with pytest.raises(kvz.PoolExhaustedError):
            feed(caches[:1], 900)
        long = stream(probe.config, 900)
        with pytest.raises(kvz.PoolExhaustedError, match=r"caches\[1\]"):
            kvz.append_many(caches[::-1], [long[0][:1], long[0]], [long[1][:1], long[1]])
        bad = long[0].copy()
        bad[-1, -1, -1] = np.nan
        with pytest.raises(kvz.NotFiniteError):
            caches[0].append(bad, long[1])


def test_append_many_knows_pins(core):
    """Long runs in a batch, beside caches without pins."""
    batch = [make(core, **WINDOW) for _ in range(3)]
    alone = [make(core, **WINDOW) for _ in range(3)]
    for cache in (batch[1], alone[1]):
        cache.pin(0, 60)
    tokens = [stream(configure(), n, n) for n in (5, 700, 300)]
    kvz.append_many(batch, [k for k, _ in tokens], [v for _, v in tokens])
    for cache, pair_of in zip(alone, tokens, strict=True):
        cache.append(*pair_of)
    assert [cache.digest() for cache in batch] == [cache.digest() for cache in alone]
    asked = queries(batch[0].config)
    for cache, out in zip(batch, kvz.attend_many(batch, [asked] * 3), strict=True):
        same_bits(out, cache.attend(asked))
