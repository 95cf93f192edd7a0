# SPDX-License-Identifier: Apache-2.0
"""Suite `blockwise` without a GPU: points, gate, ratios, and its table, with products by the reference."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

import render_docs  # noqa: E402

from benchmarks import blockwise_suite, goals, result_tables, run  # noqa: E402
from benchmarks.blockwise_suite import BlockwisePoint, measure_point  # noqa: E402


class Clock:
    """Each call takes a millisecond."""

    def start(self):
        return None

    def stop(self, token):
        pass

    def read_ms(self, token):
        return 1.0

    def settle(self):
        pass


def prepare_exact(operands, out):
    rows = [out.shape[1]] * len(out) if operands.masked_m is None else operands.masked_m.tolist()

    def call(_):
        for item, count in enumerate(rows):
            exact = blockwise_suite.multiply_exactly(operands, item, count)
            out[item, :count] = exact.to(out.dtype)

    return call


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    prepare = dict.fromkeys(blockwise_suite._PREPARE, prepare_exact)
    monkeypatch.setattr(blockwise_suite, "_PREPARE", prepare)


def measure(point, all_rows_ms=None, lost=None):
    rows = measure_point(
        point, Clock(), 3, lost or {}, {} if all_rows_ms is None else all_rows_ms, "cpu"
    )
    return {row["variant"]: row for row in rows}


@pytest.mark.parametrize("b_rows", [1, 128])
def test_rows(b_rows):
    point = BlockwisePoint(4, 64, 200, 256, b_rows=b_rows)
    rows = measure(point)
    assert list(rows) == ["ours", "triton", "cublaslt_loop"]
    for row in rows.values():
        assert row["reason"] is None and row["sqnr_db"] > 50
        assert (row["median_ms"], row["samples"]) == (1.0, 3)
        assert row["tflops"] == pytest.approx(2 * 4 * 64 * 200 * 256 / 1e-3 / 1e12)


def test_deep_gemm_takes_part_where_it_can(monkeypatch):
    def names(*sizes, **options):
        return blockwise_suite.name_calls(BlockwisePoint(4, *sizes, **options))

    monkeypatch.setattr(blockwise_suite.importlib.util, "find_spec", lambda name: name)
    assert names(64, 64, 64) == [*blockwise_suite.LABELS]
    assert names(64, 64, 64, mask="half") == ["ours", "triton", "deep_gemm"]
    assert "deep_gemm" not in names(64, 64, 64, b_rows=1) + names(64, 64, 128)
    assert measure(BlockwisePoint(2, 64, 64, 64))["deep_gemm"]["median_ms"] == 1.0
    monkeypatch.setattr(blockwise_suite.importlib.util, "find_spec", lambda name: None)
    assert names(64, 64, 64) == ["ours", "triton", "cublaslt_loop"]


def test_no_code_is_nan():
    """Normal data reaches beyond what E4M3 holds, once in many millions."""
    generator = torch.Generator().manual_seed(0)
    with mock.patch.object(
        torch, "randn", lambda size, **_: torch.linspace(-7, 7, size[1]).expand(size).clone()
    ):
        codes = blockwise_suite._make_codes(2, 3, 512, generator)
    assert float(codes.float().max()) == 448.0 and not bool(codes.float().isnan().any())


def test_time_is_put_beside_that_of_all_rows():
    times = {}
    assert measure(BlockwisePoint(4, 64, 128, 256, mask="all"), times)["ours"]["sqnr_db"] > 50
    for mask in ("half", "every_other"):
        rows = measure(BlockwisePoint(4, 64, 128, 256, mask=mask), times)
        assert "cublaslt_loop" not in rows
        # The same time for half the rows.
        assert rows["ours"]["ratio_to_all_rows"] == 2.0
        assert rows["ours"]["tflops"] == pytest.approx(4 * 64 * 128 * 256 / 1e-3 / 1e12)


def _scale_twice(out):
    out[-1] *= 2


def _write_past_the_mask(out):
    out[0, -1] = 0


@pytest.mark.parametrize(
    "fault, mask, match",
    [
        (_scale_twice, "none", "item 3 has .* dB"),
        (_write_past_the_mask, "half", "item 0: rows past the mask were written"),
    ],
)
def test_the_gate_refuses(fault, mask, match, monkeypatch):
    def prepare(operands, out):
        call = prepare_exact(operands, out)
        return lambda index: (call(index), fault(out))

    monkeypatch.setitem(blockwise_suite._PREPARE, "ours", prepare)
    rows = measure(BlockwisePoint(4, 64, 128, 256, mask=mask))
    assert rows["ours"]["median_ms"] is None
    assert re.search(match, rows["ours"]["reason"])
    assert rows["triton"]["median_ms"] == 1.0
    found = {"rows": list(rows.values())}
    assert len(blockwise_suite.find_failures(found)) == 1


def test_calls_that_lost_the_device_do_not_run_again(monkeypatch):
    monkeypatch.setitem(blockwise_suite._PREPARE, "ours", lambda *_: pytest.fail("was run"))
    rows = measure(BlockwisePoint(2, 16, 16, 128), lost={"ours": "it hung"})
    assert rows["ours"]["reason"] == "it hung"


def test_points_and_goals_agree():
    names = [point.name for point in blockwise_suite.POINTS]
    assert len(set(names)) == len(names) and set(blockwise_suite.QUICK) <= set(
        blockwise_suite.POINTS
    )
    for goal in goals.BLOCKWISE_GOALS:
        wanted = [(name, value) for name, value in goal.row if name != "variant"]
        found = [
            x for x in blockwise_suite.POINTS if all(getattr(x, n) == value for n, value in wanted)
        ]
        assert len(found) == 1, goal
    assert "blockwise" in run.POINT_SUITES


def test_table(monkeypatch):
    rows = [*measure(BlockwisePoint(4, 64, 128, 256)).values()]
    monkeypatch.setattr(result_tables, "format_caption", lambda meta: "caption")
    table = render_docs.BLOCKS["blockwise"]({"blockwise": {"rows": rows, "meta": {}}})
    assert "| 4 | 64 x 128 x 256 | 1x128 x 128x128 | no mask |" in table
    assert "make gpu-bench" in render_docs.BLOCKS["blockwise"]({"blockwise": None})
    assert "ours" in "\n".join(blockwise_suite.format_rows({"rows": rows}))
