"""How many tokens fit into how many bytes of a pool, to the page.

Calls model.py (for its arguments) and the core. Shapes of known models, for the command `kvz plan`,
are in model_shapes.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kvz._core import load
from kvz._state import config_struct
from kvz.arrays import as_count
from kvz.config import CacheConfig
from kvz.model import configs_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What fits into a budget. Returned by `plan`.

    Attributes
    ----------
    tokens : int
        How many tokens of one sequence fit, in all its layers.
    bytes : int
        The `max_bytes` that a pool needs for them.
    is_endless : bool
        Whether the sequence may go on for ever: every layer has reached its `max_tokens`, and the
        oldest tokens make room for new ones.
    """

    tokens: int
    bytes: int
    is_endless: bool


def plan(
    config: CacheConfig | Iterable[CacheConfig],
    nbytes: int,
    num_layers: int = 1,
    *,
    core: str | None = None,
) -> Plan:
    """Tell how long a sequence may become within a budget.

    A pool with `max_bytes` of `nbytes`, or of the `bytes` returned, takes so many tokens however
    they are cut into appends. Forks and open transactions come on top, where pages differ.

    Parameters
    ----------
    config : CacheConfig or sequence of CacheConfig
        Of every layer, or of each.
    nbytes : int
        The budget for the pages of all layers.
    num_layers : int
        With one config: how many layers have it.
    core : {"native", "wasm"}, optional

    Returns
    -------
    Plan

    Examples
    --------
    >>> config = CacheConfig(num_kv_heads=8, head_dim=128, max_tokens=100_000)
    >>> plan(config, 1 << 30, num_layers=32)
    Plan(tokens=28287, bytes=1072955392, is_endless=False)
    >>> plan(config, 128 << 20).is_endless
    True
    """
    budget = as_count(nbytes, "nbytes")
    single = isinstance(config, CacheConfig)
    configs = configs_of(config, num_layers if single else None)
    layers = [_Layer(one, core) for one in configs if one is not None]
    longest = max(layer.config.max_tokens for layer in layers)

    def needed(tokens: int) -> int:
        return sum(layer.bytes_for(tokens) for layer in layers)

    endless = needed(longest + 1)
    if endless <= budget:
        return Plan(tokens=longest, bytes=endless, is_endless=True)
    fits, too_many = 0, longest + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if needed(middle) <= budget:
            fits = middle
        else:
            too_many = middle
    return Plan(tokens=fits, bytes=needed(fits), is_endless=False)


class _Layer:
    """The pages of one layer, by the rules of docs/architecture.md."""

    def __init__(self, config: CacheConfig, core_name: str | None) -> None:
        core = load(core_name)
        self.config = config
        out = core.new("CacheLayout")
        with core.frame() as frame:
            given = config_struct(core, config, "two_tier", 1)
            core.check(core.cache_layout(frame.ref(given), frame.ref(out)))
        names = ("sink", "store", "warm", "tail")
        self._page_tokens = {name: int(getattr(out, f"{name}_page_tokens")) for name in names}
        self._page_bytes = {name: int(getattr(out, f"{name}_page_bytes")) for name in names}

    def bytes_for(self, tokens: int) -> int:
        """Bytes that suffice at any moment of a stream of so many tokens; it never falls."""
        config, size = self.config, self._page_tokens
        if tokens > config.max_tokens:
            return max(self.bytes_for(config.max_tokens), self._bytes_of_a_window())
        sinks = _pages(0, min(config.sink_tokens, tokens), size["sink"])
        stored = _pages(config.sink_tokens, self._cold(tokens), size["store"])
        return self._bytes(sinks, stored, self._warm_pages(tokens), self._tail_pages(tokens))

    def _bytes_of_a_window(self) -> int:
        """Give the same once old tokens leave: what is stored may then lie in one page more."""
        config, size = self.config, self._page_tokens
        recent = config.tail_length + config.warm_length
        stored = config.max_tokens - config.sink_tokens - recent
        return self._bytes(
            _pages(0, config.sink_tokens, size["sink"]),
            (stored - 2) // size["store"] + 2 if stored > 1 else stored,
            self._warm_pages(config.max_tokens),
            self._tail_pages(config.max_tokens),
        )

    def _bytes(self, sinks: int, stored: int, warm: int, tail: int) -> int:
        pages = {"sink": sinks, "store": stored, "warm": warm, "tail": tail}
        return sum(count * self._page_bytes[name] for name, count in pages.items())

    def _boundary(self, tokens: int) -> int:
        batch = self.config.migration_batch
        return max(tokens - self.config.tail_length, 0) // batch * batch

    def _cold(self, tokens: int) -> int:
        """Say where the store ends: by whole pages where a warm tier follows."""
        boundary, warm = self._boundary(tokens), self.config.warm_length
        page = self._page_tokens["store"]
        return max(boundary - warm, 0) // page * page if warm else boundary

    def _warm_pages(self, tokens: int) -> int:
        """Count the most pages that the warm tier has had by then, of one head."""
        config, size = self.config, self._page_tokens["warm"]
        if not config.warm_length:
            return 0
        if self._cold(tokens) <= config.sink_tokens:  # nothing has left it
            return _pages(config.sink_tokens, self._boundary(tokens), size)
        # It begins with a page, and ends at a multiple of the batch.
        step = math.gcd(config.migration_batch, size)
        return -(-(config.warm_length + size - step + -config.warm_length % step) // size)

    def _tail_pages(self, tokens: int) -> int:
        """Count the most pages that the tail has had by then, of one head."""
        config, size = self.config, self._page_tokens["tail"]
        if self._boundary(tokens) <= config.sink_tokens:  # nothing has left the tail
            return _pages(config.sink_tokens, tokens, size)
        # It begins at a multiple of the batch, and so at worst this far into a page.
        offset = size - math.gcd(config.migration_batch, size)
        longest = config.tail_length + config.migration_batch - 1
        return -(-(offset + longest) // size) if longest else 0


def _pages(start: int, stop: int, size: int) -> int:
    """Pages that the positions from `start` to `stop` - 1 lie in."""
    return (stop - 1) // size - start // size + 1 if start < stop else 0
