# SPDX-License-Identifier: Apache-2.0
"""The switch of FP8 products, and the hook that it puts into TE's class.

TE's tensor classes set ``__torch_function__`` to torch's "disabled" implementation. While the switch is on,
their base class has one that looks for products and transpositions and calls that implementation for
everything else. It sees a call above autograd, where a product can have gradients of its own.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Callable, Optional

import torch  # before TE: it loads the libraries that TE links to
from torch.utils._pytree import tree_any, tree_map
from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

from .calls import IMPLEMENTATIONS, PLAIN
from .products import Decoding
from .transposed_view import TransposedView, read_views

# What torch does with a call if no class has a say.
_run_below = torch._C._disabled_torch_function_impl

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


def _torch_function(
    cls: type,  # pylint: disable=unused-argument # a class method of TE's base class
    func: Callable,
    types: tuple,
    args: tuple = (),
    kwargs: Optional[dict] = None,
) -> object:
    """``__torch_function__`` of TE's quantized tensors while the switch is on."""
    kwargs = kwargs or {}
    if not all(t in PLAIN or issubclass(t, (QuantizedTensor, TransposedView)) for t in types):
        # TE's classes have no say in torch functions: a class that has one decides.
        return NotImplemented
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        implementation = IMPLEMENTATIONS.get(func)
        if implementation is not None and _switch.demands:
            with torch._C.DisableTorchFunctionSubclass():
                result = implementation(func, args, kwargs)
            if result is not None:
                return result
        if TransposedView in types:
            return _run_with_views(func, types, args, kwargs)
    return _run_below(func, types, args, kwargs)


# Views outlive the switch.
TransposedView.__torch_function__ = classmethod(_torch_function)


def _run_with_views(func: Callable, types: tuple, args: tuple, kwargs: dict) -> object:
    """A call with transposed views in it, as TE would have run it."""
    if func in _MEMORY_FUNCTIONS:
        return func(*read_views(args, True), **read_views(kwargs, True))
    if tree_any(lambda x: isinstance(x, QuantizedTensor), (args, kwargs)):
        # TE's dispatch knows no views. Whichever is not written to becomes a plain tensor, with its gradient.
        target = kwargs.get("out", args[0] if args else None)
        plain = QuantizedTensor if isinstance(target, TransposedView) else TransposedView
        args, kwargs = tree_map(
            lambda x: Decoding.apply(x, x.dtype) if isinstance(x, plain) else x, (args, kwargs)
        )
    return _run_below(func, types, args, kwargs)
