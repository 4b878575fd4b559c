"""The oracle itself, against arithmetic written out by hand, value by value."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvz import reference
from kvz.reference import Format, ReferenceCache, ReferencePooledCache
from support import HEAD_DIMS, STORES, rows, same_bits

F32 = np.float32


def simple(**fields: Any) -> SimpleNamespace:
    """Make a configuration that nobody validated."""
    base = {
        "num_kv_heads": 2,
        "head_dim": 4,
        "value_dim": None,
        "max_tokens": 60,
        "tail_length": 5,
        "tail_precision": "f32",
        "store_precision": "f32",
        "migration_batch": 4,
        "sink_tokens": 0,
        "rotation": "auto",
        "warm_length": 0,
        "warm_precision": "f32",
    }
    return SimpleNamespace(**{**base, **fields})


def representable(precision: str) -> Any:
    """Every positive number of a 16-bit float format, from its bit patterns."""
    patterns = np.arange(0x7C00 if precision == "f16" else 0x7F80, dtype=np.uint16)
    if precision == "f16":
        return patterns.view(np.float16).astype(np.float64)
    return (patterns.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("precision", ["f16", "bf16"])
def test_rounding_is_to_the_nearest_number_and_ties_to_even(precision: str) -> None:
    """Rounding finds the nearest of all numbers of the format; halfway, the even pattern."""
    numbers = representable(precision)
    rng = np.random.default_rng(3)
    at = rng.integers(0, len(numbers) - 1, 500)
    share = rng.choice([0.0, 0.25, 0.5, 0.5, 0.75], 500)
    x = (numbers[at] + share * (numbers[at + 1] - numbers[at])).astype(np.float32)
    for value, got in zip(x.tolist(), reference.round_to(precision, x).tolist(), strict=True):
        above = int(np.searchsorted(numbers, value))
        below = max(above - 1, 0)
        down, up = value - numbers[below], numbers[above] - value
        even = below if below % 2 == 0 else above
        nearest = even if down == up else (below if down < up else above)
        assert got == numbers[nearest]
    same_bits(reference.round_to(precision, -x), -reference.round_to(precision, x))


@pytest.mark.parametrize("width", [32, 64, 96, 128, 160])
def test_rotation_is_the_block_hadamard_matrix(width: int) -> None:
    """The butterflies compute Sylvester's matrix per block, and undo themselves."""
    x = rows(3, 1, width, 5)
    expected, start = np.zeros(x.shape), 0
    for n in reference.hadamard_blocks(width):
        matrix = np.ones((1, 1))
        while len(matrix) < n:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        expected[..., start : start + n] = x[..., start : start + n] @ (matrix / math.sqrt(n))
        start += n
    # log2(n) + 1 rounded operations on values up to about 4.
    step = float(np.finfo(np.float32).eps) * 8 * 4
    np.testing.assert_allclose(reference.rotate(x), expected, rtol=0, atol=step)
    np.testing.assert_allclose(reference.rotate(reference.rotate(x)), x, rtol=0, atol=2 * step)


def by_hand(group: list[np.float32], precision: str) -> list[np.float32]:
    """Quantize one group, one number at a time."""
    if precision == "q8":
        largest, low, high = max(abs(y) for y in group), -127, 127
        scale = F32(np.float16(F32(largest / F32(127))))
    else:
        up, down = max(group), min(group)
        low, high = -8, 7
        scale = F32(np.float16(F32((up if up >= -down else down) * F32(-0.125))))
    inverse = F32(0) if scale == 0 else F32(F32(1) / scale)
    codes = [min(max(round(float(F32(y * inverse))), low), high) for y in group]
    return [F32(F32(code) * scale) for code in codes]


@pytest.mark.parametrize("precision", ["q8", "q4"])
@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e3])
def test_codes_are_those_of_one_number_at_a_time(precision: str, spread: float) -> None:
    """Groups of 32 have their own scale; the codes are rounded to even and clamped."""
    x = rows(5, 2, 96, 1, spread)
    x[0, 0, :32] = 0
    x[1, 0, 3] = -x[1, 0].max() * 2
    x[2, 1, 40] = x[2, 1].max() * 50
    got = Format(precision, rotated=False).stored(x).reshape(-1, 32)
    for group, expected in zip(got, x.reshape(-1, 32), strict=True):
        values = np.array(by_hand(list(expected), precision), np.float32)
        np.testing.assert_array_equal(group, values)


