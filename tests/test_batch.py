"""Many sequences in one call: the bits of one by one, and all of them or none."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvz
from support import configure, make, make_from, queries, rows, same_bits, stream, unchanged

# Whatever may differ between the sequences of a batch.
CONFIGS = (
    configure(store_precision="q4"),
    configure(store_precision="q8", sink_tokens=4, max_tokens=128),
    configure(store_precision=("q8", "q4"), num_kv_heads=1, head_dim=64, value_dim=48),
    configure(store_precision="f16", tail_length=64, migration_batch=64),
    configure(store_precision="bf16", tail_precision="f32", head_dim=80),
)


def batch_of(core, lengths):
    """One cache for each length, of all kinds."""
    caches = []
    for i, length in enumerate(lengths):
        kind = "pooled" if i % 7 == 6 else "two_tier"
        cache = make_from(core, CONFIGS[i % len(CONFIGS)], kind)
        cache.append(*stream(cache.config, length, i))
        caches.append(cache)
    return caches


def close_all(caches):
    for cache in caches:
        cache.close()


@given(
    lengths=st.lists(st.one_of(st.integers(0, 200), st.integers(0, 3000)), min_size=1, max_size=9),
    news=st.lists(st.one_of(st.none(), st.integers(0, 20)), min_size=9, max_size=9),
    threads=st.sampled_from([1, 2, 5]),
)
@settings(max_examples=40, deadline=None)
def test_a_batch_gives_the_bits_of_each_alone(lengths, news, threads):
    """For any lengths, any number of queries of each, and any number of threads."""
    before = kvz.get_num_threads()
    caches = batch_of("native", lengths)
    try:
        kvz.set_num_threads(threads)
        asked = [
            queries(cache.config, n and min(n, cache.next_position), 2, seed=i)
            for i, (cache, n) in enumerate(zip(caches, news, strict=False))
        ]
        options = {"window": 90, "softcap": 20.0, "return_lse": True, "return_mass": True}
        plain = kvz.attend_many(caches, asked)
        full = kvz.attend_many(caches, asked, 0.1, **options)
        for i, (cache, query) in enumerate(zip(caches, asked, strict=True)):
            same_bits(plain[i], cache.attend(query))
            for part, expected in zip(full, cache.attend(query, 0.1, **options), strict=True):
                same_bits(part[i], expected)
    finally:
        kvz.set_num_threads(before)
        close_all(caches)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 40},
        {"softcap": 20.0, "causal": False},
        {"alibi_slopes": np.linspace(0.1, 0.5, 4, dtype=np.float32)},
        {"sinks": np.float32([1, -2, 0.5, 3]), "window": 70},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_are_those_of_attend(core, options):
    """For one array of queries, and for a list of them."""
    caches = [make(core, store_precision="q8", num_kv_heads=2) for _ in range(3)]
    for i, cache in enumerate(caches):
        cache.append(*stream(cache.config, 100 + 60 * i, i))
    asked = np.stack([queries(c.config, 3, 2, seed=i) for i, c in enumerate(caches)])
    for together in (asked, list(asked)):
        results = kvz.attend_many(caches, together, **options)
        for cache, query, got in zip(caches, asked, results, strict=True):
            same_bits(got, cache.attend(query, **options))
            assert not np.array_equal(got, cache.attend(query))
    close_all(caches)


def test_each_sequence_may_have_its_window(core):
    """With other options and without, for one array of queries and for a list, beside masks."""
    caches = [make(core, store_precision="q4", num_kv_heads=2) for _ in range(3)]
    for i, cache in enumerate(caches):
        cache.append(*stream(cache.config, 100 + 60 * i, i))
    asked = np.stack([queries(c.config, 2, 2, seed=i) for i, c in enumerate(caches)])
    windows = [30, None, np.int64(150)]
    masks = [np.arange(len(cache)) % 3 > 0 for cache in caches]
    for options in ({}, {"sinks": np.float32([1, -2, 0.5, 3])}):
        for together in (asked, list(asked)):
            got = kvz.attend_many(caches, together, window=windows, **options)
            masked = kvz.attend_many(caches, together, window=windows, masks=masks, **options)
            for i, cache in enumerate(caches):
                window = windows[i] and int(windows[i])
                same_bits(got[i], cache.attend(asked[i], window=window, **options))
                alone = cache.attend(asked[i], window=window, mask=masks[i], **options)
                same_bits(masked[i], alone)
    for wrong, text in (([1, 2], "window: expected 3"), ([1, 0, 2], "window: expected 1 or more")):
        with pytest.raises(kvz.InvalidArgumentError, match=text):
            kvz.attend_many(caches, asked, window=wrong)
    close_all(caches)


def test_long_sequences_beside_short_ones(core):
    """Where some are cut into units for the threads and others are not."""
    base = kvz.CacheConfig(num_kv_heads=2, head_dim=128, tail_length=64, max_tokens=20_000)
    caches = [make_from(core, base) for _ in range(4)]
    for cache, length in zip(caches, (9000, 1, 300, 4500), strict=True):
        cache.append(*stream(base, length))
    asked = rows(4, 8, 128, 5)
    got = kvz.attend_many(caches, asked)
    assert got.shape == (4, 8, 128)
    for i, cache in enumerate(caches):
        same_bits(got[i], cache.attend(asked[i]))
    twice = kvz.attend_many([caches[0], caches[3], caches[0]], asked[:3])
    same_bits(twice[2], caches[0].attend(asked[2]))


def test_a_batch_takes_and_gives_what_fits(core):
    """An array for an array, a list for a list; masks one by one."""
    caches = [make(core) for _ in range(3)]
    for i, cache in enumerate(caches):
        cache.append(*stream(cache.config, 10 * i + 4, i))
    asked = rows(3, 4, 32, 1)
    assert isinstance(kvz.attend_many(caches, list(asked)), list)
    same_bits(kvz.attend_many(caches, asked), np.stack(kvz.attend_many(caches, list(asked))))
    blocks = rows(6, 4, 32, 2).reshape(3, 2, 4, 32)
    assert kvz.attend_many(caches, blocks).shape == (3, 2, 4, 32)
    masks = [np.arange(len(cache)) % 3 > 0 for cache in caches]
    got = kvz.attend_many(caches, asked, masks=[masks[0], None, masks[2]])
    for i, mask in enumerate([masks[0], None, masks[2]]):
        same_bits(got[i], caches[i].attend(asked[i], mask=mask))
    mixed = [caches[0], make(core, value_dim=64), caches[1]]
    mixed[1].append(*stream(mixed[1].config, 5))
    assert [out.shape[-1] for out in kvz.attend_many(mixed, asked)] == [32, 64, 32]


@pytest.mark.parametrize("kind", ["two_tier", "pooled"])
def test_append_many_is_append_to_each(core, kind):
    """Token by token and in ragged runs, of any dtype."""
    batch = [make(core, kind, store_precision="q4", max_tokens=100) for _ in range(4)]
    alone = [make(core, kind, store_precision="q4", max_tokens=100) for _ in range(4)]
    for step in range(50):
        counts = [(step * 7 + i * 3) % 11 for i in range(4)]
        pairs = [stream(batch[0].config, n, step + i) for i, n in enumerate(counts)]
        keys = [pair[0].astype(np.float16) if step % 2 else pair[0] for pair in pairs]
        values = [pair[1] for pair in pairs]
        kvz.append_many(batch, keys, values)
        tokens = rows(4, 2, 32, step)
        kvz.append_many(batch, tokens, -tokens)
        for i, cache in enumerate(alone):
            cache.append(keys[i], values[i])
            cache.append(tokens[i], -tokens[i])
    assert [cache.digest() for cache in batch] == [cache.digest() for cache in alone]


def test_a_large_batch_is_appended_by_all_threads():
    """Short appends as tasks, long ones by their heads: the same bits."""
    config = kvz.CacheConfig(num_kv_heads=4, head_dim=128, tail_length=64)
    lengths = [3000, 40, 80, 40, 1500, 60, 90, 1, 2, 150]
    batch = [make_from("native", config) for _ in lengths]
    pairs = [stream(config, n, i) for i, n in enumerate(lengths)]
    before = kvz.get_num_threads()
    try:
        kvz.set_num_threads(3)
        kvz.append_many(batch, [k for k, _ in pairs], [v for _, v in pairs])
    finally:
        kvz.set_num_threads(before)
    for cache, pair in zip(batch, pairs, strict=True):
        alone = make_from("native", config)
        alone.append(*pair)
        assert cache.digest() == alone.digest()


def test_append_many_is_all_or_nothing(core):
    """A bad value, a full pool or a cache given twice leaves every cache as it was."""
    probe = make(core, pool=kvz.BufferPool(core=core))
    probe.append(*stream(probe.config, 100))
    pool = kvz.BufferPool(max_bytes=3 * probe.nbytes, core=core)
    batch = [make(core, pool=pool) for _ in range(3)]
    for i, cache in enumerate(batch):
        cache.append(*stream(cache.config, 100, i))
    keys = rows(3, 2, 32, 0)
    bad = keys.copy()
    bad[2, 1, 7] = np.nan
    long = stream(batch[0].config, 300)
    in_use = pool.stats().bytes_in_use
    with unchanged(*batch):
        with pytest.raises(kvz.NotFiniteError, match=r"caches\[2\]: keys"):
            kvz.append_many(batch, bad, keys)
        with pytest.raises(kvz.NotFiniteError, match=r"caches\[2\]: values"):
            kvz.append_many(batch, keys, bad)
        with pytest.raises(kvz.PoolExhaustedError, match=r"caches\[1\]: no room"):
            kvz.append_many(batch, [keys[0], long[0], keys[2]], [keys[0], long[1], keys[2]])
        with pytest.raises(kvz.InvalidArgumentError, match=r"caches\[.\]: the same cache"):
            kvz.append_many([batch[0], batch[1], batch[0]], keys, keys)
        with pytest.raises(kvz.InvalidArgumentError, match=r"caches\[1\]: values: expected as"):
            kvz.append_many(batch, [keys] * 3, [keys, keys[:2], keys])
        assert pool.stats().bytes_in_use == in_use
    kvz.append_many(batch, keys, keys)
    assert [len(cache) for cache in batch] == [101] * 3


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda c, q: ([], q[:0]), kvz.InvalidArgumentError, "caches: expected at least one"),
        (lambda c, q: (c[0], q), kvz.InvalidTypeError, "caches: expected a sequence"),
        (lambda c, q: ([c[0], None], q), kvz.InvalidTypeError, "caches"),
        (lambda c, q: (c, q[:1]), kvz.InvalidArgumentError, "queries: expected 2"),
        (lambda c, q: (c, 5), kvz.InvalidTypeError, "queries"),
        (lambda c, q: (c, q[:, :, :31]), kvz.InvalidArgumentError, r"caches\[0\]: query"),
        (lambda c, q: (c, [q[0], q[1][:3]]), kvz.InvalidArgumentError, r"caches\[1\]: query"),
        (lambda c, q: (c, [q[0], np.full((4, 32), np.inf)]), kvz.NotFiniteError, r"caches\[1\]"),
        (lambda c, q: (c, [q[0], np.ones((9, 4, 32))]), kvz.InvalidArgumentError, "9 tokens"),
    ],
)
def test_bad_batches_are_refused(core, change, kind, text):
    caches = [make(core) for _ in range(2)]
    kvz.append_many(caches, rows(2, 2, 32, 0), rows(2, 2, 32, 1))
    with unchanged(*caches), pytest.raises(kind, match=text):
        kvz.attend_many(*change(caches, rows(2, 4, 32, 2)))
    with pytest.raises(kvz.InvalidArgumentError, match="masks: expected 2"):
        kvz.attend_many(caches, rows(2, 4, 32, 2), masks=[None])
    caches[1].close()
    with pytest.raises(kvz.ClosedError, match=r"caches\[1\]"):
        kvz.attend_many(caches, rows(2, 4, 32, 2))


def test_cores_do_not_mix():
    pytest.importorskip("wasmtime")
    caches = [make("native"), make("wasm")]
    with pytest.raises(kvz.InvalidArgumentError, match="one core"):
        kvz.append_many(caches, rows(2, 2, 32, 0), rows(2, 2, 32, 0))


def test_batches_in_threads_do_not_wait_for_each_other_forever():
    """Two batches with the same caches in opposite order, written and read at once."""
    caches = [make("native") for _ in range(4)]
    tokens = rows(4, 2, 32, 0)

    def work(order):
        for _ in range(200):
            kvz.append_many([caches[i] for i in order], tokens, tokens)
            kvz.attend_many([caches[i] for i in order], rows(4, 2, 32, 1), return_mass=True)

    threads = [
        threading.Thread(target=work, args=(order,), daemon=True)
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert [cache.next_position for cache in caches] == [600] * 4


def test_reorder_keeps_forks_and_closes(core):
    """Parents go on themselves once, and as forks after that; the childless are closed."""
    pool = kvz.BufferPool(core=core)
    caches = [make(core, pool=pool) for _ in range(4)]
    for i, cache in enumerate(caches):
        cache.append(*stream(cache.config, 50 + i, i))
    digests = [cache.digest() for cache in caches]
    made = kvz.reorder(caches, [3, 1, 1, 3, 1])
    assert [cache.digest() for cache in made] == [digests[i] for i in (3, 1, 1, 3, 1)]
    assert made[0] is caches[3]
    assert made[1] is caches[1]
    assert len({id(cache) for cache in made}) == 5
    assert [cache.closed for cache in caches] == [True, False, True, False]
    tokens = rows(5, 2, 32, 0)
    kvz.append_many(made, tokens, tokens)
    for parents in ([5], [-1], [0.5]):
        with unchanged(*made), pytest.raises(kvz.KvzError, match="parents"):
            kvz.reorder(made, parents)
    assert kvz.reorder(made, []) == []
    close_all(made)
    assert pool.stats().bytes_in_use == 0
