"""PrefixCache: the longest prefix that is there, compared token by token."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import kvz
from support import KINDS, configure, make, same_bits, together


def run(cache: Any, tokens: Any) -> None:
    """Stand for a model: keys and values that depend on the token alone."""
    for layer in cache if isinstance(cache, kvz.ModelCache) else [cache]:
        config = layer.config
        shape = config.num_kv_heads, config.head_dim
        rows = [np.random.default_rng(int(token)).standard_normal(shape) for token in tokens]
        both = np.array(rows, np.float32).reshape(-1, *shape)
        layer.append(both, both)


def common(a: Any, b: Any) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_the_longest_prefix(core: str, kind: str) -> None:
    """As a search through all stored sequences would, and with what the trimmed cache holds."""
    rng = np.random.default_rng(0)
    stored: list[list[int]] = []
    with kvz.PrefixCache() as prefixes:
        for step in range(120):
            length = int(rng.integers(0, 12))
            tokens = rng.integers(0, 3, length).tolist()
            if rng.random() < 0.4:
                with make(core, kind) as cache:
                    run(cache, tokens)
                    prefixes.insert(tokens, cache)
                if tokens not in stored:
                    stored.append(tokens)
            expected = max((common(one, tokens) for one in stored), default=0)
            assert prefixes.match(tokens) == expected
            cache, found = prefixes.fork(tokens)
            assert found == expected
            assert len(prefixes) == len(stored)
            assert (cache is None) == (expected == 0)
            if cache is not None:
                with cache, make(core, kind) as model:
                    run(model, tokens[:found])
                    for got, wanted in zip(cache.get_all_kv(), model.get_all_kv(), strict=True):
                        same_bits(got, wanted)
            whole = max((len(o) for o in stored if tokens[: len(o)] == o), default=0)
            cache, found = prefixes.fork(tokens, exact=True)
            assert found == whole
            if cache is not None:
                with cache, make(core, kind) as model:
                    run(model, tokens[:found])
                    assert cache.digest() == model.digest()
            if step % 40 == 39:
                prefixes.clear()
                stored.clear()


def test_a_fork_goes_its_own_way(core: str) -> None:
    """What the caller does with either cache changes nothing that is stored."""
    with kvz.PrefixCache() as prefixes, make(core) as first:
        run(first, range(100))
        prefixes.insert(range(100), first)
        run(first, range(7))
        for _ in range(2):
            cache, found = prefixes.fork([*range(60), 999])
            assert found == 60
            run(cache, [1, 2, 3])
            assert len(cache) == 63
            cache.close()
        cache, found = prefixes.fork(range(200))
        assert found == 100
        with make(core) as model:
            run(model, range(100))
            assert cache.digest() == model.digest()
        cache.close()


def test_long_prompts_that_share_a_beginning_share_its_pages(core: str) -> None:
    pool = kvz.BufferPool(core=core)
    with kvz.PrefixCache() as prefixes:
        with make(core, pool=pool, max_tokens=4000) as cache:
            run(cache, range(1000))
            prefixes.insert(range(1000), cache)
        alone = prefixes.stats().held_bytes
        assert alone == pool.stats().bytes_in_use
        for turn in range(5):
            prompt = [*range(990), *[turn + 5000] * 20]
            cache, found = prefixes.fork(prompt)
            assert found == 990
            with cache:
                run(cache, prompt[found:])
                prefixes.insert(prompt, cache)
        now = prefixes.stats()
        assert now.held_bytes == pool.stats().bytes_in_use
        assert now.held_bytes < 2 * alone
        assert now.entries == 6
    assert pool.stats().bytes_in_use == 0


def test_what_was_not_used_for_longest_goes_first(core: str) -> None:
    with make(core) as cache:
        run(cache, range(64))
        size = cache.nbytes
    with kvz.PrefixCache(max_bytes=3 * size) as prefixes:
        for start in (0, 1000, 2000):
            with make(core) as cache:
                run(cache, range(start, start + 64))
                prefixes.insert(range(start, start + 64), cache)
        prefixes.fork(range(40))[0].close()  # now the first was used last
        with make(core) as cache:
            run(cache, range(3000, 3064))
            prefixes.insert(range(3000, 3064), cache)
        found = [prefixes.match(range(start, start + 64)) for start in (0, 1000, 2000, 3000)]
        assert found == [64, 0, 64, 64]
        now = prefixes.stats()
        assert (now.entries, now.evictions) == (3, 1)
        assert now.held_bytes <= 3 * size


def test_an_entry_too_large_leaves_the_others(core: str) -> None:
    with make(core) as small, make(core) as large:
        run(small, range(10))
        run(large, range(100, 400))
        with kvz.PrefixCache(max_bytes=large.nbytes - 1) as prefixes:
            prefixes.insert(range(10), small)
            prefixes.insert(range(100, 400), large)
            assert (prefixes.match(range(10)), prefixes.match(range(100, 400))) == (10, 0)
            assert prefixes.stats().evictions == 1


def test_evicted_tokens_are_not_found(core: str) -> None:
    """A window that moved on is found whole, or by its sinks: all else would lack tokens."""
    with kvz.PrefixCache() as prefixes:
        with make(core, sink_tokens=4, max_tokens=64) as cache:
            run(cache, range(100))
            prefixes.insert(range(100), cache)
        for asked, expected in ((120, 100), (100, 100), (99, 4), (20, 4), (3, 3)):
            cache, found = prefixes.fork(range(asked))
            assert found == expected
            assert cache.next_position == expected
            cache.close()
        with make(core, sink_tokens=4, max_tokens=64) as cache:
            run(cache, range(30))
            prefixes.insert(range(30), cache)
        assert prefixes.match([*range(25), 999]) == 25
        assert prefixes.match(range(50)) == 30


def test_models_are_found_as_a_whole(core: str) -> None:
    configs = [configure(), configure(max_tokens=64)]
    with kvz.PrefixCache() as prefixes:
        with kvz.ModelCache(configs, core=core) as model:
            run(model, range(90))
            prefixes.insert(range(90), model)
        for asked, expected in ((95, 90), (90, 90), (70, 0), (10, 0)):
            found, length = prefixes.fork(range(asked))
            assert length == expected
            if found is not None:
                with found:
                    assert [layer.next_position for layer in found] == [expected] * 2
                    found.check()


def test_statistics_count_lookups_and_tokens(core: str) -> None:
    with kvz.PrefixCache() as prefixes, make(core) as cache:
        run(cache, range(10))
        prefixes.insert(range(10), cache)
        prefixes.insert(range(10), cache)  # replaces itself
        assert len(prefixes) == 1
        for asked, least, expected in ((10, 1, 10), (5, 1, 5), (5, 6, 0)):
            assert prefixes.fork(range(asked), min_length=least)[1] == expected
        assert prefixes.fork([99])[0] is None
        now = prefixes.stats()
        assert (now.lookups, now.hits, now.tokens_asked, now.tokens_found) == (4, 2, 21, 15)
        assert (now.hit_rate, now.token_hit_rate) == (0.5, 15 / 21)
        assert now.to_dict()["insertions"] == 2


def test_bad_arguments_are_refused(core: str) -> None:
    with kvz.PrefixCache() as prefixes, make(core) as cache:
        run(cache, range(10))
        with pytest.raises(kvz.InvalidArgumentError, match=r"expected as many .* 10, got 9"):
            prefixes.insert(range(9), cache)
        for bad in ("abc", [1.5], [[1]], None, 3):
            with pytest.raises(kvz.InvalidTypeError, match="tokens: expected a sequence"):
                prefixes.fork(bad)
        with pytest.raises(kvz.InvalidTypeError, match="cache: expected a cache"):
            prefixes.insert([], None)  # type: ignore[arg-type]
        with pytest.raises(kvz.InvalidArgumentError, match=r"2\*\*63"):
            prefixes.fork(np.array([2**63], np.uint64))
        prefixes.insert(range(10), cache)
        with (
            make(core, head_dim=64) as other,
            pytest.raises(kvz.InvalidArgumentError, match="like"),
        ):
            prefixes.insert([], other)
        assert len(prefixes) == 1
        with pytest.raises(kvz.InvalidArgumentError):
            kvz.PrefixCache(max_bytes=0)
    for use in (lambda: prefixes.fork([1]), lambda: prefixes.insert([], cache)):
        with pytest.raises(kvz.ClosedError):
            use()
    assert repr(prefixes) == "PrefixCache(closed)"


def test_threads_share_one(core: str) -> None:
    """Everybody finds a cache of the tokens asked for, whatever the others do."""
    with kvz.PrefixCache(max_bytes=1 << 20) as prefixes:

        def work(seed: int) -> int:
            rng, hits = np.random.default_rng(seed), 0
            for _ in range(30):
                tokens = rng.integers(0, 2, 8).tolist()
                cache, found = prefixes.fork(tokens)
                cache = cache or make(core)
                hits += found > 0
                with cache:
                    run(cache, tokens[found:])
                    prefixes.insert(tokens, cache)
                    with make(core) as model:
                        run(model, tokens)
                        assert cache.digest() == model.digest()
            return hits

        hits = together(*(partial(work, seed) for seed in range(4)))
    assert min(hits) > 0
