# SPDX-License-Identifier: Apache-2.0
"""`kernels.triangle`: which kernels serve which tensors, and that it is found once. No kernel runs."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from triangle_kernel_cases import Case, make_data
from triangle_operand_gradients import make_share

from transformer_engine_batched.kernels import (
    triangle,
    triangle_output,
    triangle_output_backward,
    triangle_project,
    triangle_project_backward,
    triangle_tiles,
)

BF16 = torch.bfloat16
FITS = Case(1, 16, 128, 128, BF16)
FUNCTIONS = (
    "project_operands",
    "find_operand_amaxes",
    "project_output",
    "output_backward",
    "project_backward",
)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """CPU tensors count as those of a Hopper GPU; forms say which they are, and what they were given."""
    monkeypatch.setattr(triangle, "_found", {})
    monkeypatch.setattr(triangle, "_runs_cuda_forms", lambda device_index: True)
    monkeypatch.setattr(triangle_tiles, "IS_INTERPRETED", True)
    triton = {name: lambda *a, **k: ("triton", a, k) for name in FUNCTIONS}
    assert triton.keys() == triangle._TRITON_FORMS.keys()
    monkeypatch.setattr(triangle, "_TRITON_FORMS", triton)
    for module, names in (
        (triangle_project, ("project_operands", "find_operand_amaxes")),
        (triangle_output, ("project_output",)),
        (triangle_output_backward, ("output_backward",)),
        (triangle_project_backward, ("project_backward",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *a, **k: ("cuda", a, k))


def call(name: str, data, **options) -> str:
    """Which form served, given all that the function was given."""
    arguments = {
        "project_operands": (data.z, data.norm_in, data.projection, data.mask),
        "find_operand_amaxes": (data.z, data.norm_in, data.projection, data.mask),
        "project_output": (data.c, data.z, data.norm_in, data.norm_out, data.output),
        "output_backward": (
            data.grad_out, data.c, data.z, data.norm_in, data.norm_out, data.output,
        ),
        "project_backward": (
            data.grad_a, data.grad_b, data.z, data.norm_in, data.projection, data.mask,
            make_share(data, data.grad_out),
        ),
    }[name]  # fmt: skip
    form, given, came = getattr(triangle, name)(*arguments, **options)
    assert all(x is y for x, y in zip(given, arguments, strict=True)) and came == options
    return form


@pytest.mark.parametrize("name", triangle._CUDA_FORMS)
def test_cuda_where_it_takes_the_tensors(name):
    assert call(name, make_data(FITS)) == "cuda"
    for other in (
        FITS._replace(dtype=torch.float16),
        FITS._replace(dim=96),
        FITS._replace(hidden=48),
    ):
        assert call(name, make_data(other)) == "triton"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_triton_on_other_devices(name, monkeypatch):
    monkeypatch.setattr(triangle, "_runs_cuda_forms", lambda device_index: False)
    assert call(name, make_data(FITS)) == "triton"


def test_options_go_through():
    data = make_data(FITS)
    assert call("project_operands", data, mode="outgoing", turned=False) == "cuda"
    assert call("output_backward", data, fp8_dtype="e5m2") == "cuda"


def test_no_cuda_on_the_cpu_or_without_its_compiler(monkeypatch):
    monkeypatch.undo()
    runs = triangle._runs_cuda_forms.__wrapped__
    assert not runs(-1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (10, 0))
    assert not runs(0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert runs(0)

    def fail():
        raise ImportError("no cuda.bindings")

    monkeypatch.setattr(triangle.nvrtc, "load_bindings", fail)
    assert not runs(0)


def test_tensors_are_checked_once_for_each_description(monkeypatch):
    calls = []
    monkeypatch.setattr(triangle_project, "check_operands", lambda *_: calls.append("check"))
    # None, as `find_reason_against` says of what fits.
    monkeypatch.setattr(triangle_project, "find_reason_against", lambda *_: calls.append("can"))
    first, second = make_data(FITS), make_data(FITS, seed=1)
    for data in (first, second, first):
        call("project_operands", data, mode="outgoing")
    assert calls == ["can", "check"]
    call("project_operands", first._replace(mask=None), mode="outgoing")
    call("project_operands", first._replace(mask=first.mask.bool()), mode="outgoing")
    shifted = torch.empty(first.z.numel() + 1, dtype=BF16)[1:].view(first.z.shape)
    call("project_operands", first._replace(z=shifted), mode="outgoing")
    assert calls == 4 * ["can", "check"]


def test_tensors_that_do_not_fit_are_an_error():
    data = make_data(FITS)
    with pytest.raises(ValueError, match="`mask` must be"):
        triangle.find_operand_amaxes(data.z, data.norm_in, data.projection, data.mask[:, :8])
    norm = data.norm_out._replace(weight=data.norm_out.weight[:64])
    with pytest.raises(ValueError, match="`norm_out.weight` must be"):
        triangle.project_output(data.c, data.z, data.norm_in, norm, data.output)


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(triangle, "_MAX_FOUND", 2)
    for n in (1, 2, 3, 4):
        call("find_operand_amaxes", make_data(FITS._replace(n=n)))
        assert len(triangle._found) <= 2


def test_a_form_is_plugged_in_by_a_line(monkeypatch):
    """Without a check of its own: the function checks."""
    module = ModuleType("transformer_engine_batched.kernels.made_up")
    module.project_backward = lambda *a, **k: ("made up", a, k)
    module.find_reason_against = lambda *arguments: (
        None if arguments[2].shape[1] == 16 else "another size"
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    form = triangle._CudaForm("made_up", check=None)
    monkeypatch.setitem(triangle._CUDA_FORMS, "project_backward", form)
    assert call("project_backward", make_data(FITS)) == "made up"
    assert call("project_backward", make_data(FITS._replace(n=17))) == "triton"
