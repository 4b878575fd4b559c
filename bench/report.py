"""Make tables and pictures of what run.py measured.

Called by run.py; `python bench/report.py FILE` makes them again from its JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import plots
import targets
from contestants import FORWARD, VARIANTS, width
from heat import describe
from limits import limit

from workload import Job

Run = dict[str, Any]
Result = dict[str, Any]
KEY = ("case", "head_dim", "heads", "kv_heads", "past", "new")

HOW = """\
Times are of one step of one layer, the median (and 10 % to 90 %) in microseconds; `~`: other
processes used more than 0.15 cores meanwhile. Every answer was compared with float64 attention:
`error` is the relative error against the data, which is mostly what storing costs; `computing` the
error against what is stored. Except for `overhead`, the step goes round over so many caches that
none is found in the CPU's own caches. `of read`: stored bytes over time, as a share of the measured
read bandwidth. `ratio`: the time of the fastest other library of the same width over the row's own
time, so that more than 1 is faster; for WebAssembly, the time of the native kernels for 128-bit
vectors over its own; through a model of transformers, the time with `DynamicCache` over that with
the row's cache, where everything else that the model does takes its time, too, and `error` is that
of the logits. `of a copy`: the time over that of copying the float32 input to memory that is in no
cache, on one thread. onnxruntime and openvino append the step's tokens, too. What is compared took
turns within the same minutes, and the read bandwidth of a decode was measured among them.
"""

TITLES = {
    "decode": "Decode: one query, {past} tokens",
    "prefill": "Prefill: {new} new tokens after {past}",
    "append": "Append: {new} tokens at a time",
    "stream": "Append: single tokens, each one timed",
    "overhead": "Overhead: one query, {past} tokens in one cache",
    "wasm": "WebAssembly: one query, {past} tokens",
    "forward": "Transformers: a small model reads {new} after {past} tokens",
}


def write(run: Run, folder: Path) -> None:
    """Print the tables, and leave them and the pictures in `folder`."""
    text = markdown(run)
    print(text)
    (folder / "report.md").write_text(text, "utf-8")
    try:
        written = plots.draw(run, folder)
    except ImportError as error:
        print(f"plots: skipped: {error}", file=sys.stderr)
    else:
        print("plots:", ", ".join(map(str, written)), file=sys.stderr)


def markdown(run: Run) -> str:
    quick = run["size"] == "quick"
    parts = [heading(run)] if quick else [heading(run), targets.table(run), HOW]
    listed = [one for one in run["results"] if one["job"]["case"] in TITLES]
    keys = dict.fromkeys(tuple(one["job"][name] for name in KEY) for one in listed)
    order = list(TITLES)
    for key in sorted(keys, key=lambda k: (order.index(k[0]), -k[1], *k[4:])):
        mine = [x for x in run["results"] if tuple(x["job"][name] for name in KEY) == key]
        parts.append(section(run, mine))
    linear = targets.of_case(run["results"], "linear")
    if linear:
        parts.append(linear_table(linear))
    shapes = targets.of_case(run["results"], "shapes")
    if shapes:
        parts.append(shape_table(shapes))
    parts += [f"- {name}: skipped: {why}" for name, why in run["skipped"].items()]
    for kind in ("failed", "left_out"):
        for one in run[kind]:
            what = describe(one["name"], Job(**one["job"]))
            parts.append(f"- {what}: {kind.replace('_', ' ')}: {one['why']}")
    return "\n".join(parts) + "\n"


def heading(run: Run) -> str:
    machine = run["machine"]
    lines = [f"# {machine['cpu']}, {machine['count']} processors, {machine['date']}", ""]
    lines.append(", ".join(f"{name} {version}" for name, version in run["versions"].items()))
    for one in run["limits"]:
        unit = "GB/s" if one["what"] == "read" else "1e9 operations/s"
        lines.append(f"- {one['what']}, {one['threads']} threads: {one['per_second']:.1f} {unit}")
    if "minutes" in run:
        count = len(run["results"])
        lines += ["", f"{count} measurements in {run['minutes']:.0f} minutes."]
    if run["size"] == "quick":
        lines += ["", "**A quick run: it shows that everything works, not how fast it is.**"]
    return "\n".join(lines) + "\n"


def section(run: Run, results: Sequence[Result]) -> str:
    job = results[0]["job"]
    counts = sorted({one["job"]["threads"] for one in results})
    by_row: dict[tuple[str, str], dict[int, Result]] = {}
    for one in results:
        by_row.setdefault((one["name"], one["job"]["kv"]), {})[one["job"]["threads"]] = one
    title = TITLES[job["case"]].format(**job)
    heads = f"{job['heads']}/{job['kv_heads']} heads of {job['head_dim']}"
    attends = job["case"] in ("decode", "prefill", "forward")
    header = ["", *(["bits"] if attends else []), "error"]
    header += ["computing"] if job["case"] not in ("append", "stream", "forward") else []
    for count in counts:
        named = columns(job["case"])
        header += [f"{named[0]}, {count} thread{'s' * (count > 1)}", *named[1:], "ratio"]
    header += ["scaling"] if len(counts) > 1 else []
    lines = [f"## {title} ({heads})", "", row(header), row(["---"] * len(header))]
    ranked = sorted(by_row.items(), key=lambda item: order(*item, counts[-1]))
    for (name, kv), found in ranked:
        one = next(iter(found.values()))
        facts = {"bits": f"{one['bits']:.1f}", "error": f"{one['error_data']:.1e}"}
        facts["computing"] = f"{one['error']:.1e}" if "error" in one else ""
        cells = [f"**{name} {kv}**" if name == "kvz" else f"{name} {kv}"]
        cells += [facts[column] for column in header if column in facts]
        for count in counts:
            cells += list(measured(run, found.get(count), results))
        if len(counts) > 1:
            cells.append(scaling(found, counts))
        lines.append(row(cells))
    return "\n".join(lines) + "\n"


def linear_table(results: Sequence[Result]) -> str:
    """Show the time per token against that at the fewest tokens: the median, the quartile."""
    kvs = list(dict.fromkeys(one["job"]["kv"] for one in results))
    found: dict[str, dict[str, str]] = {}
    for kv in kvs:
        mine = [one for one in results if one["job"]["kv"] == kv]
        for (threads, tokens), median, quartile in targets.linearity(mine):
            where = f"{tokens} tokens, {threads} thread{'s' * (threads > 1)}"
            found.setdefault(where, {})[kv] = f"{median:.2f} / {quartile:.2f}"
    fewest = min(one["job"]["past"] for one in results)
    lines = [f"## Time per token against {fewest} tokens: medians / lower quartiles", ""]
    lines += [row(["kvz", *kvs]), row(["---"] * (1 + len(kvs)))]
    lines += [row([where, *(cells.get(kv, "") for kv in kvs)]) for where, cells in found.items()]
    return "\n".join(lines) + "\n"


def shape_table(results: Sequence[Result]) -> str:
    """Show the time per byte and per multiplication, as multiples of that of the usual shape.

    Few query heads for a kv head are bound by bytes, many by multiplications: a shape without a
    kernel of its own would stand out in both.
    """
    columns = list(dict.fromkeys((x["job"]["kv"], x["job"]["threads"]) for x in results))
    named = [f"{kv}, {count} thread{'s' * (count > 1)}" for kv, count in columns]
    lines = ["## Shapes: time per byte / per multiplication, relative to 4 heads of 128", ""]
    lines += [row(["query heads a kv head", "head_dim", *named])]
    lines += [row(["---"] * (2 + len(columns)))]
    found = {(*shape_of(x["job"]), x["job"]["kv"], x["job"]["threads"]): x for x in results}
    for shape in sorted(dict.fromkeys(shape_of(x["job"]) for x in results)):
        cells = [str(shape[1]), str(shape[0])]
        for column in columns:
            one, usual = found.get((*shape, *column)), found.get((128, 4, *column))
            cells.append(relative(one, usual) if one and usual else "")
        lines.append(row(cells))
    return "\n".join(lines) + "\n"


def shape_of(job: dict[str, Any]) -> tuple[int, int]:
    return job["head_dim"], job["heads"] // job["kv_heads"]


def relative(one: Result, usual: Result) -> str:
    time = one["median"] / usual["median"]
    per_byte = time * usual["bytes"] / one["bytes"]
    per_multiplication = time * flops(usual["job"]) / flops(one["job"])
    return f"{per_byte:.2f} / {per_multiplication:.2f}"


def order(key: tuple[str, str], found: dict[int, Result], threads: int) -> tuple[float, float]:
    return -width(key[1]), found[threads]["median"] if threads in found else 0.0


def columns(case: str) -> list[str]:
    return {
        "decode": ["us", "GB/s", "of read"],
        "prefill": ["us", "GFLOP/s", "of f32 peak"],
        "append": ["us", "tokens/s", "of a copy"],
        "stream": ["median us", "99 %", "max"],
        "overhead": ["us"],
        "wasm": ["us"],
        "forward": ["us"],
    }[case]


def measured(run: Run, one: Result | None, results: Sequence[Result]) -> Iterator[str]:
    """Yield the cells of one row at one number of threads, in the order of `columns`."""
    case = results[0]["job"]["case"]
    if one is None:
        yield from [""] * (len(columns(case)) + 1)
        return
    job, time = one["job"], one["median"]
    noisy = "~" if one["busy"] > 0.15 else ""
    if case == "stream":
        yield from (f"{noisy}{one[name] * 1e6:,.1f}" for name in ("median", "p99", "max"))
    else:
        digits = 0 if time > 1e-4 else 1
        low, middle, high = (f"{one[p] * 1e6:,.{digits}f}" for p in ("p10", "median", "p90"))
        yield f"{noisy}{middle} ({low} to {high})"
    if case == "decode":
        rate = one["bytes"] / time / 1e9
        most = one.get("read") or limit(run["limits"], "read", job["threads"])
        yield from share(rate, most)
    elif case == "prefill":
        rate = flops(job) / time / 1e9
        yield from share(rate, limit(run["limits"], "f32_multiply_add", job["threads"]))
    elif case == "append":
        yield f"{job['new'] / time:,.0f}"
        yield f"{time / one['copy']:.2f}" if "copy" in one else ""
    best = fastest_peer(one, results)
    yield f"{best / time:.2f}" if best else ""


def share(rate: float, most: float | None) -> tuple[str, str]:
    return f"{rate:.1f}", f"{rate / most:.0%}" if most else ""


def flops(job: dict[str, Any]) -> int:
    return Job(**job).flops


def fastest_peer(one: Result, results: Sequence[Result]) -> float | None:
    """Return the least time of another library at the same width and number of threads.

    A forward is compared with that over the cache which models have by default, at any width.
    """
    job, name = one["job"], one["name"]
    alike = [x for x in results if x["job"]["threads"] == job["threads"]]
    if job["case"] == "forward":
        peers = [x for x in alike if x["name"] == FORWARD[0] and name != FORWARD[0]]
    else:
        own = name if name in VARIANTS else "kvz"
        same = [x for x in alike if width(x["job"]["kv"]) == width(job["kv"])]
        peers = [x for x in same if x["name"] != own]
    return min((x["median"] for x in peers), default=None)


def scaling(found: dict[int, Result], counts: Sequence[int]) -> str:
    few, many = found.get(counts[0]), found.get(counts[-1])
    return f"{few['median'] / many['median']:.2f}" if few and many else ""


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write(json.loads(source.read_text("utf-8")), source.parent)
