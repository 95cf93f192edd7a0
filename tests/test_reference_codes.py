# SPDX-License-Identifier: Apache-2.0
"""FP8 and E8M0 codes against values spelled out from their bit fields, in exact arithmetic.

Needs torch alone. Must not use torch's own FP8 casts as the expectation.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_engine_batched.reference import codes

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = (E4M3, E5M2)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
MAX_CODE = {E4M3: 0x7E, E5M2: 0x7B}


def code_value(code: int, fp8: torch.dtype) -> Fraction | float:
    """Value of one code from its fields: the table of the OCP 8-bit specification."""
    mantissa_bits, bias = (3, 7) if fp8 == E4M3 else (2, 15)
    exponent = (code & 0x7F) >> mantissa_bits
    mantissa = code & ((1 << mantissa_bits) - 1)
    sign = -1 if code & 0x80 else 1
    if fp8 == E4M3 and code & 0x7F == 0x7F:
        return math.nan
    if fp8 == E5M2 and exponent == 31:
        return sign * math.inf if mantissa == 0 else math.nan
    if exponent == 0:
        return sign * Fraction(mantissa, 1 << mantissa_bits) * Fraction(2) ** (1 - bias)
    return sign * (1 + Fraction(mantissa, 1 << mantissa_bits)) * Fraction(2) ** (exponent - bias)


def nearest_code(value: float, fp8: torch.dtype) -> int:
    """The code that saturating round-to-nearest-even should give, by looking at all of them."""
    if math.isnan(value):
        return 0x7F
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    if math.isinf(value):
        return sign | MAX_CODE[fp8]
    magnitude = abs(Fraction(value))
    finite = range(MAX_CODE[fp8] + 1)
    # Of two equally near codes the even one: codes of one sign are ordered like their values.
    return sign | min(finite, key=lambda c: (abs(code_value(c, fp8) - magnitude), c & 1))


def all_codes(device: str = "cpu") -> torch.Tensor:
    return torch.arange(256, device=device).to(torch.uint8)


def next_float(value: float, towards: float) -> float:
    start, end = torch.tensor(value, dtype=torch.float32), torch.tensor(towards)
    return torch.nextafter(start, end.to(torch.float32)).item()


def check_encode(encode, values: list[float], fp8: torch.dtype, device: str = "cpu") -> None:
    got = encode(torch.tensor(values, dtype=torch.float32, device=device), fp8).tolist()
    expected = [nearest_code(value, fp8) for value in values]
    wrong = [(v, g, e) for v, g, e in zip(values, got, expected) if g != e]
    assert not wrong, f"(value, code, expected code) of {fp8}: {wrong[:5]}"


def rounding_cases(fp8: torch.dtype) -> list[float]:
    """Every value, every midpoint of neighbours and the floats next to both, in both signs. As a
    rounding is monotone, these settle it for all floats below the largest value."""
    cases = []
    for code in range(MAX_CODE[fp8] + 1):
        value, above = code_value(code, fp8), code_value(code + 1, fp8)
        points = [value]
        if code < MAX_CODE[fp8]:
            points.append((value + above) / 2)
        for point in map(float, points):
            cases += [point, next_float(point, math.inf), next_float(point, -math.inf)]
    return cases + [-case for case in cases]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp8", FORMATS)
def test_decode_is_the_table(fp8, dtype, device):
    values = codes.decode(all_codes(device), fp8, dtype)
    assert values.dtype == dtype
    expected = [float(code_value(code, fp8)) for code in range(256)]
    torch.testing.assert_close(
        values.cpu().double(), torch.tensor(expected).double(), rtol=0, atol=0, equal_nan=True
    )
    assert math.copysign(1.0, values[0x80].item()) == -1.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fp8", FORMATS)
def test_encode_rounds_to_nearest_even_at_every_midpoint(fp8, device):
    check_encode(codes.encode, rounding_cases(fp8), fp8, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fp8", FORMATS)
def test_encode_saturates(fp8, device):
    largest = codes.FP8_MAX[fp8]
    assert code_value(MAX_CODE[fp8], fp8) == largest
    half_step = (largest - float(code_value(MAX_CODE[fp8] - 1, fp8))) / 2
    beyond = [next_float(largest, math.inf), largest + half_step, largest + 2 * half_step]
    beyond += [next_float(largest + half_step, math.inf), 1e9, torch.finfo(torch.float32).max]
    beyond.append(math.inf)
    check_encode(codes.encode, beyond + [-value for value in beyond], fp8, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fp8", FORMATS)
def test_encode_maps_every_nan_to_one_code(fp8, device):
    bits = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -(1 << 22)], dtype=torch.int32)
    nans = bits.view(torch.float32)
    assert nans.isnan().all()
    assert codes.encode(nans.to(device), fp8).tolist() == [0x7F] * 5


@pytest.mark.parametrize("fp8", FORMATS)
def test_encode_keeps_the_sign_of_zero_and_of_underflows(fp8):
    smallest = float(code_value(1, fp8))
    values = [0.0, 1e-45, 1e-39, smallest / 2, -0.0, -1e-45, -1e-39, -smallest / 2]
    got = codes.encode(torch.tensor(values), fp8).tolist()
    assert got == [0x00] * 4 + [0x80] * 4


@settings(max_examples=300, deadline=None)
@given(value=st.floats(width=32), fp8=st.sampled_from(FORMATS))
def test_encode_any_float(value, fp8):
    check_encode(codes.encode, [value], fp8)


@pytest.mark.parametrize("fp8", FORMATS)
def test_encode_reads_strided_and_empty_tensors(fp8):
    values = torch.randn(6, 8, 10)[::2, :, 1::3].transpose(0, 2)
    got = codes.encode(values, fp8)
    assert got.shape == values.shape
    expected = [nearest_code(v, fp8) for v in values.flatten().tolist()]
    assert got.flatten().tolist() == expected
    assert codes.encode(torch.empty(0, 3), fp8).shape == (0, 3)
    assert codes.decode(got.transpose(0, 1), fp8).shape == got.transpose(0, 1).shape


def test_wrong_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"`values` must be torch.float32 .* torch.float64"):
        codes.encode(torch.ones(2, dtype=torch.float64), E4M3)
    with pytest.raises(TypeError, match=r"`codes` must be torch.uint8 .* torch.int32"):
        codes.decode(torch.ones(2, dtype=torch.int32), E4M3)
    with pytest.raises(TypeError, match="FP8 format was asked for and torch.float16 came"):
        codes.encode(torch.ones(2), torch.float16)
    with pytest.raises(TypeError, match="`values` must be torch.float32"):
        codes.encode_e8m0(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="`codes` must be torch.uint8"):
        codes.decode_e8m0(torch.ones(2))
    with pytest.raises(TypeError, match="`codes` must be torch.uint8"):
        codes.reciprocal_e8m0(torch.ones(2))


def e8m0_round_up(value: float) -> int:
    """ceil(log2(value)) + 127, clamped, by integers."""
    if math.isnan(value):
        return 255
    if math.isinf(value):
        return 254
    if value == 0:
        return 0
    fraction = Fraction(value)
    # value = numerator / 2^k, so ceil(log2) is the bit length of numerator - 1, less k.
    shift = fraction.denominator.bit_length() - 1
    exponent = (fraction.numerator - 1).bit_length() - shift
    return min(max(exponent, -127), 127) + 127


def check_encode_e8m0(encode, values: list[float], device: str = "cpu") -> None:
    got = encode(torch.tensor(values, dtype=torch.float32, device=device)).tolist()
    expected = [e8m0_round_up(value) for value in values]
    wrong = [(v, g, e) for v, g, e in zip(values, got, expected) if g != e]
    assert not wrong, f"(value, code, expected code): {wrong[:5]}"


def e8m0_cases() -> list[float]:
    cases = [0.0, math.inf, math.nan, torch.finfo(torch.float32).max]
    for exponent in range(-149, 128):
        power = math.ldexp(1.0, exponent)
        cases += [
            power,
            next_float(power, math.inf),
            next_float(power, 0.0),
            min(1.5 * power, 3e38),
        ]
    return cases


@pytest.mark.parametrize("device", DEVICES)
def test_encode_e8m0_rounds_up(device):
    check_encode_e8m0(codes.encode_e8m0, e8m0_cases(), device)


@settings(max_examples=300, deadline=None)
@given(st.floats(min_value=0, width=32))
def test_encode_e8m0_any_float(value):
    check_encode_e8m0(codes.encode_e8m0, [value])


def test_encode_e8m0_ignores_the_sign_and_the_strides():
    values = torch.tensor([[1.0, 3.0], [-1.0, -3.0], [0.25, -0.0]]).t()
    assert codes.encode_e8m0(values).tolist() == [[127, 127, 125], [129, 129, 0]]
    assert codes.encode_e8m0(torch.empty(0)).shape == (0,)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decode_e8m0_is_exact(dtype, device):
    values = codes.decode_e8m0(all_codes(device), dtype)
    assert values.dtype == dtype
    assert values[:255].cpu().double().tolist() == [math.ldexp(1.0, c - 127) for c in range(255)]
    assert values[255].isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_reciprocal_e8m0_is_exact(device):
    factors = codes.reciprocal_e8m0(all_codes(device))
    assert factors.dtype == torch.float32
    assert factors[:255].cpu().double().tolist() == [math.ldexp(1.0, 127 - c) for c in range(255)]
    assert factors[255].isnan()


def planted_ties_away(values, fp8):
    """Nudges every value outwards, so that ties round away from zero."""
    return codes.encode(values * (1 + 2**-22), fp8)


def planted_no_saturation(values, fp8):
    return values.to(fp8).view(torch.uint8)


def planted_double_rounding(values, fp8):
    return codes.encode(values.to(torch.bfloat16).float(), fp8)


@pytest.mark.parametrize("bug", [planted_ties_away, planted_double_rounding])
@pytest.mark.parametrize("fp8", FORMATS)
def test_the_midpoints_notice(bug, fp8):
    with pytest.raises(AssertionError, match="expected code"):
        check_encode(bug, rounding_cases(fp8), fp8)


@pytest.mark.parametrize("fp8", FORMATS)
def test_the_saturation_cases_notice(fp8):
    with pytest.raises(AssertionError, match="expected code"):
        check_encode(planted_no_saturation, [1e9], fp8)


@pytest.mark.parametrize(
    "bug",
    [
        lambda v: (v.view(torch.int32) >> 23).clamp(max=254).to(torch.uint8),  # rounds down
        lambda v: codes.encode_e8m0(v * (1 + 2**-23)),  # powers of two move up as well
        lambda v: codes.encode_e8m0(torch.where(v < 2**-126, torch.zeros_like(v), v)),  # flushes
    ],
    ids=["down", "powers", "flush"],
)
def test_the_e8m0_cases_notice(bug):
    values = [v for v in e8m0_cases() if math.isfinite(v)]
    with pytest.raises(AssertionError, match="expected code"):
        check_encode_e8m0(bug, values)
