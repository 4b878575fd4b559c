"""Presets: what they make of a configuration, under every name, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kvz import (
    CacheConfig,
    ConfigError,
    InvalidArgumentError,
    InvalidTypeError,
    ModelCache,
    cli,
    presets,
)
from kvz.options import store
from kvz.presets import Preset, as_preset, find, layer_configs

SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 64}


@pytest.mark.parametrize("preset", presets.ALL, ids=lambda each: each.name)
def test_the_bits_of_a_preset_are_those_of_its_pages(preset: Preset, core: str) -> None:
    layers = len(preset.stores) * 2
    model = ModelCache(preset.configs(layers, **SHAPE, tail_length=64, sink_tokens=0), core=core)
    rows = np.zeros((256 + 64, 2, 64), np.float32)
    for cache in model:
        cache.append(rows, rows)
    store_bytes = sum(cache.stats().store_bytes for cache in model)
    assert store_bytes * 8 / (256 * 2 * 64 * 2 * layers) == preset.bits_per_value


def test_presets_go_from_the_most_bits_to_the_fewest_and_have_their_names() -> None:
    bits = [each.bits_per_value for each in presets.ALL]
    assert bits == sorted(set(bits), reverse=True)
    for each in presets.ALL:
        assert getattr(presets, each.name.upper()) is each is find(each.name) is find(each)


def test_layers_take_the_stores_in_turn_and_the_callers_fields() -> None:
    preset = Preset(name="three", stores=("q8", ("q5k", "q4k"), "q2k"), sink_tokens=7)
    configs = preset.configs(5, **SHAPE, tail_length=32)
    expected = ["q8", ("q5k", "q4k"), "q2k", "q8", ("q5k", "q4k")]
    assert configs == tuple(
        CacheConfig(**SHAPE, tail_length=32, sink_tokens=7, store_precision=store)
        for store in expected
    )
    assert preset.config(4, **SHAPE, sink_tokens=0).sink_tokens == 0


def test_without_a_preset_all_layers_are_alike() -> None:
    assert layer_configs(3, **SHAPE) == (CacheConfig(num_kv_heads=2, head_dim=64),) * 3
    assert layer_configs(3, "small", **SHAPE) == presets.SMALL.configs(3, **SHAPE)


def test_a_store_is_a_preset_of_its_own() -> None:
    assert as_preset("q8").stores == ("q8",)
    assert as_preset(("q8", "q4")).name == "q8/q4"
    assert as_preset(presets.TINY) is presets.TINY


def test_what_is_no_preset_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"expected one of 'lossless', .* got 'huge'"):
        find("huge")
    with pytest.raises(InvalidTypeError, match="expected a Preset or a name, got int"):
        find(4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the preset small says it"):
        presets.SMALL.config(**SHAPE, store_precision="q8")
    with pytest.raises(InvalidArgumentError, match="num_layers: expected 1 or more"):
        presets.SMALL.configs(0)
    with pytest.raises(ConfigError, match=r"expected one of .* got 'q9'"):
        Preset(name="wrong", stores=("q9",)).config(**SHAPE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "stores"),
    [
        ("q8", ("q8",)),
        ("q8/q4", (("q8", "q4"),)),
        ("q5k/q4k,q4k", (("q5k", "q4k"), "q4k")),
        ("balanced", presets.BALANCED.stores),
    ],
)
def test_the_command_line_reads_stores(text: str, stores: tuple[object, ...]) -> None:
    preset = as_preset(store(text))
    assert (preset.stores, preset.name) == (stores, text)


@pytest.mark.parametrize("text", ["", "q9", "q8/q4/q2k", "q8,", "Balanced"])
def test_the_command_line_refuses_what_is_no_store(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "qwen3-8b", "--store", text])
    assert f"got {text!r}" in capsys.readouterr().err


def test_a_plan_of_layers_in_turn_is_the_sum_of_its_layers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbers = ["--layers", "5", "--kv-heads", "2", "--head-dim", "64", "--json"]
    assert cli.main(["plan", *numbers, "--store", "balanced"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    configs = presets.BALANCED.configs(5, **SHAPE)
    assert row["store"] == "balanced"
    assert row["bytes_per_token"] == sum(config.store_bytes_per_token for config in configs)


def test_a_plan_of_one_store_compares_it_with_f16(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "qwen3-8b", "--tail", "0", "--store", "q8"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("q8"))
    assert f"{16 / 8.5:.2f}x" in line
