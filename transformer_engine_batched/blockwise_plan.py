# SPDX-License-Identifier: Apache-2.0
"""The blockwise engine: products of operands with 128-block scales on the Hopper kernel.

`BlockwiseLaunch` is called as `launch.Launch`. What shapes and strides decide is decided once; codes and scales are
read where TE or `block_cast` left them, through strides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, NamedTuple, Optional

import torch

from .block_operand import BlockOperand, ScaleView, Segments, SharedBlocks
from .groupwise import align_codes, is_aligned
from .kernels import blockwise_gemm
from .launch import apply_epilogue
from .operands import Operand, contiguous_strides, fold_batch, round_up
from .reference.product import TORCH_DTYPES
from .te_interop.tensors import Codes

# What turns a buffer that came into one that the kernel reads.
Copy = Callable[[torch.Tensor], torch.Tensor]


class Reading(NamedTuple):
    """How the kernel reads one operand: copies to make first (None: as it came), and what lies where then."""

    codes: Operand
    copy_codes: Optional[Copy]
    scales: ScaleView
    copy_scales: Optional[Copy]


class View(NamedTuple):
    """Arguments of `as_strided`, the offset relative to where the tensor begins."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The view of a tensor; itself if it is that already."""
        if self.offset == 0 and x.shape == self.shape and x.stride() == self.strides:
            return x
        return x.as_strided(self.shape, self.strides, x.storage_offset() + self.offset)


class Step(NamedTuple):
    """One launch of the kernel: views of a, b and out, and for each operand the first scale and its strides."""

    matrices: tuple[View, View, View]
    first_scales: tuple[View, View]
    scale_strides: tuple[tuple[int, int, int, int], tuple[int, int, int, int]]


