# SPDX-License-Identifier: Apache-2.0
"""`enable_quantized_bmm` on the GPU, with tensors of TE's own quantizers and cuBLASLt's products."""

from __future__ import annotations

import pytest
import torch
import transformer_engine.pytorch as te
import transformer_engine_torch as tex
from accuracy import assert_accurate
from accuracy import dequantize as decode
from products import dequantize, make_quantizer
from transformer_engine.common.recipe import Float8CurrentScaling

import transformer_engine_batched as teb
from transformer_engine_batched.quantized_bmm.switch import (
    disable_quantized_bmm,
    enable_quantized_bmm,
)
from transformer_engine_batched.quantized_bmm.transposed_view import TransposedView

KINDS = ("current", "delayed")
# Rounding of BF16 output and Hopper's accumulation, as in test_products.py.
BOUND_DB = 50.0


@pytest.fixture(autouse=True)
def enabled():
    """All tests run with FP8 products."""
    with enable_quantized_bmm():
        yield


@pytest.fixture
def no_dequantize(monkeypatch):
    """Fails a test in which TE dequantizes anything."""

    def refuse(*_args, **_options):
        raise AssertionError("dequantized")

    monkeypatch.setattr(te.Float8Tensor, "dequantize", refuse)


def values(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def gradient_codes(grad):
    """FP64 numbers of the codes to which TE rounds a gradient, decoded with torch."""
    return decode(make_quantizer("current", "e5m2")(grad))


def exact(x):
    """FP64 numbers of a Float8 tensor, decoded with torch."""
    return decode(x.detach())


@pytest.mark.usefixtures("no_dequantize")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", ((96, 160, 224), (37, 41, 43), (512, 512, 4096)), ids=str)
def test_products(kind, sizes):
    m, n, k = sizes
    a = make_quantizer(kind)(values(5, m, k))
    b, b_t = make_quantizer(kind)(values(5, k, n)), make_quantizer(kind)(values(5, n, k))
    for out in (torch.bmm(a, b), a @ b, torch.matmul(a, b)):
        assert out.dtype == torch.bfloat16
        assert_accurate(out, exact(a) @ exact(b), BOUND_DB)
    view = b_t.transpose(1, 2)
    assert type(view) is TransposedView
    assert_accurate(torch.bmm(a, view), exact(a) @ exact(b_t).mT, BOUND_DB)
    c = values(n)
    assert_accurate(
        torch.baddbmm(c, a, view, beta=2, alpha=0.5),
        0.5 * exact(a) @ exact(b_t).mT + 2 * c.double(),
        BOUND_DB,
    )


@pytest.mark.usefixtures("no_dequantize")
def test_row_wise_data_alone_serve_a_transposed_operand():
    a, b = (make_quantizer("current", columnwise=False)(values(3, 64, 96)) for _ in "ab")
    assert_accurate(torch.bmm(a, b.mT), exact(a) @ exact(b).mT, BOUND_DB)


@pytest.mark.usefixtures("no_dequantize")
@pytest.mark.parametrize("b_transposed", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, b_transposed):
    x = values(4, 64, 96).requires_grad_()
    y = values(4, *((160, 96) if b_transposed else (96, 160))).requires_grad_()
    a, b = make_quantizer(kind)(x), make_quantizer(kind)(y)
    out = torch.bmm(a, b.transpose(1, 2) if b_transposed else b)
    grad = values(4, 64, 160)
    out.backward(grad)
    codes, a_exact, b_exact = gradient_codes(grad), exact(a), exact(b)
    assert_accurate(x.grad, codes @ (b_exact if b_transposed else b_exact.mT), BOUND_DB)
    grad_b = a_exact.mT @ codes
    assert_accurate(y.grad, grad_b.mT if b_transposed else grad_b, BOUND_DB)


@pytest.mark.parametrize("frozen", (0, 1))
def test_gradient_of_one_operand(frozen):
    leaves = [values(4, 64, 96).requires_grad_(), values(4, 96, 160).requires_grad_()]
    leaves[frozen].requires_grad_(False)
    a, b = (make_quantizer("current")(x) for x in leaves)
    grad = values(4, 64, 160)
    torch.bmm(a, b).backward(grad)
    codes = gradient_codes(grad)
    expected = exact(a).mT @ codes if frozen == 0 else codes @ exact(b).mT
    assert_accurate(leaves[1 - frozen].grad, expected, BOUND_DB)


def test_missing_copy_is_te():
    a = make_quantizer("current")(values(3, 64, 96))
    b = make_quantizer("current", columnwise=False)(values(3, 96, 160))
    if te.utils.is_non_tn_fp8_gemm_supported():
        pytest.skip("this device needs no column-wise copy")
    assert torch.equal(torch.bmm(a, b), torch.bmm(a.dequantize(), b.dequantize()))


def test_everything_else_is_te():
    a, b = (make_quantizer("current")(values(3, 64, 64)) for _ in "ab")
    x = values(3, 64, 64)
    plain_a, plain_b = a.dequantize(), b.dequantize()
    assert torch.equal(torch.bmm(a, x), torch.bmm(plain_a, x))
    assert torch.equal(a + b.mT, plain_a + plain_b.mT)
    assert torch.equal(torch.softmax(b.mT, -1), torch.softmax(plain_b.mT, -1))
    assert torch.equal(torch.bmm(x, b.mT), torch.bmm(x, plain_b.mT))
    requantized = make_quantizer("current")(b.mT)
    assert torch.equal(dequantize(requantized), dequantize(make_quantizer("current")(plain_b.mT)))


@pytest.mark.skipif(torch.cuda.get_device_capability() >= (10, 0), reason="has MXFP8 itself")
def test_emulated_mxfp8_with_gradients():
    """Autograd's own thread knows no `emulate()`: the forward call's is carried over."""
    quantizer = te.MXFP8Quantizer(tex.DType.kFloat8E4M3)
    x, y, grad = values(3, 64, 96), values(3, 96, 128), values(3, 64, 128)
    with teb.emulate():
        a, b = (teb.quantize(t, quantizer).requires_grad_() for t in (x, y))
        out = torch.bmm(a, b)
        codes = teb.quantize(grad, quantizer)
        out.backward(grad)
    assert_accurate(out.detach(), decode(a) @ decode(b, last_dim=False), BOUND_DB)
    assert_accurate(a.grad, decode(codes) @ decode(b).mT, BOUND_DB)
    expected = decode(a, last_dim=False).mT @ decode(codes, last_dim=False)
    assert_accurate(b.grad, expected, BOUND_DB)


def test_graph_capture():
    a, b = (make_quantizer("current")(values(3, 64, 96)) for _ in "ab")
    expected = torch.bmm(a, b.mT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.bmm(a, b.mT)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_te_modules_are_the_same():
    """A module with FP8 weights, forward and backward, bit for bit as without the switch."""
    with te.quantized_model_init(enabled=True, recipe=Float8CurrentScaling()):
        linear = te.Linear(64, 96, device="cuda", params_dtype=torch.bfloat16)
    x = values(128, 64).requires_grad_()

    def run():
        x.grad = None
        with te.autocast(enabled=True, recipe=Float8CurrentScaling()):
            out = linear(x)
        out.backward(torch.ones_like(out))
        return out.detach(), x.grad

    with_switch = run()
    disable_quantized_bmm()
    for first, second in zip(with_switch, run()):
        assert torch.equal(first, second)
