# SPDX-License-Identifier: Apache-2.0
"""`BatchedEinsum`: a contraction of two activations as a Transformer Engine module, and `einsum`.

Permuted views of the operands are the matrices of `BatchedMatmul`'s product: the kernels that quantize read
them where they lie, so that a change of layout costs no copy in high precision. Which dims play which part
is `equation`'s, the arithmetic is `autograd`'s.
"""

from __future__ import annotations

from typing import Callable, Optional

import torch

from .autograd import Quantization, differentiable_matmul
from .equation import Contraction, check_equation, plan_contraction
from .errors import UnsupportedError
from .memory_layout import Strides
from .module import check_operands, quantize_without_state, run_between_graphs
from .recipe_module import RecipeModule
from .te_interop.recipes import active_recipe
from .te_interop.tensors import is_quantized, nominal_dtype

_NOT_TRACED = "einsum is not traced"

# (a, b, strides of the result) -> product
Product = Callable[[torch.Tensor, torch.Tensor, Optional[Strides]], torch.Tensor]


class BatchedEinsum(RecipeModule):
    """``torch.einsum(equation, a, b)`` of two activations, quantized as `te.autocast` says.

    Available as `transformer_engine.pytorch.BatchedEinsum` once the package is imported. As `BatchedMatmul`
    it has no parameters, keeps the state of its recipe, saves FP8 for backward, and outside `te.autocast` is the
    same product in high precision.

    The result is contiguous, and gradients lie in memory as their operands do. Channel-last operands, as in
    the triangle multiplicative update, are read and written where they lie.

    Parameters
    ----------
    equation : str
        Of two operands, in torch.einsum's notation (letters, ellipsis, broadcasting, output or none). It must be
        a batched matrix product: each index is in both operands and the output (batch), in one operand
        and the output (rows, columns), or in both operands alone (contracted). Without a contracted index it
        is an outer product.
    name : str, optional
        For quantizer roles and debugging, as in TE.

    Raises
    ------
    ValueError
        If the equation is none of the above. The message names the index.

    Notes
    -----
    See `BatchedMatmul` for accumulation, `DelayedScaling`, NaN and CUDA graphs. An operand whose rows, columns or
    contracted indices are several and do not merge in memory is copied once. Under torch.compile the module
    runs as it is, between two graphs.

    Examples
    --------
    >>> import torch, transformer_engine.pytorch as te, transformer_engine_batched as teb
    >>> from transformer_engine.common.recipe import Float8CurrentScaling
    >>> contract = te.BatchedEinsum("bikd,bjkd->bijd")
    >>> a, b = (torch.randn(1, 24, 24, 8, requires_grad=True) for _ in "ab")
    >>> with teb.emulate(), te.autocast(enabled=True, recipe=Float8CurrentScaling()):
    ...     y = contract(a, b)
    >>> y.sum().backward()
    >>> y.is_contiguous(), tuple(a.grad.shape)
    (True, (1, 24, 24, 8))
    """

    module_type = "batched_einsum"

    def __init__(self, equation: str, name: Optional[str] = None) -> None:
        check_equation(equation)
        super().__init__(name=name)
        self.equation = equation

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``torch.einsum(equation, a, b)``.

        Parameters
        ----------
        a, b : torch.Tensor
            FP32, FP16 or BF16 of any strides. TE quantized tensors only where the equation has them as they
            are stored: `a` as ``[*batch, rows, contracted]``, `b` as ``[*batch, contracted, columns]``.

        Returns
        -------
        torch.Tensor
            Contiguous, in the dtype of `a`, or that of torch.autocast.
        """
        if torch.compiler.is_compiling():
            return run_between_graphs(_NOT_TRACED, self._forward, a, b)
        return self._forward(a, b)

    def _forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = check_operands(a, b)
        self._begin_forward(a)
        try:
            quantization = self._choose_quantization(a, b)
            return contract(
                self.equation,
                a,
                b,
                lambda left, right, strides: differentiable_matmul(
                    left, right, nominal_dtype(a), quantization, strides
                ),
            )
        finally:
            self._end_forward(a)

    def extra_repr(self) -> str:
        """Equation and name."""
        return f"{self.equation!r}, name={self.name!r}"


def einsum(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``torch.einsum(equation, a, b)``: differentiable, and quantized as `te.autocast` says.

    For recipes that keep no state; `BatchedEinsum` is for all.

    Parameters
    ----------
    equation : str
    a, b : torch.Tensor
        As for `BatchedEinsum`; not quantized.

    Raises
    ------
    UnsupportedError
        Under `DelayedScaling` and `CustomRecipe`, which keep scales between steps, and for quantized operands.
    ValueError
        As `BatchedEinsum`, and if sizes do not fit.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> a, b = torch.randn(6, 5, 3), torch.randn(7, 5, 3)
    >>> torch.allclose(teb.einsum("ikd,jkd->ijd", a, b), torch.einsum("ikd,jkd->ijd", a, b), atol=1e-5)
    True
    """
    if torch.compiler.is_compiling():
        return run_between_graphs(_NOT_TRACED, _einsum, equation, a, b)
    return _einsum(equation, a, b)


