# SPDX-License-Identifier: Apache-2.0
"""The products of blockwise_gemm.py in Triton, to read and to check against: the same functions, slower.

One program computes one tile: a product of tensor cores per k-block, scaled and summed in FP32. Runs on the GPU
and, under `TRITON_INTERPRET=1`, on the CPU. Nothing falls back to it. Must not import the package beyond its neighbour.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

from .blockwise_gemm import BlockScales

_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_BLOCK_M, _BLOCK_N = 64, 128


def multiply_blockwise(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: BlockScales,
    b_scales: BlockScales,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    masked_m: Optional[torch.Tensor] = None,
    expected_m: Optional[int] = None,
    m_indices: Optional[torch.Tensor] = None,
    formats: tuple[str, str] = ("e4m3", "e4m3"),
) -> None:
    """See `blockwise_gemm.multiply_blockwise`. Tiles are of one shape: `expected_m` is not looked at."""
    del expected_m
    mode, info = "batched", None
    if m_indices is not None:
        mode, info, a, out = "contiguous", m_indices, a[None], out[None]
    elif masked_m is not None:
        mode, info = "masked", masked_m
    _launch(mode, a, b, a_scales, b_scales, out, accumulate, info, formats)


def multiply_blockwise_k_grouped(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: BlockScales,
    b_scales: BlockScales,
    out: torch.Tensor,
    group_sizes: torch.Tensor,
    *,
    accumulate: bool = False,
    formats: tuple[str, str] = ("e4m3", "e4m3"),
) -> None:
    """See `blockwise_gemm.multiply_blockwise_k_grouped`."""
    _launch(
        "k_grouped", a[None], b[None], a_scales, b_scales, out, accumulate, group_sizes, formats
    )


def _launch(
    mode: str,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: BlockScales,
    b_scales: BlockScales,
    out: torch.Tensor,
    accumulate: bool,
    info: Optional[torch.Tensor],
    formats: tuple[str, str],
) -> None:
    if out.numel() == 0:
        return
    num_items, num_rows, num_cols = out.shape
    a, b = (
        x.view(_FORMATS[name]) if x.dtype == torch.uint8 else x for x, name in zip((a, b), formats)
    )
    grid = (triton.cdiv(num_rows, _BLOCK_M), triton.cdiv(num_cols, _BLOCK_N), num_items)
    _multiply_kernel[grid](
        a,
        b,
        a_scales.values,
        b_scales.values,
        out,
        info,
        num_rows,
        num_cols,
        a.shape[-1],
        a.stride(0) if a.shape[0] > 1 else 0,
        a.stride(1),
        b.stride(0) if b.shape[0] > 1 else 0,
        b.stride(1),
        out.stride(0),
        out.stride(1),
        *a_scales[2:],
        *b_scales[2:],
        A_ROWS_PER_SCALE=a_scales.granularity,
        B_ROWS_PER_SCALE=b_scales.granularity,
        MODE=mode,
        ACCUMULATE=accumulate,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
    )


@triton.jit
def _multiply_kernel(
    a_ptr,
    b_ptr,
    a_scale_ptr,
    b_scale_ptr,
    out_ptr,
    info_ptr,
    num_rows,
    num_cols,
    size_k,
    a_item_stride,
    a_row_stride,
    b_item_stride,
    b_row_stride,
    out_item_stride,
    out_row_stride,
    a_scale_row_stride,
    a_scale_k_stride,
    a_scale_item_rows,
    b_scale_row_stride,
    b_scale_k_stride,
    b_scale_item_rows,
    A_ROWS_PER_SCALE: tl.constexpr,
    B_ROWS_PER_SCALE: tl.constexpr,
    MODE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BLOCK_K: tl.constexpr = 128
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    item = tl.program_id(2).to(tl.int64)
    a_item, b_item = item, item
    first_k = 0
    end_k = size_k
    is_row = rows < num_rows
    if MODE == "masked":
        is_row = rows < tl.minimum(tl.load(info_ptr + item), num_rows)
    if MODE == "contiguous":
        # A tile lies within one group: groups start at multiples of 128 rows.
        b_item = tl.load(info_ptr + tl.program_id(0) * BLOCK_M).to(tl.int64)
        is_row = is_row & (tl.load(info_ptr + rows, mask=is_row, other=-1) >= 0)
        b_item = tl.maximum(b_item, 0)
    if MODE == "k_grouped":
        a_item, b_item = item * 0, item * 0
        for group in range(0, item):
            first_k += tl.load(info_ptr + group)
        end_k = first_k + tl.load(info_ptr + item)
    if tl.max(is_row.to(tl.int32)) == 0:
        return
    is_col = cols < num_cols
    a_row_ptrs = a_ptr + a_item * a_item_stride + rows.to(tl.int64) * a_row_stride
    b_row_ptrs = b_ptr + b_item * b_item_stride + cols.to(tl.int64) * b_row_stride
    first_block = item * 0 + first_k // BLOCK_K
    a_scale_rows = (a_item * a_scale_item_rows + rows) // A_ROWS_PER_SCALE
    b_scale_rows = (b_item * b_scale_item_rows + cols) // B_ROWS_PER_SCALE
    a_scale_ptrs = a_scale_ptr + a_scale_rows * a_scale_row_stride + first_block * a_scale_k_stride
    b_scale_ptrs = b_scale_ptr + b_scale_rows * b_scale_row_stride + first_block * b_scale_k_stride
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first_k, end_k, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        is_k = ks < end_k
        a = tl.load(
            a_row_ptrs[:, None] + ks[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0
        )
        b = tl.load(
            b_row_ptrs[None, :] + ks[:, None], mask=is_col[None, :] & is_k[:, None], other=0.0
        )
        a_scales = tl.load(a_scale_ptrs, mask=is_row, other=0.0)
        b_scales = tl.load(b_scale_ptrs, mask=is_col, other=0.0)
        sums += tl.dot(a, b) * (a_scales[:, None] * b_scales[None, :])
        a_scale_ptrs += a_scale_k_stride
        b_scale_ptrs += b_scale_k_stride
    out_ptrs = out_ptr + item * out_item_stride + rows.to(tl.int64)[:, None] * out_row_stride + cols
    is_inside = is_row[:, None] & is_col[None, :]
    if ACCUMULATE:
        sums += tl.load(out_ptrs, mask=is_inside, other=0.0)
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=is_inside)
