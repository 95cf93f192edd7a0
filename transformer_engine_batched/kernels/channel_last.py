# SPDX-License-Identifier: Apache-2.0
"""Per-tensor FP8 quantization of matrices whose items lie side by side in memory.

A channel-last tensor ``[B, N, N, D]``, viewed as the matrices ``[B, D, N, N]`` that a product multiplies, is
contiguous along a batch dim. The cast writes their codes ``[B, D, R_p, C_p]``, those of their transposes, or
both: it is free where the layout has to change anyway.

Inputs are CUDA tensors (CPU tensors where Triton interprets), outputs are plain tensors of codes. API, bytes
and rules are those of `float8_quantize`, which reads tensors whose rows are contiguous.
Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl

from . import float8_quantize
from .float8_codes import (
    FORMATS,
    INPUT_DTYPES,
    IS_INTERPRETED,
    compute_scale,
    encode,
    load_amax,
    raise_amax,
)
from .launcher import BoundLaunch
from .matrix_tiles import read_strides
from .tensor_amax import bind_search, plan_search


class Batch(NamedTuple):
    """Batch dims merged into one. Strides of the input count elements, those of the output items."""

    size: int
    stride: int
    out_stride: int


class Tile(NamedTuple):
    """What one program handles, ``[run, channels]``, and how programs follow one another.

    A program reads `row_run` rows of one column or `col_run` columns of one row. The programs of a group of
    ``group_rows x group_cols`` matrix elements follow one another: lines of 128 bytes that several of them write
    are then complete before they leave the L2 cache, and where both layouts are written, the second reading
    is of the cache.
    """

    row_run: int
    col_run: int
    channels: int
    group_rows: int
    group_cols: int
    num_warps: int


class Plan(NamedTuple):
    """All that a launch needs to know of a tensor's dimensions; rows are further apart than columns."""

    num_programs: int
    num_rows: int
    num_cols: int
    row_stride: int
    col_stride: int
    channels: Batch
    outer: Batch
    inner: Batch
    is_flipped: bool
    rowwise_shape: Optional[tuple[int, ...]]
    transposed_shape: Optional[tuple[int, ...]]
    is_even: bool
    multiple: int
    tile: Tile


def can_quantize(x: torch.Tensor) -> bool:
    """Whether the kernels are for `x`: FP32, BF16 or FP16 ``[*batch, R, C]`` with a contiguous batch dim.

    The other batch dims must merge into at most two, and the tensor must fill its memory so far that
    a search of its amax can read it in rows. Neither matrix dim may be contiguous: such tensors are for
    `float8_quantize`.

    Parameters
    ----------
    x : torch.Tensor
        Any plain tensor.

    Returns
    -------
    bool
        False also for a tensor that is empty or not on a CUDA device.

    Examples
    --------
    >>> x = torch.empty(2, 64, 32, 128, device="cuda")
    >>> can_quantize(x.permute(0, 3, 1, 2)), can_quantize(x)
    (True, False)
    """
    return (
        (x.is_cuda or IS_INTERPRETED)
        and x.dtype in INPUT_DTYPES
        and _describe(x.shape, x.stride()) is not None
    )


def find_cast(
    x: torch.Tensor,
    fp8_dtype: str,
    *,
    rowwise: bool,
    transposed: bool,
    multiple: int = 16,
    amax_epsilon: float = 0.0,
    force_pow_2_scales: bool = False,
) -> "Cast":
    """The `Cast` of all tensors like `x`, which `can_quantize` takes.

    Parameters, values and errors are those of `float8_quantize.quantize_float8_current`.

    Examples
    --------
    >>> x = torch.full((2, 16, 32, 8), 3.5, device="cuda").permute(0, 3, 1, 2)
    >>> cast = find_cast(x, "e4m3", rowwise=True, transposed=False)
    >>> codes, _, scale_inv = cast.with_own_scale(x)
    >>> codes.shape, scale_inv.item()  # 3.5 / 448
    (torch.Size([2, 8, 16, 32]), 0.0078125)
    """
    return _make_cast(
        x.shape,
        x.stride(),
        x.dtype,
        x.get_device(),
        x.data_ptr() % 16,
        fp8_dtype,
        (rowwise, transposed, multiple),
        (amax_epsilon, force_pow_2_scales),
    )


