# SPDX-License-Identifier: Apache-2.0
"""What `te.BatchedMatmul` and `teb.bmm` refuse, and what they say. Needs no GPU."""

from __future__ import annotations

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import make_quantizer
from training import QUANTIZED, RECIPES, Case, exact_step, make_data, quantized
from transformer_engine.common.recipe import (
    CustomRecipe,
    DelayedScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
)
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.tensor.identity_tensor import IdentityQuantizer

import transformer_engine_batched as teb

CASE = Case((2, 32, 64), (2, 64, 96))


@pytest.fixture(autouse=True)
def fresh():
    """TE's state is that of this test alone."""
    FP8GlobalStateManager.reset()
    with torch.compiler.set_stance("force_eager"):
        yield
    FP8GlobalStateManager.reset()


def products():
    """The module and the function."""
    return {"module": te.BatchedMatmul(), "bmm": teb.bmm}


@pytest.fixture(params=("module", "bmm"))
def product(request):
    return products()[request.param]


@pytest.mark.parametrize("through", ("input", "gradient"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_double_backward(recipe, through, emulated):
    """Refused, and never a gradient that leaves the second derivative out without a word."""
    data = make_data(CASE)
    with quantized(RECIPES[recipe]()):
        out = te.BatchedMatmul()(data.a, data.b)
    grad_output = data.grad_output.requires_grad_(through == "gradient")
    with pytest.raises(RuntimeError, match="twice|[Dd]ouble backward"):
        (grad,) = torch.autograd.grad(out, data.a, grad_output, create_graph=True)
        (out.sum() + grad.square().sum()).backward()


@pytest.mark.parametrize("recipe", (DelayedScaling, CustomRecipe))
def test_bmm_under_recipes_with_state(recipe, emulated):
    options = {"qfactory": lambda role: None} if recipe is CustomRecipe else {}
    data = make_data(CASE)
    pattern = f"bmm under {recipe.__name__}.*transformer_engine.pytorch.BatchedMatmul"
    with quantized(recipe(**options)):
        with pytest.raises(teb.UnsupportedError, match=pattern):
            teb.bmm(data.a, data.b)
        with torch.no_grad(), pytest.raises(teb.UnsupportedError, match=pattern):
            teb.bmm(data.a.detach(), data.b.detach())


OPTIONS = {
    "out": lambda: torch.empty(2, 32, 96),
    "bias": lambda: torch.zeros(96),
    "gelu": lambda: True,
    "alpha": lambda: 2.0,
    "accumulate": lambda: True,
    "beta": lambda: 0.5,
    "quantization_params": lambda: make_quantizer("float8_current"),
    "autotune": lambda: True,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bmm_options_with_gradients_or_recipes(name, emulated):
    options, data = {name: OPTIONS[name]()}, make_data(CASE)
    with pytest.raises(
        teb.UnsupportedError, match=f"bmm with {name} of operands that require grad"
    ):
        teb.bmm(data.a, data.b, **options)
    with pytest.raises(
        teb.UnsupportedError, match=f"bmm with {name} of operands that require grad"
    ):
        teb.bmm(data.a.detach(), data.b, **options)
    with quantized(Float8CurrentScaling()):
        with pytest.raises(teb.UnsupportedError, match=f"bmm with {name} under te.autocast"):
            teb.bmm(data.a.detach(), data.b.detach(), **options)


def test_bmm_options_without_gradients(emulated):
    data = make_data(CASE)
    out, bias = torch.empty(2, 32, 96), torch.ones(96)
    with torch.no_grad():
        result = teb.bmm(data.a, data.b, out=out, bias=bias, alpha=2.0)
    assert result is out
    torch.testing.assert_close(out.double(), exact_step(data).out * 2 + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ("none", "current", "mxfp8"))
@pytest.mark.parametrize("out_dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_bmm_out_dtype(recipe, out_dtype, emulated):
    data = make_data(CASE, torch.bfloat16)
    with quantized(RECIPES[recipe]()):
        out = teb.bmm(data.a, data.b, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    out.backward(data.grad_output.to(out_dtype))
    assert data.a.grad.dtype == data.b.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("out_dtype", (torch.float64, torch.int8))
def test_bmm_bad_out_dtype(out_dtype, emulated):
    data = make_data(CASE)
    with pytest.raises(
        TypeError, match=f"out_dtype={out_dtype}: expected float32, float16 or bfloat16"
    ):
        teb.bmm(data.a, data.b, out_dtype=out_dtype)


def test_unknown_option(emulated):
    data = make_data(CASE, requires_grad=(False, False))
    with pytest.raises(TypeError, match="unexpected keyword argument 'transpose'"):
        teb.bmm(data.a, data.b, transpose=True)


@pytest.mark.parametrize("recipe", ("none", "current"))
class TestOperands:
    """Bad operands, with and without a recipe."""

    def call(self, product, recipe, a, b):
        with quantized(RECIPES[recipe]()):
            return product(a, b)

    def test_not_a_tensor(self, recipe, product, emulated):
        a = torch.ones(2, 16, 16, requires_grad=True)
        with pytest.raises(TypeError, match="operand b: expected a torch.Tensor, got list"):
            self.call(product, recipe, a, [[1.0]])

    @pytest.mark.parametrize("dtype", (torch.float64, torch.int32, torch.complex64, torch.bool))
    def test_dtype(self, recipe, product, dtype, emulated):
        a = torch.ones(2, 16, 16, requires_grad=True)
        with pytest.raises(TypeError, match=f"operand b has dtype {dtype}: expected float32"):
            self.call(product, recipe, a, torch.ones(2, 16, 16, dtype=dtype))

    def test_scalar(self, recipe, product, emulated):
        a = torch.ones(2, 16, 16, requires_grad=True)
        with pytest.raises(ValueError, match="operand b is a scalar: expected at least 1 dim"):
            self.call(product, recipe, a, torch.tensor(2.0))

    def test_contracted_sizes(self, recipe, product, emulated):
        a = torch.ones(2, 16, 32, requires_grad=True)
        with pytest.raises(ValueError, match="the contracted sizes differ, 32 of a and 48 of b"):
            self.call(product, recipe, a, torch.ones(2, 48, 16))

    def test_batch_dims(self, recipe, product, emulated):
        a = torch.ones(2, 16, 32, requires_grad=True)
        with pytest.raises(ValueError, match=r"batch dims \[2\] and \[3\] do not broadcast"):
            self.call(product, recipe, a, torch.ones(3, 32, 16))


@pytest.mark.parametrize("size", (33, 40))
@pytest.mark.parametrize("recipe", QUANTIZED)
def test_contracted_sizes_that_padding_would_hide(recipe, size, emulated):
    """Both are padded to the same multiple of 16 or 32: the sizes differ all the same."""
    data = torch.ones(2, 16, size), torch.ones(2, size + 1, 16)
    with quantized(RECIPES[recipe]()):
        with pytest.raises(
            ValueError, match=f"contracted sizes differ, {size} of a and {size + 1} of b"
        ):
            te.BatchedMatmul()(*data)


@pytest.mark.parametrize("recipe", (Float8CurrentScaling, MXFP8BlockScaling, DelayedScaling))
def test_without_emulation_nothing_falls_back(recipe):
    """A machine without a GPU says that it lacks FP8, and does not run something else."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    a, b = torch.ones(2, 16, 32), torch.ones(2, 32, 16)
    with pytest.raises(Exception):
        with te.autocast(enabled=True, recipe=recipe()):
            te.BatchedMatmul()(a, b)


@pytest.mark.parametrize("recipe", (Float8CurrentScaling, MXFP8BlockScaling))
def test_leaving_emulation_inside_a_region(recipe):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    a, b = torch.ones(2, 32, 32), torch.ones(2, 32, 32)
    with teb.emulate():
        region = te.autocast(enabled=True, recipe=recipe())
        region.__enter__()
    try:
        with pytest.raises(teb.UnsupportedError, match="quantization to .* with .*emulate"):
            te.BatchedMatmul()(a, b)
    finally:
        region.__exit__(None, None, None)


def test_custom_recipe_with_an_unknown_quantizer(emulated):
    data = make_data(CASE)
    with quantized(CustomRecipe(qfactory=lambda role: IdentityQuantizer())):
        with pytest.raises(teb.UnsupportedError, match="quantizer of type IdentityQuantizer"):
            te.BatchedMatmul()(data.a, data.b)


def test_custom_recipe_with_two_formats(emulated):
    """One operand per tensor and the other in blocks: no engine multiplies them."""

    def qfactory(role):
        if role.tensor_type == "a":
            return te.MXFP8Quantizer(te.DType.kFloat8E4M3)
        return te.Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3, device=torch.device("cpu"))

    data = make_data(CASE)
    with quantized(CustomRecipe(qfactory=qfactory)):
        with pytest.raises(TypeError, match="have different formats, mxfp8 and float8"):
            te.BatchedMatmul()(data.a, data.b)


def test_custom_recipe_with_e5m2_everywhere(emulated):
    def qfactory(role):  # pylint: disable=unused-argument
        return te.Float8CurrentScalingQuantizer(te.DType.kFloat8E5M2, device=torch.device("cpu"))

    data = make_data(CASE)
    with quantized(CustomRecipe(qfactory=qfactory)):
        with pytest.raises(teb.UnsupportedError, match="operands a and b are both E5M2"):
            te.BatchedMatmul()(data.a, data.b)


def test_quantized_input_of_another_format(emulated):
    data = make_data(CASE, torch.bfloat16)
    a = teb.quantize(data.a.detach(), make_quantizer("mxfp8"))
    with quantized(Float8CurrentScaling()):
        with pytest.raises(TypeError, match="have different formats, mxfp8 and float8"):
            te.BatchedMatmul()(a, data.b)


@pytest.mark.parametrize("requires_grad", (False, True))
def test_one_quantized_operand_without_a_recipe(requires_grad, emulated):
    """The answer does not depend on whether gradients are asked for."""
    data = make_data(CASE, torch.bfloat16, requires_grad=(requires_grad, requires_grad))
    a = teb.quantize(data.a.detach(), make_quantizer("float8_current"))
    with pytest.raises(TypeError, match="have different formats, float8 and bf16"):
        teb.bmm(a, data.b)


@pytest.mark.parametrize("override", ("high_precision", "dequantized"))
@pytest.mark.parametrize("recipe", (Float8CurrentScaling, MXFP8BlockScaling))
def test_backward_override_is_not_ignored(recipe, override, product, emulated):
    """TE's recipes may ask for another backward than the FP8 one; that is not silently passed over."""
    data = make_data(CASE)
    with quantized(recipe(backward_override=override)):
        with pytest.raises(teb.UnsupportedError, match="backward_override"):
            product(data.a, data.b)


def test_existing_names_are_not_replaced():
    from transformer_engine_batched import plugin

    with pytest.raises(ImportError, match="transformer_engine.pytorch.Linear exists already"):
        plugin.add_to_pytorch("Linear", object())
    plugin.add_to_pytorch("BatchedMatmul", teb.BatchedMatmul)
