# SPDX-License-Identifier: Apache-2.0
"""The largest magnitude of a tensor, or of two: one launch, partial results without zeroed memory.

Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .launcher import BoundLaunch, Pointer, can_wait
from .matrix_tiles import TILES, Plan, Tile, load_tile, locate_tile, read_strides, tile_plan

# Programs that look for an amax, at most: each leaves the amax of its tiles, and every program of the cast
# reads them all. Memory for them needs no zeroing, which would be a launch of its own.
MAX_PARTIALS = 528


class Search(NamedTuple):
    """How the amaxes of a tensor are found.

    `is_awaited`: the kernel behind it may start before it ends, and must wait for it; see `BoundLaunch`.
    """

    num_programs: int
    num_warps: int
    constants: tuple
    is_awaited: bool


NO_SEARCH = Search(0, 0, (0, 0, 0, 0, 0, 0, True, True, 1, 1), False)


def plan_search(shape: tuple[int, ...], strides: tuple[int, ...], device_index: int) -> Search:
    """The search for tensors that a cast has accepted."""
    plan = make_amax_plan(shape, strides)
    tile = plan.tile
    num_programs = min(plan.num_programs, MAX_PARTIALS)
    # One item, one column of whole tiles, no gaps between rows.
    is_flat = plan.is_even and tile.cols == plan.num_cols == plan.row_stride
    constants = (
        num_programs, plan.num_programs, plan.num_rows, plan.num_cols, plan.row_stride,
        plan.batch_stride, is_flat, plan.is_even, tile.rows, tile.cols,
    )  # fmt: skip
    return Search(num_programs, tile.num_warps, constants, can_wait(device_index))


def bind_search(x: Search, y: Search = NO_SEARCH) -> BoundLaunch:
    """The launch that finds the amaxes of one tensor, or of two."""
    return BoundLaunch(
        _amax_kernel,
        x.num_programs + y.num_programs,
        max(x.num_warps, y.num_warps),
        (*x.constants, *y.constants, x.is_awaited or y.is_awaited),
    )


class AmaxPair:
    """Finds the amaxes of two tensors with one launch."""

    def __init__(self, x: Search, y: Search) -> None:
        self._launch = bind_search(x, y)

    def __call__(
        self, x: torch.Tensor, x_amaxes: Pointer, y: torch.Tensor, y_amaxes: Pointer
    ) -> None:
        """As `Cast.find_amaxes_to` for each of them."""
        self._launch(x, x_amaxes, y, y_amaxes)


@lru_cache(maxsize=4096)
def make_amax_plan(
    shape: tuple[int, ...], strides: tuple[int, ...], tile: Optional[Tile] = None
) -> Plan:
    """The launch that finds the amax of a tensor that a cast has accepted."""
    row_stride, batch_stride = read_strides(shape, strides)
    num_items, rows, cols = math.prod(shape[:-2]), shape[-2], shape[-1]
    tile = TILES["amax"] if tile is None else tile
    is_contiguous = row_stride == cols and (num_items == 1 or batch_stride == rows * cols)
    num_elements = num_items * rows * cols
    if is_contiguous and num_elements % (tile.rows * tile.cols) == 0:
        num_items, rows, cols, row_stride = 1, num_elements // tile.cols, tile.cols, tile.cols
    plan = Plan(
        num_programs=0,
        num_rows=rows,
        num_cols=cols,
        row_stride=0,
        batch_stride=0,
        rowwise_shape=None,
        transposed_shape=None,
        is_even=True,
        multiple=1,
        tile=tile,
    )
    return tile_plan(plan, num_items, row_stride, batch_stride, may_fold=True)


@triton.jit
def _search_amax(
    x_ptr,
    amaxes_ptr,
    program,
    num_programs,
    num_tiles,
    num_rows,
    num_cols,
    row_stride,
    batch_stride,
    FLAT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    IS_AWAITED: tl.constexpr,
):
    """Leaves the amax of every tile whose number is the program's, modulo the number of programs."""
    # From zero, because the maximum of nothing but NaN is NaN.
    amaxes = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    tile = program
    while tile < num_tiles:
        if FLAT:
            # No divisions: they would hold back the loads of a loop as short as this.
            rows = tl.arange(0, BLOCK_ROWS)[:, None]
            pointers = x_ptr + tile.to(tl.int64) * (BLOCK_ROWS * BLOCK_COLS)
            x = tl.load(pointers + rows * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :])
        else:
            item, first_row, first_col = locate_tile(
                tile, num_rows, num_cols, 1, BLOCK_ROWS, BLOCK_COLS
            )
            rows = first_row + tl.arange(0, BLOCK_ROWS)
            cols = first_col + tl.arange(0, BLOCK_COLS)
            x = load_tile(
                x_ptr + item * batch_stride, rows, cols, num_rows, num_cols, row_stride, EVEN
            )
        amaxes = tl.maximum(amaxes, tl.abs(x.to(tl.float32)))
        tile += num_programs
    if IS_AWAITED:
        gdc_launch_dependents()
    tl.store(amaxes_ptr + program, tl.max(amaxes))


@triton.jit
def _amax_kernel(
    x_ptr,
    x_amaxes_ptr,
    y_ptr,
    y_amaxes_ptr,
    x_programs,
    x_tiles,
    x_rows,
    x_cols,
    x_row_stride,
    x_batch_stride,
    X_FLAT: tl.constexpr,
    X_EVEN: tl.constexpr,
    X_BLOCK_ROWS: tl.constexpr,
    X_BLOCK_COLS: tl.constexpr,
    y_programs,
    y_tiles,
    y_rows,
    y_cols,
    y_row_stride,
    y_batch_stride,
    Y_FLAT: tl.constexpr,
    Y_EVEN: tl.constexpr,
    Y_BLOCK_ROWS: tl.constexpr,
    Y_BLOCK_COLS: tl.constexpr,
    IS_AWAITED: tl.constexpr,
):
    """Amaxes of parts of one tensor, or of two: the first programs are for `x`, the others for `y`."""
    program = tl.program_id(0)
    if y_ptr is None or program < x_programs:
        _search_amax(
            x_ptr, x_amaxes_ptr, program, x_programs, x_tiles, x_rows, x_cols, x_row_stride,
            x_batch_stride, X_FLAT, X_EVEN, X_BLOCK_ROWS, X_BLOCK_COLS, IS_AWAITED,
        )  # fmt: skip
    else:
        _search_amax(
            y_ptr, y_amaxes_ptr, program - x_programs, y_programs, y_tiles, y_rows, y_cols, y_row_stride,
            y_batch_stride, Y_FLAT, Y_EVEN, Y_BLOCK_ROWS, Y_BLOCK_COLS, IS_AWAITED,
        )  # fmt: skip
