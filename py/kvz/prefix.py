"""Finds what of a new prompt is in caches already there. Calls fork of the caches, and _core.py.

Sequences of tokens are kept in a radix tree: an edge carries a run of tokens, and what is found was
compared token by token, so that no hash can mistake one prompt for another.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvz._closing import Closing
from kvz.arrays import as_count, as_flag
from kvz.cache import TwoTierCache
from kvz.errors import ClosedError, InvalidArgumentError, InvalidTypeError
from kvz.model import ModelCache
from kvz.pooled import PooledCache
from kvz.stats import format_bytes

AnyCache: TypeAlias = "TwoTierCache | PooledCache | ModelCache"
Tokens: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixStats:
    """What a `PrefixCache` holds and what it was good for.

    Attributes
    ----------
    entries : int
    held_bytes : int
        Bytes of the pool that the entries hold, pages that several share counted once.
    lookups, hits : int
        Calls of `fork`, and those of them that found something.
    tokens_asked, tokens_found : int
        Tokens of all prompts, and those of them that were there.
    insertions, evictions : int
    """

    entries: int = 0
    held_bytes: int = 0
    lookups: int = 0
    hits: int = 0
    tokens_asked: int = 0
    tokens_found: int = 0
    insertions: int = 0
    evictions: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits per lookup; 0 when there were none."""
        return self.hits / self.lookups if self.lookups else 0.0

    @property
    def token_hit_rate(self) -> float:
        """Tokens found per token asked; 0 when there were none."""
        return self.tokens_found / self.tokens_asked if self.tokens_asked else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and both rates as plain values."""
        rates = {"hit_rate": self.hit_rate, "token_hit_rate": self.token_hit_rate}
        return {**asdict(self), **rates}


class _Entry:
    """A stored sequence."""

    __slots__ = ("cache", "gaps", "layers", "length", "node")

    def __init__(self, cache: AnyCache, length: int) -> None:
        self.cache = cache
        self.length = length
        self.layers: list[Any] = list(cache) if isinstance(cache, ModelCache) else [cache]
        self.node: _Node
        # Where no layer can be cut: tokens that a new cache would hold there were evicted.
        self.gaps: list[tuple[int, int]] = []
        for layer in self.layers:
            now = layer._core_stats()
            if now.total_tokens < now.next_position:
                self.gaps.append((now.sink_tokens, now.next_position))

    def usable(self, length: int) -> int:
        """Return the largest length up to `length` that the cache can be forked at."""
        if length >= self.length:
            return self.length
        while True:
            cut = [sinks for sinks, end in self.gaps if sinks < length < end]
            if not cut:
                return length
            length = min(cut)


class _Node:
    """A place in the tree: all sequences below it begin with the tokens from the root to here."""

    __slots__ = ("children", "edge", "entry", "parent")

    def __init__(self, edge: Tokens, parent: _Node | None) -> None:
        self.edge = edge  # the tokens between the parent and here
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.entry: _Entry | None = None

    def entries(self) -> Iterator[_Entry]:
        """Go through the entries here and below."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            if node.entry is not None:
                yield node.entry
            waiting.extend(node.children.values())


