"""Many sequences under one hard limit of memory: caches that share a pool.

An append that the pool has no room for raises `kvz.PoolExhaustedError` and leaves its cache as it
was; a cache that is closed gives its pages to the others.
"""

import numpy as np

import kvz

config = kvz.CacheConfig(num_kv_heads=4, head_dim=64, tail_length=64, store_precision="q8")
pool = kvz.BufferPool(max_bytes=3 << 20)
rng = np.random.default_rng(0)
chunk = rng.standard_normal((100, 4, 64), np.float32)

sequences: list[kvz.TwoTierCache] = []
try:
    while True:
        cache = kvz.TwoTierCache(config, pool=pool)
        sequences.append(cache)
        for _ in range(5):
            cache.append(chunk, chunk)
except kvz.PoolExhaustedError as error:
    print(f"sequence {len(sequences)} stopped at {len(cache)} tokens: {error}")

finished = sequences.pop(0)
finished.close()  # or leave a with-statement
cache.append(chunk, chunk)
print(f"after one was closed, it has {len(cache)} tokens")
stats = pool.stats()
print(f"{stats.bytes_in_use:,} of {stats.max_bytes:,} bytes in use")
