# SPDX-License-Identifier: Apache-2.0
"""`enable_quantized_bmm` on the CPU: which of torch's calls are taken, their numbers and gradients, and
that everything else is TE's.

Expected values are FP64 products of the dequantised operands, item by item; what falls through must equal
TE's own result bit for bit. Needs no GPU.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import operator
import threading
import weakref

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import assert_accurate, dequantize, make_operand, make_quantizer, random_values
from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

import transformer_engine_batched as teb
from transformer_engine_batched.quantized_bmm.switch import (
    disable_quantized_bmm,
    enable_quantized_bmm,
)
from transformer_engine_batched.quantized_bmm.transposed_view import TransposedView

pytestmark = pytest.mark.usefixtures("emulated")

QUANTIZED = ("float8_delayed", "float8_current", "mxfp8")
M, N, K = 64, 96, 128


@pytest.fixture
def enabled():
    """The whole test runs with FP8 products."""
    with enable_quantized_bmm():
        yield


@pytest.fixture
def no_dequantize(monkeypatch):
    """Fails a test in which TE dequantizes anything."""

    def refuse(*_args, **_options):
        raise AssertionError("dequantized")

    for cls in (te.Float8Tensor, te.MXFP8Tensor):
        monkeypatch.setattr(cls, "dequantize", refuse)


def operand(recipe, shape, seed, *, last_dim=True, **options):
    return make_operand(recipe, shape, last_dim=last_dim, seed=seed, **options)


def float8(shape, seed, fp8="e4m3"):
    return operand("float8_current", shape, seed, fp8=fp8).tensor


def run_disabled(function):
    """Result of a call with TE's own class."""
    assert QuantizedTensor.__torch_function__ is not torch._C._disabled_torch_function_impl
    hook = QuantizedTensor.__dict__["__torch_function__"]
    QuantizedTensor.__torch_function__ = torch._C._disabled_torch_function_impl
    try:
        return function()
    finally:
        QuantizedTensor.__torch_function__ = hook


def quantized_gradient(recipe, grad, last_dim):
    """FP64 numbers of the codes to which an incoming gradient is rounded."""
    if recipe == "mxfp8":
        return dequantize(teb.quantize(grad, make_quantizer("mxfp8")), last_dim=last_dim)
    return dequantize(teb.quantize(grad, make_quantizer("float8_current", "e5m2")))


# --- products -----------------------------------------------------------------------------------------------

PRODUCTS = {
    "torch.bmm": torch.bmm,
    "bmm with names": lambda a, b: torch.bmm(input=a, mat2=b),
    "Tensor.bmm": lambda a, b: a.bmm(b),
    "torch.matmul": torch.matmul,
    "torch.linalg.matmul": torch.linalg.matmul,
    "Tensor.matmul": lambda a, b: a.matmul(other=b),
    "@": operator.matmul,
    "__rmatmul__": lambda a, b: b.__rmatmul__(a),
}


@pytest.mark.usefixtures("enabled", "no_dequantize")
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("recipe", QUANTIZED)
def test_products(recipe, product):
    a = operand(recipe, (3, M, K), 0)
    b = operand(recipe, (3, K, N), 1, last_dim=False)
    out = product(a.tensor, b.tensor)
    assert type(out) is torch.Tensor and out.dtype == torch.bfloat16 and out.is_contiguous()
    assert_accurate(out, a.exact @ b.exact)


@pytest.mark.usefixtures("enabled", "no_dequantize")
@pytest.mark.parametrize("b_transposed", (False, True))
@pytest.mark.parametrize("a_transposed", (False, True))
@pytest.mark.parametrize("recipe", QUANTIZED)
def test_transposed_operands(recipe, a_transposed, b_transposed):
    a = operand(recipe, (3, K, M) if a_transposed else (3, M, K), 0, last_dim=not a_transposed)
    b = operand(recipe, (3, N, K) if b_transposed else (3, K, N), 1, last_dim=b_transposed)
    factors = [
        (x.tensor.mT, x.exact.mT) if transposed else (x.tensor, x.exact)
        for x, transposed in ((a, a_transposed), (b, b_transposed))
    ]
    out = torch.bmm(factors[0][0], factors[1][0])
    assert out.is_contiguous()
    assert_accurate(out, factors[0][1] @ factors[1][1])


