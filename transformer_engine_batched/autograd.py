# SPDX-License-Identifier: Apache-2.0
"""The differentiable batched product: forward and its two backward products.

``y = a @ b``; ``grad_a = grad_y @ b.mT``; ``grad_b = a.mT @ grad_y``. What is saved for backward is what it
reads: FP8 codes, not the inputs. Must not know of modules and recipes; it is given quantizers.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Callable, Iterator, NamedTuple, Optional

import torch

from . import autotuning
from .emulation import Emulation, current_emulation, emulate
from .gemm import multiply_codes
from .operands import broadcast_shapes
from .quantized_operand import Copies, Copy, dequantize, plain_operand, quantize_operand, trim
from .te_interop import HIGH_PRECISION_DTYPES, Codes, Quantizer, is_quantized, logical_shape


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
    a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, quantization: Quantization
) -> torch.Tensor:
    """``a @ b`` with gradients; operands of at least 2 dims."""
    if not torch.is_grad_enabled():
        # `needs_input_grad` does not know of no_grad, and would have copies made for a backward.
        a, b = a.detach(), b.detach()
    return _BatchedMatmul.apply(a, b, out_dtype, quantization)


def _detach_tensors(copies: Copies, copy: Optional[Copy]) -> tuple[list, Optional[tuple]]:
    """(tensors to save, what is needed to put them together again)."""
    if copy is None:
        return [None, None], None
    tensors = [copy.codes.data, copy.codes.scale_inv]
    hollow = copy.codes._replace(data=None, scale_inv=None)
    return tensors, (copies.rows, copies.cols, hollow, copy.transposed)


def _attach_tensors(tensors: list, hollow: Optional[tuple]) -> Optional[tuple[int, int, Copy]]:
    if hollow is None:
        return None
    rows, cols, codes, transposed = hollow
    return rows, cols, Copy(codes._replace(data=tensors[0], scale_inv=tensors[1]), transposed)


@contextmanager
def _as_in_forward(emulation: Emulation, is_autotuning: bool) -> Iterator[None]:
    # Backward runs in threads of autograd's own, which do not see the switches of the forward's thread.
    with ExitStack() as stack:
        if emulation.enabled:
            stack.enter_context(emulate(engine="reference" if emulation.force_reference else None))
        if is_autotuning:
            stack.enter_context(autotuning.autotune())
        yield


class _BatchedMatmul(torch.autograd.Function):
    """See the module docstring."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        a: torch.Tensor,
        b: torch.Tensor,
        out_dtype: torch.dtype,
        quantization: Quantization,
    ) -> torch.Tensor:
        # pylint: disable=missing-function-docstring
        needs_a, needs_b = ctx.needs_input_grad[:2]
        ctx.shapes = tuple(tuple(logical_shape(x) if is_quantized(x) else x.shape) for x in (a, b))
        # Padding of the codes would hide it.
        if ctx.shapes[0][-1] != ctx.shapes[1][-2]:
            raise ValueError(
                f"operands a {list(ctx.shapes[0])} and b {list(ctx.shapes[1])}: the contracted sizes differ, "
                f"{ctx.shapes[0][-1]} of a and {ctx.shapes[1][-2]} of b"
            )
        ctx.dtypes = a.dtype, b.dtype
        ctx.quantization = quantization
        ctx.state = current_emulation(), autotuning.is_active()
        left = _prepare_operand(
            a, quantization.a, quantization, "a", along_last=True, along_rows=needs_b
        )
        right = _prepare_operand(
            b, quantization.b, quantization, "b", along_last=needs_a, along_rows=True
        )
        out = _multiply(
            (left.rows, left.cols, left.along_last),
            (right.rows, right.cols, right.along_rows),
            out_dtype,
            quantization.split_forward,
        )
        # Where both operands repeat an item, one product served for all of them.
        batch_shape = broadcast_shapes(ctx.shapes[0][:-2], ctx.shapes[1][:-2])
        if tuple(out.shape[:-2]) != batch_shape:
            out = out.expand(*batch_shape, *out.shape[-2:]).contiguous()
        a_tensors, ctx.hollow_a = _detach_tensors(left, left.along_rows if needs_b else None)
        b_tensors, ctx.hollow_b = _detach_tensors(right, right.along_last if needs_a else None)
        ctx.save_for_backward(*a_tensors, *b_tensors)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor) -> tuple:
        # pylint: disable=missing-function-docstring
        with torch.no_grad():
            grads = _compute_gradients(ctx, grad_output)
        if torch.is_grad_enabled():
            # A second derivative must fail, not miss this part; torch's once_differentiable lets it pass
            # where grad_output needs no gradient.
            node = torch._C._functions.DelayedError(
                b"a batched product cannot be differentiated twice: its backward runs on quantized operands",
                len(grads),
            )
            grads = node(*(None if g is None else g.requires_grad_() for g in grads))
        return (*grads, None, None)


