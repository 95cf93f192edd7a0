# SPDX-License-Identifier: Apache-2.0
"""How far a quantized tensor is from what it was made of.

Input: a tensor and its quantized form, TE's or `block_cast`'s. Output: a record of numbers per batch item.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .kernels.block_layout import BLOCK
from .quantized_operand import dequantize
from .te_interop.tensors import is_quantized


@dataclass(frozen=True)
class QuantizationError:
    """Errors of each item of a batch; FP64 tensors ``[*batch]``. Printed, those of the worst item.

    Parameters
    ----------
    max_error : torch.Tensor
        ``max |x - q|``.
    relative_error : torch.Tensor
        ``|x - q| / |x|``, Frobenius norms; 0 for an item of zeros that is kept.
    sqnr_db : torch.Tensor
        Signal to quantization noise ratio ``-20 log10(relative_error)``; infinity where nothing is lost.
    """

    max_error: torch.Tensor
    relative_error: torch.Tensor
    sqnr_db: torch.Tensor

    def __str__(self) -> str:
        if self.sqnr_db.numel() == 0:
            return "no items"
        return (
            f"SQNR {float(self.sqnr_db.min()):.1f} dB, relative error {float(self.relative_error.max()):.2e}, "
            f"max error {float(self.max_error.max()):.3g} (worst of {self.sqnr_db.numel()} items)"
        )


def quantization_error(x: torch.Tensor, q: object) -> QuantizationError:
    """Error of `q` as a stand-in for `x`, per batch item: largest, relative, and as SQNR.

    Parameters
    ----------
    x : torch.Tensor
        ``[*batch, rows, cols]``, the original.
    q : tuple, QuantizedTensor or torch.Tensor
        What `per_token_cast_to_fp8` or `per_block_cast_to_fp8` gave (values and inverse scales), one of TE's
        quantized tensors, or values of the shape of `x` that are to be compared as they are.

    Returns
    -------
    QuantizationError

    Raises
    ------
    TypeError, ValueError
        If `q` is none of these, or its shape is not that of `x`.

    Notes
    -----
    In FP64 on the device of `x`. An element that is not finite, in either, makes the errors of its item NaN or
    infinite. E4M3 of normal data has about 31 dB.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> x = torch.randn(2, 128, 256)
    >>> error = teb.quantization_error(x, teb.per_token_cast_to_fp8(x))
    >>> bool((error.sqnr_db > 28).all()), tuple(error.max_error.shape)
    (True, (2,))
    """
    if not isinstance(x, torch.Tensor) or is_quantized(x):
        raise TypeError(f"x: expected the original torch.Tensor, got {type(x).__name__}")
    if x.dim() < 2:
        raise ValueError(f"x has shape {list(x.shape)}: expected a matrix, [*batch, rows, cols]")
    with torch.no_grad():
        values = _numbers(q)
        if values.shape != x.shape:
            raise ValueError(f"q has shape {list(values.shape)}, x {list(x.shape)}")
        exact = x.double()
        difference = exact - values.to(exact.device)
        if x.shape[-2] * x.shape[-1] == 0:
            zero = exact.new_zeros(x.shape[:-2])
            return QuantizationError(zero, zero, zero + torch.inf)
        noise = difference.flatten(-2).norm(dim=-1)
        relative = torch.where(noise == 0, 0.0, noise / exact.flatten(-2).norm(dim=-1))
        return QuantizationError(
            difference.abs().amax((-2, -1)), relative, -20.0 * torch.log10(relative)
        )


def _numbers(q: object) -> torch.Tensor:
    """FP64 numbers of a quantized tensor."""
    if is_quantized(q):
        return dequantize(q).double()
    if isinstance(q, torch.Tensor):
        return q.double()
    if not (isinstance(q, tuple) and len(q) == 2 and all(isinstance(x, torch.Tensor) for x in q)):
        raise TypeError(
            "q: expected (values, scale_inv) of a cast, a quantized tensor of TE or a torch.Tensor, got "
            f"{type(q).__name__}"
        )
    values, scale_inv = q
    if values.dim() < 2:
        raise ValueError(f"values have shape {list(values.shape)}: expected [*batch, rows, cols]")
    *batch, rows, cols = values.shape
    blocks = -(-cols // BLOCK)
    if tuple(scale_inv.shape) not in ((*batch, rows, blocks), (*batch, -(-rows // BLOCK), blocks)):
        raise ValueError(
            f"scale_inv has shape {list(scale_inv.shape)}: values {list(values.shape)} have scales of blocks of 1 x "
            f"{BLOCK} or {BLOCK} x {BLOCK}"
        )
    factors = scale_inv.double().repeat_interleave(BLOCK, -1)[..., :cols]
    if scale_inv.shape[-2] != rows:
        factors = factors.repeat_interleave(BLOCK, -2)[..., :rows, :]
    return values.double() * factors
