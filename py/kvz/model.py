"""All layers of one sequence. Calls cache.py, transaction.py and _persist.py."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from kvz._closing import Closing
from kvz._core import load as load_core
from kvz._persist import Source, load_layers
from kvz._save import save
from kvz.arrays import as_count
from kvz.cache import TwoTierCache
from kvz.config import CacheConfig, HighPrecisionTail, Hybrid, Policy, QuantizedStore
from kvz.errors import InvalidArgumentError, InvalidTypeError
from kvz.html import layers_html
from kvz.pool import BufferPool, PoolStats, default_pool
from kvz.quality import ModelQuality
from kvz.stats import CacheStats, format_bytes
from kvz.transaction import Transaction


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStats:
    """Tokens and bytes of a `ModelCache`, its layers one after the other.

    Attributes
    ----------
    next_position : int
        The position that the next token will have in the layers that are farthest.
    total_bytes, shared_bytes, overhead_bytes : int
        Sums over the layers, as in `CacheStats`.
    compression_ratio, bits_per_value : float
        Of all layers together.
    layers : tuple of CacheStats
    """

    next_position: int
    total_bytes: int
    shared_bytes: int
    overhead_bytes: int
    compression_ratio: float
    bits_per_value: float
    layers: tuple[CacheStats, ...]

    @property
    def own_bytes(self) -> int:
        """Bytes of the pages that nobody else holds: what closing this cache would free."""
        return self.total_bytes - self.shared_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and `own_bytes`, as plain values."""
        return {**asdict(self), "own_bytes": self.own_bytes}


