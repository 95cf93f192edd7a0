# SPDX-License-Identifier: Apache-2.0
"""The only reader of Transformer Engine's private attributes.

Everything that the package knows of the inside of TE 2.20's tensors and quantizers is here: which buffer
holds which copy, what its dims mean, how a tensor class is told from its storage. Must not import any
module of this package that plans or runs products.
"""

from __future__ import annotations

import functools
import os
from contextlib import ExitStack, contextmanager
from typing import Callable, Iterator, NamedTuple, Optional, Sequence
from unittest import mock

import torch  # before TE: it loads the libraries that TE links to
import transformer_engine.pytorch
from transformer_engine.common.recipe import Recipe
from transformer_engine.pytorch import distributed, quantization
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.distributed import (
    in_fp8_activation_recompute_phase,
    is_fp8_activation_recompute_enabled,
)
from transformer_engine.pytorch.module import base
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.quantization import (
    FP8GlobalStateManager,
    QuantizerRole,
    RecipeState,
    _has_delayed_scaling_state,
)
from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage, Quantizer
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import (
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    Float8Tensor,
)
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
    Float8BlockwiseQTensorStorage,
)
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage
from transformer_engine.pytorch.tensor.storage.nvfp4_tensor_storage import NVFP4TensorStorage

from .errors import UnsupportedError

# Keyed by plain integers: TE's enum hashes in Python, and operands are read at every call.
_FP8_DTYPES = {int(DType.kFloat8E4M3): "e4m3", int(DType.kFloat8E5M2): "e5m2"}
HIGH_PRECISION_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

_QUANTIZER_FORMATS = (
    ((Float8Quantizer, Float8CurrentScalingQuantizer), "float8"),
    (MXFP8Quantizer, "mxfp8"),
    (Float8BlockQuantizer, "float8_block"),
    (NVFP4Quantizer, "nvfp4"),
)


class Codes(NamedTuple):
    """One copy of an operand: elements and what makes them numbers.

    Parameters
    ----------
    fmt : str
        Format as in `support.FORMATS`.
    dtype : str
        "e4m3", "e5m2", or the high-precision type.
    data : torch.Tensor
        The elements; uint8 for FP8.
    scale_inv : torch.Tensor, optional
        FP32 ``[1]``, the E8M0 buffer of an MXFP8 tensor, or the FP32 buffer of a 128-block tensor.
    moved_last_dim : bool
        Whether `data` is TE's transposed copy ``[last, *leading]`` of a tensor ``[*leading, last]``.
    swizzled : bool
        Whether MXFP8 scales are already in 128x4 tiles (over the flattened matrix).
    columnwise : bool
        Whether MXFP8 blocks run along the rows.
    square : bool
        Whether 128-block scales are of 128 x 128 elements, not of 1 x 128.
    item_blocks : bool
        Whether 128-blocks start anew in each item, and `scale_inv` is ``[*batch, rows or blocks of rows, blocks]``
        of the matrices as stored; TE's belong to the flattened tensor.
    """

    fmt: str
    dtype: str
    data: torch.Tensor
    scale_inv: Optional[torch.Tensor] = None
    moved_last_dim: bool = False
    swizzled: bool = False
    columnwise: bool = False
    square: bool = False
    item_blocks: bool = False


def is_quantized(x: object) -> bool:
    """Whether `x` is one of TE's quantized tensors or storages."""
    return isinstance(x, QuantizedTensorStorage)


def is_quantizer(x: object) -> bool:
    """Whether `x` is one of TE's quantizers."""
    return isinstance(x, Quantizer)


def quantizer_format(quantizer: Quantizer) -> str:
    """Format that a quantizer writes, or an `UnsupportedError` that names its type."""
    for classes, fmt in _QUANTIZER_FORMATS:
        if isinstance(quantizer, classes):
            return fmt
    raise UnsupportedError(
        f"quantizer of type {type(quantizer).__name__}: batched products take tensors of "
        "Float8Quantizer, Float8CurrentScalingQuantizer, MXFP8Quantizer and Float8BlockQuantizer"
    )