@pytest.mark.parametrize("precision", ["q8", "q4"])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_storing_errs_by_half_a_step(precision: str, rotated: bool, dim: int) -> None:
    """No code is further off than half a step, but for what a signed scale clamps: one step."""
    x = rows(20, 2, dim, 2)
    y = np.pad(x, [(0, 0), (0, 0), (0, -dim % 32)])
    y = reference.rotate(y) if rotated else y
    encode = reference.encode_q8 if precision == "q8" else reference.encode_q4
    codes, scales = encode(y)
    error = np.abs(reference.decode(codes, scales) - y).reshape(codes.shape)
    # A scale is rounded to 11 bits: codes of 8 and 127 move by 2**-11 of themselves.
    steps = {"q8": 0.5 + 127 * 2**-11, "q4": 1.0 + 8 * 2**-11}[precision]
    assert (error <= np.abs(scales) * (steps + 1e-4)).all()
    assert (np.abs(codes).max(axis=-1) == (127 if precision == "q8" else 8)).all()


def test_limits_are_the_largest_that_stay_finite() -> None:
    """At its limit a format still gives a finite number; the float formats give none beyond."""
    for precision in STORES:
        for rotated in (False, True) if precision.startswith("q") else (False,):
            kept = Format(precision, rotated)
            for dim in (1, 64, 80, 128):
                x = np.full((1, dim), kept.limit(dim), np.float32)
                assert np.isfinite(kept.stored(x)).all()
    for precision in ("f16", "bf16"):
        beyond = np.nextafter(F32(Format(precision, False).limit(1)), F32(np.inf))
        assert np.isinf(reference.round_to(precision, np.array([beyond]))).all()


@pytest.mark.parametrize("dim", [1, 64, 80, 128])
def test_limits_through_another_format_stay_finite(dim: int) -> None:
    """Rounding may make a value larger; the limit leaves room for that."""
    ways = [Format(p, r) for p in STORES for r in (False, True) if Format(p, r).packed or not r]
    rng = np.random.default_rng(5)
    signs = np.array([np.ones(dim), *rng.choice([-1.0, 1.0], (30, dim))], np.float32)
    for warm in (way for way in ways if not way.centred):  # others are no warm formats
        for store in ways:
            x = signs * np.float32(store.limit_after(warm, dim))
            held = warm.rounded(warm.spread(x))
            got = store.rounded(store.entered(held, warm, dim))
            assert np.isfinite(got).all(), (warm, store)


def test_what_is_rotated_on_both_sides_is_not_rotated_back() -> None:
    """From q8 to q4 within the rotated space no more is lost than the two formats round."""
    q8, q4 = Format("q8", True), Format("q4", True)
    held = q8.rounded(q8.spread(rows(50, 2, 80, 1)))
    same_bits(q4.entered(held, q8, 80), held)
    plain = Format("q4", False)
    same_bits(plain.entered(held, q8, 80), plain.spread(q8.gathered(held, 80)))