class ModelCache(Closing):
    """The KV cache of one sequence in all layers of a model, over one pool.

    ``model[i]`` is the `TwoTierCache` of layer i; a forward pass appends to one after the other.
    What belongs to the sequence as a whole is done here, in all layers or in none.

    Parameters
    ----------
    config : CacheConfig or sequence of CacheConfig, optional
        Of every layer, or of each: layers may differ in anything, as in precision, or in
        `max_tokens` where some attend to a sliding window.
    num_layers : int, optional
        Not needed with a sequence.
    pool : BufferPool, optional
        Where the memory of all layers comes from; by default one pool per process and core.
    core : {"native", "wasm"}, optional
    **config_fields
        Fields of `CacheConfig`, instead of `config` or to change each.

    Examples
    --------
    Four layers, of which the first stays in 8 bits:

    >>> import numpy as np
    >>> base = CacheConfig(num_kv_heads=2, head_dim=64, tail_length=64)
    >>> layers = [CacheConfig(num_kv_heads=2, head_dim=64, tail_length=64, store_precision="q8")]
    >>> model = ModelCache([*layers, base, base, base])
    >>> for layer in model:
    ...     layer.append(np.ones((300, 2, 64)), np.ones((300, 2, 64)))
    >>> model
    ModelCache(4 layers, 300 tokens, 388.0 KiB, 10.3 bits/value)
    >>> branch = model.fork(200)
    >>> model.trim(10), model.next_position, branch.next_position
    (10, 290, 200)
    """

    def __init__(
        self,
        config: CacheConfig | Iterable[CacheConfig] | None = None,
        num_layers: int | None = None,
        *,
        pool: BufferPool | None = None,
        core: str | None = None,
        **config_fields: Any,
    ) -> None:
        configs = configs_of(config, num_layers)
        if pool is None:
            pool = default_pool(load_core(core).name)
        layers: list[TwoTierCache] = []
        try:
            for one in configs:
                layers.append(TwoTierCache(one, pool=pool, core=core, **config_fields))
        except BaseException:
            for layer in layers:
                layer.close()
            raise
        self._layers = tuple(layers)

    # -- The layers ------------------------------------------------------------------------------

    def __getitem__(self, layer: int) -> TwoTierCache:
        """Return the cache of a layer."""
        return self._layers[layer]

    def __iter__(self) -> Iterator[TwoTierCache]:
        """Go through the layers."""
        return iter(self._layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._layers)

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self._layers)

    @property
    def configs(self) -> tuple[CacheConfig, ...]:
        """What the layers were made with."""
        return tuple(layer.config for layer in self._layers)

    @property
    def core(self) -> str:
        """The name of the core that the layers live in."""
        return self._layers[0].core

    @property
    def memory_pool(self) -> BufferPool:
        """The pool that the pages of all layers come from."""
        return self._layers[0].memory_pool

    # -- The sequence ----------------------------------------------------------------------------

    @property
    def next_position(self) -> int:
        """The position that the next token will have in the layers that are farthest."""
        return max(layer.next_position for layer in self._layers)

    def fork(self, length: int | None = None) -> ModelCache:
        """Return another cache of the same sequence that shares all pages.

        Parameters
        ----------
        length : int, optional
            Take only the tokens at positions below this.

        Raises
        ------
        InvalidArgumentError
            In some layer `length` lies beyond the next position, or where tokens were evicted.
        """
        layers: list[TwoTierCache] = []
        try:
            for layer in self._layers:
                layers.append(layer.fork(length))
        except BaseException:
            for made in layers:
                made.close()
            raise
        other = object.__new__(ModelCache)
        other._layers = tuple(layers)
        return other

    def trim(self, n: int) -> int:
        """Take back the `n` newest positions, or all there are, in all layers or in none.

        Afterwards every layer ends at `next_position` - n at the latest. So after a forward pass
        that broke off, ``trim(1)`` brings layers that have its token level with those that have
        not. What stays keeps its bits and its tier, as in `TwoTierCache.trim`; `transaction` brings
        back what was evicted, too.

        Returns
        -------
        int
            How many positions were taken back.

        Raises
        ------
        InvalidArgumentError
            A layer has evicted the token that would become the newest.
        """
        count = as_count(n, "n")
        with self.transaction():
            end = self.next_position
            length = max(end - count, 0)
            for layer in self._layers:
                if layer.next_position > length:
                    layer._cut(length)
        return end - length

    def transaction(self) -> Transaction:
        """Begin something that may be undone without a trace, in all layers together."""
        return Transaction(*self._layers)

    def update_policy(self, policy: Policy | Iterable[Policy]) -> None:
        """Change tails, stores or warm tiers of all layers, or, if anything is wrong, of none.

        As `TwoTierCache.update_policy`; the old pages of all layers stay until the last one is
        through.

        Parameters
        ----------
        policy : HighPrecisionTail, QuantizedStore or Hybrid, or one for each layer
        """
        single = isinstance(policy, (HighPrecisionTail, QuantizedStore, Hybrid))
        chosen: Any = [policy] * len(self) if single else policy
        if not isinstance(chosen, Iterable):
            raise InvalidTypeError(f"policy: expected one, or one for each layer, got {policy!r}")
        chosen = list(chosen)
        if len(chosen) != len(self):
            raise InvalidArgumentError(
                f"policy: expected one for each of {len(self)} layers, got {len(chosen)}"
            )
        with self.transaction():
            for layer, one in zip(self._layers, chosen, strict=True):
                layer.update_policy(one)

    def quality(
        self, queries: Any = None, scale: float | None = None, *, tokens: int = 64
    ) -> ModelQuality:
        """Measure what the stores of all layers are going to make of tokens that are still exact.

        Parameters
        ----------
        queries : one for each layer, optional
            As `TwoTierCache.quality` takes it; None leaves a layer's logits out.
        scale : float, by default 1 / sqrt(head_dim)
        tokens : int
            How many tokens to measure in each layer, 64 at most.

        Returns
        -------
        ModelQuality
        """
        given = [None] * len(self) if queries is None else list(queries)
        if len(given) != len(self):
            raise InvalidArgumentError(
                f"queries: expected one for each of {len(self)} layers, got {len(given)}"
            )
        pairs = zip(self._layers, given, strict=True)
        return ModelQuality(
            layers=tuple(layer.quality(query, scale, tokens=tokens) for layer, query in pairs)
        )

    # -- On disk ---------------------------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        fingerprint: Mapping[str, Any] | None = None,
        incremental: bool = False,
    ) -> int:
        """Write all layers to one file, as `TwoTierCache.save` writes one cache.

        Returns
        -------
        int
            Bytes written; 0 if the snapshot was up to date.
        """
        return save(self._layers, path, fingerprint, incremental)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        fingerprint: Mapping[str, Any] | None = None,
        configs: Iterable[CacheConfig] | None = None,
        convert: bool = False,
        mmap: bool = False,
        pool: BufferPool | None = None,
        core: str | None = None,
    ) -> ModelCache:
        """Make a cache of what `save` wrote, as `TwoTierCache.load` does.

        Parameters
        ----------
        configs : iterable of CacheConfig, optional
            What every layer is expected to be.

        Raises
        ------
        SnapshotError, PoolExhaustedError, OSError
            As from `TwoTierCache.load`.
        """
        wanted = None if configs is None else configs_of(configs, None)
        if pool is None:
            pool = default_pool(load_core(core).name)
        source = Source(path, fingerprint, mmap, pool, core)
        made = object.__new__(cls)
        made._layers = tuple(load_layers(TwoTierCache, source, wanted, convert))
        return made

    def clear(self) -> None:
        """Forget everything; the next token has position 0."""
        for layer in self._layers:
            layer.clear()

    # -- Looking ---------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that the layers hold."""
        return sum(layer.nbytes for layer in self._layers)

    def stats(self) -> ModelStats:
        """Return what is held, layer by layer and together."""
        layers = tuple(layer.stats() for layer in self._layers)
        nbytes = sum(layer.total_bytes for layer in layers)
        values = plain = 0
        for now, config in zip(layers, self.configs, strict=True):
            dims = config.head_dim + (config.value_dim or config.head_dim)
            values += now.total_tokens * config.num_kv_heads * dims
            plain += now.total_tokens * config.tail_bytes_per_token
        return ModelStats(
            next_position=max(layer.next_position for layer in layers),
            total_bytes=nbytes,
            shared_bytes=sum(layer.shared_bytes for layer in layers),
            overhead_bytes=sum(layer.overhead_bytes for layer in layers),
            compression_ratio=plain / nbytes if nbytes and plain else 1.0,
            bits_per_value=nbytes * 8 / values if values else 0.0,
            layers=layers,
        )

    def pool_stats(self) -> PoolStats:
        """Return the counters of the pool."""
        return self.memory_pool.stats()

    def check(self) -> None:
        """Verify every invariant of every layer.

        Raises
        ------
        CorruptError
            One does not hold; please report it.
        """
        for layer in self._layers:
            layer.check()

    def digest(self) -> str:
        """Return a hash of the states of all layers as 16 hex digits."""
        text = " ".join(layer.digest() for layer in self._layers)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def close(self) -> None:
        """Give the memory back. Any later use but `close` raises `ClosedError`."""
        for layer in self._layers:
            layer.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return all(layer.closed for layer in self._layers)

    def _repr_html_(self) -> str:
        """Show a bar of the tiers of every layer in a notebook."""
        return escape(repr(self)) if self.closed else layers_html(self.stats().layers, repr(self))

    def __repr__(self) -> str:
        if self.closed:
            return "ModelCache(closed)"
        now, count = self.stats(), len(self._layers)
        return (
            f"ModelCache({count} layer{'s' * (count > 1)}, {now.next_position} tokens, "
            f"{format_bytes(now.total_bytes)}, {now.bits_per_value:.1f} bits/value)"
        )


def configs_of(
    config: CacheConfig | Iterable[CacheConfig] | None, num_layers: int | None
) -> list[CacheConfig | None]:
    """One configuration per layer; None where fields alone make it."""
    count = None if num_layers is None else as_count(num_layers, "num_layers", 1)
    if config is None or isinstance(config, CacheConfig):
        if count is None:
            raise InvalidArgumentError("num_layers: expected a number, or a config for each layer")
        return [config] * count
    try:
        configs = list(config)
    except TypeError:
        configs = []
    if not configs or not all(isinstance(one, CacheConfig) for one in configs):
        raise InvalidTypeError(f"config: expected a CacheConfig or several, got {config!r}")
    if count not in (None, len(configs)):
        raise InvalidArgumentError(
            f"num_layers: expected {len(configs)}, one per config, got {count}"
        )
    return [*configs]
