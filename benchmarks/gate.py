# SPDX-License-Identifier: Apache-2.0
"""The correctness gate: a product that does not pass it gets no time.

Input: a result and the exact product, both `[B, M, N]`. Output: the worst item's SQNR and a
verdict. Imports torch only.

The measure is the signal-to-quantization-noise ratio of each batch item, in dB, and the minimum
counts: an average would hide one wrong item among thousands. The reference is the FP64 product of
the operands as the engine reads them (the FP8 codes times their scale), so the format's own error
does not enter.

Gates
-----
split accumulation and BF16 : 50 dB. Rounding the result to BF16 caps the ratio at 55.6 dB; the rest
    is what FP32 accumulation may cost.
fast accumulation : 30 dB. Hopper's tensor cores keep about 14 bits of an FP8 sum (DeepSeek-V3
    report, arXiv 2412.19437, section 3.3.2: errors near 2 % at K = 4096, i.e. 34 dB), and the loss
    grows with K. The gate is set where accumulation would start to cost as much as the format
    itself (28.5 dB for E4M3 on normal data). It still catches faults: a factor of two gives 0 dB,
    exchanged items -3 dB, one dropped K tile of 128 in 8192 gives 18 dB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

MINIMUM_DB = {"bf16": 50.0, "split": 50.0, "fast": 30.0}
# Infinite ratios (an exact result, or NaN) are stored as this bound, because JSON has no infinity.
BOUND_DB = 300.0
# Items are converted to FP64 a few at a time: at most this many elements (512 MiB).
_CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Verdict:
    """Outcome of the gate: the worst item, its SQNR in dB, and the reason if it failed."""

    passed: bool
    sqnr_db: float | None
    worst_item: int | None
    reason: str | None


def _items_per_chunk(*tensors: torch.Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // max(max(x[0].numel() for x in tensors), 1))


def dequantize_exactly(x: Any) -> torch.Tensor:
    """Codes times `scale_inv` in FP64: what an engine multiplies. A plain tensor is only widened.

    Both factors and their product are exact in FP64 (4 + 24 significant bits).
    """
    if isinstance(x, torch.Tensor) and not hasattr(x, "get_metadata"):
        return x.double()
    stored = x.get_metadata()
    codes = stored["data"].view(torch.float8_e4m3fn)
    return codes.double() * stored["fp8_scale_inv"].double()


def multiply_exactly(left: Any, right: Any) -> torch.Tensor:
    """`out[b] = left[b] @ right[b]^T` in FP64, from quantized or plain operands; `[B, M, N]`."""
    left, right = dequantize_exactly(left), dequantize_exactly(right)
    return torch.bmm(left, right.mT)


def measure_sqnr(out: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """SQNR of each item, `10 log10(sum ref^2 / sum (out - ref)^2)`, in dB, `[B]`.

    NaN or infinity anywhere in an item gives that item `-BOUND_DB`.
    """
    chunk = _items_per_chunk(out, reference)
    parts = []
    for start in range(0, out.shape[0], chunk):
        exact = reference[start : start + chunk].double().flatten(1)
        noise = (out[start : start + chunk].double().flatten(1) - exact).square().sum(1)
        signal = exact.square().sum(1)
        ratio = torch.where(noise == 0, torch.inf, signal / noise)
        parts.append(torch.where(torch.isfinite(noise), 10 * torch.log10(ratio), -torch.inf))
    return torch.cat(parts).clamp(-BOUND_DB, BOUND_DB)


def judge(out: torch.Tensor, reference: torch.Tensor, minimum_db: float) -> Verdict:
    """Compare every item of `out` with `reference`; the worst one decides."""
    if out.shape != reference.shape:
        reason = f"result has shape {tuple(out.shape)}, expected {tuple(reference.shape)}"
        return Verdict(False, None, None, reason)
    db, item = torch.min(measure_sqnr(out, reference), dim=0)
    db, item = round(float(db), 2), int(item)
    if db < minimum_db:
        reason = f"item {item} has {db} dB against FP64, the gate is {minimum_db:g} dB"
        return Verdict(False, db, item, reason)
    return Verdict(True, db, item, None)
