"""Attention over tokens that lie in two places: each attends alone, and the results are merged.

With the log-sum-exp of its logits, a partial result says how much weight it has. Merged, partial
results are what one cache with all tokens gives, up to float32 rounding. The parts may be caches,
processes or machines; per query head only head_dim + 1 numbers travel.
"""

import numpy as np

import kvz


def merge(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Merge results (out, lse) over disjoint tokens."""
    outs, lses = (np.stack(both) for both in zip(*parts, strict=True))
    lse = np.logaddexp.reduce(lses, axis=0)
    return (np.exp(lses - lse)[..., np.newaxis] * outs).sum(axis=0), lse


rng = np.random.default_rng(0)
keys, values = rng.standard_normal((2, 1000, 2, 64), np.float32)
query = rng.standard_normal((8, 64), np.float32)

config = kvz.CacheConfig(num_kv_heads=2, head_dim=64, tail_precision="f32", store_precision="f32")
whole, first, second = (kvz.TwoTierCache(config) for _ in range(3))
whole.append(keys, values)
first.append(keys[:300], values[:300])
second.append(keys[300:], values[300:])

expected, expected_lse = whole.attend(query, return_lse=True)
out, lse = merge([part.attend(query, return_lse=True) for part in (first, second)])
difference = max(np.abs(out - expected).max(), np.abs(lse - expected_lse).max())
print(f"largest difference between merged and whole: {difference:.1e}")
assert difference < 1e-5
