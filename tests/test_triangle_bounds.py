# SPDX-License-Identifier: Apache-2.0
"""The scales that the triangle block takes from its weights: never exceeded, and nearly as good as an amax."""

from __future__ import annotations

import os

import pytest
import torch
from accuracy import random_values
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import IS_INTERPRETED, run_interpreted
from test_triangle import make_block, run_block
from training import quantized
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, Format
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from triangle_reference import Size, assert_close, exact_result, make_inputs, overall_sqnr

import transformer_engine_batched as teb
from transformer_engine_batched.triangle import block as triangle, bounds as triangle_bounds

SIZE = Size(1, 48, 32, 32)


@pytest.fixture(autouse=True)
def emulated_and_fresh():
    """Inside `emulate()`, without TE's state of other tests; TE compiles its update of scales otherwise."""
    FP8GlobalStateManager.reset()
    with torch.compiler.set_stance("force_eager"), teb.emulate():
        yield
    FP8GlobalStateManager.reset()


def make_weights(dim, hidden, seed, spread, bias):
    """(gamma, beta, weight, bias): as far from their usual values as `spread` says."""
    gamma = 1 + spread * random_values((dim,), seed)
    beta = spread * random_values((dim,), seed + 1)
    weight = (
        random_values((2 * hidden, dim), seed + 2)
        * (spread * random_values((2 * hidden, 1), seed + 3)).exp()
    )
    return gamma, beta, weight, spread * random_values((2 * hidden,), seed + 4) if bias else None


