# SPDX-License-Identifier: Apache-2.0
"""MXFP8 products: block scales packed per item and read at the hardware's addresses; exact decoding.

No GPU of this project has MXFP8 tensor cores, so these tests are what there is: the reference engine reads
packed scales and strided codes as documented for cuBLASLt, and must get the product of the numbers that
`accuracy.dequantize` finds in TE's own compact buffers.
"""

from __future__ import annotations

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import (
    LAYOUTS,
    assert_accurate,
    contracts_last_dim,
    dequantize,
    exact_product,
    make_operand,
    make_quantizer,
    make_sides,
    operand_shape,
    random_values,
)

import transformer_engine_batched as teb
from transformer_engine_batched import gemm
from transformer_engine_batched import launch as launch_module
from transformer_engine_batched.block_scales import packed_scale_size, tile_offset
from transformer_engine_batched.reference.decoding import decode_mxfp8

pytestmark = pytest.mark.usefixtures("emulated")

FP32 = torch.float32


def spread_values(shape, seed):
    """Normal data whose 32-blocks have magnitudes from 2^-12 to 2^12, so that scales differ."""
    exponents = torch.randint(-12, 13, shape, generator=torch.Generator().manual_seed(seed + 99))
    exponents = exponents.float()
    # One factor for each 4x4 patch: every 32-block along either dim has several.
    return random_values(shape, seed) * torch.exp2(exponents)


def make_spread(layout, name, m, n, k, batch, seed, **options):
    shape = operand_shape(layout, name, m, n, k, batch)
    last_dim = contracts_last_dim(layout, name)
    values = spread_values(shape, seed)
    return make_operand("mxfp8", shape, last_dim=last_dim, seed=0, values=values, **options)


def check(layout, m, n, k, batch, batch_b=None, **options):
    a = make_spread(layout, "A", m, n, k, batch, 0, **options)
    b = make_spread(layout, "B", m, n, k, batch if batch_b is None else batch_b, 1, **options)
    out = teb.batched_general_gemm(a.tensor, b.tensor, layout=layout, out_dtype=FP32)
    assert_accurate(out, exact_product(layout, a.exact, b.exact))
    return out


@pytest.mark.parametrize("swizzled", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "m, n, k",
    [(32, 32, 32), (96, 160, 160), (128, 128, 128), (256, 128, 96), (160, 288, 416)],
)
def test_whole_blocks(layout, m, n, k, swizzled):
    check(layout, m, n, k, (3,), swizzled=swizzled)


@pytest.mark.parametrize("swizzled", (False, True))
@pytest.mark.parametrize(
    "m, n, batch",
    [
        (1, 1, (32,)),
        (7, 31, (32,)),
        (389, 1, (32,)),
        (96, 160, (3,)),
        (129, 127, (4, 8)),
        (20, 40, (8,)),
    ],
)
@pytest.mark.parametrize("k", (32, 160))
def test_ragged_rows_of_rowwise_operands(m, n, k, batch, swizzled):
    # TE wants whole blocks of the flattened rows; items end inside 128-row tiles.
    check("TN", m, n, k, batch, swizzled=swizzled)


@pytest.mark.parametrize("swizzled", (False, True))
@pytest.mark.parametrize("layout, batch", [("NN", (32,)), ("NN", (8, 4))])
def test_ragged_rows_beside_a_columnwise_operand(layout, batch, swizzled):
    check(layout, 13, 64, 96, batch, swizzled=swizzled)


@pytest.mark.parametrize("swizzled", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "batch_a, batch_b",
    [((), (4,)), ((4,), ()), ((1,), (4,)), ((2, 1), (1, 3)), ((3,), (2, 1)), ((2, 3), (3,))],
)
def test_broadcast_batches(layout, batch_a, batch_b, swizzled):
    check(layout, 96, 64, 160, batch_a, batch_b, swizzled=swizzled)


def test_broadcast_of_ragged_rows():
    check("TN", 20, 9, 64, (32,), (1, 32))
    check("TN", 20, 32, 64, (1,), (8,))


