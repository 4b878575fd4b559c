"""transformers' QuantizedCache (quanto) with torch's attention: a step is `update` and SDPA.

Every step unpacks the whole cache, and every 128th packs it anew. Runs where optimum-quanto is
installed, too; the first time, importing this compiles its C++, which takes minutes.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import optimum.quanto  # said to be missing now, not in the middle of a job
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.cache_utils import QuantizedCache

from workload import Data, Floats, Job

KVS = {"int4": 4.5}
CASES = ("decode",)
TOLERANCE = {"int4": 1e-3}
RESIDUAL = 64  # tokens that are not packed yet when the step begins
STEPS = 8  # until the state is set back, well before it packs everything


def compile_now() -> None:
    """Pack and unpack a tensor, for which quanto compiles what it has in C++."""
    row = torch.zeros(1, 128)
    scale = optimum.quanto.MaxOptimizer()(row, optimum.quanto.qint4, 0, 64)
    optimum.quanto.quantize_weight(row, optimum.quanto.qint4, 0, *scale, 64).dequantize()


def versions() -> dict[str, Any]:
    return {name: metadata.version(name) for name in ("transformers", "optimum-quanto")}


class Entry:
    def __init__(self, job: Job, data: Data) -> None:
        torch.set_num_threads(job.threads)
        torch.set_grad_enabled(False)
        self.job = job
        self.caches = job.caches(KVS[job.kv], 1 / 8)
        config = LlamaConfig(
            num_hidden_layers=self.caches,
            num_attention_heads=job.heads,
            num_key_value_heads=job.kv_heads,
            hidden_size=job.heads * job.head_dim,
            head_dim=job.head_dim,
        )
        self._cache = QuantizedCache("quanto", config, nbits=4)
        self._query, keys, values = (
            torch.from_numpy(x).transpose(0, 1).contiguous()[None]
            for x in (data.query, data.keys, data.values)
        )
        packed = job.past - RESIDUAL
        for start, stop in ((0, packed), (packed, job.past - 1)):
            for i in range(self.caches):
                part = (x[:, :, start:stop].contiguous() for x in (keys, values))
                self._cache.update(*part, i)
        self._new = keys[:, :, -1:].clone(), values[:, :, -1:].clone()
        layers = self._cache.layers[: self.caches]
        self._before = [(x, x.keys, x.values, x.cumulative_length) for x in layers]
        row = job.kv_heads * job.head_dim * 2
        self.bytes: float = row * (packed * KVS[job.kv] + RESIDUAL * 32) / 8
        self._steps, self._first, self._held = 0, torch.empty(0), (torch.empty(0),) * 2

    def prepare(self) -> None:
        if self._steps % STEPS == 0:
            for layer, keys, values, length in self._before:
                layer.keys, layer.values, layer.cumulative_length = keys, values, length
        self._steps += 1

    def run(self) -> None:
        for i in reversed(range(self.caches)):
            keys, values = self._cache.update(*self._new, i)
            out = scaled_dot_product_attention(self._query, keys, values, enable_gqa=True)
        self._first, self._held = out, (keys, values)

    def output(self) -> Floats:
        return self._first[0].transpose(0, 1).contiguous().numpy()

    def stored(self) -> tuple[Floats, Floats]:
        keys, values = (x[0].transpose(0, 1).numpy() for x in self._held)
        return keys, values
