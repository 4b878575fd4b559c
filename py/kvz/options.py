"""Values of the options of the command line, read from their text. Called by cli.py."""

from __future__ import annotations

import argparse
from typing import Any

PRECISIONS = ("f32", "f16", "bf16", "q8", "q4", "q6k", "q5k", "q4k", "q3k", "q2k")
WARM_PRECISIONS = ("f32", "f16", "bf16", "q8", "q4")
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def store(text: str) -> Any:
    """Read the name of a store.

    It is one precision, or those of keys and values, or several of these, which the layers take in
    turn, or a preset.
    """
    from kvz import presets

    if text in (names := [each.name for each in presets.ALL]):
        return presets.find(text)
    found = tuple(part.split("/") for part in text.split(","))
    if any(len(pair) > 2 or not set(pair) <= set(PRECISIONS) for pair in found):
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(PRECISIONS)}; two like q8/q4 for keys and values; several "
            f"like q5k/q4k,q4k for layers in turn; or {', '.join(names)}; got {text!r}"
        )
    stores: Any = tuple(pair[0] if len(pair) == 1 else tuple(pair) for pair in found)
    return stores[0] if len(stores) == 1 else presets.Preset(name=text, stores=stores)


def count(text: str) -> int:
    """Read a number of things, zero or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0, 1, 2, ..., got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """Read a number of things, one or more."""
    number = count(text)
    if not number:
        raise argparse.ArgumentTypeError("expected 1, 2, 3, ..., got '0'")
    return number


def size(text: str) -> int:
    """Read a number of bytes: 8GB, 1.5GiB, 4096."""
    number = text.rstrip("BbIiKkMmGgTt ")
    unit = text[len(number) :].strip().lower()
    try:
        return int(float(number) * UNITS["" if unit == "b" else unit])
    except (ValueError, OverflowError, KeyError):
        raise argparse.ArgumentTypeError(
            f"expected a size like 8GB or 512MiB, got {text!r}"
        ) from None


def given_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given, as the settings of a command take them."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    del given["run"]
    return given