def test_mixed_swizzled_and_compact_operands():
    a = make_spread("TN", "A", 96, 160, 96, (3,), 0, swizzled=True)
    b = make_spread("TN", "B", 96, 160, 96, (3,), 1)
    out = teb.batched_general_gemm(a.tensor, b.tensor, out_dtype=FP32)
    assert_accurate(out, exact_product("TN", a.exact, b.exact))


def test_compact_and_swizzled_scales_give_the_same_bits():
    for layout in LAYOUTS:
        compact, swizzled = (
            check(layout, 96, 160, 416, (3,), swizzled=value) for value in (False, True)
        )
        assert torch.equal(compact, swizzled)


def test_one_columnwise_item_may_be_ragged_elsewhere():
    # A single item: its blocks cross nothing.
    check("NT", 32, 64, 32, ())
    check("NT", 32, 64, 32, (1, 1))


def test_columnwise_rows_across_items_are_refused_before_anything_is_written():
    a = make_spread("NN", "A", 32, 64, 16, (4,), 0)
    b = make_operand("mxfp8", (4, 32, 32), last_dim=True, seed=0)
    out = torch.full((4, 32, 64), -77.0)
    with pytest.raises((teb.UnsupportedError, ValueError)):
        teb.batched_general_gemm(a.tensor, b.tensor, layout="NN", out=out)
    b = make_operand("mxfp8", (4, 16, 64), last_dim=False, seed=0)
    a = make_operand("mxfp8", (4, 16, 32), last_dim=False, seed=0)
    with pytest.raises(teb.UnsupportedError, match="16 rows are no multiple of 32.*Pad the rows"):
        teb.batched_general_gemm(
            a.tensor, b.tensor, layout="NT", out=torch.full((4, 64, 32), -77.0)
        )
    assert (out == -77.0).all()


def test_e4m3_and_e5m2():
    for fp8 in (("e4m3", "e5m2"), ("e5m2", "e4m3")):
        sides = make_sides("mxfp8", "NT", m=96, n=32, k=64, fp8=fp8)
        out = teb.batched_general_gemm(sides.a.tensor, sides.b.tensor, layout="NT", out_dtype=FP32)
        assert_accurate(out, sides.expected)


# --- what the hardware would be given ---------------------------------------------------------------------


class Recorder:
    """Stands for the cublaslt engine: keeps what a launch hands over."""

    def __init__(self, problem):
        self.problem = problem
        self.calls = []

    def run(self, *args, **options):
        self.calls.append((args, options))


@pytest.fixture
def recorded(monkeypatch, fresh_launches):
    monkeypatch.setitem(launch_module._PLANS, "reference", Recorder)

    def run(a, b, layout="TN", **options):
        teb.batched_general_gemm(a, b, layout=layout, **options)
        return list(gemm._launches.values())[-1].plan

    return run


def uint8_tensors(call):
    args, options = call
    found = [*args, *options.values()]
    return [x for x in found if isinstance(x, torch.Tensor) and x.dtype == torch.uint8]


