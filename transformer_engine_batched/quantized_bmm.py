# SPDX-License-Identifier: Apache-2.0
"""`enable_quantized_bmm`: torch's batched products of two TE quantized tensors run in FP8.

Holds the switch, which of torch's calls are taken, and their gradients; the products are `gemm`'s. What is
not taken goes where it went before: to TE, which dequantizes. Must not read TE's private attributes.

TE's tensor classes set ``__torch_function__`` to torch's "disabled" implementation. While the switch is on,
their base class has one that looks for products and transpositions and calls that implementation for
everything else. It sees a call above autograd, where a product can have gradients of its own.
"""

from __future__ import annotations

import math
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Callable, NamedTuple, Optional

import torch  # before TE: it loads the libraries that TE links to
from torch.utils._pytree import tree_any, tree_map
from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

from .emulation import Emulation, current_emulation, emulate
from .errors import UnsupportedError
from .gemm import batched_general_gemm, bmm
from .operands import broadcast_shapes
from .plan import describe_device
from .quantize import quantize
from .reference.decoding import decode_mxfp8
from .reference.product import TORCH_DTYPES
from .support import find_engine, supports_non_tn
from .te_interop import (
    HIGH_PRECISION_DTYPES,
    Codes,
    DType,
    Float8CurrentScalingQuantizer,
    Float8TensorStorage,
    MXFP8Quantizer,
    MXFP8TensorStorage,
    read_codes,
)

# As exact as the dequantized product in BF16: fast accumulation on Hopper keeps about 14 bits of its sums.
_USE_SPLIT_ACCUMULATOR = True

_PLAIN = (torch.Tensor, torch.nn.Parameter)

# What torch does with a call if no class has a say.
_run_below = torch._C._disabled_torch_function_impl


# --- the switch -------------------------------------------------------------------------------------------