class PrefixCache(Closing):
    """Caches of earlier prompts, found again by their tokens.

    `insert` keeps a fork of a cache, `fork` gives back a fork of whatever has the longest prefix in
    common with a new prompt, cut at the token where the two part. No page is copied for either. All
    caches are of one model: `TwoTierCache`, `PooledCache` or `ModelCache` with the same
    configuration. A cache that has evicted tokens is found whole, or by its sinks; what it is cut
    to anywhere else would lack tokens. Methods may be called from several threads.

    Parameters
    ----------
    max_bytes : int, optional
        What the entries may hold together, pages that several share counted once; when they hold
        more, those go that were not used for the longest time.

    Examples
    --------
    >>> import kvz, numpy as np
    >>> def run(cache, tokens):  # stands for a model
    ...     x = np.ones((len(tokens), 1, 64)) * np.reshape(tokens, (-1, 1, 1))
    ...     cache.append(x, x)
    >>> prefixes = PrefixCache(max_bytes=1 << 20)
    >>> first = kvz.TwoTierCache(num_kv_heads=1, head_dim=64)
    >>> run(first, [1, 2, 3, 4, 5])
    >>> prefixes.insert([1, 2, 3, 4, 5], first)
    >>> prompt = [1, 2, 3, 9, 9, 9]
    >>> cache, length = prefixes.fork(prompt)
    >>> length
    3
    >>> run(cache, prompt[length:])
    >>> prefixes
    PrefixCache(1 entry, 16.0 KiB of 1.0 MiB, 3 of 6 tokens found)
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = None if max_bytes is None else as_count(max_bytes, "max_bytes", 1)
        self._lock = threading.RLock()
        self._root = _Node(np.empty(0, np.int64), None)
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # oldest use first
        self._kind: Any = None  # what every cache has to be
        self._counts = dict.fromkeys(
            ("lookups", "hits", "tokens_asked", "tokens_found", "insertions", "evictions"), 0
        )
        self._closed = False

    def insert(self, tokens: Any, cache: AnyCache) -> None:
        """Keep a fork of a cache, to be found by its tokens.

        Parameters
        ----------
        tokens : sequence of int
            All tokens of the cache, from position 0 on.
        cache : TwoTierCache, PooledCache or ModelCache
            It stays the caller's, who may go on with it or close it.

        Raises
        ------
        InvalidArgumentError
            The cache has seen another number of tokens, or is of another configuration or core than
            those before.
        """
        wanted = _as_tokens(tokens)
        if not isinstance(cache, (TwoTierCache, PooledCache, ModelCache)):
            raise InvalidTypeError(f"cache: expected a cache of kvz, got {type(cache).__name__}")
        with self._lock:
            self._check_open()
            fork = cache.fork()
            try:
                entry = _Entry(fork, len(wanted))
                self._check_fits(entry)
            except BaseException:
                fork.close()
                raise
            node = self._node_of(wanted)
            if node.entry is not None:
                self._forget(node.entry)
                node = self._node_of(wanted)
            node.entry, entry.node = entry, node
            self._entries[id(entry)] = entry
            self._counts["insertions"] += 1
            self._fit()

    def fork(self, tokens: Any, *, min_length: int = 1, exact: bool = False) -> tuple[Any, int]:
        """Return a cache with as many of the first tokens of a prompt as are known.

        A model has to see at least one token to predict the next: give ``tokens[:-1]`` where that
        matters.

        Parameters
        ----------
        tokens : sequence of int
        min_length : int
            Fewer tokens than this are not worth it.
        exact : bool
            Find whole stored sequences only. A fork in the middle of one has tokens in the store
            that a new cache would still have in its tail; with `exact` all that follows has the
            same bits as if the prompt had been appended to a new cache.

        Returns
        -------
        cache : TwoTierCache, PooledCache, ModelCache or None
            The caller's own; None if nothing was found.
        length : int
            How many tokens it holds; 0 if nothing was found.
        """
        wanted = _as_tokens(tokens)
        least = as_count(min_length, "min_length", 1)
        only_whole = as_flag(exact, "exact")
        with self._lock:
            self._check_open()
            self._counts["lookups"] += 1
            self._counts["tokens_asked"] += len(wanted)
            entry, length = self._best(wanted, only_whole)
            if entry is None or length < least:
                return None, 0
            whole = length == entry.length
            cache = entry.cache.fork() if whole else entry.cache.fork(length)
            self._entries.move_to_end(id(entry))
            self._counts["hits"] += 1
            self._counts["tokens_found"] += length
            return cache, length

    def match(self, tokens: Any) -> int:
        """Say how many of the first tokens of a prompt `fork` would find; nothing is counted."""
        wanted = _as_tokens(tokens)
        with self._lock:
            self._check_open()
            return self._best(wanted, False)[1]

    # -- The tree --------------------------------------------------------------------------------

    def _walk(self, tokens: Tokens) -> tuple[_Node, int, int]:
        """Follow `tokens` as far as they go.

        Returns
        -------
        (node, tokens matched in all, tokens matched of the edge to the node)
        """
        node, done = self._root, 0
        while done < len(tokens):
            child = node.children.get(int(tokens[done]))
            if child is None:
                break
            same = _common(child.edge, tokens[done:])
            done += same
            if same < len(child.edge):
                return child, done, same
            node = child
        return node, done, len(node.edge)

    def _best(self, tokens: Tokens, only_whole: bool) -> tuple[_Entry | None, int]:
        """Find the entry that has most of the tokens, and how many it has."""
        node: _Node | None
        node, common, on_edge = self._walk(tokens)
        best: _Entry | None = None
        length = 0
        if not only_whole:
            for entry in node.entries():  # all of them begin with the `common` tokens
                usable = entry.usable(common)
                if usable > length:
                    best, length = entry, usable
                if length == common:
                    break
        if on_edge < len(node.edge):
            node = node.parent  # that of an edge matched in part ends too late to be whole
        while node is not None:
            found = node.entry
            if found is not None and found.length > length and found.length <= common:
                best, length = found, found.length
            node = node.parent
        return best, length

    def _node_of(self, tokens: Tokens) -> _Node:
        """Find or make the place where `tokens` end."""
        node, done, on_edge = self._walk(tokens)
        if on_edge < len(node.edge):  # cut the edge in two
            parent = node.parent
            assert parent is not None
            middle = _Node(node.edge[:on_edge], parent)
            parent.children[int(node.edge[0])] = middle
            node.edge, node.parent = node.edge[on_edge:], middle
            middle.children[int(node.edge[0])] = node
            node = middle
        if done == len(tokens):
            return node
        leaf = _Node(tokens[done:].copy(), node)
        node.children[int(tokens[done])] = leaf
        return leaf

    def _forget(self, entry: _Entry) -> None:
        """Drop an entry, and what of the tree was there for it alone."""
        del self._entries[id(entry)]
        node: _Node = entry.node
        node.entry = None
        entry.cache.close()
        while node.parent is not None and node.entry is None and len(node.children) < 2:
            parent = node.parent
            for child in node.children.values():  # one, which takes the place
                child.edge, child.parent = np.concatenate([node.edge, child.edge]), parent
                parent.children[int(node.edge[0])] = child
                return
            del parent.children[int(node.edge[0])]
            node = parent

    # -- Bytes -----------------------------------------------------------------------------------

    def _fit(self) -> None:
        """Drop the entries that were not used for longest until the rest fit."""
        if self._max_bytes is None:
            return
        newest = next(reversed(self._entries.values()))
        if self._count_bytes([newest]) > self._max_bytes:  # it is of no use to drop the others
            self._forget(newest)
            self._counts["evictions"] += 1
        while self._count_bytes(self._entries.values()) > self._max_bytes:
            self._forget(next(iter(self._entries.values())))
            self._counts["evictions"] += 1

    @staticmethod
    def _count_bytes(entries: Iterable[_Entry]) -> int:
        """Bytes of the pool that entries hold, each page counted once."""
        layers = [layer for entry in entries for layer in entry.layers]
        if not layers:
            return 0
        core, out = layers[0]._core, ctypes.c_uint64()
        pointers = (core.ctypes["ptr"] * len(layers))(*[layer._handle.pointer for layer in layers])
        with core.frame() as frame:
            status = core.caches_held_bytes(frame.ref(pointers), len(layers), frame.ref(out))
            core.check(status)
        return out.value

    # -- Checks ----------------------------------------------------------------------------------

    def _check_fits(self, entry: _Entry) -> None:
        """Refuse a cache that is not what its tokens say, or not like the others."""
        seen = {layer.next_position for layer in entry.layers}
        if seen != {entry.length}:
            raise InvalidArgumentError(
                f"tokens: expected as many as the cache has seen, {max(seen)}, got {entry.length}"
            )
        first = entry.layers[0]
        kind = (
            type(entry.cache).__name__,
            first.core,
            [layer.config for layer in entry.layers],
            first._tokens_per_block,
        )
        if self._kind not in (None, kind):
            raise InvalidArgumentError(
                f"cache: expected one like those before, a {self._kind[0]} of the "
                f"{self._kind[1]} core with the same configuration"
            )
        self._kind = kind

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this PrefixCache is closed")

    # -- Looking ---------------------------------------------------------------------------------

    def stats(self) -> PrefixStats:
        """Return what is held and what was found."""
        with self._lock:
            held = self._count_bytes(self._entries.values())
            return PrefixStats(entries=len(self._entries), held_bytes=held, **self._counts)

    def clear(self) -> None:
        """Forget all entries; the counts stay."""
        with self._lock:
            for entry in list(self._entries.values()):
                self._forget(entry)
            self._kind = None

    def close(self) -> None:
        """Forget all entries and refuse further use."""
        self.clear()
        self._closed = True

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    def __repr__(self) -> str:
        if self._closed:
            return "PrefixCache(closed)"
        now = self.stats()
        most = f" of {format_bytes(self._max_bytes)}" if self._max_bytes else ""
        return (
            f"PrefixCache({now.entries} {'entry' if now.entries == 1 else 'entries'}, "
            f"{format_bytes(now.held_bytes)}{most}, "
            f"{now.tokens_found} of {now.tokens_asked} tokens found)"
        )


def _common(a: Tokens, b: Tokens) -> int:
    """Count the tokens that two runs have in common at their start."""
    count = min(len(a), len(b))
    different = np.flatnonzero(a[:count] != b[:count])
    return int(different[0]) if len(different) else count


def _as_tokens(tokens: Any) -> Tokens:
    """Make an array of token numbers."""
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InvalidTypeError(
            f"tokens: expected a sequence of integers, got {array.dtype} of shape {array.shape}"
        )
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise InvalidArgumentError("tokens: expected numbers below 2**63")
    return array.astype(np.int64)
