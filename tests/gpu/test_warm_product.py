# SPDX-License-Identifier: Apache-2.0
"""Products of known signatures on the GPU: the same bits, state and memory as those that are described anew."""

from __future__ import annotations

import pytest
import torch
import transformer_engine.pytorch as te
from torch.utils.checkpoint import checkpoint
from training import Case, quantized
from warm_steps import CASES, RECIPES, compare_steps

import transformer_engine_batched  # pylint: disable=unused-import # adds BatchedMatmul

LARGE = Case((9, 640, 512), (9, 512, 512))  # cast one by one: more than `cast_pair.MAX_ELEMENTS`
EVEN = Case((2, 256, 128), (2, 128, 192))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("recipe", ("delayed", "current", "e4m3"))
@pytest.mark.parametrize("case", (*CASES.values(), EVEN, LARGE), ids=(*CASES, "even", "large"))
def test_the_same_bits(monkeypatch, case, recipe, dtype):
    compare_steps(monkeypatch, case, recipe, dtype, device="cuda")


@pytest.mark.parametrize("needs", ((True, False), (False, True), (False, False)))
@pytest.mark.parametrize("recipe", ("delayed", "current"))
def test_some_gradients(monkeypatch, recipe, needs):
    compare_steps(monkeypatch, EVEN, recipe, needs=needs, device="cuda")


def test_small_operands_are_cast_with_one_launch(monkeypatch):
    assert compare_steps(monkeypatch, EVEN, "delayed", device="cuda")._pair is not None
    assert compare_steps(monkeypatch, LARGE, "delayed", device="cuda")._pair is None


@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("recipe", ("delayed", "current"))
def test_a_recomputed_forward_saves_the_same(recipe, use_reentrant):
    """The first forward of a shape finds the product, and the second one, in the checkpoint, knows it."""
    shape = (2, 96, 96) if use_reentrant else (2, 80, 80)
    a, b = (torch.randn(shape, device="cuda").bfloat16().requires_grad_() for _ in "ab")
    module, made = te.BatchedMatmul(), RECIPES[recipe]()
    with quantized(made):
        y = checkpoint(module, a, b, use_reentrant=use_reentrant)
        y.sum().backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()
    if recipe == "current":
        with quantized(made):
            expected = torch.autograd.grad(module(a, b).sum(), (a, b))
        assert torch.equal(a.grad, expected[0]) and torch.equal(b.grad, expected[1])
