# SPDX-License-Identifier: Apache-2.0
"""FP8 operands with scales per 128-block in every layout, and exact products, for tests of the block-wise kernels.

Scales are drawn as one number per row and k-block (or block of rows), then laid out; exact numbers come from what
was drawn, not from the layout.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from accuracy import OUTPUT_BOUNDS_DB

from transformer_engine_batched.kernels.blockwise_gemm import BlockScales

# Of the CUDA kernel, for operands whose magnitudes do not differ along K: there `add_as_tensor_cores` leaves 78 dB, as measured
# on an H200. The rounding of an FP32 result, at 152 dB, does not show.
KERNEL_BOUNDS_DB = {**OUTPUT_BOUNDS_DB, torch.float32: 70.0}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Operand(NamedTuple):
    """Codes ``[B, rows, K]`` of an FP8 dtype, their scales, and the numbers that they stand for in FP64."""

    codes: torch.Tensor
    scales: BlockScales
    exact: torch.Tensor


def make_operand(
    num_items: int,
    rows: int,
    size_k: int,
    granularity: int,
    layout: str,
    seed: int,
    *,
    fp8: str = "e4m3",
    device: str = "cpu",
) -> Operand:
    """An operand of random codes of order 30 and scales between 1/64 and 1/16, no two alike.

    Parameters
    ----------
    layout : str
        "flat": rows of all items count on, as in TE: 1x128 ``[K / 128, round_up(B * rows, 4)]``, 128x128
        ``[B * rows / 128, round_up(K / 128, 4)]`` with blocks across items. "item": ``[B, rows, K / 128]`` or
        ``[B, ceil(rows / 128), K / 128]``. "shared": the scales of the first item, for all.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device) * 3 / 64 + 1 / 64

    # Rows of codes start at multiples of 16 bytes.
    padded_k = -(-size_k // 16) * 16
    values = torch.randn((num_items, rows, padded_k), generator=generator, device=device) * 30
    codes = values.to(FP8[fp8])[..., :size_k]
    blocks_k = -(-size_k // 128)
    if layout == "flat" and granularity == 1:
        padded = -(-num_items * rows // 4) * 4
        values = draw(blocks_k, padded)
        scales = BlockScales(values, 1, 1, padded, rows)
        factors = values[:, : num_items * rows].T.reshape(num_items, rows, blocks_k)
    elif layout == "flat":
        padded = -(-blocks_k // 4) * 4
        values = draw(-(-num_items * rows // 128), padded)
        scales = BlockScales(values, 128, padded, 1, rows)
        factors = values[:, :blocks_k].repeat_interleave(128, 0)[: num_items * rows]
        factors = factors.reshape(num_items, rows, blocks_k)
    else:
        row_blocks = -(-rows // granularity)
        num_scaled = 1 if layout == "shared" else num_items
        values = draw(num_scaled, row_blocks, blocks_k)
        counted = 0 if layout == "shared" else row_blocks * granularity
        scales = BlockScales(values, granularity, blocks_k, 1, counted)
        factors = values.repeat_interleave(granularity, 1)[:, :rows].expand(num_items, -1, -1)
    factors = factors.double().repeat_interleave(128, -1)[..., :size_k]
    return Operand(codes, scales, codes.double() * factors)


def add_as_tensor_cores(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.mT`` in FP64, but that sums of FP8 products over blocks of 128 along K are Hopper's.

    An instruction adds 32 products and the sum so far, each cut to 13 bits behind the leading one of the largest, and
    cuts the result likewise (DeepSeek-V3, arXiv 2412.19437, section 3.3.2, counts 14 bits in all). Operands are in FP64,
    codes times scales that are powers of two.
    """

    def cut(terms: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 14)
        return torch.trunc(terms / unit) * unit

    total = a.new_zeros(*a.shape[:-1], b.shape[-2])
    for block_a, block_b in zip(a.split(128, -1), b.split(128, -1)):
        sums = torch.zeros_like(total)
        for x, y in zip(block_a.split(32, -1), block_b.split(32, -1)):
            terms = torch.cat((x[..., :, None, :] * y[..., None, :, :], sums[..., None]), -1)
            sums = cut(terms, terms.abs().amax(-1, keepdim=True)).sum(-1)
            sums = cut(sums, sums.abs())
        total += sums
    return total


def poisoned_out(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    row_padding: int = 0,
    fill: Optional[float] = None,
) -> torch.Tensor:
    """An output of NaN, whose rows are `row_padding` elements apart."""
    value = float("nan") if fill is None else fill
    padded = (*shape[:-1], shape[-1] + row_padding)
    return torch.full(padded, value, dtype=dtype, device=device)[..., : shape[-1]]
