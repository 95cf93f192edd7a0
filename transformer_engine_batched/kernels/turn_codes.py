# SPDX-License-Identifier: Apache-2.0
"""Transposes matrices of FP8 codes: bytes in, bytes out.

For a copy whose transpose is wanted later, or by a kernel that writes only one layout well.
Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .memory import empty_strided
from .triangle_tiles import launch

_ROWS, _COLS, _NUM_WARPS = 128, 128, 8


def turn_codes(codes: torch.Tensor) -> torch.Tensor:
    """Transposes each matrix of bytes: uint8 ``[*batch, R, C]`` -> ``[*batch, C, R]``, both contiguous.

    Parameters
    ----------
    codes : torch.Tensor
        uint8, contiguous; R and C multiples of 16.

    Raises
    ------
    ValueError
        If `codes` is something else.

    Examples
    --------
    >>> turn_codes(torch.zeros(2, 16, 32, dtype=torch.uint8, device="cuda")).shape
    torch.Size([2, 32, 16])
    """
    if (
        codes.dtype != torch.uint8
        or codes.dim() < 2
        or not codes.is_contiguous()
        or any(size % 16 for size in codes.shape[-2:])
    ):
        raise ValueError(
            "`codes` must be contiguous uint8 [*, R, C] with R and C multiples of 16 and came as "
            f"{codes.dtype}, shape {tuple(codes.shape)}, stride {codes.stride()}"
        )
    rows, cols = codes.shape[-2:]
    turned = empty_strided(
        (*codes.shape[:-2], cols, rows),
        (*codes.stride()[:-2], rows, 1),
        torch.uint8,
        codes.get_device(),
    )
    if codes.numel():
        num_items = codes.numel() // (rows * cols)
        num_tiles = triton.cdiv(rows, _ROWS) * triton.cdiv(cols, _COLS)
        is_even = rows % _ROWS == 0 and cols % _COLS == 0
        constants = (rows, cols, is_even, _ROWS, _COLS)
        launch(_turn_kernel, num_items * num_tiles, _NUM_WARPS, (codes, turned), constants)
    return turned


@triton.jit
def _turn_kernel(
    codes_ptr,
    turned_ptr,
    num_rows,
    num_cols,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """One tile. Four rows are packed into words, and words are turned."""
    tiles_per_row = tl.cdiv(num_cols, BLOCK_COLS)
    tiles_per_item = tl.cdiv(num_rows, BLOCK_ROWS) * tiles_per_row
    program = tl.program_id(0)
    offset = (program // tiles_per_item).to(tl.int64) * num_rows * num_cols
    first_row = (program % tiles_per_item) // tiles_per_row * BLOCK_ROWS
    first_col = (program % tiles_per_row) * BLOCK_COLS
    quads = first_row + 4 * tl.arange(0, BLOCK_ROWS // 4)
    cols = first_col + tl.arange(0, BLOCK_COLS)
    inside = (quads < num_rows)[:, None] & (cols < num_cols)[None, :]
    words = tl.zeros((BLOCK_ROWS // 4, BLOCK_COLS), tl.int32)
    for part in tl.static_range(4):
        pointers = codes_ptr + offset + (quads + part).to(tl.int64)[:, None] * num_cols
        pointers += cols[None, :]
        if EVEN:
            codes = tl.load(pointers)
        else:
            codes = tl.load(pointers, mask=inside, other=0)
        words |= codes.to(tl.int32) << (8 * part)
    # Words lie in memory as four codes, the first in the lowest byte.
    turned = tl.trans(words)
    pointers = (turned_ptr + offset).to(tl.pointer_type(tl.int32))
    quad = (first_row // 4) + tl.arange(0, BLOCK_ROWS // 4)
    pointers += cols.to(tl.int64)[:, None] * (num_rows // 4) + quad[None, :]
    if EVEN:
        tl.store(pointers, turned)
    else:
        tl.store(pointers, turned, mask=tl.trans(inside))
