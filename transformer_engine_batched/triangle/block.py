# SPDX-License-Identifier: Apache-2.0
"""`TriangleMultiplication`: the triangle multiplicative update of AlphaFold as a Transformer Engine module.

Holds the parameters, the recipe's state (its base class) and the choice between two pipelines of the same
arithmetic: "composed", torch operations around a batched product, and "fused" (`autograd`).
"""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext
from typing import Callable, NamedTuple, Optional

import torch
from transformer_engine.common.recipe import Recipe

from ..autograd import Quantization, differentiable_matmul
from ..batched_einsum import contract
from ..emulation import current_emulation
from ..errors import UnsupportedError
from ..module import run_between_graphs
from ..plan import describe_device
from ..recipe_module import RecipeModule
from ..support import Device
from ..te_interop.quantizers import make_quantizer_of_scale, quantizer_fp8_dtype
from ..te_interop.tensors import HIGH_PRECISION_DTYPES
from . import weights as public_weights
from .autograd import PARAMETERS, Settings, multiply_triangle
from .bounds import bound_scales

_EQUATIONS = {"outgoing": "bikd,bjkd->bijd", "incoming": "bkid,bkjd->bijd"}
MODES = tuple(_EQUATIONS)
_NOT_TRACED = "triangle multiplication is not traced"
SCALINGS = ("recipe", "bound")
INITS = ("alphafold", "normal")
PIPELINES = ("auto", "fused", "composed")


class Pipeline(NamedTuple):
    """Which of the two pipelines runs ("fused" or "composed"), and why not the fused one."""

    name: str
    reason: str = ""


def choose_pipeline(
    device: Device,
    dtype: torch.dtype,
    recipe: Optional[Recipe],
    dim: int,
    hidden: int,
    *,
    is_calibrating: bool = False,
    shares_amaxes: bool = False,
    force_reference: bool = False,
) -> Pipeline:
    """The table of the two pipelines: "fused" where all of these hold, else "composed".

    ======================  ========================================================
    device                  CUDA, compute capability 9.0 (Hopper) or higher
    dtype of the arithmetic BF16 (that of `z`, or of torch.autocast)
    recipe                  none, `DelayedScaling` or `Float8CurrentScaling`
    dim, hidden             multiples of 16, from 16 to 256
    state                   not calibrating, no amaxes of current scaling shared with
                            other ranks, not in ``emulate(engine="reference")``
    ======================  ========================================================
    """
    if not device.is_cuda or device.capability < (9, 0):
        return Pipeline("composed", f"{device.name} is no CUDA device of capability 9.0 or higher")
    if dtype is not torch.bfloat16:
        return Pipeline(
            "composed", f"its kernels compute in BF16, not {HIGH_PRECISION_DTYPES[dtype]}"
        )
    if recipe is not None and not (recipe.delayed() or recipe.float8_current_scaling()):
        return Pipeline("composed", f"{type(recipe).__name__} has no scale per tensor")
    for name, size in (("dim", dim), ("hidden", hidden)):
        if size % 16 or size > 256:
            return Pipeline("composed", f"{name} = {size} is no multiple of 16 up to 256")
    if is_calibrating:
        return Pipeline("composed", "a calibration needs the operands in high precision")
    if shares_amaxes:
        return Pipeline("composed", "its quantizers share their amaxes with other ranks")
    if force_reference:
        return Pipeline("composed", 'emulate(engine="reference") is active')
    return Pipeline("fused")


