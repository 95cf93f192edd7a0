# SPDX-License-Identifier: Apache-2.0
"""What the kernels of the triangle multiplicative update share: parameters, launches, pieces of a tile.

Must not import Transformer Engine or a sibling package of `kernels`.

A tile is some positions of one item of z, in the order in which a padded matrix of positions lies in memory. A
channel dim is held as a tuple of chunks, since Triton's tiles have powers of two as sizes.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Callable, NamedTuple, Optional

import torch
import triton
import triton.language as tl

from .float8_codes import IS_INTERPRETED
from .launcher import BoundLaunch
from .memory import empty_strided

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Matrices of positions are padded to a multiple of this: what FP8 products of cuBLASLt want, and 16 bytes of codes.
MULTIPLE = 16

_INTERPRETED = tl.constexpr(IS_INTERPRETED)


class Norm(NamedTuple):
    """A LayerNorm over the last dim: ``(v - mean) / sqrt(variance + eps) * weight + bias``.

    `weight` and `bias` are ``[C]`` or None; FP32, BF16 or FP16.
    """

    weight: Optional[torch.Tensor]
    bias: Optional[torch.Tensor]
    eps: float = 1e-5


class GatedProjection(NamedTuple):
    """``p = x weight_p^T + bias_p`` and its gate ``g = x weight_g^T + bias_g``; biases may be None.

    Operands: both weights ``[2 H, D]``, the first H rows for `a`, the others for `b`.
    Output: `weight_p` ``[D, H]`` (of ``LN_out(c)``), `weight_g` ``[D, D]`` (of ``x = LN_in(z)``).
    Weights are contiguous, both of the dtype that the tensor cores are to use.
    """

    weight_p: torch.Tensor
    bias_p: Optional[torch.Tensor]
    weight_g: torch.Tensor
    bias_g: Optional[torch.Tensor]


class Tile(NamedTuple):
    """What one program of a kernel holds, and how many programs there are.

    `positions` and output `channels` at a time, its warps, the programs that a multiprocessor runs together, the
    stages in which Triton loads ahead, and whether its weights stay in shared memory.
    """

    positions: int
    channels: int
    num_warps: int
    programs_per_multiprocessor: int
    num_stages: int
    is_resident: bool = False


# Of a multiprocessor of Hopper, of which each program takes 1 KiB for itself and one has 227 KiB at the most.
_SHARED_BYTES = 228 * 1024
_MIN_TILE = 16


def fit_tile(tile: Tile, count_bytes: Callable[[Tile], int], sizes: str) -> Tile:
    """`tile`, or one with fewer positions, channels or programs that fits into shared memory.

    Parameters
    ----------
    tile : Tile
    count_bytes : callable
        Shared memory that a program with a tile needs.
    sizes : str
        What the bytes come from, for the error.

    Raises
    ------
    ValueError
        If no tile fits.
    """
    while count_bytes(tile) + 1024 > _SHARED_BYTES:
        if max(tile.positions, tile.channels) <= _MIN_TILE:
            raise ValueError(
                f"no tile of {sizes} fits into the shared memory of a multiprocessor: {count_bytes(tile)} bytes of "
                f"{_SHARED_BYTES - 1024}; split the channels, or use torch's operations"
            )
        if tile.channels >= tile.positions:
            tile = tile._replace(channels=tile.channels // 2)
        else:
            tile = tile._replace(positions=tile.positions // 2)
    programs = _SHARED_BYTES // (count_bytes(tile) + 1024)
    return tile._replace(
        programs_per_multiprocessor=min(tile.programs_per_multiprocessor, programs)
    )


def pad(size: int) -> int:
    """`size` rounded up to a multiple of `MULTIPLE`."""
    return -(-size // MULTIPLE) * MULTIPLE


def largest_chunk(size: int, limit: int) -> int:
    """Largest power of two that divides `size`, at most `limit`."""
    return min(size & -size, limit)


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's name of what FP32 products are rounded to: TF32 only where torch's own may be."""
    is_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if is_tf32 else "ieee"


