# SPDX-License-Identifier: Apache-2.0
"""Launches a Triton kernel again without the host work of Triton's own call.

`JITFunction.run` binds, specializes and hashes all arguments at every call, 20 microseconds and more. A
caller that knows what its arguments specialize on launches the compiled kernel at once: by a key
(`Launcher`), or with an object of its own for each description (`BoundLaunch`). Must not import the package.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Callable, Hashable, Optional, Union

import torch
import triton

from .memory import Address

_MAX_KERNELS = 4096

Pointer = Optional[Union[torch.Tensor, Address]]


class BoundLaunch:
    """A kernel with everything but its addresses decided.

    The tensors of all calls must agree in whatever Triton would compile differently: their types, which of
    them are None, the alignment of addresses by 16 (where the kernel does not ignore it), and the device.

    Parameters
    ----------
    kernel : triton.JITFunction
        Takes its pointers first.
    num_programs, num_warps : int
    constants : tuple
        All arguments after the pointers, constexprs among them.
    waits : bool, default = False
        Programmatic dependent launch, where `can_wait`: programs start while the kernel before ends. All of them must
        execute `gdc_wait` before they read what that kernel writes, and before they write.

    Notes
    -----
    That kernel lets them start early if it executes `gdc_launch_dependents`. Source: CUDA C++ Programming Guide,
    "Programmatic Dependent Launch and Synchronization".
    """

    def __init__(
        self,
        kernel: triton.JITFunction,
        num_programs: int,
        num_warps: int,
        constants: tuple,
        *,
        waits: bool = False,
    ) -> None:
        self._num_programs = num_programs
        self._num_warps = num_warps
        self._constants = constants
        self._kernel = kernel
        self._waits = waits
        self._compiled: Optional[tuple] = None

    def __call__(self, *tensors: Pointer) -> None:
        """Launches on the current stream of the current device, where the tensors are; the first must be one."""
        if self._compiled is None:
            # The interpreter does not know the option.
            options = {"launch_pdl": True} if self._waits else {}
            compiled = self._kernel[(self._num_programs,)](
                *tensors, *self._constants, num_warps=self._num_warps, **options
            )
            if tensors[0].is_cuda:  # else interpreted
                self._compiled = _find_call(compiled)
            return
        run, settings = self._compiled
        # Triton asks the driver about each tensor, but takes integers as they are.
        run(
            self._num_programs,
            1,
            1,
            torch._C._cuda_getCurrentRawStream(tensors[0].get_device()),
            *settings,
            *[None if x is None else x.data_ptr() for x in tensors],
            *self._constants,
        )

    def beside(self, other: "BoundLaunch", kernel: triton.JITFunction) -> "BoundLaunch":
        """A launch of a kernel that does the work of two.

        It takes the pointers of both, then the number of programs and the constants of each.
        """
        numbers = (self._num_programs, *self._constants, other._num_programs, *other._constants)
        return BoundLaunch(
            kernel,
            self._num_programs + other._num_programs,
            max(self._num_warps, other._num_warps),
            numbers,
            waits=self._waits and other._waits,
        )


@lru_cache(maxsize=None)
def can_wait(device_index: int) -> bool:
    """Whether a device has programmatic dependent launch: from Hopper on. -1 is the CPU."""
    return device_index >= 0 and torch.cuda.get_device_capability(device_index) >= (9, 0)


def _find_call(compiled: object) -> tuple[Callable, tuple]:
    """What launches a compiled kernel, and its arguments between the stream and those of the kernel."""
    # No hooks: those of profilers want metadata that only Triton's own call prepares.
    metadata = (compiled.packed_metadata, None, None, None)
    launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return launcher, (compiled.function, *metadata)
    # The C function, without a Python function around it that looks for memory to allocate.
    options = (launcher.launch_cooperative_grid, launcher.launch_pdl, None, None)
    return launcher.launch, (compiled.function, *options, *metadata)


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
            None,
            None,
            *arguments,
        )
