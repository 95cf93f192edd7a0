# SPDX-License-Identifier: Apache-2.0
"""Block-scaled operands as plain tensors, so that other tensor cores can multiply them exactly.

An E4M3 or E5M2 code times a power of two has at most 4 significant bits: it is a BF16 number, range
permitting, and always an FP32 number wherever the product of code and factor is representable at all.
Imports torch, the codes and the scale tiles.
"""

from __future__ import annotations

import torch

from ..block_scales import item_scales, unpack_tiles
from . import codes

_BLOCK = 32

# Elements along the sides of TE's Float8 blocks: TE 2.20.2, Float8BlockQuantizer.block_len.
BLOCKWISE_SIZE = 128


def decode_mxfp8(
    data: torch.Tensor,
    scale_inv: torch.Tensor,
    fp8: torch.dtype,
    *,
    columnwise: bool,
    swizzled: bool,
) -> torch.Tensor:
    """Values of an MXFP8 copy: BF16 if that holds every one of them exactly, else FP32.

    Parameters
    ----------
    data : torch.Tensor
        uint8 ``[*batch, rows, cols]``.
    scale_inv : torch.Tensor
        TE's E8M0 buffer of the flattened matrix.
    fp8 : torch.dtype
    columnwise : bool
        Whether the blocks run along the rows.
    swizzled : bool
        Whether the buffer is in 128x4 tiles.

    Notes
    -----
    The range check waits for the device. During CUDA graph capture it cannot, and FP32 is used.
    """
    *batch, rows, cols = data.shape
    num_items = data.numel() // max(rows * cols, 1)
    packed = item_scales(
        scale_inv,
        num_items=num_items,
        rows=rows,
        cols=cols,
        columnwise=columnwise,
        swizzled=swizzled,
    )
    outer, inner = (cols, rows // _BLOCK) if columnwise else (rows, cols // _BLOCK)
    factors = codes.decode_e8m0(unpack_tiles(packed, outer, inner), torch.float32)
    factors = factors.repeat_interleave(_BLOCK, dim=-1).reshape(*batch, outer, inner * _BLOCK)
    values = codes.decode(data, fp8, torch.float32) * (factors.mT if columnwise else factors)
    return _narrow(values)


def decode_blockwise(
    data: torch.Tensor,
    scale_inv: torch.Tensor,
    fp8: torch.dtype,
    *,
    square: bool,
    transposed: bool,
) -> torch.Tensor:
    """Values ``code * scale_inv`` of a Float8 128-block copy: BF16 if that holds them exactly, else FP32.

    Exact where scales are powers of two; otherwise each value is rounded once to FP32. Blocks belong to
    the flattened matrix and are read from there, so that those that cross items are right, too.

    Parameters
    ----------
    data : torch.Tensor
        uint8 ``[*leading, last]``, or ``[last, *leading]`` if `transposed`.
    scale_inv : torch.Tensor
        TE's float32 buffer for the matrix ``[rows, cols]`` that `data` is when all its dims but the last
        (if `transposed`: but the first) are taken together: ``[ceil(cols / 128), >= rows]``, or
        ``[ceil(rows / 128), >= ceil(cols / 128)]`` if `square`.
    fp8 : torch.dtype
    square : bool
        Whether a block is 128 x 128 elements, not 1 x 128.
    transposed : bool
        Whether `data` is TE's column-wise copy.

    Returns
    -------
    torch.Tensor
        ``[*leading, last]``; of a transposed copy a view in which the dim before the last is contiguous.

    Notes
    -----
    Source of the layouts: TE 2.20.2, ``Float8BlockQuantizer.get_scale_shape`` and
    ``Float8BlockwiseQTensorStorage``. The range check waits as in `decode_mxfp8`.
    """
    size = data.shape[0] if transposed else data.shape[-1]
    num_others = data.numel() // max(size, 1)
    rows, cols = (size, num_others) if transposed else (num_others, size)
    num_blocks = -(-cols // BLOCKWISE_SIZE)
    if square:
        scales = scale_inv[: -(-rows // BLOCKWISE_SIZE), :num_blocks]
    else:
        scales = scale_inv[:num_blocks, :rows].t()
    values = codes.decode(data.reshape(rows, cols), fp8, torch.float32)
    values = _narrow(values * expand_blocks(scales, (rows, cols), square=square))
    values = values.view(data.shape)
    return values.movedim(0, -1) if transposed else values


def decode_item_blocks(
    data: torch.Tensor, scale_inv: torch.Tensor, fp8: torch.dtype, *, square: bool
) -> torch.Tensor:
    """Values ``code * scale_inv`` of codes whose blocks start anew in each matrix, as `decode_blockwise`.

    Parameters
    ----------
    data : torch.Tensor
        uint8 ``[*batch, rows, cols]``, any strides.
    scale_inv : torch.Tensor
        float32 ``[*batch, rows, ceil(cols / 128)]``, square ``[*batch, ceil(rows / 128), ceil(cols / 128)]``.
    fp8 : torch.dtype
    square : bool
    """
    rows, cols = data.shape[-2:]
    factors = scale_inv.repeat_interleave(BLOCKWISE_SIZE, dim=-1)[..., :cols]
    if square:
        factors = factors.repeat_interleave(BLOCKWISE_SIZE, dim=-2)[..., :rows, :]
    return _narrow(codes.decode(data, fp8, torch.float32) * factors)


def expand_blocks(scales: torch.Tensor, shape: tuple[int, int], *, square: bool) -> torch.Tensor:
    """Factor of each element of a matrix from those of its 1 x 128 or 128 x 128 blocks.

    Parameters
    ----------
    scales : torch.Tensor
        ``[rows, ceil(cols / 128)]``, square ``[ceil(rows / 128), ceil(cols / 128)]``.
    shape : tuple of int
        ``(rows, cols)``.
    square : bool
    """
    rows, cols = shape
    if square:
        scales = scales.repeat_interleave(BLOCKWISE_SIZE, dim=0)[:rows]
    return scales.repeat_interleave(BLOCKWISE_SIZE, dim=1)[:, :cols]


def _narrow(values: torch.Tensor) -> torch.Tensor:
    """BF16 if it holds every FP32 value exactly."""
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return values
    narrow = values.bfloat16()
    is_exact = ((narrow.float() == values) | values.isnan()).all()
    return narrow if bool(is_exact) else values
