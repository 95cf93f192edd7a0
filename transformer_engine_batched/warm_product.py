# SPDX-License-Identifier: Apache-2.0
"""A forward product of operands like those of an earlier one: from one look-up to the launches.

`quantized_operand` and `gemm` describe operands and codes at every call, half of the host time of a product. What
they decide follows from the signature of both operands alone, and is kept here for products whose
operands are both quantized by the fused kernel and multiplied by one launch. Must not know of autograd.
"""

from __future__ import annotations

from typing import Optional

import torch

from .launch import Launch
from .memory_layout import Strides, arrange
from .quantized_operand import FusedCast
from .te_interop import Quantizer


class WarmProduct:
    """The launches of one signature.

    Parameters
    ----------
    a, b : FusedCast
        Of the operands.
    launch : Launch
        Of the product of their codes.
    out_shape : tuple
        Of the result.
    """

    def __init__(
        self, a: FusedCast, b: FusedCast, launch: Launch, out_shape: tuple[int, ...]
    ) -> None:
        self._a, self._b = a, b
        self._launch = launch
        self._out_shape = out_shape
        self._pair = None
        if not (a.is_delayed or b.is_delayed or a.is_packed or b.is_packed):
            from .kernels.float8_quantize import AmaxPair

            self._pair = AmaxPair(a.cast, b.cast)

    def __call__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        a_quantizer: Quantizer,
        b_quantizer: Quantizer,
        out_strides: Optional[Strides] = None,
    ) -> tuple[torch.Tensor, tuple[Optional[torch.Tensor], ...]]:
        """The product; and codes along the rows of `a`, its scale, along the last dim of `b`, its scale."""
        a_amaxes = b_amaxes = None
        if self._pair is not None:
            a_amaxes, b_amaxes = self._pair.find(a, b)
        a_codes, a_saved, a_scale_inv = self._a.write(a, a_quantizer, a_amaxes)
        b_saved, b_codes, b_scale_inv = self._b.write(b, b_quantizer, b_amaxes)
        out = self._launch.run(a_codes, b_codes, a_scale_inv, b_scale_inv)
        if out.shape != self._out_shape:
            # Codes are padded, and where both operands repeat an item, one product served for all of them.
            rows, cols = self._out_shape[-2:]
            out = arrange(out[..., :rows, :cols].expand(self._out_shape), out_strides)
        elif out_strides is not None:
            out = arrange(out, out_strides)
        return out, (a_saved, a_scale_inv, b_saved, b_scale_inv)
