# SPDX-License-Identifier: Apache-2.0
"""A batched matrix product as a plain value: what every engine is given.

Row-major terms throughout: ``D[b] = alpha * A[b] @ B[b] + beta * D[b]``. The C++ layer has the same value
(csrc/problem.h) and alone knows cuBLASLt's column-major view. Pure: imports neither torch nor TE.
"""

from __future__ import annotations

from dataclasses import dataclass

_ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "e4m3": 1, "e5m2": 1}


def element_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return _ELEMENT_BYTES[dtype]


@dataclass(frozen=True)
class Matrix:
    """One batched matrix in memory.

    Element ``(b, r, c)`` lies at ``b * batch_stride + r * ld + c``, or, if `transposed`, at
    ``b * batch_stride + c * ld + r``. Strides count elements; a `batch_stride` of 0 broadcasts.

    Parameters
    ----------
    dtype : {"fp32", "fp16", "bf16", "e4m3", "e5m2"}
    scale_mode : {"none", "tensor", "block32"}
        How codes become numbers: as they are, times one FP32 factor for the whole batch, or times one
        E8M0 factor for each 32 elements along the contracted dimension (MXFP8), whose factors lie in
        128x4 tiles packed item after item (see `block_scales`).
    """

    dtype: str
    ld: int
    batch_stride: int
    transposed: bool = False
    scale_mode: str = "none"

    def strides(self) -> tuple[int, int, int]:
        """Strides of (item, row, column) in elements."""
        if self.transposed:
            return self.batch_stride, 1, self.ld
        return self.batch_stride, self.ld, 1


@dataclass(frozen=True)
class Problem:
    """``D = alpha * A @ B + beta * D`` over a batch, then bias and GELU, then the D scale.

    Parameters
    ----------
    batch, m, n, k : int
        A is ``[batch, m, k]``, B ``[batch, k, n]``, D ``[batch, m, n]``.
    epilogue : {"none", "bias", "gelu", "gelu_bias"}
        GELU is the tanh form, as in TE.
    bias_batch_stride : int
        0 for one bias of ``[n]`` that all items share.
    accumulate : bool
        Whether beta is not zero, so that D is read, too.
    fast_accumulation : bool
        FP8 on Ada and Hopper: partial sums stay in the tensor cores' 14-bit registers.
    amax_d : bool
        FP8 output: also write the largest absolute value of D before its scale.
    sm_count : int
        Streaming multiprocessors to plan for; 0 for all.
    workspace_limit : int
        In bytes.
    """

    batch: int
    m: int
    n: int
    k: int
    a: Matrix
    b: Matrix
    d: Matrix
    epilogue: str = "none"
    bias_dtype: str = "bf16"
    bias_batch_stride: int = 0
    accumulate: bool = False
    fast_accumulation: bool = False
    allow_tf32: bool = False
    amax_d: bool = False
    device: int = 0
    sm_count: int = 0
    workspace_limit: int = 0
