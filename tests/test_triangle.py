# SPDX-License-Identifier: Apache-2.0
"""Values of `te.TriangleMultiplication`, emulated on the CPU, against FP64, and how it behaves in contexts.

The fused pipeline's kernels and its autograd function have tests of their own.
"""

from __future__ import annotations

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import random_values
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from training import RECIPES, STATELESS, quantized
from transformer_engine.common.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    MXFP8BlockScaling,
)
from transformer_engine.pytorch import distributed
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from triangle_reference import (
    PLAIN_DB,
    SIZES,
    Inputs,
    Result,
    Size,
    assert_close,
    exact_result,
    make_inputs,
    overall_sqnr,
    randomize,
)

import transformer_engine_batched as teb
from transformer_engine_batched.triangle import block as triangle
from transformer_engine_batched.support import CPU, Device

GRADIENT_FORMATS = {"delayed": "e5m2", "current": "e5m2", "mxfp8": "e4m3", "block": "e4m3"}
SMALL = Size(2, 19, 16, 16)
HOPPER = Device("NVIDIA H200", (9, 0), 130100)


@pytest.fixture(autouse=True)
def emulated_and_fresh():
    """Inside `emulate()`, without TE's state of other tests; TE compiles its update of scales otherwise."""
    FP8GlobalStateManager.reset()
    with torch.compiler.set_stance("force_eager"), teb.emulate():
        yield
    FP8GlobalStateManager.reset()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The products are small: threads would only wait for each other on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def make_block(size: Size, mode: str = "outgoing", **options: object) -> te.TriangleMultiplication:
    """A block as if trained, with biases unless told."""
    options = {"bias": True, "device": "cpu", **options}
    block = te.TriangleMultiplication(size.dim, size.hidden, mode, **options)
    randomize(block)
    return block


def run_block(block: te.TriangleMultiplication, inputs: Inputs, recipe: object = None) -> Result:
    """Forward under the recipe, backward outside of the region; the contraction is looked at on its way."""
    seen = []
    contract = triangle.contract

    def look(*arguments):
        seen.append(contract(*arguments))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, quantized(recipe):
        patch.setattr(triangle, "contract", look)
        out = block(inputs.z, inputs.mask)
    names, parameters = zip(*block.named_parameters())
    grad_z, *grads = torch.autograd.grad(out, (inputs.z, *parameters), inputs.grad_output)
    (c,) = seen
    return Result(out.detach(), c.detach().movedim(-1, 1), grad_z, dict(zip(names, grads)))


# --- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", triangle.MODES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_against_fp64(size, mode, recipe, dtype):
    block, made = make_block(size, mode, params_dtype=dtype), RECIPES[recipe]()
    # The first step of delayed scaling has an empty history, the second a scale.
    for seed in range(2 if recipe == "delayed" else 1):
        inputs = make_inputs(size, dtype, seed=seed)
        result = run_block(block, inputs, made)
    assert result.out.dtype == dtype and result.grad_z.dtype == dtype
    plain = PLAIN_DB[dtype] if recipe == "none" else None
    expected = exact_result(block, inputs)
    assert_close(result, expected, plain_db=plain, gradient=GRADIENT_FORMATS.get(recipe, "e5m2"))
    # Nothing of the reference says zero.
    assert expected.out.abs().mean() > 0.1 and expected.grad_z.abs().mean() > 0.1


@pytest.mark.parametrize("make", (DelayedScaling, Float8CurrentScaling))
@pytest.mark.parametrize("mode", triangle.MODES)
def test_gradients_in_e4m3(mode, make):
    size = SIZES["ragged"]
    block, recipe, inputs = make_block(size, mode), make(fp8_format=Format.E4M3), make_inputs(size)
    for _ in range(2):
        result = run_block(block, inputs, recipe)
    assert_close(result, exact_result(block, inputs), gradient="e4m3")


@pytest.mark.parametrize("mode", triangle.MODES)
def test_fp16(mode):
    size = SIZES["ragged"]
    block, inputs = make_block(size, mode), make_inputs(size, torch.float16)
    result = run_block(block, inputs)
    assert result.out.dtype == torch.float16
    assert_close(result, exact_result(block, inputs), plain_db=PLAIN_DB[torch.float16])


