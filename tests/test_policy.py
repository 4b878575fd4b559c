"""`update_policy` on caches that hold tokens: other precisions, other lengths, wholly or not."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvz
from support import (
    STORES,
    agree,
    configure,
    leaving,
    make,
    make_from,
    model_of,
    queries,
    same_bits,
    same_state,
    stream,
    together,
    unchanged,
    wait_for_more,
)


def filled(core: Any, tokens: int = 400, **fields: Any) -> tuple[Any, Any]:
    """Make a cache and its reference, and fill both."""
    cache = make(core, **{"max_tokens": 4096, "sink_tokens": 3, **fields})
    model = model_of(cache.config)
    rows = stream(cache.config, tokens)
    cache.append(*rows)
    model.append(*rows)
    return cache, model


def change(cache: Any, model: Any, policy: Any) -> None:
    """Give both the same policy, and compare them now and after more tokens."""
    config = policy.apply(cache.config)
    cache.update_policy(policy)
    model.reconfigure(config)
    assert (cache.config, cache.policy) == (config, policy)
    same_state(cache, model)
    cache.check()
    agree(cache, model, queries(cache.config, min(3, len(cache)) or None, 2))


@pytest.mark.parametrize("before", STORES)
@pytest.mark.parametrize("after", STORES)
def test_a_store_is_encoded_anew(core: Any, before: str, after: str) -> None:
    """From any precision to any other, up and down; the tail keeps its bits."""
    rotation: Any = "on" if "q8" in (before, after) else "auto"
    cache, model = filled(core, 150, store_precision=before, rotation=rotation, head_dim=80)
    keys, values = cache.tail_view()
    change(cache, model, kvz.QuantizedStore(precision=after))
    same_bits(np.float32(cache.tail_view()[0]), np.float32(keys))
    same_bits(np.float32(cache.tail_view()[1]), np.float32(values))
    if before == after:
        fresh = make_from(core, cache.config)
        fresh.append(*stream(cache.config, 150))
        assert cache.digest() == fresh.digest()


@pytest.mark.parametrize("length", [0, 5, 8, 60, 396, 500])
@pytest.mark.parametrize("warm", [0, 70])
def test_a_tail_becomes_longer_or_shorter(core: Any, length: int, warm: int) -> None:
    """Tokens go to the store, or come back from it as it had them; the rule holds from then on."""
    cache, model = filled(core, warm_length=warm)
    packed = cache.get_kv(0, 392)
    change(cache, model, kvz.HighPrecisionTail(tail_length=length, precision="f32"))
    if length >= 8:  # no token has become older
        for now, before in zip(cache.get_kv(0, 392), packed, strict=True):
            same_bits(now, before)
    more = stream(cache.config, 300, 5)
    cache.append(*more)
    model.append(*more)
    same_state(cache, model)
    assert cache.stats().tail_tokens >= min(length, 700 - 3)


def test_a_shorter_tail_is_that_of_a_cache_which_always_had_it(core: Any) -> None:
    """Exact tokens lose nothing by having been in a longer tail."""
    for warm in (0, 100):
        cache, _ = filled(core, tail_length=300, warm_length=warm)
        other, _ = filled(core, tail_length=20, warm_length=warm)
        cache.update_policy(kvz.HighPrecisionTail(tail_length=20))
        if not warm:  # else tokens went to the store without having been warm
            assert cache.digest() == other.digest()
        assert cache.stats().store_tokens == other.stats().store_tokens
        assert cache.stats().warm_tokens == other.stats().warm_tokens


def test_a_warm_tier_comes_and_goes(core: Any) -> None:
    """And the whole can be saved, loaded and forked in between."""
    cache, model = filled(core, store_precision="q4")
    for policy in (
        kvz.Hybrid(tail_length=8, warm_length=100),
        kvz.Hybrid(tail_length=8, warm_precision="f16", store_precision=("q8", "f16")),
        kvz.Hybrid(tail_length=30, warm_length=0),
    ):
        fork = cache.fork()
        before = fork.digest()
        change(cache, model, policy)
        assert fork.digest() == before
        fork.check()
        more = stream(cache.config, 150, len(repr(policy)))
        cache.append(*more)
        model.append(*more)
        same_state(cache, model)


def test_what_is_kept_behind_the_window_changes_with_the_store(core: Any) -> None:
    """Pinned and spared tokens are encoded anew, and stay where they are."""
    cache, model = filled(core, 400, max_tokens=300, store_precision="q8")
    for each in (cache, model):
        each.pin(120, 150)
        each.evict([*range(180, 200), *range(230, 260)])
        each.append(*stream(configure(), 250, 3))
    same_state(cache, model)
    pins = cache.pinned
    change(cache, model, kvz.QuantizedStore(precision="q4"))
    change(cache, model, kvz.HighPrecisionTail(tail_length=200))
    assert cache.pinned == pins
    with unchanged(cache), pytest.raises(kvz.InvalidArgumentError, match="pinned tokens"):
        cache.update_policy(kvz.HighPrecisionTail(tail_length=280))
    more = stream(cache.config, 400, 4)
    cache.append(*more)
    model.append(*more)
    same_state(cache, model)


def test_a_full_pool_refuses_and_nothing_has_changed(core: Any) -> None:
    """New pages come before old ones go; with room for both it happens."""
    pool = kvz.BufferPool(core=core)
    cache = make(core, pool=pool, max_tokens=4096, store_precision="q8", head_dim=64)
    cache.append(*stream(cache.config, 2000))
    used, store = pool.stats().bytes_in_use, cache.stats().store_bytes
    tight = kvz.BufferPool(max_bytes=used + store // 2, core=core)
    full = make(core, pool=tight, max_tokens=4096, store_precision="q8", head_dim=64)
    full.append(*stream(cache.config, 2000))
    with unchanged(full), pytest.raises(kvz.PoolExhaustedError):
        full.update_policy(kvz.QuantizedStore(precision="q4"))
    assert full.config.store_precision == "q8"
    assert tight.stats().bytes_in_use == used
    cache.update_policy(kvz.QuantizedStore(precision="q4"))
    assert cache.stats().store_bytes * 17 == store * 9
    assert pool.stats().bytes_in_use == cache.nbytes
    assert pool.stats().bytes_high_water == used + cache.stats().store_bytes


def test_what_keeps_its_precision_shares_its_pages(core: Any) -> None:
    """A longer tail shortens the store, and no page of that is copied."""
    pool = kvz.BufferPool(core=core)
    cache = make(core, pool=pool, max_tokens=4096, store_precision="q8", head_dim=64)
    cache.append(*stream(cache.config, 2000))
    before = cache.nbytes
    cache.update_policy(kvz.HighPrecisionTail(tail_length=300))
    assert pool.stats().bytes_high_water <= before + cache.stats().tail_bytes
    assert pool.stats().bytes_in_use == cache.nbytes


@pytest.mark.parametrize(
    ("policy", "position"),
    [
        (kvz.QuantizedStore(precision="q4"), 10),
        (kvz.QuantizedStore(precision="q4"), 395),  # in the tail, but it will get there
        (kvz.HighPrecisionTail(tail_length=8, precision="f16"), 395),
        (kvz.HighPrecisionTail(tail_length=399, precision="f16"), 10),
    ],
)
def test_values_that_do_not_fit_are_refused(core: Any, policy: Any, position: int) -> None:
    """A number of float32 that the new precision could not hold is found before anything else."""
    cache = make(core, tail_precision="f32", store_precision="f32")
    keys, values = stream(cache.config, 400)
    values[position, 1, 5] = 1e9
    cache.append(keys, values)
    with (
        unchanged(cache),
        pytest.raises(kvz.NotRepresentableError, match=f"position {position} "),
    ):
        cache.update_policy(policy)
    assert cache.config.tail_precision == "f32"


def test_a_mapped_cache_changes_in_memory(core: Any, tmp_path: Path) -> None:
    """The file stays as it is."""
    if core == "wasm":
        pytest.skip("files are mapped by the native core")
    cache, model = filled(core)
    cache.save(tmp_path / "x")
    mapped = kvz.TwoTierCache.load(tmp_path / "x", mmap=True, core=core)
    change(mapped, model, kvz.QuantizedStore(precision="q4"))
    again = kvz.TwoTierCache.load(tmp_path / "x", core=core)
    assert again.digest() == cache.digest()
    mapped.save(tmp_path / "x")
    assert kvz.TwoTierCache.load(tmp_path / "x", core=core).digest() == mapped.digest()


def test_a_rollback_brings_the_old_precision_back(core: Any) -> None:
    """Bits, configuration and policy."""
    cache, _ = filled(core)
    before = cache.config, cache.policy
    with unchanged(cache), cache.transaction() as step:
        cache.update_policy(kvz.QuantizedStore(precision="q4"))
        step.rollback()
    assert (cache.config, cache.policy) == before


def test_all_layers_of_a_model_change_or_none(core: Any) -> None:
    """The last layer refuses, and the first ones are what they were."""
    configs = [configure(max_tokens=4096), configure(max_tokens=60)]
    model = kvz.ModelCache(configs, pool=kvz.BufferPool(core=core))
    for layer in model:
        layer.append(*stream(layer.config, 400))
    with unchanged(*model), pytest.raises(kvz.ConfigError, match="max_tokens"):
        model.update_policy(kvz.HighPrecisionTail(tail_length=100))
    assert [layer.config.tail_length for layer in model] == [8, 8]
    with pytest.raises(kvz.InvalidArgumentError, match="one for each of 2 layers, got 1"):
        model.update_policy([kvz.QuantizedStore()])
    with pytest.raises(TypeError, match="policy: expected"):
        model.update_policy(5)
    model.update_policy([kvz.QuantizedStore(precision="q4"), kvz.HighPrecisionTail(tail_length=9)])
    assert [layer.config.store_precision for layer in model] == ["q4", "q8"]
    for layer in model:
        layer.check()


def test_readers_see_the_old_state_or_the_new(core: Any) -> None:
    """While one thread changes the policy, others read whole states."""
    cache, _ = filled(core, 2000)
    seen: list[bytes] = []
    states = {cache.get_all_kv()[0].tobytes()}
    stop = threading.Event()

    @leaving(stop)
    def read() -> None:
        while not stop.is_set():
            seen.append(cache.get_all_kv()[0].tobytes())

    @leaving(stop)
    def write() -> None:
        for precision in ("q4", "q8", "q5k", "q4"):
            cache.update_policy(kvz.QuantizedStore(precision=precision))
            states.add(cache.get_all_kv()[0].tobytes())
            for _ in range(3):
                wait_for_more(seen, stop)

    together(write, read, read)
    assert set(seen) <= states
    assert len(set(seen)) > 2


@given(
    data=st.data(),
    tokens=st.integers(0, 300),
    back=st.integers(0, 100),
    length=st.integers(0, 100),
    warm=st.sampled_from([0, 1, 64, 90]),
    pair=st.tuples(st.sampled_from(STORES), st.sampled_from(STORES)),
)
@settings(max_examples=40)
def test_any_change_is_the_law(
    data: Any, tokens: int, back: int, length: int, warm: int, pair: Any
) -> None:
    """Trimmed, filled up, changed and changed back: the reference agrees to the bit."""
    cache, model = filled("native", tokens, store_precision=pair, warm_length=warm)
    for each in (cache, model):
        each.trim(back)
    for policy in (
        kvz.Hybrid(tail_length=length, store_precision=pair[::-1], warm_length=90 - warm),
        kvz.Hybrid(tail_length=8, store_precision=pair, warm_length=warm),
    ):
        change(cache, model, policy)
        more = stream(cache.config, data.draw(st.integers(0, 90)), 11)
        cache.append(*more)
        model.append(*more)
        same_state(cache, model)
