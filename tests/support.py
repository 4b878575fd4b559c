"""What the behaviour tests share: seeded data, caches with their reference, comparison of bits."""

from __future__ import annotations

import copy
import re
import threading
import time
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import kvz
from kvz import reference

Floats = NDArray[np.float32]
DOCS = Path(__file__).parents[1] / "docs"

HEAD_DIMS = (1, 31, 32, 33, 64, 80, 128)
STORES = ("f32", "f16", "bf16", "q8", "q4", "q6k", "q5k", "q4k", "q3k", "q2k")
PAIRS = (("q8", "q4"), ("q4", "q8"), ("f16", "q4"), ("q8", "f32"), ("bf16", "q8"), ("q5k", "q4k"))
KINDS = ("two_tier", "pooled")

# A small configuration in which a few tokens reach every tier; tests name what they change.
SMALL: dict[str, Any] = {
    "num_kv_heads": 2,
    "head_dim": 32,
    "max_tokens": 512,
    "tail_length": 8,
    "tail_precision": "f16",
    "store_precision": "q8",
    "migration_batch": 4,
    "sink_tokens": 0,
}

# What `attend` may add, by the format it reads: the relative L2 error of the output against float64
# attention over the same stored values, for tame data (normal, unit variance) and the usual scale.
# Floats are computed in float32: 2e-6 (docs/numerics.md), here with ten times of room. Beside codes
# the query is rounded to integers: for q4 to 8 bits per group of 32, whose largest is about 2.1, so
# that the error of a logit is about 2.1 / 127 / sqrt(12) = 4.8e-3; for q8 to 14 bits per head, at
# most 4 / 8127 / sqrt(12) = 1.4e-4. The softmax weights have 14 bits per page and group in either
# case, of which the largest may be 30 times the others. Four times the sum of these.
COMPUTING = {"f32": 2e-5, "f16": 2e-5, "bf16": 2e-5, "q8": 2e-3, "q4": 2e-2}
COMPUTING |= dict.fromkeys(("q6k", "q5k", "q4k", "q3k", "q2k"), 2e-2)  # queries as for q4


def run_page(name: str, names: dict[str, Any]) -> None:
    """Run the code of a page of docs/, one block after the other, as a reader would type them."""
    for block in re.findall(
        r"^```python\n(.*?)^```", (DOCS / name).read_text("utf-8"), re.M | re.S
    ):
        exec(compile(block, name, "exec"), names)


def f32(values: Any) -> Floats:
    """Make a float32 array."""
    return np.array(values, np.float32)


def rows(tokens: int, heads: int, dim: int, seed: int, spread: float = 1.0) -> Floats:
    """Normal values of unit variance times `spread`: (tokens, heads, dim)."""
    rng = np.random.default_rng([seed, tokens, heads, dim])
    return (rng.standard_normal((tokens, heads, dim)) * spread).astype(np.float32)


