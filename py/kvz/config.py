"""What a cache is made of: precisions, sizes, and the policies that change them.

Everything here is plain data, checked once. Called by cache.py and pooled.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Literal, TypeAlias

from kvz.arrays import as_count
from kvz.errors import ConfigError, InvalidArgumentError, InvalidTypeError, KvzError

_GROUP = 32  # values that share one scale; packed rows are padded to a multiple
_PAGE = 64  # tokens of a page of the store
_LINE = 64  # bytes; the keys of a page, and its values, are multiples of it


class Precision(str, Enum):
    """How a value is stored. Wherever one is expected, its lower-case name will do: ``"q4"``.

    `Q6K` to `Q2K` are the best for their bits: scales are bytes, fitted to the codes by least
    squares, and keys are stored relative to an offset of their page.

    Examples
    --------
    >>> Precision("q4") is Precision.Q4
    True
    >>> Precision.Q4.bits_per_value
    4.5
    """

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8 = "q8"
    Q4 = "q4"
    Q6K = "q6k"
    Q5K = "q5k"
    Q4K = "q4k"
    Q3K = "q3k"
    Q2K = "q2k"

    def __str__(self) -> str:
        return self.value

    @property
    def bits_per_value(self) -> float:
        """Bits that one value takes, its share of the scale included.

        Keys of `Q6K` to `Q2K` take an eighth of a bit more: the offset of their page.
        """
        return _BITS[self]

    @property
    def is_packed(self) -> bool:
        """Whether values are stored as codes with a scale."""
        return self not in (Precision.F32, Precision.F16, Precision.BF16)

    @property
    def is_centred(self) -> bool:
        """Whether keys are stored relative to an offset of their page."""
        return self.value.endswith("k")

    def bytes_per_row(self, dim: int) -> float:
        """Bytes that a vector of `dim` values takes, padding and scales included."""
        padded = -(-dim // _GROUP) * _GROUP if self.is_packed else dim
        return padded * self.bits_per_value / 8

    def bytes_per_key(self, dim: int) -> float:
        """Bytes that a key of `dim` values takes, its share of the offset of its page included."""
        row = self.bytes_per_row(dim)
        if not self.is_centred:
            return row
        half = _PAGE * row + -(-dim // _GROUP) * _GROUP
        return -(-half // _LINE) * _LINE / _PAGE


_BITS = {
    Precision.F32: 32.0,
    Precision.F16: 16.0,
    Precision.BF16: 16.0,
    Precision.Q8: 8.5,
    Precision.Q4: 4.5,
    Precision.Q6K: 6.25,
    Precision.Q5K: 5.25,
    Precision.Q4K: 4.25,
    Precision.Q3K: 3.25,
    Precision.Q2K: 2.25,
}
_TAIL = (Precision.F32, Precision.F16, Precision.BF16)
_WARM = (*_TAIL, Precision.Q8, Precision.Q4)  # whose tokens do not depend on each other

PrecisionLike: TypeAlias = (
    Precision | Literal["f32", "f16", "bf16", "q8", "q4", "q6k", "q5k", "q4k", "q3k", "q2k"]
)
StorePrecision: TypeAlias = PrecisionLike | tuple[PrecisionLike, PrecisionLike]


class CacheTier(str, Enum):
    """Where a token is: in the tail (hot), between tail and store (warm), in the store (cold)."""

    HOT = "hot"
    WARM = "warm"
    COLD = "cold"

    def __str__(self) -> str:
        return self.value


def to_precision(value: Any, what: str) -> Precision:
    """Return the precision that `value` is or names.

    Raises
    ------
    InvalidArgumentError
        There is no such precision.
    """
    for precision in Precision:
        if isinstance(value, str) and value == precision:
            return precision
    known = ", ".join(repr(p.value) for p in Precision)
    raise InvalidArgumentError(f"{what}: expected one of {known}, got {value!r}")


def check_rotation(value: Any) -> None:
    """Refuse what is no choice of a rotation."""
    if not (isinstance(value, str) and value in ("auto", "on", "off")):
        raise InvalidArgumentError(f"rotation: expected 'auto', 'on' or 'off', got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The shape and the precisions of one cache.

    Parameters
    ----------
    num_kv_heads : int
        Heads of the keys and values.
    head_dim : int
        Values per key.
    value_dim : int, optional
        Values per value; by default `head_dim`.
    max_tokens : int
        Tokens that the cache holds; when there are more, the oldest go, except the sinks.
    tail_length : int
        The newest tokens, at least this many, that stay at `tail_precision`.
    tail_precision : {"f32", "f16", "bf16"}
        Of the tail and of the sinks.
    store_precision : a precision, or a pair of them
        Of older tokens; a pair is (keys, values). Any `Precision` or its name.
    migration_batch : int
        Tokens that leave the tail together. Batches are aligned to position 0.
    sink_tokens : int
        The first tokens, this many, that stay at `tail_precision` for ever.
    rotation : {"auto", "on", "off"}
        Whether packed vectors are rotated, which spreads outliers over all values: "auto" for all
        but q8, "on" for q8 too.
    warm_length : int
        Tokens between tail and store, at least this many, that stay at `warm_precision`; from
        there they go on to the store, 64 at a time. With 0 there is no such tier.
    warm_precision : {"f32", "f16", "bf16", "q8", "q4"}

    Raises
    ------
    ConfigError
        Something is not valid; the message names every problem.

    Examples
    --------
    >>> config = CacheConfig(num_kv_heads=8, head_dim=128, store_precision=("q8", "q4"))
    >>> config.tail_bytes_per_token, config.store_bytes_per_token
    (4096, 1664)
    >>> CacheConfig.from_json(config.to_json()) == config
    True
    """

    num_kv_heads: int = 8
    head_dim: int = 128
    value_dim: int | None = None
    max_tokens: int = 4096
    tail_length: int = 256
    tail_precision: PrecisionLike = Precision.F16
    store_precision: StorePrecision = Precision.Q4
    migration_batch: int = 64
    sink_tokens: int = 0
    rotation: Literal["auto", "on", "off"] = "auto"
    warm_length: int = 0
    warm_precision: PrecisionLike = Precision.Q8

    def __post_init__(self) -> None:
        problems = [*self._size_problems(), *self._choice_problems()]
        if not problems and self.max_tokens < self._least_max_tokens():
            warm = f" + warm_length + {_PAGE}" if self.warm_length else ""
            problems = [
                f"max_tokens: expected at least sink_tokens + tail_length + migration_batch{warm} "
                f"= {self._least_max_tokens()}, got {self.max_tokens}"
            ]
        if problems:
            raise ConfigError("; ".join(problems))

    def _least_max_tokens(self) -> int:
        warm = self.warm_length + _PAGE if self.warm_length else 0
        return self.sink_tokens + self.tail_length + self.migration_batch + warm

    def _size_problems(self) -> list[str]:
        """Check the integers, and make them plain Python ints."""
        problems = []
        for name, (least, most) in _SIZES.items():
            value = getattr(self, name)
            if value is None and name == "value_dim":
                continue
            try:
                count = as_count(value, name, least)
            except KvzError as error:
                problems.append(str(error))
                continue
            if count > most:
                problems.append(f"{name}: expected at most {most}, got {count}")
            object.__setattr__(self, name, count)
        return problems

    def _choice_problems(self) -> list[str]:
        """Check the names, and make them enum members."""
        problems = []
        stored: Any = self.store_precision
        if isinstance(stored, (tuple, list)) and len(stored) != 2:
            problems.append(
                f"store_precision: expected one or a pair (keys, values), got {stored!r}"
            )
            stored = ()
        pair = stored if isinstance(stored, (tuple, list)) else (stored,)
        try:
            made = tuple(to_precision(one, "store_precision") for one in pair)
            object.__setattr__(self, "store_precision", made[0] if len({*made}) == 1 else made)
        except InvalidArgumentError as error:
            problems.append(str(error))
        try:
            tail = to_precision(self.tail_precision, "tail_precision")
            if tail not in _TAIL:
                problems.append(f"tail_precision: expected 'f32', 'f16' or 'bf16', got '{tail}'")
            object.__setattr__(self, "tail_precision", tail)
        except InvalidArgumentError as error:
            problems.append(str(error))
        try:
            warm = to_precision(self.warm_precision, "warm_precision")
            if warm not in _WARM:
                known = ", ".join(f"'{one}'" for one in _WARM)
                problems.append(f"warm_precision: expected one of {known}, got '{warm}'")
            object.__setattr__(self, "warm_precision", warm)
        except InvalidArgumentError as error:
            problems.append(str(error))
        try:
            check_rotation(self.rotation)
        except InvalidArgumentError as error:
            problems.append(str(error))
        return problems

    @property
    def key_precision(self) -> Precision:
        """Of the keys in the store."""
        stored: Any = self.store_precision
        return stored if isinstance(stored, Precision) else stored[0]

    @property
    def value_precision(self) -> Precision:
        """Of the values in the store."""
        stored: Any = self.store_precision
        return stored if isinstance(stored, Precision) else stored[1]

    @property
    def tail_bytes_per_token(self) -> int:
        """Bytes of one token in the tail, over all heads."""
        tail = Precision(self.tail_precision)
        return self._bytes_per_token(tail, tail)

    @property
    def warm_bytes_per_token(self) -> int:
        """Bytes of one token in the warm tier, over all heads, scales and padding included."""
        warm = Precision(self.warm_precision)
        return self._bytes_per_token(warm, warm)

    @property
    def store_bytes_per_token(self) -> int:
        """Bytes of one token in the store, over all heads, scales and padding included."""
        return self._bytes_per_token(self.key_precision, self.value_precision)

    def _bytes_per_token(self, keys: Precision, values: Precision) -> int:
        value_dim = self.value_dim or self.head_dim
        row = keys.bytes_per_key(self.head_dim) + values.bytes_per_row(value_dim)
        return math.ceil(self.num_kv_heads * row)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, as JSON knows them."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        pair = given["store_precision"]
        given["store_precision"] = list(map(str, pair)) if isinstance(pair, tuple) else str(pair)
        given["tail_precision"] = str(self.tail_precision)
        given["warm_precision"] = str(self.warm_precision)
        return given

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> CacheConfig:
        """Make a configuration of what `to_dict` returned; missing fields take their defaults."""
        if not isinstance(given, Mapping):
            raise InvalidTypeError(f"config: expected a mapping, got {type(given).__name__}")
        unknown = sorted(map(str, set(given) - {field.name for field in fields(cls)}))
        if unknown:
            raise ConfigError(f"unknown fields: {', '.join(unknown)}")
        return cls(**given)

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> CacheConfig:
        """Make a configuration of what `to_json` returned."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"not JSON: {error}") from error
        return cls.from_dict(given)


_SIZES = {
    "num_kv_heads": (1, 4096),
    "head_dim": (1, 4096),
    "value_dim": (1, 4096),
    "max_tokens": (1, 1 << 40),
    "tail_length": (0, 1 << 40),
    "migration_batch": (1, 1 << 40),
    "sink_tokens": (0, 1 << 40),
    "warm_length": (0, 1 << 40),
}


# -- Policies: what `update_policy` changes --------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class HighPrecisionTail:
    """Sets the tail (and the precision of the sinks), and leaves the store as it is.

    A longer tail takes tokens back from the store; what these lost there does not come back.

    Parameters
    ----------
    tail_length : int
    precision : {"f32", "f16", "bf16"}
    """

    tail_length: int = 256
    precision: PrecisionLike = Precision.F16

    def apply(self, config: CacheConfig) -> CacheConfig:
        """Return `config` with this tail."""
        return replace(config, tail_length=self.tail_length, tail_precision=self.precision)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedStore:
    """Sets the store, and leaves tail and warm tier as they are.

    Parameters
    ----------
    precision : a precision, or a pair of them (keys, values)
    """

    precision: StorePrecision = Precision.Q4

    def apply(self, config: CacheConfig) -> CacheConfig:
        """Return `config` with this store."""
        return replace(config, store_precision=self.precision)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hybrid:
    """Sets the tail and the store, and the warm tier if it is given.

    Parameters
    ----------
    tail_length : int
    tail_precision : {"f32", "f16", "bf16"}
    store_precision : a precision, or a pair of them (keys, values)
    warm_length : int, optional
        0 is no warm tier; by default it stays as it is.
    warm_precision : {"f32", "f16", "bf16", "q8", "q4"}, optional
        By default it stays as it is.
    """

    tail_length: int = 256
    tail_precision: PrecisionLike = Precision.F16
    store_precision: StorePrecision = Precision.Q4
    warm_length: int | None = None
    warm_precision: PrecisionLike | None = None

    def apply(self, config: CacheConfig) -> CacheConfig:
        """Return `config` with these tiers."""
        warm, precision = self.warm_length, self.warm_precision
        return replace(
            config,
            tail_length=self.tail_length,
            tail_precision=self.tail_precision,
            store_precision=self.store_precision,
            warm_length=config.warm_length if warm is None else warm,
            warm_precision=config.warm_precision if precision is None else precision,
        )


Policy: TypeAlias = HighPrecisionTail | QuantizedStore | Hybrid
