# SPDX-License-Identifier: Apache-2.0
"""Float8 128-blocks: reference quantizer and decoder against an oracle of one loop per block, and products.

The oracle takes each block apart in numpy and FP32 scalars. Needs no GPU.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch  # before TE: it loads the libraries that TE links to
import transformer_engine.pytorch as te
from accuracy import assert_accurate, exact_product, operand_shape, contracts_last_dim
from test_reference_quantizers import E4M3, E5M2, FP8_MAX, TORCH_FP8, as_numpy, oracle_amax
from test_reference_quantizers import oracle_codes, special_values
from transformer_engine.common.recipe import Float8BlockScaling, Format, QParams

import transformer_engine_batched as teb
from transformer_engine_batched.reference import blockwise
from transformer_engine_batched.reference.decoding import decode_blockwise
from transformer_engine_batched.te_interop.tensors import read_codes

# Items of 33 and of 200 rows end within a block; 3 x 128 do not.
SHAPES = ((3, 128, 256), (3, 33, 130), (200, 70), (2, 2, 65, 128), (5,), (1, 1))
LARGEST = {
    dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float16, torch.bfloat16)
}


def make_quantizer(dim=1, fp8=E4M3, rowwise=True, columnwise=True, internal=False, **options):
    quantizer = te.Float8BlockQuantizer(
        fp8, rowwise=rowwise, columnwise=columnwise, block_scaling_dim=dim, **options
    )
    quantizer.internal = internal
    return quantizer


def oracle_scale(amax, fp8, largest, power_of_two, epsilon) -> np.float32:
    amax = max(amax, np.float32(epsilon))
    if amax == 0 or np.isinf(amax):
        return np.float32(1)
    with np.errstate(over="ignore"):
        scale = FP8_MAX[fp8] / amax
    if np.isinf(scale):
        scale = np.float32(largest)
    return np.float32(2.0 ** (math.frexp(scale)[1] - 1)) if power_of_two else scale


def oracle(matrix: np.ndarray, fp8, largest, dim, power_of_two=True, epsilon=0.0):
    """Codes of a matrix, the scale_inv of its blocks ``[block of rows, block]``, and FP64 values."""
    rows, cols = matrix.shape
    high = 128 if dim == 2 else 1
    scales = np.zeros((rows, cols), np.float32)
    inverse = np.zeros((-(-rows // high), -(-cols // 128)), np.float32)
    factors = np.zeros((rows, cols))
    for i in range(inverse.shape[0]):
        for j in range(inverse.shape[1]):
            block = np.s_[i * high : (i + 1) * high, j * 128 : (j + 1) * 128]
            scale = oracle_scale(oracle_amax(matrix[block]), fp8, largest, power_of_two, epsilon)
            scales[block] = scale
            inverse[i, j] = np.float32(1) / scale
            factors[block] = inverse[i, j]
    with np.errstate(over="ignore"):
        out = oracle_codes(matrix * scales, fp8)
    values = torch.from_numpy(out).view(TORCH_FP8[fp8]).double().numpy() * factors
    return out, inverse, values


def same_bits(buffer: torch.Tensor, expected: np.ndarray) -> bool:
    return np.array_equal(buffer.cpu().numpy().view("u4"), expected.view("u4"))


def check(x: torch.Tensor, quantizer) -> None:
    """Every byte of both copies, their padding, and the decoded values."""
    y = blockwise.quantize(x, quantizer)
    parts, dim, fp8 = y.get_metadata(), quantizer.block_scaling_dim, quantizer.dtype
    assert parts["is_2D_scaled"] == (dim == 2) and parts["fp8_dtype"] == fp8
    assert y._dtype == x.dtype if quantizer.internal else y.dtype == x.dtype
    assert tuple(y.size()) == tuple(x.shape)
    matrix = as_numpy(x).reshape(-1, x.shape[-1])
    options = quantizer.force_pow_2_scales, quantizer.amax_epsilon
    for usage, columnwise, wanted in (
        ("rowwise", False, quantizer.rowwise_usage),
        ("columnwise", True, quantizer.columnwise_usage),
    ):
        data, scale_inv = parts[f"{usage}_data"], parts[f"{usage}_scale_inv"]
        if not wanted:
            assert data is None and scale_inv is None
            continue
        expected, inverse, values = oracle(
            matrix.T if columnwise else matrix, fp8, LARGEST[x.dtype], dim, *options
        )
        if dim == 1:
            inverse = np.ascontiguousarray(inverse.T)
        shape = (x.shape[-1], *x.shape[:-1]) if columnwise else tuple(x.shape)
        assert data.dtype == torch.uint8 and data.is_contiguous() and tuple(data.shape) == shape
        assert np.array_equal(data.numpy().reshape(expected.shape), expected)
        padded = np.zeros(quantizer.get_scale_shape(x.shape, columnwise), np.float32)
        assert padded.shape[1] % 4 == 0
        padded[: inverse.shape[0], : inverse.shape[1]] = inverse
        assert scale_inv.dtype == torch.float32 and same_bits(scale_inv, padded)
        decoded = decode_blockwise(
            data, scale_inv, TORCH_FP8[fp8], square=dim == 2, transposed=columnwise
        )
        assert tuple(decoded.shape) == tuple(x.shape)
        values = np.moveaxis(values.reshape(shape), 0, -1) if columnwise else values.reshape(shape)
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        assert np.array_equal(decoded.float().numpy(), values, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dim", (1, 2))
@pytest.mark.parametrize("dtype", tuple(LARGEST))
def test_every_byte(shape, dim, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    check(x, make_quantizer(dim))


@pytest.mark.parametrize("fp8", (E4M3, E5M2))
@pytest.mark.parametrize("power_of_two", (True, False))
@pytest.mark.parametrize("epsilon", (0.0, 0.5, 1e-40))
@pytest.mark.parametrize("dim", (1, 2))
@pytest.mark.parametrize(
    "name", ("normal", "zeros", "subnormal", "smallest", "huge", "nan", "only nan", "inf", "spread")
)
def test_special_values(fp8, power_of_two, epsilon, dim, name):
    options = {"force_pow_2_scales": power_of_two, "amax_epsilon": epsilon}
    for dtype in LARGEST:
        x = special_values(name, (3, 44, 140)).to(dtype)
        check(x, make_quantizer(dim, fp8, **options))


def test_unreachable_scale_is_the_largest_of_the_input_dtype():
    # 448 / 1e-40 is beyond FP32.
    for dtype, expected in ((torch.float16, 2.0**15), (torch.bfloat16, 2.0**127)):
        quantizer = make_quantizer(1, amax_epsilon=1e-40)
        y = blockwise.quantize(torch.zeros(1, 128, dtype=dtype), quantizer)
        assert y._rowwise_scale_inv[0, 0].item() == 1 / expected


@pytest.mark.parametrize("dim", (1, 2))
@pytest.mark.parametrize("internal", (False, True))
@pytest.mark.parametrize("usage", ((True, False), (False, True)))
def test_usages_and_storage(dim, internal, usage):
    quantizer = make_quantizer(dim, E4M3, *usage, internal=internal)
    check(torch.randn(2, 3, 160), quantizer)
    check(torch.randn(2, 160, 3).mT, quantizer)


@pytest.mark.parametrize("shape", ((0, 4, 8), (2, 0, 8), (2, 4, 0)))
def test_empty(shape):
    y = blockwise.quantize(torch.zeros(shape), make_quantizer())
    assert tuple(y.size()) == shape


@pytest.mark.parametrize("dim", (1, 2))
def test_te_reads_the_same_numbers(dim):
    """`dequantize` is TE's torch code: it knows the layout from another hand."""
    for shape in ((3, 128, 256), (3, 33, 130)):
        for usage in ((True, False), (False, True)):
            quantizer = make_quantizer(dim, E4M3, *usage, force_pow_2_scales=False)
            y = blockwise.quantize(torch.randn(shape), quantizer)
            codes = read_codes(y, "A", usage[0], lambda _: False)
            decoded = decode_blockwise(
                codes.data,
                codes.scale_inv,
                torch.float8_e4m3fn,
                square=codes.square,
                transposed=codes.moved_last_dim,
            )
            assert torch.equal(decoded.float(), y.dequantize())


