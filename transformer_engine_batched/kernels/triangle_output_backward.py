# SPDX-License-Identifier: Apache-2.0
"""Backward of the triangle multiplicative update's output, on Hopper, in CUDA C++ (triangle_output_backward.cu).

    grad_out -> grad_c, the output gate's share of LN_in's backward, parameters of the output

The same function as `triangle_backward.output_backward`, for BF16 and D = H = 128, in one kernel. Must not import
Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple, Optional

import torch

from . import triangle_tiles as tiles
from .float8_quantize import quantize_float8_current
from .memory import empty_strided
from .nvrtc import Kernel, encode_tensor_map
from .triangle_forward import check_output
from .triangle_gradients import NormShare, OutputGradients
from .triangle_tiles import GatedProjection, Norm
from .turn_codes import turn_codes

_CHANNELS = 128
_POSITIONS = 64
_NUM_THREADS = 384
_UNIT_BYTES = 2 * _POSITIONS * _CHANNELS
# Of Wo, bo, Wgo and bgo; sums of LN_in's and LN_out's parameters and of these.
_SHAPES = ((_CHANNELS, _CHANNELS), (_CHANNELS,)) * 2
_NUM_SUMS = (2 * _CHANNELS, 2 * _CHANNELS, 2 * _CHANNELS * (_CHANNELS + 1))
# As the kernel's `read` counts them.
_PARAMETER_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def find_reason_against(
    grad_out: torch.Tensor,
    c: torch.Tensor,
    z: torch.Tensor,
    norm_in: Norm,
    norm_out: Norm,
    output: GatedProjection,
) -> Optional[str]:
    """None if `output_backward` takes the tensors, or the reason why not.

    Shapes that do not fit each other are errors of `check_tensors`, not reasons.
    """
    named = (("grad_out", grad_out), ("c", c), ("z", z), ("the weights", output.weight_p))
    for name, x in named:
        if x.dtype != torch.bfloat16:
            return f"{name} must be BF16 and came as {x.dtype}"
    dim, hidden = z.shape[-1], c.shape[1]
    if (dim, hidden) != (_CHANNELS, _CHANNELS):
        return f"D and H must be {_CHANNELS} and came as {dim} and {hidden}"
    for name, x in named[:1] + named[2:3]:
        offset = x.data_ptr() % 16
        if offset:
            return f"{name} must begin at a multiple of 16 bytes and is at {offset} modulo 16"
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
    if tiles.pad(z.shape[1]) ** 2 >= 1 << 31:
        return f"N = {z.shape[1]} is too large: positions of one item are counted in 32 bits"
    return None


def check_tensors(
    grad_out: torch.Tensor,
    c: torch.Tensor,
    z: torch.Tensor,
    norm_in: Norm,
    norm_out: Norm,
    output: GatedProjection,
) -> None:
    """Raises where `output_backward` does not take the tensors, or they do not fit each other."""
    check_output(c, z, norm_in, norm_out, output)
    tiles.check_tensor("grad_out", grad_out, tuple(z.shape), z.device)
    reason = find_reason_against(grad_out, c, z, norm_in, norm_out, output)
    if reason is not None:
        raise ValueError(f"{reason}; use triangle_backward")


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
    """Backward of `triangle_output.project_output`.

    One kernel, which reads grad_out, c and z once; the sums over positions are those of each multiprocessor, added
    in a fixed order: results do not change from run to run. Tensors are those that `check_tensors` lets through: only
    options are checked here.

    Parameters
    ----------
    grad_out : torch.Tensor
        BF16 ``[B, N, N, D]``, contiguous.
    c, z, norm_in, norm_out, output
        As `triangle_output.project_output` was given them.
    fp8_dtype : {"e5m2", "e4m3"}, optional
        Format in which grad_c is returned. None: BF16.
    scale : torch.Tensor, optional
        float32, one element: delayed scaling. Without it grad_c is written in BF16 and quantized by
        `float8_quantize.quantize_float8_current`.
    amax : torch.Tensor, optional
        float32, one element, raised in place to the largest ``|grad_c|`` before scaling; delayed scaling only.
    force_pow_2_scales, amax_epsilon
        Of current scaling.

    Returns
    -------
    triangle_gradients.OutputGradients

    Raises
    ------
    ValueError
        If options do not fit each other.
    """
    if fp8_dtype not in (None, "e4m3", "e5m2"):
        raise ValueError(f'`fp8_dtype` must be None, "e4m3" or "e5m2" and came as {fp8_dtype!r}')
    if scale is None and amax is not None or scale is not None and fp8_dtype is None:
        raise ValueError(
            "`scale` and `amax` are those of delayed scaling: with fp8_dtype, together"
        )
    for name, state in (("scale", scale), ("amax", amax)):
        tiles.check_state(name, state, 1, z.device)
    device_index = z.get_device()
    weight_p, bias_p, weight_g, bias_g = output
    parameters = (norm_in.weight, norm_in.bias, norm_out.weight, norm_out.bias, bias_p, bias_g)
    plan = _make_plan(
        tuple(z.shape),
        c.stride(),
        tuple([None if x is None else x.dtype for x in parameters]),
        norm_in.eps,
        norm_out.eps,
        None if scale is None else fp8_dtype,
        amax is not None,
        tiles.num_multiprocessors(device_index),
    )
    batch, size = plan.shape
    size_z = z.shape[1]
    grad_c = empty_strided(
        (batch, _CHANNELS, size, size),
        (_CHANNELS * size * size, size * size, size, 1),
        torch.bfloat16 if scale is None else torch.uint8,
        device_index,
    )
    grad_hat, hat = (
        empty_strided(tuple(z.shape), z.stride(), z.dtype, device_index) for _ in range(2)
    )
    rstds = empty_strided(
        tuple(z.shape[:3]), (size_z * size_z, size_z, 1), torch.float32, device_index
    )
    scale_inv = None
    if scale is not None:
        scale_inv = empty_strided((1,), (1,), torch.float32, device_index)
    shares = [
        empty_strided((max(plan.num_ctas, 1), n), (n, 1), torch.float32, device_index)
        for n in _NUM_SUMS
    ]
    if plan.num_ctas:
        results = (grad_c, grad_hat, rstds, *shares, scale, amax, scale_inv)
        pointers = (*parameters, weight_p, weight_g, *results)
        parts = (
            encode_tensor_map(z.data_ptr(), *plan.row_map),
            encode_tensor_map(grad_out.data_ptr(), *plan.row_map),
            encode_tensor_map(c.data_ptr(), *plan.c_map),
            encode_tensor_map(hat.data_ptr(), *plan.row_map[:-1], (128, 16, 1, 1)),
            struct.pack("<17Q", *[0 if x is None else x.data_ptr() for x in pointers]),
            plan.numbers,
        )
        plan.kernel.launch(plan.num_ctas, b"".join(parts), device_index)
    else:
        for share in shares:
            share.zero_()
        if scale is not None:
            torch.reciprocal(scale.reshape(1), out=scale_inv)
    grad_c_turned = None
    if scale is not None:
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
    in_shares, out_shares, weight_shares = shares
    norm_grads = tiles.cast_sums(out_shares, norm_out[:2], ((_CHANNELS,),) * 2)
    output_grads = tiles.cast_sums(weight_shares, tuple(output), _SHAPES)
    return OutputGradients(
        grad_c,
        grad_c_turned,
        scale_inv,
        NormShare(grad_hat, in_shares, hat, rstds),
        Norm(*norm_grads, norm_out.eps),
        GatedProjection(*output_grads),
    )


class _Plan(NamedTuple):
    """What the launches for tensors of one description share."""

    shape: tuple[int, int]  # of grad_c: items, padded rows
    kernel: Optional[Kernel]
    num_ctas: int
    row_map: tuple  # of z and grad_out, all of `encode_tensor_map` but the address
    c_map: tuple
    numbers: bytes  # of the struct, behind its pointers


@lru_cache(maxsize=4096)
def _make_plan(
    shape: tuple[int, ...],
    c_strides: tuple[int, ...],
    types: tuple[Optional[torch.dtype], ...],
    in_eps: float,
    out_eps: float,
    code_dtype: Optional[str],
    raises: bool,
    num_multiprocessors: int,
) -> _Plan:
    batch, size = shape[:2]
    padded = tiles.pad(size)
    tiles_per_row = -(-padded // _POSITIONS)
    num_tiles = batch * padded * tiles_per_row
    num_ctas = min(num_tiles, num_multiprocessors)
    if not num_ctas:
        return _Plan((batch, padded), None, 0, (), (), b"")
    lines = num_ctas // tiles_per_row
    numbers = struct.pack(
        "<2f13i",
        in_eps,
        out_eps,
        *(0 if x is None else _PARAMETER_TYPES[x] for x in types),
        size,
        padded,
        tiles_per_row,
        num_tiles,
        num_ctas % tiles_per_row * _POSITIONS,
        lines % padded,
        lines // padded,
    )
    # Size of the struct, with 17 pointers: a multiple of its alignment, 64.
    numbers += bytes(-(len(numbers) + 136) % 64)
    row_bytes = 2 * _CHANNELS
    # The stride of a dim of size 1 may be anything.
    sizes = (batch, _CHANNELS, size)
    strides = [2 * step if n > 1 else 16 for n, step in zip(sizes, c_strides)]
    definitions = (
        ("OUT_TYPE", "BF16" if code_dtype is None else code_dtype.upper()),
        ("HAS_BIAS", int(any(types[i] is not None for i in (1, 3, 4, 5)))),
        ("RAISES", int(raises)),
        ("NUM_UNITS", 6 if code_dtype is None else 7),
    )
    return _Plan(
        (batch, padded),
        _get_kernel(definitions),
        num_ctas,
        (
            (row_bytes, size, size, batch),
            (row_bytes, size * row_bytes, size * size * row_bytes),
            (128, _POSITIONS, 1, 1),
        ),
        (
            (2 * size, _CHANNELS, size, batch),
            (strides[1], strides[2], strides[0]),
            (128, _CHANNELS, 1, 1),
        ),
        numbers,
    )


def shared_bytes(num_units: int, is_bf16: bool) -> int:
    """Dynamic shared memory of a CTA.

    Both weights, `num_units` tiles of z, c and grad_out, dg, what is stored, biases, moments, barriers.
    """
    weights = 4 * _CHANNELS * _CHANNELS
    stored = _UNIT_BYTES + _CHANNELS * (128 if is_bf16 else 64)
    small = 2 * 4 * _CHANNELS + 7 * 4 * _POSITIONS + 8 * (num_units + 5)
    return weights + (num_units + 1) * _UNIT_BYTES + stored + small


@lru_cache(maxsize=None)
def _get_kernel(definitions: tuple) -> Kernel:
    values = dict(definitions)
    num_bytes = shared_bytes(values["NUM_UNITS"], values["OUT_TYPE"] == "BF16")
    return Kernel("triangle_output_backward.cu", "output_backward", values, _NUM_THREADS, num_bytes)
