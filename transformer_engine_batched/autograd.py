# SPDX-License-Identifier: Apache-2.0
"""The differentiable batched product: forward and its two backward products.

``y = a @ b``; ``grad_a = grad_y @ b.mT``; ``grad_b = a.mT @ grad_y``. What is saved for backward is what it
reads: FP8 codes, not the inputs. Must not know of modules and recipes; it is given quantizers.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Callable, ContextManager, NamedTuple, Optional, Union

import torch
from torch.autograd import forward_ad
from transformer_engine.pytorch.quantized_tensor import Quantizer

from . import autotuning
from .emulation import Emulation, current_emulation, emulate
from .gemm import multiply_codes
from .memory_layout import Strides, arrange, find_layout
from .operands import broadcast_shapes
from .plan import current_sm_count
from .quantized_operand import (
    Copies,
    Copy,
    FusedCast,
    dequantize,
    find_quantize,
    plain_operand,
    quantize_operand,
    trim,
)
from .te_interop.quantizers import cast_settings, has_amax_reduction
from .te_interop.tensors import HIGH_PRECISION_DTYPES, Codes, is_quantized, logical_shape
from .warm_product import ALIGNMENT, SavedParts, WarmProduct


class Quantization(NamedTuple):
    """How a product and its gradients are quantized; all quantizers None: not at all.

    Parameters
    ----------
    a, b, grad_output : Quantizer, optional
        TE's quantizers.
    split_forward, split_grad_a, split_grad_b : bool
        `use_split_accumulator` of the three products.
    after_backward : callable, optional
        Called at the end of backward (TE reduces the amaxes of gradients then).
    """

    a: Optional[Quantizer] = None
    b: Optional[Quantizer] = None
    grad_output: Optional[Quantizer] = None
    split_forward: bool = False
    split_grad_a: bool = True
    split_grad_b: bool = True
    after_backward: Optional[Callable[[], None]] = None

    @property
    def is_enabled(self) -> bool:
        """Whether operands are quantized."""
        return self.a is not None


def differentiable_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype,
    quantization: Quantization,
    out_strides: Optional[Strides] = None,
) -> torch.Tensor:
    """``a @ b`` with gradients; operands of at least 2 dims, a contiguous result or one of `out_strides`."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        # Refused there, with or without gradients.
        return _BatchedMatmul.apply(a, b, out_dtype, quantization, out_strides)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _apply(a, b, out_dtype, quantization, out_strides)
    return multiply(a, b, out_dtype, quantization, False, False, out_strides).out


class Forward(NamedTuple):
    """A product, and what its gradients will read.

    Parameters
    ----------
    out : torch.Tensor
    tensors : tuple
        Data and `scale_inv` of a along its rows, and of b along its last dim; None where no gradient needs it. If
        they need not be apart, maybe one tensor for all.
    saved : SavedCopies or SavedParts
        Puts `tensors` together again.
    operands : tuple
        Of a and of b, what `compute_gradients` takes.
    product : WarmProduct, optional
        What has made one tensor of them.
    """

    out: torch.Tensor
    tensors: tuple[Optional[torch.Tensor], ...]
    saved: Union["SavedCopies", SavedParts]
    operands: tuple[tuple, tuple]
    product: Optional[WarmProduct] = None


class SavedCopies(NamedTuple):
    """Copies without their tensors: rows and columns without padding, codes, whether they are transposed."""

    a: Optional[tuple[int, int, Codes, bool]]
    b: Optional[tuple[int, int, Codes, bool]]

    def attach(self, tensors: tuple) -> tuple[Optional[tuple], Optional[tuple]]:
        """What `compute_gradients` takes."""
        return _attach_tensors(tensors[:2], self.a), _attach_tensors(tensors[2:], self.b)


def _detach_tensors(copies: Copies, copy: Optional[Copy]) -> tuple[list, Optional[tuple]]:
    """(tensors to save, what is needed to put them together again)."""
    if copy is None:
        return [None, None], None
    tensors = [copy.codes.data, copy.codes.scale_inv]
    hollow = copy.codes._replace(data=None, scale_inv=None)
    return tensors, (copies.rows, copies.cols, hollow, copy.transposed)


def _attach_tensors(tensors: tuple, hollow: Optional[tuple]) -> Optional[tuple[int, int, Copy]]:
    if hollow is None:
        return None
    rows, cols, codes, transposed = hollow
    return rows, cols, Copy(codes._replace(data=tensors[0], scale_inv=tensors[1]), transposed)