class QuantizedBmm(AbstractContextManager):
    """One demand for FP8 products; as a context manager it ends with the block."""

    def __enter__(self) -> "QuantizedBmm":
        _switch.add(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _switch.remove(self)

    def __repr__(self) -> str:
        return f"<QuantizedBmm, {'enabled' if self in _switch.demands else 'disabled'}>"


class _Switch:
    """Demands in order, and TE's own attribute while there are any."""

    def __init__(self) -> None:
        self.demands: list[QuantizedBmm] = []
        self._lock = threading.Lock()
        self._original: object = None

    def add(self, demand: QuantizedBmm) -> None:
        """Takes a demand once; the first hooks TE's class."""
        with self._lock:
            if demand in self.demands:
                return
            if not self.demands:
                self._original = QuantizedTensor.__dict__["__torch_function__"]
                QuantizedTensor.__torch_function__ = classmethod(_torch_function)
            self.demands.append(demand)

    def remove(self, demand: Optional[QuantizedBmm] = None) -> None:
        """Drops a demand, or the latest; the last gives TE's class its own attribute back."""
        with self._lock:
            if demand is None and self.demands:
                demand = self.demands[-1]
            if demand not in self.demands:
                return
            self.demands.remove(demand)
            if not self.demands:
                QuantizedTensor.__torch_function__ = self._original


_switch = _Switch()


def enable_quantized_bmm() -> QuantizedBmm:
    """Makes torch's batched products of two TE quantized tensors run in FP8 instead of dequantizing.

    ``torch.bmm``, ``torch.matmul``, ``@`` and ``torch.baddbmm`` (and their methods) of two Float8 or two
    MXFP8 tensors become one batched FP8 product with split accumulation. Transpositions of the last two
    dims of such a tensor (``.mT``, ``.transpose(1, 2)``, ``.permute(0, 2, 1)``, ...) are views that a
    product reads through the tensor's other copy, so that ``torch.bmm(a, b.transpose(1, 2))`` needs
    row-wise data only. Everything else, and whatever has no FP8 product here, does what TE does:
    dequantize. That includes one plain operand, 1-D operands, ``out=``, `torch.einsum`, two E5M2 operands,
    formats without an engine on the device (outside `emulate()`), operands that lack the copy that a
    product reads (on Hopper ``b`` of ``a @ b`` needs column-wise data), and code under torch.compile.

    The result has the nominal dtype of the operands (under torch.autocast, its dtype) and the values of
    the dequantized product within BF16 rounding. TE dequantizes the row-wise copy of an MXFP8 tensor, while
    a product along its rows reads the column-wise one, whose rounding is another.

    Gradients (for operands that require them) are FP8 products, too: the incoming gradient is quantized
    once, to E5M2 with current scaling, against MXFP8 operands to E4M3 blocks (TE's default recipes), and
    multiplied by the operands' own codes, ``grad_a = g @ b.mT`` and ``grad_b = a.mT @ g``. They come in the
    nominal dtype. Where that cannot be (the copy is missing, an operand is E5M2, sizes that MXFP8 cannot
    block, ``create_graph=True``), the gradient is the high-precision product with the dequantized operand.

    Returns
    -------
    QuantizedBmm
        Use it as a context manager to end with a block. Nested calls count: products run in FP8 until
        the last demand has ended.

    Notes
    -----
    Holds for the whole process, all threads. While it is on, each torch function and attribute of a quantized
    tensor costs about a microsecond more. A transposed view reads its tensor when it is used, and not when it
    is made. C++ extensions that read its memory without a torch call find none, as with TE's own tensors.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> import transformer_engine_torch as tex
    >>> from transformer_engine.pytorch import Float8CurrentScalingQuantizer
    >>> quantizer = Float8CurrentScalingQuantizer(tex.DType.kFloat8E4M3, device="cpu")
    >>> with teb.emulate(), teb.enable_quantized_bmm():
    ...     a = teb.quantize(torch.randn(4, 32, 64), quantizer)
    ...     b = teb.quantize(torch.randn(4, 48, 64), quantizer)
    ...     out = torch.bmm(a, b.transpose(1, 2))
    >>> out.shape
    torch.Size([4, 32, 48])
    """
    return QuantizedBmm().__enter__()


def disable_quantized_bmm() -> None:
    """Ends the latest demand of `enable_quantized_bmm`; does nothing if there is none.

    Examples
    --------
    >>> import transformer_engine_batched as teb
    >>> demand = teb.enable_quantized_bmm()
    >>> teb.disable_quantized_bmm()
    >>> demand
    <QuantizedBmm, disabled>
    """
    _switch.remove()


# --- which calls are taken --------------------------------------------------------------------------------


def _torch_function(
    cls: type,  # pylint: disable=unused-argument # a class method of TE's base class
    func: Callable,
    types: tuple,
    args: tuple = (),
    kwargs: Optional[dict] = None,
) -> object:
    """``__torch_function__`` of TE's quantized tensors while the switch is on."""
    kwargs = kwargs or {}
    if not all(t in _PLAIN or issubclass(t, (QuantizedTensor, TransposedView)) for t in types):
        # TE's classes have no say in torch functions: a class that has one decides.
        return NotImplemented
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        implementation = _IMPLEMENTATIONS.get(func)
        if implementation is not None and _switch.demands:
            with torch._C.DisableTorchFunctionSubclass():
                result = implementation(func, args, kwargs)
            if result is not None:
                return result
        if TransposedView in types:
            return _run_with_views(func, types, args, kwargs)
    return _run_below(func, types, args, kwargs)


def _bind(names: tuple[str, ...], args: tuple, kwargs: dict) -> Optional[list]:
    """The arguments of a call in order; None if they are not exactly those."""
    missing = names[len(args) :]
    if len(args) > len(names) or set(kwargs) != set(missing):
        return None
    return [*args, *(kwargs[name] for name in missing)]


def _try_bmm(_func: Callable, args: tuple, kwargs: dict) -> Optional[torch.Tensor]:
    bound = _bind(("input", "mat2"), args, kwargs)
    if bound is None or not _are_batches(*bound):
        return None
    return _try_product(*bound)


def _try_matmul(func: Callable, args: tuple, kwargs: dict) -> Optional[torch.Tensor]:
    bound = _bind(("input", "other"), args, kwargs)
    if bound is None:
        return None
    return _try_product(*(reversed(bound) if func is torch.Tensor.__rmatmul__ else bound))


def _try_baddbmm(_func: Callable, args: tuple, kwargs: dict) -> Optional[torch.Tensor]:
    kwargs = dict(kwargs)
    factors = kwargs.pop("beta", 1), kwargs.pop("alpha", 1)
    bound = _bind(("input", "batch1", "batch2"), args, kwargs)
    if bound is None or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in factors):
        return None
    addend, a, b = bound
    if isinstance(addend, (QuantizedTensor, TransposedView)):
        addend = _Decoding.apply(addend, addend.dtype)
    if type(addend) not in _PLAIN or not _are_batches(a, b):
        return None
    out_dtype, shape = _result_dtype(a, b), (a.shape[0], a.shape[1], b.shape[2])
    if broadcast_shapes(tuple(addend.shape), shape) != shape or addend.device != a.device:
        return None
    if addend.dtype != out_dtype and not _autocast_dtype(a):
        return None
    beta, alpha = map(float, factors)
    return _try_product(a, b, addend.to(out_dtype), beta, alpha)


def _are_batches(a: object, b: object) -> bool:
    """Whether both are tensors that torch.bmm takes, the contracted sizes apart."""
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.dim() == b.dim() == 3
        and a.shape[0] == b.shape[0]
    )


