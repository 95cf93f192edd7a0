# SPDX-License-Identifier: Apache-2.0
"""Backward of the triangle multiplicative update's output: the kernels of `triangle_backward.output_backward`.

`run_gates` computes the gates and projections of forward again and writes the gradients of both projections,
``grad_p = grad_out * gate`` and ``grad_g = grad_out * p * gate * (1 - gate)``, beside the normalized tensors
that the weights' gradients are products with. `find_grad_c` takes grad_p through Wo and LN_out and quantizes.
Positions are those of `triangle_tiles.locate_padded`. Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl

from . import triangle_tiles as tiles
from .float8_quantize import _encode, _raise_amax
from .triangle_forward import load_channels
from .triangle_tiles import (
    GatedProjection,
    Norm,
    add_bias,
    dot,
    find_moments,
    load_rows,
    load_tile,
    load_weights,
    locate_padded,
    no_sums,
    normalize,
    scale_channels,
    sigmoid,
    store_tile,
)


class Tile(NamedTuple):
    """What one program holds: positions, channels at a time, warps; how it waits for what it reads."""

    positions: int
    channels: int
    num_warps: int
    programs_per_multiprocessor: int
    num_stages: int
    is_resident: bool


class Band(NamedTuple):
    """Rows of positions that are handled together, counted over all items."""

    first: int
    size: int


@lru_cache(maxsize=256)
def choose_gates_tile(dim: int, hidden: int, dtype: torch.dtype) -> Tile:
    """Tile of `run_gates`."""
    channels = tiles.largest_chunk(dim, 64)
    if dtype == torch.float32:
        return Tile(16, min(channels, 32), 4, 2, 1, False)
    if dim * (dim + hidden) * dtype.itemsize <= 65536:
        return Tile(64, channels, 4, 2, 1, True)
    return Tile(32, channels, 4, 2, 1, False)


@lru_cache(maxsize=256)
def choose_grad_c_tile(dim: int, hidden: int, dtype: torch.dtype) -> Tile:
    """Tile of `find_grad_c`."""
    if dtype == torch.float32:
        return Tile(16, 16, 4, 2, 1, False)
    return Tile(64 if hidden <= 128 else 32, tiles.largest_chunk(dim, 128), 4, 2, 1, False)


def run_gates(
    grad_out: torch.Tensor,
    c: torch.Tensor,
    z: torch.Tensor,
    norm_in: Norm,
    norm_out: Norm,
    output: GatedProjection,
    band: Band,
    outputs: tuple[torch.Tensor, ...],
) -> Optional[torch.Tensor]:
    """Writes ``x, normalized, grad_p, grad_g, moments`` of a band; returns sums of both biases' gradients.

    x ``[rows, Q, D]``, grad_g ``[D, rows Q]`` and float32 moments ``[2, rows Q]`` (mean and 1 / deviation of c) are
    those of all rows; normalized ``[H, band Q]`` (LN_out of c) and grad_p ``[D, band Q]`` those of the band.
    """
    batch, size, _, dim = z.shape
    hidden = c.shape[1]
    pitch = outputs[0].shape[1]
    dtype = output.weight_p.dtype
    tile = choose_gates_tile(dim, hidden, dtype)
    num_programs, num_tiles = count_programs(z, tile, band.size * pitch)
    sums = None
    if output.bias_p is not None or output.bias_g is not None:
        sums = torch.empty((num_programs, 2 * dim), dtype=torch.float32, device=z.device)
    constants = (
        size, pitch, band.first * pitch, band.size * pitch, batch * size * pitch, num_tiles,
        *c.stride()[:3], float(norm_in.eps), float(norm_out.eps), dim, hidden,
        tiles.largest_chunk(dim, 128), tiles.largest_chunk(hidden, 128), tile.positions,
        tile.channels, *describe_tiles(size, pitch, band, tile.positions), tile.is_resident,
        tile.num_stages, tiles.dot_precision(dtype),
    )  # fmt: skip
    pointers = (
        grad_out, c, z, norm_in.weight, norm_in.bias, norm_out.weight, norm_out.bias, *output,
        *outputs, sums,
    )  # fmt: skip
    tiles.launch(
        _gates_kernel, num_programs, tile.num_warps, pointers, constants, tile.programs_per_multiprocessor
    )  # fmt: skip
    return sums


def find_grad_c(
    grad_p: torch.Tensor,
    c: torch.Tensor,
    moments: torch.Tensor,
    norm_out: Norm,
    output: GatedProjection,
    band: Band,
    grad_c: torch.Tensor,
    quantization: tuple[Optional[str], Optional[torch.Tensor], ...],
) -> torch.Tensor:
    """Writes a band of grad_c; returns sums of the gradients of LN_out's weight and bias.

    `quantization`: format (None: `grad_c` is no FP8), scale, amax, and where to write the scale's inverse.
    """
    batch, hidden, size, _ = c.shape
    dim = grad_p.shape[0]
    pitch = grad_c.shape[-1]
    dtype = output.weight_p.dtype
    tile = choose_grad_c_tile(dim, hidden, dtype)
    num_programs, num_tiles = count_programs(c, tile, band.size * pitch)
    sums = torch.empty((num_programs, 2 * hidden), dtype=torch.float32, device=c.device)
    fp8_dtype, *states = quantization
    constants = (
        size, pitch, band.first * pitch, band.size * pitch, batch * size * pitch, num_tiles,
        *c.stride()[:3], dim, hidden, tile.channels, tiles.largest_chunk(hidden, 128),
        tile.positions, *describe_tiles(size, pitch, band, tile.positions), fp8_dtype is not None,
        fp8_dtype == "e5m2", tile.num_stages, tiles.dot_precision(dtype),
    )  # fmt: skip
    pointers = (grad_p, c, moments, norm_out.weight, output.weight_p, grad_c, sums, *states)
    tiles.launch(
        _grad_c_kernel, num_programs, tile.num_warps, pointers, constants, tile.programs_per_multiprocessor
    )  # fmt: skip
    return sums


def count_programs(x: torch.Tensor, tile: NamedTuple, num_positions: int) -> tuple[int, int]:
    """Programs of a persistent launch, and the tiles that they share."""
    num_tiles = triton.cdiv(num_positions, tile.positions)
    multiprocessors = tiles.num_multiprocessors(x.get_device())
    return min(num_tiles, tile.programs_per_multiprocessor * multiprocessors), num_tiles


def describe_tiles(size: int, pitch: int, band: Band, positions: int) -> tuple[bool, bool, bool]:
    """SMALL (rows shorter than a tile), ALIGNED (no tile crosses a row's end), EVEN (no padding)."""
    is_even = size == pitch and band.size * pitch % positions == 0
    return pitch < positions, pitch % positions == 0, is_even


@triton.jit
def _gates_kernel(
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
    x_ptr,
    normalized_ptr,
    grad_p_ptr,
    grad_g_ptr,
    moments_ptr,
    sums_ptr,
    size,
    pitch,
    first_position,
    band_positions,
    all_positions,
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
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every so many tiles of positions, all channels."""
    NUM_DIM: tl.constexpr = DIM // DIM_CHUNK
    NUM_HIDDEN: tl.constexpr = HIDDEN // HIDDEN_CHUNK
    BLOCKS: tl.constexpr = DIM // CHANNELS
    dtype = p_weight_ptr.dtype.element_ty
    order = tl.arange(0, POSITIONS)
    p_weights = ()
    g_weights = ()
    if RESIDENT:
        for block in tl.static_range(BLOCKS):
            first = block * CHANNELS
            p_weights = p_weights + load_weights(
                p_weight_ptr, first, CHANNELS, HIDDEN, HIDDEN_CHUNK
            )  # fmt: skip
            g_weights = g_weights + load_weights(g_weight_ptr, first, CHANNELS, DIM, DIM_CHUNK)
    p_sums = no_sums(DIM, CHANNELS)
    g_sums = no_sums(DIM, CHANNELS)

    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        first_column = tile * tl.full((), POSITIONS, tl.int64)
        columns = first_column + order
        first_column += first_position
        positions = first_column + order
        item, row, col = locate_padded(first_column, order, pitch, size, SMALL, ALIGNED)
        inside = (col < size) & (columns < band_positions)
        offsets = ((item * size + row) * size + col).to(tl.int64) * DIM
        chunks = load_rows(z_ptr, offsets, inside, DIM, DIM_CHUNK, EVEN)
        mean, rstd = find_moments(chunks, in_eps, 1, DIM, NUM_DIM)
        xs = normalize(
            chunks, mean, rstd, in_weight_ptr, in_bias_ptr, 1, DIM_CHUNK, NUM_DIM, dtype
        )  # fmt: skip
        for index in tl.static_range(NUM_DIM):
            channels = index * DIM_CHUNK + tl.arange(0, DIM_CHUNK)
            pointers = x_ptr + (positions * DIM)[:, None] + channels[None, :]
            if EVEN:
                tl.store(pointers, xs[index])
            else:
                tl.store(pointers, xs[index], mask=(columns < band_positions)[:, None])
        c_offsets = item.to(tl.int64) * c_batch_stride + row.to(tl.int64) * c_row_stride + col
        chunks = load_channels(
            c_ptr, c_offsets, inside, c_channel_stride, HIDDEN, HIDDEN_CHUNK, EVEN
        )  # fmt: skip
        mean, rstd = find_moments(chunks, out_eps, 0, HIDDEN, NUM_HIDDEN)
        tl.store(moments_ptr + positions, mean, mask=columns < band_positions)
        tl.store(moments_ptr + all_positions + positions, rstd, mask=columns < band_positions)
        cs = normalize(
            chunks, mean, rstd, out_weight_ptr, out_bias_ptr, 0, HIDDEN_CHUNK, NUM_HIDDEN, dtype
        )  # fmt: skip
        for index in tl.static_range(NUM_HIDDEN):
            channels = index * HIDDEN_CHUNK + tl.arange(0, HIDDEN_CHUNK)
            store_tile(
                normalized_ptr, cs[index], channels, columns, band_positions, band_positions, EVEN
            )
        new_p_sums = ()
        new_g_sums = ()
        for block in tl.static_range(BLOCKS):
            first = block * CHANNELS
            if RESIDENT:
                p_block = p_weights[block * NUM_HIDDEN : (block + 1) * NUM_HIDDEN]
                g_block = g_weights[block * NUM_DIM : (block + 1) * NUM_DIM]
            else:
                p_block = load_weights(p_weight_ptr, first, CHANNELS, HIDDEN, HIDDEN_CHUNK)
                g_block = load_weights(g_weight_ptr, first, CHANNELS, DIM, DIM_CHUNK)
            channels = first + tl.arange(0, CHANNELS)
            pointers = grad_out_ptr + channels[:, None] + offsets[None, :]
            if EVEN:
                grad = tl.load(pointers)
            else:
                grad = tl.load(pointers, mask=inside[None, :], other=0.0)
            g = tl.zeros((CHANNELS, POSITIONS), tl.float32)
            for index in tl.static_range(NUM_DIM):
                g = dot(g_block[index], tl.trans(xs[index]), g, PRECISION)
            p = tl.zeros((CHANNELS, POSITIONS), tl.float32)
            for index in tl.static_range(NUM_HIDDEN):
                p = dot(p_block[index], cs[index], p, PRECISION)
            p = add_bias(p, p_bias_ptr, first, CHANNELS, 0)
            gate = sigmoid(add_bias(g, g_bias_ptr, first, CHANNELS, 0))
            grad_p = grad.to(tl.float32) * gate
            grad_g = grad_p * p * (1.0 - gate)
            store_tile(
                grad_p_ptr, grad_p.to(dtype), channels, columns, band_positions, band_positions, EVEN
            )
            pointers = grad_g_ptr + channels.to(tl.int64)[:, None] * all_positions
            pointers += positions[None, :]
            if EVEN:
                tl.store(pointers, grad_g.to(dtype))
            else:
                tl.store(pointers, grad_g.to(dtype), mask=(columns < band_positions)[None, :])
            if sums_ptr is not None:
                new_p_sums = new_p_sums + (p_sums[block] + tl.sum(grad_p, axis=1),)
                new_g_sums = new_g_sums + (g_sums[block] + tl.sum(grad_g, axis=1),)
        if sums_ptr is not None:
            p_sums = new_p_sums
            g_sums = new_g_sums

    if sums_ptr is not None:
        sums_ptr += tl.program_id(0) * 2 * DIM
        for block in tl.static_range(BLOCKS):
            channels = block * CHANNELS + tl.arange(0, CHANNELS)
            tl.store(sums_ptr + channels, p_sums[block])
            tl.store(sums_ptr + DIM + channels, g_sums[block])


@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "amax_ptr", "scale_inv_ptr"])
def _grad_c_kernel(
    grad_p_ptr,
    c_ptr,
    moments_ptr,
    out_weight_ptr,
    p_weight_ptr,
    grad_c_ptr,
    sums_ptr,
    scale_ptr,
    amax_ptr,
    scale_inv_ptr,
    size,
    pitch,
    first_position,
    band_positions,
    all_positions,
    num_tiles,
    c_batch_stride,
    c_channel_stride,
    c_row_stride,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    DIM_CHUNK: tl.constexpr,
    HIDDEN_CHUNK: tl.constexpr,
    POSITIONS: tl.constexpr,
    SMALL: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    FP8: tl.constexpr,
    E5M2: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every so many tiles of positions, all channels, and the sums over positions for LN_out."""
    NUM_DIM: tl.constexpr = DIM // DIM_CHUNK
    NUM_HIDDEN: tl.constexpr = HIDDEN // HIDDEN_CHUNK
    order = tl.arange(0, POSITIONS)
    scale = 1.0
    if FP8:
        scale = tl.load(scale_ptr)
        scale_inv = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
        tl.store(scale_inv_ptr, scale_inv, mask=tl.program_id(0) == 0)
    known_amax = 0.0
    if amax_ptr is not None:
        known_amax = tl.load(amax_ptr)
    amax = tl.zeros((HIDDEN_CHUNK,), tl.float32)
    area = pitch.to(tl.int64) * pitch
    weight_sums = no_sums(HIDDEN, HIDDEN_CHUNK)
    bias_sums = no_sums(HIDDEN, HIDDEN_CHUNK)

    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        first_column = tile * tl.full((), POSITIONS, tl.int64)
        columns = first_column + order
        first_column += first_position
        positions = first_column + order
        item, row, col = locate_padded(first_column, order, pitch, size, SMALL, ALIGNED)
        exists = columns < band_positions
        inside = (col < size) & exists
        offsets = item.to(tl.int64) * c_batch_stride + row.to(tl.int64) * c_row_stride + col
        chunks = load_channels(
            c_ptr, offsets, inside, c_channel_stride, HIDDEN, HIDDEN_CHUNK, EVEN
        )  # fmt: skip
        mean = tl.load(moments_ptr + positions, mask=exists, other=0.0)
        rstd = tl.load(moments_ptr + all_positions + positions, mask=exists, other=0.0)
        grads = ()
        for chunk in tl.static_range(NUM_HIDDEN):
            grad = tl.zeros((HIDDEN_CHUNK, POSITIONS), tl.float32)
            for index in tl.static_range(NUM_DIM):
                channels = index * DIM_CHUNK + tl.arange(0, DIM_CHUNK)
                grad_p = load_tile(
                    grad_p_ptr, channels, columns, band_positions, band_positions, EVEN
                )
                hidden = chunk * HIDDEN_CHUNK + tl.arange(0, HIDDEN_CHUNK)
                weight = tl.load(p_weight_ptr + channels[:, None] * HIDDEN + hidden[None, :])
                grad = dot(tl.trans(weight), grad_p, grad, PRECISION)
            grads = grads + (grad,)

        sum_1 = tl.zeros((POSITIONS,), tl.float32)
        sum_2 = tl.zeros((POSITIONS,), tl.float32)
        new_weight_sums = ()
        new_bias_sums = ()
        for index in tl.static_range(NUM_HIDDEN):
            hat = (chunks[index].to(tl.float32) - mean[None, :]) * rstd[None, :]
            grad = grads[index]
            new_weight_sums = new_weight_sums + (weight_sums[index] + tl.sum(grad * hat, axis=1),)
            new_bias_sums = new_bias_sums + (bias_sums[index] + tl.sum(grad, axis=1),)
            grad = scale_channels(grad, out_weight_ptr, index * HIDDEN_CHUNK, HIDDEN_CHUNK, 0)
            sum_1 += tl.sum(grad, axis=0)
            sum_2 += tl.sum(grad * hat, axis=0)
        weight_sums = new_weight_sums
        bias_sums = new_bias_sums
        sum_1 *= 1.0 / HIDDEN
        sum_2 *= 1.0 / HIDDEN
        for index in tl.static_range(NUM_HIDDEN):
            hat = (chunks[index].to(tl.float32) - mean[None, :]) * rstd[None, :]
            grad = scale_channels(
                grads[index], out_weight_ptr, index * HIDDEN_CHUNK, HIDDEN_CHUNK, 0
            )
            values = (grad - sum_1[None, :] - hat * sum_2[None, :]) * rstd[None, :]
            if not EVEN:
                values = tl.where(inside[None, :], values, 0.0)
            if amax_ptr is not None:
                amax = tl.maximum(amax, tl.max(tl.abs(values), axis=1))
            if FP8:
                codes = _encode(values, scale, E5M2)
                if not EVEN:
                    codes = tl.where(inside[None, :], codes, 0).to(tl.uint8)
            else:
                codes = values.to(grad_c_ptr.dtype.element_ty)
            channels = index * HIDDEN_CHUNK + tl.arange(0, HIDDEN_CHUNK)
            offsets = item.to(tl.int64) * HIDDEN * area + row.to(tl.int64) * pitch + col
            pointers = grad_c_ptr + (channels * area)[:, None] + offsets[None, :]
            if EVEN:
                tl.store(pointers, codes)
            else:
                tl.store(pointers, codes, mask=exists[None, :])

    if amax_ptr is not None:
        _raise_amax(amax_ptr, known_amax, tl.max(amax, axis=0))
    sums_ptr += tl.program_id(0) * 2 * HIDDEN
    for index in tl.static_range(NUM_HIDDEN):
        channels = index * HIDDEN_CHUNK + tl.arange(0, HIDDEN_CHUNK)
        tl.store(sums_ptr + channels, weight_sums[index])
        tl.store(sums_ptr + HIDDEN + channels, bias_sums[index])