@lru_cache(maxsize=64)
def num_multiprocessors(device_index: int) -> int:
    """Of a CUDA device; 1 where Triton interprets."""
    if device_index < 0:
        return 1
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def check_tensor(
    name: str, x: object, shape: tuple[int, ...], device: torch.device, contiguous: bool = True
) -> None:
    """One floating tensor of a shape, where the others are; errors say what came."""
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES or x.device != device:
        came = f"{x.dtype} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"`{name}` must be FP32, BF16 or FP16 on {device} and came as {came}")
    if tuple(x.shape) != shape or contiguous and not x.is_contiguous():
        raise ValueError(
            f"`{name}` must be {'contiguous ' if contiguous else ''}{list(shape)} and came as shape "
            f"{tuple(x.shape)}, stride {x.stride()}"
        )


def check_z(z: torch.Tensor) -> None:
    """z: ``[B, N, N, D]``, contiguous, on a device where Triton runs, D a multiple of 16."""
    if z.dim() != 4 or z.shape[1] != z.shape[2] or z.shape[3] % MULTIPLE or not z.shape[3]:
        raise ValueError(
            "`z` must be [B, N, N, D] with D a multiple of 16 and came as shape "
            f"{tuple(z.shape)}; pad D, or use torch's operations"
        )
    if not (z.is_cuda or IS_INTERPRETED):
        raise ValueError(f"these kernels run on CUDA devices and z came on {z.device}")
    check_tensor("z", z, tuple(z.shape), z.device)


def check_norm(name: str, norm: Norm, size: int, device: torch.device) -> None:
    """Weight and bias of a LayerNorm."""
    for field in ("weight", "bias"):
        value = getattr(norm, field)
        if value is not None:
            check_tensor(f"{name}.{field}", value, (size,), device)


def check_projection(
    name: str, projection: GatedProjection, p_shape: tuple, g_shape: tuple, device: torch.device
) -> None:
    """Weights of one dtype, biases."""
    check_tensor(f"{name}.weight_p", projection.weight_p, p_shape, device)
    check_tensor(f"{name}.weight_g", projection.weight_g, g_shape, device)
    for field in ("weight_p", "weight_g"):
        if getattr(projection, field).data_ptr() % 16:
            raise ValueError(f"`{name}.{field}` must begin at a multiple of 16 bytes; pass a clone")
    if projection.weight_p.dtype != projection.weight_g.dtype:
        raise TypeError(
            f"both weights of `{name}` must have one dtype and came as {projection.weight_p.dtype} "
            f"and {projection.weight_g.dtype}"
        )
    for field, shape in (("bias_p", p_shape[:1]), ("bias_g", g_shape[:1])):
        value = getattr(projection, field)
        if value is not None:
            check_tensor(f"{name}.{field}", value, shape, device)