@pytest.mark.parametrize("swizzled", (False, True))
def test_scales_are_packed_per_item_at_documented_addresses(recorded, swizzled):
    rows, k, batch = 160, 160, 3
    values = spread_values((batch, rows, k), 0)
    compact = teb.quantize(values.bfloat16(), make_quantizer("mxfp8"))
    x = teb.quantize(values.bfloat16(), make_quantizer("mxfp8", swizzled=swizzled))
    plan = recorded(x, x)
    assert len(plan.calls) == 1
    size = packed_scale_size(rows, k // 32)
    packed = [t for t in uint8_tensors(plan.calls[0]) if t.numel() == batch * size]
    assert len(packed) == 2
    codes = compact._rowwise_scale_inv[: batch * rows, : k // 32].reshape(batch, rows, k // 32)
    for buffer in packed:
        flat = buffer.flatten()
        for item in range(batch):
            for row in range(0, rows, 7):
                for block in range(k // 32):
                    where = item * size + tile_offset(row, block, rows, k // 32)
                    assert flat[where] == codes[item, row, block]


def test_problem_of_an_mxfp8_product(recorded):
    sides = make_sides("mxfp8", "NT", m=96, n=160, k=64, batch_a=(2, 3), fp8=("e4m3", "e5m2"))
    problem = recorded(sides.a.tensor, sides.b.tensor, "NT").problem
    assert (problem.batch, problem.m, problem.n, problem.k) == (6, 96, 160, 64)
    assert (problem.a.scale_mode, problem.b.scale_mode) == ("block32", "block32")
    assert (problem.a.dtype, problem.b.dtype) == ("e5m2", "e4m3")  # a is TE's B
    assert (problem.a.batch_stride, problem.b.batch_stride) == (96 * 64, 160 * 64)


def test_broadcast_operands_are_repeated_for_the_library(recorded):
    # Block scales have no batch stride of 0 (csrc/problem.cpp refuses it).
    sides = make_sides("mxfp8", "TN", m=32, n=32, k=64, batch_a=(), batch_b=(5,))
    plan = recorded(sides.a.tensor, sides.b.tensor)
    assert plan.problem.batch == 5
    assert plan.problem.a.batch_stride and plan.problem.b.batch_stride


def test_whole_tiles_are_handed_over_without_a_copy(recorded):
    quantizer = make_quantizer("mxfp8", swizzled=True)
    x = teb.quantize(torch.randn(3, 128, 128), quantizer)
    plan = recorded(x, x)
    addresses = {tensor.data_ptr() for tensor in uint8_tensors(plan.calls[0])}
    assert x._rowwise_scale_inv.data_ptr() in addresses
    assert x._rowwise_data.data_ptr() in addresses


# --- decoding ---------------------------------------------------------------------------------------------


def decode(x, *, last_dim=True, swizzled=False):
    side = "rowwise" if last_dim else "columnwise"
    return decode_mxfp8(
        getattr(x, f"_{side}_data"),
        getattr(x, f"_{side}_scale_inv"),
        torch.float8_e5m2 if x._fp8_dtype == te.DType.kFloat8E5M2 else torch.float8_e4m3fn,
        columnwise=not last_dim,
        swizzled=swizzled,
    )


@pytest.mark.parametrize("last_dim", (False, True))
@pytest.mark.parametrize("swizzled", (False, True))
@pytest.mark.parametrize("fp8", ("e4m3", "e5m2"))
@pytest.mark.parametrize("shape", ((3, 96, 160), (2, 2, 32, 32), (64, 32)))
def test_decoding_is_exact_in_bf16(shape, fp8, swizzled, last_dim):
    operand = make_operand(
        "mxfp8",
        shape,
        last_dim=last_dim,
        seed=0,
        fp8=fp8,
        swizzled=swizzled,
        values=spread_values(shape, 0),
    )
    values = decode(operand.tensor, last_dim=last_dim, swizzled=swizzled)
    assert values.dtype == torch.bfloat16 and values.shape == shape
    assert torch.equal(values.double(), operand.exact)


@pytest.mark.parametrize("fp8", ("e4m3", "e5m2"))
def test_every_code_times_many_scales_is_exact(fp8):
    x = teb.quantize(torch.zeros(256, 256), make_quantizer("mxfp8", fp8))
    x._rowwise_data.copy_(torch.arange(256).to(torch.uint8).expand(256, 256))
    dtype = torch.float8_e4m3fn if fp8 == "e4m3" else torch.float8_e5m2
    x._rowwise_data[~x._rowwise_data.view(dtype).float().isfinite()] = 0
    # 2^-100 to 2^100: with the codes' own 2^-16 to 2^15 inside BF16's range.
    scales = torch.arange(256).clamp(27, 227).to(torch.uint8)
    x._rowwise_scale_inv[:256, :8] = scales[:, None]
    values = decode(x)
    assert values.dtype == torch.bfloat16
    assert torch.equal(values.double(), dequantize(x))


def test_scales_beyond_bf16_fall_back_to_fp32():
    x = teb.quantize(torch.ones(32, 32), make_quantizer("mxfp8"))
    x._rowwise_data[0, 0] = 1  # 2^-9
    x._rowwise_scale_inv[0, 0] = 0  # 2^-127: 2^-136 is below BF16's smallest subnormal, 2^-133
    values = decode(x)
    assert values.dtype == torch.float32
    assert values[0, 0].item() == 2.0**-136
    assert torch.equal(values.double(), dequantize(x))


def test_nan_codes_and_nan_scales_stay_nan():
    x = teb.quantize(torch.ones(32, 64), make_quantizer("mxfp8"))
    x._rowwise_data[1, 5] = 0x7F
    x._rowwise_scale_inv[2, 1] = 0xFF
    values = decode(x)
    is_nan = torch.zeros(32, 64, dtype=torch.bool)
    is_nan[1, 5] = True
    is_nan[2, 32:] = True
    assert values.dtype == torch.bfloat16
    assert torch.equal(values.isnan(), is_nan)


def test_nan_scale_stays_in_its_row_of_the_product():
    a = teb.quantize(random_values((2, 32, 64), 0), make_quantizer("mxfp8"))
    b = make_operand("mxfp8", (2, 32, 64), last_dim=True, seed=1)
    a._rowwise_scale_inv[32 + 3, 1] = 0xFF
    out = teb.batched_general_gemm(b.tensor, a, out_dtype=FP32)
    assert out[1, 3].isnan().all() and out.isnan().sum() == 32


# --- the path that other tensor cores take ----------------------------------------------------------------


@pytest.fixture
def decoded_engine(monkeypatch, fresh_launches):
    """The support table answers as on a CUDA device without MXFP8."""
    real = gemm.find_engine

    def find(fmt, device, **options):
        return "decoded" if fmt == "mxfp8" else real(fmt, device, **options)

    monkeypatch.setattr(gemm, "find_engine", find)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("decoded_engine")
def test_product_of_decoded_operands(layout):
    check(layout, 96, 160, 64, (3,))
    check(layout, 96, 160, 64, (2, 1), (1, 3), swizzled=True)


@pytest.mark.usefixtures("decoded_engine")
def test_decoded_product_with_everything_around_it():
    sides = make_sides("mxfp8", "TN", m=32, n=64, k=96, internal=True)
    bias, before = random_values((3, 64), 3), random_values((3, 32, 64), 4)
    out = before.clone()
    result = teb.batched_general_gemm(
        sides.a.tensor,
        sides.b.tensor,
        out=out,
        bias=bias,
        alpha=0.5,
        beta=2.0,
        accumulate=True,
    )
    assert result is out
    expected = 0.5 * sides.expected + 2 * before.double() + bias.double()[:, None]
    assert_accurate(out, expected, 130.0)
    for options in ({}, {"out_dtype": torch.float16}):
        out = teb.batched_general_gemm(sides.a.tensor, sides.b.tensor, **options)
        assert out.dtype == options.get("out_dtype", torch.bfloat16)
        assert_accurate(out, sides.expected)
    quantized = teb.batched_general_gemm(
        sides.a.tensor, sides.b.tensor, quantization_params=make_quantizer("mxfp8")
    )
    assert_accurate(dequantize(quantized), sides.expected, 27.0)


@pytest.mark.usefixtures("decoded_engine")
def test_decoded_operands_of_different_precision_meet_in_fp32():
    a = teb.quantize(torch.ones(2, 32, 32), make_quantizer("mxfp8"))
    a._rowwise_data[:, 0, 0] = 1
    a._rowwise_scale_inv[0, 0] = 0
    b = make_operand("mxfp8", (2, 32, 32), last_dim=True, seed=1)
    out = teb.batched_general_gemm(a, b.tensor, out_dtype=FP32)
    assert_accurate(out, exact_product("TN", dequantize(a), b.exact))


@pytest.mark.usefixtures("decoded_engine")
def test_decoded_columnwise_rows_across_items():
    # Decoding needs no packing per item, but the answer may not depend on the device.
    a = make_operand("mxfp8", (4, 16, 32), last_dim=False, seed=0)
    with pytest.raises(teb.UnsupportedError, match="multiple of 32"):
        teb.batched_general_gemm(a.tensor, a.tensor, layout="NT")
