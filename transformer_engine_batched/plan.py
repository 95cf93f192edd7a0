# SPDX-License-Identifier: Apache-2.0
"""The cublaslt engine: a problem becomes a launch with workspace and algorithm choice.

Takes a `Problem` and tensors whose memory it describes. The C++ layer keeps handles, descriptors and
algorithms per thread and device; here are the device's properties, the SM limit, the workspace and the
call. Must not import TE.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Callable, Iterator, Optional

import torch

from . import _C, autotuning
from .kernels.memory import empty_strided
from .native import to_native
from .problem import Problem, element_bytes
from .support import CPU, Device, scalar_scale_alignment, supports_non_tn

# TE gives cuBLAS 32 MiB on Hopper and later (pytorch/cpp_extensions/gemm.py); algorithms that want more
# are not offered. Most of those offered want none, or 4 bytes for a tile counter.
WORKSPACE_LIMIT_BYTES = 32 * 1024 * 1024

_current_raw_stream = torch._C._cuda_getCurrentRawStream if torch.version.cuda else None


@lru_cache(maxsize=None)
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, (properties.major, properties.minor), _C.loaded_version())


def describe_device(device: torch.device) -> Device:
    """What the support table needs to know of a torch device."""
    if device.type == "cuda":
        return _cuda_device(device.index)
    return CPU if device.type == "cpu" else Device(device.type)


def allows_strided_fp8(device: torch.device) -> bool:
    """Whether a device multiplies per-tensor FP8 operands whose contracted dim is strided."""
    # A CPU stands for the device whose tensors it mimics, Hopper, where only TN runs.
    return supports_non_tn("float8", describe_device(device))


@lru_cache(maxsize=None)
def _num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


_sm_limit: ContextVar[int] = ContextVar("transformer_engine_batched_sm_limit", default=0)


@contextmanager
def limit_sms(count: int) -> Iterator[None]:
    """Leaves streaming multiprocessors (SMs) to others, e.g. to communication kernels.

    Products, and casts with block scales, launched inside are planned for `count` SMs of the device. Outside, TE's
    environment variable ``NVTE_EXT_MARGIN_SM`` holds: the number of SMs to leave free.

    Parameters
    ----------
    count : int
        SMs to use, at least 1; more than the device has means all.

    Examples
    --------
    >>> with teb.limit_sms(100):
    ...     out = teb.bmm(a, b)
    """
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"limit_sms(count={count!r}): expected an integer of at least 1")
    token = _sm_limit.set(count)
    try:
        yield
    finally:
        _sm_limit.reset(token)


def current_sm_count(device_index: int) -> int:
    """SMs to plan for; 0 for all."""
    limit = _sm_limit.get()
    margin = 0 if limit else _C.sm_margin()
    if not limit and not margin:
        return 0
    available = _num_sms(device_index)
    count = limit or available - margin
    return count if 0 < count < available else 0


SCALE_ALIGNMENT = scalar_scale_alignment(_C.loaded_version())


def aligned_scalar(scalar: torch.Tensor) -> torch.Tensor:
    """A per-tensor scale at an address that the loaded library takes; a copy if it has to be."""
    return scalar if scalar.data_ptr() % SCALE_ALIGNMENT == 0 else scalar.clone()


class CublasLtPlan:
    """Runs one problem on tensors of one device. Immutable but for what it learned; thread-safe."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.native = to_native(problem)
        self._bytes = (
            element_bytes(problem.a.dtype),
            element_bytes(problem.b.dtype),
            element_bytes(problem.d.dtype),
            element_bytes(problem.bias_dtype),
        )
        self._device_index = problem.device
        # Learned at the first launch. Two threads may learn it twice; the larger one wins.
        self._workspace_bytes = 0

    def run(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        d: torch.Tensor,
        offsets: tuple[int, int, int, int] = (0, 0, 0, 0),
        scale_inv_a: Optional[torch.Tensor] = None,
        scale_inv_b: Optional[torch.Tensor] = None,
        scale_d: Optional[torch.Tensor] = None,
        amax_d: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        autotune: Optional[bool] = None,
    ) -> None:
        """Launches on the current stream; does not wait.

        `offsets` are those of a, b, d and bias in elements. The workspace comes from torch's caching
        allocator for this launch alone: safe across streams and in graph capture.
        """
        offset_a, offset_b, offset_d, offset_bias = offsets
        bytes_a, bytes_b, bytes_d, bytes_bias = self._bytes
        pointers = (
            a.data_ptr() + offset_a * bytes_a,
            b.data_ptr() + offset_b * bytes_b,
            d.data_ptr() + offset_d * bytes_d,
            0 if scale_inv_a is None else scale_inv_a.data_ptr(),
            0 if scale_inv_b is None else scale_inv_b.data_ptr(),
            0 if scale_d is None else scale_d.data_ptr(),
            0 if amax_d is None else amax_d.data_ptr(),
            0 if bias is None else bias.data_ptr() + offset_bias * bytes_bias,
        )
        self.launch(pointers, d, alpha, beta, autotune)

    def launch(
        self,
        pointers: tuple[int, ...],
        d: torch.Tensor,
        alpha: float,
        beta: float,
        autotune: Optional[bool],
    ) -> None:
        """`run` for addresses of a, b, d, their scales (a, b, d), the amax of d, and the bias."""
        if autotuning.is_active() if autotune is None else autotune:
            autotuning.tune(self.problem, self.native, pointers, d, alpha, beta)
        stream = _current_raw_stream(self._device_index)
        address, workspace = 0, None
        while True:
            size = self._workspace_bytes
            if size:
                workspace = empty_strided((size,), (1,), torch.uint8, self._device_index)
                address = workspace.data_ptr()
            needed = _C.matmul(self.native, *pointers, alpha, beta, address, size, stream)
            if not needed:
                return
            self._workspace_bytes = max(size, needed)

    def bind(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        d: torch.Tensor,
        scale_inv_a: Optional[torch.Tensor] = None,
        scale_inv_b: Optional[torch.Tensor] = None,
    ) -> Callable[[], int]:
        """The C++ call with everything around it done beforehand, after one launch has run."""
        self.run(a, b, d, (0, 0, 0, 0), scale_inv_a, scale_inv_b)
        scales = (0 if scale is None else scale.data_ptr() for scale in (scale_inv_a, scale_inv_b))
        workspace = torch.empty(self._workspace_bytes, dtype=torch.uint8, device=d.device)
        arguments = (
            self.native,
            a.data_ptr(),
            b.data_ptr(),
            d.data_ptr(),
            *scales,
            0,
            0,
            0,
            1.0,
            0.0,
        )
        address = workspace.data_ptr() if workspace.numel() else 0
        stream = _current_raw_stream(self.problem.device)

        def launch(_keep: tuple = (a, b, d, scale_inv_a, scale_inv_b, workspace)) -> int:
            return _C.matmul(*arguments, address, self._workspace_bytes, stream)

        return launch
