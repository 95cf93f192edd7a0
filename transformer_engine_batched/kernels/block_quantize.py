# SPDX-License-Identifier: Apache-2.0
"""FP8 codes with one scale per 128 elements or per 128 x 128: one read of a matrix batch writes the codes,
those of the transpose, or both.

Inputs are CUDA tensors (CPU tensors where Triton interprets), outputs are plain tensors. Must not import
Transformer Engine or a sibling package of `kernels`.

The bytes are those of TE 2.20.2's kernels, whose rules are written down in `reference/blockwise.py`: FP32
arithmetic, one rounding per operation, saturating round to nearest even, NaN becomes 0x7F and is passed
over by the amax. Blocks belong to one matrix of the batch; TE's, which belong to the flattened matrix, are
those of ``x.view(-1, x.shape[-1])``.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Callable, NamedTuple, Optional

import torch
import triton
import triton.language as tl

from .block_layout import BLOCK, Layout, lay_out
from .float8_codes import FORMATS, INPUT_DTYPES, IS_INTERPRETED, encode
from .launcher import Launcher
from .matrix_tiles import load_tile, read_strides


class Tile(NamedTuple):
    """Rows of 128 elements that one program handles, its warps, and which kernel it runs.

    Parameters
    ----------
    rows, num_warps : int
    max_registers : int
        Of a thread, so that more programs fit a multiprocessor; 0 for no limit.
    is_explicit : bool
        The kernel of `block_quantize_gluon`, for 128 rows on a GPU.
    """

    rows: int
    num_warps: int
    max_registers: int = 0
    is_explicit: bool = False


# By (square, what is written). The fastest of a sweep on an H200, `benchmarks/block_quantize_kernels.py`.
TILES = {
    (False, "rowwise"): Tile(64, 8),
    (False, "transposed"): Tile(128, 4, 168, True),
    (False, "both"): Tile(128, 4, 168, True),
    (True, "rowwise"): Tile(128, 8, 80, True),
    (True, "transposed"): Tile(128, 8, 80, True),
    (True, "both"): Tile(128, 8, 80, True),
}


class BlockCodes(NamedTuple):
    """Codes of a batch of matrices and the factors that make them numbers.

    Parameters
    ----------
    codes : torch.Tensor
        uint8 ``[*batch, R, C]``; rows are contiguous and lie a multiple of 16 bytes apart.
    scale_inv : torch.Tensor
        float32 ``[*batch, R, ceil(C / 128)]``, of 128 x 128 blocks ``[*batch, ceil(R / 128), ceil(C / 128)]``.
    """

    codes: torch.Tensor
    scale_inv: torch.Tensor


class Plan(NamedTuple):
    """All that a launch needs to know of a tensor's dimensions."""

    num_tiles: int
    num_rows: int
    num_cols: int
    row_stride: int
    batch_stride: int
    rowwise: Optional[Layout]
    transposed: Optional[Layout]
    square: bool
    is_even: bool
    tile: Tile


def can_quantize(x: torch.Tensor) -> bool:
    """Whether the kernel reads `x` as it lies in memory; if not, a contiguous copy of it will do.

    Asked for are FP32, BF16 or FP16, at least two dims, a contiguous last dim, and batch dims that
    merge into one stride. False also for a tensor that is not on a CUDA device.
    """
    return (
        (x.is_cuda or IS_INTERPRETED)
        and x.dtype in INPUT_DTYPES
        and x.ndim >= 2
        and (x.numel() == 0 or read_strides(x.shape, x.stride()) is not None)
    )


