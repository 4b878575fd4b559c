"""Which jobs there are: the cases of the command line spelled out. Called by run.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from workload import Job

CASES = ("decode", "prefill", "append", "overhead", "scaling", "shapes", "wasm")
SMALL = {"heads": 9, "kv_heads": 3, "head_dim": 64}  # the shape of a small model
RATIOS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 64)  # of query heads to kv heads
HEAD_DIMS = (64, 80, 96, 128, 256)
STREAM_CALLS = 4096


@dataclass(frozen=True)
class Size:
    """How much to measure."""

    decode: tuple[int, ...] = (1024, 4096, 16384)
    prefill: tuple[int, ...] = (0, 4096, 16384)
    small: tuple[int, ...] = (4096,)
    new: int = 512
    append: int = 4096
    scaling: int = 16384
    shapes: int = 4096
    wasm: int = 4096
    cold_bytes: int = 256 << 20
    prefill_bytes: int = 16 << 20
    seconds: float = 1.0


NORMAL = Size()
FULL = replace(NORMAL, decode=(*NORMAL.decode, 65536, 131072), seconds=2.0)
QUICK = Size(
    decode=(1024,),
    prefill=(0,),
    small=(),
    new=64,
    append=1024,
    scaling=1024,
    shapes=512,
    wasm=512,
    cold_bytes=32 << 20,
    prefill_bytes=0,
    seconds=0.05,
)


SIZES = {"quick": QUICK, "normal": NORMAL, "full": FULL}


def jobs(cases: Sequence[str], kv: str, threads: int, size: Size) -> list[Job]:
    """Return every job of one contestant at one number of threads, each once."""
    return list(dict.fromkeys(_jobs(cases, kv, threads, size)))


def _jobs(cases: Sequence[str], kv: str, threads: int, size: Size) -> Iterator[Job]:
    cold = {"cold_bytes": size.cold_bytes, "seconds": size.seconds}

    def job(case: str, past: int, **other: int) -> Job:
        return Job(case, kv, threads, past, **{**cold, **other})

    if "decode" in cases:
        yield from (job("decode", past) for past in size.decode)
        yield from (job("decode", past, **SMALL) for past in size.small)
    if "scaling" in cases:
        yield job("decode", size.scaling)
    if "prefill" in cases:
        # Multiplications take the time here, not bytes: fewer caches will do.
        few = {"new": size.new, "cold_bytes": size.prefill_bytes}
        yield from (job("prefill", past, **few) for past in size.prefill)
        yield from (job("prefill", past, **few, **SMALL) for past in size.small)
    if "append" in cases:
        yield job("append", size.append, new=1)
        yield job("append", size.append, new=size.new)
        yield job("stream", STREAM_CALLS + 1, new=1, cold_bytes=0)  # one is the check's
    if "shapes" in cases:
        ratios = [(ratio, 128) for ratio in RATIOS] + [(4, dim) for dim in HEAD_DIMS]
        for ratio, dim in ratios:
            yield job("shapes", size.shapes, heads=8 * ratio, head_dim=dim)
    if "wasm" in cases and threads == 1:
        yield job("wasm", size.wasm)
    if "overhead" in cases:
        yield job("overhead", 8, cold_bytes=0)
