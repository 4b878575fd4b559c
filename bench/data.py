"""The data that every contestant gets, made once and mapped by each: see `make`.

Called by run.py, which makes it, and by worker.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workload import Data, Floats, Job, attend_exactly

SEED = 20260101
CHUNK = 4096  # tokens


def make(jobs: Iterable[Job], folder: Path) -> None:
    """Write keys and values for each shape among `jobs`, and other memory to read.

    They are as models have them: a few key channels with large offsets, and loud tokens. A job
    with fewer tokens takes the first ones.
    """
    longest: dict[tuple[int, int], int] = {}
    cold_bytes = 0
    for job in jobs:
        shape = job.kv_heads, job.head_dim
        longest[shape] = max(longest.get(shape, 0), job.tokens, job.new)
        cold_bytes = max(cold_bytes, job.cold_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    for shape, tokens in longest.items():
        _make_rows(tokens, *shape, folder)
    np.save(folder / "other.npy", np.ones(cold_bytes // 8))


def _make_rows(tokens: int, kv_heads: int, dim: int, folder: Path) -> None:
    random = np.random.default_rng(SEED)
    offsets = np.zeros((kv_heads, dim), np.float32)
    spread = np.ones((kv_heads, dim), np.float32)
    for head in range(kv_heads):
        channels = random.choice(dim, 4, replace=False)
        offsets[head, channels] = random.uniform(8, 16, 4) * random.choice([-1.0, 1.0], 4)
        spread[head, channels] = 3
    loudness = np.exp(0.7 * random.standard_normal((1, kv_heads, dim))).astype(np.float32)
    keys, values = (
        np.lib.format.open_memmap(path, "w+", np.float32, (tokens, kv_heads, dim))
        for path in _paths(kv_heads, dim, folder)
    )
    for start in range(0, tokens, CHUNK):
        part = slice(start, min(start + CHUNK, tokens))
        shape = keys[part].shape
        keys[part] = random.standard_normal(shape, dtype=np.float32) * spread + offsets
        loud = np.where(random.random((shape[0], 1, 1)) < 0.01, np.float32(4), np.float32(1))
        values[part] = random.standard_normal(shape, dtype=np.float32) * loudness * loud


def _paths(kv_heads: int, dim: int, folder: Path) -> list[Path]:
    return [folder / f"{what}-{kv_heads}x{dim}.npy" for what in ("keys", "values")]


def load(job: Job, folder: Path) -> Data:
    """Return the data of a job: token-major views of what was made, which nobody writes to."""
    tokens = max(job.tokens, job.new) if job.appends else job.tokens
    keys, values = (_map(path)[:tokens] for path in _paths(job.kv_heads, job.head_dim, folder))
    random = np.random.default_rng(SEED)
    query = random.standard_normal((job.queries, job.heads, job.head_dim), dtype=np.float32)
    return Data(query, keys, values)


def _map(path: Path) -> NDArray[Any]:
    # Copy on write: to libraries that ask whether they may write, these are arrays like others.
    return np.asarray(np.load(path, mmap_mode="c"))


def right_answer(job: Job, data: Data, folder: Path) -> Floats:
    """Return float64 attention over the data, computed by the first that asks."""
    return _kept(job, folder / "answer", lambda: attend_exactly(job, data))


def right_logits(job: Job, exact: Callable[[], Floats], folder: Path) -> Floats:
    """Return what a model says when it computes in float64, computed by the first that asks."""
    return _kept(job, folder / "logits", exact)


def _kept(job: Job, path: Path, make: Callable[[], NDArray[Any]]) -> Floats:
    shape = job.tokens, job.queries, job.new, job.heads, job.kv_heads, job.head_dim
    path = path.with_name(f"{path.name}-{'-'.join(map(str, shape))}.npy")
    if not path.exists():
        np.save(path, make())
    return np.asarray(np.load(path))


def reader(folder: Path) -> Callable[[], None]:
    """Return what reads so much other memory that nothing else is left in the CPU's caches."""
    other = _map(folder / "other.npy")
    return lambda: (other.sum(), None)[1]
