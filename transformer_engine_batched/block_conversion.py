# SPDX-License-Identifier: Apache-2.0
"""Operands with 128-block scales as MXFP8 operands: how TE multiplies them on Blackwell.

The codes stay; a scale of 128 elements becomes the same factor for each of its four blocks of 32, which E8M0 holds
exactly if it is a power of two. Where it is none, the factor is NaN, so that the product cannot be wrong without
showing it. Must not know of products.

Source: TE 2.20.2, ``pytorch/csrc/extensions/gemm.cpp``, convert_block_scaling_to_mxfp8_tensor, which asks for powers of
two, too.
"""

from __future__ import annotations

from math import prod

import torch

from .errors import UnsupportedError
from .operands import round_up
from .te_interop.tensors import Codes

_BLOCK = 128
_MX_BLOCK = 32
_NAN_CODE = 0xFF


def convert_to_mxfp8(codes: Codes, transposed: bool, name: str) -> tuple[Codes, bool]:
    """MXFP8 codes whose last dim is contracted, and whether the product transposes them.

    Parameters
    ----------
    codes : Codes
        Of format "float8_block", multiplied transposed or not, contracted along the dim that is contiguous.
    transposed : bool
    name : str
        Of the operand, for messages.

    Raises
    ------
    UnsupportedError
        Contracted along the rows of TE's flattened tensor, where these are no multiple of 32, so that blocks
        of 32 would cross items.
    """
    data, scale_inv = codes.data, codes.scale_inv
    if codes.moved_last_dim:
        data, transposed = data.movedim(0, -2), not transposed
    *batch, rows, size = data.shape
    num_items = prod(batch)
    num_blocks = -(-size // _MX_BLOCK)
    if codes.item_blocks:
        matrix = (
            scale_inv.repeat_interleave(_BLOCK, -2)[..., :rows, :] if codes.square else scale_inv
        )
        factors = matrix.reshape(num_items * rows, -1).repeat_interleave(4, 1)[:, :num_blocks]
    elif codes.moved_last_dim:
        if size % _MX_BLOCK and num_items > 1:
            raise UnsupportedError(
                f"operand {name} is contracted along its rows, but its {size} rows are no multiple of 32, so that blocks "
                "of 32 cross batch items. Pad the rows with zeros to a multiple of 32 before quantizing."
            )
        matrix = (
            scale_inv.repeat_interleave(_BLOCK, 0)[:rows] if codes.square else scale_inv.t()[:rows]
        )
        # [rows, blocks of 32 of all items] -> a row of factors for each row of each item.
        matrix = matrix.repeat_interleave(4, 1)[:, : num_items * num_blocks]
        factors = matrix.reshape(rows, num_items, num_blocks).transpose(0, 1).flatten(0, 1)
    else:
        matrix = scale_inv.repeat_interleave(_BLOCK, 0) if codes.square else scale_inv.t()
        factors = matrix[: num_items * rows].repeat_interleave(4, 1)[:, :num_blocks]
    if size % _MX_BLOCK:
        data = torch.nn.functional.pad(data, (0, -size % _MX_BLOCK))
    buffer = torch.zeros(
        round_up(num_items * rows, 128),
        round_up(num_blocks, 4),
        dtype=torch.uint8,
        device=data.device,
    )
    buffer[: num_items * rows, :num_blocks] = _encode_powers(factors)
    return Codes("mxfp8", codes.dtype, data, buffer), transposed


def _encode_powers(factors: torch.Tensor) -> torch.Tensor:
    """E8M0 codes of powers of two; NaN for other numbers."""
    bits = factors.contiguous().view(torch.int32)
    is_power = (bits & 0x7FFFFF == 0) & (bits > 0) & (bits < 0x7F800000)
    return torch.where(is_power, bits >> 23, _NAN_CODE).to(torch.uint8)