TRANSPOSITIONS = {
    "transpose": lambda x: x.transpose(1, 2),
    "transpose, negative": lambda x: x.transpose(-1, -2),
    "torch.transpose": lambda x: torch.transpose(x, 2, 1),
    "transpose with names": lambda x: x.transpose(dim0=1, dim1=2),
    "mT": lambda x: x.mT,
    "mH": lambda x: x.mH,
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "torch.swapdims": lambda x: torch.swapdims(x, -2, -1),
    "permute": lambda x: x.permute(0, 2, 1),
    "permute, tuple": lambda x: x.permute((0, -1, 1)),
    "torch.permute": lambda x: torch.permute(x, dims=(0, 2, 1)),
}


@pytest.mark.usefixtures("enabled", "no_dequantize")
@pytest.mark.parametrize("transpose", TRANSPOSITIONS.values(), ids=TRANSPOSITIONS)
def test_transpositions(transpose):
    a, b = operand("float8_current", (3, M, K), 0), operand("float8_current", (3, N, K), 1)
    view = transpose(b.tensor)
    assert type(view) is TransposedView and view.shape == (3, K, N)
    assert (view.dtype, view.device, view.stride()) == (
        b.tensor.dtype,
        b.tensor.device,
        (N * K, 1, K),
    )
    assert_accurate(torch.bmm(a.tensor, view), a.exact @ b.exact.mT)


@pytest.mark.usefixtures("enabled", "no_dequantize")
@pytest.mark.parametrize(
    "transpose", (lambda x: x.T, lambda x: x.t(), torch.t), ids=("T", "t()", "t")
)
def test_transpositions_of_matrices(transpose):
    a, b = operand("float8_current", (3, 2, M, K), 0), operand("float8_current", (N, K), 1)
    assert_accurate(a.tensor @ transpose(b.tensor), a.exact @ b.exact.mT)


@pytest.mark.usefixtures("enabled", "no_dequantize")
@pytest.mark.parametrize(
    "batches",
    (((2, 3), (2, 3)), ((2, 1), (3,)), ((), (2, 3)), ((2, 3), ()), ((), ()), ((1, 1), (2, 3))),
    ids=str,
)
def test_matmul_broadcasts(batches):
    a = operand("float8_current", (*batches[0], M, K), 0)
    b = operand("float8_current", (*batches[1], K, N), 1)
    assert_accurate(torch.matmul(a.tensor, b.tensor), a.exact @ b.exact)


@pytest.mark.usefixtures("enabled", "no_dequantize")
@pytest.mark.parametrize("input_shape", ((3, M, N), (M, N), (3, 1, N), (N,), (1,)), ids=str)
@pytest.mark.parametrize("b_transposed", (False, True))
@pytest.mark.parametrize("a_transposed", (False, True))
def test_baddbmm(a_transposed, b_transposed, input_shape):
    a = operand("float8_current", (3, K, M) if a_transposed else (3, M, K), 0)
    b = operand("float8_current", (3, N, K) if b_transposed else (3, K, N), 1)
    c = random_values(input_shape, 2).bfloat16()
    left = (a.tensor.mT, a.exact.mT) if a_transposed else a
    right = (b.tensor.mT, b.exact.mT) if b_transposed else b
    kept = c.clone()
    out = torch.baddbmm(c, left[0], right[0], beta=-2.0, alpha=0.5)
    # The doubly transposed product is rounded before the sum.
    assert_accurate(out, 0.5 * left[1] @ right[1] - 2 * c.double())
    assert torch.equal(c, kept) and out.is_contiguous()
    assert_accurate(c.baddbmm(left[0], right[0]), left[1] @ right[1] + c.double())


@pytest.mark.usefixtures("enabled", "no_dequantize")
def test_baddbmm_ignores_its_input_without_beta():
    a, b = operand("float8_current", (3, M, K), 0), operand("float8_current", (3, K, N), 1)
    c = torch.full((3, M, N), torch.nan, dtype=torch.bfloat16)
    assert_accurate(torch.baddbmm(c, a.tensor, b.tensor, beta=0), a.exact @ b.exact)


