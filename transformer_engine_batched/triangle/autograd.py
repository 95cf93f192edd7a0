# SPDX-License-Identifier: Apache-2.0
"""The fused pipeline of the triangle block: three kernels around a product, and its backward.

``project_operands -> product -> project_output``; backward ``output_backward -> two products ->
project_backward``. `x`, the gates and the operands never exist in high precision: what is saved for backward is
`z`, the product `c` and FP8 codes of the operands; all else is recomputed from `z`. Must not know of
modules and recipes.

Memory beyond `z` and the gradient of the output, in units of `z` in BF16, `hidden` = `dim`, FP8: forward holds codes
in both layouts 2, c 1, out 1. Between the passes codes 1, c 1, out 1. What was saved is freed in backward when it
has been read; its peak is where the gradient of c has been written, with what the kernels keep for later.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Optional

import torch
from torch.autograd import forward_ad
from transformer_engine.pytorch.quantized_tensor import Quantizer

from ..autograd import Quantization, with_switches, current_switches
from ..gemm import multiply_codes
from ..te_interop.quantizers import (
    current_scaling_options,
    is_delayed_quantizer,
    quantizer_fp8_dtype,
)
from ..te_interop.tensors import HIGH_PRECISION_DTYPES, Codes

# Order of the parameters as `multiply_triangle` takes them and gives their gradients.
PARAMETERS = tuple(
    f"{layer}_{kind}"
    for layer in ("norm_in", "p_in", "g_in", "norm_out", "p_out", "g_out")
    for kind in ("weight", "bias")
)
_NUM_INPUT_PARAMETERS = 6  # those before the product


class Settings(NamedTuple):
    """All of a call but its tensors.

    Parameters
    ----------
    mode : {"outgoing", "incoming"}
    eps : float
        Of both LayerNorms.
    dtype : torch.dtype
        Of products and projections, and of the result.
    quantization : Quantization
        As for `differentiable_matmul`.
    scales : torch.Tensor, optional
        float32 ``[2]``, those of `a` and `b` if they do not come from the quantizers.
    """

    mode: str
    eps: float
    dtype: torch.dtype
    quantization: Quantization
    scales: Optional[torch.Tensor] = None


def multiply_triangle(
    z: torch.Tensor,
    mask: Optional[torch.Tensor],
    parameters: tuple[Optional[torch.Tensor], ...],
    settings: Settings,
) -> torch.Tensor:
    """The triangle multiplicative update of `z` ``[B, N, N, D]``, with gradients."""
    needs_graph = torch.is_grad_enabled() and any(
        [x is not None and x.requires_grad for x in (z, *parameters)]
    )
    # Inside torch.func and forward-mode derivatives: refused, with or without gradients.
    if needs_graph or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _TriangleMultiplication.apply(z, mask, settings, *parameters)
    return _compute(z, mask, parameters, settings, needs_operands=False).out


def saved_product(out: torch.Tensor) -> torch.Tensor:
    """The contraction ``[B, H, N_p, N_p]`` that is saved for the backward of `out`, with its padding.

    For tests and benchmarks: the LayerNorm behind it hides errors of gain.

    Raises
    ------
    ValueError
        If `out` does not come from this pipeline, or needs no gradient.
    """
    if type(out.grad_fn).__name__ != "_TriangleMultiplicationBackward":
        raise ValueError("`out` was not made by the fused pipeline with gradients")
    return out.grad_fn.saved_tensors[2]


class _TriangleMultiplication(torch.autograd.Function):
    """See the module docstring."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        z: torch.Tensor,
        mask: Optional[torch.Tensor],
        settings: Settings,
        *parameters: Optional[torch.Tensor],
    ) -> torch.Tensor:
        # pylint: disable=missing-function-docstring
        needs_z, needs_parameters = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        ctx.needs_operands = needs_z or any(needs_parameters[:_NUM_INPUT_PARAMETERS])
        ctx.settings = settings
        ctx.state = current_switches()
        found = _compute(z, mask, parameters, settings, ctx.needs_operands)
        ctx.save_for_backward(found.z, mask, found.c, *found.operands, *parameters)
        return found.out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor) -> tuple:
        # pylint: disable=missing-function-docstring
        with torch.no_grad(), with_switches(ctx.state):
            grads = _compute_gradients(ctx, grad_output.contiguous())
            if ctx.settings.quantization.after_backward is not None:
                ctx.settings.quantization.after_backward()
        if torch.is_grad_enabled():
            # A second derivative must fail, not miss this part; torch's once_differentiable lets it pass
            # where grad_output needs no gradient.
            node = torch._C._functions.DelayedError(
                b"a triangle multiplication cannot be differentiated twice: its backward runs on quantized "
                b"operands",
                len(grads),
            )
            grads = node(*(None if g is None else g.requires_grad_() for g in grads))
        return (grads[0], None, None, *grads[1:])


