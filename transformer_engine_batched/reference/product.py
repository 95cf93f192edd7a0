# SPDX-License-Identifier: Apache-2.0
"""The reference engine: a `Problem` in exact arithmetic on any device.

Reads the very buffers and strides that the hardware would read, so that a wrong stride, leading dimension
or scale tile gives a wrong number here, too. Sums are in FP64; the result is rounded to FP32 and from there
to the output type, as a tensor core's FP32 result would be. Slow and obvious on purpose. Imports torch, the
problem, the codes and the tile formula; nothing that plans.
"""

from __future__ import annotations

from typing import Optional

import torch

from ..block_scales import gather_packed, packed_scale_size
from ..problem import Matrix, Problem
from . import codes

TORCH_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}

_BLOCK = 32
# FP64 copies of a slice of the batch are made; this bounds each to 512 MiB.
_MAX_ELEMENTS = 2**26


class ReferencePlan:
    """Runs one problem with torch in FP64. Same call as `plan.CublasLtPlan`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def run(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        d: torch.Tensor,
        offsets: tuple[int, int, int, int] = (0, 0, 0, 0),
        scale_inv_a: Optional[torch.Tensor] = None,
        scale_inv_b: Optional[torch.Tensor] = None,
        scale_d: Optional[torch.Tensor] = None,
        amax_d: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        autotune: Optional[bool] = None,  # pylint: disable=unused-argument # nothing to choose
    ) -> None:
        """Computes into `d`; arguments as `CublasLtPlan.run`."""
        p = self.problem
        a_view = _strided(a, p.a, p.batch, p.m, p.k, offsets[0])
        b_view = _strided(b, p.b, p.batch, p.k, p.n, offsets[1])
        d_view = _strided(d, p.d, p.batch, p.m, p.n, offsets[2])
        factors_a = _block_factors(p.a, scale_inv_a, p.batch, p.m, p.k)
        factors_b = _block_factors(p.b, scale_inv_b, p.batch, p.n, p.k)
        bias_view = None
        if bias is not None:
            shape, strides = (p.batch, 1, p.n), (p.bias_batch_stride, 0, 1)
            bias_view = bias.as_strided(shape, strides, bias.storage_offset() + offsets[3])
        largest = torch.zeros((), dtype=torch.float64, device=d.device)
        step = max(1, _MAX_ELEMENTS // max(p.m * p.k, p.k * p.n, p.m * p.n))
        for start in range(0, p.batch, step):
            items = slice(start, min(start + step, p.batch))
            left = _decode(a_view[items], p.a, scale_inv_a)
            right = _decode(b_view[items], p.b, scale_inv_b)
            if factors_a is not None:
                left = left * factors_a[items]
                right = right * factors_b[items].mT
            result = alpha * (left @ right)
            if p.accumulate:
                result += beta * d_view[items].double()
            if bias_view is not None:
                result += bias_view[items].double()
            if p.epilogue in ("gelu", "gelu_bias"):
                result = torch.nn.functional.gelu(result, approximate="tanh")
            if p.amax_d:
                largest = torch.maximum(largest, result.abs().max())
            _store(result, d_view[items], p.d, scale_d)
        if p.amax_d:
            amax_d.copy_(largest.reshape(amax_d.shape))


def _strided(
    x: torch.Tensor, matrix: Matrix, batch: int, rows: int, cols: int, offset: int
) -> torch.Tensor:
    return x.as_strided((batch, rows, cols), matrix.strides(), x.storage_offset() + offset)


def _decode(x: torch.Tensor, matrix: Matrix, scale_inv: Optional[torch.Tensor]) -> torch.Tensor:
    if matrix.scale_mode == "none":
        return x.double()
    values = codes.decode(x, TORCH_DTYPES[matrix.dtype], torch.float64)
    return values * scale_inv.double() if matrix.scale_mode == "tensor" else values


def _block_factors(
    matrix: Matrix, packed: Optional[torch.Tensor], batch: int, outer: int, k: int
) -> Optional[torch.Tensor]:
    """Factors [batch, outer, k] of a block-scaled operand, read through the tile formula."""
    if matrix.scale_mode != "block32":
        return None
    inner = -(-k // _BLOCK)
    items = packed.as_strided(
        (batch, packed_scale_size(outer, inner)),
        (packed_scale_size(outer, inner), 1),
        packed.storage_offset(),
    )
    factors = codes.decode_e8m0(gather_packed(items, outer, inner), torch.float64)
    return factors.repeat_interleave(_BLOCK, dim=-1)[..., :k]


def _store(
    result: torch.Tensor, d: torch.Tensor, matrix: Matrix, scale_d: Optional[torch.Tensor]
) -> None:
    rounded = result.float()
    if matrix.scale_mode == "tensor":
        d.copy_(codes.encode(rounded * scale_d, TORCH_DTYPES[matrix.dtype]))
    else:
        d.copy_(rounded.to(d.dtype))
