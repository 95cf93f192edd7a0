# SPDX-License-Identifier: Apache-2.0
"""The blockwise engine without a GPU: where codes and scales of TE's tensors are read, against exact products.

The kernel is replaced by `reference.blockwise_product`, which reads the same strides.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import assert_accurate, random_values
from block_data import make_block_quantizer, make_block_sides, numbers

import transformer_engine_batched as teb
from transformer_engine_batched import gemm
from transformer_engine_batched.kernels import blockwise_gemm
from transformer_engine_batched.reference import blockwise_product
from transformer_engine_batched.te_interop.tensors import read_codes

CALLS: list[dict] = []


@pytest.fixture(autouse=True)
def blockwise_engine(monkeypatch, fresh_launches):
    """128-blocks take the blockwise engine, whose kernel is the reference with the kernel's demands."""
    original = gemm.find_engine

    def find_engine(fmt, *arguments, **options):
        return "blockwise" if fmt == "float8_block" else original(fmt, *arguments, **options)

    def multiply(a, b, a_scales, b_scales, out, **options):
        for codes, scales in ((a, a_scales), (b, b_scales)):
            assert codes.dim() == 3 and codes.data_ptr() % 16 == 0
            assert codes.stride(-1) == 1 or codes.shape[-1] == 1
            assert all(s % 16 == 0 for n, s in zip(codes.shape[:2], codes.stride()[:2]) if n > 1)
            assert scales.granularity in (1, 128)
        assert out.stride(-1) == 1
        CALLS.append({"shape": tuple(out.shape), **options})
        blockwise_product.multiply_blockwise(a, b, a_scales, b_scales, out, **options)

    monkeypatch.setattr(gemm, "find_engine", find_engine)
    monkeypatch.setattr(blockwise_gemm, "multiply_blockwise", multiply)
    CALLS.clear()
    with teb.emulate():
        yield


SIZES = ((128, 256, 384), (40, 72, 200), (33, 17, 130), (256, 48, 16), (1, 1, 1), (5, 389, 129))


@pytest.mark.parametrize("layout", ("TN", "NN", "NT"))
@pytest.mark.parametrize("dims", ((1, 1), (1, 2), (2, 1), (2, 2)))
@pytest.mark.parametrize("sizes", SIZES)
def test_layouts(layout, dims, sizes):
    """All pairs of blocks, also where they cross items along rows or along K."""
    m, n, k = sizes
    a, b, expected = make_block_sides(layout, m, n, k, dims)
    out = teb.batched_general_gemm(a, b, layout=layout, out_dtype=torch.float32)
    assert CALLS
    assert_accurate(out, expected)


@pytest.mark.parametrize("power_of_two", (True, False))
@pytest.mark.parametrize("fp8", (("e4m3", "e5m2"), ("e5m2", "e4m3")))
def test_formats(fp8, power_of_two):
    a, b, expected = make_block_sides("NT", 64, 48, 200, fp8=fp8, force_pow_2_scales=power_of_two)
    out = teb.batched_general_gemm(a, b, layout="NT", out_dtype=torch.float32)
    assert_accurate(out, expected)
    # Inside, B is on the left.
    assert CALLS[-1]["formats"] == fp8[::-1]


@pytest.mark.parametrize(
    "batches",
    (((2, 3), (2, 3)), ((1,), (4,)), ((2, 1), (2, 3)), ((2, 1), (3,)), ((), (2,)), ((), ())),
)
@pytest.mark.parametrize("layout", ("TN", "NN", "NT"))
@pytest.mark.parametrize("rows", (128, 40))
def test_batches(batches, layout, rows):
    """Broadcast items and several batch dims, blocks crossing items or not."""
    for dims in ((1, 2), (2, 1), (1, 1)):
        a, b, expected = make_block_sides(layout, rows, 2 * rows, rows, dims, *batches)
        out = teb.batched_general_gemm(a, b, layout=layout, out_dtype=torch.float32)
        assert_accurate(out, expected)


