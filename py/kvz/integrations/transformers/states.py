"""What a cache layer returns in place of keys and values: a tensor with a shape and no storage.

Models hand it to the attention function untouched, which reads the layer through it. Called by
layer.py and attention.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvz.errors import UnsupportedError

if TYPE_CHECKING:
    from kvz.integrations.transformers.layer import KvzLayer


class PackedStates(torch.Tensor):
    """The keys or the values of a layer, for models that look at shape, dtype and device only.

    Attributes
    ----------
    layer : KvzLayer
        Which holds them, packed.
    """

    layer: KvzLayer
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls, layer: KvzLayer, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> PackedStates:
        """Make one of shape (batch, kv heads, tokens, dim)."""
        made: PackedStates = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=False
        )
        made.layer = layer
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: there are no numbers here to compute with."""
        raise UnsupportedError(
            f"{function}: this model computes with the keys and values of its cache outside of "
            "attention, which kvz keeps packed; use another cache for it"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PackedStates{tuple(self.shape)}"
