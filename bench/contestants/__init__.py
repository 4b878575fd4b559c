"""One module per library. What each has to have is in workload.Contestant."""

from __future__ import annotations

NAMES = ("kvz", "numpy", "torch", "onnxruntime", "openvino", "ggml", "transformers", "mlx")
NAMES += ("openvino-sdpa", "transformers-dynamic", "transformers-quantized")

#: kvz again: its WebAssembly core, its native kernels for vectors of the same 128 bits, and as the
#: cache of a model of transformers.
VARIANTS = ("kvz-wasm", "kvz-128", "kvz-transformers")

#: Those that do nothing but a forward of a model, of which the first is what others compare with.
FORWARD = ("transformers-dynamic", "transformers-quantized", "kvz-transformers")

#: Module of each: not the library's own name, which it has to import.
MODULES = {name: f"contestants.with_{name.replace('-', '_')}" for name in NAMES + VARIANTS}


def width(kv: str) -> int:
    """Bits per value that a precision is compared at; a pair counts as its wider half."""
    digits = "".join(c if c.isdigit() else " " for c in kv).split()
    return max(int(word) for word in digits if word in ("4", "8", "16", "32"))
