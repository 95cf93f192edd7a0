# SPDX-License-Identifier: Apache-2.0
"""Buffers of codes and scales with 128-blocks: shapes and strides, for who allocates and who counts bytes.

Pure integers. Must not import the package, torch or Triton.
"""

from __future__ import annotations

import math
from typing import NamedTuple

BLOCK = 128
# Bytes between rows of codes: what a bulk copy of the GEMM's operands asks for.
_PITCH_MULTIPLE = 16
# Floats between rows of aligned scales: cuBLAS manual, "1D block scaling", and TE's buffers.
_SCALE_MULTIPLE = 4


class Layout(NamedTuple):
    """Where one copy goes: shapes of the buffers, the views of them, strides of item, row and block."""

    codes_shape: tuple[int, ...]
    num_cols: int
    scale_shape: tuple[int, ...]
    view_shape: tuple[int, ...]
    view_strides: tuple[int, ...]
    strides: tuple[int, int, int, int, int]  # codes: item, row; scales: item, row, block


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def lay_out(batch: list[int], rows: int, cols: int, square: bool, aligned_scales: bool) -> Layout:
    """Buffers of one copy ``[*batch, rows, cols]``."""
    num_items = math.prod(batch)
    pitch = round_up(cols, _PITCH_MULTIPLE)
    num_blocks = -(-cols // BLOCK)
    scale_rows = -(-rows // BLOCK) if square else rows
    view_shape = (*batch, scale_rows, num_blocks)
    if aligned_scales and not square:
        ld = round_up(num_items * rows, _SCALE_MULTIPLE)
        scale_shape, item_stride, row_stride, block_stride = (num_blocks, ld), rows, 1, ld
    else:
        ld = round_up(num_blocks, _SCALE_MULTIPLE) if aligned_scales else num_blocks
        scale_shape = (*batch, scale_rows, ld)
        item_stride, row_stride, block_stride = scale_rows * ld, ld, 1
    batch_strides, step = [], item_stride
    for size in reversed(batch):
        batch_strides.append(step)
        step *= size
    return Layout(
        codes_shape=(*batch, rows, pitch),
        num_cols=cols,
        scale_shape=scale_shape,
        view_shape=view_shape,
        view_strides=(*reversed(batch_strides), row_stride, block_stride),
        strides=(rows * pitch, pitch, item_stride, row_stride, block_stride),
    )
