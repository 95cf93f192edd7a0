# SPDX-License-Identifier: Apache-2.0
"""Copies a tensor to a memory layout that is contiguous along another dim, at the speed of a plain copy.

A product writes ``[B, D, M, N]``; the caller of a channel-last contraction wants ``[B, M, N, D]``. Inputs and
outputs are torch tensors. Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl

from .float8_codes import IS_INTERPRETED
from .launcher import BoundLaunch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Batch dims besides the two that are contiguous in one of the tensors.
_MAX_OTHERS = 3


class Tile(NamedTuple):
    """Elements that a program reads along one dim and writes along another, and its warps."""

    read: int
    written: int
    num_warps: int


# By bytes of an element. The fastest of a sweep on an H200 for 2 bytes: longer runs win.
TILES = {2: Tile(128, 128, 16), 4: Tile(64, 128, 8)}


class Dim(NamedTuple):
    """A dim (or several merged) of both tensors."""

    size: int
    in_stride: int
    out_stride: int


class Plan(NamedTuple):
    """A launch: the dim that is contiguous in `x`, the one that is in `out`, and the others, outermost first."""

    num_programs: int
    read: Dim
    written: Dim
    others: tuple[Dim, ...]
    num_readable: int
    is_even: bool
    tile: Tile


def copy_permuted(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out[...] = x``, fast also where the two are contiguous along different dims.

    A kernel copies FP32, BF16 and FP16 tensors on a CUDA device of which each is contiguous along a dim of its
    own and whose other dims merge into at most three. Other pairs are left to `torch.Tensor.copy_`, which is as
    fast where both share their contiguous dim.

    Parameters
    ----------
    x, out : torch.Tensor
        Of one shape, dtype and device; any strides, but no overlap in `out`. Every element of `out` is written.

    Returns
    -------
    torch.Tensor
        `out`.

    Raises
    ------
    ValueError
        If shapes, dtypes or devices differ.

    Examples
    --------
    >>> x = torch.randn(2, 8, 4, 6, device="cuda")
    >>> out = x.new_empty(2, 4, 6, 8).permute(0, 3, 1, 2)
    >>> torch.equal(copy_permuted(x, out), x)
    True
    """
    if x.shape != out.shape or x.dtype != out.dtype or x.device != out.device:
        raise ValueError(
            f"x came as {x.dtype}, shape {tuple(x.shape)} on {x.device} and out as {out.dtype}, shape "
            f"{tuple(out.shape)} on {out.device}; both must be the same"
        )
    launch = None
    if (x.is_cuda or IS_INTERPRETED) and x.dtype in _DTYPES:
        launch = _find_launch(
            x.shape, x.stride(), out.stride(), x.dtype, _count_readable(x),
            (x.data_ptr() % 16, out.data_ptr() % 16), x.get_device(),
        )  # fmt: skip
    if launch is None:
        return out.copy_(x)
    if x.is_cuda and torch._C._cuda_getDevice() != x.get_device():
        with torch.cuda.device(x.device):
            launch(x, out)
    else:
        launch(x, out)
    return out


def _count_readable(x: torch.Tensor) -> int:
    """Columns of the last dim that may be read: a result cut from a padded buffer has more than its own.

    A multiple of 16 of them lets the kernel read 16 bytes at a time.
    """
    cols = x.shape[-1] if x.ndim else 0
    wide = -(-cols // 16) * 16
    if wide == cols or x.ndim < 2 or x.numel() == 0 or x.stride(-1) != 1 or x.stride(-2) < wide:
        return cols
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape[:-1], x.stride()[:-1]))
    return wide if (last + wide) * x.element_size() <= x.untyped_storage().nbytes() else cols


@lru_cache(maxsize=4096)
def _find_launch(
    shape: tuple[int, ...],
    in_strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    dtype: torch.dtype,
    num_readable: int,
    misalignment: tuple[int, int],  # Triton compiles for it.  pylint: disable=unused-argument
    device_index: int,  # pylint: disable=unused-argument
) -> Optional[BoundLaunch]:
    plan = _make_plan(shape, in_strides, out_strides, dtype.itemsize, num_readable)
    return None if plan is None else _bind(plan)


