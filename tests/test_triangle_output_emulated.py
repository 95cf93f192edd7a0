# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the triangle's output on a CPU, as test_triangle_project_emulated.py has that of its operands."""

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
from triangle_kernel_cases import VALUE_DB, Case, assert_near, find_expected, make_data

from transformer_engine_batched.kernels import nvrtc, triangle_output, triangle_tiles
from transformer_engine_batched.kernels.triangle_output import (
    check_tensors,
    find_reason_against,
    project_output,
    shared_bytes,
)
from transformer_engine_batched.kernels.triangle_tiles import Norm

BF16 = torch.bfloat16
__all__ = ["folder"]


@pytest.fixture(autouse=True)
def emulation(folder, monkeypatch):  # pylint: disable=redefined-outer-name
    """The kernel on the CPU; new outputs hold NaN, so that what is not written shows."""

    def get_kernel(definitions):
        values = dict(definitions)
        size = shared_bytes(values["DIM"], values["HIDDEN"])
        return EmulatedKernel(folder, definitions, size, "triangle_output.cu", "project_output")

    monkeypatch.setattr(triangle_output, "_get_kernel", get_kernel)
    monkeypatch.setattr(triangle_output, "encode_tensor_map", encode_tensor_map)
    monkeypatch.setattr(triangle_output, "empty_strided", empty_strided)
    monkeypatch.setattr(triangle_tiles, "IS_INTERPRETED", True)
    monkeypatch.setattr(triangle_tiles, "num_multiprocessors", lambda device_index: 3)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def inputs(data):
    return data.c, data.z, data.norm_in, data.norm_out, data.output


@pytest.mark.parametrize(
    "case",
    (
        Case(1, 17, 64, 64, BF16),
        Case(2, 72, 64, 64, BF16, has_bias=False),
        Case(2, 17, 128, 128, BF16),
        Case(1, 20, 128, 64, BF16, has_bias=False),
        Case(1, 20, 64, 128, BF16),
        Case(3, 1, 64, 64, BF16),
    ),
)
def test_values(case):
    data = make_data(case)
    expected = find_expected(data).out
    assert_near(project_output(*inputs(data)), expected, VALUE_DB[BF16], "out")


def test_large_mean():
    """The variance is that of deviations from the mean, not a difference of large sums."""
    data = make_data(Case(1, 17, 64, 64, BF16))
    data.c[:] = data.c / 2 + 64
    data.z[:] = data.z / 2 + 64
    assert_near(project_output(*inputs(data)), find_expected(data).out, VALUE_DB[BF16], "out")


def test_empty():
    data = make_data(Case(1, 4, 64, 64, BF16))
    c, z, *parameters = inputs(data)
    assert project_output(c[:0], z[:0], *parameters).shape == (0, 4, 4, 64)


@pytest.mark.parametrize(
    "case, match",
    [
        (Case(1, 4, 64, 64), "c must be BF16 and came as torch.float32"),
        (Case(1, 4, 96, 64, BF16), "D and H must be 64 or 128 and came as 96 and 64"),
        (Case(1, 4, 64, 192, BF16), "D and H must be 64 or 128 and came as 64 and 192"),
    ],
)
def test_refused_sizes(case, match):
    with pytest.raises(ValueError, match=match):
        check_tensors(*inputs(make_data(case)))


def test_reasons():
    c, z, norm_in, norm_out, output = inputs(make_data(Case(1, 17, 64, 64, BF16)))
    check_tensors(c, z, norm_in, norm_out, output)
    assert find_reason_against(c, z, norm_in, norm_out, output) is None
    packed = c.contiguous()
    assert "rows of c must begin at multiples of 16 bytes" in find_reason_against(
        packed, z, norm_in, norm_out, output
    )
    half = Norm(None, norm_out.bias.half())
    assert "norm_out.bias must be FP32 or BF16" in find_reason_against(c, z, norm_in, half, output)


@pytest.mark.parametrize("has_bias", (0, 1))
def test_compiles(has_bias, tmp_path):
    """For the GPU, too."""
    source = nvrtc._read_source("triangle_output.cu")
    cubin = nvrtc.compile_cubin(source, {"HAS_BIAS": has_bias})
    assert_one_thread_copies(cubin, tmp_path, num_elections=1)
