"""Masks of other libraries against the tokens that a cache holds. Called by the integrations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def align_mask(mask: NDArray[Any], tokens: int) -> NDArray[Any]:
    """Bring the last axis to `tokens`, the newest last; what is not spoken of is not seen."""
    missing = tokens - mask.shape[-1]
    if missing <= 0:
        return mask[..., -missing:]
    unseen = False if mask.dtype == np.bool_ else -np.inf
    pads = [(0, 0)] * (mask.ndim - 1) + [(missing, 0)]
    return np.pad(mask, pads, constant_values=unseen)
