# SPDX-License-Identifier: Apache-2.0
"""The triangle multiplicative update without its contraction: backward.

    output_backward:   grad_out -> grad_c, the output gate's share of LN_in's backward, parameters of the output
    project_backward:  grad_a, grad_b, that share -> grad_z, parameters of the input

The formulas are those of `triangle_forward`. Gates, projections and normalized tensors are computed again from z
and c, nothing of them was stored. Each function runs one kernel for the gradients of activations and one for those
of weights (`triangle_weight_gradients`): both at once would not fit in a multiprocessor's registers.
Neither depends on the mode: positions are those of z, ``[first, second]``.
Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Optional

import torch
import triton
import triton.language as tl

from . import triangle_tiles as tiles
from . import triangle_weight_gradients as weight_gradients
from .float8_codes import FORMATS, encode, raise_amax
from .float8_quantize import quantize_float8_current
from .triangle_forward import check_output
from .triangle_gradients import InputGradients, NormShare, OutputGradients, check_share
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
    no_sums,
    normalize,
    pair_rows,
    scale_channels,
    sigmoid,
    split_rows,
)
from .turn_codes import turn_codes


@lru_cache(maxsize=256)
def choose_output_tile(dim: int, hidden: int, dtype: torch.dtype) -> Tile:
    """Tile of `output_backward`'s activations."""
    if dtype == torch.float32:
        return Tile(16, tiles.largest_chunk(dim, 32), 4, 2, 1, False)
    if dim * (dim + hidden) * dtype.itemsize <= 65536:
        return Tile(64, tiles.largest_chunk(dim, 128), 8, 1, 1, True)
    return Tile(32, tiles.largest_chunk(dim, 64), 8, 1, 1, False)


@lru_cache(maxsize=256)
def choose_input_tile(dim: int, hidden: int, dtype: torch.dtype) -> Tile:
    """Tile of `project_backward`'s activations."""
    if dtype == torch.float32:
        return Tile(16, tiles.largest_chunk(hidden, 32), 4, 2, 1)
    if dim == 128 and hidden % 64 == 0:
        return Tile(64, 64, 4, 2, 2)
    return Tile(64 if dim <= 128 else 32, tiles.largest_chunk(hidden, 64), 8, 1, 1)


