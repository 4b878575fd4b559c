"""The warm tier: tokens pass through it, page by page, on their way from the tail to the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvz
from support import (
    agree,
    configure,
    cuts,
    make,
    make_from,
    model_of,
    queries,
    same_bits,
    same_state,
    stream,
    unchanged,
)

WARM: dict[str, Any] = {"max_tokens": 4096, "warm_length": 100, "warm_precision": "q8"}
WAYS = [("f32", "q4"), ("f16", "q8"), ("bf16", "f32"), ("q8", "q4"), ("q4", "q8"), ("q8", "f16")]
WAYS += [("q8", "q8"), ("q8", "q5k"), ("f16", "q3k"), ("q8", ("q4k", "q4"))]


def filled(core: Any, tokens: int = 400, **fields: Any) -> Any:
    """Make a cache with a warm tier and fill it."""
    cache = make(core, **{**WARM, **fields})
    cache.append(*stream(cache.config, tokens))
    return cache


@pytest.mark.parametrize(("warm", "store"), WAYS)
@pytest.mark.parametrize("rotation", ["auto", "on", "off"])
@pytest.mark.parametrize("dim", [33, 64])
def test_tokens_pass_through_the_warm_format(
    core: Any, warm: str, store: Any, rotation: Any, dim: int
) -> None:
    """However a stream is cut, the store holds what it makes of what the warm tier held."""
    config = configure(
        **WARM, head_dim=dim, rotation=rotation, sink_tokens=3, store_precision=store
    )
    config = kvz.CacheConfig.from_dict({**config.to_dict(), "warm_precision": warm})
    keys, values = stream(config, 500)
    model = model_of(config)
    model.append(keys, values)
    digests = set()
    for seed in range(3):
        cache = make_from(core, config)
        for part in cuts(500, seed) if seed else [slice(0, 500)]:
            cache.append(keys[part], values[part])
        same_state(cache, model)
        cache.check()
        digests.add(cache.digest())
    assert len(digests) == 1
    agree(cache, model, queries(config, 5, 2))


@pytest.mark.parametrize("tokens", [0, 8, 12, 111, 112, 115, 116, 171, 172, 175, 176, 300])
def test_pages_leave_when_enough_tokens_follow(core: Any, tokens: int) -> None:
    """A page of 64 goes on when `warm_length` newer tokens have left the tail."""
    cache = filled(core, tokens)
    counts = cache.stats()
    left = max(tokens - 8, 0) // 4 * 4
    assert counts.tail_tokens == tokens - left
    assert counts.store_tokens == max(left - 100, 0) // 64 * 64
    assert counts.warm_tokens == left - counts.store_tokens
    assert counts.warm_tokens <= 163
    assert counts.total_tokens == len(cache) == tokens


def test_positions_tell_their_tier(core: Any) -> None:
    """Sinks and tail are hot, and every position is where the counts say."""
    cache = filled(core, sink_tokens=3)
    now = cache.stats()
    assert (now.sink_tokens, now.store_tokens, now.warm_tokens, now.tail_tokens) == (3, 253, 136, 8)
    tiers = [cache.tier_of(position) for position in range(400)]
    names = kvz.CacheTier
    expected = [names.HOT] * 3 + [names.COLD] * 253 + [names.WARM] * 136 + [names.HOT] * 8
    assert tiers == expected
    assert "253 q8 + 136 q8 + 8 f16" in repr(cache)
    assert "warm, q8" in cache._repr_html_()
    with pytest.raises(kvz.InvalidArgumentError, match="position: expected one that is held"):
        cache.tier_of(400)
    small = filled(core, 900, max_tokens=300, sink_tokens=3)
    assert small.tier_of(2) is names.HOT
    with pytest.raises(kvz.InvalidArgumentError, match="got 3"):
        small.tier_of(3)


def test_bytes_are_those_of_the_pages(core: Any) -> None:
    """Every tier counts whole pages of its own format, and the pool holds nothing else."""
    pool = kvz.BufferPool(core=core)
    cache = make(core, pool=pool, **WARM, head_dim=64, store_precision="q4", sink_tokens=16)
    cache.append(*stream(cache.config, 400))
    now = cache.stats()
    page = 64 * 2 * 64 * 2  # tokens, heads, values of keys and of values
    assert now.store_bytes == 4 * page * 4.5 / 8
    assert now.warm_bytes == 3 * page * 8.5 / 8
    assert now.tail_bytes == page * 16 / 8
    assert now.total_bytes == cache.nbytes == pool.stats().bytes_in_use
    assert now.own_bytes == now.total_bytes
    config = cache.config
    assert config.warm_bytes_per_token == 2 * 64 * 2 * 8.5 / 8
    assert now.bits_per_value == now.total_bytes * 8 / (400 * 2 * 128)


def test_sinks_stay_exact_for_ever(core: Any) -> None:
    """Neither migration nor eviction touches the first tokens."""
    cache = make(core, **{**WARM, "max_tokens": 300}, sink_tokens=5, tail_precision="f32")
    keys, values = stream(cache.config, 3000)
    for start in range(0, 3000, 70):
        cache.append(keys[start : start + 70], values[start : start + 70])
        same_bits(cache.get_kv(0, 5)[0], keys[:5])
        same_bits(cache.get_kv(0, 5)[1], values[:5])
    assert cache.positions.tolist() == [*range(5), *range(2705, 3000)]
    with pytest.raises(kvz.InvalidArgumentError, match="evict"):
        cache.evict([4])
    cache.pin(2800, 2900)
    cache.append(*stream(cache.config, 500, 1))
    same_bits(cache.get_kv(0, 5)[0], keys[:5])


def test_only_the_store_is_evicted_from(core: Any) -> None:
    """What is warm cannot be evicted, and stays warm when all of the store has left."""
    cache = filled(core, 400)
    assert cache.evictable.tolist() == list(range(256))
    with unchanged(cache), pytest.raises(kvz.InvalidArgumentError, match="evict"):
        cache.evict([256])
    cache.evict(np.arange(256))
    assert (cache.stats().store_tokens, cache.stats().warm_tokens) == (0, 136)
    cache.append(*stream(cache.config, 100, 1))
    cache.check()


def test_a_trim_into_the_warm_tier_and_on(core: Any) -> None:
    """Trimmed at any token, the cache goes on as the reference does."""
    for back in (3, 8, 50, 140, 150, 300, 400):
        cache, model = filled(core, 400), model_of(configure(**WARM))
        model.append(*stream(cache.config, 400))
        fork = cache.fork(400 - back)
        assert cache.trim(back) == model.trim(back) == back
        assert fork.digest() == cache.digest()
        more = stream(cache.config, 230, 7)
        cache.append(*more)
        fork.append(*more)
        model.append(*more)
        same_state(cache, model)
        assert fork.digest() == cache.digest()


def test_a_transaction_leaves_no_trace(core: Any) -> None:
    """What a draft pushes from tier to tier is back where it was."""
    cache = filled(core)
    with unchanged(cache), cache.transaction() as step:
        cache.append(*stream(cache.config, 300, 3))
        step.rollback()


@pytest.mark.parametrize("mmap", [False, True])
def test_snapshots_have_the_warm_tier(core: Any, tmp_path: Path, mmap: bool) -> None:
    """Saved, appended to, saved again, loaded: the same bits, read or mapped."""
    if mmap and core == "wasm":
        pytest.skip("files are mapped by the native core")
    cache = filled(core, sink_tokens=3)
    cache.save(tmp_path / "x")
    cache.append(*stream(cache.config, 90, 5))
    cache.save(tmp_path / "x", incremental=True)
    same = kvz.TwoTierCache.load(tmp_path / "x", core=core, mmap=mmap)
    assert same.digest() == cache.digest()
    assert same.stats().warm_tokens == cache.stats().warm_tokens > 0
    more = stream(cache.config, 200, 6)
    same.append(*more)
    cache.append(*more)
    assert same.digest() == cache.digest()
    plain = kvz.CacheConfig.from_dict({**cache.config.to_dict(), "warm_length": 0})
    other = kvz.TwoTierCache.load(tmp_path / "x", config=plain, convert=True, core=core)
    assert (len(other), other.stats().warm_tokens) == (490, 0)


def test_a_full_pool_spills_the_store_and_not_the_warm_tier(tmp_path: Path) -> None:
    """With a spill, a stream of any length fits; its bits are those of a pool without limit."""
    fields = {**WARM, "max_tokens": 20_000, "head_dim": 64}
    with kvz.BufferPool(max_bytes=1 << 20, spill=tmp_path / "spill", core="native") as pool:
        cache, free = make("native", pool=pool, **fields), make("native", **fields)
        for start in range(0, 9000, 300):
            tokens = stream(cache.config, 300, start)
            cache.append(*tokens)
            free.append(*tokens)
        assert cache.digest() == free.digest()
        assert pool.stats().bytes_spilled > 0
        same_bits(cache.attend(queries(cache.config)), free.attend(queries(cache.config)))
        cache.close()


def test_threads_do_not_show(core: Any) -> None:
    """A long append gives the same bits on any number of threads."""
    fields = {**WARM, "num_kv_heads": 4, "head_dim": 128, "store_precision": "q4"}
    before = kvz.get_num_threads(core)
    digests = set()
    try:
        for threads in (1, 2, 4) if core == "native" else (1,):
            kvz.set_num_threads(threads, core)
            digests.add(filled(core, 3000, **fields).digest())
    finally:
        kvz.set_num_threads(before, core)
    assert len(digests) == 1


def test_what_cannot_be_is_refused_at_once(core: Any) -> None:
    """Formats whose tokens depend on each other, sizes that do not fit, and pooled caches."""
    with pytest.raises(kvz.ConfigError, match=r"warm_length \+ 64 = 176, got 175"):
        make(core, warm_length=100, max_tokens=175)
    make(core, warm_length=100, max_tokens=176)
    with pytest.raises(kvz.ConfigError, match="warm_length: expected 0 or more, got -1"):
        make(core, warm_length=-1)
    for precision in ("q9", "q4k"):
        with pytest.raises(kvz.ConfigError, match="warm_precision: expected one of"):
            make(core, warm_precision=precision)
    with pytest.raises(kvz.ConfigError, match="warm_length: expected 0, as a PooledCache"):
        make(core, "pooled", warm_length=64)


def test_the_largest_values_stay_finite(core: Any) -> None:
    """At the limit of the warm cache nothing overflows; beyond it an append is refused."""
    for warm, store in (("q4", "f16"), ("q8", "q4"), ("f16", "q4")):
        cache = make(core, **{**WARM, "warm_precision": warm}, store_precision=store)
        model = model_of(cache.config)
        limit = min(
            model.tail_format.limit(32), model.key_format.limit_after(model.warm_format, 32)
        )
        shape = (300, 2, 32)
        full = np.full(shape, limit, np.float32)
        cache.append(full, -full)
        assert np.isfinite(cache.get_all_kv()).all()
        beyond = np.nextafter(full, np.float32(np.inf))
        with unchanged(cache), pytest.raises(kvz.NotRepresentableError, match="keys"):
            cache.append(beyond, full)
