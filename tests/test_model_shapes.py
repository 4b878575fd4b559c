"""`kvz plan`: what a model's caches take is what they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvz
from kvz import cli
from kvz.errors import InvalidArgumentError
from kvz.model_shapes import MODELS, Layers, layers_of, layers_of_config, plan_rows
from kvz.presets import STORES

LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
         "hidden_size": 512}  # fmt: skip


@pytest.mark.parametrize("store", STORES)
def test_planned_bytes_are_those_of_a_cache(core: Any, store: Any) -> None:
    """Where pages are full, to the byte."""
    tail = "f32" if store == "f32" else "f16"
    cache = kvz.TwoTierCache(
        core=core, num_kv_heads=2, head_dim=64, tail_length=64, migration_batch=64,
        store_precision=store, tail_precision=tail, max_tokens=4096,
    )  # fmt: skip
    cache.append(np.zeros((512, 2, 64), np.float32), np.zeros((512, 2, 64), np.float32))
    layers = (Layers(count=3, num_kv_heads=2, head_dim=64),)
    (row,) = plan_rows(layers, context=512, batch=2, tail=64, sinks=0, memory=None, stores=(store,))
    assert row.cache_bytes == 3 * 2 * cache.nbytes
    assert row.bytes_per_token == 3 * cache.config.store_bytes_per_token
    assert row.tokens_per_gb == 10**9 // row.bytes_per_token


@pytest.mark.parametrize("warm", ["f16", "q8", "q4"])
@pytest.mark.parametrize("store", ["q8", ("q8", "q4"), "q4", "q4k", "q2k"])
def test_planned_bytes_of_a_warm_tier_are_those_of_a_cache(
    core: Any, warm: Any, store: Any
) -> None:
    """Where pages are full, to the byte; at any length, but for pages that are not full."""
    fields: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 64, "tail_length": 64,
                              "store_precision": store, "max_tokens": 4096}  # fmt: skip
    layers = (Layers(count=3, num_kv_heads=2, head_dim=64),)
    given = {"batch": 2, "tail": 64, "sinks": 0, "memory": None, "warm_precision": warm}

    def planned(context: int, warm_length: int) -> Any:
        (row,) = plan_rows(
            layers, context=context, warm_length=warm_length, stores=(store,), **given
        )
        return row

    def held(context: int, warm_length: int) -> int:
        cache = kvz.TwoTierCache(core=core, warm_length=warm_length, warm_precision=warm, **fields)
        cache.append(*[np.zeros((context, 2, 64), np.float32)] * 2)
        return int(3 * 2 * cache.nbytes)

    config = kvz.CacheConfig(**fields, warm_precision=warm)
    has_warm_tier = config.warm_bytes_per_token > config.store_bytes_per_token
    for context, length in ((512, 128), (512, 448), (512, 1024), (192, 128), (64, 128)):
        row = planned(context, length)
        assert row.has_warm_tier is has_warm_tier
        assert row.cache_bytes == held(context, length if has_warm_tier else 0)
    assert row.bytes_per_token == 3 * config.store_bytes_per_token
    page = 3 * 2 * 64
    most = page * (config.tail_bytes_per_token + 2 * config.warm_bytes_per_token)
    for context in (1, 130, 227, 228, 300, 700) if has_warm_tier else ():
        assert 0 <= held(context, 100) - planned(context, 100).cache_bytes <= most


def test_what_fits_is_the_longest_that_does() -> None:
    layers = MODELS["gpt-oss-20b"]
    fields: dict[str, Any] = {"batch": 3, "tail": 64, "sinks": 4, "warm_length": 1000}
    rows = plan_rows(layers, context=1, memory=10**8, **fields)
    for row, store in zip(rows, STORES, strict=True):
        assert row.fitting_context is not None
        for more, fits in ((0, True), (1, False)):
            context = row.fitting_context + more
            (now,) = plan_rows(layers, context=context, memory=None, stores=(store,), **fields)
            assert (now.cache_bytes <= 10**8) is fits


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, [(2, 2, 64, None)]),
        ({**LLAMA, "head_dim": 80}, [(2, 2, 80, None)]),
        ({**LLAMA, "sliding_window": 128}, [(2, 2, 64, 128)]),
        ({**LLAMA, "sliding_window": 128, "use_sliding_window": False}, [(2, 2, 64, None)]),
        ({**LLAMA, "sliding_window": 9, "sliding_window_pattern": 2},
         [(1, 2, 64, None), (1, 2, 64, 9)]),
        ({**LLAMA, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]},
         [(1, 2, 64, None), (1, 2, 64, 9)]),
        ({**LLAMA, "layer_types": ["conv", "full_attention"]}, [(1, 2, 64, None)]),
        ({"text_config": LLAMA, "vision_config": {}}, [(2, 2, 64, None)]),
        ({"n_layer": 3, "n_head": 4, "n_embd": 64}, [(3, 4, 16, None)]),
    ],
)  # fmt: skip
def test_configurations_of_transformers_are_understood(config: Any, expected: Any) -> None:
    layers = layers_of_config(config, "config")
    assert [(one.count, one.num_kv_heads, one.head_dim, one.window) for one in layers] == expected


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ([], "expected the configuration"),
        ({}, "num_hidden_layers or n_layer"),
        ({**LLAMA, "kv_lora_rank": 8}, "latent"),
        ({**LLAMA, "layer_types": ["conv", "conv"]}, "no layer"),
    ],
)
def test_other_configurations_are_refused(config: Any, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^config: .*{text}"):
        layers_of_config(config, "config")


def test_a_model_is_found_by_name_file_folder_and_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--llama" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    expected = layers_of_config(LLAMA, "config")
    for name in ("some/llama", str(folder), str(folder / "config.json")):
        assert layers_of(name) == expected
    assert layers_of("SmolLM2-135M") == MODELS["smollm2-135m"]
    with pytest.raises(InvalidArgumentError, match="got 'some/other'"):
        layers_of("some/other")
    (folder / "config.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match="not JSON"):
        layers_of("some/llama")


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "llama-3.1-8b", "--context", "32768", "--memory", "8GB"]) == 0
    printed = capsys.readouterr().out
    assert "32,768" in printed
    assert "32 layers of 8 kv heads x 128" in printed
    (q4,) = (line.split() for line in printed.splitlines() if line.startswith("q4 "))
    assert q4[1] == f"{32 * 8 * 128 * 2 * 4.5 / 8:,.0f}"


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["--layers", "2", "--kv-heads", "4", "--head-dim", "64"]
    assert cli.main(["plan", *numbers, "--batch", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["layers"] == [{"count": 2, "num_kv_heads": 4, "head_dim": 64, "window": None}]
    bits = {row["store"]: row["bytes_per_token"] * 8 / (2 * 2 * 4 * 64) for row in printed["rows"]}
    assert bits == {
        **{"f32": 32, "f16": 16, "q8": 8.5, "q8/q4": 6.5, "q4": 4.5, "q5k/q4k": 4.8125},
        **{"q6k": 6.3125, "q5k": 5.3125, "q4k": 4.3125, "q3k": 3.3125, "q2k": 2.3125},
    }
    assert printed["batch"] == 3


def test_the_command_counts_a_warm_tier(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the store takes fewer bits; what others are compared with has none."""
    plan = ["plan", "--layers", "1", "--kv-heads", "1", "--head-dim", "64", "--context", "1000"]
    bytes_of = {"f32": 512, "f16": 256, "q8": 136, "q4": 72}  # of a token
    for warm, options in (("q8", []), ("q4", ["--warm-precision", "q4"])):
        options = ["--tail", "100", "--warm-length", "300", *options]
        assert cli.main([*plan, *options, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["warm_length"], printed["warm_precision"]) == (300, warm)
        rows = {row["store"]: row for row in printed["rows"]}
        for store, size in bytes_of.items():
            passes = (warm, store) == ("q8", "q4")
            assert rows[store]["has_warm_tier"] is passes
            tail, middle = 512 if store == "f32" else 256, bytes_of[warm] if passes else size
            assert rows[store]["cache_bytes"] == 100 * tail + 300 * middle + 600 * size
        assert rows["q4k"]["has_warm_tier"]
        assert cli.main([*plan, *options]) == 0
        table = capsys.readouterr().out
        assert f"the 300 before the newest in {warm} where" in " ".join(table.split())
        assert "\n1 layer of 1 kv head x 64. 1 sequence. " in table
        (f16,) = (line.split() for line in table.splitlines() if line.startswith("f16 "))
        assert f16[4] == "1.00x"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--warm-precision", "q8"], "--warm-precision: there is no warm tier without"),
        (["--warm-length", "64", "--store", "q8"], "more bits than the store q8, got q8"),
        (["--warm-length", "64", "--store", "q4", "--store", "f16"], "the store f16, got q8"),
        (["--warm-length", "64", "--store", "lossless"], "more bits than the store lossless"),
        (["--warm-length", str(1 << 41)], "warm_length: expected at most"),
    ],
)
def test_a_warm_tier_that_cannot_be_is_code_1(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "qwen3-8b", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kvz: error: ")
    assert text in error


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["plan"], "expected one, or --layers"),
        (["plan", "--layers", "3"], "expected one, or --layers"),
        (["plan", "qwen3-8b", "--layers", "3"], "give one, or --layers"),
        (["plan", "no-such-model"], "got 'no-such-model'"),
    ],
)
def test_a_model_that_is_not_there_is_code_1(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(options) == 1
    error = capsys.readouterr().err
    assert error.startswith("kvz: error: model: ")
    assert text in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096", 4096), ("8GB", 8 * 10**9), ("1.5GiB", 3 << 29), ("2 kb", 2000), ("7B", 7)],
)
def test_sizes(text: str, expected: int) -> None:
    assert cli.size(text) == expected
