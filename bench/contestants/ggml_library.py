"""The C functions of ggml that a flash attention takes, out of llama-cpp-python's package.

Called by with_ggml.py.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
from pathlib import Path
from typing import Any

Pointer, Size = c.c_void_p, c.c_size_t


class InitParams(c.Structure):
    _fields_ = (("mem_size", Size), ("mem_buffer", Pointer), ("no_alloc", c.c_bool))


class Plan(c.Structure):
    _fields_ = (
        ("work_size", Size),
        ("work_data", Pointer),
        ("n_threads", c.c_int),
        ("threadpool", Pointer),
        ("abort_callback", Pointer),
        ("abort_data", Pointer),
        ("use_ref", c.c_bool),
    )


BASE: dict[str, tuple[Any, ...]] = {
    "ggml_init": (Pointer, InitParams),
    "ggml_free": (None, Pointer),
    "ggml_new_tensor_1d": (Pointer, Pointer, c.c_int, c.c_int64),
    "ggml_new_tensor_2d": (Pointer, Pointer, c.c_int, *[c.c_int64] * 2),
    "ggml_new_tensor_3d": (Pointer, Pointer, c.c_int, *[c.c_int64] * 3),
    "ggml_view_3d": (Pointer, Pointer, Pointer, *[c.c_int64] * 3, *[Size] * 3),
    "ggml_permute": (Pointer, Pointer, Pointer, *[c.c_int] * 4),
    "ggml_flash_attn_ext": (Pointer, *[Pointer] * 5, *[c.c_float] * 3),
    "ggml_set_rows": (Pointer, *[Pointer] * 4),
    "ggml_get_data": (Pointer, Pointer),
    "ggml_row_size": (Size, c.c_int, c.c_int64),
    "ggml_new_graph_custom": (Pointer, Pointer, Size, c.c_bool),
    "ggml_build_forward_expand": (None, Pointer, Pointer),
    "ggml_quantize_chunk": (Size, c.c_int, Pointer, Pointer, *[c.c_int64] * 3, Pointer),
    "ggml_tensor_overhead": (Size,),
    "ggml_version": (c.c_char_p,),
}
CPU: dict[str, tuple[Any, ...]] = {
    "ggml_cpu_init": (None,),
    "ggml_graph_plan": (Plan, Pointer, c.c_int, Pointer),
    "ggml_graph_compute": (c.c_int, Pointer, c.POINTER(Plan)),
}


class Library:
    """Its functions, without their prefix; calling `load` finds the package's shared objects."""

    def __init__(self, base: c.CDLL, cpu: c.CDLL) -> None:
        for library, signatures in ((base, BASE), (cpu, CPU)):
            for name, (returned, *taken) in signatures.items():
                function = getattr(library, name)
                function.restype, function.argtypes = returned, taken
                setattr(self, name.removeprefix("ggml_"), function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml has no function {name!r} in the table")


def load() -> Library:
    found = importlib.util.find_spec("llama_cpp")  # found, not imported: only ggml is needed
    if found is None or not found.submodule_search_locations:
        raise ImportError("No module named 'llama_cpp'")
    folder = Path(next(iter(found.submodule_search_locations)), "lib")
    opened = []
    for stem in ("ggml-base", "ggml-cpu"):
        files = sorted(path for path in folder.glob(f"*{stem}*") if not path.is_symlink())
        if not files:
            raise ImportError(f"llama_cpp has no library {stem}")
        opened.append(c.CDLL(str(files[0]), mode=c.RTLD_GLOBAL))
    library = Library(*opened)
    library.cpu_init()
    return library
