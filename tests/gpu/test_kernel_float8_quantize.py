# SPDX-License-Identifier: Apache-2.0
"""The fused FP8 quantization kernels on the GPU: the bytes of the reference and of TE, and how they run."""

from __future__ import annotations

import pytest
import torch
from expected_codes import LAYOUTS, TORCH_FP8, assert_codes, special_values
from products import FP8
from transformer_engine.pytorch import Float8CurrentScalingQuantizer, Float8Quantizer

from transformer_engine_batched.kernels import float8_quantize, tensor_amax
from transformer_engine_batched.kernels.float8_quantize import (
    Tile,
    quantize_float8,
    quantize_float8_current,
)
from transformer_engine_batched.reference import quantizers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def one(value: float) -> torch.Tensor:
    """A float32 on the device."""
    return torch.full((1,), value, device="cuda")


def current_scale(x: torch.Tensor, fp8_dtype: str, **rule) -> torch.Tensor:
    """The reference's scale of `x`."""
    return quantizers.scale_from_amax(quantizers.tensor_amax(x), TORCH_FP8[fp8_dtype], **rule)


@pytest.fixture
def use_tile(monkeypatch):
    """A function that makes every launch use one tile."""

    def use(tile):
        for name in float8_quantize.TILES:
            monkeypatch.setitem(float8_quantize.TILES, name, tile)
        forget()

    def forget():
        for function in (
            float8_quantize._make_plan, float8_quantize._make_cast, tensor_amax.make_amax_plan
        ):  # fmt: skip
            function.cache_clear()

    yield use
    forget()


@pytest.mark.parametrize("fp8_dtype", TORCH_FP8)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern(dtype, fp8_dtype):
    """All BF16 and FP16 numbers, and FP32 numbers of random bits, NaNs and subnormals among them."""
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31 - 1, (2, 512, 2048), device="cuda").int()
    else:
        bits = torch.arange(-(2**15), 2**15, device="cuda").short().reshape(2, 128, 256)
    x = bits.view(dtype)
    for scale in (1.0, -1.0, 448.0, 3.7e-5, 1.5e30, 1e-40, float("inf"), float("nan")):
        amax = one(0.0)
        outputs = quantize_float8(x, one(scale), amax, fp8_dtype, rowwise=True, transposed=True)
        assert_codes(outputs, x, one(scale), fp8_dtype, (True, True))
        assert torch.equal(amax, quantizers.tensor_amax(x))


