# SPDX-License-Identifier: Apache-2.0
"""Launches a Triton kernel again without the host work of Triton's own call.

`JITFunction.run` binds, specializes and hashes all arguments at every call, 20 microseconds and more. A
caller that knows what its arguments specialize on names it by a key, and later launches go to the compiled
kernel at once. Must not import the package.
"""

from __future__ import annotations

from typing import Hashable

import torch
import triton
from triton import knobs

_MAX_KERNELS = 4096


class Launcher:
    """A kernel whose compiled forms are kept by the caller's key.

    Parameters
    ----------
    kernel : triton.JITFunction
        Called with all its arguments by position, constexprs among them.
    """

    def __init__(self, kernel: triton.JITFunction) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, object] = {}

    def __call__(self, num_programs: int, arguments: tuple, key: Hashable, num_warps: int) -> None:
        """Launches on the current stream of the device of the first argument, a tensor.

        `key` must tell apart whatever Triton would compile differently: types, alignment of addresses by
        16, integers that are 1 or multiples of 16, constexprs, arguments that are None, and the device.
        """
        device = arguments[0].get_device()
        if device < 0:  # interpreted
            self._kernel[(num_programs,)](*arguments, num_warps=num_warps)
            return
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(num_programs, arguments, key, num_warps)
            return
        compiled = self._compiled.get(key)
        if compiled is None:
            if len(self._compiled) >= _MAX_KERNELS:
                self._compiled.clear()
            self._compiled[key] = self._kernel[(num_programs,)](*arguments, num_warps=num_warps)
            return
        compiled.run(
            num_programs,
            1,
            1,
            torch._C._cuda_getCurrentRawStream(device),
            compiled.function,
            compiled.packed_metadata,
            None,
            knobs.runtime.launch_enter_hook,
            knobs.runtime.launch_exit_hook,
            *arguments,
        )