def quantize_blocks(
    x: torch.Tensor,
    fp8_dtype: str,
    *,
    square: bool,
    rowwise: bool = True,
    transposed: bool = False,
    amax_epsilon: float = 0.0,
    power_of_two: bool = False,
    aligned_scales: bool = False,
    max_programs: int = 0,
) -> tuple[Optional[BlockCodes], Optional[BlockCodes]]:
    """``codes = fp8(x * scale)``, ``scale = fp8_max / max(amax, amax_epsilon)``, ``scale_inv = 1 / scale`` per block.

    One kernel, which reads `x` once. The host does not wait for it.

    Parameters
    ----------
    x : torch.Tensor
        FP32, BF16 or FP16 ``[*batch, R, C]``; see `can_quantize`. Any sizes: a block at the edge counts as
        if filled up with zeros.
    fp8_dtype : {"e4m3", "e5m2"}
        Format of the codes.
    square : bool
        Blocks of 128 x 128 elements instead of 1 x 128.
    rowwise : bool
        Whether to write the codes in the layout of `x`.
    transposed : bool
        Whether to write those of each item's transpose, ``[*batch, C, R]``. Its 1 x 128 blocks, and so
        its codes, are its own; 128 x 128 blocks are the same ones.
    amax_epsilon : float, default = 0.0
        Lower bound of the amax, rounded to FP32. A block without it whose amax is 0 or infinite has
        scale 1.
    power_of_two : bool, default = False
        Whether scales are rounded down to powers of two.
    aligned_scales : bool, default = False
        Scales as TE and cuBLAS want them: of 1 x 128 blocks with the row as the contiguous dim over the
        whole batch ("M-major"), of 128 x 128 with the block as the contiguous one; steps of the other dim
        are multiples of 16 bytes. Otherwise contiguous.
    max_programs : int, default = 0
        Programs at most, and so streaming multiprocessors; 0 for no limit.

    Returns
    -------
    tuple of BlockCodes or None
        Of `x` and of its transpose.

    Raises
    ------
    TypeError
        If a dtype is not one of those above.
    ValueError
        If the strides of `x` or `fp8_dtype` do not fit, or nothing is to be written.

    Notes
    -----
    Source of the rules: TE 2.20.2, ``quantize_transpose_vector_blockwise.cu`` and
    ``quantize_transpose_square_blockwise.cu``; bit for bit `reference.blockwise.cast_blocks`.

    Examples
    --------
    >>> x = torch.full((2, 256, 200), 3.5, device="cuda")
    >>> (codes, scale_inv), _ = quantize_blocks(x, "e4m3", square=False)
    >>> codes.shape, scale_inv.shape, scale_inv[0, 0, 0].item()
    (torch.Size([2, 256, 200]), torch.Size([2, 256, 2]), 0.0078125)
    """
    if fp8_dtype not in FORMATS:
        raise ValueError(f'fp8_dtype must be "e4m3" or "e5m2" and came as {fp8_dtype!r}')
    description = (x.shape, x.stride(), x.dtype, x.is_cuda)
    rule = (fp8_dtype, amax_epsilon, power_of_two)
    plan = _make_plan(*description, square, rowwise, transposed, aligned_scales)
    return _launch(x, plan, *rule, max_programs)


