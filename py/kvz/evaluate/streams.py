"""Caches of one layer that read a whole sequence at once, as if it had come token by token.

The model of the demo appends all keys and values of a sequence and then asks with all queries.
Each query must see what a decoding step would have seen: the tokens older than the tail packed,
the tail and the sinks exact. `KvzStream` does that with a real cache, `PeerStream` with a format
that is simulated. Called by measure.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import kvz
from kvz.demo.evaluate import store_configs
from kvz.demo.model import Floats, Shape
from kvz.evaluate.peers import PAGE, Peer
from kvz.presets import Store


class Setting(NamedTuple):
    """How much of a cache stays exact, and whether packed rows are rotated.

    Attributes
    ----------
    tail, sinks : int
        `tail_length` and `sink_tokens`.
    rotation : {"auto", "on", "off"}
        Of kvz's formats; the peers have none.
    core : {"native", "wasm"}, optional
    """

    tail: int = 64
    sinks: int = 4
    rotation: str = "auto"
    core: str | None = None


def boundaries(tokens: int, tail: int) -> Iterator[tuple[int, int, int]]:
    """Cut a sequence where tokens leave the tail, batches of a page at a time.

    Yields
    ------
    start, stop : int
        A run of queries.
    boundary : int
        Tokens before it have left the tail when each of the run is asked.

    Examples
    --------
    >>> list(boundaries(200, 64))
    [(0, 127, 0), (127, 191, 64), (191, 200, 128)]
    """
    start = 0
    while start < tokens:
        boundary = max(0, (start + 1 - tail) // PAGE * PAGE)
        stop = min(tokens, boundary + PAGE + tail - 1)
        yield start, stop, boundary
        start = stop


def configs(shape: Shape, store: Store, setting: Setting) -> tuple[kvz.CacheConfig, ...]:
    """Return the configurations of all layers."""
    rotation = {} if setting.rotation == "auto" else {"rotation": setting.rotation}
    return store_configs(
        shape,
        store,
        tail_length=setting.tail,
        sink_tokens=setting.sinks,
        migration_batch=PAGE,
        **rotation,
    )


class KvzStream:
    """A `kvz.TwoTierCache` that is given each run of tokens, and asked with it, in turn."""

    def __init__(self, config: kvz.CacheConfig, pool: kvz.BufferPool) -> None:
        self.cache = kvz.TwoTierCache(config, pool=pool)
        self._rows: tuple[Floats, Floats] | None = None

    @property
    def next_position(self) -> int:
        """Position of the next token."""
        return self.cache.next_position

    def append(self, keys: Floats, values: Floats) -> None:
        """Remember the sequence until its queries are known."""
        self._rows = keys, values

    def attend(self, query: Floats) -> Floats:
        """Append and attend run by run; (T, num_heads, head_dim)."""
        assert self._rows is not None, "append first"
        keys, values = self._rows
        pieces = []
        for start, stop, _ in boundaries(len(query), self.cache.config.tail_length):
            self.cache.append(keys[start:stop], values[start:stop])
            pieces.append(self.cache.attend(query[start:stop]))
        return np.concatenate(pieces)


class PeerStream:
    """Attention in numpy over what a simulated format gives back."""

    def __init__(self, peer: Peer, setting: Setting) -> None:
        self.next_position = 0
        self._peer = peer
        self._setting = setting
        self._keys = self._values = np.empty((0, 0, 0), np.float32)  # (H, T, D)

    def append(self, keys: Floats, values: Floats) -> None:
        """Remember the sequence until its queries are known."""
        self._keys = np.ascontiguousarray(keys.swapaxes(0, 1))
        self._values = np.ascontiguousarray(values.swapaxes(0, 1))

    def attend(self, query: Floats) -> Floats:
        """Attend with the whole sequence; (T, num_heads, head_dim)."""
        tokens, per_head = len(query), query.shape[1] // len(self._keys)
        out = np.empty_like(query)
        for head, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            packed_keys = self._stored(self._peer.keys, keys)
            packed_values = self._stored(self._peer.values, values)
            heads = slice(head * per_head, (head + 1) * per_head)
            for start, stop, old in boundaries(tokens, self._setting.tail):
                seen_keys = np.concatenate([packed_keys[:old], keys[old:stop]])
                seen_values = np.concatenate([packed_values[:old], values[old:stop]])
                out[start:stop, heads] = _attention(
                    query[start:stop, heads], seen_keys, seen_values
                )
        return out

    def _stored(self, storing: Any, rows: Floats) -> Floats:
        """All whole pages as they come back; sinks stay, and are out of every page's statistics."""
        stored = rows.copy()
        for start in range(0, len(rows) - PAGE + 1, PAGE):
            first = max(start, self._setting.sinks)
            if first < start + PAGE:
                stored[first : start + PAGE] = storing(rows[first : start + PAGE])
        return stored


def _attention(query: Floats, keys: Floats, values: Floats) -> Floats:
    """Attend causally with the newest queries (n, heads, D) over rows (T, D) of one kv head."""
    count, heads, dim = query.shape
    flat = query.swapaxes(0, 1).reshape(-1, dim) * np.float32(dim**-0.5)
    logits = (flat @ keys.T).reshape(heads, count, -1)
    logits[..., -count:] += np.triu(np.full((count, count), -1e30, np.float32), 1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out: Floats = (weights @ values).swapaxes(0, 1)
    return out
