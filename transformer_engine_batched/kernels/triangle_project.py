# SPDX-License-Identifier: Apache-2.0
"""Operands of the triangle multiplicative update's contraction, on Hopper, in CUDA C++ (triangle_project.cu).

    x = LN(z);  [a | b] = mask * sigmoid(x Wg^T + bg) * (x Wp^T + bp)

The same function as `triangle_forward.project_operands`, for BF16 and for sizes whose weights stay in shared memory.
Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import NamedTuple, Optional

import torch

from . import triangle_tiles as tiles
from .memory import empty_strided
from .nvrtc import Kernel, encode_tensor_map
from .triangle_forward import Operands
from .triangle_tiles import GatedProjection, Norm
from .turn_codes import turn_codes

_POSITIONS = 128
_NUM_THREADS = 384
# Of the 227 KiB of an SM that a CTA may have.
_MAX_SHARED_BYTES = 232448
_MIN_STAGES, _MAX_STAGES = 3, 6
_MODES = ("outgoing", "incoming")
_OUT_TYPES = {None: "BF16", "e4m3": "E4M3", "e5m2": "E5M2"}
# As the kernel's `read` counts them.
_PARAMETER_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_MASK_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.bool: 2}


def find_reason_against(
    z: torch.Tensor, norm: Norm, projection: GatedProjection, mask: Optional[torch.Tensor]
) -> Optional[str]:
    """None if `project_operands` takes the tensors, or the reason why not.

    Shapes that do not fit each other are errors of `check_operands`, not reasons.
    """
    weight = projection.weight_p
    for name, x in (("z", z), ("the weights", weight)):
        if x.dtype != torch.bfloat16:
            return f"{name} must be BF16 and came as {x.dtype}"
    dim, hidden = z.shape[-1], weight.shape[0] // 2
    if dim not in (64, 128) or hidden % 64 or not hidden:
        return f"D must be 64 or 128 and H a multiple of 64; they came as {dim} and {hidden}"
    if num_stages(dim, hidden) < _MIN_STAGES:
        return (
            f"the weights of D = {dim}, H = {hidden} do not fit into shared memory beside "
            f"{_MIN_STAGES} tiles of z"
        )
    if z.data_ptr() % 16:
        return f"z must begin at a multiple of 16 bytes and is at {z.data_ptr() % 16} modulo 16"
    for name, x in (
        ("norm.weight", norm.weight),
        ("norm.bias", norm.bias),
        ("projection.bias_p", projection.bias_p),
        ("projection.bias_g", projection.bias_g),
    ):
        if x is not None and x.dtype not in _PARAMETER_TYPES:
            return f"{name} must be FP32 or BF16 and came as {x.dtype}"
    if mask is not None and mask.dtype not in _MASK_TYPES:
        return f"the mask must be FP32, BF16, bool or uint8 and came as {mask.dtype}"
    return None


def check_operands(
    z: torch.Tensor, norm: Norm, projection: GatedProjection, mask: Optional[torch.Tensor]
) -> None:
    """Raises where `project_operands` and `find_operand_amaxes` do not take the tensors, or they do not fit each other."""
    tiles.check_z(z)
    dim, rows = z.shape[3], projection.weight_p.shape[0]
    tiles.check_norm("norm", norm, dim, z.device)
    tiles.check_projection("projection", projection, (rows, dim), (rows, dim), z.device)
    if mask is not None:
        tiles.check_mask(mask, z)
    reason = find_reason_against(z, norm, projection, mask)
    if reason is not None:
        raise ValueError(f"{reason}; use triangle_forward")
    if tiles.pad(z.shape[1]) ** 2 >= 1 << 31:
        raise ValueError(
            f"N = {z.shape[1]} is too large: positions of one item are counted in 32 bits"
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

    One kernel, which reads z once; `turned` takes a second one, which transposes bytes. Tensors are those that
    `check_operands` lets through: only options are checked here.

    Parameters
    ----------
    z : torch.Tensor
        BF16 ``[B, N, N, D]``, contiguous, D 64 or 128, at a multiple of 16 bytes.
    norm : Norm
        LN, over D; FP32 or BF16.
    projection : GatedProjection
        BF16 weights ``[2 H, D]``, H a multiple of 64 and at most 16384 / D; biases FP32 or BF16.
    mask : torch.Tensor, optional
        ``[B, N, N]``, FP32, BF16 or bool: factor of a and b at each position of z.
    mode, fp8_dtype, scales, amaxes, force_pow_2_scales, amax_epsilon, kept, turned
        As in `triangle_forward.project_operands`.

    Returns
    -------
    Operands

    Raises
    ------
    ValueError
        If options do not fit each other.

    Examples
    --------
    >>> z = torch.randn(1, 20, 20, 64, device="cuda", dtype=torch.bfloat16)
    >>> weight = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16)
    >>> projection = GatedProjection(weight, None, weight, None)
    >>> a, b, *_ = project_operands(z, Norm(None, None), projection, None, mode="outgoing")
    >>> a.shape
    torch.Size([1, 64, 32, 32])
    """
    if mode not in _MODES:
        raise ValueError(f'`mode` must be "outgoing" or "incoming" and came as {mode!r}')
    if fp8_dtype not in _OUT_TYPES:
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
    tiles.check_state("scales", scales, 2, z.device)
    tiles.check_state("amaxes", amaxes, 2, z.device)
    batch, size, _, _ = z.shape
    hidden, device_index = projection.weight_p.shape[0] // 2, z.get_device()
    padded = tiles.pad(size)
    # Two tensors, not parts of one: backward frees one before the other.
    operands = [
        empty_strided(
            (batch, hidden, padded, padded),
            (hidden * padded * padded, padded * padded, padded, 1),
            torch.bfloat16 if fp8_dtype is None else torch.uint8,
            device_index,
        )
        for _ in range(2)
    ]
    scale_invs = None
    if fp8_dtype is not None:
        # Each at an address of 16 bytes, which cuBLASLt asks of a scale.
        scale_invs = empty_strided((2,), (4,), torch.float32, device_index)
    if z.numel():
        # The amax is found unless it is what the scale is computed from.
        raises = amaxes is not None and (scales is not None or fp8_dtype is None)
        outputs = (*operands, scales, amaxes, scale_invs)
        options = (mode, _OUT_TYPES[fp8_dtype], raises, force_pow_2_scales, amax_epsilon)
        _launch(z, norm, projection, mask, outputs, options)
    elif scale_invs is not None:
        scale_invs.fill_(1.0) if scales is None else torch.reciprocal(scales, out=scale_invs)
    a_turned, b_turned = map(turn_codes, operands) if turned else (None, None)
    a, b = operands if kept else (None, None)
    return Operands(a, b, a_turned, b_turned, scale_invs)


