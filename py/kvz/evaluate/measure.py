"""One format on one task, and what all tasks together say about it. Called by run.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvz
from kvz.demo.evaluate import log_softmax
from kvz.demo.model import Cache, Floats, SmolLM2
from kvz.evaluate.peers import Peer
from kvz.evaluate.streams import KvzStream, PeerStream, Setting, configs
from kvz.evaluate.tasks import Task
from kvz.presets import Store

VALUES_MEASURED = 256  # tokens, four pages: what a store's bits are counted on


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was measured of one format on one task, per scored token.

    Attributes
    ----------
    task : Task
    divergence : (n,) float64
        Kullback-Leibler divergence from the exact cache's distribution, in nats.
    agrees : (n,) bool
        The likeliest token is that of the exact cache.
    right : (n,) bool
        The likeliest token is the one that comes in the text.
    surprise : (n,) float64
        Minus the log-probability of the token that comes.
    """

    task: Task
    divergence: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    right: NDArray[np.bool_]
    surprise: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A format in numbers.

    Attributes
    ----------
    name : str
    bits_per_value : float
        Of the packed tokens: codes, scales and offsets.
    simulated : bool
        Another project's format, simulated in numpy.
    kl, kl99, top1, perplexity : float
        Over the text: mean and 99th percentile of the divergence in nats, share of equal likeliest
        tokens, and perplexity.
    copy_kl, copied : float
        Over the repeated passage: mean divergence, and share of tokens that are reproduced.
    needle_kl, found : float
        Over the codes asked for: mean divergence, and share of codes given in full. NaN if no
        needle was hidden.
    """

    name: str
    bits_per_value: float
    simulated: bool
    kl: float
    kl99: float
    top1: float
    perplexity: float
    copy_kl: float
    copied: float
    needle_kl: float
    found: float


def streams(model: SmolLM2, what: Store | Peer, setting: Setting) -> list[Cache]:
    """Make the caches of all layers."""
    if isinstance(what, Peer):
        return [PeerStream(what, setting) for _ in range(model.shape.num_layers)]
    pool = kvz.BufferPool(core=setting.core)
    return [KvzStream(config, pool) for config in configs(model.shape, what, setting)]


def predict(model: SmolLM2, task: Task, caches: Sequence[Cache]) -> Floats:
    """Return the logits (n, vocabulary) that the task scores."""
    return model.forward(task.ids[:-1], caches, last=len(task.ids) - 1 - task.first)


def compare(task: Task, exact: Floats, logits: Floats) -> Outcome:
    """Compare the predictions of a task with those of an exact cache, in float64."""
    columns: list[Any] = []
    for p, q, token in zip(exact, logits, task.ids[task.first + 1 :], strict=True):
        log_p, log_q = log_softmax(p), log_softmax(q)
        best = log_q.argmax()
        divergence = np.exp(log_p) @ (log_p - log_q)
        columns.append((divergence, best == log_p.argmax(), best == token, -log_q[token]))
    divergence, agrees, right, surprise = map(np.array, zip(*columns, strict=True))
    return Outcome(task=task, divergence=divergence, agrees=agrees, right=right, surprise=surprise)


def run(
    model: SmolLM2,
    task: Task,
    formats: Iterable[Store | Peer],
    setting: Setting,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Outcome]:
    """Run a task with an exact cache, which rounds nothing, and with each format.

    Returns
    -------
    list of Outcome
        Of the exact cache first, then of the formats in their order.
    """
    exact = predict(model, task, streams(model, "f32", setting))
    advance(len(task.ids))
    outcomes = [compare(task, exact, exact)]
    for what in formats:
        logits = predict(model, task, streams(model, what, setting))
        outcomes.append(compare(task, exact, logits))
        advance(len(task.ids))
    return outcomes


def summarize(name: str, bits: float, simulated: bool, outcomes: Sequence[Outcome]) -> Row:
    """Put what one format did on all tasks into one row."""

    def gather(kind: str, field: str) -> NDArray[Any]:
        parts = [getattr(each, field) for each in outcomes if each.task.kind == kind]
        return np.concatenate(parts) if parts else np.full(1, np.nan)

    divergence = gather("text", "divergence")
    codes = [each.right.all() for each in outcomes if each.task.kind == "needle"]
    return Row(
        name=name,
        bits_per_value=bits,
        simulated=simulated,
        kl=float(divergence.mean()),
        kl99=float(np.quantile(divergence, 0.99)),
        top1=float(gather("text", "agrees").mean()),
        perplexity=float(np.exp(gather("text", "surprise").mean())),
        copy_kl=float(gather("copy", "divergence").mean()),
        copied=float(gather("copy", "right").mean()),
        needle_kl=float(gather("needle", "divergence").mean()),
        found=float(np.mean(codes)) if codes else float("nan"),
    )


def bits_per_value(model: SmolLM2, what: Store | Peer, setting: Setting) -> float:
    """Bits per packed value: of a real store by its bytes, of a simulated format by its formula."""
    if isinstance(what, Peer):
        return what.bits_per_value
    layers = kvz.ModelCache(configs(model.shape, what, setting), core=setting.core)
    tokens = VALUES_MEASURED + setting.tail
    rows = np.zeros((tokens, model.shape.num_kv_heads, model.shape.head_dim), np.float32)
    for cache in layers:
        cache.append(rows, rows)
    store_bytes = sum(cache.stats().store_bytes for cache in layers)
    values = VALUES_MEASURED * model.shape.num_kv_heads * model.shape.head_dim * 2
    return store_bytes * 8 / values / len(layers)