@pytest.mark.usefixtures("enabled")
def test_baddbmm_of_three_quantized():
    a, b = operand("float8_current", (3, M, K), 0), operand("float8_current", (3, K, N), 1)
    c = operand("float8_current", (3, M, N), 2)
    d = operand("float8_current", (3, N, M), 3)
    assert_accurate(torch.baddbmm(c.tensor, a.tensor, b.tensor), c.exact + a.exact @ b.exact)
    assert_accurate(torch.baddbmm(d.tensor.mT, a.tensor, b.tensor), d.exact.mT + a.exact @ b.exact)


@pytest.mark.usefixtures("enabled", "no_dequantize")
def test_nominal_dtype_and_autocast():
    quantizer = make_quantizer("float8_current")
    a, b = (teb.quantize(random_values((2, 32, 32), seed), quantizer) for seed in (0, 1))
    expected = dequantize(a) @ dequantize(b)
    assert (a @ b).dtype == torch.float32
    assert_accurate(a @ b, expected)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.bmm(a, b)
        assert out.dtype == torch.bfloat16
        assert_accurate(out, expected)
        added = torch.baddbmm(torch.ones(32), a, b)
        assert added.dtype == torch.bfloat16
        assert_accurate(added, expected + 1)


# --- gradients ----------------------------------------------------------------------------------------------


def backward_case(recipe, *, a_transposed=False, b_transposed=False, fp8="e4m3"):
    """(a, b) as leaves, (op(a), op(b)) and the incoming gradient."""
    a = operand(recipe, (3, K, M) if a_transposed else (3, M, K), 0, fp8=fp8).tensor
    b = operand(recipe, (3, N, K) if b_transposed else (3, K, N), 1).tensor
    a.requires_grad_(), b.requires_grad_()
    grad = random_values((3, M, N), 2).bfloat16()
    return a, b, (a.mT if a_transposed else a), (b.mT if b_transposed else b), grad


@pytest.mark.usefixtures("enabled", "no_dequantize")
@pytest.mark.parametrize("b_transposed", (False, True))
@pytest.mark.parametrize("a_transposed", (False, True))
@pytest.mark.parametrize("recipe", ("float8_delayed", "float8_current", "mxfp8"))
def test_gradients_are_fp8_products(recipe, a_transposed, b_transposed):
    a, b, left, right, grad = backward_case(
        recipe, a_transposed=a_transposed, b_transposed=b_transposed
    )
    (left @ right).backward(grad)
    # Both operands are contracted along their other dim than in the forward product.
    a_exact = dequantize(a, last_dim=a_transposed)
    b_exact = dequantize(b, last_dim=not b_transposed)
    grad_left = quantized_gradient(recipe, grad, True) @ (b_exact if b_transposed else b_exact.mT)
    grad_right = (a_exact if a_transposed else a_exact.mT) @ quantized_gradient(recipe, grad, False)
    for x, expected in (
        (a, grad_left.mT if a_transposed else grad_left),
        (b, grad_right.mT if b_transposed else grad_right),
    ):
        assert type(x.grad) is torch.Tensor and x.grad.dtype == torch.bfloat16
        assert_accurate(x.grad, expected)


@pytest.mark.usefixtures("enabled", "no_dequantize")
@pytest.mark.parametrize("which", (0, 1))
def test_gradient_of_one_operand(which):
    a, b, _, _, grad = backward_case("float8_current")
    (b, a)[which].requires_grad_(False)
    torch.bmm(a, b).backward(grad)
    codes = quantized_gradient("float8_current", grad, True)
    expected = (codes @ dequantize(b).mT, dequantize(a).mT @ codes)[which]
    assert (b, a)[which].grad is None
    assert_accurate((a, b)[which].grad, expected)


@pytest.mark.usefixtures("enabled")
def test_gradient_reaches_the_tensor_that_was_quantized():
    """TE's quantizers are differentiable; here their autograd function, without their kernel."""
    from transformer_engine.pytorch.tensor._quantization_helpers import _QuantizeFunc

    quantizer = make_quantizer("float8_current")
    sources = [random_values((2, 32, 32), seed).requires_grad_() for seed in (0, 1)]
    a, b = (_QuantizeFunc.apply(x, lambda x: teb.quantize(x, quantizer)) for x in sources)
    grad = random_values((2, 32, 32), 2)
    torch.bmm(a, b.transpose(1, 2)).backward(grad)
    codes = quantized_gradient("float8_current", grad, True)
    assert_accurate(sources[0].grad, codes @ dequantize(b))
    assert_accurate(sources[1].grad, codes.mT @ dequantize(a))


