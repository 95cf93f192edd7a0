# SPDX-License-Identifier: Apache-2.0
"""The triangle kernels on the GPU: values against FP64, codes, padding, strides, repeatability."""

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

from transformer_engine_batched.kernels.triangle_backward import output_backward, project_backward
from transformer_engine_batched.kernels.triangle_forward import (
    find_operand_amaxes,
    project_operands,
    project_output,
)
from transformer_engine_batched.kernels.turn_codes import turn_codes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = (
    Case(1, 256, 128, 128, BF16, has_bias=False),
    Case(1, 389, 128, 128, BF16, mask="bool"),
    Case(2, 101, 128, 128, BF16, mask=None),
    Case(3, 17, 64, 32, BF16),
    Case(1, 72, 64, 64, BF16),
    Case(1, 64, 256, 256, BF16, has_bias=False),
    Case(1, 50, 384, 256, BF16),
    Case(1, 50, 384, 128, BF16),
    Case(1, 40, 96, 48, FP16),
    Case(2, 40, 128, 128, FP32),
    Case(1, 70, 128, 128, FP32, BF16),
)


@pytest.fixture(autouse=True)
def filled_memory():
    """New outputs hold NaN or 0xFF, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def scalars(*values: float) -> torch.Tensor:
    """float32 on the device."""
    return torch.tensor(values, dtype=torch.float32, device="cuda")


@pytest.mark.parametrize("case", CASES)
def test_forward(case):
    data = make_data(case, "cuda")
    expected = find_expected(data)
    dtype = case.weight_dtype or case.dtype
    arguments = (data.z, data.norm_in, data.projection, data.mask)
    amaxes = find_operand_amaxes(*arguments)
    for mode in ("outgoing", "incoming"):
        plain = project_operands(*arguments, mode=mode)
        raised = torch.zeros_like(amaxes)
        codes = project_operands(
            *arguments, mode=mode, fp8_dtype="e4m3", scales=scalars(20, 30), amaxes=raised,
            turned=True,
        )  # fmt: skip
        torch.testing.assert_close(raised, amaxes, rtol=1e-6, atol=0)
        for index, wanted in enumerate(expected[:2]):
            wanted = wanted if mode == "outgoing" else wanted.mT
            values = cut_padding(plain[index], case.n)
            assert_near(values, wanted, VALUE_DB[dtype], mode)
            decoded = cut_padding(codes[index], case.n)
            decoded = decode(decoded, "e4m3", codes.scale_invs[index])
            assert_near(decoded, wanted, CODE_DB["e4m3"], mode)
            assert torch.equal(codes[index + 2], codes[index].mT)
            assert amaxes[index].item() == pytest.approx(wanted.abs().max().item(), rel=0.02)
    out = project_output(data.c, data.z, data.norm_in, data.norm_out, data.output)
    assert_near(out, expected.out, VALUE_DB[dtype], "out")


@pytest.mark.parametrize("fp8_dtype, is_delayed", (("e5m2", True), ("e4m3", False), (None, False)))
@pytest.mark.parametrize("case", CASES)
def test_backward(case, fp8_dtype, is_delayed):
    data = make_data(case, "cuda")
    expected = find_expected(data)
    bound = VALUE_DB[case.weight_dtype or case.dtype]
    states = {"scale": scalars(16), "amax": scalars(0)} if is_delayed else {}
    arguments = (
        data.grad_out, data.c, data.z, data.norm_in, data.norm_out, data.output
    )  # fmt: skip
    found = output_backward(*arguments, fp8_dtype=fp8_dtype, **states)
    grad_c = cut_padding(found.grad_c, case.n)
    if fp8_dtype is not None:
        assert torch.equal(found.grad_c_turned, found.grad_c.mT)
        grad_c = decode(grad_c, fp8_dtype, found.scale_inv)
    grad_c_bound = bound if fp8_dtype is None else CODE_DB[fp8_dtype]
    assert_near(grad_c, expected.grad_c, grad_c_bound, "grad_c")
    if is_delayed:
        amax = expected.grad_c.abs().max().item()
        assert states["amax"].item() == pytest.approx(amax, rel=0.02)
    assert_all_near(found.norm_out[:2], expected.norm_out, bound, "norm_out")
    assert_all_near(found.output, expected.output, bound, "output")
    arguments = (data.grad_a, data.grad_b, data.z, data.norm_in, data.projection, data.mask)
    grads = project_backward(*arguments, found.norm_in)
    assert_near(grads.z, expected.grad_z, bound, "grad_z")
    assert_all_near(grads.norm[:2], expected.norm_in, bound, "norm_in")
    assert_all_near(grads.projection, expected.projection, bound, "projection")


def test_results_repeat_to_the_bit():
    data = make_data(Case(2, 101, 128, 128, BF16), "cuda")

    def run():
        found = output_backward(
            data.grad_out, data.c, data.z, data.norm_in, data.norm_out, data.output
        )  # fmt: skip
        grads = project_backward(
            data.grad_a, data.grad_b, data.z, data.norm_in, data.projection, data.mask,
            found.norm_in,
        )  # fmt: skip
        return (found.grad_c, *found.norm_out[:2], *found.output, grads.z, *grads.projection)

    first = run()
    for result, wanted in zip(run(), first):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("shape", ((256, 512, 512), (3, 400, 144), (1, 16, 16)))
def test_turn_codes(shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    assert torch.equal(turn_codes(codes), codes.mT)
