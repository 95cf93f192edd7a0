# SPDX-License-Identifier: Apache-2.0
"""Operands with 128-block scales for tests on any device: values, TE's tensors, plain tensors, exact products."""

from __future__ import annotations

import torch
import transformer_engine.pytorch as te
from accuracy import TE_DTYPES, exact_product, operand_shape, random_values

import transformer_engine_batched as teb


def special_matrix(dtype, shape=(2, 260, 300)):
    """Blocks of zeros, of NaN alone, with a NaN, with an infinity, of subnormals, of wide range."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2(torch.randint(-20, 15, (*shape[:-1], 1), generator=generator))
    x[0, :128, :128] = 0.0
    x[0, 128:256, :128] = float("nan")
    x[0, 130, 200] = float("nan")
    x[0, 200, 140] = float("inf")
    x[0, 201, 141] = -float("inf")
    x[1, :128, 128:256] = 1e-40
    x[1, 128:, 256:] *= 1e-30
    x[1, 5, 5] = -0.0
    return x.to(dtype)


def bits(x):
    return x.contiguous().view(torch.int32)


def make_block_quantizer(dim, fp8="e4m3", **options):
    return te.Float8BlockQuantizer(
        TE_DTYPES[fp8], rowwise=True, columnwise=True, block_scaling_dim=dim, **options
    )


def numbers(x, last_dim):
    """FP64 values of TE's copy that a product along the last dim, or the one before it, reads."""
    data, scale = x._rowwise_data, x._rowwise_scale_inv
    if not last_dim:
        data, scale = x._columnwise_data, x._columnwise_scale_inv
    fp8 = torch.float8_e4m3fn if x._fp8_dtype == te.DType.kFloat8E4M3 else torch.float8_e5m2
    rows = data.shape[0] if not last_dim else data.numel() // data.shape[-1]
    values = data.reshape(rows, -1).view(fp8).double()
    if not x._is_2D_scaled:
        scale = scale.t()
    else:
        scale = scale.repeat_interleave(128, 0)
    factors = scale[:rows].repeat_interleave(128, 1)[:, : values.shape[1]]
    values = (values * factors.double()).view(data.shape)
    return values if last_dim else values.movedim(0, -1)


def make_block_operand(shape, dim, last_dim, seed, fp8="e4m3", device="cpu", **options):
    """A quantized operand whose items and blocks have magnitudes of their own."""
    values = random_values(shape, seed)
    values = values * torch.exp2((torch.arange(values.numel()) // 61 % 9 - 4).view(shape))
    with teb.emulate("reference"):
        tensor = teb.quantize(values.to(device), make_block_quantizer(dim, fp8, **options))
    return tensor, numbers(tensor, last_dim)


def make_block_sides(
    layout, m, n, k, dims=(1, 1), batch_a=(3,), batch_b=None, fp8=("e4m3", "e4m3"), **options
):
    batches = batch_a, batch_a if batch_b is None else batch_b
    sides = []
    for index, name in enumerate("AB"):
        shape = operand_shape(layout, name, m, n, k, batches[index])
        last_dim = layout[index] == ("T" if index == 0 else "N")
        sides.append(
            make_block_operand(shape, dims[index], last_dim, 7 + index, fp8[index], **options)
        )
    (a, a64), (b, b64) = sides
    return a, b, exact_product(layout, a64, b64)


def cast(values, granularity, **options):
    """Codes, scales, and the numbers that they stand for in FP64."""
    function = teb.per_token_cast_to_fp8 if granularity == 1 else teb.per_block_cast_to_fp8
    codes, scale_inv = function(values, **options)
    factors = scale_inv.repeat_interleave(128, -1).repeat_interleave(granularity, -2)
    rows, size = values.shape[-2:]
    return codes, scale_inv, codes.double() * factors[..., :rows, :size].double()


def make_masked(num_items, m, n, k, granularity=(1, 128, 128), seed=0, device="cpu", **options):
    """Operands with a magnitude for each item, and the exact product."""
    sizes = torch.arange(1, num_items + 1)[:, None, None].float()
    a, b = (random_values((num_items, rows, k), seed + rows) * sizes for rows in (m, n))
    a, a_scale, a64 = cast(a.to(device), granularity[0], **options)
    b, b_scale, b64 = cast(b.to(device), granularity[1], **options)
    return (a, b, a_scale, b_scale), a64 @ b64.mT
