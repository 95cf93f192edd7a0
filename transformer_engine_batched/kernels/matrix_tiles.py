# SPDX-License-Identifier: Apache-2.0
"""Tiles of a batch of matrices: how many programs, and where the tile of each lies.

Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import triton
import triton.language as tl


class Tile(NamedTuple):
    """Elements that one program handles, and its warps."""

    rows: int
    cols: int
    num_warps: int


# By what is written. The fastest of a sweep on an H200, `benchmarks/quantize_kernels.py`.
TILES = {
    "rowwise": Tile(16, 512, 4),
    "transposed": Tile(128, 64, 4),
    "both": Tile(64, 64, 4),
    "amax": Tile(32, 256, 8),
}


class Plan(NamedTuple):
    """All that a launch needs to know of a tensor's dimensions."""

    num_programs: int
    num_rows: int
    num_cols: int
    row_stride: int
    batch_stride: int
    rowwise_shape: Optional[tuple[int, ...]]
    transposed_shape: Optional[tuple[int, ...]]
    is_even: bool
    multiple: int
    tile: Tile


def tile_plan(
    plan: Plan, num_items: int, row_stride: int, batch_stride: int, may_fold: bool
) -> Plan:
    """Completes a plan: items folded into rows if possible, a tile no larger than the matrix."""
    rows, cols = plan.num_rows, plan.num_cols
    if may_fold and (num_items == 1 or batch_stride == rows * row_stride):
        rows, num_items, batch_stride = num_items * rows, 1, 0
    padded_rows, padded_cols = (-(-size // plan.multiple) * plan.multiple for size in (rows, cols))
    # What one dim does not need goes to the other.
    tile = plan.tile
    most_rows, most_cols = (triton.next_power_of_2(size) for size in (padded_rows, padded_cols))
    tile_cols = min(tile.cols, most_cols)
    tile_rows = min(tile.rows * tile.cols // tile_cols, most_rows)
    tile_cols = min(tile.rows * tile.cols // tile_rows, most_cols)
    return plan._replace(
        num_programs=num_items * -(-padded_rows // tile_rows) * -(-padded_cols // tile_cols),
        num_rows=rows,
        row_stride=row_stride,
        batch_stride=batch_stride,
        is_even=rows % tile_rows == 0
        and cols % tile_cols == 0
        and (rows, cols) == (padded_rows, padded_cols),
        tile=tile._replace(rows=tile_rows, cols=tile_cols),
    )


def read_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> Optional[tuple[int, int]]:
    """Row stride and the one batch stride of a tensor that is not empty; None if there is no such."""
    if shape[-1] != 1 and strides[-1] != 1:
        return None
    batch_stride, reached = 0, None
    for size, stride in zip(reversed(shape[:-2]), reversed(strides[:-2])):
        if size == 1:
            continue
        if reached is None:
            batch_stride, reached = stride, size * stride
        elif stride == reached:
            reached *= size
        else:
            return None
    return (strides[-2] if shape[-2] > 1 else shape[-1]), batch_stride


@triton.jit
def locate_tile(
    program,
    num_rows,
    num_cols,
    MULTIPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Item, first row and first column of a program, columns fastest."""
    padded_rows = tl.cdiv(num_rows, MULTIPLE) * MULTIPLE
    padded_cols = tl.cdiv(num_cols, MULTIPLE) * MULTIPLE
    tiles_per_row = tl.cdiv(padded_cols, BLOCK_COLS)
    tiles_per_item = tl.cdiv(padded_rows, BLOCK_ROWS) * tiles_per_row
    item = program // tiles_per_item
    tile = program % tiles_per_item
    first_row = (tile // tiles_per_row) * BLOCK_ROWS
    first_col = (tile % tiles_per_row) * BLOCK_COLS
    return item.to(tl.int64), first_row, first_col


@triton.jit
def load_tile(
    x_ptr,
    rows,
    cols,
    num_rows,
    num_cols,
    row_stride,
    EVEN: tl.constexpr,
):
    """One tile; zeros beyond the matrix."""
    pointers = x_ptr + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    if EVEN:
        return tl.load(pointers)
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, codes, rows, cols, num_rows, num_cols, EVEN: tl.constexpr):
    """One tile of a contiguous matrix, as far as it reaches."""
    pointers = ptr + rows.to(tl.int64)[:, None] * num_cols + cols[None, :]
    if EVEN:
        tl.store(pointers, codes)
    else:
        tl.store(pointers, codes, mask=(rows < num_rows)[:, None] & (cols < num_cols)[None, :])
