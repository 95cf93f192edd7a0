# SPDX-License-Identifier: Apache-2.0
"""Operands that stand for block-scaled ones where a device multiplies others: as BF16 or FP32 numbers, or as MXFP8."""

from __future__ import annotations

import torch

from .block_conversion import convert_to_mxfp8
from .gemm_arguments import Side
from .reference.decoding import decode_blockwise, decode_item_blocks, decode_mxfp8
from .reference.product import TORCH_DTYPES
from .te_interop.tensors import HIGH_PRECISION_DTYPES, Codes


def decode_both(left: Side, right: Side) -> tuple[tuple, tuple]:
    """Block-scaled operands without an engine as plain ones of one type: BF16, or FP32 if it has to be."""
    values = [decode_codes(side.codes) for side in (left, right)]
    if values[0].dtype != values[1].dtype:
        values = [value.float() for value in values]
    dtype = HIGH_PRECISION_DTYPES[values[0].dtype]
    return tuple(
        (value, side.name, side.transposed, Codes(dtype, dtype, value))
        for value, side in zip(values, (left, right))
    )


def convert_both(left: Side, right: Side) -> tuple[tuple, tuple]:
    """Operands with 128-blocks as MXFP8 operands."""
    sides = []
    for side in (left, right):
        codes, transposed = convert_to_mxfp8(side.codes, side.transposed, side.name)
        sides.append((codes.data, side.name, transposed, codes))
    return tuple(sides)


def decode_codes(codes: Codes) -> torch.Tensor:
    """Values of block-scaled codes: BF16 where that is exact, else FP32."""
    fp8 = TORCH_DTYPES[codes.dtype]
    if codes.item_blocks:
        return decode_item_blocks(codes.data, codes.scale_inv, fp8, square=codes.square)
    if codes.fmt == "float8_block":
        return decode_blockwise(
            codes.data, codes.scale_inv, fp8, square=codes.square, transposed=codes.moved_last_dim
        )
    return decode_mxfp8(
        codes.data, codes.scale_inv, fp8, columnwise=codes.columnwise, swizzled=codes.swizzled
    )
