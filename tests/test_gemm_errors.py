# SPDX-License-Identifier: Apache-2.0
"""Bad arguments: which exception, what it says, and that nothing was written.

Each case is one bullet of what the docstrings promise. Texts are part of the interface: what was asked,
what came, what to do. Needs no GPU.
"""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import make_operand, make_quantizer
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
    Float8BlockwiseQTensorStorage,
)
from transformer_engine.pytorch.tensor.storage.nvfp4_tensor_storage import NVFP4TensorStorage

import transformer_engine_batched as teb

POISON = -77.0


def good(batch=2, rows=4, cols=8, dtype=torch.float32):
    return torch.randn(batch, rows, cols).to(dtype)


def float8(shape=(2, 32, 32), recipe="float8_current", fp8="e4m3", **usage):
    quantizer = make_quantizer(recipe, fp8)
    if usage:
        quantizer.set_usage(**usage)
    with teb.emulate():
        return teb.quantize(torch.randn(shape), quantizer)


def call(A=None, B=None, **options):
    """`batched_general_gemm` with an `out` that fits [2, 4, 8] inputs and must stay as it is."""
    A = good() if A is None else A
    B = good() if B is None else B
    out = options.setdefault("out", torch.full((2, 4, 4), POISON))
    before = out.detach().clone() if isinstance(out, torch.Tensor) else None
    try:
        return teb.batched_general_gemm(A, B, **options)
    finally:
        if before is not None:
            assert torch.equal(out.detach(), before), "out was written before the checks had passed"


def expect(exception, text, *args, **options):
    with pytest.raises(exception, match=text) as caught:
        call(*args, **options)
    # The one subclass that is not asked for would hide behind its parent.
    assert isinstance(caught.value, teb.UnsupportedError) == (exception is teb.UnsupportedError)
    return str(caught.value)


# --- shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, shape_a, shape_b, text",
    [
        (
            "TN",
            (2, 4, 9),
            (2, 4, 8),
            r"differ, 8 of B and 9 of A \(transposed as the layout says\)",
        ),
        ("NN", (2, 9, 4), (2, 4, 8), r"differ, 8 of B and 9 of A$"),
        (
            "NT",
            (2, 9, 4),
            (2, 8, 4),
            r"differ, 8 of B and 9 of A \(transposed as the layout says\)",
        ),
    ],
)
def test_contracted_sizes(layout, shape_a, shape_b, text):
    message = expect(ValueError, text, torch.randn(shape_a), torch.randn(shape_b), layout=layout)
    for name, shape in (("A", shape_a), ("B", shape_b)):
        assert f"{name} (torch.float32 {list(shape)}, strides " in message


def test_contracted_sizes_of_bmm():
    with pytest.raises(ValueError, match=r"differ, 8 of a and 9 of b$"):
        teb.bmm(torch.randn(2, 4, 8), torch.randn(2, 9, 4))


def test_contracted_sizes_of_quantized_operands():
    with teb.emulate():
        message = expect(ValueError, "differ, 64 of B and 32 of A", float8(), float8((2, 32, 64)))
    assert "A (Float8Tensor [2, 32, 32])" in message


def test_batch_dims():
    expect(ValueError, r"batch dims \[2\] and \[3\] do not broadcast", good(3), good(2))
    expect(
        ValueError,
        r"batch dims \[2\] and \[3, 5\] do not broadcast",
        torch.randn(3, 5, 4, 8),
        good(2),
    )


@pytest.mark.parametrize("shape", ((), (8,)))
@pytest.mark.parametrize("name", ("A", "B"))
def test_rank(name, shape):
    text = rf"operand {name} \(torch.float32 .*has rank {len(shape)}: expected .* at least 2 dims"
    expect(ValueError, text, **{name: torch.randn(shape)})


@pytest.mark.parametrize("layout", ("TT", "tn", "", "N", "TNN", None, 3))
def test_layout(layout):
    text = rf'layout={re.escape(repr(layout))}: expected one of "TN", "NN", "NT"'
    expect(ValueError, text, layout=layout)


