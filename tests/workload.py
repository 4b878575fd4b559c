"""A fixed piece of work and a hash of everything it returns; test_bits.py runs it in many ways.

As a script it runs on the core and the kernels that the environment names (KVZ_CORE, KVZ_ISA, and
KVZ_AGENT of foreign.py):

    python tests/workload.py
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import foreign
import kvz
from support import KINDS, PAIRS, STORES, configure, make_from, queries, rows, stream

TAILS = ("f16", "bf16", "f32")


def configurations() -> Iterator[tuple[str, Any]]:
    """Every format with every head width class, and one cache that is cut into several units."""
    pairs = [*((store, store) for store in STORES), *PAIRS]
    for (pair, kind), tail in zip(itertools.product(pairs, KINDS), itertools.cycle(TAILS)):
        for dim, value_dim in ((1, None), (33, 80), (64, 31), (128, None)):
            yield (
                kind,
                configure(
                    head_dim=dim,
                    value_dim=value_dim,
                    tail_precision=tail,
                    store_precision=pair,
                    max_tokens=150,
                    sink_tokens=2,
                ),
            )
    for store in ("q8", "q4", "f16"):
        yield (
            "two_tier",
            configure(
                num_kv_heads=1,
                head_dim=64,
                store_precision=store,
                max_tokens=6000,
                tail_length=40,
                migration_batch=64,
            ),
        )


def outputs(cache: Any, seed: int) -> Iterator[Any]:
    """Yield what a cache returns: contents, and attention with options."""
    yield from cache.get_all_kv()
    heads, tokens = 3 * cache.config.num_kv_heads, len(cache)
    query = queries(cache.config, 70, 3, seed)
    yield cache.attend(query[0])
    yield from cache.attend(query, return_lse=True, return_mass=True)
    yield from cache.attend(
        query,
        0.2,
        window=65,
        softcap=3.0,
        alibi_slopes=np.abs(rows(1, 1, heads, seed)[0, 0]) / 8,
        sinks=rows(1, 1, heads, seed + 1)[0, 0],
        mask=rows(70, 1, tokens, seed),
        return_lse=True,
        return_mass=True,
    )


def fingerprint(core: Any) -> dict[str, str]:
    """Hash everything, cache by cache."""
    found = {}
    for seed, (kind, config) in enumerate(configurations()):
        cache = make_from(core, config, kind)
        keys, values = stream(config, config.max_tokens + 30, seed)
        cache.append(keys, values)
        cache.trim(5)
        hashed = hashlib.sha256(str(cache.digest()).encode())
        for array in outputs(cache, seed):
            hashed.update(np.ascontiguousarray(array).tobytes())
        name = f"{kind} {config.store_precision} {config.tail_precision} {config.head_dim}"
        found[f"{seed}: {name}"] = hashed.hexdigest()
        cache.close()
    return found


if __name__ == "__main__":
    foreign.stand_in()
    info = kvz.info()
    found = {"isa": info.isa, "isas": info.available_isas, "hashes": fingerprint(None)}
    json.dump(found, sys.stdout)
