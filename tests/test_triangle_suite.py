# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite `triangle` without a GPU: its gate, rows, goals and documents.

The clock is a stand-in; the plain module is real and runs on the CPU.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from triangle_reference import evaluate, overall_sqnr

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import goals, run, triangle_suite  # noqa: E402

spec = importlib.util.spec_from_file_location("render_docs", ROOT / "tools" / "render_docs.py")
render_docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render_docs)

SETTINGS = triangle_suite.Settings(rounds=2, warmup=1)
EAGER, OURS = triangle_suite.BASELINE, triangle_suite.VARIANTS[3]
META = dict.fromkeys(
    "commit dirty gpu driver torch te cublaslt python date command complete".split(), "x"
)


class CountingClock:
    """Every timed call takes a millisecond."""

    def start(self):
        return None

    def stop(self, token):
        pass

    def read_ms(self, token):
        return 1.0

    def settle(self):
        pass


def make_point(mode="outgoing"):
    return triangle_suite.TrianglePoint(24, mode)


@pytest.fixture(scope="module", params=triangle_suite.MODES)
def case(request):
    """(point, inputs, parameters, exact results)."""
    point = make_point(request.param)
    inputs, parameters = triangle_suite.make_inputs(point, "cpu"), triangle_suite.make_parameters(
        "cpu"
    )
    return point, inputs, parameters, triangle_suite.compute_exactly(inputs, parameters, point.mode)


def test_exact_results_are_those_of_fp64(case):
    point, inputs, parameters, exact = case
    leaves = {name: value.detach().double() for name, value in parameters.items()}
    out, c = evaluate(leaves, inputs.z.detach().double(), inputs.mask, point.mode)
    assert overall_sqnr(exact["out"], out) > 110
    assert overall_sqnr(exact["contraction"], c) > 110
    # Nothing that is compared is zero.
    assert all(value.abs().mean() > 1e-3 for value in exact.values())


def plain_results(case):
    point, inputs, parameters, _ = case
    step = triangle_suite.Step(EAGER, point, [inputs], parameters)
    return step.forward_backward()


def test_gate_admits_bf16_and_catches_damage(case):
    point, inputs, parameters, exact = case
    results, contraction = plain_results(case), exact["contraction"].bfloat16()
    minimum = triangle_suite.MINIMUM_DB["float8"]
    found, reason = triangle_suite.judge(results, contraction, exact, minimum)
    assert reason is None and found["contraction"] > 50 and found["grad"] > 27
    # A weak channel that is wrong: the whole hides it, the worst channel does not.
    exact = {**exact, "contraction": exact["contraction"].clone()}
    exact["contraction"][0, 5] /= 100
    contraction = exact["contraction"].bfloat16()
    zeroed = contraction.clone()
    zeroed[0, 5] = 0
    for name, damaged in (
        ("contraction", 1.05 * contraction),  # what the LayerNorm behind it hides
        ("contraction", contraction.mT),
        ("slice", zeroed),
    ):
        _, reason = triangle_suite.judge(results, damaged, exact, minimum)
        assert reason is not None and reason.startswith(name)
    _, reason = triangle_suite.judge((1.1 * results[0], *results[1:]), contraction, exact, minimum)
    assert reason.startswith("out")
    for index in (1, 2 + triangle_suite.PARAMETERS.index("p_in_weight")):
        damaged = list(results)
        damaged[index] = torch.zeros_like(damaged[index])
        _, reason = triangle_suite.judge(damaged, contraction, exact, minimum)
        assert reason.startswith("grad")
    damaged = list(results)
    damaged[0] = damaged[0].clone()
    damaged[0][0, 0, 0, 0] = torch.nan
    assert triangle_suite.judge(damaged, contraction, exact, minimum)[1].startswith("out")


