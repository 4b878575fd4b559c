"""Loads the WebAssembly core with wasmtime. Imported by _core.py when that core is asked for.

A wasmtime store belongs to one thread at a time, so every call and every frame holds one lock.
"""

from __future__ import annotations

import ctypes
import json
import struct
import threading
from types import TracebackType
from typing import Any

from kvz._core import Core, Frame
from kvz.errors import CoreError, OutOfMemoryError

try:
    import wasmtime
    from wasmtime import _bindings as bindings
except ImportError as missing:
    raise CoreError("the wasm core needs wasmtime: pip install 'kvz[wasm]'") from missing


# Not public: where it is missing, the public call does.
FAST_CALL: Any = getattr(bindings, "wasmtime_func_call_unchecked", None)
_SLOTS = {"i32": "i12x", "u32": "I12x", "i64": "q8x", "u64": "Q8x", "f32": "f12x", "f64": "d8x"}
_SLOTS |= {"ptr": "I12x", "usize": "I12x"}
SCRATCH_BYTES = 1 << 18
ALIGNMENT = 64  # of everything that the core allocates


class WasmCore(Core):
    """The WebAssembly module, run by wasmtime. Same bits as the native core, one thread."""

    name = "wasm"
    shares_memory = False

    def __init__(self, path: str) -> None:
        try:
            engine = wasmtime.Engine(_config())
            self._store = wasmtime.Store(engine)
            module = wasmtime.Module.from_file(engine, path)
            exports = wasmtime.Instance(self._store, module, []).exports(self._store)
            memory: Any = exports["memory"]
            manifest: Any = exports["kvz_manifest"]
            self._base = ctypes.addressof(memory.data_ptr(self._store).contents)
            text = ctypes.string_at(self.host_address(manifest(self._store)))
        except (wasmtime.WasmtimeError, KeyError, OSError) as error:
            raise CoreError(f"{path} cannot be loaded: {error}") from error
        super().__init__(path, json.loads(text), ctypes.c_uint32)
        self.lock = threading.RLock()
        self.scratch_used = 0  # bytes of the region that frames take small things from
        for name, (restype, *argtypes) in self.abi["functions"].items():
            function = exports[f"kvz_{name}"]
            setattr(self, name, self._bind(function, restype, argtypes))
        self.scratch: int = self.alloc(SCRATCH_BYTES)

    def frame(self) -> Frame:
        """Return a context that copies into the memory of the module and back."""
        return WasmFrame(self)

    def host_address(self, pointer: int) -> int:
        """Return where the memory of the module is in this process; it never moves."""
        return self._base + pointer

    def _bind(self, function: Any, restype: str, argtypes: list[str]) -> Any:
        """Make a Python function of a function of the module."""
        result = self.ctypes[restype]
        if FAST_CALL is not None:
            return self._bind_unchecked(function, result, argtypes)

        def call(*args: Any) -> Any:
            with self.lock:
                try:
                    value = function(self._store, *args)
                except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
                    raise CoreError(f"the wasm core stopped: {error}") from error
            return None if result is None else result(value).value

        return call

    def _bind_unchecked(self, function: Any, result: Any, argtypes: list[str]) -> Any:
        """Do the same without wasmtime's conversions, which cost ten times the call."""
        # Every argument has a slot of 16 bytes; the result comes back in the first.
        layout = struct.Struct("<" + "".join(_SLOTS[kind] for kind in argtypes))
        count = max(1, len(argtypes))
        slots = bindings.wasmtime_val_raw_t * count
        reference, context = ctypes.byref(function._func), self._store._context()
        invoke = FAST_CALL

        def call(*args: Any) -> Any:
            raw = bytearray(16 * count)  # an own one: a finalizer may call between any two lines
            layout.pack_into(raw, 0, *args)
            trap = ctypes.POINTER(bindings.wasm_trap_t)()
            with self.lock:
                at = slots.from_buffer(raw)
                error = invoke(context, reference, at, count, ctypes.byref(trap))
            if error:
                raise CoreError(f"the wasm core stopped: {wasmtime.WasmtimeError._from_ptr(error)}")
            if trap:
                raise CoreError(f"the wasm core stopped: {wasmtime.Trap._from_ptr(trap)}")
            return None if result is None else result.from_buffer(raw).value

        return call


def _config() -> Any:
    """Pin the memory, and keep the compiled module in wasmtime's own cache, where there is one."""
    config = wasmtime.Config()
    try:
        config.cache = True
    except wasmtime.WasmtimeError:  # no home directory, or one that is read-only
        config = wasmtime.Config()
    config.memory_reservation = 1 << 32  # all that a module can address, so it need not move
    config.memory_may_move = False
    return config


class WasmFrame(Frame):
    """Copies what is lent into the memory of the module, and results back at the end."""

    def __init__(self, core: WasmCore) -> None:
        self._core = core
        self._held: list[tuple[int, int]] = []  # (pointer, bytes)
        self._outputs: list[tuple[int, int, int]] = []  # (pointer, address, bytes)

    def __enter__(self) -> Frame:
        self._core.lock.acquire()
        self._scratch_before = self._core.scratch_used
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                base = self._core.host_address(0)
                for pointer, address, nbytes in self._outputs:
                    ctypes.memmove(address, base + pointer, nbytes)
            for pointer, nbytes in self._held:
                self._core.free(pointer, nbytes)
            self._core.scratch_used = self._scratch_before
        finally:
            self._core.lock.release()

    def put(self, address: int, nbytes: int) -> int:
        """Copy `nbytes` in."""
        pointer = self._alloc(nbytes)
        ctypes.memmove(self._core.host_address(pointer), address, nbytes)
        return pointer

    def out(self, address: int, nbytes: int) -> int:
        """Reserve `nbytes`, copied out at the end if nothing was raised."""
        pointer = self._alloc(nbytes)
        self._outputs.append((pointer, address, nbytes))
        return pointer

    def ref(self, value: Any) -> int:
        """Copy a ctypes value in, and out at the end."""
        address, nbytes = ctypes.addressof(value), ctypes.sizeof(value)
        pointer = self.put(address, nbytes)
        self._outputs.append((pointer, address, nbytes))
        return pointer

    def _alloc(self, nbytes: int) -> int:
        """Reserve memory of the module: of the scratch region as long as that has room."""
        start = self._core.scratch_used
        stop = start + max(-(-nbytes // ALIGNMENT) * ALIGNMENT, ALIGNMENT)
        if stop <= SCRATCH_BYTES:
            self._core.scratch_used = stop
            return self._core.scratch + start
        pointer: int = self._core.alloc(nbytes) if nbytes < 1 << 32 else 0
        if not pointer:
            raise OutOfMemoryError(f"the wasm core has no room for {nbytes} more bytes")
        self._held.append((pointer, nbytes))
        return pointer
