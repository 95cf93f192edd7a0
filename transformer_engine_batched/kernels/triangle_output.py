# SPDX-License-Identifier: Apache-2.0
"""The triangle multiplicative update's output, on Hopper, in CUDA C++ (triangle_output.cu).

    out = sigmoid(LN_in(z) Wgo^T + bgo) * (LN_out(c) Wo^T + bo)

The same function as `triangle_forward.project_output`, for BF16 and D and H of 64 or 128. Must not import Transformer
Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple, Optional

import torch

from . import triangle_tiles as tiles
from .memory import empty_strided
from .nvrtc import Kernel, encode_tensor_map
from .triangle_forward import check_output
from .triangle_tiles import GatedProjection, Norm

_POSITIONS = 64
_NUM_GROUPS = 4
# As the kernel's `read_parameter` counts them.
_PARAMETER_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def find_reason_against(
    c: torch.Tensor, z: torch.Tensor, norm_in: Norm, norm_out: Norm, output: GatedProjection
) -> Optional[str]:
    """None if `project_output` takes the tensors, or the reason why not.

    Shapes that do not fit each other are errors of `check_tensors`, not reasons.
    """
    for name, x in (("c", c), ("z", z), ("the weights", output.weight_p)):
        if x.dtype != torch.bfloat16:
            return f"{name} must be BF16 and came as {x.dtype}"
    dim, hidden = z.shape[-1], c.shape[1]
    if dim not in (64, 128) or hidden not in (64, 128):
        return f"D and H must be 64 or 128 and came as {dim} and {hidden}"
    if z.data_ptr() % 16:
        return f"z must begin at a multiple of 16 bytes and is at {z.data_ptr() % 16} modulo 16"
    steps = [step for size, step in zip(c.shape[:3], c.stride()[:3]) if size > 1]
    if c.data_ptr() % 16 or any(step % 8 for step in steps):
        return (
            "rows of c must begin at multiples of 16 bytes; it came with stride "
            f"{c.stride()}, at {c.data_ptr() % 16} modulo 16"
        )
    for name, x in (
        ("norm_in.weight", norm_in.weight),
        ("norm_in.bias", norm_in.bias),
        ("norm_out.weight", norm_out.weight),
        ("norm_out.bias", norm_out.bias),
        ("output.bias_p", output.bias_p),
        ("output.bias_g", output.bias_g),
    ):
        if x is not None and x.dtype not in _PARAMETER_TYPES:
            return f"{name} must be FP32 or BF16 and came as {x.dtype}"
    return None


def check_tensors(
    c: torch.Tensor, z: torch.Tensor, norm_in: Norm, norm_out: Norm, output: GatedProjection
) -> None:
    """Raises where `project_output` does not take the tensors, or they do not fit each other."""
    check_output(c, z, norm_in, norm_out, output)
    reason = find_reason_against(c, z, norm_in, norm_out, output)
    if reason is not None:
        raise ValueError(f"{reason}; use triangle_forward")


class _Plan(NamedTuple):
    """What the launches for tensors of one description share."""

    kernel: Kernel
    num_ctas: int
    z_map: tuple  # all of `encode_tensor_map` but the address
    c_map: tuple
    numbers: bytes  # of the struct, behind its pointers


def project_output(
    c: torch.Tensor, z: torch.Tensor, norm_in: Norm, norm_out: Norm, output: GatedProjection
) -> torch.Tensor:
    """``sigmoid(x Wgo^T + bgo) * (LN_out(c) Wo^T + bo)`` with ``x = LN_in(z)``.

    One kernel, which reads c and z once. Tensors are those that `check_tensors` lets through: nothing is checked here.

    Parameters
    ----------
    c : torch.Tensor
        BF16 ``[B, H, N, N]``, channel-first; rows of the last dim contiguous and at multiples of 16 bytes.
    z : torch.Tensor
        BF16 ``[B, N, N, D]``, contiguous.
    norm_in, norm_out : Norm
        Over D and over H; FP32 or BF16.
    output : GatedProjection
        `weight_p` is Wo ``[D, H]``, `weight_g` is Wgo ``[D, D]``, BF16; biases FP32 or BF16.

    Returns
    -------
    torch.Tensor
        BF16 ``[B, N, N, D]``, contiguous.
    """
    device_index = z.get_device()
    out = empty_strided(tuple(z.shape), z.stride(), z.dtype, device_index)
    if not z.numel():
        return out
    weight_p, bias_p, weight_g, bias_g = output
    parameters = (norm_in.weight, norm_in.bias, norm_out.weight, norm_out.bias, bias_p, bias_g)
    plan = _make_plan(
        z.shape,
        c.shape[1],
        c.stride(),
        tuple([None if x is None else x.dtype for x in parameters]),
        norm_in.eps,
        norm_out.eps,
        tiles.num_multiprocessors(device_index),
    )
    pointers = (*parameters, weight_p, weight_g, out)
    parts = (
        encode_tensor_map(z.data_ptr(), *plan.z_map),
        encode_tensor_map(c.data_ptr(), *plan.c_map),
        struct.pack("<9Q", *[0 if x is None else x.data_ptr() for x in pointers]),
        plan.numbers,
    )
    plan.kernel.launch(plan.num_ctas, b"".join(parts), device_index)
    return out


@lru_cache(maxsize=4096)
def _make_plan(
    shape: tuple[int, ...],
    hidden: int,
    c_strides: tuple[int, ...],
    types: tuple[Optional[torch.dtype], ...],
    in_eps: float,
    out_eps: float,
    num_multiprocessors: int,
) -> _Plan:
    batch, size, _, dim = shape
    tiles_per_row = -(-size // _POSITIONS)
    num_tiles = batch * size * tiles_per_row
    numbers = struct.pack(
        "<2f10i",
        in_eps,
        out_eps,
        *(0 if x is None else _PARAMETER_TYPES[x] for x in types),
        size,
        tiles_per_row,
        num_tiles,
        0,
    )
    # Size of the struct, with nine pointers: a multiple of its alignment, 64.
    numbers += bytes(-(len(numbers) + 72) % 64)
    # The stride of a dim of size 1 may be anything.
    sizes = (batch, hidden, size)
    strides = [2 * step if n > 1 else 16 for n, step in zip(sizes, c_strides)]
    has_bias = int(types[4:] != (None, None))
    return _Plan(
        _get_kernel((("DIM", dim), ("HIDDEN", hidden), ("HAS_BIAS", has_bias))),
        # Few tiles: one for each SM before one has two.
        min(num_tiles, num_multiprocessors),
        (
            (2 * dim, size, size, batch),
            (2 * dim, 2 * size * dim, 2 * size * size * dim),
            (128, _POSITIONS, 1, 1),
        ),
        (
            (2 * size, hidden, size, batch),
            (strides[1], strides[2], strides[0]),
            (128, hidden, 1, 1),
        ),
        numbers,
    )


def shared_bytes(dim: int, hidden: int) -> int:
    """Dynamic shared memory of a CTA: weights, a tile of z and of c for each warpgroup, parameters, barriers."""
    weights = 2 * dim * (hidden + dim)
    stages = _NUM_GROUPS * 2 * _POSITIONS * (dim + hidden)
    return weights + stages + 8 * (dim + hidden) + 8 * _NUM_GROUPS


@lru_cache(maxsize=None)
def _get_kernel(definitions: tuple) -> Kernel:
    values = dict(definitions)
    num_bytes = shared_bytes(values["DIM"], values["HIDDEN"])
    threads = 128 * _NUM_GROUPS
    return Kernel("triangle_output.cu", "project_output", values, threads, num_bytes, waits=True)
