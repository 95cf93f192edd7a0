# SPDX-License-Identifier: Apache-2.0
"""Gradients of the triangle multiplicative update's weights and biases, for `triangle_backward`.

A program holds the gradients of some rows of both weights, ``dW = sum over positions of dy x^T``, and adds a share
of all positions to them; dy and x are computed again. Shares are summed by a second kernel in a fixed order, so
results do not change from run to run.
Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Optional

import torch
import triton
import triton.language as tl

from . import triangle_tiles as tiles
from .triangle_tiles import (
    GatedProjection,
    Norm,
    Tile,
    add_bias,
    dot,
    find_moments,
    load_channels,
    load_pairs,
    load_rows,
    load_weights,
    locate,
    normalize,
    pair_rows,
    sigmoid,
    split_rows,
)


@lru_cache(maxsize=256)
def choose_projection_tile(dim: int, hidden: int, dtype: torch.dtype) -> Tile:
    """Tile for the gradients of Wp and Wg."""
    if dtype == torch.float32:
        return Tile(16, tiles.largest_chunk(hidden, 32), 4, 2, 1)
    if dim == 128 and hidden % 64 == 0:
        return Tile(64, 64, 4, 2, 1)
    return Tile(64 if dim <= 128 else 32, tiles.largest_chunk(hidden, 64), 8, 1, 1)


@lru_cache(maxsize=256)
def choose_output_tile(dim: int, hidden: int, dtype: torch.dtype) -> Tile:
    """Tile for the gradients of Wo and Wgo."""
    if dtype == torch.float32:
        return Tile(16, tiles.largest_chunk(dim, 32), 4, 2, 1)
    if dim == hidden == 128:
        return Tile(64, 128, 8, 1, 1)
    return Tile(64 if max(dim, hidden) <= 128 else 32, tiles.largest_chunk(dim, 64), 4, 2, 1)


def find_projection_gradients(
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    z: torch.Tensor,
    norm: Norm,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
) -> GatedProjection:
    """Gradients of Wp, bp, Wg, bg; arguments as `triangle_backward.project_backward` has checked them."""
    batch, size, _, dim = z.shape
    rows = 2 * grad_a.shape[1]
    dtype = projection.weight_p.dtype
    tile = choose_projection_tile(dim, rows // 2, dtype)
    chunk = tiles.largest_chunk(dim, 128)
    pitch = tiles.pad(size)
    num_tiles = batch * triton.cdiv(size * pitch, tile.positions)
    num_blocks = rows // tile.channels * (dim // chunk)
    num_shares = _count_shares(z, tile, num_blocks, num_tiles)
    sums = torch.zeros((num_shares, 2 * rows * (dim + 1)), device=z.device)
    if z.numel():
        constants = (
            size, pitch, num_tiles, *grad_a.stride()[:3], *grad_b.stride()[:3], float(norm.eps), dim,
            rows // 2, chunk, tile.positions, tile.channels, pitch < tile.positions,
            size == pitch and size * pitch % tile.positions == 0, tile.num_stages,
            tiles.dot_precision(dtype),
        )  # fmt: skip
        pointers = (grad_a, grad_b, z, mask, norm.weight, norm.bias, *projection, sums)
        num_programs = num_blocks * num_shares
        tiles.launch_tile(_projection_kernel, num_programs, tile, pointers, constants)
    return GatedProjection(
        *tiles.cast_sums(sums, tuple(projection), ((rows, dim), (rows,), (rows, dim), (rows,)))
    )


def find_output_gradients(
    grad_out: torch.Tensor,
    c: torch.Tensor,
    z: torch.Tensor,
    norm_in: Norm,
    norm_out: Norm,
    output: GatedProjection,
) -> GatedProjection:
    """Gradients of Wo, bo, Wgo, bgo; arguments as `triangle_backward.output_backward` has checked them."""
    batch, size, _, dim = z.shape
    hidden = c.shape[1]
    dtype = output.weight_p.dtype
    tile = choose_output_tile(dim, hidden, dtype)
    dim_chunk, hidden_chunk = (tiles.largest_chunk(n, 128) for n in (dim, hidden))
    pitch = tiles.pad(size)
    num_tiles = batch * triton.cdiv(size * pitch, tile.positions)
    num_blocks = dim // tile.channels * max(dim // dim_chunk, hidden // hidden_chunk)
    num_shares = _count_shares(z, tile, num_blocks, num_tiles)
    sums = torch.zeros((num_shares, dim * (dim + hidden + 2)), device=z.device)
    if z.numel():
        constants = (
            size, pitch, num_tiles, *c.stride()[:3], float(norm_in.eps), float(norm_out.eps), dim,
            hidden, dim_chunk, hidden_chunk, tile.positions, tile.channels, pitch < tile.positions,
            size == pitch and size * pitch % tile.positions == 0, tile.num_stages,
            tiles.dot_precision(dtype),
        )  # fmt: skip
        pointers = (
            grad_out, c, z, norm_in.weight, norm_in.bias, norm_out.weight, norm_out.bias, *output, sums
        )  # fmt: skip
        num_programs = num_blocks * num_shares
        tiles.launch_tile(_output_kernel, num_programs, tile, pointers, constants)
    return GatedProjection(
        *tiles.cast_sums(sums, tuple(output), ((dim, hidden), (dim,), (dim, dim), (dim,)))
    )


def _count_shares(z: torch.Tensor, tile: Tile, num_blocks: int, num_tiles: int) -> int:
    """Programs that share the positions of each block of weights; at least one."""
    multiprocessors = tiles.num_multiprocessors(z.get_device())
    wanted = tile.programs_per_multiprocessor * multiprocessors // num_blocks
    return max(1, min(wanted, num_tiles))


@triton.jit
def _projection_kernel(
    grad_a_ptr,
    grad_b_ptr,
    z_ptr,
    mask_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    p_weight_ptr,
    p_bias_ptr,
    g_weight_ptr,
    g_bias_ptr,
    sums_ptr,
    size,
    pitch,
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
    SMALL: tl.constexpr,
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
    tiles_per_item = tl.cdiv(size * pitch, POSITIONS)
    batch_stride = tl.where(is_b, b_batch_stride, a_batch_stride).to(tl.int64)
    channel_stride = tl.where(is_b, b_channel_stride, a_channel_stride).to(tl.int64)
    row_stride = tl.where(is_b, b_row_stride, a_row_stride).to(tl.int64)
    grad_ptr = tl.where(is_b, grad_b_ptr, grad_a_ptr) + (first % HIDDEN) * channel_stride
    total = tl.zeros((2 * CHANNELS, CHUNK), tl.float32)
    p_bias_sum = tl.zeros((CHANNELS,), tl.float32)
    g_bias_sum = tl.zeros((CHANNELS,), tl.float32)

    for tile in tl.range(share, num_tiles, num_shares, num_stages=STAGES):
        item = (tile // tiles_per_item).to(tl.int64)
        row, col = locate((tile % tiles_per_item) * POSITIONS, order, pitch, SMALL)
        inside = (row < size) & (col < size)
        position = item * size * size + row * size + col
        chunks = load_rows(z_ptr, position * DIM, inside, DIM, CHUNK, EVEN)
        mean, rstd = find_moments(chunks, eps, 1, DIM, NUM)
        xs = normalize(
            chunks, mean, rstd, norm_weight_ptr, norm_bias_ptr, 1, CHUNK, NUM, dtype
        )  # fmt: skip
        both = tl.zeros((2 * CHANNELS, POSITIONS), tl.float32)
        for index in tl.static_range(NUM):
            both = dot(weights[index], tl.trans(xs[index]), both, PRECISION)
        p, g = split_rows(both, CHANNELS, POSITIONS)
        channels = tl.arange(0, CHANNELS) * channel_stride
        offsets = item * batch_stride + row * row_stride + col
        pointers = grad_ptr + channels[:, None] + offsets[None, :]
        if EVEN:
            grad = tl.load(pointers).to(tl.float32)
        else:
            grad = tl.load(pointers, mask=inside[None, :], other=0.0).to(tl.float32)
        p = add_bias(p, p_bias_ptr, first, CHANNELS, 0)
        gate = sigmoid(add_bias(g, g_bias_ptr, first, CHANNELS, 0))
        if mask_ptr is not None:
            grad *= tl.load(mask_ptr + position, mask=inside, other=0).to(tl.float32)[None, :]
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
            x = _load_normalized_chunk(
                z_ptr, position * DIM, inside, mean, rstd, norm_weight_ptr, norm_bias_ptr, chunk,
                CHUNK, dtype,
            )  # fmt: skip
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


@triton.jit
def _load_normalized_chunk(
    z_ptr, offsets, inside, mean, rstd, weight_ptr, bias_ptr, chunk, CHUNK: tl.constexpr, DTYPE
):
    """One chunk of x, chosen at run time, with moments that are known."""
    channels = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(z_ptr + offsets[:, None] + channels[None, :], mask=inside[:, None], other=0.0)
    x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + channels).to(tl.float32)[None, :]
    if bias_ptr is not None:
        x += tl.load(bias_ptr + channels).to(tl.float32)[None, :]
    return x.to(DTYPE)


@triton.jit
def _output_kernel(
    grad_out_ptr,
    c_ptr,
    z_ptr,
    in_weight_ptr,
    in_bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    p_weight_ptr,
    p_bias_ptr,
    g_weight_ptr,
    g_bias_ptr,
    sums_ptr,
    size,
    pitch,
    num_tiles,
    c_batch_stride,
    c_channel_stride,
    c_row_stride,
    in_eps,
    out_eps,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    DIM_CHUNK: tl.constexpr,
    HIDDEN_CHUNK: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SMALL: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program adds every so many tiles to `CHANNELS` rows of both weights' gradients, a chunk of each."""
    NUM_DIM: tl.constexpr = DIM // DIM_CHUNK
    NUM_HIDDEN: tl.constexpr = HIDDEN // HIDDEN_CHUNK
    NUM: tl.constexpr = NUM_DIM if NUM_DIM > NUM_HIDDEN else NUM_HIDDEN
    BLOCKS: tl.constexpr = DIM // CHANNELS * NUM
    dtype = p_weight_ptr.dtype.element_ty
    block = tl.program_id(0) % BLOCKS
    share = tl.program_id(0) // BLOCKS
    num_shares = tl.num_programs(0) // BLOCKS
    chunk = block % NUM
    first = block // NUM * CHANNELS
    order = tl.arange(0, POSITIONS)
    p_weights = load_weights(p_weight_ptr, first, CHANNELS, HIDDEN, HIDDEN_CHUNK)
    g_weights = load_weights(g_weight_ptr, first, CHANNELS, DIM, DIM_CHUNK)
    tiles_per_item = tl.cdiv(size * pitch, POSITIONS)
    p_total = tl.zeros((CHANNELS, HIDDEN_CHUNK), tl.float32)
    g_total = tl.zeros((CHANNELS, DIM_CHUNK), tl.float32)
    p_bias_sum = tl.zeros((CHANNELS,), tl.float32)
    g_bias_sum = tl.zeros((CHANNELS,), tl.float32)
    # A weight with fewer chunks than the other is summed again, and stored once.
    p_chunk = tl.minimum(chunk, NUM_HIDDEN - 1)
    g_chunk = tl.minimum(chunk, NUM_DIM - 1)

    for tile in tl.range(share, num_tiles, num_shares, num_stages=STAGES):
        item = (tile // tiles_per_item).to(tl.int64)
        row, col = locate((tile % tiles_per_item) * POSITIONS, order, pitch, SMALL)
        inside = (row < size) & (col < size)
        position = item * size * size + row * size + col
        chunks = load_rows(z_ptr, position * DIM, inside, DIM, DIM_CHUNK, EVEN)
        in_mean, in_rstd = find_moments(chunks, in_eps, 1, DIM, NUM_DIM)
        xs = normalize(
            chunks, in_mean, in_rstd, in_weight_ptr, in_bias_ptr, 1, DIM_CHUNK, NUM_DIM, dtype
        )  # fmt: skip
        offsets = item * c_batch_stride + row.to(tl.int64) * c_row_stride + col
        c_chunks = load_channels(
            c_ptr, offsets, inside, c_channel_stride, HIDDEN, HIDDEN_CHUNK, EVEN
        )  # fmt: skip
        mean, rstd = find_moments(c_chunks, out_eps, 0, HIDDEN, NUM_HIDDEN)
        cs = normalize(
            c_chunks, mean, rstd, out_weight_ptr, out_bias_ptr, 0, HIDDEN_CHUNK, NUM_HIDDEN, dtype
        )  # fmt: skip
        g = tl.zeros((CHANNELS, POSITIONS), tl.float32)
        for index in tl.static_range(NUM_DIM):
            g = dot(g_weights[index], tl.trans(xs[index]), g, PRECISION)
        p = tl.zeros((CHANNELS, POSITIONS), tl.float32)
        for index in tl.static_range(NUM_HIDDEN):
            p = dot(p_weights[index], cs[index], p, PRECISION)
        p = add_bias(p, p_bias_ptr, first, CHANNELS, 0)
        gate = sigmoid(add_bias(g, g_bias_ptr, first, CHANNELS, 0))
        channels = first + tl.arange(0, CHANNELS)
        pointers = grad_out_ptr + channels[:, None] + (position * DIM)[None, :]
        if EVEN:
            grad = tl.load(pointers).to(tl.float32)
        else:
            grad = tl.load(pointers, mask=inside[None, :], other=0.0).to(tl.float32)
        grad_p = grad * gate
        grad_g = grad_p * p * (1.0 - gate)
        if p_bias_ptr is not None:
            p_bias_sum += tl.sum(grad_p, axis=1)
        if g_bias_ptr is not None:
            g_bias_sum += tl.sum(grad_g, axis=1)
        if NUM_DIM == 1:
            x = xs[0]
        else:
            x = _load_normalized_chunk(
                z_ptr, position * DIM, inside, in_mean, in_rstd, in_weight_ptr, in_bias_ptr, g_chunk,
                DIM_CHUNK, dtype,
            )  # fmt: skip
        g_total = dot(grad_g.to(dtype), x, g_total, PRECISION)
        if NUM_HIDDEN == 1:
            normalized = cs[0]
        else:
            channels = p_chunk * HIDDEN_CHUNK + tl.arange(0, HIDDEN_CHUNK)
            pointers = (
                c_ptr + (channels.to(tl.int64) * c_channel_stride)[:, None] + offsets[None, :]
            )
            normalized = tl.load(pointers, mask=inside[None, :], other=0.0).to(tl.float32)
            normalized = (normalized - mean[None, :]) * rstd[None, :]
            if out_weight_ptr is not None:
                normalized *= tl.load(out_weight_ptr + channels).to(tl.float32)[:, None]
            if out_bias_ptr is not None:
                normalized += tl.load(out_bias_ptr + channels).to(tl.float32)[:, None]
            normalized = normalized.to(dtype)
        p_total = dot(grad_p.to(dtype), tl.trans(normalized), p_total, PRECISION)

    sums_ptr += share.to(tl.int64) * (DIM * (DIM + HIDDEN + 2))
    channels = first + tl.arange(0, CHANNELS)
    columns = p_chunk * HIDDEN_CHUNK + tl.arange(0, HIDDEN_CHUNK)
    pointers = sums_ptr + channels[:, None] * HIDDEN + columns[None, :]
    tl.store(pointers, p_total, mask=chunk < NUM_HIDDEN)
    columns = g_chunk * DIM_CHUNK + tl.arange(0, DIM_CHUNK)
    pointers = sums_ptr + DIM * (HIDDEN + 1) + channels[:, None] * DIM + columns[None, :]
    tl.store(pointers, g_total, mask=chunk < NUM_DIM)
    tl.store(sums_ptr + DIM * HIDDEN + channels, p_bias_sum)
    tl.store(sums_ptr + DIM * (HIDDEN + 1 + DIM) + channels, g_bias_sum)
