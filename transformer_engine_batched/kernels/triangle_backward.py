# SPDX-License-Identifier: Apache-2.0
"""The triangle multiplicative update without its contraction: backward.

    output_backward:   grad_out -> grad_c, parameters of the output, and what project_backward needs of the gate
    project_backward:  grad_a, grad_b -> grad_z, parameters of the input

The formulas are those of `triangle_forward`; gates and projections are computed again from z and c, nothing of them
was stored. Neither function depends on the mode: positions are those of z, ``[first, second]``.
Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from . import triangle_input_gradients as input_gradients
from . import triangle_output_gradients as output_gradients
from . import triangle_tiles as tiles
from .float8_quantize import _FORMATS, quantize_float8_current
from .triangle_forward import check_output, turn_codes
from .triangle_output_gradients import Band
from .triangle_tiles import GatedProjection, Norm

# Gradients of the output projection and LN_out(c) are stored for this share of z's positions at a time: memory.
_BAND_POSITIONS = 2**20


class GateGradient(NamedTuple):
    """What `output_backward` hands to `project_backward`.

    `x`: LN_in(z), ``[B N, N_p, D]`` in the weights' dtype; `grad_g`: gradient of the output gate before its
    sigmoid, ``[D, B N N_p]``; `weight`: the gate's, ``[D, D]``. ``N_p`` is N rounded up to a multiple of 16.
    """

    x: torch.Tensor
    grad_g: torch.Tensor
    weight: torch.Tensor


class OutputGradients(NamedTuple):
    """What `output_backward` returns.

    `grad_c`: ``[B, H, N_p, N_p]`` (i, j), zero padded: uint8 codes, or the weights' dtype without FP8.
    `grad_c_turned`: codes (j, i); None without FP8. `scale_inv`: float32 ``[1]`` or None.
    `grad_x`: for `project_backward`, which may write to its memory.
    `norm_out` and `output`: gradients in their parameters' places and dtypes.
    """

    grad_c: torch.Tensor
    grad_c_turned: Optional[torch.Tensor]
    scale_inv: Optional[torch.Tensor]
    grad_x: GateGradient
    norm_out: Norm
    output: GatedProjection


class InputGradients(NamedTuple):
    """What `project_backward` returns: gradients of z, of LN_in and of the projection, in their dtypes."""

    z: torch.Tensor
    norm: Norm
    projection: GatedProjection


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
    if fp8_dtype not in (None, *_FORMATS):
        raise ValueError(f'`fp8_dtype` must be None, "e4m3" or "e5m2" and came as {fp8_dtype!r}')
    if scale is None and amax is not None or scale is not None and fp8_dtype is None:
        raise ValueError("`scale` and `amax` are those of delayed scaling: with fp8_dtype, together")
    for name, state in (("scale", scale), ("amax", amax)):
        tiles.check_state(name, state, 1, z.device)
    batch, size = z.shape[:2]
    pitch = tiles.pad(size)
    rows = batch * size
    dtype, device = output.weight_p.dtype, z.device
    is_delayed = scale is not None
    shape = (batch, hidden, pitch, pitch)
    grad_c = torch.empty(shape, dtype=torch.uint8 if is_delayed else dtype, device=device)
    if pitch != size:
        grad_c[:, :, size:].zero_()
    scale_inv = scale.reshape(1).reciprocal() if is_delayed else None
    x = torch.empty((rows, pitch, dim), dtype=dtype, device=device)
    grad_g = torch.empty((dim, rows * pitch), dtype=dtype, device=device)
    moments = torch.empty((2, rows * pitch), dtype=torch.float32, device=device)

    quantization = (fp8_dtype if is_delayed else None, scale, amax, scale_inv)
    bias_sums, norm_sums, weight_sums = [], [], []
    for band in _split_rows(rows, pitch):
        columns = band.size * pitch
        normalized = torch.empty((hidden, columns), dtype=dtype, device=device)
        grad_p = torch.empty((dim, columns), dtype=dtype, device=device)
        outputs = (x, normalized, grad_p, grad_g, moments)
        bias_sums.append(
            output_gradients.run_gates(
                grad_out, c, z, norm_in, norm_out, output, band, outputs
            )  # fmt: skip
        )
        norm_sums.append(
            output_gradients.find_grad_c(
                grad_p, c, moments, norm_out, output, band, grad_c, quantization
            )
        )
        weight_sums.append(_multiply_shares(grad_p, normalized.mT, band.size))
        del normalized, grad_p, outputs
    gate_sums = [_multiply_shares(grad_g, x.view(-1, dim), rows)] if z.numel() else []

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
    norm_grads = _cast_sums(norm_sums, (norm_out.weight, norm_out.bias), (hidden,), (hidden,))
    bias_p, bias_g = _cast_sums(bias_sums, (output.bias_p, output.bias_g), (dim,), (dim,))
    (weight_p,) = _cast_sums(weight_sums, (output.weight_p,), (dim, hidden))
    (weight_g,) = _cast_sums(gate_sums, (output.weight_g,), (dim, dim))
    return OutputGradients(
        grad_c,
        grad_c_turned,
        scale_inv,
        GateGradient(x, grad_g, output.weight_g),
        Norm(*norm_grads, norm_out.eps),
        GatedProjection(weight_p, bias_p, weight_g, bias_g),
    )


def project_backward(
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    z: torch.Tensor,
    norm: Norm,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
    grad_x: Optional[GateGradient] = None,
) -> InputGradients:
    """Backward of `triangle_forward.project_operands`.

    Parameters
    ----------
    grad_a, grad_b : torch.Tensor
        ``[B, H, N, N]``, the positions of z: ``[i, k]`` and ``[j, k]`` outgoing, ``[k, i]`` and ``[k, j]``
        incoming. Contiguous in the last dim, else any strides; FP32, BF16 or FP16.
    z, norm, projection, mask
        As `project_operands` was given them. The mask gets no gradient.
    grad_x : GateGradient, optional
        The `grad_x` that `output_backward` has returned for the same z; without it, the gate's part is zero.
        Must not be used again: its memory may be that of the gradient of z.

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
    shape = (2 * hidden, dim)
    tiles.check_projection("projection", projection, shape, shape, z.device)
    if mask is not None:
        mask = tiles.check_mask(mask, z)
    dtype = projection.weight_p.dtype
    pitch = tiles.pad(size)
    grads = (grad_a, grad_b)
    if grad_x is None:
        x = torch.empty((batch * size, pitch, dim), dtype=dtype, device=z.device)
        gate = (None, None)
        if x.numel():
            input_gradients.normalize_rows(z, norm, x)
    else:
        x, *gate = grad_x
        if tuple(x.shape) != (batch * size, pitch, dim) or x.dtype != dtype:
            raise ValueError(
                f"`grad_x` must be what output_backward returned for this z and weights of {dtype}; "
                f"its x is {x.dtype} {list(x.shape)}"
            )
    norm_sums, weight_sums = [], []
    if z.numel():
        weight_sums = [input_gradients.find_weight_gradients(grads, x, z, projection, mask)]
    # A tile of x is read before the same tile of grad_z is written, by one program.
    grad_z = x.view(z.shape) if pitch == size and dtype == z.dtype else torch.empty_like(z)
    if z.numel():
        norm_sums = [
            input_gradients.find_grad_z(grads, x, z, norm, projection, mask, tuple(gate), grad_z)
        ]
    norm_grads = _cast_sums(norm_sums, (norm.weight, norm.bias), (dim,), (dim,))
    rows = (2 * hidden,)
    projection_grads = _cast_sums(weight_sums, tuple(projection), shape, rows, shape, rows)
    return InputGradients(grad_z, Norm(*norm_grads, norm.eps), GatedProjection(*projection_grads))


