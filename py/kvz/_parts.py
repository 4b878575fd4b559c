"""What a snapshot says of the caches in it, and the files that it consists of.

A snapshot is a base file and, beside it, the increments ``<name>.1``, ``<name>.2`` ... that were
saved since, each of which names the contents that it continues. A file holds rows of pages; of a
row that is in several files the newest counts. Called by _save.py and _load.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kvz._closing import Closing
from kvz._container import Header, Tensor, read_header, read_into
from kvz._core import Core
from kvz.arrays import address_of
from kvz.config import CacheConfig
from kvz.errors import ConfigError, CorruptSnapshotError, KvzError, SnapshotError

TIERS = ("sinks", "store", "warm", "tail", "kept")  # as the core numbers them
STATE = ("next", "begin", "cold", "boundary", "evicted", "migrated")
KINDS = ("two_tier", "pooled")
HASHES = "hashes"
_POSITION_MAX = 1 << 62  # so that sums of two fit int64

Hashes = NDArray[np.uint64]
Rows = NDArray[np.int64]
Run = tuple[int, int]  # first row, number of rows
Range = tuple[int, int]  # positions, from one to before another


@dataclass(frozen=True, slots=True)
class Tier:
    """The rows of one tier of one layer: those of the state, and those in one file."""

    held: tuple[Run, ...]
    runs: tuple[Run, ...]

    @property
    def rows(self) -> int:
        """Rows of the state."""
        return sum(count for _, count in self.held)

    @property
    def stored(self) -> int:
        """Rows in the file."""
        return sum(count for _, count in self.runs)


def numbers_of(runs: tuple[Run, ...]) -> Rows:
    """Return the numbers of rows, ascending."""
    parts = [np.arange(first, first + count, dtype=np.int64) for first, count in runs]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def runs_of(rows: Rows) -> tuple[Run, ...]:
    """Return ascending numbers of rows as runs."""
    if not len(rows):
        return ()
    pieces = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return tuple((int(piece[0]), len(piece)) for piece in pieces)


def rows_over(ranges: Sequence[Range], page_tokens: int) -> tuple[Run, ...]:
    """Return the rows that cover ranges of positions, which are in order."""
    runs: list[Run] = []
    for start, stop in ranges:
        first, end = start // page_tokens, (stop - 1) // page_tokens + 1
        if runs and first <= sum(runs[-1]):
            first = runs[-1][0]
            end = max(end, sum(runs.pop()))
        runs.append((first, end - first))
    return tuple(runs)


@dataclass(frozen=True, slots=True)
class Layer:
    """What a snapshot says of one cache."""

    kind: str
    tokens_per_block: int
    config: CacheConfig
    state: dict[str, int]
    tiers: tuple[Tier, ...]
    kept: tuple[Range, ...] = ()
    pins: tuple[Range, ...] = ()

    @property
    def page_tokens(self) -> int:
        """Tokens of a page of the body, in which lies what is kept."""
        return 64 if self.kind == "two_tier" else self.tokens_per_block

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        tiers = zip(TIERS, self.tiers, strict=True)
        return {
            "kind": self.kind,
            "tokens_per_block": self.tokens_per_block,
            "config": self.config.to_dict(),
            "state": self.state,
            "kept": list(map(list, self.kept)),
            "pins": list(map(list, self.pins)),
            "tiers": {
                name: {"held": list(map(list, t.held)), "runs": list(map(list, t.runs))}
                for name, t in tiers
            },
        }

    @classmethod
    def from_dict(cls, given: Any) -> Layer:
        """Read what `to_dict` returned; ValueError, TypeError or KeyError if it is not that."""
        kind, state = given["kind"], given["state"]
        if kind not in KINDS or sorted(state) != sorted(STATE):
            raise ValueError("not the description of a cache")
        made = cls(
            kind=kind,
            tokens_per_block=_number(given["tokens_per_block"]),
            config=CacheConfig.from_dict(given["config"]),
            state={name: _number(state[name]) for name in STATE},
            tiers=tuple(_tier(given["tiers"][name]) for name in TIERS),
            kept=_ranges(given["kept"]),
            pins=_ranges(given["pins"]),
        )
        if made.tokens_per_block < 1:
            raise ValueError("no page")
        if made.tiers[-1].held != rows_over(made.kept, made.page_tokens):
            raise ValueError("other rows than the kept positions have")
        if any(len(tier.held) > 1 for tier in made.tiers[:-1]):
            raise ValueError("a tier in pieces")
        return made


def _tier(given: Any) -> Tier:
    return Tier(*(_runs(given[name]) for name in ("held", "runs")))


def _runs(given: Any) -> tuple[Run, ...]:
    """Read runs of rows: ascending, apart, not empty."""
    runs = tuple((_number(first), _number(count)) for first, count in given)
    end = -1
    for first, count in runs:
        if first <= end or not count:
            raise ValueError("rows out of order")
        end = first + count
    return runs


def _ranges(given: Any) -> tuple[Range, ...]:
    """Read ranges of positions: ascending, not empty."""
    ranges = tuple((_number(start), _number(stop)) for start, stop in given)
    end = 0
    for start, stop in ranges:
        if start < end or stop <= start:
            raise ValueError("positions out of order")
        end = stop
    return ranges


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _POSITION_MAX:
        raise ValueError("not a count")
    return value


def tensor_name(layer: int, tier: int) -> str:
    """Name the tensor of the pages of a tier."""
    return f"layers.{layer}.{TIERS[tier]}"


def hash_text(core: Core, data: bytes | NDArray[Any]) -> str:
    """Return the XXH64 of bytes as 16 hex digits."""
    array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    out = ctypes.c_uint64()
    with core.frame() as frame:
        at = frame.put(address_of(array), array.nbytes)
        core.check(core.hash_pages(at, array.nbytes, 1, frame.ref(out)))
    return f"{out.value:016x}"


class Part(Closing):
    """One open file of a snapshot, its header checked.

    Attributes
    ----------
    what : str
        The path, for messages.
    header : Header
    layers : list of Layer
    parent : str or None
        The checksum of the file that this one continues.
    fingerprint : dict
    page_bytes : list of tuples of int
        Of the tiers of each layer, where the file has rows of them, else 0.
    """

    def __init__(self, path: Path, core: Core) -> None:
        self.what = str(path)
        self.file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115 -- closed by `close`
        try:
            self.header = read_header(self.file, self.what, lambda raw: hash_text(core, raw))
            self._read_about(self.header)
        except BaseException:
            self.close()
            raise

    def _read_about(self, header: Header) -> None:
        about = header.about
        try:
            self.layers = [Layer.from_dict(layer) for layer in about["layers"]]
            self.parent = about["parent"]
            self.fingerprint: dict[str, Any] = about["fingerprint"]
            self._hashes_hash = about["hashes"]
            if not self.layers or not isinstance(self.fingerprint, dict):
                raise ValueError("no layers")
            self.page_bytes = self._check_tensors(header.tensors)
        except ConfigError as error:
            raise SnapshotError(f"{self.what}: its configuration is not valid: {error}") from None
        except (KvzError, ValueError, TypeError, KeyError, AttributeError):
            raise CorruptSnapshotError(f"{self.what}: its description makes no sense") from None

    def _check_tensors(self, tensors: dict[str, Tensor]) -> list[tuple[int, ...]]:
        """Check that the tensors are what the description implies; return the bytes of pages."""
        expected, sizes, pages = {}, [], 0
        for index, layer in enumerate(self.layers):
            found = []
            for number, tier in enumerate(layer.tiers):
                stored, heads, nbytes = tier.stored, layer.config.num_kv_heads, 0
                if stored:
                    name = tensor_name(index, number)
                    nbytes = tensors[name].shape[-1]
                    if not nbytes or nbytes % 64:
                        raise ValueError("no pages")
                    expected[name] = Tensor("U8", (stored, heads, nbytes))
                found.append(nbytes)
                pages += stored * heads
            sizes.append(tuple(found))
        expected[HASHES] = Tensor("U64", (pages,))
        if list(expected.items()) != list(tensors.items()):
            raise ValueError("other tensors than the description implies")
        return sizes

    def read_hashes(self, core: Core) -> list[list[Hashes]]:
        """Read and check the hashes of all pages: (row, head) for each tier of each layer."""
        flat: Hashes = np.empty(self.header.tensors[HASHES].shape, "<u8")
        self.file.seek(self.header.offsets()[HASHES])
        read_into(self.file, flat.view(np.uint8).data, self.what)
        if hash_text(core, flat) != self._hashes_hash:
            raise CorruptSnapshotError(f"{self.what}: damaged: its table of hashes does not match")
        made, at = [], 0
        for layer in self.layers:
            tables = []
            for tier in layer.tiers:
                heads = layer.config.num_kv_heads
                count = tier.stored * heads
                tables.append(flat[at : at + count].reshape(tier.stored, heads))
                at += count
            made.append(tables)
        return made

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def increment_path(path: Path, number: int) -> Path:
    """Say where increment `number` (from 1) of a snapshot is."""
    return path.with_name(f"{path.name}.{number}")


def open_parts(path: Path, core: Core) -> list[Part]:
    """Open a snapshot: the base and every increment that continues it. Close each part."""
    parts = [Part(path, core)]
    try:
        if parts[0].parent is not None:
            raise SnapshotError(f"{path}: an increment of another snapshot; load that one instead")
        while True:
            try:
                part = Part(increment_path(path, len(parts)), core)
            except FileNotFoundError:
                return parts
            if part.parent != parts[-1].header.checksum:
                part.close()  # left over from a snapshot that was here before
                return parts
            parts.append(part)
            if [layer.config for layer in part.layers] != [ly.config for ly in parts[0].layers]:
                raise CorruptSnapshotError(f"{part.what}: of other caches than {path}")
    except BaseException:
        close_all(parts)
        raise


def close_all(parts: list[Part]) -> None:
    """Close what `open_parts` returned."""
    for part in parts:
        part.close()


@dataclass(slots=True)
class Places:
    """Where the rows of one tier are: for each row of the state the part, and the place in it."""

    rows: Rows
    part: Rows
    index: Rows


def find(rows: Rows, wanted: Rows) -> tuple[Rows, NDArray[np.bool_]]:
    """Say where among ascending `rows` each wanted one is, and whether it is there."""
    at = np.searchsorted(rows, wanted)
    found = at < len(rows)
    found[found] = rows[at[found]] == wanted[found]
    return at, found


def locate(parts: list[Part], layer: int, tier: int) -> Places:
    """Find the newest copy of every row of a tier."""
    state = parts[-1].layers[layer].tiers[tier]
    available = sum(part.layers[layer].tiers[tier].stored for part in parts)
    if state.rows > available:  # before anything as large as `rows` is made
        raise CorruptSnapshotError(f"{parts[-1].what}: rows are missing")
    wanted = numbers_of(state.held)
    places = Places(wanted, np.full(len(wanted), -1, np.int64), np.full(len(wanted), -1, np.int64))
    for number, part in enumerate(parts):
        rows = numbers_of(part.layers[layer].tiers[tier].runs)
        at, found = find(wanted, rows)
        places.part[at[found]] = number
        places.index[at[found]] = np.flatnonzero(found)
    if (places.part < 0).any():
        raise CorruptSnapshotError(f"{parts[-1].what}: rows are missing")
    return places
