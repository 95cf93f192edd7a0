# SPDX-License-Identifier: Apache-2.0
"""Backward of the triangle multiplicative update's input: the kernels of `triangle_backward.project_backward`.

Both compute the projections and gates of forward again, from x: `find_grad_z` for the gradient of z, and
`find_weight_gradients` for those of the weights, whose sums over all positions stay in registers. Both at once would
not fit there. Positions are those of `triangle_tiles.locate_padded`.
Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl

from . import triangle_tiles as tiles
from .triangle_output_gradients import Band, count_programs, describe_tiles
from .triangle_tiles import (
    GatedProjection,
    Norm,
    add_bias,
    dot,
    find_moments,
    load_pairs,
    load_rows,
    locate_padded,
    no_sums,
    normalize,
    pair_rows,
    scale_channels,
    sigmoid,
    split_rows,
)


class Tile(NamedTuple):
    """What one program holds: positions, channels at a time, warps; how it waits for what it reads."""

    positions: int
    channels: int
    num_warps: int
    programs_per_multiprocessor: int
    num_stages: int


@lru_cache(maxsize=256)
def choose_grad_z_tile(dim: int, hidden: int, dtype: torch.dtype) -> Tile:
    """Tile of `find_grad_z`."""
    if dtype == torch.float32:
        return Tile(16, tiles.largest_chunk(hidden, 32), 4, 2, 1)
    if dim <= 128:
        return Tile(64, tiles.largest_chunk(hidden, 64), 4, 2, 2)
    return Tile(32, tiles.largest_chunk(hidden, 32), 8, 1, 1)


@lru_cache(maxsize=256)
def choose_weights_tile(dim: int, hidden: int, dtype: torch.dtype) -> Tile:
    """Tile of `find_weight_gradients`."""
    if dtype == torch.float32:
        return Tile(16, tiles.largest_chunk(hidden, 32), 4, 2, 1)
    return Tile(64 if dim <= 128 else 32, tiles.largest_chunk(hidden, 64), 8, 2, 1)


def normalize_rows(z: torch.Tensor, norm: Norm, x: torch.Tensor) -> None:
    """Writes ``x = LN(z)``, ``[rows, Q, D]``."""
    size, dim = z.shape[2:]
    pitch = x.shape[1]
    positions = 32
    num_positions = x.shape[0] * pitch
    band = Band(0, x.shape[0])
    constants = (
        size, pitch, num_positions, float(norm.eps), dim, tiles.largest_chunk(dim, 128), positions,
        *describe_tiles(size, pitch, band, positions),
    )  # fmt: skip
    pointers = (z, norm.weight, norm.bias, x)
    tiles.launch(_normalize_kernel, triton.cdiv(num_positions, positions), 4, pointers, constants)


def find_grad_z(
    grads: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    z: torch.Tensor,
    norm: Norm,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
    gate: tuple[Optional[torch.Tensor], Optional[torch.Tensor]],
    grad_z: torch.Tensor,
) -> torch.Tensor:
    """Writes grad_z; returns sums of the gradients of the weight and bias of LN_in.

    `gate`: ``[D, rows Q]`` gradient of the output gate before its sigmoid, and its weight ``[D, D]``.
    """
    size, dim = z.shape[2:]
    rows, pitch, _ = x.shape
    hidden = projection.weight_p.shape[0] // 2
    dtype = projection.weight_p.dtype
    tile = choose_grad_z_tile(dim, hidden, dtype)
    num_programs, num_tiles = count_programs(z, tile, rows * pitch)
    sums = torch.empty((num_programs, 2 * dim), dtype=torch.float32, device=z.device)
    constants = (
        size, pitch, rows * pitch, num_tiles, *grads[0].stride()[:3], *grads[1].stride()[:3],
        float(norm.eps), dim, hidden, tiles.largest_chunk(dim, 128), tile.positions, tile.channels,
        tiles.largest_chunk(dim, 64), *describe_tiles(size, pitch, Band(0, rows), tile.positions),
        tile.num_stages, tiles.dot_precision(dtype),
    )  # fmt: skip
    pointers = (*grads, x, z, mask, norm.weight, *projection, *gate, grad_z, sums)
    tiles.launch(
        _grad_z_kernel, num_programs, tile.num_warps, pointers, constants, tile.programs_per_multiprocessor
    )  # fmt: skip
    return sums


def find_weight_gradients(
    grads: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    z: torch.Tensor,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
) -> torch.Tensor:
    """Partial sums ``[shares, n]`` of the gradients of Wp, bp, Wg and bg, one behind the other."""
    size, dim = z.shape[2:]
    num_rows, pitch, _ = x.shape
    rows = projection.weight_p.shape[0]
    dtype = projection.weight_p.dtype
    tile = choose_weights_tile(dim, rows // 2, dtype)
    chunk = tiles.largest_chunk(dim, 128)
    num_tiles = triton.cdiv(num_rows * pitch, tile.positions)
    num_blocks = rows // tile.channels * (dim // chunk)
    multiprocessors = tiles.num_multiprocessors(z.get_device())
    wanted = tile.programs_per_multiprocessor * multiprocessors // num_blocks
    num_shares = max(1, min(wanted, num_tiles))
    sums = torch.empty((num_shares, 2 * rows * (dim + 1)), dtype=torch.float32, device=z.device)
    constants = (
        size, pitch, num_rows * pitch, num_tiles, *grads[0].stride()[:3], *grads[1].stride()[:3],
        dim, rows // 2, chunk, tile.positions, tile.channels,
        *describe_tiles(size, pitch, Band(0, num_rows), tile.positions), tile.num_stages,
        tiles.dot_precision(dtype),
    )  # fmt: skip
    pointers = (*grads, x, mask, *projection, sums)
    num_programs = num_blocks * num_shares
    tiles.launch(
        _weights_kernel, num_programs, tile.num_warps, pointers, constants, tile.programs_per_multiprocessor
    )  # fmt: skip
    return sums


@triton.jit
def _normalize_kernel(
    z_ptr,
    weight_ptr,
    bias_ptr,
    x_ptr,
    size,
    pitch,
    num_positions,
    eps,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    POSITIONS: tl.constexpr,
    SMALL: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
):
    NUM: tl.constexpr = DIM // CHUNK
    first = tl.program_id(0).to(tl.int64) * POSITIONS
    order = tl.arange(0, POSITIONS)
    item, row, col = locate_padded(first, order, pitch, size, SMALL, ALIGNED)
    exists = first + order < num_positions
    inside = (col < size) & exists
    offsets = ((item * size + row) * size + col) * DIM
    chunks = load_rows(z_ptr, offsets, inside, DIM, CHUNK, EVEN)
    mean, rstd = find_moments(chunks, eps, 1, DIM, NUM)
    xs = normalize(
        chunks, mean, rstd, weight_ptr, bias_ptr, 1, CHUNK, NUM, x_ptr.dtype.element_ty
    )  # fmt: skip
    for index in tl.static_range(NUM):
        channels = index * CHUNK + tl.arange(0, CHUNK)
        pointers = x_ptr + ((first + order) * DIM)[:, None] + channels[None, :]
        tl.store(pointers, xs[index], mask=exists[:, None])


@triton.jit
def _grad_z_kernel(
    grad_a_ptr,
    grad_b_ptr,
    x_ptr,
    z_ptr,
    mask_ptr,
    norm_weight_ptr,
    p_weight_ptr,
    p_bias_ptr,
    g_weight_ptr,
    g_bias_ptr,
    gate_ptr,
    gate_weight_ptr,
    grad_z_ptr,
    sums_ptr,
    size,
    pitch,
    num_positions,
    num_tiles,
    a_batch_stride,
    a_channel_stride,
    a_row_stride,
    b_batch_stride,
    b_channel_stride,
    b_row_stride,
    eps,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GATE_CHANNELS: tl.constexpr,
    SMALL: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every so many tiles of grad_z, and the sums over positions for LN_in."""
    NUM: tl.constexpr = DIM // CHUNK
    dtype = p_weight_ptr.dtype.element_ty
    order = tl.arange(0, POSITIONS)
    weight_sums = no_sums(DIM, CHUNK)
    bias_sums = no_sums(DIM, CHUNK)

    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1):
        first_position = tile * tl.full((), POSITIONS, tl.int64)
        positions = first_position + order
        item, row, col = locate_padded(first_position, order, pitch, size, SMALL, ALIGNED)
        exists = positions < num_positions
        inside = (col < size) & exists
        xs = load_rows(x_ptr, positions * DIM, exists, DIM, CHUNK, EVEN)
        offsets = ((item * size + row) * size + col).to(tl.int64)
        if mask_ptr is not None:
            factor = tl.load(mask_ptr + offsets, mask=inside, other=0).to(tl.float32)
        a_offsets = item.to(tl.int64) * a_batch_stride + row.to(tl.int64) * a_row_stride + col
        b_offsets = item.to(tl.int64) * b_batch_stride + row.to(tl.int64) * b_row_stride + col
        grad_xs = ()
        for _ in tl.static_range(NUM):
            grad_xs = grad_xs + (tl.zeros((CHUNK, POSITIONS), tl.float32),)
        for block in tl.range(0, 2 * HIDDEN // CHANNELS, num_stages=STAGES):
            first = block * CHANNELS
            weights = load_pairs(p_weight_ptr, g_weight_ptr, first, CHANNELS, DIM, CHUNK)
            both = tl.zeros((2 * CHANNELS, POSITIONS), tl.float32)
            for index in tl.static_range(NUM):
                both = dot(weights[index], tl.trans(xs[index]), both, PRECISION)
            p, g = split_rows(both, CHANNELS, POSITIONS)
            is_a = first < HIDDEN
            channels = (first % HIDDEN + tl.arange(0, CHANNELS)).to(tl.int64)
            channels *= tl.where(is_a, a_channel_stride, b_channel_stride)
            pointers = tl.where(is_a, grad_a_ptr, grad_b_ptr) + channels[:, None]
            pointers += tl.where(is_a, a_offsets, b_offsets)[None, :]
            if EVEN:
                grad = tl.load(pointers).to(tl.float32)
            else:
                grad = tl.load(pointers, mask=inside[None, :], other=0.0).to(tl.float32)
            p = add_bias(p, p_bias_ptr, first, CHANNELS, 0)
            gate = sigmoid(add_bias(g, g_bias_ptr, first, CHANNELS, 0))
            if mask_ptr is not None:
                grad *= factor[None, :]
            grad *= gate
            grad_g = (grad * p * (1.0 - gate)).to(dtype)
            grads = pair_rows(grad.to(dtype), grad_g, CHANNELS, POSITIONS)
            new_xs = ()
            for index in tl.static_range(NUM):
                product = dot(tl.trans(weights[index]), grads, grad_xs[index], PRECISION)
                new_xs = new_xs + (product,)
            grad_xs = new_xs
        if gate_ptr is not None:
            for block in tl.range(0, DIM // GATE_CHANNELS, num_stages=STAGES):
                channels = block * GATE_CHANNELS + tl.arange(0, GATE_CHANNELS)
                pointers = gate_ptr + channels.to(tl.int64)[:, None] * num_positions
                pointers += positions[None, :]
                if EVEN:
                    grad = tl.load(pointers)
                else:
                    grad = tl.load(pointers, mask=exists[None, :], other=0.0)
                new_xs = ()
                for index in tl.static_range(NUM):
                    cols = index * CHUNK + tl.arange(0, CHUNK)
                    weight = tl.load(gate_weight_ptr + channels[:, None] * DIM + cols[None, :])
                    product = dot(tl.trans(weight), grad, grad_xs[index], PRECISION)
                    new_xs = new_xs + (product,)
                grad_xs = new_xs

        # Backward of LN_in, over the rows of [channels, positions].
        chunks = load_rows(z_ptr, offsets * DIM, inside, DIM, CHUNK, EVEN)
        mean, rstd = find_moments(chunks, eps, 1, DIM, NUM)
        sum_1 = tl.zeros((POSITIONS,), tl.float32)
        sum_2 = tl.zeros((POSITIONS,), tl.float32)
        new_xs = ()
        new_weight_sums = ()
        new_bias_sums = ()
        for index in tl.static_range(NUM):
            grad = grad_xs[index]
            hat = (tl.trans(chunks[index]).to(tl.float32) - mean[None, :]) * rstd[None, :]
            new_weight_sums = new_weight_sums + (weight_sums[index] + tl.sum(grad * hat, axis=1),)
            new_bias_sums = new_bias_sums + (bias_sums[index] + tl.sum(grad, axis=1),)
            grad = scale_channels(grad, norm_weight_ptr, index * CHUNK, CHUNK, 0)
            new_xs = new_xs + (grad,)
            sum_1 += tl.sum(grad, axis=0)
            sum_2 += tl.sum(grad * hat, axis=0)
        weight_sums = new_weight_sums
        bias_sums = new_bias_sums
        sum_1 *= 1.0 / DIM
        sum_2 *= 1.0 / DIM
        for index in tl.static_range(NUM):
            channels = index * CHUNK + tl.arange(0, CHUNK)
            hat = (tl.trans(chunks[index]).to(tl.float32) - mean[None, :]) * rstd[None, :]
            values = (new_xs[index] - sum_1[None, :] - hat * sum_2[None, :]) * rstd[None, :]
            values = tl.trans(values.to(grad_z_ptr.dtype.element_ty))
            pointers = grad_z_ptr + (offsets * DIM)[:, None] + channels[None, :]
            if EVEN:
                tl.store(pointers, values)
            else:
                tl.store(pointers, values, mask=inside[:, None])

    sums_ptr += tl.program_id(0) * 2 * DIM
    for index in tl.static_range(NUM):
        channels = index * CHUNK + tl.arange(0, CHUNK)
        tl.store(sums_ptr + channels, weight_sums[index])
        tl.store(sums_ptr + DIM + channels, bias_sums[index])


@triton.jit
def _weights_kernel(
    grad_a_ptr,
    grad_b_ptr,
    x_ptr,
    mask_ptr,
    p_weight_ptr,
    p_bias_ptr,
    g_weight_ptr,
    g_bias_ptr,
    sums_ptr,
    size,
    pitch,
    num_positions,
    num_tiles,
    a_batch_stride,
    a_channel_stride,
    a_row_stride,
    b_batch_stride,
    b_channel_stride,
    b_row_stride,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SMALL: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program adds every so many tiles to `CHANNELS` rows of both weights' gradients, one chunk of columns."""
    NUM: tl.constexpr = DIM // CHUNK
    BLOCKS: tl.constexpr = 2 * HIDDEN // CHANNELS * NUM
    dtype = p_weight_ptr.dtype.element_ty
    # Neighbours make other blocks from the same positions.
    block = tl.program_id(0) % BLOCKS
    share = tl.program_id(0) // BLOCKS
    num_shares = tl.num_programs(0) // BLOCKS
    chunk = block % NUM
    first = block // NUM * CHANNELS
    is_b = first >= HIDDEN
    order = tl.arange(0, POSITIONS)
    weights = load_pairs(p_weight_ptr, g_weight_ptr, first, CHANNELS, DIM, CHUNK)
    batch_stride = tl.where(is_b, b_batch_stride, a_batch_stride).to(tl.int64)
    channel_stride = tl.where(is_b, b_channel_stride, a_channel_stride).to(tl.int64)
    row_stride = tl.where(is_b, b_row_stride, a_row_stride).to(tl.int64)
    grad_ptr = tl.where(is_b, grad_b_ptr, grad_a_ptr) + (first % HIDDEN) * channel_stride
    total = tl.zeros((2 * CHANNELS, CHUNK), tl.float32)
    p_bias_sum = tl.zeros((CHANNELS,), tl.float32)
    g_bias_sum = tl.zeros((CHANNELS,), tl.float32)

    for tile in tl.range(share, num_tiles, num_shares, num_stages=STAGES):
        first_position = tile * tl.full((), POSITIONS, tl.int64)
        positions = first_position + order
        item, row, col = locate_padded(first_position, order, pitch, size, SMALL, ALIGNED)
        exists = positions < num_positions
        inside = (col < size) & exists
        xs = load_rows(x_ptr, positions * DIM, exists, DIM, CHUNK, EVEN)
        both = tl.zeros((2 * CHANNELS, POSITIONS), tl.float32)
        for index in tl.static_range(NUM):
            both = dot(weights[index], tl.trans(xs[index]), both, PRECISION)
        p, g = split_rows(both, CHANNELS, POSITIONS)
        channels = tl.arange(0, CHANNELS) * channel_stride
        offsets = item.to(tl.int64) * batch_stride + row.to(tl.int64) * row_stride + col
        pointers = grad_ptr + channels[:, None] + offsets[None, :]
        if EVEN:
            grad = tl.load(pointers).to(tl.float32)
        else:
            grad = tl.load(pointers, mask=inside[None, :], other=0.0).to(tl.float32)
        p = add_bias(p, p_bias_ptr, first, CHANNELS, 0)
        gate = sigmoid(add_bias(g, g_bias_ptr, first, CHANNELS, 0))
        if mask_ptr is not None:
            offsets = (item * size + row) * size + col
            factor = tl.load(mask_ptr + offsets, mask=inside, other=0).to(tl.float32)
            grad *= factor[None, :]
        grad_p = grad * gate
        grad_g = grad_p * p * (1.0 - gate)
        if p_bias_ptr is not None:
            p_bias_sum += tl.sum(grad_p, axis=1)
        if g_bias_ptr is not None:
            g_bias_sum += tl.sum(grad_g, axis=1)
        grads = pair_rows(grad_p.to(dtype), grad_g.to(dtype), CHANNELS, POSITIONS)
        if NUM == 1:
            x = xs[0]
        else:
            columns = chunk * CHUNK + tl.arange(0, CHUNK)
            pointers = x_ptr + (positions * DIM)[:, None] + columns[None, :]
            x = tl.load(pointers, mask=exists[:, None], other=0.0)
        total = dot(grads, x, total, PRECISION)

    rows = 2 * HIDDEN
    sums_ptr += share.to(tl.int64) * (2 * rows * (DIM + 1))
    p_total, g_total = split_rows(total, CHANNELS, CHUNK)
    channels = first + tl.arange(0, CHANNELS)
    offsets = channels[:, None] * DIM + (chunk * CHUNK + tl.arange(0, CHUNK))[None, :]
    tl.store(sums_ptr + offsets, p_total)
    tl.store(sums_ptr + rows * (DIM + 1) + offsets, g_total)
    tl.store(sums_ptr + rows * DIM + channels, p_bias_sum)
    tl.store(sums_ptr + rows * (2 * DIM + 1) + channels, g_bias_sum)
