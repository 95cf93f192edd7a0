# SPDX-License-Identifier: Apache-2.0
"""`te.TriangleMultiplication` on a GPU: both pipelines against FP64 and each other, memory, graphs, streams."""

from __future__ import annotations

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import sqnr_per_item
from training import RECIPES, delayed_state, quantized
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, Format
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from triangle_reference import (
    PLAIN_DB,
    Result,
    Size,
    assert_close,
    exact_result,
    make_inputs,
    overall_sqnr,
    randomize,
)

import transformer_engine_batched as teb
from transformer_engine_batched.kernels import triangle as kernels
from transformer_engine_batched.triangle import block as triangle, bounds as triangle_bounds
from transformer_engine_batched.triangle.autograd import saved_product

BF16 = torch.bfloat16
# (recipe, scaling)
ARMS = {
    "none": ("none", "recipe"),
    "delayed": ("delayed", "recipe"),
    "current": ("current", "recipe"),
    "bound, delayed": ("delayed", "bound"),
    "bound, current": ("current", "bound"),
}
SIZES = {
    "whole tiles": Size(1, 128, 128, 128),
    "ragged": Size(2, 77, 64, 32),
    "hidden is larger": Size(1, 96, 32, 128),
    "odd channels": Size(2, 61, 48, 80),
    "wide": Size(1, 64, 256, 256),
    "one row": Size(3, 1, 32, 32),
}
MIDDLE = Size(1, 200, 128, 128)


@pytest.fixture(autouse=True)
def fresh():
    """TE's state is that of this test alone."""
    FP8GlobalStateManager.reset()
    yield
    FP8GlobalStateManager.reset()


def make_block(size: Size, mode: str = "outgoing", **options: object) -> te.TriangleMultiplication:
    options = {"bias": True, "device": "cuda", "params_dtype": BF16, **options}
    block = te.TriangleMultiplication(size.dim, size.hidden, mode, **options)
    randomize(block)
    return block


def run_block(block, inputs, recipe=None, fused: bool = True) -> Result:
    """Forward and backward; the contraction is what forward saves of it."""
    names, parameters = zip(*block.named_parameters())
    with quantized(recipe):
        out = block(inputs.z, inputs.mask)
    n = inputs.z.shape[1]
    c = saved_product(out)[..., :n, :n].clone() if fused else None
    grad_z, *grads = torch.autograd.grad(out, (inputs.z, *parameters), inputs.grad_output)
    return Result(out.detach(), c, grad_z, dict(zip(names, grads)))


