# SPDX-License-Identifier: Apache-2.0
"""Bytes of a product with 128-block scales before it is run, from the layouts that allocate them.

Input: sizes. Output: a record of bytes. Must not allocate.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Optional

import torch

from .kernels.block_layout import Layout, lay_out

_OPERATIONS = {"gemm": torch.bfloat16, "weight_gradient": torch.float32}
_GRANULARITIES = ((1, 128, 128), (1, 1, 128), (128, 128, 128))
# torch's caching allocator hands out multiples of this: c10/cuda/CUDACachingAllocator, kMinBlockSize.
_ALLOCATION_BYTES = 512


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device.

    Parameters
    ----------
    codes, scales : int
        Of both operands.
    output : int
    workspace : int
        What the product allocates beside its operands and output.
    total : int
        The sum, each buffer rounded up as torch's allocator does.
    high_precision : int
        The same operands in BF16, and the output.
    """

    codes: int
    scales: int
    output: int
    workspace: int
    total: int
    high_precision: int

    def __str__(self) -> str:
        saved = 100.0 * (1.0 - self.total / self.high_precision) if self.high_precision else 0.0
        parts = (
            f"{name} {getattr(self, name) / 2**20:.1f} MiB"
            for name in ("codes", "scales", "output", "workspace", "total")
        )
        return ", ".join(parts) + f" ({saved:.0f} % less than with BF16 operands)"


def estimate_memory(
    shape: tuple[int, int, int],
    operation: str = "gemm",
    *,
    batch: int = 1,
    scale_granularity_mnk: Optional[tuple[int, int, int]] = None,
    out_dtype: Optional[torch.dtype] = None,
    with_transpose: bool = False,
) -> MemoryEstimate:
    """Bytes of operands, scales, output and workspace of `batch` products of ``[M, K]`` and ``[N, K]``.

    Parameters
    ----------
    shape : tuple of int
        ``(M, N, K)``.
    operation : {"gemm", "weight_gradient"}
        What defaults are for: a BF16 output and 128 x 128 blocks of the second operand, or an FP32 output and
        1 x 128 blocks of both.
    batch : int, default = 1
        Products.
    scale_granularity_mnk : tuple of int, optional
        As for `batched_gemm_fp8_nt_groupwise`.
    out_dtype : torch.dtype, optional
        float32, float16 or bfloat16.
    with_transpose : bool, default = False
        Both operands with the codes and scales of their transposes, too, as training keeps them.

    Returns
    -------
    MemoryEstimate
        For operands made by `per_token_cast_to_fp8` and `per_block_cast_to_fp8`. The kernel needs no workspace;
        operands that are not aligned are copied, which is not counted.

    Examples
    --------
    >>> import transformer_engine_batched as teb
    >>> print(teb.estimate_memory((1024, 2048, 4096)))
    codes 12.0 MiB, scales 0.1 MiB, output 4.0 MiB, workspace 0.0 MiB, total 16.1 MiB (42 % less than with BF16 operands)
    """
    if operation not in _OPERATIONS:
        raise ValueError(f"operation={operation!r}: expected one of {tuple(_OPERATIONS)}")
    sizes = (batch, *shape)
    if len(sizes) != 4 or not all(isinstance(x, int) and x >= 0 for x in sizes):
        raise ValueError(f"shape={shape}, batch={batch}: expected counts (M, N, K) and of items")
    granularity = scale_granularity_mnk or ((1, 128, 128) if operation == "gemm" else (1, 1, 128))
    if tuple(granularity) not in _GRANULARITIES:
        raise ValueError(f"scale_granularity_mnk={granularity}: expected one of {_GRANULARITIES}")
    m, n, k = shape
    layouts: list[Layout] = []
    for rows, per_scale in ((m, granularity[0]), (n, granularity[1])):
        square = per_scale != 1
        layouts.append(lay_out([batch], rows, k, square, False))
        if with_transpose:
            layouts.append(lay_out([batch], k, rows, square, False))
    dtype = out_dtype or _OPERATIONS[operation]
    codes = [prod(layout.codes_shape) for layout in layouts]
    scales = [4 * prod(layout.scale_shape) for layout in layouts]
    output = batch * m * n * dtype.itemsize
    total = sum(-(-x // _ALLOCATION_BYTES) * _ALLOCATION_BYTES for x in (*codes, *scales, output))
    return MemoryEstimate(
        codes=sum(codes),
        scales=sum(scales),
        output=output,
        workspace=0,
        total=total,
        high_precision=2 * batch * (m + n) * k + output,
    )
