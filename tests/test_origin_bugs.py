"""The bugs of the original system, each by its number, and each shown to be gone: 1 to 26.

Simulations, wrong numbers, positions and eviction; test_origin_inputs.py has the others.
"""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest

import kvz
from kvz import reference
from support import Floats, f32, make, model_of, queries, rows, same_bits, same_state, stream, twins


def filled(core: Any, kind: Any = "two_tier", tokens: Any = 100, **fields: Any) -> Any:
    return twins(core, kind, tokens, **fields)[0]


# -- A. Simulations: it says what it does --------------------------------------------------------


def test_bug_01_quantized_values_are_packed(core: Any) -> None:
    """A page of 64 tokens takes the bytes that its bits say: 36 per value with q4, 68 with q8."""
    for store, bits in (("q8", 8.5), ("q4", 4.5)):
        cache = filled(core, tokens=72, store_precision=store, head_dim=64)
        assert cache.stats().store_tokens == 64
        assert cache.stats().store_bytes == 64 * 2 * (64 + 64) * bits / 8


def test_bug_02_an_f16_tail_is_f16(core: Any) -> None:
    """The tail takes two bytes per value at f16 and four at f32, and rounds accordingly."""
    fields = {"tokens": 64, "tail_length": 64}
    taken = {tail: filled(core, tail_precision=tail, **fields) for tail in ("f16", "f32")}
    assert taken["f16"].stats().tail_bytes == 64 * 2 * (32 + 32) * 2
    assert taken["f32"].stats().tail_bytes == 64 * 2 * (32 + 32) * 4
    keys, _ = stream(taken["f16"].config, 64)
    assert taken["f16"].tail_view()[0].dtype == np.float16
    np.testing.assert_array_equal(taken["f16"].tail_view()[0], keys.astype(np.float16))
    same_bits(taken["f32"].get_all_kv()[0], keys)


def test_bug_03_a_precision_is_the_one_that_was_asked_for(core: Any) -> None:
    """Asking for f32 gives f32; a precision that does not exist is refused."""
    cache = make(core, store_precision="f32", tail_precision="f32")
    keys, values = stream(cache.config, 40)
    cache.append(keys, values)
    assert cache.stats().store_tokens > 0
    same_bits(cache.get_all_kv()[0], keys)
    same_bits(cache.get_all_kv()[1], values)
    with pytest.raises(kvz.ConfigError, match="q7"):
        make(core, store_precision="q7")


def test_bug_04_a_policy_takes_effect(core: Any) -> None:
    """update_policy changes what is stored and what comes, and can be read back."""
    cache = make(core, store_precision="q8")
    policy = kvz.Hybrid(tail_length=4, tail_precision="f32", store_precision="q4")
    cache.update_policy(policy)
    assert cache.policy == policy
    model = model_of(cache.config)
    keys, values = stream(cache.config, 40)
    for each in (cache, model):
        each.append(keys, values)
    assert model.key_format.precision == "q4"
    assert model.tail_format.precision == "f32"
    same_state(cache, model)
    assert cache.stats().tail_tokens == 4
    cache.update_policy(kvz.QuantizedStore(precision="q8"))
    model.reconfigure(cache.config)
    same_state(cache, model)
    assert model.key_format.precision == "q8"


def test_bug_05_attend_decays_by_position_and_copies_nothing(core: Any) -> None:
    """The documented decay exists, and a call takes no memory that grows with the cache."""
    cache = filled(core, tokens=4000, store_precision="q4", max_tokens=4096, head_dim=128)
    query = queries(cache.config)
    near = cache.attend(query, 0.0, alibi_slopes=np.full(2, 50.0), return_mass=True)[1]
    assert near[:, -1] == pytest.approx(1, abs=1e-6)
    unpacked, used = 4000 * 2 * 2 * 128 * 4, cache.pool_stats().bytes_in_use
    tracemalloc.start()
    cache.attend(query)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < unpacked / 100
    assert cache.pool_stats().bytes_in_use == used


