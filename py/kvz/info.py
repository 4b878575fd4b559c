"""What is running: which core, which kernels, how many threads. Calls _core.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvz._core import Core, load
from kvz.arrays import as_count
from kvz.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True, slots=True)
class Info:
    """What `info` returns.

    Attributes
    ----------
    version : str
        Of the package.
    core : {"native", "wasm"}
    isa : str
        The kernels in use, such as "x86_64_v3".
    available_isas : tuple of str
        The kernels that this machine could run, best first; KVZ_ISA chooses.
    num_threads : int
        Threads that one call may use.
    cpu_count : int
        Processors that this process may run on, as the core sees them.
    huge_pages : bool
        Whether the system grants huge pages on request.
    abi_version : int
    library : str
        The file that the core was loaded from.
    """

    version: str
    core: str
    isa: str
    available_isas: tuple[str, ...]
    num_threads: int
    cpu_count: int
    huge_pages: bool
    abi_version: int
    library: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def info(core: str | None = None) -> Info:
    """Say what is running.

    Parameters
    ----------
    core : {"native", "wasm"}, optional
        By default what KVZ_CORE says, else "native".

    Examples
    --------
    >>> info().isa in info().available_isas
    True
    """
    loaded = load(core)
    now = _info(loaded)
    return Info(
        version=version(),
        core=loaded.name,
        isa=loaded.string(loaded.isa()),
        available_isas=loaded.isas(),
        num_threads=now.num_threads,
        cpu_count=now.cpu_count,
        huge_pages=bool(now.huge_pages),
        abi_version=loaded.abi["version"],
        library=loaded.path,
    )


def set_num_threads(n: int, core: str | None = None) -> None:
    """Let one call use up to `n` threads; results do not depend on it.

    Raises
    ------
    InvalidArgumentError
        `n` is not positive, or more than the core can use.
    """
    loaded, count = load(core), as_count(n, "n", 1)
    if count >= 1 << 32:
        raise InvalidArgumentError(f"n: expected a number of threads, got {count}")
    with loaded.frame():
        loaded.check(loaded.set_num_threads(count))


def get_num_threads(core: str | None = None) -> int:
    """Return how many threads one call may use."""
    return int(_info(load(core)).num_threads)


def _info(core: Core) -> Any:
    out = core.new("Info")
    with core.frame() as frame:
        core.check(core.info(frame.ref(out)))
    return out


def version() -> str:
    """Return the version of the installed package; "unknown" where it runs uninstalled."""
    from importlib import metadata  # not needed, and slow, when kvz is merely imported

    try:
        return metadata.version("kvz")
    except metadata.PackageNotFoundError:
        return "unknown"
