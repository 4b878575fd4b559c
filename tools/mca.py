"""Estimate the speed of a decode step on CPUs that are not here: `python -m tools.mca`.

One decode step is run under qemu-user, which writes down every basic block that it executes; this
instruction stream, kernels and all that is between them, is then timed by llvm-mca with the model
of a CPU. Two steps over caches of different lengths are compared, and the difference is divided by
the pages that the longer one has more. So there is nothing to cut out of the code by hand, and
nothing here that knows the kernels.

What it says is a limit by computing: llvm-mca finds every load in the first-level cache and every
instruction at hand. `--measure` times the x86-64-v3 kernels on this machine, on a cache that stays
in the second-level cache, beside the estimate for them with the model of this CPU: that is the
error to expect. The sessions `arm` and `estimate` of noxfile.py prepare the libraries.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HEAD_DIM, QUERY_HEADS = 128, 4  # of one kv head
TAIL = 64
PAGES = (2, 4)  # of the two caches
MEASURED_PAGES = (16, 32)
PAGE_TOKENS = 64
STORES = ("q4", "q8", "f16")


class Machine(NamedTuple):
    """An instruction set to trace, and the CPUs to time it with."""

    qemu: tuple[str, ...]
    prefix: str  # where the library and the agent are
    triple: str
    isa: str
    models: tuple[str, ...]


MACHINES = {
    "aarch64": Machine(
        ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "max"),
        "build/aarch64-linux",
        "aarch64",
        "neon_dotprod",
        ("apple-m1", "neoverse-v1", "neoverse-v2", "neoverse-n1"),
    ),
    "x86_64": Machine(
        ("qemu-x86_64", "-cpu", "max"),
        "build/x86_64-linux",
        "x86_64",
        "x86_64_v3",
        ("znver3", "znver4"),
    ),
}


class Log:
    """Reads what qemu writes with `-d in_asm,exec,nochain`: each new block, each block executed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open()
        self._blocks: dict[int, list[str]] = {}

    def executed(self) -> list[str]:
        """Return the bytes of the instructions executed since the last call, as hexadecimal."""
        stream: list[str] = []
        block: list[str] = []
        for line in self._file:
            if line.startswith("IN:"):
                block = []
            elif line.startswith("0x"):
                address, encoded, more = instruction(line)
                if not block:
                    self._blocks[address] = block
                if more:
                    block[-1] += encoded
                else:
                    block.append(encoded)
            elif line.startswith("Trace"):
                stream += self._blocks[int(line.split("/")[1], 16)]
        return stream


def instruction(line: str) -> tuple[int, str, bool]:
    """Address and bytes of a line, and whether these continue the instruction of the line before.

    A line is `0x55008d9594:  540006a1  b.ne ...`, or `0x400081bb70:  48 89 e7  movq ...`, which
    has another line, without a name, if the bytes are too many.
    """
    start, rest = line.split(":", 1)
    fields = rest.split()
    if len(fields[0]) == 8:
        return int(start, 16), bytes.fromhex(fields[0])[::-1].hex(), False
    padded = re.match(r"\s*((?:[0-9a-f]{2} )+)", rest.rstrip() + " ")
    assert padded, line
    octets = padded[1].split()
    return int(start, 16), "".join(octets), len(octets) == len(fields)


def traces(machine: Machine) -> Iterator[tuple[str, int, list[list[str]]]]:
    """Yield for each format the bytes of a page and the two instruction streams."""
    import foreign
    import kvz
    from kvz import _core

    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder, "log")
        prefix = Path(machine.prefix)
        what = ["-d", "in_asm,exec,nochain", "-D", str(log_file)]
        agent = [str(prefix / "bin" / "agent"), str(prefix / "kvz" / "libkvz.so")]
        core = foreign.ForeignCore([*machine.qemu, *what, *agent])
        core.check(core.isa_select(machine.isa.encode() + b"\0"))
        core.check(core.set_num_threads(1))
        _core._loaded["native"] = core
        log = Log(log_file)
        for store in STORES:
            caches = [filled(store, pages) for pages in PAGES]
            query = data(1, QUERY_HEADS)[0]
            streams = []
            for cache in caches:
                cache.attend(query)
                log.executed()
                cache.attend(query)
                streams.append(log.executed())
            few, many = (cache.stats().store_bytes for cache in caches)
            yield store, (many - few) // (PAGES[1] - PAGES[0]), streams
        kvz.set_num_threads(1)


def data(tokens: int, heads: int) -> Any:
    random = np.random.default_rng([tokens, heads])
    return random.standard_normal((tokens, heads, HEAD_DIM), dtype=np.float32)


