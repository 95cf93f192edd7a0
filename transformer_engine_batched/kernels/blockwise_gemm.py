# SPDX-License-Identifier: Apache-2.0
"""Batched products of FP8 matrices with scales per block of 128 along K, on Hopper.

``out[b, m, n] (+)= sum over k of a[b, m, k] scale_a[b, m, k // 128] b[b, n, k] scale_b[b, n, k // 128]``

One kernel family (blockwise_gemm.cu) for batches, for rows masked on the device, for rows of several groups in one
matrix and for groups along K. Input: codes and scales, as tensors and strides. Host work per call: a look-up of what
its signature decides, and one launch; nothing waits for the device, so calls can be captured in a CUDA graph. Must not
import the rest of the package. blockwise_gemm_triton.py is the readable version.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import NamedTuple, Optional

import torch

from .nvrtc import Kernel, encode_tensor_map

BLOCK_K = 128
# Of a warpgroup.
_NUM_THREADS = 128
_STAGING_BYTES = 4 * 2048
# Of the 227 KiB of an SM that a CTA may have.
_MAX_SHARED_BYTES = 232448
# Offsets within a tile are 32-bit in the kernel.
_MAX_SCALE_STRIDE = 1 << 22
_FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_OUT_TYPES = {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32"}


class BlockScales(NamedTuple):
    """FP32 scales (factors from codes to numbers) of the rows of a batched operand, one per 128 columns.

    That of row m of item b and k-block kb is element
    ``(b * rows_per_item + m) // granularity * row_stride + kb * k_stride`` of `values`.

    Parameters
    ----------
    values : torch.Tensor
        FP32, of any shape: its first element is where counting starts.
    granularity : {1, 128}
        Rows per scale.
    row_stride, k_stride : int
        Elements between rows of scales, and between k-blocks.
    rows_per_item : int
        Rows that `values` counts for an item: those of the item where scales run over flattened rows (TE),
        a multiple of 128 where each item has scales of its own, 0 for scales that all items share.

    Examples
    --------
    TE's 1x128 scales ``[K / 128, round_up(B * M, 4)]``: ``BlockScales(s, 1, 1, s.stride(0), M)``.
    FlashInfer's ``[B, M, K / 128]``: ``BlockScales(s, 1, s.stride(1), 1, s.stride(0) // s.stride(1))``.
    Scales ``[B, ceil(N / 128), K / 128]``, contiguous: ``BlockScales(s, 128, s.stride(1), 1, s.shape[1] * 128)``.
    """

    values: torch.Tensor
    granularity: int
    row_stride: int
    k_stride: int
    rows_per_item: int


class Tile(NamedTuple):
    """Shape of an output tile, and the warpgroups that multiply.

    Parameters
    ----------
    rows, cols : int
    column_groups : {1, 2}
        2 where two warpgroups split the columns, 1 where all split the rows.
    warpgroups : {2, 3}
        Three leave each the registers for 64 rows.
    """

    rows: int
    cols: int
    column_groups: int
    warpgroups: int = 2


class Problem(NamedTuple):
    """What a launch is decided by: no addresses. Strides in elements."""

    mode: str
    a_shape: tuple[int, ...]
    a_strides: tuple[int, ...]
    b_shape: tuple[int, ...]
    b_strides: tuple[int, ...]
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]
    formats: tuple[str, str]
    out_type: str
    accumulate: bool
    a_scales: tuple[int, int, int, int]
    b_scales: tuple[int, int, int, int]
    expected_rows: Optional[int]
    is_aligned: bool
    num_sms: int
    tile: Optional[Tile]


class Launch(NamedTuple):
    """What a problem decides: the kernel, the grid, and the struct but for addresses."""

    kernel: Kernel
    num_ctas: int
    a_map: tuple
    b_map: tuple
    constants: bytes


TILES = (
    Tile(256, 128, 1),
    Tile(128, 256, 2),
    Tile(128, 128, 1),
    Tile(64, 256, 2),
    Tile(64, 128, 2),
    Tile(192, 128, 1, 3),
)
# Time for one element of a tile (H200, N = 512 to 4096, full tiles) over that of the fastest with a scale of B per 128
# columns. Small tiles read operands more often from the L2 cache, and have one slab of rows between two waits for data. With
# a scale per column, two FP32 operations per element and block take longer than the products of one other warpgroup:
# a third one hides them.
_SLOWDOWN = dict(zip(TILES, (1.01, 1.0, 1.11, 1.13, 1.57, 1.04)))
_SLOWDOWN_PER_COLUMN = dict(zip(TILES, (1.43, 1.42, 1.54, 1.53, 1.9, 1.32)))
# Cycles of a tile outside its loop over k-blocks: the first loads' latency, the output.
_TILE_CYCLES = 1000
# From here on, SMs that are done early do not count.
_MANY_ROUNDS = 8


def find_reason_against(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    m_indices: Optional[torch.Tensor] = None,
) -> Optional[str]:
    """None if `multiply_blockwise` takes the operands, or the reason why not and what to do.

    K need be no multiple of 128, but rows of codes must start at multiples of 16 bytes.
    """
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in _FORMATS and x.dtype != torch.uint8:
            return f"{name} must hold FP8 codes (torch.float8_e4m3fn, float8_e5m2 or uint8) and is {x.dtype}"
        wanted = 2 if name == "a" and m_indices is not None else 3
        if x.dim() != wanted:
            return f"{name} must have {wanted} dims and has shape {tuple(x.shape)}"
        came = f"{name} has shape {tuple(x.shape)} and stride {x.stride()}"
        if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"{came}: its last dim, K, must be contiguous; pass the other copy of a transposed operand"
        steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1]) if size > 1]
        if x.data_ptr() % 16 or any(step % 16 for step in steps):
            return (
                f"{came}, at address {x.data_ptr()} modulo 16 = {x.data_ptr() % 16}: its rows must start at "
                "multiples of 16 bytes; pad K to a multiple of 16"
            )
        if any(step >= 1 << 40 or step < 0 for step in steps):
            return f"{came}: strides must lie between 0 and 2^40"
    if a.shape[-1] != b.shape[-1]:
        return f"a {tuple(a.shape)} and b {tuple(b.shape)} must agree in their last dim, K"
    if out.dtype not in _OUT_TYPES:
        return f"out must be bfloat16, float16 or float32 and is {out.dtype}"
    if out.numel() and out.shape[-1] > 1 and out.stride(-1) != 1:
        return f"out has stride {out.stride()}: its last dim must be contiguous"
    if accumulate and out.dtype != torch.float32:
        return f"accumulation is into float32 and out is {out.dtype}"
    num_items = 1 if m_indices is not None else max(a.shape[0], b.shape[0])
    if m_indices is None:
        for name, x in (("a", a), ("b", b)):
            if x.shape[0] not in (1, num_items):
                return f"a {tuple(a.shape)} and b {tuple(b.shape)} must agree in their first dim"
        wanted = (num_items, a.shape[-2], b.shape[-2])
    else:
        wanted = (a.shape[0], b.shape[-2])
    if tuple(out.shape) != wanted:
        return f"out must have shape {wanted} and has {tuple(out.shape)}"
    return _check_device(a, b, out)


def _check_device(a: torch.Tensor, *others: torch.Tensor) -> Optional[str]:
    if not a.is_cuda or any(x.device != a.device for x in others):
        return f"all tensors must be on one CUDA device; they are on {[str(x.device) for x in (a, *others)]}"
    if _capability(a.get_device()) != (9, 0):
        return (
            f"the kernel is for Hopper (compute capability 9.0), not {_capability(a.get_device())}"
        )
    return None


def multiply_blockwise(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: BlockScales,
    b_scales: BlockScales,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    masked_m: Optional[torch.Tensor] = None,
    expected_m: Optional[int] = None,
    m_indices: Optional[torch.Tensor] = None,
    num_sms: Optional[int] = None,
    formats: tuple[str, str] = ("e4m3", "e4m3"),
    tile: Optional[Tile] = None,
) -> None:
    """``out[b] (+)= A[b] @ B[b]^T`` of FP8 codes with scales per block of 128 along K, into `out`.

    Parameters
    ----------
    a : torch.Tensor
        Codes ``[B, M, K]``; with `m_indices` ``[M, K]``. K contiguous, other strides multiples of 16. One item
        (or a batch stride of 0) serves all.
    b : torch.Tensor
        Codes ``[B, N, K]``, likewise; with `m_indices` one item for each group.
    a_scales, b_scales : BlockScales
        All four pairs of granularities.
    out : torch.Tensor
        ``[B, M, N]`` (with `m_indices` ``[M, N]``) of BF16, FP16 or FP32, N contiguous.
    accumulate : bool, default = False
        Add to `out`, which is FP32.
    masked_m : torch.Tensor, optional
        INT32 ``[B]`` on the device: only the first ``masked_m[b]`` rows (at most M) of item b are computed
        and written; what lies past them costs nothing.
    expected_m : int, optional
        Rows per item to choose tiles by, M by default; results do not depend on it.
    m_indices : torch.Tensor, optional
        INT32 ``[M]`` on the device: the item of b for each row of a. Each group starts at a multiple of 128
        rows, its last rows up to the next multiple may be padding, -1, whose output is not written.
    num_sms : int, optional
        SMs to use at most.
    formats : tuple of str
        "e4m3" or "e5m2" for each operand that is of dtype uint8.
    tile : Tile, optional
        Overrules the choice of tiles.

    Raises
    ------
    ValueError
        What `find_reason_against` says.
    """
    reason = find_reason_against(a, b, out, accumulate=accumulate, m_indices=m_indices)
    if reason is None and masked_m is not None:
        reason = _check_info("masked_m", masked_m, out.shape[0], a)
        if m_indices is not None:
            reason = "masked_m and m_indices exclude each other"
    if reason is None and m_indices is not None:
        reason = _check_info("m_indices", m_indices, a.shape[0], a)
    if reason is not None:
        raise ValueError(f"multiply_blockwise: {reason}")
    mode = "BATCHED"
    if m_indices is not None:
        mode = "CONTIGUOUS"
        a, out = a[None], out[None]
    elif masked_m is not None:
        mode = "MASKED"
    _launch(mode, a, b, a_scales, b_scales, out, accumulate, masked_m if m_indices is None else m_indices,
            expected_m, num_sms, formats, tile)  # fmt: skip


def multiply_blockwise_k_grouped(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: BlockScales,
    b_scales: BlockScales,
    out: torch.Tensor,
    group_sizes: torch.Tensor,
    *,
    accumulate: bool = False,
    num_sms: Optional[int] = None,
    formats: tuple[str, str] = ("e4m3", "e4m3"),
    tile: Optional[Tile] = None,
) -> None:
    """``out[g] (+)= A[:, k0:k1] @ B[:, k0:k1]^T`` with the columns of group g: weight gradients of experts.

    Parameters
    ----------
    a, b : torch.Tensor
        Codes ``[M, K]`` and ``[N, K]``, K contiguous, the columns of all groups side by side.
    a_scales, b_scales : BlockScales
        As for `multiply_blockwise`, of one item.
    out : torch.Tensor
        ``[G, M, N]``. A group of size 0 gives zeros, or leaves `out` as it is with `accumulate`.
    group_sizes : torch.Tensor
        INT32 ``[G]`` on the device, multiples of 128, at most K in sum.
    accumulate, num_sms, formats, tile
        As for `multiply_blockwise`.

    Raises
    ------
    ValueError
        What `find_reason_against` says, or `group_sizes` is no INT32 tensor ``[G]``.
    """
    if a.dim() != 2 or b.dim() != 2 or out.dim() != 3:
        came = f"{tuple(a.shape)}, {tuple(b.shape)}, {tuple(out.shape)}"
        raise ValueError(
            f"multiply_blockwise_k_grouped: a, b, out must be [M, K], [N, K], [G, M, N] and came as {came}"
        )
    a, b = a[None], b[None]
    num_groups = out.shape[0]
    reason = _check_info("group_sizes", group_sizes, num_groups, a)
    if reason is None and num_groups:
        reason = find_reason_against(a, b, out[:1], accumulate=accumulate)
    if reason is not None:
        raise ValueError(f"multiply_blockwise_k_grouped: {reason}")
    _launch(
        "K_GROUPED",
        a,
        b,
        a_scales,
        b_scales,
        out,
        accumulate,
        group_sizes,
        None,
        num_sms,
        formats,
        tile,
    )


def _check_info(name: str, info: torch.Tensor, size: int, a: torch.Tensor) -> Optional[str]:
    if info.dtype != torch.int32 or tuple(info.shape) != (size,) or not info.is_contiguous():
        return f"{name} must be a contiguous int32 tensor [{size}] and is {info.dtype} {tuple(info.shape)}"
    if info.device != a.device:
        return f"{name} must be on {a.device} and is on {info.device}"
    return None


def _launch(
    mode: str,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: BlockScales,
    b_scales: BlockScales,
    out: torch.Tensor,
    accumulate: bool,
    info: Optional[torch.Tensor],
    expected_rows: Optional[int],
    num_sms: Optional[int],
    formats: tuple[str, str],
    tile: Optional[Tile],
) -> None:
    if out.numel() == 0:
        return
    for name, scales in (("a_scales", a_scales), ("b_scales", b_scales)):
        values = scales.values
        if values.dtype != torch.float32 or values.device != a.device:
            raise ValueError(
                f"{name} must be float32 on {a.device} and is {values.dtype} on {values.device}"
            )
    device_index = a.get_device()
    all_sms = _num_sms(device_index)
    problem = Problem(
        mode,
        tuple(a.shape),
        a.stride(),
        tuple(b.shape),
        b.stride(),
        tuple(out.shape),
        out.stride(),
        (_FORMATS.get(a.dtype, formats[0]), _FORMATS.get(b.dtype, formats[1])),
        _OUT_TYPES[out.dtype],
        accumulate,
        a_scales[1:],
        b_scales[1:],
        expected_rows,
        out.data_ptr() % 16 == 0,
        all_sms if num_sms is None else min(num_sms, all_sms),
        tile,
    )
    launch = prepare_launch(problem)
    parameters = (
        encode_tensor_map(a.data_ptr(), *launch.a_map)
        + encode_tensor_map(b.data_ptr(), *launch.b_map)
        + struct.pack(
            "<4Q",
            a_scales.values.data_ptr(),
            b_scales.values.data_ptr(),
            out.data_ptr(),
            0 if info is None else info.data_ptr(),
        )
        + launch.constants
    )
    launch.kernel.launch(launch.num_ctas, parameters, device_index)


@lru_cache(maxsize=4096)
def prepare_launch(problem: Problem) -> Launch:
    """Kernel, grid and constants of a problem: pure arithmetic."""
    mode = problem.mode
    num_items, num_rows, num_cols = problem.out_shape
    size_k = problem.a_shape[-1]
    for name, scales in (("a_scales", problem.a_scales), ("b_scales", problem.b_scales)):
        if scales[0] not in (1, 128):
            raise ValueError(
                f"{name}: a scale is for 1 or 128 rows, and granularity came as {scales[0]}"
            )
        if not 0 <= scales[1] < _MAX_SCALE_STRIDE:
            raise ValueError(
                f"{name}: row_stride must be below {_MAX_SCALE_STRIDE} and came as {scales[1]}"
            )
    if problem.num_sms < 1:
        raise ValueError(f"num_sms must be at least 1 and came as {problem.num_sms}")
    tile = problem.tile or choose_tile(problem)
    # Blocks of scales of B coincide with tiles, unless they begin somewhere in an item.
    per_column = _is_per_column(problem)
    if not per_column and tile.cols % 128 and 128 % tile.cols:
        per_column = True
    tiles_m = -(-num_rows // tile.rows)
    tiles_n = -(-num_cols // tile.cols)
    num_tiles = num_items * tiles_m * tiles_n
    if num_tiles >= 1 << 30:
        raise ValueError(f"out of shape {problem.out_shape} has too many tiles")
    split_from = num_tiles
    # A last round with few tiles: their halves take half the time.
    remainder = num_tiles % problem.num_sms
    if (
        mode == "BATCHED"
        and tile.rows * tile.cols == 256 * 128
        and 0 < 2 * remainder <= problem.num_sms
    ):
        split_from -= remainder
        num_tiles += remainder
    definitions = {
        "MODE": mode,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.cols,
        "MATH_GROUPS": tile.warpgroups,
        "GROUPS_N": tile.column_groups,
        "NUM_STAGES": num_stages(tile, per_column),
        "B_PER_COLUMN": int(per_column),
        "A_FORMAT": f'"{problem.formats[0]}"',
        "B_FORMAT": f'"{problem.formats[1]}"',
        "OUT_TYPE": problem.out_type,
        "ACCUMULATE": int(problem.accumulate),
    }
    element_bytes = 4 if problem.out_type == "FP32" else 2
    steps = [step for size, step in zip(problem.out_shape[:2], problem.out_strides[:2]) if size > 1]
    is_out_aligned = problem.is_aligned and all(step * element_bytes % 16 == 0 for step in steps)
    a_map, a_step = _describe_map(
        problem.a_shape, problem.a_strides, tile.rows if tile.rows % 128 else 128
    )
    b_map, b_step = _describe_map(
        problem.b_shape, problem.b_strides, tile.cols // tile.column_groups
    )
    constants = struct.pack(
        "<8q12i",
        *problem.a_scales[1:],
        *problem.b_scales[1:],
        problem.out_strides[0],
        problem.out_strides[1],
        problem.a_scales[0].bit_length() - 1,
        problem.b_scales[0].bit_length() - 1,
        a_step,
        b_step,
        num_items,
        num_rows,
        num_cols,
        -(-size_k // BLOCK_K),
        tiles_n,
        num_tiles,
        split_from,
        is_out_aligned,
    )
    num_ctas = min(problem.num_sms, num_tiles)
    kernel = _get_kernel(
        tuple(definitions.items()),
        _NUM_THREADS * (tile.warpgroups + 1),
        shared_bytes(tile, per_column),
    )
    # Size of the struct: a multiple of its alignment, 64.
    size = 256 + 32 + len(constants)
    return Launch(kernel, num_ctas, a_map, b_map, constants + bytes(-size % 64))


def _is_per_column(problem: Problem) -> bool:
    return problem.b_scales[0] == 1 or problem.b_scales[3] % 128 != 0


def choose_tile(problem: Problem) -> Tile:
    """The tile shape that takes the fewest cycles by a simple count of rounds of tiles over the SMs."""
    num_items, num_rows, num_cols = problem.out_shape
    if problem.expected_rows is not None:
        num_rows = max(1, min(problem.expected_rows, num_rows))
    num_k_blocks = -(-problem.a_shape[-1] // BLOCK_K)
    if problem.mode == "K_GROUPED":
        num_k_blocks = -(-num_k_blocks // num_items)
    slowdown = _SLOWDOWN_PER_COLUMN if _is_per_column(problem) else _SLOWDOWN

    def count_cycles(tile: Tile) -> float:
        # A tile whose rows end early is multiplied in slabs of so many rows.
        slab_rows = 64 * tile.warpgroups // tile.column_groups
        tiles_n = -(-num_cols // tile.cols)
        num_tiles = num_items * -(-num_rows // tile.rows) * tiles_n
        area = num_items * -(-num_rows // slab_rows) * slab_rows * tiles_n * tile.cols
        # 4096 multiply-adds a cycle.
        cycles = area * num_k_blocks / 32 * slowdown[tile] / num_tiles + _TILE_CYCLES
        rounds = num_tiles / problem.num_sms
        return cycles * (rounds if rounds > _MANY_ROUNDS else math.ceil(rounds))

    # Groups of rows start at multiples of 128; and half of a tile must not be empty for sure.
    most_rows = 128 if problem.mode == "CONTIGUOUS" else 256
    usable = [x for x in TILES if x.rows <= most_rows and (x.rows < 2 * num_rows or x.rows == 64)]
    return min(usable, key=count_cycles)


def num_stages(tile: Tile, per_column: bool) -> int:
    """Stages of the ring of operands that fit into shared memory beside the output's staging."""
    stage = _stage_bytes(tile, per_column)
    staging = _STAGING_BYTES * tile.warpgroups
    return min(8, (_MAX_SHARED_BYTES - staging - 128) // (stage + 16))


def shared_bytes(tile: Tile, per_column: bool) -> int:
    """Dynamic shared memory of a CTA."""
    stages = num_stages(tile, per_column)
    ring = -(-stages * _stage_bytes(tile, per_column) // 128) * 128
    return ring + _STAGING_BYTES * tile.warpgroups + 16 * stages


def _stage_bytes(tile: Tile, per_column: bool) -> int:
    return (tile.rows + tile.cols) * BLOCK_K + 4 * (tile.rows + (tile.cols if per_column else 4))


def _describe_map(
    shape: tuple[int, ...], strides: tuple[int, ...], box_rows: int
) -> tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], int]:
    """Sizes, strides and box of an operand for `encode_tensor_map`, and the step of its item index."""
    num_items, num_rows, size_k = shape
    row_stride = strides[1] if num_rows > 1 else -(-size_k // 16) * 16
    step = int(num_items > 1 and strides[0] != 0)
    item_stride = strides[0] if step else num_rows * row_stride
    sizes = (max(size_k, 1), num_rows, num_items if step else 1)
    return (sizes, (max(row_stride, 16), max(item_stride, 16)), (BLOCK_K, box_rows, 1)), step


@lru_cache(maxsize=None)
def _get_kernel(definitions: tuple, num_threads: int, num_bytes: int) -> Kernel:
    return Kernel(
        "blockwise_gemm.cu", "multiply_blockwise", dict(definitions), num_threads, num_bytes
    )


@lru_cache(maxsize=None)
def _num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@lru_cache(maxsize=None)
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)