def test_devices():
    meta = good().to("meta")
    expect(ValueError, "operand A is on meta, operand B on cpu: move them to one device", A=meta)
    expect(ValueError, "operand A is on cpu, operand B on meta: move them to one device", B=meta)
    expect(ValueError, "bias is on meta, operand B on cpu", bias=torch.randn(4, device="meta"))
    with pytest.raises(ValueError, match="out is on meta, operand B on cpu"):
        teb.batched_general_gemm(good(), good(), out=torch.empty(2, 4, 4, device="meta"))


# --- types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    (
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
    ),
)
@pytest.mark.parametrize("name", ("A", "B"))
def test_input_dtypes(name, dtype):
    text = (
        rf"operand {name} has dtype {dtype}: expected float32, float16, bfloat16 or a TE quantized"
    )
    expect(TypeError, text, **{name: torch.ones(2, 4, 8).to(dtype)})


@pytest.mark.parametrize("value", (3.0, "x", [[1.0]], object()))
def test_inputs_that_are_no_tensors(value):
    text = (
        rf"operand B: expected a torch.Tensor or a TE quantized tensor, got {type(value).__name__}"
    )
    expect(TypeError, text, B=value)
    with pytest.raises(TypeError, match="operand a: expected a torch.Tensor"):
        teb.bmm(None, good())


def test_mixed_formats():
    expect(
        TypeError, "different formats, fp32 and bf16: cast one of them", good(dtype=torch.bfloat16)
    )
    with teb.emulate():
        expect(
            TypeError, r"fp32 and float8: quantize the other one, too \(teb.quantize\)", float8()
        )
        expect(
            TypeError,
            "mxfp8 and float8: quantize both with the same recipe",
            float8(),
            float8(recipe="mxfp8"),
        )


@pytest.mark.parametrize("recipe", ("float8_current", "float8_delayed", "mxfp8"))
def test_e5m2_twice(recipe):
    x = float8(recipe=recipe, fp8="e5m2")
    with teb.emulate():
        expect(
            teb.UnsupportedError,
            "operands B and A are both E5M2.*Quantize one of them to E4M3",
            x,
            x,
        )
        with pytest.raises(teb.UnsupportedError, match="operands a and b are both E5M2"):
            teb.bmm(x, x)


# --- copies of quantized operands -------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ("float8_current", "mxfp8"))
@pytest.mark.parametrize(
    "layout, name, missing",
    [
        ("TN", "A", "rowwise"),
        ("TN", "B", "rowwise"),
        ("NN", "A", "columnwise"),
        ("NN", "B", "rowwise"),
        ("NT", "A", "columnwise"),
        ("NT", "B", "columnwise"),
    ],
)
def test_missing_copies(recipe, layout, name, missing):
    usage = {"rowwise": True, "columnwise": True, missing: False}
    operands = {"A": float8(recipe=recipe), "B": float8(recipe=recipe)}
    operands[name] = float8(recipe=recipe, **usage)
    kind = type(operands[name]).__name__
    dim = "last" if missing == "rowwise" else "second to last"
    text = (
        rf"operand {name} \({kind} of shape \[2, 32, 32\]\) is contracted along its {dim} dim, but has no "
        rf"{missing} data: quantize it with a quantizer of {missing}=True"
    )
    with teb.emulate():
        message = expect(ValueError, text, **operands, layout=layout)
    assert ("update_usage(columnwise_usage=True)" in message) == (
        recipe == "float8_current" and missing == "columnwise"
    )


def test_transposed_copy_that_is_out_of_date_is_not_read():
    x = float8()
    x._transpose_invalid = True
    with teb.emulate():
        expect(ValueError, "operand A .* has no columnwise data", x, float8(), layout="NN")


