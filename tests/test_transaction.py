"""What leaves no trace, and what `trim` leaves: drafts that are taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvz
from support import KINDS, make, queries, same_bits, same_state, stream, twins, unchanged


def tokens(cache, count, seed=0):
    return stream(cache.config, count, seed)


class RejectedError(Exception):
    """What a block raises to be rolled back."""


def in_transaction(cache, *steps):
    """Take the steps in a transaction, and raise."""
    with cache.transaction():
        for step in steps:
            step()
        raise RejectedError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", [0, 1, 5, 8, 11, 63, 64, 130, 240, 256])
@pytest.mark.parametrize("draft", [1, 8, 70, 300])
def test_a_rejected_draft_leaves_no_trace(core, kind, held, draft):
    """Also one that made batches migrate or evicted tokens; counters and later bits included."""
    cache = make(core, kind, sink_tokens=3, max_tokens=256, store_precision="q4")
    twin = make(core, kind, sink_tokens=3, max_tokens=256, store_precision="q4")
    for one in (cache, twin):
        one.append(*tokens(one, held))
    before = cache.stats()
    with unchanged(cache), cache.transaction() as step:
        cache.append(*tokens(cache, draft, 1))
        cache.attend(queries(cache.config, min(draft, 5)))
        step.rollback()
    now = cache.stats()
    assert (now.evicted_tokens, now.next_position) == (before.evicted_tokens, held)
    for seed in (2, 3):
        cache.append(*tokens(cache, 90, seed))
        twin.append(*tokens(twin, 90, seed))
    assert cache.digest() == twin.digest()
    query = queries(cache.config, 3)
    same_bits(cache.attend(query), twin.attend(query))


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_rolls_back_and_passes_on(core, kind):
    cache = make(core, kind)
    cache.append(*tokens(cache, 100))
    steps = [
        lambda: cache.append(*tokens(cache, 33, 1)),
        lambda: cache.trim(50),
        lambda: cache.append(*tokens(cache, 7, 2)),
        cache.clear,
    ]
    for count in range(5):
        with unchanged(cache), pytest.raises(RejectedError):
            in_transaction(cache, *steps[:count])
    with pytest.raises(RejectedError):
        in_transaction(cache, cache.close)
    assert cache.closed


def test_what_is_not_rolled_back_stays(core):
    real, model = twins(core, tokens=60)
    with real.transaction():
        real.append(*tokens(real, 20, 1))
    model.append(*tokens(real, 20, 1))
    same_state(real, model)


def test_a_draft_accepted_in_part_is_the_stream_without_the_rest(core):
    """The same state as that of a cache which never saw the rejected tokens."""
    cache, plain = make(core, max_tokens=64), make(core, max_tokens=64)
    for step in range(40):
        keys, values = tokens(cache, 8, step)
        accepted = (step * 5) % 9
        with cache.transaction() as draft:
            cache.append(keys, values)
            draft.rollback()
            cache.append(keys[:accepted], values[:accepted])
        plain.append(keys[:accepted], values[:accepted])
        assert cache.digest() == plain.digest()
        assert cache.stats().migrated_tokens == plain.stats().migrated_tokens
        assert cache.stats().evicted_tokens == plain.stats().evicted_tokens


def test_it_may_roll_back_many_times_and_nest(core):
    cache = make(core)
    cache.append(*tokens(cache, 100))
    start = cache.digest()
    with cache.transaction() as outer:
        for seed in range(1, 5):
            cache.append(*tokens(cache, 40, seed))
            middle = cache.digest()
            with cache.transaction() as inner:
                cache.append(*tokens(cache, 9, seed))
                inner.rollback()
                assert cache.digest() == middle
                cache.trim(3)
            assert cache.digest() != middle
            outer.rollback()
            assert cache.digest() == start
        cache.append(*tokens(cache, 5, 9))
    assert len(cache) == 105


def test_a_transaction_ends(core):
    cache = make(core)
    with cache.transaction() as step:
        pass
    with pytest.raises(kvz.ClosedError, match="transaction has ended"):
        step.rollback()
    step = cache.transaction()
    cache.close()
    with pytest.raises(kvz.ClosedError, match="TwoTierCache is closed"):
        step.rollback()
    step.close()
    with pytest.raises(kvz.ClosedError):
        cache.transaction()


def test_a_transaction_takes_no_memory_until_pages_differ(core):
    """And holds on to no page after it."""
    pool = kvz.BufferPool(core=core)
    cache = make(core, pool=pool)
    cache.append(*tokens(cache, 100))
    before = pool.stats().bytes_in_use
    with cache.transaction() as step:
        cache.append(*tokens(cache, 3, 1))
        assert pool.stats().bytes_in_use == before
        cache.trim(5)
        cache.append(*tokens(cache, 3, 2))
        assert pool.stats().bytes_in_use > before
        step.rollback()
        assert pool.stats().bytes_in_use == before
    assert cache.stats().own_bytes == before


def test_a_policy_is_rolled_back_too(core):
    cache = make(core, store_precision="q8")
    cache.append(*tokens(cache, 100))
    config, policy = cache.config, cache.policy
    with unchanged(cache), cache.transaction() as step:
        cache.clear()
        cache.update_policy(kvz.QuantizedStore(precision="q4"))
        cache.append(*tokens(cache, 10))
        step.rollback()
    assert (cache.config, cache.policy) == (config, policy)


def test_forks_of_a_draft_outlive_its_rollback(core):
    """A fork made inside is a cache of its own: the rollback does not reach it."""
    cache, twin = make(core), make(core)
    for one in (cache, twin):
        one.append(*tokens(one, 100))
    with cache.transaction() as step:
        cache.append(*tokens(cache, 10, 1))
        branch = cache.fork()
        step.rollback()
        cache.append(*tokens(cache, 10, 2))
    twin.append(*tokens(twin, 10, 1))
    assert branch.digest() == twin.digest() != cache.digest()


@given(
    held=st.integers(0, 200),
    draft=st.integers(0, 120),
    batch=st.sampled_from([1, 4, 7, 64]),
    kind=st.sampled_from(KINDS),
)
def test_a_trimmed_append_leaves_a_trace_only_where_something_moved(held, draft, batch, kind):
    """A trace is left exactly if a token from before the append migrated or was evicted."""
    cache = make("native", kind, max_tokens=150, migration_batch=batch, sink_tokens=2)
    cache.append(*tokens(cache, held))
    before, counts = cache.digest(), cache._core_stats()
    kept = {int(p): cache.get_kv(int(p), int(p) + 1) for p in cache.positions}
    cache.append(*tokens(cache, draft, 1))
    assert cache.trim(draft) == draft
    now = cache._core_stats()
    # Of the tokens from before the draft.
    moved = now.store_tokens != counts.store_tokens or now.total_tokens != counts.total_tokens
    assert (cache.digest() == before) is not moved
    assert cache.next_position == held
    if kind == "pooled" or not moved:
        for position in cache.positions:
            for got, expected in zip(
                cache.get_kv(int(position), int(position) + 1), kept[int(position)], strict=True
            ):
                same_bits(got, expected)
