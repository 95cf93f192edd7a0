# SPDX-License-Identifier: Apache-2.0
"""The 8-bit number formats: FP8 codes (E4M3, E5M2) and E8M0 block scales, to and from float.

Inputs are torch tensors on any device. Must not import Transformer Engine or any sibling module.
"""

from __future__ import annotations

import torch

# Largest finite value: 1.75 * 2^8 and 1.75 * 2^15.
# Source: OCP 8-bit Floating Point Specification 1.0, table 1 (its E4M3 has no infinity).
FP8_MAX: dict[torch.dtype, float] = {
    torch.float8_e4m3fn: 448.0,
    torch.float8_e5m2: 57344.0,
}

# Both formats: what `cvt.rn.satfinite` makes of any NaN, whatever its sign and payload.
NAN_CODE = 0x7F

E8M0_NAN_CODE = 0xFF
_E8M0_MAX_CODE = 0xFE  # 2^127

_FP32_MANTISSA_BITS = 23
_FP32_MANTISSA_MASK = 0x7FFFFF
_FP32_NAN_BITS = 0x7FFFFFFF
_FP32_TWO_POW_MINUS_127_BITS = 0x00400000  # subnormal: the leading bit sits in the mantissa


def fp8_max(fp8: torch.dtype) -> float:
    """Largest finite value of an FP8 format.

    Parameters
    ----------
    fp8 : torch.dtype
        ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.

    Returns
    -------
    float
        448.0 or 57344.0.

    Raises
    ------
    TypeError
        If `fp8` is another dtype.

    Examples
    --------
    >>> fp8_max(torch.float8_e4m3fn)
    448.0
    """
    if fp8 not in FP8_MAX:
        raise TypeError(
            f"an FP8 format was asked for and {fp8} came; "
            "pass torch.float8_e4m3fn or torch.float8_e5m2"
        )
    return FP8_MAX[fp8]


def encode(values: torch.Tensor, fp8: torch.dtype) -> torch.Tensor:
    """FP8 codes of float values, as `cvt.rn.satfinite` writes them.

    ``code = round_to_nearest_even(clamp(value, -max, max))``: magnitudes beyond the largest finite
    value, infinities among them, become the largest finite code; every NaN becomes 0x7F; zeros and
    underflows keep their sign.

    Parameters
    ----------
    values : torch.Tensor
        float32, any shape and strides.
    fp8 : torch.dtype
        ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.

    Returns
    -------
    torch.Tensor
        uint8, the shape of `values`.

    Raises
    ------
    TypeError
        If `values` is not float32 (another dtype would be rounded twice) or `fp8` is no FP8 format.

    Notes
    -----
    Source: the software form of the instruction in CUDA's ``cuda_fp8.hpp``, functions
    ``__nv_cvt_float_to_fp8`` and ``__nv_cvt_double_to_fp8`` with ``__NV_SATFINITE``. There a NaN is
    first made canonical (0x7FFFFFFF), which drops its sign and gives 0x7F in both formats.

    Examples
    --------
    >>> encode(torch.tensor([1.0, -1e9, float("nan")]), torch.float8_e4m3fn).tolist()
    [56, 254, 127]
    """
    maximum = fp8_max(fp8)
    _require(values, torch.float32, "values")
    # torch's own cast rounds to nearest even but does not saturate, hence the clamp, and keeps the
    # sign of a NaN.
    codes = values.clamp(-maximum, maximum).to(fp8).view(torch.uint8)
    return codes.masked_fill(values.isnan(), NAN_CODE)


