# SPDX-License-Identifier: Apache-2.0
"""Where the scales of an operand with 128-blocks lie, as strides of items, rows and blocks of K.

Input: the codes and scales of one operand of a product, TE's or `block_cast`'s. Output: a `BlockOperand`. TE's scales
belong to the flattened matrix ``[items * R, C]``. Contracted along C, a block never leaves its row. Contracted along R,
an item's blocks are its own only if R is a multiple of 128; otherwise the operand is cut into segments that no block of
either operand divides, and each is packed with zeros behind it up to 128 (`Segments`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Callable, NamedTuple, Optional

import torch

from .operands import Operand, contiguous_strides
from .te_interop.tensors import Codes

BLOCK = 128

# A buffer of scales from the one that came.
Relayout = Callable[[torch.Tensor], torch.Tensor]


class ScaleView(NamedTuple):
    """Scales of ``[*batch, rows, K]``: that of row r and block k of an item is the element
    ``item @ batch_strides + r // granularity * row_stride + k * k_stride`` of what `relayout` makes of the buffer.
    """

    batch_shape: tuple[int, ...]
    batch_strides: tuple[int, ...]
    granularity: int
    row_stride: int
    k_stride: int
    relayout: Optional[Relayout] = None

    def expand(self, batch_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Strides of the items of a broadcast batch."""
        operand = Operand(self.batch_shape, self.batch_strides, 1, 1, 1, 1)
        return operand.expand(batch_shape).batch_strides


class SharedBlocks(NamedTuple):
    """Scales of an operand whose items share blocks of K.

    Parameters
    ----------
    item_size : int
        Item i starts at element ``i * item_size`` of the dim along which blocks are counted.
    granularity, row_stride, k_stride : int
        As in `ScaleView`, k counted over all items.
    """

    item_size: int
    granularity: int
    row_stride: int
    k_stride: int