def nominal_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype of a tensor, or the one that a quantized tensor stands for."""
    return x._dtype if isinstance(x, QuantizedTensorStorage) else x.dtype


def logical_shape(x: QuantizedTensorStorage) -> tuple[int, ...]:
    """Shape of the tensor that a quantized tensor stands for."""
    return tuple(x.size())


def read_codes(
    x: object, name: str, last_dim: bool, allow_strided: Callable[[torch.device], bool]
) -> Codes:
    """The copy of an operand that a product along its last (or second to last) dim reads.

    Parameters
    ----------
    x : torch.Tensor or QuantizedTensorStorage
    name : str
        Of the operand, for messages.
    last_dim : bool
        Whether the contracted dim is the last one ("row-wise" in TE's words) or the one before it.
    allow_strided : callable
        Whether a device multiplies FP8 operands whose contracted dim is strided, so that TE keeps no
        transposed copy there.
    """
    if isinstance(x, Float8TensorStorage):
        return _read_float8(x, name, last_dim, allow_strided)
    if isinstance(x, MXFP8TensorStorage):
        return _read_mxfp8(x, name, last_dim)
    if isinstance(x, Float8BlockwiseQTensorStorage):
        return _read_blockwise(x, name, last_dim, allow_strided)
    if isinstance(x, NVFP4TensorStorage):
        # The caller's support table says why there is no engine; the buffers are not read.
        return Codes("nvfp4", "e2m1", _any_buffer(x))
    if isinstance(x, QuantizedTensorStorage):
        raise UnsupportedError(
            f"operand {name} is a {type(x).__name__}: batched products take Float8 and MXFP8 tensors "
            "(or torch tensors: call its dequantize())"
        )
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"operand {name}: expected a torch.Tensor or a TE quantized tensor, got {type(x).__name__}"
        )
    dtype = HIGH_PRECISION_DTYPES.get(x.dtype)
    if dtype is None:
        raise TypeError(
            f"operand {name} has dtype {x.dtype}: expected float32, float16, bfloat16 or a TE quantized "
            "tensor"
        )
    return Codes(dtype, dtype, x)


def has_rowwise_copy(x: QuantizedTensorStorage) -> bool:
    """Whether a quantized tensor has data for products along its last dim."""
    return bool(x.get_usages().get("rowwise"))


def _any_buffer(x: QuantizedTensorStorage) -> torch.Tensor:
    return next(t for t in x.get_data_tensors() if t is not None)


def _read_float8(
    x: Float8TensorStorage, name: str, last_dim: bool, allow_strided: Callable[[torch.device], bool]
) -> Codes:
    dtype = _FP8_DTYPES[int(x._fp8_dtype)]
    transpose = None if x._transpose_invalid else x._transpose
    # The copy that is contiguous along the contracted dim; where the device takes strided ones, the other
    # copy serves as well.
    contiguous, strided = (x._data, transpose) if last_dim else (transpose, x._data)
    if contiguous is not None:
        return Codes("float8", dtype, contiguous, x._scale_inv, not last_dim)
    if strided is not None and allow_strided(strided.device):
        return Codes("float8", dtype, strided, x._scale_inv, last_dim)
    raise _missing_copy(x, name, last_dim)


def _read_mxfp8(x: MXFP8TensorStorage, name: str, last_dim: bool) -> Codes:
    data = x._rowwise_data if last_dim else x._columnwise_data
    scale_inv = x._rowwise_scale_inv if last_dim else x._columnwise_scale_inv
    if data is None or scale_inv is None:
        raise _missing_copy(x, name, last_dim)
    return Codes(
        "mxfp8",
        _FP8_DTYPES[int(x._fp8_dtype)],
        data,
        scale_inv,
        swizzled=bool(x._with_gemm_swizzled_scales),
        columnwise=not last_dim,
    )


def _read_blockwise(
    x: Float8BlockwiseQTensorStorage,
    name: str,
    last_dim: bool,
    allow_strided: Callable[[torch.device], bool],
) -> Codes:
    dtype, square = _FP8_DTYPES[int(x._fp8_dtype)], bool(x._is_2D_scaled)
    copies = (
        (x._rowwise_data, x._rowwise_scale_inv, False),
        (x._columnwise_data, x._columnwise_scale_inv, True),
    )
    for data, scale_inv, moved in copies if last_dim else reversed(copies):
        if data is None or scale_inv is None:
            continue
        # The two copies hold the same numbers only if blocks are square.
        if moved == last_dim and not (square and allow_strided(data.device)):
            continue
        return Codes("float8_block", dtype, data, scale_inv, moved, square=square)
    raise _missing_copy(x, name, last_dim)


def _missing_copy(x: QuantizedTensorStorage, name: str, last_dim: bool) -> ValueError:
    usage = "rowwise" if last_dim else "columnwise"
    dim = "last" if last_dim else "second to last"
    return ValueError(
        f"operand {name} ({type(x).__name__} of shape {list(logical_shape(x))}) is contracted along its "
        f"{dim} dim, but has no {usage} data: quantize it with a quantizer of {usage}=True"
        + (
            f", or call its update_usage({usage}_usage=True) first"
            if isinstance(x, Float8TensorStorage) and not last_dim
            else ""
        )
    )


# --- FP8 output -----------------------------------------------------------------------------------------


def is_delayed_quantizer(quantizer: Quantizer) -> bool:
    """Whether the scale is known before the data: the output can be quantized while it is written."""
    return isinstance(quantizer, Float8Quantizer)


def quantizer_fp8_dtype(quantizer: Quantizer) -> str:
    """FP8 type that a quantizer writes."""
    return _FP8_DTYPES[int(quantizer.dtype)]


def make_float8(
    quantizer: Float8Quantizer, codes: torch.Tensor, fake_dtype: torch.dtype
) -> Float8TensorStorage:
    """TE's tensor (or storage, if `quantizer.internal`) around codes written with `quantizer.scale`.

    The column-wise copy is made if the quantizer asks for it, where TE itself keeps one.
    """
    scale_inv = quantizer.scale.detach().reshape(1).reciprocal()
    transpose = None
    if quantizer.columnwise_usage and keeps_transposed_copy(codes.device):
        transpose = codes.movedim(-1, 0).contiguous()
    arguments = {
        "data": codes,
        "fp8_scale_inv": scale_inv,
        "fp8_dtype": quantizer.dtype,
        "data_transpose": transpose,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=fake_dtype, **arguments)
    return Float8Tensor(shape=codes.shape, dtype=fake_dtype, device=codes.device, **arguments)


def keeps_transposed_copy(device: torch.device) -> bool:
    """Whether TE keeps a transposed copy of per-tensor FP8 data for column-wise use on this device.

    On a CPU, where TE's kernels do not run, the tensors are laid out as on Hopper.
    """
    if device.type != "cuda":
        return True
    return not transformer_engine.pytorch.utils.is_non_tn_fp8_gemm_supported()


# --- quantizers -----------------------------------------------------------------------------------------


def copy_quantizer(quantizer: Quantizer, rowwise: bool, columnwise: bool) -> Quantizer:
    """The quantizer for internal use with the given usages; scale and amax stay shared."""
    result = quantizer.copy()
    result.set_usage(rowwise=rowwise, columnwise=columnwise)
    result.internal = True
    return result


def make_quantizer_of_scale(like: Quantizer, scale: torch.Tensor) -> Float8Quantizer:
    """A quantizer of the FP8 type of `like` with a given scale ``[1]``; its amax goes nowhere."""
    return Float8Quantizer(
        scale, torch.zeros_like(scale), like.dtype, rowwise=True, columnwise=True
    )


def has_square_blocks(quantizer: Quantizer) -> bool:
    """Whether scales are of 128 x 128 elements."""
    return isinstance(quantizer, Float8BlockQuantizer) and quantizer.block_scaling_dim == 2


def block_scaling_options(quantizer: Float8BlockQuantizer) -> dict[str, object]:
    """What decides scales and codes of a 128-block quantizer, as `block_cast.cast_blocks` takes it."""
    return {
        "square": has_square_blocks(quantizer),
        "epsilon": quantizer.amax_epsilon,
        "power_of_two": quantizer.force_pow_2_scales,
    }


def cast_settings(quantizer: Quantizer) -> tuple:
    """What decides the codes that a quantizer writes, besides data and state: part of a signature."""
    kind = type(quantizer)
    if isinstance(quantizer, (Float8Quantizer, MXFP8Quantizer)):
        return kind, int(quantizer.dtype)
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        return (
            kind,
            int(quantizer.dtype),
            quantizer.amax_epsilon,
            quantizer.force_pow_2_scales,
            quantizer.with_amax_reduction,
        )
    if isinstance(quantizer, Float8BlockQuantizer):
        return (
            kind,
            int(quantizer.dtype),
            quantizer.amax_epsilon,
            quantizer.force_pow_2_scales,
            quantizer.block_scaling_dim,
        )
    return (kind,)


def current_scaling_options(quantizer: Float8CurrentScalingQuantizer) -> dict[str, object]:
    """What decides the scale of a current-scaling quantizer, besides the data."""
    return {
        "amax_epsilon": quantizer.amax_epsilon,
        "force_pow_2_scales": quantizer.force_pow_2_scales,
    }


def current_scaling_group(
    quantizer: Float8CurrentScalingQuantizer,
) -> Optional[torch.distributed.ProcessGroup]:
    """The group that shares the amax of a current-scaling quantizer, if any."""
    return quantizer.amax_reduction_group if quantizer.with_amax_reduction else None


def has_amax_reduction(quantizer: Quantizer) -> bool:
    """Whether the amaxes of several ranks are one before anything is quantized."""
    return isinstance(quantizer, Float8CurrentScalingQuantizer) and quantizer.with_amax_reduction


def encode_quantizer(quantizer: Quantizer) -> tuple[str, float]:
    """A quantizer without state as text and its amax epsilon, which a compiled graph can hold."""
    dtype = int(quantizer.dtype)
    if isinstance(quantizer, MXFP8Quantizer):
        return f"mxfp8 {dtype}", 0.0
    flag = "1" if quantizer.force_pow_2_scales else "0"
    # torch.compile may take a number for a symbol, and compiles a graph with float symbols twice.
    epsilon = 0.0 if quantizer.amax_epsilon == 0.0 else quantizer.amax_epsilon
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        return f"current {dtype} {flag}", epsilon
    dim = "2" if quantizer.block_scaling_dim == 2 else "1"
    return f"block {dtype} {flag} {dim}", epsilon


def decode_quantizer(text: str, amax_epsilon: float, device: torch.device) -> Quantizer:
    """The quantizer that `encode_quantizer` was given."""
    kind, dtype, *rule = text.split()
    dtype = DType(int(dtype))
    if kind == "mxfp8":
        return MXFP8Quantizer(dtype)
    settings = {"amax_epsilon": amax_epsilon, "force_pow_2_scales": rule[0] == "1"}
    if kind == "current":
        return Float8CurrentScalingQuantizer(dtype, device=device, **settings)
    return Float8BlockQuantizer(
        dtype, rowwise=True, columnwise=True, block_scaling_dim=int(rule[1]), **settings
    )


class Buffers(NamedTuple):
    """One copy in TE's tensor: shape of its data, shape and dtype of its scales, and where the last dim went."""

    data_shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    scale_dtype: torch.dtype
    moved_last_dim: bool


def describe_buffers(
    quantizer: Quantizer, shape: tuple[int, ...], rowwise: bool, device: torch.device
) -> Buffers:
    """What a quantizer writes for a tensor of a shape (also a symbolic one): the row-wise copy or the other."""
    if isinstance(quantizer, (Float8Quantizer, Float8CurrentScalingQuantizer)):
        moved = not rowwise and keeps_transposed_copy(device)
        data_shape = (shape[-1], *shape[:-1]) if moved else shape
        return Buffers(data_shape, (1,), torch.float32, moved)
    specs = copy_quantizer(quantizer, rowwise, not rowwise).inner_tensor_specs(shape)
    side = "rowwise" if rowwise else "columnwise"
    data_shape, _ = specs[f"_{side}_data"]
    scale_shape, scale_dtype = specs[f"_{side}_scale_inv"]
    moved = isinstance(quantizer, Float8BlockQuantizer) and not rowwise
    return Buffers(data_shape, scale_shape, scale_dtype, moved)


def is_calibrating() -> bool:
    """Whether te.autocast only collects statistics."""
    return FP8GlobalStateManager.is_fp8_calibration()


# --- modules and recipes --------------------------------------------------------------------------------


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
        enter_forward_without_cuda(module, x)


def leave_forward(module: TransformerEngineBaseModule, x: torch.Tensor) -> None:
    """What TE's `end_forward` does, likewise."""
    if _IS_PROFILED and x.is_cuda:
        module.end_forward()
    elif in_fp8_activation_recompute_phase():
        leave_forward_without_cuda(module)


# Whether TE marks each forward for NVIDIA's profiler; TE asks at every call.
_IS_PROFILED = transformer_engine.pytorch.utils._nvtx_enabled()


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


def enter_forward_without_cuda(module: TransformerEngineBaseModule, x: torch.Tensor) -> None:
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


def leave_forward_without_cuda(module: TransformerEngineBaseModule) -> None:
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


@contextmanager
def recipe_states_on(device: torch.device) -> Iterator[None]:
    """Lets TE's base module make its recipe states on a CPU; it names CUDA for them."""
    if device.type == "cuda":
        yield
        return
    create = functools.partial(RecipeState.create, device=device)
    with mock.patch.object(RecipeState, "create", staticmethod(create)):
        yield


def make_gradient_quantizer(fmt: str, device: torch.device) -> Quantizer:
    """The quantizer for gradients of operands that came quantized, as TE's recipes make it by default.

    E5M2 and current scaling for one scale per tensor; E4M3 for MXFP8 and for 128-blocks, those of 1 x 128.
    """
    if fmt == "mxfp8":
        return MXFP8Quantizer(DType.kFloat8E4M3)
    if fmt == "float8_block":
        return Float8BlockQuantizer(
            DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=1
        )
    return Float8CurrentScalingQuantizer(DType.kFloat8E5M2, device=device)


def quantizer_of(x: QuantizedTensorStorage) -> Quantizer:
    """The quantizer that a quantized tensor carries, or one like it."""
    return x._get_quantizer()


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


# --- names added to TE ----------------------------------------------------------------------------------


def _add_name(module: object, where: str, name: str, value: object) -> None:
    existing = getattr(module, name, value)
    if existing is not value:
        raise ImportError(
            f"{where}.{name} exists already: this version of Transformer Engine has its own; use that one, "
            "or an older Transformer Engine"
        )
    setattr(module, name, value)


def add_to_pytorch(name: str, value: object) -> None:
    """Adds a name to `transformer_engine.pytorch`, never replacing one of TE's."""
    _add_name(transformer_engine.pytorch, "transformer_engine.pytorch", name, value)


def add_to_cpp_extensions(name: str, function: Callable) -> None:
    """Adds a function to `transformer_engine.pytorch.cpp_extensions`, never replacing one of TE's."""
    module = transformer_engine.pytorch.cpp_extensions
    _add_name(module, "transformer_engine.pytorch.cpp_extensions", name, function)