def test_one_launch_where_strides_allow():
    for dims, layout in itertools.product(((1, 1), (1, 2), (2, 1)), ("TN", "NN", "NT")):
        a, b, _ = make_block_sides(layout, 256, 128, 384, dims, (4,))
        CALLS.clear()
        teb.batched_general_gemm(a, b, layout=layout)
        assert [call["shape"] for call in CALLS] == [(4, 256, 128)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_out_dtypes_and_default(dtype):
    a, b, expected = make_block_sides("TN", 40, 48, 200)
    assert_accurate(teb.batched_general_gemm(a, b, out_dtype=dtype), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("alpha, beta", ((1.0, None), (0.5, None), (1.0, 0.25), (-2.0, 3.0)))
def test_accumulate(dtype, alpha, beta):
    a, b, expected = make_block_sides("TN", 40, 48, 200)
    out = random_values((3, 40, 48), 3).to(dtype)
    expected = alpha * expected + (1.0 if beta is None else beta) * out.double()
    made = teb.batched_general_gemm(a, b, out=out, accumulate=True, alpha=alpha, beta=beta)
    assert made is out
    assert_accurate(out, expected)
    # The kernel adds to FP32 by itself; for other factors it writes.
    is_added = dtype == torch.float32 and alpha == 1.0 and beta is None
    assert CALLS[-1]["accumulate"] == is_added


@pytest.mark.parametrize("bias_shape", ((48,), (3, 48)))
def test_epilogue(bias_shape):
    a, b, expected = make_block_sides("TN", 40, 48, 200)
    bias = random_values(bias_shape, 5)
    out = teb.batched_general_gemm(a, b, alpha=0.5, bias=bias, gelu=True, out_dtype=torch.float32)
    expected = 0.5 * expected + (bias if bias.dim() == 1 else bias.unsqueeze(-2)).double()
    assert_accurate(out, torch.nn.functional.gelu(expected, approximate="tanh"), 100.0)


@pytest.mark.parametrize(
    "view",
    (
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.empty(3, 40, 96)[..., ::2],
        lambda x: torch.empty(40, 3, 48).transpose(0, 1),
    ),
)
def test_out_views(view):
    a, b, expected = make_block_sides("TN", 40, 48, 200)
    out = view(torch.full((3, 40, 48), torch.nan))
    teb.batched_general_gemm(a, b, out=out)
    assert_accurate(out, expected)


def test_sm_limit(monkeypatch):
    monkeypatch.setattr(gemm, "current_sm_count", lambda index: 100)
    a, b, _ = make_block_sides("TN", 40, 48, 200)
    monkeypatch.setattr(gemm.torch.Tensor, "get_device", lambda self: 0)
    teb.batched_general_gemm(a, b)
    assert CALLS[-1]["num_sms"] == 100


def test_both_e5m2_is_refused():
    a, b, _ = make_block_sides("TN", 40, 48, 200, fp8=("e5m2", "e5m2"))
    with pytest.raises(teb.UnsupportedError, match="both E5M2"):
        teb.batched_general_gemm(a, b)


@pytest.mark.parametrize("quantized_output", (False, True))
def test_quantized_output(quantized_output):
    a, b, expected = make_block_sides("TN", 40, 48, 200)
    quantizer = make_block_quantizer(1) if quantized_output else None
    out = teb.batched_general_gemm(a, b, quantization_params=quantizer)
    if quantized_output:
        out = numbers(out, True)
    assert_accurate(out, expected, 27.0)


@pytest.mark.parametrize("rows", (128, 40))
@pytest.mark.parametrize("keeps_rowwise", (True, False))
def test_a_copy_that_is_not_there_is_packed_from_the_other(keeps_rowwise, rows):
    """Square blocks hold the same numbers both ways; a differentiable product uses the copy that there is."""
    a, b, expected = make_block_sides("NT" if keeps_rowwise else "TN", rows, 2 * rows, rows, (2, 2))
    codes = []
    for x, usage in ((b, "a"), (a, "b")):
        x.update_usage(rowwise_usage=keeps_rowwise, columnwise_usage=not keeps_rowwise)
        codes.append(read_codes(x, usage, not keeps_rowwise, lambda device: True))
        assert codes[-1].moved_last_dim != keeps_rowwise
    # Both along the dim whose copy is missing: the last one, or the one before it.
    left, right = (True, False) if keeps_rowwise else (False, True)
    out = gemm.multiply_codes(codes[0], left, codes[1], right, torch.float32, False)
    assert_accurate(out, expected)