class _Forward(NamedTuple):
    """What forward makes: the result, and what backward reads.

    `operands` are a, b and the inverses of their scales, None where backward does not want them.
    """

    out: torch.Tensor
    z: torch.Tensor
    c: torch.Tensor
    operands: tuple[Optional[torch.Tensor], ...]


def _compute(
    z: torch.Tensor,
    mask: Optional[torch.Tensor],
    parameters: tuple[Optional[torch.Tensor], ...],
    settings: Settings,
    needs_operands: bool,
) -> _Forward:
    from ..kernels import triangle  # Triton takes a second to import

    z = z.contiguous()
    layers = _make_layers(parameters, settings)
    is_quantized = settings.quantization.is_enabled
    made = triangle.project_operands(
        z,
        layers.norm_in,
        layers.projection,
        mask,
        mode=settings.mode,
        kept=True,
        # High-precision operands are read both ways as they are.
        turned=is_quantized and needs_operands,
        **_operand_options(z, mask, layers, settings),
    )
    left, right = _describe_operands(made, made.a, made.b, settings)
    # In the positions of c: a[i, k] b[j, k].
    c = multiply_codes(
        left, False, right, True, settings.dtype, settings.quantization.split_forward
    )
    operands = (None, None, None)
    if needs_operands:
        pair = (made.a_turned, made.b_turned) if is_quantized else (made.a, made.b)
        operands = (*pair, made.scale_invs)
    # Freed before the output is made.
    del made, left, right
    size = z.shape[1]
    inside = c if c.shape[-1] == size else c[..., :size, :size]
    out = triangle.project_output(inside, z, layers.norm_in, layers.norm_out, layers.output)
    if out.dtype is not settings.dtype:
        out = out.to(settings.dtype)
    return _Forward(out, z, c, operands)


class _Layers(NamedTuple):
    """The parameters as the kernels take them, projections in the dtype of the arithmetic."""

    norm_in: object
    projection: object
    norm_out: object
    output: object


