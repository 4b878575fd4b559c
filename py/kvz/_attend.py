"""Attention with options: what `attend` hands to the core when it is not the plain case.

Called by _cache.py and batch.py; calls arrays.py and _core.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvz._core import Core, Frame
from kvz.arrays import F32, Floats, address_of, as_count, as_flag, as_float32, as_number
from kvz.errors import InvalidArgumentError, InvalidTypeError


class Options(NamedTuple):
    """The keyword arguments of `attend`, as given."""

    causal: Any
    window: Any
    softcap: Any
    alibi_slopes: Any
    sinks: Any
    mask: Any
    return_lse: Any
    return_mass: Any

    def with_flags(self) -> Options:
        """Return the same with every flag a bool."""
        names = ("causal", "return_lse", "return_mass")
        return self._replace(**{name: as_flag(getattr(self, name), name) for name in names})


PLAIN = Options(True, None, None, None, None, None, False, False)


class Call(NamedTuple):
    """One call of the core: what it reads and writes, on the side of numpy."""

    pointer: int
    query: Floats  # (N, Hq, D) or (Hq, D), C-contiguous
    scale: float
    out: Floats
    live_tokens: int


class Arrays(NamedTuple):
    """The checked arrays of the options, and what the results go into."""

    slopes: Floats | None
    sinks: Floats | None
    mask: NDArray[Any] | None  # (N or 1, Hq or 1, T)
    lse: Floats | None
    mass: Floats | None


def attend(core: Core, call: Call, options: Options) -> Any:
    """Run one call and return out[, lse][, mass]."""
    given, arrays = prepare(core, call, options)
    if call.query.size:
        _run(core, call, given, arrays)
    results = [x for x in (call.out, arrays.lse, arrays.mass) if x is not None]
    return results[0] if len(results) == 1 else tuple(results)


def prepare(core: Core, call: Call, options: Options) -> tuple[Any, Arrays]:
    """Check the options against the query, and make the struct that will take them."""
    given = core.new("AttendOptions", causal=options.causal, live_tokens=call.live_tokens)
    if options.window is not None:
        given.window = as_count(options.window, "window", 1)
    if options.softcap is not None:
        given.softcap = as_number(options.softcap, "softcap")
        if given.softcap <= 0:
            raise InvalidArgumentError(f"softcap: expected more than 0, got {options.softcap!r}")
    arrays = _arrays(call, options)
    if not call.query.size and arrays.mass is not None:
        arrays.mass[:] = 0  # no queries: nothing is looked at
    return given, arrays


def _arrays(call: Call, options: Options) -> Arrays:
    """Check the arrays of the options against the query and the tokens held."""
    query, live = call.query, call.live_tokens
    tokens, heads = (1, *query.shape[:1]) if query.ndim == 2 else query.shape[:2]
    slopes = _per_head(options.alibi_slopes, "alibi_slopes", heads)
    if slopes is not None and not np.isfinite(slopes).all():
        raise InvalidArgumentError("alibi_slopes: expected finite numbers")
    sinks = _per_head(options.sinks, "sinks", heads)
    if sinks is not None and not (sinks < np.inf).all():
        raise InvalidArgumentError("sinks: expected numbers or -inf, got NaN or inf")
    mask = None
    if options.mask is not None:
        mask = _spread(_mask_array(options.mask), (tokens, heads, live), query.ndim == 2)
    return Arrays(
        slopes,
        sinks,
        mask,
        np.empty(query.shape[:-1], F32) if options.return_lse else None,
        np.empty((heads, live), F32) if options.return_mass else None,
    )


def _run(core: Core, call: Call, given: Any, arrays: Arrays) -> None:
    """Hand everything to the core."""
    with core.frame() as frame:
        lend(core, frame, given, arrays)
        status = core.cache_attend(
            call.pointer,
            put(frame, call.query),
            call.query.shape[0] if call.query.ndim == 3 else 1,
            call.query.shape[-2],
            call.scale,
            frame.ref(given),
            take(frame, call.out),
        )
        core.check(status)


def lend(core: Core, frame: Frame, given: Any, arrays: Arrays) -> None:
    """Lend the arrays of the options to the core."""
    slopes, sinks, mask, lse, mass = arrays
    if slopes is not None:
        given.alibi_slopes = put(frame, slopes)
    if sinks is not None:
        given.sinks = put(frame, sinks)
    if mask is not None and mask.size:
        kind = "boolean" if mask.dtype == np.bool_ else "additive"
        given.mask_kind = core.enums["MaskKind"][kind]
        given.mask = put(frame, mask)
        given.mask_query_stride = mask.shape[1] * mask.shape[2] if mask.shape[0] > 1 else 0
        given.mask_head_stride = mask.shape[2] if mask.shape[1] > 1 else 0
    if lse is not None:
        given.lse = take(frame, lse)
    if mass is not None and mass.size:
        given.mass = take(frame, mass)


def put(frame: Frame, array: NDArray[Any]) -> int:
    """Lend an array for reading."""
    return frame.put(address_of(array), array.nbytes)


def take(frame: Frame, array: NDArray[Any]) -> int:
    """Lend an array for writing."""
    return frame.out(address_of(array), array.nbytes)


def _per_head(given: Any, what: str, heads: int) -> Floats | None:
    """Return one float32 per query head."""
    if given is None:
        return None
    array = as_float32(given, what)
    if array.shape != (heads,):
        raise InvalidArgumentError(
            f"{what}: expected shape ({heads},), one per query head, got {array.shape}"
        )
    return array


def _mask_array(given: Any) -> NDArray[Any]:
    """Return booleans, or float32 without NaN and inf."""
    array = given if isinstance(given, np.ndarray) else _bools_of(given)
    if array is not None and array.dtype == np.bool_:
        return array
    try:
        numbers = as_float32(given, "mask")
    except InvalidTypeError as error:
        text = str(error).replace("an array of", "an array of bool,")
        raise InvalidTypeError(text) from None
    if not (numbers < np.inf).all():
        raise InvalidArgumentError("mask: expected numbers or -inf, got NaN or inf")
    return numbers


def _bools_of(given: Any) -> NDArray[Any] | None:
    """Return what numpy makes of a foreign array, if it makes booleans."""
    try:
        array = np.asarray(given)
    except Exception:  # bfloat16, which the float path knows
        return None
    return array if array.dtype == np.bool_ else None


def _spread(mask: NDArray[Any], shape: tuple[int, int, int], single: bool) -> NDArray[Any]:
    """Bring a mask to C-contiguous (N or 1, Hq or 1, T).

    Two axes are (Hq, T) for a query (Hq, D) and (N, T) for a query (N, Hq, D).
    """
    tokens, heads, live = shape
    wide = mask
    if mask.ndim == 2 and not single:
        wide = mask[:, None, :]
    wide = wide.reshape((1,) * (3 - wide.ndim) + wide.shape) if wide.ndim < 3 else wide
    if wide.ndim != 3 or any(
        have not in (1, want) for have, want in zip(wide.shape, shape, strict=True)
    ):
        full = f"({heads}, {live})" if single else f"({tokens}, {heads}, {live})"
        two = "" if single else f" or ({tokens}, {live})"
        raise InvalidArgumentError(
            f"mask: expected a shape that broadcasts to {full}{two}, got {mask.shape}"
        )
    if wide.shape[2] != live:
        wide = np.broadcast_to(wide, (*wide.shape[:2], live))
    return np.ascontiguousarray(wide)
