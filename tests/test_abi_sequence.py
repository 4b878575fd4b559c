"""The functions of the ABI about several caches: a caller's mistake is a status, never a crash."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

import kvz
from kvz import arrays
from support import make, rows, stream, unchanged


class Raw:
    """Two caches, called without the checks of the Python package."""

    def __init__(self, core: str) -> None:
        self.caches = [make(core, max_tokens=100), make(core, max_tokens=100)]
        for cache in self.caches:
            cache.append(*stream(cache.config, 60))
        self.core = self.caches[0]._core
        self.pointers = [cache._handle.pointer for cache in self.caches]
        self.failed = ctypes.c_uint64(99)

    def status(self, code: int) -> str:
        return {v: k for k, v in self.core.enums["Status"].items()}[code]

    def many(self, function: str, name: str, **columns: Any) -> str:
        """Call on two good items, but for `columns` of the second."""
        items = np.zeros(2, np.dtype(self.core.structs[name]))
        items["size_bytes"] = items.itemsize
        items["cache"] = self.pointers
        data = rows(4, 2, 32, 0)
        with self.core.frame() as frame:
            at = frame.out(arrays.address_of(data), data.nbytes)
            for column in {"query", "out", "keys", "values"} & set(items.dtype.names):
                items[column] = at
            for column, value in {"tokens": 1, "query_tokens": 1, "query_heads": 2}.items():
                if column in items.dtype.names:
                    items[column] = value
            for column, value in columns.items():
                items[column][1] = value
            put = frame.put(arrays.address_of(items), items.nbytes)
            code = getattr(self.core, function)(put, 2, frame.ref(self.failed))
        return self.status(code)


@pytest.fixture
def raw(core: Any) -> Raw:
    return Raw(core)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, "ok"),
        ({"size_bytes": 8}, "abi_mismatch"),
        ({"cache": 0}, "invalid_argument"),
        ({"query": 0}, "invalid_argument"),
        ({"out": 0}, "invalid_argument"),
        ({"query_heads": 3}, "invalid_argument"),
        ({"query_heads": 0}, "invalid_argument"),
        ({"query_tokens": 0}, "ok"),
        ({"query_tokens": 2**32 - 1, "query_heads": 0}, "invalid_argument"),
    ],
)
def test_attend_many_refuses(raw, columns, expected):
    with unchanged(*raw.caches):
        assert raw.many("attend_many", "AttendItem", **columns) == expected
    if expected != "ok":
        assert raw.failed.value == 1


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"size_bytes": 200}, "abi_mismatch"),
        ({"cache": 0}, "invalid_argument"),
        ({"keys": 0}, "invalid_argument"),
        ({"values": 0}, "invalid_argument"),
        ({"tokens": 2**60}, "invalid_argument"),
    ],
)
def test_append_many_refuses(raw, columns, expected):
    with unchanged(*raw.caches):
        assert raw.many("append_many", "AppendItem", **columns) == expected
    assert raw.failed.value == 1


def test_no_items_are_fine_and_too_many_are_not(raw):
    core = raw.core
    with core.frame() as frame:
        failed = frame.ref(raw.failed)
        items = frame.put(arrays.address_of(np.zeros(64, np.uint8)), 64)
        for function in (core.attend_many, core.append_many):
            assert raw.status(function(items, 0, failed)) == "ok"
            assert raw.status(function(items, 2**63, failed)) == "out_of_memory"


def test_runs_and_pins_fit_into_what_is_given(raw):
    """As many as there is room for, and always how many there are."""
    core, cache, pointer = raw.core, raw.caches[0], raw.pointers[0]
    for start in (5, 15, 25):
        cache.pin(start, start + 3)
    cache.append(*stream(cache.config, 300))
    for function, wanted in (
        (core.cache_runs, [(0, 0), (5, 8), (15, 18), (25, 28)]),
        (core.cache_pins, [(5, 8), (15, 18), (25, 28)]),
    ):
        for capacity in range(len(wanted) + 1):
            out, count = np.full((6, 2), 77, np.uint64), ctypes.c_uint64()
            with core.frame() as frame:
                target = frame.ref((ctypes.c_uint64 * 12).from_buffer(out)) if capacity else 0
                assert function(pointer, target, capacity, frame.ref(count)) == 0
            assert count.value >= len(wanted)
            assert [tuple(map(int, pair)) for pair in out[:capacity]] == wanted[:capacity]
            assert (out[capacity:] == 77).all()


@pytest.mark.parametrize(
    "ranges", [[(9, 8)], [(5, 6), (5, 6)], [(10, 12), (8, 9)], [(0, 2**63)], [(2**63, 2**64 - 1)]]
)
def test_ranges_out_of_order_are_refused(raw, ranges):
    core = raw.core
    array = np.array(ranges, np.uint64)
    with unchanged(raw.caches[0]), core.frame() as frame:
        put = frame.put(arrays.address_of(array), array.nbytes)
        status = core.cache_evict(raw.pointers[0], put, len(ranges))
        assert raw.status(status) == "invalid_argument"


def test_pins_out_of_range_are_refused(raw):
    core, pointer = raw.core, raw.pointers[0]
    with unchanged(*raw.caches):
        for start, stop in ((5, 4), (0, 2**64 - 1), (2**64 - 2, 2**64 - 1), (0, 2**48)):
            assert raw.status(core.cache_pin(pointer, start, stop)) == "invalid_argument"
        for start, stop in ((9, 3), (0, 2**64 - 1)):
            assert raw.status(core.cache_unpin(pointer, start, stop)) == "invalid_argument"
        assert core.cache_unpin(pointer, 3, 3) == core.cache_unpin(pointer, 0, 2**48 - 1) == 0


def test_only_a_fork_can_be_restored(raw, core):
    """Of the same configuration and pool; restoring a cache from itself does nothing."""
    foreign = make(core, pool=kvz.BufferPool(core=core), max_tokens=100)
    other = make(core, max_tokens=101)
    with unchanged(*raw.caches):
        for cache in (foreign, other):
            status = raw.core.cache_restore(raw.pointers[0], cache._handle.pointer)
            assert raw.status(status) == "invalid_argument"
        assert raw.core.cache_restore(raw.pointers[0], raw.pointers[0]) == 0
        for length in (61, 2**64 - 2):
            assert raw.status(raw.core.cache_cut(raw.pointers[0], length)) == "invalid_argument"
