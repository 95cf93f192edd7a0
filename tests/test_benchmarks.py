# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness without a GPU: gate, schedule, results, restart after a lost device,
documents.

Clocks and devices are stand-ins; the products are real and run on the CPU. Must not need the C++
layer.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gate, gemm_suite, goals, host_suite, peers, result_plots, run
from benchmarks import stored_results, timing
from benchmarks.points import OTHER, QUICK, SQUARE, Point, make_operands

spec = importlib.util.spec_from_file_location("render_docs", ROOT / "tools" / "render_docs.py")
render_docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render_docs)


class StoredCodes:
    """Stands in for a TE Float8 tensor: E4M3 codes with one scale."""

    def __init__(self, x: torch.Tensor) -> None:
        scale_inv = (x.abs().amax().float() / 448).reshape(1)
        codes = (x.float() / scale_inv).to(torch.float8_e4m3fn).view(torch.uint8)
        self.stored = {"data": codes, "fp8_scale_inv": scale_inv}

    def get_metadata(self):
        return self.stored


class StandInClock:
    """Each timed call takes the milliseconds that `durations` has for it; remembers the order."""

    def __init__(self, durations=None):
        self.durations = durations or {}
        self.is_lost = False
        self.current = None
        self.order = []

    def name(self, call):
        """Tell the clock which call runs."""
        self.current = call

    def start(self):
        return {}

    def stop(self, token):
        token["name"] = self.current
        self.order.append(self.current)

    def read_ms(self, token):
        duration = self.durations[token["name"]]
        return next(duration) if hasattr(duration, "__next__") else duration

    def settle(self):
        if self.is_lost:
            raise RuntimeError("CUDA error: unspecified launch failure")


def make_reference(batch=4, rows=32, k=64):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(batch, rows, k, generator=generator)
    right = torch.randn(batch, rows, k, generator=generator)
    return left, right, gate.multiply_exactly(left, right)


# The gate


def test_gate_passes_rounding_to_bf16():
    _, _, exact = make_reference()
    verdict = gate.judge(exact.to(torch.bfloat16), exact, gate.MINIMUM_DB["split"])
    assert verdict.passed and 54 < verdict.sqnr_db < 58


@pytest.mark.parametrize("accumulation", ["split", "fast"])
@pytest.mark.parametrize(
    "plant",
    [
        lambda out: out * 2,
        lambda out: out[[1, 0, *range(2, len(out))]],
        lambda out: torch.cat([out[:-1], torch.zeros_like(out[-1:])]),
        lambda out: out.index_fill(0, torch.tensor([2]), torch.nan),
        lambda out: -out,
        lambda out: out[:, :-1],
    ],
    ids=["factor two", "exchanged items", "zeroed item", "unwritten item", "sign", "shape"],
)
def test_gate_catches_planted_bugs(plant, accumulation):
    _, _, exact = make_reference(batch=64)
    out = plant(exact.to(torch.bfloat16))
    verdict = gate.judge(out, exact, gate.MINIMUM_DB[accumulation])
    assert not verdict.passed and verdict.reason


def test_gate_catches_a_dropped_k_tile_at_the_largest_k():
    left, right, exact = make_reference(batch=1, rows=64, k=8192)
    short = gate.multiply_exactly(left[..., 128:], right[..., 128:])
    assert not gate.judge(short, exact, gate.MINIMUM_DB["fast"]).passed


def test_gate_names_the_worst_item():
    _, _, exact = make_reference(batch=8)
    out = exact.clone()
    out[5] *= 1.01
    verdict = gate.judge(out, exact, 50)
    assert verdict.worst_item == 5 and verdict.sqnr_db == 40.0
    assert verdict.reason == "item 5 has 40.0 dB against FP64, the gate is 50 dB"


def test_reference_is_the_product_of_codes_times_scale():
    x = make_operands(Point(2, 16, 24, 32), 0, "cpu", StoredCodes)
    codes = x.left_fp8.stored["data"].view(torch.float8_e4m3fn).double()
    decoded = codes * x.left_fp8.stored["fp8_scale_inv"].double()
    assert torch.equal(gate.dequantize_exactly(x.left_fp8), decoded)
    # The format's own error, 28.5 dB on normal data, is not in the reference.
    db = gate.measure_sqnr(gate.multiply_exactly(x.left_fp8, x.right_fp8), x.left @ x.right.mT)
    assert 20 < float(db.min()) < 40


