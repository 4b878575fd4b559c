"""The tests of the original system, translated; each says as much as it said there, or more.

test_origin_bugs.py and test_origin_inputs.py hold one test for each bug of the original.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvz
from support import f32, same_bits


def token(heads: int, dim: int, value: float) -> Any:
    return np.full(heads * dim, value, np.float32)  # flat, as the original took them


def test_kv_cache_append(core: Any) -> None:
    """One token of a cache with a tail of four is in the tail."""
    cache = kvz.TwoTierCache(
        core=core, tail_length=4, num_kv_heads=2, head_dim=4, migration_batch=2
    )
    cache.append(token(2, 4, 1.0), token(2, 4, 1.0))
    stats = cache.stats()
    assert stats.total_tokens == 1
    assert stats.tail_tokens == 1
    assert stats.store_tokens == 0


def test_kv_cache_migration(core: Any) -> None:
    """Five tokens with a tail of two: two stay, three are stored."""
    cache = kvz.TwoTierCache(
        core=core,
        tail_length=2,
        num_kv_heads=2,
        head_dim=4,
        migration_batch=1,
        max_tokens=100,
    )
    for _ in range(5):
        cache.append(token(2, 4, 1.0), token(2, 4, 1.0))
    stats = cache.stats()
    assert stats.total_tokens == 5
    assert stats.tail_tokens == 2
    assert stats.store_tokens == 3


def test_kv_cache_attend(core: Any) -> None:
    """A single token gets all attention, so the output is its value, exactly."""
    cache = kvz.TwoTierCache(core=core, tail_length=4, num_kv_heads=1, head_dim=4)
    cache.append(f32([1, 0, 0, 0]), f32([1, 2, 3, 4]))
    output = cache.attend(f32([[1, 0, 0, 0]]), 1.0)
    same_bits(output, f32([[1, 2, 3, 4]]))


def test_pooled_kv_cache_basic(core: Any) -> None:
    """One token takes one block."""
    config = kvz.CacheConfig(tail_length=4, num_kv_heads=2, head_dim=4, max_tokens=100)
    cache = kvz.PooledCache(config, tokens_per_block=16, core=core)
    cache.append(token(2, 4, 1.0), token(2, 4, 2.0))
    stats = cache.stats()
    assert stats.total_tokens == 1
    assert stats.block_count == 1


def test_pooled_kv_cache_multiple_blocks(core: Any) -> None:
    """Five tokens in blocks of two take exactly three blocks, and come back as they went in."""
    config = kvz.CacheConfig(tail_length=4, num_kv_heads=2, head_dim=4, max_tokens=100)
    cache = kvz.PooledCache(config, tokens_per_block=2, core=core)
    for i in range(5):
        cache.append(token(2, 4, i), token(2, 4, 2 * i))
    stats = cache.stats()
    assert stats.total_tokens == 5
    assert stats.block_count == 3
    keys, values = cache.get_all_kv()
    expected = np.broadcast_to(np.arange(5, dtype=np.float32)[:, None, None], (5, 2, 4))
    same_bits(keys, np.ascontiguousarray(expected))
    same_bits(values, np.ascontiguousarray(2 * expected))


@pytest.mark.parametrize("rounds", [1, 3])
def test_pooled_kv_cache_pool_reuse(core: Any, rounds: int) -> None:
    """Append and clear: after the first round every page comes from the free list."""
    pool = kvz.BufferPool(core=core)
    pool.prewarm(kvz.BufferSize.KB4, 4)
    warmed = pool.stats()
    assert warmed.free_buffers[1] == 4
    config = kvz.CacheConfig(tail_length=4, num_kv_heads=2, head_dim=4, max_tokens=100)
    cache = kvz.PooledCache(config, pool, tokens_per_block=16, core=core)
    for _ in range(rounds):
        cache.append(token(2, 4, 1.0), token(2, 4, 2.0))
        cache.clear()
    stats = cache.stats()
    assert stats.total_tokens == 0
    got = stats.pool_stats
    assert got.returns - warmed.returns == 2 * rounds  # one page per head
    assert got.hits - warmed.hits == 2 * (rounds - 1)
    assert got.misses - warmed.misses == 2
    assert got.free_buffers[1] == 4  # pages have their own size: the warmed buffers are untouched
