"""The verbs of `TwoTierCache` and `PooledCache`: checks of shapes, arrays in and out.

Called by cache.py and pooled.py; calls _evict.py, arrays.py, _attend.py and _core.py.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from kvz._attend import PLAIN, Call, Options, attend
from kvz._evict import EvictingCache
from kvz.arrays import (
    F32,
    Borrowed,
    Floats,
    address_of,
    as_count,
    as_float32,
    as_number,
    as_output,
    borrow,
)
from kvz.errors import InvalidArgumentError
from kvz.pool import AlignedBuffer

_byte_of: Any = ctypes.c_char.from_buffer
_address = ctypes.addressof


class BaseCache(EvictingCache):
    """The verbs of both caches. Not for direct use."""

    # -- Writing ---------------------------------------------------------------------------------

    def append(self, keys: Any, values: Any) -> None:
        """Append the keys and values of T tokens, or, if anything is wrong, nothing.

        Parameters
        ----------
        keys : (T, H, D) or (T, H*D) float32, float16, bfloat16 or float64
            Of numpy, torch, JAX, MLX, or anything that numpy or DLPack can see in host memory.
            Strides are taken as they are; only the last axis must be contiguous to avoid a copy.
            One token may drop the T axis.
        values : (T, H, Dv) or (T, H*Dv)

        Raises
        ------
        InvalidTypeError
            An argument is not an array of one of these dtypes.
        InvalidArgumentError
            The shapes do not fit the configuration or each other.
        NotFiniteError, NotRepresentableError
            A value is NaN or infinite, or too large for the precisions of this cache.
        PoolExhaustedError
            The pool has no room.
        """
        # The plain case in few steps: C-contiguous float32 (T, H, D) in numpy, on the native core.
        if (
            self._direct
            and type(keys) is type(values) is np.ndarray
            and keys.dtype is values.dtype is F32
        ):
            shape, key_token, value_token = keys.shape, *self._token
            rows = shape[0] if len(shape) == 3 else 0
            if rows and shape == (rows, *key_token) and values.shape == (rows, *value_token):
                try:
                    key_at = _address(_byte_of(keys))
                    value_at = _address(_byte_of(values))
                except (TypeError, BufferError):  # strided, or read-only
                    pass
                else:
                    with self._lock, self._handle as pointer:
                        status = self._core_append(pointer, key_at, value_at, rows, None)
                        if status:
                            self._core.check(status)
                    return
        self._append(keys, values)

    def _append(self, keys: Any, values: Any) -> None:
        """Append arrays of any kind."""
        k, v, layout = self._inputs_of(keys, values)
        with self._lock, self._handle as pointer:
            if not k.shape[0]:
                return
            with self._core.frame() as frame:
                status = self._core.cache_append(
                    pointer,
                    frame.put(k.address, k.nbytes),
                    frame.put(v.address, v.nbytes),
                    k.shape[0],
                    frame.ref(layout),
                )
                self._core.check(status)

    def _inputs_of(self, keys: Any, values: Any) -> tuple[Borrowed, Borrowed, Any]:
        """Borrow the keys and values of an append, and say how they lie."""
        k, key_token_stride, key_head_stride = self._tokens_of(keys, "keys", self._head_dim)
        v, value_token_stride, value_head_stride = self._tokens_of(
            values, "values", self._value_dim
        )
        if v.shape[0] != k.shape[0]:
            raise InvalidArgumentError(
                f"values: expected as many tokens as keys, {k.shape[0]}, got {v.shape[0]}"
            )
        dtypes = self._core.enums["Dtype"]
        layout = self._core.new(
            "TokenLayout",
            key_dtype=dtypes[k.dtype],
            value_dtype=dtypes[v.dtype],
            key_token_stride=key_token_stride,
            key_head_stride=key_head_stride,
            value_token_stride=value_token_stride,
            value_head_stride=value_head_stride,
        )
        return k, v, layout

    def _tokens_of(self, given: Any, what: str, dim: int) -> tuple[Borrowed, int, int]:
        """Borrow keys or values as (T, H, dim) or (T, H*dim), and say their two strides."""
        array = borrow(given, what)
        heads = self._heads
        if array.shape in ((heads, dim), (heads * dim,)):
            array = array._replace(shape=(1, *array.shape), strides=(0, *array.strides))
        if array.shape[1:] not in ((heads, dim), (heads * dim,)):
            raise InvalidArgumentError(
                f"{what}: expected shape (T, {heads}, {dim}) or (T, {heads * dim}), or one token "
                f"({heads}, {dim}) or ({heads * dim},), got {array.shape}"
            )
        # What has to be copied into another memory is copied without its gaps.
        array = array.with_dense_rows() if self._core.shares_memory else array.dense()
        return array, array.strides[0], array.strides[1] if len(array.shape) == 3 else dim

    # -- Reading ---------------------------------------------------------------------------------

    def attend(
        self,
        query: Any,
        scale: float | None = None,
        *,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        mask: Any = None,
        return_lse: bool = False,
        return_mass: bool = False,
        out: Any = None,
    ) -> Any:
        """Softmax attention of the newest tokens over all T tokens held.

        Query head h reads kv head h // (Hq / H). An empty cache gives zeros.

        Parameters
        ----------
        query : (Hq, D) or (N, Hq, D) array of floats, of the newest token or of the N newest
            Hq is a multiple of H.
        scale : float, by default 1 / sqrt(D)
        causal : bool
            Whether a token sees only itself and what came before it.
        window : int, optional
            A token sees only positions above its own minus `window`, sinks included.
        softcap : float, optional
            Logits become ``softcap * tanh(logit / softcap)``.
        alibi_slopes : (Hq,) array, optional
            ``slope * (position of key - position of query)`` is added to the logits.
        sinks : (Hq,) array, optional
            The logit of one more token, whose value is zero.
        mask : array of bool (True: may be seen) or floats (added to the logits), optional
            Columns are in the order of `positions`. It broadcasts to (Hq, T) or (N, Hq, T), as the
            query has it; for the latter, two axes mean (N, T).
        return_lse, return_mass : bool
            Also return the log-sum-exp, (Hq,) or (N, Hq) float32, and the probability that each
            token got, summed over the N queries, (Hq, T) float32.
        out : (Hq, Dv) or (N, Hq, Dv) float32, C-contiguous, optional
            Where to write the result: a numpy array, a torch tensor, or any writable buffer.

        Returns
        -------
        (Hq, Dv) or (N, Hq, Dv) float32, `out` if given, or a tuple (out[, lse][, mass])
        """
        if type(query) is not np.ndarray or query.dtype is not F32:
            query = as_float32(query, "query")
        shape = query.shape
        if not 1 < len(shape) < 4 or shape[-1] != self._head_dim or shape[-2] % self._heads:
            raise self._query_error(shape)
        given_out = out
        if out is None:
            out = np.empty((*shape[:-1], self._value_dim), F32)
        else:
            out = as_output(out, (*shape[:-1], self._value_dim), "out")
            query = query.copy() if np.may_share_memory(query, out) else query
        scale = self._scale if scale is None else as_number(scale, "scale")
        if (
            causal is True
            and window is softcap is alibi_slopes is sinks is mask is None
            and return_lse is return_mass is False
        ):
            result = self._attend_plain(query, scale, out)
        else:
            given = (causal, window, softcap, alibi_slopes, sinks, mask, return_lse, return_mass)
            result = self._attend(query, scale, out, Options(*given))
        first = out if given_out is None else given_out
        return (first, *result[1:]) if isinstance(result, tuple) else first

    def _attend_plain(self, query: Floats, scale: float, out: Floats) -> Any:
        """Attend without options, in few steps on the native core."""
        if self._direct:
            try:
                query_at, out_at = _address(_byte_of(query)), _address(_byte_of(out))
            except (TypeError, ValueError, BufferError):  # strided, read-only or empty
                pass
            else:
                if not (query_at | out_at) & 3:
                    shape = query.shape
                    tokens = shape[0] if len(shape) == 3 else 1
                    with self._handle as pointer:
                        status = self._core_attend(
                            pointer, query_at, tokens, shape[-2], scale, None, out_at
                        )
                        if status:
                            self._core.check(status)
                    return out
        return self._attend(query, scale, out, PLAIN)

    def _attend(self, query: Floats, scale: float, out: Floats, options: Options) -> Any:
        """Attend with options, or on a core with its own memory."""
        if not query.shape[-2]:
            raise self._query_error(query.shape)
        query = as_float32(query, "query")  # now C-contiguous
        options = options.with_flags()
        if options.mask is None and not options.return_mass:
            with self._handle as pointer:
                return attend(self._core, Call(pointer, query, scale, out, 0), options)
        with self._lock, self._handle as pointer:  # no append may come in between
            held = self._core_stats().total_tokens
            return attend(self._core, Call(pointer, query, scale, out, held), options)

    def _query_error(self, shape: tuple[int, ...]) -> InvalidArgumentError:
        heads, dim = self._heads, self._head_dim
        return InvalidArgumentError(
            f"query: expected shape (Hq, {dim}) or (N, Hq, {dim}) with Hq a multiple of {heads}, "
            f"got {shape}"
        )

    def get_all_kv(self) -> tuple[Floats, Floats]:
        """Return copies of all keys and values held, oldest first, as they read back.

        Returns
        -------
        keys : (T, H, D) float32
        values : (T, H, Dv) float32
        """
        with self._lock:
            return self._get(0, self._core_stats().total_tokens)

    def get_kv(self, start: int, stop: int) -> tuple[Floats, Floats]:
        """Return copies of the keys and values at the positions `start` to `stop` - 1.

        Raises
        ------
        InvalidArgumentError
            One of these positions was evicted, or is yet to come.
        """
        first, last = as_count(start, "start"), as_count(stop, "stop")
        with self._lock:
            runs, index = self._runs(), 0
            for begin, end in runs:
                if begin <= first <= last <= end:
                    return self._get(index + first - begin, last - first)
                index += end - begin
            if first == last <= self.next_position:
                return self._get(0, 0)
            held = " and ".join(f"{begin} to {end}" for begin, end in runs) or "none"
            raise InvalidArgumentError(
                f"start, stop: expected a range of positions held, {held}, got {first} to {last}"
            )

    def get_all_kv_aligned(self) -> tuple[AlignedBuffer, AlignedBuffer]:
        """Return what `get_all_kv` does, flat, at addresses that are multiples of 64."""
        with self._lock:
            tokens = self._core_stats().total_tokens
            pair = tuple(AlignedBuffer(tokens * math.prod(shape)) for shape in self._token)
            for buffer in pair:
                buffer.resize(buffer.capacity)
            self._get_into(0, tokens, pair[0].array, pair[1].array)
        return pair[0], pair[1]

    def _get(self, index: int, tokens: int) -> tuple[Floats, Floats]:
        """Read tokens by their index among those held."""
        keys, values = (np.empty((tokens, *shape), F32) for shape in self._token)
        self._get_into(index, tokens, keys, values)
        return keys, values

    def _get_into(self, index: int, tokens: int, keys: Floats, values: Floats) -> None:
        core = self._core
        with self._handle as pointer:
            if not tokens:
                return
            with core.frame() as frame:
                status = core.cache_get(
                    pointer,
                    index,
                    tokens,
                    frame.out(address_of(keys), keys.nbytes),
                    frame.out(address_of(values), values.nbytes),
                )
                core.check(status)
