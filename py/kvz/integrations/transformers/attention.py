"""The attention function that transformers calls: the newest queries over a packed layer.

Registered as "kvz" by the package. Calls mask.py and the caches of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from kvz.batch import attend_many
from kvz.errors import UnsupportedError
from kvz.integrations.transformers.mask import newest_windows, row_mask
from kvz.integrations.transformers.states import PackedStates

if TYPE_CHECKING:
    from kvz.integrations.transformers.layer import KvzLayer


def kvz_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks for it.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer.
    query : (batch, query heads, queries, dim)
    key, value : PackedStates, or tensors where the model runs without a cache
    attention_mask : tensor, optional
        As `kvz_mask` makes it, or as the user gave it.
    scaling, dropout, is_causal, sliding_window, softcap, s_aux
        As every attention function of transformers takes them.

    Returns
    -------
    out : (batch, queries, query heads, value dim), of the dtype of the query
    weights : None

    Raises
    ------
    UnsupportedError
        The model wants what kvz cannot give, or has another cache.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else bool(is_causal)
    _check(dropout, kwargs)
    if not isinstance(key, PackedStates):
        options = (scaling, dropout, causal, sliding_window, softcap, s_aux)
        return _without_cache(module, query, key, value, attention_mask, *options, **kwargs)
    # (batch, queries, heads, dim), the layout of both `attend` and what is returned.
    queries = query.detach().transpose(1, 2).to(torch.float32).contiguous().numpy()
    sinks = None if s_aux is None else s_aux.detach().to(torch.float32).numpy()
    out = _over_packed(
        key.layer, queries, attention_mask, scaling, causal, sliding_window, softcap, sinks
    )
    result = torch.from_numpy(out).to(query.dtype)
    if query.requires_grad and torch.is_grad_enabled():
        result = _NoGradient.apply(result, query)
    return result, None


def _over_packed(
    layer: KvzLayer,
    queries: NDArray[np.float32],
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    sinks: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Attend over all sequences, in one call: (batch, queries, query heads, value dim)."""
    rows, masks = layer.rows, None
    window: Any = sliding_window or layer.sliding_window
    padding = newest_windows(attention_mask, queries.shape[1], len(rows), window)
    if padding is not None:
        window = padding[0] if len(rows) == 1 else padding
    elif attention_mask is not None:
        seen = [
            row_mask(attention_mask, number, len(row), window, causal)
            for number, row in enumerate(rows)
        ]
        masks = [one.mask for one in seen] if any(one.mask is not None for one in seen) else None
        # The shape of the mask decided on these, for all sequences alike.
        window, causal = seen[0].window, seen[0].causal
    options: dict[str, Any] = {"causal": causal, "window": window}
    options |= {"softcap": softcap, "sinks": sinks}
    if len(rows) == 1:
        out = rows[0].attend(queries[0], scaling, mask=masks and masks[0], **options)[None]
    else:
        out = attend_many(rows, queries, scaling, masks=masks, **options)
    return cast("NDArray[np.float32]", out)


def _check(dropout: float, kwargs: dict[str, Any]) -> None:
    """Refuse what no part of this file does."""
    if dropout:
        raise UnsupportedError(f"dropout: expected 0, got {dropout}; call model.eval()")
    for name in ("position_bias", "head_mask", "cache"):
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{name}: kvz attention does not take this")
    if kwargs.get("output_attentions"):
        raise UnsupportedError("output_attentions: kvz attention does not return its weights")


class _NoGradient(torch.autograd.Function):
    """Makes a backward pass through packed states fail instead of being silently wrong."""

    @staticmethod
    def forward(context: Any, result: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the result, which depends on the query."""
        return result.view_as(result)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        """Refuse."""
        raise UnsupportedError("there is no gradient through a KvzCache; train without a cache")


# -- Without a cache: plain tensors, in torch ------------------------------------------------------


def _without_cache(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over what one forward pass made: no cache, or the encoder of images."""
    queries, keys = query.shape[2], key.shape[2]
    if causal and keys != queries:
        raise UnsupportedError(
            f"got {keys} keys for {queries} queries from a cache that is no KvzCache; pass "
            "past_key_values=cache_for(model)"
        )
    mask = attention_mask
    if causal and mask is not None and mask.shape[2] == 1 < queries:
        mask = _causal_mask(keys, sliding_window, mask)
    elif causal and mask is None and sliding_window and sliding_window < keys:
        mask = _causal_mask(keys, sliding_window, None)
    if softcap is None and s_aux is None:
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, scaling=scaling, is_causal=causal, **kwargs
        )
        return out
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query.float() @ repeat_kv(key, groups).float().transpose(2, 3) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None and causal:
        mask = _causal_mask(keys, sliding_window, None)
    if mask is not None:
        hidden = torch.finfo(torch.float32).min
        logits = logits.masked_fill(~mask, hidden) if mask.dtype == torch.bool else logits + mask
    if s_aux is not None:
        sink = s_aux.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :keys]
    result = weights @ repeat_kv(value, groups).float()
    return result.to(query.dtype).transpose(1, 2).contiguous(), None


def _causal_mask(keys: int, window: int | None, padding: torch.Tensor | None) -> torch.Tensor:
    """Return (1 or batch, 1, keys, keys) bool."""
    position = torch.arange(keys)
    mask = position[None, :] <= position[:, None]
    if window:
        mask &= position[None, :] > position[:, None] - window
    return mask[None, None] if padding is None else mask[None, None] & padding