def current_switches() -> tuple[Emulation, bool]:
    """The switches that a backward needs as they were in forward."""
    return current_emulation(), autotuning.is_active()


def with_switches(state: tuple[Emulation, bool]) -> ContextManager[None]:
    """A context with the switches of `current_switches`."""
    # Backward runs in threads of autograd's own, which do not see the switches of the forward's thread.
    if state == current_switches():
        return nullcontext()
    emulation, is_autotuning = state
    stack = ExitStack()
    if emulation.enabled:
        stack.enter_context(emulate(engine="reference" if emulation.force_reference else None))
    if is_autotuning:
        stack.enter_context(autotuning.autotune())
    return stack


class _BatchedMatmul(torch.autograd.Function):
    """See the module docstring."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        a: torch.Tensor,
        b: torch.Tensor,
        out_dtype: torch.dtype,
        quantization: Quantization,
        out_strides: Optional[Strides],
    ) -> torch.Tensor:
        # pylint: disable=missing-function-docstring
        needs_a, needs_b = ctx.needs_input_grad[:2]
        out, tensors, *kept = multiply(a, b, out_dtype, quantization, needs_a, needs_b, out_strides)
        ctx.save_for_backward(*tensors)
        ctx.kept = (*kept, quantization, current_switches())
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor) -> tuple:
        # pylint: disable=missing-function-docstring
        *kept, state = ctx.kept
        arguments = (grad_output, ctx.saved_tensors, *kept)
        if torch.is_grad_enabled() or state != current_switches():
            with torch.no_grad(), with_switches(state):
                grads = _run_backward(*arguments)
        else:
            grads = _run_backward(*arguments)
        if torch.is_grad_enabled():
            # A second derivative must fail, not miss this part; torch's once_differentiable lets it pass
            # where grad_output needs no gradient.
            node = torch._C._functions.DelayedError(
                b"a batched product cannot be differentiated twice: its backward runs on quantized operands",
                len(grads),
            )
            grads = node(*(None if g is None else g.requires_grad_() for g in grads))
        return (*grads, None, None, None)


# `_BatchedMatmul.apply` without what torch.func needs around it.
_apply = super(torch.autograd.Function, _BatchedMatmul).apply


def _run_backward(
    grad_output: torch.Tensor,
    tensors: tuple[Optional[torch.Tensor], ...],
    saved: Union[SavedCopies, SavedParts],
    operands: tuple[tuple, tuple],
    product: Optional[WarmProduct],
    quantization: Quantization,
) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Both gradients, and what a recipe does after them."""
    grads = _find_gradients(grad_output, tensors, saved, operands, product, quantization)
    if quantization.after_backward is not None:
        quantization.after_backward()
    return grads


def _find_gradients(
    grad_output: torch.Tensor,
    tensors: tuple[Optional[torch.Tensor], ...],
    saved: Union[SavedCopies, SavedParts],
    operands: tuple[tuple, tuple],
    product: Optional[WarmProduct],
    quantization: Quantization,
) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """`compute_gradients` of what forward saved, from one look-up where that is possible."""
    if product is None or is_quantized(grad_output):
        return compute_gradients(grad_output, *saved.attach(tensors), operands, quantization)
    (memory,), quantizer = tensors, quantization.grad_output
    if memory.data_ptr() % ALIGNMENT or not memory.is_contiguous():
        # Hooks of saved tensors have moved it.
        memory = memory.clone(memory_format=torch.contiguous_format)
    device_index = memory.get_device()
    splits = quantization.split_grad_a, quantization.split_grad_b
    key = (
        grad_output.shape, grad_output.stride(), grad_output.dtype, grad_output.data_ptr() % 16,
        grad_output.get_device(), device_index, cast_settings(quantizer), splits, current_emulation(),
        current_sm_count(device_index) if device_index >= 0 else 0,
    )  # fmt: skip
    gradients = product.gradients.get(key, _UNKNOWN)
    if gradients is _UNKNOWN:
        cast = find_quantize(grad_output, quantizer, saved.b is not None, saved.a is not None)
        is_known = isinstance(cast, FusedCast) and not has_amax_reduction(quantizer)
        gradients = product.find_gradients(
            key, grad_output, cast if is_known else None, operands, splits
        )
    if gradients is None:
        return compute_gradients(grad_output, *saved.attach((memory,)), operands, quantization)
    return gradients(grad_output, memory, quantizer)