@pytest.mark.usefixtures("enabled", "no_dequantize")
def test_gradients_of_broadcast_operands():
    a, b = float8((2, 3, M, K), 0).requires_grad_(), float8((3, K, N), 1).requires_grad_()
    grad = random_values((2, 3, M, N), 2).bfloat16()
    torch.matmul(a, b).backward(grad)
    codes = quantized_gradient("float8_current", grad, True)
    assert_accurate(a.grad, codes @ dequantize(b).mT)
    assert b.grad.shape == b.shape
    # Two rounded products are summed.
    assert_accurate(b.grad, (dequantize(a).mT @ codes).sum(0), 48.0)


@pytest.mark.usefixtures("enabled", "no_dequantize")
def test_gradients_of_baddbmm():
    a, b, _, _, grad = backward_case("float8_current")
    c = random_values((M, 1), 3).bfloat16().requires_grad_()
    torch.baddbmm(c, a, b, beta=3, alpha=0.25).backward(grad)
    codes = quantized_gradient("float8_current", grad, True)
    assert_accurate(a.grad, 0.25 * codes @ dequantize(b).mT)
    assert_accurate(b.grad, 0.25 * dequantize(a).mT @ codes)
    assert_accurate(c.grad, 3 * grad.double().sum((0, 2))[:, None], 45.0)


def test_gradients_after_the_switches():
    """What runs in backward is what was decided in forward."""
    with enable_quantized_bmm():
        a, b, _, _, grad = backward_case("float8_current")
        out = a @ b
    out.backward(grad)
    assert_accurate(a.grad, quantized_gradient("float8_current", grad, True) @ dequantize(b).mT)


@pytest.mark.usefixtures("enabled", "no_dequantize")
def test_gradients_in_another_thread():
    """As autograd computes those of CUDA tensors: where no `emulate()` is active."""
    a, b, _, _, grad = backward_case("float8_current")
    out = a @ b
    thread = threading.Thread(target=out.backward, args=(grad,))
    thread.start()
    thread.join()
    assert_accurate(a.grad, quantized_gradient("float8_current", grad, True) @ dequantize(b).mT)


@pytest.mark.usefixtures("enabled")
def test_gradients_without_the_copy_are_in_high_precision():
    a, b, _, _, grad = backward_case("float8_current")
    out = a @ b
    b._data = None  # row-wise, of which grad_a is made
    out.backward(grad)
    b_exact = dequantize(b)
    assert_accurate(a.grad, grad.double() @ b_exact.mT)
    assert_accurate(b.grad, dequantize(a).mT @ quantized_gradient("float8_current", grad, True))


@pytest.mark.usefixtures("enabled")
def test_gradients_with_an_e5m2_operand():
    a, b, _, _, grad = backward_case("float8_current", fp8="e5m2")
    torch.bmm(a, b).backward(grad)
    assert_accurate(a.grad, quantized_gradient("float8_current", grad, True) @ dequantize(b).mT)
    assert_accurate(b.grad, dequantize(a).mT @ grad.double())


@pytest.mark.usefixtures("enabled")
def test_gradients_of_sizes_that_mxfp8_cannot_block():
    a = operand("mxfp8", (4, 24, 64), 0).tensor.requires_grad_()
    b = operand("mxfp8", (4, 64, 96), 1).tensor.requires_grad_()
    grad = random_values((4, 24, 96), 2).bfloat16()
    torch.bmm(a, b).backward(grad)
    assert_accurate(a.grad, quantized_gradient("mxfp8", grad, True) @ dequantize(b).mT)
    assert_accurate(b.grad, dequantize(a).mT @ grad.double())


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("recipe", ("float8_current", "mxfp8"))
def test_double_backward_is_in_high_precision(recipe):
    a, b, _, right, grad = backward_case(recipe, b_transposed=True)
    grad.requires_grad_()
    values = [dequantize(x).requires_grad_() for x in (a, b)]
    exact_grad = grad.detach().double().requires_grad_()

    def penalize(left, right, leaves, grad):
        first = torch.autograd.grad(left @ right, leaves, grad, create_graph=True)
        sum(x.square().sum() for x in first).backward()
        return first

    first = penalize(a, right, (a, b), grad)
    expected = penalize(values[0], values[1].mT, values, exact_grad)
    for x, y in (*zip(first, expected), (a.grad, values[0].grad), (b.grad, values[1].grad)):
        assert_accurate(x.detach(), y.detach(), 40.0)
    assert_accurate(grad.grad, exact_grad.grad, 40.0)


