"""ggml's flash attention on the CPU, through the libraries inside llama-cpp-python.

Laid out as llama.cpp does it: token-major rows of all kv heads, permuted views, a float16 mask; one
graph with one operation per cache. Appending is ggml_set_rows.
"""

from __future__ import annotations

import ctypes as c
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contestants.ggml_library import InitParams, load
from workload import Data, Floats, Job

KVS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
CASES = ("decode", "prefill", "append", "stream", "overhead")
TOLERANCE = {"f16": 3e-2, "q8_0": 3e-2, "q4_0": 6e-2}  # it adds up in f16, and packs the query
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "i64": 27}
GROUP = 32  # values that share a scale

ggml = load()


def versions() -> dict[str, Any]:
    return {"ggml": (ggml.version() or b"").decode()}


class Entry:
    def __init__(self, job: Job, data: Data) -> None:
        self.job, self._type = job, TYPES[job.kv]
        self.caches = job.caches(KVS[job.kv], 1 if job.appends else 1 / 8)
        self._wide = job.kv_heads * job.head_dim
        self._row = ggml.row_size(self._type, self._wide)
        self.bytes: float = 2 * job.tokens * self._row
        self._context = ggml.init(InitParams(self._memory(), None, False))
        self._graph = ggml.new_graph_custom(self._context, 4096, False)
        self._keys, self._values = [], []
        for _ in range(self.caches):
            for held in (self._keys, self._values):
                held.append(self._new(self._type, self._wide, job.tokens))
        self._at = 0
        (self._build_append if job.appends else self._build_attend)(data)
        self._plan = ggml.graph_plan(self._graph, job.threads, None)
        self._work = np.zeros(self._plan.work_size + 64, np.uint8)
        self._plan.work_data = self._work.ctypes.data

    def __del__(self) -> None:
        ggml.free(self._context)

    def _memory(self) -> int:
        job = self.job
        outputs = job.queries * job.heads * job.head_dim * 4
        each = self.bytes + outputs + 8192 + 16 * ggml.tensor_overhead()
        rows = 2 * 4 * job.new * self._wide
        return int(self.caches * each + rows + outputs + 4 * job.tokens * job.queries + (32 << 20))

    def _new(self, kind: int, *sizes: int) -> Any:
        make = (ggml.new_tensor_1d, ggml.new_tensor_2d, ggml.new_tensor_3d)[len(sizes) - 1]
        return make(self._context, kind, *sizes)

    def _put(self, tensor: Any, array: NDArray[Any]) -> None:
        array = np.ascontiguousarray(array)
        c.memmove(ggml.get_data(tensor), array.ctypes.data, array.nbytes)

    def _build_append(self, data: Data) -> None:
        job = self.job
        sources = []
        for rows in (data.keys, data.values):
            sources.append(self._new(TYPES["f32"], self._wide, job.new))
            self._put(sources[-1], rows[: job.new].reshape(job.new, -1))
        self._where = self._new(TYPES["i64"], job.new)
        for pair in zip(self._keys, self._values, strict=True):
            for target, source in zip(pair, sources, strict=True):
                done = ggml.set_rows(self._context, target, source, self._where)
                ggml.build_forward_expand(self._graph, done)

    def _build_attend(self, data: Data) -> None:
        job = self.job
        query = self._new(TYPES["f32"], job.head_dim, job.heads, job.queries)
        self._put(query, data.query)
        query = ggml.permute(self._context, query, 0, 2, 1, 3)
        mask = self._new(TYPES["f16"], job.tokens, job.queries)
        last = job.tokens - job.queries + np.arange(job.queries)
        hidden = np.arange(job.tokens) > last[:, None]
        self._put(mask, np.where(hidden, -np.inf, 0).astype(np.float16))
        self._outputs = []
        for keys, values in zip(self._keys, self._values, strict=True):
            for tensor, first, rows in (
                (keys, self._keys[0], data.keys),
                (values, self._values[0], data.values),
            ):
                self._fill(tensor, first, rows)
            views = self._view(keys), self._view(values)
            arguments = self._context, query, *views, mask, job.scale, 0.0, 0.0
            self._outputs.append(ggml.flash_attn_ext(*arguments))
            ggml.build_forward_expand(self._graph, self._outputs[-1])

    def _fill(self, tensor: Any, first: Any, rows: Floats) -> None:
        target = ggml.get_data(tensor)
        if tensor == first:
            source = np.ascontiguousarray(rows).ctypes.data
            count = self.job.tokens
            ggml.quantize_chunk(self._type, source, target, 0, count, self._wide, None)
        else:
            c.memmove(target, ggml.get_data(first), self.job.tokens * self._row)

    def _view(self, tensor: Any) -> Any:
        job = self.job
        head = ggml.row_size(self._type, job.head_dim)
        shape = job.head_dim, job.tokens, job.kv_heads
        return ggml.view_3d(self._context, tensor, *shape, self._row, head, 0)

    def prepare(self) -> None:
        if self._at + self.job.new > self.job.past:
            self._at = 0

    def run(self) -> None:
        if self.job.appends:
            self._put(self._where, np.arange(self._at, self._at + self.job.new))
            self._at += self.job.new
        if ggml.graph_compute(self._graph, c.byref(self._plan)) != 0:
            raise RuntimeError("ggml_graph_compute failed")

    def output(self) -> Floats:
        job = self.job
        values = c.c_float * (job.queries * job.heads * job.head_dim)
        return np.array(values.from_address(ggml.get_data(self._outputs[0])), np.float32)

    def stored(self) -> tuple[Floats, Floats]:
        return self._decode(self._keys[0]), self._decode(self._values[0])

    def _decode(self, tensor: Any) -> Floats:
        """Blocks are a float16 scale and its codes; of q4_0, the low nibbles come first."""
        job = self.job
        memory = (c.c_uint8 * (job.tokens * self._row)).from_address(ggml.get_data(tensor))
        raw = np.frombuffer(memory, np.uint8)
        shape = job.tokens, job.kv_heads, job.head_dim
        if job.kv == "f16":
            return raw.view(np.float16).astype(np.float32).reshape(shape)
        blocks = raw.reshape(-1, ggml.row_size(self._type, GROUP))
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        codes = blocks[:, 2:]
        if job.kv == "q4_0":
            codes = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.int8) - 8
        return (codes.view(np.int8) * scales).reshape(shape)
