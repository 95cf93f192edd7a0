# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the output's backward on a CPU, as test_triangle_project_emulated.py has that of the operands.

Sums of shares and transposes, which are Triton's on a GPU, are torch's here.
"""

from __future__ import annotations

import pytest
import torch
from sass import assert_one_thread_copies
from test_triangle_project_emulated import (
    EmulatedKernel,
    empty_strided,
    encode_tensor_map,
    folder,
)
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
from triangle_operand_gradients import find_output_share

from transformer_engine_batched.kernels import (
    nvrtc,
    triangle_output_backward,
    triangle_tiles,
)
from transformer_engine_batched.kernels.triangle_output_backward import (
    check_tensors,
    find_reason_against,
    output_backward,
    shared_bytes,
)
from transformer_engine_batched.kernels.triangle_tiles import Norm

BF16 = torch.bfloat16
SMALL = Case(1, 17, 128, 128, BF16)
__all__ = ["folder"]


@pytest.fixture(autouse=True)
def emulation(folder, monkeypatch):  # pylint: disable=redefined-outer-name
    """The kernel on the CPU; new outputs hold NaN or 0xFF, so that what is not written shows."""

    def get_kernel(definitions):
        values = dict(definitions)
        size = shared_bytes(values["NUM_UNITS"], values["OUT_TYPE"] == "BF16")
        name = "triangle_output_backward.cu"
        return EmulatedKernel(folder, definitions, size, name, "output_backward")

    monkeypatch.setattr(triangle_output_backward, "_get_kernel", get_kernel)
    monkeypatch.setattr(triangle_output_backward, "encode_tensor_map", encode_tensor_map)
    monkeypatch.setattr(triangle_output_backward, "empty_strided", empty_strided)
    monkeypatch.setattr(triangle_output_backward, "turn_codes", lambda codes: codes.mT.contiguous())
    monkeypatch.setattr(triangle_tiles, "IS_INTERPRETED", True)
    monkeypatch.setattr(triangle_tiles, "num_multiprocessors", lambda device_index: 3)
    monkeypatch.setattr(triangle_tiles, "sum_partials", lambda sums, dtype: sums.sum(0).to(dtype))
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def inputs(data):
    return data.grad_out, data.c, data.z, data.norm_in, data.norm_out, data.output


def check(data, found, grad_c):
    """All but grad_c's format."""
    expected = find_expected(data)
    bound = CODE_DB["e5m2"] if found.grad_c.dtype == torch.uint8 else VALUE_DB[BF16]
    assert_near(grad_c, expected.grad_c, bound, "grad_c")
    share = find_output_share(data)
    assert_near(found.norm_in.grad_hat, share.grad_hat.double(), VALUE_DB[BF16], "grad_hat")
    sums, wanted = (
        x.double().sum(0).view(2, -1) for x in (found.norm_in.norm_sums, share.norm_sums)
    )
    assert_all_near(sums, wanted, VALUE_DB[BF16], "norm_in")
    assert_near(found.norm_in.hat, share.hat.double(), VALUE_DB[BF16], "hat")
    torch.testing.assert_close(found.norm_in.rstds, share.rstds, rtol=1e-5, atol=0)
    assert_all_near(found.norm_out[:2], expected.norm_out, VALUE_DB[BF16], "norm_out")
    assert_all_near(found.output, expected.output, VALUE_DB[BF16], "output")
    return expected


def test_values():
    data = make_data(SMALL)
    found = output_backward(*inputs(data))
    assert found.grad_c_turned is None and found.scale_inv is None
    check(data, found, cut_padding(found.grad_c, SMALL.n))


@pytest.mark.parametrize(
    "case, fp8_dtype",
    (
        (Case(2, 9, 128, 128, BF16), "e5m2"),
        (Case(1, 72, 128, 128, BF16, has_bias=False), "e4m3"),  # two tiles a row
    ),
)
def test_codes(case, fp8_dtype):
    data = make_data(case)
    scale, amax = torch.tensor([20.0]), torch.tensor([1e-3])
    found = output_backward(*inputs(data), fp8_dtype=fp8_dtype, scale=scale, amax=amax)
    assert torch.equal(found.scale_inv, 1 / scale)
    assert torch.equal(found.grad_c_turned, found.grad_c.mT)
    grad_c = decode(cut_padding(found.grad_c, case.n), fp8_dtype, found.scale_inv)
    expected = check(data, found, grad_c)
    wanted = expected.grad_c.abs().max()
    torch.testing.assert_close(amax[0].double(), wanted, rtol=0.02, atol=0)


def test_some_parameters():
    """LN_out's bias alone makes the sums that others need, and a weight of zero divides nothing."""
    data = make_data(Case(1, 9, 128, 128, BF16))
    data.norm_out.weight[3] = 0
    data = data._replace(
        norm_in=Norm(data.norm_in.weight.float(), None, 1e-5),
        output=data.output._replace(bias_p=None, bias_g=None),
    )
    amax = torch.tensor([1e4])
    found = output_backward(
        *inputs(data), fp8_dtype="e5m2", scale=torch.tensor([16.0]), amax=amax
    )  # fmt: skip
    assert amax[0] == 1e4
    check(data, found, decode(cut_padding(found.grad_c, 9), "e5m2", found.scale_inv))


