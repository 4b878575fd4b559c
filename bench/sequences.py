"""What operations on sequences cost: fork, trim, transactions, batches. Needs kvz alone.

    python bench/sequences.py [--core wasm] [--tokens 100000]

Compared operations take turns, so that a machine that slows down slows both; medians are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np

import kvz

HEADS, QUERY_HEADS, HEAD_DIM, DRAFT = 8, 32, 128, 8
LENGTHS = range(1000, 16001, 1000)  # of the sequences of a batch

rng = np.random.default_rng(0)


def filled(tokens: int, core: str, store: str = "q4") -> kvz.TwoTierCache:
    """Make a cache that holds `tokens` tokens."""
    cache = kvz.TwoTierCache(
        num_kv_heads=HEADS, head_dim=HEAD_DIM, max_tokens=1 << 24, store_precision=store, core=core
    )
    for start in range(0, tokens, 4096):
        part = rng.standard_normal((min(4096, tokens - start), HEADS, HEAD_DIM), np.float32)
        cache.append(part, part)
    return cache


def microseconds(step: Callable[[], object]) -> float:
    """Time one call; what it returns lives until the clock has stopped."""
    start = time.perf_counter()
    kept = step()
    taken = time.perf_counter() - start
    del kept
    return taken * 1e6


def forks(cache: kvz.TwoTierCache) -> Iterator[tuple[str, float]]:
    """Fork, and the first append of a fork whose slots another fork has claimed."""
    token = rng.standard_normal((1, HEADS, HEAD_DIM), np.float32)
    yield "fork", statistics.median(microseconds(cache.fork) for _ in range(300))
    half = len(cache) // 2 + 1
    yield (
        f"fork of the first {half} tokens",
        statistics.median(microseconds(lambda: cache.fork(half)) for _ in range(300)),
    )
    first = []
    for _ in range(100):
        fork = cache.fork()
        first.append(microseconds(lambda fork=fork: fork.append(token, token)))
    yield "first append of a fork (copies a page of every head)", statistics.median(first)


def drafts(cache: kvz.TwoTierCache) -> Iterator[tuple[str, float]]:
    """A draft of 8 tokens that is rejected, beside a plain append of 8 tokens: means of 800.

    Means, because now and then an append makes a batch migrate, and that is part of its price.
    """
    draft = rng.standard_normal((DRAFT, HEADS, HEAD_DIM), np.float32)

    def transaction() -> None:
        with cache.transaction() as step:
            cache.append(draft, draft)
            step.rollback()

    def trim() -> None:
        cache.trim(DRAFT)
        cache.append(draft, draft)

    times: dict[str, list[float]] = {"append": [], "trim": [], "transaction": []}
    for _ in range(800):
        times["append"].append(microseconds(lambda: cache.append(draft, draft)))
        times["trim"].append(microseconds(trim))
        times["transaction"].append(microseconds(transaction))
    plain = statistics.mean(times["append"])
    yield f"append of {DRAFT} tokens", plain
    for name, text in (("trim", "trim and append again"), ("transaction", "append, rolled back")):
        mean = statistics.mean(times[name])
        yield f"{text} ({mean / plain:.2f}x)", mean


def batches(core: str, store: str) -> Iterator[tuple[str, float]]:
    """16 sequences of 1k to 16k tokens in one call, and one sequence of as many tokens."""
    caches = [filled(n, core, store) for n in rng.permutation(LENGTHS).tolist()]
    single = filled(sum(LENGTHS), core, store)
    queries = rng.standard_normal((len(caches), QUERY_HEADS, HEAD_DIM), np.float32)
    steps: dict[str, Callable[[], object]] = {
        "attend_many": lambda: kvz.attend_many(caches, queries),
        "one by one": lambda: [c.attend(q) for c, q in zip(caches, queries, strict=True)],
        "one sequence": lambda: single.attend(queries[0]),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(15):
        for name, step in steps.items():
            times[name].append(microseconds(step))
    medians = {name: statistics.median(each) for name, each in times.items()}
    nbytes = {"one sequence": single.nbytes}
    speed = single.nbytes / medians["one sequence"]
    for name, median in medians.items():
        own = nbytes.get(name, sum(cache.nbytes for cache in caches))
        yield f"{store}: {name} ({own / median / speed:.0%} of the bytes per second)", median


def main() -> None:
    """Print one line per operation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--core", choices=["native", "wasm"], default="native")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        kvz.set_num_threads(given.threads)
    print(kvz.info())
    cache = filled(given.tokens, given.core)
    print(cache)
    parts = [forks(cache), drafts(cache), batches(given.core, "q4"), batches(given.core, "q8")]
    for part in parts:
        for text, taken in part:
            print(f"{taken:12,.1f} us  {text}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
