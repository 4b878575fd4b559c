"""Choices of formats that stand on measurements: ``kvz.presets.BALANCED`` and its neighbours.

A preset says how each layer of a model stores what is older than its tail, and how many sinks it
keeps; sizes are the caller's. The table is for SmolLM2-135M with a tail of 64 tokens, the shortest
that makes sense: KL divergence of the next-token distribution from that with an exact cache, and
the share of equal likeliest tokens, as `kvz eval` measures them. A longer tail is nearer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from kvz.arrays import as_count
from kvz.config import CacheConfig, StorePrecision, to_precision
from kvz.errors import ConfigError, InvalidArgumentError, InvalidTypeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """How the layers of a model store their older tokens.

    Attributes
    ----------
    name : str
    stores : tuple of precisions, or of pairs of them
        `store_precision` of the layers, which take them in turn: with two, those of even and of
        odd layers.
    sink_tokens : int
        The first tokens, this many, stay exact.
    rotation : {"auto", "on", "off"}
        As in `CacheConfig`.

    Examples
    --------
    >>> from kvz import ModelCache, TwoTierCache, presets
    >>> TwoTierCache(presets.LOSSLESS.config(num_kv_heads=2, head_dim=64)).config.sink_tokens
    4
    >>> model = ModelCache(presets.BALANCED.configs(30, num_kv_heads=2, head_dim=64))
    >>> [str(config.key_precision) for config in model.configs[:4]]
    ['q5k', 'q4k', 'q5k', 'q4k']
    """

    name: str
    stores: tuple[StorePrecision, ...]
    sink_tokens: int = 4
    rotation: Literal["auto", "on", "off"] = "auto"

    @property
    def bits_per_value(self) -> float:
        """Of a packed token: codes, scales and offsets, over all layers.

        Examples
        --------
        >>> BALANCED.bits_per_value
        4.5625
        """
        total = 0.0
        for store in self.stores:
            keys, values = store if isinstance(store, tuple) else (store, store)
            key, value = to_precision(keys, "keys"), to_precision(values, "values")
            total += key.bytes_per_key(64) / 8 + value.bytes_per_row(64) / 8
        return total / 2 / len(self.stores)

    def config(self, layer: int = 0, **fields: Any) -> CacheConfig:
        """Return the configuration of a layer.

        Parameters
        ----------
        layer : int
            Its index among the layers that have keys and values.
        **fields
            Other fields of `CacheConfig`; `sink_tokens` and `rotation` go before the preset's.

        Raises
        ------
        ConfigError
            A field is not valid, or it is the preset's to say.
        """
        if "store_precision" in fields:
            raise ConfigError(f"store_precision: the preset {self.name} says it; give one of both")
        store = self.stores[as_count(layer, "layer", 0) % len(self.stores)]
        return CacheConfig(
            **{"sink_tokens": self.sink_tokens, "rotation": self.rotation, **fields},
            store_precision=store,
        )

    def configs(self, num_layers: int, **fields: Any) -> tuple[CacheConfig, ...]:
        """Return the configurations of all layers, as `ModelCache` takes them."""
        count = as_count(num_layers, "num_layers", 1)
        return tuple(self.config(layer, **fields) for layer in range(count))


#: The formats of a cache or a model: of keys and values, of (keys, values), or of all layers.
Store: TypeAlias = str | tuple[str, str] | Preset

LOSSLESS = Preset(name="lossless", stores=("q8",), rotation="on")
"""8.5 bits: KL 0.00001, same top-1 99.9 %. No difference that anybody would see."""

PRECISE = Preset(name="precise", stores=(("q6k", "q5k"),))
"""5.81 bits: KL 0.00015, same top-1 99.4 %."""

BALANCED = Preset(name="balanced", stores=(("q5k", "q4k"), "q4k"))
"""4.56 bits: KL 0.0009, same top-1 98.9 %. Every other layer has a fifth bit for its keys."""

SMALL = Preset(name="small", stores=(("q4k", "q3k"),))
"""3.81 bits: KL 0.0023, same top-1 97.4 %."""

TINY = Preset(name="tiny", stores=(("q3k", "q2k"),))
"""2.81 bits: KL 0.011, same top-1 94.5 %. For where nothing else fits."""

ALL = (LOSSLESS, PRECISE, BALANCED, SMALL, TINY)
"""From the most bits to the fewest."""

#: Those that tables compare, from the most bits to the fewest.
STORES: tuple[Store, ...] = (
    "f32",
    "f16",
    "q8",
    ("q8", "q4"),
    "q6k",
    "q5k",
    ("q5k", "q4k"),
    "q4",
    "q4k",
    "q3k",
    "q2k",
)


def find(preset: Preset | str) -> Preset:
    """Return the preset that is given, or the one of that name.

    Raises
    ------
    InvalidArgumentError
        There is no such preset.
    InvalidTypeError
        It is neither a preset nor a name.

    Examples
    --------
    >>> find("balanced") is BALANCED
    True
    """
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str):
        raise InvalidTypeError(f"preset: expected a Preset or a name, got {type(preset).__name__}")
    for each in ALL:
        if each.name == preset:
            return each
    known = ", ".join(repr(each.name) for each in ALL)
    raise InvalidArgumentError(f"preset: expected one of {known}, got {preset!r}")


def as_preset(store: Store) -> Preset:
    """Return the preset that a store is, or one with that store for all layers.

    Examples
    --------
    >>> as_preset(("q5k", "q4k"))
    Preset(name='q5k/q4k', stores=(('q5k', 'q4k'),), sink_tokens=4, rotation='auto')
    """
    if isinstance(store, Preset):
        return store
    name = store if isinstance(store, str) else "/".join(store)
    return Preset(name=name, stores=(store,))  # type: ignore[arg-type]


def layer_configs(
    num_layers: int, preset: Preset | str | None = None, **fields: Any
) -> tuple[CacheConfig, ...]:
    """Return a configuration for each layer: by a preset, or all the same."""
    if preset is None:
        return (CacheConfig(**fields),) * num_layers
    return find(preset).configs(num_layers, **fields)
