# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the output's backward on the GPU: values against FP64, repeatability."""

from __future__ import annotations

import pytest
import torch
from triangle_kernel_cases import (
    CODE_DB,
    VALUE_DB,
    Case,
    assert_all_near,
    assert_near,
    cut_padding,
    decode,
    find_expected,
    make_data,
)

from transformer_engine_batched.kernels import triangle_backward
from transformer_engine_batched.kernels.triangle_output_backward import output_backward

BF16 = torch.bfloat16
CASES = (
    Case(1, 256, 128, 128, BF16, has_bias=False),
    Case(1, 389, 128, 128, BF16),
    Case(2, 101, 128, 128, BF16),
    Case(3, 17, 128, 128, BF16),
    Case(3, 1, 128, 128, BF16, has_bias=False),
)


@pytest.fixture(autouse=True)
def filled_memory():
    """New outputs hold NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def inputs(data):
    """What the kernel reads."""
    return data.grad_out, data.c, data.z, data.norm_in, data.norm_out, data.output


def scalar(value):
    return torch.tensor([float(value)], device="cuda")


@pytest.mark.parametrize(
    "fp8_dtype, is_delayed", (("e5m2", True), ("e4m3", True), ("e5m2", False), (None, False))
)
@pytest.mark.parametrize("case", CASES)
def test_against_fp64(case, fp8_dtype, is_delayed):
    data = make_data(case, "cuda")
    expected = find_expected(data)
    states = {"scale": scalar(16), "amax": scalar(0)} if is_delayed else {}
    found = output_backward(*inputs(data), fp8_dtype=fp8_dtype, **states)
    grad_c, bound = cut_padding(found.grad_c, case.n), VALUE_DB[BF16]
    if fp8_dtype is not None:
        assert torch.equal(found.grad_c_turned, found.grad_c.mT)
        grad_c, bound = decode(grad_c, fp8_dtype, found.scale_inv), CODE_DB[fp8_dtype]
    assert_near(grad_c, expected.grad_c, bound, "grad_c")
    if is_delayed:
        assert found.scale_inv.item() == 1 / 16
        amax = expected.grad_c.abs().max().item()
        assert states["amax"].item() == pytest.approx(amax, rel=0.02)
    assert_all_near(found.norm_out[:2], expected.norm_out, VALUE_DB[BF16], "norm_out")
    assert_all_near(found.output, expected.output, VALUE_DB[BF16], "output")
    share = triangle_backward.output_backward(*inputs(data)).norm_in
    # Both have rounded du, dg and the result.
    assert_near(found.norm_in.grad_hat, share.grad_hat.double(), VALUE_DB[BF16], "grad_hat")
    sums, wanted = (
        x.double().sum(0).view(2, -1) for x in (found.norm_in.norm_sums, share.norm_sums)
    )
    assert_all_near(sums, wanted, VALUE_DB[BF16], "norm_in")


def test_results_repeat_to_the_bit():
    """Races would show: several tiles for each CTA, copies under way while others multiply."""
    data = make_data(Case(1, 640, 128, 128, BF16), "cuda")

    def run():
        states = {"scale": scalar(16), "amax": scalar(0)}
        found = output_backward(*inputs(data), fp8_dtype="e5m2", **states)
        return (found.grad_c, *found.norm_in, *found.norm_out[:2], *found.output, states["amax"])

    first = run()
    for _ in range(20):
        for result, wanted in zip(run(), first):
            assert torch.equal(result, wanted)
