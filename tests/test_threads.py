"""Several Python threads: readers beside one writer, caches beside caches, errors beside errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvz
from support import (
    KINDS,
    Floats,
    configure,
    leaving,
    make,
    make_from,
    queries,
    same_bits,
    stream,
    together,
    wait_for_more,
)

kinds = pytest.mark.parametrize("kind", KINDS)


def numbered(first: int, count: int, heads: int, dim: int) -> Floats:
    """Tokens that are their own position in every value: exact in float32."""
    numbers = np.arange(first, first + count, dtype=np.float32)
    return np.ascontiguousarray(np.broadcast_to(numbers[:, None, None], (count, heads, dim)))


def whole(numbers: Floats) -> None:
    """Assert that these are three sinks and then consecutive positions, up to 200 in all."""
    expected = np.arange(len(numbers))
    if len(numbers) == 200 and numbers[-1] >= 200:
        expected = np.concatenate([[0, 1, 2], np.arange(numbers[-1] - 196, numbers[-1] + 1)])
    np.testing.assert_array_equal(numbers, expected)


@kinds
def test_readers_never_see_a_torn_state(core: Any, kind: str) -> None:
    """While one thread appends, others read whole states: no hole, no double, no mixture."""
    fields = {"store_precision": "f32", "tail_precision": "f32", "max_tokens": 200}
    cache = make(core, kind, **fields, sink_tokens=3)
    steps, total = [1, 2, 17, 64, 5], 4000
    finished = threading.Event()
    looked: list[None] = []

    @leaving(finished)
    def write() -> int:
        first, turn = 0, 0
        while first < total:
            count = steps[turn % len(steps)]
            rows = numbered(first, count, 2, 32)
            cache.append(rows, rows)
            wait_for_more(looked, finished)
            first, turn = first + count, turn + 1
        return first

    @leaving(finished)
    def read() -> int:
        last, reads = -1.0, 0
        while not finished.is_set() or not reads:
            keys, values = cache.get_all_kv()
            whole(keys[:, 0, 0])
            assert (keys == keys[:, :1, :1]).all()
            np.testing.assert_array_equal(keys, values)
            newest = float(keys[-1, 0, 0]) if len(keys) else -1.0
            assert newest >= last
            last, reads = newest, reads + 1
            looked.append(None)
        return reads

    @leaving(finished)
    def ask() -> int:
        reads, zero = 0, np.zeros((2, 32), np.float32)
        while not finished.is_set() or not reads:
            # The LSE tells how many tokens there were, the mean whether they were whole.
            out, lse = cache.attend(zero, return_lse=True)
            count = round(float(np.exp(np.float64(lse[0]))))
            mean = float(out[0, 0])
            if 0 < count < 200:
                assert mean == pytest.approx((count - 1) / 2, rel=1e-5)
            elif count:
                newest = (mean * 200 - 3) / 197 + 98  # 3 sinks, 197 in a row
                assert newest == pytest.approx(round(newest), abs=0.05)
            reads += 1
            looked.append(None)
        return reads

    @leaving(finished)
    def count() -> int:
        reads, last = 0, 0
        while not finished.is_set() or not reads:
            stats = cache.stats()
            assert stats.total_tokens <= 200
            if kind == "two_tier":
                parts = (stats.sink_tokens, stats.store_tokens, stats.tail_tokens)
                assert sum(parts) == stats.total_tokens
            assert cache.next_position >= last
            last, reads = cache.next_position, reads + 1
            looked.append(None)
        return reads

    written, *reads = together(write, read, ask, count)
    assert cache.next_position == written
    assert min(reads) > 0
    cache.check()


@kinds
def test_attention_never_sees_half_an_append(core: Any, kind: str) -> None:
    """A long append is there wholly or not at all for those who attend meanwhile."""
    fields = {"store_precision": "f32", "tail_precision": "f32", "head_dim": 128}
    cache = make(core, kind, **fields, max_tokens=3000, tail_length=900, migration_batch=64)
    finished = threading.Event()
    block, appends = 1000, 60
    ready = [numbered(first * block, block, 2, 128) for first in range(appends)]

    asked: list[None] = []

    @leaving(finished)
    def write() -> None:
        for rows in ready:
            cache.append(rows, rows)
            wait_for_more(asked, finished)

    @leaving(finished)
    def ask() -> int:
        zero, seen = np.zeros((2, 128), np.float32), set()
        while not finished.is_set():
            out, lse = cache.attend(zero, return_lse=True)
            asked.append(None)
            if np.isneginf(lse[0]):
                continue
            held = np.exp(np.float64(lse[0]))
            newest = out.astype(np.float64) + (held - 1) / 2  # of `held` numbers in a row
            # Both count blocks. Float32 sums of 3000 numbers up to 60000 err by less than 1, half
            # an append by hundreds.
            for numbers in (held / block, (newest + 1) / block):
                if np.abs(numbers - np.rint(numbers)).max() > 0.002:
                    pytest.fail(f"half an append: {held:.2f} tokens up to {newest[0, 0]:.2f}")
            seen.add(round(float(newest[0, 0])))
        return len(seen)

    _, *seen = together(write, ask, ask)
    assert max(seen) > 1
    cache.check()


@kinds
def test_appends_of_several_threads_are_each_whole(core: Any, kind: str) -> None:
    """Writers may come from several threads: appends are whole, and positions are given once."""
    cache = make(core, kind, store_precision="f32", tail_precision="f32", max_tokens=4096)

    def write(number: int) -> Callable[[], None]:
        rows = np.full((5, 2, 32), number, np.float32)

        def work() -> None:
            for _ in range(60):
                cache.append(rows, rows)

        return work

    together(*(write(number) for number in range(4)))
    keys = cache.get_all_kv()[0][:, 0, 0]
    assert len(keys) == 4 * 60 * 5 == cache.next_position
    runs = keys.reshape(-1, 5)
    np.testing.assert_array_equal(runs, np.repeat(runs[:, :1], 5, axis=1))
    assert [int((runs[:, 0] == number).sum()) for number in range(4)] == [60] * 4
    cache.check()


def test_caches_on_one_pool_do_not_disturb_each_other(core: Any) -> None:
    """Two threads with a cache each, on one pool, get what they get alone."""
    pool = kvz.BufferPool(core=core)

    def work(kind: str, seed: int, shared: Any) -> Any:
        cache = make_from(core, configure(max_tokens=150, store_precision="q4"), kind, pool=shared)
        keys, values = stream(cache.config, 400, seed)
        for start in range(0, 400, 7):
            cache.append(keys[start : start + 7], values[start : start + 7])
            if start % 5 == 0:
                cache.trim(9)
            if start % 11 == 0:
                cache.clear()
        result = cache.digest(), cache.attend(queries(cache.config, None, 2)).tobytes()
        cache.check()
        cache.close()
        return result

    jobs = [(kind, seed) for kind in KINDS for seed in (1, 2)]
    alone = [work(kind, seed, None) for kind, seed in jobs]
    beside = together(*(lambda k=kind, s=seed: work(k, s, pool) for kind, seed in jobs))
    assert beside == alone
    assert pool.stats().bytes_in_use == 0


def test_error_messages_belong_to_the_thread_that_failed(core: Any) -> None:
    """Each thread reads its own message, however many fail at once."""

    def fail(token: int) -> Callable[[], set[str]]:
        cache = make(core)
        keys, values = stream(cache.config, 12)
        keys[token, 1, 5] = np.nan

        def work() -> set[str]:
            messages = set()
            for _ in range(200):
                with pytest.raises(kvz.KvzError) as raised:
                    cache.append(keys, values)
                messages.add(str(raised.value))
            return messages

        return work

    found = together(*(fail(token) for token in range(6)))
    for token, messages in enumerate(found):
        assert len(messages) == 1
        assert f"token {token}" in messages.pop()


@kinds
@pytest.mark.parametrize("store", ["f16", "q4"])
def test_attention_from_several_threads_gives_the_same_bits(
    core: Any, kind: str, store: str
) -> None:
    """Callers at the same time do not see each other, on one cache and on several."""
    fields = {"store_precision": store, "max_tokens": 3000, "head_dim": 64}
    caches = [make(core, kind, **fields) for _ in range(2)]
    for seed, cache in enumerate(caches):
        cache.append(*stream(cache.config, 2500, seed))
    asked = [queries(caches[0].config, n, 2) for n in (None, 1, 40)]
    alone = [[cache.attend(query) for query in asked] for cache in caches]

    def ask(start: int) -> Callable[[], None]:
        def work() -> None:
            for turn in range(start, start + 8):
                cache, query = turn % 2, turn % 3
                same_bits(caches[cache].attend(asked[query]), alone[cache][query])

        return work

    together(*(ask(start) for start in range(4)))


@kinds
def test_closing_while_others_read_is_an_error_not_a_crash(core: Any, kind: str) -> None:
    """A reader that comes too late gets a clear error; one that is inside finishes."""
    for _ in range(10):
        cache = make(core, kind, store_precision="q4")
        cache.append(*stream(cache.config, 300))
        query = queries(cache.config, 20, 2)
        expected = cache.attend(query)

        def read(cache: Any = cache, query: Any = query, expected: Any = expected) -> None:
            for _ in range(50):
                try:
                    out = cache.attend(query)
                except kvz.ClosedError:
                    return
                same_bits(out, expected)

        together(read, read, cache.close)
        with pytest.raises(ValueError, match="closed"):
            cache.attend(query)
