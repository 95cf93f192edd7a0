# SPDX-License-Identifier: Apache-2.0
"""The triangle block's fused pipeline, its kernels run by Triton's interpreter, against FP64 and the composed one.

The same on a GPU, where it is chosen by itself, is tests/gpu/test_triangle.py.
"""

from __future__ import annotations

import os

import pytest
import torch
from interpreted import IS_INTERPRETED, give_device_arithmetic, run_interpreted
from test_triangle import make_block
from training import RECIPES, SavedTensors, delayed_state, quantized
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from triangle_reference import (
    PLAIN_DB,
    Result,
    Size,
    assert_close,
    exact_result,
    make_inputs,
    overall_sqnr,
)

import transformer_engine_batched as teb
from transformer_engine_batched.triangle import autograd as triangle_autograd, block as triangle

# The interpreter takes seconds for a step of these; a GPU runs every arm, direction and size.
SMALL = Size(2, 9, 16, 16)
TINY = Size(1, 5, 16, 16)
RAGGED = Size(1, 17, 16, 16)
WHOLE = Size(1, 16, 32, 16)
# (size, mode, recipe, scaling)
CASES = {
    "none, outgoing": (RAGGED, "outgoing", "none", "recipe"),
    "none, incoming": (WHOLE, "incoming", "none", "recipe"),
    "current, outgoing": (WHOLE, "outgoing", "current", "recipe"),
    "delayed, incoming": (RAGGED, "incoming", "delayed", "recipe"),
    "bound, outgoing": (RAGGED, "outgoing", "current", "bound"),
}


def test_in_the_interpreter():
    if IS_INTERPRETED:
        pytest.skip("this is the process that the test starts")
    run_interpreted(os.path.abspath(__file__))


@pytest.fixture
def fused(monkeypatch):
    """CPU tensors take the fused pipeline, in TE's fresh state."""
    give_device_arithmetic(monkeypatch)
    monkeypatch.setattr(triangle, "choose_pipeline", lambda *_, **__: triangle.Pipeline("fused"))
    FP8GlobalStateManager.reset()
    with torch.compiler.set_stance("force_eager"), teb.emulate():
        yield
    FP8GlobalStateManager.reset()


def make_bf16(size, seed=0, **options):
    return make_inputs(size, torch.bfloat16, seed=seed, **options)


def run_fused(block, inputs, recipe=None) -> Result:
    """Forward and backward; the contraction is the first of the products."""
    products = []
    multiply = triangle_autograd.multiply_codes

    def look(*arguments):
        products.append(multiply(*arguments))
        return products[-1]

    names, parameters = zip(*block.named_parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triangle_autograd, "multiply_codes", look)
        with quantized(recipe):
            out = block(inputs.z, inputs.mask)
        grad_z, *grads = torch.autograd.grad(out, (inputs.z, *parameters), inputs.grad_output)
    assert len(products) == 3
    size = inputs.z.shape[1]
    c = products[0][..., :size, :size]
    return Result(out.detach(), c.detach(), grad_z, dict(zip(names, grads)))


