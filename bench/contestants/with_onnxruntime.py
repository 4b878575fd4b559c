"""onnxruntime's com.microsoft.GroupQueryAttention: one model with one node per cache.

Past and present share one buffer. The step appends its tokens, too: that cannot be left out.
The scales of int8 and int4 are static, per channel, and made from the first of the very data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto

from workload import Data, Floats, Job, heads_first

KVS = {"f32": 32.0, "int8": 8.0, "int4": 4.0}
CASES = ("decode", "prefill", "overhead")
TOLERANCE = {"f32": 1e-4, "int8": 1e-2, "int4": 3e-2}
STORED = {"f32": TensorProto.FLOAT, "int8": TensorProto.INT8, "int4": TensorProto.UINT8}
INT32 = TensorProto.INT32
CALIBRATED = 4096  # tokens
LEVELS = {"int8": 127, "int4": 7}


def versions() -> dict[str, Any]:
    return {"onnxruntime": ort.__version__}


def tensor(name: str, kind: int, shape: list[int]) -> onnx.ValueInfoProto:
    """Describe an input or output of the graph."""
    sizes = onnx.TensorShapeProto(dim=[{"dim_value": size} for size in shape])
    of = onnx.TypeProto.Tensor(elem_type=kind, shape=sizes)
    return onnx.ValueInfoProto(name=name, type=onnx.TypeProto(tensor_type=of))


class Entry:
    def __init__(self, job: Job, data: Data) -> None:
        self.job = job
        self.caches = job.caches(KVS[job.kv])
        self._scales = self._make_scales(data)
        options = ort.SessionOptions()
        options.intra_op_num_threads = job.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        model = self._model().SerializeToString()
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._binding, self._session = session.io_binding(), session
        self._buffers: dict[str, Any] = {}
        for name, rows in (("query", data.query), ("key", data.keys), ("value", data.values)):
            self._bind(name, rows[-job.queries :].reshape(1, job.queries, -1))
        keys, values = self._store(data.keys, "keys"), self._store(data.values, "values")
        self.bytes: float = keys.nbytes + values.nbytes
        for i in range(self.caches):
            self._bind(f"keys{i}", keys, f"new_keys{i}")
            self._bind(f"values{i}", values, f"new_values{i}")
            out = np.zeros((1, job.queries, job.heads * job.head_dim), np.float32)
            self._bind("", out, f"out{i}")

    def _make_scales(self, data: Data) -> dict[str, Floats]:
        if self.job.kv not in LEVELS:
            return {}
        rows = {"keys": data.keys[:CALIBRATED], "values": data.values[:CALIBRATED]}
        return {name: np.abs(x).max(axis=0) / LEVELS[self.job.kv] for name, x in rows.items()}

    def _model(self) -> onnx.ModelProto:
        job = self.job
        wide, narrow = job.heads * job.head_dim, job.kv_heads * job.head_dim
        packed = job.head_dim // 2 if job.kv == "int4" else job.head_dim
        shape, kind = [1, job.kv_heads, job.tokens, packed], STORED[job.kv]
        given = {"query": wide, "key": narrow, "value": narrow}
        inputs = [tensor(n, TensorProto.FLOAT, [1, job.queries, w]) for n, w in given.items()]
        constants = [
            TensorProto(name="last", data_type=INT32, dims=[1], int32_data=[job.tokens - 1]),
            TensorProto(name="total", data_type=INT32, int32_data=[job.tokens]),
        ]
        scales: list[str] = []
        for name, scale in self._scales.items():
            scales.append(f"scale_{name}")
            each = {"dims": [1, job.kv_heads, 1, job.head_dim], "float_data": scale.ravel()}
            constants.append(TensorProto(name=scales[-1], data_type=TensorProto.FLOAT, **each))
        nodes, outputs = [], []
        for i in range(self.caches):
            past, present = [f"keys{i}", f"values{i}"], [f"new_keys{i}", f"new_values{i}"]
            inputs += [tensor(name, kind, shape) for name in past]
            outputs += [tensor(name, kind, shape) for name in present]
            outputs.append(tensor(f"out{i}", TensorProto.FLOAT, [1, job.queries, wide]))
            tail = [""] * 5 + scales if scales else []  # inputs that are not used, then the scales
            nodes.append(
                onnx.NodeProto(
                    op_type="GroupQueryAttention",
                    domain="com.microsoft",
                    input=["query", "key", "value", *past, "last", "total", *tail],
                    output=[f"out{i}", *present],
                    attribute=self._attributes(),
                )
            )
        graph = onnx.GraphProto(
            name="attention", node=nodes, input=inputs, output=outputs, initializer=constants
        )
        versions_of = {"": 18, "com.microsoft": 1}.items()
        opsets = [onnx.OperatorSetIdProto(domain=d, version=v) for d, v in versions_of]
        return onnx.ModelProto(ir_version=9, graph=graph, opset_import=opsets)

    def _attributes(self) -> list[onnx.AttributeProto]:
        job, make = self.job, onnx.AttributeProto
        counts = {"num_heads": job.heads, "kv_num_heads": job.kv_heads}
        if self._scales:
            counts["kv_cache_bit_width"] = int(KVS[job.kv])
        made = [make(name=name, type=make.INT, i=count) for name, count in counts.items()]
        made.append(make(name="scale", type=make.FLOAT, f=job.scale))
        if self._scales:
            names = "k_quant_type", "v_quant_type"
            made += [make(name=name, type=make.STRING, s=b"PER_CHANNEL") for name in names]
        return made

    def _bind(self, source: str, array: NDArray[Any], target: str = "") -> None:
        value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        self._buffers[target or source] = value
        if source:
            self._binding.bind_ortvalue_input(source, value)
        if target:
            self._binding.bind_ortvalue_output(target, value)

    def _store(self, rows: Floats, name: str) -> NDArray[Any]:
        rows = rows.copy()
        rows[self.job.tokens - self.job.queries :] = 0  # the step brings these
        if not self._scales:
            return heads_first(rows)[None]
        level = LEVELS[self.job.kv]
        codes = np.clip(np.rint(rows / self._scales[name]), -level - 1, level).astype(np.int8)
        codes = np.ascontiguousarray(codes.transpose(1, 0, 2))[None]
        if level > 7:
            return codes
        nibbles = (codes + 8).astype(np.uint8)
        return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def output(self) -> Floats:
        return self._buffers["out0"].numpy()

    def stored(self) -> tuple[Floats, Floats]:
        return self._decode("keys"), self._decode("values")

    def _decode(self, name: str) -> Floats:
        codes = self._buffers[f"new_{name}0"].numpy()[0].transpose(1, 0, 2)
        if not self._scales:
            return codes
        if self.job.kv == "int4":
            pairs = np.stack([codes & 15, codes >> 4], axis=-1).astype(np.int8) - 8
            codes = pairs.reshape(*codes.shape[:2], -1)
        return codes.astype(np.float32) * self._scales[name]
