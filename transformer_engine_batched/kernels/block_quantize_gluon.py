# SPDX-License-Identifier: Apache-2.0
"""The cast of `block_quantize` with the layouts written out: what a GPU runs where a transpose is asked for.

Same arguments and bytes as `block_quantize._quantize_kernel`, which is the one to read. Must not import the
package.

What the layouts buy, for a tile of 128 x 128 elements: a thread holds 8 x 8 of them (16-byte loads), so that
both maxima are found mostly in registers and codes of the transpose are 8 contiguous bytes before they
go through shared memory; and each scale is computed by one thread instead of all that need it, since a division
costs as much as the rest of the work on ten elements.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _scale_of(
    amax, amax_epsilon, LARGEST: gl.constexpr, FP8_MAX: gl.constexpr, POWER_OF_2: gl.constexpr
):
    amax = gl.maximum(amax, 0.0)
    amax = gl.where(amax < amax_epsilon, amax_epsilon, amax)
    scale = gl.div_rn(gl.to_tensor(FP8_MAX), amax)
    scale = gl.where(scale == float("inf"), LARGEST, scale)
    if POWER_OF_2:
        scale = (scale.to(gl.int32, bitcast=True) & -8388608).to(gl.float32, bitcast=True)
    return gl.where((amax > 0.0) & (amax < float("inf")), scale, 1.0)


@gluon.jit
def _encode(values, E5M2: gl.constexpr):
    if E5M2:
        return values.to(gl.float8e5).to(gl.uint8, bitcast=True)
    return values.to(gl.float8e4nv).to(gl.uint8, bitcast=True)


@gluon.jit(do_not_specialize=["num_tiles"])
def quantize_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    turned_ptr,
    turned_scales_ptr,
    num_rows,
    num_cols,
    row_stride,
    batch_stride,
    codes_item,
    codes_row,
    scales_item,
    scales_row,
    scales_block,
    turned_item,
    turned_row,
    turned_scales_item,
    turned_scales_row,
    turned_scales_block,
    num_tiles,
    amax_epsilon,
    LARGEST: gl.constexpr,
    POWER_OF_2: gl.constexpr,
    E5M2: gl.constexpr,
    SQUARE: gl.constexpr,
    EVEN: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    IS_LIMITED: gl.constexpr,
):
    """Casts tiles of 128 x 128 elements: one for a program, or where programs are limited each so many."""
    gl.static_assert(BLOCK_ROWS == 128)
    FP8_MAX: gl.constexpr = 57344.0 if E5M2 else 448.0
    WARPS: gl.constexpr = gl.num_warps()
    # Of the values; of the transposed codes on their way out; of one number for each row or column.
    TILE: gl.constexpr = gl.BlockedLayout([64 // WARPS, 8], [2, 16], [WARPS, 1], [1, 0])
    TURNED: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    PER_ROW: gl.constexpr = gl.SliceLayout(1, TILE)
    PER_COL: gl.constexpr = gl.SliceLayout(0, TILE)

    tiles_per_row = (num_cols + 127) // 128
    tiles_per_item = (num_rows + 127) // 128 * tiles_per_row
    # Within a tile, offsets fit 32 bits: see `_make_plan`.
    rows = gl.arange(0, 128, PER_ROW)
    cols = gl.arange(0, 128, PER_COL)
    line = gl.arange(0, 128, LINE)
    # The compiler removes a loop that it sees to run once.
    count = gl.cdiv(num_tiles - gl.program_id(0), gl.num_programs(0)) if IS_LIMITED else 1
    for step in range(count):
        index = gl.program_id(0) + step * gl.num_programs(0)
        item = (index // tiles_per_item).to(gl.int64)
        tile = index % tiles_per_item
        row_block = (tile // tiles_per_row).to(gl.int64)
        col_block = (tile % tiles_per_row).to(gl.int64)
        first_row = row_block * 128
        first_col = col_block * 128

        is_inside = (first_row + rows < num_rows)[:, None] & (first_col + cols < num_cols)[None, :]
        pointers = x_ptr + item * batch_stride + first_row * row_stride + first_col
        pointers += rows[:, None] * row_stride + cols[None, :]
        if EVEN:
            x = gl.load(pointers)
        else:
            x = gl.load(pointers, mask=is_inside, other=0.0)
        values = x.to(gl.float32)

        if codes_ptr is not None:
            scales_base = scales_ptr + item * scales_item
        if turned_ptr is not None:
            turned_scales_base = turned_scales_ptr + item * turned_scales_item

        if SQUARE:
            amax = gl.max(gl.max(gl.abs(values), 1), 0)
            scale = _scale_of(amax, amax_epsilon, LARGEST, FP8_MAX, POWER_OF_2)
            scale_inv = gl.div_rn(gl.to_tensor(1.0), scale)
            codes = _encode(values * scale, E5M2)
            if codes_ptr is not None:
                gl.store(scales_base + row_block * scales_row + col_block * scales_block, scale_inv)
            if turned_ptr is not None:
                gl.store(
                    turned_scales_base
                    + col_block * turned_scales_row
                    + row_block * turned_scales_block,
                    scale_inv,
                )
        elif codes_ptr is not None:
            amax = gl.convert_layout(gl.max(gl.abs(values), 1), LINE)
            scale = _scale_of(amax, amax_epsilon, LARGEST, FP8_MAX, POWER_OF_2)
            gl.store(
                scales_base + col_block * scales_block + (first_row + line) * scales_row,
                gl.div_rn(gl.to_tensor(1.0), scale),
                mask=first_row + line < num_rows,
            )
            codes = _encode(values * gl.convert_layout(scale, PER_ROW)[:, None], E5M2)

        if codes_ptr is not None:
            pointers = codes_ptr + item * codes_item + first_row * codes_row + first_col
            pointers += rows[:, None] * codes_row + cols[None, :]
            if EVEN:
                gl.store(pointers, codes)
            else:
                gl.store(pointers, codes, mask=is_inside)

        if turned_ptr is not None:
            if SQUARE:
                # Always `scale`, which the compiler cannot know. Triton 3.6 stores a wrong transpose, the same at each
                # run, where both copies are made from one conversion to FP8 (also `float8_quantize.Cast`).
                codes = _encode(values * gl.where(num_rows > 0, scale, 0.0), E5M2)
            else:
                amax = gl.convert_layout(gl.max(gl.abs(values), 0), LINE)
                scale = _scale_of(amax, amax_epsilon, LARGEST, FP8_MAX, POWER_OF_2)
                gl.store(
                    turned_scales_base
                    + row_block * turned_scales_block
                    + (first_col + line) * turned_scales_row,
                    gl.div_rn(gl.to_tensor(1.0), scale),
                    mask=first_col + line < num_cols,
                )
                codes = _encode(values * gl.convert_layout(scale, PER_COL)[None, :], E5M2)
            turned = gl.convert_layout(gl.permute(codes, (1, 0)), TURNED)
            turned_rows = gl.arange(0, 128, gl.SliceLayout(1, TURNED))
            turned_cols = gl.arange(0, 128, gl.SliceLayout(0, TURNED))
            pointers = turned_ptr + item * turned_item + first_col * turned_row + first_row
            pointers += turned_rows[:, None] * turned_row + turned_cols[None, :]
            if EVEN:
                gl.store(pointers, turned)
            else:
                is_turned_inside = (first_col + turned_rows < num_cols)[:, None]
                is_turned_inside = is_turned_inside & (first_row + turned_cols < num_rows)[None, :]
                gl.store(pointers, turned, mask=is_turned_inside)
