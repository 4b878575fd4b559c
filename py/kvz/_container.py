"""The container that snapshots are written in: one safetensors file, in one canonical form.

A header is a length (u64, little-endian), that many bytes of JSON padded with spaces, and then the
tensors, without gaps, in the order of the header. Bytes 37 to 52 are a checksum of the header, so
that a reader can tell damage from a difference. Nothing read from a file is trusted: a header that
this module would not have written itself, byte for byte, is refused. Called by _parts.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kvz.errors import CorruptSnapshotError, SnapshotError, SnapshotVersionError

FORMAT, VERSION = "kvz", 1
ALIGNMENT = 4096  # of the first tensor in the file, so that its pages can be mapped
HEADER_BYTES_MAX = 100_000_000  # the limit of safetensors
_LENGTH_BYTES = 8
_START = '{"__metadata__":{"checksum":"'
_CHECKSUM = slice(_LENGTH_BYTES + len(_START), _LENGTH_BYTES + len(_START) + 16)
_BYTES_PER_VALUE = {"U8": 1, "U64": 8}

Checksum = Callable[[bytes], str]


class Tensor(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes."""
        return _BYTES_PER_VALUE[self.dtype] * math.prod(self.shape)


class Header(NamedTuple):
    """A header as it was read or is going to be written.

    Attributes
    ----------
    about : dict
        What the writer said besides the tensors; plain JSON values.
    tensors : dict of str to Tensor
        In the order of the file.
    checksum : str
        16 hex digits, which also serve as the name of the whole file's contents.
    nbytes : int
        Bytes before the first tensor.
    """

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    checksum: str
    nbytes: int

    def offsets(self) -> dict[str, int]:
        """Say where in the file each tensor begins."""
        at, offsets = self.nbytes, {}
        for name, tensor in self.tensors.items():
            offsets[name] = at
            at += tensor.nbytes
        return offsets

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.nbytes + sum(tensor.nbytes for tensor in self.tensors.values())


def dump(value: Any) -> str:
    """Write JSON in the one form that snapshots use."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode(about: Mapping[str, Any], tensors: Mapping[str, Tensor], checksum: Checksum) -> bytes:
    """Return the bytes before the first tensor."""
    entries, at = {}, 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        entries[name] = {"data_offsets": [at, end], "dtype": tensor.dtype, "shape": tensor.shape}
        at = end
    text = dump({"format": FORMAT, "snapshot": dump(about), "version": str(VERSION)})
    body = _START + "0" * 16 + '",' + text[1:]
    if entries:  # not sorted: their order is that of the file
        body += "," + json.dumps(entries, separators=(",", ":"))[1:-1]
    body += "}"
    body += " " * (-(_LENGTH_BYTES + len(body)) % ALIGNMENT)
    raw = bytearray(len(body).to_bytes(_LENGTH_BYTES, "little") + body.encode("ascii"))
    raw[_CHECKSUM] = checksum(bytes(raw)).encode("ascii")
    return bytes(raw)


def read_header(file: BinaryIO, what: str, checksum: Checksum) -> Header:
    """Read and check the header of an open file.

    Raises
    ------
    SnapshotVersionError
        A later version of kvz wrote it.
    CorruptSnapshotError
        It is damaged or cut off.
    SnapshotError
        It is something else.
    """
    size = os.fstat(file.fileno()).st_size
    start, brace = file.read(_LENGTH_BYTES), file.read(1)
    length = int.from_bytes(start, "little")
    if brace != b"{" or length > HEADER_BYTES_MAX:
        raise SnapshotError(f"{what}: not a snapshot: it does not begin as a safetensors file does")
    if length > size - _LENGTH_BYTES:
        raise CorruptSnapshotError(
            f"{what}: cut off: its header takes {length} bytes, the file has {size}"
        )
    raw = start + brace + file.read(length - 1)
    metadata, entries = _parse(raw, what)
    header = _checked(raw, metadata, entries, what, checksum)
    if header.file_bytes != size:
        raise CorruptSnapshotError(
            f"{what}: expected {header.file_bytes} bytes, the file has {size}"
        )
    return header


def _parse(raw: bytes, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse the JSON of a header: its metadata and its tensors."""
    try:
        parsed = load(raw[_LENGTH_BYTES:].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SnapshotError(
            f"{what}: not a snapshot, or damaged: its header is not JSON ({error})"
        ) from None
    metadata = parsed.pop("__metadata__", None) if isinstance(parsed, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise SnapshotError(f"{what}: a safetensors file, but not one that kvz wrote (or damaged)")
    return metadata, parsed


def load(text: str) -> Any:
    """Parse JSON, and refuse what JSON leaves open: names twice, and numbers that are none."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _checked(
    raw: bytes, metadata: dict[str, Any], entries: dict[str, Any], what: str, checksum: Checksum
) -> Header:
    """Refuse a header that is not, to the byte, what `encode` makes of its contents."""
    blank = bytearray(raw)
    blank[_CHECKSUM] = b"0" * 16
    intact = checksum(bytes(blank)).encode("ascii") == raw[_CHECKSUM]
    version = metadata.get("version")
    if version != str(VERSION) and (intact or (isinstance(version, str) and version.isdigit())):
        raise SnapshotVersionError(
            f"{what}: of version {version!r}, which this version of kvz cannot read; it reads "
            f"version {VERSION} (or the file is damaged)"
        )
    damaged = CorruptSnapshotError(f"{what}: the header is damaged: its checksum does not match")
    if not intact:
        raise damaged
    try:
        about = load(metadata["snapshot"])
        tensors = {
            name: Tensor(entry["dtype"], tuple(map(_size, entry["shape"])))
            for name, entry in entries.items()
        }
        if not isinstance(about, dict) or encode(about, tensors, checksum) != raw:
            raise damaged
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise damaged from None
    return Header(about, tensors, raw[_CHECKSUM].decode("ascii"), len(raw))


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("no size")
    return value


def read_into(file: BinaryIO, target: memoryview, what: str) -> None:
    """Fill `target` from the file, or say that it is cut off."""
    while target:
        count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise CorruptSnapshotError(f"{what}: cut off while it was read")
        target = target[count:]


def sync_folder(path: Path) -> None:
    """Make names in a folder durable, where the system can."""
    if os.name != "posix":
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
