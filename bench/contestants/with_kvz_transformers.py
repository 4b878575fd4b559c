"""kvz under transformers: `cache_for` as a user calls it, with the tail that it has by default."""

from __future__ import annotations

from typing import Any

import kvz
from contestants import with_kvz
from contestants.transformers_model import TOLERANCE, Forward
from kvz.integrations.transformers import KvzCache, cache_for
from workload import Data, Job

__all__ = ["CASES", "KVS", "TOLERANCE", "Entry", "versions"]

KVS = {"f16": 16.0, "q8": 8.5, "q4": 4.5}
CASES = ("forward",)


def versions() -> dict[str, Any]:
    return with_kvz.versions("kvz-transformers")


class Entry(Forward):
    def __init__(self, job: Job, data: Data) -> None:
        kvz.set_num_threads(job.threads)
        super().__init__(job, data)

    def empty(self) -> KvzCache:
        return cache_for(self.model, store_precision=self.job.kv)

    def count(self, cache: KvzCache) -> float:
        return cache.nbytes
