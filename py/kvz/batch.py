"""Many sequences in one call: they may differ in everything but the core. Calls _attend.py.

A batch is a list of caches. Sequences join and leave by joining and leaving the list.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from kvz._attend import PLAIN, Arrays, Call, Options, lend, prepare, put, take
from kvz._cache import BaseCache
from kvz._core import Core, Frame, Handle
from kvz.arrays import F32, Floats, as_count, as_float32, as_number
from kvz.errors import InvalidArgumentError, InvalidTypeError, KvzError
from kvz.model import ModelCache

Fork = TypeVar("Fork", bound="BaseCache | ModelCache")


def attend_many(
    caches: Sequence[BaseCache],
    queries: Any,
    scale: float | None = None,
    *,
    causal: bool = True,
    window: int | Sequence[int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    masks: Sequence[Any] | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
) -> Any:
    """Attention of many sequences, each over its own cache, in one call.

    The threads share out the work of all sequences, whatever their lengths. Every result has the
    bits of ``cache.attend`` alone. A cache may occur more than once.

    Parameters
    ----------
    caches : sequence of B TwoTierCache or PooledCache
        On one core, of any shapes and precisions.
    queries : (B, Hq, D) or (B, N, Hq, D) array, or sequence of B arrays (Hq, D) or (N, Hq, D)
        As in `attend`; N may differ between sequences.
    scale, causal, softcap, alibi_slopes, sinks, return_lse, return_mass
        As in `attend`; the same for all sequences.
    window : int, or sequence of B ints or None, optional
        As in `attend`; the same for all sequences, or one for each.
    masks : sequence of B arrays or None, optional
        The `mask` of each sequence.

    Returns
    -------
    (B, Hq, Dv) or (B, N, Hq, Dv) float32, or a list of B arrays, as the queries came
        With `return_lse` and `return_mass` a tuple (out[, lses][, masses]); these are lists.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        As in `attend`; the message begins with the cache's place in the batch.

    Examples
    --------
    >>> import kvz, numpy as np
    >>> caches = [kvz.TwoTierCache(num_kv_heads=2, head_dim=64) for _ in range(3)]
    >>> for n, cache in enumerate(caches):
    ...     cache.append(np.ones((100 * n + 1, 2, 64)), np.ones((100 * n + 1, 2, 64)))
    >>> kvz.attend_many(caches, np.ones((3, 8, 64), np.float32)).shape
    (3, 8, 64)
    """
    core = _core_of(caches)
    options = PLAIN
    if causal is not True or not (
        window is softcap is alibi_slopes is sinks is None and return_lse is return_mass is False
    ):
        given = (causal, window, softcap, alibi_slopes, sinks, None, return_lse, return_mass)
        options = Options(*given).with_flags()
    whole = queries
    if type(queries) is not np.ndarray or queries.dtype is not F32 or not queries.flags.carray:
        whole = as_float32(queries, "queries") if hasattr(queries, "shape") else None
    scale = None if scale is None else as_number(scale, "scale")
    windows = _windows(window, len(caches))
    options = options if windows is None else options._replace(window=None)
    one_answer = masks is None and not options.return_lse and not options.return_mass
    if whole is not None and one_answer and _alike(caches, whole):
        return _attend_alike(core, caches, whole, scale, options, windows)
    each = [options._replace(window=one) for one in windows or ()] or [options] * len(caches)
    return _attend_each(core, caches, queries if whole is None else whole, scale, each, masks)


def _windows(given: Any, count: int) -> list[int | None] | None:
    """Return the windows of all sequences, or None where they share one or have none."""
    if not isinstance(given, (Sequence, np.ndarray)):
        return None
    each = _one_per_cache(given, count, "window")
    return [None if one is None else as_count(one, "window", 1) for one in each]


def _attend_each(
    core: Core,
    caches: Sequence[BaseCache],
    queries: Any,
    scale: float | None,
    options: Sequence[Options],
    masks: Sequence[Any] | None,
) -> Any:
    """Attend with options, or with arrays of any kind."""
    count = len(caches)
    each = _one_per_cache(queries, count, "queries")
    masked = [None] * count if masks is None else _one_per_cache(masks, count, "masks")
    with ExitStack() as held:
        if masks is not None or options[0].return_mass:
            _lock(held, caches)  # no append may come in between
        calls: list[Call] = []
        prepared: list[tuple[Any, Arrays]] = []
        for i, (cache, query, mask) in enumerate(zip(caches, each, masked, strict=True)):
            with _blame(i):
                pointer = held.enter_context(cache._handle)
                live = options[i].return_mass or mask is not None
                call = _call(cache, pointer, query, scale, live)
                prepared.append(prepare(core, call, options[i]._replace(mask=mask)))
            calls.append(call)
        outs: Any = [call.out for call in calls]
        if isinstance(queries, np.ndarray) and len({out.shape for out in outs}) == 1:
            outs = np.empty((count, *outs[0].shape), F32)
            calls = [call._replace(out=out) for call, out in zip(calls, outs, strict=True)]
        _attend(core, calls, prepared)
    results = [outs]
    if options[0].return_lse:
        results.append([arrays.lse for _, arrays in prepared])
    if options[0].return_mass:
        results.append([arrays.mass for _, arrays in prepared])
    return results[0] if len(results) == 1 else tuple(results)


def _alike(caches: Sequence[BaseCache], queries: Floats) -> bool:
    """Whether one array of queries fits caches that are all of one shape."""
    shape, token = queries.shape, caches[0]._token
    fits = len(shape) in (3, 4) and shape[0] == len(caches)
    if not fits or not queries.size or shape[-1] != token[0][1] or shape[-2] % token[0][0]:
        return False
    return all(cache._token == token for cache in caches)


def _attend_alike(
    core: Core,
    caches: Sequence[BaseCache],
    queries: Floats,
    scale: float | None,
    options: Options,
    windows: Sequence[int | None] | None,
) -> Floats:
    """Attend where all addresses are steps from the first, and all options but windows shared."""
    shape = queries.shape
    scale = caches[0]._scale if scale is None else scale
    out: Floats = np.empty((*shape[:-1], caches[0]._value_dim), F32)
    shared = None
    if options is not PLAIN:
        with _blame(0):
            shared = prepare(core, Call(0, queries[0], scale, out[0], 0), options)
    items = _items(core, "AttendItem", len(caches))
    items["query_tokens"] = shape[1] if len(shape) == 4 else 1
    items["query_heads"] = shape[-2]
    items["scale"] = scale
    kept: list[Any] = []  # until the call is over

    def lend_all(frame: Frame) -> None:
        if shared is not None:
            lend(core, frame, *shared)
            one = np.frombuffer(shared[0], _dtype(core, "AttendOptions"))
            each = np.repeat(one, len(caches))
            if windows is not None:
                each["window"] = [window or 0 for window in windows]
            _steps(items, "options", put(frame, each), each)
            kept.append(each)
        _steps(items, "query", put(frame, queries), queries)
        _steps(items, "out", take(frame, out), out)

    with _pinned(caches) as pointers:
        items["cache"] = pointers
        _run(core, core.attend_many, items, lend_all)
    return out


@contextmanager
def _pinned(caches: Sequence[BaseCache]) -> Iterator[list[int]]:
    """Keep the caches from being freed during a call; give their pointers."""
    pinned: list[Handle] = []
    pointers: list[int] = []
    try:
        for i, cache in enumerate(caches):
            handle = cache._handle
            try:
                pointers.append(handle.__enter__())
            except KvzError:
                with _blame(i):
                    raise
            pinned.append(handle)
        yield pointers
    finally:
        for handle in pinned:
            handle.__exit__()


def _call(cache: BaseCache, pointer: int, given: Any, scale: float | None, live: bool) -> Call:
    """Check one query, and make room for its result."""
    query = as_float32(given, "query")
    shape = query.shape
    fits = len(shape) in (2, 3) and shape[-1] == cache._head_dim
    if not fits or not shape[-2] or shape[-2] % cache._heads:
        raise cache._query_error(shape)
    out: Floats = np.empty((*shape[:-1], cache._value_dim), F32)
    held = cache._core_stats().total_tokens if live else 0
    return Call(pointer, query, cache._scale if scale is None else scale, out, held)


def _attend(core: Core, calls: list[Call], prepared: list[tuple[Any, Arrays]]) -> None:
    items = _items(core, "AttendItem", len(calls))
    items["query_tokens"] = [len(c.query) if c.query.ndim == 3 else 1 for c in calls]
    items["query_heads"] = [call.query.shape[-2] for call in calls]
    items["scale"] = [call.scale for call in calls]
    items["cache"] = [call.pointer for call in calls]

    def lend_all(frame: Frame) -> None:
        for given, arrays in prepared:
            lend(core, frame, given, arrays)
        items["options"] = [frame.ref(given) for given, _ in prepared]
        items["query"] = [put(frame, call.query) for call in calls]
        items["out"] = [take(frame, call.out) for call in calls]

    _run(core, core.attend_many, items, lend_all)


def append_many(caches: Sequence[BaseCache], keys: Any, values: Any) -> None:
    """Append to many caches in one call: to all of them or, if anything is wrong, to none.

    Parameters
    ----------
    caches : sequence of B different TwoTierCache or PooledCache
        On one core, of any shapes and precisions.
    keys : (B, H, D) or (B, T, H, D) array, or sequence of B arrays that `append` takes
        T may differ between sequences.
    values : the same, with Dv

    Raises
    ------
    InvalidTypeError, InvalidArgumentError, PoolExhaustedError
        As in `append`; the message begins with the cache's place in the batch.

    Examples
    --------
    >>> import kvz, numpy as np
    >>> caches = [kvz.TwoTierCache(num_kv_heads=2, head_dim=64) for _ in range(3)]
    >>> token = np.ones((3, 2, 64), np.float32)
    >>> kvz.append_many(caches, token, token)
    >>> [len(cache) for cache in caches]
    [1, 1, 1]
    """
    core = _core_of(caches)
    plain = _plain_tokens(caches, keys, 0) and _plain_tokens(caches, values, 1)
    if plain and keys.shape[:-1] == values.shape[:-1]:
        _append_alike(core, caches, keys, values)
    else:
        _append_each(core, caches, keys, values)


def _append_each(core: Core, caches: Sequence[BaseCache], keys: Any, values: Any) -> None:
    """Append arrays of any kind."""
    each_key = _one_per_cache(keys, len(caches), "keys")
    each_value = _one_per_cache(values, len(caches), "values")
    with ExitStack() as held:
        _lock(held, caches)
        items = _items(core, "AppendItem", len(caches))
        inputs = []
        pointers = []
        for i, (cache, key, value) in enumerate(zip(caches, each_key, each_value, strict=True)):
            with _blame(i):
                inputs.append(cache._inputs_of(key, value))
                pointers.append(held.enter_context(cache._handle))
        items["cache"] = pointers
        items["tokens"] = [key.shape[0] for key, _, _ in inputs]

        def lend_all(frame: Frame) -> None:
            items["keys"] = [frame.put(key.address, key.nbytes) for key, _, _ in inputs]
            items["values"] = [frame.put(value.address, value.nbytes) for _, value, _ in inputs]
            items["layout"] = [frame.ref(layout) for _, _, layout in inputs]

        _run(core, core.append_many, items, lend_all)


def reorder(caches: Sequence[Fork], parents: Sequence[int]) -> list[Fork]:
    """Go on with some of the caches, each as often as it is named: what beam search does.

    A cache that is named goes on itself, and as a fork for every further time; one that is not
    named is closed.

    Parameters
    ----------
    caches : sequence of TwoTierCache, PooledCache or ModelCache
    parents : sequence of int
        Places in `caches`.

    Returns
    -------
    list
        One cache for each of `parents`.

    Examples
    --------
    >>> import kvz
    >>> a, b, c = (kvz.TwoTierCache(head_dim=64) for _ in range(3))
    >>> beams = kvz.reorder([a, b, c], [2, 0, 0])
    >>> beams[0] is c, beams[1] is a, beams[2] is a, b.closed
    (True, True, False, True)
    """
    chosen = [as_count(parent, "parents") for parent in parents]
    if chosen and max(chosen) >= len(caches):
        raise InvalidArgumentError(f"parents: expected below {len(caches)}, got {max(chosen)}")
    made: list[Any] = []
    try:
        for i, parent in enumerate(chosen):
            first = parent not in chosen[:i]
            made.append(caches[parent] if first else caches[parent].fork())
    except BaseException:
        for cache in made:
            if not any(cache is one for one in caches):
                cache.close()
        raise
    for i, cache in enumerate(caches):
        if i not in chosen:
            cache.close()
    return made


def _plain_tokens(caches: Sequence[BaseCache], array: Any, side: int) -> bool:
    """Whether this is one dense float32 array that fits caches which are all of one shape."""
    if type(array) is not np.ndarray or array.dtype is not F32 or not array.flags.c_contiguous:
        return False
    shape, token = array.shape, caches[0]._token
    fits = len(shape) in (3, 4) and shape[0] == len(caches) and array.size > 0
    return fits and shape[-2:] == token[side] and all(cache._token == token for cache in caches)


def _append_alike(core: Core, caches: Sequence[BaseCache], keys: Floats, values: Floats) -> None:
    """Append where all addresses are steps from the first."""
    items = _items(core, "AppendItem", len(caches))
    items["tokens"] = keys.shape[1] if keys.ndim == 4 else 1

    def lend_all(frame: Frame) -> None:
        _steps(items, "keys", put(frame, keys), keys)
        _steps(items, "values", put(frame, values), values)

    with ExitStack() as held:
        _lock(held, caches)
        items["cache"] = held.enter_context(_pinned(caches))
        _run(core, core.append_many, items, lend_all)


def _steps(items: Any, name: str, address: int, array: Floats) -> None:
    """Write the addresses of the parts of an array that belong to one cache each."""
    items[name] = np.arange(
        address, address + array.nbytes, array.nbytes // len(array), dtype=np.uint64
    )


def _run(core: Core, function: Any, items: Any, lend_all: Callable[[Frame], None]) -> None:
    """Call a function on all items; an error tells which one is to blame."""
    failed = ctypes.c_uint64()
    with core.frame() as frame:
        lend_all(frame)
        status = function(put(frame, items), len(items), frame.ref(failed))
        error = core.error(status) if status else None
    if error is not None:
        with _blame(failed.value):
            raise error


@contextmanager
def _blame(index: int) -> Iterator[None]:
    """Put the place of the cache before the message of an error."""
    try:
        yield
    except KvzError as error:
        raise type(error)(f"caches[{index}]: {error}") from None


def _core_of(caches: Sequence[BaseCache]) -> Core:
    """Check the caches and return the core that they all live in."""
    if not isinstance(caches, Sequence) or not all(isinstance(c, BaseCache) for c in caches):
        raise InvalidTypeError(f"caches: expected a sequence of caches, got {caches!r}")
    if not caches:
        raise InvalidArgumentError("caches: expected at least one")
    if len({cache.core for cache in caches}) > 1:
        raise InvalidArgumentError("caches: expected all on one core, got native and wasm")
    return caches[0]._core


def _one_per_cache(given: Any, count: int, what: str) -> list[Any]:
    try:
        each = list(given)
    except TypeError:
        kind = type(given).__name__
        raise InvalidTypeError(f"{what}: expected an array, or one per cache, got {kind}") from None
    if len(each) != count:
        raise InvalidArgumentError(f"{what}: expected {count}, one per cache, got {len(each)}")
    return each


def _lock(held: ExitStack, caches: Sequence[BaseCache]) -> None:
    """Take the locks of all caches, in the same order whoever takes them."""
    for cache in sorted(caches, key=id):
        held.enter_context(cache._lock)


def _items(core: Core, name: str, count: int) -> Any:
    """Make an array of structs of the ABI, a column of which can be written at once."""
    items = np.zeros(count, _dtype(core, name))
    items["size_bytes"] = items.itemsize
    return items


@lru_cache
def _dtype(core: Core, name: str) -> np.dtype[Any]:
    return np.dtype(core.structs[name])
