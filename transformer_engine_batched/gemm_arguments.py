# SPDX-License-Identifier: Apache-2.0
"""Arguments of `batched_general_gemm` and `bmm`: what each may be, and the error that says otherwise.

What the signature of a call decides is checked once (`check_sides` to `with_bias`), what depends on values at
each call. Must not choose an engine or launch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple, Optional

import torch
from transformer_engine.pytorch.quantized_tensor import Quantizer

from .errors import UnsupportedError
from .launch import Extras, Input
from .operands import Operand, broadcast_shapes, has_internal_overlap, num_elements_spanned
from .support import HIGH_PRECISION
from .te_interop.quantizers import is_quantizer, quantizer_format
from .te_interop.tensors import HIGH_PRECISION_DTYPES, Codes, is_quantized


class Side(NamedTuple):
    """One operand of ``left @ right``, for checks and messages."""

    x: object
    name: str
    transposed: bool
    codes: Codes

    def operand(self) -> Operand:
        """The matrices that are multiplied, as they lie in memory."""
        shape, strides = self.codes.data.shape, self.codes.data.stride()
        if self.codes.moved_last_dim:
            shape, strides = shape[1:] + shape[:1], strides[1:] + strides[:1]
        operand = Operand.from_strides(tuple(shape), tuple(strides))
        return operand.mT if self.transposed else operand

    def describe(self) -> str:
        """Name, type and shape for messages."""
        shape = list(self.x.size())
        if is_quantized(self.x):
            return f"{self.name} ({type(self.x).__name__} {shape})"
        return f"{self.name} ({self.x.dtype} {shape}, strides {list(self.x.stride())})"


def check_sides(
    left: Side, right: Side, out: Optional[torch.Tensor], bias: Optional[torch.Tensor]
) -> None:
    """Ranks of the operands, and one device for all tensors."""
    for side in (left, right):
        if len(side.codes.data.shape) < 2:
            raise ValueError(
                f"operand {side.describe()} has rank {len(side.codes.data.shape)}: expected [*batch, rows, "
                "cols] with at least 2 dims; unsqueeze vectors first"
            )
    device = left.codes.data.device
    for what, tensor in (
        (f"operand {right.name}", right.codes.data),
        ("out", out),
        ("bias", bias),
    ):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{what} is on {tensor.device}, operand {left.name} on {device}: move them to one device"
            )


def find_common_format(left: Side, right: Side) -> str:
    """Format of both operands, as in `support.FORMATS`."""
    formats = (left.codes.fmt, right.codes.fmt)
    if formats[0] == formats[1]:
        return formats[0]
    quantized = [fmt not in HIGH_PRECISION for fmt in formats]
    if all(quantized):
        fix = "quantize both with the same recipe"
    elif any(quantized):
        fix = "quantize the other one, too (teb.quantize), or dequantize this one"
    else:
        fix = "cast one of them"
    raise TypeError(
        f"operands {left.describe()} and {right.describe()} have different formats, {formats[0]} and "
        f"{formats[1]}: {fix}"
    )


def find_batch_shape(left: Side, right: Side, a: Operand, b: Operand) -> tuple[int, ...]:
    """Batch dims of the product of two sides, described by `a` and `b`."""
    if a.cols != b.rows:
        raise ValueError(
            f"operands {left.describe()} and {right.describe()}: the contracted sizes differ, {a.cols} of "
            f"{left.name} and {b.rows} of {right.name}"
            + (" (transposed as the layout says)" if left.transposed or right.transposed else "")
        )
    batch_shape = broadcast_shapes(a.batch_shape, b.batch_shape)
    if batch_shape is None:
        raise ValueError(
            f"operands {left.describe()} and {right.describe()}: batch dims {list(a.batch_shape)} and "
            f"{list(b.batch_shape)} do not broadcast"
        )
    return batch_shape


def make_input(side: Side, operand: Operand) -> Input:
    """What a launch is told of an operand."""
    codes = side.codes
    scales = None
    if codes.fmt == "mxfp8":
        *batch, rows, cols = codes.data.shape
        num_items = math.prod(batch)
        if codes.columnwise and rows % 32 != 0 and num_items > 1:
            raise UnsupportedError(
                f"operand {side.describe()} is contracted along its rows, but its {rows} rows are no "
                "multiple of 32, so that column-wise MXFP8 blocks of TE's flattened tensor cross batch "
                "items. Pad the rows with zeros to a multiple of 32 before quantizing."
            )
        scales = (num_items, rows, cols, codes.columnwise, codes.swizzled)
    return Input(operand, codes.dtype, codes.data.data_ptr() % 16 == 0, scales)


def describe_out(out: torch.Tensor, shape: tuple[int, ...]) -> Operand:
    """How a given `out` lies in memory."""
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {list(out.shape)}, the product {list(shape)}")
    if has_internal_overlap(tuple(out.shape), out.stride()):
        raise ValueError(
            f"out of shape {list(out.shape)} and strides {list(out.stride())} has elements that share "
            "memory: pass a tensor that is not expanded"
        )
    return Operand.from_strides(tuple(out.shape), out.stride())


def with_bias(extras: Extras, bias: torch.Tensor, batch_shape: tuple[int, ...], n: int) -> Extras:
    """`extras` with what a launch is told of the bias."""
    if bias.dtype not in HIGH_PRECISION_DTYPES:
        raise TypeError(f"bias has dtype {bias.dtype}: expected float32, float16 or bfloat16")
    if tuple(bias.shape) not in ((n,), (*batch_shape, n)):
        raise ValueError(
            f"bias has shape {list(bias.shape)}: expected [{n}] or {list((*batch_shape, n))}"
        )
    strides = bias.stride()
    operand = Operand(tuple(bias.shape[:-1]), strides[:-1], 1, n, n, strides[-1])
    is_readable = strides[-1] == 1 or n == 1
    return replace(
        extras,
        bias_dtype=HIGH_PRECISION_DTYPES[bias.dtype],
        bias_operand=operand,
        fuse_epilogue=extras.fuse_epilogue and is_readable,
    )


_COMMUNICATION = ("ub", "ub_type", "extra_output", "bulk_overlap")


def refuse_unbatchable(
    gelu_in: Optional[torch.Tensor],
    grad: bool,
    gelu: bool,
    bias: Optional[torch.Tensor],
    communication: dict[str, object],
) -> None:
    """Refuses what TE's `general_gemm` takes and no batched product has."""
    for name, value in communication.items():
        if name not in _COMMUNICATION:
            raise TypeError(f"batched_general_gemm() got an unexpected keyword argument {name!r}")
        if value is not None and value is not False:
            raise UnsupportedError(
                f"{name}={value!r}: TE's communication overlap splits one matrix into chunks and has no "
                "batched form. Call general_gemm for it."
            )
    if gelu_in is not None:
        raise UnsupportedError(
            "gelu_in is the input of TE's dGELU epilogue, which has no batched form: multiply the "
            "gradient after the product"
        )
    if grad and (gelu or bias is not None):
        raise UnsupportedError(
            "grad=True with gelu or bias asks for TE's dGELU or bias-gradient epilogue, which have no "
            "batched form: compute them from the result (the bias gradient is its sum over rows)"
        )