def stream(config: Any, tokens: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Keys and values that fit `config`."""
    heads, value_dim = config.num_kv_heads, config.value_dim or config.head_dim
    keys = rows(tokens, heads, config.head_dim, 2 * seed)
    return keys, rows(tokens, heads, value_dim, 2 * seed + 1)


def queries(config: Any, tokens: int | None = None, per_kv_head: int = 1, seed: int = 0) -> Floats:
    """A query (Hq, D), or several (tokens, Hq, D)."""
    made = rows(tokens or 1, config.num_kv_heads * per_kv_head, config.head_dim, 7_000 + seed)
    return made if tokens else made[0]


def configure(**fields: Any) -> Any:
    """`SMALL` with changes."""
    return kvz.CacheConfig(**{**SMALL, **fields})


def make(core: Any, kind: Any = "two_tier", *, pool: Any = None, **fields: Any) -> Any:
    """Make a cache on `core`."""
    return make_from(core, configure(**fields), kind, pool=pool)


def make_from(core: Any, config: Any, kind: str = "two_tier", *, pool: Any = None) -> Any:
    """Make a cache on `core` with a whole configuration."""
    maker = kvz.PooledCache if kind == "pooled" else kvz.TwoTierCache
    return maker(config, pool=pool, core=core)


def twins(core: Any, kind: Any = "two_tier", tokens: Any = 0, **fields: Any) -> tuple[Any, Any]:
    """Make a cache and its reference, both holding the same `tokens` tokens."""
    real = make(core, kind, **fields)
    model = model_of(real.config, kind)
    if tokens:
        keys, values = stream(real.config, tokens)
        real.append(keys, values)
        model.append(keys, values)
    return real, model


def model_of(config: Any, kind: str = "two_tier") -> reference.ReferenceCache:
    """Make the reference of a cache with this configuration."""
    pooled = kind == "pooled"
    return (reference.ReferencePooledCache if pooled else reference.ReferenceCache)(config)


def same_bits(got: ArrayLike, expected: ArrayLike) -> None:
    """Assert equal shape, float32 and every bit, the signs of zeros included."""
    a, b = np.asarray(got), np.asarray(expected)
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.float32
    wrong = np.flatnonzero(a.ravel().view(np.uint32) != b.ravel().view(np.uint32))
    assert wrong.size == 0, (
        f"{wrong.size} of {a.size} differ, first at {np.unravel_index(wrong[0], a.shape)}: "
        f"got {a.ravel()[wrong[0]]!r}, expected {b.ravel()[wrong[0]]!r}"
    )


def same_state(real: Any, model: reference.ReferenceCache) -> None:
    """Assert that a cache holds exactly what its reference holds, in the same tiers."""
    got, expected = real.get_all_kv(), model.get_all_kv()
    assert len(real) == len(model)
    assert real.next_position == model.next_position
    np.testing.assert_array_equal(np.asarray(real.positions), model.positions)
    same_bits(got[0], expected[0])
    same_bits(got[1], expected[1])
    counts, wanted = real.stats(), model.stats()
    assert counts.total_tokens == wanted.total_tokens
    if isinstance(real, kvz.TwoTierCache):
        assert counts.sink_tokens == wanted.sink_tokens
        assert counts.store_tokens == wanted.store_tokens
        assert counts.warm_tokens == wanted.warm_tokens
        assert counts.tail_tokens == wanted.tail_tokens


def relative_error(got: ArrayLike, expected: ArrayLike) -> float:
    """Relative L2 error over the whole array."""
    a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    norm = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / norm if norm else float(np.linalg.norm(a))


def computing_bound(config: Any, kind: str = "two_tier") -> float:
    """What `attend` may add for the formats of this configuration."""
    model = model_of(config, kind)
    formats = [model.tail_format, model.key_format, model.value_format]
    formats += [model.warm_format] if config.warm_length else []
    return max(COMPUTING[f.precision] for f in formats)


def magnitude(model: reference.ReferenceCache, query: Floats, options: dict[str, Any]) -> float:
    """Root of the sum of squares of what attention adds up: weights times values.

    An error is judged beside this and not beside the output, in which values may cancel out.
    """
    probe = copy.copy(model)
    keys, values = model.get_all_kv()
    tokens = len(keys)
    probe._values = np.broadcast_to(np.eye(tokens)[:, None], (tokens, keys.shape[1], tokens))
    weights = np.asarray(probe.attend(query, **options))
    squares = (values.astype(np.float64) ** 2).sum(axis=2)  # (T, kv heads)
    squares = np.repeat(squares, query.shape[-2] // keys.shape[1], axis=1)
    return float(np.sqrt((weights**2 * squares.T).sum()))


def agree(real: Any, model: reference.ReferenceCache, query: Floats, **options: Any) -> None:
    """Assert that `attend` gives what the reference gives, within the bound for its formats."""
    bound = computing_bound(model.config, "two_tier" if model.has_store else "pooled")
    # A larger scale makes the logits larger, and with them their errors.
    usual = model.head_dim**-0.5
    bound *= max(1.0, abs(options.get("scale") or usual) / usual)
    got = real.attend(query, return_lse=True, return_mass=True, **options)
    expected = model.attend(query, return_lse=True, return_mass=True, **options)
    for part, wanted in zip(got, expected, strict=True):
        assert part.dtype == np.float32
        assert part.shape == wanted.shape
        assert not np.isnan(part).any()
    allowed = max(magnitude(model, query, options), float(np.linalg.norm(expected[0])))
    assert float(np.linalg.norm(got[0] - expected[0])) <= bound * allowed
    nothing = np.isneginf(expected[1])
    np.testing.assert_array_equal(np.isneginf(got[1]), nothing)
    lse, wanted = got[1][~nothing].astype(np.float64), expected[1][~nothing]
    # The LSE errs as much as its logits do; beside that it is a float32.
    assert (np.abs(lse - wanted) <= 3 * bound + 2**-23 * np.abs(wanted)).all()
    assert relative_error(got[2], expected[2]) <= 2 * bound


@contextmanager
def unchanged(*caches: Any) -> Iterator[None]:
    """Assert that the caches are the same to the bit afterwards."""
    before = [(cache.digest(), len(cache), cache.next_position) for cache in caches]
    held = [cache.get_all_kv() for cache in caches]
    yield
    for cache, state, (keys, values) in zip(caches, before, held, strict=True):
        assert (cache.digest(), len(cache), cache.next_position) == state
        now = cache.get_all_kv()
        same_bits(now[0], keys)
        same_bits(now[1], values)
        cache.check()


def cuts(total: int, seed: int) -> list[slice]:
    """Cut `total` tokens into random runs."""
    rng = np.random.default_rng(seed)
    edges = np.unique(np.concatenate([[0, total], rng.integers(0, total + 1, 9)]))
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


def together(*works: Callable[[], Any]) -> list[Any]:
    """Run each in a thread of its own, from one starting line; errors come out."""
    line = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        line.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(run, work) for work in works]]


@contextmanager
def leaving(finished: threading.Event) -> Iterator[None]:
    """Set `finished` at the end, also if that is an error: the other threads wait for it."""
    try:
        yield
    finally:
        finished.set()


def wait_for_more(seen: Sized, finished: threading.Event) -> None:
    """Wait until another thread has added to `seen`: somebody looks between any two steps."""
    before = len(seen)
    while len(seen) == before and not finished.is_set():
        time.sleep(0)
