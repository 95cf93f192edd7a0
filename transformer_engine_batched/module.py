# SPDX-License-Identifier: Apache-2.0
"""`BatchedMatmul`: the product of two activations as a Transformer Engine module, and `bmm`.

A module keeps what its recipe needs between steps; `bmm` is the same product for recipes that keep nothing.
Input: torch tensors or TE quantized tensors. The arithmetic is `autograd`'s.
"""

from __future__ import annotations

import functools
from typing import Callable, Optional

import torch
from torch.distributed.tensor import DTensor
from transformer_engine.common.recipe import Recipe

from . import compiled_product
from .autograd import Quantization, differentiable_matmul
from .errors import UnsupportedError
from .gemm import bmm as multiply
from .recipe_module import RecipeModule, check_recipe, is_stateless
from .sharded_product import is_sharded, multiply_shards
from .te_interop.quantizers import make_gradient_quantizer, quantizer_format
from .te_interop.recipes import accumulator_settings, active_recipe, make_stateless_quantizers
from .te_interop.tensors import HIGH_PRECISION_DTYPES, is_quantized, nominal_dtype, quantizer_of


class BatchedMatmul(RecipeModule):
    """``y = a @ b`` for two activations, quantized as `te.autocast` says.

    Available as `transformer_engine.pytorch.BatchedMatmul` once the package is imported. It has no
    parameters; its state is the recipe's (scales and amax histories of delayed scaling).

    Inside ``te.autocast(enabled=True, recipe=...)`` both operands are quantized, forward and backward are
    products of FP8 operands, and what is saved for backward is FP8. Outside, it is the same product in
    high precision.

    Parameters
    ----------
    name : str, optional
        For quantizer roles and debugging, as in TE.

    Notes
    -----
    With `DelayedScaling`, call one module once per autocast region: TE reduces amaxes when the region ends,
    and a second call overwrites the first one's. Use one `BatchedMatmul` for each product in the model,
    or a recipe that keeps no state (`Float8CurrentScaling`, `MXFP8BlockScaling`).

    Accumulation is as the recipe says: `fp8_gemm_fprop`, `fp8_gemm_dgrad` (gradient of `a`) and
    `fp8_gemm_wgrad` (gradient of `b`), by default fast, split, split.

    A NaN or infinity in an operand: see `quantize`. Per-tensor scales ignore NaN and saturate infinity, so
    that NaN stays in the rows and columns that it touches.

    Double backward is not supported and raises. torch.compile keeps the product in its graph with recipes that
    keep no state; with `DelayedScaling` and `CustomRecipe` it runs between two graphs. A plain CUDA graph leaves
    the update of gradients' scales to its owner, as with TE's own modules; `te.make_graphed_callables` does it.

    Two DTensors are multiplied shard by shard, without communication, if that is the product or a partial sum of
    it; others are refused (docs/training.md has the table).

    TE updates the scales of all delayed-scaling modules of the process when a region ends.

    Examples
    --------
    >>> import torch, transformer_engine.pytorch as te, transformer_engine_batched as teb
    >>> from transformer_engine.common.recipe import Float8CurrentScaling
    >>> bmm = te.BatchedMatmul()
    >>> a = torch.randn(4, 32, 64, requires_grad=True)
    >>> b = torch.randn(4, 48, 64, requires_grad=True)
    >>> with teb.emulate(), te.autocast(enabled=True, recipe=Float8CurrentScaling()):
    ...     y = bmm(a, b.mT)
    >>> y.sum().backward()
    >>> tuple(y.shape), tuple(a.grad.shape)
    ((4, 32, 48), (4, 32, 64))
    """

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``a @ b`` with torch.matmul's shapes and broadcasting.

        Parameters
        ----------
        a : torch.Tensor
            ``[*batch, M, K]`` (or ``[K]``): FP32, FP16, BF16, or a TE quantized tensor. A `DTensor` if `b` is one.
        b : torch.Tensor
            ``[*batch, K, N]`` (or ``[K]``).

        Returns
        -------
        torch.Tensor
            ``[*batch, M, N]`` in the dtype of `a`, or that of torch.autocast.
        """
        if torch.compiler.is_compiling():
            reason = compiled_product.why_not_traceable(a, b)
            if reason is not None:
                return run_between_graphs(reason, self._forward, a, b)
            recipe = active_recipe()
            if recipe is not None:
                check_recipe(recipe)
            return _multiply_in_graph(a, b, None, recipe)
        return self._forward(a, b)

    def _forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if is_sharded(a) or is_sharded(b):
            return multiply_shards(self._forward, a, b)
        a, b, dtype, squeeze = _prepare_operands(a, b)
        self._begin_forward(a)
        try:
            quantization = self._choose_quantization(a, b)
            out = differentiable_matmul(a, b, dtype, quantization)
        finally:
            self._end_forward(a)
        return out if squeeze is None else squeeze(out)

    def extra_repr(self) -> str:
        """The name."""
        return f"name={self.name!r}"


def bmm(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out_dtype: Optional[torch.dtype] = None,
    use_split_accumulator: bool = False,
    **options: object,
) -> torch.Tensor:
    """``a @ b``: differentiable, and quantized as `te.autocast` says.

    `a` is ``[*, M, K]``, `b` ``[*, K, N]``, the result ``[*, M, N]``; batch dims broadcast as in torch.matmul.
    Under `te.autocast` with a recipe that keeps no state, both operands are quantized first. Operands that
    are quantized already are multiplied as they are: `a` needs row-wise, `b` column-wise data. Under
    torch.autocast, torch tensors are cast to its dtype first. DTensors are multiplied as by `BatchedMatmul`.

    Parameters
    ----------
    a, b : torch.Tensor
        As for `BatchedMatmul`.
    out_dtype : torch.dtype, optional
        Default: the dtype of `a`, or that of torch.autocast.
    use_split_accumulator : bool
        Of the forward product of operands that come quantized; a recipe has its own setting.
    **options
        `out`, `accumulate`, `alpha`, `beta`, `bias`, `gelu`, `quantization_params`, `autotune` as in
        `batched_general_gemm`: outside `te.autocast`, where no gradient is asked for.

    Raises
    ------
    UnsupportedError
        Under `DelayedScaling` and `CustomRecipe`, which keep scales between steps: use
        `te.BatchedMatmul`. For `options` where they do not hold.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> a, b = torch.randn(3, 8, 32, requires_grad=True), torch.randn(32, 4)
    >>> teb.bmm(a, b).sum().backward()
    >>> tuple(a.grad.shape)
    (3, 8, 32)
    """
    if torch.compiler.is_compiling():
        reason = compiled_product.why_not_traceable(a, b)
        if options:
            reason = f"{', '.join(sorted(options))} of bmm are not traced"
        if reason is None:
            recipe = active_recipe()
            if recipe is not None:
                check_recipe(recipe)
            return _multiply_in_graph(a, b, out_dtype, recipe)
        options |= {"out_dtype": out_dtype, "use_split_accumulator": use_split_accumulator}
        return run_between_graphs(reason, _bmm, a, b, **options)
    return _bmm(a, b, out_dtype=out_dtype, use_split_accumulator=use_split_accumulator, **options)


def _bmm(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out_dtype: Optional[torch.dtype],
    use_split_accumulator: bool,
    **options: object,
) -> torch.Tensor:
    if is_sharded(a) or is_sharded(b):
        if options:
            raise UnsupportedError(
                f"bmm of DTensors with {', '.join(sorted(options))}: apply them to the result"
            )
        multiply_local = functools.partial(
            _bmm, out_dtype=out_dtype, use_split_accumulator=use_split_accumulator
        )
        return multiply_shards(multiply_local, a, b)
    recipe = active_recipe()
    needs_grad = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (a, b))
    if recipe is None and not needs_grad:
        return multiply(
            a, b, out_dtype=out_dtype, use_split_accumulator=use_split_accumulator, **options
        )
    if options:
        raise UnsupportedError(
            f"bmm with {', '.join(sorted(options))} "
            + ("under te.autocast" if recipe is not None else "of operands that require grad")
            + ": these options are for products without either. Apply them to the result."
        )
    a, b, dtype, squeeze = _prepare_operands(a, b)
    if recipe is not None:
        quantization = quantize_without_state(recipe, a.device, "bmm", "BatchedMatmul()")
    elif is_quantized(a) != is_quantized(b):
        with torch.no_grad():
            return multiply(a, b)  # refuses operands of different formats
    elif is_quantized(a):
        fmt = quantizer_format(quantizer_of(a))
        quantization = Quantization(
            quantizer_of(a),
            quantizer_of(b),
            make_gradient_quantizer(fmt, a.device),
            split_forward=use_split_accumulator,
        )
    else:
        quantization = Quantization()
    out = differentiable_matmul(a, b, out_dtype or dtype, quantization)
    return out if squeeze is None else squeeze(out)


def quantize_without_state(
    recipe: Recipe, device: torch.device, function: str, module: str
) -> Quantization:
    """The quantization of a function under a recipe; one that keeps state wants the module named."""
    if not is_stateless(recipe):
        raise UnsupportedError(
            f"{function} under {type(recipe).__name__}, which keeps scales between steps, was asked for: make "
            f"a transformer_engine.pytorch.{module} for this product and call it, or use "
            "Float8CurrentScaling or MXFP8BlockScaling"
        )
    check_recipe(recipe)
    return Quantization(*make_stateless_quantizers(recipe, device), *accumulator_settings(recipe))


def _multiply_in_graph(
    a: torch.Tensor, b: torch.Tensor, out_dtype: Optional[torch.dtype], recipe: Optional[Recipe]
) -> torch.Tensor:
    a, b, dtype, squeeze = _prepare_operands(a, b)
    out = compiled_product.differentiable_matmul(a, b, out_dtype or dtype, recipe)
    return out if squeeze is None else squeeze(out)


def run_between_graphs(reason: str, function: Callable, *arguments: object, **options: object):
    """Calls a function where torch.compile cannot trace it: between two graphs, as TE's modules do."""
    torch._dynamo.graph_break(msg=f"transformer_engine_batched: {reason}")
    return _run_eagerly(function, *arguments, **options)