def test_bug_06_memory_comes_from_the_pool(core: Any) -> None:
    """A new cache takes nothing; a filled one takes what it says, from the pool it was given."""
    pool = kvz.BufferPool(core=core)
    cache = make(core, pool=pool)
    assert pool.stats().bytes_in_use == 0
    cache.append(*stream(cache.config, 600))
    assert pool.stats().bytes_in_use == cache.stats().total_bytes > 0
    assert cache.memory_pool is pool
    for buffer in cache.get_all_kv_aligned():
        assert buffer.address % kvz.pool.CACHE_LINE_SIZE == 0


def test_bug_07_what_is_called_a_view_is_one(core: Any) -> None:
    """Buffers show their memory without a copy; inputs of any strides are read where they lie."""
    buffer = kvz.AlignedBuffer(8)
    buffer.extend(np.ones(3))
    buffer.array[1] = 7
    same_bits(np.asarray(buffer), f32([1, 7, 1]))
    pooled = kvz.BufferPool(core=core).acquire(kvz.BufferSize.KB1)
    pooled.view(np.float32)[5] = 3
    assert pooled.view(np.float32)[5] == 3
    assert kvz.info(core).isa in kvz.info(core).available_isas
    cache = make("native", max_tokens=8192, head_dim=64)
    heads_first = rows(2, 4000, 64, 1).swapaxes(0, 1)  # (T, H, D), as a view
    tracemalloc.start()
    cache.append(heads_first, heads_first)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < heads_first.nbytes / 10


def test_bug_08_a_pooled_cache_honours_its_precision_and_attends(core: Any) -> None:
    """PooledCache rounds to tail_precision and has every verb of TwoTierCache."""
    real, model = twins(core, "pooled", tokens=100, tail_precision="bf16")
    same_state(real, model)
    same_bits(real.get_all_kv()[0], reference.round_to("bf16", stream(real.config, 100)[0]))
    verbs = {name for name in dir(kvz.TwoTierCache) if not name.startswith("_")}
    only_tiered = {"policy", "quality", "tail_view", "tier_of", "update_policy"}
    assert verbs - set(dir(kvz.PooledCache)) <= only_tiered
    query = queries(real.config)
    np.testing.assert_allclose(real.attend(query), model.attend(query), atol=2e-5)


# -- B. Wrong numbers ----------------------------------------------------------------------------


def stored_side(core: Any, keys: Floats, values: Floats, **fields: Any) -> tuple[Floats, Floats]:
    """Store tokens without rotation and give back what the store made of them."""
    shape = {"num_kv_heads": keys.shape[1], "head_dim": keys.shape[2], "value_dim": values.shape[2]}
    plain = {"rotation": "off", "tail_precision": "f32", "tail_length": 1, "migration_batch": 1}
    cache = make(core, **{**shape, **plain, **fields})
    last = np.ones_like(keys[:1]), np.ones_like(values[:1])
    cache.append(np.concatenate([keys, last[0]]), np.concatenate([values, last[1]]))
    assert cache.stats().store_tokens == len(keys)
    got = cache.get_all_kv()
    return got[0][:-1], got[1][:-1]


@pytest.mark.parametrize(("store", "steps"), [("q8", 127), ("q4", 8)])
def test_bug_09_values_have_their_own_scale(core: Any, store: str, steps: int) -> None:
    """Small keys and large values, and the other way round, each err by a step of their own."""
    small, large = rows(20, 2, 32, 1), rows(20, 2, 32, 2, spread=100)
    for keys, values in ((small, large), (large, small)):
        both = stored_side(core, keys, values, store_precision=store)
        for given, got in zip((keys, values), both, strict=True):
            step = np.abs(given).max(axis=-1, keepdims=True) / steps
            assert (np.abs(got - given) <= step * 1.01).all()


@pytest.mark.parametrize(("store", "steps"), [("q8", 127), ("q4", 8)])
def test_bug_10_codes_are_clamped(core: Any, store: str, steps: int) -> None:
    """The value opposite to the largest does not wrap to the other end of the codes."""
    x = np.zeros((4, 1, 32), np.float32)
    x[:, 0, 0], x[:, 0, 1] = [1, -1, 1, -1], [-1, 1, -0.9999, 0.9999]
    for got in stored_side(core, x, x, store_precision=store):
        assert (np.sign(got[:, 0, :2]) == np.sign(x[:, 0, :2])).all()
        assert (np.abs(got - x) <= 1.01 / steps).all()


