# SPDX-License-Identifier: Apache-2.0
"""What a per-tensor FP8 quantization must write: codes of both layouts, padding, inverse scale.

By the reference's arithmetic alone; for tests on the CPU and on the GPU. Must not import a kernel.
"""

from __future__ import annotations

import torch

from transformer_engine_batched.reference import codes as fp8_codes

TORCH_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# (row-wise, transposed)
LAYOUTS = ((True, False), (False, True), (True, True))


def encode_padded(
    x: torch.Tensor, scale: torch.Tensor, fp8_dtype: str, multiple: int = 16
) -> torch.Tensor:
    """What the kernel must write row-wise: reference codes inside, zeros around."""
    codes = fp8_codes.encode(x.float() * scale, TORCH_FP8[fp8_dtype])
    right, bottom = -x.shape[-1] % multiple, -x.shape[-2] % multiple
    return torch.nn.functional.pad(codes, (0, right, 0, bottom))


def assert_codes(
    outputs, x: torch.Tensor, scale: torch.Tensor, fp8_dtype: str, layout, multiple: int = 16
) -> None:
    """Both layouts and the inverse scale, bit for bit."""
    codes, transposed_codes, scale_inv = outputs
    expected = encode_padded(x, scale, fp8_dtype, multiple)
    for made, wanted, is_asked in zip((codes, transposed_codes), (expected, expected.mT), layout):
        assert (made is not None) == is_asked
        if is_asked:
            assert made.dtype == torch.uint8 and made.is_contiguous()
            assert torch.equal(made, wanted)
    assert scale_inv.shape == (1,)
    inverse = scale.reciprocal().reshape(1)
    assert torch.equal(scale_inv.view(torch.int32), inverse.view(torch.int32))


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """`[2, 64, 32]`: zeros of both signs, subnormals, ties between codes, the range's ends, NaN, Inf."""
    values = torch.linspace(0, 500, 1024).double()
    ties = (torch.arange(1024) % 33 / 32 + 1).double() * 2.0 ** (torch.arange(1024) // 33 - 20)
    values = torch.cat([values, ties, -values, -ties])
    values[5], values[2047], values[3000] = float("nan"), float("inf"), -float("inf")
    values[77], values[78] = 1e-40, -1e-40
    return values.to(dtype).reshape(2, 64, 32)
