"""OpenVINO's stateful model on the CPU: scaled dot product attention whose cache is in its state.

What runs where a model is not served in batches; only the variants that are faster than
PagedAttention somewhere. A step appends its token, so the state is set back before it has grown
by 2 %. What it holds is the plugin's own affair, so errors are against the data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset6, opset13

from workload import Data, Floats, Job, heads_first

KVS = {"bf16": 16.0}
CASES = ("decode",)
TOLERANCE = {"bf16": 3e-2}


def versions() -> dict[str, Any]:
    return {"openvino": ov.__version__.split("-")[0]}


def integers(*values: int) -> Any:
    return opset13.constant(np.array(values, np.int64))


class Entry:
    def __init__(self, job: Job, data: Data) -> None:
        self.job = job
        self.caches = job.caches(KVS[job.kv])
        self.bytes: float = job.bytes(KVS[job.kv])
        options = {
            "INFERENCE_NUM_THREADS": job.threads,
            "INFERENCE_PRECISION_HINT": ov.Type.bf16,
            "KV_CACHE_PRECISION": ov.Type.bf16,
            "ENABLE_CPU_PINNING": False,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        model = ov.Core().compile_model(self._model(), "CPU", options)
        self._request = model.create_infer_request()
        last = slice(job.past - 1, job.past)
        given = {"query": data.query, "keys": data.keys[last], "values": data.values[last]}
        for name, rows in given.items():
            self._request.set_tensor(name, ov.Tensor(np.ascontiguousarray(rows[None])))
        self._request.set_tensor("beam_idx", ov.Tensor(np.zeros(1, np.int32)))
        self._past = {
            name: ov.Tensor(heads_first(rows[: job.past - 1])[None])
            for name, rows in (("keys", data.keys), ("values", data.values))
        }
        self._steps, self._most = 0, max(1, job.past // 50)
        self._set_back()

    def _model(self) -> ov.Model:
        job, sinks, results, parameters = self.job, [], [], []
        counts = {"query": job.heads, "keys": job.kv_heads, "values": job.kv_heads}
        for name, heads in counts.items():
            parameters.append(opset13.parameter([1, -1, heads, job.head_dim], np.float32, name))
            parameters[-1].output(0).set_names({name})
        beam = opset13.parameter([-1], np.int32, "beam_idx")
        beam.output(0).set_names({"beam_idx"})
        query, *rows = (opset13.transpose(one, integers(0, 2, 1, 3)) for one in parameters)
        for i in range(self.caches):
            present = []
            for name, new in zip(("keys", "values"), rows, strict=True):
                whole, sink = self._appended(f"{name}{i}", new, beam)
                sinks.append(sink)
                present.append(self._repeated(whole))
            attended = opset13.scaled_dot_product_attention(query, *present)
            result = opset13.result(opset13.transpose(attended, integers(0, 2, 1, 3)))
            result.output(0).set_names({f"out{i}"})
            results.append(result)
        return ov.Model(results, sinks, [*parameters, beam], "attention")

    def _appended(self, name: str, new: Any, beam: Any) -> tuple[Any, Any]:
        job = self.job
        about = ov.op.util.VariableInfo()
        about.data_shape = ov.PartialShape([-1, job.kv_heads, -1, job.head_dim])
        about.data_type, about.variable_id = ov.Type.f32, name
        variable = ov.op.util.Variable(about)
        shape = integers(1, job.kv_heads, 0, job.head_dim)
        empty = opset13.broadcast(opset13.constant(np.float32(0)), shape)
        held = opset6.read_value(empty, variable)
        chosen = opset13.gather(held, beam, opset13.constant(0, np.int64), 0)
        whole = opset13.concat([chosen, new], 2)
        return whole, opset6.assign(whole, variable)

    def _repeated(self, rows: Any) -> Any:
        """Give each query head its kv head: the pattern that the plugin takes for groups."""
        job = self.job
        tokens = opset13.gather(
            opset13.shape_of(rows), integers(2), opset13.constant(0, np.int64), 0
        )
        group = integers(1, job.kv_heads, job.heads // job.kv_heads)
        shape = opset13.concat([group, tokens, integers(job.head_dim)], 0)
        grouped = opset13.unsqueeze(rows, integers(2))
        wide = opset13.broadcast(grouped, shape, broadcast_spec="BIDIRECTIONAL")
        return opset13.reshape(wide, integers(0, job.heads, -1, job.head_dim), True)

    def _set_back(self) -> None:
        self._request.reset_state()
        for state in self._request.query_state():
            state.state = self._past["keys" if state.name.startswith("keys") else "values"]
        self._steps = 0

    def prepare(self) -> None:
        if self._steps >= self._most:
            self._set_back()
            self.run()  # which moves what was set to where it stays

    def run(self) -> None:
        self._request.infer()
        self._steps += 1

    def output(self) -> Floats:
        return np.array(self._request.get_tensor("out0").data)

    def stored(self) -> None:
        return None
