"""MLX, with mlx-lm's attention over a quantized cache (groups of 64, float32 scales)."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import quantized_scaled_dot_product_attention as quantized_attention

from workload import Data, Floats, Job, heads_first

KVS = {"f32": 32.0, "f16": 16.0, "q8": 9.0, "q4": 5.0}
CASES = ("decode", "overhead")
TOLERANCE = {"f32": 1e-4, "f16": 1e-2, "q8": 1e-3, "q4": 1e-3}
GROUP = 64


def versions() -> dict[str, Any]:
    return {name: metadata.version(name) for name in ("mlx", "mlx-lm")}


class Entry:
    """MLX has no number of threads: the process is bound to as many processors instead."""

    def __init__(self, job: Job, data: Data) -> None:
        self.job = job
        self.caches = job.caches(KVS[job.kv], 1 / 8)
        self._dtype = mx.float16 if job.kv == "f16" else mx.float32
        self._query = mx.array(heads_first(data.query)[None])
        self._all = [(self._store(data.keys), self._store(data.values)) for _ in range(self.caches)]
        self.bytes: float = sum(part.nbytes for half in self._all[0] for part in half)
        self._first = self._query

    def _store(self, rows: Floats) -> tuple[mx.array, ...]:
        array = mx.array(heads_first(rows)[None]).astype(self._dtype)
        parts = (array,)
        if self.job.kv.startswith("q"):
            parts = tuple(mx.quantize(array, group_size=GROUP, bits=int(self.job.kv[1:])))
        mx.eval(parts)
        return parts

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        outputs = []
        for keys, values in self._all:
            outputs.append(self._one(keys, values))
            mx.eval(outputs[-1])
        self._first = outputs[0]

    def _one(self, keys: tuple[mx.array, ...], values: tuple[mx.array, ...]) -> mx.array:
        scale = self.job.scale
        if len(keys) > 1:
            packing = {"group_size": GROUP, "bits": int(self.job.kv[1:])}
            query = self._query * 1  # the function scales its argument in place
            return quantized_attention(query, keys, values, scale=scale, mask=None, **packing)
        query = self._query.astype(self._dtype)
        out = mx.fast.scaled_dot_product_attention(query, keys[0], values[0], scale=scale)
        return out.astype(mx.float32)

    def output(self) -> Floats:
        return np.array(self._first)[0].transpose(1, 0, 2)

    def stored(self) -> tuple[Floats, Floats]:
        keys, values = (self._decode(half) for half in self._all[0])
        return keys, values

    def _decode(self, parts: tuple[mx.array, ...]) -> Floats:
        array = parts[0]
        if len(parts) > 1:
            array = mx.dequantize(*parts, group_size=GROUP, bits=int(self.job.kv[1:]))
        return np.array(array.astype(mx.float32))[0].transpose(1, 0, 2)
