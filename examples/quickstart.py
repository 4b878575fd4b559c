"""One cache: fill it, attend, look at it."""

import numpy as np

import kvz

rng = np.random.default_rng(0)
cache = kvz.TwoTierCache(num_kv_heads=8, head_dim=128, tail_length=256, store_precision="q4")
keys, values = rng.standard_normal((2, 2000, 8, 128), np.float32)  # 2000 tokens
cache.append(keys, values)
out = cache.attend(rng.standard_normal((32, 128), np.float32))  # 32 query heads on 8 kv heads
print(out.shape, cache, f"{cache.stats().compression_ratio:.1f}x smaller than f16", sep="\n")