@pytest.mark.parametrize("recipe", ("none", "current"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
def test_torch_autocast(dtype, recipe):
    size = SIZES["ragged"]
    block, inputs = make_block(size), make_inputs(size)
    with torch.autocast("cpu", dtype):
        with quantized(RECIPES[recipe]()):
            out = block(inputs.z, inputs.mask)
    assert out.dtype == dtype
    (grad,) = torch.autograd.grad(out, inputs.z, inputs.grad_output.to(dtype))
    assert grad.dtype == torch.float32
    found = overall_sqnr(out, exact_result(block, inputs).out)
    assert found >= (PLAIN_DB[dtype] if recipe == "none" else 27.5)


@pytest.mark.parametrize("mode", triangle.MODES)
def test_without_biases(mode):
    block, inputs = make_block(SMALL, mode, bias=False), make_inputs(SMALL)
    assert not [
        name for name, _ in block.named_parameters() if name[:2] in "p_g_" and "bias" in name
    ]
    assert_close(
        run_block(block, inputs), exact_result(block, inputs), plain_db=PLAIN_DB[torch.float32]
    )


def test_eps_is_used():
    inputs = make_inputs(SMALL)
    inputs = inputs._replace(z=(1e-2 * inputs.z.detach()).requires_grad_())
    block, other = make_block(SMALL, eps=1e-3), make_block(SMALL)
    result = run_block(block, inputs)
    assert_close(result, exact_result(block, inputs), plain_db=PLAIN_DB[torch.float32])
    assert overall_sqnr(other(inputs.z, inputs.mask), result.out.double()) < 10


def test_modes_differ():
    inputs = make_inputs(SMALL)
    results = [run_block(make_block(SMALL, mode), inputs).c for mode in triangle.MODES]
    assert overall_sqnr(results[0], results[1].double()) < 1


# --- masks and shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.bool, torch.uint8, torch.float32, torch.bfloat16))
def test_mask_of_any_dtype(dtype):
    block, inputs = make_block(SMALL), make_inputs(SMALL)
    expected = block(inputs.z, inputs.mask)
    assert torch.equal(block(inputs.z, inputs.mask.to(dtype)), expected)
    assert not torch.equal(block(inputs.z), expected)


def test_no_mask_is_a_mask_of_ones():
    block, inputs = make_block(SMALL), make_inputs(SMALL, masked=False)
    assert torch.equal(block(inputs.z), block(inputs.z, torch.ones(2, 19, 19)))
    assert torch.equal(block(inputs.z), block(inputs.z, torch.ones(19, 1)))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", triangle.MODES)
def test_a_masked_item_contracts_to_zero(mode, recipe):
    block, inputs = make_block(SMALL, mode, bias=False), make_inputs(SMALL)
    with torch.no_grad():
        block.norm_out_bias.zero_()
    inputs.mask[1] = 0
    result = run_block(block, inputs, RECIPES[recipe]())
    assert not result.c[1].any() and result.c[0].any()
    # LN(0) = 0, so that nothing comes out either.
    assert not result.out[1].any() and not result.grad_z[1].any()


@pytest.mark.parametrize("mode", triangle.MODES)
def test_what_is_masked_does_not_count(mode):
    """Rows k that are masked for all pairs leave every other pair's sums alone."""
    block, inputs = make_block(SMALL, mode), make_inputs(SMALL)
    with torch.no_grad():
        inputs.mask[:, 5] = 0
        inputs.mask[:, :, 5] = 0
        other = inputs.z.detach().clone()
        other[:, 5] += 1
        other[:, :, 5] -= 2
    kept = [i for i in range(19) if i != 5]
    first, second = (block(z, inputs.mask)[:, kept][:, :, kept] for z in (inputs.z, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("lead", ((), (3,), (2, 3)), ids=str)
def test_leading_dims(lead):
    block = make_block(SMALL)
    z, mask = random_values((*lead, 7, 7, 16), 0), random_values((*lead, 7, 7), 1) > -1
    out = block(z, mask)
    assert out.shape == z.shape
    items = [block(x, m) for x, m in zip(z.view(-1, 7, 7, 16), mask.view(-1, 7, 7))]
    torch.testing.assert_close(out.view(-1, 7, 7, 16), torch.stack(items), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ((0, 7, 7, 16), (2, 0, 0, 16)), ids=str)
@pytest.mark.parametrize("recipe", ("none", "delayed", "current"))
def test_empty(shape, recipe):
    block, z = make_block(SMALL), torch.zeros(shape, requires_grad=True)
    with quantized(RECIPES[recipe]()):
        out = block(z, torch.ones(shape[:-1]))
    assert out.shape == shape
    out.sum().backward()
    assert z.grad.shape == shape and not block.p_in_weight.grad.any()


def test_views():
    block = make_block(SMALL)
    wide = random_values((2, 19, 19, 32), 0)
    for z in (wide[..., ::2], wide[..., 8:24], wide[..., :16].transpose(1, 2)):
        assert torch.equal(block(z), block(z.contiguous()))


# --- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ("none", "current"))
def test_frozen_parameters(recipe):
    inputs = make_inputs(SMALL)
    whole = run_block(make_block(SMALL), inputs, RECIPES[recipe]())
    block = make_block(SMALL).requires_grad_(False)
    block.g_out_weight.requires_grad_()
    with quantized(RECIPES[recipe]()):
        out = block(inputs.z, inputs.mask)
    out.backward(inputs.grad_output)
    torch.testing.assert_close(inputs.z.grad, whole.grad_z)
    torch.testing.assert_close(block.g_out_weight.grad, whole.grads["g_out_weight"])
    inputs.z.grad = None
    assert all(p.grad is None for n, p in block.named_parameters() if n != "g_out_weight")


def test_parameters_alone():
    inputs = make_inputs(SMALL)
    whole = run_block(make_block(SMALL), inputs, RECIPES["current"]())
    block = make_block(SMALL)
    with quantized(RECIPES["current"]()):
        out = block(inputs.z.detach(), inputs.mask)
    out.backward(inputs.grad_output)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, whole.grads[name])


@pytest.mark.parametrize("recipe", ("none", *STATELESS))
def test_inference_is_training_without_gradients(recipe):
    block, inputs = make_block(SMALL), make_inputs(SMALL)
    made = RECIPES[recipe]()
    expected = run_block(block, inputs, made).out
    for context in (torch.no_grad, torch.inference_mode):
        with context(), quantized(made):
            out = block(inputs.z, inputs.mask)
        assert torch.equal(out, expected) and not out.requires_grad


@pytest.mark.parametrize("recipe", ("current", "none"))
def test_double_backward_is_refused(recipe):
    block, inputs = make_block(SMALL), make_inputs(SMALL)
    with quantized(RECIPES[recipe]()):
        out = block(inputs.z, inputs.mask)
    (grad,) = torch.autograd.grad(out, inputs.z, inputs.grad_output, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.square().sum().backward()


@pytest.fixture
def checkpoint_on_cpu(monkeypatch):
    """te.checkpoint keeps the state of CUDA's random numbers; there is none here."""
    monkeypatch.setattr(distributed, "_get_cuda_rng_state", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "_set_cuda_rng_state", lambda *_, **__: None)


def train(call) -> list[torch.Tensor]:
    """Outputs and gradients of three steps; `call(block, z, mask)` is the forward."""
    FP8GlobalStateManager.reset()
    block, found = make_block(SMALL), []
    for seed in range(3):
        inputs = make_inputs(SMALL, seed=seed)
        out = call(block, inputs.z, inputs.mask)
        block.zero_grad()
        out.backward(inputs.grad_output)
        found += [out.detach(), inputs.z.grad, block.p_in_weight.grad, block.norm_out_bias.grad]
    return found


def assert_same_training(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("recipe", ("none", *STATELESS))
def test_torch_checkpoint(recipe, use_reentrant):
    made = RECIPES[recipe]()

    def call(block, z, mask):
        with quantized(made):
            return block(z, mask)

    def checkpointed(*arguments):
        return torch_checkpoint(call, *arguments, use_reentrant=use_reentrant)

    assert_same_training(train(call), train(checkpointed))


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("recipe", ("delayed", "current"))
def test_te_checkpoint(recipe, use_reentrant, checkpoint_on_cpu):
    # TE's checkpoint moves the history on by one more row; the maximum of a long one does not see it.
    made = DelayedScaling(amax_history_len=32) if recipe == "delayed" else RECIPES[recipe]()

    def call(block, z, mask):
        with quantized(made):
            return block(z, mask)

    def checkpointed(block, z, mask):
        with quantized(made):
            return te.checkpoint(block, z, mask, use_reentrant=use_reentrant)

    assert_same_training(train(call), train(checkpointed))


def test_calibration():
    """Amaxes are recorded while the block stays in high precision."""
    block, inputs, recipe = make_block(SMALL), make_inputs(SMALL), DelayedScaling()
    with te.autocast(enabled=False, calibrating=True, recipe=recipe):
        plain = block(inputs.z, inputs.mask)
    assert torch.equal(plain, block(inputs.z, inputs.mask))
    found = block.fp8_meta["scaling_fwd"].amax_history[0]
    x = torch.nn.functional.layer_norm(inputs.z, (16,), block.norm_in_weight, block.norm_in_bias)
    gate = torch.sigmoid(x @ block.g_in_weight.T + block.g_in_bias)
    gated = inputs.mask[..., None] * gate * (x @ block.p_in_weight.T + block.p_in_bias)
    for amax, operand in zip(found, gated.chunk(2, dim=-1)):
        torch.testing.assert_close(amax, operand.abs().max().detach())


@pytest.mark.parametrize("scaling", triangle.SCALINGS)
def test_accumulates_into_grad_and_retains(scaling):
    block, inputs = make_block(SMALL, scaling=scaling), make_inputs(SMALL)
    with quantized(Float8CurrentScaling()):
        out = block(inputs.z, inputs.mask)
    out.backward(inputs.grad_output, retain_graph=True)
    once = block.p_in_weight.grad.clone()
    out.backward(inputs.grad_output)
    assert torch.equal(block.p_in_weight.grad, 2 * once)


# --- choice of the pipeline -----------------------------------------------------------------------------


def test_pipeline_table():
    def choose(device=HOPPER, dtype=torch.bfloat16, recipe=None, dim=128, hidden=128, **state):
        return triangle.choose_pipeline(device, dtype, recipe, dim, hidden, **state)

    for recipe in (None, DelayedScaling(), Float8CurrentScaling()):
        assert choose(recipe=recipe) == ("fused", "")
    assert choose(device=Device("NVIDIA B200", (10, 0), 130100)).name == "fused"
    for expected, options in (
        ("CPU is no CUDA device", {"device": CPU}),
        (
            "NVIDIA L4 is no CUDA device of capability 9.0",
            {"device": Device("NVIDIA L4", (8, 9), 130100)},
        ),
        ("compute in BF16, not fp32", {"dtype": torch.float32}),
        ("MXFP8BlockScaling has no scale per tensor", {"recipe": MXFP8BlockScaling()}),
        ("dim = 24 is no multiple", {"dim": 24}),
        ("hidden = 512 is no multiple", {"hidden": 512}),
        ("calibration", {"is_calibrating": True}),
        ("share their amaxes", {"shares_amaxes": True}),
        ('emulate\\(engine="reference"\\)', {"force_reference": True}),
    ):
        found = choose(**options)
        assert found.name == "composed"
        with pytest.raises(AssertionError, match=expected):
            raise AssertionError(found.reason)


def test_a_pipeline_asked_for_is_not_replaced():
    block = make_block(SMALL, pipeline="fused")
    with pytest.raises(
        teb.UnsupportedError, match='pipeline="fused" was asked for, but CPU is no CUDA'
    ):
        block(make_inputs(SMALL).z)


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((16, 16, "sideways"), {}, "mode='sideways': expected one of outgoing, incoming"),
        ((16,), {"scaling": "none"}, "scaling='none': expected one of recipe, bound"),
        ((16,), {"init": "zero"}, "init='zero': expected one of alphafold, normal"),
        ((16,), {"pipeline": "fast"}, "pipeline='fast': expected one of auto, fused, composed"),
        ((0,), {}, "dim=0: expected an integer of at least 1"),
        ((16, 1.5), {}, "hidden=1.5: expected an integer"),
    ],
)
def test_bad_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        te.TriangleMultiplication(*arguments, device="cpu", **options)


@pytest.mark.parametrize(
    "z, mask, error, message",
    [
        (torch.zeros(1, 4, 4, 8), None, ValueError, r"expected \[\*batch, N, N, 16\], got \[1, 4, 4, 8\]"),
        (torch.zeros(1, 4, 5, 16), None, ValueError, "is square"),
        (torch.zeros(4, 16), None, ValueError, r"got \[4, 16\]"),
        (torch.zeros(1, 4, 4, 16).long(), None, TypeError, "got torch.int64"),
        ([1.0], None, TypeError, "got list"),
        (torch.zeros(1, 4, 4, 16), torch.ones(1, 4, 4, 1), ValueError, r"mask: expected \[1, 4, 4\].*got \[1, 4, 4, 1\]"),
        (torch.zeros(1, 4, 4, 16), torch.ones(2, 4, 4), ValueError, r"mask: expected \[1, 4, 4\]"),
        (torch.zeros(1, 4, 4, 16, device="meta"), None, ValueError, "z is on meta, the parameters are on cpu"),
        (torch.zeros(1, 4, 4, 16), torch.ones(1, 4, 4).requires_grad_(), ValueError, "mask requires grad"),
    ],
)  # fmt: skip
def test_bad_inputs(z, mask, error, message):
    with pytest.raises(error, match=message):
        make_block(SMALL)(z, mask)


@pytest.mark.parametrize("make", (MXFP8BlockScaling, Float8BlockScaling))
def test_a_bound_is_one_scale_per_tensor(make):
    block, inputs = make_block(SMALL, scaling="bound"), make_inputs(SMALL)
    message = f'scaling="bound" under {make.__name__}: a bound gives one scale per tensor'
    with pytest.raises(teb.UnsupportedError, match=message):
        with quantized(make()):
            block(inputs.z, inputs.mask)
    # The module is usable after an error.
    assert block(inputs.z, inputs.mask).isfinite().all()
