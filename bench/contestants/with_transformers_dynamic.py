"""transformers' DynamicCache with torch's attention (sdpa): a step copies all it holds."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from transformers import DynamicCache

from contestants.transformers_model import TOLERANCE, Forward

__all__ = ["CASES", "KVS", "TOLERANCE", "Entry", "versions"]

KVS = {"f32": 32.0}
CASES = ("forward",)


def versions() -> dict[str, Any]:
    return {name: metadata.version(name) for name in ("transformers", "torch")}


class Entry(Forward):
    def empty(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def count(self, cache: DynamicCache) -> float:
        return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
