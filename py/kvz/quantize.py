"""Quantization by itself, with the formats of the store. Calls _core.py."""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kvz._core import Core, load
from kvz.arrays import Floats, address_of, as_float32
from kvz.config import Precision, PrecisionLike, check_rotation, to_precision
from kvz.errors import InvalidArgumentError
from kvz.pool import AlignedBuffer


class QuantizedTensor:
    """Packed rows; made by `quantize`.

    Attributes
    ----------
    data : (nbytes,) uint8, read-only
        Pages of 64 rows, as the keys of a store have them (docs/format.md).
    shape : tuple of int
        Of the array that was packed.
    precision : Precision
    rotated : bool
        Whether every row was rotated before it was packed.
    """

    __slots__ = ("_core", "data", "precision", "rotated", "shape")

    def __init__(
        self,
        core: Core,
        data: NDArray[np.uint8],
        shape: tuple[int, ...],
        precision: Precision,
        rotated: bool,
    ) -> None:
        self._core = core
        self.data = data
        self.shape = shape
        self.precision = precision
        self.rotated = rotated

    @property
    def nbytes(self) -> int:
        """Bytes of `data`: codes, scales, and the padding of rows to 32 values and pages to 64."""
        return int(self.data.nbytes)

    @property
    def bits_per_value(self) -> float:
        """Bits taken per value; 0 when there are none."""
        values = int(np.prod(self.shape))
        return self.nbytes * 8 / values if values else 0.0

    def dequantize(self) -> Floats:
        """Return the values as they can be read back.

        Returns
        -------
        (..., dim) float32
            Of the shape that was packed.
        """
        out = np.empty(self.shape, np.float32)
        rows, dim = _rows_of(self.shape)
        if rows:
            core = self._core
            source = int(self.data.__array_interface__["data"][0])
            with core.frame() as frame:
                status = core.dequantize(
                    core.enums["Format"][self.precision.value],
                    int(self.rotated),
                    frame.put(source, self.nbytes),
                    rows,
                    dim,
                    frame.out(address_of(out), out.nbytes),
                )
                core.check(status)
        return out

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise InvalidArgumentError("copy: packed values cannot be seen without a copy")
        return self.dequantize().astype(dtype or np.float32, copy=False)

    def __repr__(self) -> str:
        rotated = ", rotated" if self.rotated else ""
        return f"QuantizedTensor({self.shape}, {self.precision}{rotated}, {self.nbytes} bytes)"


def quantize(
    x: Any,
    precision: PrecisionLike,
    rotation: Literal["auto", "on", "off"] = "auto",
    *,
    core: str | None = None,
) -> QuantizedTensor:
    """Pack the rows of an array as a cache packs its keys.

    Parameters
    ----------
    x : (..., dim) float32, float16, bfloat16 or float64
        Every row has its own scales, one per 32 values.
    precision : Precision or its name
    rotation : {"auto", "on", "off"}
        Rotate rows before they are packed; "auto" does for q4.
    core : {"native", "wasm"}, optional

    Raises
    ------
    NotFiniteError, NotRepresentableError
        `x` holds a value that `precision` cannot store.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.linspace(-1, 1, 64 * 128).reshape(64, 128)
    >>> packed = quantize(x, "q8")
    >>> packed.bits_per_value, bool(abs(packed.dequantize() - x).max() < 0.004)
    (8.5, True)
    """
    loaded, chosen = load(core), to_precision(precision, "precision")
    check_rotation(rotation)
    rotated = chosen.is_packed and (rotation == "on" or (rotation == "auto" and chosen != "q8"))
    source = as_float32(x, "x")
    if source.ndim == 0:
        raise InvalidArgumentError("x: expected (..., dim), got a single number")
    rows, dim = _rows_of(source.shape)
    code, nbytes = loaded.enums["Format"][chosen.value], ctypes.c_uint64()
    if not rows:
        return QuantizedTensor(loaded, np.zeros(0, np.uint8), source.shape, chosen, rotated)
    with loaded.frame() as frame:
        loaded.check(loaded.quantized_bytes(code, rows, dim, frame.ref(nbytes)))
    target = AlignedBuffer(-(-nbytes.value // 4))
    with loaded.frame() as frame:
        status = loaded.quantize(
            code,
            int(rotated),
            frame.put(address_of(source), source.nbytes),
            rows,
            dim,
            frame.out(target.address, nbytes.value),
        )
        loaded.check(status)
    target.resize(target.capacity)
    data = target.array.view(np.uint8)[: nbytes.value]
    data.flags.writeable = False
    return QuantizedTensor(loaded, data, source.shape, chosen, rotated)


def _rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (rows, dim), or no rows if there are no values."""
    dim = shape[-1]
    return (int(np.prod(shape[:-1])), dim) if dim else (0, 0)
