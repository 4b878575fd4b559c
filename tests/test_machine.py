"""Random walks over all verbs, against the reference: `--hypothesis-profile=long` walks further."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import kvz
from support import (
    KINDS,
    STORES,
    agree,
    make_from,
    model_of,
    queries,
    rows,
    same_bits,
    same_state,
    stream,
    unchanged,
)

counts = st.one_of(st.integers(1, 9), st.integers(10, 70), st.sampled_from([63, 64, 65, 128, 150]))
seeds = st.integers(0, 2**20)
tails = st.sampled_from(["f32", "f16", "bf16"])
stores = st.sampled_from(STORES)
warms = st.sampled_from(["f32", "f16", "bf16", "q8", "q4"])
ENDS = ("keep", "rollback", "raise", "fork and rollback")


@st.composite
def configs(draw: Any, tiered: bool) -> Any:
    """Any small configuration: every tier within reach, every eviction near."""
    sinks, tail = draw(st.integers(0, 9)), draw(st.integers(0, 40))
    batch = draw(st.sampled_from([1, 2, 7, 32, 64]))
    warm = draw(st.sampled_from([0, 1, 40, 64, 100])) if tiered else 0
    return kvz.CacheConfig(
        num_kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 16, 31, 32, 33, 64, 80])),
        value_dim=draw(st.sampled_from([None, 1, 24, 64])),
        max_tokens=sinks + tail + batch + (warm and warm + 64) + draw(st.integers(0, 150)),
        tail_length=tail,
        tail_precision=draw(tails),
        store_precision=(draw(stores), draw(stores)),
        migration_batch=batch,
        sink_tokens=sinks,
        rotation=draw(st.sampled_from(["auto", "on", "off"])),
        warm_length=warm,
        warm_precision=draw(warms),
    )


@st.composite
def policies(draw: Any) -> Any:
    """Any of the three, with small tiers."""
    length, pair = st.integers(0, 60), st.tuples(stores, stores)
    warm = st.sampled_from([None, 0, 1, 64, 100])
    return draw(
        st.one_of(
            st.builds(kvz.HighPrecisionTail, tail_length=length, precision=tails),
            st.builds(kvz.QuantizedStore, precision=pair),
            st.builds(
                kvz.Hybrid,
                tail_length=length,
                tail_precision=tails,
                store_precision=pair,
                warm_length=warm,
                warm_precision=st.one_of(st.none(), warms),
            ),
        )
    )


@st.composite
def options_of_attend(draw: Any, heads: int, tokens: int, n: int | None) -> dict[str, Any]:
    """Any options, on their own or together."""
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    seed = draw(seeds)
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.0, 0.05, 0.3]))
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 2 * tokens + 1))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.1, 2.0, 30.0]))
    if draw(st.booleans()):
        options["alibi_slopes"] = np.abs(rows(1, 1, heads, seed)[0, 0]) / 10
    if draw(st.booleans()):
        options["sinks"] = rows(1, 1, heads, seed + 1)[0, 0]
    kind = draw(st.sampled_from(["none", "boolean", "additive"]))
    if kind != "none":
        shapes = [(tokens,), (heads, tokens), (1, tokens)]
        if n:
            shapes = [
                (tokens,),
                (n, tokens),
                (n, heads, tokens),
                (n, 1, tokens),
                (1, heads, tokens),
            ]
        shape = draw(st.sampled_from(shapes))
        mask = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        options["mask"] = mask > -0.8 if kind == "boolean" else mask
    return options


class Pair(NamedTuple):
    """A cache and the reference that it must agree with."""

    real: Any
    model: Any


class CacheMachine(RuleBasedStateMachine):
    """A cache and its reference, which must never differ."""

    def __init__(self, core: Any, kind: str) -> None:
        super().__init__()
        self.core, self.kind = core, kind

    @initialize(data=st.data())
    def start(self, data: Any) -> None:
        config = data.draw(configs(self.kind == "two_tier"))
        self.pool = kvz.BufferPool(core=self.core)
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.real = make_from(self.core, config, self.kind, pool=self.pool)
        self.model = model_of(config, self.kind)
        self.others: list[Pair] = []

    @rule(n=counts, seed=seeds, cut=st.integers(1, 40))
    def append(self, n: int, seed: int, cut: int) -> None:
        """The real cache gets the tokens in runs of `cut`, the reference all at once."""
        keys, values = stream(self.real.config, n, seed)
        for start in range(0, n, cut):
            self.real.append(keys[start : start + cut], values[start : start + cut])
        self.model.append(keys, values)

    @rule(n=counts, seed=seeds, where=st.integers(0, 10**6), bad=st.sampled_from([np.nan, np.inf]))
    def append_something_bad(self, n: int, seed: int, where: int, bad: float) -> None:
        keys, values = stream(self.real.config, n, seed)
        side = (keys, values)[where % 2]
        side.flat[where % side.size] = bad
        with unchanged(self.real), pytest.raises(kvz.KvzError, match=("keys", "values")[where % 2]):
            self.real.append(keys, values)

    @rule(n=st.integers(0, 80))
    def trim(self, n: int) -> None:
        assert self.real.trim(n) == self.model.trim(n)

    @precondition(lambda self: len(self.others) < 4)
    @rule(back=st.integers(0, 200), swap=st.booleans())
    def fork(self, back: int, swap: bool) -> None:
        """Fork at any token, also where eviction has been; walk on with either of the two."""
        length = max(self.model.next_position - back, 0)
        try:
            model = self.model.fork(length)
        except ValueError:
            with unchanged(self.real), pytest.raises(kvz.InvalidArgumentError, match="length"):
                self.real.fork(length)
            return
        real = self.real.fork(length) if back else self.real.fork()
        self.others.append(Pair(real, model))
        if swap:
            self.switch(len(self.others) - 1)

    @rule(back=st.integers(-40, 200), length=st.integers(1, 30), undo=st.booleans())
    def pin(self, back: int, length: int, undo: bool) -> None:
        """Pin what is held or yet to come; refused where it was evicted or leaves no room."""
        start = max(self.model.next_position - back, 0)
        if undo:
            self.real.unpin(start, start + length)
            self.model.unpin(start, start + length)
            return
        try:
            self.model.pin(start, start + length)
        except ValueError:
            with unchanged(self.real), pytest.raises(kvz.InvalidArgumentError, match="pin"):
                self.real.pin(start, start + length)
            return
        self.real.pin(start, start + length)

    @precondition(lambda self: len(self.model.evictable()))
    @rule(seed=seeds, part=st.sampled_from([0.0, 0.1, 0.5, 1.0]), first=st.integers(0, 200))
    def evict(self, seed: int, part: float, first: int) -> None:
        """Evict some single tokens, and a run of them; a token that may not go stops all."""
        may = self.model.evictable()
        np.testing.assert_array_equal(self.real.evictable, may)
        some = may[np.random.default_rng(seed).random(len(may)) < part]
        gone = np.union1d(some, may[first : first + 20])
        stays = np.setdiff1d(np.arange(self.model.next_position + 1), may)
        if seed % 5 == 0:
            with unchanged(self.real), pytest.raises(kvz.InvalidArgumentError, match="evict"):
                self.real.evict(np.append(gone, stays[seed % len(stays)]))
        assert self.real.evict(np.random.default_rng(seed).permutation(gone)) == len(gone)
        self.model.evict(gone)

    @rule(n=counts, seed=seeds, back=st.integers(0, 80), how=st.sampled_from(ENDS))
    def transaction(self, n: int, seed: int, back: int, how: str) -> None:
        """Append and trim in a transaction; unless it is kept, nothing has happened."""
        before = self.real.digest(), self.real.stats().evicted_tokens
        tokens = stream(self.real.config, n, seed)
        with suppress(ZeroDivisionError), self.real.transaction() as step:
            self.real.append(*tokens)
            self.real.trim(back)
            if how == "keep":
                self.model.append(*tokens)
                self.model.trim(back)
            elif how == "rollback":
                step.rollback()
            elif how == "fork and rollback" and len(self.others) < 6:
                branch = Pair(self.real.fork(), self.model.fork())
                branch.model.append(*tokens)
                branch.model.trim(back)
                self.others.append(branch)
                step.rollback()
            else:
                raise ZeroDivisionError
        if how != "keep":
            assert (self.real.digest(), self.real.stats().evicted_tokens) == before

    @precondition(lambda self: self.kind == "two_tier")
    @rule(policy=policies(), undo=st.booleans())
    def update_policy(self, policy: Any, undo: bool) -> None:
        """Change precisions and lengths, and maybe back; refused where they do not fit."""
        if undo:
            with unchanged(self.real), self.real.transaction() as step:
                with suppress(kvz.KvzError):
                    self.real.update_policy(policy)
                    self.real.append(*stream(self.real.config, 9, 1))
                step.rollback()
            return
        try:
            self.model.reconfigure(policy.apply(self.model.config))
        except ValueError:
            with (
                unchanged(self.real),
                pytest.raises(kvz.InvalidArgumentError, match=r"room|max_tok"),
            ):
                self.real.update_policy(policy)
            return
        self.real.update_policy(policy)

    @precondition(lambda self: self.others)
    @rule(which=st.integers(0, 3))
    def switch(self, which: int) -> None:
        """Walk on with another fork."""
        which %= len(self.others)
        other = self.others[which]
        self.others[which] = Pair(self.real, self.model)
        self.real, self.model = other

    @precondition(lambda self: self.others)
    @rule(which=st.integers(0, 5))
    def close_a_fork(self, which: int) -> None:
        self.others.pop(which % len(self.others)).real.close()

    @rule(incremental=st.booleans(), mmap=st.booleans())
    def save_and_load(self, incremental: bool, mmap: bool) -> None:
        """Walk on with what was written over whatever was saved before."""
        path, digest = Path(self.folder.name, "x"), self.real.digest()
        self.real.save(path, incremental=incremental)
        mmap = mmap and self.core == "native" and os.name == "posix"
        loaded = type(self.real).load(path, mmap=mmap, pool=self.pool)
        self.real.close()
        self.real = loaded
        assert loaded.digest() == digest

    @precondition(lambda self: len(self.model) > 100)
    @rule()
    def clear(self) -> None:
        self.real.clear()
        self.model.clear()

    @rule(data=st.data(), n=st.one_of(st.none(), st.integers(1, 40)), ratio=st.integers(1, 3))
    def attend(self, data: Any, n: int | None, ratio: int) -> None:
        if n and self.model.next_position:
            n = min(n, self.model.next_position)
        query = queries(self.real.config, n, ratio, seed=data.draw(seeds))
        options = options_of_attend(query.shape[-2], len(self.model), n)
        agree(self.real, self.model, query, **data.draw(options))

    @rule(ends=st.tuples(st.integers(0, 300), st.integers(0, 300)))
    def get(self, ends: tuple[int, int]) -> None:
        """Read a range of what is held; a range with a hole is refused, here as there."""
        now = self.model.next_position
        start, stop = sorted(max(now - end, 0) for end in ends)
        try:
            expected = self.model.get_kv(start, stop)
        except ValueError:
            with pytest.raises(kvz.InvalidArgumentError):
                self.real.get_kv(start, stop)
            return
        for got, wanted in zip(self.real.get_kv(start, stop), expected, strict=True):
            same_bits(got, wanted)

    @invariant()
    def agrees_with_the_reference(self) -> None:
        if hasattr(self, "real"):
            for real, model in [Pair(self.real, self.model), *self.others]:
                same_state(real, model)
                real.check()

    @invariant()
    def counts_shared_memory_once(self) -> None:
        if hasattr(self, "real"):
            caches = [self.real, *(pair.real for pair in self.others)]
            in_use = self.pool.stats().bytes_in_use
            assert max(cache.nbytes - cache.mapped_bytes for cache in caches) <= in_use
            assert in_use <= sum(cache.nbytes for cache in caches)

    def teardown(self) -> None:
        if hasattr(self, "real"):
            for real, _ in [Pair(self.real, self.model), *self.others]:
                real.close()
            assert self.pool.stats().bytes_in_use == 0
            self.folder.cleanup()


@pytest.mark.parametrize("kind", KINDS)
def test_any_walk_agrees_with_the_reference(core: Any, kind: str) -> None:
    """No order of verbs makes a cache differ from its reference."""
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(
        cast(Any, lambda: CacheMachine(core, kind)),
        settings=settings(deadline=None, suppress_health_check=quiet),
    )
