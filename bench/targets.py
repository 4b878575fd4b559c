"""What kvz is to reach, as ratios within one run, and whether it did. Called by report.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contestants import NAMES, VARIANTS, width

Result = dict[str, Any]
Figures = Mapping[tuple[int, str], float]

DECODE_FROM = 4096  # tokens
PEERS = tuple(name for name in NAMES if name != "kvz")


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes
    ----------
    what : str
        What is asked for, in words.
    bound : float
        What is wanted of every figure: at least this, or at most, where `most` is set.
    figures : dict
        What was measured, by number of threads and where.
    show : callable
        Writes one figure.
    """

    what: str
    bound: float
    figures: Figures
    show: Callable[[float], str]
    most: bool = False

    @property
    def worst(self) -> float:
        return (max if self.most else min)(self.figures.values())

    @property
    def met(self) -> bool:
        return self.worst <= self.bound if self.most else self.worst >= self.bound


def percent(value: float) -> str:
    return f"{value:.0%}"


def times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def microseconds(value: float) -> str:
    return f"{value * 1e6:.1f} us"


def table(run: Mapping[str, Any]) -> str:
    """Return the targets as Markdown; those without a figure in this run are left out."""
    lines = ["## Targets", "", "Met if the worst of the figures is; all are of this run.", ""]
    header = "kvz", "wanted", "measured, by threads (tokens)", "worst", ""
    lines += [f"| {' | '.join(header)} |", "| --- | --- | --- | --- | --- |"]
    for target in every(run["results"]):
        if not target.figures:
            continue
        bound = f"{'at most' if target.most else 'at least'} {target.show(target.bound)}"
        figures = listed(target)
        verdict = "met" if target.met else "**missed**"
        cells = target.what, bound, figures, target.show(target.worst), verdict
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 6 else ""


def listed(target: Target) -> str:
    """Write a target's figures, by number of threads."""
    by_threads: dict[int, list[str]] = {}
    for (threads, where), figure in sorted(target.figures.items(), key=lambda item: item[0][0]):
        shown = f"{target.show(figure)} ({where})" if where else target.show(figure)
        by_threads.setdefault(threads, []).append(shown)
    parts = (f"{threads}: {', '.join(shown)}" for threads, shown in by_threads.items())
    return "; ".join(parts)


def every(results: Sequence[Result]) -> Iterator[Target]:
    """Yield all targets."""
    # The largest shape, which every library was given.
    usual = [one for one in results if one["job"]["head_dim"] == 128]
    yield from decode(usual)
    yield from prefill(usual)
    yield from append(usual)
    yield from scaling(usual)
    yield from calls(usual)
    yield from wasm(usual)


def decode(results: Sequence[Result]) -> Iterator[Target]:
    found = [x for x in results if x["job"]["case"] == "decode"]
    found = [x for x in found if x["job"]["past"] >= DECODE_FROM]
    most = max((x["job"]["threads"] for x in found), default=0)
    for kv, share, peer, ggml in (("q4", 0.8, 9, 50), ("q8", 0.85, 5, 25), ("f16", 0.85, 2.8, 5)):
        mine = [x for x in found if x["name"] == "kvz" and x["job"]["kv"] == kv]
        full = (x for x in mine if x["job"]["threads"] == most and x.get("read"))
        reads = {at(x): x["bytes"] / x["median"] / 1e9 / x["read"] for x in full}
        yield Target(f"decode {kv}: share of the read bandwidth", share, reads, percent)
        bits = width(kv)
        ratios = against(mine, found, PEERS, bits)
        yield Target(f"decode {kv}: speed over the fastest {bits}-bit peer", peer, ratios, times)
        ratios = against(mine, found, ("ggml",), bits)
        yield Target(f"decode {kv}: speed over ggml {bits}-bit", ggml, ratios, times)
        if kv == "f16":
            ratios = against(mine, found, ("torch",), bits, 32)
            yield Target("decode f16: speed over torch", 5, ratios, times)


def prefill(results: Sequence[Result]) -> Iterator[Target]:
    found = [x for x in results if x["job"]["case"] == "prefill"]
    for kv, bound, peers, widths in (
        ("q4", 1.1, PEERS, (4, 8)),
        ("q8", 1.0, PEERS, (4, 8)),
        ("f16", 1.2, ("onnxruntime",), (32,)),
    ):
        mine = [x for x in found if x["name"] == "kvz" and x["job"]["kv"] == kv]
        whom = "onnxruntime f32" if kv == "f16" else "the fastest 4- or 8-bit peer"
        ratios = against(mine, found, peers, *widths)
        yield Target(f"prefill {kv}: speed over {whom}", bound, ratios, times)


