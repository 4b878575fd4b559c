"""Byte budgets: what `plan` promises, what happens at a pool's limit, and how high memory peaks."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvz
from support import configure, cuts, make_from, queries, same_bits, stream, unchanged

CONFIGS = st.builds(
    lambda sinks, tail, batch, more, store, heads, warm: kvz.CacheConfig(
        num_kv_heads=heads,
        head_dim=32,
        max_tokens=sinks + tail + batch + more + (warm and warm + 64),
        tail_length=tail,
        sink_tokens=sinks,
        migration_batch=batch,
        store_precision=store,
        warm_length=warm,
    ),
    st.integers(0, 70),
    st.integers(0, 100),
    st.sampled_from([1, 7, 32, 48, 64, 128]),
    st.integers(0, 400),
    st.sampled_from(["f16", "q8", "q4", ("q8", "q4")]),
    st.integers(1, 2),
    st.sampled_from([0, 0, 1, 63, 64, 100]),
)


@given(config=CONFIGS, part=st.floats(0, 1.2), seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_what_is_planned_fits_however_it_is_cut(config, part, seed):
    """And the plan is no larger than a page of each tier above what was really used."""
    most = kvz.plan(config, 1 << 40)
    plan = kvz.plan(config, int(most.bytes * part))
    assert plan.bytes <= most.bytes * part
    assert plan.is_endless is (plan.bytes >= most.bytes)
    tokens = plan.tokens + 300 * plan.is_endless
    highest = 0
    for step in (seed, None):
        pool = kvz.BufferPool(max_bytes=max(plan.bytes, 1))
        with kvz.TwoTierCache(config, pool=pool) as cache:
            keys, values = stream(config, tokens)
            runs = cuts(tokens, seed) if step else [slice(i, i + 1) for i in range(tokens)]
            for run in runs:
                cache.append(keys[run], values[run])
            assert cache.next_position == tokens
        highest = max(highest, pool.stats().bytes_high_water)
    assert plan.bytes - highest <= _one_of_each(config)


def _one_of_each(config):
    """Bytes of a page of store, warm tier and tail, over all heads."""
    probe = kvz.TwoTierCache(
        config,
        pool=kvz.BufferPool(),
        sink_tokens=0,
        tail_length=64,
        migration_batch=64,
        warm_length=64 if config.warm_length else 0,
        max_tokens=256,
    )
    probe.append(*stream(probe.config, 192 if config.warm_length else 128))
    return probe.nbytes


def test_a_model_is_planned_as_a_whole(core):
    """Layers with windows stop growing; the others go on to the budget."""
    full = configure(store_precision="q8", max_tokens=100_000)
    window = configure(store_precision="q4", max_tokens=128, sink_tokens=4)
    budget = 1 << 20
    plan = kvz.plan([full, window, full], budget, core=core)
    assert not plan.is_endless
    alone = (budget - kvz.plan(window, budget, core=core).bytes) // 2
    assert plan.tokens == kvz.plan(full, alone, core=core).tokens
    pool = kvz.BufferPool(max_bytes=plan.bytes, core=core)
    model = kvz.ModelCache([full, window, full], pool=pool)
    for layer in model:
        layer.append(*stream(layer.config, plan.tokens))
    assert model.nbytes <= plan.bytes <= budget
    assert kvz.plan(full, 2 * budget, 2).tokens == kvz.plan(full, budget).tokens
    assert kvz.plan(full, 0) == kvz.Plan(tokens=0, bytes=0, is_endless=False)


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        ((configure(), -1), kvz.InvalidArgumentError),
        ((configure(), "1 GB"), kvz.InvalidTypeError),
        (("q4", 100), kvz.InvalidTypeError),
        ((configure(), 100, 0), kvz.InvalidArgumentError),
    ],
)
def test_bad_plans_are_refused(args, kind):
    with pytest.raises(kind):
        kvz.plan(*args)


def test_a_full_pool_loses_nothing_and_has_room_again(core):
    """Many caches over one pool: whoever asks for too much is told, and all stay as they were."""
    config = configure(store_precision="q4", max_tokens=10_000)
    pool = kvz.BufferPool(max_bytes=6 * kvz.plan(config, 1 << 30).bytes // 8, core=core)
    caches = [make_from(core, config, pool=pool) for _ in range(6)]
    refused = None
    for step in range(1000):
        cache = caches[step % 6]
        tokens = stream(config, 40, step)
        held = [one.digest() for one in caches]
        try:
            cache.append(*tokens)
        except kvz.PoolExhaustedError as error:
            refused, text = step, str(error)
            assert [one.digest() for one in caches] == held
            break
    assert refused is not None
    assert refused > 30
    assert str(pool.stats().max_bytes) in text
    assert "no room in the pool" in text
    assert pool.stats().bytes_in_use == sum(one.nbytes for one in caches)
    assert pool.stats().bytes_high_water <= pool.stats().max_bytes
    query = queries(config)
    expected = cache.attend(query)
    with unchanged(*caches):
        for other in caches:
            with pytest.raises(kvz.PoolExhaustedError):
                other.append(*stream(config, 5000))
        with pytest.raises(kvz.PoolExhaustedError), cache.transaction():
            cache.append(*tokens)
    same_bits(cache.attend(query), expected)
    caches[(refused + 1) % 6].trim(100)  # room by trimming another ...
    cache.append(*tokens)
    with pytest.raises(kvz.PoolExhaustedError):
        cache.append(*stream(config, 1000))
    for other in caches[:3]:
        other.close()  # ... or by closing some
    survivor = caches[4]
    survivor.append(*stream(config, 800))
    survivor.check()


PEAK = """
import resource, sys
import numpy as np
import kvz

