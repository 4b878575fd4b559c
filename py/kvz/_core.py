"""Loads the compiled core, native (ctypes) or WebAssembly (wasmtime), from the manifest it carries.

No signature and no struct is written here: both loaders build them from the JSON that the library
returns from `kvz_manifest`. After that, ``core.cache_append(...)`` calls ``kvz_cache_append`` with
numbers, and addresses cross through a *frame*, because WebAssembly has its own memory:

    with core.frame() as frame:
        status = core.cache_append(cache, frame.put(address, nbytes), ...)

On the native core a frame hands addresses through. Called by every other module; calls nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvz.errors import (
    ERRORS,
    AbiMismatchError,
    ClosedError,
    CoreError,
    InvalidArgumentError,
    InvalidTypeError,
    KvzError,
)

ABI_VERSION = 1
NATIVE_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_native")
NATIVE_FILES = ("libkvz.so", "libkvz.dylib", "kvz.dll")
WASM_FILE = "kvz.wasm"

_CTYPES: dict[str, Any] = {
    "void": None,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "f32": ctypes.c_float,
    "f64": ctypes.c_double,
}


class Core:
    """A loaded core: the functions of the ABI as methods, and what is needed to call them.

    Attributes
    ----------
    name : str
        "native" or "wasm".
    abi : dict
        The manifest.
    enums : dict
        Values by name, by the enum's name: ``core.enums["Format"]["q4"]``.
    shares_memory : bool
        Whether the core sees the memory of this process where it is.
    """

    name: str
    shares_memory: bool

    def __init__(self, path: str, abi: dict[str, Any], pointer: Any) -> None:
        if abi["version"] != ABI_VERSION:
            raise AbiMismatchError(
                f"{path} speaks version {abi['version']} of the ABI and this package {ABI_VERSION}"
            )
        self.path = path
        self.abi = abi
        self.enums: dict[str, dict[str, int]] = {}
        self.structs: dict[str, type[ctypes.Structure]] = {}
        self.ctypes = {**_CTYPES, "ptr": pointer, "usize": pointer}
        for name, spec in abi["types"].items():
            if "fields" in spec:
                self.structs[name] = self._struct(name, spec)
            else:
                self.enums[name] = spec
        self._errors = {
            code: ERRORS.get(name, KvzError) for name, code in self.enums["Status"].items()
        }

    def _struct(self, name: str, spec: dict[str, Any]) -> type[ctypes.Structure]:
        """Build a struct from the manifest; its offsets must be what the core says."""
        fields = [(field, self.ctypes[kind]) for field, (kind, _) in spec["fields"].items()]
        made = type(name, (ctypes.Structure,), {"_fields_": fields})
        offsets = {field: getattr(made, field).offset for field in spec["fields"]}
        if ctypes.sizeof(made) != spec["size"] or any(
            offsets[field] != offset for field, (_, offset) in spec["fields"].items()
        ):
            raise AbiMismatchError(f"{name}: this platform lays the struct out differently")
        return made

    def new(self, name: str, **fields: Any) -> Any:
        """Make a struct of the ABI: sized, all other fields zero unless given."""
        return self.structs[name](size_bytes=ctypes.sizeof(self.structs[name]), **fields)

    def create(self, function: str, *args: int) -> int:
        """Call a function whose last parameter receives a pointer, and return that pointer."""
        out = self.ctypes["ptr"]()
        with self.frame() as frame:
            self.check(getattr(self, function)(*args, frame.ref(out)))
        return int(out.value or 0)

    def check(self, status: int) -> None:
        """Raise the exception that belongs to a status; call it before any other call."""
        if status:
            raise self.error(status)

    def error(self, status: int) -> KvzError:
        """Return the exception that belongs to a failure; call it before any other call."""
        return self._errors.get(status, KvzError)(self.string(self.last_error()))

    def frame(self) -> Frame:
        """Return a context that lends memory of this process to the core."""
        raise NotImplementedError

    def host_address(self, pointer: int) -> int:
        """Return where this process sees memory that the core pointed to."""
        raise NotImplementedError

    def string(self, pointer: int) -> str:
        """Read a string of the core."""
        return ctypes.string_at(self.host_address(pointer)).decode("utf-8", "replace")

    def isas(self) -> tuple[str, ...]:
        """Name the kernels that this machine could run, best first."""
        found: list[str] = []
        while pointer := self.isa_available(len(found)):
            found.append(self.string(pointer))
        return tuple(found)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...


class Frame:
    """Lends memory of this process to the native core, which sees it where it is."""

    def __enter__(self) -> Frame:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing was copied, so nothing is to be copied back."""

    def put(self, address: int, nbytes: int) -> int:
        """Lend `nbytes` for reading; the caller keeps their owner alive."""
        return address

    def out(self, address: int, nbytes: int) -> int:
        """Lend `nbytes` for writing; complete when the frame ends."""
        return address

    def ref(self, value: Any) -> int:
        """Lend a ctypes value, which the caller keeps, for reading and writing."""
        return ctypes.addressof(value)