@lru_cache(maxsize=4096)
def _make_plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    is_cuda: bool,
    square: bool,
    rowwise: bool,
    transposed: bool,
    aligned_scales: bool,
    tile: Optional[Tile] = None,
) -> Plan:
    """Checks a tensor's description and prepares its launch; `tile` overrules the table."""
    came = f"{dtype}, shape {tuple(shape)}, stride {tuple(strides)}"
    if dtype not in INPUT_DTYPES:
        raise TypeError(
            f"the FP8 kernel reads float32, bfloat16 or float16 and x came as {came}; convert it first"
        )
    if not (is_cuda or IS_INTERPRETED):
        raise ValueError(f"the FP8 kernel reads CUDA tensors and x came as {came} on the CPU")
    if len(shape) < 2:
        raise ValueError(f"the FP8 kernel needs a matrix, [*batch, R, C], and x came as {came}")
    if not (rowwise or transposed):
        raise ValueError("neither rowwise nor transposed codes were asked for; ask for one of them")
    *batch, rows, cols = shape
    num_items = math.prod(batch)
    what = "both" if rowwise and transposed else "rowwise" if rowwise else "transposed"
    tile = TILES[square, what] if tile is None else tile
    plan = Plan(
        num_tiles=0,
        num_rows=rows,
        num_cols=cols,
        row_stride=0,
        batch_stride=0,
        rowwise=lay_out(batch, rows, cols, square, aligned_scales) if rowwise else None,
        transposed=lay_out(batch, cols, rows, square, aligned_scales) if transposed else None,
        square=square,
        is_even=True,
        tile=tile,
    )
    if math.prod(shape) == 0:
        return plan
    read = read_strides(shape, strides)
    if read is None:
        raise ValueError(
            "the FP8 kernel reads a contiguous last dim and batch dims that merge into one stride, "
            f"and x came as {came}; pass x.contiguous()"
        )
    row_stride, batch_stride = read
    if max(row_stride, rows, cols) * BLOCK >= 2**31:
        raise ValueError(f"the FP8 kernel counts 128 rows in 32 bits, and x came as {came}")
    if not (square or transposed) and batch_stride == rows * row_stride:
        # Rows do not know of each other: those of all items are one matrix, in every layout of scales.
        rows, num_items, batch_stride = num_items * rows, 1, 0
    return plan._replace(
        num_tiles=num_items * -(-rows // tile.rows) * -(-cols // BLOCK),
        num_rows=rows,
        row_stride=row_stride,
        batch_stride=batch_stride,
        is_even=rows % tile.rows == 0 and cols % BLOCK == 0,
    )


def _allocate(x: torch.Tensor, layout: Optional[Layout]) -> tuple:
    """Buffers of a copy as the kernel writes them, and the views that are returned."""
    if layout is None:
        return None, None, None
    codes = torch.empty(layout.codes_shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(layout.scale_shape, dtype=torch.float32, device=x.device)
    view = codes if layout.codes_shape[-1] == layout.num_cols else codes[..., : layout.num_cols]
    return (
        codes,
        scales,
        BlockCodes(view, scales.as_strided(layout.view_shape, layout.view_strides)),
    )


def _launch(
    x: torch.Tensor,
    plan: Plan,
    fp8_dtype: str,
    amax_epsilon: float,
    power_of_two: bool,
    max_programs: int = 0,
) -> tuple[Optional[BlockCodes], Optional[BlockCodes]]:
    """Allocates the outputs and launches the kernel."""
    codes, scales, first = _allocate(x, plan.rowwise)
    turned, turned_scales, second = _allocate(x, plan.transposed)
    if plan.num_tiles:
        num_programs = min(plan.num_tiles, max_programs or plan.num_tiles)
        is_limited = num_programs < plan.num_tiles
        none = (0, 0, 0, 0, 0)
        is_e5m2 = fp8_dtype == "e5m2"
        arguments = (
            x, codes, scales, turned, turned_scales,
            plan.num_rows, plan.num_cols, plan.row_stride, plan.batch_stride,
            *(plan.rowwise.strides if plan.rowwise else none),
            *(plan.transposed.strides if plan.transposed else none),
            plan.num_tiles, amax_epsilon, torch.finfo(x.dtype).max,
            power_of_two, is_e5m2, plan.square, plan.is_even, plan.tile.rows, is_limited,
        )  # fmt: skip
        key = (plan, x.dtype, x.data_ptr() % 16, x.get_device(), power_of_two, is_e5m2, is_limited)
        _launch_kernel(plan.tile)(num_programs, arguments, key, plan.tile.num_warps)
    return first, second


@triton.jit
def _scale_of(
    amax, amax_epsilon, LARGEST: tl.constexpr, FP8_MAX: tl.constexpr, POWER_OF_2: tl.constexpr
):
    """`reference.quantizers.scale_from_amax`, operation by operation."""
    # From zero, because the maximum of nothing but NaN is NaN.
    amax = tl.maximum(amax, 0.0)
    amax = tl.where(amax < amax_epsilon, amax_epsilon, amax)
    scale = tl.div_rn(tl.full(amax.shape, FP8_MAX, tl.float32), amax)
    scale = tl.where(scale == float("inf"), LARGEST, scale)
    if POWER_OF_2:
        scale = (scale.to(tl.int32, bitcast=True) & -8388608).to(tl.float32, bitcast=True)
    is_usable = (amax > 0.0) & (amax < float("inf"))
    return tl.where(is_usable, scale, 1.0)


@triton.jit
def _store_codes(ptr, codes, rows, cols, num_rows, num_cols, pitch, EVEN: tl.constexpr):
    """One tile of a copy, as far as it reaches."""
    pointers = ptr + rows.to(tl.int64)[:, None] * pitch + cols[None, :]
    if EVEN:
        tl.store(pointers, codes)
    else:
        tl.store(pointers, codes, mask=(rows < num_rows)[:, None] & (cols < num_cols)[None, :])


@triton.jit
def _store_scales(ptr, scale, rows, num_rows, stride, EVEN: tl.constexpr):
    """Inverse scales of the rows of a tile."""
    scale_inv = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    pointers = ptr + rows.to(tl.int64) * stride
    if EVEN:
        tl.store(pointers, scale_inv)
    else:
        tl.store(pointers, scale_inv, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_tiles"])
def _quantize_kernel(
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
    LARGEST: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    E5M2: tl.constexpr,
    SQUARE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    IS_LIMITED: tl.constexpr,
):
    """Casts tiles of BLOCK_ROWS x 128 elements; 128 x 128 where a block or the transpose asks for it.

    A program has one of them, or where they are limited each so many.
    """
    FP8_MAX: tl.constexpr = 57344.0 if E5M2 else 448.0
    # The compiler removes a loop that it sees to run once.
    count = tl.cdiv(num_tiles - tl.program_id(0), tl.num_programs(0)) if IS_LIMITED else 1
    for step in range(count):
        index = tl.program_id(0) + step * tl.num_programs(0)
        tiles_per_row = tl.cdiv(num_cols, 128)
        tiles_per_item = tl.cdiv(num_rows, BLOCK_ROWS) * tiles_per_row
        item = (index // tiles_per_item).to(tl.int64)
        tile = index % tiles_per_item
        row_tile = tile // tiles_per_row
        block = tile % tiles_per_row
        rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        cols = block * 128 + tl.arange(0, 128)
        x = load_tile(x_ptr + item * batch_stride, rows, cols, num_rows, num_cols, row_stride, EVEN)
        values = x.to(tl.float32)
        if codes_ptr is not None:
            codes_base = codes_ptr + item * codes_item
            scales_base = scales_ptr + item * scales_item + block.to(tl.int64) * scales_block
        if turned_ptr is not None:
            turned_base = turned_ptr + item * turned_item
            turned_scales_base = (
                turned_scales_ptr
                + item * turned_scales_item
                + row_tile.to(tl.int64) * turned_scales_block
            )

        if SQUARE:
            tl.static_assert(BLOCK_ROWS == 128)
            scale = _scale_of(tl.max(tl.abs(values)), amax_epsilon, LARGEST, FP8_MAX, POWER_OF_2)
            scale_inv = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
            if codes_ptr is not None:
                codes = encode(values, scale, E5M2)
                _store_codes(codes_base, codes, rows, cols, num_rows, num_cols, codes_row, EVEN)
                tl.store(scales_base + row_tile.to(tl.int64) * scales_row, scale_inv)
            if turned_ptr is not None:
                turned = tl.trans(encode(values, scale, E5M2))
                _store_codes(turned_base, turned, cols, rows, num_cols, num_rows, turned_row, EVEN)
                tl.store(turned_scales_base + block.to(tl.int64) * turned_scales_row, scale_inv)
        else:
            if codes_ptr is not None:
                amax = tl.max(tl.abs(values), axis=1)
                scale = _scale_of(amax, amax_epsilon, LARGEST, FP8_MAX, POWER_OF_2)
                codes = encode(values, scale[:, None], E5M2)
                _store_codes(codes_base, codes, rows, cols, num_rows, num_cols, codes_row, EVEN)
                _store_scales(scales_base, scale, rows, num_rows, scales_row, EVEN)
            if turned_ptr is not None:
                tl.static_assert(BLOCK_ROWS == 128)
                amax = tl.max(tl.abs(values), axis=0)
                scale = _scale_of(amax, amax_epsilon, LARGEST, FP8_MAX, POWER_OF_2)
                turned = tl.trans(encode(values, scale[None, :], E5M2))
                _store_codes(turned_base, turned, cols, rows, num_cols, num_rows, turned_row, EVEN)
                _store_scales(turned_scales_base, scale, cols, num_cols, turned_scales_row, EVEN)


class _Limited:
    """A kernel that is compiled for a number of registers."""

    def __init__(self, kernel: triton.JITFunction, max_registers: int) -> None:
        self._kernel = kernel
        self._options = {"maxnreg": max_registers} if max_registers else {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return partial(self._kernel[grid], **self._options)


@lru_cache(maxsize=None)
def _launch_kernel(tile: Tile) -> Launcher:
    """The launcher of the kernel that a tile names."""
    if IS_INTERPRETED or not tile.is_explicit:
        return Launcher(_Limited(_quantize_kernel, tile.max_registers))
    from .block_quantize_gluon import quantize_kernel  # Gluon has no interpreter

    return Launcher(_Limited(quantize_kernel, tile.max_registers))