class Cast(float8_quantize.Cast):
    """`float8_quantize.Cast` for channel-last tensors, made by `find_cast`: the same with other launches."""

    # pylint: disable=super-init-not-called
    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: torch.dtype,
        device_index: int,
        fp8_dtype: str,
        layouts: tuple[bool, bool, int],
        scale_rule: tuple[float, bool],
    ) -> None:
        if fp8_dtype not in FORMATS:
            raise ValueError(f'fp8_dtype must be "e4m3" or "e5m2" and came as {fp8_dtype!r}')
        plan = _make_plan(shape, strides, dtype, device_index >= 0, *layouts)
        self._device_index = device_index
        self._is_empty = False
        self._codes = float8_quantize.describe_codes(plan.rowwise_shape)
        self._transposed = float8_quantize.describe_codes(plan.transposed_shape)
        self.search = plan_search(*_by_stride(shape, strides), device_index)
        self._find = bind_search(self.search)
        self._num_partials = self.search.num_programs
        self._casts = [
            ((plan, _bind_cast(plan, scale_rule, fp8_dtype == "e5m2", num_partials, waits)),)
            for num_partials, waits in ((1, False), (self._num_partials, self.search.is_awaited))
        ]


@lru_cache(maxsize=4096)
def _make_cast(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device_index: int,
    misalignment: int,  # Triton compiles for it.  pylint: disable=unused-argument
    fp8_dtype: str,
    layouts: tuple[bool, bool, int],
    scale_rule: tuple[float, bool],
) -> Cast:
    return Cast(shape, strides, dtype, device_index, fp8_dtype, layouts, scale_rule)


def _bind_cast(
    plan: Plan, scale_rule: tuple[float, bool], is_e5m2: bool, num_partials: int, waits: bool
) -> BoundLaunch:
    """A launch that takes what `float8_quantize`'s does."""
    tile = plan.tile
    constants = (
        plan.num_rows, plan.num_cols, plan.channels.size, plan.inner.size, plan.row_stride, plan.col_stride,
        plan.outer.stride, plan.inner.stride, plan.channels.out_stride, plan.outer.out_stride,
        plan.inner.out_stride, *scale_rule, is_e5m2, plan.is_even, plan.multiple, num_partials, waits,
        *tile[:5],
    )  # fmt: skip
    launch = BoundLaunch(_cast_kernel, plan.num_programs, tile.num_warps, constants, waits=waits)
    if not plan.is_flipped:
        return launch
    return lambda x, codes, transposed, *scalars: launch(x, transposed, codes, *scalars)


def _describe(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> Optional[tuple[Batch, Batch, Batch]]:
    """(channels, outer, inner) of a tensor that `can_quantize` takes, None of others."""
    if len(shape) < 3 or math.prod(shape) == 0:
        return None
    if any(stride == 1 and size > 1 for size, stride in zip(shape[-2:], strides[-2:])):
        return None
    channels, others, num_items = None, [], 1
    for size, stride in zip(reversed(shape[:-2]), reversed(strides[:-2])):
        if size == 1:
            continue
        last = others[-1] if others else None
        if stride == 1 and channels is None:
            channels = Batch(size, 1, num_items)
        elif last and (stride, num_items) == (last.size * last.stride, last.size * last.out_stride):
            others[-1] = last._replace(size=last.size * size)
        else:
            others.append(Batch(size, stride, num_items))
        num_items *= size
    if channels is None or len(others) > 2:
        return None
    if read_strides(*_by_stride(shape, strides)) is None:
        return None
    inner, outer = (*others, Batch(1, 0, 0), Batch(1, 0, 0))[:2]
    return channels, outer, inner


def _by_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple, tuple]:
    """Shape and strides with the dims in the order in which they lie in memory."""
    dims = sorted((dim for dim in zip(strides, shape) if dim[1] > 1), reverse=True)
    dims = [(0, 1)] * (2 - len(dims)) + dims
    return tuple(size for _, size in dims), tuple(stride for stride, _ in dims)


