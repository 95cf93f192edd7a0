# SPDX-License-Identifier: Apache-2.0
"""Scales of the triangle block's operands from its weights alone.

A LayerNorm stands before the projections, so that no data can drive them beyond what the weights allow:
no history and no pass over the data is needed. Must not know of modules or recipes.
"""

from __future__ import annotations

from typing import Optional

import torch

# Relative roundings of BF16 (2^-9 each) between LayerNorm and code: x, weight, projection, gate and their
# product; 2^-6 holds eight.
_ROUNDING = 1 + 2.0**-6
# x and the weight are rounded where beta's part of the projection may cancel.
_CANCELLATION = 2.0**-8

FP8_MAX = {"e4m3": 448.0, "e5m2": 57344.0}


def bound_operands(
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    p_weight: torch.Tensor,
    p_bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """``max_d sqrt(D) |w_d * gamma| + |w_d . beta + b_d|`` for the rows of each operand.

    ``x = gamma * (z - mean) / sqrt(var + eps) + beta`` has ``|(x - beta) / gamma| <= sqrt(D)`` for every
    `z`, so by Cauchy and Schwarz no element of ``p = x @ w.T + b`` exceeds it. The gate is below one, and a
    mask within [0, 1] keeps it there.

    Parameters
    ----------
    norm_weight, norm_bias : torch.Tensor
        gamma and beta of the LayerNorm, ``[D]``.
    p_weight : torch.Tensor
        ``[2 H, D]``, rows of `a` above those of `b`.
    p_bias : torch.Tensor, optional
        ``[2 H]``.

    Returns
    -------
    torch.Tensor
        float32 ``[2]``: the bounds of `a` and `b`, with room for the roundings of BF16 arithmetic (1.6 %).

    Notes
    -----
    The bound is met where the normalized `z` is parallel to ``w_d * gamma`` and the gate is open. Independent
    normal data stay some 2 to 4 times below it: they cost FP8 range, of which E4M3 has 2^17, not precision.
    """
    weight, beta = p_weight.float(), norm_bias.float()
    spread = (weight * norm_weight.float()).norm(dim=1) * weight.shape[1] ** 0.5
    shift = weight @ beta
    if p_bias is not None:
        shift = shift + p_bias.float()
    bound = spread + shift.abs() + _CANCELLATION * (weight.abs() @ beta.abs())
    return _ROUNDING * bound.view(2, -1).amax(dim=1)


def bound_scales(
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    p_weight: torch.Tensor,
    p_bias: Optional[torch.Tensor],
    fp8_dtype: str,
) -> torch.Tensor:
    """``scale = fp8_max / bound`` of `a` and `b`, float32 ``[2]``, on the device and without waiting for it.

    A bound of zero or one that is not finite gives scale 1, as TE's rule for an amax.
    """
    with torch.no_grad():
        weights = (norm_weight, norm_bias, p_weight, p_bias)
        if p_weight.is_cuda:
            from ..kernels import triangle_bounds  # Triton takes a second to import

            return triangle_bounds.find_scales(
                *weights, _ROUNDING, _CANCELLATION, FP8_MAX[fp8_dtype]
            )
        bound = bound_operands(*weights)
        return torch.where((bound > 0) & bound.isfinite(), FP8_MAX[fp8_dtype] / bound, 1.0)
