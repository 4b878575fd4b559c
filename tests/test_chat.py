"""`kvz chat` with a model that is no model: turns, commands, and what the caches hold."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

import kvz
from kvz import cli
from kvz.demo import chat


class Letters:
    """Every character is a token, and the answer is the reversed line."""

    shape = SimpleNamespace(num_layers=2, num_kv_heads=1, head_dim=32, max_tokens=600)

    def __init__(self) -> None:
        self.tokenizer = self
        self.read = ""

    def encode(self, text: str) -> Any:
        return SimpleNamespace(ids=list(map(ord, text)))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def forward(self, ids: Sequence[int], caches: Any, *, last: int | None = None) -> Any:
        self.read += self.decode(ids)
        for cache in caches:
            rows = np.ones((len(ids), 1, 32), np.float32)
            cache.append(rows, rows)
        return np.zeros((1, 1), np.float32)

    def generate(self, logits: Any, caches: Any, count: int) -> Iterator[int]:
        line = self.read.rpartition("user\n")[2].partition("<")[0]
        for index, letter in enumerate(line[::-1][:count]):
            if index:
                self.forward([ord(line[::-1][index - 1])], caches)
            yield ord(letter)
        if len(line) < count:
            self.forward([ord(line[0])], caches)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    model = Letters()
    monkeypatch.setattr(chat, "load_model", lambda path: model)

    def run(lines: Sequence[str], *options: str) -> tuple[str, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        assert cli.main(["chat", "--model", "none.gguf", *options]) == 0
        out, err = capsys.readouterr()
        return out, err, model.read

    return run


def test_turns_follow_each_other_on_one_cache(talk: Any) -> None:
    out, _, read = talk(["abc", "", "defg", "/quit", "never"])
    assert out == "cba\n\ngfed\n\n"
    first = chat.SYSTEM + chat.TURN.format(text="abc") + "cba"
    assert read == first + chat.END_OF_TURN + chat.TURN.format(text="defg") + "gfed"


def test_undo_and_reset(talk: Any) -> None:
    lines = ["abc", "/stats", "defg", "/undo", "/stats", "/undo", "/undo", "x", "/reset", "/stats"]
    out, err, _ = talk(lines, "--json")
    turns = [json.loads(line) for line in out.splitlines()]
    assert [turn["answer"] for turn in turns if "answer" in turn] == ["cba", "gfed", "x"]
    first, before, _, after, last, empty = turns
    assert first["total_tokens"] == before["total_tokens"] == after["total_tokens"]
    assert last["total_tokens"] == first["total_tokens"] - 4
    assert (empty["total_tokens"], empty["total_bytes"]) == (0, 0)
    assert "no turn to take back" in err


def test_a_saved_conversation_goes_on(talk: Any, tmp_path: Any) -> None:
    """What was read need not be read again, and a turn before the save can be taken back."""
    file = tmp_path / "my talk.kvz"
    out, _, before = talk(["abc", "de", f"/save {file}", "/stats"], "--json", "--store", "q8")
    saved = json.loads(out.splitlines()[-1])
    assert json.loads(out.splitlines()[-2])["file_bytes"] == file.stat().st_size
    out, _, read = talk(["zzz", f"/load {file}", "/stats", "fgh", "/undo", "/undo"], "--json")
    _, _, loaded, turn = map(json.loads, out.splitlines())
    assert loaded == saved
    assert turn["answer"] == "hgf"
    assert read[len(before) :].endswith(chat.END_OF_TURN + chat.TURN.format(text="fgh") + "hgf")
    out, _, _ = talk([f"/load {file}", "/stats"])
    assert "tokens in q8: " in out
    assert "in q8, " in out


def test_what_is_no_conversation_is_not_loaded(talk: Any, tmp_path: Any) -> None:
    other = kvz.ModelCache(num_layers=2, num_kv_heads=1, head_dim=32)
    other.save(tmp_path / "other.kvz", fingerprint={"model": "none.gguf"})
    other.save(tmp_path / "m.kvz", fingerprint={"model": "m", "chat": {"turns": [], "unread": ""}})
    lines = ["abc", "/load", "/save /", f"/load {tmp_path}/no", f"/load {tmp_path}/other.kvz"]
    out, err, _ = talk([*lines, f"/load {tmp_path}/m.kvz", "de"])
    assert out == "cba\n\ned\n\n"
    assert "/load: expected the name of a file" in err
    assert "expected a conversation that /save wrote" in err
    assert "expected model 'none.gguf', found 'm'" in err
    assert err.count("kvz: error: ") == 5


def test_a_long_answer_is_cut_off(talk: Any) -> None:
    out, _, read = talk(["abcdef", "x"], "--tokens", "3")
    assert out == "fed\n\nx\n\n"
    assert "fed" + chat.END_OF_TURN in read


def test_what_is_wrong_is_said_and_the_talk_goes_on(talk: Any) -> None:
    out, err, _ = talk(["/nothing", "/help", "y" * 700, "z", "/stats"], "--store", "q8/q4")
    assert "no such command: /nothing" in err
    assert "/undo or /reset makes room" in err
    assert "z\n\n" in out
    assert "2 layers of" in out
    assert "in q8/q4" in out
