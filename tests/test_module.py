# SPDX-License-Identifier: Apache-2.0
"""Values of `te.BatchedMatmul` and of the differentiable `teb.bmm`, emulated on the CPU, against FP64.

Also what is quantized and saved for it, and how it behaves inside torch's and TE's contexts.
"""

from __future__ import annotations

import threading

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import assert_accurate, dequantize, make_quantizer, random_values
from torch.utils.checkpoint import CheckpointError
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import set_checkpoint_early_stop
from training import (
    CASES,
    DTYPES,
    EMPTY_CASES,
    FORWARD_BOUND_DB,
    GRADIENT_BOUNDS_DB,
    QUANTIZED,
    RECIPES,
    STATELESS,
    Case,
    Data,
    QuantizeCalls,
    SavedTensors,
    Step,
    assert_same_step,
    assert_step_accurate,
    delayed_state,
    exact_step,
    make_data,
    quantized,
    run_step,
    train,
)
from transformer_engine.common.recipe import (
    DelayedScaling,
    Float8CurrentScaling,
    Format,
    MMParams,
)
from transformer_engine.pytorch import distributed
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

import transformer_engine_batched as teb
from transformer_engine_batched import autograd, quantized_operand

PLAIN = CASES["plain"]
# Sizes of whole MXFP8 blocks, so that nothing is padded.
BLOCKS = Case((2, 32, 64), (2, 64, 96))


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


# --- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_fp64(case, recipe, dtype):
    module, made = te.BatchedMatmul(), RECIPES[recipe]()
    # The first step of delayed scaling has an empty history, the third a scale of two amaxes.
    for seed in range(3 if recipe == "delayed" else 1):
        data = make_data(case, dtype, seed=seed)
        assert_step_accurate(run_step(module, data, made), data, recipe)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("recipe", ("none", *STATELESS))
@pytest.mark.parametrize(
    "name", ("plain", "both.mT", "each repeats the other", "ragged", "vector by matrix")
)
def test_bmm_is_the_module(name, recipe, dtype):
    data, made = make_data(CASES[name], dtype), RECIPES[recipe]()
    assert_same_step(run_step(teb.bmm, data, made), run_step(te.BatchedMatmul(), data, made))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", EMPTY_CASES.values(), ids=EMPTY_CASES)
def test_empty(case, recipe):
    data = make_data(case)
    step = run_step(te.BatchedMatmul(), data, RECIPES[recipe]())
    for result, exact in zip(step, exact_step(data)):
        assert result.shape == exact.shape and result.dtype == torch.float32
        assert not result.any() and not exact.any()


def test_an_empty_step_leaves_the_scales_alone():
    module, recipe = te.BatchedMatmul(), RECIPES["delayed"]()
    run_step(module, make_data(PLAIN), recipe)
    before = delayed_state(module)
    run_step(module, make_data(EMPTY_CASES["no items"]), recipe)
    after = delayed_state(module)
    assert torch.equal(before["scale_fwd"], after["scale_fwd"])
    assert torch.equal(before["scale_bwd"], after["scale_bwd"])


def test_delayed_scales_are_those_of_the_step_before():
    module, recipe = te.BatchedMatmul(), DelayedScaling(amax_history_len=2, margin=1)
    amaxes = []
    for step in range(5):
        data = make_data(PLAIN, seed=step)
        # Magnitudes go up and down, so that an amax that leaves the history shows.
        data = Data(*(x.detach() * 2.0 ** (-1) ** step for x in data))
        data = Data(data.a.requires_grad_(), data.b.requires_grad_(), data.grad_output)
        with quantized(recipe):
            out = module(data.a, data.b)
        out.backward(data.grad_output)
        amaxes.append([x.detach().abs().max().item() for x in data])
        # TE keeps one row for the step to come.
        expected = (
            torch.tensor([448.0, 448.0, 57344.0]) / 2 / torch.tensor(amaxes[-2:]).max(0).values
        )
        state = delayed_state(module)
        found = torch.cat([state["scale_fwd"][:2], state["scale_bwd"][:1]])
        torch.testing.assert_close(found, expected, rtol=2e-7, atol=0.0)