def _compute_gradients(
    ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor
) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Gradients of a and b, None where not needed."""
    quantization = ctx.quantization
    tensors = ctx.saved_tensors
    a_saved = _attach_tensors(tensors[:2], ctx.hollow_a)
    b_saved = _attach_tensors(tensors[2:], ctx.hollow_b)
    grad_a = grad_b = None
    if not quantization.is_enabled:
        saved = a_saved or b_saved
        grad_output = grad_output.to(saved[2].codes.data.dtype)
    with _as_in_forward(*ctx.state):
        grad = _prepare_operand(
            grad_output,
            quantization.grad_output,
            quantization,
            "grad_output",
            along_last=b_saved is not None,
            along_rows=a_saved is not None,
        )
        batch_shape = tuple(grad_output.shape[:-2])
        if b_saved is not None:
            grad_a = _multiply_gradient(
                (grad.rows, grad.cols, grad.along_last),
                _transpose(b_saved),
                (ctx.shapes[0], batch_shape, ctx.dtypes[0]),
                quantization.split_grad_a,
            )
        if a_saved is not None:
            grad_b = _multiply_gradient(
                _transpose(a_saved),
                (grad.rows, grad.cols, grad.along_rows),
                (ctx.shapes[1], batch_shape, ctx.dtypes[1]),
                quantization.split_grad_b,
            )
        if quantization.after_backward is not None:
            quantization.after_backward()
    return grad_a, grad_b


def _prepare_operand(
    x: torch.Tensor,
    quantizer: Optional[Quantizer],
    quantization: Quantization,
    name: str,
    *,
    along_last: bool,
    along_rows: bool,
) -> Copies:
    if not quantization.is_enabled:
        return plain_operand(dequantize(x) if is_quantized(x) else x)
    return quantize_operand(x, quantizer, name, along_last=along_last, along_rows=along_rows)


def _transpose(x: tuple[int, int, Copy]) -> tuple[int, int, Copy]:
    rows, cols, copy = x
    return cols, rows, Copy(copy.codes, not copy.transposed)


def _multiply(
    left: tuple[int, int, Copy],
    right: tuple[int, int, Copy],
    out_dtype: torch.dtype,
    use_split_accumulator: bool,
) -> torch.Tensor:
    """``left @ right`` without the padding of their codes."""
    rows, cols = left[0], right[1]
    left_copy, right_copy = left[2], right[2]
    if left_copy.sizes()[1] != right_copy.sizes()[0]:
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
    if out.shape[-2:] != (rows, cols):
        out = out[..., :rows, :cols].contiguous()
    return out


def _multiply_gradient(
    left: tuple[int, int, Copy],
    right: tuple[int, int, Copy],
    target: tuple[tuple[int, ...], tuple[int, ...], torch.dtype],
    use_split_accumulator: bool,
) -> torch.Tensor:
    """A gradient of the shape and dtype of its input, summed over the dims along which it was broadcast."""
    shape, batch_shape, dtype = target
    is_reduced = tuple(shape[:-2]) != batch_shape
    # Sums over items are of FP32 products: rounding each of them first would be an error of its own.
    product_dtype = torch.float32 if is_reduced or dtype not in HIGH_PRECISION_DTYPES else dtype
    grad = _multiply(left, right, product_dtype, use_split_accumulator)
    # The batch of the product is that of the output unless both factors were broadcast there.
    full = broadcast_shapes(batch_shape, tuple(grad.shape[:-2]))
    if tuple(grad.shape[:-2]) != full:
        grad = grad.expand(*full, *grad.shape[-2:])
    return grad.sum_to_size(shape).to(dtype)
