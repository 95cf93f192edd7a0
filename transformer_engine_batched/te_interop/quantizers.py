# SPDX-License-Identifier: Apache-2.0
"""TE's quantizers: what they write, by which settings, and quantizers like a given one."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch  # before TE: it loads the libraries that TE links to
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.quantized_tensor import Quantizer
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import (
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
)
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

from ..errors import UnsupportedError
from .tensors import FP8_DTYPES, keeps_transposed_copy

_QUANTIZER_FORMATS = (
    ((Float8Quantizer, Float8CurrentScalingQuantizer), "float8"),
    (MXFP8Quantizer, "mxfp8"),
    (Float8BlockQuantizer, "float8_block"),
    (NVFP4Quantizer, "nvfp4"),
)


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


def is_delayed_quantizer(quantizer: Quantizer) -> bool:
    """Whether the scale is known before the data: the output can be quantized while it is written."""
    return isinstance(quantizer, Float8Quantizer)


def quantizer_fp8_dtype(quantizer: Quantizer) -> str:
    """FP8 type that a quantizer writes."""
    return FP8_DTYPES[int(quantizer.dtype)]


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