def make_cuda_inputs(size: Size, dtype=BF16, **options):
    return make_inputs(size, dtype, device="cuda", **options)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("mode", triangle.MODES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_against_fp64(size, mode, arm):
    recipe, scaling = ARMS[arm]
    made, block = RECIPES[recipe](), make_block(size, mode, scaling=scaling)
    for seed in range(2 if recipe == "delayed" else 1):
        inputs = make_cuda_inputs(size, seed=seed)
        result = run_block(block, inputs, made)
    assert result.out.dtype == result.grad_z.dtype == BF16
    expected = exact_result(block, inputs)
    if size.n == 1:  # few elements, all of which may be near their worst
        assert overall_sqnr(result.out, expected.out) > (30 if recipe == "none" else 20)
        return
    assert_close(result, expected, plain_db=PLAIN_DB[BF16] if recipe == "none" else None)


@pytest.mark.parametrize("make", (DelayedScaling, Float8CurrentScaling))
def test_gradients_in_e4m3(make):
    block, recipe, inputs = (
        make_block(MIDDLE),
        make(fp8_format=Format.E4M3),
        make_cuda_inputs(MIDDLE),
    )
    for _ in range(2):
        result = run_block(block, inputs, recipe)
    assert_close(result, exact_result(block, inputs), gradient="e4m3")


@pytest.mark.parametrize("params", (torch.float32, BF16))
@pytest.mark.parametrize("arm", ARMS)
def test_torch_autocast(arm, params):
    recipe, scaling = ARMS[arm]
    size = SIZES["ragged"]
    made = RECIPES[recipe]()
    block = make_block(size, params_dtype=params, scaling=scaling)
    inputs = make_cuda_inputs(size, torch.float32)
    for _ in range(2):
        block.zero_grad()
        inputs.z.grad = None
        with torch.autocast("cuda", BF16), quantized(made):
            out = block(inputs.z, inputs.mask)
        assert out.dtype == BF16
        out.backward(inputs.grad_output.bfloat16())
    grads = {name: parameter.grad for name, parameter in block.named_parameters()}
    assert all(grad.dtype == params for grad in grads.values())
    result = Result(out.detach(), None, inputs.z.grad, grads)
    plain = PLAIN_DB[BF16] if recipe == "none" else None
    assert_close(result, exact_result(block, inputs), plain_db=plain)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", (torch.float32, BF16))
@pytest.mark.parametrize("mode", triangle.MODES)
def test_composed(mode, dtype, recipe):
    size = SIZES["ragged"]
    block = make_block(size, mode, params_dtype=dtype, pipeline="composed")
    made = RECIPES[recipe]()
    with teb.emulate():
        for seed in range(2 if recipe == "delayed" else 1):
            inputs = make_cuda_inputs(size, dtype, seed=seed)
            result = run_block(block, inputs, made, fused=False)
    plain = (100.0 if dtype == torch.float32 else PLAIN_DB[BF16]) if recipe == "none" else None
    assert_close(result, exact_result(block, inputs), plain_db=plain)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("mode", triangle.MODES)
def test_pipelines_and_emulation_agree(mode, arm):
    """What is left is how BF16 is rounded on the way, and codes that flip because of it."""
    recipe, scaling = ARMS[arm]
    size, made, outs = SIZES["ragged"], RECIPES[recipe](), {}
    inputs = make_cuda_inputs(size)
    for name in ("fused", "composed", "emulated"):
        FP8GlobalStateManager.reset()
        pipeline = "fused" if name == "fused" else "composed"
        block = make_block(size, mode, scaling=scaling, pipeline=pipeline)
        with teb.emulate(engine="reference" if name == "emulated" else None):
            for _ in range(2):
                with (
                    torch.no_grad() if recipe != "delayed" else torch.enable_grad(),
                    quantized(made),
                ):
                    out = block(inputs.z, inputs.mask)
        outs[name] = out.detach()
    bound = 40 if recipe == "none" else 30
    assert overall_sqnr(outs["fused"], outs["composed"].double()) > bound
    assert overall_sqnr(outs["emulated"], outs["composed"].double()) > 40


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("mode", triangle.MODES)
def test_kernels_in_cuda_and_in_triton_agree(mode, arm, monkeypatch):
    """Sums in another order turn roundings of BF16, and a few codes with them."""
    recipe, scaling = ARMS[arm]
    results, modules = [], []
    for forms in (kernels._CUDA_FORMS, {}):
        FP8GlobalStateManager.reset()
        monkeypatch.setattr(kernels, "_CUDA_FORMS", forms)
        monkeypatch.setattr(kernels, "_found", {})
        block, made = make_block(MIDDLE, mode, scaling=scaling), RECIPES[recipe]()
        for _ in range(2):
            result = run_block(block, make_cuda_inputs(MIDDLE), made)
        results.append(result)
        modules.append({function.__module__.split(".")[-1] for function in kernels._found.values()})
    assert {"triangle_project", "triangle_output"} <= modules[0]
    assert modules[1] == {"triangle_forward", "triangle_backward"}
    bound = 40 if recipe == "none" else 30
    for name in ("out", "c", "grad_z"):
        mine, other = (getattr(result, name) for result in results)
        assert overall_sqnr(mine, other.double()) > bound, name


def test_scales_are_those_of_the_composed_pipeline():
    inputs, made, found = make_cuda_inputs(MIDDLE), DelayedScaling(), []
    for pipeline in ("fused", "composed"):
        FP8GlobalStateManager.reset()
        block = make_block(MIDDLE, pipeline=pipeline)
        for _ in range(2):
            with quantized(made):
                out = block(inputs.z, inputs.mask)
            torch.autograd.grad(out, inputs.z, inputs.grad_output)
        found.append(delayed_state(block))
    for name in ("scale_fwd", "scale_bwd"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0.05, atol=0)
        assert found[0][name][0] != 1


def test_bound_scales_of_the_kernel():
    for bias in (True, False):
        block = make_block(Size(1, 1, 48, 80), bias=bias, params_dtype=torch.float32)
        weights = (block.norm_in_weight, block.norm_in_bias, block.p_in_weight, block.p_in_bias)
        found = triangle_bounds.bound_scales(*weights, "e4m3")
        torch.testing.assert_close(
            found, 448.0 / triangle_bounds.bound_operands(*weights), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("arm", ARMS)
def test_a_masked_item_contracts_to_zero(arm):
    recipe, scaling = ARMS[arm]
    size = SIZES["ragged"]
    block = make_block(size, bias=False, scaling=scaling)
    with torch.no_grad():
        block.norm_out_bias.zero_()
    inputs = make_cuda_inputs(size)
    inputs.mask[1] = 0
    result = run_block(block, inputs, RECIPES[recipe]())
    assert not result.c[1].any() and result.c[0].any()
    assert not result.out[1].any() and not result.grad_z[1].any()


@pytest.mark.parametrize("arm", ("none", "delayed", "current"))
@pytest.mark.parametrize("mode", triangle.MODES)
def test_memory(mode, arm):
    """Peaks beyond the inputs at N = 2048, where z has 1024 MiB."""
    recipe, scaling = ARMS[arm]
    size, made = Size(1, 2048, 128, 128), RECIPES[recipe]()
    block = make_block(size, mode, bias=False, scaling=scaling)
    z, grad = (torch.randn(1, 2048, 2048, 128, device="cuda", dtype=BF16) for _ in range(2))
    z.requires_grad_()

    def step(backward):
        with quantized(made), torch.set_grad_enabled(backward):
            out = block(z)
        return torch.autograd.grad(out, z, grad) if backward else out

    for backward, bound in ((False, 3100 if recipe == "none" else 2100), (True, 8000)):
        for _ in range(2):
            step(backward)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(backward)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        assert 1024 < peak < bound, (backward, peak)


@pytest.mark.parametrize("recipe", ("none", "current"))
def test_a_retained_graph(recipe):
    block, inputs = make_block(MIDDLE), make_cuda_inputs(MIDDLE)
    with quantized(RECIPES[recipe]()):
        out = block(inputs.z, inputs.mask)
    leaves = (inputs.z, block.p_in_weight)
    first = torch.autograd.grad(out, leaves, inputs.grad_output, retain_graph=True)
    second = torch.autograd.grad(out, leaves, inputs.grad_output)
    assert all(torch.equal(*pair) for pair in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, inputs.grad_output)


@pytest.mark.parametrize("arm", ("none", "current", "bound, current"))
def test_cuda_graph(arm):
    """Captured once, replayed on other data and other weights."""
    recipe, scaling = ARMS[arm]
    made = RECIPES[recipe]()
    block, static = make_block(MIDDLE, scaling=scaling), make_cuda_inputs(MIDDLE)

    def step(inputs):
        with quantized(made):
            out = block(inputs.z, inputs.mask)
        return out, torch.autograd.grad(out, (inputs.z, block.p_in_weight), inputs.grad_output)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = step(static)
    other = make_cuda_inputs(MIDDLE, seed=1)
    with torch.no_grad():
        for mine, new in zip(static, other):
            mine.copy_(new)
        block.p_in_weight.mul_(8.0)
    graph.replay()
    expected, expected_grads = step(other)
    assert torch.equal(out, expected)
    assert all(torch.equal(x, y) for x, y in zip(grads, expected_grads))


@pytest.mark.parametrize("arm", ARMS)
def test_repeatable_and_without_synchronization(arm):
    recipe, scaling = ARMS[arm]
    made = RECIPES[recipe]()
    block, inputs = make_block(MIDDLE, scaling=scaling), make_cuda_inputs(MIDDLE)
    found = [run_block(block, inputs, made) for _ in range(4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found.append(run_block(block, inputs, made))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first, last = found[-2:]
    assert torch.equal(first.out, last.out) and torch.equal(first.grad_z, last.grad_z)
    assert all(torch.equal(first.grads[name], last.grads[name]) for name in first.grads)


def test_training_lowers_a_loss():
    """A block learns another one's output; FP8 as well as BF16, within a tenth."""
    size = Size(2, 64, 32, 32)
    teacher = make_block(size, params_dtype=torch.float32)
    losses = {}
    for arm, (recipe, scaling) in ARMS.items():
        FP8GlobalStateManager.reset()
        torch.manual_seed(0)
        block = te.TriangleMultiplication(
            32, bias=True, scaling=scaling, params_dtype=torch.float32
        )
        optimizer, made = torch.optim.Adam(block.parameters(), lr=3e-3), RECIPES[recipe]()
        for seed in range(60):
            inputs = make_cuda_inputs(size, seed=seed)
            with torch.no_grad():
                target = teacher(inputs.z.float(), inputs.mask)
            with torch.autocast("cuda", BF16), quantized(made):
                out = block(inputs.z, inputs.mask)
            loss = (out.float() - target).square().mean() / target.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[arm] = loss.item()
    assert losses["none"] < 0.8
    assert all(loss < 1.1 * losses["none"] for loss in losses.values()), losses


def test_worst_slice_at_ragged_sizes():
    for n in (15, 16, 17, 127, 129, 389):
        size = Size(1, n, 64, 64)
        block, inputs = make_block(size), make_cuda_inputs(size)
        result = run_block(block, inputs, Float8CurrentScaling())
        assert sqnr_per_item(result.c, exact_result(block, inputs).c).min() > 25.0


def test_on_another_stream_and_device_index():
    block, inputs = make_block(MIDDLE), make_cuda_inputs(MIDDLE)
    expected = run_block(block, inputs, Float8CurrentScaling())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run_block(block, inputs, Float8CurrentScaling())
    stream.synchronize()
    assert torch.equal(found.out, expected.out) and torch.equal(found.grad_z, expected.grad_z)