def decode(
    codes: torch.Tensor, fp8: torch.dtype, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Values of FP8 codes.

    Exact in float64, float32, bfloat16 and float16.

    Parameters
    ----------
    codes : torch.Tensor
        uint8, any shape and strides.
    fp8 : torch.dtype
        ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
    dtype : torch.dtype, default = torch.float64
        Floating-point dtype of the result.

    Returns
    -------
    torch.Tensor
        `dtype`, the shape of `codes`.

    Raises
    ------
    TypeError
        If `codes` is not uint8 or `fp8` is no FP8 format.

    Examples
    --------
    >>> decode(torch.tensor([0x38, 0x7E], dtype=torch.uint8), torch.float8_e4m3fn).tolist()
    [1.0, 448.0]
    """
    fp8_max(fp8)
    _require(codes, torch.uint8, "codes")
    return codes.view(fp8).to(dtype)


def encode_e8m0(values: torch.Tensor) -> torch.Tensor:
    """E8M0 codes of non-negative values, rounded up to a power of two.

    ``code = clamp(ceil(log2(value)), -127, 127) + 127``; 0 becomes 0 (2^-127), infinity 254 (2^127)
    and NaN 255. The sign bit is ignored.

    Parameters
    ----------
    values : torch.Tensor
        float32, any shape and strides.

    Returns
    -------
    torch.Tensor
        uint8, the shape of `values`.

    Raises
    ------
    TypeError
        If `values` is not float32.

    Notes
    -----
    Source: ``float_to_e8m0`` in TE 2.20.2, ``common/util/ptx_arch_spec.cuh``. Its software branch is
    what stands here. Its Blackwell branch, ``cvt.rp.satfinite.ue8m0x2.f32``, gives the same code
    for every float, zero, subnormals, infinity and NaN included: all 2^32 were compared with the
    software form of that instruction in CUDA 13.0's ``cuda_fp8.hpp`` (``__nv_cvt_float_to_e8m0``,
    ``cudaRoundPosInf``). Hardware was not asked.

    Examples
    --------
    >>> encode_e8m0(torch.tensor([1.0, 1.5, 2.0])).tolist()
    [127, 128, 128]
    """
    _require(values, torch.float32, "values")
    bits = values.view(torch.int32)
    exponent = (bits >> _FP32_MANTISSA_BITS) & 0xFF
    mantissa = bits & _FP32_MANTISSA_MASK
    # A subnormal up to 2^-127 (mantissa 0x400000) already has its upper bound in code 0.
    rounds_up = torch.where(exponent == 0, mantissa > _FP32_TWO_POW_MINUS_127_BITS, mantissa > 0)
    codes = (exponent + rounds_up).clamp(max=_E8M0_MAX_CODE)
    return codes.masked_fill(values.isnan(), E8M0_NAN_CODE).to(torch.uint8)


def decode_e8m0(codes: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Values of E8M0 codes: ``2^(code - 127)``, NaN for 255.

    Exact in float64, float32 and bfloat16; float16 does not have the range.

    Parameters
    ----------
    codes : torch.Tensor
        uint8, any shape and strides.
    dtype : torch.dtype, default = torch.float64
        Floating-point dtype of the result.

    Returns
    -------
    torch.Tensor
        `dtype`, the shape of `codes`.

    Raises
    ------
    TypeError
        If `codes` is not uint8.

    Notes
    -----
    Source: ``exp2f`` in TE 2.20.2, ``common/util/ptx.cuh``.

    Examples
    --------
    >>> decode_e8m0(torch.tensor([126, 127, 130], dtype=torch.uint8)).tolist()
    [0.5, 1.0, 8.0]
    """
    _require(codes, torch.uint8, "codes")
    return _power_of_two(codes.to(torch.int32), codes == E8M0_NAN_CODE).to(dtype)


def reciprocal_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """The factor that a cast multiplies by: ``2^(127 - code)``, NaN for 255.

    Exact for every code: 254 gives the float32 subnormal 2^-127, 0 gives 2^127.

    Parameters
    ----------
    codes : torch.Tensor
        uint8, any shape and strides.

    Returns
    -------
    torch.Tensor
        float32, the shape of `codes`.

    Raises
    ------
    TypeError
        If `codes` is not uint8.

    Notes
    -----
    Source: ``exp2f_rcp<float>`` in TE 2.20.2, ``common/util/ptx.cuh``.

    Examples
    --------
    >>> reciprocal_e8m0(torch.tensor([126, 127, 130], dtype=torch.uint8)).tolist()
    [2.0, 1.0, 0.125]
    """
    _require(codes, torch.uint8, "codes")
    return _power_of_two(254 - codes.to(torch.int32), codes == E8M0_NAN_CODE)


def _power_of_two(biased_exponent: torch.Tensor, is_nan: torch.Tensor) -> torch.Tensor:
    """float32 ``2^(biased_exponent - 127)`` for int32 exponents 0 to 254, built from its bits so
    that no device's pow or flush-to-zero has a say."""
    bits = biased_exponent << _FP32_MANTISSA_BITS
    bits = bits.masked_fill(biased_exponent == 0, _FP32_TWO_POW_MINUS_127_BITS)
    return bits.masked_fill(is_nan, _FP32_NAN_BITS).view(torch.float32)


def _require(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype != dtype:
        raise TypeError(
            f"`{name}` must be {dtype} and came as {tensor.dtype} "
            f"(shape {tuple(tensor.shape)}, device {tensor.device}); convert it first"
        )
