# SPDX-License-Identifier: Apache-2.0
"""One small kernel: scales of the triangle block's operands from its weights.

The rule is `triangle_bounds.bound_operands`; as torch operations it is a dozen launches, more than the rest
of a small block. Must not import the package.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

from .triangle_tiles import launch

_BLOCK_ROWS = 32


def find_scales(
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    p_weight: torch.Tensor,
    p_bias: Optional[torch.Tensor],
    rounding: float,
    cancellation: float,
    fp8_max: float,
) -> torch.Tensor:
    """float32 ``[2]``: ``fp8_max / bound`` of each half of the rows of `p_weight`.

    Parameters
    ----------
    norm_weight, norm_bias : torch.Tensor
        ``[D]``, contiguous.
    p_weight : torch.Tensor
        ``[2 H, D]``, contiguous.
    p_bias : torch.Tensor, optional
        ``[2 H]``.
    rounding, cancellation : float
        See `triangle_bounds.bound_operands`.
    fp8_max : float
        Largest number of the FP8 type.
    """
    num_rows, dim = p_weight.shape[0] // 2, p_weight.shape[1]
    scales = torch.empty(2, dtype=torch.float32, device=p_weight.device)
    pointers = (scales, norm_weight, norm_bias, p_weight, p_bias)
    numbers = (float(dim) ** 0.5, rounding, cancellation, fp8_max)
    constants = (*numbers, num_rows, dim, _BLOCK_ROWS, triton.next_power_of_2(dim))
    launch(_scales_kernel, 2, 8, pointers, constants)
    return scales


@triton.jit
def _scales_kernel(
    scales_ptr,
    gamma_ptr,
    beta_ptr,
    weight_ptr,
    bias_ptr,
    root_of_dim,
    rounding,
    cancellation,
    fp8_max,
    NUM_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program finds the scale of one operand."""
    operand = tl.program_id(0)
    cols = tl.arange(0, BLOCK_COLS)
    is_col = cols < DIM
    gamma = tl.load(gamma_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
    largest = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(0, NUM_ROWS, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        is_row = rows < NUM_ROWS
        rows += operand * NUM_ROWS
        inside = is_row[:, None] & is_col[None, :]
        weight = tl.load(weight_ptr + rows[:, None] * DIM + cols[None, :], mask=inside, other=0.0)
        weight = weight.to(tl.float32)
        scaled = weight * gamma[None, :]
        bound = tl.sqrt(tl.sum(scaled * scaled, axis=1)) * root_of_dim
        shifted = weight * beta[None, :]
        shift = tl.sum(shifted, axis=1)
        if bias_ptr is not None:
            shift += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
        bound += tl.abs(shift) + cancellation * tl.sum(tl.abs(shifted), axis=1)
        # A NaN must come through, for which a maximum is not to be relied on.
        largest = tl.where((bound > largest) | (bound != bound), bound, largest)
    has_nan = tl.max((largest != largest).to(tl.int32), axis=0) > 0
    bound = tl.max(tl.where(largest == largest, largest, 0.0), axis=0) * rounding
    is_usable = (bound > 0.0) & (bound < float("inf")) & (has_nan == 0)
    scale = tl.where(is_usable, fp8_max / tl.where(is_usable, bound, 1.0), 1.0)
    tl.store(scales_ptr + operand, scale)
