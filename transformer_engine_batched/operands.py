# SPDX-License-Identifier: Apache-2.0
"""Batching as arithmetic on shapes and strides.

Describes where the elements of a batched matrix lie, finds the leading dimension, merges batch dimensions
into one stride, and says what a padded copy would look like. Pure: integers in, integers out; imports
neither torch nor TE.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Optional

from .problem import Matrix


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def broadcast_shapes(*shapes: tuple[int, ...]) -> Optional[tuple[int, ...]]:
    """torch.matmul's broadcasting of batch dimensions; None if the shapes do not fit together."""
    rank = max(len(shape) for shape in shapes)
    result = []
    for dims in zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes)):
        sizes = {size for size in dims if size != 1}
        if len(sizes) > 1:
            return None
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a row-major tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Operand:
    """A batched matrix ``[*batch, rows, cols]`` as it lies in memory. Strides count elements."""

    batch_shape: tuple[int, ...]
    batch_strides: tuple[int, ...]
    rows: int
    cols: int
    row_stride: int
    col_stride: int

    @classmethod
    def from_strides(cls, shape: tuple[int, ...], strides: tuple[int, ...]) -> "Operand":
        """The operand of a tensor with these dimensions, the last two being the matrix."""
        return cls(
            tuple(shape[:-2]), tuple(strides[:-2]), shape[-2], shape[-1], strides[-2], strides[-1]
        )

    @property
    def mT(self) -> "Operand":
        """The transposed matrices: a swap of strides."""
        return replace(
            self,
            rows=self.cols,
            cols=self.rows,
            row_stride=self.col_stride,
            col_stride=self.row_stride,
        )

    def expand(self, batch_shape: tuple[int, ...]) -> "Operand":
        """The operand broadcast to more items: stride 0 where a dimension is repeated."""
        missing = len(batch_shape) - len(self.batch_shape)
        shape = (1,) * missing + self.batch_shape
        strides = (0,) * missing + self.batch_strides
        strides = tuple(
            0 if size == 1 and wanted != 1 else stride
            for size, stride, wanted in zip(shape, strides, batch_shape)
        )
        return replace(self, batch_shape=tuple(batch_shape), batch_strides=strides)

    def fits(self, transposed: bool) -> bool:
        """Whether the rows (or, if `transposed`, the columns) can be read with one leading dimension.

        A dim of size 1 has no stride of its own, and a row may not overlap the next one.
        """
        if transposed:
            return self.mT.fits(False)
        is_contiguous = self.col_stride == 1 or self.cols == 1
        return is_contiguous and (self.row_stride >= self.cols or self.rows == 1)

    def choose_orientation(self, preferred: bool) -> Optional[bool]:
        """`transposed` as the memory has it: `preferred` if that fits, else the other, else None."""
        if self.fits(preferred):
            return preferred
        return (not preferred) if self.fits(not preferred) else None

    def leading_dimension(self, transposed: bool) -> int:
        """Elements from one row (or, if transposed, column) to the next."""
        if transposed:
            return self.mT.leading_dimension(False)
        return self.row_stride if self.rows > 1 else max(self.cols, 1)

    def matrix(self, dtype: str, scale_mode: str, batch_stride: int, transposed: bool) -> Matrix:
        """The description that engines read."""
        return Matrix(
            dtype=dtype,
            ld=self.leading_dimension(transposed),
            batch_stride=batch_stride,
            transposed=transposed,
            scale_mode=scale_mode,
        )

    def packed(
        self, *, transposed: bool, row_multiple: int, col_multiple: int, repeat: bool = False
    ) -> "PackedCopy":
        """What a packed copy looks like, sizes padded to multiples.

        Broadcast batch dims stay unrepeated unless `repeat`.
        """
        rows, cols = round_up(self.rows, row_multiple), round_up(self.cols, col_multiple)
        # A broadcast dim is copied once; expanding it again costs nothing.
        base = tuple(
            1 if stride == 0 and not repeat else size
            for size, stride in zip(self.batch_shape, self.batch_strides)
        )
        stored = (*base, cols, rows) if transposed else (*base, rows, cols)
        copy = Operand.from_strides(stored, contiguous_strides(stored))
        copy = (copy.mT if transposed else copy).expand(self.batch_shape)
        return PackedCopy(stored_shape=stored, base_shape=base, transposed=transposed, operand=copy)


@dataclass(frozen=True)
class PackedCopy:
    """Shape of the memory of a packed copy, and the operand that reads it."""

    stored_shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    transposed: bool
    operand: Operand


@dataclass(frozen=True)
class FoldedBatch:
    """Batch dimensions of several operands merged: one strided batch inside a loop of launches.

    Parameters
    ----------
    size : int
        Items of the strided batch.
    strides : tuple of int
        Batch stride of each operand.
    offsets : tuple of tuple of int
        For each launch, the offset of each operand in elements.
    """

    size: int
    strides: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...]


def fold_batch(shape: tuple[int, ...], *operand_strides: tuple[int, ...]) -> FoldedBatch:
    """Merges batch dimensions into one stride for each operand.

    Two neighbouring dims merge if for every operand the outer stride is the inner size times the inner
    stride (0 and 0 for a broadcast operand). What does not merge becomes a loop of launches around the
    largest merged dim, so that no operand is ever copied for its batch layout.
    """
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, *strides in zip(shape, *operand_strides):
        if size == 1:
            continue
        if merged:
            outer_size, outer = merged[-1]
            if all(step == size * stride for step, stride in zip(outer, strides)):
                merged[-1] = (outer_size * size, tuple(strides))
                continue
        merged.append((size, tuple(strides)))
    if not merged:
        zero = (0,) * len(operand_strides)
        return FoldedBatch(1, zero, (zero,))
    inner = max(range(len(merged)), key=lambda index: merged[index][0])
    size, strides = merged.pop(inner)
    offsets = [(0,) * len(operand_strides)]
    for outer_size, outer in merged:
        offsets = [
            tuple(base + index * step for base, step in zip(offset, outer))
            for offset in offsets
            for index in range(outer_size)
        ]
    return FoldedBatch(size, strides, tuple(offsets))


def has_single_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether batch dims of an operand merge into one, in row-major order of the items."""
    return len(fold_batch(shape, strides).offsets) == 1


def num_elements_spanned(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided tensor, both included; 0 for an empty one."""
    if prod(shape) == 0:
        return 0
    return 1 + sum((size - 1) * abs(stride) for size, stride in zip(shape, strides))


def has_internal_overlap(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two indices may reach the same element (sufficient test, sorted strides)."""
    reached = 0
    for stride, size in sorted((s, n) for n, s in zip(shape, strides) if n > 1):
        if stride <= reached:
            return True
        reached += (size - 1) * stride
    return False
