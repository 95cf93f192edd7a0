# SPDX-License-Identifier: Apache-2.0
"""Quantization as Transformer Engine's kernels do it, byte for byte, in torch on any device.

Inputs are a torch tensor and a TE quantizer; the result is TE's own tensor class. Must not import
the compiled extension, TE's kernels (``transformer_engine_torch`` functions) or a module that runs
a product.
"""

from __future__ import annotations

import math

import torch  # before TE: it loads the libraries that TE links to
import transformer_engine.pytorch as te

from .. import block_scales
from ..block_scales import BLOCK_SIZE
from ..errors import UnsupportedError
from . import codes as fp8_codes

_FP8_DTYPES = {
    te.DType.kFloat8E4M3: torch.float8_e4m3fn,
    te.DType.kFloat8E5M2: torch.float8_e5m2,
}
_INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_FP32_MAX = torch.finfo(torch.float32).max
_FP32_EXPONENT_MASK = -(1 << 23)  # 0xFF800000 as a signed 32-bit integer: sign and exponent


def quantize(
    x: torch.Tensor, quantizer: te.Quantizer
) -> te.QuantizedTensor | te.Float8TensorStorage | te.MXFP8TensorStorage:
    """Quantize a tensor into TE's own class, with the bytes that TE's kernel would write.

    Per tensor, ``codes = fp8(x * scale)`` with ``scale_inv = 1 / scale``; MXFP8,
    ``codes = fp8(x * 2^(127 - e))`` with one E8M0 code ``e`` per block of 32 elements. All
    arithmetic is FP32, one rounding per operation, in the kernels' order.

    Parameters
    ----------
    x : torch.Tensor
        float32, float16 or bfloat16 ``[..., last]``, any strides, any device. It is read without
        autograd.
    quantizer : Float8Quantizer, Float8CurrentScalingQuantizer or MXFP8Quantizer
        TE's object. `Float8Quantizer.amax` is updated in place with the larger of itself and the
        amax of `x`. Usages: row-wise data is ``[..., last]``; column-wise data of the per-tensor
        quantizers is ``[last, ...]``, as TE makes it on Hopper, and of MXFP8 ``[..., last]`` with
        blocks along the flattened leading dimensions. Column-wise only, which TE refuses per
        tensor, works here.

    Returns
    -------
    Float8Tensor, MXFP8Tensor or their storage classes
        The storage class if ``quantizer.internal``. Buffers are new, contiguous and on the device
        of `x`; padding of scale buffers is zero.

    Raises
    ------
    TypeError
        If `x` is not a plain tensor of one of the three dtypes, or `quantizer` is not a quantizer.
    ValueError
        If no usage is set, `x` has no dimension, the sizes do not fit MXFP8's blocks, or the scale
        and amax of a delayed quantizer are not single float32 values on the device of `x`.
    UnsupportedError
        For any other TE quantizer.

    Notes
    -----
    NaN and infinity, as in the kernels: a NaN in `x` becomes code 0x7F and is passed over by every
    amax; an infinity saturates. An infinite amax gives scale 1 with current scaling and E8M0 code
    254 (2^127) with MXFP8. A block of nothing but NaN gets E8M0 code 0, as TE's general kernel
    gives it; TE's register-resident BF16 kernels give 255 there.

    An empty `x` leaves the amax of a delayed quantizer alone. TE leaves `scale_inv` unwritten then;
    here it is ``1 / scale``, and 1 with current scaling.

    Sources, all TE 2.20.2: per tensor ``common/util/vectorized_pointwise.h`` (``unary_kernel``),
    ``common/utils.cuh`` (``atomicMaxFloat``, ``reciprocal``), ``common/recipe/recipe_common.cuh``
    and ``pytorch/csrc/quantizer.cpp``; MXFP8 ``common/cast/mxfp8/quantize_mxfp8.cuh``.

    Examples
    --------
    >>> quantizer = te.Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3, device="cpu")
    >>> quantize(torch.tensor([[1.0, -0.5]]), quantizer).dequantize()
    tensor([[ 1.0000, -0.5000]])
    """
    fp8 = _check_quantizer(quantizer)
    check_input(x)
    with torch.no_grad():
        if isinstance(quantizer, te.MXFP8Quantizer):
            return _quantize_mxfp8(x, quantizer, fp8)
        if isinstance(quantizer, te.Float8CurrentScalingQuantizer):
            return _quantize_current(x, quantizer, fp8)
        return _quantize_delayed(x, quantizer, fp8)


