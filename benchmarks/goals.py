# SPDX-License-Identifier: Apache-2.0
"""What the project set out to reach on an H200, and whether stored results reach it.

Input: the dictionaries of the suites' files. Output: one `Outcome` per goal. Pure.
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


def _triangle(
    size: int, mode: str, pass_name: str, field: str, bound: float, variant: str = "ours_delayed"
) -> Goal:
    row = (("point", f"N{size}_{mode}"), ("variant", variant), ("pass", pass_name))
    what = "forward" if pass_name == "forward" else "forward and backward"
    of = "over cuEquivariance" if field != "peak_mib" else "peak memory beyond the inputs, MiB"
    text = f"triangle multiplication, {mode}, {what}, delayed scaling, {of}, N={size}"
    return Goal("triangle", row, field, bound, field != "peak_mib", text)


_OVER_PEER = "ratio_to_cuequivariance"
TRIANGLE_GOALS = tuple(
    _triangle(size, mode, pass_name, field, bound)
    for size, pass_name, field, bound in (
        (256, "forward", _OVER_PEER, 1.0),
        (384, "forward", _OVER_PEER, 1.0),
        (1024, "forward", _OVER_PEER, 1.15),
        (2048, "forward", _OVER_PEER, 1.3),
        (768, "forward_backward", _OVER_PEER, 1.2),
        (1024, "forward_backward", _OVER_PEER, 2.5),
        (2048, "forward_backward", _OVER_PEER, 2.5),
        (2048, "forward_backward", "peak_mib", 8000.0),
    )
    for mode in ("outgoing", "incoming")
)


def _einsum(size: int, mode: str, pass_name: str, bound: float) -> Goal:
    row = (("point", f"N{size}_{mode}"), ("variant", "ours_delayed"), ("pass", pass_name))
    what = "forward" if pass_name == "forward" else "forward and backward"
    text = f"einsum, {mode}, {what}, delayed scaling, over torch.einsum BF16, N={size}, D=128"
    return Goal("einsum", row, "ratio_to_einsum", bound, True, text)


def _einsum_kernel(variant: str, bound: float, what: str) -> Goal:
    row = (("point", "N2048_kernels"), ("variant", variant))
    return Goal("einsum", row, "gbps", bound, True, f"{what}, N=2048, D=128")


EINSUM_GOALS = (
    *(_einsum(2048, mode, "forward", 9.0) for mode in ("outgoing", "incoming")),
    *(_einsum(2048, mode, "forward_backward", 9.0) for mode in ("outgoing", "incoming")),
    _einsum(512, "outgoing", "forward", 3.0),
    _einsum(1024, "outgoing", "forward", 10.0),
    _einsum_kernel("ours_rowwise", 3800.0, "quantize and change the layout, one layout"),
    _einsum_kernel("ours_transposed", 3800.0, "quantize and change the layout, the transposed one"),
    _einsum_kernel("ours_both", 3500.0, "quantize and change the layout, both layouts"),
    _einsum_kernel("ours_permute", 3800.0, "result back to channel-last"),
)


def _blockwise(
    size: int,
    batch: int,
    bound: float,
    text: str,
    b_rows: int = 128,
    mask: str = "none",
) -> Goal:
    row = (
        *(("batch", batch), ("m", size), ("n", size), ("k", size)),
        *(("b_rows", b_rows), ("mask", mask), ("variant", "ours")),
    )
    return Goal("blockwise", row, "tflops", bound, True, f"{text}, TFLOP/s, N={size}, B={batch}")


# What DeepGEMM 0.1.0 reached on the same GPU, less a few percent: 1210, 1336, 714; 1109 and 970 masked. No library
# runs a batch of 1x128 x 1x128 there.
BLOCKWISE_GOALS = (
    _blockwise(2048, 32, 1150.0, "1x128 x 128x128"),
    _blockwise(4096, 8, 1270.0, "1x128 x 128x128"),
    _blockwise(512, 512, 680.0, "1x128 x 128x128"),
    _blockwise(2048, 32, 950.0, "1x128 x 1x128", b_rows=1),
    _blockwise(2048, 32, 1100.0, "masked, all rows", mask="all"),
    _blockwise(2048, 32, 970.0, "masked, half the rows", mask="half"),
    *(
        Goal(
            "blockwise",
            (("batch", batch), ("m", m), ("mask", "every_other"), ("variant", "ours")),
            "ratio_to_all_rows",
            1.15,
            False,
            f"masked: time per row with every other item empty over that with none, M={m}, B={batch}",
        )
        for batch, m in ((8, 4096), (32, 1024), (32, 4096), (256, 128), (256, 1024), (256, 4096))
    ),
)

# Goals of the suites that `run.POINT_SUITES` names.
SUITE_GOALS = {
    "einsum": EINSUM_GOALS,
    "triangle": TRIANGLE_GOALS,
    "blockwise": BLOCKWISE_GOALS,
}


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