@torch.compiler.disable
def _run_eagerly(function: Callable, *arguments: object, **options: object):
    return function(*arguments, **options)


def _activation_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return nominal_dtype(x)


def _is_plain_matrix(x: torch.Tensor) -> bool:
    kind = type(x)
    return (
        (kind is torch.Tensor or kind is torch.nn.Parameter)
        and x.dtype in HIGH_PRECISION_DTYPES
        and x.dim() >= 2
    )


def check_operands(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands of a type that products take, in the dtype of torch.autocast."""
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"operand {name}: expected a torch.Tensor, got {type(x).__name__}")
        if isinstance(x, DTensor):
            raise UnsupportedError(
                f"operand {name} is a DTensor: multiply local shards, through "
                "torch.distributed.tensor.experimental.local_map (docs/training.md shows how)"
            )
        if not is_quantized(x) and x.dtype not in HIGH_PRECISION_DTYPES:
            raise TypeError(
                f"operand {name} has dtype {x.dtype}: expected float32, float16, bfloat16 or a TE "
                "quantized tensor"
            )
    kind = a.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        a = a if is_quantized(a) else a.to(dtype)
        b = b if is_quantized(b) else b.to(dtype)
    return a, b


def _prepare_operands(a: torch.Tensor, b: torch.Tensor):
    """Operands of at least two dims in the dtype of torch.autocast, the result's dtype, and what squeezes it, if needed."""
    if _is_plain_matrix(a) and _is_plain_matrix(b) and not torch.is_autocast_enabled(a.device.type):
        return a, b, a.dtype, None
    a, b = check_operands(a, b)
    dtype = _activation_dtype(a)
    for name, x in (("a", a), ("b", b)):
        if x.dim() == 0:
            raise ValueError(f"operand {name} is a scalar: expected at least 1 dim")
    is_a_vector, is_b_vector = a.dim() == 1, b.dim() == 1
    if not (is_a_vector or is_b_vector):
        return a, b, dtype, None
    if is_a_vector:
        a = a.unsqueeze(0)
    if is_b_vector:
        b = b.unsqueeze(-1)

    def squeeze(out: torch.Tensor) -> torch.Tensor:
        if is_b_vector:
            out = out.squeeze(-1)
        if is_a_vector:
            out = out.squeeze(-1 if is_b_vector else -2)
        return out

    return a, b, dtype, squeeze
