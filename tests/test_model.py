"""All layers of a sequence as one thing: together or not at all."""

from __future__ import annotations

import pytest

import kvz
from support import configure, queries, same_bits, stream, unchanged

# Full attention in 8 bits, a sliding window of 60 with sinks, and a layer of another shape.
LAYERS = (
    configure(store_precision="q8"),
    configure(store_precision="q4", max_tokens=64, sink_tokens=4),
    configure(num_kv_heads=1, head_dim=64, value_dim=32, store_precision=("q8", "q4")),
)


def make(core, pool=None, tokens=0):
    model = kvz.ModelCache(LAYERS, pool=pool, core=core)
    forward(model, tokens)
    return model


def forward(model, tokens, seed=0):
    """What a forward pass does."""
    for i, layer in enumerate(model):
        layer.append(*stream(layer.config, tokens, seed + 100 * i))


def test_layers_are_caches_over_one_pool(core):
    pool = kvz.BufferPool(core=core)
    model = make(core, pool, 200)
    assert len(model) == model.num_layers == 3
    assert [layer.config for layer in model] == list(model.configs) == list(LAYERS)
    assert model[-1] is model[2]
    with pytest.raises(IndexError):
        model[3]
    assert all(layer.memory_pool is model.memory_pool is pool for layer in model)
    assert (model.core, model.next_position) == (core, 200)
    assert [len(layer) for layer in model] == [200, 64, 200]
    now = model.stats()
    assert now.total_bytes == model.nbytes == pool.stats().bytes_in_use
    assert now.total_bytes == sum(layer.total_bytes for layer in now.layers)
    assert now.layers == tuple(layer.stats() for layer in model)
    assert 1 < now.compression_ratio < 4
    assert 4.5 < now.bits_per_value < 16
    assert "3 layers, 200 tokens" in repr(model)
    model.check()
    model.close()
    assert model.closed
    assert pool.stats().bytes_in_use == 0
    with pytest.raises(kvz.ClosedError):
        model.stats()
    assert repr(model) == "ModelCache(closed)"


def test_one_config_serves_all_layers(core):
    with kvz.ModelCache(LAYERS[0], 4, core=core, store_precision="q4") as model:
        assert (
            model.configs
            == (kvz.CacheConfig.from_dict({**LAYERS[0].to_dict(), "store_precision": "q4"}),) * 4
        )
    with kvz.ModelCache(num_layers=2, core=core, head_dim=64) as model:
        assert model[1].config == kvz.CacheConfig(head_dim=64)


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        ((), kvz.InvalidArgumentError, "num_layers: expected a number"),
        ((LAYERS[0],), kvz.InvalidArgumentError, "num_layers"),
        ((LAYERS[0], 0), kvz.InvalidArgumentError, "num_layers"),
        ((LAYERS, 2), kvz.InvalidArgumentError, "expected 3, one per config, got 2"),
        (([],), kvz.InvalidTypeError, "config"),
        (("q4", 3), kvz.InvalidTypeError, "config"),
        (([LAYERS[0], None],), kvz.InvalidTypeError, "config"),
    ],
)
def test_what_makes_no_layers_is_refused(args, kind, text):
    with pytest.raises(kind, match=text):
        kvz.ModelCache(*args)


def test_forks_share_all_layers(core):
    pool = kvz.BufferPool(core=core)
    model = make(core, pool, 150)
    before, held = pool.stats().bytes_in_use, model.digest()
    branch = model.fork()
    assert pool.stats().bytes_in_use == before
    assert branch.digest() == held
    assert branch.stats().own_bytes == 0
    forward(branch, 30, seed=1)
    assert model.digest() == held != branch.digest()
    assert model.fork(140).next_position == 140
    with pytest.raises(kvz.InvalidArgumentError, match="length"):
        model.fork(60)  # the window has lost it
    assert len({layer.digest() for layer in model}) == 3
    plain = kvz.ModelCache([LAYERS[0]] * 3, core=core)
    forward(plain, 100)
    assert plain.fork(60).next_position == 60


def test_trim_brings_the_layers_of_a_broken_pass_level(core):
    """A pass that broke off after the first layer is taken back by trimming its tokens."""
    model, plain = make(core, tokens=40), make(core, tokens=40)
    model[0].append(*stream(LAYERS[0], 1, 5))
    assert model.next_position == 41
    assert model.trim(1) == 1
    assert [layer.next_position for layer in model] == [40, 40, 40]
    assert model.digest() == plain.digest()
    assert model.trim(1000) == 40
    assert model.next_position == 0


def test_trim_is_for_all_layers_or_none(core):
    """The window cannot go back to where its tokens are gone; the other layers then do not."""
    model = make(core, tokens=200)
    with unchanged(*model), pytest.raises(kvz.InvalidArgumentError, match="length"):
        model.trim(100)
    assert model.trim(60) == 60
    assert [layer.next_position for layer in model] == [140, 140, 140]


def test_a_rejected_draft_leaves_no_trace_in_any_layer(core):
    """Also where one layer's window had moved on."""
    model, plain = make(core, tokens=130), make(core, tokens=130)
    with unchanged(*model), model.transaction() as step:
        forward(model, 80, seed=1)
        step.rollback()
    forward(model, 8, seed=2)
    forward(plain, 8, seed=2)
    assert model.digest() == plain.digest()
    for layer, other in zip(model, plain, strict=True):
        query = queries(layer.config, 4)
        same_bits(layer.attend(query), other.attend(query))
    model.clear()
    assert (model.next_position, model.nbytes) == (0, 0)


def test_a_full_pool_stops_a_pass_and_nothing_is_lost(core):
    """What the layers before the full one took is given back by the transaction."""
    probe = make(core, kvz.BufferPool(core=core), 100)
    pool = kvz.BufferPool(max_bytes=probe.nbytes, core=core)
    model = make(core, pool, 100)
    with unchanged(*model):
        with pytest.raises(kvz.PoolExhaustedError), model.transaction():
            forward(model, 300, seed=1)
        assert pool.stats().bytes_in_use == model.nbytes
    model.trim(30)
    forward(model, 20, seed=1)
    model.check()
