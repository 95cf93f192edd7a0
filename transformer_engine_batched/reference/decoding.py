# SPDX-License-Identifier: Apache-2.0
"""MXFP8 operands as plain tensors, so that other tensor cores can multiply them exactly.

An E4M3 or E5M2 code times a power of two has at most 4 significant bits: it is a BF16 number, range
permitting, and always an FP32 number wherever the product of code and factor is representable at all.
Imports torch, the codes and the scale tiles.
"""

from __future__ import annotations

import torch

from ..block_scales import item_scales, unpack_tiles
from . import codes

_BLOCK = 32


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
    if data.is_cuda and torch.cuda.is_current_stream_capturing():
        return values
    narrow = values.bfloat16()
    is_exact = ((narrow.float() == values) | values.isnan()).all()
    return narrow if bool(is_exact) else values
