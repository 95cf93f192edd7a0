# SPDX-License-Identifier: Apache-2.0
"""Memory layouts of results: where the items of a product lie side by side, its result shall, too.

Must not know of quantization and products.
"""

from __future__ import annotations

from typing import Optional

import torch

Strides = tuple[int, ...]


def find_layout(x: torch.Tensor) -> Optional[Strides]:
    """Strides for a gradient of a channel-last operand; None for other operands, whose gradients are contiguous.

    Channel-last is an operand ``[*batch, rows, cols]`` that is contiguous along a batch dim, as the view
    ``[B, D, N, N]`` of ``[B, N, N, D]``. A contiguous gradient would make torch copy it, slowly, to where the
    operand was viewed from.

    Examples
    --------
    >>> x = torch.empty(2, 5, 7, 3)
    >>> find_layout(x.permute(0, 3, 1, 2)), find_layout(x)
    ((105, 1, 21, 3), None)
    """
    shape, strides = x.shape, x.stride()
    if 1 not in strides[:-2]:
        return None
    sizes = [size for size, stride in zip(shape, strides) if stride == 1]
    is_contiguous = any(n > 1 and s == 1 for n, s in zip(shape[-2:], strides[-2:]))
    if max(sizes) == 1 or is_contiguous or 0 in strides or x.numel() == 0:
        return None
    result = [0] * x.dim()
    step = 1
    for dim in sorted(range(x.dim()), key=lambda dim: (strides[dim], shape[dim] > 1)):
        result[dim] = step
        step *= shape[dim]
    return tuple(result)


def arrange(x: torch.Tensor, strides: Optional[Strides]) -> torch.Tensor:
    """`x` with these strides, of a dense tensor; with None contiguous. Not a copy if it has them already."""
    if strides is None:
        return x.contiguous()
    if x.stride() == strides:
        return x
    out = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    if x.is_cuda:
        from .kernels.permute import copy_permuted  # Triton takes a second to import

        return copy_permuted(x, out)
    return out.copy_(x)
