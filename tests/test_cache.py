"""What a cache holds: tiers, positions, eviction, trim, and the bits that come back."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import kvz
from support import (
    HEAD_DIMS,
    KINDS,
    PAIRS,
    SMALL,
    STORES,
    configure,
    cuts,
    make,
    make_from,
    model_of,
    queries,
    rows,
    same_bits,
    same_state,
    stream,
    twins,
)

DTYPES = (np.float16, np.float32, np.float64)
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_a_new_cache_is_empty(core: Any, kind: str) -> None:
    """It has no tokens, its next position is 0, and everything it returns has the right shape."""
    cache = make(core, kind, value_dim=5)
    assert (len(cache), cache.next_position) == (0, 0)
    assert np.asarray(cache.positions).shape == (0,)
    keys, values = cache.get_all_kv()
    assert (keys.shape, values.shape) == ((0, 2, 32), (0, 2, 5))
    assert cache.trim(3) == 0
    cache.check()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_stored_values_have_the_specified_bits(core: Any, store: str, dim: int) -> None:
    """Every format at every head width reads back exactly what the reference says."""
    real, model = twins(core, tokens=30, store_precision=store, head_dim=dim)
    same_state(real, model)
    assert real.stats().store_tokens == 20


@pytest.mark.parametrize("tail", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("pair", PAIRS)
def test_keys_and_values_have_their_own_format(core: Any, tail: str, pair: tuple[str, str]) -> None:
    """Keys and values are stored independently, from what the tail held."""
    fields = {"tail_precision": tail, "store_precision": pair, "value_dim": 80}
    same_state(*twins(core, tokens=40, **fields))


@pytest.mark.parametrize("store", ["q8", "q4"])
@pytest.mark.parametrize("dim", [31, 64, 80, 128])
def test_rotation_can_be_chosen(core: Any, store: str, dim: int) -> None:
    """Rotation off and on gives different, specified bits; auto is on for q4 only."""
    held = {}
    for rotation in ("on", "off", "auto"):
        fields = {"head_dim": dim, "store_precision": store, "rotation": rotation}
        real, model = twins(core, tokens=20, **fields)
        same_state(real, model)
        held[rotation] = real.get_all_kv()[0].tobytes()
    assert held["on"] != held["off"]
    assert held["auto"] == held["on" if store == "q4" else "off"]


@kinds
@pytest.mark.parametrize("tail", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129])
def test_a_page_may_be_full_or_one_off(core: Any, kind: str, tail: str, tokens: int) -> None:
    """Nothing happens to the values at the edge of a page, in the store and in the tail."""
    for tail_length in (8, 200):
        fields = {"tail_length": tail_length, "tail_precision": tail, "migration_batch": 1}
        same_state(*twins(core, kind, tokens=tokens, **fields))


@kinds
@pytest.mark.parametrize("spread", [1e-8, 1e-3, 100.0])
@pytest.mark.parametrize("store", STORES)
def test_tiny_and_large_numbers_keep_their_bits(
    core: Any, kind: str, spread: float, store: str
) -> None:
    """Subnormal scales, zero groups, outliers and signed zeros come back as specified."""
    real = make(core, kind, store_precision=store, head_dim=64)
    model = model_of(real.config, kind)
    keys, values = rows(40, 2, 64, 1, spread), rows(40, 2, 64, 2, spread)
    outlier = min(values.max() * 100, model.value_format.limit(64))
    keys[3, 0, :32], keys[4], values[5, 1, 7] = 0, 0, outlier
    values[6, 0] *= np.float32(-0.0)
    for cache in (real, model):
        cache.append(keys, values)
    same_state(real, model)


@pytest.mark.parametrize(("tail", "batch"), [(0, 1), (0, 8), (1, 1), (8, 4), (5, 64), (64, 5)])
def test_the_tail_keeps_its_length(core: Any, tail: int, batch: int) -> None:
    """After any append the tail holds tail_length to tail_length + migration_batch - 1 tokens."""
    real, model = twins(core, tail_length=tail, migration_batch=batch)
    keys, values = stream(real.config, 200)
    for part in cuts(200, seed=tail):
        for cache in (real, model):
            cache.append(keys[part], values[part])
        held = real.stats().tail_tokens
        assert held <= tail + batch - 1
        assert held >= min(tail, part.stop)
        same_state(real, model)


def test_a_batch_of_one_is_the_plain_rule(core: Any) -> None:
    """With migration_batch=1 exactly tail_length tokens stay."""
    real, _ = twins(core, tokens=21, tail_length=6, migration_batch=1)
    stats = real.stats()
    assert (stats.tail_tokens, stats.store_tokens) == (6, 15)


@kinds
@pytest.mark.parametrize("sinks", [0, 1, 5, 70])
def test_sinks_are_never_quantized_and_never_leave(core: Any, kind: str, sinks: int) -> None:
    """The first tokens stay at tail precision for ever, whatever happens to the others."""
    fields = {"sink_tokens": sinks, "max_tokens": 100, "store_precision": "q4"}
    real, model = twins(core, kind, tokens=400, **fields)
    same_state(real, model)
    assert list(real.positions[:sinks]) == list(range(sinks))
    keys, _ = stream(real.config, 400)
    half = keys[:sinks].astype(np.float16).astype(np.float32)
    same_bits(real.get_all_kv()[0][:sinks], half)


@kinds
@pytest.mark.parametrize("limit", [20, 63, 64, 65, 100])
def test_max_tokens_is_exact_to_the_token(core: Any, kind: str, limit: int) -> None:
    """The cache is full with max_tokens tokens; one more evicts the oldest one and nothing else."""
    real, model = twins(core, kind, max_tokens=limit, migration_batch=3)
    keys, values = stream(real.config, 3 * limit)
    for i in range(3 * limit):
        for cache in (real, model):
            cache.append(keys[i : i + 1], values[i : i + 1])
        assert len(real) == min(i + 1, limit)
        assert real.positions[0] == max(0, i + 1 - limit)
    same_state(real, model)
    real.check()


@kinds
def test_one_append_may_be_longer_than_the_cache(core: Any, kind: str) -> None:
    """Tokens that would be evicted by the same append leave no trace."""
    same_state(*twins(core, kind, tokens=1000, max_tokens=50, sink_tokens=3))


@kinds
def test_positions_count_the_stream(core: Any, kind: str) -> None:
    """Positions are absolute: they survive eviction and are never given twice."""
    real, _ = twins(core, kind, tokens=150, max_tokens=40, sink_tokens=2)
    assert list(real.positions) == [0, 1, *range(112, 150)]
    assert real.next_position == 150


@kinds
@pytest.mark.parametrize("seed", range(4))
def test_state_does_not_depend_on_how_the_stream_was_cut(core: Any, kind: str, seed: int) -> None:
    """Any cut into appends gives the same bits and the same digest."""
    fields = {"max_tokens": 90, "sink_tokens": 2, "store_precision": ("q8", "q4")}
    whole, model = twins(core, kind, tokens=230, **fields)
    parts = make(core, kind, **fields)
    keys, values = stream(whole.config, 230)
    for part in cuts(230, seed):
        parts.append(keys[part], values[part])
    same_state(parts, model)
    assert parts.digest() == whole.digest()


@kinds
def test_digest_tells_states_apart(core: Any, kind: str) -> None:
    """The digest changes with one bit of one value, with the length and with the position."""
    caches = [make(core, kind, max_tokens=40) for _ in range(4)]
    keys, values = stream(caches[0].config, 80)
    touched = values.copy()
    touched[70, 1, 31] = np.nextafter(np.float16(touched[70, 1, 31]), np.float16(9))
    caches[0].append(keys, values)
    caches[1].append(keys, touched)
    caches[2].append(keys[:79], values[:79])
    caches[3].append(keys[:1], values[:1])
    caches[3].append(keys, values)
    digests = [cache.digest() for cache in caches]
    assert len(set(digests)) == 4


@kinds
@pytest.mark.parametrize("n", [0, 1, 5, 12, 13, 40, 90, 999])
def test_trim_takes_back_the_newest(core: Any, kind: str, n: int) -> None:
    """Trim returns how many it took, keeps the bits of the others, and appends go on from there."""
    fields = {"max_tokens": 64, "sink_tokens": 3}
    real, model = twins(core, kind, tokens=100, **fields)
    assert real.trim(n) == model.trim(n) == min(n, 64)
    same_state(real, model)
    real.check()
    keys, values = stream(real.config, 70, seed=5)
    for size in (1, 2, 67):
        for cache in (real, model):
            cache.append(keys[:size], values[:size])
        same_state(real, model)


def test_a_trimmed_token_does_not_return_to_the_tail(core: Any) -> None:
    """After a trim the tail may be short: what is in the store stays there, as it is."""
    real, _ = twins(core, tokens=30)
    stored = real.stats().store_tokens
    before = real.get_all_kv()[0]
    assert real.trim(8) == 8
    assert real.stats().store_tokens == stored == 20
    assert real.stats().tail_tokens == 2
    same_bits(real.get_all_kv()[0], before[:22])
    assert real.trim(4) == 4
    assert (real.stats().store_tokens, real.stats().tail_tokens) == (18, 0)


@kinds
def test_trim_then_append_is_the_same_as_never_having_had_them(core: Any, kind: str) -> None:
    """Speculative tokens that never left the tail leave no trace."""
    real, other = make(core, kind), make(core, kind)
    keys, values = stream(real.config, 40)
    real.append(keys[:33], values[:33])
    real.append(keys[:2], values[:2])
    assert real.trim(2) == 2
    other.append(keys[:33], values[:33])
    assert real.digest() == other.digest()
    for cache in (real, other):
        cache.append(keys[33:], values[33:])
    assert real.digest() == other.digest()


@kinds
def test_clear_forgets_everything(core: Any, kind: str) -> None:
    """After clear the cache is as new: empty, at position 0, without memory."""
    real, model = twins(core, kind, tokens=100, max_tokens=40, sink_tokens=4)
    real.clear()
    model.clear()
    same_state(real, model)
    assert real.digest() == make(core, kind, max_tokens=40, sink_tokens=4).digest()
    real.check()
    keys, values = stream(real.config, 30)
    for cache in (real, model):
        cache.append(keys, values)
    same_state(real, model)


@kinds
def test_a_range_of_positions_can_be_read(core: Any, kind: str) -> None:
    """get_kv takes absolute positions, over the seams of the tiers."""
    real, model = twins(core, kind, tokens=120, max_tokens=90, sink_tokens=3)
    ranges = [(33, 120), (0, 3), (0, 1), (2, 3), (33, 34), (70, 109), (110, 119), (119, 120)]
    for start, stop in [*ranges, (50, 50), (0, 0), (120, 120)]:
        got, expected = real.get_kv(start, stop), model.get_kv(start, stop)
        same_bits(got[0], expected[0])
        same_bits(got[1], expected[1])


@kinds
def test_what_is_returned_is_a_copy(core: Any, kind: str) -> None:
    """Writing into the arrays that came out, or into those that went in, changes nothing."""
    real = make(core, kind)
    keys, values = stream(real.config, 20)
    real.append(keys, values)
    digest = real.digest()
    keys[:], values[:] = 7, 7
    for array in (*real.get_all_kv(), *real.get_kv(5, 9), np.asarray(real.positions)):
        if array.flags.writeable:
            array[:] = 9
    assert real.digest() == digest
    assert list(real.positions) == list(range(20))


@kinds
def test_shapes_that_mean_the_same_give_the_same(core: Any, kind: str) -> None:
    """(T, H, D), flat (T, H*D), and one token without its T axis."""
    shapes = [make(core, kind, value_dim=5) for _ in range(4)]
    keys, values = stream(shapes[0].config, 9)
    shapes[0].append(keys, values)
    shapes[1].append(keys.reshape(9, -1), values.reshape(9, -1))
    for k, v in zip(keys, values, strict=True):
        shapes[2].append(k, v)
        shapes[3].append(k.ravel(), v.ravel())
    assert len({cache.digest() for cache in shapes}) == 1


@kinds
@pytest.mark.parametrize("layout", ["heads first", "every second", "backwards", "column", "slice"])
def test_strides_do_not_matter(core: Any, kind: str, layout: str) -> None:
    """Views of any strides hold the values that numpy says they hold."""
    plain, strided = make(core, kind), make(core, kind)
    wide = rows(60, 4, 64, 9)
    view = {
        "heads first": np.ascontiguousarray(wide[:20, :2, :32].swapaxes(0, 1)).swapaxes(0, 1),
        "every second": wide[::3, ::2, ::2],
        "backwards": wide[19::-1, 1::-1, 31::-1],
        "column": np.asfortranarray(wide[:20, :2, :32]),
        "slice": wide[10:30, 1:3, 5:37],
    }[layout]
    assert view.shape == (20, 2, 32)
    strided.append(view, view)
    plain.append(np.ascontiguousarray(view), np.ascontiguousarray(view))
    assert plain.digest() == strided.digest()


@kinds
@pytest.mark.parametrize("tail", ["f32", "bf16"])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)))
def test_floats_of_any_width_go_in(core: Any, kind: str, tail: str, dtypes: Any) -> None:
    """Inputs of f16 and f64 are taken as their float32; keys and values may differ."""
    given, plain = (make(core, kind, tail_precision=tail) for _ in range(2))
    keys, values = stream(given.config, 20)
    keys, values = keys.astype(dtypes[0]), values.astype(dtypes[1])
    given.append(keys, values)
    plain.append(keys.astype(np.float32), values.astype(np.float32))
    assert given.digest() == plain.digest()


@kinds
def test_f64_is_rounded_to_f32_first(core: Any, kind: str) -> None:
    """A double goes through float32 on its way to bf16: two roundings, as specified."""
    given, plain = (make(core, kind, tail_precision="bf16") for _ in range(2))
    tie = np.full((1, 2, 32), 1 + 2.0**-8 + 2.0**-40)  # above the tie in f64, on it in f32
    given.append(tie, tie)
    plain.append(tie.astype(np.float32), tie.astype(np.float32))
    same_bits(given.get_all_kv()[0], np.ones((1, 2, 32), np.float32))
    assert given.digest() == plain.digest()


@kinds
def test_appending_no_tokens_changes_nothing(core: Any, kind: str) -> None:
    """An empty append is allowed."""
    cache = make(core, kind)
    keys, values = stream(cache.config, 5)
    cache.append(keys, values)
    digest = cache.digest()
    cache.append(keys[:0], values[:0])
    assert (cache.digest(), len(cache)) == (digest, 5)


@kinds
@pytest.mark.parametrize("store", STORES)
def test_accounting_covers_codes_scales_and_slack(core: Any, kind: str, store: str) -> None:
    """No tier claims fewer bytes than its codes and scales take; the pool agrees on the sum."""
    pool = kvz.BufferPool(core=core)
    cache = make(core, kind, pool=pool, store_precision=store, head_dim=80, sink_tokens=3)
    keys, values = stream(cache.config, 300)
    cache.append(keys, values)
    stats = cache.stats()
    bits = kvz.Precision(store).bits_per_value
    slack = 1 / 16 if store.endswith("k") else 0  # offsets of the keys, an eighth of a bit
    width = 2 * 2 * (96 if store.startswith("q") else 80)  # heads, keys and values
    if kind == "pooled":
        held = stats.total_bytes
        assert held >= 300 * 2 * 2 * 80 * 2
    else:
        assert stats.store_bytes >= stats.store_tokens * width * bits / 8
        assert stats.tail_bytes >= stats.tail_tokens * 2 * 2 * 80 * 2
        # Slack is at most one page per head at either end of a tier: 128 tokens.
        assert stats.store_bytes <= (stats.store_tokens + 128) * width * (bits + 2 * slack) / 8
        held = stats.sink_bytes + stats.store_bytes + stats.tail_bytes
        as_tail = len(cache) * 2 * 2 * 80 * 2
        assert stats.compression_ratio == pytest.approx(as_tail / held)
    assert pool.stats().bytes_in_use == held
    assert cache.nbytes >= held
    cache.clear()
    assert pool.stats().bytes_in_use == 0


@kinds
def test_closing_gives_everything_back(core: Any, kind: str) -> None:
    """Close, a with-statement and the garbage collector each return the memory to the pool."""
    pool = kvz.BufferPool(core=core)
    keys, values = stream(configure(), 100)
    with make(core, kind, pool=pool) as cache:
        cache.append(keys, values)
        assert pool.stats().bytes_in_use > 0
    assert pool.stats().bytes_in_use == 0
    dropped = make(core, kind, pool=pool)
    dropped.append(keys, values)
    del dropped
    assert pool.stats().bytes_in_use == 0
    cache.close()
    cache.close()


@kinds
def test_eviction_gives_pages_back(core: Any, kind: str) -> None:
    """A full cache does not grow: pages that hold no live token go back to the pool."""
    pool = kvz.BufferPool(core=core)
    cache = make(core, kind, pool=pool, max_tokens=128)
    keys, values = stream(cache.config, 64)
    sizes = []
    for _ in range(30):
        cache.append(keys, values)
        sizes.append(pool.stats().bytes_in_use)
    assert max(sizes[10:]) == max(sizes[4:10])


def test_two_caches_on_one_pool_do_not_mix(core: Any) -> None:
    """Caches of different shapes share a pool and keep their own values."""
    pool = kvz.BufferPool(core=core)
    shapes = [("two_tier", 64, "q4"), ("pooled", 33, "q4"), ("two_tier", 32, "q8")]
    caches, models = [], []
    for kind, dim, store in shapes:
        caches.append(make(core, kind, pool=pool, head_dim=dim, store_precision=store))
        models.append(model_of(caches[-1].config, kind))
    for step in range(12):
        for real, model in zip(caches, models, strict=True):
            keys, values = stream(real.config, 17, seed=step)
            real.append(keys, values)
            model.append(keys, values)
            if step % 4 == 3:
                assert real.trim(20) == model.trim(20)
    for real, model in zip(caches, models, strict=True):
        same_state(real, model)
        real.check()


@kinds
def test_copies_for_other_engines_hold_the_same(core: Any, kind: str) -> None:
    """get_all_kv_aligned gives the values of get_all_kv, at addresses that are multiples of 64."""
    cache, _ = twins(core, kind, tokens=50)
    for aligned, plain in zip(cache.get_all_kv_aligned(), cache.get_all_kv(), strict=True):
        array = np.asarray(aligned)
        assert array.ctypes.data % 64 == 0
        same_bits(array.reshape(plain.shape), plain)


def test_config_fields_and_config_objects_are_the_same(core: Any) -> None:
    """A cache can be made from a CacheConfig or from its fields."""
    a = make_from(core, configure(head_dim=64))
    b = kvz.TwoTierCache(core=core, **{**SMALL, "head_dim": 64})
    assert a.config == b.config


@kinds
def test_repr_says_what_is_held(core: Any, kind: str) -> None:
    """The repr names the type and the number of tokens."""
    cache, _ = twins(core, kind, tokens=23)
    assert type(cache).__name__ in repr(cache)
    assert "23" in repr(cache)
    cache.attend(queries(cache.config))
    cache.close()
    assert "closed" in repr(cache)