def test_a_spoiled_scale_shows():
    """The bounds bite: a scale that loses the low bits is seen in output and gradients."""
    module, recipe = te.BatchedMatmul(), RECIPES["delayed"]()
    run_step(module, make_data(PLAIN), recipe)
    module.fp8_meta["scaling_fwd"].scale[0] = 2.0**-6
    data = make_data(PLAIN, seed=1)
    with pytest.raises(AssertionError, match="out: .* dB, expected"):
        assert_step_accurate(run_step(module, data, recipe), data, "delayed")


@pytest.mark.parametrize("recipe", (DelayedScaling, Float8CurrentScaling))
def test_e4m3_gradients_are_more_exact(recipe):
    data = make_data(PLAIN)
    step = run_step(te.BatchedMatmul(), data, recipe(fp8_format=Format.E4M3))
    # The bounds of MXFP8 are those of E4M3 everywhere.
    assert_step_accurate(step, data, "mxfp8")
    with pytest.raises(AssertionError, match="grad_a: .* dB, expected"):
        assert_step_accurate(run_step(te.BatchedMatmul(), data, recipe()), data, "mxfp8")


def test_power_of_two_scales_are_the_recipe_s():
    recipe = Float8CurrentScaling(use_power_2_scales=True)
    for params in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        setattr(recipe, params, type(getattr(recipe, params))(power_2_scale=True))
    data = make_data(PLAIN)
    with SavedTensors() as saved, quantized(recipe):
        te.BatchedMatmul()(data.a, data.b)
    scales = [x for x in saved.tensors if x.dtype == torch.float32]
    assert len(scales) == 2
    for scale in scales:
        assert (scale.view(torch.int32) & 0x7FFFFF == 0).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_module_is_one_product_for_many_shapes(recipe):
    module, made = te.BatchedMatmul(), RECIPES[recipe]()
    for name in ("plain", "ragged", "b has no batch", "vectors", "plain"):
        data = make_data(CASES[name])
        assert_step_accurate(run_step(module, data, made), data, recipe)


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_forced_reference_engine_gives_the_same(recipe):
    data, made = make_data(PLAIN, torch.bfloat16), RECIPES[recipe]()
    usual = run_step(te.BatchedMatmul(), data, made)
    with teb.emulate(engine="reference"):
        assert_same_step(usual, run_step(te.BatchedMatmul(), data, made))


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_operands_of_two_dtypes(recipe):
    data = make_data(PLAIN)
    data = Data(data.a.detach().bfloat16().requires_grad_(), data.b, data.grad_output.bfloat16())
    step = run_step(te.BatchedMatmul(), data, RECIPES[recipe]())
    assert [x.dtype for x in step] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert_step_accurate(step, data, recipe)


# --- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", ((True, False), (False, True), (False, False)))
@pytest.mark.parametrize("recipe", RECIPES)
def test_none_for_inputs_that_need_no_gradient(recipe, requires_grad):
    data = make_data(PLAIN, requires_grad=requires_grad)
    with quantized(made := RECIPES[recipe]()):
        out = te.BatchedMatmul()(data.a, data.b)
    assert out.requires_grad == any(requires_grad)
    if any(requires_grad):
        out.backward(data.grad_output)
    assert [x.grad is not None for x in data[:2]] == list(requires_grad)
    step = run_step(te.BatchedMatmul(), data, made)
    assert_step_accurate(step, data, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ("plain", "b has no batch", "both expanded", "ragged"))
