"""`save` and `load` of both caches, and what a snapshot says of itself.

Called by cache.py and pooled.py; calls _save.py and _load.py.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kvz._cache import BaseCache
from kvz._core import load as load_core
from kvz._load import SnapshotInfo, info_of
from kvz._load import load as load_caches
from kvz._parts import Layer, close_all, open_parts
from kvz._save import save as save_caches
from kvz.config import CacheConfig
from kvz.errors import InvalidTypeError, SnapshotMismatchError
from kvz.pool import BufferPool

Self = TypeVar("Self", bound="PersistentCache")


class PersistentCache(BaseCache):
    """A cache that can be saved and loaded. Not for direct use."""

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        fingerprint: Mapping[str, Any] | None = None,
        incremental: bool = False,
    ) -> int:
        """Write the cache to a file that any safetensors reader can open.

        Packed pages stay packed. The file is complete or not there at all: it is written under
        another name, synced to the disk, and renamed. What was at `path` before is replaced.

        Parameters
        ----------
        path : str or path
        fingerprint : dict, optional
            What the contents belong to, such as ``{"model": ..., "tokenizer": ...}``; plain JSON
            values. `load` can insist on it.
        incremental : bool
            Write only what the snapshot at `path` lacks, to a file of its own beside it
            (`path` with ``.1``, ``.2`` ... at its end). Where there is no snapshot of a cache like
            this one, or more than half of the bytes on the disk would be out of date, the whole
            is written.

        Returns
        -------
        int
            Bytes written; 0 if the snapshot was up to date.

        Raises
        ------
        OSError
            The system says so; what was at `path` is still there.

        Examples
        --------
        >>> import kvz, numpy as np, pathlib, tempfile
        >>> cache = kvz.TwoTierCache(num_kv_heads=1, head_dim=64)
        >>> cache.append(np.ones((1000, 1, 64)), np.ones((1000, 1, 64)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "prompt.kvz")
        ...     whole = cache.save(path, fingerprint={"model": "m-1"})
        ...     cache.append(np.ones((9, 1, 64)), np.ones((9, 1, 64)))
        ...     new = cache.save(path, fingerprint={"model": "m-1"}, incremental=True)
        ...     same = kvz.TwoTierCache.load(path, fingerprint={"model": "m-1"})
        >>> same.digest() == cache.digest(), new < whole
        (True, True)
        """
        return save_caches([self], path, fingerprint, incremental)

    @classmethod
    def load(
        cls: type[Self],
        path: str | os.PathLike[str],
        *,
        fingerprint: Mapping[str, Any] | None = None,
        config: CacheConfig | None = None,
        convert: bool = False,
        mmap: bool = False,
        pool: BufferPool | None = None,
        core: str | None = None,
    ) -> Self:
        """Make a cache of what `save` wrote, on any core and machine: the same bits.

        Parameters
        ----------
        path : str or path
        fingerprint : dict, optional
            Names and values that the saved fingerprint must have.
        config : CacheConfig, optional
            What the cache is expected to be; by default whatever the file says.
        convert : bool
            Whether a cache of another `config` may be made, by reading every token back and
            appending it anew.
        mmap : bool
            Map the file instead of reading it, which takes milliseconds. Pages stay in the file,
            outside the pool, until something is written to one of them; they are checked once,
            before their first use, which raises `CorruptSnapshotError` if they are damaged. The
            file must not be changed in place meanwhile (`save` never does). Native core only.
        pool, core
            As for a new cache.

        Raises
        ------
        SnapshotError
            The file is no snapshot, is damaged (`CorruptSnapshotError`), was written by a later
            version (`SnapshotVersionError`), or holds something else than was asked for
            (`SnapshotMismatchError`).
        PoolExhaustedError
            The pool has no room.
        OSError
            The file cannot be read.
        """
        if config is not None and not isinstance(config, CacheConfig):
            raise InvalidTypeError(f"config: expected a CacheConfig, got {type(config).__name__}")

        source = Source(path, fingerprint, mmap, pool, core)
        (cache,) = load_layers(cls, source, [config], convert)
        return cache

    @property
    def mapped_bytes(self) -> int:
        """Those of `nbytes` that lie in a mapped file and not in the pool."""
        out = ctypes.c_uint64()
        with self._handle as pointer, self._core.frame() as frame:
            self._core.check(self._core.cache_mapped_bytes(pointer, frame.ref(out)))
        return out.value

    @classmethod
    def _make(
        cls: type[Self],
        config: CacheConfig,
        tokens_per_block: int,
        pool: BufferPool | None,
        core: str | None,
    ) -> Self:
        """Make an empty cache."""
        raise NotImplementedError

    def _append_all_of(self, other: PersistentCache) -> None:
        """Append what another cache holds, at its positions; this one is empty."""
        tokens, sinks = len(other), other.config.sink_tokens
        start = 0
        if len(other._ranges(other._core.cache_runs)) > 4:
            raise SnapshotMismatchError(
                "config: a cache that keeps tokens behind its window cannot be converted"
            )
        if tokens < other.next_position:  # behind the sinks, tokens were evicted
            if self.config.sink_tokens != sinks:
                raise SnapshotMismatchError(
                    f"sink_tokens: expected {sinks}, because tokens behind the sinks were evicted, "
                    f"got {self.config.sink_tokens}"
                )
            if sinks:
                self.append(*other._get(0, sinks))
            start = sinks
            first = other.next_position - (tokens - sinks)
            with self._handle as pointer, self._core.frame():
                self._core.check(self._core.cache_skip(pointer, first))
        for index in range(start, tokens, _CONVERT_TOKENS):
            self.append(*other._get(index, min(_CONVERT_TOKENS, tokens - index)))
        for pin in other._ranges(other._core.cache_pins):
            with self._handle as pointer, self._core.frame():
                self._core.check(self._core.cache_pin(pointer, *pin))


_CONVERT_TOKENS = 4096  # read back and appended at a time


class Source(NamedTuple):
    """Where caches come from, and where they go."""

    path: str | os.PathLike[str]
    fingerprint: Mapping[str, Any] | None
    mmap: bool
    pool: BufferPool | None
    core: str | None


def load_layers(
    kind: type[Self],
    source: Source,
    configs: Sequence[CacheConfig | None] | None,
    convert: bool,
) -> list[Self]:
    """Make caches of all layers of a snapshot.

    Parameters
    ----------
    configs : sequence, optional
        What each layer is expected to be, None where anything will do; by default any number.
    """
    pool, core = source.pool, source.core
    made: list[Self] = []

    def make(layer: Layer) -> Self:
        wanted = configs[len(made)] if configs else None
        if wanted is not None and wanted != layer.config and not convert:
            raise SnapshotMismatchError(
                f"{source.path}: config: expected {_difference(wanted, layer.config)}; "
                "convert=True would convert it"
            )
        made.append(kind._make(layer.config, layer.tokens_per_block, pool, core))
        return made[-1]

    chosen = load_core(core if core is not None or pool is None else pool.core)
    count = len(configs) if configs else None
    load_caches(source.path, chosen, kind._kind, count, source.fingerprint, make, source.mmap)
    for index, wanted in enumerate(configs or ()):
        if wanted is not None and wanted != made[index].config:
            try:
                made[index] = _converted(made[index], wanted, pool, core)
            except BaseException:
                for cache in made:
                    cache.close()
                raise
    return made


def _converted(cache: Self, config: CacheConfig, pool: BufferPool | None, core: str | None) -> Self:
    """Make another cache of what one holds, and close that."""
    other = cache._make(config, cache._tokens_per_block, pool, core)
    try:
        other._append_all_of(cache)
    except BaseException:
        other.close()
        raise
    cache.close()
    return other


def _difference(wanted: CacheConfig, found: CacheConfig) -> str:
    """Say in which fields two configurations differ."""
    mine, theirs = wanted.to_dict(), found.to_dict()
    return ", ".join(
        f"{name} {mine[name]!r}, found {theirs[name]!r}"
        for name in mine
        if mine[name] != theirs[name]
    )


def snapshot_info(path: str | os.PathLike[str]) -> SnapshotInfo:
    """Read what a snapshot says of itself, without its pages.

    Raises
    ------
    SnapshotError, OSError
        As `TwoTierCache.load` does.
    """
    parts = open_parts(Path(os.path.realpath(os.fspath(path))), load_core())
    try:
        return info_of(parts)
    finally:
        close_all(parts)
