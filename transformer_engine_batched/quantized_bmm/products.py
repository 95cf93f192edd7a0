# SPDX-License-Identifier: Apache-2.0
"""Products of quantized tensors, or of transposed views of them, and their gradients.

The products are `gemm`'s. TE's storage classes say which format a tensor has.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch  # before TE: it loads the libraries that TE links to
from transformer_engine.pytorch.quantized_tensor import QuantizedTensor
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage

from ..autograd import with_switches
from ..emulation import current_emulation
from ..errors import UnsupportedError
from ..gemm import batched_general_gemm, bmm
from ..operand_conversion import decode_codes
from ..operands import broadcast_shapes
from ..plan import allows_strided_fp8, describe_device
from ..quantize import quantize
from ..support import find_engine
from ..te_interop.quantizers import copy_quantizer, make_gradient_quantizer
from ..te_interop.tensors import HIGH_PRECISION_DTYPES, Codes, read_codes
from .transposed_view import TransposedView

# As exact as the dequantized product in BF16: fast accumulation on Hopper keeps about 14 bits of its sums.
_USE_SPLIT_ACCUMULATOR = True
_LAYOUTS = {(False, False): "NN", (False, True): "TN", (True, False): "NT"}


def try_product(
    a: object,
    b: object,
    addend: Optional[torch.Tensor] = None,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> Optional[torch.Tensor]:
    """``alpha * a @ b + beta * addend`` in FP8; None if that is for TE and torch to do (or to refuse)."""
    left, right = _Factor.of(a), _Factor.of(b)
    if (
        left is None
        or right is None
        or min(a.dim(), b.dim()) < 2
        or a.shape[-1] != b.shape[-2]
        or broadcast_shapes(tuple(a.shape[:-2]), tuple(b.shape[:-2])) is None
        or a.device != b.device
    ):
        return None
    out_dtype = find_result_dtype(a, b)
    if _find_format(left.source) != _find_format(right.source):
        return None
    if out_dtype is None or left.read(is_left=True) is None or right.read(is_left=False) is None:
        return None
    try:
        if torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (a, b, addend)
        ):
            return _Product.apply(a, b, addend, beta, alpha, out_dtype)
        return _multiply(left, right, out_dtype, addend, beta, alpha)
    except UnsupportedError:
        return None


def has_engine(x: QuantizedTensor) -> bool:
    """Whether products of tensors like `x` run in FP8 here."""
    fmt, emulation = _find_format(x), current_emulation()
    if fmt is None:
        return False
    try:
        find_engine(
            fmt,
            describe_device(x.device),
            emulate=emulation.enabled,
            force_reference=emulation.force_reference,
        )
    except UnsupportedError:
        return False
    return True


def find_autocast_dtype(x: torch.Tensor) -> Optional[torch.dtype]:
    """Dtype of torch.autocast on the device of `x`, None outside of it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def find_result_dtype(a: torch.Tensor, b: torch.Tensor) -> Optional[torch.dtype]:
    """Dtype of the product in torch; None where torch refuses or the nominal dtype is no usual one."""
    if not {a.dtype, b.dtype} <= set(HIGH_PRECISION_DTYPES):
        return None
    autocast_dtype = find_autocast_dtype(a)
    if autocast_dtype is None and a.dtype != b.dtype:
        return None
    dtype = autocast_dtype or a.dtype
    return dtype if dtype in HIGH_PRECISION_DTYPES else None


class _Factor(NamedTuple):
    """An operand as `gemm` takes it: codes as they are stored, and whether to multiply them transposed."""

    source: object
    transposed: bool = False

    @classmethod
    def of(cls, x: object) -> Optional["_Factor"]:
        """None if `x` is neither a quantized tensor nor a view of one."""
        if isinstance(x, TransposedView):
            source = x.read_source()
            return None if source is None else cls(source, True)
        return cls(x) if isinstance(x, QuantizedTensor) and _find_format(x) else None

    @property
    def mT(self) -> "_Factor":
        """The factor transposed."""
        return self._replace(transposed=not self.transposed)

    def read(self, *, is_left: bool) -> Optional[Codes]:
        """The codes that a product reads; None if there is no such copy."""
        try:
            codes = read_codes(self.source, "", is_left != self.transposed, allows_strided_fp8)
        except ValueError:
            return None
        # Not the stand-ins of a tracer, which have no memory.
        return codes if type(codes.data) is torch.Tensor else None


def _find_format(x: object) -> Optional[str]:
    if isinstance(x, Float8TensorStorage):
        return "float8"
    return "mxfp8" if isinstance(x, MXFP8TensorStorage) else None


