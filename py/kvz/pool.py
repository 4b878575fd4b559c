"""Memory: the pool that caches take their pages from, and buffers of one's own.

Called by cache.py and pooled.py; calls _core.py.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from dataclasses import asdict, dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kvz._closing import Closing
from kvz._core import Core, Handle, load
from kvz.arrays import Floats, address_of, as_count, as_flag, as_float32
from kvz.errors import (
    ClosedError,
    InvalidArgumentError,
    InvalidTypeError,
    OutOfMemoryError,
)
from kvz.stats import format_bytes

CACHE_LINE_SIZE = 64


class BufferSize(IntEnum):
    """The size classes of a pool; each is its number of bytes."""

    KB1 = 1 << 10
    KB4 = 4 << 10
    KB16 = 16 << 10
    KB64 = 64 << 10
    KB256 = 256 << 10

    @classmethod
    def for_size(cls, nbytes: int) -> BufferSize | None:
        """Return the smallest class that holds `nbytes`, or None above 256 KB.

        Examples
        --------
        >>> BufferSize.for_size(1025).name
        'KB4'
        """
        wanted = as_count(nbytes, "nbytes")
        return next((size for size in cls if size >= wanted), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStats:
    """The counters of a `BufferPool` at one moment.

    Attributes
    ----------
    hits, misses : int
        Requests that found a free buffer, and that did not.
    allocations : int
        Buffers newly made.
    returns, drops : int
        Buffers given back and kept, and given back beyond `max_free_per_class`.
    free_buffers : tuple of int
        Free buffers in the classes of 1, 4, 16, 64 and 256 KB.
    free_pages : int
        Free buffers of all other sizes.
    bytes_in_use, bytes_free : int
        Handed out, and kept for reuse.
    bytes_reserved : int
        What the system was asked for.
    bytes_high_water : int
        The highest `bytes_in_use` so far.
    max_bytes : int or None
    huge_pages : bool
        Whether the memory asks for huge pages.
    bytes_spilled, bytes_written : int
        What is in the spill file now, and what was written to it so far.
    """

    hits: int = 0
    misses: int = 0
    allocations: int = 0
    returns: int = 0
    drops: int = 0
    free_buffers: tuple[int, ...] = (0, 0, 0, 0, 0)
    free_pages: int = 0
    bytes_in_use: int = 0
    bytes_free: int = 0
    bytes_reserved: int = 0
    bytes_high_water: int = 0
    max_bytes: int | None = None
    huge_pages: bool = False
    bytes_spilled: int = 0
    bytes_written: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits per request; 0 when there were none."""
        requests = self.hits + self.misses
        return self.hits / requests if requests else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and `hit_rate`, as plain values."""
        return {**asdict(self), "hit_rate": self.hit_rate}


class BufferPool(Closing):
    """Aligned memory in size classes, with a hard limit, shared between caches and threads.

    Parameters
    ----------
    max_free_per_class : int
        Free buffers that are kept per size; more go back to the system.
    max_bytes : int, optional
        What is handed out and kept free never exceeds this.
    zero_on_release : bool
        Overwrite buffers with zeros when they come back.
    core : {"native", "wasm"}, optional
        The core whose memory this is; caches on the pool use the same.
    spill : path, optional
        A file for what `max_bytes` leaves no room for. It must not exist yet, and exists without
        a name until the last cache of the pool is closed. A cache that needs more pages moves its
        oldest ones there, 2048 tokens at a time, unless forks share them; attention reads them from
        there and gives the same bits. One append still has to fit. Linux and macOS, native core.
    spill_write_bytes : int, optional
        What may be written to that file over its life; then the pool refuses as if it had none.

    Examples
    --------
    >>> pool = BufferPool(max_bytes=1 << 20)
    >>> with pool.acquire_for_size(3000) as buffer:
    ...     buffer.capacity, pool.stats().bytes_in_use
    (4096, 4096)
    >>> pool.stats().bytes_in_use
    0
    """

    def __init__(
        self,
        max_free_per_class: int = 32,
        max_bytes: int | None = None,
        zero_on_release: bool = False,
        core: str | None = None,
        *,
        spill: str | os.PathLike[str] | None = None,
        spill_write_bytes: int | None = None,
    ) -> None:
        self._core = load(core)
        self._max_bytes = None if max_bytes is None else as_count(max_bytes, "max_bytes", 1)
        free = as_count(max_free_per_class, "max_free_per_class")
        if free >= 1 << 32:
            raise InvalidArgumentError(f"max_free_per_class: expected less than 2**32, got {free}")
        config = self._core.new(
            "PoolConfig",
            max_free_per_class=free,
            max_bytes=self._max_bytes or 0,
            zero_on_release=as_flag(zero_on_release, "zero_on_release"),
        )
        with self._core.frame() as frame:
            pointer = self._core.create("pool_new", frame.ref(config))
        self._handle = Handle("BufferPool", pointer, self._core.pool_free)
        self._spills = spill is not None
        if spill is not None:
            self._open_spill(spill, spill_write_bytes)
        elif spill_write_bytes is not None:
            raise InvalidArgumentError("spill_write_bytes: expected only beside spill")

    def _open_spill(self, path: str | os.PathLike[str], write_bytes: int | None) -> None:
        """Give the core a file of its own."""
        limit = 0 if write_bytes is None else as_count(write_bytes, "spill_write_bytes", 1)
        if self._max_bytes is None:
            raise InvalidArgumentError("spill: expected max_bytes beside it, the budget of memory")
        if not self._core.shares_memory or os.name != "posix":
            raise InvalidArgumentError("spill: not on Windows, and not on the wasm core")
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(path)  # the system takes it back when the process ends, however that may be
        try:
            with self._handle as pool:
                self._core.check(self._core.pool_set_spill(pool, file, limit))
        except BaseException:
            os.close(file)
            raise

    @property
    def core(self) -> str:
        """The name of the core whose memory this is."""
        return self._core.name

    def acquire(self, size_class: BufferSize | int) -> PooledBuffer:
        """Take a buffer of one of the size classes.

        Raises
        ------
        PoolExhaustedError
            The pool would exceed `max_bytes`.
        """
        return self.acquire_for_size(_to_size(size_class))

    def acquire_for_size(self, nbytes: int) -> PooledBuffer:
        """Take a buffer of at least `nbytes`: of a class, or, above 256 KB, of its own size."""
        return PooledBuffer(self._core, self._handle, as_count(nbytes, "nbytes"))

    def prewarm(self, size_class: BufferSize | int, n: int) -> None:
        """Make `n` free buffers of a class, as far as `max_free_per_class` keeps them."""
        with self._handle as pool, self._core.frame():
            size, count = _to_size(size_class), as_count(n, "n")
            self._core.check(self._core.pool_prewarm(pool, size, count))

    def prewarm_all(self, n: int) -> None:
        """Make `n` free buffers of every class."""
        for size in BufferSize:
            self.prewarm(size, n)

    def clear(self) -> None:
        """Give all free buffers back; those in use and the counters stay."""
        with self._handle as pool:
            self._core.pool_clear(pool)

    def stats(self) -> PoolStats:
        """Return the counters, all of one moment."""
        out = self._core.new("PoolStats")
        with self._handle as pool, self._core.frame() as frame:
            self._core.check(self._core.pool_stats(pool, frame.ref(out)))
        free = (out.free_1k, out.free_4k, out.free_16k, out.free_64k, out.free_256k)
        return PoolStats(
            hits=out.hits,
            misses=out.misses,
            allocations=out.allocations,
            returns=out.returns,
            drops=out.drops,
            free_buffers=free,
            free_pages=out.free_pages,
            bytes_in_use=out.bytes_in_use,
            bytes_free=out.bytes_free,
            bytes_reserved=out.bytes_reserved,
            bytes_high_water=out.bytes_high_water,
            max_bytes=self._max_bytes,
            huge_pages=bool(out.huge_pages),
            bytes_spilled=out.bytes_spilled,
            bytes_written=out.bytes_written,
        )

    def close(self) -> None:
        """Refuse further use; the memory goes when the last cache and buffer of the pool do."""
        self._handle.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._handle.pointer

    def __repr__(self) -> str:
        if self.closed:
            return "BufferPool(closed)"
        now = self.stats()
        most = f" of {format_bytes(self._max_bytes)}" if self._max_bytes else ""
        used, free = format_bytes(now.bytes_in_use), format_bytes(now.bytes_free)
        return f"BufferPool({self.core}: {used} in use, {free} free{most})"


def _to_size(size_class: Any) -> int:
    """Return the bytes of a size class, given as a member or as its bytes."""
    size = as_count(size_class, "size_class")
    if size not in {int(known) for known in BufferSize}:
        known = ", ".join(size.name for size in BufferSize)
        raise InvalidArgumentError(f"size_class: expected a BufferSize ({known}), got {size}")
    return size


class PooledBuffer:
    """A buffer of a `BufferPool`, 64-byte aligned; made by the pool's `acquire` methods.

    Its memory goes back to the pool with `release`, with the end of a `with` statement, or when it
    is collected; where numpy views still look at it, as soon as the last of them is gone. The
    memory is not cleared: a reused buffer holds what was last written to it.
    """

    def __init__(self, core: Core, handle: Handle, nbytes: int) -> None:
        pointer, size = core.ctypes["ptr"](), ctypes.c_uint64()
        pool = handle.__enter__()  # pinned until the memory is back
        try:
            with core.frame() as frame:
                core.check(core.pool_acquire(pool, nbytes, frame.ref(pointer), frame.ref(size)))
        except BaseException:
            handle.__exit__()
            raise
        self.capacity: int = size.value
        address = core.host_address(pointer.value)
        self._memory: Any = (ctypes.c_ubyte * self.capacity).from_address(address)
        finalizer = weakref.finalize(self._memory, _give_back, core, handle, pool, pointer.value)
        finalizer.atexit = False

    @property
    def released(self) -> bool:
        """Whether the buffer was given back."""
        return self._memory is None

    @property
    def size_class(self) -> BufferSize | None:
        """The class of the buffer, or None if it is larger than all."""
        try:
            return BufferSize(self.capacity)
        except ValueError:
            return None

    @property
    def address(self) -> int:
        """Where the buffer is in this process."""
        return ctypes.addressof(self._held())

    def view(self, dtype: DTypeLike = np.uint8) -> NDArray[Any]:
        """Return the whole buffer as a writable 1-D numpy array, without a copy.

        Raises
        ------
        InvalidTypeError
            The dtype holds Python objects.
        """
        wanted = np.dtype(dtype)
        if wanted.hasobject or not wanted.itemsize:
            raise InvalidTypeError(f"dtype: expected a dtype of plain numbers, got {wanted}")
        whole = self.capacity // wanted.itemsize
        return np.frombuffer(self._held(), wanted, count=whole)

    def clear(self) -> None:
        """Overwrite the buffer with zeros."""
        self.view()[:] = 0

    def release(self) -> None:
        """Give the buffer back; it cannot be used afterwards."""
        self._memory = None

    def _held(self) -> Any:
        if self._memory is None:
            raise ClosedError("this PooledBuffer was released")
        return self._memory

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return _as_array(self.view(), dtype, copy)

    def __len__(self) -> int:
        return self.capacity

    def __enter__(self) -> PooledBuffer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        state = ", released" if self.released else ""
        return f"PooledBuffer({self.capacity} bytes{state})"


def _give_back(core: Core, handle: Handle, pool: int, pointer: int) -> None:
    """Return the memory, and let go of the pool."""
    core.pool_release(pool, pointer)
    handle.__exit__()


def _as_array(held: NDArray[Any], dtype: DTypeLike | None, copy: bool | None) -> NDArray[Any]:
    """Finish `__array__`: the memory itself, unless a copy or another dtype is asked for."""
    if dtype is not None and np.dtype(dtype) != held.dtype:
        if copy is False:
            raise InvalidArgumentError(f"copy: a copy is needed to make {np.dtype(dtype)}")
        return held.astype(dtype)
    return held.copy() if copy else held


class AlignedBuffer:
    """A float32 buffer of fixed capacity at an address that is a multiple of 64.

    Parameters
    ----------
    capacity : int
        Values that fit.

    Examples
    --------
    >>> buffer = AlignedBuffer(8)
    >>> buffer.extend([1.0, 2.0, 3.0])
    >>> len(buffer), buffer.capacity, buffer.array
    (3, 8, array([1., 2., 3.], dtype=float32))
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = as_count(capacity, "capacity")
        nbytes = max(self._capacity * 4, CACHE_LINE_SIZE)
        try:
            memory = np.zeros(nbytes + CACHE_LINE_SIZE, np.uint8)
        except (MemoryError, ValueError, OverflowError) as error:
            raise OutOfMemoryError(f"no room for {self._capacity} float32 values") from error
        skip = -address_of(memory) % CACHE_LINE_SIZE
        self._whole: Floats = memory[skip : skip + nbytes].view(np.float32)
        self._length = 0

    @property
    def capacity(self) -> int:
        """Values that fit."""
        return self._capacity

    @property
    def address(self) -> int:
        """Where the buffer is in this process."""
        return int(self._whole.__array_interface__["data"][0])

    @property
    def array(self) -> Floats:
        """The values held, as a writable numpy view."""
        return self._whole[: self._length]

    def extend(self, values: Any) -> None:
        """Append an array of floats, read in C order.

        Raises
        ------
        InvalidArgumentError
            They do not fit; nothing was appended.
        """
        flat = as_float32(values, "values").ravel()
        stop = self._length + flat.size
        if stop > self._capacity:
            room = self._capacity - self._length
            raise InvalidArgumentError(f"values: expected at most {room}, got {flat.size}")
        self._whole[self._length : stop] = flat
        self._length = stop

    def resize(self, length: int) -> None:
        """Hold `length` values; those that were not written are zero or what they were."""
        wanted = as_count(length, "length")
        if wanted > self._capacity:
            raise InvalidArgumentError(f"length: expected at most {self._capacity}, got {wanted}")
        self._length = wanted

    def clear(self) -> None:
        """Hold nothing; the capacity stays."""
        self._length = 0

    def copy(self) -> AlignedBuffer:
        """Return another buffer of the same capacity with the same values."""
        other = AlignedBuffer(self._capacity)
        other.extend(self.array)
        return other

    def __copy__(self) -> AlignedBuffer:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> AlignedBuffer:
        return self.copy()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return _as_array(self.array, dtype, copy)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"AlignedBuffer({self._length} of {self._capacity} float32 values)"


_defaults: dict[str, BufferPool] = {}
_making_default = threading.Lock()


def default_pool(core: str | None = None) -> BufferPool:
    """Return the pool that caches of a core take their pages from when none is given."""
    name = load(core).name
    with _making_default:
        pool = _defaults.get(name)
        if pool is None or pool.closed:
            pool = _defaults[name] = BufferPool(core=name)
        return pool
