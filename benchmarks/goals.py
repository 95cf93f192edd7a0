# SPDX-License-Identifier: Apache-2.0
"""What the project set out to reach on an H200, and whether stored results reach it.

Input: the dictionaries of `gemm.json`, `host.json` and `module.json`. Output: one `Outcome` per goal. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence


@dataclass(frozen=True)
class Goal:
    """A bound on one stored number: at least (`is_minimum`) or at most `bound`."""

    suite: str
    row: tuple[tuple[str, Any], ...]
    field: str
    bound: float
    is_minimum: bool
    text: str


@dataclass(frozen=True)
class Outcome:
    """`measured` and `is_reached` are None while there is no number."""

    goal: Goal
    measured: float | None
    is_reached: bool | None


def _ratio(size: int, batch: int, variant: str, field: str, bound: float, text: str) -> Goal:
    point = f"B{batch}_M{size}_N{size}_K{size}"
    row = (("point", point), ("variant", variant))
    return Goal("gemm", row, field, bound, True, f"{text}, N={size}, B={batch}")


_SPLIT = "split accumulation over torch.bmm BF16"
_FAST = "fast accumulation with autotune over torch.bmm BF16"
_LOOP_FAST = "fast accumulation with autotune over the same loop, fast"
_LOOP = "split accumulation over a loop of `general_gemm`"
GOALS = (
    _ratio(2048, 32, "ours_split", "ratio_to_bf16", 1.6, _SPLIT),
    _ratio(4096, 8, "ours_split", "ratio_to_bf16", 1.6, _SPLIT),
    _ratio(512, 512, "ours_split", "ratio_to_bf16", 1.35, _SPLIT),
    _ratio(2048, 32, "ours_fast_tuned", "ratio_to_bf16", 1.85, _FAST),
    _ratio(512, 512, "ours_fast_tuned", "ratio_to_bf16", 1.5, _FAST),
    _ratio(2048, 32, "ours_split", "ratio_to_te_loop", 1.5, _LOOP),
    _ratio(2048, 32, "ours_fast_tuned", "ratio_to_te_loop", 1.5, _LOOP_FAST),
    _ratio(512, 512, "ours_split", "ratio_to_te_loop", 20.0, _LOOP),
    Goal(
        "host",
        (("case", "ours_fp8"),),
        "median_us",
        20.0,
        False,
        "host time of a warm call, TE Float8 operands",
    ),
    Goal("host", (("case", "ours_cpp"),), "median_us", 10.0, False, "host time of the C++ layer"),
)


def _module(size: int, batch: int, variant: str, field: str, bound: float, text: str) -> Goal:
    row = (
        ("point", f"B{batch}_N{size}"),
        ("variant", variant),
        ("pass", "forward_backward"),
    )
    is_minimum = field == "ratio_to_bf16"
    return Goal("module", row, field, bound, is_minimum, f"{text}, N={size}, B={batch}")


_DELAYED = "forward and backward, delayed scaling, over torch.bmm BF16"
_CURRENT = "forward and backward, current scaling, over torch.bmm BF16"
MODULE_GOALS = (
    _module(2048, 32, "ours_delayed", "ratio_to_bf16", 1.25, _DELAYED),
    _module(4096, 8, "ours_delayed", "ratio_to_bf16", 1.38, _DELAYED),
    _module(2048, 32, "ours_current", "ratio_to_bf16", 1.10, _CURRENT),
    _module(4096, 8, "ours_current", "ratio_to_bf16", 1.28, _CURRENT),
    _module(1024, 128, "ours_delayed", "ratio_to_bf16", 0.9, _DELAYED),
    _module(1024, 128, "ours_current", "ratio_to_bf16", 0.9, _CURRENT),
    _module(
        2048, 32, "ours_delayed", "saved_ratio", 0.55, "bytes saved for backward, of torch.bmm's"
    ),
    *(
        Goal("module", (("case", f"ours_{name}"),), "median_us", 60.0, False, text)
        for name, text in (
            ("delayed", "host time of a forward, delayed scaling"),
            ("current", "host time of a forward, current scaling"),
        )
    ),
)


def evaluate(
    results: dict[str, dict[str, Any] | None], chosen: Sequence[Goal] = GOALS
) -> list[Outcome]:
    """Compare each goal with `results[suite]`, which may be None."""
    outcomes = []
    for goal in chosen:
        stored = results.get(goal.suite)
        rows = stored["rows"] if stored is not None else []
        found = [r for r in rows if all(r.get(key) == value for key, value in goal.row)]
        measured = found[0][goal.field] if found else None
        is_reached = None
        if measured is not None:
            is_reached = measured >= goal.bound if goal.is_minimum else measured <= goal.bound
        outcomes.append(Outcome(goal, measured, is_reached))
    return outcomes
