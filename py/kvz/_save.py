"""Writes snapshots: whole, or only what changed since the last one.

A file appears under its name only when it is complete and on the disk: it is written under another
name, synced and renamed. So whatever stops a save in the middle, the snapshot there before is
still there. Called by _persist.py; calls _parts.py and _container.py.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from kvz._container import Tensor, dump, encode, load, sync_folder
from kvz._parts import (
    HASHES,
    STATE,
    TIERS,
    Hashes,
    Layer,
    Rows,
    Run,
    Tier,
    close_all,
    find,
    hash_text,
    increment_path,
    locate,
    numbers_of,
    open_parts,
    rows_over,
    runs_of,
    tensor_name,
)
from kvz.arrays import address_of
from kvz.errors import InvalidArgumentError, InvalidTypeError, SnapshotError

if TYPE_CHECKING:
    from kvz._state import CacheState

BATCH_BYTES = 1 << 20  # rows are copied and written this many bytes at a time
SYNC_BYTES = 64 << 20  # are brought to the disk while more is written
INCREMENTS_MAX = 64
DEAD_BYTES_MIN = 1 << 20


def check_fingerprint(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a fingerprint as JSON would give it back."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise InvalidTypeError(f"fingerprint: expected a dict with names as keys, got {given!r}")
    try:
        plain: dict[str, Any] = load(dump(dict(given)))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"fingerprint: not JSON: {error}") from None
    return plain


def save(
    caches: Sequence[CacheState],
    path: str | os.PathLike[str],
    fingerprint: Mapping[str, Any] | None,
    incremental: bool,
) -> int:
    """Write the caches, all of one moment, as the layers of one snapshot.

    Returns
    -------
    int
        Bytes written.
    """
    known = check_fingerprint(fingerprint)
    target = Path(os.path.realpath(os.fspath(path)))
    with ExitStack() as stack:
        # What is written is a fork, so that all is of one moment and nobody has to wait for it;
        # but pages that a fork shares cannot move to a spill, where an append may need them to.
        spills = any(cache._pool._spills for cache in caches)
        with ExitStack() as locks:
            for cache in caches:
                (stack if spills else locks).enter_context(cache._lock)
            forks = caches if spills else [stack.enter_context(cache.fork()) for cache in caches]
        whole = [_describe(cache) for cache in forks]
        if incremental:
            written = _save_increment(forks, whole, target, known)
            if written is not None:
                return written
        written = _write(forks, whole, target, known, None)
    _remove_increments(target, 1)
    return written


def _describe(cache: CacheState) -> Layer:
    """Describe a cache with all its rows."""
    core = cache._core
    now = core.new("CacheState")
    tiers = []
    with cache._handle as pointer, core.frame() as frame:
        core.check(core.cache_state(pointer, frame.ref(now)))
    for number in range(len(TIERS) - 1):
        found = core.new("TierState")
        with cache._handle as pointer, core.frame() as frame:
            core.check(core.cache_tier(pointer, number, frame.ref(found)))
        runs = ((found.first_row, found.rows),) if found.rows else ()
        tiers.append(Tier(runs, runs))
    layer = Layer(
        kind=cache._kind,
        tokens_per_block=cache._tokens_per_block,
        config=cache._config,
        state={name: getattr(now, name) for name in STATE},
        tiers=tuple(tiers),
        kept=tuple(cache._ranges(core.cache_runs)[1:-3]),
        pins=tuple(cache._ranges(core.cache_pins)),
    )
    kept = rows_over(layer.kept, layer.page_tokens)
    return replace(layer, tiers=(*tiers, Tier(kept, kept)))


def _save_increment(
    caches: Sequence[CacheState], whole: list[Layer], target: Path, fingerprint: dict[str, Any]
) -> int | None:
    """Write what the snapshot at `target` lacks; None if a whole one is due instead."""
    core = caches[0]._core
    try:
        parts = open_parts(target, core)
    except (FileNotFoundError, SnapshotError):
        return None
    try:
        last = parts[-1]
        same = [(ly.kind, ly.tokens_per_block, ly.config) for ly in last.layers] == [
            (ly.kind, ly.tokens_per_block, ly.config) for ly in whole
        ]
        if not same or last.fingerprint != fingerprint:
            return None
        try:
            tables = [part.read_hashes(core) for part in parts]
        except SnapshotError:
            return None
        changed: list[Layer] = []
        for index, (cache, layer) in enumerate(zip(caches, whole, strict=True)):
            tiers = []
            for number, tier in enumerate(layer.tiers):
                places = locate(parts, index, number)
                table = np.empty((len(places.part), layer.config.num_kv_heads), np.uint64)
                for which in range(len(parts)):
                    held = places.part == which
                    table[held] = tables[which][index][number][places.index[held]]
                runs = _changed_runs(cache, number, tier, places.rows, table)
                tiers.append(Tier(tier.held, runs))
            changed.append(replace(layer, tiers=tuple(tiers)))
        if changed == last.layers or (changed == _without_runs(last.layers)):
            return 0
        stored = sum(part.header.file_bytes for part in parts)
        parent, number = last.header.checksum, len(parts)
    finally:
        close_all(parts)
    new, live = _page_bytes(caches, changed), _page_bytes(caches, whole)
    if number > INCREMENTS_MAX or stored + new > 2 * live + DEAD_BYTES_MIN:
        return None
    return _write(caches, changed, increment_path(target, number), fingerprint, parent)


def _without_runs(layers: list[Layer]) -> list[Layer]:
    """Return what an increment would say that brings no rows."""
    return [
        replace(layer, tiers=tuple(Tier(tier.held, ()) for tier in layer.tiers)) for layer in layers
    ]


def _changed_runs(
    cache: CacheState, number: int, tier: Tier, rows: Rows, table: Hashes
) -> tuple[Run, ...]:
    """Compare the rows of a tier with the hashes that are known of `rows`."""
    wanted = numbers_of(tier.held)
    now = np.empty((len(wanted), cache._heads), np.uint64)
    at = 0
    for run in tier.held:
        _read_rows(cache, number, run, None, now[at : at + run[1]])
        at += run[1]
    place, known = find(rows, wanted)
    changed = ~known
    changed[known] = (now[known] != table[place[known]]).any(axis=1)
    return runs_of(wanted[changed])


def _page_bytes(caches: Sequence[CacheState], layers: list[Layer]) -> int:
    """Bytes of the pages that a file with these layers would hold."""
    return sum(
        tier.stored * cache._heads * _bytes_of_page(cache, number)
        for cache, layer in zip(caches, layers, strict=True)
        for number, tier in enumerate(layer.tiers)
    )


def _bytes_of_page(cache: CacheState, tier: int) -> int:
    found = cache._core.new("TierState")
    with cache._handle as pointer, cache._core.frame() as frame:
        cache._core.check(cache._core.cache_tier(pointer, tier, frame.ref(found)))
    return int(found.page_bytes)


def _read_rows(
    cache: CacheState, tier: int, run: Run, pages: np.ndarray[Any, Any] | None, hashes: Hashes
) -> None:
    """Copy rows of a tier into `pages`, if given, and their hashes into `hashes`."""
    core = cache._core
    with cache._handle as pointer, core.frame() as frame:
        if not run[1]:
            return
        status = core.cache_read_rows(
            pointer,
            tier,
            *run,
            0 if pages is None else frame.out(address_of(pages), pages.nbytes),
            frame.out(address_of(hashes), hashes.nbytes),
        )
        core.check(status)


def _write(
    caches: Sequence[CacheState],
    layers: list[Layer],
    target: Path,
    fingerprint: dict[str, Any],
    parent: str | None,
) -> int:
    """Write one file of a snapshot; it is there wholly or not at all."""
    core = caches[0]._core
    tensors, pages = {}, 0
    for index, (cache, layer) in enumerate(zip(caches, layers, strict=True)):
        for number, tier in enumerate(layer.tiers):
            if tier.stored:
                shape = (tier.stored, cache._heads, _bytes_of_page(cache, number))
                tensors[tensor_name(index, number)] = Tensor("U8", shape)
            pages += tier.stored * cache._heads
    tensors[HASHES] = Tensor("U64", (pages,))
    about = {
        "fingerprint": fingerprint,
        "hashes": "0" * 16,
        "layers": [layer.to_dict() for layer in layers],
        "parent": parent,
    }
    header = encode(about, tensors, lambda _: "0" * 16)
    hashes = np.empty(pages, "<u8")
    with _replacing(target) as file, _Disk(file) as disk:
        file.seek(len(header))
        at = 0
        for cache, layer in zip(caches, layers, strict=True):
            for number, tier in enumerate(layer.tiers):
                count = tier.stored * cache._heads
                table = hashes[at : at + count].reshape(tier.stored, cache._heads)
                _write_tier(cache, number, tier, disk, table)
                at += count
        file.write(hashes.view(np.uint8).data)
        written = file.tell()
        about["hashes"] = hash_text(core, hashes)
        file.seek(0)
        file.write(encode(about, tensors, lambda raw: hash_text(core, raw)))
    return written


def _write_tier(cache: CacheState, number: int, tier: Tier, disk: _Disk, hashes: Hashes) -> None:
    """Write the rows of a tier that belong into this file, and note their hashes."""
    if not tier.stored:
        return
    row_bytes = cache._heads * _bytes_of_page(cache, number)
    rows_max = max(1, BATCH_BYTES // row_bytes)
    buffer = np.empty(rows_max * row_bytes, np.uint8)
    done = 0
    for first, count in tier.runs:
        for start in range(first, first + count, rows_max):
            rows = min(rows_max, first + count - start)
            pages = buffer[: rows * row_bytes]
            _read_rows(cache, number, (start, rows), pages, hashes[done : done + rows])
            disk.write(pages.data)
            done += rows


class _Disk:
    """Writes to a file, and brings it to the disk meanwhile: the sync at the end is short."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._behind = 0  # bytes written since the last sync began
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def write(self, data: memoryview) -> None:
        """Write all of `data`."""
        while data:
            count = self._file.write(data)
            self._behind += count
            data = data[count:]
        idle = self._running is None or self._running.done()
        if self._behind >= SYNC_BYTES and idle:
            self._raise_failure()
            self._running = self._thread.submit(os.fsync, self._file.fileno())
            self._behind = 0

    def _raise_failure(self) -> None:
        """Wait for the last sync; the system tells of an error only once."""
        if self._running is not None:
            self._running.result()

    def __enter__(self) -> _Disk:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self._raise_failure()


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """Give a new file that takes the name `target` when all of it is on the disk."""
    draft = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    try:
        with open(draft, "xb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    sync_folder(target.parent)


def _remove_increments(target: Path, number: int) -> None:
    """Remove increments that belong to no snapshot any more; unread, they would do no harm."""
    with suppress(OSError):
        while True:
            increment_path(target, number).unlink()
            number += 1