def check_gradients(x: object, name: str) -> None:
    """Refuses an operand that requires grad."""
    # TE's storage classes have no gradient.
    if getattr(x, "requires_grad", False):
        raise ValueError(
            f"{name} requires grad, but this function is not differentiable: call it under "
            "torch.no_grad() or on detached tensors; teb.bmm and te.BatchedMatmul are differentiable"
        )


def check_factors(alpha: float, beta: Optional[float], accumulate: bool) -> tuple[float, float]:
    """alpha and beta as numbers; beta is 0 unless the product is accumulated."""
    alpha = float(alpha)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha}: expected a finite number")
    if not accumulate:
        if beta not in (None, 0.0):
            raise ValueError(
                f"beta={beta} without accumulate=True would be ignored: pass accumulate=True and `out`"
            )
        return alpha, 0.0
    beta = 1.0 if beta is None else float(beta)
    if not math.isfinite(beta):
        raise ValueError(f"beta={beta}: expected a finite number")
    return alpha, beta


def check_destination(
    quantizer: Optional[Quantizer],
    out: Optional[torch.Tensor],
    accumulate: bool,
    out_dtype: Optional[torch.dtype],
) -> None:
    """The quantizer or the `out` that a result is for."""
    if quantizer is not None:
        if not is_quantizer(quantizer):
            raise TypeError(
                f"quantization_params: expected one of TE's quantizers, got {type(quantizer).__name__}"
            )
        quantizer_format(quantizer)
        if out is not None or accumulate:
            raise UnsupportedError(
                "quantization_params returns a new quantized tensor and takes no `out` to write or "
                "accumulate to: leave one of them out"
            )
        return
    if is_quantized(out) or not isinstance(out, torch.Tensor):
        raise TypeError(
            f"out: expected a torch.Tensor in high precision, got {type(out).__name__}; for a quantized "
            "result pass quantization_params"
        )
    if out_dtype is not None and out_dtype != out.dtype:
        raise ValueError(
            f"out_dtype={out_dtype}, but out has dtype {out.dtype}: leave out_dtype out"
        )


def check_delayed_state(quantizer: Quantizer, device: torch.device) -> None:
    """Scale and amax of a quantizer that quantizes inside the product."""
    for name in ("scale", "amax"):
        state = getattr(quantizer, name)
        if (
            not isinstance(state, torch.Tensor)
            or state.dtype != torch.float32
            or state.numel() != 1
            or state.device != device
        ):
            came = (
                f"{state.dtype} {list(state.shape)} on {state.device}"
                if isinstance(state, torch.Tensor)
                else type(state).__name__
            )
            raise ValueError(
                f"the quantizer's `{name}` must be one float32 on {device}, got {came}"
            )


def check_aliasing(
    out: torch.Tensor, left: tuple, right: tuple, bias: Optional[torch.Tensor]
) -> None:
    """Refuses an `out` whose span of memory meets that of an input."""
    start, end = _memory_span(out)
    for name, tensor in (
        (left[1], left[3].data),
        (right[1], right[3].data),
        ("bias", bias),
    ):
        if tensor is None:
            continue
        other_start, other_end = _memory_span(tensor)
        if start < other_end and other_start < end:
            raise ValueError(
                f"out and {name} share memory (their first to last elements overlap): the product could "
                "read what it has written; pass another out"
            )


def _memory_span(x: torch.Tensor) -> tuple[int, int]:
    start = x.data_ptr()
    return start, start + num_elements_spanned(x.shape, x.stride()) * x.element_size()