def largest_operands(z, weights, dtype):
    """Largest |a| and |b| in the arithmetic of a dtype, with every gate open as far as it goes."""
    gamma, beta, weight, bias = weights
    x = torch.nn.functional.layer_norm(z.float(), gamma.shape, gamma, beta).to(dtype)
    p = torch.nn.functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    return p.float().abs().view(-1, 2, weight.shape[0] // 2).amax(dim=(0, 2))


@settings(max_examples=150)
@given(
    st.sampled_from((1, 2, 5, 16, 33)),
    st.sampled_from((1, 3, 16)),
    st.integers(0, 10**6),
    st.sampled_from((0.0, 0.3, 2.0)),
    st.booleans(),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    st.sampled_from(("normal", "worst", "one hot", "huge", "tiny")),
)
def test_no_data_exceeds_the_bound(dim, hidden, seed, spread, bias, dtype, kind):
    weights = make_weights(dim, hidden, seed, spread, bias)
    z = random_values((32, dim), seed + 9)
    if kind == "worst":
        # Parallel to the weights of each row as the LayerNorm passes them, with both signs.
        rows = weights[2] * weights[0]
        z = torch.cat((rows, -rows))
    elif kind == "one hot":
        z = torch.eye(dim) * 1e3
    elif kind != "normal":
        z = z * (1e15 if kind == "huge" else 1e-15)
    bound = triangle_bounds.bound_operands(*weights)
    found = largest_operands(z, weights, dtype)
    assert (found <= bound).all(), (found, bound)


def test_the_bound_is_met():
    """It cannot be made smaller but by its room for rounding, and by the mean that a LayerNorm takes out."""
    dim, hidden = 64, 16
    gamma, beta, weight, bias = make_weights(dim, hidden, 3, 0.0, False)
    weight = weight - weight.mean(dim=1, keepdim=True)
    weights = (gamma, beta, weight, bias)
    found = largest_operands(1e3 * weight, weights, torch.float32)
    bound = triangle_bounds.bound_operands(*weights)
    assert (found > 0.98 * bound).all() and (found <= bound).all()


def test_scales_of_degenerate_weights():
    ones, zeros = torch.ones(4), torch.zeros(4)
    weight = torch.ones(4, 4)

    def scales(weight):
        return triangle_bounds.bound_scales(ones, zeros, weight, None, "e4m3")

    assert torch.equal(scales(0 * weight), torch.ones(2))
    weight[0, 0] = torch.inf
    weight[3, 2] = torch.nan
    assert torch.equal(scales(weight), torch.ones(2))
    weight[3, 2] = 1.0
    assert scales(weight)[0] == 1 and scales(weight)[1] == pytest.approx(448 / (4 * (1 + 2**-6)))


@pytest.mark.parametrize("make", (DelayedScaling, Float8CurrentScaling))
@pytest.mark.parametrize("mode", triangle.MODES)
def test_block_against_fp64(mode, make):
    recipe, inputs = make(fp8_format=Format.E4M3), make_inputs(SIZE)
    block = make_block(SIZE, mode, scaling="bound")
    if make is DelayedScaling:
        run_block(block, inputs, recipe)  # the gradient has a history of its own
    assert_close(run_block(block, inputs, recipe), exact_result(block, inputs), gradient="e4m3")


def test_close_to_the_exact_amax():
    """SQNR within 0.3 dB of current scaling's, although the bound is a few times wider than the data."""
    inputs = make_inputs(SIZE)
    recipe = Float8CurrentScaling()
    blocks = {name: make_block(SIZE, scaling=name) for name in triangle.SCALINGS}
    expected = exact_result(blocks["bound"], inputs).c
    found = {
        name: overall_sqnr(run_block(block, inputs, recipe).c, expected)
        for name, block in blocks.items()
    }
    assert abs(found["bound"] - found["recipe"]) < 0.3
    block = blocks["bound"]
    weights = (block.norm_in_weight, block.norm_in_bias, block.p_in_weight, block.p_in_bias)
    bound = triangle_bounds.bound_operands(*weights)
    amaxes = largest_operands(inputs.z.detach().reshape(-1, SIZE.dim), weights, torch.float32)
    assert (amaxes < bound).all() and (amaxes > bound / 8).all()


def test_it_does_not_depend_on_the_data_before():
    """Delayed scaling saturates on data ten times larger than its history; a bound knows nothing of it."""
    small = make_inputs(SIZE)
    with torch.no_grad():
        small.mask.mul_(2.0**-6)  # as if the gates had been nearly shut
    large = make_inputs(SIZE, seed=1)
    found = {}
    for scaling in triangle.SCALINGS:
        FP8GlobalStateManager.reset()
        block, recipe = make_block(SIZE, scaling=scaling), DelayedScaling()
        for _ in range(2):
            run_block(block, small, recipe)
        found[scaling] = overall_sqnr(
            run_block(block, large, recipe).c, exact_result(block, large).c
        )
    assert found["bound"] > 27.5 and found["recipe"] < 15


def test_changed_weights_change_the_scale():
    """Also by ways that no version counter sees, as some optimizers take."""
    block, inputs, recipe = (
        make_block(SIZE, scaling="bound"),
        make_inputs(SIZE),
        Float8CurrentScaling(),
    )
    for factor in (1.0, 64.0):
        block.p_in_weight.data.mul_(factor)
        with torch.no_grad(), quantized(recipe):
            out = block(inputs.z, inputs.mask)
        expected = exact_result(block, inputs).out
        assert overall_sqnr(out, expected) > 27


def test_no_effect_without_a_recipe():
    inputs = make_inputs(SIZE)
    outs = [make_block(SIZE, scaling=name)(inputs.z, inputs.mask) for name in triangle.SCALINGS]
    assert torch.equal(*outs)


def test_the_kernel_in_the_interpreter():
    if IS_INTERPRETED:
        pytest.skip("this is the process that the test starts")
    run_interpreted(os.path.abspath(__file__))


@pytest.mark.skipif(not IS_INTERPRETED, reason="runs in a process where Triton interprets")
class TestInterpreted:
    """The kernel against the torch operations of `bound_operands`."""

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("bias", (True, False))
    @pytest.mark.parametrize("dim, hidden", ((16, 16), (48, 40), (130, 3)))
    def test_same_scales(self, dim, hidden, bias, dtype):
        weights = [
            None if x is None else x.to(dtype) for x in make_weights(dim, hidden, 5, 0.5, bias)
        ]
        assert_kernel_agrees(weights)

    @pytest.mark.parametrize("value", (torch.nan, torch.inf))
    def test_weights_that_are_not_finite(self, value):
        gamma, beta, weight, _ = make_weights(16, 64, 5, 0.5, False)
        weight[40, 3] = value
        scales = assert_kernel_agrees((gamma, beta, weight, None))
        assert scales[0] == 1 and scales[1] != 1


def assert_kernel_agrees(weights):
    from transformer_engine_batched.kernels import triangle_bounds as kernel

    found = kernel.find_scales(
        *weights, triangle_bounds._ROUNDING, triangle_bounds._CANCELLATION, 448.0
    )
    expected = triangle_bounds.bound_scales(*weights, "e4m3")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    return found