def output_backward(
    grad_out: torch.Tensor,
    c: torch.Tensor,
    z: torch.Tensor,
    norm_in: Norm,
    norm_out: Norm,
    output: GatedProjection,
    *,
    fp8_dtype: Optional[str] = None,
    scale: Optional[torch.Tensor] = None,
    amax: Optional[torch.Tensor] = None,
    force_pow_2_scales: bool = False,
    amax_epsilon: float = 0.0,
) -> OutputGradients:
    """Backward of `triangle_forward.project_output`.

    Parameters
    ----------
    grad_out : torch.Tensor
        ``[B, N, N, D]``, contiguous; FP32, BF16 or FP16.
    c, z, norm_in, norm_out, output
        As `project_output` was given them.
    fp8_dtype : {"e5m2", "e4m3"}, optional
        Format in which grad_c is returned. None: the weights' dtype.
    scale : torch.Tensor, optional
        float32, one element: delayed scaling. Without it grad_c is written in the weights' dtype and quantized
        by `float8_quantize.quantize_float8_current`.
    amax : torch.Tensor, optional
        float32, one element, raised in place to the largest ``|grad_c|`` before scaling; delayed scaling only.
    force_pow_2_scales, amax_epsilon
        Of current scaling.

    Returns
    -------
    OutputGradients

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes, strides or options do not fit.
    """
    dim, hidden = check_output(c, z, norm_in, norm_out, output)
    tiles.check_tensor("grad_out", grad_out, tuple(z.shape), z.device)
    if fp8_dtype not in (None, *FORMATS):
        raise ValueError(f'`fp8_dtype` must be None, "e4m3" or "e5m2" and came as {fp8_dtype!r}')
    if scale is None and amax is not None or scale is not None and fp8_dtype is None:
        raise ValueError(
            "`scale` and `amax` are those of delayed scaling: with fp8_dtype, together"
        )
    for name, state in (("scale", scale), ("amax", amax)):
        tiles.check_state(name, state, 1, z.device)
    batch, size = z.shape[:2]
    padded = tiles.pad(size)
    dtype = output.weight_p.dtype
    is_delayed = scale is not None
    shape = (batch, hidden, padded, padded)
    grad_c = torch.empty(shape, dtype=torch.uint8 if is_delayed else dtype, device=z.device)
    grad_hat = torch.empty_like(z)
    scale_inv = torch.empty(1, dtype=torch.float32, device=z.device) if is_delayed else None

    tile = choose_output_tile(dim, hidden, dtype)
    num_tiles = batch * triton.cdiv(padded * padded, tile.positions)
    multiprocessors = tiles.num_multiprocessors(z.get_device())
    num_programs = min(num_tiles, tile.programs_per_multiprocessor * multiprocessors)
    norm_in_sums, norm_sums = (
        torch.zeros((max(num_programs, 1), 2 * n), device=z.device) for n in (dim, hidden)
    )
    if z.numel():
        constants = (
            size, padded, num_tiles, *c.stride()[:3], float(norm_in.eps), float(norm_out.eps), dim,
            hidden, tiles.largest_chunk(dim, 128), tiles.largest_chunk(hidden, 128), tile.positions,
            tile.channels, padded < tile.positions, size == padded, is_delayed, fp8_dtype == "e5m2",
            tile.is_resident, tile.num_stages, tiles.dot_precision(dtype),
        )  # fmt: skip
        pointers = (
            grad_out, c, z, norm_in.weight, norm_in.bias, norm_out.weight, norm_out.bias, *output,
            grad_c, grad_hat, norm_in_sums, norm_sums, scale, amax, scale_inv,
        )  # fmt: skip
        tiles.launch_tile(_output_kernel, num_programs, tile, pointers, constants)
    elif is_delayed:
        torch.reciprocal(scale.reshape(1), out=scale_inv)
    grad_c_turned = None
    if is_delayed:
        grad_c_turned = turn_codes(grad_c)
    elif fp8_dtype is not None:
        grad_c, grad_c_turned, scale_inv = quantize_float8_current(
            grad_c,
            fp8_dtype,
            rowwise=True,
            transposed=True,
            amax_epsilon=amax_epsilon,
            force_pow_2_scales=force_pow_2_scales,
        )
    norm_grads = tiles.cast_sums(norm_sums, (norm_out.weight, norm_out.bias), ((hidden,),) * 2)
    output_grads = weight_gradients.find_output_gradients(grad_out, c, z, norm_in, norm_out, output)
    norm_in_share = NormShare(grad_hat, norm_in_sums)
    return OutputGradients(
        grad_c,
        grad_c_turned,
        scale_inv,
        norm_in_share,
        Norm(*norm_grads, norm_out.eps),
        output_grads,
    )


def project_backward(
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    z: torch.Tensor,
    norm: Norm,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
    share: Optional[NormShare] = None,
) -> InputGradients:
    """Backward of `triangle_forward.project_operands`.

    Parameters
    ----------
    grad_a, grad_b : torch.Tensor
        ``[B, H, N, N]``, the positions of z: ``[i, k]`` and ``[j, k]`` outgoing, ``[k, i]`` and ``[k, j]``
        incoming. Contiguous in the last dim, else any strides; FP32, BF16 or FP16.
    z, norm, projection, mask
        As `project_operands` was given them. The mask gets no gradient.
    share : NormShare, optional
        What `output_backward` has found of LN's backward. The memory of its gradient is used for that of z.

    Returns
    -------
    InputGradients

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes or strides do not fit.
    """
    tiles.check_z(z)
    batch, size, _, dim = z.shape
    for name, grad in (("grad_a", grad_a), ("grad_b", grad_b)):
        tiles.check_channel_first(name, grad, z)
    hidden = grad_a.shape[1]
    if grad_b.shape != grad_a.shape or grad_b.dtype != grad_a.dtype:
        raise ValueError(
            f"`grad_b` must be {grad_a.dtype} {list(grad_a.shape)} as `grad_a` and came as "
            f"{grad_b.dtype}, shape {tuple(grad_b.shape)}"
        )
    tiles.check_norm("norm", norm, dim, z.device)
    rows = (2 * hidden, dim)
    tiles.check_projection("projection", projection, rows, rows, z.device)
    if mask is not None:
        mask = tiles.check_mask(mask, z)
    check_share(share, z)
    grad_hat = None if share is None else share.grad_hat
    grad_z = torch.empty_like(z) if grad_hat is None else grad_hat
    dtype = projection.weight_p.dtype
    # Before grad_hat is overwritten nothing else needs it; the weights' kernel reads z and the operands' gradients.
    grads = weight_gradients.find_projection_gradients(grad_a, grad_b, z, norm, projection, mask)
    tile = choose_input_tile(dim, hidden, dtype)
    pitch = tiles.pad(size)
    num_tiles = batch * triton.cdiv(size * pitch, tile.positions)
    multiprocessors = tiles.num_multiprocessors(z.get_device())
    num_programs = min(num_tiles, tile.programs_per_multiprocessor * multiprocessors)
    norm_sums = torch.zeros((max(num_programs, 1), 2 * dim), device=z.device)
    if z.numel():
        constants = (
            size, pitch, num_tiles, *grad_a.stride()[:3], *grad_b.stride()[:3], float(norm.eps), dim,
            hidden, tiles.largest_chunk(dim, 128), tile.positions, tile.channels,
            pitch < tile.positions, size == pitch and size * pitch % tile.positions == 0,
            tile.num_stages, tiles.dot_precision(dtype),
        )  # fmt: skip
        pointers = (
            grad_a, grad_b, z, mask, norm.weight, norm.bias, *projection, grad_hat, grad_z, norm_sums
        )  # fmt: skip
        tiles.launch_tile(_input_kernel, num_programs, tile, pointers, constants)
    if share is not None:
        norm_sums = torch.cat((share.norm_sums, norm_sums))
    norm_grads = tiles.cast_sums(norm_sums, (norm.weight, norm.bias), ((dim,),) * 2)
    return InputGradients(grad_z, Norm(*norm_grads, norm.eps), grads)


