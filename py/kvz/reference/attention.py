"""Part 5 of the specification: attention in float64, over the values as they are stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvz.reference.formats import Floats


class Attention(NamedTuple):
    """Everything that `attend` can return, in float64."""

    out: NDArray[np.float64]  # (N, query heads, value_dim)
    lse: NDArray[np.float64]  # (N, query heads)
    mass: NDArray[np.float64]  # (query heads, tokens)


def attention(
    query: ArrayLike,
    keys: Floats,
    values: Floats,
    positions: NDArray[np.int64],
    query_positions: NDArray[np.int64],
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Attention:
    """Softmax attention of N queries over T tokens, in float64.

    Parameters
    ----------
    query : (N, query heads, head_dim)
    keys, values : (T, kv heads, head_dim) and (T, kv heads, value_dim)
        Query head h reads kv head h // (query heads / kv heads).
    positions, query_positions : (T,) and (N,)
    scale : float, optional
        1 / sqrt(head_dim) by default.
    sinks : (query heads,), optional
        The logit of one more token whose value is zero.
    mask : broadcastable to (N, query heads, T), optional
        Booleans (True: may attend) or numbers (added to the logits).
    """
    q = np.asarray(query, np.float64)
    heads, per_head = q.shape[1], q.shape[1] // keys.shape[1]
    k = np.repeat(keys.astype(np.float64), per_head, axis=1)  # (T, query heads, head_dim)
    v = np.repeat(values.astype(np.float64), per_head, axis=1)
    products = (q.swapaxes(0, 1) @ k.transpose(1, 2, 0)).swapaxes(0, 1)  # (N, query heads, T)
    logits = products * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    distance = positions[None, :] - query_positions[:, None]  # (N, T), negative in the past
    if alibi_slopes is not None:
        logits = logits + np.asarray(alibi_slopes, np.float64)[:, None] * distance[:, None, :]
    if causal:
        logits = np.where(distance[:, None, :] <= 0, logits, -np.inf)
    if window is not None:
        logits = np.where(distance[:, None, :] > -window, logits, -np.inf)
    if mask is not None:
        given = np.asarray(mask)
        logits = np.where(given, logits, -np.inf) if given.dtype == bool else logits + given
    extra = np.full((heads, 1), -np.inf) if sinks is None else np.reshape(sinks, (heads, 1))
    extra = np.broadcast_to(extra, (len(q), heads, 1)).astype(np.float64)
    logits = np.concatenate([logits, extra], axis=-1)  # the virtual token comes last
    top = logits.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)  # a row that sees nothing
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)[..., :-1]
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    out = (weights.swapaxes(0, 1) @ v.swapaxes(0, 1)).swapaxes(0, 1)
    return Attention(out, lse, weights.sum(axis=0))


def spread_mask(mask: ArrayLike, query_axes: int) -> NDArray[Any]:
    """Bring a mask to three axes, (N, query heads, T), by the rule of `attend`.

    One axis is (T,). Two axes are (query heads, T) for one query and (N, T) for several.
    """
    given = np.asarray(mask)
    if given.ndim == 2 and query_axes == 3:
        return given[:, None, :]
    return given.reshape((1,) * (3 - given.ndim) + given.shape)
