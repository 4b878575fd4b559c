"""What attention computes: every option against float64 over the stored values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvz
from support import (
    HEAD_DIMS,
    KINDS,
    PAIRS,
    STORES,
    agree,
    computing_bound,
    f32,
    make,
    model_of,
    queries,
    relative_error,
    rows,
    same_bits,
    stream,
    twins,
)

kinds = pytest.mark.parametrize("kind", KINDS)
GQA = (1, 2, 3, 4, 7)


@kinds
@pytest.mark.parametrize("ratio", [1, 3])
def test_attention_over_nothing_is_zero(core: Any, kind: str, ratio: int) -> None:
    """An empty cache gives zeros of the full shape, an LSE of -inf, and no mass."""
    cache = make(core, kind, value_dim=5)
    for n in (None, 4):
        query = queries(cache.config, n, ratio)
        shape = query.shape[:-1]
        out, lse, mass = cache.attend(query, return_lse=True, return_mass=True)
        assert (out.shape, lse.shape, mass.shape) == ((*shape, 5), shape, (2 * ratio, 0))
        assert not out.any()
        assert np.isneginf(lse).all()


def test_heads_do_not_mix(core: Any) -> None:
    """Query head h reads kv head h // G and nothing else."""
    cache = make(core, num_kv_heads=3)
    keys, values = stream(cache.config, 20)
    values[:] = np.array([1.0, 2.0, 3.0])[:, None]
    cache.append(keys, values)
    out = cache.attend(queries(cache.config, per_kv_head=2))
    # A weighted mean of equal numbers; q8 keeps 1, 2 and 3 to the step of a float16 scale.
    expected = np.repeat([1.0, 2.0, 3.0], 2)[:, None] * np.ones(32)
    np.testing.assert_allclose(out, expected, rtol=2**-11 + computing_bound(cache.config))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_format_at_every_width(core: Any, store: str, dim: int) -> None:
    """Attention reads the packed bytes of any format at any head width."""
    real, model = twins(core, tokens=90, store_precision=store, head_dim=dim)
    agree(real, model, queries(real.config, None, 2))
    agree(real, model, queries(real.config, 3, 2))


@kinds
@pytest.mark.parametrize("tail", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dims", [(64, 31), (33, 128), (128, 1)])
def test_keys_and_values_may_differ_in_format_and_width(
    core: Any, kind: str, tail: str, pair: tuple[str, str], dims: tuple[int, int]
) -> None:
    """(K, V) pairs of formats, value_dim other than head_dim, and every tail precision."""
    fields = {"head_dim": dims[0], "value_dim": dims[1], "tail_precision": tail}
    real, model = twins(core, kind, tokens=80, store_precision=pair, **fields)
    agree(real, model, queries(real.config, 2, 3))


@kinds
@pytest.mark.parametrize("ratio", GQA)
@pytest.mark.parametrize("heads", [1, 3])
def test_any_number_of_query_heads(core: Any, kind: str, ratio: int, heads: int) -> None:
    """GQA ratios need not be powers of two; one query or several."""
    real, model = twins(core, kind, tokens=70, num_kv_heads=heads)
    for n in (None, 1, 2, 5):
        agree(real, model, queries(real.config, n, ratio))


@kinds
@pytest.mark.parametrize("store", ["f16", "q8", "q4"])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 129, 200])
def test_any_number_of_tokens(core: Any, kind: str, store: str, tokens: int) -> None:
    """A page may be empty, full, or one off, in the tail and in the store."""
    for tail, sinks in ((0, 0), (1, 3), (64, 1), (300, 0)):
        fields = {"tail_length": tail, "migration_batch": 1, "sink_tokens": sinks}
        real, model = twins(core, kind, tokens=tokens, store_precision=store, **fields)
        agree(real, model, queries(real.config, None, 2))


@kinds
@pytest.mark.parametrize("n", [1, 2, 16, 64, 65, 100])
def test_several_queries_are_causal_among_themselves(core: Any, kind: str, n: int) -> None:
    """Query i of N stands at the i-th of the N newest positions, also if N is all of them."""
    real, model = twins(core, kind, tokens=100, store_precision="q4")
    agree(real, model, queries(real.config, n, 2))
    agree(real, model, queries(real.config, n, 2), causal=False)


