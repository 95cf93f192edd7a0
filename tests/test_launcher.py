# SPDX-License-Identifier: Apache-2.0
"""Which launches may start before the kernel in front of them has ended. No kernel runs."""

from __future__ import annotations

import pytest
import torch

from sass import disassemble

from transformer_engine_batched.kernels import (
    channel_last,
    float8_quantize,
    launcher,
    nvrtc,
    tensor_amax,
    triangle_output,
    triangle_output_backward,
    triangle_project,
    triangle_project_backward,
)
from transformer_engine_batched.kernels.launcher import BoundLaunch


class RecordingKernel:
    """Stands for a `triton.JITFunction`; keeps the options of its launches."""

    def __init__(self):
        self.options = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.options.append(options)


@pytest.mark.parametrize("waits", (True, False))
def test_options(waits):
    kernel = RecordingKernel()
    BoundLaunch(kernel, 3, 4, (), waits=waits)(torch.zeros(1))
    assert kernel.options == [{"num_warps": 4, "launch_pdl": True} if waits else {"num_warps": 4}]


@pytest.mark.parametrize("waits", ((True, True), (True, False), (False, False)))
def test_of_two_both_must_wait(waits):
    first, second = (BoundLaunch(RecordingKernel(), 1, 4, (), waits=x) for x in waits)
    kernel = RecordingKernel()
    first.beside(second, kernel)(torch.zeros(1))
    assert kernel.options == [{"num_warps": 4, **({"launch_pdl": True} if all(waits) else {})}]


@pytest.mark.parametrize("capability, expected", (((8, 9), False), ((9, 0), True), ((10, 0), True)))
def test_devices(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    can_wait = launcher.can_wait.__wrapped__
    assert can_wait(0) is expected and not can_wait(-1)


@pytest.mark.parametrize("module", (float8_quantize, channel_last))
@pytest.mark.parametrize("can_wait", (True, False))
def test_casts_wait_for_the_search_alone(module, can_wait, monkeypatch):
    """Of delayed scaling there is none; the constant of the kernel and the option of the launch agree."""
    made = []

    class Recorded(BoundLaunch):
        def __init__(self, kernel, num_programs, num_warps, constants, *, waits=False):
            super().__init__(kernel, num_programs, num_warps, constants, waits=waits)
            made.append((kernel, constants, waits))

    monkeypatch.setattr(tensor_amax, "can_wait", lambda device_index: can_wait)
    monkeypatch.setattr(module, "BoundLaunch", Recorded)
    monkeypatch.setattr(tensor_amax, "BoundLaunch", Recorded)
    shape, strides = (8, 32, 48), (1536, 48, 1) if module is float8_quantize else (1, 384, 8)
    layouts = (True, True, 16)
    module.Cast(shape, strides, torch.bfloat16, 0, "e4m3", layouts, (0.0, False))
    search, delayed, current = made
    names = [parameter.name for parameter in module._cast_kernel.params]
    place = names.index("WAITS") - len([name for name in names if name.endswith("_ptr")])
    assert search[0] is tensor_amax._amax_kernel and not search[2] and search[1][-1] is can_wait
    assert delayed[1][place] is delayed[2] is False
    assert current[1][place] is current[2] is can_wait


def make_kernels():
    """One form of each kernel in CUDA C++ of the triangle block."""
    sizes = (("DIM", 128), ("HIDDEN", 128))
    return {
        "project_operands": triangle_project._get_kernel((*sizes, ("OUT_TYPE", "E4M3")), 232448),
        "project_output": triangle_output._get_kernel(sizes),
        "output_backward": triangle_output_backward._get_kernel(
            (("OUT_TYPE", "E5M2"), ("NUM_UNITS", 7))
        ),
        "project_backward": triangle_project_backward._get_kernel((("DIM", 128), ("IS_LAST", 1))),
    }


@pytest.mark.parametrize("name", make_kernels())
def test_cuda_kernels_that_start_early_wait_before_they_read(name, tmp_path):
    """ACQBULK is griddepcontrol.wait; the others are launched behind the kernel before."""
    kernel = make_kernels()[name]
    assert kernel._waits == (name in ("project_operands", "project_output"))
    cubin = nvrtc.compile_cubin(nvrtc._read_source(kernel._file_name), kernel._definitions)
    lines = disassemble(cubin, tmp_path).splitlines()
    reads = [i for i, line in enumerate(lines) if " LDG" in line or " UTMALDG" in line]
    waits = [i for i, line in enumerate(lines) if "ACQBULK" in line]
    assert reads and len(waits) == kernel._waits and all(i < reads[0] for i in waits)


@pytest.mark.parametrize("waits", (True, False))
def test_option_of_cuda_kernels(waits, monkeypatch):
    """The launch that starts early says so to the driver, and where and how large it is."""
    calls = []
    monkeypatch.setattr(nvrtc, "_call_driver", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5, raising=False)
    kernel = nvrtc.Kernel("made_up.cu", "made_up", {}, 384, 1000, waits=waits)
    kernel._functions[0] = "function"
    kernel.launch(7, b"struct", 0)
    kernel.launch(8, b"struct", 0)
    driver = nvrtc.load_bindings().driver
    for (function, *arguments), num_ctas in zip(calls, (7, 8), strict=True):
        if not waits:
            assert function is driver.cuLaunchKernel
            assert arguments[:9] == ["function", num_ctas, 1, 1, 384, 1, 1, 1000, 5]
            continue
        config, name, _, _ = arguments
        assert function is driver.cuLaunchKernelEx and name == "function"
        assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (num_ctas, 1, 1)
        assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (384, 1, 1)
        assert (config.sharedMemBytes, int(config.hStream)) == (1000, 5)
        (attribute,) = config.attrs
        wanted = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        assert attribute.id == wanted and config.numAttrs == 1
        assert attribute.value.programmaticStreamSerializationAllowed == 1
