"""The work every contestant does: shapes, the float64 answer, and the clock.

Called by plan.py, worker.py and the contestants.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

ROWS_CHECKED = 8  # queries of a prefill that are compared with float64
CHUNK = 512  # tokens


class WrongResultError(Exception):
    """A contestant's answer is out of bounds: its speed is not worth printing."""


@dataclass(frozen=True)
class Job:
    """One thing to time.

    Attributes
    ----------
    case : str
        "decode", "prefill", "append" or "overhead"; "stream", an "append" with the time of every
        single call; "linear", "shapes" or "wasm", a "decode" that is compared over tokens, over
        shapes, and of the WebAssembly core; "forward", of a whole model.
    past, new : int
        Tokens in the cache before the step, and tokens that the step brings. A decode and a call
        on a tiny cache attend with one query to `past` tokens.
    cold_bytes : int
        The step rotates over as many caches as it takes to hold these.
    seconds : float
        To measure for.
    """

    case: str
    kv: str
    threads: int
    past: int
    new: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    cold_bytes: int = 0
    seconds: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens in the cache when the queries attend."""
        return self.past + self.new if self.case in ("prefill", "forward") else self.past

    @property
    def queries(self) -> int:
        return self.new if self.case == "prefill" else 1

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def appends(self) -> bool:
        """Whether appending, not attending, is timed."""
        return self.case in ("append", "stream")

    @property
    def flops(self) -> int:
        """Multiplications and additions of the visible pairs."""
        pairs = self.queries * self.past + (self.queries * (self.queries + 1) // 2)
        pairs = pairs if self.case == "prefill" else self.past
        return pairs * self.heads * self.head_dim * 4

    def bytes(self, bits: float) -> float:
        """What one cache takes, at `bits` per stored value."""
        return self.tokens * self.kv_heads * self.head_dim * 2 * bits / 8

    def caches(self, bits: float, share: float = 1) -> int:
        """How many caches to rotate over, at `bits` per stored value.

        With slow libraries, a `share` of the memory will do: before their steps, and before a
        prefill, which is slow with any library, other memory is read instead.
        """
        if self.case == "prefill":
            return 1
        return int(min(512, max(1, -(-self.cold_bytes * share // self.bytes(bits)))))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Contestant(Protocol):
    """What `Entry(job, data)` of a module in contestants/ is.

    A module also has KVS (the precisions it stores, with their nominal bits per value), CASES,
    TOLERANCE (of the relative error, per precision) and versions().
    """

    caches: int
    bytes: float  # that one cache takes

    def run(self) -> None:
        """Do the step once on every cache."""

    def prepare(self) -> None:
        """Make room for the next `run`; not timed."""

    def output(self) -> Floats:
        """Return what the first cache answered, (queries, heads, head_dim)."""

    def stored(self) -> tuple[Floats, Floats] | None:
        """Return what the first cache holds, (tokens, kv_heads, head_dim); None if opaque."""


@dataclass(frozen=True)
class Data:
    """Token-major float32: query (queries, heads, dim), keys and values (tokens, kv_heads, dim)."""

    query: Floats
    keys: Floats
    values: Floats


def heads_first(rows: Floats) -> Floats:
    """Turn (tokens, heads, dim) into contiguous (heads, tokens, dim)."""
    return np.ascontiguousarray(rows.transpose(1, 0, 2))


def rows_checked(job: Job) -> list[int]:
    count = job.queries
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, ROWS_CHECKED))})


def attend_exactly(job: Job, data: Data) -> NDArray[np.float64]:
    """Return causal attention in float64, of the rows that are checked."""
    rows, wide = rows_checked(job), np.float64
    shape = len(rows), job.kv_heads, job.heads // job.kv_heads, job.head_dim
    query = data.query[rows].reshape(shape).transpose(1, 0, 2, 3).astype(wide) * job.scale
    logits = np.empty((*query.shape[:3], job.tokens))
    parts = [slice(i, i + CHUNK) for i in range(0, job.tokens, CHUNK)]  # that stay in cache
    for part in parts:
        keys = data.keys[: job.tokens][part].astype(wide).transpose(1, 2, 0)
        logits[..., part] = query @ keys[:, None]
    for i, row in enumerate(rows):
        logits[:, i, :, job.tokens - job.queries + row + 1 :] = -np.inf
    logits -= logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits, out=logits)
    right = np.zeros_like(query)
    for part in parts:
        values = data.values[: job.tokens][part].astype(wide).transpose(1, 0, 2)
        right += weights[..., part] @ values[:, None]
    right /= weights.sum(axis=-1, keepdims=True)
    return right.transpose(1, 0, 2, 3).reshape(len(rows), job.heads, job.head_dim)


def check(
    job: Job, one: Contestant, data: Data, right: NDArray[Any] | None, tolerance: float, bits: float
) -> dict[str, float]:
    """Refuse a contestant whose answer, after its first `run`, is wrong.

    The answer is compared with `right`, float64 attention over the data, from which it may be as
    far as storing at `bits` explains, and with float64 attention over what is stored, where that
    can be read, within `tolerance`. Of an append, the stored values are compared.

    Raises
    ------
    WrongResultError
        An error is out of bounds.
    """
    held = one.stored()
    storage = 0.01 if bits >= 16 else 0.08 if bits >= 8 else 0.6
    if job.appends:
        if held is None:
            return {}
        pairs = zip(held, (data.keys, data.values), strict=True)
        error = max(_distance(a[: job.new], b[: job.new]) for a, b in pairs)
        return {"error_data": _bounded("storage error", error, storage)}
    got = np.asarray(one.output(), np.float32).reshape(job.queries, job.heads, job.head_dim)
    got = got[rows_checked(job)]
    assert right is not None
    error = _distance(got, right)
    errors = {"error_data": _bounded("error", error, max(storage, 2 * tolerance))}
    if held is not None:
        pairs = list(zip(held, (data.keys, data.values), strict=True))
        same = all(np.array_equal(a[:1], b[:1]) and np.array_equal(a, b) for a, b in pairs)
        right = right if same else attend_exactly(job, Data(data.query, *held))
        errors["error"] = _bounded("computing error", _distance(got, right), tolerance)
    return errors


def check_model(one: Any, right: NDArray[Any], tolerance: float) -> dict[str, float]:
    """Refuse a model whose answer is farther than `tolerance` from the `right` one."""
    return {"error_data": _bounded("error", _distance(one.output(), right), tolerance)}


def _distance(got: Floats, right: NDArray[Any]) -> float:
    return float(np.linalg.norm(got - right) / np.linalg.norm(right))


def _bounded(what: str, error: float, bound: float) -> float:
    if not error <= bound:
        raise WrongResultError(f"{what} {error:.2g} is above {bound:.2g}")
    return error


@dataclass(frozen=True)
class Timing:
    """Seconds of steps on one cache; `busy` is how many cores others used meanwhile."""

    samples: list[float]
    busy: float


def measure(one: Contestant, seconds: float, between: Callable[[], None]) -> Timing:
    """Time `run` for so many seconds, at least once; call `between` before each time."""
    watch = Watch()
    samples = [sample / one.caches for sample in _samples(one, seconds, between)]
    return Timing(samples, watch.others())


def _samples(one: Contestant, seconds: float, between: Callable[[], None]) -> Iterator[float]:
    end = time.perf_counter() + seconds
    while True:
        one.prepare()
        between()
        start = time.perf_counter()
        one.run()
        stop = time.perf_counter()
        yield stop - start
        if stop >= end:
            return


def measure_copy(job: Job, data: Data) -> float:
    """Median seconds of copying the float32 input of an append, on one thread, to cold memory."""
    source = np.stack([data.keys[: job.new], data.values[: job.new]])
    places = max(2, -(-job.cold_bytes // source.nbytes))
    targets = np.zeros((places, *source.shape), np.float32)
    targets[:] = 1  # so that the system has given every page
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for target in targets:
            np.copyto(target, source)
        seconds.append((time.perf_counter() - start) / places)
    return float(np.median(seconds))


def measure_stream(one: Contestant, calls: int) -> Timing:
    """Time each of `calls` calls of `run`."""
    watch, run, prepare, clock = Watch(), one.run, one.prepare, time.perf_counter
    times = [0.0] * calls
    for i in range(calls):
        prepare()
        start = clock()
        run()
        times[i] = clock() - start
    return Timing(times, watch.others())


class Watch:
    """How many cores other processes use, where the system tells (Linux); else zero."""

    def __init__(self) -> None:
        self._start = self._now()

    def others(self) -> float:
        wall, all_of_them, own = (b - a for a, b in zip(self._start, self._now(), strict=True))
        known = all_of_them and wall > 0.1  # the system counts in hundredths of a second
        return round(max(0.0, (all_of_them - own) / wall), 2) if known else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        try:
            with open("/proc/stat") as file:
                ticks = [int(word) for word in file.readline().split()[1:9]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        except (OSError, AttributeError, ValueError):
            busy = 0.0
        return time.perf_counter(), busy, time.process_time()
