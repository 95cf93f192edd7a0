# SPDX-License-Identifier: Apache-2.0
"""Operands of GPU tests: how they are made, quantized by TE's own kernels, and what their product is."""

from __future__ import annotations

import torch
import transformer_engine.pytorch  # noqa: F401
import transformer_engine_torch as tex
from transformer_engine.pytorch import Float8CurrentScalingQuantizer, Float8Quantizer

FP8 = {"e4m3": tex.DType.kFloat8E4M3, "e5m2": tex.DType.kFloat8E5M2}


def make_quantizer(kind: str, dtype: str = "e4m3", *, columnwise: bool = True, scale: float = 40.0):
    """TE's quantizer: "current", or "delayed" with a fixed scale."""
    if kind == "current":
        return Float8CurrentScalingQuantizer(FP8[dtype], device="cuda", columnwise=columnwise)
    return Float8Quantizer(
        scale=torch.tensor([scale], device="cuda"),
        amax=torch.zeros(1, device="cuda"),
        fp8_dtype=FP8[dtype],
        columnwise=columnwise,
    )


def operand_shapes(layout: str, m: int, n: int, k: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B in TE's convention."""
    return {
        "TN": ((n, k), (m, k)),
        "NN": ((k, n), (m, k)),
        "NT": ((k, n), (k, m)),
    }[layout]


def multiply(a: torch.Tensor, b: torch.Tensor, layout: str) -> torch.Tensor:
    """op(B) @ op(A) in FP64, by torch alone."""
    a, b = a.double(), b.double()
    return {"TN": lambda: b @ a.mT, "NN": lambda: b @ a, "NT": lambda: b.mT @ a}[layout]()


def dequantize(x: torch.Tensor) -> torch.Tensor:
    """FP64 values of a quantized tensor, decoded by TE's own kernel; a plain tensor as it is."""
    values = x.dequantize(dtype=torch.float32) if hasattr(x, "_quantizer") else x
    return values.double()


def random_operands(layout: str, batch, m: int, n: int, k: int, dtype=torch.bfloat16):
    """Normal A and B; each item has a magnitude of its own, so that swapped items show."""
    sizes = operand_shapes(layout, m, n, k)
    batch = (batch,) if isinstance(batch, int) else tuple(batch)
    operands = []
    for rows, cols in sizes:
        x = torch.randn(*batch, rows, cols, device="cuda")
        x *= torch.rand(*batch, 1, 1, device="cuda") + 0.5
        operands.append(x.to(dtype))
    return operands