def peak_bytes():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

kvz.set_num_threads(2)
cache = kvz.TwoTierCache(num_kv_heads=4, head_dim=64, max_tokens=1 << 20, tail_length=64)
rng = np.random.default_rng(0)
tokens = rng.standard_normal((2048, 4, 64), np.float32)
query = rng.standard_normal((2048, 16, 64), np.float32)
out = np.ones((2048, 16, 64), np.float32)
cache.append(tokens[:300], tokens[:300])
cache.attend(query[:300], out=out[:300])  # threads and their memory exist
before = peak_bytes()
for _ in range(8):
    cache.append(tokens, tokens)
    cache.attend(query, out=out)
print(peak_bytes() - before, cache.nbytes)
"""


def test_the_peak_of_a_prefill_is_the_cache_and_a_tile():
    """By the process's own high-water mark: 16,000 tokens read in pieces of 2048.

    Unpacked, the cache would take another 33 MB; the scores of a piece, for all heads, 2 GB.
    """
    pytest.importorskip("resource")
    result = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=300
    )
    grown, held = map(int, result.stdout.split())
    assert held > 4 << 20
    assert grown < held + (8 << 20)


def test_a_window_returns_its_pages_as_they_empty(core):
    """Exact to the token, quantized, sinks kept, positions absolute; memory stays level."""
    config = configure(store_precision="q4", max_tokens=300, sink_tokens=4, tail_length=32)
    pool = kvz.BufferPool(core=core)
    cache = make_from(core, config, pool=pool)
    levels = []
    for step in range(200):
        cache.append(*stream(config, 10, step))
        now = cache.stats()
        assert pool.stats().bytes_in_use == now.total_bytes
        levels.append(now.total_bytes)
        assert len(cache) == min(300, 10 * (step + 1))
    expected = np.concatenate([np.arange(4), np.arange(2000 - 296, 2000)])
    np.testing.assert_array_equal(cache.positions, expected)
    assert max(levels[40:]) <= kvz.plan(config, 1 << 30, core=core).bytes
    assert max(levels[40:]) - min(levels[40:]) <= _one_of_each(config)
    fresh = make_from(core, config)
    for step in range(200):
        fresh.append(*stream(config, 10, step))
    query = queries(config, 8)
    same_bits(cache.attend(query, window=100), fresh.attend(query, window=100))