def test_sum_backward(name, recipe):
    """Backward of a sum gives an expanded gradient, all of whose strides are 0."""
    data = make_data(CASES[name])
    data = data._replace(grad_output=torch.ones(1).expand_as(data.grad_output))
    module, made = te.BatchedMatmul(), RECIPES[recipe]()
    with quantized(made):
        out = module(data.a, data.b)
    out.sum().backward()
    assert_step_accurate(Step(out.detach(), data.a.grad, data.b.grad), data, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "view",
    (lambda g: g.mT.contiguous().mT, lambda g: g[:1].expand_as(g), lambda g: torch.cat([g, g], -1)[..., ::2]),
    ids=("transposed", "repeated", "interleaved"),
)  # fmt: skip
def test_views_as_gradients(view, recipe):
    data = make_data(PLAIN)
    data = data._replace(grad_output=view(data.grad_output))
    assert_step_accurate(run_step(te.BatchedMatmul(), data, RECIPES[recipe]()), data, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_accumulate(recipe):
    made = RECIPES[recipe]()
    a, b, _ = make_data(PLAIN)
    batches = [Data(a, b, make_data(PLAIN, seed=seed).grad_output) for seed in range(2)]
    apart = train(te.BatchedMatmul(), made, batches).steps
    FP8GlobalStateManager.reset()
    module = te.BatchedMatmul()
    for data in batches:
        with quantized(made):
            out = module(a, b)
        out.backward(data.grad_output)
    assert torch.equal(a.grad, apart[0].grad_a + apart[1].grad_a)
    assert torch.equal(b.grad, apart[0].grad_b + apart[1].grad_b)


@pytest.mark.parametrize("recipe", RECIPES)
def test_backward_after_both_forwards(recipe):
    """Each backward has the codes of its own forward."""
    made, module = RECIPES[recipe](), te.BatchedMatmul()
    batches = [make_data(PLAIN, seed=seed) for seed in range(2)]
    outs = []
    for data in batches:
        with quantized(made):
            outs.append(module(data.a, data.b))
    for data, out in reversed(list(zip(batches, outs))):
        grads = torch.autograd.grad(out, data[:2], data.grad_output)
        assert_step_accurate(Step(out.detach(), *grads), data, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_backward_twice_through_one_graph(recipe):
    data, made = make_data(PLAIN), RECIPES[recipe]()
    with quantized(made):
        out = te.BatchedMatmul()(data.a, data.b)
    first = torch.autograd.grad(out, data[:2], data.grad_output, retain_graph=True)
    assert_step_accurate(Step(out.detach(), *first), data, recipe)
    second = torch.autograd.grad(out, data[:2], data.grad_output)
    assert_step_accurate(Step(out.detach(), *second), data, recipe)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, data[:2], data.grad_output)


@pytest.mark.parametrize("recipe", RECIPES)
def test_square_of_one_tensor(recipe):
    """Both operands are one tensor: its gradient is the sum of both."""
    x = random_values((3, 32, 32), 1).requires_grad_()
    grad_output = random_values((3, 32, 32), 2)
    with quantized(RECIPES[recipe]()):
        out = te.BatchedMatmul()(x, x.mT)
    out.backward(grad_output)
    exact = exact_step(Data(x, x.mT, grad_output))
    bound = 140.0 if recipe == "none" else GRADIENT_BOUNDS_DB[recipe]
    assert_accurate(x.grad, exact.grad_a + exact.grad_b.mT, bound)


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_an_input_changed_in_place_does_not_change_backward(recipe):
    """Codes are saved, not the inputs."""
    data, made = make_data(PLAIN), RECIPES[recipe]()
    expected = run_step(te.BatchedMatmul(), data, made)
    with quantized(made):
        out = te.BatchedMatmul()(data.a, data.b)
    with torch.no_grad():
        data.a.zero_()
        data.b.fill_(7.0)
    assert_same_step(
        expected, Step(out.detach(), *torch.autograd.grad(out, data[:2], data.grad_output))
    )


def test_an_input_changed_in_place_is_noticed_in_high_precision():
    data = make_data(PLAIN)
    out = te.BatchedMatmul()(data.a, data.b)
    with torch.no_grad():
        data.a.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(data.grad_output)


@pytest.mark.parametrize("recipe", RECIPES)
def test_zero_gradient(recipe):
    data, module, made = make_data(PLAIN), te.BatchedMatmul(), RECIPES[recipe]()
    zeros = data._replace(grad_output=torch.zeros_like(data.grad_output))
    for _ in range(2):
        step = run_step(module, zeros, made)
        assert not step.grad_a.any() and not step.grad_b.any()
    # A gradient after zeros is as good as ever, whatever the scale was then.
    run_step(module, data, made)
    assert_step_accurate(run_step(module, data, made), data, recipe)


@pytest.mark.parametrize("zero", ("a", "b", "both"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_zero_operands(recipe, zero):
    data, module, made = make_data(PLAIN), te.BatchedMatmul(), RECIPES[recipe]()
    zeros = Data(
        *(
            (x.detach() * (0.0 if zero in (name, "both") else 1.0)).requires_grad_()
            for name, x in zip("ab", data)
        ),
        data.grad_output,
    )
    for _ in range(2):
        step = run_step(module, zeros, made)
        assert not step.out.any()
        assert zero == "a" or not step.grad_a.any()
        assert zero == "b" or not step.grad_b.any()
        assert all(bool(x.isfinite().all()) for x in step)
    run_step(module, data, made)
    assert_step_accurate(run_step(module, data, made), data, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_stays_in_its_rows_and_columns(recipe):
    data, module, made = make_data(PLAIN), te.BatchedMatmul(), RECIPES[recipe]()
    exact = exact_step(data)
    with torch.no_grad():
        data.a[1, 2, 3] = float("nan")
    for _ in range(2):
        step = run_step(module, data, made)
        expected_out, expected_b = torch.zeros_like(step.out), torch.zeros_like(step.grad_b)
        expected_out[1, 2] = expected_b[1, 3] = 1
        assert torch.equal(step.out.isnan(), expected_out.bool())
        assert torch.equal(step.grad_b.isnan(), expected_b.bool())
        assert not step.grad_a.isnan().any()
        keep = torch.arange(4) != 1
        assert_accurate(step.out[keep], exact.out[keep], FORWARD_BOUND_DB)
        assert_accurate(
            step.grad_b[keep], exact.grad_b[keep], GRADIENT_BOUNDS_DB.get(recipe, 100.0)
        )


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_infinity_stays_in_its_rows_and_training_goes_on(recipe):
    data, module, made = make_data(PLAIN), te.BatchedMatmul(), RECIPES[recipe]()
    run_step(module, data, made)
    spoiled = Data(data.a.detach().clone(), data.b, data.grad_output)
    spoiled.a[1, 2, 3] = float("inf")
    spoiled.a.requires_grad_()
    step = run_step(module, spoiled, made)
    keep = torch.arange(4) != 1
    exact = exact_step(data)
    assert_accurate(step.out[keep], exact.out[keep], FORWARD_BOUND_DB)
    assert step.grad_a.isfinite().all()
    rows = torch.arange(32) != 2
    assert step.out[1, rows].isfinite().all()
    if recipe in ("delayed", "current"):  # saturates
        assert step.out.isfinite().all() and step.grad_b.isfinite().all()
    # An infinite amax leaves the history after `amax_history_len` steps; meanwhile the scale is the old one.
    for _ in range(5):
        assert_step_accurate(run_step(module, data, made), data, recipe)


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_nan_gradient_does_not_spoil_the_next_step(recipe):
    data, module, made = make_data(PLAIN), te.BatchedMatmul(), RECIPES[recipe]()
    grad = data.grad_output.clone()
    grad[2, 5, 7] = float("nan")
    step = run_step(module, data._replace(grad_output=grad), made)
    assert torch.equal(step.grad_a.isnan().any(-1).nonzero(), torch.tensor([[2, 5]]))
    assert torch.equal(step.grad_b.isnan().any(-2).nonzero(), torch.tensor([[2, 7]]))
    for _ in range(2):
        assert_step_accurate(run_step(module, data, made), data, recipe)


# --- what is quantized and saved -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "requires_grad, expected",
    (
        ((True, True), {"a": (1, 1), "b": (1, 1), "grad_output": (1, 1)}),
        ((True, False), {"a": (1, 0), "b": (1, 1), "grad_output": (1, 0)}),
        ((False, True), {"a": (1, 1), "b": (0, 1), "grad_output": (0, 1)}),
        ((False, False), {"a": (1, 0), "b": (0, 1)}),
    ),
)
@pytest.mark.parametrize("recipe", QUANTIZED)
def test_only_the_copies_that_are_read(recipe, requires_grad, expected, monkeypatch):
    seen, data = QuantizeCalls(monkeypatch), make_data(PLAIN, requires_grad=requires_grad)
    run_step(te.BatchedMatmul(), data, RECIPES[recipe]())
    assert seen.calls == [(name, *map(bool, copies)) for name, copies in expected.items()]


@pytest.mark.parametrize("how", (torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("recipe", QUANTIZED)
def test_inference_makes_one_copy_of_each(recipe, how, monkeypatch):
    """Also where the operands require grad."""
    seen, data = QuantizeCalls(monkeypatch), make_data(PLAIN)
    with how(), quantized(RECIPES[recipe]()):
        out = te.BatchedMatmul()(data.a, data.b)
    assert not out.requires_grad
    assert_accurate(out, exact_step(data).out, FORWARD_BOUND_DB)
    assert seen.calls == [("a", True, False), ("b", False, True)]


@pytest.mark.parametrize("name", ("plain", "a.mT", "b.mT", "both.mT", "a expanded"))
@pytest.mark.parametrize("recipe", QUANTIZED)
def test_each_tensor_is_read_once_and_as_it_is_stored(recipe, name, monkeypatch):
    """No high-precision copy is made of a transposed or repeated input: its own memory is quantized."""
    read = []
    for quantize in (quantized_operand.quantize, quantized_operand.cast_blocks):

        def record(x, *arguments, quantize=quantize, **options):
            read.append(x)
            return quantize(x, *arguments, **options)

        monkeypatch.setattr(quantized_operand, quantize.__name__, record)
    shapes = {"a.mT": ((2, 64, 32), (2, 64, 96)), "b.mT": ((2, 32, 64), (2, 96, 64))}
    shapes["both.mT"], shapes["a expanded"] = ((2, 64, 32), (2, 96, 64)), ((32, 64), (4, 64, 96))
    a_shape, b_shape = shapes.get(name, BLOCKS[:2])
    data = make_data(CASES[name]._replace(a_shape=a_shape, b_shape=b_shape))
    run_step(te.BatchedMatmul(), data, RECIPES[recipe]())
    assert [x.data_ptr() for x in read] == [x.data_ptr() for x in data]
    assert all(x.is_contiguous() for x in read)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("plain", "both.mT", "b has no batch"))
@pytest.mark.parametrize("recipe", QUANTIZED)
def test_saved_bytes(recipe, name, dtype):
    shapes = {"plain": ((3, 256, 128), (3, 128, 384)), "both.mT": ((3, 128, 256), (3, 384, 128))}
    case = CASES[name]
    a_shape, b_shape = shapes.get(name, ((3, 256, 128), (128, 384)))
    data = make_data(case._replace(a_shape=a_shape, b_shape=b_shape), dtype)
    with SavedTensors() as plain:
        torch.matmul(data.a, data.b)
    with SavedTensors() as saved, quantized(RECIPES[recipe]()):
        te.BatchedMatmul()(data.a, data.b)
    inputs = (data.a.numel() + data.b.numel()) * 2
    assert plain.num_bytes >= inputs
    assert saved.num_bytes <= 0.55 * inputs
    assert sorted(x.dtype.itemsize for x in saved.tensors)[-1] <= 4
    assert not any(x.dtype == dtype for x in saved.tensors)


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_saved_copies_are_those_of_the_gradients_asked_for(recipe):
    """A frozen b: only b is saved, for the gradient of a."""
    for requires_grad, side in (((True, False), 1), ((False, True), 0)):
        data = make_data(
            Case((2, 64, 128), (2, 128, 256)), torch.bfloat16, requires_grad=requires_grad
        )
        with SavedTensors() as saved, quantized(RECIPES[recipe]()):
            te.BatchedMatmul()(data.a, data.b)
        assert saved.num_bytes <= 0.55 * 2 * data[side].numel()


@pytest.mark.parametrize("requires_grad", ((True, True), (False, False)))
def test_nothing_is_saved_without_gradients(requires_grad):
    data = make_data(PLAIN, requires_grad=requires_grad)
    with torch.no_grad(), SavedTensors() as saved, quantized(Float8CurrentScaling()):
        te.BatchedMatmul()(data.a, data.b)
    assert not saved.tensors


# --- accumulation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_split_accumulation_is_the_recipe_s(recipe, monkeypatch):
    flags = []
    multiply_codes = autograd.multiply_codes

    def record(*arguments):
        flags.append(arguments[-1])
        return multiply_codes(*arguments)

    monkeypatch.setattr(autograd, "multiply_codes", record)
    made = RECIPES[recipe]()
    defaults = [
        (
            getattr(made, name).use_split_accumulator
            if hasattr(made, name)
            else name != "fp8_gemm_fprop"
        )
        for name in ("fp8_gemm_fprop", "fp8_gemm_dgrad", "fp8_gemm_wgrad")
    ]
    run_step(te.BatchedMatmul(), make_data(PLAIN), made)
    assert flags == defaults
    if recipe in ("delayed", "current"):
        assert flags == [False, True, True]


@pytest.mark.parametrize("product", (te.BatchedMatmul, lambda: teb.bmm))
@pytest.mark.parametrize("which", range(3))
def test_split_accumulation_of_each_pass(which, product, monkeypatch):
    flags = []
    multiply_codes = autograd.multiply_codes
    monkeypatch.setattr(
        autograd, "multiply_codes", lambda *x: (flags.append(x[-1]), multiply_codes(*x))[1]
    )
    wanted = [index == which for index in range(3)]
    recipe = Float8CurrentScaling(
        fp8_gemm_fprop=MMParams(use_split_accumulator=wanted[0]),
        fp8_gemm_dgrad=MMParams(use_split_accumulator=wanted[1]),
        fp8_gemm_wgrad=MMParams(use_split_accumulator=wanted[2]),
    )
    run_step(product(), make_data(PLAIN), recipe)
    assert flags == wanted


# --- torch's and TE's contexts --------------------------------------------------------------------------


@pytest.mark.parametrize("product", (te.BatchedMatmul, lambda: teb.bmm))
def test_disabled_autocast_is_high_precision(product):
    data = make_data(PLAIN)
    with te.autocast(enabled=False, recipe=Float8CurrentScaling()):
        out = product()(data.a, data.b)
    out.backward(data.grad_output)
    assert_step_accurate(Step(out.detach(), data.a.grad, data.b.grad), data, "none")


def test_disabled_region_inside_an_enabled_one():
    data, module, recipe = make_data(PLAIN), te.BatchedMatmul(), Float8CurrentScaling()
    plain = run_step(te.BatchedMatmul(), data)
    with te.autocast(enabled=True, recipe=recipe):
        with te.autocast(enabled=False, recipe=recipe):
            inner = module(data.a, data.b)
        outer = module(data.a, data.b)
    assert torch.equal(inner, plain.out)
    assert not torch.equal(outer, plain.out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_torch_autocast(recipe):
    data = make_data(PLAIN)
    with torch.autocast("cpu", torch.bfloat16), quantized(RECIPES[recipe]()):
        out = te.BatchedMatmul()(data.a, data.b)
    assert out.dtype == torch.bfloat16
    out.backward(data.grad_output.bfloat16())
    assert data.a.grad.dtype == data.b.grad.dtype == torch.float32
    rounded = data.a.detach().bfloat16(), data.b.detach().bfloat16()
    exact = exact_step(Data(*rounded, data.grad_output.bfloat16()))
    forward, backward = (50.0, 50.0) if recipe == "none" else (27.0, GRADIENT_BOUNDS_DB[recipe])
    assert_accurate(out.detach(), exact.out, forward)
    assert_accurate(data.a.grad, exact.grad_a, backward)
    assert_accurate(data.b.grad, exact.grad_b, backward)


def test_a_region_of_torch_autocast_that_is_disabled():
    data = make_data(PLAIN, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert te.BatchedMatmul()(data.a, data.b).dtype == torch.float32


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_backward_in_a_thread(recipe):
    """A thread does not see the switch of the one that ran forward."""
    data, made = make_data(PLAIN), RECIPES[recipe]()
    expected = run_step(te.BatchedMatmul(), data, made)
    with quantized(made):
        out = te.BatchedMatmul()(data.a, data.b)
    found = []

    def work():
        found.extend(torch.autograd.grad(out, data[:2], data.grad_output))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same_step(expected, Step(out.detach(), *found))


@pytest.mark.parametrize("recipe", STATELESS)
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_torch_checkpoint(recipe, use_reentrant):
    data, module, made = make_data(PLAIN), te.BatchedMatmul(), RECIPES[recipe]()
    expected = run_step(te.BatchedMatmul(), data, made)
    outputs = []

    def block(a, b):
        with quantized(made):
            outputs.append(module(a, b))
        return outputs[-1] * 1.0

    # Stopping early would end the second run before its output is seen.
    with set_checkpoint_early_stop(False):
        with SavedTensors() as saved:
            out = torch_checkpoint(block, data.a, data.b, use_reentrant=use_reentrant)
        assert not any(x.dtype == torch.uint8 for x in saved.tensors)
        out.backward(data.grad_output)
    assert len(outputs) == 2
    assert torch.equal(outputs[0], outputs[1])
    assert_same_step(expected, Step(outputs[1].detach(), data.a.grad, data.b.grad))


def test_torch_checkpoint_recomputed_outside_of_the_region_is_an_error():
    """torch's checkpoint knows nothing of te.autocast: what is recomputed elsewhere does not pass as FP8."""
    data = make_data(PLAIN)
    with quantized(Float8CurrentScaling()):
        out = torch_checkpoint(te.BatchedMatmul(), data.a, data.b, use_reentrant=False)
    with pytest.raises(CheckpointError):
        out.backward(data.grad_output)


@pytest.fixture
def checkpoint_on_cpu(monkeypatch):
    """te.checkpoint keeps the state of CUDA's random numbers; there is none here."""
    monkeypatch.setattr(distributed, "_get_cuda_rng_state", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "_set_cuda_rng_state", lambda *_, **__: None)


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("recipe", QUANTIZED)
def test_te_checkpoint(recipe, use_reentrant, checkpoint_on_cpu):
    # TE's checkpoint ends a region of its own when it recomputes, which moves the history on by one more
    # row: of te.Linear as well. The maximum of a long history does not see it.
    made = (
        RECIPES[recipe]() if recipe != "delayed" else DelayedScaling(amax_history_len=32, margin=1)
    )
    batches = [make_data(PLAIN, seed=seed) for seed in range(4)]
    expected = train(te.BatchedMatmul(), made, batches)
    FP8GlobalStateManager.reset()
    module, outputs = te.BatchedMatmul(), []
    module.register_forward_hook(lambda *hook: outputs.append(hook[-1].detach().clone()))
    for step, data in enumerate(batches):
        with quantized(made):
            out = te.checkpoint(module, data.a, data.b, use_reentrant=use_reentrant)
        out.backward(data.grad_output)
        assert len(outputs) == 2 * step + 2
        assert torch.equal(outputs[-1], outputs[-2])
        assert_same_step(expected.steps[step], Step(out.detach(), data.a.grad, data.b.grad))
        if recipe == "delayed":
            for name in ("scale_fwd", "scale_bwd"):
                assert torch.equal(expected.states[step][name], delayed_state(module)[name])


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_two_modules_in_one_region(recipe):
    """A chain: the second one's gradient is the first one's."""
    made = RECIPES[recipe]()
    first, second = te.BatchedMatmul(name="first"), te.BatchedMatmul(name="second")
    for seed in range(3):
        data = make_data(PLAIN, seed=seed)
        c = random_values((4, 48, 32), 77 + seed).requires_grad_()
        with quantized(made):
            middle = first(data.a, data.b)
            out = second(middle, c)
        grad_output = random_values((4, 32, 32), 99 + seed)
        grads = torch.autograd.grad(out, (data.a, data.b, c), grad_output)
        exact = [x.detach().double().requires_grad_() for x in (data.a, data.b, c)]
        exact_out = exact[0] @ exact[1] @ exact[2]
        exact_grads = torch.autograd.grad(exact_out, exact, grad_output.double())
        # Two products: the noise of the first adds to that of the second.
        assert_accurate(out.detach(), exact_out.detach(), FORWARD_BOUND_DB - 3.0)
        for grad, expected in zip(grads, exact_grads):
            assert_accurate(grad, expected, GRADIENT_BOUNDS_DB[recipe] - 3.0)
        if recipe == "delayed":
            scales = [delayed_state(module)["scale_fwd"] for module in (first, second)]
            assert torch.equal(scales[0][:2] != 1, torch.tensor([True, True]))
            assert not torch.equal(scales[0], scales[1])
            for module in (first, second):
                history = delayed_state(module)["amax_history_bwd"]
                assert (history[1:, 0] > 0).sum() == min(seed + 1, 2)


@pytest.mark.parametrize("recipe", STATELESS)
def test_one_module_twice_in_a_region(recipe):
    data, module, made = make_data(PLAIN), te.BatchedMatmul(), RECIPES[recipe]()
    other = make_data(CASES["ragged"])
    with quantized(made):
        outs = [module(x.a, x.b) for x in (data, other)]
    for x, out in zip((data, other), outs):
        grads = torch.autograd.grad(out, x[:2], x.grad_output)
        assert_step_accurate(Step(out.detach(), *grads), x, recipe)


# --- quantized inputs -----------------------------------------------------------------------------------


def quantize_input(x: torch.Tensor, kind: str, requires_grad: bool = True) -> torch.Tensor:
    return teb.quantize(x.detach(), make_quantizer(kind)).requires_grad_(requires_grad)


KINDS = {"delayed": "float8_delayed", "current": "float8_current", "mxfp8": "mxfp8"}


@pytest.mark.parametrize("which", ("a", "b", "both"))
@pytest.mark.parametrize("recipe", KINDS)
def test_quantized_inputs_are_used_as_they_are(recipe, which, monkeypatch):
    data = make_data(BLOCKS, torch.bfloat16)
    quantized_names = ("a", "b") if which == "both" else (which,)
    operands = {
        name: quantize_input(x, KINDS[recipe]) if name in quantized_names else x
        for name, x in zip("ab", data)
    }
    count = []
    quantize = quantized_operand.quantize
    monkeypatch.setattr(
        quantized_operand, "quantize", lambda x, q: (count.append(x), quantize(x, q))[1]
    )
    with quantized(RECIPES[recipe]()):
        out = te.BatchedMatmul()(operands["a"], operands["b"])
    out.backward(data.grad_output)
    assert len(count) == 3 - len(quantized_names)
    grads = [operands[name].grad for name in "ab"]
    for grad in grads:
        assert type(grad) is torch.Tensor and grad.dtype == torch.bfloat16
    assert_step_accurate(Step(out.detach(), *grads), data, recipe)


@pytest.mark.parametrize("kind", ("float8_delayed", "float8_current", "mxfp8"))
def test_bmm_of_quantized_tensors_outside_of_autocast(kind):
    data = make_data(BLOCKS, torch.bfloat16)
    a, b = (quantize_input(x, kind) for x in data[:2])
    out = teb.bmm(a, b)
    out.backward(data.grad_output)
    recipe = "mxfp8" if kind == "mxfp8" else "current"
    assert_step_accurate(Step(out.detach(), a.grad, b.grad), data, recipe)
    with torch.no_grad():
        assert torch.equal(out, teb.bmm(a, b))


@pytest.mark.parametrize("kind", ("float8_delayed", "float8_current", "mxfp8"))
def test_quantized_inputs_without_a_recipe_are_dequantized_by_the_module(kind):
    data = make_data(BLOCKS, torch.bfloat16)
    a, b = (quantize_input(x, kind) for x in data[:2])
    out = te.BatchedMatmul()(a, b)
    out.backward(data.grad_output)
    exact = exact_step(Data(*(dequantize(x.detach()) for x in (a, b)), data.grad_output))
    for result, expected in zip((out.detach(), a.grad, b.grad), exact):
        assert result.dtype == torch.bfloat16
        assert_accurate(result, expected)


@pytest.mark.parametrize("missing", ("rowwise", "columnwise"))
def test_a_quantized_input_with_one_copy(missing):
    """Per tensor, the other copy is packed from the one that is there."""
    data = make_data(BLOCKS, torch.bfloat16)
    quantizer = make_quantizer("float8_current")
    quantizer.set_usage(**{missing: False})
    a = teb.quantize(data.a.detach(), quantizer).requires_grad_()
    with quantized(Float8CurrentScaling()):
        out = te.BatchedMatmul()(a, data.b)
    out.backward(data.grad_output)
    assert_step_accurate(Step(out.detach(), a.grad, data.b.grad), data, "current")


def test_storage_is_not_a_tensor():
    quantizer = make_quantizer("float8_current", internal=True)
    storage = teb.quantize(torch.randn(2, 32, 32), quantizer)
    with quantized(Float8CurrentScaling()):
        with pytest.raises(
            TypeError, match="operand a: expected a torch.Tensor, got Float8TensorStorage"
        ):
            te.BatchedMatmul()(storage, torch.randn(2, 32, 32))  # fmt: skip
