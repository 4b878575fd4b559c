"""Pictures of caches, with matplotlib (`pip install "kvz[plot]"`).

Every function draws into the axes it is given, or into new ones, and returns them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kvz.arrays import as_float32
from kvz.errors import InvalidArgumentError
from kvz.html import COLORS
from kvz.stats import CacheStats


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots()[1]


def tiers(caches: Any, ax: Any = None) -> Any:
    """Draw how many bytes each tier takes, a bar for each cache.

    Parameters
    ----------
    caches : TwoTierCache, CacheStats, or iterable of them
        The layers of a model, or sequences.
    ax : matplotlib axes, optional

    Returns
    -------
    matplotlib axes

    Examples
    --------
    >>> import numpy as np, kvz, kvz.plot
    >>> cache = kvz.TwoTierCache(num_kv_heads=1, head_dim=32)
    >>> cache.append(np.ones((500, 1, 32)), np.ones((500, 1, 32)))
    >>> len(kvz.plot.tiers([cache, cache]).patches)  # doctest: +SKIP
    6
    """
    many = [caches] if isinstance(caches, CacheStats) or hasattr(caches, "stats") else caches
    stats = [one if isinstance(one, CacheStats) else one.stats() for one in many]
    ax, below = _axes(ax), np.zeros(len(stats))
    for name, color in COLORS.items():
        field = f"{name.rstrip('s')}_bytes" if name == "sinks" else f"{name}_bytes"
        sizes = np.array([getattr(now, field) for now in stats]) / 2**20
        ax.bar(range(len(stats)), sizes, bottom=below, color=color, label=name)
        below = below + sizes
    ax.set_xlabel("layer")
    ax.set_ylabel("MiB")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(COLORS), frameon=False)
    return ax


def error_by_age(cache: Any, keys: Any, values: Any, ax: Any = None) -> Any:
    """Draw the relative error of what a cache holds, against the age of its tokens.

    Parameters
    ----------
    cache : TwoTierCache
    keys, values : (T, H, D) and (T, H, Dv) arrays
        What was appended since the cache was empty, all of it.
    ax : matplotlib axes, optional

    Returns
    -------
    matplotlib axes

    Raises
    ------
    InvalidArgumentError
        There are not as many keys or values as tokens came.
    """
    ax, positions = _axes(ax), cache.positions
    age = cache.next_position - 1 - positions
    held = cache.get_all_kv()
    for name, given, got in zip(("keys", "values"), (keys, values), held, strict=True):
        exact = as_float32(given, name)
        if len(exact) != cache.next_position:
            raise InvalidArgumentError(
                f"{name}: expected all {cache.next_position} tokens that came, got {len(exact)}"
            )
        exact = exact.reshape(len(exact), -1)[positions]
        error = np.linalg.norm(got.reshape(len(got), -1) - exact, axis=1)
        ax.plot(age, error / np.maximum(np.linalg.norm(exact, axis=1), 1e-30), ".", label=name)
    ax.set_xlabel("age in tokens")
    ax.set_ylabel("relative error")
    ax.legend()
    return ax


def kl_against_bits(rows: Iterable[Mapping[str, Any]], ax: Any = None) -> Any:
    """Draw fidelity against size: one point for each format.

    Formats without any divergence, which a logarithm cannot show, lie below all others as "exact".

    Parameters
    ----------
    rows : iterable of mappings
        With "store", "bits_per_value" and "kl" (nats per token), as `kvz demo --json` prints them
        under "results".
    ax : matplotlib axes, optional

    Returns
    -------
    matplotlib axes
    """
    ax = _axes(ax)
    listed = list(rows)
    exact = min((row["kl"] for row in listed if row["kl"] > 0), default=1.0) / 10
    for row in listed:
        kl, name = (row["kl"], row["store"]) if row["kl"] > 0 else (exact, f"{row['store']}, exact")
        ax.plot(row["bits_per_value"], kl, "o", color=COLORS["store"])
        at, offset = (row["bits_per_value"], kl), (0, 6)
        ax.annotate(name, at, offset, textcoords="offset points", ha="center")
    ax.set_yscale("log")
    ax.margins(x=0.15, y=0.15)
    ax.set_xlabel("bits per value")
    ax.set_ylabel("mean KL divergence per token, nats")
    return ax