def test_columnwise_mxfp8_whose_blocks_cross_items():
    a, b = float8((2, 48, 32), recipe="mxfp8"), float8((2, 48, 64), recipe="mxfp8")
    text = r"operand B \(MXFP8Tensor \[2, 48, 64\]\) is contracted along its rows, but its 48 rows"
    out = torch.full((2, 64, 32), POISON)
    with teb.emulate():
        message = expect(teb.UnsupportedError, text, a, b, layout="NT", out=out)
    assert "Pad the rows with zeros" in message


def test_formats_without_engine():
    codes = torch.zeros(2, 32, 32, dtype=torch.uint8)
    block = Float8BlockwiseQTensorStorage(
        rowwise_data=codes,
        rowwise_scale_inv=torch.ones(1, 64),
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=te.DType.kFloat8E4M3,
        quantizer=None,
        is_2D_scaled=False,
    )
    nvfp4 = NVFP4TensorStorage(
        rowwise_data=codes,
        rowwise_scale_inv=torch.ones(1, 64),
        columnwise_data=None,
        columnwise_scale_inv=None,
        amax_rowwise=None,
        amax_columnwise=None,
        fp4_dtype=te.DType.kFloat4E2M1,
        quantizer=None,
        with_gemm_swizzled_scales=False,
    )
    for engine in (None, "reference"):
        with teb.emulate(engine):
            text = "NVFP4.*Quantize with Float8Current.* instead"
            expect(teb.UnsupportedError, text, nvfp4, nvfp4)
    expect(teb.UnsupportedError, "NVFP4", nvfp4, nvfp4)
    text = r"Float8 128-blocks.*for single matrices only.*transformer_engine_batched.emulate\(\)"
    expect(teb.UnsupportedError, text, block, block)


# --- factors and destinations -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_factors_that_are_not_finite(value):
    expect(ValueError, rf"alpha={value}: expected a finite number", alpha=value)
    expect(ValueError, rf"beta={value}: expected a finite number", beta=value, accumulate=True)


def test_beta_that_would_be_ignored():
    expect(ValueError, "beta=0.5 without accumulate=True would be ignored", beta=0.5)
    expect(ValueError, "beta=nan without accumulate=True", beta=float("nan"))


def test_accumulation_into_nothing():
    expect(
        ValueError, "accumulate=True adds to what is in `out`.*no `out`", accumulate=True, out=None
    )


@pytest.mark.parametrize("shape", ((2, 4, 5), (1, 4, 4), (2, 2, 4, 4), (4, 4), (2, 16)))
def test_out_shape(shape):
    text = rf"out has shape {re.escape(str(list(shape)))}, the product \[2, 4, 4\]"
    expect(ValueError, text, out=torch.full(shape, POISON))


@pytest.mark.parametrize("dtype", (torch.float64, torch.int32, torch.uint8))
def test_out_dtype(dtype):
    text = rf"out.*{dtype}.*expected float32, float16 or bfloat16"
    expect(TypeError, text, out=torch.zeros(2, 4, 4, dtype=dtype))
    expect(TypeError, text, out=None, out_dtype=dtype)


def test_out_dtype_twice():
    text = "out_dtype=torch.float16, but out has dtype torch.float32: leave out_dtype out"
    expect(ValueError, text, out_dtype=torch.float16)


def test_out_that_is_no_plain_tensor():
    expect(TypeError, "out: expected a torch.Tensor in high precision, got list", out=[])
    expect(
        TypeError,
        "out: expected .* got Float8Tensor; for a quantized result pass quantization_params",
        out=float8(),
    )


def test_out_with_elements_that_share_memory():
    out = torch.full((1, 4, 4), POISON).expand(2, 4, 4)
    expect(
        ValueError,
        r"out of shape \[2, 4, 4\] and strides \[0, 4, 1\] has elements that share",
        out=out,
    )


@pytest.mark.parametrize("name", ("A", "B", "bias"))
@pytest.mark.parametrize("overlap", ("same", "part"))
def test_out_that_aliases_an_input(name, overlap):
    memory = torch.full((200,), POISON)
    out = memory[8:40].view(2, 4, 4)
    start = 8 if overlap == "same" else 39
    if name == "bias":
        inputs = {"bias": memory[start : start + 4]}
    else:
        inputs = {name: memory[start : start + 64].view(2, 4, 8)}
    text = f"out and (operand )?{name} share memory.*pass another out"
    expect(ValueError, text, out=out, **inputs)


