"""Parts 4 to 6 of the specification: where tokens lie, attention, and the caches."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvz.reference.formats import Floats, Format, offset_of, round_to

PAGE = 64  # tokens of a page of the store


# -- 4. Tiers ------------------------------------------------------------------------------------


class Tiers(NamedTuple):
    """Where everything lies. Positions count the stream from 0 and are never renumbered.

    The first `sinks` positions stay for ever. Of the others, those before `boundary` are in the
    store, those from there to `tokens` in the tail. Eviction has reached `first`: before it only
    sinks, pinned tokens and what an explicit eviction spared are held; from there on all are.
    """

    tokens: int = 0  # the position that the next token will have
    boundary: int = 0
    first: int = 0

    def after_append(self, count: int, config: Any, *, has_store: bool = True) -> Tiers:
        """Give the tiers with `count` more tokens, before anything is evicted.

        A batch of `migration_batch` positions, aligned to position 0, leaves the tail as soon as
        `tail_length` newer tokens exist outside it. The rule looks at nothing but the number of
        tokens, so it does not matter how they were cut into appends.
        """
        tokens, boundary = self.tokens + count, self.boundary
        batch = config.migration_batch
        if has_store and tokens >= config.tail_length:
            boundary = max(boundary, (tokens - config.tail_length) // batch * batch)
        return Tiers(tokens, boundary, self.first)

    def after_trim(self, newest: int) -> Tiers:
        """Give the tiers when `newest`, and all that came after it, are taken back."""
        return Tiers(newest, min(self.boundary, newest), min(self.first, newest))


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
        self.pins: frozenset[int] = frozenset()  # positions, held or yet to come
        self.positions = np.zeros(0, np.int64)  # of the tokens held, oldest first
        self._offsets: dict[int, Floats] = {}  # of the keys of the store's pages, (H, D)
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
        centred = self.key_format.centred and moves.any()
        offset = self._offsets_of(positions, k, moves) if centred else None
        k[moves] = self.key_format.stored(k[moves], offset)
        v[moves] = self.value_format.stored(v[moves])
        # Eviction: the oldest go, exact to the token; sinks and pinned tokens never.
        self.positions, self._keys, self._values = positions, k, v
        excess = len(positions) - self.config.max_tokens
        if excess > 0:
            self._forget(positions[self._loose()][:excess])
        self._drop_pages()

    def _offsets_of(self, positions: NDArray[np.int64], keys: Floats, moves: Any) -> Floats:
        """Give the offset of each key that migrates; a page that is new gets one.

        It is that of the page's tokens in the first batch that reaches it: it does not matter how
        the stream was cut into appends, nor which of those tokens are evicted at once.
        """
        moving = positions[moves]
        batch = self.config.migration_batch
        for page in np.unique(moving // PAGE).tolist():
            if page not in self._offsets:
                first = moving[moving // PAGE == page][0]
                last = min((page + 1) * PAGE, (first // batch + 1) * batch)
                rows = keys[(positions >= first) & (positions < last)]
                offset = offset_of(self.key_format.spread(rows))
                self._offsets = {**self._offsets, page: offset}  # forks share what was there
        return np.array([self._offsets[page] for page in (moving // PAGE).tolist()])

    def _drop_pages(self) -> None:
        """Forget the offsets of pages of which no stored token is held."""
        sinks, boundary = self.config.sink_tokens, self.tiers.boundary
        stored = (self.positions >= sinks) & (self.positions < boundary)
        pages = set((self.positions[stored] // PAGE).tolist())
        self._offsets = {page: offset for page, offset in self._offsets.items() if page in pages}

    def _loose(self) -> NDArray[np.bool_]:
        """Tell which of the tokens held are neither sinks nor pinned."""
        pinned = np.isin(self.positions, list(self.pins))
        loose: NDArray[np.bool_] = (self.positions >= self.config.sink_tokens) & ~pinned
        return loose

    def _forget(self, gone: NDArray[np.int64]) -> None:
        """Evict positions."""
        held = ~np.isin(self.positions, gone)
        if gone.max() >= max(self.tiers.first, self.config.sink_tokens):
            self.tiers = self.tiers._replace(first=int(gone.max()) + 1)
        self.positions, self._keys, self._values = (
            x[held] for x in (self.positions, self._keys, self._values)
        )

    def pin(self, start: int, stop: int) -> None:
        """Never evict the positions from `start` to `stop` - 1.

        Raises
        ------
        ValueError
            One of them was evicted, or no token would be left that could be.
        """
        config = self.config
        wanted = np.arange(start, stop)
        past = wanted[wanted < self.tiers.tokens]
        pins = self.pins | set(wanted.tolist())
        pinned = sum(position >= config.sink_tokens for position in pins)
        tail = config.tail_length + config.migration_batch - 1 if self.has_store else 0
        if not np.isin(past, self.positions).all():
            raise ValueError("pin: expected positions that are held or yet to come")
        if pins != self.pins and config.sink_tokens + pinned + tail >= config.max_tokens:
            raise ValueError("pin: expected to leave room for tokens that may be evicted")
        self.pins = frozenset(pins)

    def unpin(self, start: int, stop: int) -> None:
        """Let these positions be evicted in their turn."""
        self.pins = self.pins - set(range(start, stop))

    def evictable(self) -> NDArray[np.int64]:
        """List the positions that `evict` takes: of the store, if there is one."""
        packed = self.positions < self.tiers.boundary if self.has_store else True
        return self.positions[self._loose() & packed]

    def evict(self, gone: ArrayLike) -> None:
        """Evict positions, all of which must be evictable."""
        positions = np.unique(np.asarray(gone, np.int64))
        if not np.isin(positions, self.evictable()).all():
            raise ValueError("positions: expected evictable ones")
        if len(positions):
            self._forget(positions)
            self._drop_pages()

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
            self._take_back(int(self.positions[len(self) - removed]))
        return removed

    def _take_back(self, newest: int) -> None:
        """Forget the tokens from position `newest` on."""
        held = self.positions < newest
        self.tiers = self.tiers.after_trim(newest)
        self.positions, self._keys, self._values = (
            x[held] for x in (self.positions, self._keys, self._values)
        )
        self._drop_pages()

    def fork(self, length: int | None = None) -> ReferenceCache:
        """Copy the cache; with `length`, as if the tokens from that position on were trimmed.

        Raises
        ------
        ValueError
            `length` lies beyond the stream, or in a gap that eviction left.
        """
        tokens, sinks = self.tiers.tokens, min(self.config.sink_tokens, self.tiers.tokens)
        length = tokens if length is None else length
        ends = np.concatenate([[0], self.positions, self.positions + 1])
        in_window = min(max(self.tiers.first, sinks), tokens) <= length <= tokens
        if not in_window and length not in ends:
            raise ValueError(f"length: expected that of a prefix held, got {length}")
        other = copy(self)
        other._take_back(length)
        return other

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
