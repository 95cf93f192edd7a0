# SPDX-License-Identifier: Apache-2.0
"""Float8 128-blocks on the GPU: the same bytes as TE's kernels, and products on the kernel and inside `emulate()`."""

from __future__ import annotations

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import assert_accurate, sqnr_per_item
from block_data import make_block_sides, numbers
from blockwise_cases import KERNEL_BOUNDS_DB, add_as_tensor_cores
from products import FP8
from test_against_te import inputs
from transformer_engine.common.recipe import Float8BlockScaling

import transformer_engine_batched as teb
from transformer_engine_batched.reference import blockwise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Against FP64 of the original normal data, E4M3 x E4M3: 28.3 dB with scales that are powers of two, 28.5 with others.
END_TO_END_DB = 28.0
# Measured on an H200: 0.01 to 3 dB above the simulation, which cuts each sum once more than the tensor cores may do, and does
# not know that blocks of scales which cross items cut K elsewhere.
SIMULATION_SLACK_DB = 1.0
# TE's kernel for 128 x 128 blocks makes no column-wise copy alone.
USAGES = {1: ((True, False), (False, True), (True, True)), 2: ((True, False), (True, True))}

pytestmark = pytest.mark.skipif(
    torch.cuda.get_device_capability() != (9, 0), reason="TE keeps 128-blocks on Hopper only"
)


def make_quantizer(dim, fp8="e4m3", rowwise=True, columnwise=True, **options):
    return te.Float8BlockQuantizer(
        FP8[fp8], rowwise=rowwise, columnwise=columnwise, block_scaling_dim=dim, **options
    )


def make_sides(*arguments):
    """Operands and exact product of the tests without a GPU."""
    return make_block_sides(*arguments, device="cuda")


def assert_same_bytes(x, y, name):
    """Codes of both copies and their scales without the padding, which TE leaves unwritten."""
    assert type(x) is type(y) and x._is_2D_scaled == y._is_2D_scaled, name
    assert x._fp8_dtype == y._fp8_dtype and x.shape == y.shape and x.dtype == y.dtype, name
    cols = x.shape[-1]
    rows = x.numel() // cols
    for usage, sizes in (("rowwise", (rows, cols)), ("columnwise", (cols, rows))):
        codes = [getattr(tensor, f"_{usage}_data") for tensor in (x, y)]
        scales = [getattr(tensor, f"_{usage}_scale_inv") for tensor in (x, y)]
        if codes[0] is None:
            assert codes[1] is None and scales[0] is None and scales[1] is None, (name, usage)
            continue
        assert codes[0].shape == codes[1].shape and scales[0].shape == scales[1].shape, name
        assert torch.equal(*codes), (name, usage, int((codes[0] != codes[1]).sum()))
        written = -(-sizes[1] // 128) if x._is_2D_scaled else sizes[0]
        bits = [scale[:, :written].contiguous().view(torch.int32) for scale in scales]
        assert torch.equal(*bits), (name, usage, int((bits[0] != bits[1]).sum()))


def block_inputs(dtype):
    """The inputs of other recipes, whole blocks, items that share a block, and other ragged sizes."""
    named = inputs(dtype)
    for shape in ((2, 128, 256), (3, 33, 130), (2, 200, 72), (5, 7), (1, 16), (300, 389)):
        named[str(shape)] = torch.randn(shape, device="cuda").to(dtype)
    spread = torch.exp2(torch.randint(-60, 60, (4, 96, 160), device="cuda").double())
    named["spread"] = (torch.randn(4, 96, 160, device="cuda") * spread).to(dtype)
    return named


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (1, 2))
@pytest.mark.parametrize("power_of_two", (True, False))
@pytest.mark.parametrize("epsilon", (0.0, 1e-2))
def test_bytes(dim, dtype, fp8, power_of_two, epsilon):
    for name, x in block_inputs(dtype).items():
        for usage in USAGES[dim]:
            quantizer = make_quantizer(
                dim, fp8, *usage, force_pow_2_scales=power_of_two, amax_epsilon=epsilon
            )
            expected = quantizer(x.contiguous())
            assert_same_bytes(expected, blockwise.quantize(x, quantizer), (name, usage))


def test_quantize_takes_tes_kernel():
    x = torch.randn(2, 128, 128, device="cuda")
    quantizer = make_quantizer(1)
    with teb.emulate("reference"):
        expected = teb.quantize(x, quantizer)
    assert_same_bytes(expected, teb.quantize(x, quantizer), "emulated and not")