# The schedule


def test_takes_part_gives_exactly_the_wanted_rounds():
    for rounds, wanted in itertools.product(range(1, 26), range(0, 26)):
        part = [timing.takes_part(i, rounds, min(wanted, rounds)) for i in range(rounds)]
        assert sum(part) == min(wanted, rounds)


def test_interleave_runs_every_call_in_every_round():
    clock = StandInClock({"a": 1.0, "b": iter([5.0, 1.0, 2.0] * 2), "c": 3.0})
    numbers = []
    calls = {name: (lambda i, n=name: clock.name(n)) for name in "abc"}
    calls["a"] = lambda i: (clock.name("a"), numbers.append(i))
    samples = timing.interleave(calls, clock, rounds=6, warmup=2)
    rounds = [tuple(clock.order[i : i + 3]) for i in range(0, 18, 3)]
    assert [sorted(names) for names in rounds] == [list("abc")] * 6
    assert len(set(rounds)) > 1
    assert numbers == list(range(8))
    assert samples["b"].median == 2.0 and samples["b"].quartiles == (1.25, 4.25)


def test_interleave_spares_costly_calls():
    clock = StandInClock({"a": 1.0, "loop": 9.0})
    calls = {name: (lambda i, n=name: clock.name(n)) for name in ("a", "loop")}
    samples = timing.interleave(calls, clock, rounds=20, warmup=5, wanted={"loop": 3})
    assert len(samples["a"].values) == 20 and len(samples["loop"].values) == 3


def test_a_failing_call_keeps_the_others():
    clock = StandInClock({"good": 1.0, "bad": 1.0})

    def fail_later(i):
        clock.name("bad")
        if i == 4:
            raise ValueError("no kernel\nsecond line")

    calls = {"bad": fail_later, "good": lambda i: clock.name("good")}
    samples = timing.interleave(calls, clock, rounds=6, warmup=1)
    assert samples["bad"].reason == "ValueError: no kernel" and samples["bad"].median is None
    assert len(samples["good"].values) == 6


def test_a_lost_device_is_told_apart_from_an_error():
    clock = StandInClock({"bad": 1.0})

    def break_device(i):
        clock.is_lost = True
        raise RuntimeError("illegal memory access")

    with pytest.raises(timing.DeviceLostError, match="illegal memory access") as caught:
        timing.interleave({"bad": break_device}, clock, rounds=2, warmup=0)
    assert caught.value.call == "bad"


def make_nanosecond_clock(step):
    ticks = itertools.count(0, step)
    return lambda: next(ticks)


def test_host_time_is_the_median_of_single_calls():
    result = timing.time_host(
        lambda: None, lambda: None, chunks=3, calls_per_chunk=10, now_ns=make_nanosecond_clock(7000)
    )
    assert result.per_call.median == 7.0 and len(result.per_call.values) == 30


def test_host_time_is_refused_when_the_device_was_the_limit():
    now = SimpleNamespace(ns=0)

    def advance(by):
        now.ns += by

    result = timing.time_host(
        lambda: advance(5000), lambda: advance(400_000), 3, 100, now_ns=lambda: now.ns
    )
    assert result.per_call.median is None and "its speed was measured" in result.per_call.reason


# A whole point on the CPU


SMALL = Point(3, 32, 48, 64)


def clocked(variant, clock):
    """The variant, telling the clock its name at each call."""

    def prepare(sets, out):
        call = variant.prepare(sets, out)

        def named(i):
            clock.name(variant.name)
            return call(i)

        return named

    return peers.Variant(**{**vars(variant), "prepare": prepare})


def find_variant(name):
    return next(v for v in peers.VARIANTS if v.name == name)


def decoded_variant(name, factor=1.0, order=slice(None), is_tuned=False):
    """Stands in for ours: the exact product, with planted bugs on request."""

    def prepare(sets, out):
        def call(i):
            x = sets[i % len(sets)]
            return out.copy_(gate.multiply_exactly(x.left_fp8, x.right_fp8)[order] * factor)

        return call

    return peers.Variant(name, name, "split", prepare, is_tuned=is_tuned, on_every_point=True)