@pytest.mark.parametrize("store", ["q8", "q4"])
def test_bug_11_an_outlier_stays_in_its_group(core: Any, store: str) -> None:
    """An outlier in one head, or in one group of 32, changes no bit of the others."""
    plain = rows(10, 2, 64, 1)
    spoiled = plain.copy()
    spoiled[:, 0, 5] = 1000
    for before, after in zip(
        stored_side(core, plain, plain, store_precision=store),
        stored_side(core, spoiled, spoiled, store_precision=store),
        strict=True,
    ):
        same_bits(after[:, 1], before[:, 1])
        same_bits(after[:, 0, 32:], before[:, 0, 32:])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_bug_12_what_is_not_finite_is_refused(core: Any, bad: float) -> None:
    """An infinite key does not make NaNs of a token: it does not get in."""
    cache = filled(core)
    keys, values = stream(cache.config, 1)
    keys[0, 1, 3] = bad
    digest = cache.digest()
    with pytest.raises(kvz.NotFiniteError, match="keys: token 0, head 1, dim 3"):
        cache.append(keys, values)
    assert cache.digest() == digest


def test_bug_13_constant_keys_do_not_spare_the_values(core: Any) -> None:
    """Values are stored alike whatever the keys are, so tests need not use constant ones."""
    values = rows(20, 2, 32, 1)
    constant = stored_side(core, np.ones_like(values), values, store_precision="q4")[1]
    normal = stored_side(core, rows(20, 2, 32, 2), values, store_precision="q4")[1]
    same_bits(constant, normal)
    assert (constant != values).any()


def test_bug_14_heads_have_their_own_softmax(core: Any) -> None:
    """Two heads that look at different tokens give 1 and 2, not 1.5 twice."""
    cache = make(core, num_kv_heads=2, head_dim=1, value_dim=1, tail_precision="f32")
    cache.append(f32([[[9], [-9]], [[-9], [9]]]), f32([[[1], [1]], [[2], [2]]]))
    out = cache.attend(f32([[9], [9]]), 1.0)
    np.testing.assert_allclose(out, [[1], [2]], rtol=1e-6)


def test_bug_15_a_query_must_fit(core: Any) -> None:
    """The output has the query's heads, on an empty cache too; other widths are refused."""
    for cache in (make(core), filled(core)):
        assert cache.attend(np.ones((8, 32), np.float32)).shape == (8, 32)
        for shape in ((2, 64), (2, 16), (3, 32), (64,)):
            with pytest.raises(kvz.InvalidArgumentError, match="query"):
                cache.attend(np.ones(shape, np.float32))


def test_bug_16_store_bytes_of_q4_are_not_zero(core: Any) -> None:
    """48 stored tokens of q4 take a page per head."""
    cache = filled(core, tokens=56, store_precision="q4")
    assert cache.stats().store_tokens == 48
    assert cache.stats().store_bytes == 2 * 64 * (32 + 32) * 4.5 / 8


@pytest.mark.parametrize(("store", "bits"), [("q8", 8.5), ("q4", 4.5), ("f16", 16)])
def test_bug_17_the_ratio_is_that_of_compression(core: Any, store: str, bits: float) -> None:
    """6400 tokens at 16 bits, over 100 pages of the store (6392 tokens) and one of the tail."""
    cache = filled(core, tokens=6400, max_tokens=8000, store_precision=store, head_dim=64)
    expected = 6400 * 16 / (100 * 64 * bits + 64 * 16)
    assert cache.stats().compression_ratio == pytest.approx(expected)


def test_bug_18_bytes_count_scales_and_overhead(core: Any) -> None:
    """Stored bytes are those of the pool, scales included; page tables are told separately."""
    pool = kvz.BufferPool(core=core)
    cache = make(core, pool=pool, store_precision="q4", sink_tokens=3)
    cache.append(*stream(cache.config, 300))
    stats = cache.stats()
    assert stats.store_bytes >= stats.store_tokens * 2 * 64 * 4.5 / 8 > stats.store_tokens * 64
    assert stats.sink_bytes + stats.store_bytes + stats.tail_bytes == pool.stats().bytes_in_use
    assert stats.overhead_bytes > 0


