"""Parts 1 to 3 of the specification: what a value becomes when it is stored."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

GROUP = 32  # values that share one scale


# -- 1. Rounding ---------------------------------------------------------------------------------


def round_to(precision: str, x: Floats) -> Floats:
    """Round float32 values to `precision` ("f32", "f16" or "bf16"); the result is float32 again.

    Examples
    --------
    >>> round_to("bf16", np.float32([1.0, 1.00390625, 1.01171875]))  # the last two are ties
    array([1.      , 1.      , 1.015625], dtype=float32)
    """
    if precision == "f32":
        return x
    if precision == "f16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    if precision != "bf16":
        raise ValueError(f"precision: expected f32, f16 or bf16, got {precision!r}")
    # bf16 is the upper half of a float32. Adding 0x7FFF, and one more if the kept half is odd,
    # carries into the kept half exactly when rounding to nearest even goes up.
    bits = x.astype(np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


# -- 2. Rotation ---------------------------------------------------------------------------------


def hadamard_blocks(width: int) -> list[int]:
    """Cut `width` into powers of two, largest first.

    Examples
    --------
    >>> hadamard_blocks(128), hadamard_blocks(96)
    ([128], [64, 32])
    """
    return [1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]


def rotate(x: Floats) -> Floats:
    """Apply the orthonormal Hadamard transform to each block of the last axis.

    It is its own inverse, up to rounding: the same function rotates and un-rotates.
    """
    blocks = hadamard_blocks(x.shape[-1])
    edges = np.cumsum(blocks)[:-1]
    return np.concatenate([_hadamard(part) for part in np.split(x, edges, axis=-1)], axis=-1)


def _hadamard(x: Floats) -> Floats:
    """One block, whose width n is a power of two, by log2(n) passes of butterflies."""
    shape, n = x.shape, x.shape[-1]
    half = 1
    while half < n:
        # Every pair (i, i + half) with i & half == 0 becomes (sum, difference).
        pairs = x.reshape(*shape[:-1], n // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([a + b, a - b], axis=-2).reshape(shape)
        half *= 2
    return x * np.float32(1 / np.sqrt(n))


# -- 3. Formats ----------------------------------------------------------------------------------


def encode_q8(y: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Symmetric 8-bit codes of groups of 32, each with one float16 scale (returned as float32).

    `y` is (..., 32 * groups); the codes are (..., groups, 32), the scales (..., groups, 1).
    The largest magnitude of a group becomes code 127 or -127.
    """
    groups = y.reshape(*y.shape[:-1], y.shape[-1] // GROUP, GROUP)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    scales = round_to("f16", largest / np.float32(127))
    codes = np.clip(np.rint(groups * _inverse(scales)), -127, 127)
    return codes.astype(np.int8), scales


def encode_q4(y: Floats) -> tuple[NDArray[np.int8], Floats]:
    """4-bit codes of groups of 32, each with one *signed* float16 scale; shapes as in `encode_q8`.

    The value of largest magnitude becomes code -8, whatever its sign, so that no code is wasted:
    of -8..7 a scheme with a positive scale would leave -8 unused. A tie goes to the positive one.
    """
    groups = y.reshape(*y.shape[:-1], y.shape[-1] // GROUP, GROUP)
    high = groups.max(axis=-1, keepdims=True)
    low = groups.min(axis=-1, keepdims=True)
    largest = np.where(high >= -low, high, low)
    scales = round_to("f16", largest * np.float32(-0.125)) + np.float32(0)  # never minus zero
    codes = np.clip(np.rint(groups * _inverse(scales)), -8, 7)
    return codes.astype(np.int8), scales


def _inverse(scales: Floats) -> Floats:
    """1 / scale, and 0 for the groups that are all zero (or too small for a float16 scale)."""
    safe = np.where(scales != 0, scales, np.float32(1))
    return np.where(scales != 0, np.float32(1) / safe, np.float32(0))


def decode(codes: NDArray[np.int8], scales: Floats) -> Floats:
    """Give the values back that `encode_q8` or `encode_q4` made codes of."""
    values = codes.astype(np.float32) * scales
    return values.reshape(*values.shape[:-2], values.shape[-2] * GROUP)


class Format(NamedTuple):
    """How a tier stores the vectors of one side (keys or values)."""

    precision: str  # "f32", "f16", "bf16", "q8" or "q4"
    rotated: bool

    @classmethod
    def of(cls, precision: object, rotation: object = "auto") -> Format:
        """Resolve names or enum members. Rotation "auto" is on for q4, which gains by it."""
        name, when = _name(precision), _name(rotation)
        rotated = name in {"q8", "q4"} and (when == "on" or (when == "auto" and name == "q4"))
        return cls(name, rotated)

    def stored(self, x: Floats) -> Floats:
        """Give what comes back of the vectors `x` (..., dim) after they were stored."""
        if self.precision not in {"q8", "q4"}:
            return round_to(self.precision, x)
        dim = x.shape[-1]
        padding = [(0, 0)] * (x.ndim - 1) + [(0, -dim % GROUP)]
        y = np.pad(x, padding)
        if self.rotated:
            y = rotate(y)
        y = decode(*(encode_q8(y) if self.precision == "q8" else encode_q4(y)))
        if self.rotated:
            y = rotate(y)
        return np.ascontiguousarray(y[..., :dim])

    def limit(self, dim: int) -> float:
        """Give the largest magnitude that can be stored in a vector of `dim` values.

        A float may not round to infinity. The scale of a group may not either, and a rotation can
        gather a whole block of n equal values in one place, sqrt(n) times as large.
        """
        if self.precision == "f32":
            return float(np.finfo(np.float32).max)
        if self.precision == "f16":  # halfway to the next step; the tie would round up
            return float(np.nextafter(np.float32(65520), np.float32(0)))
        if self.precision == "bf16":
            return float(np.nextafter(np.uint32(0x7F7F8000).view(np.float32), np.float32(0)))
        largest = 65504.0 * (127 if self.precision == "q8" else 8)
        block = hadamard_blocks(dim + -dim % GROUP)[0] if self.rotated else 1
        return largest / float(np.sqrt(block))


def _name(choice: object) -> str:
    """`Precision.Q4` or "q4" -> "q4"."""
    return str(getattr(choice, "name", choice)).lower()