def check_mask(mask: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """A mask that a kernel can read: bool as bytes."""
    if tuple(mask.shape) != tuple(z.shape[:3]) or mask.device != z.device:
        raise ValueError(
            f"`mask` must be {list(z.shape[:3])} on {z.device} and came as shape "
            f"{tuple(mask.shape)} on {mask.device}"
        )
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def check_channel_first(name: str, x: torch.Tensor, z: torch.Tensor) -> None:
    """``[B, H, N, N]`` with a contiguous last dim; other strides are free (a view of a padded buffer)."""
    batch, size = z.shape[0], z.shape[1]
    if x.dim() != 4 or x.shape[1] % MULTIPLE or not x.shape[1]:
        raise ValueError(
            f"`{name}` must be [B, H, N, N] with H a multiple of 16 and came as shape "
            f"{tuple(x.shape)}"
        )
    check_tensor(name, x, (batch, x.shape[1], size, size), z.device, contiguous=False)
    if x.stride(3) != 1 and size > 1:
        raise ValueError(f"`{name}` must be contiguous in its last dim and has stride {x.stride()}")


def check_state(name: str, state: Optional[torch.Tensor], size: int, device: torch.device) -> None:
    """Scales and amaxes: `size` contiguous float32."""
    if state is not None and (
        state.dtype != torch.float32
        or state.numel() != size
        or not state.is_contiguous()
        or state.device != device
    ):
        raise ValueError(
            f"`{name}` must be {size} contiguous float32 on {device} and came as {state.dtype}, "
            f"shape {tuple(state.shape)}, stride {state.stride()}, device {state.device}"
        )


# Of a multiprocessor, and the most that a thread can have.
_REGISTERS = 65536
_MAX_REGISTERS = 255

_launches: dict[tuple, BoundLaunch] = {}
_MAX_LAUNCHES = 4096


class _CappedKernel:
    """A kernel compiled for at most so many registers a thread."""

    def __init__(self, kernel: triton.JITFunction, max_registers: int) -> None:
        self._kernel = kernel
        self._max_registers = max_registers

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return partial(self._kernel[grid], maxnreg=self._max_registers)


def launch(
    kernel: triton.JITFunction,
    num_programs: int,
    num_warps: int,
    tensors: tuple[Optional[torch.Tensor], ...],
    constants: tuple,
    programs_per_multiprocessor: int = 1,
) -> None:
    """Launches a kernel whose pointers come first, on the current stream of the device of the first.

    Registers are limited to what `programs_per_multiprocessor` programs at a time leave to each thread.
    """
    device_index = tensors[0].get_device()
    description = [None if x is None else (x.dtype, x.data_ptr() % MULTIPLE == 0) for x in tensors]
    key = (
        kernel, num_programs, num_warps, programs_per_multiprocessor, constants, device_index,
        *description,
    )  # fmt: skip
    bound = _launches.get(key)
    if bound is None:
        if len(_launches) >= _MAX_LAUNCHES:
            _launches.clear()
        max_registers = _REGISTERS // (programs_per_multiprocessor * num_warps * 32) // 8 * 8
        if device_index >= 0 and max_registers < _MAX_REGISTERS:
            kernel = _CappedKernel(kernel, max_registers)
        bound = _launches[key] = BoundLaunch(kernel, num_programs, num_warps, constants)
    if device_index >= 0 and device_index != torch._C._cuda_getDevice():
        with torch.cuda.device(device_index):
            bound(*tensors)
    else:
        bound(*tensors)


def launch_tile(
    kernel: triton.JITFunction,
    num_programs: int,
    tile: Tile,
    tensors: tuple[Optional[torch.Tensor], ...],
    constants: tuple,
) -> None:
    """`launch` with the warps and the programs of each multiprocessor that a tile asks for."""
    programs = tile.programs_per_multiprocessor
    launch(kernel, num_programs, tile.num_warps, tensors, constants, programs)


def sum_partials(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum over the first dim of float32 ``[P, n]``, in a fixed order, as ``[n]`` of a dtype."""
    num_partials, size = partials.shape
    total = empty_strided((size,), (1,), dtype, partials.get_device())
    block = 128
    launch(
        _sum_kernel, triton.cdiv(size, block), 4, (partials, total), (num_partials, size, 16, block)
    )
    return total


def cast_sums(
    sums: torch.Tensor,
    parameters: tuple[Optional[torch.Tensor], ...],
    shapes: tuple[tuple[int, ...], ...],
) -> tuple[Optional[torch.Tensor], ...]:
    """Gradients of parameters, which lie one behind the other in each row of `sums`; of None, None."""
    dtypes = {x.dtype for x in parameters if x is not None}
    if not dtypes:
        return (None,) * len(parameters)
    total = sum_partials(sums, dtypes.pop() if len(dtypes) == 1 else torch.float32)
    parts, first = [], 0
    for x, shape in zip(parameters, shapes):
        part = None
        if x is not None:
            strides = (shape[1], 1) if len(shape) == 2 else (1,)
            part = total.as_strided(shape, strides, first)
            if part.dtype is not x.dtype:
                part = part.to(x.dtype)
        parts.append(part)
        first += math.prod(shape)
    return tuple(parts)


@triton.jit
def _sum_kernel(
    partials_ptr, total_ptr, num_partials, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, num_partials, ROWS):
        rows = first + tl.arange(0, ROWS)
        total += tl.load(
            partials_ptr + rows.to(tl.int64)[:, None] * size + cols[None, :],
            mask=(rows < num_partials)[:, None] & (cols < size)[None, :],
            other=0.0,
        )
    total = tl.sum(total, axis=0)
    tl.store(total_ptr + cols, total.to(total_ptr.dtype.element_ty), mask=cols < size)


@triton.jit
def sigmoid(x):
    """``1 / (1 + 2^(-x log2 e))`` from two approximations of the special function unit, 2 ulp each."""
    if _INTERPRETED:
        return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))
    return tl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
        "rcp.approx.ftz.f32 $0, t; }",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def locate(first_position, order, pitch, SMALL: tl.constexpr):
    """Rows and columns of positions ``first_position + order`` of a matrix with `pitch` columns."""
    if SMALL:
        position = first_position + order
        return position // pitch, position % pitch
    # At most one row ends within a tile: no division for each position.
    row = first_position // pitch
    cols = first_position - row * pitch + order
    is_next = cols >= pitch
    return row + is_next.to(tl.int32), tl.where(is_next, cols - pitch, cols)


@triton.jit
def load_rows(ptr, offsets, inside, SIZE: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """Rows of `SIZE` contiguous elements: a tuple of ``[rows, CHUNK]``, zero where not inside."""
    chunks = ()
    for index in tl.static_range(SIZE // CHUNK):
        pointers = ptr + offsets[:, None] + (index * CHUNK + tl.arange(0, CHUNK))[None, :]
        if EVEN:
            chunk = tl.load(pointers)
        else:
            chunk = tl.load(pointers, mask=inside[:, None], other=0.0)
        chunks = chunks + (chunk,)
    return chunks


@triton.jit
def load_channels(
    ptr,
    offsets,
    inside,
    channel_stride,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Positions of channel-first matrices: a tuple of ``[CHUNK, positions]``, zero where not inside."""
    chunks = ()
    for index in tl.static_range(SIZE // CHUNK):
        channels = (index * CHUNK + tl.arange(0, CHUNK)).to(tl.int64) * channel_stride
        pointers = ptr + channels[:, None] + offsets[None, :]
        if EVEN:
            chunk = tl.load(pointers)
        else:
            chunk = tl.load(pointers, mask=inside[None, :], other=0.0)
        chunks = chunks + (chunk,)
    return chunks


@triton.jit
def find_moments(chunks, eps, AXIS: tl.constexpr, SIZE: tl.constexpr, NUM: tl.constexpr):
    """Mean and ``1 / sqrt(variance + eps)`` over `AXIS` of all chunks."""
    total = tl.sum(chunks[0].to(tl.float32), axis=AXIS)
    for index in tl.static_range(1, NUM):
        total += tl.sum(chunks[index].to(tl.float32), axis=AXIS)
    mean = total * (1.0 / SIZE)
    centred = chunks[0].to(tl.float32) - tl.expand_dims(mean, AXIS)
    square = tl.sum(centred * centred, axis=AXIS)
    for index in tl.static_range(1, NUM):
        centred = chunks[index].to(tl.float32) - tl.expand_dims(mean, AXIS)
        square += tl.sum(centred * centred, axis=AXIS)
    return mean, tl.rsqrt(square * (1.0 / SIZE) + eps)


@triton.jit
def normalize(
    chunks,
    mean,
    rstd,
    weight_ptr,
    bias_ptr,
    AXIS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """LayerNorm along `AXIS` of each chunk."""
    normalized = ()
    for index in tl.static_range(NUM):
        x = chunks[index].to(tl.float32) - tl.expand_dims(mean, AXIS)
        x *= tl.expand_dims(rstd, AXIS)
        channels = index * CHUNK + tl.arange(0, CHUNK)
        if weight_ptr is not None:
            x *= tl.expand_dims(tl.load(weight_ptr + channels).to(tl.float32), 1 - AXIS)
        if bias_ptr is not None:
            x += tl.expand_dims(tl.load(bias_ptr + channels).to(tl.float32), 1 - AXIS)
        normalized = normalized + (x.to(DTYPE),)
    return normalized


@triton.jit
def load_matrix(ptr, first_row, first_col, pitch, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``[ROWS, COLS]`` of a row-major matrix."""
    rows = first_row + tl.arange(0, ROWS)
    cols = first_col + tl.arange(0, COLS)
    return tl.load(ptr + rows[:, None] * pitch + cols[None, :])


@triton.jit
def load_weights(ptr, first_row, ROWS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Rows of a weight with `SIZE` columns: a tuple of ``[ROWS, CHUNK]``."""
    chunks = ()
    for index in tl.static_range(SIZE // CHUNK):
        chunks = chunks + (load_matrix(ptr, first_row, index * CHUNK, SIZE, ROWS, CHUNK),)
    return chunks


@triton.jit
def load_pairs(
    p_ptr, g_ptr, first_row, ROWS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr
):
    """Rows of two weights with `SIZE` columns: a tuple of ``[2 ROWS, CHUNK]``.

    8 rows of p, 8 of g, and so on: a thread's accumulators of a product lie 8 rows apart, so that
    `split_rows` of a product with this finds both partners in one thread. Weights begin at multiples of 16 bytes.
    """
    itemsize: tl.constexpr = p_ptr.dtype.element_ty.primitive_bitwidth // 8
    distance = (g_ptr.to(tl.int64) - p_ptr.to(tl.int64)) // itemsize
    distance = tl.multiple_of(distance, 16 // itemsize)
    row = tl.arange(0, 2 * ROWS)
    offsets = (first_row + row // 16 * 8 + row % 8) * SIZE + (row // 8) % 2 * distance
    chunks = ()
    for index in tl.static_range(SIZE // CHUNK):
        cols = index * CHUNK + tl.arange(0, CHUNK)
        chunks = chunks + (tl.load(p_ptr + offsets[:, None] + cols[None, :]),)
    return chunks


@triton.jit
def pair_rows(upper, lower, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``[2 ROWS, COLS]``: inverse of `split_rows`."""
    pair = tl.join(upper, lower).reshape(ROWS // 8, 8, COLS, 2)
    return pair.permute(0, 3, 1, 2).reshape(2 * ROWS, COLS)


@triton.jit
def split_rows(pair, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The products with p and with g of `load_pairs`."""
    pair = pair.reshape(ROWS // 8, 2, 8, COLS).permute(0, 2, 3, 1)
    return tl.split(pair.reshape(ROWS, COLS, 2))


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """``total + left @ right``."""
    if _INTERPRETED:
        # Triton's interpreter multiplies the bits of BF16.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def add_bias(values, ptr, first, SIZE: tl.constexpr, AXIS: tl.constexpr):
    """``values + bias[first:first + SIZE]`` along `AXIS`; nothing without a bias."""
    if ptr is not None:
        bias = tl.load(ptr + first + tl.arange(0, SIZE)).to(tl.float32)
        values += tl.expand_dims(bias, 1 - AXIS)
    return values


@triton.jit
def scale_channels(values, ptr, first, SIZE: tl.constexpr, AXIS: tl.constexpr):
    """``values * weight[first:first + SIZE]`` along `AXIS`; nothing without a weight."""
    if ptr is not None:
        weight = tl.load(ptr + first + tl.arange(0, SIZE)).to(tl.float32)
        values *= tl.expand_dims(weight, 1 - AXIS)
    return values


@triton.jit
def no_sums(SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """A tuple of zero vectors, one for each chunk."""
    sums = ()
    for _ in tl.static_range(SIZE // CHUNK):
        sums = sums + (tl.zeros((CHUNK,), tl.float32),)
    return sums
