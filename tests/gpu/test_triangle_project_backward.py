# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the operands' backward on the GPU: values against FP64, and that they repeat."""

from __future__ import annotations

import pytest
import torch
from triangle_kernel_cases import VALUE_DB, Case, assert_all_near, assert_near, make_data
from triangle_operand_gradients import find_operand_gradients, make_share

from transformer_engine_batched.kernels.triangle_project_backward import project_backward

BF16 = torch.bfloat16
CASES = (
    Case(1, 256, 128, 128, BF16, has_bias=False),
    Case(1, 389, 128, 128, BF16, mask="bool"),
    Case(2, 101, 128, 128, BF16, mask=None),
    Case(3, 17, 64, 128, BF16),
    Case(2, 72, 128, 64, BF16),
    Case(1, 128, 64, 64, BF16, has_bias=False, mask=None),
    Case(1, 70, 128, 192, BF16),
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
    """What the kernel reads but the gradient of x."""
    return data.grad_a, data.grad_b, data.z, data.norm_in, data.projection, data.mask


@pytest.mark.parametrize("given", ("nothing", "grad", "hat"))
@pytest.mark.parametrize("case", CASES)
def test_against_fp64(case, given):
    data = make_data(case, "cuda")
    grad_x = None if given == "nothing" else data.grad_out
    expected = find_operand_gradients(data, grad_x)
    share = make_share(data, grad_x)
    if given == "grad":
        share = share._replace(hat=None, rstds=None)
    found = project_backward(*inputs(data), share)
    assert_near(found.z, expected.z, VALUE_DB[BF16], "z")
    assert_all_near(found.norm[:2], expected.norm, VALUE_DB[BF16], "norm")
    assert_all_near(found.projection, expected.projection, VALUE_DB[BF16], "projection")


@pytest.mark.parametrize("has_hat", (False, True))
def test_results_repeat_to_the_bit(has_hat):
    """Races would show: many tiles for each multiprocessor, all stages in use."""
    data = make_data(Case(1, 640, 128, 128, BF16), "cuda")
    share = make_share(data, data.grad_out)
    if not has_hat:
        share = share._replace(hat=None, rstds=None)

    def run():
        found = project_backward(*inputs(data), share._replace(grad_hat=share.grad_hat.clone()))
        return (found.z, *found.norm[:2], *found.projection)

    first = run()
    for _ in range(10):
        assert all(map(torch.equal, run(), first))