def test_decoded_type():
    x = torch.randn(4, 256)
    for power_of_two, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        y = blockwise.quantize(x, make_quantizer(force_pow_2_scales=power_of_two))
        decoded = decode_blockwise(
            y._rowwise_data,
            y._rowwise_scale_inv,
            torch.float8_e4m3fn,
            square=False,
            transposed=False,
        )
        assert decoded.dtype == dtype


def test_refusals():
    with pytest.raises(TypeError, match="a Float8BlockQuantizer was asked for and MXFP8Quantizer"):
        blockwise.quantize(torch.ones(2, 2), te.MXFP8Quantizer(E4M3))
    with pytest.raises(TypeError, match="plain tensor was asked for"):
        x = blockwise.quantize(torch.ones(2, 2), make_quantizer())
        blockwise.quantize(x, make_quantizer())
    with pytest.raises(TypeError, match="came as torch.int32"):
        blockwise.quantize(torch.ones(2, 2, dtype=torch.int32), make_quantizer())
    with pytest.raises(ValueError, match=r"set_usage\(rowwise=True\)"):
        quantizer = make_quantizer()
        quantizer.set_usage(rowwise=False, columnwise=False)
        blockwise.quantize(torch.ones(2, 2), quantizer)
    with pytest.raises(ValueError, match="block_scaling_dim=3: expected 1"):
        blockwise.quantize(torch.ones(2, 2), make_quantizer(dim=3))