class TriangleMultiplication(RecipeModule):
    """``out = sigmoid(x Wg_o^T) * (LN(c) Wp_o^T)``: the triangle multiplicative update.

    With ``x = LN(z)`` and ``[a | b] = mask * sigmoid(x Wg^T) * (x Wp^T)``, the contraction is, for each of
    `hidden` channels,

    - outgoing: ``c[i, j] = sum_k a[i, k] b[j, k]``
    - incoming: ``c[i, j] = sum_k a[k, i] b[k, j]``

    Available as `transformer_engine.pytorch.TriangleMultiplication` once the package is imported.
    Inside ``te.autocast(enabled=True, recipe=...)`` the contraction and its two backward products run on FP8
    operands, which are what is saved for backward; LayerNorms, projections and gates stay in high precision.

    Parameters
    ----------
    dim : int
        Channels of the pair representation.
    hidden : int, default = `dim`
        Channels that are contracted: the batch of the product.
    mode : {"outgoing", "incoming"}
        Algorithms 11 and 12 of AlphaFold 2 (12 and 13 of AlphaFold 3).
    bias : bool, default = False
        Whether the linear maps have biases: AlphaFold 2 has them, AlphaFold 3 and Boltz have not.
    eps : float, default = 1e-5
        Of both LayerNorms.
    scaling : {"recipe", "bound"}
        Where the scales of `a` and `b` come from under a recipe with one scale per tensor. "recipe": from
        amaxes, as the recipe says. "bound": from the weights alone, ``448 / max_d(sqrt(dim) |w_d| + ...)``
        (`bounds.bound_operands`), which no `z` can exceed: neither history nor a pass over
        the data, right from the first step on, and the same for every batch and rank. The mask must lie within
        [0, 1]. The gradient's scale is the recipe's. Without a recipe it has no effect.
    init : {"alphafold", "normal"}
        "alphafold", as the published models start: projections of variance ``1 / fan_in``, gates at weight
        zero and bias one, the output projection zero, so that a fresh block returns exactly 0.
        "normal": all linear maps of variance ``1 / fan_in``, biases as before.
    pipeline : {"auto", "fused", "composed"}
        "auto" chooses by `choose_pipeline`. "fused" is an error where it cannot run.
    params_dtype : torch.dtype, default = `torch.get_default_dtype()`
        Dtype of the parameters. They are rounded to the dtype of the arithmetic where they are multiplied.
    device : torch.device or str, default = "cuda" where there is one, else "cpu"
        Of the parameters.
    name : str, optional
        For quantizer roles and debugging, as in TE.

    Notes
    -----
    The parameters are named as the arguments of NVIDIA cuEquivariance's function of the same job:
    ``norm_in_weight [dim]``, ``p_in_weight [2 hidden, dim]`` (rows of `a` above those of `b`), ``g_in_weight``,
    ``norm_out_weight [hidden]``, ``p_out_weight [dim, hidden]``, ``g_out_weight [dim, dim]``, and each with
    ``_bias``, the linear ones if asked for.

    Two pipelines share parameters and recipe state and differ by rounding alone: "fused" never writes `x`, `a`
    or `b` in high precision; "composed" is made of torch operations and runs everywhere, with every recipe and
    inside `emulate()`. `choose_pipeline` is the table.

    What is said of `DelayedScaling`, accumulation, double backward and CUDA graphs at `BatchedMatmul` holds
    here: one call for each autocast region, no second derivative. The mask gets no gradient.

    Raises
    ------
    ValueError
        For sizes below 1 and unknown options.

    Examples
    --------
    >>> import torch, transformer_engine.pytorch as te, transformer_engine_batched as teb
    >>> from transformer_engine.common.recipe import Float8CurrentScaling
    >>> block = te.TriangleMultiplication(32, mode="incoming", init="normal", device="cpu")
    >>> z, mask = torch.randn(1, 20, 20, 32, requires_grad=True), torch.ones(1, 20, 20)
    >>> with teb.emulate(), te.autocast(enabled=True, recipe=Float8CurrentScaling()):
    ...     z_new = z + block(z, mask)
    >>> z_new.sum().backward()
    >>> tuple(z.grad.shape), tuple(block.p_in_weight.grad.shape)
    ((1, 20, 20, 32), (64, 32))
    """

    module_type = "triangle_multiplication"

    def __init__(
        self,
        dim: int,
        hidden: Optional[int] = None,
        mode: str = "outgoing",
        *,
        bias: bool = False,
        eps: float = 1e-5,
        scaling: str = "recipe",
        init: str = "alphafold",
        pipeline: str = "auto",
        params_dtype: Optional[torch.dtype] = None,
        device: Optional[torch.device | str] = None,
        name: Optional[str] = None,
    ) -> None:
        hidden = dim if hidden is None else hidden
        for option, value, choices in (
            ("mode", mode, MODES),
            ("scaling", scaling, SCALINGS),
            ("init", init, INITS),
            ("pipeline", pipeline, PIPELINES),
        ):
            if value not in choices:
                raise ValueError(f"{option}={value!r}: expected one of {', '.join(choices)}")
        for option, value in (("dim", dim), ("hidden", hidden)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{option}={value!r}: expected an integer of at least 1")
        super().__init__(name=name)
        self.dim, self.hidden, self.mode, self.bias, self.eps = dim, hidden, mode, bias, eps
        self.scaling, self.init, self.pipeline = scaling, init, pipeline
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        options = {"dtype": params_dtype or torch.get_default_dtype(), "device": device}
        for norm, size in (("norm_in", dim), ("norm_out", hidden)):
            self._add_parameter(f"{norm}_weight", (size,), _fill(1.0), options)
            self._add_parameter(f"{norm}_bias", (size,), _fill(0.0), options)
        shapes = {
            "p_in": (2 * hidden, dim),
            "g_in": (2 * hidden, dim),
            "p_out": (dim, hidden),
            "g_out": (dim, dim),
        }
        for linear, shape in shapes.items():
            is_gate = linear.startswith("g_")
            starts_at_zero = init == "alphafold" and (is_gate or linear == "p_out")
            std = 0.0 if starts_at_zero else 1.0 / math.sqrt(shape[1])
            draw = functools.partial(torch.nn.init.normal_, std=std)
            self._add_parameter(f"{linear}_weight", shape, draw, options)
            if bias:
                self._add_parameter(
                    f"{linear}_bias", shape[:1], _fill(1.0 if is_gate else 0.0), options
                )
            else:
                self.register_parameter(f"{linear}_bias", None)
        self.reset_parameters(defer_init=torch.device(device).type == "meta")

    def _add_parameter(
        self, name: str, shape: tuple[int, ...], init_fn: Callable, options: dict
    ) -> None:
        parameter = torch.nn.Parameter(torch.empty(shape, **options))
        self.register_parameter(name, parameter, init_fn=init_fn)

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Draws the parameters anew as `init` says; those on the meta device become real first."""
        if not defer_init and self.p_in_weight.is_meta and not torch.cuda.is_available():
            self.to_empty(device="cpu")  # TE would make them on a GPU
        super().reset_parameters(defer_init=defer_init)

    @classmethod
    def from_openfold(
        cls,
        source: public_weights.Source,
        mode: str,
        *,
        prefix: str = "",
        **options: object,
    ) -> TriangleMultiplication:
        """A block with the weights of OpenFold's ``TriangleMultiplicativeUpdate``, fused or not.

        OpenFold3 and Protenix have the same names; theirs are without biases.

        Parameters
        ----------
        source : torch.nn.Module or mapping of str to torch.Tensor
            The module, or a state dict that has its weights.
        mode : {"outgoing", "incoming"}
            A state dict does not say which it is.
        prefix : str
            Of the weights' names in a state dict, such as ``"evoformer.blocks.0.core.tri_mul_out."``.
        **options
            As for the class; `eps`, dtype and device are those of the source unless given.

        Raises
        ------
        ValueError
            If weights are missing or unknown, or the module says it is of the other mode.
        """
        weights = public_weights.read_openfold(source, prefix)
        public_weights.check_mode(source, mode)
        return cls._from_weights(weights, mode, options)

    @classmethod
    def from_boltz(
        cls,
        source: public_weights.Source,
        mode: str,
        *,
        prefix: str = "",
        **options: object,
    ) -> TriangleMultiplication:
        """A block with the weights of Boltz's ``TriangleMultiplicationOutgoing`` or ``...Incoming``.

        Arguments and errors are those of `from_openfold`.
        """
        return cls._from_weights(public_weights.read_boltz(source, prefix), mode, options)

    @classmethod
    def _from_weights(
        cls, weights: public_weights.BlockWeights, mode: str, options: dict
    ) -> TriangleMultiplication:
        like = weights.tensors["p_in_weight"]
        defaults = {"params_dtype": like.dtype, "device": like.device}
        if weights.eps is not None:
            defaults["eps"] = weights.eps
        block = cls(
            weights.dim, weights.hidden, mode, bias=weights.has_bias, **{**defaults, **options}
        )
        with torch.no_grad():
            for name, value in weights.tensors.items():
                parameter = getattr(block, name)
                if parameter.shape != value.shape:
                    raise ValueError(
                        f"{name} was to be of shape {list(parameter.shape)}, but the weights given have "
                        f"{list(value.shape)}"
                    )
                parameter.copy_(value)
        return block

    def forward(self, z: torch.Tensor, mask: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The update of `z`, without the residual connection.

        Parameters
        ----------
        z : torch.Tensor
            ``[*batch, N, N, dim]``: FP32, FP16 or BF16.
        mask : torch.Tensor, optional
            ``[*batch, N, N]`` or broadcast to it, any dtype; 0 removes a pair from every sum.

        Returns
        -------
        torch.Tensor
            ``[*batch, N, N, dim]`` in the dtype of `z`, or that of torch.autocast.

        Raises
        ------
        TypeError, ValueError
            If dtype, shape or device do not fit.
        UnsupportedError
            If the pipeline or the scaling asked for cannot run with the recipe or on the device.
        """
        if torch.compiler.is_compiling():
            return run_between_graphs(_NOT_TRACED, self._forward, z, mask)
        return self._forward(z, mask)

    def _forward(self, z: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
        self._check_inputs(z, mask)
        shape = z.shape
        if z.dim() != 4:
            z = z.reshape(math.prod(shape[:-3]), *shape[-3:])
        if mask is not None and mask.shape != z.shape[:-1]:
            mask = mask.expand(shape[:-1]).reshape(z.shape[:-1])
        kind = z.device.type
        is_autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if is_autocast else z.dtype
        self._begin_forward(z)
        try:
            run = self._run_fused if self._choose_pipeline(z, dtype) else self._run_composed
            with torch.autocast(kind, enabled=False) if is_autocast else nullcontext():
                out = run(z, mask, dtype)
        finally:
            self._end_forward(z)
        return out if len(shape) == 4 else out.reshape(shape)

    def _check_inputs(self, z: torch.Tensor, mask: Optional[torch.Tensor]) -> None:
        if not isinstance(z, torch.Tensor) or z.dtype not in HIGH_PRECISION_DTYPES:
            raise TypeError(
                "z: expected a torch.Tensor of float32, float16 or bfloat16, got "
                f"{getattr(z, 'dtype', type(z).__name__)}"
            )
        if z.dim() < 3 or z.shape[-1] != self.dim or z.shape[-2] != z.shape[-3]:
            raise ValueError(
                f"z: expected [*batch, N, N, {self.dim}], got {list(z.shape)} (a pair representation is square)"
            )
        if z.device != self.p_in_weight.device:
            raise ValueError(
                f"z is on {z.device}, the parameters are on {self.p_in_weight.device}: move one of them"
            )
        if mask is None:
            return
        fits = mask.shape == z.shape[:-1]
        if not fits:
            try:
                fits = torch.broadcast_shapes(mask.shape, z.shape[:-1]) == z.shape[:-1]
            except RuntimeError:
                pass
        if not fits:
            raise ValueError(
                f"mask: expected {list(z.shape[:-1])} or what broadcasts to it, for z of {list(z.shape)}; "
                f"got {list(mask.shape)}"
            )
        if mask.device != z.device:
            raise ValueError(f"mask is on {mask.device}, z on {z.device}: move one of them")
        if mask.requires_grad:
            raise ValueError("mask requires grad, but gets no gradient here: pass mask.detach()")

    def _choose_pipeline(self, z: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether the fused pipeline runs."""
        if self.pipeline == "composed" or z.numel() == 0:
            return False
        found = choose_pipeline(
            describe_device(z.device),
            dtype,
            self.fp8_meta["recipe"] if self.fp8 else None,
            self.dim,
            self.hidden,
            is_calibrating=self.fp8_calibration and not self.fp8,
            shares_amaxes=self.fp8 and self._shares_amaxes(),
            force_reference=current_emulation().force_reference,
        )
        if found.name == "composed" and self.pipeline == "fused":
            raise UnsupportedError(
                f'pipeline="fused" was asked for, but {found.reason}. Use "auto" or "composed".'
            )
        return found.name == "fused"

    def _shares_amaxes(self) -> bool:
        quantizers = (*self.quantizers["scaling_fwd"][:2], self.quantizers["scaling_bwd"][0])
        return any(getattr(quantizer, "with_amax_reduction", False) for quantizer in quantizers)

    def _run_composed(
        self, z: torch.Tensor, mask: Optional[torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        x = _normalize(z, self.norm_in_weight, self.norm_in_bias, self.eps).to(dtype)
        gate = torch.sigmoid(_project(x, self.g_in_weight, self.g_in_bias))
        gated = gate * _project(x, self.p_in_weight, self.p_in_bias)
        if mask is not None:
            gated = gated * mask.to(dtype).unsqueeze(-1)
        a, b = gated.chunk(2, dim=-1)
        quantization = self._quantization_of(a, b)
        product = contract(
            _EQUATIONS[self.mode],
            a,
            b,
            lambda left, right, strides: differentiable_matmul(
                left, right, dtype, quantization, strides
            ),
        )
        normed = _normalize(product, self.norm_out_weight, self.norm_out_bias, self.eps)
        gate = torch.sigmoid(_project(x, self.g_out_weight, self.g_out_bias))
        return gate * _project(normed.to(dtype), self.p_out_weight, self.p_out_bias)

    def _run_fused(
        self, z: torch.Tensor, mask: Optional[torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        # Not through `__getattr__`: host time.
        parameters = tuple(map(self._parameters.__getitem__, PARAMETERS))
        # Only asked whether they want a gradient: the operands themselves never exist.
        wants = next((x for x in (z, *parameters) if x is not None and x.requires_grad), z)
        quantization = self._choose_quantization(wants, wants)
        scales = None
        if self.scaling == "bound" and quantization.is_enabled:
            scales = self._bound_scales(quantization)
        if mask is not None and mask.dtype not in (torch.bool, *HIGH_PRECISION_DTYPES):
            mask = mask.to(dtype)
        settings = Settings(self.mode, self.eps, dtype, quantization, scales)
        return multiply_triangle(z, mask, parameters, settings)

    def _quantization_of(self, a: torch.Tensor, b: torch.Tensor) -> Quantization:
        """The recipe's quantization, with the scales of the bound if asked for."""
        quantization = self._choose_quantization(a, b)
        if self.scaling == "recipe" or not quantization.is_enabled:
            return quantization
        scales = self._bound_scales(quantization)
        return quantization._replace(
            a=make_quantizer_of_scale(quantization.a, scales[0:1]),
            b=make_quantizer_of_scale(quantization.b, scales[1:2]),
        )

    def _bound_scales(self, quantization: Quantization) -> torch.Tensor:
        """Scales of `a` and `b` from the weights, ``[2]``."""
        recipe = self.fp8_meta["recipe"]
        if not (recipe.delayed() or recipe.float8_current_scaling()):
            raise UnsupportedError(
                f'scaling="bound" under {type(recipe).__name__}: a bound gives one scale per tensor, as '
                'DelayedScaling and Float8CurrentScaling use. Take one of them, or scaling="recipe".'
            )
        return bound_scales(
            self.norm_in_weight,
            self.norm_in_bias,
            self.p_in_weight,
            self.p_in_bias,
            quantizer_fp8_dtype(quantization.a),
        )

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"dim={self.dim}, hidden={self.hidden}, mode={self.mode!r}, bias={self.bias}, eps={self.eps}, "
            f"scaling={self.scaling!r}, pipeline={self.pipeline!r}, name={self.name!r}"
        )


def _fill(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return functools.partial(torch.nn.init.constant_, val=value)


def _normalize(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm; statistics in FP32, and parameters of another dtype are not rounded to that of `x`."""
    # On a CPU torch sums the parameters' gradients in the dtype of `x`: 20 dB in BF16.
    if weight.dtype != x.dtype or not x.is_cuda:
        x, weight, bias = x.float(), weight.float(), bias.float()
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


def _project(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)