def raise_on_prepare(sets, out):
    raise FileNotFoundError("no such file: /home/someone/lib/kernels/gemm.so")


def measure(variants, durations, point=SMALL, **options):
    clock = StandInClock(durations)
    variants = [clocked(v, clock) for v in variants]
    rows = gemm_suite.measure_point(
        point,
        variants,
        clock,
        gemm_suite.Settings(rounds=5, warmup=1),
        device="cpu",
        quantize=StoredCodes,
        l2_bytes=30_000,
        **options,
    )
    return {row["variant"]: row for row in rows}, clock


def test_a_point_times_the_right_and_refuses_the_wrong():
    rows, clock = measure(
        [
            find_variant("torch_bmm"),
            find_variant("scaled_mm_loop"),
            peers.Variant("te_loop", "te", "split", decoded_variant("te_loop").prepare),
            decoded_variant("ours_split"),
            decoded_variant("wrong_scale", factor=2.0),
            decoded_variant("swapped", order=[1, 0, 2]),
            peers.Variant("broken", "broken", "split", raise_on_prepare),
            decoded_variant("ours_split_tuned", is_tuned=True),
        ],
        {
            "torch_bmm": iter([4.0] * 5 + [5.0] * 5),
            "scaled_mm_loop": 8.0,
            "te_loop": 6.0,
            "ours_split": 2.0,
            "ours_split_tuned": 2.0,
        },
    )
    assert rows["ours_split"]["median_ms"] == 2.0
    assert rows["ours_split"]["tflops"] == pytest.approx(SMALL.flops / 2e-3 / 1e12)
    assert rows["ours_split"]["ratio_to_bf16"] == 2.0
    assert rows["ours_split"]["ratio_to_te_loop"] == 3.0
    assert rows["scaled_mm_loop"]["ratio_to_bf16"] == 0.5
    # Tuned variants are compared with the baseline measured beside them.
    assert rows["ours_split_tuned"]["ratio_to_bf16"] == 2.5
    assert rows["torch_bmm"]["median_ms"] == 4.0 and rows["torch_bmm"]["repeat_ms"] == 5.0
    for name in ("wrong_scale", "swapped"):
        assert rows[name]["median_ms"] is None and "the gate is 50 dB" in rows[name]["reason"]
        assert name not in clock.order
    assert rows["broken"]["reason"] == "FileNotFoundError: no such file: gemm.so"
    assert rows["torch_bmm"]["sqnr_db"] > 50 and rows["scaled_mm_loop"]["sqnr_db"] > 50
    json.dumps(list(rows.values()), allow_nan=False)


def test_ragged_points_run_ours_and_the_baseline_only():
    names = [v.name for v in gemm_suite.select_variants(OTHER[0], peers.VARIANTS)]
    ours = ["ours_split", "ours_fast", "ours_split_tuned", "ours_fast_tuned"]
    assert names == ["torch_bmm", *ours]


def test_a_failing_quantizer_gives_every_row_its_reason():
    def refuse(x):
        raise ValueError("sizes must be multiples of 16")

    rows = gemm_suite.measure_point(
        SMALL,
        peers.VARIANTS,
        StandInClock(),
        gemm_suite.Settings(),
        device="cpu",
        quantize=refuse,
    )
    assert {row["reason"] for row in rows} == {"ValueError: sizes must be multiples of 16"}
    assert len(rows) == len(peers.VARIANTS)


def test_inputs_rotate_past_the_cache():
    point = Point(32, 2048, 2048, 128)
    l2_bytes = 60 << 20
    assert point.count_sets(l2_bytes) * 32 * (2048 + 2048) * 128 >= 2 * l2_bytes
    assert SQUARE[-1].count_sets(l2_bytes) == 1


def test_host_case_that_fails_has_its_reason():
    def refuse(operands, out):
        raise AttributeError("no attribute 'prepare_raw_launch'")

    row = host_suite.measure_case(
        host_suite.Case("x", "x", refuse), None, None, settle=lambda: None
    )
    assert row["median_us"] is None and "prepare_raw_launch" in row["reason"]