def _einsum(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = check_operands(a, b)
    if is_quantized(a) or is_quantized(b):
        raise UnsupportedError(
            "einsum of quantized tensors was asked for: use transformer_engine_batched.bmm, which multiplies them "
            "as they are stored, or dequantize() them first"
        )
    recipe = active_recipe()
    quantization = Quantization()
    if recipe is not None:
        module = f"BatchedEinsum({equation!r})"
        quantization = quantize_without_state(recipe, a.device, "einsum", module)
    return contract(
        equation,
        a,
        b,
        lambda left, right, strides: differentiable_matmul(
            left, right, a.dtype, quantization, strides
        ),
    )


def contract(equation: str, a: torch.Tensor, b: torch.Tensor, product: Product) -> torch.Tensor:
    """An equation by a batched matrix product of views."""
    quantized = is_quantized(a), is_quantized(b)
    strides = (None if is_q else x.stride() for x, is_q in zip((a, b), quantized))
    plan = plan_contraction(equation, tuple(a.shape), tuple(b.shape), *strides)
    left = _view(a, "a", equation, plan.a_dims, plan.a_shape, plan.a_matrix, quantized[0])
    right = _view(b, "b", equation, plan.b_dims, plan.b_shape, plan.b_matrix, quantized[1])
    out = product(left, right, plan.product_strides)
    return _restore(out, plan)


def _view(
    x: torch.Tensor,
    name: str,
    equation: str,
    dims: tuple[int, ...],
    shape: tuple[int, ...],
    matrix: tuple[int, ...],
    quantized: bool,
) -> torch.Tensor:
    """An operand as ``[*batch, rows, cols]``: a view, unless dims that do not merge must."""
    if quantized:
        if dims != tuple(range(len(dims))) or tuple(x.shape) != matrix:
            raise UnsupportedError(
                f"equation {equation!r}: operand {name} is a {type(x).__name__}, whose codes cannot be permuted to "
                f"{'[*batch, rows, contracted]' if name == 'a' else '[*batch, contracted, columns]'}; dequantize() "
                "it, or write the equation so that it is stored like that"
            )
        return x
    # Each view is a step of backward, too, and takes the host longer than a small product takes the device.
    if dims != tuple(range(len(dims))):
        x = x.permute(dims)
    if x.shape != shape:
        x = x.expand(shape)
    return x if shape == matrix else x.reshape(matrix)


def _restore(out: torch.Tensor, plan: Contraction) -> torch.Tensor:
    if out.shape != plan.product_shape:
        out = out.view(plan.product_shape)
    return out.permute(plan.output_dims).contiguous()