class NativeCore(Core):
    """The shared library, called by ctypes. Calls release the GIL."""

    name = "native"
    shares_memory = True

    def __init__(self, path: str) -> None:
        try:
            library = ctypes.CDLL(path)
            library.kvz_manifest.restype = ctypes.c_char_p
            manifest = library.kvz_manifest()
        except (OSError, AttributeError) as error:
            raise CoreError(f"{path} cannot be loaded: {error}") from error
        super().__init__(path, json.loads(manifest), ctypes.c_void_p)
        for name, (restype, *argtypes) in self.abi["functions"].items():
            function = getattr(library, f"kvz_{name}")
            function.restype = self.ctypes[restype]
            function.argtypes = [self.ctypes[kind] for kind in argtypes]
            setattr(self, name, function)
        self._frame = Frame()

    def frame(self) -> Frame:
        """Return a context that hands addresses through."""
        return self._frame

    def host_address(self, pointer: int) -> int:
        """Return the pointer: the memory is shared."""
        return pointer


class Handle:
    """Owns one object of the core and frees it once: by `close`, or when it is collected.

    Every call into the core pins the handle, and `close` leaves the object to the last call that
    still runs in another thread, so no call ever meets an object that is gone.
    """

    __slots__ = ("__weakref__", "_finalizer", "_pins", "pointer", "what")

    def __init__(self, what: str, pointer: int, free: Callable[..., Any], *keep: Any) -> None:
        self.what = what
        self.pointer = pointer
        self._pins: list[None] = []  # append and pop are atomic
        self._finalizer = weakref.finalize(self, _free, free, pointer, keep)
        # At exit the system takes the memory back; a thread may still be using it.
        self._finalizer.atexit = False

    def __enter__(self) -> int:
        self._pins.append(None)
        pointer = self.pointer
        if not pointer:
            self.__exit__()
            raise ClosedError(f"this {self.what} is closed")
        return pointer

    def __exit__(self, *error: object) -> None:
        self._pins.pop()
        if not self.pointer:
            self.close()

    def close(self) -> None:
        """Free the object now, or when the last running call returns."""
        self.pointer = 0
        if not self._pins:
            self._finalizer()


def _free(free: Callable[..., Any], pointer: int, keep: tuple[Any, ...]) -> None:
    """Call `free`; what `keep` holds lives until then."""
    free(pointer)


_loaded: dict[str, Core] = {}
_loading = threading.Lock()


def load(name: str | None = None) -> Core:
    """Return the core called `name`, loaded once per process.

    Parameters
    ----------
    name : {"native", "wasm"}, optional
        By default what KVZ_CORE says, else "native".

    Raises
    ------
    InvalidArgumentError
        No core has this name, or KVZ_ISA or KVZ_NUM_THREADS is not possible here.
    CoreError
        The library is missing or cannot be loaded.
    """
    if name is not None and not isinstance(name, str):
        raise InvalidTypeError(f"core: expected 'native', 'wasm' or None, got {name!r}")
    chosen = name or os.environ.get("KVZ_CORE") or "native"
    if chosen not in ("native", "wasm"):
        source = "core" if name else "KVZ_CORE"
        raise InvalidArgumentError(f"{source}: expected 'native' or 'wasm', got {chosen!r}")
    found = _loaded.get(chosen)
    if found is None:
        with _loading:
            found = _loaded.get(chosen) or _load_now(chosen)
            _loaded[chosen] = found
    return found


def _load_now(name: str) -> Core:
    if name == "wasm":
        from kvz._wasm import WasmCore

        return WasmCore(_only_file((WASM_FILE,)))
    core = NativeCore(_only_file(NATIVE_FILES))
    _apply_environment(core)
    return core


def _only_file(names: tuple[str, ...]) -> str:
    """Find the library: a wheel holds exactly one."""
    paths = [os.path.join(NATIVE_FOLDER, name) for name in names]
    found = [path for path in paths if os.path.isfile(path)]
    if len(found) != 1:
        there = ", ".join(found) or "nothing"
        raise CoreError(
            f"expected one of {', '.join(names)} in {NATIVE_FOLDER}, found {there}; "
            "install kvz from a wheel, or build it with `pip install .`"
        )
    return found[0]


def _apply_environment(core: Core) -> None:
    """Honour KVZ_ISA and KVZ_NUM_THREADS. WebAssembly has one ISA and one thread."""
    isa = os.environ.get("KVZ_ISA")
    if isa and core.isa_select(isa.encode() + b"\0"):
        here = ", ".join(core.isas())
        raise InvalidArgumentError(f"KVZ_ISA: expected one of {here}, got {isa!r}")
    threads = os.environ.get("KVZ_NUM_THREADS")
    if threads:
        if not (threads.isascii() and threads.isdigit()) or not 0 < int(threads) < 1 << 16:
            raise InvalidArgumentError(f"KVZ_NUM_THREADS: expected 1 or more, got {threads!r}")
        core.check(core.set_num_threads(int(threads)))