@dataclass(frozen=True)
class BlockOperand:
    """Codes ``[*batch, rows, K]`` and their scales.

    Parameters
    ----------
    codes : Operand
        K is `cols`.
    dtype : str
        "e4m3" or "e5m2".
    scales : ScaleView or SharedBlocks
    """

    codes: Operand
    dtype: str
    scales: ScaleView | SharedBlocks

    @classmethod
    def describe(cls, codes: Codes, operand: Operand, *, contracts_last: bool) -> "BlockOperand":
        """The operand ``[*batch, rows, K]`` of `codes`.

        `contracts_last` says whether K is the last dim of the tensor that was quantized, or the one before it.
        """
        if codes.item_blocks:
            return cls(operand, codes.dtype, _describe_own(codes, operand))
        batch_shape, rows, size = operand.batch_shape, operand.rows, operand.cols
        num_items, num_blocks = prod(batch_shape), -(-size // BLOCK)
        # Elements per scale and step between scales: along the flattened dims, and along the last one.
        ld = codes.scale_inv.stride(0)
        if codes.square:
            flat, last = (BLOCK, ld), (BLOCK, 1)
            if codes.moved_last_dim:
                flat, last = (BLOCK, 1), (BLOCK, ld)
        elif codes.moved_last_dim:
            flat, last = (BLOCK, ld), (1, 1)
        else:
            flat, last = (1, 1), (BLOCK, ld)
        if contracts_last:
            (granularity, row_stride), (_, k_stride) = flat, last
            if granularity == BLOCK and rows % BLOCK and num_items > 1:
                view = _one_scale_per_row(batch_shape, rows, num_blocks, row_stride, k_stride)
            else:
                steps = _steps(batch_shape, rows // granularity * row_stride)
                view = ScaleView(batch_shape, steps, granularity, row_stride, k_stride)
            return cls(operand, codes.dtype, _with_whole_steps(view, rows, num_blocks))
        (_, k_stride), (granularity, row_stride) = flat, last
        if size % BLOCK and num_items > 1:
            shared = SharedBlocks(size, granularity, row_stride, k_stride)
            return cls(operand, codes.dtype, shared)
        steps = _steps(batch_shape, size // BLOCK * k_stride)
        view = ScaleView(batch_shape, steps, granularity, row_stride, k_stride)
        return cls(operand, codes.dtype, _with_whole_steps(view, rows, num_blocks))


def _describe_own(codes: Codes, operand: Operand) -> ScaleView:
    """Scales ``[*batch, rows or blocks of rows, blocks]``, a matrix for each item."""
    strides = codes.scale_inv.stride()
    view = ScaleView(
        operand.batch_shape, strides[:-2], BLOCK if codes.square else 1, strides[-2], strides[-1]
    )
    return _with_whole_steps(view, operand.rows, -(-operand.cols // BLOCK))


def _steps(batch_shape: tuple[int, ...], step: int) -> tuple[int, ...]:
    """Strides of items that follow one another."""
    return tuple(stride * step for stride in contiguous_strides(batch_shape))


def _one_scale_per_row(
    batch_shape: tuple[int, ...], rows: int, num_blocks: int, row_stride: int, k_stride: int
) -> ScaleView:
    """Rows of two items share a scale of 128 rows: it is repeated for each of them."""
    num_rows = prod(batch_shape) * rows

    def relayout(scales: torch.Tensor) -> torch.Tensor:
        index = torch.arange(num_rows, device=scales.device) // BLOCK
        shape = (-(-num_rows // BLOCK), num_blocks)
        return scales.as_strided(shape, (row_stride, k_stride)).index_select(0, index)

    return ScaleView(
        batch_shape, _steps(batch_shape, rows * num_blocks), 1, num_blocks, 1, relayout
    )


def _with_whole_steps(view: ScaleView, rows: int, num_blocks: int) -> ScaleView:
    """A view whose items are whole rows of scales apart, which is how the kernel counts; else of a packed copy."""
    steps = [step for size, step in zip(view.batch_shape, view.batch_strides) if size > 1]
    if view.row_stride > 0 and all(step % view.row_stride == 0 for step in steps):
        return view
    shape = (*view.batch_shape, -(-rows // view.granularity), num_blocks)
    strides = (*view.batch_strides, view.row_stride, view.k_stride)

    def relayout(scales: torch.Tensor) -> torch.Tensor:
        return scales.as_strided(shape, strides).contiguous()

    packed = contiguous_strides(shape)
    return view._replace(
        batch_strides=packed[:-2], row_stride=packed[-2], k_stride=packed[-1], relayout=relayout
    )


# --- blocks that items share ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segments:
    """K of each item cut where a block of either operand ends; segment s fills columns ``128 * s`` and on.

    Parameters
    ----------
    columns : torch.Tensor
        INT64 ``[items, 128 * segments]``: which element of K a packed column holds, -1 for none.
    blocks : tuple of torch.Tensor
        For each operand INT64 ``[items, segments]``: the block of K that a segment belongs to.
    """

    columns: torch.Tensor
    blocks: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def cut(
        cls, left: BlockOperand, right: BlockOperand, batch_shape: tuple[int, ...]
    ) -> "Segments":
        """Of a product whose batch is `batch_shape`."""
        size = left.codes.cols
        starts = [_item_starts(side, batch_shape) for side in (left, right)]
        rows = []
        for pair in zip(*starts):
            # An operand's blocks end where its own count of elements is a multiple of 128.
            cuts = {0, size} | {
                k for start in pair for k in range(-start % BLOCK, size, BLOCK) if k > 0
            }
            cuts = sorted(cuts)
            rows.append([(k, end, *((start + k) // BLOCK for start in pair))
                         for k, end in zip(cuts, cuts[1:])])  # fmt: skip
        num_segments = max(map(len, rows))
        columns = torch.full((len(rows), num_segments, BLOCK), -1)
        blocks = torch.zeros(2, len(rows), num_segments, dtype=torch.int64)
        for item, segments in enumerate(rows):
            for index, (k, end, *pair) in enumerate(segments):
                columns[item, index, : end - k] = torch.arange(k, end)
                blocks[:, item, index] = torch.tensor(pair)
        return cls(columns.flatten(1), tuple(blocks))

    def to(self, device: torch.device) -> "Segments":
        """The same on another device."""
        return Segments(self.columns.to(device), tuple(x.to(device) for x in self.blocks))

    def pack_codes(
        self, codes: torch.Tensor, operand: Operand, batch_shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Codes ``[items, rows, 128 * segments]``, zeros between."""
        shape = (*operand.batch_shape, operand.rows, operand.cols)
        strides = (*operand.batch_strides, operand.row_stride, operand.col_stride)
        view = codes.as_strided(shape, strides, codes.storage_offset()).expand(*batch_shape, -1, -1)
        view = torch.nn.functional.pad(view.reshape(-1, *shape[-2:]), (0, 1))
        # The padding is what index -1 reads.
        index = (self.columns % (operand.cols + 1)).unsqueeze(1).expand(-1, operand.rows, -1)
        return view.gather(2, index)

    def pack_scales(
        self, scale_inv: torch.Tensor, side: BlockOperand, index: int, batch_shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Scales ``[items, rows or blocks of rows, segments]`` of operand `index`, 0 or 1."""
        blocks, scales = self.blocks[index], side.scales
        num_items = len(blocks)
        num_rows = -(-side.codes.rows // scales.granularity)
        if isinstance(scales, SharedBlocks):
            num_blocks = -(-prod(side.codes.batch_shape) * scales.item_size // BLOCK)
            matrix = scale_inv.as_strided(
                (num_rows, num_blocks), (scales.row_stride, scales.k_stride)
            )
            return (
                matrix.index_select(1, blocks.flatten()).view(num_rows, num_items, -1).movedim(1, 0)
            )
        if scales.relayout is not None:
            scale_inv = scales.relayout(scale_inv)
        shape = (*scales.batch_shape, num_rows, -(-side.codes.cols // BLOCK))
        strides = (*scales.batch_strides, scales.row_stride, scales.k_stride)
        view = scale_inv.as_strided(shape, strides, scale_inv.storage_offset())
        view = view.expand(*batch_shape, -1, -1).reshape(num_items, *shape[-2:])
        return view.gather(2, blocks.unsqueeze(1).expand(-1, num_rows, -1))


def _item_starts(side: BlockOperand, batch_shape: tuple[int, ...]) -> list[int]:
    """For each item of the product, where its K starts in the count of blocks."""
    if not isinstance(side.scales, SharedBlocks):
        return [0] * prod(batch_shape)
    items = torch.arange(prod(side.codes.batch_shape)).view(side.codes.batch_shape)
    return (items.expand(batch_shape).flatten() * side.scales.item_size).tolist()
