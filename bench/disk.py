"""Saving and loading beside plain writes and reads of the same bytes, and a cache that spills.

    python bench/disk.py [megabytes] [folder]

Every line is of one run, one after the other on the same file system; files are synced.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import kvz

HEADS, DIM, ROUNDS = 8, 128, 3
BATCH_BYTES = 1 << 20
TOKENS_PER_APPEND = 512


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def filled(tokens: int, pool: kvz.BufferPool | None = None) -> kvz.TwoTierCache:
    cache = kvz.TwoTierCache(num_kv_heads=HEADS, head_dim=DIM, max_tokens=tokens, pool=pool)
    rows = np.random.default_rng(0).standard_normal((TOKENS_PER_APPEND, HEADS, DIM))
    rows = rows.astype(np.float32)
    for _ in range(tokens // TOKENS_PER_APPEND):
        cache.append(rows, rows)
    return cache


def plain_write(path: Path, data: memoryview) -> None:
    """Write, sync and rename, as `save` does."""
    draft = path.with_suffix(".draft")
    with open(draft, "wb", buffering=0) as file:
        for start in range(0, len(data), BATCH_BYTES):
            file.write(data[start : start + BATCH_BYTES])
        os.fsync(file.fileno())
    os.replace(draft, path)


def plain_read(path: Path) -> None:
    """Read into new memory, as `load` does."""
    target = memoryview(np.empty(path.stat().st_size, np.uint8))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(target[:BATCH_BYTES]):
            target = target[count:]


def files(cache: kvz.TwoTierCache, folder: Path) -> None:
    path, other = folder / "cache.kvz", folder / "plain"
    nbytes = cache.save(path)
    data = memoryview(path.read_bytes())
    print(f"{nbytes / 1e9:.2f} GB of pages          ", "  ".join(f"run {i}" for i in range(ROUNDS)))
    table: dict[str, list[float]] = {}
    loaded: list[kvz.TwoTierCache] = []

    def note(what: str, work: Callable[[], Any]) -> None:
        table.setdefault(what, []).append(seconds(work))

    for _ in range(ROUNDS):
        note("plain write", lambda: plain_write(other, data))
        other.unlink()
        path.unlink()
        note("save", lambda: cache.save(path))
        note("plain read", lambda: plain_read(path))
        note("load", lambda: loaded.append(kvz.TwoTierCache.load(path)))
        loaded.pop().close()
        note("load, mapped", lambda: loaded.append(kvz.TwoTierCache.load(path, mmap=True)))
        note("  its first attend", lambda: loaded[0].attend(np.ones((32, DIM), np.float32)))
        note("  its second attend", lambda: loaded[0].attend(np.ones((32, DIM), np.float32)))
        loaded.pop().close()
    for what, times in table.items():
        print(f"{what:28}", "  ".join(f"{t:5.3f}" for t in times), "s")
    for mine, plain in (("save", "plain write"), ("load", "plain read")):
        rates = [b / a for a, b in zip(table[mine], table[plain], strict=True)]
        print(f"{mine}, of the speed of a {plain}: ", "  ".join(f"{rate:.0%}" for rate in rates))


def spill(tokens: int, nbytes: int, folder: Path) -> None:
    """A quarter of the memory, the rest in a file."""
    pool = kvz.BufferPool(max_bytes=nbytes // 4, spill=folder / "spill")
    query = np.ones((32, DIM), np.float32)
    made: list[kvz.TwoTierCache] = []
    for what, where in (("in memory", None), ("a quarter in memory", pool)):
        append = seconds(lambda where=where: made.append(filled(tokens, where)))
        made[-1].attend(query)
        times = [seconds(lambda: made[-1].attend(query)) for _ in range(5)]
        print(f"{what:28} append {append:.2f} s, attend {min(times) * 1e3:.0f} ms")
    assert made[0].digest() == made[1].digest()
    print(f"in the file: {pool.stats().bytes_spilled / 1e9:.2f} GB")


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with kvz.TwoTierCache(num_kv_heads=HEADS, head_dim=DIM) as one:
        per_token = one.config.store_bytes_per_token
    tokens = megabytes * 1_000_000 // per_token // TOKENS_PER_APPEND * TOKENS_PER_APPEND
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        with filled(tokens) as cache:
            nbytes = cache.nbytes
            files(cache, Path(folder))
        kvz.default_pool().clear()
        spill(tokens, nbytes, Path(folder))


if __name__ == "__main__":
    main()
