"""Damages snapshots in every way that a disk, a crash or a bad writer could.

`python tests/snapshot_damage.py 100000` runs the long search by itself.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import kvz
from kvz._container import encode, read_header
from kvz._core import load as load_core
from kvz._parts import hash_text
from support import queries, stream

# Every tier, in pages as small as they come.
SMALL: dict[str, Any] = {
    "num_kv_heads": 1,
    "head_dim": 16,
    "max_tokens": 100,
    "tail_length": 8,
    "migration_batch": 8,
    "sink_tokens": 2,
    "store_precision": ("q8", "q4"),
}


def small_cache(core: str | None = None, tokens: int = 70) -> kvz.TwoTierCache:
    """A cache that has tokens in every tier."""
    cache = kvz.TwoTierCache(**SMALL, core=core)
    cache.append(*stream(cache.config, tokens))
    cache.pin(4, 6)
    cache.evict([*range(6, 20), *range(22, 40)])
    return cache


def checksum(data: Any) -> str:
    return hash_text(load_core("native"), data)


def signed(raw: bytes, change: Any) -> bytes:
    """Change the description or the pages of a file, and make all its checksums fit again."""
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.seek(0)
        header = read_header(file, "", checksum)
    about, tensors = copy.deepcopy(header.about), dict(header.tensors)
    body = bytearray(raw[header.nbytes :])
    about, tensors, body = change(about, tensors, body)
    return encode(about, tensors, checksum) + bytes(body)


def with_random_pages(raw: bytes, rng: np.random.Generator) -> bytes:
    """Replace all pages by noise, under checksums that fit."""

    def change(about: Any, tensors: Any, body: Any) -> Any:
        at, hashes = 0, []
        for name, tensor in tensors.items():
            if name == "hashes":
                continue
            size = tensor.shape[-1]
            for _ in range(tensor.nbytes // size):
                page = rng.integers(0, 256, size, np.uint8)
                body[at : at + size] = page.tobytes()
                hashes.append(int(checksum(page), 16))
                at += size
        table = np.array(hashes, "<u8")
        body[at:] = table.tobytes()
        about["hashes"] = checksum(table)
        return about, tensors, body

    return signed(raw, change)


NUMBERS = [0, 1, 2, 3, 63, 64, 2**31, 2**32, 2**40, 2**48, 2**62, 2**63 - 1, 2**63, 2**70, -1, 1.5]
VALUES = [*NUMBERS, None, True, "", "q4", "two_tier", [], {}, [[0, 1]], [[1, 0]], "\ud800", "é"]


def with_other_description(raw: bytes, rng: np.random.Generator) -> bytes:
    """Replace, remove or repeat something in the description, under checksums that fit."""

    def change(about: Any, tensors: Any, body: Any) -> Any:
        node = about
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = keys[rng.integers(len(keys))]
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.9:
                node = node[key]
                continue
            if rng.random() < 0.1:
                del node[key]
            elif isinstance(node[key], int) and rng.random() < 0.5:
                node[key] = int(node[key]) + int(rng.integers(-3, 4))
            else:
                node[key] = VALUES[rng.integers(len(VALUES))]
            break
        return about, tensors, body

    return signed(raw, change)


def with_other_bytes(raw: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite, cut, repeat or insert bytes."""
    data = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        near_start = rng.random() < 0.6
        at = int(rng.integers(0, min(len(data), 1500) if near_start else len(data)))
        size = int(rng.integers(1, 1 << int(rng.integers(1, 10))))
        kind = rng.integers(5)
        if kind == 0:
            data[at] ^= int(rng.integers(1, 256))
        elif kind == 1:
            data[at : at + size] = rng.integers(0, 256, size, np.uint8).tobytes()
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[max(0, at - size) : at]
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


def attempt(path: Path, core: str | None, digest: str, trusted: bool, mmap: bool) -> str:
    """Load a file and use what came of it; say what happened.

    A file whose checksums were made to fit may load, and must then be safe to use.
    """
    try:
        cache = kvz.TwoTierCache.load(path, core=core, mmap=mmap)
        if mmap:
            cache.digest()
    except kvz.SnapshotError as error:
        return type(error).__name__ if str(error) else "without a message"
    with cache:
        if not trusted:
            assert cache.digest() == digest
            return "intact"
        cache.check()
        cache.get_all_kv()
        cache.attend(queries(cache.config))
        with suppress(kvz.KvzError):
            cache.append(*stream(cache.config, 30))
        cache.trim(3)
        cache.digest()
    return "loaded"


def search(count: int, seed: int, core: str | None = None) -> dict[str, int]:
    """Try `count` damaged files."""
    rng = np.random.default_rng(seed)
    outcomes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, small_cache(core) as cache:
        path = Path(folder, "cache.kvz")
        cache.save(path, fingerprint={"model": "m"})
        raw, digest = path.read_bytes(), cache.digest()
        for _ in range(count):
            kind = rng.random()
            if kind < 0.5:
                data, trusted = with_other_bytes(raw, rng), False
            elif kind < 0.95:
                data, trusted = with_other_description(raw, rng), True
            else:
                data, trusted = with_random_pages(raw, rng), True
            path.write_bytes(data)
            mmap = core != "wasm" and bool(rng.integers(2))
            outcome = attempt(path, core, digest, trusted, mmap)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


if __name__ == "__main__":
    print(search(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
