# SPDX-License-Identifier: Apache-2.0
"""The triangle multiplicative update without its contraction: the kernels of forward.

    x = LN_in(z);  p = x Wp^T + bp;  g = x Wg^T + bg;  [a | b] = mask * sigmoid(g) * p
    out = sigmoid(x Wgo^T + bgo) * (LN_out(c) Wo^T + bo)

`project_operands` reads z once and writes both operands of the contraction, quantized and in its layout;
`project_output` reads its result and z. Nothing between is stored. Inputs are CUDA tensors (CPU tensors where
Triton interprets). Arithmetic is FP32, except that the tensor cores' operands have the weights' dtype.
Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl

from . import triangle_tiles as tiles
from .float8_codes import FORMATS, compute_scale, encode, raise_amax
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
    sigmoid,
    split_rows,
)
from .turn_codes import turn_codes

_MODES = ("outgoing", "incoming")
# Elements from one scale to the next.
_SCALE_STRIDE = tl.constexpr(4)


class Operands(NamedTuple):
    """Both operands of the contraction.

    `a`, `b`: ``[B, H, N_p, N_p]`` contiguous, the contracted index last: ``a[b, h, i, k]`` and
    ``b[b, h, j, k]``. uint8 codes, or the weights' dtype if not quantized. ``N_p`` is N rounded up to a
    multiple of 16, padding is zero. `a_turned`, `b_turned`: each item's transpose ``[b, h, k, i]``.
    What was not asked for is None. `scale_invs`: float32 ``[2]``, ``1 / scales``, 16 bytes apart; None without FP8.
    """

    a: Optional[torch.Tensor]
    b: Optional[torch.Tensor]
    a_turned: Optional[torch.Tensor]
    b_turned: Optional[torch.Tensor]
    scale_invs: Optional[torch.Tensor]


@lru_cache(maxsize=256)
def choose_operand_tile(dim: int, hidden: int, dtype: torch.dtype) -> Tile:
    """Tile of `project_operands`; weights stay in shared memory where those of one operand fit.

    BF16 at D = H = 128: the fastest of a sweep on an H200, `benchmarks/triangle_kernels.py`.
    """
    channels = tiles.largest_chunk(hidden, 64)
    weights_bytes = 2 * hidden * dim * dtype.itemsize
    if dtype != torch.float32 and weights_bytes <= 65536 and dim <= 128:
        return Tile(64, channels, 4, 2, 2, True)
    tile = Tile(64, channels, 4, 2, 1, False)
    if dtype == torch.float32:
        tile = Tile(32, min(channels, 32), 4, 2, 1, False)
    return tiles.fit_tile(
        tile,
        # Weights of p and g, and x.
        lambda tile: (2 * tile.channels + tile.positions) * dim * dtype.itemsize,
        f"D = {dim}, H = {hidden} in {dtype}",
    )


@lru_cache(maxsize=256)
def choose_output_tile(dim: int, hidden: int, dtype: torch.dtype) -> Tile:
    """Tile of `project_output`; see `choose_operand_tile`."""
    channels = tiles.largest_chunk(dim, 64)
    weights_bytes = dim * (dim + hidden) * dtype.itemsize
    if dtype != torch.float32 and weights_bytes <= 65536:
        return Tile(64, tiles.largest_chunk(dim, 128), 4, 2, 1, True)
    tile = Tile(64, channels, 4, 2, 1, False)
    if dtype == torch.float32:
        tile = Tile(32, min(channels, 32), 4, 2, 1, False)
    return tiles.fit_tile(
        tile,
        # x, LN(c), and the weights of one of them.
        lambda tile: (tile.positions * (dim + hidden) + tile.channels * max(dim, hidden))
        * dtype.itemsize,
        f"D = {dim}, H = {hidden} in {dtype}",
    )


def project_operands(
    z: torch.Tensor,
    norm: Norm,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
    *,
    mode: str,
    fp8_dtype: Optional[str] = None,
    scales: Optional[torch.Tensor] = None,
    amaxes: Optional[torch.Tensor] = None,
    force_pow_2_scales: bool = False,
    amax_epsilon: float = 0.0,
    kept: bool = True,
    turned: bool = False,
) -> Operands:
    """``[a | b] = mask * sigmoid(x Wg^T + bg) * (x Wp^T + bp)`` with ``x = LN(z)``, in the contraction's layout.

    One kernel, which reads z once; `turned` takes a second one, which transposes bytes.

    Parameters
    ----------
    z : torch.Tensor
        FP32, BF16 or FP16 ``[B, N, N, D]``, contiguous, D a multiple of 16.
    norm : Norm
        LN, over D.
    projection : GatedProjection
        Weights ``[2 H, D]``, H a multiple of 16. Their dtype may differ from z's.
    mask : torch.Tensor, optional
        ``[B, N, N]``, floating or bool: factor of a and b at each position of z.
    mode : {"outgoing", "incoming"}
        Which index of z is contracted: the last one, ``z[b, i, k]``, or the first, ``z[b, k, i]``.
    fp8_dtype : {"e4m3", "e5m2"}, optional
        Format of the codes. None: operands in the weights' dtype.
    scales : torch.Tensor, optional
        float32 ``[2]``, of a and b: ``codes = fp8(a * scale)`` (delayed scaling). Without them the scales
        are computed from `amaxes` as `float8_quantize.quantize_float8_current` does.
    amaxes : torch.Tensor, optional
        float32 ``[2]``, largest magnitudes of a and b before scaling. With `scales` they are raised in place,
        without FP8 too; else only read: see `find_operand_amaxes`.
    force_pow_2_scales, amax_epsilon
        Of current scaling.
    kept, turned : bool
        Whether to return ``a, b`` and ``a_turned, b_turned``; the latter only with FP8.

    Returns
    -------
    Operands

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes, strides or options do not fit.

    Examples
    --------
    >>> z, weight = torch.randn(1, 20, 20, 64, device="cuda"), torch.randn(64, 64, device="cuda")
    >>> projection = GatedProjection(weight, None, weight, None)
    >>> a, b, *_ = project_operands(z, Norm(None, None), projection, None, mode="outgoing")
    >>> a.shape
    torch.Size([1, 32, 32, 32])
    """
    tile = _check_operands(z, norm, projection)
    if mode not in _MODES:
        raise ValueError(f'`mode` must be "outgoing" or "incoming" and came as {mode!r}')
    if fp8_dtype not in (None, *FORMATS):
        raise ValueError(f'`fp8_dtype` must be None, "e4m3" or "e5m2" and came as {fp8_dtype!r}')
    if not (kept or turned) or turned and fp8_dtype is None:
        raise ValueError(
            f"ask for kept or turned operands, turned ones with FP8 only; came kept={kept}, "
            f"turned={turned}, fp8_dtype={fp8_dtype!r}"
        )
    if fp8_dtype is not None and scales is None and amaxes is None:
        raise ValueError("FP8 operands need `scales`, or `amaxes` to compute them from")
    if fp8_dtype is None and scales is not None:
        raise ValueError("`scales` came without fp8_dtype; operands that are not FP8 have none")
    for name, state in (("scales", scales), ("amaxes", amaxes)):
        tiles.check_state(name, state, 2, z.device)
    batch, size, _, _ = z.shape
    hidden = projection.weight_p.shape[0] // 2
    dtype = torch.uint8 if fp8_dtype is not None else projection.weight_p.dtype
    padded = tiles.pad(size)
    both = torch.empty((2, batch, hidden, padded, padded), dtype=dtype, device=z.device)
    scale_invs = None
    if fp8_dtype is not None:
        # Each at an address of 16 bytes, which cuBLASLt asks of a scale.
        scale_invs = torch.empty((2, _SCALE_STRIDE.value), dtype=torch.float32, device=z.device)[
            :, 0
        ]
    if both.numel():
        options = (mode == "incoming", fp8_dtype, force_pow_2_scales, amax_epsilon)
        _launch_operands(
            z, norm, projection, mask, (both, scales, amaxes, scale_invs), options, tile
        )
    elif scale_invs is not None:
        scale_invs.fill_(1.0) if scales is None else torch.reciprocal(scales, out=scale_invs)
    turned_both = turn_codes(both) if turned else (None, None)
    a, b = both if kept else (None, None)
    return Operands(a, b, turned_both[0], turned_both[1], scale_invs)


def find_operand_amaxes(
    z: torch.Tensor, norm: Norm, projection: GatedProjection, mask: Optional[torch.Tensor]
) -> torch.Tensor:
    """float32 ``[2]``: largest magnitudes of a and b, for current scaling; see `project_operands`.

    The same computation, of which nothing but the amaxes is written.
    """
    tile = _check_operands(z, norm, projection)
    amaxes = torch.zeros(2, dtype=torch.float32, device=z.device)
    if z.numel():
        outputs = (None, None, amaxes, None)
        _launch_operands(z, norm, projection, mask, outputs, (False, None, False, 0.0), tile)
    return amaxes


def project_output(
    c: torch.Tensor,
    z: torch.Tensor,
    norm_in: Norm,
    norm_out: Norm,
    output: GatedProjection,
) -> torch.Tensor:
    """``sigmoid(x Wgo^T + bgo) * (LN_out(c) Wo^T + bo)`` with ``x = LN_in(z)``.

    One kernel, which reads c and z once.

    Parameters
    ----------
    c : torch.Tensor
        FP32, BF16 or FP16 ``[B, H, N, N]``, channel-first; contiguous in its last dim, else any strides.
    z : torch.Tensor
        ``[B, N, N, D]``, contiguous.
    norm_in, norm_out : Norm
        Over D and over H.
    output : GatedProjection
        `weight_p` is Wo ``[D, H]``, `weight_g` is Wgo ``[D, D]``.

    Returns
    -------
    torch.Tensor
        ``[B, N, N, D]``, contiguous, in the dtype of z.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes or strides do not fit.
    """
    dim, hidden = check_output(c, z, norm_in, norm_out, output)
    out = torch.empty_like(z)
    if not z.numel():
        return out
    batch, size = z.shape[:2]
    dtype = output.weight_p.dtype
    tile = choose_output_tile(dim, hidden, dtype)
    pitch = tiles.pad(size)
    num_tiles = batch * triton.cdiv(size * pitch, tile.positions)
    num_programs = min(
        num_tiles, tile.programs_per_multiprocessor * tiles.num_multiprocessors(z.get_device())
    )
    constants = (
        size, pitch, num_tiles, *c.stride()[:3], float(norm_in.eps), float(norm_out.eps), dim, hidden,
        tiles.largest_chunk(dim, 128), tiles.largest_chunk(hidden, 128), tile.positions, tile.channels,
        pitch < tile.positions, size == pitch and size * pitch % tile.positions == 0,
        tile.is_resident, tile.num_stages, tiles.dot_precision(dtype),
    )  # fmt: skip
    pointers = (
        c, z, norm_in.weight, norm_in.bias, norm_out.weight, norm_out.bias, *output, out
    )  # fmt: skip
    tiles.launch_tile(_output_kernel, num_programs, tile, pointers, constants)
    return out


def check_output(
    c: torch.Tensor, z: torch.Tensor, norm_in: Norm, norm_out: Norm, output: GatedProjection
) -> tuple[int, int]:
    """Arguments of `project_output`; returns D and H."""
    tiles.check_z(z)
    tiles.check_channel_first("c", c, z)
    dim, hidden = z.shape[3], c.shape[1]
    tiles.check_norm("norm_in", norm_in, dim, z.device)
    tiles.check_norm("norm_out", norm_out, hidden, z.device)
    tiles.check_projection("output", output, (dim, hidden), (dim, dim), z.device)
    return dim, hidden


def _check_operands(z: torch.Tensor, norm: Norm, projection: GatedProjection) -> Tile:
    """Arguments of `project_operands`; returns the tile."""
    tiles.check_z(z)
    dim = z.shape[3]
    tiles.check_norm("norm", norm, dim, z.device)
    rows = projection.weight_p.shape[0]
    if rows % (2 * tiles.MULTIPLE) or not rows:
        raise ValueError(
            "`projection.weight_p` must have 2 H rows with H a multiple of 16 and came as shape "
            f"{tuple(projection.weight_p.shape)}"
        )
    tiles.check_projection("projection", projection, (rows, dim), (rows, dim), z.device)
    return choose_operand_tile(dim, rows // 2, projection.weight_p.dtype)


def _launch_operands(
    z: torch.Tensor,
    norm: Norm,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
    outputs: tuple[Optional[torch.Tensor], ...],
    options: tuple[bool, Optional[str], bool, float],
    tile: Tile,
) -> None:
    """Launches the kernel; without an output buffer it finds amaxes only."""
    if mask is not None:
        mask = tiles.check_mask(mask, z)
    batch, size, _, dim = z.shape
    hidden = projection.weight_p.shape[0] // 2
    is_incoming, fp8_dtype, force_pow_2_scales, amax_epsilon = options
    both = outputs[0]
    padded = tiles.pad(size)
    num_tiles = triton.cdiv(padded * padded, tile.positions) * batch
    multiprocessors = tiles.num_multiprocessors(z.get_device())
    num_programs = min(
        2 * num_tiles, tile.programs_per_multiprocessor * multiprocessors // 2 * 2 or 2
    )
    dtype = projection.weight_p.dtype
    itemsize = dtype.itemsize if both is None else both.element_size()
    constants = (
        size, padded, num_tiles, float(norm.eps), amax_epsilon, dim, hidden,
        tiles.largest_chunk(dim, 128), tile.positions, tile.channels,
        min(16 // itemsize, tile.positions // 4), is_incoming,
        fp8_dtype is not None, fp8_dtype == "e5m2", force_pow_2_scales, size == padded,
        padded < tile.positions, tile.is_resident, tile.num_stages, tiles.dot_precision(dtype),
    )  # fmt: skip
    pointers = (z, mask, norm.weight, norm.bias, *projection, *outputs)
    tiles.launch_tile(_operands_kernel, num_programs, tile, pointers, constants)


@triton.jit
def _order_positions(POSITIONS: tl.constexpr, VECTOR: tl.constexpr):
    """Position of each column of a product's tile.

    Four neighbouring threads hold two columns each of every eight: column ``8 j + 2 t + e`` lies in thread t.
    As position ``t VECTOR + 2 j + e`` of ``4 VECTOR``, a thread's elements are neighbours, one vector of 16
    bytes, and `_sort_positions` costs nothing.
    """
    column = tl.arange(0, POSITIONS)
    group: tl.constexpr = 4 * VECTOR
    inner = ((column // 2) % 4) * VECTOR + ((column % group) // 8) * 2 + column % 2
    return column // group * group + inner


@triton.jit
def _sort_positions(values, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, VECTOR: tl.constexpr):
    """Columns in the order of `_order_positions` back in the order of positions."""
    groups: tl.constexpr = POSITIONS // (4 * VECTOR)
    values = values.reshape(CHANNELS, groups, VECTOR // 2, 4, 2).permute(0, 1, 3, 2, 4)
    return values.reshape(CHANNELS, POSITIONS)


@triton.jit(do_not_specialize_on_alignment=["scales_ptr", "amaxes_ptr", "scale_invs_ptr"])
def _operands_kernel(
    z_ptr,
    mask_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    p_weight_ptr,
    p_bias_ptr,
    g_weight_ptr,
    g_bias_ptr,
    both_ptr,
    scales_ptr,
    amaxes_ptr,
    scale_invs_ptr,
    size,
    padded,
    num_tiles,
    eps,
    amax_epsilon,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
    INCOMING: tl.constexpr,
    FP8: tl.constexpr,
    E5M2: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    EVEN: tl.constexpr,
    SMALL: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program makes one operand of every so many tiles. Its neighbour makes the other from the same z."""
    NUM: tl.constexpr = DIM // CHUNK
    BLOCKS: tl.constexpr = HIDDEN // CHANNELS
    FP8_MAX: tl.constexpr = 57344.0 if E5M2 else 448.0
    WRITES: tl.constexpr = both_ptr is not None
    # The amax is found unless it is what the scale is computed from.
    RAISES: tl.constexpr = amaxes_ptr is not None and (scales_ptr is not None or not FP8)
    side = tl.program_id(0) % 2
    dtype = p_weight_ptr.dtype.element_ty
    order = _order_positions(POSITIONS, VECTOR)
    weights = ()
    if RESIDENT:
        for block in tl.static_range(BLOCKS):
            first = side * HIDDEN + block * CHANNELS
            weights = weights + load_pairs(p_weight_ptr, g_weight_ptr, first, CHANNELS, DIM, CHUNK)
    scale = 1.0
    known_amax = 0.0
    if amaxes_ptr is not None:
        known_amax = tl.load(amaxes_ptr + side)
    if FP8:
        if scales_ptr is None:
            scale = compute_scale(known_amax, amax_epsilon, FP8_MAX, POWER_OF_2)
        else:
            scale = tl.load(scales_ptr + side)
        scale_inv = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
        tl.store(scale_invs_ptr + _SCALE_STRIDE * side, scale_inv, mask=tl.program_id(0) < 2)
    area = padded.to(tl.int64) * padded
    tiles_per_item = tl.cdiv(padded * padded, POSITIONS)
    num_items = num_tiles // tiles_per_item
    amax = tl.zeros((CHANNELS,), tl.float32)

    for tile in tl.range(
        tl.program_id(0) // 2, num_tiles, tl.num_programs(0) // 2, num_stages=STAGES
    ):
        item = tile // tiles_per_item
        first_position = (tile % tiles_per_item) * POSITIONS
        row, contracted = locate(first_position, order, padded, SMALL)
        inside = (row < size) & (contracted < size)
        if INCOMING:
            position = contracted * size + row
        else:
            position = row * size + contracted
        position = item.to(tl.int64) * size * size + position
        chunks = load_rows(z_ptr, position * DIM, inside, DIM, CHUNK, EVEN)
        mean, rstd = find_moments(chunks, eps, 1, DIM, NUM)
        xs = normalize(
            chunks, mean, rstd, norm_weight_ptr, norm_bias_ptr, 1, CHUNK, NUM, dtype
        )  # fmt: skip
        if mask_ptr is not None:
            factor = tl.load(mask_ptr + position, mask=inside, other=0).to(tl.float32)
        for block in tl.static_range(BLOCKS):
            first = side * HIDDEN + block * CHANNELS
            if RESIDENT:
                pairs = weights[block * NUM : (block + 1) * NUM]
            else:
                # What depends on the tile (by a zero) stays in the loop: where nothing is written Triton would
                # load the weights of all blocks before it, and they need not fit into shared memory.
                row = first + tile // num_tiles
                pairs = load_pairs(p_weight_ptr, g_weight_ptr, row, CHANNELS, DIM, CHUNK)
            both = tl.zeros((2 * CHANNELS, POSITIONS), tl.float32)
            for index in tl.static_range(NUM):
                both = dot(pairs[index], tl.trans(xs[index]), both, PRECISION)
            p, g = split_rows(both, CHANNELS, POSITIONS)
            p = add_bias(p, p_bias_ptr, first, CHANNELS, 0)
            g = add_bias(g, g_bias_ptr, first, CHANNELS, 0)
            values = p * sigmoid(g)
            if mask_ptr is not None:
                values *= factor[None, :]
            if not EVEN:
                # Not by a product: a bias could make it -0 or, if it is infinite, NaN.
                values = tl.where(inside[None, :], values, 0.0)
            if RAISES:
                amax = tl.maximum(amax, tl.max(tl.abs(values), axis=1))
            if WRITES:
                if FP8:
                    codes = encode(values, scale, E5M2)
                    if not EVEN:
                        codes = tl.where(inside[None, :], codes, 0).to(tl.uint8)
                else:
                    codes = values.to(both_ptr.dtype.element_ty)
                codes = _sort_positions(codes, CHANNELS, POSITIONS, VECTOR)
                channel = block * CHANNELS + tl.arange(0, CHANNELS)
                matrix = (side * num_items + item).to(tl.int64) * HIDDEN + channel
                columns = first_position + tl.arange(0, POSITIONS)
                pointers = both_ptr + (matrix * area)[:, None] + columns[None, :]
                if SMALL:
                    tl.store(pointers, codes, mask=(columns < area)[None, :])
                else:
                    tl.store(pointers, codes)
    if RAISES:
        raise_amax(amaxes_ptr + side, known_amax, tl.max(amax, axis=0))


