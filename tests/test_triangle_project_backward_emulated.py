# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the operands' backward on a CPU, as test_triangle_project_emulated.py has that of the operands."""

from __future__ import annotations

import pytest
import torch
from cuda.bindings import nvrtc as compiler
from sass import assert_one_thread_copies
from test_triangle_project_emulated import EmulatedKernel, encode_tensor_map, folder
from triangle_kernel_cases import VALUE_DB, Case, assert_all_near, assert_near, make_data
from triangle_operand_gradients import find_operand_gradients, make_share

from transformer_engine_batched.kernels import nvrtc, triangle_project_backward, triangle_tiles
from transformer_engine_batched.kernels.triangle_gradients import NormShare
from transformer_engine_batched.kernels.triangle_project_backward import (
    find_reason_against,
    project_backward,
    shared_bytes,
)
from transformer_engine_batched.kernels.triangle_tiles import GatedProjection, Norm

BF16 = torch.bfloat16
SMALL = Case(1, 17, 64, 64, BF16)
SOURCE = "triangle_project_backward.cu"
__all__ = ["folder"]


@pytest.fixture(autouse=True)
def emulation(folder, monkeypatch):  # pylint: disable=redefined-outer-name
    """The kernel on the CPU; new outputs hold NaN, so that what is not written shows."""

    def get_kernel(definitions):
        values = dict(definitions)
        size = shared_bytes(values["DIM"])
        return EmulatedKernel(folder, definitions, size, SOURCE, "project_backward")

    monkeypatch.setattr(triangle_project_backward, "_get_kernel", get_kernel)
    monkeypatch.setattr(triangle_project_backward, "encode_tensor_map", encode_tensor_map)
    monkeypatch.setattr(triangle_tiles, "IS_INTERPRETED", True)
    monkeypatch.setattr(triangle_tiles, "num_multiprocessors", lambda device_index: 3)
    monkeypatch.setattr(
        triangle_tiles, "sum_partials", lambda partials, dtype: partials.sum(0).to(dtype)
    )
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def inputs(data):
    return data.grad_a, data.grad_b, data.z, data.norm_in, data.projection, data.mask


@pytest.mark.parametrize(
    "case, given",
    (
        (SMALL, "grad"),
        (SMALL, "nothing"),
        (SMALL, "hat"),
        (Case(2, 17, 128, 128, BF16), "hat"),
        (Case(1, 20, 128, 128, BF16, mask="bool"), "nothing"),
        (Case(1, 70, 64, 64, BF16, has_bias=False, mask=None), "grad"),
        (Case(1, 17, 64, 192, BF16), "hat"),
        (Case(1, 20, 128, 64, BF16, has_bias=False), "grad"),
        (Case(1, 17, 128, 64, BF16, has_bias=False, mask=None), "hat"),
        (Case(7, 1, 64, 128, BF16), "grad"),
    ),
)
def test_values(case, given):
    data = make_data(case)
    grad_x = None if given == "nothing" else data.grad_out
    expected = find_operand_gradients(data, grad_x)
    share = make_share(data, grad_x)
    if given == "grad":
        share = share._replace(hat=None, rstds=None)
    found = project_backward(*inputs(data), share)
    assert share is None or found.z.data_ptr() == share.grad_hat.data_ptr()
    assert_near(found.z, expected.z, VALUE_DB[BF16], "z")
    assert_all_near(found.norm[:2], expected.norm, VALUE_DB[BF16], "norm")
    assert_all_near(found.projection, expected.projection, VALUE_DB[BF16], "projection")


@pytest.mark.parametrize("has_hat", (True, False))
def test_a_warp_that_lags(has_hat, monkeypatch):
    """Nothing that its products still read is overwritten: the results are the same, to the bit."""
    # The first warp has the positions. One CTA: tiles follow one another.
    data = make_data(SMALL._replace(n=4))
    monkeypatch.setattr(triangle_tiles, "num_multiprocessors", lambda device_index: 1)
    share = make_share(data, data.grad_out)
    if not has_hat:
        share = share._replace(hat=None, rstds=None)

    def run():
        return project_backward(*inputs(data), share._replace(grad_hat=share.grad_hat.clone()))

    expected = run()
    made = triangle_project_backward._get_kernel
    monkeypatch.setattr(
        triangle_project_backward,
        "_get_kernel",
        lambda definitions: made((*definitions, ("LAGGING_WARP", 0), ("LAG_MS", 300))),
    )
    found = run()
    for mine, other in zip(
        (found.z, *found.norm[:2], *found.projection),
        (expected.z, *expected.norm[:2], *expected.projection),
    ):
        assert torch.equal(mine, other)


def test_large_mean():
    """The variance is that of deviations from the mean, not a difference of large sums."""
    data = make_data(SMALL)
    data.z[:] = data.z / 2 + 64
    expected, found = find_operand_gradients(data, None), project_backward(*inputs(data))
    assert_near(found.z, expected.z, VALUE_DB[BF16], "z")
    assert_all_near(found.projection, expected.projection, VALUE_DB[BF16], "projection")


def test_padding_is_not_read():
    """Beyond the last position rows of the operands' gradients may hold anything."""
    data = make_data(SMALL)
    expected = project_backward(*inputs(data))
    grads = []
    for grad in inputs(data)[:2]:
        padded = torch.full((1, 64, 32, 32), float("nan"), dtype=BF16)
        padded[:, :, :17, :17] = grad
        grads.append(padded[:, :, :17, :17])
    found = project_backward(*grads, *inputs(data)[2:])
    assert torch.equal(found.z, expected.z)
    assert all(map(torch.equal, found.projection, expected.projection))


