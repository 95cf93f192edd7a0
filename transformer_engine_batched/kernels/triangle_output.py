# SPDX-License-Identifier: Apache-2.0
"""The triangle multiplicative update's output, on Hopper, in CUDA C++ (triangle_output.cu).

    out = sigmoid(LN_in(z) Wgo^T + bgo) * (LN_out(c) Wo^T + bo)

The same function as `triangle_forward.project_output`, for BF16 and D and H of 64 or 128. Must not import Transformer
Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Optional

import torch

from . import triangle_tiles as tiles
from .nvrtc import Kernel, encode_tensor_map
from .triangle_forward import check_output
from .triangle_tiles import GatedProjection, Norm

_POSITIONS = 64
_NUM_GROUPS = 4
# As the kernel's `read_parameter` counts them.
_PARAMETER_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def can_project(
    c: torch.Tensor, z: torch.Tensor, norm_in: Norm, norm_out: Norm, output: GatedProjection
) -> Optional[str]:
    """None if `project_output` takes the tensors, or the reason why not.

    Shapes that do not fit each other are errors of `project_output`, not reasons.
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


def project_output(
    c: torch.Tensor, z: torch.Tensor, norm_in: Norm, norm_out: Norm, output: GatedProjection
) -> torch.Tensor:
    """``sigmoid(x Wgo^T + bgo) * (LN_out(c) Wo^T + bo)`` with ``x = LN_in(z)``.

    One kernel, which reads c and z once.

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

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes or strides do not fit; `can_project` gives the reason beforehand.
    """
    dim, hidden = check_output(c, z, norm_in, norm_out, output)
    reason = can_project(c, z, norm_in, norm_out, output)
    if reason is not None:
        raise ValueError(f"{reason}; use triangle_forward")
    out = torch.empty_like(z)
    if not z.numel():
        return out
    batch, size = z.shape[:2]
    tiles_per_row = -(-size // _POSITIONS)
    num_tiles = batch * size * tiles_per_row
    z_map = encode_tensor_map(
        z.data_ptr(),
        (2 * dim, size, size, batch),
        (2 * dim, 2 * size * dim, 2 * size * size * dim),
        (128, _POSITIONS, 1, 1),
    )
    # The stride of a dim of size 1 may be anything.
    strides = [2 * step if n > 1 else 16 for n, step in zip(c.shape[:3], c.stride()[:3])]
    c_map = encode_tensor_map(
        c.data_ptr(),
        (2 * size, hidden, size, batch),
        (strides[1], strides[2], strides[0]),
        (128, hidden, 1, 1),
    )
    parameters = (*norm_in[:2], *norm_out[:2], *output[1::2])
    pointers = (*parameters, *output[::2], out)
    values = struct.pack(
        "<9Q2f10i",
        *(0 if x is None else x.data_ptr() for x in pointers),
        norm_in.eps,
        norm_out.eps,
        *(0 if x is None else _PARAMETER_TYPES[x.dtype] for x in parameters),
        size,
        tiles_per_row,
        num_tiles,
        0,
    )
    # Size of the struct: a multiple of its alignment, 64.
    values += bytes(-len(values) % 64)
    device_index = z.get_device()
    has_bias = output.bias_p is not None or output.bias_g is not None
    kernel = _get_kernel((("DIM", dim), ("HIDDEN", hidden), ("HAS_BIAS", int(has_bias))))
    # Few tiles: one for each SM before one has two.
    num_ctas = min(num_tiles, tiles.num_multiprocessors(device_index))
    kernel.launch(num_ctas, z_map + c_map + values, device_index)
    return out


def shared_bytes(dim: int, hidden: int) -> int:
    """Dynamic shared memory of a CTA: weights, a tile of z and of c for each warpgroup, parameters, barriers."""
    weights = 2 * dim * (hidden + dim)
    stages = _NUM_GROUPS * 2 * _POSITIONS * (dim + hidden)
    return weights + stages + 8 * (dim + hidden) + 8 * _NUM_GROUPS


@lru_cache(maxsize=None)
def _get_kernel(definitions: tuple) -> Kernel:
    values = dict(definitions)
    num_bytes = shared_bytes(values["DIM"], values["HIDDEN"])
    return Kernel("triangle_output.cu", "project_output", values, 128 * _NUM_GROUPS, num_bytes)