def _try_transposition(func: Callable, args: tuple, kwargs: dict) -> Optional[torch.Tensor]:
    x = args[0] if args else None
    if (
        not isinstance(x, QuantizedTensor)
        or x.dim() < 2
        or min(x.shape[-2:]) < 2  # contiguous either way, so that C++ would read it where it lies
        or not _swaps_last_dims(func, args[1:], kwargs, x.dim())
        or not _has_engine(x)
    ):
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return _Transposition.apply(x)
    return TransposedView(x)


def _swaps_last_dims(func: Callable, args: tuple, kwargs: dict, rank: int) -> bool:
    """Whether a call of one of torch's transpositions swaps the last two dims and nothing else."""
    if func in _MATRIX_TRANSPOSITIONS:
        return True
    if func in _FULL_TRANSPOSITIONS:
        return rank == 2
    dims = [*args, *kwargs.values()]
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = list(dims[0])
    if not all(type(dim) is int and -rank <= dim < rank for dim in dims):
        return False
    dims = [dim % rank for dim in dims]
    if func in _PERMUTATIONS:
        return dims == [*range(rank - 2), rank - 1, rank - 2]
    return sorted(dims) == [rank - 2, rank - 1]


_MATRIX_TRANSPOSITIONS = (torch.Tensor.mT.__get__, torch.Tensor.mH.__get__)
_FULL_TRANSPOSITIONS = (torch.Tensor.T.__get__, torch.t, torch.Tensor.t)
_PERMUTATIONS = (torch.permute, torch.Tensor.permute)
_SWAPS = tuple(
    getattr(module, name)
    for module in (torch, torch.Tensor)
    for name in ("transpose", "swapaxes", "swapdims")
)

_IMPLEMENTATIONS = {
    torch.bmm: _try_bmm,
    torch.Tensor.bmm: _try_bmm,
    torch.matmul: _try_matmul,
    torch.linalg.matmul: _try_matmul,
    torch.Tensor.matmul: _try_matmul,
    torch.Tensor.__matmul__: _try_matmul,
    torch.Tensor.__rmatmul__: _try_matmul,
    torch.baddbmm: _try_baddbmm,
    torch.Tensor.baddbmm: _try_baddbmm,
    **dict.fromkeys(
        (*_MATRIX_TRANSPOSITIONS, *_FULL_TRANSPOSITIONS, *_PERMUTATIONS, *_SWAPS),
        _try_transposition,
    ),
}


# --- transposed views -------------------------------------------------------------------------------------


class TransposedView(torch.Tensor):
    """A quantized tensor with its last two dims swapped, for products to read through its other copy.

    To anything but a product it is what TE makes of a transposition, the dequantized tensor. Like TE's
    tensors it is dequantized anew by each operation that reads it. The first that writes to it or lets its
    memory out settles it: from then on it is a plain tensor in all but type. Made by
    `enable_quantized_bmm`'s hook.
    """

    @staticmethod
    def __new__(cls, source: QuantizedTensor) -> "TransposedView":
        *batch, rows, cols = source.shape
        strides = torch.empty((*batch, rows, cols), device="meta").mT.stride()
        return torch.Tensor._make_wrapper_subclass(
            cls, (*batch, cols, rows), strides=strides, dtype=source.dtype, device=source.device
        )

    def __init__(self, source: QuantizedTensor) -> None:
        super().__init__()
        self._source: Optional[QuantizedTensor] = source
        self._value: Optional[torch.Tensor] = None

    def read_source(self) -> Optional[QuantizedTensor]:
        """The tensor that was transposed; None once the view is settled."""
        return self._source

    def read_value(self, *, settle: bool) -> torch.Tensor:
        """The elements, without gradient.

        `settle`: the same tensor from now on, for the caller to write to or to give away.
        """
        value = self._value
        if value is None:
            with torch.no_grad():
                value = self._source.dequantize().transpose(-2, -1)
        if settle:
            self._value, self._source = value, None
        return value

    __torch_function__ = classmethod(_torch_function)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: Optional[dict] = None
    ) -> object:
        settle = func._schema.is_mutable or func.is_view
        return func(*_read_views(args, settle), **_read_views(kwargs or {}, settle))


def _read_views(tree: object, settle: bool) -> object:
    return tree_map(
        lambda x: x.read_value(settle=settle) if isinstance(x, TransposedView) else x, tree
    )


# These read the memory of a tensor, or the tensor as an object, without the dispatcher.
_MEMORY_FUNCTIONS = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        "__array__",
        "__deepcopy__",
        "__dlpack__",
        "__dlpack_device__",
        "__reduce_ex__",
        "__repr__",
        "data_ptr",
        "numpy",
        "storage",
        "tolist",
        "untyped_storage",
    )
    if hasattr(torch.Tensor, name)
)


