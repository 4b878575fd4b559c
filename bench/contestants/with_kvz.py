"""kvz itself: one `TwoTierCache` per cache, called as a user would."""

from __future__ import annotations

from typing import Any

import kvz
from workload import Data, Floats, Job

KVS = {"f16": 16.0, "q8": 8.5, "q4": 4.5, "q8+q4": 6.5}
CASES = ("decode", "prefill", "append", "stream", "overhead", "linear", "shapes")
TOLERANCE = {"f16": 1e-4, "q8": 2e-3, "q4": 3e-2, "q8+q4": 3e-2}
TAIL = 64


def versions(name: str = "kvz") -> dict[str, Any]:
    info = kvz.info()
    pages = ", huge pages" if info.huge_pages else ""
    return {name: f"{info.version} ({info.isa}{pages})"}


def keep_all() -> kvz.BufferPool:
    """Make a pool that gives nothing back to the system, so that no page fault is ever timed."""
    return kvz.BufferPool(max_free_per_class=1 << 20)


class Entry:
    """Appending starts with empty caches, which are emptied when they hold `past` tokens."""

    def __init__(self, job: Job, data: Data) -> None:
        kvz.set_num_threads(job.threads)
        first, _, second = job.kv.partition("+")
        config = kvz.CacheConfig(
            num_kv_heads=job.kv_heads,
            head_dim=job.head_dim,
            store_precision=(first, second or first),  # type: ignore[arg-type]
            tail_length=TAIL,
            max_tokens=max(job.past + job.new, TAIL + 64),
        )
        self.job = job
        self.caches = job.caches(KVS[job.kv])
        pool = keep_all()
        self._all = [kvz.TwoTierCache(config, pool=pool) for _ in range(self.caches)]
        self._new = data.keys[: job.new], data.values[: job.new]
        self._query = data.query if job.case == "prefill" else data.query[0]
        self._first: Floats | None = None
        if job.appends:
            self.bytes: float = config.store_bytes_per_token * job.past
            self.run = self._append
            self._touch_all()
            return
        self.run = self._attend
        for cache in self._all:
            cache.append(data.keys, data.values)
        self.bytes = self._all[0].stats().total_bytes

    def _touch_all(self) -> None:
        """Fill and empty the caches once, for a steady state."""
        for cache in self._all:
            for _ in range(self.job.past // self.job.new):
                cache.append(*self._new)
        for cache in self._all:
            cache.clear()

    def prepare(self) -> None:
        if self.job.appends and len(self._all[0]) + self.job.new > self.job.past:
            for cache in self._all:
                cache.clear()

    def _append(self) -> None:
        for cache in self._all:
            cache.append(*self._new)

    def _attend(self) -> None:
        outputs = [cache.attend(self._query) for cache in self._all]
        self._first = outputs[0]

    def output(self) -> Floats:
        assert self._first is not None
        return self._first

    def stored(self) -> tuple[Floats, Floats]:
        return self._all[0].get_all_kv()
