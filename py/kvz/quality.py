"""What the store is going to make of tokens that are still exact. Made by cache.py and model.py."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CacheQuality:
    """Errors of one cache, for each kv head. Returned by `TwoTierCache.quality`.

    An error is the norm of what is wrong over the norm of what is right, over all values of all
    tokens measured. Logits are measured less their mean over the tokens, because softmax does not
    see what is the same for all.

    Attributes
    ----------
    tokens : int
        How many tokens were measured; without any, all errors are NaN.
    precision : str
        Of the store, as "q4" or "q8/q4".
    keys, values : (H,) float64
        Relative errors.
    logits, logit_rms : (H,) float64 or None
        Relative errors of logits, and the root of their mean square; None without a query.
    """

    tokens: int
    precision: str
    keys: Numbers
    values: Numbers
    logits: Numbers | None = None
    logit_rms: Numbers | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {
            "tokens": self.tokens,
            "precision": self.precision,
            **{name: None if x is None else x.tolist() for name, x in self._errors()},
        }

    def _errors(self) -> list[tuple[str, Numbers | None]]:
        names = ("keys", "values", "logits", "logit_rms")
        return [(name, getattr(self, name)) for name in names]

    def __repr__(self) -> str:
        if not self.tokens:
            return f"CacheQuality(no tokens on their way to {self.precision})"
        parts = [f"keys {_worst(self.keys)}", f"values {_worst(self.values)}"]
        if self.logits is not None and self.logit_rms is not None:
            parts.append(f"logits {_worst(self.logits)} (rms {self.logit_rms.max():.2g})")
        count = f"{self.tokens} token{'s' * (self.tokens > 1)}"
        errors = ", ".join(parts)
        return f"CacheQuality({count} on the way to {self.precision}, worst head: {errors})"

    def _repr_html_(self) -> str:
        """Show a row for each head in a notebook."""
        title = f"CacheQuality, {self.tokens} tokens on the way to {self.precision}"
        columns = [_cells(x, len(self.keys)) for _, x in self._errors()]
        return _table(title, "head", list(zip(*columns, strict=True)))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModelQuality:
    """Errors of all layers. Returned by `ModelCache.quality`.

    Attributes
    ----------
    layers : tuple of CacheQuality
    """

    layers: tuple[CacheQuality, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the layers as plain values."""
        return {"layers": [layer.to_dict() for layer in self.layers]}

    def __repr__(self) -> str:
        measured = [layer for layer in self.layers if layer.tokens]
        if not measured:
            return f"ModelQuality({len(self.layers)} layers, no tokens)"
        worst = max(measured, key=lambda layer: float(layer.keys.max()))
        return f"ModelQuality({len(self.layers)} layers, of the worst keys: {worst!r})"

    def _repr_html_(self) -> str:
        """Show a row for each layer, with its worst head, in a notebook."""
        rows = [
            tuple("-" if x is None else f"{x.max():.2g}" for _, x in layer._errors())
            for layer in self.layers
        ]
        return _table("ModelQuality, worst head of each layer", "layer", rows)


def _worst(errors: Numbers) -> str:
    """Return the largest of some errors as text: "7.1 %"."""
    return f"{100 * errors.max():.2g} %"


def _cells(errors: Numbers | None, heads: int) -> list[str]:
    """Return one text for each head; "-" where nothing was measured."""
    return ["-"] * heads if errors is None else [f"{error:.2g}" for error in errors]


def _table(title: str, kind: str, rows: list[tuple[str, ...]]) -> str:
    """Return an HTML table."""
    head = "".join(f"<th>{name}</th>" for name in (kind, "keys", "values", "logits", "rms"))
    body = "".join(
        f"<tr><td>{index}</td>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for index, row in enumerate(rows)
    )
    return f"<div><b>{escape(title)}</b><table><tr>{head}</tr>{body}</table></div>"
