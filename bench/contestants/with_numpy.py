"""What one writes first: float32 arrays and matrix products, a kv head at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from workload import Data, Floats, Job, heads_first

KVS = {"f32": 32.0}
CASES = ("decode", "prefill", "append", "stream", "overhead")
TOLERANCE = {"f32": 1e-5}


def versions() -> dict[str, Any]:
    return {"numpy": np.__version__}


class Entry:
    def __init__(self, job: Job, data: Data) -> None:
        self.job = job
        self.caches = job.caches(32)
        keys, values = heads_first(data.keys), heads_first(data.values)
        self._all = [(keys.copy(), values.copy()) for _ in range(self.caches)]
        self.bytes: float = keys.nbytes + values.nbytes
        self._new = keys[:, : job.new].copy(), values[:, : job.new].copy()
        group = job.heads // job.kv_heads
        query = data.query.reshape(job.queries, job.kv_heads, group, job.head_dim)
        self._query = (query * np.float32(job.scale)).transpose(1, 2, 0, 3)
        visible = job.tokens - job.queries + np.arange(job.queries)
        hidden = np.arange(job.tokens) > visible[:, None]
        self._mask = np.where(hidden, -np.inf, 0).astype(np.float32)
        self._at, self._first = 0, np.empty(0, np.float32)
        self.run = self._append if job.appends else self._attend

    def prepare(self) -> None:
        if self._at + self.job.new > self.job.past:
            self._at = 0

    def _append(self) -> None:
        new = slice(self._at, self._at + self.job.new)
        for keys, values in self._all:
            keys[:, new], values[:, new] = self._new
        self._at += self.job.new

    def _attend(self) -> None:
        outputs = [self._one(keys, values) for keys, values in self._all]
        self._first = outputs[0]

    def _one(self, keys: Floats, values: Floats) -> Floats:
        job = self.job
        out = np.empty_like(self._query)
        for head in range(job.kv_heads):
            logits = self._query[head].reshape(-1, job.head_dim) @ keys[head].T
            if job.queries > 1:
                logits.reshape(-1, *self._mask.shape)[:] += self._mask
            logits -= logits.max(axis=1, keepdims=True)
            np.exp(logits, out=logits)
            total = logits.sum(axis=1, keepdims=True)
            out[head] = (logits @ values[head] / total).reshape(out[head].shape)
        return out

    def output(self) -> Floats:
        job = self.job
        return self._first.transpose(2, 0, 1, 3).reshape(job.queries, job.heads, job.head_dim)

    def stored(self) -> tuple[Floats, Floats]:
        keys, values = self._all[0]
        return keys.transpose(1, 0, 2), values.transpose(1, 0, 2)
