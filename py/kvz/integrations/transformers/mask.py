"""The masks of transformers, in the form that attention.py takes.

What is exactly causal, with or without a sliding window, needs no mask: `attend` knows both by
itself. Padding comes as one row per sequence. Whatever else a model wants, chunks, blocks of an
image, packed sequences, comes whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from kvz.integrations.align import align_mask


def kvz_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Make the mask of one kind of layers, once per forward pass.

    Returns
    -------
    None, (batch, 1, 1, kv_length) bool, or (batch, 1, q_length, kv_length) bool
        Nothing but causality and window; padding besides them; or everything there is to know.
    """
    if not is_causal_or_sliding(mask_function):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **{**kwargs, "allow_is_causal_skip": False},
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return None
    seen = padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    # With four axes, because some models cut the mask along the third.
    return None if bool(seen.all()) else seen[:, None, None, :]


def is_causal_or_sliding(function: Callable[..., Any]) -> bool:
    """Whether a mask function is the causal one, alone or under a sliding window.

    Both are recognised by what they are and not by what they return, so that anything unknown is
    computed whole.
    """
    if function is causal_mask_function:
        return True
    if getattr(function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        return False
    (parts,) = (cell.cell_contents for cell in function.__closure__ or ())
    return all(
        part is causal_mask_function
        or getattr(part, "__qualname__", "") == "sliding_window_overlay.<locals>.inner_mask"
        for part in parts
    )


def newest_windows(
    given: torch.Tensor | None, queries: int, rows: int, window: int | None
) -> list[int] | None:
    """Say padding on the left, as one query of each sequence sees it, by windows.

    That is quicker than a mask, and what is hidden is not even read.

    Parameters
    ----------
    given : (batch or 1, heads or 1, queries or 1, keys) bool or float, optional
    queries : int
        Of each sequence.
    rows : int
        Sequences.
    window : int, optional
        The window of the layer.

    Returns
    -------
    list of int, optional
        None where there is no mask, or one that a window cannot say.
    """
    if given is None or queries != 1 or given.dtype != torch.bool or given.shape[1:3] != (1, 1):
        return None
    mask = given.numpy()[:, 0, 0]
    seen = np.count_nonzero(mask, axis=1)
    if (
        not seen.all()
        or not (mask.argmax(axis=1) + seen == mask.shape[1]).all()
        or len(mask) != rows
    ):
        return None
    return [int(count) for count in (seen if window is None else np.minimum(seen, window))]


class RowMask(NamedTuple):
    """What one sequence may see.

    Attributes
    ----------
    mask : array, optional
        As `attend` takes it.
    window : int, optional
    causal : bool
    """

    mask: NDArray[Any] | None
    window: int | None
    causal: bool


def row_mask(
    given: torch.Tensor | None, row: int, tokens: int, window: int | None, causal: bool
) -> RowMask:
    """Cut the mask of one sequence out of that of a batch.

    Parameters
    ----------
    given : (batch or 1, heads or 1, queries or 1, keys) bool or float, optional
        The newest key is the last one; keys may be more or fewer than those held.
    row : int
    tokens : int
        Keys held.
    window : int, optional
    causal : bool
    """
    if given is None:
        return RowMask(None, window, causal)
    one = given[row if given.shape[0] > 1 else 0]
    if one.dtype not in (torch.bool, torch.float32, torch.float64):
        one = one.to(torch.float32)
    mask = align_mask(one.numpy(), tokens).transpose(1, 0, 2)  # (queries, heads, keys)
    if mask.shape[:2] != (1, 1):
        return RowMask(mask, None, False)  # it knows about causality and window
    columns = mask[0, 0]
    if columns.dtype != np.bool_:
        return RowMask(columns, window, causal)
    if columns.all():
        return RowMask(None, window, causal)
    return RowMask(columns, window, causal)