@dataclass(frozen=True)
class BlockwiseLaunch:
    """A prepared product ``a @ b``: `readings` are of ``[*batch, M, K]`` and ``[*batch, N, K]``."""

    readings: tuple[Reading, Reading]
    formats: tuple[str, str]
    batch_shape: tuple[int, ...]
    out_dtype: torch.dtype
    gelu: bool
    num_sms: Optional[int]
    has_fp8_output: bool = False
    steps: dict = field(default_factory=dict)  # strides of the output -> its steps

    @classmethod
    def prepare(
        cls,
        codes: tuple[Codes, Codes],
        operands: tuple[Operand, Operand],
        contracts_last: tuple[bool, bool],
        *,
        batch_shape: tuple[int, ...],
        out_dtype: str,
        gelu: bool,
        sm_count: int,
    ) -> "BlockwiseLaunch":
        """Decides how ``a @ b`` runs.

        Parameters
        ----------
        codes : tuple of Codes
            Of `a` and `b`; all calls have such shapes, strides and alignment.
        operands : tuple of Operand
            The matrices ``[*, M, K]`` and ``[*, K, N]``.
        contracts_last : tuple of bool
            Whether K is the last dim of the tensor that was quantized, or the one before it.
        batch_shape, out_dtype, gelu
            Of the product.
        sm_count : int
            SMs to use, 0 for all.
        """
        sides = tuple(
            BlockOperand.describe(of_one, operand, contracts_last=last)
            for of_one, operand, last in zip(codes, (operands[0], operands[1].mT), contracts_last)
        )
        if any(isinstance(side.scales, SharedBlocks) for side in sides):
            segments = Segments.cut(*sides, batch_shape).to(codes[0].data.device)
            readings = tuple(
                _read_packed(side, i, segments, batch_shape) for i, side in enumerate(sides)
            )
        else:
            readings = tuple(_read(side, of_one.data) for side, of_one in zip(sides, codes))
        return cls(
            readings,
            (sides[0].dtype, sides[1].dtype),
            batch_shape,
            TORCH_DTYPES[out_dtype],
            gelu,
            sm_count or None,
        )

    def run(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        scale_inv_a: torch.Tensor,
        scale_inv_b: torch.Tensor,
        quantizer: Optional[
            object
        ] = None,  # pylint: disable=unused-argument # the call is that of `Launch`
        out: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        autotune: Optional[bool] = None,  # pylint: disable=unused-argument
    ) -> torch.Tensor:
        """Multiplies; returns `out` or a new tensor."""
        shape = (*self.batch_shape, self.readings[0].codes.rows, self.readings[1].codes.rows)
        if out is None:
            out = torch.empty(shape, dtype=self.out_dtype, device=a.device)
        # The kernel writes the product, or adds it to FP32; other factors are applied to an FP32 product.
        is_sum = beta == 1.0 and out.dtype == torch.float32
        is_direct = alpha == 1.0 and (beta == 0.0 or is_sum) and out.stride(-1) == 1
        target = out
        if not is_direct:
            dtype = self.out_dtype if alpha == 1.0 and beta == 0.0 else torch.float32
            target = torch.empty(shape, dtype=dtype, device=a.device)
        self._multiply((a, b), (scale_inv_a, scale_inv_b), target, is_direct and is_sum)
        if not is_direct:
            if alpha != 1.0:
                target.mul_(alpha)
            if beta != 0.0:
                target.add_(out, alpha=beta)
            out.copy_(target)
        if bias is not None or self.gelu:
            apply_epilogue(out, bias, self.gelu)
        return out

    def _multiply(
        self,
        codes: tuple[torch.Tensor, torch.Tensor],
        scales: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        accumulate: bool,
    ) -> None:
        steps = self.steps.get(out.stride())
        if steps is None:
            steps = self.steps[out.stride()] = self._plan_steps(tuple(out.shape), out.stride())
        codes = [
            x if reading.copy_codes is None else reading.copy_codes(x)
            for x, reading in zip(codes, self.readings)
        ]
        scales = [
            x if reading.copy_scales is None else reading.copy_scales(x)
            for x, reading in zip(scales, self.readings)
        ]
        for matrices, first_scales, scale_strides in steps:
            blockwise_gemm.multiply_blockwise(
                matrices[0].of(codes[0]),
                matrices[1].of(codes[1]),
                *(
                    blockwise_gemm.BlockScales(view.of(x) if view.offset else x, *strides)
                    for x, view, strides in zip(scales, first_scales, scale_strides)
                ),
                matrices[2].of(out),
                accumulate=accumulate,
                num_sms=self.num_sms,
                formats=self.formats,
            )

    def _plan_steps(
        self, out_shape: tuple[int, ...], out_strides: tuple[int, ...]
    ) -> tuple[Step, ...]:
        """Strided batches that cover the product."""
        operands = [reading.codes.expand(self.batch_shape) for reading in self.readings]
        operands.append(Operand.from_strides(out_shape, out_strides))
        batch = fold_batch(
            self.batch_shape,
            *(operand.batch_strides for operand in operands),
            *(reading.scales.expand(self.batch_shape) for reading in self.readings),
        )
        scale_strides = tuple(
            # The kernel counts the rows of an item, not its elements.
            (
                view.granularity,
                view.row_stride,
                view.k_stride,
                step // view.row_stride * view.granularity,
            )
            for view, step in zip((x.scales for x in self.readings), batch.strides[3:])
        )
        return tuple(
            Step(
                tuple(
                    View((batch.size, x.rows, x.cols), (step, x.row_stride, 1), offset)
                    for x, step, offset in zip(operands, batch.strides, offsets)
                ),
                tuple(View((1,), (1,), offset) for offset in offsets[3:]),
                scale_strides,
            )
            for offsets in batch.offsets
        )


def _read(side: BlockOperand, data: torch.Tensor) -> Reading:
    """Of an operand whose blocks are its own: codes as they lie, or copied to aligned rows."""
    operand, scales = side.codes, side.scales
    shape = (*operand.batch_shape, operand.rows, operand.cols)
    strides = (*operand.batch_strides, operand.row_stride, operand.col_stride)
    if is_aligned(data.as_strided(shape, strides, data.storage_offset())):
        return Reading(operand, None, scales, scales.relayout)

    def copy(codes: torch.Tensor) -> torch.Tensor:
        return align_codes(codes.as_strided(shape, strides, codes.storage_offset()))

    pitch = contiguous_strides((*shape[:-1], round_up(shape[-1], 16)))
    return Reading(Operand.from_strides(shape, pitch), copy, scales, scales.relayout)


def _read_packed(
    side: BlockOperand, index: int, segments: Segments, batch_shape: tuple[int, ...]
) -> Reading:
    """Of an operand that is packed into segments."""
    size = segments.columns.shape[1]
    rows, granularity = side.codes.rows, side.scales.granularity
    shape = (*batch_shape, rows, size)
    scale_shape = (*batch_shape, -(-rows // granularity), segments.blocks[index].shape[1])
    *steps, row_stride, k_stride = contiguous_strides(scale_shape)
    return Reading(
        Operand.from_strides(shape, contiguous_strides(shape)),
        lambda codes: segments.pack_codes(codes, side.codes, batch_shape),
        ScaleView(batch_shape, tuple(steps), granularity, row_stride, k_stride),
        lambda scale_inv: segments.pack_scales(scale_inv, side, index, batch_shape).contiguous(),
    )