# Stored results


META = {
    "commit": "0123456789abcdef",
    "dirty": False,
    "gpu": "NVIDIA H200",
    "driver": "580.159",
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "te": "2.20.2",
    "cublaslt": "13.1.0",
    "python": "3.12.1",
    "date": "2026-11-21",
    "command": "python benchmarks/run.py",
}


def run_points(path, points, measure_one, is_resumed=False):
    names = lambda point: ["torch_bmm", "ours_split"]  # noqa: E731
    return run.run_suite(path, META, points, measure_one, names, is_resumed)


def test_results_are_written_after_each_point(tmp_path):
    path = tmp_path / "gemm.json"

    def measure_one(point, lost):
        if point is QUICK[1]:
            raise KeyboardInterrupt
        return [{"point": point.name}]

    with pytest.raises(KeyboardInterrupt):
        run_points(path, QUICK, measure_one)
    stored = stored_results.read(path)
    assert stored["rows"] == [{"point": QUICK[0].name}] and stored["meta"]["complete"] is False
    assert [p.name for p in tmp_path.iterdir()] == ["gemm.json"]


def test_a_new_process_goes_on_without_the_call_that_broke_the_device(tmp_path):
    path = tmp_path / "gemm.json"
    asked = []

    def measure_one(point, lost):
        asked.append((point.name, dict(lost)))
        if point is QUICK[1] and "ours_split" not in lost:
            raise timing.DeviceLostError("ours_split", "illegal memory access")
        return [{"point": point.name, "lost": sorted(lost)}]

    with pytest.raises(timing.DeviceLostError):
        run_points(path, QUICK, measure_one)
    stored = run_points(path, QUICK, measure_one, is_resumed=True)
    assert [row["point"] for row in stored["rows"]] == [p.name for p in QUICK]
    assert [row["lost"] for row in stored["rows"]] == [[], ["ours_split"], []]
    assert [name for name, _ in asked].count(QUICK[0].name) == 1
    assert "illegal memory access" in asked[2][1]["ours_split"]
    assert stored["meta"]["complete"] is True


def test_an_unattributed_loss_gives_up_the_point(tmp_path):
    def measure_one(point, lost):
        if not lost:
            raise timing.DeviceLostError(None, "launch failure")
        return [{"point": point.name, "lost": sorted(lost)}]

    with pytest.raises(timing.DeviceLostError):
        run_points(tmp_path / "gemm.json", QUICK[:1], measure_one)
    stored = run_points(tmp_path / "gemm.json", QUICK[:1], measure_one, is_resumed=True)
    assert stored["rows"][0]["lost"] == ["ours_split", "torch_bmm"]


def test_a_lost_variant_is_not_run_again():
    durations = {"torch_bmm": 1.0, "ours_split": 1.0}
    variants = [find_variant("torch_bmm"), decoded_variant("ours_split")]
    rows, clock = measure(variants, durations, lost={"ours_split": "the device stopped answering"})
    assert rows["ours_split"]["reason"] == "the device stopped answering"
    assert rows["ours_split"]["median_ms"] is None and "ours_split" not in clock.order


def test_stored_command_names_no_place_on_the_machine():
    words = "--suite gemm --out /data/x --quick --commit=abc --resume".split()
    command = stored_results.describe_command(words)
    assert command == "python benchmarks/run.py --suite gemm --quick"


def test_given_commit_wins():
    assert stored_results.find_commit("abc-dirty") == ("abc", True)
    assert stored_results.find_commit("abc") == ("abc", False)


def test_folder_is_named_after_the_gpu():
    assert run.choose_folder("NVIDIA H200", False) == ROOT / "benchmarks" / "results" / "h200"
    assert run.choose_folder("NVIDIA H200", True).name == "h200-quick"


# Made-up results -> goals, summary, documents


