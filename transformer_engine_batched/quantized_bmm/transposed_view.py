# SPDX-License-Identifier: Apache-2.0
"""A quantized tensor with its last two dims swapped: a view that a product reads through the tensor's other copy."""

from __future__ import annotations

from typing import Callable, Optional

import torch  # before TE: it loads the libraries that TE links to
from torch.utils._pytree import tree_map
from transformer_engine.pytorch.quantized_tensor import QuantizedTensor


class TransposedView(torch.Tensor):
    """A quantized tensor with its last two dims swapped, for products to read through its other copy.

    To anything but a product it is what TE makes of a transposition, the dequantized tensor. Like TE's
    tensors it is dequantized anew by each operation that reads it. The first that writes to it or lets its
    memory out settles it: from then on it is a plain tensor in all but type. Made by
    `enable_quantized_bmm`'s hook, which is its ``__torch_function__``, too.
    """

    @staticmethod
    def __new__(cls, source: QuantizedTensor) -> "TransposedView":
        *batch, rows, cols = source.shape
        strides = torch.empty((*batch, rows, cols), device="meta").mT.stride()
        return torch.Tensor._make_wrapper_subclass(
            cls, (*batch, cols, rows), strides=strides, dtype=source.dtype, device=source.device
        )

    def __init__(self, source: QuantizedTensor) -> None:
        super().__init__()
        self._source: Optional[QuantizedTensor] = source
        self._value: Optional[torch.Tensor] = None

    def read_source(self) -> Optional[QuantizedTensor]:
        """The tensor that was transposed; None once the view is settled."""
        return self._source

    def read_value(self, *, settle: bool) -> torch.Tensor:
        """The elements, without gradient.

        `settle`: the same tensor from now on, for the caller to write to or to give away.
        """
        value = self._value
        if value is None:
            with torch.no_grad():
                value = self._source.dequantize().transpose(-2, -1)
        if settle:
            self._value, self._source = value, None
        return value

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: Optional[dict] = None
    ) -> object:
        settle = func._schema.is_mutable or func.is_view
        return func(*read_views(args, settle), **read_views(kwargs or {}, settle))


def read_views(tree: object, settle: bool) -> object:
    """Arguments of a call with values in place of views."""
    return tree_map(
        lambda x: x.read_value(settle=settle) if isinstance(x, TransposedView) else x, tree
    )


class Transposition(torch.autograd.Function):
    """A quantized tensor and its transposed view, of which nothing is computed."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,  # pylint: disable=unused-argument
        x: QuantizedTensor,
    ) -> TransposedView:
        return TransposedView(x)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,  # pylint: disable=unused-argument
        grad: torch.Tensor,
    ) -> torch.Tensor:
        return grad.transpose(-2, -1)
