# SPDX-License-Identifier: Apache-2.0
"""Memory on the device: uninitialized tensors at a third of the host time of torch.empty, and addresses.

Must not import the package.
"""

from __future__ import annotations

import torch

# What torch's own compiler allocates with. It takes no device: that of the thread.
_empty_strided_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def empty_strided(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device_index: int
) -> torch.Tensor:
    """`torch.empty_strided` on a CUDA device, or on the CPU (index -1).

    Memory is filled where torch.use_deterministic_algorithms says so.
    """
    if device_index < 0:
        return torch.empty_strided(shape, strides, dtype=dtype)
    if (
        _empty_strided_cuda is None
        or torch._C._cuda_getDevice() != device_index
        or torch.are_deterministic_algorithms_enabled()
    ):
        device = torch.device("cuda", device_index)
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return _empty_strided_cuda(shape, strides, dtype)


class Address:
    """Memory that a kernel takes for a tensor, a part of a larger one."""

    __slots__ = ("dtype", "_address")

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype = dtype
        self._address = address

    def data_ptr(self) -> int:
        """Where it begins."""
        return self._address
