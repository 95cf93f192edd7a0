# SPDX-License-Identifier: Apache-2.0
"""The triangle block in FP64, its inputs, and the gates that a result must pass, on any device.

Written from the formulas of AlphaFold 2 (supplementary algorithms 11 and 12) with torch's FP64 autograd. Must
not import the package's pipelines or kernels.
"""

from __future__ import annotations

from typing import Mapping, NamedTuple, Optional

import torch
from accuracy import random_values, sqnr_per_item

# In dB on independent normal data: the contraction over all, its worst channel, gradients. E4M3 x E4M3 has 28.5
# and E5M2 x E4M3, what the recipes' default of E5M2 for gradients gives, 24.5 (tests/accuracy.py).
CONTRACTION_DB, WORST_SLICE_DB = 27.5, 26.0
GRADIENT_DB = {"e4m3": 25.0, "e5m2": 23.0}
# Gradients of biases and LayerNorms are sums of few dozen elements each, many of them nearly cancelled.
VECTOR_SLACK_DB = 5.0
# Without a recipe: results in BF16 and FP16 have passed through some ten roundings of 2^-9 and 2^-12.
PLAIN_DB = {torch.float32: 110.0, torch.float16: 55.0, torch.bfloat16: 38.0}
# Over the gates, an output that is too good for three bits of mantissa was not quantized.
FP8_CEILING_DB = 40.0


class Size(NamedTuple):
    """``[batch, n, n, dim]``, and the channels that are contracted."""

    batch: int
    n: int
    dim: int
    hidden: int


SIZES = {
    "whole blocks": Size(1, 32, 32, 32),
    "ragged": Size(2, 37, 32, 16),
    "hidden is larger": Size(1, 32, 16, 48),
}


class Inputs(NamedTuple):
    """`z` is a leaf that requires grad; `mask` may be None."""

    z: torch.Tensor
    mask: Optional[torch.Tensor]
    grad_output: torch.Tensor


class Result(NamedTuple):
    """What a forward and a backward give: `c` is ``[B, H, N, N]``, gradients of parameters by name."""

    out: torch.Tensor
    c: Optional[torch.Tensor]
    grad_z: Optional[torch.Tensor]
    grads: dict[str, torch.Tensor]


def make_inputs(
    size: Size,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    masked: bool = True,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Normal data; the mask drops a tenth of the pairs, as a crop with a few missing residues."""
    shape = (size.batch, size.n, size.n)
    z = random_values((*shape, size.dim), 3 * seed).to(device, dtype)
    grad_output = random_values((*shape, size.dim), 3 * seed + 1).to(device, dtype)
    mask = None
    if masked:
        mask = (random_values(shape, 3 * seed + 2) > -1.28).to(device, dtype)
    return Inputs(z.requires_grad_(), mask, grad_output)


def randomize(block: torch.nn.Module, seed: int = 0) -> None:
    """Parameters of a trained block's kind: no two alike, none zero, biases and LayerNorms of their own."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(block.named_parameters())):
            noise = random_values(tuple(parameter.shape), 100 + 50 * seed + index)
            if parameter.dim() == 2:
                value = noise / parameter.shape[1] ** 0.5
            elif name.endswith("_bias"):
                value = 0.2 * noise
            else:
                value = 1 + 0.2 * noise
            parameter.copy_(value)


def evaluate(
    parameters: Mapping[str, torch.Tensor],
    z: torch.Tensor,
    mask: Optional[torch.Tensor],
    mode: str,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, c)`` from parameters under our names, in the dtype of `z`: FP64 for a reference."""

    def normalize(x: torch.Tensor, name: str) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * parameters[f"{name}_weight"] + parameters[f"{name}_bias"]

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        product = torch.einsum("bijc,dc->bijd", x, parameters[f"{name}_weight"])
        bias = parameters.get(f"{name}_bias")
        return product if bias is None else product + bias

    x = normalize(z, "norm_in")
    gated = torch.sigmoid(project(x, "g_in")) * project(x, "p_in")
    if mask is not None:
        gated = gated * mask.to(z.dtype)[..., None]
    hidden = gated.shape[-1] // 2
    a, b = gated[..., :hidden], gated[..., hidden:]
    equation = "bikd,bjkd->bijd" if mode == "outgoing" else "bkid,bkjd->bijd"
    c = torch.einsum(equation, a, b)
    out = torch.sigmoid(project(x, "g_out")) * project(normalize(c, "norm_out"), "p_out")
    return out, c.movedim(-1, 1)


def exact_result(block: torch.nn.Module, inputs: Inputs) -> Result:
    """Output, contraction and all gradients of a block in FP64."""
    leaves = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in block.named_parameters()
    }
    z = inputs.z.detach().double().requires_grad_()
    out, c = evaluate(leaves, z, inputs.mask, block.mode, block.eps)
    grads = torch.autograd.grad(out, (z, *leaves.values()), inputs.grad_output.double())
    return Result(out.detach(), c.detach(), grads[0], dict(zip(leaves, grads[1:])))


def overall_sqnr(result: torch.Tensor, expected: torch.Tensor) -> float:
    """SQNR in dB of a whole tensor as one item; 0 / 0 is exact."""
    return sqnr_per_item(result.reshape(1, 1, -1), expected.reshape(1, 1, -1)).item()


def assert_close(
    result: Result,
    expected: Result,
    *,
    plain_db: Optional[float] = None,
    gradient: str = "e5m2",
) -> None:
    """Fails unless contraction, output and every gradient pass their gates.

    Parameters
    ----------
    plain_db : float, optional
        The gate of all of them for a result without FP8.
    gradient : {"e4m3", "e5m2"}
        Format of the gradient of the contraction otherwise.
    """
    if plain_db is None:
        contraction_db, slice_db, gradient_db = (
            CONTRACTION_DB,
            WORST_SLICE_DB,
            GRADIENT_DB[gradient],
        )
    else:
        contraction_db, slice_db, gradient_db = plain_db, plain_db, plain_db
    if result.c is not None:
        found = overall_sqnr(result.c, expected.c)
        assert found >= contraction_db, f"contraction: {found:.1f} dB, expected {contraction_db}"
        worst = sqnr_per_item(result.c, expected.c).min().item()
        assert worst >= slice_db, f"worst slice: {worst:.1f} dB, expected {slice_db}"
        assert plain_db is not None or found < FP8_CEILING_DB, f"{found:.1f} dB: was that FP8?"
    for item, exact in zip(result.out, expected.out, strict=True):
        found = overall_sqnr(item, exact)
        assert found >= contraction_db, f"output: {found:.1f} dB, expected {contraction_db}"
    pairs = [] if result.grad_z is None else [("z", result.grad_z, expected.grad_z)]
    pairs += [(name, grad, expected.grads[name]) for name, grad in result.grads.items()]
    for name, grad, exact in pairs:
        assert grad is not None and grad.shape == exact.shape, name
        bound = gradient_db - (VECTOR_SLACK_DB if grad.dim() == 1 else 0.0)
        found = overall_sqnr(grad, exact)
        assert found >= bound, f"gradient of {name}: {found:.1f} dB, expected {bound}"