def test_out_next_to_an_input_is_fine():
    memory = torch.randn(64 + 32 + 4)
    a, out, bias = memory[:64].view(2, 4, 8), memory[64:96].view(2, 4, 4), memory[96:]
    expected = a.double() @ a.double().mT + bias.double()
    teb.batched_general_gemm(a, a, out=out, bias=bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_aliasing_is_checked_at_every_call():
    # The launch is cached after the first; the addresses are those of the second.
    square = torch.randn(2, 4, 4)
    teb.batched_general_gemm(square, square, out=torch.zeros(2, 4, 4))
    before = square.clone()
    with pytest.raises(ValueError, match="share memory"):
        teb.batched_general_gemm(square, square, out=square)
    assert torch.equal(square, before)


# --- bias -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((5,), (1,), (1, 4), (4, 2), (2, 1, 4), ()))
def test_bias_shape(shape):
    text = rf"bias has shape {re.escape(str(list(shape)))}: expected \[4\] or \[2, 4\]"
    expect(ValueError, text, bias=torch.randn(shape))


@pytest.mark.parametrize("dtype", (torch.float64, torch.int32, torch.complex64))
def test_bias_dtype(dtype):
    text = rf"bias has dtype {dtype}: expected float32, float16 or bfloat16"
    expect(TypeError, text, bias=torch.ones(4).to(dtype))


def test_bias_that_is_no_tensor():
    expect(TypeError, "bias: expected a torch.Tensor.*, got list", bias=[1.0] * 4)


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("A", "B", "out", "bias"))
def test_inputs_that_require_grad(name):
    tensors = {
        "out": torch.full((2, 4, 4), POISON),
        "A": good(),
        "B": good(),
        "bias": torch.randn(4),
    }
    tensors[name].requires_grad_()
    message = expect(
        ValueError, f"^{name} requires grad, but this function is not differ", **tensors
    )
    assert "torch.no_grad()" in message and "te.BatchedMatmul are differentiable" in message


def test_quantized_inputs_that_require_grad():
    x = float8().requires_grad_()
    with teb.emulate():
        expect(ValueError, "A requires grad", x, float8())


# --- what cannot be batched -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("ub", "ub_type", "extra_output", "bulk_overlap"))
def test_communication_overlap(name):
    text = f"{name}=.*communication overlap.*has no batched form. Call general_gemm"
    value = True if name == "bulk_overlap" else torch.zeros(1)
    expect(teb.UnsupportedError, text, **{name: value})


def test_gradient_epilogues():
    expect(teb.UnsupportedError, "gelu_in is the input of TE's dGELU", gelu_in=good())
    text = "grad=True with gelu or bias asks for TE's dGELU or bias-gradient"
    expect(teb.UnsupportedError, text, grad=True, gelu=True)
    expect(teb.UnsupportedError, text, grad=True, bias=torch.randn(4))


def test_unknown_keyword():
    expect(
        TypeError, r"batched_general_gemm\(\) got an unexpected keyword argument 'beto'", beto=1.0
    )
    with pytest.raises(TypeError, match="layout"):
        teb.bmm(good(), good(), layout="TN")


# --- quantized output -------------------------------------------------------------------------------------


def test_quantization_params():
    text = "quantization_params: expected one of TE's quantizers, got"
    expect(TypeError, f"{text} dtype", quantization_params=torch.float8_e4m3fn, out=None)
    quantizer = make_quantizer("float8_current")
    text = "quantization_params returns a new quantized tensor and takes no `out`"
    expect(teb.UnsupportedError, text, quantization_params=quantizer)


