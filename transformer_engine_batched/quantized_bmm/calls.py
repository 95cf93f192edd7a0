# SPDX-License-Identifier: Apache-2.0
"""Which of torch's calls are products or transpositions of quantized tensors, and what takes their place.

`IMPLEMENTATIONS`: a function of torch -> a function of ``(func, args, kwargs)`` that returns its result, or None where
the call is for TE and torch to do, or to refuse.
"""

from __future__ import annotations

import math
from typing import Callable, Optional

import torch  # before TE: it loads the libraries that TE links to
from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

from ..operands import broadcast_shapes
from .products import Decoding, find_autocast_dtype, find_result_dtype, has_engine, try_product
from .transposed_view import TransposedView, Transposition

PLAIN = (torch.Tensor, torch.nn.Parameter)


def _try_bmm(_func: Callable, args: tuple, kwargs: dict) -> Optional[torch.Tensor]:
    bound = _bind(("input", "mat2"), args, kwargs)
    if bound is None or not _are_batches(*bound):
        return None
    return try_product(*bound)


def _try_matmul(func: Callable, args: tuple, kwargs: dict) -> Optional[torch.Tensor]:
    bound = _bind(("input", "other"), args, kwargs)
    if bound is None:
        return None
    return try_product(*(reversed(bound) if func is torch.Tensor.__rmatmul__ else bound))


def _try_baddbmm(_func: Callable, args: tuple, kwargs: dict) -> Optional[torch.Tensor]:
    kwargs = dict(kwargs)
    factors = kwargs.pop("beta", 1), kwargs.pop("alpha", 1)
    bound = _bind(("input", "batch1", "batch2"), args, kwargs)
    if bound is None or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in factors):
        return None
    addend, a, b = bound
    if isinstance(addend, (QuantizedTensor, TransposedView)):
        addend = Decoding.apply(addend, addend.dtype)
    if type(addend) not in PLAIN or not _are_batches(a, b):
        return None
    out_dtype, shape = find_result_dtype(a, b), (a.shape[0], a.shape[1], b.shape[2])
    if broadcast_shapes(tuple(addend.shape), shape) != shape or addend.device != a.device:
        return None
    if addend.dtype != out_dtype and not find_autocast_dtype(a):
        return None
    beta, alpha = map(float, factors)
    return try_product(a, b, addend.to(out_dtype), beta, alpha)


def _bind(names: tuple[str, ...], args: tuple, kwargs: dict) -> Optional[list]:
    """The arguments of a call in order; None if they are not exactly those."""
    missing = names[len(args) :]
    if len(args) > len(names) or set(kwargs) != set(missing):
        return None
    return [*args, *(kwargs[name] for name in missing)]


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
        or not has_engine(x)
    ):
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return Transposition.apply(x)
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

IMPLEMENTATIONS = {
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
