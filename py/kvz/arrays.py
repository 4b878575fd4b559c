"""Takes arrays of any library where they lie: address, dtype, shape and strides, without a copy.

numpy arrays (with `ml_dtypes.bfloat16` too), torch tensors, and whatever speaks DLPack (JAX, MLX),
the buffer protocol or `__array__`. bfloat16 needs no numpy dtype: DLPack is read with ctypes.
Called by the caches, quantize.py and pool.py.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvz.errors import InvalidArgumentError, InvalidTypeError

Floats = NDArray[np.float32]

F32 = np.dtype(np.float32)
#: What goes in, by the name that numpy, torch and the core agree on, as the dtype of its bits.
BITS: dict[str, np.dtype[Any]] = {
    "f32": F32,
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "f64": np.dtype(np.float64),
}
_BY_DTYPE = {dtype: name for name, dtype in BITS.items() if name != "bf16"}
_BY_NAME = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}
_BY_DLPACK = {(2, 32): "f32", (2, 16): "f16", (4, 16): "bf16", (2, 64): "f64"}
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_byte_of: Any = ctypes.c_char.from_buffer  # refuses what is not writable and contiguous
_EXPECTED = "expected an array of float32, float16, bfloat16 or float64"


class Borrowed(NamedTuple):
    """An array in host memory that belongs to somebody else.

    Attributes
    ----------
    address : int
        Of the first element.
    dtype : {"f32", "f16", "bf16", "f64"}
    shape, strides : tuple of int
        Strides count elements.
    owner : object
        Keeps the memory alive.
    """

    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    owner: Any

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, gaps between them not counted."""
        return math.prod(self.shape) * BITS[self.dtype].itemsize

    def bits(self) -> NDArray[Any]:
        """Return a read-only numpy view; bfloat16 comes as the uint16 of its bits."""
        return np.asarray(_Interface(self))

    def with_dense_rows(self) -> Borrowed:
        """Return this array, or a copy of it if the last axis is not contiguous."""
        if not self.shape or self.strides[-1] == 1 or self.shape[-1] <= 1:
            return self
        return self.dense()

    def dense(self) -> Borrowed:
        """Return this array, or a copy of it if it is not C-contiguous."""
        return _of_numpy(np.ascontiguousarray(self.bits()), self.dtype)


class _Interface:
    """Makes numpy see a borrowed array, and keep its owner."""

    def __init__(self, borrowed: Borrowed, *, writable: bool = False) -> None:
        bits = BITS[borrowed.dtype]
        self.owner = borrowed.owner
        self.__array_interface__ = {
            "version": 3,
            "data": (borrowed.address, not writable),
            "typestr": bits.str,
            "shape": borrowed.shape,
            "strides": tuple(stride * bits.itemsize for stride in borrowed.strides),
        }


def borrow(x: Any, what: str) -> Borrowed:
    """Borrow an array of any library.

    Parameters
    ----------
    x : array
    what : str
        The name of the argument, for messages.

    Raises
    ------
    InvalidTypeError
        `x` is not an array of float32, float16, bfloat16 or float64 in host memory.
    """
    if isinstance(x, np.ndarray):
        return _borrow_numpy(x, what)
    if hasattr(x, "data_ptr") and hasattr(x, "stride"):
        return _borrow_torch(x, what)
    if hasattr(x, "__dlpack__"):
        found = _borrow_dlpack(x, what)
        if found is not None:
            return found
    return _borrow_numpy(_to_numpy(x, what), what)


def as_float32(x: Any, what: str) -> Floats:
    """Return `x` as a C-contiguous float32 numpy array, without a copy where it is one already."""
    borrowed = borrow(x, what)
    bits = borrowed.bits()
    if borrowed.dtype == "bf16":
        wide: NDArray[np.uint32] = np.left_shift(bits, 16, dtype=np.uint32, order="C")
        return wide.view(F32)
    with np.errstate(over="ignore"):
        found: Floats = np.require(bits, F32, ["C", "A"])
        return found


def as_output(out: Any, shape: tuple[int, ...], what: str) -> Floats:
    """Return the memory of `out` as a writable float32 numpy array of this shape.

    Parameters
    ----------
    out : numpy array, torch tensor, or any writable buffer
        Of float32 and this shape; a flat buffer of as many numbers or bytes will do.
    shape : tuple of int
    what : str
        The name of the argument, for messages.

    Raises
    ------
    InvalidTypeError
        `out` is nothing to write float32 to.
    InvalidArgumentError
        It has another shape, or is read-only or not C-contiguous.
    """
    if isinstance(out, np.ndarray):
        view = out
    elif hasattr(out, "data_ptr") and hasattr(out, "stride"):
        view = _torch_output(out, what)
    else:
        view = _buffer_output(out, shape, what)
    if view.dtype != F32:
        raise InvalidTypeError(f"{what}: expected an array of float32, got {view.dtype}")
    if view.shape != shape:
        raise InvalidArgumentError(f"{what}: expected shape {shape}, got {view.shape}")
    if not view.flags.carray:
        raise InvalidArgumentError(f"{what}: expected a writable, C-contiguous, aligned array")
    return view


def _torch_output(out: Any, what: str) -> NDArray[Any]:
    """View a tensor, unless writing to its memory is not writing to the tensor."""
    if out.requires_grad or out.is_neg():
        raise InvalidTypeError(f"{what}: expected a plain tensor without gradient; use .detach()")
    borrowed = _borrow_torch(out, what)
    if borrowed.dtype != "f32":
        raise InvalidTypeError(f"{what}: expected an array of float32, got {out.dtype}")
    return np.asarray(_Interface(borrowed, writable=True))


