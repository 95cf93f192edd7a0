# SPDX-License-Identifier: Apache-2.0
"""Which launches may start before the kernel in front of them has ended. No kernel runs."""

from __future__ import annotations

import pytest
import torch

from transformer_engine_batched.kernels import (
    channel_last,
    float8_quantize,
    launcher,
    tensor_amax,
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