@kinds
def test_queries_older_than_the_evicted_see_the_sinks(core: Any, kind: str) -> None:
    """Queries may reach back further than the cache: they see what is left before them."""
    real, model = twins(core, kind, tokens=60, max_tokens=20, sink_tokens=2)
    agree(real, model, queries(real.config, 50, 1))
    real, model = twins(core, kind, tokens=60, max_tokens=20)
    agree(real, model, queries(real.config, 50, 1))


@kinds
@pytest.mark.parametrize("scale", [None, 0.0, 0.03, 1.0, -0.2])
def test_scale_multiplies_the_logits(core: Any, kind: str, scale: float | None) -> None:
    """The default is 1 / sqrt(head_dim); zero gives the mean of the values."""
    real, model = twins(core, kind, tokens=50, store_precision="f16")
    agree(real, model, queries(real.config, None, 2), scale=scale)
    if scale == 0:
        mean = np.repeat(real.get_all_kv()[1].astype(np.float64).mean(axis=0), 2, axis=0)
        assert relative_error(real.attend(queries(real.config, None, 2), 0.0), mean) <= 2e-5


@kinds
@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 63, 64, 65, 99, 100, 1000])
@pytest.mark.parametrize("sinks", [0, 3])
def test_a_window_hides_what_is_older(core: Any, kind: str, window: int, sinks: int) -> None:
    """A query sees `window` positions up to its own; the window holds for sinks too."""
    real, model = twins(core, kind, tokens=100, sink_tokens=sinks)
    for n in (None, 70):
        agree(real, model, queries(real.config, n, 2), window=window)
        agree(real, model, queries(real.config, n, 2), window=window, causal=False)


@kinds
@pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0])
def test_softcap_bounds_the_logits(core: Any, kind: str, softcap: float) -> None:
    """softcap * tanh(logit / softcap), before anything is added."""
    real, model = twins(core, kind, tokens=80)
    agree(real, model, queries(real.config, 3, 2), softcap=softcap, scale=1.0)


@kinds
def test_alibi_decays_with_the_distance(core: Any, kind: str) -> None:
    """slope * (key position - query position), with absolute positions, per query head."""
    real, model = twins(core, kind, tokens=300, max_tokens=90, sink_tokens=2)
    slopes = f32([0.5, 0.25, 0.0, -0.01])
    agree(real, model, queries(real.config, 70, 2), alibi_slopes=slopes)
    agree(real, model, queries(real.config, None, 2), alibi_slopes=slopes)


@kinds
def test_logit_sinks_take_their_share(core: Any, kind: str) -> None:
    """A learned sink is one more token whose value is zero; it counts in the LSE."""
    real, model = twins(core, kind, tokens=70)
    sinks = f32([-50.0, 0.0, 2.0, 50.0])
    agree(real, model, queries(real.config, None, 2), sinks=sinks)
    agree(real, model, queries(real.config, 9, 2), sinks=sinks)
    out, lse = real.attend(queries(real.config, None, 2), sinks=sinks, return_lse=True)
    assert np.abs(out[3]).max() < 1e-15
    assert lse[3] == pytest.approx(50, abs=1e-5)


def masks(n: int | None, heads: int, tokens: int, seed: int) -> list[Any]:
    """Masks of every shape that fits: boolean and additive, whole and broadcast."""
    full = rows(n or 1, heads, tokens, seed)
    full = full if n else full[0]
    shapes = [full, full[..., :1, :], full[0, 0] if n else full[0]]
    if n:
        shapes += [full[:, 0], full[:1], full[:1, :1], full[:1, 0]]
    boolean = [shape > -0.5 for shape in shapes]
    hidden = [np.where(mask, shape, -np.inf) for mask, shape in zip(boolean, shapes, strict=True)]
    return boolean + shapes + [part.astype(np.float32) for part in hidden]