def _describe(x: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, Optional[Strides]]:
    if is_quantized(x):
        return logical_shape(x), x.dtype, None
    return x.shape, x.dtype, find_layout(x)


def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype,
    quantization: Quantization,
    needs_a: bool,
    needs_b: bool,
    out_strides: Optional[Strides] = None,
    *,
    is_apart: bool = False,
) -> Forward:
    """``a @ b``, and both operands with the copies that the gradients needed will read.

    With `is_apart`, what is saved has a tensor of its own for codes and scales of each operand.
    """
    if quantization.a is not None and not (is_quantized(a) or is_quantized(b)):
        device_index = a.get_device()
        key = (
            a.shape, a.stride(), a.dtype, a.data_ptr() % 16, device_index,
            b.shape, b.stride(), b.dtype, b.data_ptr() % 16, b.get_device(),
            out_dtype, needs_a, needs_b, is_apart,
            cast_settings(quantization.a), cast_settings(quantization.b), quantization.split_forward,
            current_emulation(), current_sm_count(device_index) if device_index >= 0 else 0,
        )  # fmt: skip
        known = _warm_products.get(key, _UNKNOWN)
        if known is _UNKNOWN:
            _check_contracted(a.shape, b.shape)
            known = _find_product(key, a, b, out_dtype, quantization, (needs_a, needs_b), is_apart)
        if known is not None:
            product, operands = known
            out, tensors = product(a, b, quantization.a, quantization.b, out_strides)
            return Forward(out, tensors, product.saved, operands, product)
    shape_a = logical_shape(a) if is_quantized(a) else a.shape
    shape_b = logical_shape(b) if is_quantized(b) else b.shape
    _check_contracted(shape_a, shape_b)
    if quantization.a is None:
        left, right = _keep(a), _keep(b)
    else:
        left = quantize_operand(a, quantization.a, "a", along_last=True, along_rows=needs_b)
        right = quantize_operand(b, quantization.b, "b", along_last=needs_a, along_rows=True)
    product = _multiply(
        (left.rows, left.cols, left.along_last),
        (right.rows, right.cols, right.along_rows),
        out_dtype,
        quantization.split_forward,
    )
    # Where both operands repeat an item, one product served for all of them.
    out_shape = (*broadcast_shapes(shape_a[:-2], shape_b[:-2]), left.rows, right.cols)
    out = arrange(product if product.shape == out_shape else product.expand(out_shape), out_strides)
    operands = _describe(a), _describe(b)
    a_tensors, a_hollow = _detach_tensors(left, left.along_rows if needs_b else None)
    b_tensors, b_hollow = _detach_tensors(right, right.along_last if needs_a else None)
    return Forward(out, (*a_tensors, *b_tensors), SavedCopies(a_hollow, b_hollow), operands)


