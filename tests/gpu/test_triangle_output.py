# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the triangle's output on the GPU: values against FP64, repeatability."""

from __future__ import annotations

import pytest
import torch
from triangle_kernel_cases import VALUE_DB, Case, assert_near, find_expected, make_data

from transformer_engine_batched.kernels.triangle_output import project_output

BF16 = torch.bfloat16
CASES = (
    Case(1, 256, 128, 128, BF16, has_bias=False),
    Case(1, 389, 128, 128, BF16),
    Case(2, 101, 128, 64, BF16),
    Case(3, 17, 64, 128, BF16),
    Case(2, 72, 64, 64, BF16, has_bias=False),
    Case(3, 1, 128, 128, BF16),
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
    return data.c, data.z, data.norm_in, data.norm_out, data.output


@pytest.mark.parametrize("case", CASES)
def test_against_fp64(case):
    data = make_data(case, "cuda")
    assert_near(project_output(*inputs(data)), find_expected(data).out, VALUE_DB[BF16], "out")


def test_results_repeat_to_the_bit():
    """Races would show: several tiles for each warpgroup, copies under way while others multiply."""
    data = make_data(Case(1, 640, 128, 128, BF16), "cuda")
    first = project_output(*inputs(data))
    for _ in range(20):
        assert torch.equal(project_output(*inputs(data)), first)