@kinds
@pytest.mark.parametrize("n", [None, 1, 6])
def test_masks_of_every_shape(core: Any, kind: str, n: int | None) -> None:
    """Booleans or numbers, per token, per head, per query, or broadcast over them."""
    real, model = twins(core, kind, tokens=150, max_tokens=80, sink_tokens=2)
    for mask in masks(n, 6, 80, seed=4):
        agree(real, model, queries(real.config, n, 3), mask=mask)


@kinds
def test_masks_of_any_dtype_and_stride(core: Any, kind: str) -> None:
    """Additive masks may be f16 or f64, and any mask may be a strided view."""
    real, model = twins(core, kind, tokens=80)
    query = queries(real.config, 5, 2)
    mask = rows(5, 4, 80, 1)
    for dtype in (np.float16, np.float64):
        agree(real, model, query, mask=mask.astype(dtype))
    agree(real, model, query, mask=rows(10, 4, 240, 2)[::2, :, ::-3])
    agree(real, model, query, mask=(mask > 0).transpose(2, 1, 0).copy().transpose(2, 1, 0))


@kinds
def test_the_lowest_number_hides_as_well_as_minus_infinity(core: Any, kind: str) -> None:
    """Models write the mask with the lowest float32 instead of -inf."""
    real, _ = twins(core, kind, tokens=80)
    query, seen = queries(real.config, None, 2), rows(1, 1, 80, 1)[0, 0] > 0
    lowest = np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)
    infinite = np.where(seen, 0, -np.inf).astype(np.float32)
    for mask in (lowest, infinite):
        for got, boolean in zip(
            real.attend(query, mask=mask, return_lse=True, return_mass=True),
            real.attend(query, mask=seen, return_lse=True, return_mass=True),
            strict=True,
        ):
            same_bits(got, boolean)


@kinds
def test_a_row_that_sees_nothing_is_zero(core: Any, kind: str) -> None:
    """Zeros and an LSE of -inf, or of the sink; the other rows are not disturbed."""
    real, model = twins(core, kind, tokens=90)
    query, sinks = queries(real.config, 4, 2), f32([1, 2, 3, 4])
    mask = rows(4, 4, 90, 1) > 0
    mask[1] = False
    mask[2, 3] = False
    for options in ({}, {"sinks": sinks}):
        agree(real, model, query, mask=mask, **options)
        out, lse = real.attend(query, mask=mask, return_lse=True, **options)
        assert not out[1].any()
        assert not out[2, 3].any()
        expected = sinks if options else np.full(4, -np.inf)
        np.testing.assert_allclose(lse[1], expected, rtol=1e-6)
    agree(real, model, query, mask=np.full(90, -np.inf, np.float32))


@kinds
@pytest.mark.parametrize("store", ["f16", "q8", "q4"])
def test_all_options_at_once(core: Any, kind: str, store: str) -> None:
    """Options combine in the documented order."""
    fields = {"max_tokens": 150, "sink_tokens": 3, "store_precision": store, "value_dim": 80}
    real, model = twins(core, kind, tokens=400, **fields)
    for n in (None, 70):
        options: dict[str, Any] = {
            "scale": 0.2,
            "window": 60,
            "softcap": 2.0,
            "alibi_slopes": f32([0.1, 0.2, 0.05, 0.0, 0.3, 0.01]),
            "sinks": f32([0, 1, -1, 2, -2, 0.5]),
            "mask": rows(n or 1, 6, 150, 8)[slice(None) if n else 0],
        }
        agree(real, model, queries(real.config, n, 3), **options)
        agree(real, model, queries(real.config, n, 3), causal=False, **options)


