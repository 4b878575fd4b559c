"""How far attention is from exact: computing on packed bytes errs less than packing them did."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from kvz import reference
from support import PAIRS, STORES, Floats, configure, make_from, relative_error, rows, same_bits

ALL = [(store, store) for store in STORES] + list(PAIRS)
CODES = {"q8", "q4", "q6k", "q5k", "q4k", "q3k", "q2k"}


class Case(NamedTuple):
    keys: Floats  # (T, H, D)
    values: Floats  # (T, H, Dv)
    query: Floats  # (N, Hq, D): the newest N tokens


@cache
def real(layer: int) -> Case:
    """Keys, values and queries that a small language model computed."""
    with np.load(Path(__file__).parent / "data" / "kv_smollm2.npz") as file:
        return Case(*(file[f"{name}{layer}"].astype(np.float32) for name in "kvq"))


@cache
def synthetic(kind: str) -> Case:
    """Normal data with outliers as models have them: whole channels, or single tokens."""
    keys, values = rows(700, 2, 128, 1), rows(700, 2, 96, 2)
    query = rows(20, 8, 128, 3)
    if kind == "channels":
        keys[..., [5, 40, 41]] *= 12
        values[..., [0, 77]] *= 12
    else:
        keys[::97] *= 6
        values[50::97] *= 30
    return Case(keys, values, query)


def case_of(name: str) -> Case:
    return synthetic(name) if name in {"channels", "tokens"} else real(int(name))


def exact(case: Case, keys: Floats, values: Floats) -> Any:
    at = np.arange(len(case.keys))
    return reference.attention(case.query, keys, values, at, at[-len(case.query) :]).out


@cache
def original(name: str) -> Any:
    case = case_of(name)
    return exact(case, case.keys, case.values)


def errors(core: Any, name: str, **fields: Any) -> tuple[float, float]:
    """What storing and computing contribute: relative L2 errors of the attention output."""
    case = case_of(name)
    config = configure(
        num_kv_heads=case.keys.shape[1],
        head_dim=case.keys.shape[2],
        value_dim=case.values.shape[2],
        max_tokens=2048,
        migration_batch=64,
        **{"tail_length": 64, "tail_precision": "f16", "sink_tokens": 4, **fields},
    )
    real_cache = make_from(core, config)
    real_cache.append(case.keys, case.values)
    stored = exact(case, *real_cache.get_all_kv())
    storing = relative_error(stored, original(name))
    return storing, relative_error(real_cache.attend(case.query), stored)


@pytest.mark.parametrize("name", ["1", "13", "26", "channels", "tokens"])
@pytest.mark.parametrize("pair", ALL)
def test_computing_errs_less_than_storing_did(core: Any, name: str, pair: tuple[str, str]) -> None:
    """With codes, attention adds less error than the codes brought; without, only float error.

    The bounds without codes: float32 arithmetic measures 1e-6 to 2e-6 (docs/numerics.md); ten times
    that. A bf16 or f16 store next to it is read as float32, so it has the same bound.
    """
    tail = "f32" if pair == ("f32", "f32") else "f16"
    storing, computing = errors(core, name, store_precision=pair, tail_precision=tail)
    if CODES.isdisjoint(pair):
        assert computing <= 2e-5
    else:
        assert 0 < computing <= storing


@pytest.mark.parametrize("rotation", ["on", "off"])
@pytest.mark.parametrize("store", ["q8", "q4", "q5k", "q4k"])
@pytest.mark.parametrize("layer", ["1", "13", "26"])
def test_computing_errs_less_with_or_without_rotation(
    core: Any, layer: str, store: str, rotation: str
) -> None:
    """Neither choice of rotation lets the computing error pass the storing error."""
    storing, computing = errors(core, layer, store_precision=store, rotation=rotation)
    assert 0 < computing <= storing


def test_formats_are_as_good_as_their_bits(core: Any) -> None:
    """More bits err less, on every layer, and q4k less than q4; the data itself is of f16."""
    order = ["bf16", "q8", "q6k", "q5k", "q4k", "q4", "q3k", "q2k"]
    for layer in ("1", "13", "26"):
        f32, f16, *found = (
            errors(core, layer, store_precision=store, tail_precision="f32")[0]
            for store in ("f32", "f16", *order)
        )
        assert f32 == f16 == 0 < found[0]
        assert found == sorted(set(found))


def test_rotation_pays_for_four_bits(core: Any) -> None:
    """On real keys and values q4 errs less with the rotation than without (the reason for auto)."""
    on, off = (
        sum(
            errors(core, layer, store_precision="q4", rotation=rotation)[0]
            for layer in ("1", "13", "26")
        )
        for rotation in ("on", "off")
    )
    assert on < off


def test_sinks_and_a_longer_tail_help(core: Any) -> None:
    """Keeping the first tokens, or more of the last ones, exact makes q4 better."""
    plain = errors(core, "13", store_precision="q4", sink_tokens=0)[0]
    sinks = errors(core, "13", store_precision="q4", sink_tokens=4)[0]
    longer = errors(core, "13", store_precision="q4", sink_tokens=4, tail_length=256)[0]
    assert longer < sinks < plain


@pytest.mark.parametrize("tail", ["f32", "f16", "bf16"])
def test_a_pooled_cache_errs_by_its_rounding_alone(core: Any, tail: str) -> None:
    """A cache without codes is off by half a step of its precision, and by float arithmetic."""
    case = case_of("channels")
    fields = {"num_kv_heads": 2, "head_dim": 128, "value_dim": 96, "max_tokens": 2048}
    pooled = make_from(core, configure(tail_precision=tail, **fields), "pooled")
    pooled.append(case.keys, case.values)
    stored = exact(case, *pooled.get_all_kv())
    for got, given in zip(pooled.get_all_kv(), (case.keys, case.values), strict=True):
        same_bits(got, reference.round_to(tail, given))
    assert relative_error(pooled.attend(case.query), stored) <= 2e-5
