# SPDX-License-Identifier: Apache-2.0
"""`RecipeModule`: what all modules of two quantized activations share, the state of their recipe.

A subclass calls `_begin_forward`, `_choose_quantization` and `_end_forward` around its arithmetic. Everything
about scales, histories, checkpoints and roles is here or in TE's base class.
"""

from __future__ import annotations

from typing import List, Optional

import torch
from transformer_engine.common.recipe import Recipe
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.quantization import QuantizerRole

from .autograd import Quantization
from .errors import UnsupportedError
from .te_interop.modules import (
    enter_forward,
    leave_forward,
    meta_without_registration,
    point_history_buffers,
    takes_first_module_turn,
    update_backward_scales,
    without_cuda,
)
from .te_interop.recipes import (
    accumulator_settings,
    has_other_format,
    recipe_states_on,
    remake_quantizers,
    set_current_scaling_options,
)

# No recipe is this one.
_UNKNOWN = (None, None, None, Quantization(), None)


class RecipeModule(TransformerEngineBaseModule):
    """Base class of modules that multiply two activations, `a` and `b`.

    Slots of quantizers are those of TE's modules: ``a, b, output`` and ``grad_output, grad_a`` (which `grad_b`
    shares).

    Parameters
    ----------
    name : str, optional
        For quantizer roles and debugging, as in TE.
    """

    # The `module_type` of the roles that a `CustomRecipe` is asked for.
    module_type = "batched_matmul"

    def __init__(self, name: Optional[str] = None) -> None:
        with without_cuda():
            super().__init__(name=name)
        self.fast_setattr("_state_device", _default_device())
        self.fast_setattr("_known_quantization", _UNKNOWN)

    def _begin_forward(self, x: torch.Tensor) -> None:
        """TE's bookkeeping before a forward on the device of `x`; `_end_forward` must follow."""
        self.__dict__["_state_device"] = x.device
        enter_forward(self, x)

    def _end_forward(self, x: torch.Tensor) -> None:
        leave_forward(self, x)

    def _choose_quantization(self, a: torch.Tensor, b: torch.Tensor) -> Quantization:
        if not self.fp8:
            if self.fp8_calibration:
                for quantizer, x in zip(self.quantizers["scaling_fwd"], (a, b)):
                    quantizer.calibrate(x.detach())
            return Quantization()
        recipe = self.fp8_meta["recipe"]
        forward, backward = self.quantizers["scaling_fwd"], self.quantizers["scaling_bwd"]
        # TE makes new lists when a recipe or the length of its history changes.
        known = self._known_quantization
        if known[0] is not recipe or known[1] is not forward or known[2] is not backward:
            known = _decide_quantization(recipe, forward, backward)
            self.fast_setattr("_known_quantization", known)
        _, _, _, quantization, with_update = known
        if with_update is None or not torch.is_grad_enabled():
            return quantization
        if (a.requires_grad or b.requires_grad) and takes_first_module_turn():
            return with_update
        return quantization

    def set_meta_tensor(self, fwd: bool, recipe: Recipe) -> None:
        """Makes scales and amax histories, on the CPU if that is where the operands are."""
        state = self.fp8_meta.get("scaling_fwd" if fwd else "scaling_bwd")
        is_initialized = self.fp8_meta_tensors_initialized
        if state is not None and has_other_format(state, recipe):
            if recipe.delayed():
                raise UnsupportedError(
                    f"the fp8_format of DelayedScaling changed to {recipe.fp8_format.name} after scales of another "
                    f"one were recorded, which TE keeps under the old recipe: make a new {type(self).__name__} for it"
                )
            self.fast_setattr("fp8_meta_tensors_initialized", False)
        with recipe_states_on(self._state_device):
            super().set_meta_tensor(fwd, recipe)
        self.fast_setattr("fp8_meta_tensors_initialized", is_initialized)
        made = self.quantizers["scaling_fwd" if fwd else "scaling_bwd"]
        set_current_scaling_options(recipe, *((made, ()) if fwd else ((), made)))

    def adjust_amax_history_length(self, length: int, fwd: Optional[bool] = None) -> None:
        """Changes the length of the amax histories of one direction or both; keeps their newest part."""
        super().adjust_amax_history_length(length, fwd)
        point_history_buffers(self)

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state["fp8_meta"] = meta_without_registration(self.fp8_meta)
        state["quantizers"] = {key: [] for key in self.quantizers}
        state["_known_quantization"] = _UNKNOWN
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for key in self.quantizers:
            if key in self.fp8_meta:
                self.quantizers[key] = remake_quantizers(self.fp8_meta[key])

    def get_extra_state(self) -> torch.Tensor:
        """Scales and amax histories for a checkpoint, as all TE modules store them."""
        with without_cuda():
            return super().get_extra_state()

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restores what `get_extra_state` gave."""
        with without_cuda():
            super().set_extra_state(state)

    def get_quantizer_roles(
        self, *, fwd: bool, num_quantizers: int
    ) -> Optional[List[QuantizerRole]]:
        """Roles for `CustomRecipe`: a, b, output; grad_output, grad_a (which grad_b shares)."""

        def role(tensor_type: str) -> QuantizerRole:
            return QuantizerRole(
                module_type=self.module_type, tensor_type=tensor_type, name=self.name or ""
            )

        if fwd:
            roles = [role("a"), role("b"), self._output_quantizer_role or role("output")]
        else:
            roles = [role("grad_output"), self._grad_input_quantizer_role or role("grad_a")]
        assert len(roles) == num_quantizers
        return roles

    def _get_weight_tensors(self) -> list:
        return []

    def _get_weight_quantizers(self) -> list:
        return []


def _decide_quantization(recipe: Recipe, forward: list, backward: list) -> tuple:
    """(recipe, quantizers forward and backward, what to do, and for the module whose turn the update is)."""
    check_recipe(recipe)
    quantization = Quantization(forward[0], forward[1], backward[0], *accumulator_settings(recipe))
    with_update = None
    if not is_stateless(recipe):
        with_update = quantization._replace(after_backward=update_backward_scales)
    return recipe, forward, backward, quantization, with_update


def check_recipe(recipe: Recipe) -> None:
    """Refuses settings of a recipe that a batched product cannot follow."""
    override = getattr(recipe, "backward_override", None)
    if override is not None:
        raise UnsupportedError(
            f"{type(recipe).__name__}(backward_override={override!r}): the backward of a batched product runs "
            "on the operands that forward quantized. Leave backward_override at None, or multiply outside "
            "te.autocast for a backward in high precision."
        )


def is_stateless(recipe: Recipe) -> bool:
    """Whether a recipe keeps nothing between steps."""
    return not (recipe.delayed() or recipe.custom())


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