@pytest.fixture
def filled_memory():
    """New outputs hold 0xFF, so that padding which is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", ((3, 256, 512), (2, 389, 389), (2, 2, 40, 1000), (5, 1), (1, 24), (2, 1, 1))
)
def test_layouts_and_tiles(use_tile, layout, shape):
    rowwise, transposed = layout
    for tile, dtype, multiple in (
        (Tile(128, 64, 4), torch.bfloat16, 16),
        (Tile(64, 128, 8), torch.float32, 128),
        (Tile(16, 32, 1), torch.float16, 16),
    ):
        use_tile(tile)
        x = torch.randn(shape, device="cuda").to(dtype)
        amax = one(0.5)
        asked = {"rowwise": rowwise, "transposed": transposed, "multiple": multiple}
        outputs = quantize_float8(x, one(-20.0), amax, "e4m3", **asked)
        assert_codes(outputs, x, one(-20.0), "e4m3", layout, multiple)
        assert amax.item() == max(0.5, x.abs().max().item())
        outputs = quantize_float8_current(x, "e5m2", **asked)
        assert_codes(outputs, x, current_scale(x, "e5m2"), "e5m2", layout, multiple)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "view",
    (
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2, 16:240],
        lambda x: x[1:, 3:21],
        lambda x: x[:, :, 1:],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.view(3, 2, 48, 256)[:, :, :, 1:],
    ),
)
def test_views(layout, view):
    rowwise, transposed = layout
    x = view(torch.randn(3, 96, 256, device="cuda").bfloat16())
    asked = {"rowwise": rowwise, "transposed": transposed}
    outputs = quantize_float8(x, one(20.0), one(0.0), "e4m3", **asked)
    assert_codes(outputs, x, one(20.0), "e4m3", layout)
    outputs = quantize_float8_current(x, "e4m3", **asked)
    assert_codes(outputs, x, current_scale(x, "e4m3"), "e4m3", layout)


@pytest.mark.parametrize("fp8_dtype", TORCH_FP8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power_of_2", (False, True))
@pytest.mark.parametrize("epsilon", (0.0, 0.75))
def test_current_scale(dtype, fp8_dtype, power_of_2, epsilon):
    rule = {"force_pow_2_scales": power_of_2, "amax_epsilon": epsilon}
    for largest in (0.0, 1e-45, 1e-40, 1e-30, 0.1, 0.75, 1 / 3, 448.0, 449.0, 6e4, 3e38, torch.inf):
        x = torch.rand(2, 64, 96, device="cuda") * largest
        x = x.nan_to_num(nan=1.0, posinf=torch.inf).to(dtype)
        x[1, 2, 3] = torch.nan
        outputs = quantize_float8_current(x, fp8_dtype, rowwise=True, transposed=True, **rule)
        assert_codes(outputs, x, current_scale(x, fp8_dtype, **rule), fp8_dtype, (True, True))


@pytest.mark.parametrize("fp8_dtype", TORCH_FP8)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_te(dtype, fp8_dtype):
    for x in (torch.randn(4, 96, 160, device="cuda").to(dtype), special_values(dtype).cuda()):
        state = torch.tensor([9.0, 37.5, 0.25, 9.0], device="cuda")
        te_quantizer = Float8Quantizer(one(37.5), one(0.25), FP8[fp8_dtype])
        wanted = te_quantizer(x)
        made = quantize_float8(x, state[1], state[2], fp8_dtype, rowwise=True, transposed=True)
        current_quantizer = Float8CurrentScalingQuantizer(FP8[fp8_dtype], device="cuda")
        pairs = [
            (made, wanted),
            (
                quantize_float8_current(x, fp8_dtype, rowwise=True, transposed=True),
                current_quantizer(x),
            ),
        ]
        for (codes, transposed_codes, scale_inv), wanted in pairs:
            assert torch.equal(codes, wanted._data)
            assert torch.equal(transposed_codes, wanted._data.mT)
            assert torch.equal(scale_inv.view(torch.int32), wanted._scale_inv.view(torch.int32))
        assert torch.equal(state[2:3], te_quantizer.amax)
        assert (state[0], state[1], state[3]) == (9.0, 37.5, 9.0)


def test_amax_that_is_nan_stays():
    x, amax = torch.randn(2, 64, 64, device="cuda"), one(torch.nan)
    quantize_float8(x, one(1.0), amax, "e4m3", rowwise=True, transposed=False)
    assert amax.isnan().item()


def test_graph_capture_reads_and_writes_anew():
    x = torch.randn(4, 128, 192, device="cuda").bfloat16()
    scale, amax = one(30.0), one(0.0)

    def quantize():
        return (
            quantize_float8(x, scale, amax, "e4m3", rowwise=True, transposed=True),
            quantize_float8_current(x, "e5m2", rowwise=True, transposed=True),
        )

    quantize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        delayed, current = quantize()
    for factor in (2.0, 0.25):
        x.mul_(factor)
        scale.mul_(0.5)
        amax.zero_()
        graph.replay()
        assert_codes(delayed, x, scale, "e4m3", (True, True))
        assert_codes(current, x, current_scale(x, "e5m2"), "e5m2", (True, True))
        assert torch.equal(amax, quantizers.tensor_amax(x))


def test_the_host_does_not_wait():
    x = torch.randn(4, 100, 192, device="cuda")
    scale, amax = one(30.0), one(0.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantize_float8(x, scale, amax, "e4m3", rowwise=True, transposed=True)
        quantize_float8_current(x, "e4m3", rowwise=True, transposed=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_stream():
    x, stream = torch.zeros(8, 1024, 1024, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(2.0)
        outputs = quantize_float8_current(x, "e4m3", rowwise=True, transposed=True)
    stream.synchronize()
    assert_codes(outputs, x, current_scale(x, "e4m3"), "e4m3", (True, True))


@pytest.mark.parametrize("transposed", (False, True))
def test_beyond_2_31_elements(transposed):
    """Offsets of 64 bits in x, in the codes and in their transpose: every row has its own value."""
    items, rows, cols = 5, 16384, 32768
    x = torch.zeros(items, rows, cols, device="cuda", dtype=torch.bfloat16)
    x[:, :, ::4096] = torch.randn(items, rows, cols // 4096, device="cuda").bfloat16()
    scale, amax = one(20.0), one(0.0)
    asked = {"rowwise": not transposed, "transposed": transposed}
    made = quantize_float8(x, scale, amax, "e4m3", **asked)
    current = quantize_float8_current(x, "e4m3", **asked)
    for outputs, used in ((made, scale), (current, current_scale(x[:, :, ::4096], "e4m3"))):
        for item in range(items):
            part = tuple(None if y is None else y[item] for y in outputs[:2]) + outputs[2:]
            layout = (not transposed, transposed)
            assert_codes(part, x[item], used, "e4m3", layout)
    # One row stride beyond 32 bits.
    wide = x.view(-1).as_strided((2, 64), (2**31 + 64, 1))
    wide.copy_(torch.randn(2, 64, device="cuda"))
    outputs = quantize_float8(wide, scale, amax, "e4m3", rowwise=True, transposed=True)
    assert_codes(outputs, wide, scale, "e4m3", (True, True))