@lru_cache(maxsize=4096)
def _make_plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    is_cuda: bool,
    rowwise: bool,
    transposed: bool,
    multiple: int,
    tile: Optional[Tile] = None,
) -> Plan:
    """Checks a tensor's description and prepares its launch; `tile` overrules the choice."""
    came = f"{dtype}, shape {tuple(shape)}, stride {tuple(strides)}"
    if dtype not in INPUT_DTYPES:
        raise TypeError(
            f"the FP8 kernel reads float32, bfloat16 or float16 and x came as {came}; convert it first"
        )
    if not (is_cuda or IS_INTERPRETED):
        raise ValueError(f"the FP8 kernel reads CUDA tensors and x came as {came} on the CPU")
    if not (rowwise or transposed):
        raise ValueError("neither rowwise nor transposed codes were asked for; ask for one of them")
    if multiple < 16 or multiple % 16:
        raise ValueError(f"codes are padded to a multiple of 16, and multiple came as {multiple}")
    batch = _describe(shape, strides)
    if batch is None:
        raise ValueError(
            "the channel-last FP8 kernel reads a contiguous batch dim beside at most two others, and x came as "
            f"{came}; use float8_quantize, of x.contiguous() if need be"
        )
    channels, outer, inner = batch
    rows, cols = shape[-2:]
    # A dim of size 1 is nowhere far.
    row_stride, col_stride = (s if n > 1 else 0 for n, s in zip(shape[-2:], strides[-2:]))
    padded_rows, padded_cols = (-(-size // multiple) * multiple for size in (rows, cols))
    shapes = (
        (*shape[:-2], padded_rows, padded_cols) if rowwise else None,
        (*shape[:-2], padded_cols, padded_rows) if transposed else None,
    )
    is_flipped = row_stride < col_stride
    if is_flipped:
        rows, cols, row_stride, col_stride = cols, rows, col_stride, row_stride
        padded_rows, padded_cols = padded_cols, padded_rows
        rowwise, transposed = transposed, rowwise
    if tile is None:
        tile = _choose_tile(padded_rows, padded_cols, channels.size, rowwise, transposed)
    groups = (
        -(-padded_rows // tile.group_rows)
        * -(-padded_cols // tile.group_cols)
        * -(-channels.size // tile.channels)
    )
    tiles = tile.group_rows * tile.group_cols // tile.col_run if rowwise else 0
    tiles += tile.group_rows * tile.group_cols // tile.row_run if transposed else 0
    return Plan(
        num_programs=math.prod(shape[:-2]) // channels.size * groups * tiles,
        num_rows=rows,
        num_cols=cols,
        row_stride=row_stride,
        col_stride=col_stride,
        channels=channels,
        outer=outer,
        inner=inner,
        is_flipped=is_flipped,
        rowwise_shape=shapes[0],
        transposed_shape=shapes[1],
        is_even=rows % tile.group_rows == 0
        and cols % tile.group_cols == 0
        and channels.size % tile.channels == 0
        and (rows, cols) == (padded_rows, padded_cols),
        multiple=multiple,
        tile=tile,
    )


def _choose_tile(rows: int, cols: int, channels: int, rowwise: bool, transposed: bool) -> Tile:
    """The fastest of sweeps on an H200 at N = 1024 and 2048, D = 64 and 128, made to fit other sizes.

    Elements of a program: 16384 for one layout, 8192 for both, in runs of 64 bytes and more.
    """
    is_both = rowwise and transposed
    # The widest that wastes little: reading 64 bytes of a row and more is as good as reading all.
    num_channels = min((128, 64, 32), key=lambda width: (-(-channels // width) * width, -width))
    num_channels = min(num_channels, triton.next_power_of_2(channels))
    if is_both:
        longest = 64 if num_channels >= 64 else 128
    else:
        longest = min(16384 // num_channels, 256)
    most_rows, most_cols = triton.next_power_of_2(rows), triton.next_power_of_2(cols)
    row_run, col_run = min(longest, most_rows), min(longest, most_cols)
    if is_both:
        group_rows, group_cols = min(128, most_rows), col_run
    elif rowwise:
        group_rows, group_cols = 1, col_run
    else:
        group_rows, group_cols = min(256, most_rows), 1
    size = num_channels * (max(row_run, col_run) if is_both else col_run if rowwise else row_run)
    return Tile(
        row_run=row_run,
        col_run=col_run,
        channels=num_channels,
        group_rows=group_rows,
        group_cols=group_cols,
        num_warps=max(1, min(4, size // (2048 if is_both else 4096))),
    )


@triton.jit
def _cast_line(
    x_ptr,
    codes_ptr,
    scale_ptr,
    amax_ptr,
    scale_inv_ptr,
    line,
    run,
    channels,
    items,
    num_lines,
    num_run,
    num_channels,
    line_stride,
    run_stride,
    amax_epsilon,
    POWER_OF_2: tl.constexpr,
    E5M2: tl.constexpr,
    EVEN: tl.constexpr,
    MULTIPLE: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    WAITS: tl.constexpr,
    RAISE: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Casts a run of one row (or column, if that is the line) of several items."""
    FP8_MAX: tl.constexpr = 57344.0 if E5M2 else 448.0
    x_ptr += line.to(tl.int64) * line_stride
    pointers = x_ptr + run.to(tl.int64) * run_stride + channels
    is_inside = (line < num_lines) & (run < num_run)
    if EVEN:
        x = tl.load(pointers, eviction_policy=EVICTION)
    else:
        mask = is_inside & (channels < num_channels)
        x = tl.load(pointers, mask=mask, other=0.0, eviction_policy=EVICTION)

    # After the load, which then is under way while the scale is computed.
    if scale_ptr is None:
        amax = load_amax(amax_ptr, NUM_PARTIALS, WAITS)
        scale = compute_scale(amax, amax_epsilon, FP8_MAX, POWER_OF_2)
    else:
        amax = tl.load(amax_ptr)
        scale = tl.load(scale_ptr)
    scale_inv = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
    tl.store(scale_inv_ptr, scale_inv, mask=tl.program_id(0) == 0)

    # Values must be turned before they are encoded: ptxas 12.8 and 12.9 (Triton 3.6 on Hopper) misplace FP8
    # codes when bytes of them are moved apart (triton-lang/triton#11111; 13.3 is said to be right). Triton moves
    # a change of layout from the store up to a conversion to a wider type, which 16-bit values have. FP32 gets
    # one: adding a zero that the compiler does not know, in 64 bits, of which it leaves nothing else.
    if x.dtype == tl.float32:
        zero = (tl.num_programs(1) - 1).to(tl.int64)
        x = (
            (x.to(tl.int32, bitcast=True).to(tl.int64) + zero)
            .to(tl.int32)
            .to(tl.float32, bitcast=True)
        )
    x = x.to(tl.float32)
    if RAISE and scale_ptr is not None:
        raise_amax(amax_ptr, amax, tl.max(tl.abs(x)))
    padded_lines = tl.cdiv(num_lines, MULTIPLE) * MULTIPLE
    padded_run = tl.cdiv(num_run, MULTIPLE) * MULTIPLE
    targets = codes_ptr + (items * padded_lines + line) * padded_run + run
    if EVEN:
        tl.store(targets, encode(x, scale, E5M2))
    else:
        # The product of a padding zero and the scale need not be +0.
        x = tl.where(is_inside, x * scale, 0.0)
        mask = (line < padded_lines) & (run < padded_run) & (channels < num_channels)
        tl.store(targets, encode(x, 1.0, E5M2), mask=mask)


# The scalars of a recipe lie side by side in one tensor, so their alignment says nothing. Sizes are never constants: of a
# size of 1 the compiler would know which codes are those of padding, and ptxas 12.8 loses one that several words share.
@triton.jit(
    do_not_specialize=["num_rows", "num_cols"],
    do_not_specialize_on_alignment=["scale_ptr", "amax_ptr", "scale_inv_ptr"],
)
def _cast_kernel(
    x_ptr,
    codes_ptr,
    transposed_ptr,
    scale_ptr,
    amax_ptr,
    scale_inv_ptr,
    num_rows,
    num_cols,
    num_channels,
    num_inner,
    row_stride,
    col_stride,
    outer_stride,
    inner_stride,
    channel_step,
    outer_step,
    inner_step,
    amax_epsilon,
    POWER_OF_2: tl.constexpr,
    E5M2: tl.constexpr,
    EVEN: tl.constexpr,
    MULTIPLE: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    WAITS: tl.constexpr,
    ROW_RUN: tl.constexpr,
    COL_RUN: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    GROUP_COLS: tl.constexpr,
):
    """A program casts one tile into one layout. Without `scale_ptr` the scale comes from amaxes, which are only
    read.

    Both layouts in one program would be one read instead of two, but its tile would have runs of 32 bytes in
    both directions, which is slower than two programs that share the L2 cache (docs/performance.md).
    """
    NUM_ROWWISE: tl.constexpr = 0 if codes_ptr is None else GROUP_ROWS * GROUP_COLS // COL_RUN
    NUM_TURNED: tl.constexpr = 0 if transposed_ptr is None else GROUP_ROWS * GROUP_COLS // ROW_RUN
    IS_BOTH: tl.constexpr = NUM_ROWWISE * NUM_TURNED > 0
    program = tl.program_id(0)
    if scale_ptr is None:
        # The end of x was read last and may still be in the L2 cache.
        program = tl.num_programs(0) - 1 - program
    channel_tiles = tl.cdiv(num_channels, CHANNELS)
    col_groups = tl.cdiv(tl.cdiv(num_cols, MULTIPLE) * MULTIPLE, GROUP_COLS)
    row_groups = tl.cdiv(tl.cdiv(num_rows, MULTIPLE) * MULTIPLE, GROUP_ROWS)
    tile = program % (NUM_ROWWISE + NUM_TURNED)
    program //= NUM_ROWWISE + NUM_TURNED
    channels = (program % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    program //= channel_tiles
    first_col = (program % col_groups) * GROUP_COLS
    program //= col_groups
    first_row = (program % row_groups) * GROUP_ROWS
    item = (program // row_groups).to(tl.int64)
    outer = item // num_inner
    inner = item % num_inner
    x_ptr += outer * outer_stride + inner * inner_stride
    items = outer * outer_step + inner * inner_step + channels.to(tl.int64) * channel_step
    if codes_ptr is not None and (not IS_BOTH or tile < NUM_ROWWISE):
        ACROSS: tl.constexpr = GROUP_COLS // COL_RUN
        row = first_row + tile // ACROSS
        cols = first_col + tile % ACROSS * COL_RUN + tl.arange(0, COL_RUN)[:, None]
        _cast_line(
            x_ptr, codes_ptr, scale_ptr, amax_ptr, scale_inv_ptr, row, cols, channels, items,
            num_rows, num_cols, num_channels, row_stride, col_stride, amax_epsilon,
            POWER_OF_2, E5M2, EVEN, MULTIPLE, NUM_PARTIALS, WAITS, True, "evict_last" if IS_BOTH else "",
        )  # fmt: skip
    if transposed_ptr is not None and (not IS_BOTH or tile >= NUM_ROWWISE):
        DOWN: tl.constexpr = GROUP_ROWS // ROW_RUN
        tile -= NUM_ROWWISE
        col = first_col + tile // DOWN
        rows = first_row + tile % DOWN * ROW_RUN + tl.arange(0, ROW_RUN)[:, None]
        _cast_line(
            x_ptr, transposed_ptr, scale_ptr, amax_ptr, scale_inv_ptr, col, rows, channels, items,
            num_cols, num_rows, num_channels, col_stride, row_stride, amax_epsilon,
            POWER_OF_2, E5M2, EVEN, MULTIPLE, NUM_PARTIALS, WAITS, not IS_BOTH, "",
        )  # fmt: skip
