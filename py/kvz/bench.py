"""The command ``kvz bench``: how fast caches of each format are on this machine. Called by cli.py.

One layer, one sequence. Steps go round over so many caches that none is found in the processor's
own caches, as in a model with many layers. How fast memory can be read is measured beside, because
that bounds a decoding step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import kvz
from kvz.arrays import Floats
from kvz.demo.report import print_table, progress, store_name
from kvz.errors import InvalidArgumentError
from kvz.presets import Store, as_preset

STORES: tuple[Store, ...] = ("f16", "q8", ("q8", "q4"), "q4")
PREFILL_TOKENS = 512  # new ones that attend at once; also how many an append takes
REPEATS_MIN = 5
HEAD = (
    "\nstore",
    "bits/\nvalue",
    "decode\nµs",
    "GB/s\nread",
    "of\nmemory",
    "prefill\ntokens/s",
    "append of 1\nµs",
    "append of 512\nµs/token",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the command.

    Attributes
    ----------
    stores : tuple of Store
    tokens : int
        Held by each cache.
    heads, kv_heads, head_dim : int
        Of the layer.
    cold_bytes : int
        The caches of a store take together at least this much.
    seconds : float
        Spent on each figure.
    core : {"native", "wasm"}, optional
    threads : int, optional
    as_json : bool
    """

    stores: tuple[Store, ...] = STORES
    tokens: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    cold_bytes: int = 256 << 20
    seconds: float = 0.5
    core: str | None = None
    threads: int | None = None
    as_json: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one store: medians.

    Attributes
    ----------
    store : str
    bits_per_value : float
        As allocated.
    decode_seconds : float
        One query over all tokens held.
    read_bytes_per_second : float
        The bytes of a cache over `decode_seconds`.
    prefill_tokens_per_second : float
        Queries of 512 new tokens, over all held.
    append_one_seconds, append_seconds_per_token : float
        One token at a time, and 512.
    """

    store: str
    bits_per_value: float
    decode_seconds: float
    read_bytes_per_second: float
    prefill_tokens_per_second: float
    append_one_seconds: float
    append_seconds_per_token: float

    def cells(self, memory: float) -> list[str]:
        """Return what the table shows, in the order of `HEAD`."""
        return [
            self.store,
            f"{self.bits_per_value:.2f}",
            f"{self.decode_seconds * 1e6:,.0f}",
            f"{self.read_bytes_per_second / 1e9:.1f}",
            f"{self.read_bytes_per_second / memory:.0%}",
            f"{self.prefill_tokens_per_second:,.0f}",
            f"{self.append_one_seconds * 1e6:.1f}",
            f"{self.append_seconds_per_token * 1e6:.2f}",
        ]


def run(settings: Settings) -> None:
    """Measure everything, and print a table or JSON.

    Raises
    ------
    InvalidArgumentError
        The layer is impossible, or too short to measure.
    """
    if settings.tokens < PREFILL_TOKENS:
        raise InvalidArgumentError(
            f"tokens: expected {PREFILL_TOKENS} or more, got {settings.tokens}"
        )
    if settings.threads is not None:
        kvz.set_num_threads(settings.threads, settings.core)
    now = kvz.info(settings.core)
    rows = []
    with progress("measuring", 1 + 5 * len(settings.stores), "figures") as advance:
        memory = memory_bytes_per_second(now.num_threads, settings.seconds)
        advance(1)
        for store in settings.stores:
            rows.append(measure(settings, store, advance))
    if settings.as_json:
        found = {**asdict(settings), "memory_bytes_per_second": memory, "info": now.to_dict()}
        print(json.dumps({**found, "rows": list(map(asdict, rows))}, indent=2))
        return
    caption = (
        f"{settings.heads} query heads over {settings.kv_heads} kv heads of {settings.head_dim}, "
        f"{settings.tokens:,} tokens, not in the\nprocessor's caches; {now.core} core, {now.isa}, "
        f"threads: {now.num_threads}. Memory is read at {memory / 1e9:.1f} GB/s here."
    )
    print_table(HEAD, [row.cells(memory) for row in rows], caption)


def measure(settings: Settings, store: Store, advance: Callable[[int], None]) -> Row:
    """Measure one store."""
    random = np.random.default_rng(0)
    shape = (settings.tokens, settings.kv_heads, settings.head_dim)
    keys, values = (random.standard_normal(shape, dtype=np.float32) for _ in range(2))
    caches = [cache_of(settings, store, 0)]
    caches[0].append(keys, values)
    while sum(cache.nbytes for cache in caches) < settings.cold_bytes:
        caches.append(cache_of(settings, store, len(caches)))
        caches[-1].append(keys, values)
    advance(1)
    queries = random.standard_normal(
        (PREFILL_TOKENS, settings.heads, settings.head_dim), dtype=np.float32
    )
    seconds = settings.seconds
    decode = timed(lambda cache: cache.attend(queries[0]), caches, seconds)
    advance(1)
    prefill = timed(lambda cache: cache.attend(queries), caches, seconds)
    advance(1)
    nbytes, stats = caches[0].nbytes, caches[0].stats()
    tokens = cycle(range(settings.tokens))
    one = timed(lambda cache: cache.append(*token(keys, values, next(tokens))), caches, seconds)
    advance(1)
    new = keys[:PREFILL_TOKENS], values[:PREFILL_TOKENS]
    many = timed(lambda cache: cache.append(*new), caches, seconds)
    advance(1)
    for cache in caches:
        cache.close()
    return Row(
        store=store_name(store),
        bits_per_value=stats.bits_per_value,
        decode_seconds=decode,
        read_bytes_per_second=nbytes / decode,
        prefill_tokens_per_second=PREFILL_TOKENS / prefill,
        append_one_seconds=one,
        append_seconds_per_token=many / PREFILL_TOKENS,
    )


def cache_of(settings: Settings, store: Store, layer: int) -> kvz.TwoTierCache:
    """Make an empty cache, which stays as long as it is while appends are measured.

    Where layers take stores in turn, caches do.
    """
    config = as_preset(store).config(
        layer,
        sink_tokens=0,
        num_kv_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        max_tokens=settings.tokens,
        tail_length=min(256, settings.tokens // 4),
    )
    return kvz.TwoTierCache(config, core=settings.core)


def token(keys: Floats, values: Floats, index: int) -> tuple[Floats, Floats]:
    """Return one token, as a decoding step appends it."""
    return keys[index : index + 1], values[index : index + 1]


def timed(step: Callable[[Any], Any], caches: Sequence[Any], seconds: float) -> float:
    """Return the median time of a step, which goes round over the caches."""
    times: list[float] = []
    around: Iterator[Any] = cycle(caches)
    step(next(around))  # which may have to fetch memory from the system
    end = perf_counter() + seconds
    while len(times) < REPEATS_MIN or perf_counter() < end:
        cache = next(around)
        start = perf_counter()
        step(cache)
        times.append(perf_counter() - start)
    return median(times)


def memory_bytes_per_second(threads: int, seconds: float, nbytes: int = 256 << 20) -> float:
    """Return how fast numpy reads memory that is in no cache, with so many threads."""
    memory = np.ones(nbytes // 8, np.int64)
    pieces = np.array_split(memory, threads)
    with ThreadPoolExecutor(threads) as pool:
        return nbytes / timed(lambda _: list(pool.map(np.max, pieces)), [None], seconds)
