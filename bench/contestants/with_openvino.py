"""OpenVINO's PagedAttention on the CPU, the operation under its servers: one node per cache.

Blocks of 32 tokens; keys are quantized by channel in a block, values by token. The step appends
its tokens, too. What the blocks hold is the plugin's own affair, so errors are against the data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op import _PagedAttentionExtension

from workload import Data, Floats, Job

KVS = {"bf16": 16.0, "u8": 8.5, "u4": 4.5}
CASES = ("decode", "prefill", "overhead")
TOLERANCE = {"bf16": 3e-2, "u8": 3e-2, "u4": 3e-2}
BLOCK = 32
FILLED = 64  # tokens of the sequences that write what is past
INDICES = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
# What follows the lengths: scale, sliding window, alibi slopes; then features that stay off.
OFF: tuple[Any, ...] = (np.int32(0), "i", "i", "f", "f", np.int32(0), np.int32(0), "f")
OFF += (np.int32(0), "i", "i", "i", "i", "u", "i")
EMPTY = {"i": np.int32, "f": np.float32, "u": np.uint8}


def versions() -> dict[str, Any]:
    return {"openvino": ov.__version__.split("-")[0]}


class Entry:
    def __init__(self, job: Job, data: Data) -> None:
        self.job = job
        self.caches = job.caches(KVS[job.kv], 1 if job.kv == "bf16" else 1 / 4)
        kind = {"bf16": ov.Type.bf16, "u8": ov.Type.u8, "u4": ov.Type.u4}[job.kv]
        options = {
            "INFERENCE_NUM_THREADS": job.threads,
            "INFERENCE_PRECISION_HINT": ov.Type.bf16,
            "KV_CACHE_PRECISION": kind,
            "KEY_CACHE_PRECISION": kind,
            "VALUE_CACHE_PRECISION": kind,
            "ENABLE_CPU_PINNING": False,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        model = ov.Core().compile_model(self._model(), "CPU", options)
        self._request = model.create_infer_request()
        self._make_blocks(model)
        self._fill(data)
        first = job.tokens - job.queries
        self._set(data.query, data.keys[first:], data.values[first:], first, 0)

    def _model(self) -> ov.Model:
        job, parameters, results = self.job, [], []

        def parameter(name: str, shape: list[int], kind: ov.Type) -> Any:
            made = op.parameter(ov.PartialShape(shape), kind, name=name)
            made.output(0).set_names({name})
            parameters.append(made)
            return made

        def constant(value: Any) -> Any:
            empty = isinstance(value, str)
            return op.constant(np.zeros(0, EMPTY[value]) if empty else np.asarray(value))

        wide, narrow = job.heads * job.head_dim, job.kv_heads * job.head_dim
        given = {"query": wide, "key": narrow, "value": narrow}
        rows = [parameter(name, [-1, dim], ov.Type.f32) for name, dim in given.items()]
        indices = [parameter(name, [-1], ov.Type.i32) for name in INDICES]
        longest = parameter("max_context_len", [], ov.Type.i32)
        for i in range(self.caches):
            blocks = [
                parameter(f"{name}_cache.{i}", [-1] * 4, ov.Type.dynamic)
                for name in ("key", "value")
            ]
            window = [constant(np.float32(job.scale)), constant(np.int32(0)), constant("f")]
            inputs = [*rows, *blocks, *indices, *window, longest, *map(constant, OFF)]
            node = _PagedAttentionExtension([x.output(0) for x in inputs])
            hints = node.get_rt_info()
            for letter in "kv":
                hints[f"num_{letter}_heads"] = job.kv_heads
                hints[f"{letter}_head_size"] = job.head_dim
            result = op.result(node.output(0))
            result.output(0).set_names({f"out{i}"})
            results.append(result)
        return ov.Model(results, parameters, "attention")

    def _make_blocks(self, model: Any) -> None:
        """Give every node its own blocks; the plugin says of what type and shape."""
        self._count = -(-self.job.tokens // BLOCK) + 1
        self._blocks = []
        for given in model.inputs:
            if "_cache." in given.any_name:
                sizes = [given.partial_shape[i].get_length() for i in (1, 2, 3)]
                tensor = ov.Tensor(given.element_type, ov.Shape([self._count, *sizes]))
                self._request.set_tensor(given.any_name, tensor)
                self._blocks.append(tensor)
        used = self.job.tokens / (self._count * BLOCK)
        self.bytes: float = sum(x.byte_size for x in self._blocks) / self.caches * used

    def _fill(self, data: Data) -> None:
        """Write what is past, as short sequences that own neighbouring blocks."""
        job = self.job
        past = job.tokens - job.queries
        for start in range(0, past, FILLED):
            stop = min(past, start + FILLED)
            query = np.zeros((stop - start, job.heads, job.head_dim), np.float32)
            rows = data.keys[start:stop], data.values[start:stop]
            self._set(query, *rows, 0, start // BLOCK)
            self._request.infer()

    def _set(self, query: Floats, keys: Floats, values: Floats, past: int, block: int) -> None:
        count = len(query)
        blocks = -(-(past + count) // BLOCK)
        rows = {"query": query, "key": keys, "value": values}
        self._inputs = {
            name: np.ascontiguousarray(x.reshape(count, -1), dtype=np.float32)
            for name, x in rows.items()
        }
        indices = [[past], [0, count], range(block, block + blocks), [0, blocks]]
        for name, index in zip(INDICES, indices, strict=True):
            self._inputs[name] = np.asarray(index, np.int32)
        self._inputs["max_context_len"] = np.asarray(past + count, np.int32)
        for name, array in self._inputs.items():
            self._request.set_tensor(name, ov.Tensor(array))

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        self._request.infer()

    def output(self) -> Floats:
        return np.array(self._request.get_tensor("out0").data)

    def stored(self) -> None:
        return None
