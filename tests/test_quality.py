"""`quality`: what the store is going to make of tokens that are still exact."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import kvz
from kvz import reference
from kvz.reference.formats import offset_of
from support import STORES, Floats, configure, make, queries, stream, unchanged

SIZES: dict[str, Any] = {"max_tokens": 4096, "tail_length": 80}


def passed(rows: Floats, config: Any, side: int) -> Floats:
    """Rows of up to one page as they read back once they are stored, through the warm tier."""
    store = (config.key_precision, config.value_precision)[side]
    formats = [reference.Format.of(config.tail_precision)]
    formats += [reference.Format.of(config.warm_precision, config.rotation)]
    formats += [reference.Format.of(store, config.rotation)]
    if not config.warm_length:
        del formats[1]
    dim, held = rows.shape[-1], formats[0].spread(rows)
    for before, after in pairwise(formats):
        held = after.entered(held, before, dim)
        offset = offset_of(held) if after.centred and side == 0 else None
        held = after.rounded(held, offset)
    return formats[-1].gathered(held, dim)


def ratio(wrong: Any, right: Any) -> Any:
    """Norms over all but the axis of heads, one over the other."""
    axes = (0, 2)
    squares = [(np.asarray(x, np.float64) ** 2).sum(axis=axes) for x in (wrong, right)]
    return np.sqrt(squares[0] / squares[1])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("warm", [0, 100])
@pytest.mark.parametrize("dim", [33, 64])
def test_errors_are_those_of_what_will_be_stored(
    core: Any, store: str, warm: int, dim: int
) -> None:
    """Against the reference: keys, values, and logits less their means, for each kv head."""
    config = configure(**SIZES, head_dim=dim, value_dim=48, store_precision=store, warm_length=warm)
    cache = kvz.TwoTierCache(config, core=core)
    keys, values = stream(config, 500)
    cache.append(keys, values)
    query = queries(config, 3, 2)
    with unchanged(cache):
        got = cache.quality(query, 0.2)
    start = 500 - cache.stats().tail_tokens
    exact = [x[start : start + 64].astype(np.float16).astype(np.float32) for x in (keys, values)]
    wrong = [passed(x, config, side) - x for side, x in enumerate(exact)]
    np.testing.assert_allclose(got.keys, ratio(wrong[0], exact[0]), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(got.values, ratio(wrong[1], exact[1]), rtol=1e-6, atol=1e-12)
    parts = []
    for rows in (wrong[0], exact[0]):
        per_head = np.repeat(rows.astype(np.float64), 2, axis=1)
        logits = np.einsum("nhd,thd->thn", query.astype(np.float64), per_head) * 0.2
        logits -= logits.mean(axis=0)
        parts.append(logits.reshape(64, 2, 6))
    np.testing.assert_allclose(got.logits, ratio(*parts), rtol=1e-5, atol=1e-12)
    rms = np.sqrt((parts[0] ** 2).mean(axis=(0, 2)))
    np.testing.assert_allclose(got.logit_rms, rms, rtol=1e-5, atol=1e-12)
    assert got.tokens == 64


def test_it_foretells_what_migration_does(core: Any) -> None:
    """A whole page that is measured and then migrates has just that error."""
    cache = make(core, **{**SIZES, "tail_length": 64}, store_precision="q4k", migration_batch=64)
    keys, values = stream(cache.config, 128)
    cache.append(keys[:64], values[:64])
    before = cache.get_kv(0, 64)
    told = cache.quality()
    cache.append(keys[64:], values[64:])
    assert cache.stats().store_tokens == 64
    after = cache.get_kv(0, 64)
    np.testing.assert_allclose(told.keys, ratio(after[0] - before[0], before[0]), rtol=1e-6)
    np.testing.assert_allclose(told.values, ratio(after[1] - before[1], before[1]), rtol=1e-6)


def test_both_cores_give_the_same_numbers() -> None:
    """To the last bit, for any number of tokens, in any head."""
    found = []
    for core in ("native", "wasm"):
        cache = make(core, **SIZES, store_precision=("q8", "q3k"), head_dim=80)
        cache.append(*stream(cache.config, 200))
        found.append([cache.quality(queries(cache.config), tokens=n).to_dict() for n in (1, 9, 64)])
    assert found[0] == found[1]
    assert json.loads(json.dumps(found[0])) == found[0]
    assert [one["tokens"] for one in found[0]] == [1, 9, 64]


def test_an_exact_store_has_no_error(core: Any) -> None:
    """And zeros, of which nothing can be lost, have none in any store."""
    for fields in ({"store_precision": "f32"}, {"store_precision": "f16", "warm_length": 0}):
        cache = make(core, **SIZES, **fields)
        cache.append(*stream(cache.config, 100))
        got = cache.quality(queries(cache.config))
        assert not np.concatenate([got.keys, got.values, got.logits, got.logit_rms]).any()
    cache = make(core, **SIZES, store_precision="q4")
    cache.append(np.zeros((100, 2, 32)), np.zeros((100, 2, 32)))
    assert not cache.quality(queries(cache.config)).keys.any()


def test_what_it_says(core: Any) -> None:
    """One line for people, a table for notebooks, plain values for machines."""
    cache = make(core, **SIZES, store_precision=("q8", "q4"))
    assert repr(cache.quality()) == "CacheQuality(no tokens on their way to q8/q4)"
    assert np.isnan(cache.quality().keys).all()
    assert cache.quality().tokens == 0
    cache.append(*stream(cache.config, 200))
    plain, full = cache.quality(), cache.quality(queries(cache.config, 2, 4))
    assert plain.logits is None
    assert "64 tokens on the way to q8/q4, worst head: keys 0." in repr(plain)
    assert "logits" in repr(full)
    assert "rms" in repr(full)
    assert full._repr_html_().count("<tr>") == 3
    assert plain._repr_html_().count("<td>-</td>") == 4
    assert set(full.to_dict()) == {"tokens", "precision", "keys", "values", "logits", "logit_rms"}


def test_a_model_tells_of_all_its_layers(core: Any) -> None:
    """Layer by layer, with the worst one in front."""
    configs = [configure(**SIZES, store_precision=p) for p in ("q8", "q4")]
    model = kvz.ModelCache(configs, pool=kvz.BufferPool(core=core))
    assert repr(model.quality()) == "ModelQuality(2 layers, no tokens)"
    for layer in model:
        layer.append(*stream(layer.config, 200))
    got = model.quality([queries(configs[0]), None], tokens=8)
    assert [layer.precision for layer in got.layers] == ["q8", "q4"]
    assert got.layers[0].logits is not None
    assert got.layers[1].logits is None
    assert "2 layers, of the worst keys: CacheQuality(8 tokens on the way to q4" in repr(got)
    assert got._repr_html_().count("<tr>") == 3
    assert len(got.to_dict()["layers"]) == 2
    with pytest.raises(kvz.InvalidArgumentError, match="one for each of 2 layers, got 1"):
        model.quality([None])


def test_bad_arguments_are_refused(core: Any) -> None:
    """Shapes, numbers and closed caches."""
    cache = make(core, **SIZES)
    cache.append(*stream(cache.config, 100))
    for shape in ((32,), (3, 32), (2, 31), (0, 2, 32), (2, 0, 32), (1, 1, 2, 32)):
        with pytest.raises(kvz.InvalidArgumentError, match="query: expected shape"):
            cache.quality(np.zeros(shape))
    with pytest.raises(kvz.InvalidArgumentError, match="tokens: expected 1 or more"):
        cache.quality(tokens=0)
    cache.close()
    with pytest.raises(kvz.ClosedError):
        cache.quality()