@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "amax_ptr", "scale_inv_ptr"])
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
    grad_c_ptr,
    grad_hat_ptr,
    in_sums_ptr,
    sums_ptr,
    scale_ptr,
    amax_ptr,
    scale_inv_ptr,
    size,
    padded,
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
    FP8: tl.constexpr,
    E5M2: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program makes every so many tiles of grad_c and grad_hat, and its sums over positions for both norms."""
    NUM_DIM: tl.constexpr = DIM // DIM_CHUNK
    NUM_HIDDEN: tl.constexpr = HIDDEN // HIDDEN_CHUNK
    dtype = p_weight_ptr.dtype.element_ty
    order = tl.arange(0, POSITIONS)
    p_weights = ()
    g_weights = ()
    if RESIDENT:
        for block in tl.static_range(DIM // CHANNELS):
            first = block * CHANNELS
            p_weights = p_weights + load_weights(
                p_weight_ptr, first, CHANNELS, HIDDEN, HIDDEN_CHUNK
            )  # fmt: skip
            g_weights = g_weights + load_weights(g_weight_ptr, first, CHANNELS, DIM, DIM_CHUNK)
    scale = 1.0
    if FP8:
        scale = tl.load(scale_ptr)
        scale_inv = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
        tl.store(scale_inv_ptr, scale_inv, mask=tl.program_id(0) == 0)
    known_amax = 0.0
    if amax_ptr is not None:
        known_amax = tl.load(amax_ptr)
    amax = tl.zeros((HIDDEN_CHUNK,), tl.float32)
    area = padded.to(tl.int64) * padded
    tiles_per_item = tl.cdiv(padded * padded, POSITIONS)
    weight_sums = no_sums(HIDDEN, HIDDEN_CHUNK)
    bias_sums = no_sums(HIDDEN, HIDDEN_CHUNK)
    in_weight_sums = no_sums(DIM, DIM_CHUNK)
    in_bias_sums = no_sums(DIM, DIM_CHUNK)

    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        item = (tile // tiles_per_item).to(tl.int64)
        first_position = (tile % tiles_per_item) * POSITIONS
        row, col = locate(first_position, order, padded, SMALL)
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
        grad_xs = ()
        for _ in tl.static_range(NUM_DIM):
            grad_xs = grad_xs + (tl.zeros((DIM_CHUNK, POSITIONS), tl.float32),)
        grad_cs = ()
        for _ in tl.static_range(NUM_HIDDEN):
            grad_cs = grad_cs + (tl.zeros((HIDDEN_CHUNK, POSITIONS), tl.float32),)

        for block in tl.static_range(DIM // CHANNELS):
            first = block * CHANNELS
            if RESIDENT:
                p_block = p_weights[block * NUM_HIDDEN : (block + 1) * NUM_HIDDEN]
                g_block = g_weights[block * NUM_DIM : (block + 1) * NUM_DIM]
            else:
                p_block = load_weights(p_weight_ptr, first, CHANNELS, HIDDEN, HIDDEN_CHUNK)
                g_block = load_weights(g_weight_ptr, first, CHANNELS, DIM, DIM_CHUNK)
            g = tl.zeros((CHANNELS, POSITIONS), tl.float32)
            for index in tl.static_range(NUM_DIM):
                g = dot(g_block[index], tl.trans(xs[index]), g, PRECISION)
            p = tl.zeros((CHANNELS, POSITIONS), tl.float32)
            for index in tl.static_range(NUM_HIDDEN):
                p = dot(p_block[index], cs[index], p, PRECISION)
            p = add_bias(p, p_bias_ptr, first, CHANNELS, 0)
            gate = sigmoid(add_bias(g, g_bias_ptr, first, CHANNELS, 0))
            pointers = grad_out_ptr + (first + tl.arange(0, CHANNELS))[:, None]
            pointers += (position * DIM)[None, :]
            if EVEN:
                grad = tl.load(pointers).to(tl.float32)
            else:
                grad = tl.load(pointers, mask=inside[None, :], other=0.0).to(tl.float32)
            grad *= gate
            grad_p = grad.to(dtype)
            grad_g = (grad * p * (1.0 - gate)).to(dtype)
            new_xs = ()
            for index in tl.static_range(NUM_DIM):
                product = dot(tl.trans(g_block[index]), grad_g, grad_xs[index], PRECISION)
                new_xs = new_xs + (product,)
            grad_xs = new_xs
            new_cs = ()
            for index in tl.static_range(NUM_HIDDEN):
                product = dot(tl.trans(p_block[index]), grad_p, grad_cs[index], PRECISION)
                new_cs = new_cs + (product,)
            grad_cs = new_cs

        # Of LN_in's backward what needs grad_x alone.
        sum_1 = tl.zeros((POSITIONS,), tl.float32)
        new_weight_sums = ()
        new_bias_sums = ()
        new_xs = ()
        for index in tl.static_range(NUM_DIM):
            hat = (tl.trans(chunks[index]).to(tl.float32) - in_mean[None, :]) * in_rstd[None, :]
            grad = grad_xs[index]
            new_weight_sums = new_weight_sums + (
                in_weight_sums[index] + tl.sum(grad * hat, axis=1),
            )
            new_bias_sums = new_bias_sums + (in_bias_sums[index] + tl.sum(grad, axis=1),)
            grad = scale_channels(grad, in_weight_ptr, index * DIM_CHUNK, DIM_CHUNK, 0)
            new_xs = new_xs + (grad,)
            sum_1 += tl.sum(grad, axis=0)
        in_weight_sums = new_weight_sums
        in_bias_sums = new_bias_sums
        sum_1 *= 1.0 / DIM
        for index in tl.static_range(NUM_DIM):
            channels = index * DIM_CHUNK + tl.arange(0, DIM_CHUNK)
            pointers = grad_hat_ptr + (position * DIM)[:, None] + channels[None, :]
            values = new_xs[index] - sum_1[None, :]
            values = tl.trans(values.to(grad_hat_ptr.dtype.element_ty))
            if EVEN:
                tl.store(pointers, values)
            else:
                tl.store(pointers, values, mask=inside[:, None])

        # Backward of LN_out, over the rows of [channels, positions].
        sum_1 = tl.zeros((POSITIONS,), tl.float32)
        sum_2 = tl.zeros((POSITIONS,), tl.float32)
        new_weight_sums = ()
        new_bias_sums = ()
        for index in tl.static_range(NUM_HIDDEN):
            hat = (c_chunks[index].to(tl.float32) - mean[None, :]) * rstd[None, :]
            grad = grad_cs[index]
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
            hat = (c_chunks[index].to(tl.float32) - mean[None, :]) * rstd[None, :]
            grad = scale_channels(
                grad_cs[index], out_weight_ptr, index * HIDDEN_CHUNK, HIDDEN_CHUNK, 0
            )
            values = (grad - sum_1[None, :] - hat * sum_2[None, :]) * rstd[None, :]
            if not EVEN:
                values = tl.where(inside[None, :], values, 0.0)
            if amax_ptr is not None:
                amax = tl.maximum(amax, tl.max(tl.abs(values), axis=1))
            if FP8:
                codes = encode(values, scale, E5M2)
                if not EVEN:
                    codes = tl.where(inside[None, :], codes, 0).to(tl.uint8)
            else:
                codes = values.to(grad_c_ptr.dtype.element_ty)
            channel = index * HIDDEN_CHUNK + tl.arange(0, HIDDEN_CHUNK)
            columns = first_position + order
            pointers = grad_c_ptr + ((item * HIDDEN + channel) * area)[:, None] + columns[None, :]
            if SMALL:
                tl.store(pointers, codes, mask=(columns < area)[None, :])
            else:
                tl.store(pointers, codes)

    if amax_ptr is not None:
        raise_amax(amax_ptr, known_amax, tl.max(amax, axis=0))
    in_sums_ptr += tl.program_id(0) * 2 * DIM
    for index in tl.static_range(NUM_DIM):
        channels = index * DIM_CHUNK + tl.arange(0, DIM_CHUNK)
        tl.store(in_sums_ptr + channels, in_weight_sums[index])
        tl.store(in_sums_ptr + DIM + channels, in_bias_sums[index])
    sums_ptr += tl.program_id(0) * 2 * HIDDEN
    for index in tl.static_range(NUM_HIDDEN):
        channels = index * HIDDEN_CHUNK + tl.arange(0, HIDDEN_CHUNK)
        tl.store(sums_ptr + channels, weight_sums[index])
        tl.store(sums_ptr + HIDDEN + channels, bias_sums[index])


@triton.jit
def _input_kernel(
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
    grad_hat_ptr,
    grad_z_ptr,
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
    """A program makes every so many tiles of grad_z, and its sums over positions for LN_in."""
    NUM: tl.constexpr = DIM // CHUNK
    dtype = p_weight_ptr.dtype.element_ty
    order = tl.arange(0, POSITIONS)
    tiles_per_item = tl.cdiv(size * pitch, POSITIONS)
    weight_sums = no_sums(DIM, CHUNK)
    bias_sums = no_sums(DIM, CHUNK)

    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1):
        item = (tile // tiles_per_item).to(tl.int64)
        row, col = locate((tile % tiles_per_item) * POSITIONS, order, pitch, SMALL)
        inside = (row < size) & (col < size)
        position = item * size * size + row * size + col
        chunks = load_rows(z_ptr, position * DIM, inside, DIM, CHUNK, EVEN)
        mean, rstd = find_moments(chunks, eps, 1, DIM, NUM)
        xs = normalize(
            chunks, mean, rstd, norm_weight_ptr, norm_bias_ptr, 1, CHUNK, NUM, dtype
        )  # fmt: skip
        if mask_ptr is not None:
            factor = tl.load(mask_ptr + position, mask=inside, other=0).to(tl.float32)
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
            offsets = item * tl.where(is_a, a_batch_stride, b_batch_stride) + col
            offsets += row.to(tl.int64) * tl.where(is_a, a_row_stride, b_row_stride)
            pointers += offsets[None, :]
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

        # Backward of LN_in, over the rows of [channels, positions].
        sum_1 = tl.zeros((POSITIONS,), tl.float32)
        sum_2 = tl.zeros((POSITIONS,), tl.float32)
        new_xs = ()
        new_weight_sums = ()
        new_bias_sums = ()
        for index in tl.static_range(NUM):
            channels = index * CHUNK + tl.arange(0, CHUNK)
            grad = grad_xs[index]
            hat = (tl.trans(chunks[index]).to(tl.float32) - mean[None, :]) * rstd[None, :]
            new_weight_sums = new_weight_sums + (weight_sums[index] + tl.sum(grad * hat, axis=1),)
            new_bias_sums = new_bias_sums + (bias_sums[index] + tl.sum(grad, axis=1),)
            grad = scale_channels(grad, norm_weight_ptr, index * CHUNK, CHUNK, 0)
            if grad_hat_ptr is not None:
                pointers = grad_hat_ptr + channels[:, None] + (position * DIM)[None, :]
                if EVEN:
                    grad += tl.load(pointers).to(tl.float32)
                else:
                    grad += tl.load(pointers, mask=inside[None, :], other=0.0).to(tl.float32)
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
            pointers = grad_z_ptr + (position * DIM)[:, None] + channels[None, :]
            if EVEN:
                tl.store(pointers, values)
            else:
                tl.store(pointers, values, mask=inside[:, None])

    sums_ptr += tl.program_id(0) * 2 * DIM
    for index in tl.static_range(NUM):
        channels = index * CHUNK + tl.arange(0, CHUNK)
        tl.store(sums_ptr + channels, weight_sums[index])
        tl.store(sums_ptr + DIM + channels, bias_sums[index])
