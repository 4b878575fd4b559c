"""What goes wrong is said: which argument, what it got, what was expected; nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import kvz
from support import KINDS, configure, make, queries, rows, stream, twins, unchanged

kinds = pytest.mark.parametrize("kind", KINDS)
NAN, INF = float("nan"), float("inf")
Arrays = tuple[Any, Any]


def put(array: Any, at: Any, value: float) -> Any:
    """Return a copy with one number changed."""
    changed = array.copy()
    changed[at] = value
    return changed


# Changes of good (T, 2, 32) keys and (T, 2, 5) values; what the message must hold.
BAD_SHAPES: dict[str, tuple[Callable[[Any, Any], Arrays], list[str]]] = {
    "too few numbers": (lambda k, v: (k.ravel()[:63], v), ["keys", "(63,)"]),
    "a remainder": (lambda k, v: (k.ravel()[:67], v), ["keys", "(67,)"]),
    "flat without T": (lambda k, v: (k.ravel(), v), ["keys", "(640,)"]),
    "a remainder of values": (lambda k, v: (k, v.ravel()[:13]), ["values", "(13,)"]),
    "more keys": (lambda k, v: (k, v[:9]), ["values", "9", "10"]),
    "more values": (lambda k, v: (k[:9], v), ["values", "9", "10"]),
    "no values": (lambda k, v: (k, v[:0]), ["values", "0", "10"]),
    "one head": (lambda k, v: (k[:, :1], v), ["keys", "(10, 1, 32)", "(T, 2, 32)"]),
    "three heads": (lambda k, v: (rows(10, 3, 32, 0), v), ["keys", "(10, 3, 32)"]),
    "heads of values": (lambda k, v: (k, v[:, :1]), ["values", "(10, 1, 5)", "(T, 2, 5)"]),
    "a short key": (lambda k, v: (k[..., :31], v), ["keys", "(10, 2, 31)"]),
    "a long value": (lambda k, v: (k, k), ["values", "(10, 2, 32)", "(T, 2, 5)"]),
    "values for keys": (lambda k, v: (v, v), ["keys", "(10, 2, 5)"]),
    "heads first": (lambda k, v: (k.swapaxes(0, 1), v), ["keys", "(2, 10, 32)"]),
    "a batch axis": (lambda k, v: (k[None], v), ["keys", "(1, 10, 2, 32)"]),
    "a number": (lambda k, v: (np.float32(1), v), ["keys", "()"]),
    "no dims": (lambda k, v: (k[..., :0], v), ["keys", "(10, 2, 0)"]),
    "no heads": (lambda k, v: (k, v[:, :0]), ["values", "(10, 0, 5)"]),
}
BAD_NUMBERS: dict[str, tuple[Callable[[Any, Any], Arrays], list[str]]] = {
    "nan first": (lambda k, v: (put(k, (0, 0, 0), NAN), v), ["keys", "token 0, head 0, dim 0"]),
    "nan last": (lambda k, v: (put(k, (9, 1, 31), NAN), v), ["keys", "token 9, head 1, dim 31"]),
    "nan in values": (
        lambda k, v: (k, put(v, (9, 1, 4), NAN)),
        ["values", "token 9, head 1, dim 4"],
    ),
    "inf": (lambda k, v: (put(k, (3, 1, 0), INF), v), ["keys", "token 3", "inf"]),
    "minus inf": (lambda k, v: (k, put(v, (3, 1, 0), -INF)), ["values", "token 3", "-inf"]),
    "inf of f16": (lambda k, v: (put(k.astype("f2"), (3, 1, 0), INF), v), ["keys", "token 3"]),
    "nan of f64": (lambda k, v: (put(k.astype("f8"), (3, 1, 0), NAN), v), ["keys", "token 3"]),
    "nan, strided": (lambda k, v: (k, put(v, (4, 0, 2), NAN)[:, ::1]), ["values", "token 4"]),
}
TOO_LARGE: dict[str, tuple[Callable[[Any, Any], Arrays], list[str]]] = {
    "beyond f16": (lambda k, v: (put(k, (3, 1, 0), 65520), v), ["keys", "token 3", "65520"]),
    "minus beyond": (
        lambda k, v: (k, put(v, (3, 0, 0), -1e9)),
        ["values", "token 3", "-1000000000"],
    ),
    "f64 beyond f32": (
        lambda k, v: (put(k.astype("f8"), (3, 1, 0), 1e300), v),
        ["keys", "token 3"],
    ),
}
BAD_TYPES: dict[str, tuple[Callable[[Any, Any], Arrays], list[str]]] = {
    "None": (lambda k, v: (None, v), ["keys", "float32"]),
    "text": (lambda k, v: (k, "values"), ["values", "float32"]),
    "integers": (lambda k, v: (k.astype(int), v), ["keys", "float32", "int64"]),
    "bytes": (lambda k, v: (k, v.astype("u1")), ["values", "uint8"]),
    "booleans": (lambda k, v: (k > 0, v), ["keys", "bool"]),
    "complex": (lambda k, v: (k.astype("c8"), v), ["keys", "complex64"]),
    "objects": (lambda k, v: (k, v.astype(object)), ["values", "object"]),
    "long double": (lambda k, v: (k.astype(np.longdouble), v), ["keys", "float"]),
    "a dict": (lambda k, v: ({}, v), ["keys", "float32"]),
    "ragged": (lambda k, v: ([[1.0], [1.0, 2.0]], v), ["keys", "float32"]),
}


def refused(
    cache: Any, call: Callable[[], Any], words: list[str], *kinds_: type[BaseException]
) -> None:
    """Assert a KvzError of these kinds whose message holds these words; the cache is unchanged."""
    with unchanged(cache), pytest.raises(kvz.KvzError) as raised:
        call()
    for one in kinds_:
        assert isinstance(raised.value, one)
    for word in words:
        assert word in str(raised.value)


@kinds
@pytest.mark.parametrize("name", [*BAD_SHAPES, *BAD_NUMBERS, *TOO_LARGE, *BAD_TYPES])
def test_append_refuses(core: Any, kind: str, name: str) -> None:
    """Anything wrong in an append is an error that names it; no token of it is stored."""
    cache, _ = twins(core, kind, tokens=30, value_dim=5, max_tokens=33)
    keys, values = stream(cache.config, 10, seed=1)
    error: tuple[type[Exception], ...]
    if name in BAD_TYPES:
        (change, words), error = BAD_TYPES[name], (kvz.InvalidTypeError, TypeError)
    elif name in BAD_SHAPES:
        (change, words), error = BAD_SHAPES[name], (kvz.InvalidArgumentError, ValueError)
    elif name in TOO_LARGE:
        (change, words), error = TOO_LARGE[name], (kvz.NotRepresentableError, ValueError)
    else:
        (change, words), error = BAD_NUMBERS[name], (kvz.NotFiniteError, ValueError)
    bad_keys, bad_values = change(keys, values)
    refused(cache, lambda: cache.append(bad_keys, bad_values), words, *error)
    cache.append(keys, values)
    assert len(cache) == 33


@kinds
@pytest.mark.parametrize("store", ["f16", "q8", "q4", "q4k"])
@pytest.mark.parametrize("token", [0, 57, 58, 200, 299])
def test_a_long_append_refuses(core: Any, kind: str, store: str, token: int) -> None:
    """Wherever a bad number of a long append was to go, nothing is left of the others."""
    pool = kvz.BufferPool(core=core)
    fields = {"store_precision": store, "tail_length": 64, "migration_batch": 64}
    cache = make(core, kind, pool=pool, num_kv_heads=8, head_dim=128, **fields)
    keys, values = stream(cache.config, 300)
    cache.append(keys[:70], values[:70])
    held = pool.stats().bytes_in_use
    bad = put(keys, (token, 5, 100), NAN), put(values, (token, 5, 100), 1e9)
    where = f"token {token}, head 5, dim 100"
    refused(cache, lambda: cache.append(*bad), ["keys", where], kvz.NotFiniteError)
    words = ["values", where]
    refused(cache, lambda: cache.append(keys, bad[1]), words, kvz.NotRepresentableError)
    assert pool.stats().bytes_in_use == held
    cache.append(keys, values)
    other = make(core, kind, num_kv_heads=8, head_dim=128, **fields)
    other.append(np.concatenate([keys[:70], keys]), np.concatenate([values[:70], values]))
    assert cache.digest() == other.digest()


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"store_precision": "f32", "tail_precision": "f32"}, np.finfo(np.float32).max),
        ({"store_precision": "f32", "tail_precision": "bf16"}, 3.39615e38),
        ({"store_precision": "f32", "tail_precision": "f16"}, 65519.99),
        ({"store_precision": "f16", "tail_precision": "f32"}, 65519.99),
        ({"store_precision": "q8", "tail_precision": "f32"}, 65504 * 127),
        ({"store_precision": "q8", "tail_precision": "f32", "rotation": "on"}, 65504 * 127 / 8),
        ({"store_precision": "q4", "tail_precision": "f32", "rotation": "off"}, 65504 * 8),
        ({"store_precision": "q4", "tail_precision": "f32"}, 65504 * 8 / 8),
    ],
)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_each_precision_has_its_limit(
    core: Any, fields: dict[str, Any], limit: float, side: str
) -> None:
    """A magnitude is refused if some tier could not hold it, wherever it would go now."""
    cache, model = twins(core, head_dim=64, **fields)
    good = {"keys": np.ones((1, 2, 64), np.float32), "values": np.ones((1, 2, 64), np.float32)}
    for sign in (1, -1):
        good[side] = np.full((1, 2, 64), sign * limit, np.float32)
        for real in (cache, model):
            real.append(**good)
        # As float64, which exists beyond the largest f32 too.
        above = np.full((1, 2, 64), float(limit) * 1.001 * sign)
        call = {**good, side: above}
        refused(cache, partial(cache.append, **call), [side], kvz.NotRepresentableError)
        with pytest.raises(ValueError, match=side):
            model.append(**call)
    assert len(cache) == len(model) == 2


def test_keys_and_values_have_their_own_limit(core: Any) -> None:
    """What an f32 side holds, the q4 side beside it may refuse."""
    cache = make(core, tail_precision="f32", store_precision=("f32", "q4"), head_dim=64)
    huge, one = np.full((1, 2, 64), 1e30, np.float32), np.ones((1, 2, 64), np.float32)
    cache.append(huge, one)
    refused(cache, lambda: cache.append(one, huge), ["values"], kvz.NotRepresentableError)


@kinds
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_a_full_pool_stops_an_append_whole(core: Any, kind: str, tokens: int) -> None:
    """If the pool has no room in the middle of an append, none is stored and no page is lost."""
    pool = kvz.BufferPool(core=core, max_bytes=1 << 16)
    cache = make(core, kind, pool=pool, max_tokens=100_000, head_dim=64)
    keys, values = stream(cache.config, tokens)
    for _ in range(2000):
        used, digest = pool.stats().bytes_in_use, cache.digest()
        try:
            cache.append(keys, values)
        except kvz.PoolExhaustedError as error:
            message = str(error)
            break
    else:
        pytest.fail("the pool never refused")
    assert "65536" in message
    assert cache.digest() == digest
    assert pool.stats().bytes_in_use == used <= 1 << 16
    cache.check()
    with unchanged(cache), pytest.raises(MemoryError):
        cache.append(keys, values)
    # Room made elsewhere, or in the cache itself, is room.
    held = len(cache)
    assert (held == 0) is (tokens == 300)  # a first append of 300 is more than the pool holds
    assert cache.trim(held) == held
    cache.clear()
    cache.append(keys[:1], values[:1])


@kinds
def test_a_full_pool_still_lets_a_window_slide(core: Any, kind: str) -> None:
    """A cache at max_tokens needs no more memory than it has: appends go on for ever."""
    pool = kvz.BufferPool(core=core)
    cache = make(core, kind, pool=pool, max_tokens=256)
    keys, values = stream(cache.config, 64)
    for _ in range(8):
        cache.append(keys, values)
    most = pool.stats().bytes_high_water
    tight = kvz.BufferPool(core=core, max_bytes=most)
    cache = make(core, kind, pool=tight, max_tokens=256)
    for _ in range(30):
        cache.append(keys, values)
    assert len(cache) == 256


@kinds
def test_a_closed_cache_says_so(core: Any, kind: str) -> None:
    """Every verb of a closed cache raises ClosedError, a ValueError; close may be called again."""
    cache, _ = twins(core, kind, tokens=5)
    query, (keys, values) = queries(cache.config), stream(cache.config, 1)
    cache.close()
    for call in (
        lambda: cache.append(keys, values),
        lambda: cache.append(keys.astype("f8"), values),
        lambda: cache.append(keys[:0], values[:0]),
        lambda: cache.attend(query),
        lambda: cache.attend(query, return_mass=True),
        lambda: cache.attend(query, window=3),
        cache.get_all_kv,
        lambda: cache.get_kv(0, 1),
        lambda: cache.get_kv(0, 0),
        cache.get_all_kv_aligned,
        lambda: cache.trim(1),
        cache.clear,
        cache.stats,
        cache.check,
        cache.digest,
        lambda: len(cache),
        lambda: cache.positions,
        lambda: cache.next_position,
        lambda: cache.nbytes,
    ):
        with pytest.raises(kvz.ClosedError, match="closed") as raised:
            call()
        assert isinstance(raised.value, ValueError)
    cache.close()
    assert cache.closed


QUERIES: dict[str, tuple[Any, list[str]]] = {
    "too narrow": (rows(1, 4, 31, 0)[0], ["query", "(4, 31)", "32"]),
    "too wide": (rows(1, 4, 64, 0)[0], ["query", "(4, 64)", "32"]),
    "flat": (rows(1, 4, 32, 0).ravel(), ["query", "(128,)"]),
    "three heads": (rows(1, 3, 32, 0)[0], ["query", "(3, 32)", "2"]),
    "no heads": (rows(1, 4, 32, 0)[0, :0], ["query", "(0, 32)"]),
    "a batch axis": (rows(1, 4, 32, 0)[None], ["query", "(1, 1, 4, 32)"]),
    "a number": (np.float32(1), ["query", "()"]),
    "more than the stream": (rows(31, 4, 32, 0), ["query", "31", "30"]),
    "nan": (put(rows(1, 4, 32, 0)[0], (2, 7), NAN), ["query", "finite"]),
    "inf": (put(rows(2, 4, 32, 0), (1, 3, 31), INF), ["query", "finite"]),
}
QUERY_TYPES: dict[str, tuple[Any, list[str]]] = {
    "integers": (np.ones((4, 32), int), ["query", "int64"]),
    "None": (None, ["query", "float32"]),
    "complex": (np.ones((4, 32), complex), ["query", "complex128"]),
}


@kinds
@pytest.mark.parametrize("name", [*QUERIES, *QUERY_TYPES])
def test_attend_refuses_a_query(core: Any, kind: str, name: str) -> None:
    """A query of the wrong width, heads, dtype or number is refused, not cut to fit."""
    cache, _ = twins(core, kind, tokens=30)
    query, words = {**QUERIES, **QUERY_TYPES}[name]
    error = TypeError if name in QUERY_TYPES else ValueError
    refused(cache, lambda: cache.attend(query), words, error)
    refused(cache, lambda: cache.attend(query, window=9, return_mass=True), words, error)


@kinds
def test_an_empty_cache_refuses_the_same_queries(core: Any, kind: str) -> None:
    """The shape of a query is checked whether or not there is something to attend to."""
    cache = make(core, kind)
    for name, (query, words) in QUERIES.items():
        if name != "more than the stream":
            refused(cache, partial(cache.attend, query), words, ValueError)


OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "scale nan": ({"scale": NAN}, ["scale", "nan"]),
    "scale inf": ({"scale": INF}, ["scale", "inf"]),
    "window 0": ({"window": 0}, ["window", "0"]),
    "window -1": ({"window": -1}, ["window", "-1"]),
    "softcap 0": ({"softcap": 0.0}, ["softcap", "0"]),
    "softcap -1": ({"softcap": -1.0}, ["softcap", "-1"]),
    "softcap nan": ({"softcap": NAN}, ["softcap", "nan"]),
    "slopes short": ({"alibi_slopes": np.ones(2, "f4")}, ["alibi_slopes", "(4,)", "(2,)"]),
    "slopes nan": ({"alibi_slopes": put(np.ones(4, "f4"), 1, NAN)}, ["alibi_slopes"]),
    "sinks long": ({"sinks": np.ones(5, "f4")}, ["sinks", "(4,)", "(5,)"]),
    "sinks nan": ({"sinks": put(np.ones(4, "f4"), 3, NAN)}, ["sinks"]),
    "sinks inf": ({"sinks": put(np.ones(4, "f4"), 3, INF)}, ["sinks"]),
    "mask short": ({"mask": np.ones(29, bool)}, ["mask", "30", "(29,)"]),
    "mask heads": ({"mask": np.ones((3, 30), bool)}, ["mask", "(3, 30)"]),
    "mask axes": ({"mask": np.ones((1, 1, 1, 30), bool)}, ["mask", "(1, 1, 1, 30)"]),
    "mask nan": ({"mask": put(np.ones(30, "f4"), 3, NAN)}, ["mask"]),
    "mask inf": ({"mask": put(np.ones(30, "f4"), 3, INF)}, ["mask"]),
    "out shape": ({"out": np.zeros((4, 31), "f4")}, ["out", "(4, 32)", "(4, 31)"]),
    "out strides": ({"out": np.zeros((32, 4), "f4").T}, ["out", "contiguous"]),
}
OPTION_TYPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "scale text": ({"scale": "x"}, ["scale", "x"]),
    "window float": ({"window": 2.5}, ["window", "2.5"]),
    "window bool": ({"window": True}, ["window", "True"]),
    "mask integers": ({"mask": np.ones(30, int)}, ["mask", "int64", "bool"]),
    "out dtype": ({"out": np.zeros((4, 32))}, ["out", "float32", "float64"]),
    "out list": ({"out": [0.0]}, ["out", "list"]),
}


@kinds
@pytest.mark.parametrize("name", [*OPTIONS, *OPTION_TYPES])
def test_attend_refuses_an_option(core: Any, kind: str, name: str) -> None:
    """Options out of range, of the wrong shape or dtype are refused by name."""
    cache, _ = twins(core, kind, tokens=30)
    options, words = {**OPTIONS, **OPTION_TYPES}[name]
    error = TypeError if name in OPTION_TYPES else ValueError
    query = queries(cache.config, None, 2)
    refused(cache, lambda: cache.attend(query, **options), words, error)


@kinds
def test_a_read_only_out_is_refused(core: Any, kind: str) -> None:
    """Nothing is written to an array that may not be written to."""
    cache, _ = twins(core, kind, tokens=30)
    out = np.zeros((4, 32), np.float32)
    out.flags.writeable = False
    refused(
        cache, lambda: cache.attend(queries(cache.config, None, 2), out=out), ["out", "writable"]
    )
    assert not out.any()


@kinds
def test_ranges_and_counts_are_checked(core: Any, kind: str) -> None:
    """trim and get_kv take whole numbers in range; evicted positions are not given again."""
    cache, _ = twins(core, kind, tokens=100, max_tokens=40, sink_tokens=2)
    for bad in (-1, -(2**70), 2**70):
        refused(cache, partial(cache.trim, bad), ["n", str(bad)], ValueError)
    for odd in (1.5, "1", None, True):
        refused(cache, partial(cache.trim, odd), ["n", repr(odd)], TypeError)
    for start, stop in [(0, 5), (3, 5), (61, 63), (90, 101), (100, 102), (70, 69), (2, 62)]:
        words = ["start", "stop", "62 to 100", f"{start} to {stop}"]
        refused(cache, partial(cache.get_kv, start, stop), words, ValueError)
    refused(cache, lambda: cache.get_kv(-3, 100), ["start", "-3"], ValueError)
    refused(cache, lambda: cache.get_kv(62.0, 100), ["start", "62.0"], TypeError)


CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no heads": ({"num_kv_heads": 0}, ["num_kv_heads", "0"]),
    "no dims": ({"head_dim": 0}, ["head_dim", "0"]),
    "no value dims": ({"value_dim": 0}, ["value_dim", "0"]),
    "negative": ({"head_dim": -4}, ["head_dim", "-4"]),
    "huge": ({"head_dim": 2**40}, ["head_dim", str(2**40)]),
    "huge heads": ({"num_kv_heads": 2**70}, ["num_kv_heads", str(2**70)]),
    "negative tail": ({"tail_length": -1}, ["tail_length", "-1"]),
    "no batch": ({"migration_batch": 0}, ["migration_batch", "0"]),
    "negative sinks": ({"sink_tokens": -1}, ["sink_tokens", "-1"]),
    "no tokens": ({"max_tokens": 0}, ["max_tokens", "0"]),
    "tail over max": ({"max_tokens": 11}, ["max_tokens", "11", "12"]),
    "sinks over max": ({"max_tokens": 20, "sink_tokens": 9}, ["max_tokens", "20", "21"]),
    "huge sum": ({"sink_tokens": 2**63}, ["sink_tokens"]),
    "fraction": ({"head_dim": 32.0}, ["head_dim", "32.0"]),
    "bool": ({"head_dim": True}, ["head_dim", "True"]),
    "text": ({"max_tokens": "512"}, ["max_tokens", "512"]),
    "store": ({"store_precision": "q5"}, ["store_precision", "q5", "q4"]),
    "one of a pair": ({"store_precision": ("q8", "q5")}, ["store_precision", "q5"]),
    "three": ({"store_precision": ("q8", "q4", "q4")}, ["store_precision"]),
    "store None": ({"store_precision": None}, ["store_precision", "None"]),
    "packed tail": ({"tail_precision": "q8"}, ["tail_precision", "q8", "f16"]),
    "rotation": ({"rotation": "maybe"}, ["rotation", "maybe", "auto"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_configuration_is_named(name: str) -> None:
    """Every field is checked once, when the configuration is made."""
    fields, words = CONFIGS[name]
    with pytest.raises(kvz.ConfigError) as raised:
        configure(**fields)
    for word in words:
        assert word in str(raised.value)


def test_all_problems_are_named_at_once() -> None:
    """One error lists everything that is wrong."""
    with pytest.raises(kvz.ConfigError) as raised:
        configure(head_dim=0, migration_batch=0, tail_precision="q4", rotation="x")
    for name in ("head_dim", "migration_batch", "tail_precision", "rotation"):
        assert name in str(raised.value)


def test_unknown_fields_and_changes_are_refused() -> None:
    """There is no silent misspelling, and a configuration does not change."""
    with pytest.raises(TypeError, match="heads_kv"):
        configure(heads_kv=3)
    with pytest.raises(kvz.ConfigError, match="heads_kv"):
        kvz.CacheConfig.from_dict({"heads_kv": 3})
    with pytest.raises(AttributeError):
        configure().head_dim = 3


@kinds
def test_a_cache_too_large_for_memory_is_an_error_when_it_fills(core: Any, kind: str) -> None:
    """A huge max_tokens costs nothing by itself."""
    cache = make(core, kind, max_tokens=2**40)
    keys, values = stream(cache.config, 20)
    cache.append(keys, values)
    assert len(cache) == 20