# --- products ---------------------------------------------------------------------------------------------


def exact_copy(x: torch.Tensor, quantizer, last_dim: bool) -> torch.Tensor:
    """FP64 values of the copy that a product reads, from the oracle."""
    matrix = as_numpy(x).reshape(-1, x.shape[-1])
    values = oracle(
        matrix if last_dim else matrix.T,
        quantizer.dtype,
        LARGEST[x.dtype],
        quantizer.block_scaling_dim,
        quantizer.force_pow_2_scales,
        quantizer.amax_epsilon,
    )[2]
    return torch.from_numpy(np.ascontiguousarray(values if last_dim else values.T)).view(x.shape)


@pytest.mark.parametrize("engine", (None, "reference"))
@pytest.mark.parametrize("layout", ("TN", "NN", "NT"))
@pytest.mark.parametrize("dims", ((1, 1), (1, 2), (2, 1)))
@pytest.mark.parametrize("power_of_two", (True, False))
@pytest.mark.parametrize("sizes", ((128, 128, 128), (33, 70, 150)))
def test_products(engine, layout, dims, power_of_two, sizes):
    m, n, k = sizes
    tensors, exact = [], []
    for seed, (name, dim) in enumerate(zip("AB", dims)):
        shape = operand_shape(layout, name, m, n, k, (3,))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        # Items of very different size, so that the scale of another item shows.
        x *= torch.tensor([1.0, 2.0**8, 2.0**-9]).view(3, 1, 1)
        last_dim = contracts_last_dim(layout, name)
        quantizer = make_quantizer(
            dim, E4M3, last_dim, not last_dim, force_pow_2_scales=power_of_two
        )
        with teb.emulate(engine):
            tensors.append(teb.quantize(x, quantizer))
        exact.append(exact_copy(x, quantizer, last_dim))
    for out_dtype in (torch.float32, torch.bfloat16):
        with teb.emulate(engine):
            out = teb.batched_general_gemm(*tensors, layout=layout, out_dtype=out_dtype)
        assert out.dtype == out_dtype
        # Products of values that are rounded to FP32 where scales are no powers of two.
        bound = None if power_of_two or out_dtype != torch.float32 else 130.0
        assert_accurate(out, exact_product(layout, *exact), bound)