def _split_rows(rows: int, pitch: int) -> list[Band]:
    """Bands of as many rows as `_BAND_POSITIONS` hold, at least one row each."""
    size = max(1, _BAND_POSITIONS // max(pitch, 1))
    return [Band(first, min(size, rows - first)) for first in range(0, rows, size)]


def _multiply_shares(left: torch.Tensor, right: torch.Tensor, rows: int) -> torch.Tensor:
    """``left @ right`` as float32 products ``[shares, m n]`` over shares of the long contracted dim.

    One product would leave most of the device idle. `rows` divides the contracted dim; a share is some rows.
    """
    (m, contracted), n = left.shape, right.shape[1]
    # At least 32 shares, if there are as many divisors.
    shares = next((share for share in range(min(32, rows), rows + 1) if rows % share == 0), 1)
    left = left.view(m, shares, contracted // shares).transpose(0, 1)
    right = right.unflatten(0, (shares, contracted // shares))
    if left.is_cuda and left.dtype != torch.float32:
        product = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        product = torch.bmm(left.float(), right.float())
    return product.view(shares, m * n)


def _cast_sums(
    sums: list[Optional[torch.Tensor]],
    parameters: tuple[Optional[torch.Tensor], ...],
    *shapes: tuple[int, ...],
) -> tuple[Optional[torch.Tensor], ...]:
    """Gradients of parameters from partial sums, one parameter behind the other; zero without any sums."""
    if not sums:
        return tuple(None if x is None else torch.zeros_like(x) for x in parameters)
    if all(x is None for x in parameters):
        return (None,) * len(parameters)
    return tiles.cast_sums(sums[0] if len(sums) == 1 else torch.cat(sums), parameters, shapes)
