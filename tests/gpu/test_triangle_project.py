# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the triangle's operands on the GPU: values against FP64, codes against Triton's kernel, padding."""

from __future__ import annotations

import pytest
import torch
from triangle_kernel_cases import (
    CODE_DB,
    VALUE_DB,
    Case,
    assert_near,
    cut_padding,
    decode,
    find_expected,
    make_data,
)

from transformer_engine_batched.kernels import triangle_forward
from transformer_engine_batched.kernels.triangle_project import (
    find_operand_amaxes,
    project_operands,
)

BF16 = torch.bfloat16
CASES = (
    Case(1, 256, 128, 128, BF16, has_bias=False),
    Case(1, 389, 128, 128, BF16, mask="bool"),
    Case(2, 101, 128, 128, BF16, mask=None),
    Case(3, 17, 64, 128, BF16),
    Case(2, 72, 64, 64, BF16),
    Case(1, 128, 64, 256, BF16, has_bias=False, mask=None),
    Case(1, 1, 128, 64, BF16),
)


@pytest.fixture(autouse=True)
def filled_memory():
    """New outputs hold NaN or 0xFF, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def inputs(data):
    """What both kernels read."""
    return data.z, data.norm_in, data.projection, data.mask


@pytest.mark.parametrize("mode", ("outgoing", "incoming"))
@pytest.mark.parametrize("case", CASES)
def test_against_fp64(case, mode):
    data = make_data(case, "cuda")
    expected = find_expected(data)[:2]
    scales, amaxes = torch.tensor([20.0, 30.0], device="cuda"), torch.zeros(2, device="cuda")
    plain = project_operands(*inputs(data), mode=mode, amaxes=amaxes)
    torch.testing.assert_close(amaxes, find_operand_amaxes(*inputs(data)), rtol=1e-6, atol=0)
    for fp8_dtype in ("e4m3", "e5m2"):
        raised = torch.zeros_like(amaxes)
        options = {"mode": mode, "fp8_dtype": fp8_dtype, "turned": True}
        codes = project_operands(*inputs(data), scales=scales, amaxes=raised, **options)
        torch.testing.assert_close(raised, amaxes, rtol=1e-6, atol=0)
        assert torch.equal(codes.scale_invs, 1 / scales)
        for index, wanted in enumerate(expected):
            wanted = wanted if mode == "outgoing" else wanted.mT
            assert_near(cut_padding(plain[index], case.n), wanted, VALUE_DB[BF16], mode)
            decoded = cut_padding(codes[index], case.n)
            decoded = decode(decoded, fp8_dtype, codes.scale_invs[index])
            assert_near(decoded, wanted, CODE_DB[fp8_dtype], mode)
            assert torch.equal(codes[index + 2], codes[index].mT)
            assert amaxes[index].item() == pytest.approx(wanted.abs().max().item(), rel=0.02)


@pytest.mark.parametrize("mode", ("outgoing", "incoming"))
def test_against_triton(mode):
    """Sums in another order may turn the rounding of an x: an output moves by 0.03 at the most, few codes move."""
    data = make_data(CASES[1], "cuda")
    amaxes = find_operand_amaxes(*inputs(data))
    torch.testing.assert_close(
        amaxes, triangle_forward.find_operand_amaxes(*inputs(data)), rtol=1e-2, atol=0
    )
    options = {"mode": mode, "fp8_dtype": "e4m3", "amaxes": amaxes, "amax_epsilon": 1e-6}
    ours = project_operands(*inputs(data), **options)
    triton = triangle_forward.project_operands(*inputs(data), **options)
    assert torch.equal(ours.scale_invs, triton.scale_invs)
    for index in range(2):
        assert (ours[index] != triton[index]).double().mean() < 0.01
        x, y = (decode(made[index], "e4m3", ours.scale_invs[index]) for made in (ours, triton))
        # A code's step is an eighth at the most.
        assert ((x - y).abs() <= 0.03 + 0.13 * y.abs()).all()


def test_results_repeat_to_the_bit():
    """Races would show: several tiles for each multiprocessor, weights and tiles of z under way together."""
    data = make_data(Case(1, 640, 128, 128, BF16), "cuda")
    scales = torch.tensor([20.0, 30.0], device="cuda")
    options = {"mode": "incoming", "fp8_dtype": "e4m3", "scales": scales}
    first = project_operands(*inputs(data), **options)
    for _ in range(20):
        again = project_operands(*inputs(data), **options)
        assert torch.equal(again.a, first.a) and torch.equal(again.b, first.b)