def _buffer_output(out: Any, shape: tuple[int, ...], what: str) -> NDArray[Any]:
    """View a buffer; a flat one takes the shape of the result, bytes become float32."""
    try:
        with memoryview(out) as memory:
            view = np.asarray(memory)
    except (TypeError, ValueError, BufferError) as error:
        raise InvalidTypeError(
            f"{what}: expected an array or a writable buffer of float32, got {type(out).__name__}"
        ) from error
    if view.ndim == 1 and view.dtype.itemsize == 1 and view.nbytes == 4 * math.prod(shape):
        view = view.view(F32) if view.flags.c_contiguous else view
    return view.reshape(shape) if view.ndim == 1 and view.size == math.prod(shape) else view


def address_of(array: NDArray[Any]) -> int:
    """Return the address of a numpy array, fast if it is writable and C-contiguous."""
    try:
        return ctypes.addressof(_byte_of(array))
    except (TypeError, ValueError, BufferError):
        return int(array.__array_interface__["data"][0])


def _to_numpy(x: Any, what: str) -> NDArray[Any]:
    """Let numpy find its way: the buffer protocol, `__array__`, nested sequences of floats."""
    try:
        return np.asarray(x)
    except Exception as error:  # whatever the other library raises
        raise InvalidTypeError(f"{what}: {_EXPECTED}, got {type(x).__name__} ({error})") from error


def _borrow_numpy(x: NDArray[Any], what: str) -> Borrowed:
    dtype = _BY_DTYPE.get(x.dtype) or _BY_NAME.get(x.dtype.name)
    if dtype is None:
        raise InvalidTypeError(f"{what}: {_EXPECTED}, got dtype {x.dtype}")
    if isinstance(x, np.ma.MaskedArray):  # its mask would silently be forgotten
        raise InvalidTypeError(f"{what}: expected a plain array, got a masked one; use .filled()")
    item = x.dtype.itemsize
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    elif not x.flags.aligned or any(stride % item for stride in x.strides):
        x = x.copy(order="C")
    return _of_numpy(x, dtype)


def _of_numpy(x: NDArray[Any], dtype: str) -> Borrowed:
    item = x.dtype.itemsize
    strides = tuple(stride // item for stride in x.strides)
    return Borrowed(address_of(x), dtype, x.shape, strides, x)


def _borrow_torch(x: Any, what: str) -> Borrowed:
    """Torch tensors, also those that require a gradient, which refuse DLPack."""
    name = str(x.dtype).rpartition(".")[2]
    dtype = _BY_NAME.get(name)
    if dtype is None:
        raise InvalidTypeError(f"{what}: {_EXPECTED}, got dtype {x.dtype}")
    device = str(x.device)
    if device != "cpu":
        raise InvalidTypeError(
            f"{what}: expected host memory, got a tensor on {device!r}; use .cpu()"
        )
    try:
        if x.is_neg():
            x = x.resolve_neg()
        address = x.data_ptr()
        if not address and x.numel():
            raise RuntimeError("it has no storage")
        return Borrowed(address, dtype, tuple(x.shape), tuple(x.stride()), x)
    except (RuntimeError, NotImplementedError) as error:  # sparse tensors, tensors without storage
        raise InvalidTypeError(f"{what}: expected a dense tensor ({error})") from error


# -- DLPack, read with ctypes, because numpy refuses bfloat16 --------------------------------------


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_CPU, _CPU_PINNED, _METAL = 1, 3, 8

_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _borrow_dlpack(x: Any, what: str) -> Borrowed | None:
    """Read the capsule and leave it unconsumed, so that its own destructor gives it back."""
    try:
        capsule = x.__dlpack__()
        pointer = _capsule_pointer(capsule, b"dltensor")
    except Exception:  # a library may refuse to export what it can show by other ways
        return None
    tensor = _DLTensor.from_address(pointer)
    # MLX on Apple silicon calls its memory Metal; the CPU shares it.
    unified = tensor.device_type == _METAL and type(x).__module__.startswith("mlx")
    if tensor.device_type not in (_CPU, _CPU_PINNED) and not unified:
        raise InvalidTypeError(
            f"{what}: expected host memory, got DLPack device type {tensor.device_type}"
        )
    dtype = _BY_DLPACK.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        kind = _DLPACK_KINDS.get(tensor.code, f"DLPack type {tensor.code} of ")
        raise InvalidTypeError(f"{what}: {_EXPECTED}, got {kind}{tensor.bits}")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else dense_strides(shape)
    return Borrowed((tensor.data or 0) + tensor.byte_offset, dtype, shape, strides, capsule)


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a C-contiguous array."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


# -- Checks of plain arguments ---------------------------------------------------------------------


def as_count(value: Any, what: str, least: int = 0) -> int:
    """Return an integer of at least `least`; bools and floats are refused."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise InvalidTypeError(f"{what}: expected an integer, got {value!r}")
    try:
        count = int(value.__index__())
    except TypeError as error:  # an array that is not one number
        raise InvalidTypeError(f"{what}: expected an integer, got {value!r}") from error
    if count < least:
        raise InvalidArgumentError(f"{what}: expected {least} or more, got {count}")
    if count >= 1 << 63:
        raise InvalidArgumentError(f"{what}: expected less than 2**63, got {count}")
    return count


def as_number(value: Any, what: str) -> float:
    """Return a finite number as a float."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidTypeError(f"{what}: expected a number, got {value!r}") from error
    if not np.isfinite(np.float32(number)):
        raise InvalidArgumentError(f"{what}: expected a finite number, got {value!r}")
    return number


def as_flag(value: Any, what: str) -> bool:
    """Return a bool; 0 and 1 will do."""
    if isinstance(value, (bool, np.bool_)) or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise InvalidTypeError(f"{what}: expected True or False, got {value!r}")