@pytest.mark.skipif(not IS_INTERPRETED, reason="runs in a process where Triton interprets")
@pytest.mark.usefixtures("fused")
class TestInterpreted:
    """Everything here is done by the kernels and the reference engine."""

    @pytest.mark.parametrize("size, mode, recipe, scaling", CASES.values(), ids=CASES)
    def test_against_fp64(self, size, mode, recipe, scaling):
        made = RECIPES[recipe]()
        block = make_block(size, mode, params_dtype=torch.bfloat16, scaling=scaling)
        for seed in range(2 if recipe == "delayed" else 1):
            inputs = make_bf16(size, seed)
            result = run_fused(block, inputs, made)
        assert result.out.dtype == result.grad_z.dtype == torch.bfloat16
        plain = PLAIN_DB[torch.bfloat16] if recipe == "none" else None
        assert_close(result, exact_result(block, inputs), plain_db=plain)

    def test_torch_autocast(self, recipe="none", params=torch.float32):
        """FP32 pairs and parameters: LayerNorms read them as they are."""
        block, inputs = make_block(SMALL, params_dtype=params), make_inputs(SMALL)
        with torch.autocast("cpu", torch.bfloat16), quantized(RECIPES[recipe]()):
            out = block(inputs.z, inputs.mask)
        assert out.dtype == torch.bfloat16
        out.backward(inputs.grad_output.bfloat16())
        grads = {name: parameter.grad for name, parameter in block.named_parameters()}
        assert inputs.z.grad.dtype == torch.float32
        assert all(grad.dtype == params for grad in grads.values())
        plain = PLAIN_DB[torch.bfloat16] if recipe == "none" else None
        result = Result(out.detach(), None, inputs.z.grad, grads)
        assert_close(result, exact_result(block, inputs), plain_db=plain)

    @pytest.mark.parametrize("recipe, mode", (("none", "incoming"), ("current", "outgoing")))
    def test_both_pipelines_agree(self, mode, recipe):
        """What is left is how BF16 is rounded on the way, and codes that flip because of it."""
        block, inputs = make_block(SMALL, mode, params_dtype=torch.bfloat16), make_bf16(SMALL)
        made = RECIPES[recipe]()
        with torch.no_grad(), quantized(made):
            fused = block(inputs.z, inputs.mask)
            block.pipeline = "composed"
            composed = block(inputs.z, inputs.mask)
        assert overall_sqnr(fused, composed.double()) > (40 if recipe == "none" else 30)

    def test_mask_of_any_dtype(self, dtype=torch.uint8):
        block, inputs = make_block(SMALL, params_dtype=torch.bfloat16), make_bf16(SMALL)
        with torch.no_grad():
            expected = block(inputs.z, inputs.mask)
            assert torch.equal(block(inputs.z, inputs.mask.to(dtype)), expected)
            assert torch.equal(block(inputs.z), block(inputs.z, torch.ones(9, 9, dtype=dtype)))
            assert not torch.equal(block(inputs.z), expected)

    def test_a_masked_item_contracts_to_zero(self):
        block = make_block(SMALL, bias=False, params_dtype=torch.bfloat16)
        inputs = make_bf16(SMALL)
        with torch.no_grad():
            block.norm_out_bias.zero_()
        inputs.mask[1] = 0
        result = run_fused(block, inputs, Float8CurrentScaling())
        assert not result.c[1].any() and result.c[0].any()
        assert not result.out[1].any() and not result.grad_z[1].any()

    @pytest.mark.parametrize("scaling", triangle.SCALINGS)
    def test_amaxes_of_delayed_scaling(self, scaling):
        """They go into TE's history; a bound records none but that of the gradient."""
        inputs, made = make_bf16(TINY), DelayedScaling()
        blocks = [
            make_block(TINY, params_dtype=torch.bfloat16, scaling=scaling, pipeline=pipeline)
            for pipeline in ("auto", "composed")
        ]
        found = []
        for block in blocks:
            FP8GlobalStateManager.reset()
            with quantized(made):
                out = block(inputs.z, inputs.mask)
            torch.autograd.grad(out, inputs.z, inputs.grad_output)
            found.append(delayed_state(block))
        for name in ("scale_fwd", "scale_bwd"):
            torch.testing.assert_close(found[0][name], found[1][name], rtol=0.02, atol=0)
        is_recorded = scaling == "recipe"
        assert bool((found[0]["scale_fwd"][:2] != 1).all()) == is_recorded
        assert found[0]["scale_bwd"][0] != 1

    def test_what_is_saved(self):
        """Without gradients nothing; with them z, c and codes, of one layout, but no operand in BF16."""
        block, inputs = make_block(SMALL, params_dtype=torch.bfloat16), make_bf16(SMALL)
        calls = []
        project = __import__(
            "transformer_engine_batched.kernels.triangle", fromlist=["project_operands"]
        )
        with pytest.MonkeyPatch.context() as patch:
            original = project.project_operands
            patch.setattr(
                project,
                "project_operands",
                lambda *a, **k: calls.append(k["turned"]) or original(*a, **k),
            )
            with torch.no_grad(), quantized(Float8CurrentScaling()):
                block(inputs.z, inputs.mask)
            with SavedTensors() as saved, quantized(Float8CurrentScaling()):
                block(inputs.z, inputs.mask)
        assert calls == [False, True]
        large = [x for x in saved.tensors if x.dim() == 4]
        shapes = sorted((str(x.dtype)[6:], tuple(x.shape)) for x in large)
        codes = ("uint8", (2, 16, 16, 16))
        assert shapes == sorted(
            [("bfloat16", (2, 16, 16, 16)), ("bfloat16", tuple(inputs.z.shape)), codes, codes]
        )

    def test_frozen_parameters(self):
        inputs, made = make_bf16(TINY), Float8CurrentScaling()
        whole = run_fused(make_block(TINY, params_dtype=torch.bfloat16), inputs, made)
        block = make_block(TINY, params_dtype=torch.bfloat16).requires_grad_(False)
        with quantized(made):
            out = block(inputs.z, inputs.mask)
        (grad,) = torch.autograd.grad(out, inputs.z, inputs.grad_output)
        assert torch.equal(grad, whole.grad_z)
        # Of the output alone: no operand is kept, and no product is made backward.
        block.p_out_weight.requires_grad_()
        with quantized(made):
            out = block(inputs.z.detach(), inputs.mask)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triangle_autograd, "multiply_codes", None)
            out.backward(inputs.grad_output)
        assert torch.equal(block.p_out_weight.grad, whole.grads["p_out_weight"])

    def test_a_retained_graph(self):
        block, inputs = make_block(TINY, params_dtype=torch.bfloat16), make_bf16(TINY)
        with quantized(Float8CurrentScaling()):
            out = block(inputs.z, inputs.mask)
        leaves = (inputs.z, block.p_in_weight)
        first = torch.autograd.grad(out, leaves, inputs.grad_output, retain_graph=True)
        second = torch.autograd.grad(out, leaves, inputs.grad_output)
        assert all(torch.equal(*pair) for pair in zip(first, second))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, leaves, inputs.grad_output)

    def test_double_backward_is_refused(self):
        block, inputs = make_block(TINY, params_dtype=torch.bfloat16), make_bf16(TINY)
        out = block(inputs.z, inputs.mask)
        (grad,) = torch.autograd.grad(out, inputs.z, inputs.grad_output, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            grad.float().square().sum().backward()

    def test_expanded_gradient_and_views(self):
        block = make_block(SMALL, params_dtype=torch.bfloat16)
        wide = torch.randn(1, 9, 9, 32).bfloat16()
        grads = []
        for z in (wide[..., ::2], wide[..., ::2].contiguous()):
            z = z.detach().requires_grad_()
            block(z).sum().backward()
            grads.append(z.grad)
        assert torch.equal(*grads) and grads[0].any()