def _run_with_views(func: Callable, types: tuple, args: tuple, kwargs: dict) -> object:
    """A call with transposed views in it, as TE would have run it."""
    if func in _MEMORY_FUNCTIONS:
        return func(*_read_views(args, True), **_read_views(kwargs, True))
    if tree_any(lambda x: isinstance(x, QuantizedTensor), (args, kwargs)):
        # TE's dispatch knows no views. Whichever is not written to becomes a plain tensor, with its gradient.
        target = kwargs.get("out", args[0] if args else None)
        plain = QuantizedTensor if isinstance(target, TransposedView) else TransposedView
        args, kwargs = tree_map(
            lambda x: _Decoding.apply(x, x.dtype) if isinstance(x, plain) else x, (args, kwargs)
        )
    return _run_below(func, types, args, kwargs)


class _Transposition(torch.autograd.Function):
    """A quantized tensor and its transposed view, of which nothing is computed."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,  # pylint: disable=unused-argument
        x: QuantizedTensor,
    ) -> TransposedView:
        return TransposedView(x)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,  # pylint: disable=unused-argument
        grad: torch.Tensor,
    ) -> torch.Tensor:
        return grad.transpose(-2, -1)


# --- products ---------------------------------------------------------------------------------------------


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
            codes = read_codes(self.source, "", is_left != self.transposed, _allows_strided)
        except ValueError:
            return None
        # Not the stand-ins of a tracer, which have no memory.
        return codes if type(codes.data) is torch.Tensor else None


def _allows_strided(device: torch.device) -> bool:
    return supports_non_tn("float8", describe_device(device))


def _find_format(x: object) -> Optional[str]:
    if isinstance(x, Float8TensorStorage):
        return "float8"
    return "mxfp8" if isinstance(x, MXFP8TensorStorage) else None


def _has_engine(x: QuantizedTensor) -> bool:
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


def _autocast_dtype(x: torch.Tensor) -> Optional[torch.dtype]:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _result_dtype(a: torch.Tensor, b: torch.Tensor) -> Optional[torch.dtype]:
    """Dtype of the product in torch; None where torch refuses or the nominal dtype is no usual one."""
    if not {a.dtype, b.dtype} <= set(HIGH_PRECISION_DTYPES):
        return None
    autocast_dtype = _autocast_dtype(a)
    if autocast_dtype is None and a.dtype != b.dtype:
        return None
    dtype = autocast_dtype or a.dtype
    return dtype if dtype in HIGH_PRECISION_DTYPES else None


def _try_product(
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
    out_dtype = _result_dtype(a, b)
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


_LAYOUTS = {(False, False): "NN", (False, True): "TN", (True, False): "NT"}


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
        with _like(ctx.emulation):
            if not torch.is_grad_enabled():
                grads[:2] = _multiply_gradient(grad, a, b, alpha, ctx.operands)
            if ctx.needs_input_grad[0] and grads[0] is None:
                grads[0] = alpha * (grad @ _Decoding.apply(b, grad.dtype).mT)
            if ctx.needs_input_grad[1] and grads[1] is None:
                grads[1] = alpha * (_Decoding.apply(a, grad.dtype).mT @ grad)
        for index, (shape, dtype) in enumerate(ctx.operands):
            if grads[index] is not None:
                grads[index] = grads[index].sum_to_size(shape).to(dtype)
        if ctx.needs_input_grad[2]:
            grads[2] = (beta * grad).sum_to_size(ctx.addend_shape)
        return (*grads, None, None, None)


def _like(emulation: Emulation) -> AbstractContextManager:
    if not emulation.enabled:
        return nullcontext()
    return emulate("reference" if emulation.force_reference else None)


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
    quantizer = _make_gradient_quantizer(
        codes.fmt,
        grad.device,
        rowwise=right_codes is not None,
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


def _make_gradient_quantizer(
    fmt: str, device: torch.device, *, rowwise: bool, columnwise: bool
) -> object:
    """As TE's recipes quantize gradients by default: E5M2 per tensor, E4M3 in MXFP8 blocks."""
    if fmt == "mxfp8":
        quantizer = MXFP8Quantizer(DType.kFloat8E4M3, rowwise=rowwise, columnwise=columnwise)
    else:
        # TE transposes the row-wise copy: there is none without it.
        quantizer = Float8CurrentScalingQuantizer(
            DType.kFloat8E5M2, device=device, rowwise=True, columnwise=columnwise
        )
    quantizer.internal = True
    return quantizer


class _Decoding(torch.autograd.Function):
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
    values = decode_mxfp8(
        codes.data,
        codes.scale_inv,
        TORCH_DTYPES[codes.dtype],
        columnwise=codes.columnwise,
        swizzled=codes.swizzled,
    )
    return (values.mT if factor.transposed else values).to(dtype)