@kinds
def test_huge_logits_do_not_overflow(core: Any, kind: str) -> None:
    """Logits of thousands give the value of the winner, and a finite LSE."""
    real, _ = twins(core, kind, tokens=0, store_precision="f16")
    keys, values = stream(real.config, 100)
    keys[37, :, 0] = 1000.0
    real.append(keys, values)
    query = np.zeros((2, 32), np.float32)
    query[:, 0] = 100.0
    out, lse, mass = real.attend(query, 1.0, return_lse=True, return_mass=True)
    expected = values[37].astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    np.testing.assert_allclose(lse, 1e5, rtol=1e-6)
    np.testing.assert_allclose(mass[:, 37], 1, rtol=1e-6)
    # The other way round: every logit is far below zero.
    same = real.attend(-query, 1.0, mask=np.arange(100) == 37)
    np.testing.assert_allclose(same, expected, rtol=1e-6)


def merged(parts: list[Any], lse: Any) -> Any:
    """Weigh partial outputs by exp(their LSE - the LSE of all)."""
    outs, lses = (np.array(side, np.float64) for side in zip(*parts, strict=True))
    weights = np.exp(lses - lse)
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-5)  # LSE near 5: 2**-22 each
    return (weights[..., None] * outs).sum(axis=0)


@kinds
@pytest.mark.parametrize("store", STORES)
def test_partial_results_merge_by_their_lse(core: Any, kind: str, store: str) -> None:
    """Outputs over disjoint tokens, weighted by exp(lse), are the output over all of them."""
    whole, _ = twins(core, kind, tokens=130, store_precision=store)
    query, at = queries(whole.config, None, 2), np.arange(130)
    seen = [at < 7, (at >= 7) & (at < 70), at >= 70]
    expected, lse = whole.attend(query, return_lse=True)
    got = merged([whole.attend(query, mask=mask, return_lse=True) for mask in seen], lse)
    # Logits are the same, weights are rounded anew: either side errs by what weights cost.
    assert relative_error(got, expected) <= 2 * computing_bound(whole.config, kind)


@kinds
def test_partial_results_of_several_caches_merge(core: Any, kind: str) -> None:
    """The tokens may lie in caches of their own, or on other machines."""
    floats = {"store_precision": "f32", "tail_precision": "f32"}
    whole, *caches = (make(core, kind, **floats) for _ in range(4))
    keys, values = stream(whole.config, 130)
    whole.append(keys, values)
    query = queries(whole.config, None, 2)
    for part, (start, stop) in zip(caches, [(0, 7), (7, 70), (70, 130)], strict=True):
        part.append(keys[start:stop], values[start:stop])
    expected, lse = whole.attend(query, return_lse=True)
    got = merged([part.attend(query, return_lse=True) for part in caches], lse)
    assert relative_error(got, expected) <= 2 * computing_bound(whole.config, kind)


@kinds
def test_mass_is_a_probability(core: Any, kind: str) -> None:
    """Per query head the mass sums to the number of queries, and is never negative."""
    real, _ = twins(core, kind, tokens=140, store_precision="q4")
    for n in (None, 30):
        _, mass = real.attend(queries(real.config, n, 3), return_mass=True)
        assert mass.shape == (6, 140)
        assert (mass >= 0).all()
        # 140 additions and n rows, each rounded to 24 bits.
        np.testing.assert_allclose(mass.sum(axis=1), n or 1, rtol=200 * 2**-24)


@kinds
def test_what_is_asked_for_comes_in_order(core: Any, kind: str) -> None:
    """out, then lse, then mass; asking for more does not change what comes."""
    real, _ = twins(core, kind, tokens=70)
    query = queries(real.config, 5, 2)
    out, lse, mass = real.attend(query, return_lse=True, return_mass=True)
    same_bits(real.attend(query), out)
    for got, expected in zip(real.attend(query, return_lse=True), (out, lse), strict=True):
        same_bits(got, expected)
    for got, expected in zip(real.attend(query, return_mass=True), (out, mass), strict=True):
        same_bits(got, expected)


@kinds
def test_the_result_can_be_written_in_place(core: Any, kind: str) -> None:
    """With `out` the result is written there, and returned."""
    real, _ = twins(core, kind, tokens=70, value_dim=5)
    for n in (None, 3):
        query = queries(real.config, n, 2)
        target = np.full((*query.shape[:-1], 5), np.nan, np.float32)
        returned = real.attend(query, out=target)
        same_bits(target, real.attend(query))
        assert returned is target


