"""Quantization by itself: the bits of the store, without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvz
from kvz.reference import Format
from support import HEAD_DIMS, STORES, make, rows, same_bits


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("rotation", ["auto", "on", "off"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_values_come_back_as_specified(core: Any, store: Any, rotation: Any, dim: int) -> None:
    """Any number of rows, on either side of a page of 64."""
    for count in (1, 63, 64, 65, 200):
        x = rows(count, 1, dim, 1)[:, 0]
        packed = kvz.quantize(x, store, rotation, core=core)
        same_bits(packed.dequantize(), Format.of(store, rotation).stored(x))


@pytest.mark.parametrize("store", STORES)
def test_a_store_holds_the_same(core: Any, store: Any) -> None:
    """quantize gives what a cache gives back of its store: of values, as keys may be centred."""
    cache = make(core, store_precision=store, tail_precision="f32", tail_length=1)
    x = rows(65, 2, 32, 1)
    cache.append(x, x)
    stored = cache.stats().store_tokens
    assert stored == 64
    same_bits(cache.get_all_kv()[1][:64], kvz.quantize(x[:64], store, core=core).dequantize())


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 4, 7), (0, 7), (3, 0)])
def test_any_leading_axes(core: Any, shape: tuple[int, ...]) -> None:
    """The last axis is packed; the others come back as they were."""
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    packed = kvz.quantize(x, "q8", core=core)
    same_bits(packed.dequantize(), Format.of("q8").stored(x) if x.size else x)
    np.testing.assert_array_equal(np.asarray(packed), packed.dequantize())


@pytest.mark.parametrize(("store", "bits"), [("f32", 32), ("f16", 16), ("q8", 8.5), ("q4", 4.5)])
def test_bytes_are_counted(core: Any, store: Any, bits: float) -> None:
    """Full pages and full groups take exactly the bits of the format; others take their padding."""
    packed = kvz.quantize(rows(128, 1, 64, 1), store, core=core)
    assert packed.bits_per_value == bits
    assert packed.nbytes == packed.data.nbytes == 128 * 64 * bits / 8
    assert kvz.quantize(rows(1, 1, 1, 1), store, core=core).bits_per_value > bits


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(core: Any, bad: float) -> None:
    """As in a cache."""
    x = rows(3, 1, 40, 1)[:, 0]
    x[2, 39] = bad
    with pytest.raises(kvz.NotFiniteError, match="x: token 2"):
        kvz.quantize(x, "q4", core=core)


@pytest.mark.parametrize(
    ("store", "rotation", "limit"),
    [("f16", "off", 65519), ("q8", "off", 65504 * 127), ("q4", "on", 65504 * 8 / 8)],
)
def test_what_is_too_large_is_refused(core: Any, store: Any, rotation: Any, limit: float) -> None:
    """The limit itself is fine, in any place; what is a thousandth above is not."""
    x = np.full((2, 64), limit, np.float32)
    assert np.isfinite(kvz.quantize(x, store, rotation, core=core).dequantize()).all()
    x[1, 3] *= np.float32(-1.001)
    with pytest.raises(kvz.NotRepresentableError, match="x"):
        kvz.quantize(x, store, rotation, core=core)


def test_other_mistakes_are_named(core: Any) -> None:
    """Precisions and rotations that do not exist, and what is not an array of floats."""
    x = rows(3, 1, 8, 1)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: kvz.quantize(x, "q3", core=core), "q3"),  # type: ignore[arg-type]
        (lambda: kvz.quantize(x, "q4", "up", core=core), "up"),  # type: ignore[arg-type]
        (lambda: kvz.quantize(x.astype(int), "q4", core=core), "int"),
        (lambda: kvz.quantize(np.float32(3), "q4", core=core), "x"),
    ]
    for call, word in calls:
        with pytest.raises(kvz.KvzError, match=word):
            call()
