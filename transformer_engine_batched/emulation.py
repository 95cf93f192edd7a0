# SPDX-License-Identifier: Apache-2.0
"""`emulate()`: the explicit switch that lets recipes run where their hardware is absent.

Holds only the state of the switch; who consults it decides what it means. Imports neither torch nor TE.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Callable, ContextManager, Iterator, NamedTuple, Optional


class Emulation(NamedTuple):
    """State of the switch."""

    enabled: bool = False
    force_reference: bool = False


_OFF = Emulation()
_contexts: list[Callable[[], ContextManager[None]]] = []
_state: ContextVar[Emulation] = ContextVar("transformer_engine_batched_emulation", default=_OFF)


def current_emulation() -> Emulation:
    """State of the switch in the current thread or task."""
    return _state.get()


@contextmanager
def emulate(engine: Optional[str] = None) -> Iterator[None]:
    """Runs recipes that the device lacks, with exact arithmetic.

    Inside, `quantize` falls back to the reference quantizers (TE's own tensor classes with the bytes that
    TE's kernels would write), and products of formats that the device cannot multiply run exactly: codes
    times scales, summed in FP64, rounded once. What the device can run, it still runs. MXFP8 on a CUDA
    device without MXFP8 runs as a BF16 product of the decoded operands, which is exact up to the order of
    the FP32 sums, since an FP8 code times a power of two is a BF16 number (checked, range permitting).
    Float8 128-blocks run decoded everywhere, in FP32 where their scales are no powers of two.

    TE's own support checks pass inside, so that `te.autocast` accepts every recipe; modules of TE other than
    this package's still need their hardware and fail with their own error.

    The switch holds for the current thread (or asyncio task) and nests.

    Parameters
    ----------
    engine : {None, "reference"}
        "reference" sends everything through the reference engine, also what the device could run.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> from transformer_engine.pytorch import MXFP8Quantizer
    >>> import transformer_engine_torch as tex
    >>> quantizer = MXFP8Quantizer(tex.DType.kFloat8E4M3)
    >>> with teb.emulate():
    ...     a = teb.quantize(torch.randn(2, 64, 64), quantizer)
    ...     b = teb.quantize(torch.randn(2, 64, 64), quantizer)
    ...     out = teb.batched_general_gemm(a, b, layout="TN", out_dtype=torch.float32)
    >>> out.shape
    torch.Size([2, 64, 64])
    """
    if engine not in (None, "reference"):
        raise ValueError(f'emulate(engine={engine!r}): expected None or "reference"')
    token = _state.set(Emulation(True, engine == "reference"))
    try:
        with ExitStack() as stack:
            for make_context in _contexts:
                stack.enter_context(make_context())
            yield
    finally:
        _state.reset(token)


def add_context(make_context: Callable[[], ContextManager[None]]) -> None:
    """Registers a context that every `emulate()` enters, too."""
    _contexts.append(make_context)