def test_bug_19_ties_round_alike_at_every_index(core: Any) -> None:
    """Halves round to even wherever they stand, in q8 and in q4, on any core."""
    x = np.resize(f32([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]), 37).reshape(1, 1, 37)
    for store, top in (("q8", 127.0), ("q4", -8.0)):
        x[0, 0, [0, 32]] = top  # makes the scale of both groups 1
        got = stored_side(core, x, x, store_precision=store)[0]
        same_bits(np.abs(got), np.abs(np.rint(x)))
        np.testing.assert_array_equal(got, np.rint(x))


# -- C. Positions and eviction -------------------------------------------------------------------


def test_bug_20_positions_are_never_given_twice(core: Any) -> None:
    """Eight appends to a cache of four leave the positions 4, 5, 6, 7."""
    cache = make(core, max_tokens=4, tail_length=2, migration_batch=1)
    keys, values = stream(cache.config, 8)
    for k, v in zip(keys, values, strict=True):
        cache.append(k, v)
    assert list(cache.positions) == [4, 5, 6, 7]


def test_bug_21_positions_can_be_read(core: Any) -> None:
    """Positions are there for whoever rotates queries by them, and lead to the tokens."""
    cache = filled(core, tokens=50, max_tokens=20, sink_tokens=2, store_precision="f16")
    assert cache.next_position == 50
    for index, position in enumerate(cache.positions):
        same_bits(cache.get_kv(position, position + 1)[0][0], cache.get_all_kv()[0][index])


def test_bug_22_counts_are_exact_after_eviction(core: Any) -> None:
    """However many go at once, the counts are those of the tokens held."""
    cache = make(core, max_tokens=10, tail_length=8, migration_batch=2)
    for step in (6, 4, 6, 10, 1, 37):
        cache.append(*stream(cache.config, step))
        stats = cache.stats()
        assert stats.total_tokens == len(cache) == len(cache.get_all_kv()[0])
        assert stats.sink_tokens + stats.store_tokens + stats.tail_tokens == stats.total_tokens
        assert stats.evicted_tokens == stats.next_position - stats.total_tokens


def test_bug_23_overflow_does_not_hang(core: Any) -> None:
    """A tail as long as the cache allows overflows without a deadlock; a longer one is refused."""
    cache = make(core, max_tokens=9, tail_length=8, migration_batch=1)
    work = threading.Thread(target=lambda: cache.append(*stream(cache.config, 300)), daemon=True)
    work.start()
    work.join(timeout=60)
    assert not work.is_alive()
    assert len(cache) == 9
    with pytest.raises(kvz.ConfigError, match="max_tokens"):
        make(core, max_tokens=8, tail_length=8, migration_batch=1)


def test_bug_24_a_pooled_cache_evicts_one_token_for_one(core: Any) -> None:
    """At 100 of 100 one more leaves 100, at 10 with blocks of 64 it leaves 10."""
    for limit in (100, 10):
        cache = kvz.PooledCache(max_tokens=limit, num_kv_heads=2, head_dim=32, core=core)
        cache.append(*stream(cache.config, limit))
        assert len(cache) == limit
        cache.append(*stream(cache.config, 1))
        assert len(cache) == limit
        assert list(cache.positions) == list(range(1, limit + 1))


def test_bug_25_sinks_stay_and_eviction_moves_nothing(core: Any) -> None:
    """The first tokens never go; the others keep their bits while the window slides."""
    cache = filled(core, tokens=200, max_tokens=100, sink_tokens=4)
    before = cache.get_kv(110, 180)
    cache.append(*stream(cache.config, 6))
    for got, expected in zip(cache.get_kv(110, 180), before, strict=True):
        same_bits(got, expected)
    assert list(cache.positions[:5]) == [0, 1, 2, 3, 110]


def test_bug_26_decode_migrates_whole_batches(core: Any) -> None:
    """Token by token, the store grows by migration_batch at a time."""
    cache = make(core, tail_length=8, migration_batch=16)
    seen = []
    for k, v in zip(*stream(cache.config, 100), strict=True):
        cache.append(k, v)
        seen.append(cache.stats().store_tokens)
    assert sorted({*seen}) == [0, 16, 32, 48, 64, 80]
    assert seen.index(16) == 16 + 8 - 1
