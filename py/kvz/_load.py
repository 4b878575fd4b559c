"""Reads snapshots: checks everything, then makes new caches, so that nothing old is touched.

Called by _persist.py; calls _parts.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvz._container import read_into
from kvz._core import Core
from kvz._mapped import MappedParts, stretches
from kvz._parts import STATE, TIERS, Hashes, Layer, Part, Places, close_all, locate, open_parts
from kvz._save import check_fingerprint
from kvz.arrays import address_of
from kvz.config import CacheConfig
from kvz.errors import (
    CorruptSnapshotError,
    InvalidArgumentError,
    SnapshotMismatchError,
)

if TYPE_CHECKING:
    from kvz._state import CacheState

BATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """What a snapshot holds, as its headers say.

    Attributes
    ----------
    kind : {"two_tier", "pooled"}
    num_layers : int
    configs : tuple of CacheConfig
        One for each layer.
    next_position : int
        The position that the next token would have.
    fingerprint : dict
        What the caller said when it was saved.
    files : tuple of str
        The base and its increments.
    nbytes : int
        Bytes of all files.
    """

    kind: str
    num_layers: int
    configs: tuple[CacheConfig, ...]
    next_position: int
    fingerprint: dict[str, Any]
    files: tuple[str, ...]
    nbytes: int


def info_of(parts: list[Part]) -> SnapshotInfo:
    """Summarise the headers of a snapshot."""
    last = parts[-1]
    return SnapshotInfo(
        kind=last.layers[0].kind,
        num_layers=len(last.layers),
        configs=tuple(layer.config for layer in last.layers),
        next_position=last.layers[0].state["next"],
        fingerprint=last.fingerprint,
        files=tuple(part.what for part in parts),
        nbytes=sum(part.header.file_bytes for part in parts),
    )


def load(
    path: str | os.PathLike[str],
    core: Core,
    kind: str,
    num_layers: int | None,
    fingerprint: Mapping[str, Any] | None,
    make: Callable[[Layer], CacheState],
    mmap: bool,
) -> list[CacheState]:
    """Read the caches of a snapshot into new ones.

    Parameters
    ----------
    num_layers : int or None
        How many caches it must hold.
    make : callable
        Makes an empty cache for a layer, as the snapshot describes it.
    mmap : bool
        Leave the pages in the files, mapped, and check them when they are first used.
    """
    if mmap and not core.shares_memory:
        raise InvalidArgumentError(f"mmap: files cannot be mapped into the {core.name} core")
    target = Path(os.path.realpath(os.fspath(path)))
    wanted = check_fingerprint(fingerprint)
    parts = open_parts(target, core)
    made: list[CacheState] = []
    try:
        _check_match(parts, kind, num_layers, wanted)
        layers = parts[-1].layers
        places = [[locate(parts, i, t) for t in range(len(TIERS))] for i in range(len(layers))]
        mapped = MappedParts(parts, places, core) if mmap else None
        for index, layer in enumerate(layers):
            made.append(make(layer))
            _restore(made[-1], layer, index, parts, mapped)
        if not mmap:
            for number, part in enumerate(parts):
                _read_part(part, number, made, places)
    except BaseException:
        for cache in made:
            cache.close()
        raise
    finally:
        close_all(parts)
    return made


def _check_match(
    parts: list[Part], kind: str, num_layers: int | None, wanted: dict[str, Any]
) -> None:
    """Refuse a snapshot of something else than was asked for."""
    last = parts[-1]
    path = parts[0].what
    for layer in last.layers:
        if layer.kind != kind:
            raise SnapshotMismatchError(f"{path}: expected a {kind} cache, found {layer.kind}")
    if num_layers is not None and len(last.layers) != num_layers:
        raise SnapshotMismatchError(
            f"{path}: expected {num_layers} layers, found {len(last.layers)}"
        )
    for name, value in wanted.items():
        found = last.fingerprint.get(name)
        if name not in last.fingerprint or found != value:
            raise SnapshotMismatchError(
                f"{path}: fingerprint: expected {name} {value!r}, found {found!r}"
            )


def _restore(
    cache: CacheState, layer: Layer, index: int, parts: list[Part], mapped: MappedParts | None
) -> None:
    """Give an empty cache the positions of a layer, if its pages are such as the file has."""
    core, what = cache._core, parts[-1].what
    page_bytes = [part.page_bytes[index] for part in parts]
    rows = [tier.rows for tier in layer.tiers]
    state = core.new(
        "CacheState",
        **{name: layer.state[name] for name in STATE},
        sink_rows=rows[0],
        store_rows=rows[1],
        warm_rows=rows[2],
        tail_rows=rows[3],
        kept_rows=rows[4],
    )
    found = [core.new("TierState") for _ in TIERS]
    with cache._handle as pointer, core.frame() as frame:
        for number, tier in enumerate(found):
            core.check(core.cache_tier(pointer, number, frame.ref(tier)))
    for number, tier in enumerate(found):
        if {sizes[number] for sizes in page_bytes} - {0, tier.page_bytes}:
            raise CorruptSnapshotError(f"{what}: pages of another size than its configuration has")
    try:
        with cache._handle as pointer, core.frame() as frame:
            range_ = core.structs["Range"]
            kept = (range_ * len(layer.kept))(*[range_(*one) for one in layer.kept])
            status = core.cache_set_state(
                pointer,
                frame.ref(state),
                frame.ref(kept) if layer.kept else 0,
                len(layer.kept),
                *(mapped.arguments(index) if mapped else (0, 0, 0)),
            )
            core.check(status)
            for start, stop in layer.pins:
                core.check(core.cache_pin(pointer, start, stop))
    except InvalidArgumentError as error:
        raise CorruptSnapshotError(f"{what}: its positions make no sense: {error}") from None
    for number, tier in enumerate(found):
        with cache._handle as pointer, core.frame() as frame:
            core.check(core.cache_tier(pointer, number, frame.ref(tier)))
        held = layer.tiers[number].held
        if held and tier.first_row != held[0][0]:
            raise CorruptSnapshotError(f"{what}: its rows are not those of its positions")


def _read_part(
    part: Part, number: int, caches: list[CacheState], places: list[list[Places]]
) -> None:
    """Read one file: the rows that count into their caches, all others only to check them."""
    core = caches[0]._core
    tables = part.read_hashes(core)
    offsets = part.header.offsets()
    for index, cache in enumerate(caches):
        for tier in range(len(TIERS)):
            if not len(tables[index][tier]):
                continue
            part.file.seek(offsets[f"layers.{index}.{TIERS[tier]}"])
            state = part.layers[index].tiers[tier]
            needed = np.zeros(state.stored, bool)
            mine = places[index][tier]
            needed[mine.index[mine.part == number]] = True
            page_bytes = part.page_bytes[index][tier]
            reader = _TierReader(part, cache, tier, page_bytes, tables[index][tier])
            for at, first, count, wanted in stretches(state.runs, needed):
                reader.read(at, first, count, wanted)


@dataclass(slots=True)
class _TierReader:
    """Reads rows of one tier from where the file stands."""

    part: Part
    cache: CacheState
    tier: int
    page_bytes: int
    table: Hashes

    def read(self, at: int, first: int, count: int, wanted: bool) -> None:
        """Read `count` rows; into the cache if they are wanted. Check them all."""
        heads = self.table.shape[1]
        row_bytes = heads * self.page_bytes
        batch = max(1, BATCH_BYTES // row_bytes)
        buffer = np.empty(min(batch, count) * row_bytes, np.uint8)
        for start in range(0, count, batch):
            rows = min(batch, count - start)
            pages = buffer[: rows * row_bytes]
            read_into(self.part.file, pages.data, self.part.what)
            hashes = np.empty((rows, heads), np.uint64)
            self._take(first + start, rows, pages, hashes, wanted)
            wrong = np.argwhere(hashes != self.table[at + start : at + start + rows])
            if len(wrong):
                row, head = map(int, wrong[0])
                raise CorruptSnapshotError(
                    f"{self.part.what}: damaged: page {first + start + row} of the "
                    f"{TIERS[self.tier]}, head {head}, does not match its hash"
                )

    def _take(
        self, first: int, rows: int, pages: np.ndarray[Any, Any], hashes: Hashes, wanted: bool
    ) -> None:
        core = self.cache._core
        with self.cache._handle as pointer, core.frame() as frame:
            source = frame.put(address_of(pages), pages.nbytes)
            target = frame.out(address_of(hashes), hashes.nbytes)
            if wanted:
                status = core.cache_write_rows(pointer, self.tier, first, rows, source, target)
            else:
                status = core.hash_pages(source, self.page_bytes, hashes.size, target)
            core.check(status)