@pytest.mark.usefixtures("enabled")
def test_zero_gradient():
    a, b, _, _, grad = backward_case("float8_current")
    torch.bmm(a, b).backward(torch.zeros_like(grad))
    assert not a.grad.any() and not b.grad.any()


# --- what is TE's -------------------------------------------------------------------------------------------

FALL_THROUGH = {
    "plain right": lambda a, b, x: torch.bmm(a, x),
    "plain left": lambda a, b, x: x.mT @ b,
    "plain and view": lambda a, b, x: torch.bmm(x.mT, b.mT),
    "vector": lambda a, b, x: torch.matmul(a, x[0, :, 0]),
    "mm": lambda a, b, x: torch.mm(a[0], b[0].mT),
    "einsum": lambda a, b, x: torch.einsum("bmk,bnk->bmn", a, b),
    "out=": lambda a, b, x: torch.bmm(a, b.mT, out=torch.empty(3, 32, 32, dtype=x.dtype)),
    "add": lambda a, b, x: a + b,
    "add view": lambda a, b, x: a.mT + b.mT,
    "add quantized and view": lambda a, b, x: a + b.mT,
    "exp": lambda a, b, x: b.mT.exp(),
    "view of a view": lambda a, b, x: b.mT[1:].reshape(-1, 32).contiguous(),
    "transposed twice": lambda a, b, x: b.mT.mT,
    "other dims": lambda a, b, x: b.transpose(0, 1),
    "cat": lambda a, b, x: torch.cat([a, b.mT, x]),
    "softmax": lambda a, b, x: torch.nn.functional.softmax(a.mT, -1),
    "linear": lambda a, b, x: torch.nn.functional.linear(a.mT, b[0]),
    "baddbmm with a plain operand": lambda a, b, x: torch.baddbmm(x, a, x),
    "numpy": lambda a, b, x: torch.from_numpy(b.mT.float().numpy()),
    "numpy of a view": lambda a, b, x: torch.tensor(b.mT.detach().float().tolist()),
    "tolist": lambda a, b, x: torch.tensor(b.mT.tolist()),
    "deepcopy": lambda a, b, x: copy.deepcopy(b.mT),
    "to": lambda a, b, x: b.mT.to(torch.float64),
    "detach": lambda a, b, x: b.mT.detach(),
    "clone": lambda a, b, x: b.mT.clone(),
}


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("call", FALL_THROUGH.values(), ids=FALL_THROUGH)
def test_everything_else_is_te(call):
    arguments = (
        float8((3, 32, 32), 0),
        float8((3, 32, 32), 1),
        random_values((3, 32, 32), 2).bfloat16(),
    )
    out, expected = call(*arguments), run_disabled(lambda: call(*arguments))
    out = out.clone() if isinstance(out, TransposedView) else out
    assert type(out) is type(expected) and out.dtype == expected.dtype
    assert torch.equal(out, expected)


# Of these torch has no gradient.
_WITHOUT_GRADIENT = ("out=", "numpy", "numpy of a view", "tolist", "deepcopy", "detach")


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("name", [name for name in FALL_THROUGH if name not in _WITHOUT_GRADIENT])
def test_everything_else_has_te_gradients(name):
    def run():
        leaves = [float8((3, 32, 32), seed).requires_grad_() for seed in (0, 1)]
        out = FALL_THROUGH[name](*leaves, random_values((3, 32, 32), 2).bfloat16())
        out.backward(random_values(tuple(out.shape), 3).to(out.dtype))
        return [x.grad for x in leaves]

    grads, expected = run(), run_disabled(run)
    for x, y in zip(grads, expected):
        assert (x is None) == (y is None) and (x is None or torch.equal(x, y))