@pytest.mark.parametrize("layout", ("TN", "NN", "NT"))
@pytest.mark.parametrize("dims", ((1, 1), (1, 2), (2, 1), (2, 2)))
@pytest.mark.parametrize("sizes", ((128, 256, 384), (40, 72, 200), (33, 17, 130), (256, 48, 16)))
def test_products_of_te_tensors(layout, dims, sizes):
    """TE's tensors as they are on the kernel: all pairs of blocks, also where they cross items."""
    a, b, expected = make_sides(layout, *sizes, dims, (3,))
    # Magnitudes differ along K, so that the small ones lose bits: the tensor cores' arithmetic says how many.
    a64, b64 = numbers(a, layout[0] == "T"), numbers(b, layout[1] == "N")
    a64, b64 = a64 if layout[0] == "T" else a64.mT, b64 if layout[1] == "N" else b64.mT
    simulated = sqnr_per_item(add_as_tensor_cores(b64, a64), expected).min().item()
    assert simulated >= 66.0  # a bound must stay one
    bounds = {**KERNEL_BOUNDS_DB, torch.float32: simulated - SIMULATION_SLACK_DB}
    for dtype in (torch.float32, torch.bfloat16):
        out = teb.batched_general_gemm(a, b, layout=layout, out_dtype=dtype)
        assert_accurate(out, expected, bounds[dtype])


@pytest.mark.parametrize(
    "batches", (((2, 3), (2, 3)), ((1,), (4,)), ((2, 1), (2, 3)), ((), (2,)), ((), ()))
)
@pytest.mark.parametrize("rows", (128, 40))
def test_batches_of_te_tensors(batches, rows):
    for dims, layout in (((1, 2), "TN"), ((2, 1), "NN"), ((1, 1), "NT")):
        a, b, expected = make_sides(layout, rows, 2 * rows, rows, dims, *batches)
        out = teb.batched_general_gemm(a, b, layout=layout, out_dtype=torch.float32)
        assert_accurate(out, expected, KERNEL_BOUNDS_DB[out.dtype])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("alpha, beta", ((1.0, None), (-2.0, 3.0)))
def test_accumulation(dtype, alpha, beta):
    a, b, expected = make_sides("NT", 128, 200, 256)
    out = torch.randn(3, 128, 200, device="cuda", dtype=dtype)
    expected = alpha * expected + (1.0 if beta is None else beta) * out.double()
    teb.batched_general_gemm(a, b, layout="NT", out=out, accumulate=True, alpha=alpha, beta=beta)
    assert_accurate(out, expected, KERNEL_BOUNDS_DB[out.dtype])


@pytest.mark.parametrize("engine", (None, "reference"))
@pytest.mark.parametrize("power_of_two", (True, False))
@pytest.mark.parametrize("dims", ((1, 1), (1, 2), (2, 1)))
@pytest.mark.parametrize("sizes", ((256, 128, 384), (40, 70, 389)))
def test_products(engine, power_of_two, dims, sizes):
    m, k, n = sizes
    operands = [torch.randn(3, m, k, device="cuda"), torch.randn(3, n, k, device="cuda")]
    quantized = []
    for x, dim in zip(operands, dims):
        quantizer = make_quantizer(dim, columnwise=False, force_pow_2_scales=power_of_two)
        with teb.emulate(engine):
            quantized.append(teb.quantize(x, quantizer))
    exact = [x.dequantize(dtype=torch.float32).double() for x in quantized]
    with teb.emulate(engine):
        out = teb.batched_general_gemm(quantized[1], quantized[0], out_dtype=torch.bfloat16)
    assert_accurate(out, exact[0] @ exact[1].mT)
    assert_accurate(out, operands[0].double() @ operands[1].double().mT, END_TO_END_DB)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("sizes", ((256, 128, 384), (40, 70, 389)))
def test_training_under_autocast(dtype, sizes):
    m, k, n = sizes
    a = torch.randn(3, m, k, device="cuda", dtype=dtype, requires_grad=True)
    b = torch.randn(3, n, k, device="cuda", dtype=dtype, requires_grad=True)
    gradient = torch.randn(3, m, n, device="cuda", dtype=dtype)
    results = []
    for engine in (None, "reference"):
        a.grad = b.grad = None
        with teb.emulate(engine), te.autocast(enabled=True, recipe=Float8BlockScaling()):
            y = te.BatchedMatmul()(a, b.mT)
        y.backward(gradient)
        results.append((y.detach(), a.grad, b.grad))
    a64, b64, g64 = a.detach().double(), b.detach().double(), gradient.double()
    for made in results:
        for result, expected in zip(made, (a64 @ b64.mT, g64 @ b64, g64.mT @ a64)):
            assert_accurate(result, expected, END_TO_END_DB)
    for result, reference in zip(*results):
        assert_accurate(result, reference.double(), KERNEL_BOUNDS_DB[dtype])


def test_einsum_under_autocast():
    """A contraction of channel-last operands, as triangle multiplication has it, and its gradients."""
    a, b = (
        torch.randn(1, rows, 160, 6, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for rows in (128, 96)
    )
    gradient = torch.randn(1, 128, 96, 6, device="cuda", dtype=torch.bfloat16)
    with te.autocast(enabled=True, recipe=Float8BlockScaling()):
        y = te.BatchedEinsum("bikd,bjkd->bijd")(a, b)
    y.backward(gradient)
    a64, b64 = (x.detach().double().requires_grad_() for x in (a, b))
    y64 = torch.einsum("bikd,bjkd->bijd", a64, b64)
    y64.backward(gradient.double())
    for result, expected in ((y, y64), (a.grad, a64.grad), (b.grad, b64.grad)):
        items = [x.detach().movedim(3, 1) for x in (result, expected)]
        assert_accurate(*items, END_TO_END_DB)
