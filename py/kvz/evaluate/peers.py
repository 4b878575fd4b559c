"""Formats of other projects, simulated: what comes back of keys and values after storing them.

Each is a function of whole pages of 64 tokens; bits per value count scales and minima. Called by
streams.py; listed by run.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from kvz.demo.model import Floats

PAGE = 64

Storing: TypeAlias = Callable[[Floats], Floats]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A format that is simulated.

    Attributes
    ----------
    name : str
    keys, values : callable
        Give what comes back of the rows of a page, (tokens, head_dim).
    key_bits, value_bits : float
        Bits per value, scales and minima included.
    """

    name: str
    keys: Storing
    values: Storing
    key_bits: float
    value_bits: float

    @property
    def bits_per_value(self) -> float:
        """Mean of keys and values."""
        return (self.key_bits + self.value_bits) / 2


def _half(x: Floats) -> Floats:
    """Round to float16, as scales are stored."""
    rounded: Floats = x.astype(np.float16).astype(np.float32)
    return rounded


def _inverse(x: Floats) -> Floats:
    return np.divide(1, x, out=np.zeros_like(x), where=x != 0)


def symmetric(rows: Floats, *, bits: int, group: int) -> Floats:
    """Codes within +-(2^(bits-1) - 1) times the scale, the largest magnitude over that (q8_0).

    Examples
    --------
    >>> symmetric(np.float32([[127, -3.4, 0, 1]]), bits=8, group=4)
    array([[127.,  -3.,   0.,   1.]], dtype=float32)
    """
    limit = 2 ** (bits - 1) - 1
    groups = rows.reshape(len(rows), -1, group)
    scales = np.abs(groups).max(-1, keepdims=True) / np.float32(limit)
    codes = np.rint(groups * _inverse(scales))
    stored: Floats = (codes * _half(scales)).reshape(rows.shape)
    return stored


def signed(rows: Floats, *, bits: int, group: int) -> Floats:
    """Give the value of largest magnitude the code -2^(bits-1), whatever its sign (q4_0, q5_0).

    Examples
    --------
    >>> signed(np.float32([[8, -8, 1, 7]]), bits=4, group=4)
    array([[ 8., -7.,  1.,  7.]], dtype=float32)
    """
    half = 2 ** (bits - 1)
    groups = rows.reshape(len(rows), -1, group)
    place = np.abs(groups).argmax(-1, keepdims=True)
    scales = np.take_along_axis(groups, place, -1) / np.float32(-half)
    codes = np.clip(np.floor(groups * _inverse(scales) + half + np.float32(0.5)), 0, 2 * half - 1)
    stored: Floats = ((codes - half) * _half(scales)).reshape(rows.shape)
    return stored


def asymmetric(rows: Floats, *, bits: int, group: int) -> Floats:
    """Codes from 0 to 2^bits - 1 times a scale, plus the minimum (q4_1; mlx; KIVI's values).

    Examples
    --------
    >>> asymmetric(np.float32([[1, 2, 3, 16]]), bits=4, group=4)
    array([[ 1.,  2.,  3., 16.]], dtype=float32)
    """
    limit = 2**bits - 1
    groups = rows.reshape(len(rows), -1, group)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scales, low = _half((high - low) / np.float32(limit)), _half(low)
    codes = np.clip(np.rint((groups - low) * _inverse(scales)), 0, limit)
    stored: Floats = (codes * scales + low).reshape(rows.shape)
    return stored


def by_channel(rows: Floats, *, bits: int, group: int) -> Floats:
    """Like `asymmetric`, each channel over `group` tokens (KIVI's keys, arXiv 2402.02750).

    The first page of a stream lacks its sinks: its first group has so many tokens fewer.
    """
    first = len(rows) % group or group
    pieces = np.split(rows, range(first, len(rows), group))
    stored = [
        asymmetric(np.ascontiguousarray(piece.T), bits=bits, group=len(piece)).T for piece in pieces
    ]
    return np.concatenate(stored)


def _same(name: str, store: Callable[..., Floats], bits: int, group: int, extra: float) -> Peer:
    """Keys and values alike; `extra` bits a group for its scale, and its minimum if it has one."""
    cost = bits + extra / group
    both = partial(store, bits=bits, group=group)
    return Peer(name=name, keys=both, values=both, key_bits=cost, value_bits=cost)


def _kivi(bits: int) -> Peer:
    return Peer(
        name=f"KIVI-{bits}",
        keys=partial(by_channel, bits=bits, group=32),
        values=partial(asymmetric, bits=bits, group=32),
        key_bits=bits + 1,
        value_bits=bits + 1,
    )


PEERS = (
    _same("ggml q8_0", symmetric, 8, 32, 16),
    _same("ggml q5_0", signed, 5, 32, 16),
    _same("ggml q4_1, mlx 4 bits g32", asymmetric, 4, 32, 32),
    _same("ggml q4_0", signed, 4, 32, 16),
    _same("mlx 8 bits g64", asymmetric, 8, 64, 32),
    _same("mlx 4 bits g64", asymmetric, 4, 64, 32),
    _kivi(4),
    _kivi(2),
    _same("asymmetric 3 bits g32", asymmetric, 3, 32, 32),
    _same("asymmetric 2 bits g32", asymmetric, 2, 32, 32),
)
