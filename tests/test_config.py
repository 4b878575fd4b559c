"""Configurations, policies, and what is said about the tokens and bytes of a cache."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

import kvz
from kvz import CacheConfig, Precision
from support import make, same_bits, stream, twins


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"store_precision": ("q8", "q4"), "value_dim": 7},
        {"store_precision": ["q8", Precision.F16], "tail_precision": "bf16", "rotation": "off"},
        {"num_kv_heads": np.int64(3), "sink_tokens": np.uint8(5), "tail_length": 0},
    ],
    ids=str,
)
def test_a_configuration_survives_every_way_out(fields: dict[str, Any]) -> None:
    """dict, JSON and pickle give back an equal one, with plain values on the way."""
    config = CacheConfig(**fields)
    assert CacheConfig.from_dict(config.to_dict()) == config
    assert CacheConfig.from_json(config.to_json()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert replace(config) == config
    assert len({config, CacheConfig(**fields)}) == 1
    for value in json.loads(json.dumps(config.to_dict())).values():
        assert isinstance(value, (int, str, list, type(None)))
    assert type(config.num_kv_heads) is int


def test_names_and_members_are_the_same() -> None:
    """Any mixture gives equal configurations; a pair of equals is one."""
    plain = CacheConfig(store_precision="q8", tail_precision="f32")
    assert plain == CacheConfig(store_precision=Precision.Q8, tail_precision=Precision.F32)
    assert plain == CacheConfig(store_precision=("q8", "q8"), tail_precision="f32")
    assert (plain.key_precision, plain.value_precision) == (Precision.Q8, Precision.Q8)
    pair = CacheConfig(store_precision=("q8", "q4"))
    assert (pair.key_precision, pair.value_precision) == (Precision.Q8, Precision.Q4)
    assert f"{Precision.Q4} {Precision.Q4!s} {kvz.CacheTier.HOT}" == "q4 q4 hot"


def test_a_configuration_cannot_be_changed() -> None:
    """Nor be made by position."""
    config = CacheConfig()
    with pytest.raises(FrozenInstanceError):
        config.head_dim = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        CacheConfig(8, 128)  # type: ignore[misc]


def test_every_problem_is_named_at_once() -> None:
    """One error for all."""
    with pytest.raises(kvz.ConfigError) as caught:
        CacheConfig(
            num_kv_heads=0,
            head_dim=1.5,  # type: ignore[arg-type]
            tail_precision="q4",
            store_precision=("q4", "q5"),  # type: ignore[arg-type]
            rotation=np.ones(3),  # type: ignore[arg-type]
        )
    said = str(caught.value)
    for name in ("num_kv_heads", "head_dim", "tail_precision", "store_precision", "rotation"):
        assert f"{name}: expected" in said


@pytest.mark.parametrize("given", [[], "{}", 3, None])
def test_only_mappings_are_configurations(given: Any) -> None:
    """Of which from_dict says so."""
    with pytest.raises(TypeError, match=r"^config: expected a mapping"):
        CacheConfig.from_dict(given)


@pytest.mark.parametrize("text", ["", "{", '{"x": 1}', '{"head_dim": 0}'])
def test_bad_json_is_a_config_error(text: str) -> None:
    """Whether it is no JSON or no configuration."""
    with pytest.raises(kvz.ConfigError):
        CacheConfig.from_json(text)


@pytest.mark.parametrize(
    "store", ["f32", "f16", "bf16", "q8", "q4", ("q8", "q4"), "q5k", "q2k", ("q6k", "q3k")]
)
@pytest.mark.parametrize("dim", [32, 80])
def test_bytes_per_token_are_what_full_pages_take(core: Any, store: Any, dim: int) -> None:
    """With pages full to the last slot, the estimate is the truth."""
    cache = make(core, store_precision=store, head_dim=dim, tail_length=64, migration_batch=64)
    cache.append(*stream(cache.config, 192))
    stats = cache.stats()
    assert (stats.store_tokens, stats.tail_tokens) == (128, 64)
    assert stats.store_bytes == 128 * cache.config.store_bytes_per_token
    assert stats.tail_bytes == 64 * cache.config.tail_bytes_per_token


@pytest.mark.parametrize(
    ("policy", "changed"),
    [
        (kvz.HighPrecisionTail(tail_length=3, precision="f32"), (3, "f32", "q8")),
        (kvz.QuantizedStore(precision=("q4", "f16")), (8, "f16", ("q4", "f16"))),
        (kvz.Hybrid(tail_length=0, tail_precision="bf16", store_precision="q4"), (0, "bf16", "q4")),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_policy_changes_its_part(core: Any, policy: Any, changed: Any) -> None:
    """And leaves the rest of the configuration."""
    cache = make(core)
    before = cache.config
    assert cache.policy == kvz.Hybrid(tail_length=8, tail_precision="f16", store_precision="q8")
    cache.update_policy(policy)
    after = cache.config
    assert (after.tail_length, after.tail_precision, after.store_precision) == changed
    assert replace(after, tail_length=8, tail_precision="f16", store_precision="q8") == before
    assert cache.policy == policy
    cache.append(*stream(after, 30))
    cache.update_policy(kvz.Hybrid())
    assert cache.config.tail_length == 256
    cache.check()


def test_a_policy_that_does_not_fit_changes_nothing(core: Any) -> None:
    """The cache works on as before."""
    cache = make(core)
    before = cache.config
    no_such: Any = "f8"
    for bad in (kvz.HighPrecisionTail(tail_length=10**9), kvz.QuantizedStore(precision=no_such)):
        with pytest.raises(kvz.ConfigError):
            cache.update_policy(bad)
    with pytest.raises(TypeError, match=r"^policy: expected"):
        cache.update_policy("q4")
    assert cache.config is before
    cache.append(*stream(before, 5))
    assert len(cache) == 5


def test_fields_change_a_given_configuration(core: Any) -> None:
    """A config and fields together: the fields win; unknown ones are refused."""
    base = CacheConfig(num_kv_heads=2, head_dim=32)
    assert kvz.TwoTierCache(base, core=core, head_dim=64).config == replace(base, head_dim=64)
    for maker in (kvz.TwoTierCache, kvz.PooledCache):
        with pytest.raises(TypeError, match="heads_kv"):
            maker(core=core, heads_kv=3)
        with pytest.raises(TypeError, match=r"^config: expected a CacheConfig, got dict"):
            maker({}, core=core)


def test_a_pooled_cache_needs_no_room_for_a_tail(core: Any) -> None:
    """Made from fields, it only has to hold one token more than its sinks."""
    cache = kvz.PooledCache(core=core, num_kv_heads=1, head_dim=8, max_tokens=4, sink_tokens=3)
    cache.append(*stream(cache.config, 10))
    assert list(cache.positions) == [0, 1, 2, 9]
    with pytest.raises(kvz.ConfigError):
        kvz.PooledCache(core=core, max_tokens=4, sink_tokens=4)


@pytest.mark.parametrize("kind", ["two_tier", "pooled"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_ranges_are_absolute_positions(core: Any, kind: str, sinks: int) -> None:
    """What is at a position stays at that position; evicted ones are an error."""
    cache, _ = twins(core, kind, tokens=150, max_tokens=40, sink_tokens=sinks)
    keys, values = cache.get_all_kv()
    first = 150 - (40 - sinks)
    for start, stop in [(first, 150), (149, 150), (first + 5, 120), (0, sinks), (sinks, sinks)]:
        got = cache.get_kv(start, stop)
        held = np.isin(cache.positions, np.arange(start, stop))
        same_bits(got[0], keys[held])
        same_bits(got[1], values[held])
    for bad in [(first - 1, 150), (first, 151), (sinks, sinks + 1), (0, 150), (140, 130)]:
        with pytest.raises(ValueError, match=r"^start, stop: expected a range of positions held"):
            cache.get_kv(*bad)


@pytest.mark.parametrize("tail", ["f32", "f16", "bf16"])
def test_the_tail_can_be_looked_at(core: Any, tail: str) -> None:
    """As it is stored, read-only, and of the moment it was asked for."""
    cache, _ = twins(core, tokens=30, tail_precision=tail, value_dim=5)
    keys, values = cache.tail_view()
    wanted = np.float16 if tail == "f16" else np.float32
    assert (keys.dtype, values.dtype) == (wanted, wanted)
    assert (keys.shape, values.shape) == ((10, 2, 32), (10, 2, 5))
    assert not (keys.flags.writeable)
    assert not (values.flags.writeable)
    same_bits(keys.astype(np.float32), cache.get_all_kv()[0][-10:])
    before = keys.copy()
    cache.append(*stream(cache.config, 30, seed=3))
    assert np.array_equal(keys, before)


def test_a_repr_is_for_people(core: Any) -> None:
    """Shape, tokens by tier, bytes, bits."""
    cache, _ = twins(core, tokens=30, sink_tokens=2, store_precision=("q8", "q4"), value_dim=64)
    assert repr(cache).startswith(
        "TwoTierCache(2 heads x 32/64, 30 tokens: 2 f16 sinks + 18 q8/q4 + 10 f16, "
    )
    assert repr(cache).endswith("bits/value)")
    empty = make(core)
    assert "0 tokens" in repr(empty)
    assert (empty.stats().compression_ratio, empty.stats().bits_per_value) == (1.0, 0.0)
    assert empty.stats().to_dict()["total_bytes"] == empty.nbytes == 0