def test_rows_of_a_point():
    variants = (EAGER, triangle_suite.PEER)
    rows = triangle_suite.measure_point(
        make_point(), CountingClock(), SETTINGS, device="cpu", variants=variants
    )
    assert [(row["variant"], row["pass"]) for row in rows] == [
        (variant.name, name) for variant in variants for name in triangle_suite.PASSES
    ]
    for row in rows[:2]:
        assert row["median_ms"] == 1.0 and row["samples"] == 2 and row["ratio_to_eager"] == 1.0
        assert row["reason"] is None and row["sqnr_db"]["out"] > 38
        assert row["ratio_to_cuequivariance"] is None
    # Not installed, or without a GPU: a reason and no time, and the others go on.
    for row in rows[2:]:
        assert row["median_ms"] is None and row["reason"]
    assert triangle_suite.find_failures({"rows": rows}) == []


def test_a_lost_variant_does_not_run_again():
    rows = triangle_suite.measure_point(
        make_point(),
        CountingClock(),
        SETTINGS,
        {"eager": "the device stopped answering"},
        device="cpu",
        variants=(EAGER,),
    )
    assert all(row["median_ms"] is None and "stopped answering" in row["reason"] for row in rows)


def test_ours_without_a_time_is_a_failure():
    row = triangle_suite.empty_row(make_point(), OURS, triangle_suite.FORWARD)
    row["reason"] = "out: 3 dB"
    results = {"meta": META, "rows": [row]}
    failures = run.find_failures(None, None, further={"triangle": results})
    assert failures == ["triangle N24_outgoing ours_bf16 forward: out: 3 dB"]
    assert "out: 3 dB" in run.format_summary(None, None, further={"triangle": results})


def test_compiled_runs_at_few_points():
    compiled = next(v for v in triangle_suite.VARIANTS if v.name == "compiled")
    names = [point.name for point in triangle_suite.POINTS if compiled.runs_at(point)]
    assert names == ["N512_outgoing", "N1024_outgoing", "N2048_outgoing"]
    assert all("eager" in triangle_suite.name_calls(point) for point in triangle_suite.POINTS)


def test_inputs_exceed_the_cache():
    l2_bytes = 60 * 2**20
    for point in triangle_suite.POINTS:
        num_bytes = point.count_sets(l2_bytes) * 2 * triangle_suite.CHANNELS * point.size**2
        assert num_bytes >= 2 * l2_bytes


def make_results(ratio: float, peak: float) -> dict:
    rows = []
    for point in triangle_suite.POINTS:
        for variant in triangle_suite.VARIANTS:
            for name in triangle_suite.PASSES if variant.runs_at(point) else ():
                row = triangle_suite.empty_row(point, variant, name)
                row.update(median_ms=1.0, peak_mib=peak, ratio_to_cuequivariance=ratio)
                row["sqnr_db"] = {"contraction": 28.5, "slice": 28.0, "out": 28.5, "grad": 24.5}
                rows.append(row)
    return {"meta": META, "rows": rows}


@pytest.mark.parametrize("is_reached", (True, False))
def test_goals_find_their_rows(is_reached):
    results = make_results(2.6, 7000.0) if is_reached else make_results(0.9, 9000.0)
    outcomes = goals.evaluate({"triangle": results}, goals.TRIANGLE_GOALS)
    assert len(outcomes) == 16 and all(x.is_reached is is_reached for x in outcomes)


def test_documents():
    results = {"triangle": make_results(2.6, 7000.0)}
    text = render_docs.BLOCKS["triangle-forward"](results)
    assert "| 2048 | incoming | 1.000 (2.60x) | - | 1.000 | 1.000 (2.60x) |" in text
    assert "| 7000 |" in render_docs.BLOCKS["triangle-memory"](results)
    assert "28.5, 28.0, 28.5, 24.5" in render_docs.BLOCKS["triangle-checks"](results)
    assert "7000.00 MiB | reached" in render_docs.BLOCKS["triangle-goals"](results)
    for name in ("goals", "forward", "step", "memory", "checks"):
        assert "Not measured yet" in render_docs.BLOCKS[f"triangle-{name}"]({"triangle": None})
