# SPDX-License-Identifier: Apache-2.0
"""FP64 gradients of the triangle's operands alone, for tests of their backward. As triangle_kernel_cases.py otherwise."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from triangle_kernel_cases import Data

from transformer_engine_batched.kernels.triangle_gradients import NormShare


class OperandGradients(NamedTuple):
    """Of z, of LN_in's weight and bias, of Wp, bp, Wg and bg."""

    z: torch.Tensor
    norm: tuple
    projection: tuple


def make_share(data: Data, grad_x: Optional[torch.Tensor]) -> Optional[NormShare]:
    """What another reader of ``x = LN_in(z)``, whose gradient of x is that, leaves for the operands' backward."""
    if grad_x is None:
        return None
    z, grad = data.z.double(), grad_x.double()
    variance, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
    hat = (z - mean) * torch.rsqrt(variance + data.norm_in.eps)
    sums = torch.stack([(grad * hat).flatten(0, 2), grad.flatten(0, 2)], 1).flatten(1)
    # Two shares, of unequal size.
    norm_sums = torch.stack([sums[:5].sum(0), sums[5:].sum(0)]).float()
    if data.norm_in.weight is not None:
        grad = grad * data.norm_in.weight.double()
    grad_hat = (grad - grad.mean(-1, keepdim=True)).to(data.z.dtype)
    rstds = torch.rsqrt(variance + data.norm_in.eps).squeeze(-1).float()
    return NormShare(grad_hat, norm_sums, (hat + 0.25).to(data.z.dtype), rstds)


def find_operand_gradients(data: Data, grad_x: Optional[torch.Tensor]) -> OperandGradients:
    """From grad_a, grad_b and a further gradient of ``x = LN_in(z)``, by autograd."""

    def leaf(x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        return None if x is None else x.detach().double().requires_grad_()

    z, norm, projection = leaf(data.z), *(
        tuple(map(leaf, values)) for values in (data.norm_in[:2], data.projection)
    )
    functional = torch.nn.functional
    x = functional.layer_norm(z, z.shape[-1:], *norm, data.norm_in.eps)
    operands = (
        functional.linear(x, *projection[:2]) * functional.linear(x, *projection[2:]).sigmoid()
    )
    if data.mask is not None:
        operands = operands * data.mask.double()[..., None]
    grads = torch.cat((data.grad_a, data.grad_b), 1).permute(0, 2, 3, 1)
    loss = (operands * grads.double()).sum()
    if grad_x is not None:
        loss = loss + (x * grad_x.double()).sum()
    loss.backward()
    found = (tuple(None if x is None else x.grad for x in values) for values in (norm, projection))
    return OperandGradients(z.grad, *found)


def find_output_share(data: Data) -> NormShare:
    """What the output's backward leaves: the output gate's part of the gradient of LN_in's output, by autograd."""
    z, c, grad_out = (x.double() for x in (data.z, data.c, data.grad_out))
    norms = [
        [None if x is None else x.double() for x in norm[:2]]
        for norm in (data.norm_in, data.norm_out)
    ]
    functional = torch.nn.functional
    wo, bo, wgo, bgo = (None if x is None else x.double() for x in data.output)
    x = functional.layer_norm(z, z.shape[-1:], *norms[0], data.norm_in.eps).requires_grad_()
    y = functional.layer_norm(c.permute(0, 2, 3, 1), c.shape[1:2], *norms[1], data.norm_out.eps)
    out = functional.linear(y, wo, bo) * functional.linear(x, wgo, bgo).sigmoid()
    return make_share(data, torch.autograd.grad(out, x, grad_out)[0])