@triton.jit
def _output_kernel(
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
    result_ptr,
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
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program makes all channels of every so many tiles."""
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

    tiles_per_item = tl.cdiv(size * pitch, POSITIONS)

    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        item = (tile // tiles_per_item).to(tl.int64)
        row, col = locate((tile % tiles_per_item) * POSITIONS, order, pitch, SMALL)
        inside = (row < size) & (col < size)
        position = item * size * size + row * size + col
        chunks = load_rows(z_ptr, position * DIM, inside, DIM, DIM_CHUNK, EVEN)
        mean, rstd = find_moments(chunks, in_eps, 1, DIM, NUM_DIM)
        xs = normalize(
            chunks, mean, rstd, in_weight_ptr, in_bias_ptr, 1, DIM_CHUNK, NUM_DIM, dtype
        )  # fmt: skip
        offsets = item * c_batch_stride + row.to(tl.int64) * c_row_stride + col
        chunks = load_channels(
            c_ptr, offsets, inside, c_channel_stride, HIDDEN, HIDDEN_CHUNK, EVEN
        )  # fmt: skip
        mean, rstd = find_moments(chunks, out_eps, 0, HIDDEN, NUM_HIDDEN)
        cs = normalize(
            chunks, mean, rstd, out_weight_ptr, out_bias_ptr, 0, HIDDEN_CHUNK, NUM_HIDDEN, dtype
        )  # fmt: skip
        for block in tl.static_range(DIM // CHANNELS):
            first = block * CHANNELS
            if RESIDENT:
                p_block = p_weights[block * NUM_HIDDEN : (block + 1) * NUM_HIDDEN]
                g_block = g_weights[block * NUM_DIM : (block + 1) * NUM_DIM]
            else:
                p_block = load_weights(p_weight_ptr, first, CHANNELS, HIDDEN, HIDDEN_CHUNK)
                g_block = load_weights(g_weight_ptr, first, CHANNELS, DIM, DIM_CHUNK)
            g = tl.zeros((POSITIONS, CHANNELS), tl.float32)
            for index in tl.static_range(NUM_DIM):
                g = dot(xs[index], tl.trans(g_block[index]), g, PRECISION)
            p = tl.zeros((POSITIONS, CHANNELS), tl.float32)
            for index in tl.static_range(NUM_HIDDEN):
                p = dot(tl.trans(cs[index]), tl.trans(p_block[index]), p, PRECISION)
            p = add_bias(p, p_bias_ptr, first, CHANNELS, 1)
            g = add_bias(g, g_bias_ptr, first, CHANNELS, 1)
            values = (p * sigmoid(g)).to(result_ptr.dtype.element_ty)
            channels = first + tl.arange(0, CHANNELS)
            pointers = result_ptr + (position * DIM)[:, None] + channels[None, :]
            if EVEN:
                tl.store(pointers, values)
            else:
                tl.store(pointers, values, mask=inside[:, None])
