"""Parts 4 and 6 of the specification: where tokens lie, and the caches."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvz.reference.attention import attention, spread_mask
from kvz.reference.formats import Floats, Format, offset_of, round_to

PAGE = 64  # tokens of a page of the store


# -- 4. Tiers ------------------------------------------------------------------------------------


class Tiers(NamedTuple):
    """Where everything lies. Positions count the stream from 0 and are never renumbered.

    The first `sinks` positions stay for ever. Of the others, those before `cold` are in the store,
    those from there to `boundary` are warm, and those from there to `tokens` in the tail. Eviction
    has reached `first`: before it only sinks, pinned tokens and what an explicit eviction spared
    are held; from there on all are.
    """

    tokens: int = 0  # the position that the next token will have
    boundary: int = 0
    cold: int = 0
    first: int = 0

    def after_append(self, count: int, config: Any, *, has_store: bool = True) -> Tiers:
        """Give the tiers with `count` more tokens, before anything is evicted.

        A batch of `migration_batch` positions, aligned to position 0, leaves the tail as soon as
        `tail_length` newer tokens exist outside it. If there is a warm tier, a page of 64 goes on
        to the store as soon as `warm_length` newer tokens have left the tail. The rules look at
        nothing but the number of tokens, so it does not matter how they were cut into appends.
        """
        tokens, boundary = self.tokens + count, self.boundary
        batch, warm = config.migration_batch, config.warm_length
        if has_store and tokens >= config.tail_length:
            boundary = max(boundary, (tokens - config.tail_length) // batch * batch)
        cold = max(self.cold, (boundary - warm) // PAGE * PAGE) if warm else boundary
        return Tiers(tokens, boundary, cold, self.first)

    def after_trim(self, newest: int) -> Tiers:
        """Give the tiers when `newest`, and all that came after it, are taken back."""
        return Tiers(newest, *(min(x, newest) for x in (self.boundary, self.cold, self.first)))


# -- 6. Caches -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceStats:
    """How many tokens each tier holds."""

    total_tokens: int
    sink_tokens: int
    store_tokens: int
    warm_tokens: int
    tail_tokens: int
    next_position: int


class ReferenceCache:
    """`kvz.TwoTierCache`: sinks and tail at `tail_precision`, older tokens in the store's formats.

    Those that are stored are kept twice: as they read back, and in the space in which they are
    stored, from which they go on to another format.

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
    ...     rotation="auto", warm_length=0, warm_precision="q8"))
    >>> cache.append(np.ones((5, 1, 2)), np.ones((5, 1, 2)))
    >>> cache.stats().store_tokens, cache.stats().tail_tokens
    (3, 2)
    """

    has_store = True

    def __init__(self, config: Any) -> None:
        self.head_dim = int(config.head_dim)
        self.value_dim = int(getattr(config, "value_dim", None) or config.head_dim)
        self._configure(config)
        self.clear()

    def _configure(self, config: Any) -> None:
        """Take over the precisions and sizes of a configuration."""
        stored: Any = config.store_precision
        key, value = stored if isinstance(stored, (tuple, list)) else (stored, stored)
        self.config = config
        self.tail_format = Format.of(config.tail_precision)
        self.warm_format = Format.of(config.warm_precision, config.rotation)
        self.key_format = Format.of(key, config.rotation)
        self.value_format = Format.of(value, config.rotation)

    def _formats(self, tier: str) -> tuple[Format, Format]:
        """Give the formats of keys and values in a tier; sinks are like the tail."""
        if tier == "store":
            return self.key_format, self.value_format
        return (self.warm_format if tier == "warm" else self.tail_format,) * 2

    def clear(self) -> None:
        """Forget everything; the next token has position 0."""
        heads = self.config.num_kv_heads
        self.tiers = Tiers()
        self.pins: frozenset[int] = frozenset()  # positions, held or yet to come
        self.positions = np.zeros(0, np.int64)  # of the tokens held, oldest first
        self._offsets: dict[int, Floats] = {}  # of the keys of the store's pages, (H, D)
        self._keys = np.zeros((0, heads, self.head_dim), np.float32)  # as they read back now
        self._values = np.zeros((0, heads, self.value_dim), np.float32)
        self._stored_keys = self.tail_format.spread(self._keys)  # the same as they are stored
        self._stored_values = self.tail_format.spread(self._values)

    def append(self, keys: ArrayLike, values: ArrayLike) -> None:
        """Add tokens: keys (T, H, D) and values (T, H, Dv), or flat, or one token without T.

        Raises
        ------
        ValueError
            If a shape or a number does not fit. The cache is then as it was.
        """
        k = self._rows("keys", keys, self.head_dim, 0)
        v = self._rows("values", values, self.value_dim, 1)
        if len(k) != len(v):
            raise ValueError(f"values: expected {len(k)} tokens as in keys, got {len(v)}")
        before = self.tiers
        self.tiers = before.after_append(len(k), self.config, has_store=self.has_store)
        new = np.arange(before.tokens, self.tiers.tokens)
        k, v = (round_to(self.tail_format.precision, x) for x in (k, v))
        self.positions = np.concatenate([self.positions, new])
        self._keys = np.concatenate([self._keys, k])
        self._values = np.concatenate([self._values, v])
        self._stored_keys = np.concatenate([self._stored_keys, self.tail_format.spread(k)])
        self._stored_values = np.concatenate([self._stored_values, self.tail_format.spread(v)])
        # Migration: what was in the tail, or is new, and now lies before the boundary. A tier
        # always encodes what the one before it held, even of a token that never had to wait there.
        left = "warm" if self.config.warm_length else "store"
        self._move(before.boundary, self.tiers.boundary, "tail", left)
        if left == "warm":
            self._move(before.cold, self.tiers.cold, "warm", "store")
        # Eviction: the oldest go, exact to the token; sinks and pinned tokens never.
        excess = len(self.positions) - self.config.max_tokens
        if excess > 0:
            self._forget(self.positions[self._loose()][:excess])
        self._drop_pages()

    def reconfigure(self, config: Any) -> None:
        """Change precisions and lengths, as a policy does, also of what is held.

        Every token goes where the rule puts it in a stream of this length; what eviction has passed
        stays with the store. Where a token's format there is the one it had, it keeps its bits. A
        page of keys that are all encoded anew gets the offset of all of them.

        Raises
        ------
        ValueError
            The pinned tokens would leave no room to evict any.
        """
        sinks, first = config.sink_tokens, self.tiers.first
        pinned = sum(position >= sinks for position in self.pins)
        if sinks + pinned + _recent(config, self.has_store) >= config.max_tokens:
            raise ValueError("config: expected to leave room for tokens that may be evicted")
        before, old = self._tier_names(), {n: self._formats(n) for n in ("tail", "warm", "store")}
        rule = Tiers().after_append(self.tiers.tokens, config, has_store=self.has_store)
        passed = first if first > sinks and self.has_store else 0
        cold = max(rule.cold, passed)
        self.tiers = Tiers(rule.tokens, max(rule.boundary, cold), cold, first)
        self._configure(config)
        if self.key_format != old["store"][0]:
            self._offsets = {}
        names = self._tier_names()
        for name in ("_keys", "_values", "_stored_keys", "_stored_values"):
            setattr(self, name, getattr(self, name).copy())
        for target in old:
            moves = [(old[source], (before == source) & (names == target)) for source in old]
            self._encode(moves, target, PAGE)
        self._drop_pages()

    def _tier_names(self) -> NDArray[np.str_]:
        """Say for every token held where it is; sinks count as tail."""
        names = np.full(len(self.positions), "tail", dtype="<U5")
        body = self.positions >= self.config.sink_tokens
        names[body & (self.positions < self.tiers.boundary)] = "warm"
        names[body & (self.positions < self.tiers.cold)] = "store"
        return names

    def _move(self, start: int, stop: int, source: str, target: str) -> None:
        """Move the tokens at positions from `start` to `stop` - 1 from one tier to another."""
        moves = (self.positions >= max(start, self.config.sink_tokens)) & (self.positions < stop)
        batch = self.config.migration_batch if source == "tail" else PAGE
        self._encode([(self._formats(source), moves)], target, batch)

    def _encode(self, moves: list[tuple[Any, Any]], target: str, batch: int) -> None:
        """Store tokens again, those of each pair of formats (keys, values), in those of a tier."""
        for side, name in enumerate(("keys", "values")):
            read_back, stored = getattr(self, f"_{name}"), getattr(self, f"_stored_{name}")
            new, dim = self._formats(target)[side], read_back.shape[-1]
            changed = np.zeros(len(self.positions), bool)
            for formats, which in moves:
                if formats[side] != new:
                    stored[which] = new.entered(stored[which], formats[side], dim)
                    changed |= which
            if not changed.any():
                continue
            centred = new.centred and name == "keys"
            offset = self._offsets_of(changed, batch) if centred else None
            stored[changed] = new.rounded(stored[changed], offset)
            read_back[changed] = new.gathered(stored[changed], dim)

    def _offsets_of(self, moves: NDArray[np.bool_], batch: int) -> Floats:
        """Give the offset of each key that moves to the store; a page that is new gets one.

        It is that of the page's tokens in the first batch that reaches it: it does not matter how
        the stream was cut into appends, nor which of those tokens are evicted at once.
        """
        moving = self.positions[moves]
        for page in np.unique(moving // PAGE).tolist():
            if page not in self._offsets:
                first = moving[moving // PAGE == page][0]
                last = min((page + 1) * PAGE, (first // batch + 1) * batch)
                reached = moves & (self.positions >= first) & (self.positions < last)
                offset = offset_of(self._stored_keys[reached])
                self._offsets = {**self._offsets, page: offset}  # forks share what was there
        return np.array([self._offsets[page] for page in (moving // PAGE).tolist()])

    def _drop_pages(self) -> None:
        """Forget the offsets of pages of which no stored token is held."""
        stored = self._tier_names() == "store"
        pages = set((self.positions[stored] // PAGE).tolist())
        self._offsets = {page: offset for page, offset in self._offsets.items() if page in pages}

    def _keep(self, held: NDArray[np.bool_]) -> None:
        """Forget all tokens but these."""
        for name in ("positions", "_keys", "_values", "_stored_keys", "_stored_values"):
            setattr(self, name, getattr(self, name)[held])

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
        self._keep(held)

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
        if not np.isin(past, self.positions).all():
            raise ValueError("pin: expected positions that are held or yet to come")
        recent = _recent(config, self.has_store)
        if pins != self.pins and config.sink_tokens + pinned + recent >= config.max_tokens:
            raise ValueError("pin: expected to leave room for tokens that may be evicted")
        self.pins = frozenset(pins)

    def unpin(self, start: int, stop: int) -> None:
        """Let these positions be evicted in their turn."""
        self.pins = self.pins - set(range(start, stop))

    def evictable(self) -> NDArray[np.int64]:
        """List the positions that `evict` takes: of the store, if there is one."""
        packed = self.positions < self.tiers.cold if self.has_store else True
        return self.positions[self._loose() & packed]

    def evict(self, gone: ArrayLike) -> None:
        """Evict positions, all of which must be evictable."""
        positions = np.unique(np.asarray(gone, np.int64))
        if not np.isin(positions, self.evictable()).all():
            raise ValueError("positions: expected evictable ones")
        if len(positions):
            self._forget(positions)
            self._drop_pages()

    def _rows(self, what: str, given: ArrayLike, dim: int, side: int) -> Floats:
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
        store = self._formats("store")[side]
        limit = min(self.tail_format.limit(dim), store.limit(dim))
        if self.config.warm_length:
            limit = min(limit, store.limit_after(self.warm_format, dim))
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
        self._keep(held)
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
        stored = ~sinks & (self.positions < self.tiers.cold)
        warm = ~sinks & ~stored & (self.positions < self.tiers.boundary)
        return ReferenceStats(
            total_tokens=len(self),
            sink_tokens=int(sinks.sum()),
            store_tokens=int(stored.sum()),
            warm_tokens=int(warm.sum()),
            tail_tokens=int((~sinks & ~stored & ~warm).sum()),
            next_position=self.tiers.tokens,
        )


def _recent(config: Any, has_store: bool) -> int:
    """Count the most tokens that tail and warm tier have together."""
    if not has_store:
        return 0
    warm = config.warm_length + PAGE - 1 if config.warm_length else 0
    return int(config.tail_length + config.migration_batch - 1 + warm)


class ReferencePooledCache(ReferenceCache):
    """`kvz.PooledCache`: no store; every token stays at `tail_precision` until it is evicted."""

    has_store = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.key_format = self.value_format = self.tail_format
