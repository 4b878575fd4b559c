"""The specification of kvz, in numpy: the same caches, written to be read instead of to be fast.

Read it from top to bottom; every part uses only what stands above it.

1. *Rounding*: the three floating-point precisions.
2. *Rotation*: an orthonormal Hadamard transform, which spreads outliers over a vector.
3. *Formats*: what a value becomes when it is stored, one vector at a time.
4. *Tiers*: which token lies in which tier, as a function of the stream alone.
5. *Attention*: in float64, over the stored values.
6. *Caches*: the verbs of `kvz.TwoTierCache` and `kvz.PooledCache` on plain arrays.

Parts 1 to 4 are exact: the core gives the same bits. All their arithmetic is float32, one rounding
(to nearest, ties to even) per operation and no fused multiply-add. Part 5 is what the core
approximates: it computes the same sums with a stated error.

Used by the test suite as its oracle; it needs numpy alone and no compiled core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

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


# -- 4. Tiers ------------------------------------------------------------------------------------


class Tiers(NamedTuple):
    """Where everything lies. Positions count the stream from 0 and are never renumbered.

    The first `sinks` positions stay for ever. Of the others, those before `first` are evicted,
    those from there to `boundary` are in the store, those from `boundary` to `tokens` in the tail.
    """

    tokens: int = 0  # the position that the next token will have
    boundary: int = 0
    first: int = 0

    def after_append(self, count: int, config: Any, *, has_store: bool = True) -> Tiers:
        """Give the tiers with `count` more tokens.

        A batch of `migration_batch` positions, aligned to position 0, leaves the tail as soon as
        `tail_length` newer tokens exist outside it. Eviction is exact to the token. Neither looks
        at anything but the number of tokens, so it does not matter how they were cut into appends.
        """
        tokens, boundary, first = self.tokens + count, self.boundary, self.first
        batch = config.migration_batch
        if has_store and tokens >= config.tail_length:
            boundary = max(boundary, (tokens - config.tail_length) // batch * batch)
        if tokens > config.max_tokens:
            first = max(first, tokens - (config.max_tokens - config.sink_tokens))
        return Tiers(tokens, boundary, first)

    def after_trim(self, newest: int) -> Tiers:
        """Give the tiers when `newest`, and all that came after it, are taken back."""
        return Tiers(newest, min(self.boundary, newest), min(self.first, newest))

    def live(self, config: Any) -> NDArray[np.int64]:
        """List the positions held, oldest first."""
        sinks = min(config.sink_tokens, self.tokens)
        body = np.arange(max(self.first, sinks), self.tokens)
        return np.concatenate([np.arange(sinks), body]).astype(np.int64)


# -- 5. Attention --------------------------------------------------------------------------------


class Attention(NamedTuple):
    """Everything that `attend` can return, in float64."""

    out: NDArray[np.float64]  # (N, query heads, value_dim)
    lse: NDArray[np.float64]  # (N, query heads)
    mass: NDArray[np.float64]  # (query heads, tokens)


def attention(
    query: ArrayLike,
    keys: Floats,
    values: Floats,
    positions: NDArray[np.int64],
    query_positions: NDArray[np.int64],
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Attention:
    """Softmax attention of N queries over T tokens, in float64.

    Parameters
    ----------
    query : (N, query heads, head_dim)
    keys, values : (T, kv heads, head_dim) and (T, kv heads, value_dim)
        Query head h reads kv head h // (query heads / kv heads).
    positions, query_positions : (T,) and (N,)
    scale : float, optional
        1 / sqrt(head_dim) by default.
    sinks : (query heads,), optional
        The logit of one more token whose value is zero.
    mask : broadcastable to (N, query heads, T), optional
        Booleans (True: may attend) or numbers (added to the logits).
    """
    q = np.asarray(query, np.float64)
    heads, per_head = q.shape[1], q.shape[1] // keys.shape[1]
    k = np.repeat(keys.astype(np.float64), per_head, axis=1)  # (T, query heads, head_dim)
    v = np.repeat(values.astype(np.float64), per_head, axis=1)
    products = (q.swapaxes(0, 1) @ k.transpose(1, 2, 0)).swapaxes(0, 1)  # (N, query heads, T)
    logits = products * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    distance = positions[None, :] - query_positions[:, None]  # (N, T), negative in the past
    if alibi_slopes is not None:
        logits = logits + np.asarray(alibi_slopes, np.float64)[:, None] * distance[:, None, :]
    if causal:
        logits = np.where(distance[:, None, :] <= 0, logits, -np.inf)
    if window is not None:
        logits = np.where(distance[:, None, :] > -window, logits, -np.inf)
    if mask is not None:
        given = np.asarray(mask)
        logits = np.where(given, logits, -np.inf) if given.dtype == bool else logits + given
    extra = np.full((heads, 1), -np.inf) if sinks is None else np.reshape(sinks, (heads, 1))
    extra = np.broadcast_to(extra, (len(q), heads, 1)).astype(np.float64)
    logits = np.concatenate([logits, extra], axis=-1)  # the virtual token comes last
    top = logits.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)  # a row that sees nothing
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)[..., :-1]
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    out = (weights.swapaxes(0, 1) @ v.swapaxes(0, 1)).swapaxes(0, 1)
    return Attention(out, lse, weights.sum(axis=0))


def spread_mask(mask: ArrayLike, query_axes: int) -> NDArray[Any]:
    """Bring a mask to three axes, (N, query heads, T), by the rule of `attend`.

    One axis is (T,). Two axes are (query heads, T) for one query and (N, T) for several.
    """
    given = np.asarray(mask)
    if given.ndim == 2 and query_axes == 3:
        return given[:, None, :]
    return given.reshape((1,) * (3 - given.ndim) + given.shape)


# -- 6. Caches -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceStats:
    """How many tokens each tier holds."""

    total_tokens: int
    sink_tokens: int
    store_tokens: int
    tail_tokens: int
    next_position: int


class ReferenceCache:
    """`kvz.TwoTierCache`: sinks and tail at `tail_precision`, older tokens in the store's formats.

    Parameters
    ----------
    config : kvz.CacheConfig
        Or any object with the same fields.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> cache = ReferenceCache(SimpleNamespace(
    ...     num_kv_heads=1, head_dim=2, value_dim=None, max_tokens=8, tail_length=2,
    ...     tail_precision="f16", store_precision=("q8", "q4"), migration_batch=1, sink_tokens=0,
    ...     rotation="auto"))
    >>> cache.append(np.ones((5, 1, 2)), np.ones((5, 1, 2)))
    >>> cache.stats().store_tokens, cache.stats().tail_tokens
    (3, 2)
    """

    has_store = True

    def __init__(self, config: Any) -> None:
        stored: Any = config.store_precision
        key, value = stored if isinstance(stored, (tuple, list)) else (stored, stored)
        self.config = config
        self.head_dim = int(config.head_dim)
        self.value_dim = int(getattr(config, "value_dim", None) or config.head_dim)
        self.tail_format = Format.of(config.tail_precision)
        self.key_format = Format.of(key, config.rotation)
        self.value_format = Format.of(value, config.rotation)
        self.clear()

    def clear(self) -> None:
        """Forget everything; the next token has position 0."""
        heads = self.config.num_kv_heads
        self.tiers = Tiers()
        self.positions = np.zeros(0, np.int64)  # of the tokens held, oldest first
        self._keys = np.zeros((0, heads, self.head_dim), np.float32)  # as they read back now
        self._values = np.zeros((0, heads, self.value_dim), np.float32)

    def append(self, keys: ArrayLike, values: ArrayLike) -> None:
        """Add tokens: keys (T, H, D) and values (T, H, Dv), or flat, or one token without T.

        Raises
        ------
        ValueError
            If a shape or a number does not fit. The cache is then as it was.
        """
        k = self._rows("keys", keys, self.head_dim, self.key_format)
        v = self._rows("values", values, self.value_dim, self.value_format)
        if len(k) != len(v):
            raise ValueError(f"values: expected {len(k)} tokens as in keys, got {len(v)}")
        before, sinks = self.tiers, self.config.sink_tokens
        self.tiers = before.after_append(len(k), self.config, has_store=self.has_store)
        new = np.arange(before.tokens, self.tiers.tokens)
        positions = np.concatenate([self.positions, new])
        k = np.concatenate([self._keys, round_to(self.tail_format.precision, k)])
        v = np.concatenate([self._values, round_to(self.tail_format.precision, v)])
        # Migration: what was in the tail, or is new, and now lies before the boundary. A store
        # always encodes what the tail held, even of a token that never had to wait there.
        moves = (positions >= max(before.boundary, sinks)) & (positions < self.tiers.boundary)
        k[moves] = self.key_format.stored(k[moves])
        v[moves] = self.value_format.stored(v[moves])
        # Eviction.
        held = np.isin(positions, self.tiers.live(self.config))
        self.positions, self._keys, self._values = positions[held], k[held], v[held]

    def _rows(self, what: str, given: ArrayLike, dim: int, store: Format) -> Floats:
        """Check one side of an append and bring it to (T, H, dim) float32."""
        heads = int(self.config.num_kv_heads)
        with np.errstate(over="ignore"):
            rows = np.asarray(given).astype(np.float32)
        if rows.shape in {(heads, dim), (heads * dim,)}:
            rows = rows[None]
        if rows.shape[1:] not in {(heads, dim), (heads * dim,)}:
            raise ValueError(f"{what}: expected (T, {heads}, {dim}), got {rows.shape}")
        rows = rows.reshape(len(rows), heads, dim)
        if not np.isfinite(rows).all():
            raise ValueError(f"{what}: expected finite numbers")
        limit = min(self.tail_format.limit(dim), store.limit(dim))
        if rows.size and np.abs(rows).max() > limit:
            raise ValueError(f"{what}: expected magnitudes up to {limit}, got a larger one")
        return rows

    def attend(
        self,
        query: ArrayLike,
        scale: float | None = None,
        *,
        mask: ArrayLike | None = None,
        return_lse: bool = False,
        return_mass: bool = False,
        **options: Any,
    ) -> Any:
        """Attention of one query (Hq, D), or of the N newest tokens (N, Hq, D).

        The options are those of `attention`. Returns out[, lse][, mass], in float64.
        """
        q = np.asarray(query, np.float64)
        batch = q.reshape((-1, *q.shape[-2:]))
        if len(batch) > self.tiers.tokens > 0:
            raise ValueError(f"query: expected at most {self.tiers.tokens} tokens")
        at = np.arange(len(batch)) + self.tiers.tokens - len(batch)
        if mask is not None:
            mask = spread_mask(mask, q.ndim)
        result = attention(
            batch,
            self._keys,
            self._values,
            self.positions,
            at,
            scale=scale,
            mask=mask,
            **options,
        )
        out, lse = (x if q.ndim == 3 else x[0] for x in (result.out, result.lse))
        chosen = [out, *([lse] if return_lse else []), *([result.mass] if return_mass else [])]
        return chosen[0] if len(chosen) == 1 else tuple(chosen)

    def get_all_kv(self) -> tuple[Floats, Floats]:
        """Copy all keys and values held, oldest first, as they read back."""
        return self._keys.copy(), self._values.copy()

    def get_kv(self, start: int, stop: int) -> tuple[Floats, Floats]:
        """Copy those at the positions `start` to `stop` - 1, all of which must be held."""
        chosen = (self.positions >= start) & (self.positions < stop)
        if chosen.sum() != stop - start:
            raise ValueError(f"start, stop: expected positions held, got {start} to {stop}")
        return self._keys[chosen], self._values[chosen]

    def trim(self, n: int) -> int:
        """Take back the `n` newest tokens, or all there are; returns how many.

        What stays keeps its bits: a stored token does not return to the tail.
        """
        removed = min(n, len(self))
        if removed:
            keep = len(self) - removed
            self.tiers = self.tiers.after_trim(int(self.positions[keep]))
            self.positions, self._keys, self._values = (
                x[:keep] for x in (self.positions, self._keys, self._values)
            )
        return removed

    def __len__(self) -> int:
        """Count the tokens held."""
        return len(self.positions)

    @property
    def next_position(self) -> int:
        """The position that the next token will have."""
        return self.tiers.tokens

    def stats(self) -> ReferenceStats:
        """Count the tokens of each tier."""
        sinks = self.positions < self.config.sink_tokens
        stored = ~sinks & (self.positions < self.tiers.boundary)
        tail = int((~sinks & ~stored).sum())
        return ReferenceStats(
            len(self), int(sinks.sum()), int(stored.sum()), tail, self.tiers.tokens
        )


class ReferencePooledCache(ReferenceCache):
    """`kvz.PooledCache`: no store; every token stays at `tail_precision` until it is evicted."""

    has_store = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.key_format = self.value_format = self.tail_format