def test_not_finite():
    """NaN at a position stays there in the gradient of z."""
    data = make_data(SMALL._replace(mask=None))
    data.grad_b[0, 7, 3, 5] = float("nan")
    found = project_backward(*inputs(data))
    assert found.z[0, 3, 5].isnan().all() and found.z.isnan().sum() == 64
    assert (
        found.projection.weight_p[71].isnan().all()
        and found.projection.weight_p[7].isfinite().all()
    )


def test_empty():
    data = make_data(SMALL)
    found = project_backward(
        data.grad_a[:0], data.grad_b[:0], data.z[:0], data.norm_in, data.projection, None
    )
    assert found.z.shape == (0, 17, 17, 64)
    assert not any(x.any() for x in (*found.norm[:2], *found.projection))


class TestRefusals:
    """Reasons and error texts."""

    @pytest.mark.parametrize(
        "case, match",
        [
            (Case(1, 4, 64, 64), "grad_a must be BF16 and came as torch.float32"),
            (Case(1, 4, 96, 64, BF16), "D must be 64 or 128 .* came as 96 and 64"),
            (Case(1, 4, 64, 48, BF16), "H a multiple of 64; they came as 64 and 48"),
        ],
    )
    def test_sizes(self, case, match):
        with pytest.raises(ValueError, match=match + ".*use triangle_backward"):
            project_backward(*inputs(make_data(case)))

    def test_parameters(self):
        data = make_data(SMALL)
        assert find_reason_against(*inputs(data)) is None
        grad_a, grad_b, z, norm, projection, mask = inputs(data)
        half = Norm(norm.weight.half(), None)
        reason = find_reason_against(grad_a, grad_b, z, half, projection, mask)
        assert "norm.weight must be FP32 or BF16" in reason
        biased = GatedProjection(*projection[:3], projection.bias_g.half())
        reason = find_reason_against(grad_a, grad_b, z, norm, biased, mask)
        assert "projection.bias_g must be FP32 or BF16" in reason
        reason = find_reason_against(grad_a, grad_b, z, norm, projection, mask.half())
        assert "mask must be FP32, BF16" in reason
        shifted = torch.zeros(z.numel() + 1, dtype=BF16)[1:].view(z.shape)
        share = NormShare(shifted, torch.zeros(1, 128))
        reason = find_reason_against(grad_a, grad_b, z, norm, projection, mask, share)
        assert "grad_hat must begin at a multiple" in reason
        share = make_share(data, data.grad_out)._replace(hat=shifted)
        reason = find_reason_against(grad_a, grad_b, z, norm, projection, mask, share)
        assert reason.startswith("hat must begin at a multiple")
        odd = grad_b.contiguous()
        reason = find_reason_against(grad_a, odd, z, norm, projection, mask)
        assert "rows of grad_b must begin at multiples of 16 bytes" in reason

    def test_shapes(self):
        data = make_data(SMALL)
        grad_a, grad_b, *others = inputs(data)
        with pytest.raises(ValueError, match="`grad_b` must be .* as `grad_a`"):
            project_backward(grad_a, grad_b.repeat(1, 2, 1, 1), *others)
        share = make_share(data, data.grad_out)
        with pytest.raises(TypeError, match="`share.grad_hat` must be torch.bfloat16 as z"):
            project_backward(
                grad_a, grad_b, *others, share._replace(grad_hat=share.grad_hat.float())
            )
        with pytest.raises(ValueError, match="`share.hat` and `share.rstds` must come together"):
            project_backward(grad_a, grad_b, *others, share._replace(rstds=None))
        with pytest.raises(TypeError, match="`share.rstds` must be float32"):
            project_backward(grad_a, grad_b, *others, share._replace(rstds=share.rstds.bfloat16()))
        with pytest.raises(ValueError, match=r"`share.norm_sums` must be float32 \[S, 128\]"):
            project_backward(
                grad_a, grad_b, *others, share._replace(norm_sums=share.norm_sums[:, :-1])
            )


@pytest.mark.parametrize("dim, has_bias", ((64, 1), (128, 0), (128, 1)))
@pytest.mark.parametrize("is_last", (0, 1))
def test_compiles(dim, has_bias, is_last, tmp_path):
    """For the GPU: ptxas says of no products (C7510, C7512, C7514) that they wait for each other; an elected lane copies."""
    definitions = {"DIM": dim, "HAS_BIAS": has_bias, "HAS_GRAD": 1}
    definitions |= {"IS_LAST": is_last}
    options = [*nvrtc._OPTIONS, b"--ptxas-options=-v"]
    options += [f"-D{name}={value}".encode() for name, value in definitions.items()]
    headers = nvrtc._read_headers()
    names, texts = ([x.encode() for x in values] for values in (headers, headers.values()))
    source = nvrtc._read_source(SOURCE).encode()
    _, program = compiler.nvrtcCreateProgram(source, SOURCE.encode(), len(texts), texts, names)
    (status,) = compiler.nvrtcCompileProgram(program, len(options), options)
    _, size = compiler.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    compiler.nvrtcGetProgramLog(program, log)
    compiler.nvrtcDestroyProgram(program)
    text = log.decode(errors="replace")
    assert status == compiler.nvrtcResult.NVRTC_SUCCESS and "registers" in text, text
    assert "C75" not in text, text
    cubin = nvrtc.compile_cubin(nvrtc._read_source(SOURCE), definitions)
    assert_one_thread_copies(cubin, tmp_path, 16)
