"""transformers' QuantizedCache (quanto) with torch's attention (sdpa): a step unpacks all it holds.

The tokens that the first forward brings are attended to as they came, and packed beside.
"""

from __future__ import annotations

from transformers.cache_utils import QuantizedCache

from contestants.transformers_model import TOLERANCE, Forward
from contestants.with_transformers import compile_now, versions

__all__ = ["CASES", "KVS", "TOLERANCE", "Entry", "compile_now", "versions"]

KVS = {"int4": 4.5}
CASES = ("forward",)


class Entry(Forward):
    def empty(self) -> QuantizedCache:
        return QuantizedCache("quanto", self.model.config, nbits=4)

    def count(self, cache: QuantizedCache) -> float:
        plain = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        packed = [
            part
            for layer in cache.layers
            for states in (layer._quantized_keys, layer._quantized_values)
            for part in (states._data._data, states._scale, states._shift)
        ]
        return sum(x.nbytes for x in plain + packed)
