# SPDX-License-Identifier: Apache-2.0
"""`batched_general_gemm` and `bmm`: check, describe, launch.

Inputs are torch tensors and TE's quantized tensors. What depends only on shapes, strides, types and options
is checked and decided once and kept as a `Launch` under the signature of the call; what depends on values
(addresses, gradients, alpha) is checked at each call. Nothing is written before all checks have passed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Callable, NamedTuple, Optional

import torch

from . import _C
from .block_conversion import convert_to_mxfp8
from .blockwise_plan import BlockwiseLaunch
from .emulation import Emulation, current_emulation
from .errors import UnsupportedError
from .launch import EmptyLaunch, Extras, Input, Launch, Output
from .operands import (
    Operand,
    broadcast_shapes,
    has_internal_overlap,
    num_elements_spanned,
)
from .plan import current_sm_count, describe_device
from .quantize import quantize
from .reference.decoding import decode_blockwise, decode_item_blocks, decode_mxfp8
from .reference.product import TORCH_DTYPES
from .support import HIGH_PRECISION, check_fp8_pair, find_engine, supports_non_tn
from .te_interop import (
    HIGH_PRECISION_DTYPES,
    Codes,
    Quantizer,
    is_delayed_quantizer,
    is_quantized,
    is_quantizer,
    make_float8,
    nominal_dtype,
    quantizer_format,
    quantizer_fp8_dtype,
    read_codes,
)

# layout -> is (A, B) multiplied transposed, in row-major terms: out = op(B) @ op(A).
_LAYOUTS = {"TN": (True, False), "NN": (False, False), "NT": (False, True)}

_COMMUNICATION = ("ub", "ub_type", "extra_output", "bulk_overlap")

# Signatures of calls -> what was decided for them. Cleared when full: ragged workloads see many shapes, few
# of them again.
_MAX_LAUNCHES = 4096
_launches: dict[tuple, object] = {}


# Stand for launches of other operands: the decoded ones as plain tensors, and 128-blocks as MXFP8.
_DECODED = object()
_AS_MXFP8 = object()


class _Side(NamedTuple):
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


def batched_general_gemm(
    A: torch.Tensor,
    B: torch.Tensor,
    out_dtype: Optional[torch.dtype] = None,
    quantization_params: Optional[Quantizer] = None,
    gelu: bool = False,
    gelu_in: Optional[torch.Tensor] = None,
    alpha: float = 1.0,
    beta: Optional[float] = None,
    accumulate: bool = False,
    layout: str = "TN",
    out: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    use_split_accumulator: bool = False,
    grad: bool = False,
    *,
    autotune: Optional[bool] = None,
    **communication: object,
) -> torch.Tensor:
    """Batched matrix product in the convention of TE's `general_gemm`.

    ``out[b] = quantize(gelu(alpha * op(B[b]) @ op(A[b]) + beta * out[b] + bias))`` with, by `layout`,

    - "TN": ``B @ A.mT``, A ``[*, N, K]``, B ``[*, M, K]``;
    - "NN": ``B @ A``, A ``[*, K, N]``, B ``[*, M, K]``;
    - "NT": ``B.mT @ A``, A ``[*, K, N]``, B ``[*, K, M]``;

    and out ``[*, M, N]``. All leading dims are batch and broadcast as in torch.matmul. Names, order and
    defaults are those of `transformer_engine.pytorch.cpp_extensions.general_gemm`.

    Parameters
    ----------
    A, B : torch.Tensor, Float8Tensor, MXFP8Tensor or Float8BlockwiseQTensor (or their storage classes)
        Both FP32, both FP16, both BF16, both Float8 (one scale per tensor; E4M3 and E5M2 mixed, not both
        E5M2), both MXFP8, or both Float8 128-blocks (inside `emulate()`). A quantized operand must have row-wise data if its last dim is contracted,
        column-wise data otherwise. Torch tensors may be any views: those with one of the last two dims
        contiguous are read in place, others from one packed copy.
    out_dtype : torch.dtype, optional
        float32, float16 or bfloat16. Default: that of `out`, else the (nominal) dtype of A.
    quantization_params : Quantizer, optional
        Returns a quantized tensor. A `Float8Quantizer` (delayed scaling) quantizes inside the product,
        writes its `amax` and uses its `scale`; others quantize the finished product.
    gelu : bool
        Tanh-approximated GELU of the result, as in TE.
    gelu_in, grad
        For TE's gradient epilogues, which cannot be batched: refused. `grad=True` without `bias` and
        `gelu` changes nothing and is accepted.
    alpha : float
    beta : float, optional
        Only with `accumulate`, default 1.
    accumulate : bool
        Add ``beta * out`` to the product; needs `out`.
    out : torch.Tensor, optional
        Written in place and returned. Rows contiguous, else through one packed copy.
    bias : torch.Tensor, optional
        ``[N]`` or ``[*, N]``.
    use_split_accumulator : bool
        FP8 on Ada and Hopper: promote partial sums to FP32 registers, slower and more exact. Default: fast.
    autotune : bool, optional
        Time the algorithms offered if this problem has no choice yet (see `teb.autotune`).

    Returns
    -------
    torch.Tensor
        `out`, a new contiguous tensor, or a quantized tensor.

    Raises
    ------
    TypeError, ValueError
        Bad arguments; the message names the operand, what was asked, what came and what to do.
    UnsupportedError
        What no engine runs here, and what cannot be batched.

    Notes
    -----
    FP8 needs sizes and addresses at multiples of 16 bytes (K also of 16 elements): other operands are
    padded inside, at the cost of one packed copy of each operand concerned and, where rows of the output
    are no multiple of 16 bytes, one of the output. Not differentiable. Does not wait for the GPU; usable in
    CUDA graph capture and from several threads.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> a, b = torch.randn(3, 8, 32), torch.randn(3, 4, 32)
    >>> out = teb.batched_general_gemm(a, b, layout="TN")
    >>> torch.allclose(out, b @ a.mT, atol=1e-5)
    True
    """
    if gelu_in is not None or communication or grad:
        _refuse_unbatchable(gelu_in, grad, gelu, bias, communication)
    transposes = _LAYOUTS.get(layout)
    if transposes is None:
        raise ValueError(f'layout={layout!r}: expected one of "TN", "NN", "NT"')
    a_transposed, b_transposed = transposes
    return _multiply(
        (B, "B", b_transposed, read_codes(B, "B", not b_transposed, _allows_strided)),
        (A, "A", a_transposed, read_codes(A, "A", a_transposed, _allows_strided)),
        A, out_dtype, quantization_params, gelu, alpha, beta, accumulate, out, bias,
        use_split_accumulator, autotune,
    )  # fmt: skip


def bmm(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out_dtype: Optional[torch.dtype] = None,
    quantization_params: Optional[Quantizer] = None,
    gelu: bool = False,
    alpha: float = 1.0,
    beta: Optional[float] = None,
    accumulate: bool = False,
    out: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    use_split_accumulator: bool = False,
    autotune: Optional[bool] = None,
) -> torch.Tensor:
    """Batched matrix product in torch's convention: ``out = a @ b``.

    `a` is ``[*, M, K]``, `b` ``[*, K, N]``, out ``[*, M, N]``; batch dims broadcast as in torch.matmul.
    Everything else is as in `batched_general_gemm`. Of quantized operands, `a` needs row-wise and `b`
    column-wise data. Under torch.autocast, torch tensors are cast to its dtype first, as torch.bmm does.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> a, b = torch.randn(3, 8, 32), torch.randn(32, 4)
    >>> torch.allclose(teb.bmm(a, b), a @ b, atol=1e-5)
    True
    """
    a, b = _apply_autocast(a), _apply_autocast(b)
    return _multiply(
        (a, "a", False, read_codes(a, "a", True, _allows_strided)),
        (b, "b", False, read_codes(b, "b", False, _allows_strided)),
        a, out_dtype, quantization_params, gelu, alpha, beta, accumulate, out, bias,
        use_split_accumulator, autotune,
    )  # fmt: skip


def multiply_codes(
    left: Codes,
    left_transposed: bool,
    right: Codes,
    right_transposed: bool,
    out_dtype: torch.dtype,
    use_split_accumulator: bool,
) -> torch.Tensor:
    """``left @ right`` of operands that are described already, as differentiable products have them."""
    launch = find_launch(
        left, left_transposed, right, right_transposed, out_dtype, use_split_accumulator
    )
    if launch is None:
        return _multiply(
            (left.data, "a", left_transposed, left),
            (right.data, "b", right_transposed, right),
            left.data, out_dtype, None, False, 1.0, None, False, None, None, use_split_accumulator, None,
        )  # fmt: skip
    try:
        return launch.run(left.data, right.data, left.scale_inv, right.scale_inv)
    except _C.NotSupportedError as error:
        raise UnsupportedError(str(error)) from error


def find_launch(
    left: Codes,
    left_transposed: bool,
    right: Codes,
    right_transposed: bool,
    out_dtype: torch.dtype,
    use_split_accumulator: bool,
) -> Optional[Launch]:
    """The launch of `multiply_codes`, for all codes of this signature; None if others are multiplied in their place.

    `_multiply` without what such products have none of: a shorter signature, and no checks of arguments.
    """
    left_data, right_data = left.data, right.data
    device_index = left_data.get_device()
    emulation = current_emulation()
    allow_tf32 = left.fmt == "fp32" and torch.backends.cuda.matmul.allow_tf32
    key = (
        left[:2], left[4:], left_transposed,
        left_data.shape, left_data.stride(), left_data.data_ptr() % 16,
        right[:2], right[4:], right_transposed,
        right_data.shape, right_data.stride(), right_data.data_ptr() % 16,
        device_index, right_data.get_device(), out_dtype, use_split_accumulator, allow_tf32, emulation,
        current_sm_count(device_index) if device_index >= 0 else 0,
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None:
        sides = (
            _Side(left_data, "a", left_transposed, left),
            _Side(right_data, "b", right_transposed, right),
        )
        extras = Extras(fast_accumulation=not use_split_accumulator, allow_tf32=allow_tf32)
        launch = _remember(key, _prepare(*sides, out_dtype, None, None, None, extras, emulation))
    return None if launch is _DECODED or launch is _AS_MXFP8 else launch


def _multiply(
    left: tuple,
    right: tuple,
    nominal: object,
    out_dtype: Optional[torch.dtype],
    quantizer: Optional[Quantizer],
    gelu: bool,
    alpha: float,
    beta: Optional[float],
    accumulate: bool,
    out: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    use_split_accumulator: bool,
    autotune: Optional[bool],
    allow_tf32: Optional[bool] = None,
) -> torch.Tensor:
    """``left @ right`` with everything around it. Operands are the fields of a `_Side`.

    A warm call is 20 microseconds of host time at the most, so that this function builds a key and nothing
    else: objects are made where a launch is prepared.
    """
    left_x, left_name, left_transposed, left_codes = left
    right_x, right_name, right_transposed, right_codes = right
    if torch.is_grad_enabled():
        _check_gradients(left_x, left_name)
        _check_gradients(right_x, right_name)
        if out is not None:
            _check_gradients(out, "out")
        if bias is not None:
            _check_gradients(bias, "bias")
    if bias is not None and (is_quantized(bias) or not isinstance(bias, torch.Tensor)):
        raise TypeError(f"bias: expected a torch.Tensor, got {type(bias).__name__}")
    if alpha != 1.0 or beta is not None or accumulate:
        alpha, beta = _check_factors(alpha, beta, accumulate)
        if accumulate and out is None:
            raise ValueError(
                "accumulate=True adds to what is in `out`, but no `out` was given: pass it, or leave "
                "accumulate at False"
            )
    else:
        beta = 0.0
    fp8_output = None
    if quantizer is not None or out is not None:
        _check_destination(quantizer, out, accumulate, out_dtype)
        if quantizer is not None and is_delayed_quantizer(quantizer):
            _check_delayed_state(quantizer, left[3].data.device)
            fp8_output = quantizer_fp8_dtype(quantizer)
    if out is not None:
        out_dtype = out.dtype
    elif out_dtype is None:
        out_dtype = nominal_dtype(nominal)
    left_fmt, left_dtype, left_data, left_scale_inv, *left_flags = left_codes
    right_fmt, right_dtype, right_data, right_scale_inv, *right_flags = right_codes
    if allow_tf32 is None:
        allow_tf32 = left_fmt == "fp32" and torch.backends.cuda.matmul.allow_tf32
    emulation = current_emulation()
    device_index = left_data.get_device()
    key = (
        left_fmt, left_dtype, *left_flags, left_transposed,
        left_data.shape, left_data.stride(), left_data.data_ptr() % 16,
        right_fmt, right_dtype, *right_flags, right_transposed,
        right_data.shape, right_data.stride(), right_data.data_ptr() % 16,
        device_index, right_data.get_device(),
        out_dtype,
        None if out is None else (out.shape, out.stride(), out.data_ptr() % 16, out.get_device()),
        None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.get_device()),
        fp8_output,
        gelu,
        beta != 0.0,
        use_split_accumulator,
        allow_tf32,
        emulation,
        current_sm_count(device_index) if device_index >= 0 else 0,
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None:
        extras = Extras(
            fast_accumulation=not use_split_accumulator,
            allow_tf32=allow_tf32,
            accumulate=beta != 0.0,
            gelu=gelu,
        )
        launch = _remember(
            key,
            _prepare(
                _Side(*left), _Side(*right), out_dtype, out, bias, fp8_output, extras, emulation
            ),
        )
    if out is not None:
        _check_aliasing(out, left, right, bias)
    if launch is _DECODED or launch is _AS_MXFP8:
        replace_both = _decode_both if launch is _DECODED else _convert_both
        return _multiply(
            *replace_both(_Side(*left), _Side(*right)), nominal, out_dtype, quantizer, gelu, alpha, beta if accumulate else None,
            accumulate, out, bias, use_split_accumulator, autotune, False,
        )  # fmt: skip
    arguments = (
        left_data, right_data, left_scale_inv, right_scale_inv, quantizer, out, bias, alpha, beta,
        autotune,
    )  # fmt: skip
    try:
        result = launch.run(*arguments)
    except _C.NotSupportedError as error:
        launch = _remember(key, _without_fused_epilogue(launch, error))
        result = launch.run(*arguments)
    if quantizer is None:
        return result
    if launch.has_fp8_output:
        return make_float8(quantizer, result, out_dtype)
    return quantize(result, quantizer)


def prepare_raw_launch(
    A: torch.Tensor, B: torch.Tensor, layout: str, out: torch.Tensor
) -> Callable[[], int]:
    """The C++ call alone for a plain product of operands that need no copy: what a benchmark times.

    The returned function launches on the stream that is current now and returns 0.
    """
    _launches.clear()
    batched_general_gemm(A, B, layout=layout, out=out)
    launch = next(reversed(_launches.values()))
    transposes = _LAYOUTS[layout]
    left = read_codes(B, "B", not transposes[1], _allows_strided)
    right = read_codes(A, "A", transposes[0], _allows_strided)
    return launch.plan.bind(left.data, right.data, out, left.scale_inv, right.scale_inv)


def _remember(key: tuple, launch: object) -> object:
    if len(_launches) >= _MAX_LAUNCHES:
        _launches.clear()
    _launches[key] = launch
    return launch


def _allows_strided(device: torch.device) -> bool:
    # A CPU stands for the device whose tensors it mimics, Hopper, where only TN runs.
    return supports_non_tn("float8", describe_device(device))


# --- what is decided once ---------------------------------------------------------------------------------


def _prepare(
    left: _Side,
    right: _Side,
    out_dtype: torch.dtype,
    out: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    fp8_output: Optional[str],
    extras: Extras,
    emulation: Emulation,
) -> object:
    """Checks everything that the signature of a call decides; its `Launch` (or one called alike), `_DECODED` or `_AS_MXFP8`."""
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
    fmt = _common_format(left, right)
    if fmt in ("float8", "mxfp8", "float8_block"):
        check_fp8_pair(left.codes.dtype, right.codes.dtype, left.name, right.name)
    device_info = describe_device(device)
    engine = find_engine(
        fmt,
        device_info,
        emulate=emulation.enabled,
        force_reference=emulation.force_reference,
    )
    a, b = left.operand(), right.operand()
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
    if out_dtype not in HIGH_PRECISION_DTYPES:
        raise TypeError(
            f"out_dtype={out_dtype}: expected float32, float16 or bfloat16 (for FP8 output pass a "
            "quantizer as quantization_params)"
        )
    out_shape = (*batch_shape, a.rows, b.cols)
    given = None if out is None else _check_out(out, out_shape)
    if bias is not None:
        extras = _with_bias(extras, bias, batch_shape, b.cols)
    if math.prod(out_shape) == 0 or a.cols == 0:
        return EmptyLaunch(out_shape, out_dtype, extras.gelu)
    if engine == "decoded":
        return _DECODED
    if engine == "mxfp8":
        return _AS_MXFP8
    if engine == "blockwise":
        return BlockwiseLaunch.prepare(
            (left.codes, right.codes),
            (a, b),
            (not left.transposed, right.transposed),
            batch_shape=batch_shape,
            out_dtype=HIGH_PRECISION_DTYPES[out_dtype],
            gelu=extras.gelu,
            sm_count=current_sm_count(device.index or 0),
        )
    return Launch.prepare(
        fmt=fmt,
        engine=engine,
        device=device_info,
        device_index=device.index or 0,
        a=_make_input(left, a),
        b=_make_input(right, b),
        out=Output(
            HIGH_PRECISION_DTYPES[out_dtype],
            given,
            out is None or out.data_ptr() % 16 == 0,
            fp8_output,
        ),
        batch_shape=batch_shape,
        extras=extras,
    )


def _common_format(left: _Side, right: _Side) -> str:
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


def _make_input(side: _Side, operand: Operand) -> Input:
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


def _check_out(out: torch.Tensor, shape: tuple[int, ...]) -> Operand:
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {list(out.shape)}, the product {list(shape)}")
    if has_internal_overlap(tuple(out.shape), out.stride()):
        raise ValueError(
            f"out of shape {list(out.shape)} and strides {list(out.stride())} has elements that share "
            "memory: pass a tensor that is not expanded"
        )
    return Operand.from_strides(tuple(out.shape), out.stride())


def _with_bias(extras: Extras, bias: torch.Tensor, batch_shape: tuple[int, ...], n: int) -> Extras:
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


def _without_fused_epilogue(launch: Launch, error: Exception) -> Launch:
    """The same launch with bias and GELU after the product, where the library does not fuse them."""
    unfused = launch.unfused() if isinstance(launch, Launch) else None
    if unfused is None:
        raise UnsupportedError(str(error)) from error
    return unfused


# --- what is checked at each call -------------------------------------------------------------------------


def _refuse_unbatchable(
    gelu_in: Optional[torch.Tensor],
    grad: bool,
    gelu: bool,
    bias: Optional[torch.Tensor],
    communication: dict[str, object],
) -> None:
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


def _check_gradients(x: object, name: str) -> None:
    # TE's storage classes have no gradient.
    if getattr(x, "requires_grad", False):
        raise ValueError(
            f"{name} requires grad, but this function is not differentiable: call it under "
            "torch.no_grad() or on detached tensors; teb.bmm and te.BatchedMatmul are differentiable"
        )


def _check_factors(alpha: float, beta: Optional[float], accumulate: bool) -> tuple[float, float]:
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


def _check_destination(
    quantizer: Optional[Quantizer],
    out: Optional[torch.Tensor],
    accumulate: bool,
    out_dtype: Optional[torch.dtype],
) -> None:
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


def _check_delayed_state(quantizer: Quantizer, device: torch.device) -> None:
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


def _check_aliasing(
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


def _apply_autocast(x: object) -> object:
    if is_quantized(x) or not isinstance(x, torch.Tensor):
        return x
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in HIGH_PRECISION_DTYPES:
        return x.to(torch.get_autocast_dtype(kind))
    return x


# --- emulation on other tensor cores ----------------------------------------------------------------------


def _decode_both(left: _Side, right: _Side) -> tuple[tuple, tuple]:
    """Block-scaled operands without an engine as plain ones of one type: BF16, or FP32 if it has to be."""
    values = [decode_codes(side.codes) for side in (left, right)]
    if values[0].dtype != values[1].dtype:
        values = [value.float() for value in values]
    dtype = HIGH_PRECISION_DTYPES[values[0].dtype]
    return tuple(
        (value, side.name, side.transposed, Codes(dtype, dtype, value))
        for value, side in zip(values, (left, right))
    )


def _convert_both(left: _Side, right: _Side) -> tuple[tuple, tuple]:
    """Operands with 128-blocks as MXFP8 operands."""
    sides = []
    for side in (left, right):
        codes, transposed = convert_to_mxfp8(side.codes, side.transposed, side.name)
        sides.append((codes.data, side.name, transposed, codes))
    return tuple(sides)


def decode_codes(codes: Codes) -> torch.Tensor:
    """Values of block-scaled codes: BF16 where that is exact, else FP32."""
    fp8 = TORCH_DTYPES[codes.dtype]
    if codes.item_blocks:
        return decode_item_blocks(codes.data, codes.scale_inv, fp8, square=codes.square)
    if codes.fmt == "float8_block":
        return decode_blockwise(
            codes.data, codes.scale_inv, fp8, square=codes.square, transposed=codes.moved_last_dim
        )
    return decode_mxfp8(
        codes.data, codes.scale_inv, fp8, columnwise=codes.columnwise, swizzled=codes.swizzled
    )
