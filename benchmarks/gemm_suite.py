# SPDX-License-Identifier: Apache-2.0
"""Suite `gemm`: device time of pre-quantized batched products against every alternative.

Input: points and variants. Output: one row per point and variant. Each variant passes the
correctness gate first or has no time. A failure of one variant is its row's reason and nothing
else's.

A point has two phases. In the first, everything runs as it comes. In the second, ours is tuned and
timed again, with the baseline beside it: a tuned choice stays for its problem, so the two cannot
share a phase. Ratios are to the baseline of the same phase; the baseline's two medians show the
noise of the run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Callable, Mapping, Sequence

import torch

from benchmarks import gate, peers, timing
from benchmarks.peers import BASELINE, TE_LOOP, TE_LOOP_FAST, Variant
from benchmarks.points import Operands, Point, make_operands
from benchmarks.stored_results import clean_reason

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How long to measure. `loop_rounds` is for one launch per item at `many_items` and more."""

    rounds: int = 25
    warmup: int = 5
    loop_rounds: int = 4
    many_items: int = 512


def quantize_current(x: torch.Tensor) -> Any:
    """E4M3 codes with one scale for the tensor, by Transformer Engine's own kernel."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import Float8CurrentScalingQuantizer

    quantizer = Float8CurrentScalingQuantizer(
        fp8_dtype=tex.DType.kFloat8E4M3, device="cuda", rowwise=True, columnwise=False
    )
    return quantizer(x)


def empty_row(point: Point, variant: Variant) -> Row:
    """The row of a variant that has not run yet; every field that rows have."""
    return {
        "point": point.name,
        **asdict(point),
        "variant": variant.name,
        "accumulation": variant.accumulation,
        "sqnr_db": None,
        "worst_item": None,
        "gate_db": gate.MINIMUM_DB[variant.accumulation],
        "median_ms": None,
        "quartiles_ms": None,
        "samples": 0,
        "tflops": None,
        "baseline_ms": None,
        "ratio_to_bf16": None,
        "ratio_to_te_loop": None,
        "repeat_ms": None,
        "reason": None,
    }


def select_variants(point: Point, variants: Sequence[Variant]) -> list[Variant]:
    """Variants that run at this point."""
    return [v for v in variants if point.kind == "square" or v.on_every_point]


def _admit(
    variant: Variant,
    row: Row,
    sets: Sequence[Operands],
    out: torch.Tensor,
    exact: Mapping[bool, torch.Tensor],
    clock: Any,
) -> peers.Call | None:
    """Prepare a variant and pass it through the gate; None with the row's reason if it fails."""
    try:
        call = variant.prepare(sets, out)
        out.fill_(torch.nan)
        result = call(0)
        clock.settle()
        is_bf16 = variant.accumulation == "bf16"
        verdict = gate.judge(result, exact[is_bf16], row["gate_db"])
    except Exception as error:
        row["reason"] = clean_reason(timing.describe_error(error))
        timing.check_device(variant.name, error, clock.settle)
        return None
    row.update(sqnr_db=verdict.sqnr_db, worst_item=verdict.worst_item, reason=verdict.reason)
    return call if verdict.passed else None


def _fill_times(row: Row, point: Point, samples: timing.Samples) -> None:
    if samples.reason is not None:
        row["reason"] = clean_reason(samples.reason)
        return
    median = samples.median
    row.update(
        median_ms=median,
        quartiles_ms=samples.quartiles,
        samples=len(samples.values),
        tflops=point.flops / (median * 1e-3) / 1e12,
    )


def _run_phase(
    point: Point,
    variants: Sequence[Variant],
    rows: Mapping[str, Row],
    sets: Sequence[Operands],
    out: torch.Tensor,
    exact: Mapping[bool, torch.Tensor],
    clock: Any,
    settings: Settings,
) -> timing.Samples | None:
    """Gate and time `variants`; fills their rows and returns the baseline's samples."""
    calls = {}
    for variant in variants:
        if rows[variant.name]["reason"] is None:
            call = _admit(variant, rows[variant.name], sets, out, exact, clock)
            if call is not None:
                calls[variant.name] = call
    is_slow = point.batch >= settings.many_items
    wanted = {v.name: settings.loop_rounds for v in variants if v.is_looped and is_slow}
    samples = timing.interleave(calls, clock, settings.rounds, settings.warmup, wanted)
    baseline = samples.get(BASELINE.name)
    for variant in variants:
        if variant.name in samples:
            _fill_times(rows[variant.name], point, samples[variant.name])
            if baseline is not None:
                rows[variant.name]["baseline_ms"] = baseline.median
    return baseline


def _fill_ratios(rows: Sequence[Row]) -> None:
    loops = {
        row["accumulation"]: row["median_ms"]
        for row in rows
        if row["variant"] in (TE_LOOP.name, TE_LOOP_FAST.name)
    }
    for row in rows:
        if row["median_ms"] is None:
            continue
        # To the loop with the same accumulation; BF16 has none of its own and is put beside split.
        loop = loops.get("fast" if row["accumulation"] == "fast" else "split")
        if row["baseline_ms"] is not None:
            row["ratio_to_bf16"] = row["baseline_ms"] / row["median_ms"]
        if loop is not None:
            row["ratio_to_te_loop"] = loop / row["median_ms"]


def measure_point(
    point: Point,
    variants: Sequence[Variant],
    clock: Any,
    settings: Settings,
    lost: Mapping[str, str] | None = None,
    device: str = "cuda",
    quantize: Callable[[torch.Tensor], Any] = quantize_current,
    l2_bytes: int = 60 << 20,
) -> list[Row]:
    """Rows of one point.

    Parameters
    ----------
    lost : mapping of variant to reason, optional
        Variants not to run again, because the device stopped answering with them.

    Raises
    ------
    timing.DeviceLostError
        If the device stops answering; the process cannot measure anything more.
    """
    variants = select_variants(point, variants)
    rows = {v.name: empty_row(point, v) for v in variants}
    for name, reason in (lost or {}).items():
        if name in rows:
            rows[name]["reason"] = reason
    try:
        num_sets = point.count_sets(l2_bytes)
        sets = [make_operands(point, seed, device, quantize) for seed in range(num_sets)]
        out = torch.empty(
            (point.batch, point.m, point.n), dtype=torch.bfloat16, device=sets[0].left.device
        )
        exact = {
            True: gate.multiply_exactly(sets[0].left, sets[0].right),
            False: gate.multiply_exactly(sets[0].left_fp8, sets[0].right_fp8),
        }
        clock.settle()
    except Exception as error:
        timing.check_device(None, error, clock.settle)
        for row in rows.values():
            row["reason"] = row["reason"] or clean_reason(timing.describe_error(error))
        return list(rows.values())

    as_is = [v for v in variants if not v.is_tuned]
    tuned = [v for v in variants if v.is_tuned]
    untouched = dict(rows[BASELINE.name])
    _run_phase(point, as_is, rows, sets, out, exact, clock, settings)
    if tuned:
        beside = [v for v in as_is if v.name == BASELINE.name] + tuned
        second = {**rows, BASELINE.name: untouched}
        again = _run_phase(point, beside, second, sets, out, exact, clock, settings)
        rows[BASELINE.name]["repeat_ms"] = again.median if again is not None else None
    _fill_ratios(list(rows.values()))
    return list(rows.values())
