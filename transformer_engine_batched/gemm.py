# SPDX-License-Identifier: Apache-2.0
"""`batched_general_gemm` and `bmm`: check, describe, launch.

Inputs are torch tensors and TE's quantized tensors. What depends only on shapes, strides, types and options
is checked and decided once and kept as a `Launch` under the signature of the call; what depends on values
(addresses, gradients, alpha) is checked at each call. Nothing is written before all checks have passed.
"""

from __future__ import annotations

import math
from typing import Callable, Optional

import torch
from transformer_engine.pytorch.quantized_tensor import Quantizer

from . import _C
from .blockwise_plan import BlockwiseLaunch
from .emulation import Emulation, current_emulation
from .errors import UnsupportedError
from .gemm_arguments import (
    Side,
    check_aliasing,
    check_delayed_state,
    check_destination,
    check_factors,
    check_gradients,
    check_sides,
    describe_out,
    find_batch_shape,
    find_common_format,
    make_input,
    refuse_unbatchable,
    with_bias,
)
from .launch import EmptyLaunch, Extras, Launch, Output
from .operand_conversion import convert_both, decode_both
from .plan import allows_strided_fp8, current_sm_count, describe_device
from .quantize import quantize
from .support import check_fp8_pair, find_engine
from .te_interop.quantizers import is_delayed_quantizer, quantizer_fp8_dtype
from .te_interop.tensors import (
    HIGH_PRECISION_DTYPES,
    Codes,
    is_quantized,
    make_float8,
    nominal_dtype,
    read_codes,
)

# layout -> is (A, B) multiplied transposed, in row-major terms: out = op(B) @ op(A).
_LAYOUTS = {"TN": (True, False), "NN": (False, False), "NT": (False, True)}

# Signatures of calls -> what was decided for them. Cleared when full: ragged workloads see many shapes, few
# of them again.
_MAX_LAUNCHES = 4096
_launches: dict[tuple, object] = {}

# Stand for launches of other operands: the decoded ones as plain tensors, and 128-blocks as MXFP8.
_DECODED = object()
_AS_MXFP8 = object()


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
        refuse_unbatchable(gelu_in, grad, gelu, bias, communication)
    transposes = _LAYOUTS.get(layout)
    if transposes is None:
        raise ValueError(f'layout={layout!r}: expected one of "TN", "NN", "NT"')
    a_transposed, b_transposed = transposes
    return _multiply(
        (B, "B", b_transposed, read_codes(B, "B", not b_transposed, allows_strided_fp8)),
        (A, "A", a_transposed, read_codes(A, "A", a_transposed, allows_strided_fp8)),
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
        (a, "a", False, read_codes(a, "a", True, allows_strided_fp8)),
        (b, "b", False, read_codes(b, "b", False, allows_strided_fp8)),
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
            Side(left_data, "a", left_transposed, left),
            Side(right_data, "b", right_transposed, right),
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
    """``left @ right`` with everything around it. Operands are the fields of a `Side`.

    A warm call is 20 microseconds of host time at the most, so that this function builds a key and nothing
    else: objects are made where a launch is prepared.
    """
    left_x, left_name, left_transposed, left_codes = left
    right_x, right_name, right_transposed, right_codes = right
    if torch.is_grad_enabled():
        check_gradients(left_x, left_name)
        check_gradients(right_x, right_name)
        if out is not None:
            check_gradients(out, "out")
        if bias is not None:
            check_gradients(bias, "bias")
    if bias is not None and (is_quantized(bias) or not isinstance(bias, torch.Tensor)):
        raise TypeError(f"bias: expected a torch.Tensor, got {type(bias).__name__}")
    if alpha != 1.0 or beta is not None or accumulate:
        alpha, beta = check_factors(alpha, beta, accumulate)
        if accumulate and out is None:
            raise ValueError(
                "accumulate=True adds to what is in `out`, but no `out` was given: pass it, or leave "
                "accumulate at False"
            )
    else:
        beta = 0.0
    fp8_output = None
    if quantizer is not None or out is not None:
        check_destination(quantizer, out, accumulate, out_dtype)
        if quantizer is not None and is_delayed_quantizer(quantizer):
            check_delayed_state(quantizer, left[3].data.device)
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
                Side(*left), Side(*right), out_dtype, out, bias, fp8_output, extras, emulation
            ),
        )
    if out is not None:
        check_aliasing(out, left, right, bias)
    if launch is _DECODED or launch is _AS_MXFP8:
        replace_both = decode_both if launch is _DECODED else convert_both
        return _multiply(
            *replace_both(Side(*left), Side(*right)), nominal, out_dtype, quantizer, gelu, alpha, beta if accumulate else None,
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
    left = read_codes(B, "B", not transposes[1], allows_strided_fp8)
    right = read_codes(A, "A", transposes[0], allows_strided_fp8)
    return launch.plan.bind(left.data, right.data, out, left.scale_inv, right.scale_inv)


def _remember(key: tuple, launch: object) -> object:
    if len(_launches) >= _MAX_LAUNCHES:
        _launches.clear()
    _launches[key] = launch
    return launch


def _prepare(
    left: Side,
    right: Side,
    out_dtype: torch.dtype,
    out: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    fp8_output: Optional[str],
    extras: Extras,
    emulation: Emulation,
) -> object:
    """Checks everything that the signature of a call decides; its `Launch` (or one called alike), `_DECODED` or `_AS_MXFP8`."""
    check_sides(left, right, out, bias)
    device = left.codes.data.device
    fmt = find_common_format(left, right)
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
    batch_shape = find_batch_shape(left, right, a, b)
    if out_dtype not in HIGH_PRECISION_DTYPES:
        raise TypeError(
            f"out_dtype={out_dtype}: expected float32, float16 or bfloat16 (for FP8 output pass a "
            "quantizer as quantization_params)"
        )
    out_shape = (*batch_shape, a.rows, b.cols)
    given = None if out is None else describe_out(out, out_shape)
    if bias is not None:
        extras = with_bias(extras, bias, batch_shape, b.cols)
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
        a=make_input(left, a),
        b=make_input(right, b),
        out=Output(
            HIGH_PRECISION_DTYPES[out_dtype],
            given,
            out is None or out.data_ptr() % 16 == 0,
            fp8_output,
        ),
        batch_shape=batch_shape,
        extras=extras,
    )


def _without_fused_epilogue(launch: Launch, error: Exception) -> Launch:
    """The same launch with bias and GELU after the product, where the library does not fuse them."""
    unfused = launch.unfused() if isinstance(launch, Launch) else None
    if unfused is None:
        raise UnsupportedError(str(error)) from error
    return unfused


def _apply_autocast(x: object) -> object:
    if is_quantized(x) or not isinstance(x, torch.Tensor):
        return x
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in HIGH_PRECISION_DTYPES:
        return x.to(torch.get_autocast_dtype(kind))
    return x