def unlike(name):
    """(a, b) of which torch or the tensor cores take no product, or for which a copy is missing."""
    a, b = float8((2, 32, 32), 0), float8((2, 32, 32), 1)
    if name == "both e5m2":
        a, b = float8((2, 32, 32), 0, "e5m2"), float8((2, 32, 32), 1, "e5m2")
    elif name == "no column-wise copy":
        b._transpose, b._transpose_invalid = None, True
    elif name == "stale column-wise copy":
        b._transpose_invalid = True
    elif name == "no row-wise copy":
        a._data = None
    return a, b


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize(
    "name", ("both e5m2", "no column-wise copy", "stale column-wise copy", "no row-wise copy")
)
def test_what_has_no_product_is_te(name):
    a, b = unlike(name)
    assert torch.equal(torch.bmm(a, b), run_disabled(lambda: torch.bmm(a, b)))
    a.requires_grad_()
    out = torch.bmm(a, b)
    assert torch.equal(out, run_disabled(lambda: a @ b))
    assert type(out.grad_fn).__name__ == "BmmBackward0"


@pytest.mark.usefixtures("enabled")
def test_view_without_row_wise_data_is_te():
    a, b = float8((2, 32, 32), 0), float8((2, 32, 32), 1)
    b._data = None
    assert torch.equal(torch.bmm(a, b.mT), run_disabled(lambda: torch.bmm(a, b.mT)))


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize(
    "shapes", (((2, 32, 32), (3, 32, 32)), ((2, 32, 64), (2, 32, 64)), ((2, 32, 32), (32, 32)))
)
def test_torch_refuses_wrong_shapes_itself(shapes):
    a, b = (float8(shape, seed) for seed, shape in enumerate(shapes))
    with pytest.raises(RuntimeError) as expected:
        run_disabled(lambda: torch.bmm(a, b))
    with pytest.raises(RuntimeError) as error:
        torch.bmm(a, b)
    assert str(error.value) == str(expected.value)