def walk(config: Any, total: int) -> tuple[set[int], ...]:
    """Move tokens one by one: sinks, store, warm and tail after `total`, by the plain words."""
    sinks: set[int] = set()
    store: set[int] = set()
    warm: set[int] = set()
    tail: set[int] = set()
    for position in range(total):
        (sinks if position < config.sink_tokens else tail).add(position)
        for batch in range(position // config.migration_batch + 1):
            span = range(batch * config.migration_batch, (batch + 1) * config.migration_batch)
            newer = position - span[-1]
            if newer >= config.tail_length:
                moving = tail & set(span)
                tail -= moving
                warm |= moving
                if not config.warm_length:
                    store, warm = store | warm, set()
        for page in range(position // 64 + 1):
            newer = sum(one >= (page + 1) * 64 for one in warm)
            if newer >= config.warm_length > 0:
                moving = warm & set(range(page * 64, (page + 1) * 64))
                warm -= moving
                store |= moving
        while len(sinks) + len(store) + len(warm) + len(tail) > config.max_tokens:
            oldest = min(store | warm | tail)
            for tier in (store, warm, tail):
                tier.discard(oldest)
    return sinks, store, warm, tail


@pytest.mark.parametrize("sinks", [0, 3, 5])
@pytest.mark.parametrize(
    ("tail", "batch", "warm", "limit"),
    [(5, 4, 0, 60), (1, 1, 0, 9), (7, 3, 0, 20), (0, 8, 0, 16), (5, 4, 30, 150), (0, 7, 90, 180)],
)
def test_tiers_follow_the_rule_in_words(
    sinks: int, tail: int, batch: int, warm: int, limit: int
) -> None:
    """The formulas give what moving the tokens one by one gives, however they are cut."""
    sizes = {"tail_length": tail, "migration_batch": batch, "warm_length": warm}
    config = simple(**sizes, max_tokens=limit, sink_tokens=sinks)
    for total in range(0, 230 if warm else 70, 3):
        expected = walk(config, total)
        once, cut = ReferenceCache(config), ReferenceCache(config)
        x = rows(total, 2, 4, 0)
        once.append(x, x)
        for start in range(0, total, 7):
            cut.append(x[start : start + 7], x[start : start + 7])
        for cache in (once, cut):
            counts = cache.stats()
            held = counts.sink_tokens, counts.store_tokens, counts.warm_tokens, counts.tail_tokens
            assert held == tuple(len(tier) for tier in expected)
            assert cache.positions.tolist() == sorted(set.union(*expected))
        same_bits(once.get_all_kv()[0], cut.get_all_kv()[0])


def test_trim_takes_the_newest_and_positions_run_on() -> None:
    """Trim goes back through the body, over the evicted gap, into the sinks."""
    config = simple(sink_tokens=2, max_tokens=20, tail_length=4)
    cache = ReferenceCache(config)
    x = rows(30, 2, 4, 0)
    cache.append(x, x)
    assert cache.positions.tolist() == [0, 1, *range(12, 30)]
    assert cache.trim(17) == 17
    assert (cache.next_position, cache.positions.tolist()) == (13, [0, 1, 12])
    assert cache.trim(2) == 2
    assert (cache.next_position, cache.positions.tolist()) == (1, [0])
    cache.append(x[:3], x[:3])
    assert cache.positions.tolist() == [0, 1, 2, 3]
    assert cache.trim(99) == 4
    assert cache.trim(1) == 0


def by_loops(cache: ReferenceCache, q: Any, scale: float, options: dict[str, Any]) -> Any:
    """Attention with loops over queries, heads and tokens."""
    keys, values = (x.astype(float) for x in cache.get_all_kv())
    n, heads, _ = q.shape
    out = np.zeros((n, heads, values.shape[2]))
    lse = np.full((n, heads), -math.inf)
    mass = np.zeros((heads, len(cache)))
    for i in range(n):
        at = cache.next_position - n + i
        for h in range(heads):
            kv = h * keys.shape[1] // heads
            weights = {}
            for t, position in enumerate(cache.positions.tolist()):
                if options["causal"] and position > at:
                    continue
                if options["window"] is not None and position <= at - options["window"]:
                    continue
                logit = scale * float(np.dot(q[i, h].astype(float), keys[t, kv]))
                if options["softcap"]:
                    logit = options["softcap"] * math.tanh(logit / options["softcap"])
                logit += options["alibi_slopes"][h] * (position - at)
                weights[t] = math.exp(logit + options["mask"][i, h, t])
            total = sum(weights.values()) + math.exp(options["sinks"][h])
            lse[i, h] = math.log(total)
            for t, weight in weights.items():
                out[i, h] += weight / total * values[t, kv]
                mass[h, t] += weight / total
    return out, lse, mass


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attention_is_what_loops_give(causal: bool, window: int | None, softcap: float) -> None:
    """Every option at once, against loops with the formulas of the specification."""
    config = simple(sink_tokens=2, max_tokens=16, value_dim=3)
    cache = ReferenceCache(config)
    cache.append(rows(25, 2, 4, 0), rows(25, 2, 3, 1))
    q = rows(5, 6, 4, 2)
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": np.linspace(0.1, 0.6, 6),
        "sinks": np.linspace(-1, 1, 6),
        "mask": rows(5, 6, 16, 3),
    }
    got = cache.attend(q, 0.3, return_lse=True, return_mass=True, **options)
    for part, expected in zip(got, by_loops(cache, q, 0.3, options), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-12, atol=1e-14)


def test_masks_broadcast_by_the_number_of_axes() -> None:
    """Two axes mean heads for one query and queries for several."""
    cache = ReferencePooledCache(simple())
    cache.append(rows(6, 2, 4, 0), rows(6, 2, 4, 1))
    q = rows(4, 4, 4, 2)
    mask = rows(4, 4, 6, 3) > -0.3
    for small in (mask[0, 0], mask[:, 0], mask[:, :1], mask[:1], mask):
        full = np.broadcast_to(small[:, None] if small.ndim == 2 else small, mask.shape)
        np.testing.assert_array_equal(cache.attend(q, mask=small), cache.attend(q, mask=full))
    for small in (mask[0, 0], mask[0]):
        full = np.broadcast_to(small, (4, 6))
        np.testing.assert_array_equal(cache.attend(q[0], mask=small), cache.attend(q[0], mask=full))


def test_nothing_visible_is_zero() -> None:
    """Of nothing, the output is zero and the LSE -inf, or the logit of the sink."""
    cache = ReferenceCache(simple())
    q = rows(3, 4, 4, 2)
    out, lse, mass = cache.attend(q, return_lse=True, return_mass=True)
    assert not out.any()
    assert np.isneginf(lse).all()
    assert mass.shape == (4, 0)
    cache.append(rows(6, 2, 4, 0), rows(6, 2, 4, 1))
    nothing = np.zeros(6, bool)
    out, lse = cache.attend(q, mask=nothing, sinks=np.full(4, 0.5), return_lse=True)
    assert not out.any()
    np.testing.assert_array_equal(lse, np.full((3, 4), 0.5))