def append(results: Sequence[Result]) -> Iterator[Target]:
    found = [x for x in results if x["job"]["case"] == "append" and x["job"]["new"] > 1]
    for kv, bound in (("q4", 6), ("q8", 1), ("f16", 0)):
        mine = [x for x in found if x["name"] == "kvz" and x["job"]["kv"] == kv]
        new = f"append of {mine[0]['job']['new']}, {kv}" if mine else ""
        if bound:
            ratios = against(mine, found, ("ggml",), width(kv))
            yield Target(f"{new}: speed over ggml {width(kv)}-bit", bound, ratios, times)
        copies = {at(x): x["median"] / x["copy"] for x in mine if "copy" in x}
        yield Target(f"{new}: time over a copy of the float32 input", 1.5, copies, times, most=True)


def scaling(results: Sequence[Result]) -> Iterator[Target]:
    ours = [x for x in results if x["name"] == "kvz"]
    for kv in ("q4", "q8", "f16"):
        mine = [x for x in ours if x["job"]["kv"] == kv]
        found = {(x["job"]["past"], x["job"]["threads"]): x for x in of_case(mine, "prefill")}
        pairs = {
            past: (found[past, 1], found[past, 2])
            for past, n in found
            if n == 1 and (past, 2) in found
        }
        gains = {at(b): a["median"] / b["median"] for a, b in pairs.values()}
        yield Target(f"prefill {kv}: speed of 2 threads over 1", 1.8, gains, times)
        linear = {where: ratio for where, _, ratio in linearity(mine)}
        what = f"decode {kv}: time per token against that at the fewest (lower quartiles)"
        yield Target(what, 1.1, linear, times, most=True)


def linearity(results: Sequence[Result]) -> Iterator[tuple[tuple[int, str], float, float]]:
    """Yield where, and the time per token against that at the fewest tokens: median, quartile."""
    found = of_case(results, "linear")
    for threads in sorted({x["job"]["threads"] for x in found}):
        mine = [x for x in found if x["job"]["threads"] == threads]
        mine.sort(key=lambda x: int(x["job"]["past"]))
        for one in mine[1:]:
            tokens = one["job"]["past"] / mine[0]["job"]["past"]
            ratios = (one[x] / mine[0][x] / tokens for x in ("median", "quartile"))
            median, quartile = ratios
            yield at(one), median, quartile


def calls(results: Sequence[Result]) -> Iterator[Target]:
    ours = [x for x in results if x["name"] == "kvz"]
    for case, bound, what in (
        ("overhead", 12e-6, "attend on 8 tokens: time of a call"),
        ("stream", 6e-6, "append of 1: time of a call"),
    ):
        found = of_case(ours, case)
        medians = {(x["job"]["threads"], x["job"]["kv"]): x["median"] for x in found}
        yield Target(what, bound, medians, microseconds, most=True)


def wasm(results: Sequence[Result]) -> Iterator[Target]:
    found = {(x["name"], x["job"]["kv"]): x for x in of_case(results, "wasm")}
    theirs, ours = VARIANTS[1], VARIANTS[0]
    shares = {
        (1, kv): found[theirs, kv]["median"] / one["median"]
        for (name, kv), one in found.items()
        if name == ours and (theirs, kv) in found
    }
    yield Target("WebAssembly: speed over native 128-bit vectors", 0.45, shares, percent)


def of_case(results: Iterable[Result], case: str) -> list[Result]:
    return [one for one in results if one["job"]["case"] == case]


def against(
    mine: Sequence[Result], results: Sequence[Result], peers: Sequence[str], *widths: int
) -> dict[tuple[int, str], float]:
    """Return how many times faster each of ours is than the fastest of the peers there."""
    ratios = {}
    for one in mine:
        job = {**one["job"], "kv": ""}
        theirs = [
            other["median"]
            for other in results
            if other["name"] in peers
            and width(other["job"]["kv"]) in widths
            and {**other["job"], "kv": ""} == job
        ]
        if theirs:
            ratios[at(one)] = min(theirs) / one["median"]
    return ratios


def at(one: Result) -> tuple[int, str]:
    job = one["job"]
    return job["threads"], str(job["past"]) if job["case"] != "append" else ""
