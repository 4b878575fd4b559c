"""Which jobs there are, and which are measured side by side. Called by run.py and worker.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from contestants import width

from workload import Job

CASES = ("decode", "linear", "prefill", "append", "overhead", "shapes", "wasm", "forward")
QUICK_CASES = tuple(case for case in CASES if case != "forward")  # which imports transformers
OURS_ALONE = ("linear", "shapes", "wasm")  # cases that compare kvz with itself
SMALL = {"heads": 9, "kv_heads": 3, "head_dim": 64}  # the shape of a small model
STREAM_CALLS = 4096
ROUNDS = 5  # in which everything that is compared takes its turn
HEAT_BYTES = 4 << 30  # of caches that are held at the same time

# A step of which every sample would cost more seconds than this is left out.
SLOW_SECONDS = {"prefill": 2.5, "forward": 2.5}
SLOW_SECONDS_ELSE = 1.0


@dataclass(frozen=True)
class Size:
    """How much to measure."""

    decode: tuple[int, ...] = (1024, 4096, 16384, 65536, 131072)
    decode_few: tuple[int, ...] = (1024, 4096, 16384)  # with fewer than the most threads
    linear: tuple[int, ...] = (4096, 16384, 65536, 131072)
    prefill: tuple[int, ...] = (0, 4096, 16384)
    small: tuple[int, ...] = (4096,)
    new: int = 512
    append: int = 4096
    shapes: int = 4096
    ratios: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 16, 64)  # of query heads to kv heads
    head_dims: tuple[int, ...] = (64, 80, 96, 128, 256)
    wasm: int = 4096
    forward: tuple[tuple[int, int], ...] = ((0, 512), (2048, 512), (2048, 1))  # past, new
    cold_bytes: int = 256 << 20
    seconds: float = 0.75
    linear_seconds: float = 1.5


WHOLE = Size()
QUICK = replace(
    WHOLE,
    decode=(1024,),
    decode_few=(1024,),
    linear=(256, 1024),
    prefill=(0,),
    small=(),
    new=64,
    append=1024,
    shapes=512,
    ratios=(1, 4, 5),
    head_dims=(80, 128),
    wasm=512,
    forward=((320, 16), (320, 1)),
    cold_bytes=8 << 20,
    seconds=0.02,
    linear_seconds=0.02,
)

SIZES = {"quick": QUICK, "whole": WHOLE}


def jobs(
    cases: Sequence[str], kv: str, threads: int, counts: Sequence[int], size: Size
) -> Iterator[Job]:
    """Yield every job of one contestant at one of the numbers of threads that are measured."""
    cold = {"cold_bytes": size.cold_bytes}

    def job(case: str, past: int, seconds: float = size.seconds, **other: int) -> Job:
        return Job(case, kv, threads, past, seconds=seconds, **{**cold, **other})

    if "decode" in cases:
        most = size.decode if threads == max(counts) else size.decode_few
        yield from (job("decode", past) for past in most)
        yield from (job("decode", past, **SMALL) for past in size.small)
    if "linear" in cases:
        yield from (job("linear", past, size.linear_seconds) for past in size.linear)
    if "prefill" in cases:
        yield from (job("prefill", past, new=size.new) for past in size.prefill)
        yield from (job("prefill", past, new=size.new, **SMALL) for past in size.small)
    if "append" in cases:
        yield job("append", size.append, new=1)
        yield job("append", size.append, new=size.new)
        yield job("stream", STREAM_CALLS, cold_bytes=0)
    if "overhead" in cases:
        yield job("overhead", 8, cold_bytes=0)
    if "shapes" in cases and threads == min(counts):
        pairs = [(ratio, 128) for ratio in size.ratios] + [(4, dim) for dim in size.head_dims]
        for ratio, dim in dict.fromkeys(pairs):
            yield job("shapes", size.shapes, size.seconds / 2, heads=8 * ratio, head_dim=dim)
    if "wasm" in cases and threads == 1:
        yield job("wasm", size.wasm)
    if "forward" in cases:
        for past, new in size.forward:
            yield job("forward", past, 2 * size.seconds, new=new, cold_bytes=0, **SMALL)


Entrant = tuple[str, Job]  # a contestant's name, and what it is to do


def heats(entrants: Sequence[Entrant]) -> list[list[Entrant]]:
    """Group what is compared with each other, so that it is measured in the same minutes."""
    found: dict[tuple[object, ...], list[Entrant]] = {}
    for name, job in entrants:
        found.setdefault(_key(job), []).append((name, job))
    split: list[list[Entrant]] = []
    for heat in found.values():
        split += [heat] if _bytes(heat) <= HEAT_BYTES else _by_threads(heat)
    return sorted(split, key=_order)


def _key(job: Job) -> tuple[object, ...]:
    """Say what the jobs of a heat have in common."""
    if job.case in OURS_ALONE:
        # Their figures are ratios over tokens, shapes or cores, not over libraries.
        return job.case, job.kv, job.threads
    shape = job.case, job.past, job.new, job.heads, job.head_dim
    return (*shape, width(job.kv)) if job.case == "decode" else shape


def _bytes(heat: Sequence[Entrant]) -> float:
    return sum(job.caches(width(job.kv)) * job.bytes(width(job.kv)) for _, job in heat)


def _by_threads(heat: Sequence[Entrant]) -> list[list[Entrant]]:
    counts = dict.fromkeys(job.threads for _, job in heat)
    return [[one for one in heat if one[1].threads == count] for count in counts]


def _order(heat: Sequence[Entrant]) -> tuple[int, ...]:
    job = heat[0][1]
    case = ("append" if job.case == "stream" else job.case,)
    return CASES.index(*case), -job.head_dim, job.past, job.new, width(job.kv), job.threads


def weight(job: Job) -> float:
    """Return roughly how long a job takes against others, for the time that is left."""
    if job.case == "forward":
        return 1.5 * job.seconds + 3
    values = job.tokens * job.kv_heads * job.head_dim * 2
    steps = job.flops / 150e9 if job.case == "prefill" else values / 5e8
    return 1.5 * job.seconds + 0.5 + values / 1.5e8 + 6 * steps


def too_slow(job: Job, seconds: float) -> bool:
    """Whether a step of so many seconds is left out."""
    return seconds > SLOW_SECONDS.get(job.case, SLOW_SECONDS_ELSE)


def expected_seconds(job: Job, results: Sequence[tuple[Job, float]]) -> float | None:
    """Return what a step should take, from steps of the same kind at fewer tokens."""
    alike = [
        (one.past, seconds)
        for one, seconds in results
        if one.past < job.past and replace(one, past=job.past) == job
    ]
    if not alike or job.case not in ("decode", "prefill"):
        return None
    past, seconds = max(alike)
    return seconds * job.flops / replace(job, past=past).flops
