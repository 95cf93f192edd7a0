# SPDX-License-Identifier: Apache-2.0
"""The evidence scripts without a GPU: training, attention, the suite `module`, several processes.

Small runs with emulated FP8 on the CPU; clocks are stand-ins. What the scripts conclude is tested with planted faults.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import transformer_engine_batched as teb

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import attention_error, goals, module_suite, result_plots, run
from benchmarks import stored_results, timing, training
from tools import render_docs

SMALL = training.Settings(
    num_steps=90,
    num_warmup_steps=20,
    batch=4,
    num_items=32,
    channels=16,
    num_blocks=1,
    num_clusters=4,
    edge_within=0.7,
    edge_between=0.05,
    learning_rate=1e-2,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are small: threads that wait for each other cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Training


def test_triangle_product_is_what_the_task_needs():
    losses = training.train("bf16", 0, SMALL, "cpu")
    without = training.train(training.WITHOUT_TRIANGLES, 0, SMALL, "cpu")
    assert training.final_loss(losses) < 0.6 * training.final_loss(without)
    assert training.final_loss(losses) < 0.4 * losses[0]


@pytest.mark.parametrize("name", training.QUANTIZED)
def test_emulated_recipes_follow_bf16(name):
    settings = replace(SMALL, num_steps=10)
    baseline = training.train("bf16", 0, settings, "cpu")
    losses = training.train(name, 0, settings, "cpu")
    # Other arithmetic, the same course.
    assert losses != baseline
    assert losses == pytest.approx(baseline, rel=0.05)


def test_a_recipe_that_does_not_train_is_seen():
    def row(recipe, seed, loss):
        return {"recipe": recipe, "seed": seed, "final_loss": loss, "seconds": 1.0}

    rows = [row("bf16", 0, 0.30), row("bf16", 1, 0.20)]
    rows += [row("current", 0, 0.305), row("current", 1, 0.204)]
    rows += [row("delayed", 0, 0.310), row("delayed", 1, 0.206)]
    rows += [row("mxfp8", 0, 0.29), row("mxfp8", 1, 0.19)]
    found = training.summarize(rows)
    assert found["current"]["deviation"] == pytest.approx(0.018)
    verdicts = {name: result["is_reached"] for name, result in found.items()}
    # A loss that is lower by more than the bound is as suspicious as a higher one.
    assert verdicts == {"bf16": None, "current": True, "delayed": False, "mxfp8": False}


def test_training_script_stores_its_curves(tmp_path):
    arguments = "--device cpu --recipes bf16 current --seeds 2 --steps 3 --items 32 --channels 16"
    training.main([*arguments.split(), "--out", str(tmp_path), "--commit", "abc"])
    stored = stored_results.read(tmp_path / "training.json")
    assert [(r["recipe"], r["seed"]) for r in stored["rows"]] == [
        ("bf16", 0),
        ("current", 0),
        ("bf16", 1),
        ("current", 1),
    ]
    assert all(len(row["losses"]) == 3 for row in stored["rows"])
    assert stored["meta"]["command"] == f"python benchmarks/training.py {arguments}"
    assert stored["meta"]["complete"] and stored["meta"]["settings"]["num_items"] == 32


# Attention


def test_attention_errors_are_those_of_the_formats():
    shape = attention_error.Shape(batch=1, heads=2, length=64, head_dim=32)
    rows = attention_error.measure(shape, "cpu")
    found = {(row["recipe"], row["tensor"]): row["worst_db"] for row in rows}
    assert len(found) == 4 * 5 and all(row["passed"] for row in rows)
    for name in training.QUANTIZED:
        assert found[name, "scores"] == pytest.approx(28.5, abs=1.0)
        assert all(found[name, t] < found["bf16", t] - 10 for t in attention_error.TENSORS)


def test_attention_against_torch():
    shape = attention_error.Shape(batch=2, heads=2, length=16, head_dim=8)
    inputs = [x.double() for x in attention_error.draw_inputs(shape, 0, "cpu")]
    results = attention_error.attend(inputs, torch.matmul, torch.matmul, torch.float64)
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    grads = torch.autograd.grad(out, (q, k, v), inputs[3])
    torch.testing.assert_close(results["out"], out.detach())
    for name, expected in zip(("grad_q", "grad_k", "grad_v"), grads):
        torch.testing.assert_close(results[name], expected)


# The suite `module`


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


POINT = module_suite.ModulePoint(64, 4)
QUICK = module_suite.Settings(rounds=2, warmup=1)
AS_IS = tuple(v for v in module_suite.VARIANTS if not v.is_tuned)


def measure(**options):
    rows = module_suite.measure_point(
        POINT, CountingClock(), QUICK, device="cpu", variants=AS_IS, **options
    )
    return {(row["variant"], row["pass"]): row for row in rows}


def test_module_suite_gates_and_times_every_pass(emulated):
    rows = measure()
    assert set(rows) == set(itertools.product((v.name for v in AS_IS), module_suite.PASSES))
    for (_, pass_name), row in rows.items():
        assert row["reason"] is None and row["ratio_to_bf16"] == 1.0 and row["samples"] == 2
        assert len(row["sqnr_db"]) == (3 if pass_name == "forward_backward" else 1)
        count = 3 if pass_name == "forward_backward" else 1
        assert row["tflops"] == pytest.approx(count * 2 * 4 * 64**3 / 1e-3 / 1e12)
    # What is saved is FP8: half of torch.bmm's BF16 operands, and two scales.
    assert rows["torch_bmm", "forward_backward"]["saved_bytes"] == 2 * 2 * 4 * 64 * 64
    assert 0.5 <= rows["ours_delayed", "forward_backward"]["saved_ratio"] <= 0.55
    json.dumps(list(rows.values()), allow_nan=False)


def test_module_suite_refuses_wrong_gradients(emulated, monkeypatch):
    class WrongGradient(teb.BatchedMatmul):
        def forward(self, a, b):
            y = super().forward(a, b)
            if y.requires_grad:
                y.register_hook(lambda g: g * 2)
            return y

    monkeypatch.setattr(teb, "BatchedMatmul", WrongGradient)
    rows = measure()
    row = rows["ours_current", "forward_backward"]
    assert row["median_ms"] is None and row["reason"].startswith("gradient of a: item ")
    assert rows["ours_current", "forward"]["median_ms"] == 1.0
    assert rows["torch_bmm", "forward_backward"]["median_ms"] == 1.0


def test_module_suite_does_not_run_lost_variants_again(emulated):
    rows = measure(lost={"ours_current": "the device stopped answering"})
    assert rows["ours_current", "forward"]["reason"] == "the device stopped answering"
    assert rows["ours_delayed", "forward"]["median_ms"] == 1.0


@pytest.mark.parametrize("case", module_suite.HOST_CASES, ids=lambda case: case.name)
def test_module_host_cases_run(case, emulated, monkeypatch):
    monkeypatch.setattr(module_suite, "HOST_POINT", module_suite.ModulePoint(32, 1))
    time_host = timing.time_host
    monkeypatch.setattr(
        timing, "time_host", lambda call, settle, chunks: time_host(call, settle, chunks, 2)
    )
    row = module_suite.measure_host(case, lambda: None, device="cpu", chunks=2)
    assert row["reason"] is None and row["median_us"] > 0 and row["calls"] == 4


def make_module_results(ratio):
    rows = []
    for point, variant, p in itertools.product(
        module_suite.POINTS, module_suite.VARIANTS, module_suite.PASSES
    ):
        row = module_suite.empty_row(point, variant, p)
        row.update(median_ms=2.0, ratio_to_bf16=ratio, sqnr_db=[28.4, 24.4, 24.4])
        row.update(saved_bytes=2**28, saved_ratio=0.5)
        rows.append(row)
    for case in module_suite.HOST_CASES:
        rows.append(
            dict(case=case.name, label=case.label, median_us=50.0, quartiles_us=None, reason=None)
        )
    meta = dict.fromkeys(
        "commit dirty gpu driver torch te cublaslt python date command complete".split(), "x"
    )
    return {"meta": meta, "rows": rows}


def test_module_goals_name_things_that_are_measured():
    for ratio, expected in ((1.4, {True}), (0.8, {True, False})):
        results = make_module_results(ratio)
        outcomes = goals.evaluate({"module": results}, goals.MODULE_GOALS)
        assert all(outcome.measured is not None for outcome in outcomes)
        assert {outcome.is_reached for outcome in outcomes} == expected
    assert "MISSED" in run.format_summary(None, None, results)
    results["rows"][2].update(median_ms=None, reason="ValueError: x")
    assert run.find_failures(None, None, results) == [
        "module B512_N512 ours_delayed: ValueError: x"
    ]


def test_module_tables_say_where_bf16_is_faster():
    block = render_docs.BLOCKS["module-verdict"]
    text = block({"module": make_module_results(0.8)})
    assert "faster at N=512 with delayed scaling (0.80x)" in text
    assert "At none of these sizes" in block({"module": make_module_results(1.4)})
    for name in ("module-goals", "module-step", "module-forward", "module-checks", "module-host"):
        assert render_docs.BLOCKS[name]({"module": make_module_results(1.4)}).startswith("| ")


def test_training_tables_and_plot(tmp_path):
    rows = [
        dict(recipe=name, seed=seed, final_loss=0.3, seconds=1.0, losses=[0.7, 0.5, 0.3])
        for name, seed in itertools.product(training.LABELS, range(2))
    ]
    meta = make_module_results(1.0)["meta"]
    stored_results.write(tmp_path / "training.json", meta, rows)
    result_plots.write_plots(tmp_path, tmp_path / "img")
    assert (tmp_path / "img" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert result_plots.find_stale_plots(tmp_path, tmp_path / "img") == []
    text = render_docs.BLOCKS["training"]({"training": {"meta": meta, "rows": rows}})
    assert "| MXFP8, emulated | 0.3000 | 0.3000 to 0.3000 | +0.00 % | within 2 % |" in text


# Several processes


def test_two_processes_on_the_cpu():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests" / "distributed" / "run_distributed.py"), "--device", "cpu"]
    # TE compiles its update of amaxes with torch.compile, which takes longer than all checks.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NVTE_TORCH_COMPILE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0 and "FAIL" not in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("PASS") == 18, done.stdout
