# SPDX-License-Identifier: Apache-2.0
"""TE's base module: its bookkeeping around a forward, also on a CPU, and its places in TE's global state."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator
from unittest import mock

import torch  # before TE: it loads the libraries that TE links to
import transformer_engine.pytorch
from transformer_engine.pytorch import distributed
from transformer_engine.pytorch.distributed import (
    in_fp8_activation_recompute_phase,
    is_fp8_activation_recompute_enabled,
)
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.quantization import (
    FP8GlobalStateManager,
    _has_delayed_scaling_state,
)

# Whether TE marks each forward for NVIDIA's profiler; TE asks at every call.
_IS_PROFILED = transformer_engine.pytorch.utils._nvtx_enabled()


def enter_forward(module: TransformerEngineBaseModule, x: torch.Tensor) -> None:
    """TE's bookkeeping before a forward of `x`: what its `prepare_forward` does, also on a CPU.

    TE finds nothing to do from the second forward on, unless something has changed. That it has not is
    seen here in a tenth of the time.
    """
    if _is_unchanged(module, x):
        return
    if x.is_cuda:
        # num_gemms, allow_non_contiguous, allow_different_data_and_param_types
        module.prepare_forward(x, 1, True, True)
    else:
        _enter_forward_without_cuda(module, x)


def leave_forward(module: TransformerEngineBaseModule, x: torch.Tensor) -> None:
    """What TE's `end_forward` does, likewise."""
    if _IS_PROFILED and x.is_cuda:
        module.end_forward()
    elif in_fp8_activation_recompute_phase():
        _leave_forward_without_cuda(module)


def _is_unchanged(module: TransformerEngineBaseModule, x: torch.Tensor) -> bool:
    """Whether `prepare_forward` of TE 2.20 would leave module and global state as they are.

    It looks at what is read here: the region, its recipe (by equality, which includes identity), the
    activations' dtype, recomputation, and the registration of amaxes for reduction.
    """
    region = FP8GlobalStateManager.quantization_state
    known = module.__dict__
    if (
        known["activation_dtype"] is not x.dtype  # also before the first forward
        or known["fp8"] is not region.fp8_enabled
        or region.fp8_calibration
        or region.fp8_parameters
        or known["fp8_calibration"]
        or distributed._IN_ACTIVATION_RECOMPUTE_REGION
        or distributed._ACTIVATION_RECOMPUTE_PHASE
        or _IS_PROFILED
        or torch.is_autocast_enabled()
    ):
        return False
    meta = known["fp8_meta"]
    if not region.fp8_enabled:
        return not known["fp8_initialized"] and meta.get("fp8_checkpoint") is False
    recipe = region.fp8_recipe
    return (
        known["fp8_initialized"]
        and recipe is not None
        and recipe is meta.get("recipe")
        and (
            not (recipe.delayed() or recipe.custom())
            or FP8GlobalStateManager.get_buffer_info() in meta
        )
    )


def _enter_forward_without_cuda(module: TransformerEngineBaseModule, x: torch.Tensor) -> None:
    """What `prepare_forward` does, for an input on a CPU, where TE refuses it."""
    if module.fp8 and in_fp8_activation_recompute_phase():
        FP8GlobalStateManager.get_old_fp8_meta_tensors_for_recompute(module.fp8_meta)
        return
    module.fast_setattr("activation_dtype", x.dtype)
    module.init_fp8_metadata(num_gemms=1)
    if module.fp8 and _has_delayed_scaling_state(module.fp8_meta):
        FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(module.fp8_meta)
        if is_fp8_activation_recompute_enabled():
            FP8GlobalStateManager.copy_forward_fp8_meta_tensors_for_recompute(module.fp8_meta)


def _leave_forward_without_cuda(module: TransformerEngineBaseModule) -> None:
    """What `end_forward` does, likewise."""
    if (
        module.fp8
        and _has_delayed_scaling_state(module.fp8_meta)
        and in_fp8_activation_recompute_phase()
    ):
        FP8GlobalStateManager.restore_fp8_meta_tensors(module.fp8_meta)


@contextmanager
def without_cuda() -> Iterator[None]:
    """Lets TE's base module be made and stored on a machine without CUDA.

    TE asks for CUDA in its constructor and synchronizes around checkpoints. Does nothing where CUDA is
    available.
    """
    if torch.cuda.is_available():
        yield
        return
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
    ):
        yield


def takes_first_module_turn() -> bool:
    """Whether the calling module is the first of its autocast region, which reduces gradients' amaxes.

    As in TE's Linear: asking in the recompute phase of a checkpoint does not use up the turn.
    """
    state = FP8GlobalStateManager.quantization_state
    before = state.is_first_fp8_module
    result = FP8GlobalStateManager.is_first_fp8_module()
    if in_fp8_activation_recompute_phase():
        state.is_first_fp8_module = before
    return result


def update_backward_scales() -> None:
    """Reduces the amaxes of gradients and updates their scales (delayed scaling)."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)


def point_history_buffers(module: TransformerEngineBaseModule) -> None:
    """Gives TE's global amax buffers this module's own histories, after their length has changed.

    TE 2.20's `adjust_amax_history_length` of one direction puts that direction's history into the
    buffers of both.
    """
    info = module.fp8_meta.get(FP8GlobalStateManager.get_buffer_info())
    if info is None:
        return
    state = FP8GlobalStateManager.quantization_state
    for key, position, buffer_key in zip(("scaling_fwd", "scaling_bwd"), info[::2], info[1::2]):
        if buffer_key in state.global_amax_buffer:
            history = module.fp8_meta[key].amax_history
            state.global_amax_history_buffer[buffer_key][position] = history
            state.global_amax_buffer[buffer_key][position] = history[0]


def meta_without_registration(fp8_meta: dict) -> dict:
    """A module's recipe state without its places in TE's global buffers, which a copy must not share."""
    places = (FP8GlobalStateManager.get_buffer_info(), "global_fp8_buffer_pos_fwd_recompute")
    return {key: value for key, value in fp8_meta.items() if key not in places}
