# SPDX-License-Identifier: Apache-2.0
"""`te.BatchedMatmul` under torch.compile on the GPU: one graph, the bits of the eager product."""

from __future__ import annotations

import pytest
import torch
import transformer_engine.pytorch as te
from transformer_engine.common.recipe import Float8CurrentScaling, MXFP8BlockScaling

import transformer_engine_batched as teb


@pytest.mark.parametrize("is_transposed", (False, True))
@pytest.mark.parametrize("shape", ((2, 256, 128, 64), (3, 389, 70, 17)))
@pytest.mark.parametrize("recipe", (None, Float8CurrentScaling(), MXFP8BlockScaling()), ids=str)
def test_one_graph_and_the_bits_of_eager(recipe, shape, is_transposed):
    torch.compiler.reset()
    batch, rows, inner, cols = shape
    multiply = te.BatchedMatmul()

    def function(a, b):
        return multiply(a.mT, b.mT) if is_transposed else multiply(a, b)

    shapes = ((batch, rows, inner), (batch, inner, cols))
    a, b = (torch.randn(x, device="cuda", dtype=torch.bfloat16) for x in shapes)
    if is_transposed:
        a, b = a.mT.contiguous(), b.mT.contiguous()
    leaves = a.requires_grad_(), b.requires_grad_()
    grad = torch.randn(batch, rows, cols, device="cuda", dtype=torch.bfloat16)

    def run(function):
        with teb.emulate(), te.autocast(enabled=recipe is not None, recipe=recipe):
            y = function(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, grad)

    expected = run(function)
    for x, y in zip(run(torch.compile(function, fullgraph=True)), expected):
        assert torch.equal(x, y)


def test_backward_finds_the_switch_of_emulation():
    """Autograd's threads do not see it; the graph knows."""
    torch.compiler.reset()
    a, b = (
        torch.randn(2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    compiled = torch.compile(te.BatchedMatmul(), fullgraph=True)
    with teb.emulate(), te.autocast(enabled=True, recipe=MXFP8BlockScaling()):
        y = compiled(a, b)
    y.sum().backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()