def _multiply(
    left: _Factor,
    right: _Factor,
    out_dtype: torch.dtype,
    addend: Optional[torch.Tensor] = None,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> torch.Tensor:
    """The product of two factors, of which the second may be a plain gradient's codes."""
    options = {"alpha": alpha, "use_split_accumulator": _USE_SPLIT_ACCUMULATOR}
    layout = _LAYOUTS.get((left.transposed, right.transposed))
    with torch.no_grad():
        if layout is None:
            product = bmm(right.source, left.source, out_dtype=out_dtype, **options).mT
            if addend is None or beta == 0.0:
                return product.contiguous()
            return torch.add(product, addend, alpha=beta).contiguous()
        if addend is None or beta == 0.0:
            return batched_general_gemm(
                right.source, left.source, out_dtype, layout=layout, **options
            )
        rows = left.source.shape[-1 if left.transposed else -2]
        cols = right.source.shape[-2 if right.transposed else -1]
        out = addend.expand(*left.source.shape[:-2], rows, cols)
        out = out.clone(memory_format=torch.contiguous_format)
        return batched_general_gemm(
            right.source, left.source, layout=layout, out=out, accumulate=True, beta=beta, **options
        )


class _Product(torch.autograd.Function):
    """``alpha * a @ b + beta * addend`` and its gradients."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        a: torch.Tensor,
        b: torch.Tensor,
        addend: Optional[torch.Tensor],
        beta: float,
        alpha: float,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        needs_a, needs_b, *_ = ctx.needs_input_grad
        # Each operand is there for the gradient of the other.
        ctx.save_for_backward(a if needs_b else None, b if needs_a else None)
        ctx.operands = [(x.shape, x.dtype) for x in (a, b)]
        ctx.addend_shape = None if addend is None else addend.shape
        ctx.factors = beta, alpha
        # Gradients of CUDA tensors are computed in a thread of autograd's own, where no switch is set.
        ctx.emulation = current_emulation()
        return _multiply(_Factor.of(a), _Factor.of(b), out_dtype, addend, beta, alpha)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple:
        a, b = ctx.saved_tensors
        beta, alpha = ctx.factors
        grads: list[Optional[torch.Tensor]] = [None, None, None]
        with with_switches((ctx.emulation, False)):
            if not torch.is_grad_enabled():
                grads[:2] = _multiply_gradient(grad, a, b, alpha, ctx.operands)
            if ctx.needs_input_grad[0] and grads[0] is None:
                grads[0] = alpha * (grad @ Decoding.apply(b, grad.dtype).mT)
            if ctx.needs_input_grad[1] and grads[1] is None:
                grads[1] = alpha * (Decoding.apply(a, grad.dtype).mT @ grad)
        for index, (shape, dtype) in enumerate(ctx.operands):
            if grads[index] is not None:
                grads[index] = grads[index].sum_to_size(shape).to(dtype)
        if ctx.needs_input_grad[2]:
            grads[2] = (beta * grad).sum_to_size(ctx.addend_shape)
        return (*grads, None, None, None)


def _multiply_gradient(
    grad: torch.Tensor,
    a: Optional[torch.Tensor],
    b: Optional[torch.Tensor],
    alpha: float,
    operands: list[tuple[torch.Size, torch.dtype]],
) -> list[Optional[torch.Tensor]]:
    """FP8 gradients of the operands; None where one is not asked for or has to be had otherwise.

    The gradient's row-wise copy meets `b`, its column-wise copy `a`.
    """
    left, right = None if a is None else _Factor.of(a), None if b is None else _Factor.of(b)
    left_codes = None if left is None else left.mT.read(is_left=True)
    right_codes = None if right is None else right.mT.read(is_left=False)
    codes = left_codes or right_codes
    if codes is None:
        return [None, None]
    quantizer = copy_quantizer(
        make_gradient_quantizer(codes.fmt, grad.device),
        # TE transposes the row-wise copy of one scale per tensor: there is none without it.
        rowwise=right_codes is not None or codes.fmt == "float8",
        columnwise=left_codes is not None,
    )
    if not quantizer.is_quantizable(grad):
        return [None, None]
    try:
        quantized = _Factor(quantize(grad, quantizer))
    except UnsupportedError:
        return [None, None]
    grads: list[Optional[torch.Tensor]] = [None, None]
    for index, is_possible in enumerate((right_codes is not None, left_codes is not None)):
        if not is_possible:
            continue
        pair = (quantized, right.mT) if index == 0 else (left.mT, quantized)
        try:
            grads[index] = _multiply(*pair, operands[index][1], alpha=alpha)
        except UnsupportedError:
            continue
    return grads


class Decoding(torch.autograd.Function):
    """A quantized tensor or a view of one as a plain tensor; gradients pass in high precision, as in TE."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.dtype = x.dtype
        factor = _Factor.of(x)
        is_foreign = factor is not None and _find_format(factor.source) == "mxfp8"
        if is_foreign and current_emulation().enabled:
            # TE's kernel decodes MXFP8 on devices that have it only.
            return _decode_mxfp8(factor, dtype)
        if isinstance(x, TransposedView):
            # Of a settled view, no result may be written to its memory.
            return x.read_value(settle=False).to(dtype, copy=x.read_source() is None)
        return x.dequantize(dtype=dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple:
        return grad.to(ctx.dtype), None


def _decode_mxfp8(factor: _Factor, dtype: torch.dtype) -> torch.Tensor:
    """The row-wise copy's numbers, as TE decodes, or the only copy's."""
    codes = factor.read(is_left=not factor.transposed) or factor.read(is_left=factor.transposed)
    values = decode_codes(codes)
    return (values.mT if factor.transposed else values).to(dtype)