def make_gemm_results(scale=1.0, missing=()):
    rows = []
    for point, variant in itertools.product((*SQUARE, *OTHER), peers.VARIANTS):
        if variant not in gemm_suite.select_variants(point, peers.VARIANTS):
            continue
        row = gemm_suite.empty_row(point, variant)
        if variant.name in missing:
            row["reason"] = "RuntimeError: too many groups"
        else:
            rate = scale * (400 if variant.name == "torch_bmm" else 700)
            ms = point.flops / rate / 1e9
            row.update(median_ms=ms, tflops=rate, sqnr_db=54.9, baseline_ms=ms * rate / 400)
            row.update(ratio_to_bf16=rate / 400, ratio_to_te_loop=2.0, samples=25)
        rows.append(row)
    return {"meta": {**META, "complete": True}, "rows": rows}


def make_host_results(us=12.0):
    rows = [
        dict(case=c.name, label=c.label, median_us=us, quartiles_us=[us, us], reason=None)
        for c in host_suite.CASES
    ]
    return {"meta": {**META, "complete": True}, "rows": rows}


def test_goals_name_things_that_are_measured():
    gemm, host = make_gemm_results(), make_host_results()
    outcomes = goals.evaluate({"gemm": gemm, "host": host})
    assert all(outcome.measured is not None for outcome in outcomes)
    verdicts = {o.goal.text: o.is_reached for o in outcomes}
    assert verdicts["split accumulation over torch.bmm BF16, N=2048, B=32"] is True
    assert verdicts["split accumulation over a loop of `general_gemm`, N=512, B=512"] is False
    assert verdicts["host time of a warm call, TE Float8 operands"] is True
    assert verdicts["host time of the C++ layer"] is False
    assert {o.is_reached for o in goals.evaluate({})} == {None}


def test_summary_and_failures():
    gemm = make_gemm_results(missing=("ours_fast", "te_grouped"))
    summary = run.format_summary(gemm, make_host_results())
    assert "too many groups" in summary and "MISSED" in summary
    failures = run.find_failures(gemm, None)
    assert len(failures) == len(SQUARE) + len(OTHER)
    assert all("ours_fast: RuntimeError" in failure for failure in failures)


DOCUMENT = "# T\n\n" + "\n".join(
    f"<!-- generated: {name} -->\n<!-- end -->\n"
    for name in render_docs.BLOCKS
    if name != "support"
)


