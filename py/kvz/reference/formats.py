"""Parts 1 to 3 of the specification: what a value becomes when it is stored."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

GROUP = 32  # values that share one scale
BYTE_SCALED = {"q2k": 2, "q3k": 3, "q4k": 4, "q5k": 5, "q6k": 6}  # bits of their codes


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


def scale_of(byte: NDArray[np.integer]) -> Floats:
    """Give the scale that a byte stands for: 2^(e - 16) * (1 + m / 8), its upper bits being e.

    The byte 0 is the scale 0, so that zeros stay zeros.

    Examples
    --------
    >>> scale_of(np.array([0, 1, 128, 132, 255]))
    array([0.0000000e+00, 1.7166138e-05, 1.0000000e+00, 1.5000000e+00,
           6.1440000e+04], dtype=float32)
    """
    bits = (byte.astype(np.uint32) << np.uint32(20)) + np.uint32((127 - 16) << 23)
    scales: Floats = np.where(byte == 0, np.float32(0), bits.view(np.float32))
    return scales


def _levels(groups: Floats, inverse: Floats, half: int) -> Floats:
    """Round to the half-integers from 1/2 - half to half - 1/2."""
    shifted = groups * inverse - np.float32(0.5)
    whole: Floats = np.rint(np.clip(shifted, -half, half - 1)).astype(np.float32)
    return whole + np.float32(0.5)


def _sum(groups: Floats) -> Floats:
    """Sum a group of 32: both halves lane by lane, then (i, i+8), (i, i+4), (i, i+2), (i, i+1)."""
    width = GROUP
    while width > 1:
        width //= 2
        groups = groups[..., :width] + groups[..., width:]
    return groups


def encode_k(y: Floats, bits: int) -> tuple[Bytes, Bytes]:
    """Codes from 0 to 2^bits - 1, which stand for half-integers, and a byte for each scale.

    `y` is (..., 32 * groups); the codes are (..., groups, 32), the scales (..., groups, 1). The
    levels that reach the largest magnitude are rounded to first; the scale that fits those best,
    by least squares, lies between two bytes; that of the smaller squared error is taken.
    """
    groups = y.reshape(*y.shape[:-1], y.shape[-1] // GROUP, GROUP)
    half = 2 ** (bits - 1)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    worth = largest >= np.float32(2**-17)  # below, zero is nearer than the least scale's levels
    first = np.where(worth, largest / np.float32(half - 0.5), np.float32(0))
    levels = _levels(groups, _inverse(first), half)
    fitted = _sum(groups * levels) / _sum(levels * levels)
    below = (fitted.view(np.int32) - ((127 - 16) << 23)) >> 20
    below = np.clip(below, 1, 254)
    errors = []
    for byte in (below, below + 1):
        scale = scale_of(byte)
        error = groups - _levels(groups, _inverse(scale), half) * scale
        errors.append(_sum(error * error))
    scales = np.where(worth, below + (errors[1] < errors[0]), 0)
    levels = _levels(groups, _inverse(scale_of(scales)), half)
    codes = levels + np.float32(half - 0.5)
    return codes.astype(np.uint8), scales.astype(np.uint8)


def decode_k(codes: Bytes, scales: Bytes, bits: int) -> Floats:
    """Give the values back that `encode_k` made codes of."""
    levels = codes.astype(np.float32) - np.float32((2**bits - 1) / 2)
    values = levels * scale_of(scales)
    return values.reshape(*values.shape[:-2], values.shape[-2] * GROUP)


def offset_of(rows: Floats) -> Floats:
    """Give what the keys of a page are stored relative to: about the mean of `rows` (n, ..., D).

    The rows are added in their order. Of the float16 of the mean only the upper byte is kept,
    rounded to nearest even: how near it is does not matter, as codes hold the difference.
    """
    total = np.zeros(rows.shape[1:], np.float32)
    for row in rows:
        total = total + row
    bits = (total * np.float32(1 / len(rows))).astype(np.float16).view(np.uint16).astype(np.uint32)
    upper = (bits + np.uint32(0x7F) + ((bits >> np.uint32(8)) & np.uint32(1))) >> np.uint32(8)
    return (upper << np.uint32(8)).astype(np.uint16).view(np.float16).astype(np.float32)


class Format(NamedTuple):
    """How a tier stores the vectors of one side (keys or values)."""

    precision: str  # "f32", "f16", "bf16", "q8", "q4", "q2k" to "q6k"
    rotated: bool

    @classmethod
    def of(cls, precision: object, rotation: object = "auto") -> Format:
        """Resolve names or enum members. Rotation "auto" is on for all but q8, which gain by it."""
        name, when = _name(precision), _name(rotation)
        packed = name in {"q8", "q4", *BYTE_SCALED}
        return cls(name, packed and (when == "on" or (when == "auto" and name != "q8")))

    @property
    def packed(self) -> bool:
        """Whether values become codes with a scale."""
        return self.precision in {"q8", "q4", *BYTE_SCALED}

    @property
    def centred(self) -> bool:
        """Whether keys are stored relative to an offset of their page."""
        return self.precision in BYTE_SCALED

    def spread(self, x: Floats) -> Floats:
        """Bring vectors (..., dim) to the space in which they are stored: padded, rotated."""
        y = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % GROUP)])
        return rotate(y) if self.rotated else y

    def gathered(self, y: Floats, dim: int) -> Floats:
        """Bring vectors back from the space in which they are stored."""
        return np.ascontiguousarray((rotate(y) if self.rotated else y)[..., :dim])

    def rounded(self, y: Floats, offset: Floats | None = None) -> Floats:
        """Give what comes back of vectors that are in that space already; it stays there.

        `offset` broadcasts to `y`.
        """
        if not self.packed:
            return round_to(self.precision, y)
        if offset is not None:
            y = y - offset
        if self.precision in BYTE_SCALED:
            bits = BYTE_SCALED[self.precision]
            y = decode_k(*encode_k(y, bits), bits)
        else:
            y = decode(*(encode_q8(y) if self.precision == "q8" else encode_q4(y)))
        return y if offset is None else y + offset

    def stored(self, x: Floats, offset: Floats | None = None) -> Floats:
        """Give what comes back of the vectors `x` (..., dim) after they were stored.

        `offset` broadcasts to what `spread` makes of `x`.
        """
        return self.gathered(self.rounded(self.spread(x), offset), x.shape[-1])

    def entered(self, y: Floats, source: Format, dim: int) -> Floats:
        """Bring vectors from the space in which they are stored as `source` to that of this format.

        Where both are rotated nothing is rotated back, so that only formats round.
        """
        if self.rotated and source.rotated:
            return y
        return self.spread(source.gathered(y, dim))

    def limit_after(self, source: Format, dim: int) -> float:
        """Give the largest magnitude that can be stored after it was stored as `source`.

        Rounding may have made it larger: by little within a space, and by up to half a step of
        every value of its block where they are rotated in between.
        """
        block = hadamard_blocks(dim + -dim % GROUP)[0]
        unrotates = source.rotated and not self.rotated
        growth = 1 + block / 16 if unrotates else 1 + 1 / 128
        return min(source.limit(dim), self.limit(dim) / growth)

    def limit(self, dim: int) -> float:
        """Give the largest magnitude that can be stored in a vector of `dim` values.

        A float may not round to infinity. The scale of a group may not either, and a rotation can
        gather a whole block of n equal values in one place, sqrt(n) times as large. A key may lie
        twice as far from the offset of its page, which must be finite too.
        """
        if self.precision == "f32":
            return float(np.finfo(np.float32).max)
        if self.precision == "f16":  # halfway to the next step; the tie would round up
            return float(np.nextafter(np.float32(65520), np.float32(0)))
        if self.precision == "bf16":
            return float(np.nextafter(np.uint32(0x7F7F8000).view(np.float32), np.float32(0)))
        if self.precision in BYTE_SCALED:
            reach = 2 ** (BYTE_SCALED[self.precision] - 1) - 0.5
            largest: float = min(57344.0, 61440.0 * reach / 2)
        else:
            largest = 65504.0 * (127 if self.precision == "q8" else 8)
        block = hadamard_blocks(dim + -dim % GROUP)[0] if self.rotated else 1
        return largest / float(np.sqrt(block))


def _name(choice: object) -> str:
    """`Precision.Q4` or "q4" -> "q4"."""
    return str(getattr(choice, "name", choice)).lower()
