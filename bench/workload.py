"""The work every contestant does: shapes, data, the float64 answer, and the clock.

Called by plan.py, worker.py and the contestants.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

ROWS_CHECKED = 8  # queries of a prefill that are compared with float64


class WrongResultError(Exception):
    """A contestant's answer is out of bounds: its speed is not worth printing."""


@dataclass(frozen=True)
class Job:
    """One thing to time.

    Attributes
    ----------
    case : {"decode", "prefill", "append", "stream", "overhead", "shapes", "wasm"}
        "stream" is "append" with the time of every single call; the last two are a "decode" of
        other shapes, and of the WebAssembly core.
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
        return self.past + self.new if self.case == "prefill" else self.past

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

    def caches(self, bits: float, most: int = 512) -> int:
        """How many caches to rotate over, at `bits` per stored value."""
        one = self.tokens * self.kv_heads * self.head_dim * 2 * bits / 8
        return int(min(most, max(1, -(-self.cold_bytes // one))))

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


@lru_cache(maxsize=1)
def _data(tokens: int, queries: int, heads: int, kv_heads: int, dim: int) -> Data:
    random = np.random.default_rng(20260101)
    query = random.standard_normal((queries, heads, dim), dtype=np.float32)
    keys = random.standard_normal((tokens, kv_heads, dim), dtype=np.float32)
    values = random.standard_normal((tokens, kv_heads, dim), dtype=np.float32)
    for head in range(kv_heads):
        channels = random.choice(dim, 4, replace=False)
        offset = random.uniform(8, 16, 4) * random.choice([-1.0, 1.0], 4)
        keys[:, head, channels] = keys[:, head, channels] * 3 + offset.astype(np.float32)
    values *= np.exp(0.7 * random.standard_normal((1, kv_heads, dim))).astype(np.float32)
    values[random.random(tokens) < 0.01] *= 4
    return Data(query, keys, values)


def make_data(job: Job) -> Data:
    """Return data as models have them: a few key channels with large offsets, and loud tokens."""
    tokens = max(job.tokens, job.new) if job.appends else job.tokens
    return _data(tokens, job.queries, job.heads, job.kv_heads, job.head_dim)


def heads_first(rows: Floats) -> Floats:
    """Turn (tokens, heads, dim) into contiguous (heads, tokens, dim)."""
    return np.ascontiguousarray(rows.transpose(1, 0, 2))


def relative_error(job: Job, query: Floats, keys: Floats, values: Floats, got: Floats) -> float:
    """Compare with causal attention in float64: the norm of the difference over the norm."""
    count, group = job.queries, job.heads // job.kv_heads
    rows = sorted({round(i) for i in np.linspace(0, count - 1, min(count, ROWS_CHECKED))})
    difference = total = 0.0
    for head in range(job.kv_heads):
        k, v = keys[:, head].astype(np.float64), values[:, head].astype(np.float64)
        mine = slice(head * group, (head + 1) * group)
        for row in rows:
            visible = job.tokens - count + row + 1
            logits = query[row, mine].astype(np.float64) @ k[:visible].T * job.scale
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            right = weights @ v[:visible] / weights.sum(axis=1, keepdims=True)
            difference += float(((got[row, mine] - right) ** 2).sum())
            total += float((right**2).sum())
    return (difference / total) ** 0.5


def check(job: Job, one: Contestant, data: Data, tolerance: float, bits: float) -> dict[str, float]:
    """Refuse a contestant whose answer is wrong.

    Its answer is compared with float64 attention over the data, which must be explained by storing
    them at `bits`, and over what it stores, where that can be read, within `tolerance`. Of an
    append, the stored values are compared.

    Raises
    ------
    WrongResultError
        An error is out of bounds.
    """
    one.prepare()
    one.run()
    held = one.stored()
    storage = 0.01 if bits >= 16 else 0.08 if bits >= 8 else 0.6
    if job.appends:
        if held is None:
            return {}
        pairs = zip(held, (data.keys, data.values), strict=True)
        error = max(_distance(a[: job.new], b[: job.new]) for a, b in pairs)
        return {"error_data": _bounded("storage error", error, storage)}
    got = np.asarray(one.output(), np.float32).reshape(job.queries, job.heads, job.head_dim)
    error = relative_error(job, data.query, data.keys, data.values, got)
    errors = {"error_data": _bounded("error", error, max(storage, 2 * tolerance))}
    if held is not None:
        error = relative_error(job, data.query, *held, got)
        errors["error"] = _bounded("computing error", error, tolerance)
    return errors


def _distance(got: Floats, right: Floats) -> float:
    return float(np.linalg.norm(got - right) / np.linalg.norm(right))


def _bounded(what: str, error: float, bound: float) -> float:
    if not error <= bound:
        raise WrongResultError(f"{what} {error:.2g} is above {bound:.2g}")
    return error


@dataclass(frozen=True)
class Timing:
    """Seconds of one step on one cache; `busy` is how many cores others used meanwhile."""

    median: float
    p10: float
    p90: float
    p99: float
    max: float
    samples: int
    busy: float


def measure(one: Contestant, seconds: float, least: int = 5) -> Timing:
    """Time `run` until there are enough samples, again if others used the machine much."""
    timings = []
    for _ in range(1 if seconds < 0.5 else 2):
        watch = Watch()
        samples = list(_samples(one, seconds, least))
        timings.append(summarize([s / one.caches for s in samples], watch.others()))
        if timings[-1].busy < 0.15:
            break
    return min(timings, key=lambda timing: timing.busy)


def _samples(one: Contestant, seconds: float, least: int) -> Iterator[float]:
    end, last, count = time.perf_counter() + seconds, time.perf_counter() + 6 * seconds, 0
    while time.perf_counter() < end or (count < least and time.perf_counter() < last):
        one.prepare()
        start = time.perf_counter()
        one.run()
        yield time.perf_counter() - start
        count += 1


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
    """Time each of `calls` calls of `run`, without anything between them."""
    watch, run, clock = Watch(), one.run, time.perf_counter
    one.prepare()
    times = [0.0] * calls
    for i in range(calls):
        start = clock()
        run()
        times[i] = clock() - start
    return summarize(times, watch.others())


def summarize(samples: Sequence[float], busy: float) -> Timing:
    p10, median, p90, p99 = np.percentile(samples, (10, 50, 90, 99)).tolist()
    return Timing(median, p10, p90, p99, max(samples), len(samples), round(busy, 2))


class Watch:
    """How many cores other processes use, where the system tells (Linux); else zero."""

    def __init__(self) -> None:
        self._start = self._now()

    def others(self) -> float:
        wall, all_of_them, own = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return max(0.0, (all_of_them - own) / wall) if all_of_them and wall > 0.2 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        try:
            with open("/proc/stat") as file:
                ticks = [int(word) for word in file.readline().split()[1:9]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        except (OSError, AttributeError, ValueError):
            busy = 0.0
        return time.perf_counter(), busy, time.process_time()