@kinds
def test_queries_of_other_floats_and_strides(core: Any, kind: str) -> None:
    """A query is taken as its float32, whatever its dtype and strides."""
    real, _ = twins(core, kind, tokens=70)
    query = queries(real.config, 6, 2)
    for dtype in (np.float16, np.float64):
        narrowed = query.astype(dtype)
        same_bits(real.attend(narrowed), real.attend(narrowed.astype(np.float32)))
    heads_first = np.ascontiguousarray(query.swapaxes(0, 1)).swapaxes(0, 1)
    same_bits(real.attend(heads_first), real.attend(query))
    same_bits(real.attend(query[::-2]), real.attend(query[::-2].copy()))


@pytest.mark.parametrize("dim", [64, 60])
def test_what_pages_held_before_does_not_show(core: Any, dim: int) -> None:
    """A page that comes back from the pool full of what reads as NaNs is harmless."""
    pool = kvz.BufferPool(core=core)
    before = make(core, "pooled", pool=pool, head_dim=32, tail_precision="f32")
    # As halves, the bits of this number are 1.999 and a NaN. A page has 16 KB, as one of f16 below.
    full = np.full((256, 2, 32), np.uint32(0x3FFFFFFF).view(np.float32))
    before.append(full, full)
    before.close()
    hits = pool.stats().hits
    real = make(core, pool=pool, head_dim=dim, store_precision="f16")
    model = model_of(real.config)
    keys, values = stream(real.config, 21)
    for cache in (real, model):
        cache.append(keys, values)
    assert pool.stats().hits > hits
    agree(real, model, queries(real.config, 9, 2))


@kinds
def test_attending_changes_nothing(core: Any, kind: str) -> None:
    """Attention only reads: the digest stays, and the same query gives the same bits."""
    real, _ = twins(core, kind, tokens=130, store_precision="q4")
    digest, query = real.digest(), queries(real.config, 3, 2)
    first = real.attend(query)
    real.attend(query, window=3, return_mass=True)
    same_bits(real.attend(query), first)
    assert real.digest() == digest


@kinds
def test_attention_follows_trim_and_clear(core: Any, kind: str) -> None:
    """Positions and visibility are right after tokens were taken back."""
    real, model = twins(core, kind, tokens=200, max_tokens=100, sink_tokens=2)
    keys, values = stream(real.config, 30, seed=3)
    for n in (5, 60, 34):
        for cache in (real, model):
            cache.trim(n)
        if len(model):
            agree(real, model, queries(real.config, min(2, model.next_position), 2))
        for cache in (real, model):
            cache.append(keys, values)
        agree(real, model, queries(real.config, 20, 2), window=25)
    for cache in (real, model):
        cache.clear()
        cache.append(keys, values)
    agree(real, model, queries(real.config, 20, 2))


@kinds
def test_everything_may_be_trimmed(core: Any, kind: str) -> None:
    """A cache whose tokens were all evicted or taken back gives zeros, at its old position."""
    real, model = twins(core, kind, tokens=200, max_tokens=100)
    assert real.trim(100) == model.trim(100) == 100
    assert real.next_position == model.next_position == 100
    agree(real, model, queries(real.config, None, 2))
    agree(real, model, queries(real.config, 7, 2))


def test_a_sink_of_minus_infinity_is_no_sink(core: Any) -> None:
    """It leaves results as they are, also where nothing is seen."""
    cache = make(core, num_kv_heads=1, head_dim=8)
    off = np.full(2, -np.inf)
    query = np.ones((2, 8), np.float32)
    assert np.isneginf(cache.attend(query, sinks=off, return_lse=True)[1]).all()
    cache.append(np.ones((3, 1, 8)), np.ones((3, 1, 8)))
    for mask in (None, np.zeros(3, bool)):
        plain = cache.attend(query, mask=mask, return_lse=True)
        with_sinks = cache.attend(query, mask=mask, sinks=off, return_lse=True)
        for a, b in zip(plain, with_sinks, strict=True):
            np.testing.assert_array_equal(a, b)