def test_large_mean():
    """Variances are those of deviations from the mean, not differences of large sums."""
    data = make_data(Case(1, 9, 128, 128, BF16))
    data.c[:] = data.c / 2 + 64
    data.z[:] = data.z / 2 + 64
    found = output_backward(*inputs(data))
    check(data, found, cut_padding(found.grad_c, 9))


def test_empty():
    data = make_data(SMALL)
    grad_out, c, z, *parameters = inputs(data)
    found = output_backward(
        grad_out[:0], c[:0], z[:0], *parameters, fp8_dtype="e5m2", scale=torch.tensor([4.0])
    )
    assert found.grad_c.shape == found.grad_c_turned.shape == (0, 128, 32, 32)
    assert found.norm_in.grad_hat.shape == (0, 17, 17, 128) and found.scale_inv.item() == 0.25
    for x in (*found.norm_out[:2], *found.output):
        assert not x.any()


@pytest.mark.parametrize(
    "case, match",
    [
        (Case(1, 4, 128, 128), "grad_out must be BF16 and came as torch.float32"),
        (Case(1, 4, 64, 128, BF16), "D and H must be 128 and came as 64 and 128"),
        (Case(1, 4, 128, 64, BF16), "D and H must be 128 and came as 128 and 64"),
    ],
)
def test_refused_sizes(case, match):
    with pytest.raises(ValueError, match=match):
        check_tensors(*inputs(make_data(case)))


def test_refused_options():
    arguments = inputs(make_data(SMALL))
    scale = torch.ones(1)
    with pytest.raises(ValueError, match="`fp8_dtype` must be None"):
        output_backward(*arguments, fp8_dtype="e3m4", scale=scale)
    with pytest.raises(ValueError, match="`scale` and `amax` are those of delayed scaling"):
        output_backward(*arguments, fp8_dtype="e5m2", amax=scale)
    with pytest.raises(ValueError, match="`scale` must be 1 contiguous float32"):
        output_backward(*arguments, fp8_dtype="e5m2", scale=scale.double())


def test_reasons():
    grad_out, c, z, norm_in, norm_out, output = inputs(make_data(SMALL))
    check_tensors(grad_out, c, z, norm_in, norm_out, output)
    assert find_reason_against(grad_out, c, z, norm_in, norm_out, output) is None
    packed = c.contiguous()
    assert "rows of c must begin at multiples of 16 bytes" in find_reason_against(
        grad_out, packed, z, norm_in, norm_out, output
    )
    shifted = torch.empty(grad_out.numel() + 1, dtype=BF16)[1:].view_as(grad_out)
    assert "grad_out must begin at a multiple of 16 bytes and is at 2" in find_reason_against(
        shifted, c, z, norm_in, norm_out, output
    )
    half = Norm(None, norm_out.bias.half())
    assert "norm_out.bias must be FP32 or BF16" in find_reason_against(
        grad_out, c, z, norm_in, half, output
    )


@pytest.mark.parametrize("out_type, has_bias", (("E5M2", 1), ("E4M3", 0), ("BF16", 1)))
def test_compiles(out_type, has_bias, tmp_path):
    """For the GPU, too."""
    source = nvrtc._read_source("triangle_output_backward.cu")
    definitions = {"OUT_TYPE": out_type, "HAS_BIAS": has_bias}
    cubin = nvrtc.compile_cubin(source, definitions)
    assert_one_thread_copies(cubin, tmp_path, num_elections=5)


def test_a_warp_that_lags(monkeypatch):
    """Nothing that its products still read is overwritten: the results are the same, to the bit."""
    # A second warp has positions: the first waits for all others to copy. One CTA: tiles follow one another.
    data = make_data(SMALL._replace(n=17))
    monkeypatch.setattr(triangle_tiles, "num_multiprocessors", lambda device_index: 1)
    options = {"fp8_dtype": "e5m2", "scale": torch.tensor([16.0])}
    expected = output_backward(*inputs(data), **options)
    made = triangle_output_backward._get_kernel
    monkeypatch.setattr(
        triangle_output_backward,
        "_get_kernel",
        lambda definitions: made((*definitions, ("LAGGING_WARP", 2))),
    )
    triangle_output_backward._make_plan.cache_clear()
    found = output_backward(*inputs(data), **options)
    triangle_output_backward._make_plan.cache_clear()
    assert torch.equal(found.grad_c, expected.grad_c)
    for mine, other in zip(
        (*found.norm_in, *found.norm_out[:2], *found.output),
        (*expected.norm_in, *expected.norm_out[:2], *expected.output),
    ):
        assert torch.equal(mine, other)