@pytest.mark.parametrize("emulated", (False, True))
@pytest.mark.parametrize("make", (Float8BlockQuantizer, NVFP4Quantizer))
def test_quantizers_without_engine(make, emulated):
    if make is NVFP4Quantizer:
        quantizer = object.__new__(NVFP4Quantizer)  # its constructor wants a GPU
        text = "NVFP4"
    else:
        quantizer = make(te.DType.kFloat8E4M3, rowwise=True, columnwise=False)
        text = "quantization to Float8 128-blocks.* on CPU.*emulate"
    for call_ in (
        lambda: teb.batched_general_gemm(good(), good(), quantization_params=quantizer),
        lambda: teb.quantize(good(), quantizer),
    ):
        with teb.emulate() if emulated else contextlib.nullcontext():
            if emulated and make is Float8BlockQuantizer:
                assert isinstance(call_(), Float8BlockwiseQTensorStorage)
                continue
            with pytest.raises(teb.UnsupportedError, match=text):
                call_()


@pytest.mark.parametrize("name", ("scale", "amax"))
@pytest.mark.parametrize(
    "state", (torch.zeros(1, device="meta"), torch.zeros(1).double(), torch.zeros(2))
)
def test_state_of_a_delayed_quantizer(name, state):
    # The library gets its address: another device or type would be read as what it is not.
    quantizer = make_quantizer("float8_delayed")
    setattr(quantizer, name, state)
    text = f"quantizer's `?{name}`? must be one float32 on cpu"
    with teb.emulate(), pytest.raises(ValueError, match=text):
        teb.batched_general_gemm(float8(), float8(), quantization_params=quantizer)


def test_quantized_output_needs_the_switch_on_a_cpu():
    with pytest.raises(teb.UnsupportedError, match="quantization to Float8.* on CPU.*emulate"):
        teb.batched_general_gemm(
            good(), good(), quantization_params=make_quantizer("float8_current")
        )


@pytest.mark.parametrize("recipe", ("float8_current", "float8_delayed", "mxfp8"))
def test_recipes_that_the_device_lacks(recipe):
    x = float8(recipe=recipe)
    message = expect(teb.UnsupportedError, "on CPU: FP8 tensor cores need a CUDA device", x, x)
    assert "transformer_engine_batched.emulate()" in message
    message = "quantization to .* was asked for on CPU: .*exact reference quantizer.*emulate"
    with pytest.raises(teb.UnsupportedError, match=message):
        teb.quantize(torch.randn(2, 32, 32), make_quantizer(recipe))


# --- quantize ---------------------------------------------------------------------------------------------


def test_quantize_arguments():
    quantizer = make_quantizer("float8_current")
    with teb.emulate():
        with pytest.raises(TypeError, match="quantizer: expected one of TE's quantizers, got str"):
            teb.quantize(good(), "float8")
        with pytest.raises(TypeError, match="x is a Float8Tensor already"):
            teb.quantize(float8(), quantizer)
        with pytest.raises(TypeError, match="x: expected a torch.Tensor, got list"):
            teb.quantize([1.0], quantizer)
        with pytest.raises(TypeError, match="float64"):
            teb.quantize(good().double(), quantizer)
        with pytest.raises(ValueError, match="MXFP8 needs the last dimension"):
            teb.quantize(torch.randn(2, 32, 33), make_quantizer("mxfp8"))


def test_failed_calls_leave_no_launch(fresh_launches):
    from transformer_engine_batched import gemm

    for shape in ((2, 4, 9), (3, 4, 8)):
        with pytest.raises(ValueError):
            teb.batched_general_gemm(torch.randn(shape), good())
    assert not gemm._launches


def test_unsupported_error_is_a_not_implemented_error():
    assert issubclass(teb.UnsupportedError, NotImplementedError)


def test_operands_made_by_the_helper_are_good():
    # The poisoned `out` of this file would be written by a call without a fault.
    out = torch.full((2, 4, 4), POISON)
    teb.batched_general_gemm(good(), good(), out=out)
    assert (out != POISON).all()
    x = make_operand("bf16", (2, 4, 8), last_dim=True, seed=0)
    assert torch.equal(x.tensor.double(), x.exact)