@lru_cache(maxsize=4096)
def _make_plan(
    shape: tuple[int, ...],
    in_strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    element_bytes: int,
    num_readable: int,
    tile: Optional[Tile] = None,
) -> Optional[Plan]:
    """The launch for a pair of layouts; None where it is torch's job. `tile` overrules the table."""
    if math.prod(shape) == 0:
        return None
    dims = [Dim(*dim) for dim in zip(shape, in_strides, out_strides) if dim[0] > 1]
    reads = [dim for dim in dims if dim.in_stride == 1]
    writes = [dim for dim in dims if dim.out_stride == 1]
    if len(reads) != 1 or len(writes) != 1 or reads == writes:
        return None
    if shape[-1] != reads[0].size or in_strides[-1] != 1:
        num_readable = reads[0].size
    others: list[Dim] = []
    # Programs follow the output, innermost last.
    for dim in sorted(dims, key=lambda dim: -dim.out_stride):
        if dim in (reads[0], writes[0]):
            continue
        if others and all(
            outer == dim.size * inner for outer, inner in zip(others[-1][1:], dim[1:])
        ):
            others[-1] = Dim(others[-1].size * dim.size, *dim[1:])
        else:
            others.append(dim)
    if len(others) > _MAX_OTHERS:
        return None
    others = [Dim(1, 0, 0)] * (_MAX_OTHERS - len(others)) + others
    tile = _fit_tile(tile or TILES[element_bytes], reads[0].size, writes[0].size)
    tiles = -(-reads[0].size // tile.read), -(-writes[0].size // tile.written)
    return Plan(
        num_programs=math.prod(dim.size for dim in others) * math.prod(tiles),
        read=reads[0],
        written=writes[0],
        others=tuple(others),
        num_readable=num_readable,
        is_even=reads[0].size % tile.read == 0 and writes[0].size % tile.written == 0,
        tile=tile,
    )


def _fit_tile(tile: Tile, num_read: int, num_written: int) -> Tile:
    """A tile no larger than the tensor: what one dim does not need goes to the other, up to a factor of 4."""
    most_read, most_written = (triton.next_power_of_2(size) for size in (num_read, num_written))
    read, written = min(tile.read, most_read), min(tile.written, most_written)
    read, written = (
        min(most_read, read * min(tile.written // written, 4)),
        min(most_written, written * min(tile.read // read, 4)),
    )
    num_warps = max(1, tile.num_warps * read * written // (tile.read * tile.written))
    return Tile(read, written, num_warps)


def _bind(plan: Plan) -> BoundLaunch:
    tile = plan.tile
    constants = (
        plan.read.size, plan.written.size, *(dim.size for dim in plan.others[1:]), plan.num_readable,
        plan.written.in_stride, plan.read.out_stride,
        *(dim.in_stride for dim in plan.others), *(dim.out_stride for dim in plan.others),
        plan.is_even, tile.read, tile.written,
    )  # fmt: skip
    return BoundLaunch(_permute_kernel, plan.num_programs, tile.num_warps, constants)


@triton.jit
def _permute_kernel(
    x_ptr,
    out_ptr,
    num_read,
    num_written,
    num_middle,
    num_inner,
    num_readable,
    written_in_stride,
    read_out_stride,
    outer_in_stride,
    middle_in_stride,
    inner_in_stride,
    outer_out_stride,
    middle_out_stride,
    inner_out_stride,
    EVEN: tl.constexpr,
    BLOCK_READ: tl.constexpr,
    BLOCK_WRITTEN: tl.constexpr,
):
    """A program copies one tile: read along one dim, written along the other."""
    program = tl.program_id(0)
    written_tiles = tl.cdiv(num_written, BLOCK_WRITTEN)
    read_tiles = tl.cdiv(num_read, BLOCK_READ)
    written = (program % written_tiles) * BLOCK_WRITTEN + tl.arange(0, BLOCK_WRITTEN)[:, None]
    program //= written_tiles
    read = (program % read_tiles) * BLOCK_READ + tl.arange(0, BLOCK_READ)[None, :]
    program = (program // read_tiles).to(tl.int64)
    inner = program % num_inner
    program //= num_inner
    middle = program % num_middle
    outer = program // num_middle
    x_ptr += outer * outer_in_stride + middle * middle_in_stride + inner * inner_in_stride
    out_ptr += outer * outer_out_stride + middle * middle_out_stride + inner * inner_out_stride
    sources = x_ptr + written.to(tl.int64) * written_in_stride + read
    targets = out_ptr + read.to(tl.int64) * read_out_stride + written
    if EVEN:
        tl.store(targets, tl.load(sources))
    else:
        is_inside = written < num_written
        x = tl.load(sources, mask=is_inside & (read < num_readable), other=0.0)
        tl.store(targets, x, mask=is_inside & (read < num_read))