def find_operand_amaxes(
    z: torch.Tensor, norm: Norm, projection: GatedProjection, mask: Optional[torch.Tensor]
) -> torch.Tensor:
    """float32 ``[2]``: largest magnitudes of a and b, for current scaling; see `project_operands`."""
    amaxes = torch.zeros(2, dtype=torch.float32, device=z.device)
    if z.numel():
        options = ("outgoing", "NONE", True, False, 0.0)
        _launch(z, norm, projection, mask, (None, None, None, amaxes, None), options)
    return amaxes


def num_stages(dim: int, hidden: int) -> int:
    """Tiles of z in shared memory beside the weights; too few if below 3."""
    free = _MAX_SHARED_BYTES - _fixed_bytes(dim, hidden)
    return min(_MAX_STAGES, free // _stage_bytes(dim))


def shared_bytes(dim: int, hidden: int) -> int:
    """Dynamic shared memory of a CTA."""
    return _fixed_bytes(dim, hidden) + num_stages(dim, hidden) * _stage_bytes(dim)


def _fixed_bytes(dim: int, hidden: int) -> int:
    """Weights, the norm's parameters, the weights' barrier."""
    return 2 * (2 * hidden * dim * 2) + 2 * dim * 4 + 8


def _stage_bytes(dim: int) -> int:
    """Positions, their masks, three barriers."""
    return _POSITIONS * (dim * 2 + 4) + 3 * 8


class _Plan(NamedTuple):
    """What the launches for tensors of one description share."""

    kernel: Kernel
    num_ctas: int
    z_map: tuple  # all of `encode_tensor_map` but the address
    weight_map: tuple
    numbers: bytes  # of the struct, behind its pointers


def _launch(
    z: torch.Tensor,
    norm: Norm,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
    outputs: tuple[Optional[torch.Tensor], ...],
    options: tuple[str, str, bool, bool, float],
) -> None:
    if mask is not None and not mask.is_contiguous():
        mask = mask.contiguous()
    weight_p, bias_p, weight_g, bias_g = projection
    pointers = (mask, norm.weight, norm.bias, bias_p, bias_g, *outputs)
    device_index = z.get_device()
    plan = _make_plan(
        z.shape,
        weight_p.shape[0],
        tuple([None if x is None else x.dtype for x in pointers[:5]]),
        norm.eps,
        options,
        tiles.num_multiprocessors(device_index),
    )
    parts = (
        encode_tensor_map(z.data_ptr(), *plan.z_map),
        encode_tensor_map(weight_p.data_ptr(), *plan.weight_map),
        encode_tensor_map(weight_g.data_ptr(), *plan.weight_map),
        struct.pack("<10Q", *[0 if x is None else x.data_ptr() for x in pointers]),
        plan.numbers,
    )
    plan.kernel.launch(plan.num_ctas, b"".join(parts), device_index)


@lru_cache(maxsize=4096)
def _make_plan(
    shape: tuple[int, ...],
    rows: int,
    types: tuple[Optional[torch.dtype], ...],
    eps: float,
    options: tuple[str, str, bool, bool, float],
    num_multiprocessors: int,
) -> _Plan:
    mode, out_type, raises, force_pow_2_scales, amax_epsilon = options
    batch, size, _, dim = shape
    padded = tiles.pad(size)
    num_tiles = batch * padded * padded // _POSITIONS
    mask_type, *parameter_types = types
    definitions = (
        ("DIM", dim),
        ("HIDDEN", rows // 2),
        ("OUT_TYPE", out_type),
        ("HAS_MASK", int(mask_type is not None)),
        ("HAS_BIAS", int(types[3:] != (None, None))),
        ("IS_EVEN", int(size == padded)),
        ("RAISES", int(raises)),
        ("NUM_STAGES", num_stages(dim, rows // 2)),
    )
    steps = (dim, size * dim) if mode == "outgoing" else (size * dim, dim)
    # A box lies in one row of padded positions.
    box_positions = math.gcd(padded, _POSITIONS)
    mask_steps = (size, 1) if mode == "outgoing" else (1, size)
    numbers = struct.pack(
        "<3q2f11i",
        *mask_steps,
        size * size,
        eps,
        amax_epsilon,
        0 if mask_type is None else _MASK_TYPES[mask_type],
        *(0 if x is None else _PARAMETER_TYPES[x] for x in parameter_types),
        force_pow_2_scales,
        size,
        padded,
        num_tiles,
        box_positions,
        mode == "incoming" and padded % _POSITIONS == 0,
    )
    # Size of the struct, with ten pointers: a multiple of its alignment, 64.
    numbers += bytes(-(len(numbers) + 80) % 64)
    return _Plan(
        _get_kernel(definitions, shared_bytes(dim, rows // 2)),
        min(num_tiles, num_multiprocessors),
        (
            (2 * dim, size, size, batch),
            (2 * steps[0], 2 * steps[1], 2 * size * size * dim),
            (128, box_positions, 1, 1),
        ),
        ((2 * dim, rows, 1), (2 * dim, 2 * dim * rows), (128, 8, 1)),
        numbers,
    )


@lru_cache(maxsize=None)
def _get_kernel(definitions: tuple, num_bytes: int) -> Kernel:
    values = dict(definitions)
    return Kernel(
        "triangle_project.cu", "project_operands", values, _NUM_THREADS, num_bytes, waits=True
    )
