"""Damaged snapshots: each is refused with a clear error, and nothing crashes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvz
from snapshot_damage import search, small_cache
from support import unchanged


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small snapshot."""
    path = tmp_path / "cache.kvz"
    with small_cache() as cache:
        cache.save(path, fingerprint={"model": "m"})
    return path


def refused(path: Path, data: bytes, **options: Any) -> None:
    """Assert that a file with these bytes cannot be loaded."""
    path.write_bytes(data)
    with pytest.raises(kvz.SnapshotError):
        kvz.TwoTierCache.load(path, **options)


def refused_with_flips(path: Path, places: Iterable[int], *, damaged: Path | None = None) -> None:
    """Assert that `path` cannot be loaded with any one byte of `damaged` flipped."""
    rng = np.random.default_rng(0)
    with open(damaged or path, "r+b", buffering=0) as file:
        for at in places:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ int(rng.integers(1, 256))]))
            with pytest.raises(kvz.SnapshotError):
                kvz.TwoTierCache.load(path)
            file.seek(at)
            file.write(bytes([byte]))


def test_every_flipped_byte_is_detected(saved: Path) -> None:
    """One byte changed, anywhere: header, padding, pages, hashes."""
    digest = kvz.TwoTierCache.load(saved).digest()
    size = saved.stat().st_size
    assert size < 24_000
    refused_with_flips(saved, range(size))
    assert kvz.TwoTierCache.load(saved).digest() == digest


def test_a_flipped_byte_of_an_increment_is_detected(saved: Path) -> None:
    """In a file that continues another, and in rows that it replaced."""
    with small_cache(tokens=75) as cache:
        cache.save(saved, fingerprint={"model": "m"}, incremental=True)
        digest = cache.digest()
    increment = saved.with_name(saved.name + ".1")
    refused_with_flips(saved, range(0, increment.stat().st_size, 5), damaged=increment)
    refused_with_flips(saved, range(0, saved.stat().st_size, 23))
    assert kvz.TwoTierCache.load(saved).digest() == digest


def test_a_flipped_byte_is_detected_on_each_core(saved: Path, core: str) -> None:
    raw = saved.read_bytes()
    for at in range(0, len(raw), 97):
        data = bytearray(raw)
        data[at] ^= 1
        refused(saved, bytes(data), core=core)


def test_a_file_cut_anywhere_or_with_something_added_is_refused(saved: Path) -> None:
    raw = saved.read_bytes()
    for length in [*range(0, 2000, 3), *range(2000, len(raw), 53), len(raw) - 1]:
        refused(saved, raw[:length])
    refused(saved, raw + b"\0")
    refused(saved, raw + raw)


def test_random_damage_never_crashes(core: str) -> None:
    """Also damage whose checksums were made to fit: that may load, and is safe to use then."""
    outcomes = search(1500 if core == "native" else 200, seed=5, core=core)
    assert "without a message" not in outcomes
    assert {"SnapshotError", "CorruptSnapshotError", "loaded"} <= set(outcomes)


def test_sizes_in_a_file_are_not_trusted(saved: Path) -> None:
    """A length or a shape beyond the file costs neither memory nor time."""
    raw = bytearray(saved.read_bytes())
    for length in (len(raw), 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1):
        refused(saved, length.to_bytes(8, "little") + bytes(raw[8:]))


def test_foreign_files_are_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvz"
    empty = b"{}      "
    other = b'{"__metadata__":{"format":"pt"},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    for data in (
        b"",
        b"x",
        b"PK\x03\x04" + b"\0" * 500,
        len(empty).to_bytes(8, "little") + empty,
        len(other).to_bytes(8, "little") + other + b"\0",
        (9).to_bytes(8, "little") + b"[[[[[[[[[" + b"\0" * 10,
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ):
        path.write_bytes(data)
        with pytest.raises(kvz.SnapshotError, match=r"not a snapshot|not one that kvz wrote"):
            kvz.TwoTierCache.load(path)


def test_a_later_version_is_named_as_such(saved: Path) -> None:
    raw = saved.read_bytes()
    saved.write_bytes(raw.replace(b'"version":"1"', b'"version":"2"'))
    with pytest.raises(kvz.SnapshotVersionError, match="version '2'"):
        kvz.TwoTierCache.load(saved)


def test_a_refused_file_leaves_memory_and_caches_alone(saved: Path, core: str) -> None:
    """Whatever was taken for a snapshot that turns out damaged at its end is given back."""
    pool = kvz.BufferPool(core=core)
    with kvz.TwoTierCache(num_kv_heads=1, head_dim=16, pool=pool) as other:
        other.append(np.ones((5, 1, 16)), np.ones((5, 1, 16)))
        before = pool.stats().bytes_in_use
        data = bytearray(saved.read_bytes())
        last_page = data.rindex(b"\0" * 64) if b"\0" * 64 in data else len(data) - 4000
        data[last_page] ^= 1
        with unchanged(other):
            refused(saved, bytes(data), pool=pool)
        assert pool.stats().bytes_in_use == before