def _check_contracted(shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    """Padding of the codes would hide it."""
    if shape_a[-1] != shape_b[-2]:
        raise ValueError(
            f"operands a {list(shape_a)} and b {list(shape_b)}: the contracted sizes differ, {shape_a[-1]} of a "
            f"and {shape_b[-2]} of b"
        )


# Signature of a product -> the product, and what `Forward` has as operands; None for products that `WarmProduct` is not
# for. Cleared when full: ragged workloads see many shapes, few of them again.
_MAX_WARM_PRODUCTS = 4096
_warm_products: dict[tuple, Optional[tuple[WarmProduct, tuple]]] = {}
_UNKNOWN = object()


def _find_product(
    key: tuple,
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype,
    quantization: Quantization,
    needs: tuple[bool, bool],
    is_apart: bool,
) -> Optional[tuple[WarmProduct, tuple]]:
    """The product of this signature, if fused kernels quantize its operands; kept for the next one."""
    if len(_warm_products) >= _MAX_WARM_PRODUCTS:
        _warm_products.clear()
    _warm_products[key] = None
    if has_amax_reduction(quantization.a) or has_amax_reduction(quantization.b):
        return None
    if a.get_device() != b.get_device() or broadcast_shapes(a.shape[:-2], b.shape[:-2]) is None:
        return None  # `gemm` says what is wrong
    needs_a, needs_b = needs
    a_cast = find_quantize(a, quantization.a, True, needs_b)
    b_cast = find_quantize(b, quantization.b, needs_a, True)
    if not (isinstance(a_cast, FusedCast) and isinstance(b_cast, FusedCast)):
        return None
    product = WarmProduct(
        a, b, (a_cast, b_cast), needs, out_dtype, quantization.split_forward, is_apart
    )
    _warm_products[key] = product, (_describe(a), _describe(b))
    return _warm_products[key]


def compute_gradients(
    grad_output: torch.Tensor,
    a_saved: Optional[tuple[int, int, Copy]],
    b_saved: Optional[tuple[int, int, Copy]],
    operands: tuple[tuple, tuple],
    quantization: Quantization,
) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Gradients of a and b, None where not needed.

    Parameters
    ----------
    a_saved, b_saved : tuple, optional
        Rows, columns and copy (along the rows of a, along the last dim of b); None if no gradient reads it.
    operands : tuple
        (shape, dtype, strides of the gradient or None) of a and of b.
    """
    grad_a = grad_b = None
    if quantization.a is None:
        saved = a_saved or b_saved
        grad = plain_operand(grad_output.to(saved[2].codes.data.dtype))
    else:
        grad = quantize_operand(
            grad_output,
            quantization.grad_output,
            "grad_output",
            along_last=b_saved is not None,
            along_rows=a_saved is not None,
        )
    batch_shape = grad_output.shape[:-2]
    if b_saved is not None:
        grad_a = _multiply_gradient(
            (grad.rows, grad.cols, grad.along_last),
            _transpose(b_saved),
            (*operands[0], batch_shape),
            quantization.split_grad_a,
        )
    if a_saved is not None:
        grad_b = _multiply_gradient(
            _transpose(a_saved),
            (grad.rows, grad.cols, grad.along_rows),
            (*operands[1], batch_shape),
            quantization.split_grad_b,
        )
    return grad_a, grad_b


def _keep(x: torch.Tensor) -> Copies:
    """An operand in high precision."""
    return plain_operand(dequantize(x) if is_quantized(x) else x)


def _transpose(x: tuple[int, int, Copy]) -> tuple[int, int, Copy]:
    rows, cols, copy = x
    return cols, rows, Copy(copy.codes, not copy.transposed)


def _multiply(
    left: tuple[int, int, Copy],
    right: tuple[int, int, Copy],
    out_dtype: torch.dtype,
    use_split_accumulator: bool,
) -> torch.Tensor:
    """``left @ right``, a view without the padding of their codes."""
    rows, cols = left[0], right[1]
    left_copy, right_copy = left[2], right[2]
    if left_copy.cols != right_copy.rows:
        # One is padded and the other, which came quantized, is not.
        left_copy, right_copy = trim(left_copy, left[0], left[1]), trim(right_copy, *right[:2])
    out = multiply_codes(
        left_copy.codes,
        left_copy.transposed,
        right_copy.codes,
        right_copy.transposed,
        out_dtype,
        use_split_accumulator,
    )
    return out if out.shape[-2:] == (rows, cols) else out[..., :rows, :cols]


def _multiply_gradient(
    left: tuple[int, int, Copy],
    right: tuple[int, int, Copy],
    target: tuple[tuple[int, ...], torch.dtype, Optional[Strides], tuple[int, ...]],
    use_split_accumulator: bool,
) -> torch.Tensor:
    """A gradient of the shape and dtype of its input, summed over the dims along which it was broadcast.

    `target` is that shape and dtype, strides if it shall not be contiguous, and the batch shape of the output.
    """
    shape, dtype, strides, batch_shape = target
    is_reduced = shape[:-2] != batch_shape
    # Sums over items are of FP32 products: rounding each of them first would be an error of its own.
    product_dtype = torch.float32 if is_reduced or dtype not in HIGH_PRECISION_DTYPES else dtype
    grad = _multiply(left, right, product_dtype, use_split_accumulator)
    if grad.shape == shape and grad.dtype is dtype:
        return arrange(grad, strides)
    # The batch of the product is that of the output unless both factors were broadcast there.
    full = broadcast_shapes(tuple(batch_shape), tuple(grad.shape[:-2]))
    if tuple(grad.shape[:-2]) != full:
        grad = grad.expand(*full, *grad.shape[-2:])
    return arrange(grad.sum_to_size(shape).to(dtype), strides)
