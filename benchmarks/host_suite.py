# SPDX-License-Identifier: Apache-2.0
"""Suite `host`: what a call costs the host, at a size where the device is never the limit.

Input: none but the GPU. Output: one row per case, in microseconds. A case that cannot run has its
reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Mapping

import torch

from benchmarks import timing
from benchmarks.gemm_suite import quantize_current
from benchmarks.peers import split_items
from benchmarks.points import Operands, Point, make_operands
from benchmarks.stored_results import clean_reason

POINT = Point(batch=2, m=128, n=128, k=128, kind="host")

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A call whose host time is taken; `prepare(operands, out)` sets it up and returns it."""

    name: str
    label: str
    prepare: Callable[[Operands, torch.Tensor], Call]


def _ours_fp8(x: Operands, out: torch.Tensor) -> Call:
    import transformer_engine_batched as teb

    return lambda: teb.batched_general_gemm(x.right_fp8, x.left_fp8, out_dtype=torch.bfloat16)


def _ours_fp8_out(x: Operands, out: torch.Tensor) -> Call:
    import transformer_engine_batched as teb

    return lambda: teb.batched_general_gemm(
        x.right_fp8, x.left_fp8, out_dtype=torch.bfloat16, out=out
    )


def _ours_bf16(x: Operands, out: torch.Tensor) -> Call:
    import transformer_engine_batched as teb

    return lambda: teb.batched_general_gemm(x.right, x.left, out_dtype=torch.bfloat16)


def _ours_bmm(x: Operands, out: torch.Tensor) -> Call:
    import transformer_engine_batched as teb

    right = x.right.mT
    return lambda: teb.bmm(x.left, right)


def _raw_launch(x: Operands, out: torch.Tensor) -> Call:
    from transformer_engine_batched import gemm

    return gemm.prepare_raw_launch(x.right_fp8, x.left_fp8, "TN", out)


def _torch_bmm(x: Operands, out: torch.Tensor) -> Call:
    right = x.right.mT
    return lambda: torch.bmm(x.left, right)


def _te_general_gemm(x: Operands, out: torch.Tensor) -> Call:
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    right, left = split_items(x.right_fp8)[0], split_items(x.left_fp8)[0]
    return lambda: general_gemm(right, left, out_dtype=torch.bfloat16, layout="TN")


CASES = (
    Case("ours_fp8", "`teb.batched_general_gemm`, Float8", _ours_fp8),
    Case("ours_fp8_out", "`teb.batched_general_gemm`, Float8, `out` given", _ours_fp8_out),
    Case("ours_bf16", "`teb.batched_general_gemm`, BF16", _ours_bf16),
    Case("ours_bmm", "`teb.bmm`, BF16", _ours_bmm),
    Case("ours_cpp", "the C++ layer alone, Float8", _raw_launch),
    Case("torch_bmm", "`torch.bmm`, BF16", _torch_bmm),
    Case("te_general_gemm", "TE `general_gemm`, Float8, one item", _te_general_gemm),
)


def measure_case(
    case: Case,
    operands: Operands,
    out: torch.Tensor,
    settle: Callable[[], None],
    lost: Mapping[str, str] | None = None,
    chunks: int = 20,
) -> dict[str, Any]:
    """One row; raises `timing.DeviceLostError` if the device stops answering.

    A case named in `lost` is not run; its reason is stored.
    """
    row: dict[str, Any] = {
        "case": case.name,
        "label": case.label,
        "median_us": None,
        "quartiles_us": None,
        "calls": 0,
        "drain_us": None,
        "reason": (lost or {}).get(case.name),
    }
    if row["reason"] is not None:
        return row
    try:
        result = timing.time_host(case.prepare(operands, out), settle, chunks=chunks)
    except Exception as error:
        row["reason"] = clean_reason(timing.describe_error(error))
        timing.check_device(case.name, error, settle)
        return row
    samples = result.per_call
    row.update(
        median_us=samples.median,
        quartiles_us=samples.quartiles,
        calls=len(samples.values),
        drain_us=result.drain_us,
        reason=samples.reason,
    )
    return row


def make_inputs() -> tuple[Operands, torch.Tensor]:
    """Operands and output of the small product."""
    operands = make_operands(POINT, seed=0, device="cuda", quantize=quantize_current)
    out = torch.empty((POINT.batch, POINT.m, POINT.n), dtype=torch.bfloat16, device="cuda")
    return operands, out