def test_square_blocks_serve_both_ways_and_others_do_not():
    x = torch.randn(2, 128, 128)
    with teb.emulate():
        for dim in (1, 2):
            y = teb.quantize(x, make_quantizer(dim, E4M3, True, False))
            with pytest.raises(ValueError, match="has no columnwise data"):
                teb.batched_general_gemm(y, y, layout="NN")
            if dim == 1:
                with pytest.raises(ValueError, match="has no columnwise data"):
                    read_codes(y, "A", False, lambda _: True)
                continue
            codes = read_codes(y, "A", False, lambda _: True)
            assert codes.data is y._rowwise_data and not codes.moved_last_dim


def test_two_e5m2_operands_are_refused():
    with teb.emulate():
        x = teb.quantize(torch.randn(2, 16, 16), make_quantizer(fp8=E5M2))
        with pytest.raises(teb.UnsupportedError, match="both E5M2"):
            teb.batched_general_gemm(x, x)


@pytest.mark.parametrize("fmt", (Format.E4M3, Format.HYBRID))
@pytest.mark.parametrize("function", ("module", "bmm"))
@pytest.mark.parametrize("sizes", ((128, 256, 128), (40, 70, 389)))
def test_training_under_autocast(fmt, function, sizes):
    m, k, n = sizes
    a = torch.randn(3, m, k, requires_grad=True)
    b = torch.randn(3, n, k, requires_grad=True)
    gradient = torch.randn(3, m, n)
    multiply = te.BatchedMatmul() if function == "module" else teb.bmm
    with teb.emulate(), te.autocast(enabled=True, recipe=Float8BlockScaling(fp8_format=fmt)):
        y = multiply(a, b.mT)
    y.backward(gradient)
    a64, b64, gradient = a.detach().double(), b.detach().double(), gradient.double()
    assert_accurate(y.detach(), a64 @ b64.mT, 27.0)
    bound = 27.0 if fmt == Format.E4M3 else 23.0
    assert_accurate(a.grad, gradient @ b64, bound)
    assert_accurate(b.grad, gradient.mT @ a64, bound)


def test_training_uses_the_quantizers_of_the_recipe():
    """`a` has 1 x 128 blocks and `b` 128 x 128, as the recipe's defaults say."""
    recipe = Float8BlockScaling()
    recipe.fp8_quant_fwd_inp = QParams(power_2_scale=False, amax_epsilon=0.0)
    a, b = torch.randn(2, 64, 128), torch.randn(2, 128, 64)
    with teb.emulate(), te.autocast(enabled=True, recipe=recipe):
        y = te.BatchedMatmul()(a, b)
    left = exact_copy(a, make_quantizer(1, force_pow_2_scales=False), True)
    right = exact_copy(b, make_quantizer(2), False)
    assert_accurate(y, left @ right, 130.0)


def test_gradients_of_quantized_operands():
    x, weight = torch.randn(2, 64, 128), torch.randn(2, 128, 32)
    with teb.emulate():
        a = teb.quantize(x, make_quantizer(1)).requires_grad_()
        b = teb.quantize(weight, make_quantizer(2)).requires_grad_()
        y = teb.bmm(a, b)
    gradient = torch.randn(y.shape)
    y.backward(gradient)
    gradient = gradient.double()
    assert_accurate(y.detach(), x.double() @ weight.double(), 27.0)
    assert_accurate(a.grad, gradient @ weight.double().mT, 27.0)
    assert_accurate(b.grad, x.double().mT @ gradient, 27.0)
