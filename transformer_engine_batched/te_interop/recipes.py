# SPDX-License-Identifier: Apache-2.0
"""TE's recipes and their states: what is active, the quantizers it gives, and what TE's modules add to them."""

from __future__ import annotations

import functools
import os
from contextlib import ExitStack, contextmanager
from typing import Iterator, NamedTuple, Optional, Sequence
from unittest import mock

import torch  # before TE: it loads the libraries that TE links to
from transformer_engine.common.recipe import Recipe
from transformer_engine.pytorch import quantization
from transformer_engine.pytorch.module import base
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, RecipeState
from transformer_engine.pytorch.quantized_tensor import Quantizer


class AccumulatorSettings(NamedTuple):
    """`use_split_accumulator` of forward and of the gradients of the first and second operand."""

    forward: bool
    grad_a: bool
    grad_b: bool


def accumulator_settings(recipe: Recipe) -> AccumulatorSettings:
    """What a recipe says, or TE's defaults for recipes that say nothing (module/base.py, _2X_ACC_*)."""
    names = ("fp8_gemm_fprop", "fp8_gemm_dgrad", "fp8_gemm_wgrad")
    defaults = (base._2X_ACC_FPROP, base._2X_ACC_DGRAD, base._2X_ACC_WGRAD)
    return AccumulatorSettings(
        *(
            getattr(recipe, name).use_split_accumulator if hasattr(recipe, name) else default
            for name, default in zip(names, defaults)
        )
    )


def active_recipe() -> Optional[Recipe]:
    """The recipe of the autocast region, or None outside of one and where it is disabled."""
    if not FP8GlobalStateManager.is_fp8_enabled():
        return None
    return FP8GlobalStateManager.get_fp8_recipe()


def is_calibrating() -> bool:
    """Whether te.autocast only collects statistics."""
    return FP8GlobalStateManager.is_fp8_calibration()


@contextmanager
def all_recipes_supported() -> Iterator[None]:
    """Lets TE's autocast accept recipes that the device lacks, and update scales wherever they are.

    TE's fused update of amaxes and scales is a CUDA kernel; its other one works on CPU tensors, too.
    """
    names = ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(quantization, name, (True, "")))
        stack.enter_context(mock.patch.dict(os.environ, NVTE_UNFUSED_FP8_UPDATE="1"))
        yield


def make_stateless_quantizers(recipe: Recipe, device: torch.device) -> tuple[Quantizer, ...]:
    """Quantizers (a, b, grad_output) of a recipe that keeps no state."""
    forward = RecipeState.create(recipe, mode="forward", num_quantizers=3, device=device)
    backward = RecipeState.create(recipe, mode="backward", num_quantizers=2, device=device)
    a, b, _ = forward.make_quantizers()
    grad_output = backward.make_quantizers()[0]
    set_current_scaling_options(recipe, (a, b), (grad_output,))
    return a, b, grad_output


def set_current_scaling_options(
    recipe: Recipe, forward: Sequence[Quantizer], backward: Sequence[Quantizer]
) -> None:
    """Gives quantizers (a, b, ...; grad_output, ...) the options that TE's modules set, not its recipe states.

    As TE's Linear does for its input, weight and gradient
    (`_customize_quantizers_float8_current_scaling`).
    """
    if not recipe.float8_current_scaling():
        return
    options = (recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight)
    pairs = [*zip(forward, options), *zip(backward, (recipe.fp8_quant_bwd_grad,))]
    for quantizer, option in pairs:
        quantizer.force_pow_2_scales = option.power_2_scale
        quantizer.amax_epsilon = option.amax_epsilon


def remake_quantizers(recipe_state: RecipeState) -> list:
    """Quantizers that share the buffers of a copied recipe state."""
    recipe_state.inherit_state_from(recipe_state)
    return recipe_state.make_quantizers()


def has_other_format(recipe_state: RecipeState, recipe: Recipe) -> bool:
    """Whether a recipe of the same class asks for other FP8 types than the state was made for.

    TE 2.20 keeps the old quantizers then (its issue 3157).
    """
    before, after = (getattr(x, "fp8_format", None) for x in (recipe_state.recipe, recipe))
    return type(recipe_state.recipe) is type(recipe) and before != after


@contextmanager
def recipe_states_on(device: torch.device) -> Iterator[None]:
    """Lets TE's base module make its recipe states on a CPU; it names CUDA for them."""
    if device.type == "cuda":
        yield
        return
    create = functools.partial(RecipeState.create, device=device)
    with mock.patch.object(RecipeState, "create", staticmethod(create)):
        yield