def tensor_amax(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of a tensor, NaNs passed over: ``amax = max(|x|)``, 0 if there is none.

    Parameters
    ----------
    x : torch.Tensor
        float32, float16 or bfloat16, any shape.

    Returns
    -------
    torch.Tensor
        float32 ``[1]``.

    Notes
    -----
    The kernels start from 0 and use ``fmaxf`` or ``__hmax``, which return the other operand for a
    NaN. The maximum of magnitudes needs no rounding, so the dtype it is taken in does not matter.

    Examples
    --------
    >>> tensor_amax(torch.tensor([1.0, -3.0, float("nan")]))
    tensor([3.])
    """
    return magnitudes_of(x).flatten().amax(0, keepdim=True) if x.numel() else _scalar(x, 0.0)


def scale_from_amax(
    amax: torch.Tensor,
    fp8: torch.dtype,
    *,
    force_pow_2_scales: bool = False,
    amax_epsilon: float = 0.0,
    largest: float = _FP32_MAX,
) -> torch.Tensor:
    """Scale of current scaling: ``scale = fp8_max / max(amax, amax_epsilon)``, rounded to nearest.

    An amax of 0, infinity or NaN gives 1; a quotient beyond FP32 gives `largest`.
    `force_pow_2_scales` then drops the mantissa, rounding the scale down to a power of two.

    Parameters
    ----------
    amax : torch.Tensor
        float32, not negative.
    fp8 : torch.dtype
        ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
    force_pow_2_scales : bool, default = False
        Whether scales are powers of two.
    amax_epsilon : float, default = 0.0
        Lower bound of the amax, rounded to FP32.
    largest : float, default = the largest finite FP32 value
        Stands for a quotient beyond FP32.

    Returns
    -------
    torch.Tensor
        float32, the shape of `amax`.

    Notes
    -----
    Source: ``compute_scale_from_amax`` in TE 2.20.2, ``common/recipe/recipe_common.cuh``; the
    per-tensor kernel (``common/recipe/current_scaling.cu``) calls it with the largest finite FP32
    value as the stand-in for infinity.

    Examples
    --------
    >>> scale_from_amax(torch.tensor([3.5]), torch.float8_e4m3fn)
    tensor([128.])
    """
    epsilon = torch.full_like(amax, amax_epsilon)
    amax = torch.where(amax < epsilon, epsilon, amax)
    # A tensor over a tensor: torch computes `number / tensor` as number * reciprocal, which rounds
    # twice.
    scale = torch.full_like(amax, fp8_codes.fp8_max(fp8)) / amax
    scale = scale.masked_fill(scale.isinf(), largest)
    if force_pow_2_scales:
        scale = (scale.view(torch.int32) & _FP32_EXPONENT_MASK).view(torch.float32)
    return scale.masked_fill(amax.isinf() | amax.isnan() | (amax == 0), 1.0)


def mxfp8_block_scales(
    x: torch.Tensor, fp8: torch.dtype, *, columnwise: bool = False, square: bool = False
) -> torch.Tensor:
    """E8M0 codes of the blocks of a matrix: ``e = ceil(log2(amax / fp8_max)) + 127``.

    The quotient is TE's: ``amax`` times the FP32 value nearest to ``1 / fp8_max``, rounded to FP32.

    Parameters
    ----------
    x : torch.Tensor
        ``[rows, cols]``, both multiples of 32 where blocks run along them.
    fp8 : torch.dtype
        ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
    columnwise : bool, default = False
        Blocks of 32 rows by one column instead of one row by 32 columns.
    square : bool, default = False
        The amax is that of 32 x 32 elements, which then share their code.

    Returns
    -------
    torch.Tensor
        uint8 ``[rows, cols / 32]``, column-wise ``[rows / 32, cols]``: compact, without padding.

    Notes
    -----
    Source: ``quantize_mxfp8_kernel`` in TE 2.20.2, ``common/cast/mxfp8/quantize_mxfp8.cuh``, and
    ``Quantized_Limits`` in ``common/utils.cuh``. TE's register-resident BF16 kernel computes the
    exponent from the bits of the amax instead; for every BF16 amax that gives the same code.

    Examples
    --------
    >>> mxfp8_block_scales(torch.full((1, 32), 448.0), torch.float8_e4m3fn)
    tensor([[127]], dtype=torch.uint8)
    """
    magnitudes = magnitudes_of(x)
    rows, cols = x.shape
    if square:
        amax = magnitudes.view(rows // BLOCK_SIZE, BLOCK_SIZE, cols // BLOCK_SIZE, BLOCK_SIZE)
        amax = amax.amax((1, 3)).repeat_interleave(BLOCK_SIZE, dim=1 if columnwise else 0)
    elif columnwise:
        amax = magnitudes.view(rows // BLOCK_SIZE, BLOCK_SIZE, cols).amax(1)
    else:
        amax = magnitudes.view(rows, cols // BLOCK_SIZE, BLOCK_SIZE).amax(2)
    reciprocal = _scalar(x, 1.0 / fp8_codes.fp8_max(fp8))
    return fp8_codes.encode_e8m0(amax * reciprocal)


def _quantize_delayed(
    x: torch.Tensor, quantizer: te.Float8Quantizer, fp8: torch.dtype
) -> te.Float8Tensor | te.Float8TensorStorage:
    for name in ("scale", "amax"):
        _check_state(getattr(quantizer, name), name, x)
    if x.numel():
        # The kernel's atomicMax compares the bits as integers, which orders non-negative floats and
        # lets a NaN that is already there stay.
        amax = quantizer.amax.view(torch.int32)
        amax.copy_(torch.maximum(amax, tensor_amax(x).view(torch.int32).view_as(amax)))
    return _float8_tensor(x, quantizer.scale.reshape(1), quantizer, quantizer, fp8)


def _quantize_current(
    x: torch.Tensor, quantizer: te.Float8CurrentScalingQuantizer, fp8: torch.dtype
) -> te.Float8Tensor | te.Float8TensorStorage:
    scale = _scalar(x, 1.0)
    # TE's ranks skip the reduction for an empty tensor: all of them must have data, or none.
    if x.numel():
        amax = tensor_amax(x)
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(
                amax, op=torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group
            )
        scale = scale_from_amax(
            amax,
            fp8,
            force_pow_2_scales=quantizer.force_pow_2_scales,
            amax_epsilon=quantizer.amax_epsilon,
        )
    # As in TE, the process group does not live on in the tensor.
    owner = quantizer.copy()
    owner.with_amax_reduction = False
    owner.amax_reduction_group = None
    return _float8_tensor(x, scale, quantizer, owner, fp8)


def _float8_tensor(
    x: torch.Tensor,
    scale: torch.Tensor,
    quantizer: te.Quantizer,
    owner: te.Quantizer,
    fp8: torch.dtype,
) -> te.Float8Tensor | te.Float8TensorStorage:
    """Cast `x` with the scale of shape [1] and wrap the codes; `owner` is what the tensor keeps."""
    data = fp8_codes.encode(x.float() * scale, fp8).contiguous()
    transpose = None
    if quantizer.columnwise_usage:
        # A clone even where the transpose is a reshape: TE's two buffers never share memory.
        transpose = data.movedim(-1, 0).clone(memory_format=torch.contiguous_format)
    buffers = {
        "data": data if quantizer.rowwise_usage else None,
        "data_transpose": transpose,
        "fp8_scale_inv": scale.reciprocal(),
        "fp8_dtype": quantizer.dtype,
        "quantizer": owner,
    }
    if quantizer.internal:
        return te.Float8TensorStorage(**buffers, fake_dtype=x.dtype)
    return te.Float8Tensor(shape=x.shape, dtype=x.dtype, device=x.device, **buffers)


def _quantize_mxfp8(
    x: torch.Tensor, quantizer: te.MXFP8Quantizer, fp8: torch.dtype
) -> te.MXFP8Tensor | te.MXFP8TensorStorage:
    _check_mxfp8_sizes(x)
    matrix = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    buffers = {
        "rowwise_data": None,
        "rowwise_scale_inv": None,
        "columnwise_data": None,
        "columnwise_scale_inv": None,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "with_gemm_swizzled_scales": quantizer.optimize_for_gemm,
    }
    for usage, columnwise, wanted in (
        ("rowwise", False, quantizer.rowwise_usage),
        ("columnwise", True, quantizer.columnwise_usage),
    ):
        if not wanted:
            continue
        scales = mxfp8_block_scales(
            matrix, fp8, columnwise=columnwise, square=quantizer.with_2d_quantization
        )
        factors = fp8_codes.reciprocal_e8m0(scales)
        factors = factors.repeat_interleave(BLOCK_SIZE, dim=0 if columnwise else 1)
        data = fp8_codes.encode(matrix.float() * factors, fp8)
        buffers[f"{usage}_data"] = data.contiguous().view(x.shape)
        buffers[f"{usage}_scale_inv"] = _scale_buffer(
            scales,
            quantizer.get_scale_shape(x.shape, columnwise=columnwise),
            columnwise=columnwise,
            swizzled=quantizer.optimize_for_gemm,
        )
    if quantizer.internal:
        return te.MXFP8TensorStorage(**buffers, fake_dtype=x.dtype)
    return te.MXFP8Tensor(shape=x.shape, dtype=x.dtype, device=x.device, **buffers)


def _scale_buffer(
    scales: torch.Tensor, shape: tuple[int, int], *, columnwise: bool, swizzled: bool
) -> torch.Tensor:
    """Compact scales in TE's padded buffer, tiled for the GEMM if asked. The tiles of column-wise
    scales are those of the transpose, in a buffer that keeps its shape."""
    if swizzled:
        matrix = scales.t() if columnwise else scales
        return block_scales.pack_tiles(matrix.unsqueeze(0)).view(shape)
    buffer = scales.new_zeros(shape)
    buffer[: scales.shape[0], : scales.shape[1]] = scales
    return buffer


def magnitudes_of(x: torch.Tensor) -> torch.Tensor:
    """float32 ``|x|``, contiguous, with 0 in place of NaN."""
    return x.float().abs().masked_fill(x.isnan(), 0.0).contiguous()


def _scalar(x: torch.Tensor, value: float) -> torch.Tensor:
    """float32 ``[1]`` on the device of `x`."""
    return torch.full((1,), value, dtype=torch.float32, device=x.device)


def _check_quantizer(quantizer: te.Quantizer) -> torch.dtype:
    """The FP8 dtype of a quantizer that this module knows and that has a usage."""
    if not isinstance(quantizer, te.Quantizer):
        raise TypeError(
            f"a Transformer Engine quantizer was asked for and {type(quantizer).__name__} came"
        )
    known = (te.Float8Quantizer, te.Float8CurrentScalingQuantizer, te.MXFP8Quantizer)
    if not isinstance(quantizer, known):
        raise UnsupportedError(
            f"the reference has no {type(quantizer).__name__}; it quantizes with "
            f"{', '.join(cls.__name__ for cls in known)}"
        )
    if not (quantizer.rowwise_usage or quantizer.columnwise_usage):
        raise ValueError(
            f"{type(quantizer).__name__} has neither row-wise nor column-wise usage, so there is "
            "nothing to write; call quantizer.set_usage(rowwise=True)"
        )
    fp8 = _FP8_DTYPES.get(quantizer.dtype)
    if fp8 is None:
        raise TypeError(
            f"{type(quantizer).__name__} asks for {quantizer.dtype!r}; its dtype must be one of "
            f"{', '.join(str(dtype) for dtype in _FP8_DTYPES)}"
        )
    return fp8


def check_input(x: torch.Tensor) -> None:
    """Refuses what no quantizer takes."""
    if not isinstance(x, torch.Tensor) or isinstance(x, te.QuantizedTensor):
        raise TypeError(
            f"a plain tensor was asked for and {type(x).__name__} came; "
            "dequantize() a quantized tensor first"
        )
    came = f"{x.dtype}, shape {tuple(x.shape)}, stride {x.stride()}, device {x.device}"
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(
            "the input of a quantizer must be float32, float16 or bfloat16 and came as "
            f"{came}; convert it first"
        )
    if x.ndim == 0:
        raise ValueError(
            f"the input of a quantizer must have at least one dimension and came as {came}"
        )


def _check_state(state: torch.Tensor, name: str, x: torch.Tensor) -> None:
    """A delayed quantizer's scale or amax: one float32 where `x` is."""
    if state.dtype != torch.float32 or state.numel() != 1 or state.device != x.device:
        raise ValueError(
            f"the quantizer's `{name}` must be one float32 on {x.device}, where the input is, and "
            f"came as {state.dtype}, shape {tuple(state.shape)}, device {state.device}"
        )


def _check_mxfp8_sizes(x: torch.Tensor) -> None:
    """TE's rule: the last dimension and the product of the others are multiples of 32."""
    came = f"shape {tuple(x.shape)}, dtype {x.dtype}, device {x.device}"
    if x.ndim < 2:
        raise ValueError(f"MXFP8 needs at least two dimensions; the input came as {came}")
    cols, rows = x.shape[-1], math.prod(x.shape[:-1])
    if cols % BLOCK_SIZE == 0 and rows % BLOCK_SIZE == 0:
        return
    right, bottom = -cols % BLOCK_SIZE, -x.shape[-2] % BLOCK_SIZE if rows % BLOCK_SIZE else 0
    raise ValueError(
        f"MXFP8 needs the last dimension ({cols}) and the product of the others ({rows}) to be "
        f"multiples of {BLOCK_SIZE}; the input came as {came}. Zeros do not change a product: "
        f"torch.nn.functional.pad(x, (0, {right}, 0, {bottom})) fits"
    )
