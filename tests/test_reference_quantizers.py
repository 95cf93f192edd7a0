# SPDX-License-Identifier: Apache-2.0
"""Reference quantizers against an oracle written apart from them, in numpy.

The oracle does each FP32 operation of TE's kernels with numpy float32 scalars and arrays, rounds to
FP8 by searching a table in float64, and takes exponents with frexp. Needs no GPU.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch  # before TE: it loads the libraries that TE links to
import transformer_engine.pytorch as te

from transformer_engine_batched.errors import UnsupportedError
from transformer_engine_batched.reference import codes, quantizers
from transformer_engine_batched.reference.quantizers import quantize

E4M3, E5M2 = te.DType.kFloat8E4M3, te.DType.kFloat8E5M2
TORCH_FP8 = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
FP8_MAX = {E4M3: np.float32(448), E5M2: np.float32(57344)}
FP32_MAX = np.finfo(np.float32).max
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
USAGES = ((True, False), (False, True), (True, True))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(11)


def fp8_table(fp8) -> np.ndarray:
    """Non-negative finite values in the order of their codes."""
    mantissa_bits, bias, count = (3, 7, 0x7F) if fp8 == E4M3 else (2, 15, 0x7C)
    values = []
    for code in range(count):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
        values.append(math.ldexp(fraction, max(exponent, 1) - bias))
    return np.array(values)


def oracle_codes(values: np.ndarray, fp8) -> np.ndarray:
    assert values.dtype == np.float32
    table = fp8_table(fp8)
    exact = np.abs(values.astype(np.float64))
    exact = np.minimum(np.where(np.isnan(exact), 0, exact), table[-1])
    upper = np.clip(np.searchsorted(table, exact), 1, len(table) - 1)
    lower = upper - 1
    to_lower, to_upper = exact - table[lower], table[upper] - exact
    even = np.where(lower % 2 == 0, lower, upper)
    code = np.where(to_lower < to_upper, lower, np.where(to_upper < to_lower, upper, even))
    code = code | np.where(np.signbit(values), 0x80, 0)
    return np.where(np.isnan(values), 0x7F, code).astype(np.uint8)


def oracle_amax(values: np.ndarray) -> np.float32:
    finite_or_inf = np.abs(values[~np.isnan(values)])
    return finite_or_inf.max() if finite_or_inf.size else np.float32(0)


def oracle_scale(amax, fp8, power_of_two=False, epsilon=0.0) -> np.float32:
    amax = max(amax, np.float32(epsilon))
    if amax == 0 or np.isinf(amax):
        return np.float32(1)
    with np.errstate(over="ignore"):
        scale = FP8_MAX[fp8] / amax
    scale = min(scale, FP32_MAX)
    return np.float32(2.0 ** (math.frexp(scale)[1] - 1)) if power_of_two else scale


def oracle_exponent(amax: np.float32, fp8) -> int:
    ratio = amax * (np.float32(1) / FP8_MAX[fp8])
    if np.isinf(ratio):
        return 254
    if ratio == 0:
        return 0
    fraction, exponent = math.frexp(ratio)  # ratio = fraction * 2^exponent, 0.5 <= fraction < 1
    return min(max(exponent - (fraction == 0.5), -127), 127) + 127


def oracle_mxfp8(values: np.ndarray, fp8, columnwise: bool, square: bool):
    """Codes and compact scales of a matrix, block by block."""
    rows, cols = values.shape
    high, wide = (32, 32) if square else (32, 1) if columnwise else (1, 32)
    out = np.zeros((rows, cols), np.uint8)
    exponents = np.zeros((rows // high, cols // wide), np.uint8)
    for i in range(rows // high):
        for j in range(cols // wide):
            block = np.s_[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            exponents[i, j] = oracle_exponent(oracle_amax(values[block]), fp8)
            factor = np.float32(math.ldexp(1.0, 127 - int(exponents[i, j])))
            with np.errstate(over="ignore"):
                out[block] = oracle_codes(values[block] * factor, fp8)
    if square:
        exponents = exponents.repeat(32, axis=1 if columnwise else 0)
    return out, exponents


def special_values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 data of order one with one kind of edge in it."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator)
    flat = x.view(-1)
    if name == "zeros":
        x.zero_()
    elif name == "negative zeros":
        x.zero_().neg_()
    elif name == "subnormal":
        x.mul_(1e-40)
    elif name == "smallest":
        x.zero_()
        flat[1] = 1e-45
    elif name == "huge":
        x.mul_(1e38)
        flat[3] = torch.finfo(torch.float32).max
    elif name == "nan":
        flat[::5] = math.nan
        flat[1] = -math.nan
    elif name == "only nan":
        x.fill_(math.nan)
    elif name == "nan in a block":
        flat[:32] = math.nan
    elif name == "inf":
        flat[2], flat[40] = math.inf, -math.inf
    elif name == "inf and nan":
        flat[0], flat[1] = math.inf, math.nan
    elif name == "spread":
        x.mul_(torch.exp2(torch.randint(-60, 60, shape, generator=generator)))
    else:
        assert name == "normal"
    return x


SPECIAL = (
    "normal",
    "zeros",
    "negative zeros",
    "subnormal",
    "smallest",
    "huge",
    "nan",
    "only nan",
    "nan in a block",
    "inf",
    "inf and nan",
    "spread",
)


def as_numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().float().numpy()


def delayed_quantizer(fp8=E4M3, scale=1.0, amax=0.0, device="cpu", rowwise=True, columnwise=True):
    scale = torch.full((1,), scale, dtype=torch.float32, device=device)
    amax = torch.full((1,), amax, dtype=torch.float32, device=device)
    return te.Float8Quantizer(scale, amax, fp8, rowwise=rowwise, columnwise=columnwise)


def current_quantizer(fp8=E4M3, device="cpu", **options):
    return te.Float8CurrentScalingQuantizer(fp8, torch.device(device), **options)


def bits(value: torch.Tensor | np.float32) -> int:
    return int(np.float32(value.item() if isinstance(value, torch.Tensor) else value).view("u4"))


def check_float8(y, x: torch.Tensor, fp8, scale: np.float32, usage=(True, True)) -> None:
    """Every byte of a Float8 tensor of `x`."""
    with np.errstate(over="ignore", invalid="ignore"):
        expected = oracle_codes(as_numpy(x) * scale, fp8)
        scale_inv = np.float32(1) / scale
    parts = y.get_metadata()
    for buffer, wanted, layout in (
        (parts["data"], usage[0], expected),
        (parts["data_transpose"], usage[1], np.moveaxis(expected, -1, 0)),
    ):
        assert (buffer is not None) == wanted
        if wanted:
            assert buffer.dtype == torch.uint8 and buffer.is_contiguous()
            assert buffer.device == x.device
            np.testing.assert_array_equal(buffer.cpu().numpy(), layout)
    assert parts["fp8_scale_inv"].shape == (1,)
    assert parts["fp8_scale_inv"].dtype == torch.float32
    assert bits(parts["fp8_scale_inv"]) == bits(scale_inv)
    assert parts["fp8_dtype"] == fp8 and parts["fake_dtype"] == x.dtype


def scale_inv(y) -> float:
    return y.get_metadata()["fp8_scale_inv"].item()


def padded_compact(exponents: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    out = np.zeros(shape, np.uint8)
    out[: exponents.shape[0], : exponents.shape[1]] = exponents
    return out


def swizzled(exponents: np.ndarray) -> np.ndarray:
    """TE's gemm_swizzled_scale_idx, index by index."""
    outer, inner = exponents.shape
    num_tiles = -(-inner // 4)
    out = np.zeros(-(-outer // 128) * num_tiles * 512, np.uint8)
    for i in range(outer):
        for j in range(inner):
            index = (i // 128 * num_tiles + j // 4) * 512
            index += (i % 128 % 32) * 16 + (i % 128 // 32) * 4 + j % 4
            out[index] = exponents[i, j]
    return out


def check_mxfp8(y, x: torch.Tensor, quantizer) -> None:
    """Every byte of an MXFP8 tensor of `x`."""
    matrix = as_numpy(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    tiled = quantizer.optimize_for_gemm
    parts = y.get_metadata()
    assert parts["with_gemm_swizzled_scales"] == tiled
    assert parts["fp8_dtype"] == quantizer.dtype and parts["fake_dtype"] == x.dtype
    for columnwise, usage, wanted in (
        (False, "rowwise", quantizer.rowwise_usage),
        (True, "columnwise", quantizer.columnwise_usage),
    ):
        data, scales = parts[f"{usage}_data"], parts[f"{usage}_scale_inv"]
        assert (data is not None) == wanted and (scales is not None) == wanted
        if not wanted:
            continue
        expected, exponents = oracle_mxfp8(
            matrix, quantizer.dtype, columnwise, quantizer.with_2d_quantization
        )
        assert data.shape == x.shape and data.is_contiguous() and data.device == x.device
        np.testing.assert_array_equal(data.cpu().numpy().reshape(matrix.shape), expected)
        shape = tuple(quantizer.get_scale_shape(x.shape, columnwise=columnwise))
        assert tuple(scales.shape) == shape and scales.is_contiguous()
        if tiled:
            layout = swizzled(exponents.T if columnwise else exponents).reshape(shape)
        else:
            layout = padded_compact(exponents, shape)
        np.testing.assert_array_equal(scales.cpu().numpy(), layout)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("name", SPECIAL)
def test_delayed_bytes(name, fp8, dtype, device):
    x = special_values(name, (3, 8, 16)).to(device, dtype)
    for scale in (1.0, 37.3, 1e-3, 3e38):
        quantizer = delayed_quantizer(fp8, scale, device=device)
        y = quantize(x, quantizer)
        assert isinstance(y, te.Float8Tensor) and y.shape == x.shape and y.dtype == dtype
        check_float8(y, x, fp8, np.float32(scale))
        assert bits(quantizer.amax) == bits(oracle_amax(as_numpy(x)))


def test_delayed_amax_is_the_larger_of_old_and_new():
    x = torch.tensor([[1.0, -2.5]])
    for before, after in ((0.0, 2.5), (2.0, 2.5), (3.0, 3.0), (math.inf, math.inf)):
        quantizer = delayed_quantizer(amax=before)
        quantize(x, quantizer)
        assert quantizer.amax.item() == after
    quantizer = delayed_quantizer(amax=math.nan)
    quantize(x, quantizer)
    assert quantizer.amax.isnan()


def test_delayed_amax_is_written_in_place_into_a_history():
    history = torch.zeros(4, 3)
    quantizer = te.Float8Quantizer(torch.ones(1), history[0][1:2], E4M3)
    quantize(torch.full((2, 2), 5.0), quantizer)
    assert history.flatten().tolist() == [0.0, 5.0] + [0.0] * 10
    scalar = te.Float8Quantizer(torch.tensor(2.0), torch.tensor(0.0), E4M3)
    y = quantize(torch.full((2, 2), 5.0), scalar)
    assert scalar.amax.item() == 5.0 and scale_inv(y) == 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("name", SPECIAL)
def test_current_bytes(name, fp8, dtype, device):
    x = special_values(name, (3, 8, 16)).to(device, dtype)
    amax = oracle_amax(as_numpy(x))
    for power_of_two in (False, True):
        for epsilon in (0.0, 1e-4, 4.0):
            quantizer = current_quantizer(
                fp8, device, force_pow_2_scales=power_of_two, amax_epsilon=epsilon
            )
            y = quantize(x, quantizer)
            assert isinstance(y, te.Float8Tensor) and y.shape == x.shape and y.dtype == dtype
            check_float8(y, x, fp8, oracle_scale(amax, fp8, power_of_two, epsilon))


def edge_amaxes() -> np.ndarray:
    """Every exponent of float32 with the mantissas where the quotient changes its exponent."""
    powers = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
    with np.errstate(over="ignore"):
        amaxes = np.concatenate([powers, powers * np.float32(1.75), powers * np.float32(1.3)])
    amaxes = np.concatenate([amaxes, np.nextafter(amaxes, np.inf), np.nextafter(amaxes, 0)])
    extra = np.random.default_rng(3).uniform(0.5, 500, 2000)
    extra = np.concatenate([extra, [FP32_MAX, np.inf, 0.0]]).astype(np.float32)
    return np.concatenate([amaxes[amaxes > 0], extra])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_scale_from_amax_at_each_edge(fp8, power_of_two, device):
    amaxes = edge_amaxes()
    got = quantizers.scale_from_amax(
        torch.from_numpy(amaxes).to(device), TORCH_FP8[fp8], force_pow_2_scales=power_of_two
    )
    expected = np.array([oracle_scale(amax, fp8, power_of_two) for amax in amaxes], np.float32)
    np.testing.assert_array_equal(got.cpu().numpy().view("u4"), expected.view("u4"))
    nan = torch.tensor([math.nan], device=device)
    assert quantizers.scale_from_amax(nan, TORCH_FP8[fp8]).item() == 1.0


def test_the_edges_notice_a_reciprocal_instead_of_a_quotient():
    amaxes = edge_amaxes()
    amaxes = amaxes[(amaxes > 1e-30) & np.isfinite(amaxes)]
    rounded_twice = (np.float32(1) / amaxes) * FP8_MAX[E4M3]
    assert (rounded_twice != FP8_MAX[E4M3] / amaxes).any()


def strided_views() -> dict[str, torch.Tensor]:
    x = torch.randn(4, 6, 32, 32)
    return {
        "transposed": x[0].transpose(1, 2),
        "batch inside": x[0].permute(1, 0, 2),
        "sliced": x[:, ::2, :, 1::2],
        "broadcast": x[0, 0].expand(3, 32, 32),
        "four dims, permuted": x.permute(2, 0, 1, 3),
        "storage offset": x[1:],
    }


@pytest.mark.parametrize("usage", USAGES)
@pytest.mark.parametrize("name", strided_views())
def test_per_tensor_reads_any_strides(name, usage):
    x = strided_views()[name]
    before = x.clone()
    flags = {"rowwise": usage[0], "columnwise": usage[1]}
    check_float8(quantize(x, delayed_quantizer(scale=3.0, **flags)), x, E4M3, np.float32(3), usage)
    scale = oracle_scale(oracle_amax(as_numpy(x)), E4M3)
    y = quantize(x, current_quantizer(**flags))
    check_float8(y, x, E4M3, scale, usage)
    assert y.size() == x.size() and torch.equal(x, before)


@pytest.mark.parametrize("shape", [(16,), (1, 16), (16, 1), (5, 7), (2, 3, 5), (2, 3, 4, 5)])
def test_per_tensor_shapes_and_layouts(shape):
    x = torch.randn(shape)
    y = quantize(x, current_quantizer())
    check_float8(y, x, E4M3, oracle_scale(oracle_amax(as_numpy(x)), E4M3))
    data, transpose = y.get_data_tensors()
    assert data.data_ptr() != transpose.data_ptr()
    assert tuple(transpose.shape) == (shape[-1], *shape[:-1])


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 8), (2, 3, 0)])
def test_per_tensor_empty(shape):
    x = torch.empty(shape)
    quantizer = delayed_quantizer(scale=4.0, amax=2.0)
    y = quantize(x, quantizer)
    assert y.shape == shape
    assert tuple(y.get_data_tensors()[1].shape) == (shape[-1], *shape[:-1])
    assert quantizer.amax.item() == 2.0 and scale_inv(y) == 0.25
    y = quantize(x, current_quantizer(amax_epsilon=1.0))
    assert y.shape == shape and scale_inv(y) == 1.0


@pytest.mark.parametrize("fp8, decibels", [(E4M3, 30.0), (E5M2, 24.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_tensor_dequantizes_through_te(dtype, fp8, decibels):
    x = torch.randn(4, 64, 128).to(dtype)
    for quantizer in (current_quantizer(fp8), delayed_quantizer(fp8, scale=100.0)):
        y = quantize(x, quantizer)
        own = codes.decode(y.get_data_tensors()[0], TORCH_FP8[fp8]) * scale_inv(y)
        te_values = y.dequantize(dtype=torch.float32).double()
        torch.testing.assert_close(te_values, own, rtol=1e-7, atol=0)
        signal = x.double().square().sum((1, 2))
        noise = (own - x.double()).square().sum((1, 2))
        assert (10 * torch.log10(signal / noise)).min() > decibels
        assert y.dequantize().dtype == dtype
        columnwise = quantizer.copy()
        columnwise.set_usage(rowwise=False, columnwise=True)
        only = quantize(x, columnwise)
        assert torch.equal(only.dequantize(dtype=torch.float32), y.dequantize(dtype=torch.float32))


def test_internal_quantizers_make_storages():
    for quantizer, cls in (
        (delayed_quantizer(), te.Float8TensorStorage),
        (current_quantizer(), te.Float8TensorStorage),
        (te.MXFP8Quantizer(E4M3), te.MXFP8TensorStorage),
    ):
        x = torch.randn(2, 32, 32, dtype=torch.bfloat16)
        outer = quantize(x, quantizer)
        quantizer.internal = True
        inner = quantize(x, quantizer)
        assert type(inner) is cls and isinstance(outer, cls) and type(outer) is not cls
        assert tuple(inner.size()) == tuple(x.shape)
        for ours, theirs in zip(inner.get_data_tensors(), outer.get_data_tensors()):
            assert torch.equal(ours, theirs)
        assert inner.get_metadata()["fake_dtype"] == torch.bfloat16


def test_result_needs_no_grad_and_the_input_keeps_its_graph():
    x = torch.randn(2, 32, 32, requires_grad=True) * 2
    for quantizer in (delayed_quantizer(), current_quantizer(), te.MXFP8Quantizer(E4M3)):
        assert not quantize(x, quantizer).requires_grad
    assert x.grad_fn is not None


@pytest.mark.parametrize("group", [None, "a process group"])
def test_current_scaling_reduces_its_amax_over_the_group(group, monkeypatch):
    calls = []

    def other_rank_has_14(tensor, op, group):
        calls.append((tensor.tolist(), op, group))
        tensor.fill_(14.0)

    monkeypatch.setattr(torch.distributed, "all_reduce", other_rank_has_14)
    quantizer = current_quantizer(with_amax_reduction=True, amax_reduction_group=group)
    x = torch.tensor([[2.0, -1.5]])
    y = quantize(x, quantizer)
    assert calls == [([2.0], torch.distributed.ReduceOp.MAX, group)]
    check_float8(y, x, E4M3, np.float32(32))
    # The tensor does not hold on to the group, the quantizer does.
    assert not y.get_metadata()["quantizer"].with_amax_reduction
    assert y.get_metadata()["quantizer"].amax_reduction_group is None
    assert quantizer.with_amax_reduction and quantizer.amax_reduction_group == group
    quantize(torch.empty(0, 2), quantizer)
    assert len(calls) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("name", SPECIAL)
def test_mxfp8_bytes(name, fp8, dtype, device):
    x = special_values(name, (2, 16, 64)).to(device, dtype)
    for square in (False, True):
        quantizer = te.MXFP8Quantizer(fp8, with_2d_quantization=square)
        y = quantize(x, quantizer)
        assert isinstance(y, te.MXFP8Tensor) and y.shape == x.shape and y.dtype == dtype
        check_mxfp8(y, x, quantizer)


@pytest.mark.parametrize("usage", USAGES)
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("shape", [(32, 32), (3, 96, 160), (2, 4, 20, 64)])
def test_mxfp8_layouts(shape, tiled, square, usage):
    quantizer = te.MXFP8Quantizer(
        E4M3, rowwise=usage[0], columnwise=usage[1], with_2d_quantization=square
    )
    quantizer.optimize_for_gemm = tiled
    x = torch.randn(shape) * torch.exp2(torch.randint(-9, 9, shape))
    check_mxfp8(quantize(x, quantizer), x, quantizer)


@pytest.mark.parametrize("name", strided_views())
def test_mxfp8_reads_any_strides(name):
    x = strided_views()[name]
    if x.shape[-1] % 32:
        x = x.repeat(1, 1, 1, 2)[:, ::3]
    for square in (False, True):
        quantizer = te.MXFP8Quantizer(E4M3, with_2d_quantization=square)
        check_mxfp8(quantize(x, quantizer), x, quantizer)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 64), (2, 32, 0), (0, 0)])
def test_mxfp8_empty(shape, tiled):
    quantizer = te.MXFP8Quantizer(E4M3)
    quantizer.optimize_for_gemm = tiled
    y = quantize(torch.empty(shape), quantizer)
    assert y.shape == shape
    check_mxfp8(y, torch.empty(shape), quantizer)


@pytest.mark.parametrize("columnwise", [False, True])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_mxfp8_scales_at_each_edge_of_the_amax(fp8, columnwise):
    amaxes = edge_amaxes()
    x = torch.from_numpy(amaxes).repeat(32, 1)
    x = x if columnwise else x.t().contiguous()
    got = quantizers.mxfp8_block_scales(x, TORCH_FP8[fp8], columnwise=columnwise).flatten()
    assert got.tolist() == [oracle_exponent(amax, fp8) for amax in amaxes]
    # No block saturates, and the largest element uses the format's last binade or the one below.
    fits = np.isfinite(amaxes) & (got.numpy() > 0)
    scaled = amaxes.astype(np.float64) / np.exp2(got.numpy().astype(np.float64) - 127)
    largest = float(FP8_MAX[fp8])
    assert (scaled[fits] <= largest).all() and (scaled[fits] > largest / 2 * (1 - 1e-6)).all()


@pytest.mark.parametrize("fp8, emax", [(E4M3, 8), (E5M2, 15)])
def test_mxfp8_scales_are_the_closed_form_for_every_bf16_amax(fp8, emax):
    """The exponent that TE's register-resident kernels take from the bits of the amax."""
    patterns = torch.arange(0x7F81, dtype=torch.int32)  # 0 to infinity
    amaxes = (patterns << 16).view(torch.float32).bfloat16()
    got = quantizers.mxfp8_block_scales(amaxes.repeat(32, 1), TORCH_FP8[fp8], columnwise=True)
    expected = ((patterns + 31) >> 7) - emax  # 97 / 128 and more of mantissa is beyond 1.75
    expected = expected.clamp(min=0)
    expected[-1] = 254
    assert torch.equal(got[0].int(), expected)


def test_mxfp8_zero_block_and_its_neighbours():
    x = torch.ones(32, 96)
    x[:, 32:64] = 0
    y = quantize(x, te.MXFP8Quantizer(E4M3, columnwise=False))
    parts = y.get_metadata()
    assert parts["rowwise_scale_inv"][0].tolist() == [119, 0, 119, 0]  # 1 / 448, up to 2^-8
    assert parts["rowwise_data"][0, 32:64].tolist() == [0] * 32


@pytest.mark.parametrize("fp8, decibels", [(E4M3, 28.0), (E5M2, 22.0)])
@pytest.mark.parametrize("columnwise", [False, True])
def test_mxfp8_values_are_near_the_data(columnwise, fp8, decibels):
    x = torch.randn(4, 64, 128)
    y = quantize(x, te.MXFP8Quantizer(fp8))
    parts = y.get_metadata()
    if columnwise:
        data, blocks = parts["columnwise_data"], parts["columnwise_scale_inv"][:8, :128]
    else:
        data, blocks = parts["rowwise_data"], parts["rowwise_scale_inv"][:, :4]
    data = codes.decode(data, TORCH_FP8[fp8])
    scales = codes.decode_e8m0(blocks).repeat_interleave(32, 0 if columnwise else 1)
    noise = (data * scales.view(x.shape) - x).square().sum((1, 2))
    assert (10 * torch.log10(x.double().square().sum((1, 2)) / noise)).min() > decibels


def test_mxfp8_sizes_that_do_not_fit():
    quantizer = te.MXFP8Quantizer(E4M3)
    with pytest.raises(ValueError, match=r"last dimension \(33\).*pad\(x, \(0, 31, 0, 0\)\) fits"):
        quantize(torch.ones(2, 32, 33), quantizer)
    with pytest.raises(
        ValueError, match=r"others \(6\).*shape \(2, 3, 32\).*\(0, 0, 0, 29\)\) fits"
    ):
        quantize(torch.ones(2, 3, 32), quantizer)
    with pytest.raises(ValueError, match=r"at least two dimensions; .*shape \(64,\)"):
        quantize(torch.ones(64), quantizer)
    padded = torch.nn.functional.pad(torch.ones(2, 3, 33), (0, 31, 0, 29))
    check_mxfp8(quantize(padded, quantizer), padded, quantizer)
    # Leading dimensions count together: 2 x 16 rows are one block.
    x = torch.randn(2, 16, 32)
    check_mxfp8(quantize(x, quantizer), x, quantizer)


def test_other_quantizers_are_named():
    with pytest.raises(UnsupportedError, match="no Float8BlockQuantizer; it quantizes with"):
        block = te.Float8BlockQuantizer(E4M3, rowwise=True, columnwise=True)
        quantize(torch.ones(128, 128), block)
    with pytest.raises(TypeError, match="quantizer was asked for and str came"):
        quantize(torch.ones(2, 2), "mxfp8")


def test_inputs_that_are_refused():
    quantizer = current_quantizer()
    for dtype in (torch.int32, torch.complex64, torch.float64, torch.uint8):
        with pytest.raises(TypeError, match=rf"came as {dtype}, shape \(2, 2\), stride"):
            quantize(torch.ones(2, 2).to(dtype), quantizer)
    with pytest.raises(ValueError, match=r"at least one dimension .* shape \(\)"):
        quantize(torch.tensor(1.0), quantizer)
    with pytest.raises(TypeError, match="Float8Tensor came; dequantize"):
        quantize(quantize(torch.ones(2, 2), quantizer), quantizer)
    with pytest.raises(TypeError, match="a plain tensor was asked for and list came"):
        quantize([1.0], quantizer)


def test_quantizers_that_are_refused():
    with pytest.raises(ValueError, match="neither row-wise nor column-wise usage"):
        quantize(torch.ones(2, 2), current_quantizer(rowwise=False, columnwise=False))
    with pytest.raises(TypeError, match="its dtype must be one of"):
        quantize(torch.ones(2, 2), current_quantizer(te.DType.kBFloat16))
    two = te.Float8Quantizer(torch.ones(2), torch.zeros(1), E4M3)
    with pytest.raises(ValueError, match=r"`scale` must be one float32 on cpu.*shape \(2,\)"):
        quantize(torch.ones(2, 2), two)
    double = te.Float8Quantizer(torch.ones(1), torch.zeros(1, dtype=torch.float64), E4M3)
    with pytest.raises(ValueError, match="`amax` must be one float32 .* torch.float64"):
        quantize(torch.ones(2, 2), double)
    elsewhere = te.Float8Quantizer(torch.ones(1, device="meta"), torch.zeros(1), E4M3)
    with pytest.raises(ValueError, match="`scale` .* device meta"):
        quantize(torch.ones(2, 2), elsewhere)


def planted_round_down(values):
    return (values.view(torch.int32) >> 23).clamp(max=254).to(torch.uint8)


def test_rounding_the_block_scale_down_is_noticed(monkeypatch):
    monkeypatch.setattr(codes, "encode_e8m0", planted_round_down)
    with pytest.raises(AssertionError):
        test_mxfp8_bytes("normal", E4M3, torch.float32, "cpu")
    with pytest.raises(AssertionError):
        test_mxfp8_scales_at_each_edge_of_the_amax(E4M3, False)


def test_a_cast_that_does_not_saturate_is_noticed(monkeypatch):
    monkeypatch.setattr(codes, "encode", lambda v, fp8: v.to(fp8).view(torch.uint8))
    with pytest.raises(AssertionError):
        test_delayed_bytes("inf", E5M2, torch.float32, "cpu")


def test_a_scale_rounded_twice_is_noticed(monkeypatch):
    right = quantizers.scale_from_amax

    def wrong(amax, fp8, **options):
        scale = amax.reciprocal() * codes.fp8_max(fp8)
        return torch.where(right(amax, fp8, **options) == 1, 1.0, scale)

    monkeypatch.setattr(quantizers, "scale_from_amax", wrong)
    with pytest.raises(AssertionError):
        test_scale_from_amax_at_each_edge(E4M3, False, "cpu")


def test_an_amax_that_a_nan_poisons_is_noticed(monkeypatch):
    monkeypatch.setattr(quantizers, "tensor_amax", lambda x: x.float().abs().amax().reshape(1))
    with pytest.raises(AssertionError):
        test_delayed_bytes("nan", E4M3, torch.float32, "cpu")
