# SPDX-License-Identifier: Apache-2.0
"""Backward of the triangle multiplicative update's operands, on Hopper, in CUDA C++ (triangle_project_backward.cu).

    grad_a, grad_b -> grad_z, parameters of the input

The same function as `triangle_backward.project_backward`, for BF16, D of 64 or 128 and H a multiple of 64. Must not
import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Optional

import torch

from . import triangle_tiles as tiles
from .nvrtc import Kernel, encode_tensor_map
from .triangle_gradients import InputGradients, NormShare, check_share
from .triangle_tiles import GatedProjection, Norm

_POSITIONS = 64
_ROWS = 128  # of the weights, in one launch
_CHANNELS = 64  # of one operand, of each half of those rows
_NUM_THREADS = 384
_STAGES = 4
# As the kernel's `read` counts them.
_PARAMETER_TYPES = {torch.float32: 0, torch.bfloat16: 1}
# As its definition `MASK` does.
_MASK_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.uint8: 3, torch.bool: 3}


def find_reason_against(
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    z: torch.Tensor,
    norm: Norm,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
    share: Optional[NormShare] = None,
) -> Optional[str]:
    """None if `project_backward` takes the tensors, or the reason why not.

    Shapes that do not fit each other are errors of `project_backward`, not reasons.
    """
    for name, x in (
        ("grad_a", grad_a),
        ("grad_b", grad_b),
        ("z", z),
        ("the weights", projection.weight_p),
    ):
        if x.dtype != torch.bfloat16:
            return f"{name} must be BF16 and came as {x.dtype}"
    dim, hidden = z.shape[-1], projection.weight_p.shape[0] // 2
    if dim not in (64, 128) or hidden % _CHANNELS or not hidden:
        return f"D must be 64 or 128 and H a multiple of 64; they came as {dim} and {hidden}"
    grad_hat, hat = (None, None) if share is None else (share.grad_hat, share.hat)
    for name, x in (("z", z), ("grad_hat", grad_hat), ("hat", hat)):
        if x is not None and x.data_ptr() % 16:
            return f"{name} must begin at a multiple of 16 bytes and is at {x.data_ptr() % 16} modulo 16"
    for name, x in (("grad_a", grad_a), ("grad_b", grad_b)):
        steps = [step for size, step in zip(x.shape[:3], x.stride()[:3]) if size > 1]
        if x.data_ptr() % 16 or any(step % 8 for step in steps):
            return (
                f"rows of {name} must begin at multiples of 16 bytes; it came with stride "
                f"{x.stride()}, at {x.data_ptr() % 16} modulo 16"
            )
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


def project_backward(
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    z: torch.Tensor,
    norm: Norm,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
    share: Optional[NormShare] = None,
) -> InputGradients:
    """Backward of `triangle_project.project_operands`: gradients of z, of LN and of the projection.

    One kernel for each 128 rows of the weights, which makes the gradients of activations and of weights at once: two
    for H = 128. Between them the gradient of ``hat = (z - mean) / std`` lies in BF16 where that of z will.

    Parameters
    ----------
    grad_a, grad_b : torch.Tensor
        BF16 ``[B, H, N, N]``, the positions of z; rows of the last dim contiguous and at multiples of 16 bytes.
    z : torch.Tensor
        BF16 ``[B, N, N, D]``, contiguous, D 64 or 128, at a multiple of 16 bytes.
    norm : Norm
        LN, over D; FP32 or BF16.
    projection : GatedProjection
        BF16 weights ``[2 H, D]``, H a multiple of 64; biases FP32 or BF16.
    mask : torch.Tensor, optional
        ``[B, N, N]``, FP32, BF16 or bool. It gets no gradient.
    share : NormShare, optional
        What `output_backward` has found of LN's backward. Its memory is used for the gradient of z.

    Returns
    -------
    InputGradients

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes or strides do not fit; `find_reason_against` gives the reason beforehand.

    Examples
    --------
    >>> z = torch.randn(1, 20, 20, 64, device="cuda", dtype=torch.bfloat16)
    >>> weight = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16)
    >>> projection = GatedProjection(weight, None, weight, None)
    >>> grad = torch.randn(1, 64, 20, 32, device="cuda", dtype=torch.bfloat16)[..., :20]
    >>> project_backward(grad, grad, z, Norm(None, None), projection, None).z.shape
    torch.Size([1, 20, 20, 64])
    """
    _check(grad_a, grad_b, z, norm, projection, mask, share)
    if mask is not None:
        mask = tiles.check_mask(mask, z)
    grad_z = torch.empty_like(z) if share is None else share.grad_hat
    dim, rows = z.shape[3], projection.weight_p.shape[0]
    device_index = z.get_device()
    tiles_per_row = -(-z.shape[2] // _POSITIONS)
    num_tiles = z.shape[0] * z.shape[1] * tiles_per_row
    num_ctas = min(num_tiles, tiles.num_multiprocessors(device_index))
    make = torch.empty if num_ctas else torch.zeros
    sums = make((max(num_ctas, 1), 2 * rows * (dim + 1)), dtype=torch.float32, device=z.device)
    num_launches = rows // _ROWS
    norm_sums = make(
        (num_launches * max(num_ctas, 1), 2 * dim), dtype=torch.float32, device=z.device
    )
    if num_ctas:
        hat, rstds = (None, None) if share is None else (share.hat, share.rstds)
        maps = _encode_maps(z if hat is None else hat, grad_z)
        for first in range(0, rows, _ROWS):
            is_first, is_last = first == 0, first + _ROWS == rows
            has_grad = share is not None or not is_first
            added = (norm.bias, projection.bias_p, projection.bias_g)
            definitions = (
                ("DIM", dim),
                ("MASK", 0 if mask is None else _MASK_TYPES[mask.dtype]),
                ("HAS_BIAS", int(any(x is not None for x in added))),
                ("HAS_GRAD", int(has_grad)),
                ("HAS_HAT", int(hat is not None)),
                ("IS_LAST", int(is_last)),
            )
            grads, channels = [], []
            for row in (first, first + _CHANNELS):
                grad, channel = (grad_a, row) if row < rows // 2 else (grad_b, row - rows // 2)
                grads.append(_encode_grad_map(grad))
                channels.append(channel)
            own_norm_sums = norm_sums[first // _ROWS * num_ctas :]
            biases, weights = projection[1::2], projection[::2]
            pointers = (mask, *norm[:2], *biases, rstds, *weights, sums, own_norm_sums)
            values = struct.pack(
                "<10Qf13i",
                *(0 if x is None else x.data_ptr() for x in pointers),
                norm.eps,
                *(0 if x is None else _PARAMETER_TYPES[x.dtype] for x in pointers[1:5]),
                first,
                rows,
                *channels,
                z.shape[1],
                tiles_per_row,
                num_tiles,
                *divmod(num_ctas, tiles_per_row),
            )
            # Size of the struct: a multiple of its alignment, 64.
            values += bytes(-len(values) % 64)
            kernel = _get_kernel(definitions)
            kernel.launch(num_ctas, b"".join((*maps, *grads, values)), device_index)
    shapes = ((rows, dim), (rows,), (rows, dim), (rows,))
    grads = GatedProjection(*tiles.cast_sums(sums, tuple(projection), shapes))
    if share is not None:
        norm_sums = torch.cat((share.norm_sums, norm_sums))
    norm_grads = tiles.cast_sums(norm_sums, (norm.weight, norm.bias), ((dim,),) * 2)
    return InputGradients(grad_z, Norm(*norm_grads, norm.eps), grads)


def shared_bytes(dim: int) -> int:
    """Dynamic shared memory of a CTA: weights, tiles, the mask, moments, places, barriers."""
    weights = 2 * _ROWS * dim * 2
    # A tile of x in each stage; grad_hat of both halves of the rows, and what it is added to.
    positions = (_STAGES + 3) * _POSITIONS * dim * 2
    # The operand's gradient, dp and dg.
    channels = 3 * _ROWS * _POSITIONS * 2
    # The mask and 1 / std of positions, places of tiles.
    small = _STAGES * (2 * _POSITIONS * 4 + 4 * 16)
    return weights + positions + channels + small + 8 * (6 * _STAGES + 14)


def _check(
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    z: torch.Tensor,
    norm: Norm,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
    share: Optional[NormShare],
) -> None:
    tiles.check_z(z)
    for name, grad in (("grad_a", grad_a), ("grad_b", grad_b)):
        tiles.check_channel_first(name, grad, z)
    if grad_b.shape != grad_a.shape or grad_b.dtype != grad_a.dtype:
        raise ValueError(
            f"`grad_b` must be {grad_a.dtype} {list(grad_a.shape)} as `grad_a` and came as "
            f"{grad_b.dtype}, shape {tuple(grad_b.shape)}"
        )
    dim, rows = z.shape[3], 2 * grad_a.shape[1]
    tiles.check_norm("norm", norm, dim, z.device)
    tiles.check_projection("projection", projection, (rows, dim), (rows, dim), z.device)
    check_share(share, z)
    reason = find_reason_against(grad_a, grad_b, z, norm, projection, mask, share)
    if reason is not None:
        raise ValueError(f"{reason}; use triangle_backward")


def _encode_maps(z: torch.Tensor, grad_z: torch.Tensor) -> tuple[bytes, ...]:
    """Of z, or hat, and the gradient of z, 16 positions at a time."""
    batch, size, _, dim = z.shape
    sizes = (2 * dim, size, size, batch)
    strides = (2 * dim, 2 * size * dim, 2 * size * size * dim)
    return tuple(
        encode_tensor_map(x.data_ptr(), sizes, strides, (128, 16, 1, 1)) for x in (z, grad_z)
    )


def _encode_grad_map(grad: torch.Tensor) -> bytes:
    """Rows of positions; outside of them zeros."""
    batch, hidden, size, _ = grad.shape
    # The stride of a dim of size 1 may be anything.
    strides = [2 * step if n > 1 else 16 for n, step in zip(grad.shape[:3], grad.stride()[:3])]
    return encode_tensor_map(
        grad.data_ptr(),
        (2 * size, hidden, size, batch),
        (strides[1], strides[2], strides[0]),
        (128, _CHANNELS, 1, 1),
    )


@lru_cache(maxsize=None)
def _get_kernel(definitions: tuple) -> Kernel:
    values = dict(definitions)
    return Kernel(
        "triangle_project_backward.cu",
        "project_backward",
        values,
        _NUM_THREADS,
        shared_bytes(values["DIM"]),
    )
