# SPDX-License-Identifier: Apache-2.0
"""The contraction of the triangle block in each number format the demo compares.

Input: the operands ``a, b`` of the contraction, ``[D, N, N]`` in BF16. A recipe quantizes them with
a quantizer of Transformer Engine and multiplies them with ``teb.batched_general_gemm``.
Must not import: `protein`, `triangle`, `picture`. A recipe knows matrices, not proteins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
import transformer_engine.pytorch as te

import transformer_engine_batched as teb

E4M3 = te.DType.kFloat8E4M3
E4M3_MAX = 448.0  # OCP 8-bit floating point specification, table 1: largest finite E4M3 number.

# outgoing: out = a @ b^T contracts the last dim of both operands, TN with row-wise data.
# incoming: out = a^T @ b contracts the rows of both, NT with column-wise data.
# Transformer Engine writes out = op(B) @ op(A), so A = b and B = a in both.
LAYOUTS = {"outgoing": "TN", "incoming": "NT"}


def delayed_scaling_quantizer(calibration: torch.Tensor, columnwise: bool) -> te.Float8Quantizer:
    """``scale = 448 / amax`` with the amax of an earlier step: `DelayedScaling` with margin 0.

    `calibration` is what the earlier step multiplied: quantizing it once is what fills the amax.
    """
    device = calibration.device
    scale, amax = torch.ones(1, device=device), torch.zeros(1, device=device)
    quantizer = te.Float8Quantizer(scale, amax, E4M3, rowwise=True, columnwise=columnwise)
    teb.quantize(calibration, quantizer)
    scale.copy_(E4M3_MAX / amax)
    return quantizer


def current_scaling_quantizer(
    calibration: torch.Tensor, columnwise: bool
) -> te.Float8CurrentScalingQuantizer:
    """``scale = 448 / amax`` with the amax of the very tensor that is quantized."""
    return te.Float8CurrentScalingQuantizer(
        E4M3, calibration.device, rowwise=True, columnwise=columnwise
    )


def mxfp8_quantizer(calibration: torch.Tensor, columnwise: bool) -> te.MXFP8Quantizer:
    """A power-of-two scale for each 32 elements along the contracted dimension."""
    del calibration
    return te.MXFP8Quantizer(E4M3, rowwise=not columnwise, columnwise=columnwise)


@dataclass(frozen=True)
class Recipe:
    """A number format for the operands.

    Attributes
    ----------
    name : str
        As it stands in the tables.
    format : str
        Name of the format in the support table of the package.
    alignment : int
        Rows and columns are padded with zeros to a multiple of this before they are quantized: 16
        is what cuBLASLt wants of FP8 operands, 32 elements is a block of MXFP8. Zeros do not change
        the product, and its padding is cut off.
    min_sqnr_db, min_slice_db : float
        What the contraction must reach in all and in its worst channel; below, the demo fails. E4M3
        has 3 bits of mantissa: 28.5 dB for two operands of normal data, whatever the granularity of
        the scale.
    make_quantizer : callable or None
        ``(calibration, columnwise)`` to a quantizer; None leaves BF16 as it is.
    """

    name: str
    format: str
    alignment: int
    min_sqnr_db: float
    min_slice_db: float
    make_quantizer: Callable[[torch.Tensor, bool], object] | None = None

    def prepare(self, x: torch.Tensor, quantizer: object | None) -> torch.Tensor:
        """Pad the last two dims of ``[D, N, N]`` and quantize: what an FP8 product costs extra."""
        if quantizer is None:
            return x
        padding = -x.shape[-1] % self.alignment
        if padding:
            x = torch.nn.functional.pad(x, (0, padding, 0, padding))
        return teb.quantize(x, quantizer)


RECIPES = (
    Recipe("BF16", "bf16", 1, 45.0, 45.0),
    Recipe("Float8 delayed", "float8", 16, 27.0, 26.0, delayed_scaling_quantizer),
    Recipe("Float8 current", "float8", 16, 27.0, 26.0, current_scaling_quantizer),
    Recipe("MXFP8", "mxfp8", 32, 27.0, 26.0, mxfp8_quantizer),
)


def multiply(a: torch.Tensor, b: torch.Tensor, direction: str, size: int) -> torch.Tensor:
    """The contraction of prepared operands, BF16 ``[D, size, size]``.

    The sums here are coherent, all terms of one sign, which is where Hopper's fast accumulation truncates
    visibly. So partial sums are promoted to FP32.
    """
    product = teb.batched_general_gemm(
        b, a, out_dtype=torch.bfloat16, layout=LAYOUTS[direction], use_split_accumulator=True
    )
    return product[..., :size, :size]


def count_bytes(x: torch.Tensor) -> int:
    """Bytes of a prepared operand: its elements, or codes and scales in all layouts it holds."""
    if not isinstance(x, te.QuantizedTensor):
        return x.nbytes
    buffers = x.get_metadata().values()
    return sum(buffer.nbytes for buffer in buffers if isinstance(buffer, torch.Tensor))
