# SPDX-License-Identifier: Apache-2.0
"""What the backward functions of the triangle multiplicative update return, in Triton and in CUDA C++ alike.

Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from . import triangle_tiles as tiles
from .triangle_tiles import GatedProjection, Norm


class NormShare(NamedTuple):
    """One reader's share in the backward of ``x = LN_in(z) = hat * weight + bias``, ``hat = (z - mean) / std``.

    `grad_hat`: ``[B, N, N, D]`` in z's dtype, the gradient of hat less its mean over the channels, which does not
    change that of z. `norm_sums`: float32 ``[S, 2 D]``, whose sum over S is the gradient of the weight, then the bias.
    `hat` and `rstds`, where the reader has kept them: ``hat + 1/4`` as grad_hat, and float32 ``1 / std``, ``[B, N, N]``.
    """

    grad_hat: torch.Tensor
    norm_sums: torch.Tensor
    hat: Optional[torch.Tensor] = None
    rstds: Optional[torch.Tensor] = None


class OutputGradients(NamedTuple):
    """What `output_backward` returns.

    `grad_c`: ``[B, H, N_p, N_p]`` (i, j), zero padded: uint8 codes, or the weights' dtype without FP8.
    `grad_c_turned`: codes (j, i); None without FP8. `scale_inv`: float32 ``[1]`` or None.
    `norm_in`: the output gate's share in LN_in's backward, for `project_backward`. `norm_out` and `output`:
    gradients in their parameters' places and dtypes.
    """

    grad_c: torch.Tensor
    grad_c_turned: Optional[torch.Tensor]
    scale_inv: Optional[torch.Tensor]
    norm_in: NormShare
    norm_out: Norm
    output: GatedProjection


class InputGradients(NamedTuple):
    """What `project_backward` returns: gradients of z, of LN_in and of the projection, in their dtypes."""

    z: torch.Tensor
    norm: Norm
    projection: GatedProjection


def check_share(share: Optional[NormShare], z: torch.Tensor) -> None:
    """Raises where a share of another reader of LN(z) does not fit z."""
    if share is None:
        return
    for name, x in (("share.grad_hat", share.grad_hat), ("share.hat", share.hat)):
        if x is not None:
            tiles.check_tensor(name, x, tuple(z.shape), z.device)
            if x.dtype != z.dtype:
                raise TypeError(f"`{name}` must be {z.dtype} as z and came as {x.dtype}")
    if (share.hat is None) != (share.rstds is None):
        raise ValueError("`share.hat` and `share.rstds` must come together")
    if share.rstds is not None:
        tiles.check_tensor("share.rstds", share.rstds, tuple(z.shape[:3]), z.device)
        if share.rstds.dtype != torch.float32:
            raise TypeError(f"`share.rstds` must be float32 and came as {share.rstds.dtype}")
    sums, num_sums = share.norm_sums, 2 * z.shape[-1]
    if sums.dtype != torch.float32 or sums.ndim != 2 or sums.shape[1] != num_sums:
        raise ValueError(
            f"`share.norm_sums` must be float32 [S, {num_sums}] and came as {sums.dtype}, shape {tuple(sums.shape)}"
        )
