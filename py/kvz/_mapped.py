"""Leaves the pages of a snapshot in its files, mapped into memory, for a cache to use in place.

Called by _load.py.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from kvz._core import Core, Handle
from kvz._parts import Part, Places, tensor_name
from kvz.arrays import address_of


class MappedParts:
    """The files of a snapshot, mapped, with what their pages must hash to.

    The core keeps the mapping as long as any cache needs it.
    """

    def __init__(self, parts: list[Part], places: list[list[Places]], core: Core) -> None:
        self._core = core
        self._handle = Handle("mapping", core.create("mapping_new"), core.mapping_free)
        rows: list[list[tuple[int, int, int, int, int]]] = [[] for _ in places]
        for number, part in enumerate(parts):
            region = self._add(part)
            offsets, tables = part.header.offsets(), part.read_hashes(core)
            for layer, of_layer in enumerate(places):
                for tier, place in enumerate(of_layer):
                    state, table = part.layers[layer].tiers[tier], tables[layer][tier]
                    if not state.stored:
                        continue
                    page_bytes, heads = part.page_bytes[layer][tier], table.shape[1]
                    start = offsets[tensor_name(layer, tier)]
                    self._expect(region, start, page_bytes, table)
                    needed = np.zeros(state.stored, bool)
                    needed[place.index[place.part == number]] = True
                    for at, first, count, wanted in stretches(state.runs, needed):
                        if wanted:
                            offset = start + at * heads * page_bytes
                            rows[layer].append((tier, first, count, region, offset))
        self._pieces = [self._pieces_of(sorted(of_layer)) for of_layer in rows]

    def _add(self, part: Part) -> int:
        """Map a file."""
        region, fd = ctypes.c_uint64(), part.file.fileno()
        if sys.platform == "win32":
            import msvcrt

            fd = msvcrt.get_osfhandle(fd)
        with self._handle as mapping, self._core.frame() as frame:
            status = self._core.mapping_add_file(
                mapping, fd, part.header.file_bytes, frame.ref(region)
            )
            self._core.check(status)
        return region.value

    def _expect(self, region: int, offset: int, page_bytes: int, table: Any) -> None:
        """Say what pages must hash to."""
        with self._handle as mapping, self._core.frame() as frame:
            status = self._core.mapping_expect(
                mapping,
                region,
                offset,
                page_bytes,
                frame.put(address_of(table), table.nbytes),
                table.size,
            )
            self._core.check(status)

    def _pieces_of(self, rows: list[tuple[int, int, int, int, int]]) -> Any:
        """Make an array of abi.MappedRows."""
        struct = self._core.structs["MappedRows"]
        size = ctypes.sizeof(struct)
        return (struct * len(rows))(*[struct(size, *row) for row in rows])

    def arguments(self, layer: int) -> tuple[int, int, int]:
        """Return what `cache_set_state` wants to know of a layer."""
        pieces = self._pieces[layer]
        return self._handle.pointer, ctypes.addressof(pieces), len(pieces)


def stretches(
    runs: tuple[tuple[int, int], ...], needed: np.ndarray[Any, Any]
) -> Iterator[tuple[int, int, int, bool]]:
    """Cut the rows of a file into (place, row, count, needed), each alike throughout."""
    at = 0
    for first, count in runs:
        flags = needed[at : at + count]
        edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), count]
        for start, end in pairwise(edges):
            yield at + start, first + start, end - start, bool(flags[start])
        at += count