@pytest.fixture
def project(tmp_path):
    """A folder with documents that have every block, and a function that stores results."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(DOCUMENT, encoding="utf-8")
    (tmp_path / "docs" / "performance.md").write_text(DOCUMENT, encoding="utf-8")

    def store(**results):
        for suite, content in results.items():
            path = tmp_path / "benchmarks" / "results" / "h200" / f"{suite}.json"
            stored_results.write(path, content["meta"], content["rows"])

    return SimpleNamespace(root=tmp_path, store=store)


def test_documents_without_results_say_so(project):
    render_docs.render(project.root, is_check=False)
    text = (project.root / "README.md").read_text(encoding="utf-8")
    assert text.count("Not measured yet") == len(render_docs.BLOCKS) - 2
    assert render_docs.render(project.root, is_check=True) == []


def test_documents_show_the_stored_results(project):
    project.store(gemm=make_gemm_results(missing=("te_grouped",)), host=make_host_results())
    render_docs.render(project.root, is_check=False)
    text = (project.root / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "| 2048 | 32 | 400 | 700 (1.75x) |" in text
    assert "TE 2.20.2" not in text and "Transformer Engine 2.20.2" in text
    for part in ("NVIDIA H200", "cuBLASLt 13.1.0", "commit 0123456789ab,", "run.py`"):
        assert part in text
    assert "no time for TE `general_grouped_gemm` at N=128, B=4096; N=256" in text
    assert "too many groups" in text and "| 12.0 |" in text and "reached" in text
    for name in result_plots.PLOTS:
        assert (project.root / "docs" / "img" / name).read_bytes().startswith(b"\x89PNG")
    assert render_docs.render(project.root, is_check=True) == []


def test_check_sees_changed_results_and_changed_text(project):
    project.store(gemm=make_gemm_results(), host=make_host_results())
    render_docs.render(project.root, is_check=False)
    project.store(host=make_host_results(us=13.0))
    assert render_docs.render(project.root, is_check=True) == [
        f"{name}: block {block!r} differs"
        for name in ("README.md", "docs/performance.md")
        for block in ("goals", "host")
    ]
    project.store(host=make_host_results())
    readme = project.root / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("(1.75x)", "(1.95x)", 1), "utf-8")
    problems = render_docs.render(project.root, is_check=True)
    assert len(problems) == 1 and problems[0].startswith("README.md: block 'gemm-")


def test_check_sees_missing_and_stale_plots(project):
    project.store(gemm=make_gemm_results())
    render_docs.render(project.root, is_check=False)
    (project.root / "docs" / "img" / "gemm_tflops.png").unlink()
    assert render_docs.render(project.root, is_check=True) == [
        "docs/img/gemm_tflops.png: missing, but there are results to draw"
    ]
    project.store(gemm=make_gemm_results(scale=1.1))
    problems = render_docs.render(project.root, is_check=True)
    assert "docs/img/gemm_speedup.png: drawn from other results than the stored ones" in problems


def test_bad_markers_are_refused(project):
    with pytest.raises(ValueError, match="unknown generated block 'nonsense'"):
        render_docs.render_text("<!-- generated: nonsense -->\n<!-- end -->", {}, "README.md")
    with pytest.raises(ValueError, match="README.md: a `<!-- generated: NAME -->` has no"):
        render_docs.render_text("<!-- generated: host -->\n", {"host": None}, "README.md")


def test_each_point_begins_without_what_was_tuned_before(tmp_path):
    events = []
    run.run_suite(
        tmp_path / "gemm.json", META, QUICK, lambda point, lost: events.append(point.name) or [],
        lambda point: [], False, forget=lambda: events.append("forget"),
    )  # fmt: skip
    assert events == [word for point in QUICK for word in ("forget", point.name)]


def test_the_headline_of_the_triangle():
    def row(size, mode, variant, ratio, **values):
        return {
            "size": size, "mode": mode, "variant": variant, "pass": "forward", "median_ms": 2.0,
            "ratio_to_cuequivariance": ratio, **values,
        }  # fmt: skip

    rows = [
        row(512, "outgoing", "ours_delayed", 1.25),
        row(512, "incoming", "ours_delayed", 9.0),
        row(512, "outgoing", "cuequivariance", 1.0),
        row(256, "outgoing", "ours_delayed", None, median_ms=None),
    ]
    text = render_docs.BLOCKS["triangle-headline"]({"triangle": {"meta": META, "rows": rows}})
    assert [line for line in text.splitlines() if line[:3] in ("| 2", "| 5")] == [
        "| 256 | - | - | - | - | - | - |",
        "| 512 | - | 2.000 | 2.000 (1.25x) | - | - | - |",
    ]


def test_the_table_of_triangle_kernels():
    def row(n, kernel, tile=None, **values):
        return {"n": n, "kernel": kernel, "tile": tile, "reason": None, **values}

    rate = {"ms": 2.0, "gbps": 2000.4, "tflops": 300.0, "roof": 0.456}
    rows = [
        row(1024, "output", **rate),
        row(1024, "output", [64, 64], **rate),
        row(512, "turn", **rate),
        row(2048, "output, CUDA"),
    ]
    meta = {**META, "gbps_copy": 4251.7}
    text = render_docs.BLOCKS["triangle-kernels"](
        {"triangle_kernels": {"meta": meta, "rows": rows}}
    )
    lines = text.splitlines()
    assert lines[2] == "| output | 2.000 | 2000 | 300 | 46% | - | - | - | - |"
    assert lines[3] == "| output, CUDA | - | - | - | - | - | - | - | - |"
    assert len([line for line in lines if line.startswith("|")]) == 4
    assert "4252 GB/s" in text


def test_the_table_of_algorithms():
    row = {
        "batch": 8,
        "m": 256,
        "n": 128,
        "k": 64,
        "fastest": "Algorithm(id=66)",
        "fastest_us": 10.0,
    }
    rows = [
        {**row, "accumulation": "split", "taken_us": 11.0, "heuristic_us": 11.0},
        {**row, "accumulation": "fast", "taken_us": 10.0, "heuristic_us": 12.5},
    ]
    text = render_docs.BLOCKS["algorithms"]({"algorithms": {"meta": META, "rows": rows}})
    assert "| 256 x 128 x 64 | 8 | 10.0 | 1.00 | 1.25 | 10.0 | 1.10 | 1.10 |" in text