def _make_layers(parameters: tuple[Optional[torch.Tensor], ...], settings: Settings) -> _Layers:
    from ..kernels.triangle_tiles import GatedProjection, Norm

    norm_in, p_in, g_in, norm_out, p_out, g_out = zip(parameters[::2], parameters[1::2])

    def cast(x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        if x is None or x.dtype is settings.dtype and x.is_contiguous():
            return x
        return x.to(settings.dtype).contiguous()

    return _Layers(
        Norm(*norm_in, settings.eps),
        GatedProjection(*map(cast, (*p_in, *g_in))),
        Norm(*norm_out, settings.eps),
        GatedProjection(*map(cast, (*p_out, *g_out))),
    )


def _operand_options(
    z: torch.Tensor, mask: Optional[torch.Tensor], layers: _Layers, settings: Settings
) -> dict[str, object]:
    """What decides the scales of `a` and `b`."""
    from ..kernels import triangle

    quantization = settings.quantization
    if not quantization.is_enabled:
        return {}
    if settings.scales is not None:
        return {"fp8_dtype": quantizer_fp8_dtype(quantization.a), "scales": settings.scales}
    if is_delayed_quantizer(quantization.a):
        return {
            "fp8_dtype": quantizer_fp8_dtype(quantization.a),
            "scales": _as_pair(quantization.a.scale, quantization.b.scale),
            "amaxes": _as_pair(quantization.a.amax, quantization.b.amax),
        }
    amaxes = triangle.find_operand_amaxes(z, layers.norm_in, layers.projection, mask)
    return {
        "fp8_dtype": quantizer_fp8_dtype(quantization.a),
        "amaxes": amaxes,
        **current_scaling_options(quantization.a),
    }


def _as_pair(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two scalars of a recipe's state as one tensor ``[2]`` of the same memory."""
    if (
        first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
        or second.storage_offset() != first.storage_offset() + 1
    ):
        raise AssertionError("TE keeps the scales and amaxes of a module's slots side by side")
    return first.as_strided((2,), (1,))


def _describe_operands(
    operands: object, a: torch.Tensor, b: torch.Tensor, settings: Settings
) -> tuple[Codes, Codes]:
    """Both operands in one layout as the product takes them."""
    return tuple(
        _describe(x, operands.scale_invs, index, settings.quantization.a, settings.dtype)
        for index, x in enumerate((a, b))
    )


def _describe(
    x: torch.Tensor,
    scale_invs: Optional[torch.Tensor],
    index: int,
    quantizer: Optional[Quantizer],
    dtype: torch.dtype,
) -> Codes:
    if quantizer is None:
        return Codes(HIGH_PRECISION_DTYPES[dtype], HIGH_PRECISION_DTYPES[dtype], x)
    return Codes("float8", quantizer_fp8_dtype(quantizer), x, scale_invs[index : index + 1])


def _gradient_options(quantizer: Optional[Quantizer]) -> dict[str, object]:
    """What decides the scale of the gradient of c."""
    if quantizer is None:
        return {}
    if is_delayed_quantizer(quantizer):
        return {
            "fp8_dtype": quantizer_fp8_dtype(quantizer),
            "scale": quantizer.scale,
            "amax": quantizer.amax,
        }
    return {"fp8_dtype": quantizer_fp8_dtype(quantizer), **current_scaling_options(quantizer)}


def _compute_gradients(
    ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor
) -> tuple[Optional[torch.Tensor], ...]:
    """Gradients of z and of the parameters, None where not needed."""
    from ..kernels import triangle

    settings = ctx.settings
    z, mask, c, a, b, scale_invs, *parameters = ctx.saved_tensors
    # What was saved is freed as soon as it has been read, unless the graph is retained.
    ctx.maybe_clear_saved_tensors()
    layers = _make_layers(parameters, settings)
    size = z.shape[1]
    grad_c, grad_c_turned, grad_scale_inv, norm_in, norm_out, output = triangle.output_backward(
        grad_output,
        c[..., :size, :size],
        z,
        layers.norm_in,
        layers.norm_out,
        layers.output,
        **_gradient_options(settings.quantization.grad_output),
    )
    del c
    grad_z, input_grads = None, (None,) * _NUM_INPUT_PARAMETERS
    if ctx.needs_operands:
        quantization, dtype = settings.quantization, settings.dtype
        describe_grad = partial(
            _describe,
            scale_invs=grad_scale_inv,
            index=0,
            quantizer=quantization.grad_output,
            dtype=dtype,
        )
        describe_operand = partial(
            _describe, scale_invs=scale_invs, quantizer=quantization.a, dtype=dtype
        )
        # Outgoing: grad_a[i, k] = grad_c[i, j] b[j, k], grad_b[j, k] = grad_c[i, j] a[i, k].
        is_turned = (
            quantization.is_enabled
        )  # codes of operands lie [k, .], of the second gradient [j, i]
        grad_a = _multiply_gradient(
            (describe_grad(grad_c), False),
            (describe_operand(b, index=1), is_turned),
            settings,
            quantization.split_grad_a,
        )
        del b
        if is_turned:
            grad_c = grad_c_turned
        del grad_c_turned
        grad_b = _multiply_gradient(
            (describe_grad(grad_c), not is_turned),
            (describe_operand(a, index=0), is_turned),
            settings,
            quantization.split_grad_b,
        )
        del a, grad_c
        inputs = triangle.project_backward(
            grad_a[..., :size, :size],
            grad_b[..., :size, :size],
            z,
            layers.norm_in,
            layers.projection,
            mask,
            norm_in,
        )
        grad_z = inputs.z
        input_grads = (*inputs.norm[:2], *inputs.projection)
    grads = (*input_grads, *norm_out[:2], *output)
    return (
        grad_z if ctx.needs_input_grad[0] else None,
        *(
            (
                (grad if grad.dtype is parameter.dtype else grad.to(parameter.dtype))
                if is_needed
                else None
            )
            for grad, parameter, is_needed in zip(grads, parameters, ctx.needs_input_grad[3:])
        ),
    )


def _multiply_gradient(
    grad: tuple[Codes, bool],
    operand: tuple[Codes, bool],
    settings: Settings,
    use_split_accumulator: bool,
) -> torch.Tensor:
    """``grad @ operand`` in the positions of `z`: transposed if incoming. Sides are codes and "transposed"."""
    left, right = grad, operand
    if settings.mode == "incoming":
        left, right = (operand[0], not operand[1]), (grad[0], not grad[1])
    return multiply_codes(*left, *right, settings.dtype, use_split_accumulator)
