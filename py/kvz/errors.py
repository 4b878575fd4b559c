"""The exceptions of kvz, and which one each status of the core becomes.

Every error that kvz raises on purpose is a `KvzError`, and also the built-in exception that a
caller would expect, so both ``except kvz.KvzError`` and ``except ValueError`` work.
"""

from __future__ import annotations


class KvzError(Exception):
    """Base of every error that kvz raises on purpose."""


class InvalidArgumentError(KvzError, ValueError):
    """An argument breaks a documented rule: a shape, a range, a choice."""


class ConfigError(InvalidArgumentError):
    """A configuration is not valid; the message names every problem, one per line."""


class NotFiniteError(InvalidArgumentError):
    """An input holds a NaN or an infinity."""


class NotRepresentableError(InvalidArgumentError):
    """An input holds a magnitude that the precisions of this cache cannot store."""


class InvalidTypeError(KvzError, TypeError):
    """An argument is of a type, or an array of a dtype, that is not accepted there."""


class OutOfMemoryError(KvzError, MemoryError):
    """The system has no memory left for this."""


class PoolExhaustedError(OutOfMemoryError):
    """The pool would exceed its `max_bytes`."""


class ForeignBufferError(InvalidArgumentError):
    """A buffer was given to a pool that did not hand it out, or was given back twice."""


class ClosedError(KvzError, ValueError):
    """The object was closed and can no longer be used."""


class CorruptError(KvzError, ValueError):
    """The state of a cache contradicts itself."""


class UnsupportedError(KvzError, NotImplementedError, ValueError):
    """Another library asks for something that kvz cannot do, or not without unpacking."""


class SnapshotError(KvzError, ValueError):
    """A file is no snapshot of a cache, or not one that can be used here."""


class CorruptSnapshotError(SnapshotError):
    """A snapshot is damaged or cut off: a checksum or a size does not match."""


class SnapshotVersionError(SnapshotError):
    """A snapshot was written by a later version of kvz."""


class SnapshotMismatchError(SnapshotError):
    """A snapshot is of another model, kind or configuration than was asked for."""


class CoreError(KvzError, OSError):
    """The compiled core cannot be loaded, or stopped in the middle of a call."""


class AbiMismatchError(CoreError):
    """The Python package and the compiled core are of different versions."""


#: The exception of every status of the core that is not "ok", by the status's name.
ERRORS: dict[str, type[KvzError]] = {
    "out_of_memory": OutOfMemoryError,
    "pool_exhausted": PoolExhaustedError,
    "invalid_argument": InvalidArgumentError,
    "not_finite": NotFiniteError,
    "not_representable": NotRepresentableError,
    "abi_mismatch": AbiMismatchError,
    "foreign_buffer": ForeignBufferError,
    "corrupt": CorruptError,
    "damaged": CorruptSnapshotError,
}
