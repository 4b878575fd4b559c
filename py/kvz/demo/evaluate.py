"""What a packed cache costs and saves: the same tokens through an exact cache and a packed one.

All tokens of a text but the last `SCORED` fill the caches, in chunks no longer than the tail, so
that a token's own chunk is not packed yet when attention reads it. The last `SCORED` tokens are
then fed as they stand (teacher forcing), in chunks of 32 and the very last `TIMED` one by one, as
in decoding. The logits after each are compared with those of an exact cache, which holds all
tokens in f32. Called by run.py; calls model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvz
from kvz.demo.model import Floats, Shape, SmolLM2
from kvz.presets import Store, as_preset

PREFILL_CHUNK = 128
SCORE_CHUNK = 32
SCORED = 256
TIMED = 32


class TimedCache:
    """A cache of one layer, and the seconds spent in it."""

    def __init__(self, cache: kvz.TwoTierCache) -> None:
        self.cache = cache
        self.seconds = 0.0

    @property
    def next_position(self) -> int:
        """Position of the next token."""
        return self.cache.next_position

    def append(self, keys: Floats, values: Floats) -> None:
        """Append tokens."""
        start = perf_counter()
        self.cache.append(keys, values)
        self.seconds += perf_counter() - start

    def attend(self, query: Floats) -> Floats:
        """Attend with the newest tokens."""
        start = perf_counter()
        out: Floats = self.cache.attend(query)
        self.seconds += perf_counter() - start
        return out


def make_caches(
    shape: Shape, store: Store, *, tail: int, sinks: int, core: str | None = None
) -> list[TimedCache]:
    """Make the caches of all layers, on one pool; with the store "f32" nothing is rounded."""
    pool = kvz.BufferPool(core=core)
    configs = store_configs(shape, store, tail_length=tail, sink_tokens=sinks)
    return [TimedCache(kvz.TwoTierCache(config, pool=pool)) for config in configs]


def store_configs(shape: Shape, store: Store, **fields: Any) -> tuple[kvz.CacheConfig, ...]:
    """Return the configurations of all layers; with the store "f32" nothing is rounded."""
    fields |= {
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_tokens": shape.max_tokens,
        "tail_precision": "f32" if store == "f32" else "f16",
    }
    return as_preset(store).configs(shape.num_layers, **fields)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes and seconds of one run over a text.

    Attributes
    ----------
    tokens, values : int
        Tokens held by every cache, and the numbers that they are in all caches together.
    nbytes : int
        Bytes of the pages of all caches, unused slots included.
    prefill_rate, decode_rate : float
        Tokens per second, of the whole model.
    attention_seconds, attention_share : float
        Spent in `append` and `attend` of all layers per decoded token, and its share of all time.
    """

    tokens: int
    values: int
    nbytes: int
    prefill_rate: float
    decode_rate: float
    attention_seconds: float
    attention_share: float

    @property
    def bits_per_value(self) -> float:
        """Bits per number of the keys and values."""
        return self.nbytes * 8 / self.values

    @property
    def vs_f32(self) -> float:
        """How many times as large the same numbers are in float32."""
        return 32 / self.bits_per_value

    @property
    def vs_f16(self) -> float:
        """How many times as large the same numbers are in float16."""
        return 16 / self.bits_per_value


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How near the next-token distributions are to the exact ones, over the scored tokens.

    Attributes
    ----------
    scored : int
        Tokens after which the distributions are compared.
    top1 : float
        Share of them after which the likeliest token is the same.
    kl : float
        Mean Kullback-Leibler divergence from the exact distribution, in nats.
    """

    scored: int
    top1: float
    kl: float


def chunks(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Cut `ids` into pieces of `size`."""
    return (ids[start : start + size] for start in range(0, len(ids), size))


def prefill(
    model: SmolLM2,
    caches: Sequence[TimedCache],
    ids: Sequence[int],
    *,
    tail: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Floats:
    """Fill the caches with `ids`, in chunks no longer than the tail; return the last logits.

    Returns
    -------
    (1, vocabulary) float32
    """
    logits = np.empty((0, 0), np.float32)
    for chunk in chunks(ids, min(PREFILL_CHUNK, max(tail, 1))):
        logits = model.forward(chunk, caches, last=1)
        advance(len(chunk))
    return logits


def run_text(
    model: SmolLM2,
    caches: Sequence[TimedCache],
    ids: Sequence[int],
    *,
    tail: int,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Cost, Floats]:
    """Run a text through empty caches, as the head of this file says.

    Parameters
    ----------
    model : SmolLM2
    caches : one per layer
        Left as they are after the last token.
    ids : at least two tokens
    tail : int
        The tail's length, which bounds the chunks.
    advance : callable
        Told how many tokens were just done.

    Returns
    -------
    cost : Cost
    logits : (scored, vocabulary) float32
        After each of the last `SCORED` tokens, or after half of the text if that is less.
    """
    scored = min(SCORED, len(ids) // 2)
    timed = min(TIMED, scored)
    start = perf_counter()
    prefill(model, caches, ids[:-scored], tail=tail, advance=advance)
    prefill_seconds = perf_counter() - start
    logits = []
    for chunk in chunks(ids[-scored:-timed], SCORE_CHUNK):
        logits.append(model.forward(chunk, caches))
        advance(len(chunk))
    before, start = sum(cache.seconds for cache in caches), perf_counter()
    for token in ids[-timed:]:
        logits.append(model.forward([token], caches))
        advance(1)
    seconds = perf_counter() - start
    attention = sum(cache.seconds for cache in caches) - before
    shape = model.shape
    cost = Cost(
        tokens=len(ids),
        values=len(ids) * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2,
        nbytes=sum(cache.cache.nbytes for cache in caches),
        prefill_rate=(len(ids) - scored) / prefill_seconds,
        decode_rate=timed / seconds,
        attention_seconds=attention / timed,
        attention_share=attention / seconds,
    )
    return cost, np.concatenate(logits)


def compare(exact: Floats, packed: Floats) -> Fidelity:
    """Compare the logits (tokens, vocabulary) of two runs over the same tokens, in float64."""
    agree, divergence = 0, 0.0
    for p, q in zip(exact, packed, strict=True):
        log_p, log_q = log_softmax(p), log_softmax(q)
        agree += int(log_p.argmax() == log_q.argmax())
        divergence += float(np.exp(log_p) @ (log_p - log_q))
    return Fidelity(scored=len(exact), top1=agree / len(exact), kl=divergence / len(exact))


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Return the log-probabilities (vocabulary,) of logits, in float64."""
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