def filled(store: str, pages: int) -> Any:
    """Make a cache of one kv head whose store has this many full pages."""
    import kvz

    tokens = pages * PAGE_TOKENS + TAIL
    cache = kvz.TwoTierCache(
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        max_tokens=tokens + PAGE_TOKENS,
        store_precision=store,
        tail_length=TAIL,
    )
    cache.append(data(tokens, 1), data(tokens, 1))
    assert cache.stats().store_tokens == pages * PAGE_TOKENS
    return cache


def estimate(stream: Sequence[str], triple: str, model: str) -> float:
    """Cycles of an instruction stream on a CPU, as llvm-mca simulates it."""
    octets = "\n".join(" ".join(f"0x{x}" for x in re.findall("..", code)) for code in stream)
    arch = [f"--triple={triple}", "--mattr=+all"] if triple == "aarch64" else [f"--triple={triple}"]
    text = run([tool("llvm-mc"), "--disassemble", *arch], octets)
    options = [f"-mtriple={triple}", f"-mcpu={model}", "-iterations=1", "-json"]
    options += ["-skip-unsupported-instructions=any", "-instruction-info=false"]
    options += ["-resource-pressure=false"]
    found = json.loads(run([tool("llvm-mca"), *options], text))
    summary = found["CodeRegions"][0]["SummaryView"]
    return float(summary["TotalCycles"])


def tool(name: str) -> str:
    """Find a tool of the newest LLVM that is installed; 19 is the oldest that will do."""
    for version in range(30, 18, -1):
        if path := shutil.which(f"{name}-{version}"):
            return path
    raise SystemExit(f"{name} 19 or newer is not installed: apt-get install llvm-19")


def run(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip()[:500]}")
    return done.stdout


def clock_hertz() -> float:
    """Time a loop of one cycle a turn, on any x86-64: what the system says may be nominal."""
    loop = bytes.fromhex("48ffcf75fbc3")  # dec rdi; jnz the dec; ret
    code = mmap.mmap(-1, len(loop), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(loop)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    turns, seconds = 10_000_000, []
    for _ in range(100):
        start = time.perf_counter()
        ctypes.CFUNCTYPE(None, ctypes.c_uint64)(address)(turns)
        seconds.append(time.perf_counter() - start)
    return turns / min(seconds)


def measured_cycles(store: str, hertz: float) -> float:
    """Cycles of a page on this machine, from caches that stay in the second-level cache."""
    seconds = []
    query = data(1, QUERY_HEADS)[0]
    for pages in MEASURED_PAGES:
        cache = filled(store, pages)
        times = []
        for _ in range(3000):
            start = time.perf_counter()
            cache.attend(query)
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times))
    return (seconds[1] - seconds[0]) / (MEASURED_PAGES[1] - MEASURED_PAGES[0]) * hertz


def main() -> None:
    """Print a table for one instruction set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", choices=MACHINES)
    parser.add_argument("--gigahertz", type=float, default=3.2, help="clock for GB/s (M1: 3.2)")
    parser.add_argument("--measure", action="store_true", help="measure here, too, on x86-64")
    options = parser.parse_args()
    machine = MACHINES[options.machine]
    if options.measure:
        command = [sys.executable, "-c", MEASURE]
        environment = {**os.environ, "KVZ_ISA": machine.isa, "KVZ_NUM_THREADS": "1"}
        here = json.loads(subprocess.check_output(command, env=environment))
        options.gigahertz = here["gigahertz"]
        print(f"The clock is {options.gigahertz:.2f} GHz.\n")
    columns = ["store", "model", "instructions", "cycles", "bytes", "bytes/cycle", "GB/s"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for store, page_bytes, (few, many) in traces(machine):
        pages = PAGES[1] - PAGES[0]
        count = (len(many) - len(few)) / pages
        rows = {
            model: (estimate(many, machine.triple, model) - estimate(few, machine.triple, model))
            / pages
            for model in machine.models
        }
        if options.measure:
            rows["measured here"] = here[store]
        for name, cycles in rows.items():
            rate = page_bytes / cycles
            cells = [store, name, f"{count:,.0f}", f"{cycles:,.0f}", f"{page_bytes:,}"]
            cells += [f"{rate:.1f}", f"{rate * options.gigahertz:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


# In a process of its own: there the native core is this machine's.
MEASURE = """
import json
from tools import mca
hertz = mca.clock_hertz()
found = {store: mca.measured_cycles(store, hertz) for store in mca.STORES}
print(json.dumps({**found, "gigahertz": hertz / 1e9}))
"""

if __name__ == "__main__":
    main()