@pytest.mark.usefixtures("enabled")
def test_torch_refuses_unequal_nominal_dtypes_itself():
    a = float8((2, 32, 32), 0)
    b = teb.quantize(random_values((2, 32, 32), 1), make_quantizer("float8_current"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        torch.bmm(a, b)


@pytest.mark.usefixtures("enabled")
def test_formats_that_differ_are_te(monkeypatch):
    a, b = float8((2, 32, 32), 0), operand("mxfp8", (2, 32, 32), 1)
    # TE's kernel for it needs a GPU.
    monkeypatch.setattr(
        te.MXFP8Tensor, "dequantize", lambda self, *, dtype=None: b.exact.to(dtype or self.dtype)
    )
    with pytest.raises(TypeError, match="different formats"):
        teb.bmm(a, b.tensor)
    out = torch.bmm(a, b.tensor)
    assert torch.equal(out, torch.bmm(a.dequantize(), b.exact.bfloat16()))


def test_devices_without_an_engine_are_te():
    """Outside `emulate()` a CPU multiplies no FP8."""
    a, b = float8((2, 32, 32), 0), float8((2, 32, 32), 1)
    result = []

    def run():  # a thread of its own starts outside `emulate()`
        with enable_quantized_bmm():
            result.extend((b.mT, torch.bmm(a, b), torch.bmm(a, b.mT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    values = a.dequantize(), b.dequantize()
    assert type(result[0]) is torch.Tensor
    assert torch.equal(result[1], torch.bmm(*values))
    assert torch.equal(result[2], torch.bmm(values[0], values[1].mT))


@pytest.mark.usefixtures("enabled")
def test_a_class_with_a_say_decides():
    class Loud(torch.Tensor):
        """Answers each torch function with its name."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func.__name__

    loud = torch.ones(2, 32, 32).as_subclass(Loud)
    assert torch.bmm(float8((2, 32, 32), 0), loud) == "bmm"
    assert torch.bmm(loud, float8((2, 32, 32), 0).mT) == "bmm"


# --- transposed views ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("enabled")
def test_writes_to_a_view_are_seen():
    a, b = float8((2, 32, 32), 0), float8((2, 32, 32), 1)
    for write in (
        lambda x: x.mul_(2),
        lambda x: x[1].zero_(),
        lambda x: x.add_(a),
        lambda x: torch.mul(a, a, out=x),
        lambda x: x.__setitem__((0, 0), 3.0),
    ):
        view, plain = b.mT, b.dequantize().mT
        torch.bmm(a, view)
        write(view)
        run_disabled(lambda: write(plain))
        assert torch.equal(view.clone(), plain) and view.read_source() is None
        assert torch.equal(torch.bmm(a, view), torch.bmm(a.dequantize(), plain))


@pytest.mark.usefixtures("enabled")
def test_reading_a_view_keeps_it():
    a, b = operand("float8_current", (2, 32, 32), 0), operand("float8_current", (2, 32, 32), 1)
    view = b.tensor.mT
    view.sum(), view.exp(), view + a.tensor, view.numel(), view.shape, view.is_contiguous()
    assert view.read_source() is b.tensor
    assert_accurate(a.tensor @ view, a.exact @ b.exact.mT)


@pytest.mark.usefixtures("enabled")
def test_memory_of_a_view():
    view = float8((2, 32, 48), 0).mT
    assert view.data_ptr() == view.data_ptr() != 0
    file = io.BytesIO()
    torch.save(view, file)
    file.seek(0)
    assert torch.equal(torch.load(file), view.clone())


@pytest.mark.usefixtures("enabled")
def test_view_outlives_the_switch():
    a, b = float8((2, 32, 32), 0), float8((2, 32, 32), 1)
    view = b.mT
    out = run_disabled(lambda: torch.bmm(a, view))
    assert out.shape == (2, 32, 32)
    disable_quantized_bmm()
    assert torch.equal(torch.bmm(a, view), torch.bmm(a.dequantize(), b.dequantize().mT))
    assert torch.equal(view + 0, b.dequantize().mT)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("shape", ((2, 1, 32), (2, 32, 1)))
def test_vectors_are_not_viewed(shape):
    assert type(float8(shape, 0).mT) is torch.Tensor


@pytest.mark.usefixtures("enabled")
def test_gradient_through_autograd_functions():
    """A function of the caller's sees the view itself, and its gradient arrives."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    b = float8((2, 32, 48), 0).requires_grad_()
    grad = random_values((2, 48, 32), 1).bfloat16()
    Double.apply(b.mT).backward(grad)
    assert torch.equal(b.grad, 2 * grad.mT)


# --- the switch ---------------------------------------------------------------------------------------------


def is_hooked():
    return QuantizedTensor.__torch_function__ is not torch._C._disabled_torch_function_impl


def test_restored():
    assert not is_hooked()
    before = QuantizedTensor.__dict__["__torch_function__"]
    with enable_quantized_bmm() as demand:
        assert is_hooked() and repr(demand) == "<QuantizedBmm, enabled>"
    assert QuantizedTensor.__dict__["__torch_function__"] is before
    with pytest.raises(KeyError):
        with enable_quantized_bmm():
            raise KeyError
    assert not is_hooked()
    assert type(float8((2, 32, 32), 0).mT) is torch.Tensor


def test_nested():
    with enable_quantized_bmm():
        with enable_quantized_bmm():
            pass
        assert is_hooked()
        enable_quantized_bmm()
        disable_quantized_bmm()
        assert is_hooked()
    assert not is_hooked()


def test_disabled_within_its_block():
    with enable_quantized_bmm() as demand:
        disable_quantized_bmm()
        assert not is_hooked() and repr(demand) == "<QuantizedBmm, disabled>"
    disable_quantized_bmm()
    assert not is_hooked()
    with demand:  # once more
        assert is_hooked()
    assert not is_hooked()


def test_threads():
    def toggle():
        for _ in range(200):
            with enable_quantized_bmm():
                assert is_hooked()

    threads = [threading.Thread(target=toggle) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not is_hooked()


@pytest.mark.parametrize("enable", (False, True))
def test_compile(enable):
    """What TE can compile compiles with the switch as without."""
    a, b = float8((2, 32, 32), 0), float8((2, 32, 32), 1)
    with enable_quantized_bmm() if enable else contextlib.nullcontext():
        for function in (
            lambda x, y: torch.bmm(x.dequantize(), y.dequantize()),
            lambda x, y: x.detach().dequantize().mT @ y.view(2, 32, 32).dequantize(),
            lambda x, y: torch.ones(x.shape) * y.dequantize(),
        ):
            torch._dynamo.reset()
            compiled = torch.compile(function, backend="eager", fullgraph=True)
            assert torch.equal(compiled(a, b), function(a, b))


def test_warm_calls_do_not_grow():
    """Nothing is kept from call to call."""
    a, b = float8((2, 32, 32), 0), float8((2, 32, 32), 1)
    with enable_quantized_bmm():
        view = weakref.ref(b.mT)
        out = weakref.ref(torch.bmm(a.requires_grad_(), b.mT))
        gc.collect()
    assert view() is None and out() is None
