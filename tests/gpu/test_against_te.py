# SPDX-License-Identifier: Apache-2.0
"""The same bytes as TE: reference quantizers against its kernels, batch 1 against its `general_gemm`."""

from __future__ import annotations

import pytest
import torch
from products import FP8, make_quantizer, random_operands
from transformer_engine.pytorch import Float8CurrentScalingQuantizer, Float8Quantizer
from transformer_engine.pytorch.cpp_extensions import general_gemm

import transformer_engine_batched as teb
from transformer_engine_batched.reference import quantizers

LIMITS = {"e4m3": 448.0, "e5m2": 57344.0}


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """Zeros of both signs, subnormals, every binade, ties and the edges of the range."""
    exponents = torch.arange(-40, 18, device="cuda").double()
    mantissas = torch.arange(0, 33, device="cuda").double() / 32 + 1
    grid = (mantissas * 2.0 ** exponents[:, None]).flatten()
    x = torch.cat(
        [torch.zeros(1, device="cuda").double(), grid, -grid, -torch.zeros(1, device="cuda")]
    )
    x = x[: x.numel() // 64 * 64]
    return x.to(dtype).reshape(2, -1, 32)


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Named inputs; `amax` decides the current scale, so edges of it are among them."""
    x = torch.randn(3, 48, 96, device="cuda")
    with_nan, with_inf = x.clone(), x.clone()
    with_nan[1, 2, 3], with_inf[2, 3, 4] = float("nan"), float("-inf")
    return {
        "normal": x.to(dtype),
        "tiny": (x * 1e-7).to(dtype),
        "huge": (x * 1e4).to(dtype),
        "zeros": torch.zeros(2, 32, 32, device="cuda", dtype=dtype),
        "special": special_values(dtype),
        "amax 448": (x.clamp(-448, 448).index_fill(0, torch.tensor([0], device="cuda"), 448.0)).to(
            dtype
        ),
        "strided": x.to(dtype).mT,
        "nan": with_nan.to(dtype),
        "inf": with_inf.to(dtype),
        "subnormal amax": torch.full((2, 16, 16), 1e-40, device="cuda").to(dtype),
        "4-d": torch.randn(2, 3, 16, 32, device="cuda").to(dtype),
    }


def assert_same_bytes(x, y, name):
    """Codes, transposed codes and scale."""
    assert torch.equal(x._data, y._data), name
    assert torch.equal(x._transpose, y._transpose), name
    assert torch.equal(x._scale_inv.view(torch.int32), y._scale_inv.view(torch.int32)), name
    assert x._fp8_dtype == y._fp8_dtype


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("scale", (1.0, 40.0, 2.0**-9, 1.5e30))
def test_delayed_bytes(dtype, fp8, scale):
    for name, x in inputs(dtype).items():
        for start in (0.0, 3.0):
            made = []
            for quantize in (lambda x, q: q(x.contiguous()), quantizers.quantize):
                quantizer = Float8Quantizer(
                    torch.tensor([scale], device="cuda"),
                    torch.tensor([start], device="cuda"),
                    FP8[fp8],
                )
                made.append((quantize(x, quantizer), quantizer.amax))
            assert_same_bytes(made[0][0], made[1][0], name)
            assert torch.equal(made[0][1], made[1][1]), (name, start, made[0][1], made[1][1])


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("power_of_two", (False, True))
@pytest.mark.parametrize("epsilon", (0.0, 1e-2))
def test_current_bytes(dtype, fp8, power_of_two, epsilon):
    for name, x in inputs(dtype).items():
        quantizer = Float8CurrentScalingQuantizer(
            FP8[fp8], device="cuda", force_pow_2_scales=power_of_two, amax_epsilon=epsilon
        )
        assert_same_bytes(quantizer(x.contiguous()), quantizers.quantize(x, quantizer), name)


@pytest.mark.parametrize("split", (True, False))
@pytest.mark.parametrize("layout", ("TN", "NN", "NT"))
@pytest.mark.parametrize("kind", ("plain", "current"))
@pytest.mark.parametrize("sizes", ((128, 256, 512), (1024, 512, 2048)))
def test_batch_of_one_is_general_gemm(layout, kind, sizes, split):
    a, b = random_operands(layout, 1, *sizes)
    if kind == "current":
        a, b = make_quantizer(kind)(a), make_quantizer(kind)(b)
    out = teb.batched_general_gemm(
        a, b, layout=layout, out_dtype=torch.bfloat16, use_split_accumulator=split
    )
    expected = general_gemm(
        a, b, layout=layout, out_dtype=torch.bfloat16, use_split_accumulator=split
    )[0]
    assert torch.equal(out.flatten(), expected.flatten())


@pytest.mark.parametrize("kind", ("current", "delayed"))
def test_fp8_output_is_that_of_general_gemm(kind):
    a, b = random_operands("TN", 1, 128, 256, 64)
    a, b = make_quantizer("current")(a), make_quantizer("current")(b)
    made = []
    for function in (teb.batched_general_gemm, general_gemm):
        quantizer = make_quantizer(kind, scale=0.5)
        quantizer_amax = getattr(quantizer, "amax", torch.zeros(1))
        quantizer_amax.fill_(1e6)  # whether the old amax is kept or replaced shows
        out = function(a, b, out_dtype=torch.bfloat16, quantization_params=quantizer)
        made.append((out if isinstance(out, torch.Tensor) else out[0], quantizer_amax))
    assert torch.equal(made[0][0]._data.flatten(), made[1][0]._data.flatten())
    assert torch.equal(made[0][0]._scale_inv, made[1][0]._scale_inv)
    assert torch.equal(made[0][1], made[1][1])
