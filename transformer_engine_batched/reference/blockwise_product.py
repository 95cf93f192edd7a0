# SPDX-License-Identifier: Apache-2.0
"""Products of FP8 operands with 128-block scales in exact arithmetic, on any device.

The same calls as `kernels.blockwise_gemm`, which reads the same buffers: codes through their strides, scales
through the formula of `BlockScales`, so that a wrong stride gives a wrong number here, too. Sums are in FP64; the
result is rounded to FP32 and from there to the output type. Slow and obvious on purpose. Imports torch and the codes.
"""

from __future__ import annotations

from typing import Optional

import torch

from . import codes

_BLOCK = 128
_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def multiply_blockwise(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: object,
    b_scales: object,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    masked_m: Optional[torch.Tensor] = None,
    expected_m: Optional[int] = None,  # pylint: disable=unused-argument # no tiles to choose
    m_indices: Optional[torch.Tensor] = None,
    num_sms: Optional[int] = None,  # pylint: disable=unused-argument
    formats: tuple[str, str] = ("e4m3", "e4m3"),
) -> None:
    """``out[b] (+)= A[b] @ B[b].mT``; everything as `kernels.blockwise_gemm.multiply_blockwise`."""
    if m_indices is not None:
        left = decode(a[None], a_scales, formats[0])[0]
        right = decode(b, b_scales, formats[1])
        for group in range(b.shape[0]):
            rows = (m_indices == group).nonzero().flatten()
            result = left[rows] @ right[group].mT
            out[rows] = _rounded(result, out[rows] if accumulate else None, out.dtype)
        return
    left, right = decode(a, a_scales, formats[0]), decode(b, b_scales, formats[1])
    for item in range(out.shape[0]):
        rows = out.shape[1]
        if masked_m is not None:
            rows = min(max(int(masked_m[item]), 0), rows)
        result = left[min(item, len(left) - 1), :rows] @ right[min(item, len(right) - 1)].mT
        target = out[item, :rows]
        target.copy_(_rounded(result, target if accumulate else None, out.dtype))


def multiply_blockwise_k_grouped(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: object,
    b_scales: object,
    out: torch.Tensor,
    group_sizes: torch.Tensor,
    *,
    accumulate: bool = False,
    num_sms: Optional[int] = None,  # pylint: disable=unused-argument
    formats: tuple[str, str] = ("e4m3", "e4m3"),
) -> None:
    """``out[g] (+)= A[:, k0:k1] @ B[:, k0:k1].mT``; as `kernels.blockwise_gemm.multiply_blockwise_k_grouped`."""
    left, right = decode(a[None], a_scales, formats[0])[0], decode(b[None], b_scales, formats[1])[0]
    start = 0
    for group, size in enumerate(group_sizes.tolist()):
        columns = slice(start, start + size)
        result = left[:, columns] @ right[:, columns].mT
        out[group] = _rounded(result, out[group] if accumulate else None, out.dtype)
        start += size


def decode(x: torch.Tensor, scales: object, fmt: str) -> torch.Tensor:
    """FP64 numbers ``[items, rows, K]`` of codes and their `BlockScales`."""
    items, rows, size = x.shape
    fp8 = _FORMATS[fmt] if x.dtype == torch.uint8 else x.dtype
    values = codes.decode(x.view(torch.uint8), fp8, torch.float64)
    if x.numel() == 0:
        return values
    device = x.device
    flat_rows = torch.arange(items, device=device)[:, None] * scales.rows_per_item
    scale_rows = (flat_rows + torch.arange(rows, device=device)) // scales.granularity
    blocks = torch.arange(-(-size // _BLOCK), device=device)
    index = scale_rows[..., None] * scales.row_stride + blocks * scales.k_stride
    buffer = scales.values
    length = int(index.max()) + 1
    factors = buffer.as_strided((length,), (1,), buffer.storage_offset())[index].double()
    return values * factors.repeat_interleave(_BLOCK, -1)[..., :size]


def _rounded(
    result: torch.Tensor, before: Optional[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    if before is not None:
        result = result + before.double()
    return result.float().to(dtype)
