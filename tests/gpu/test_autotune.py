# SPDX-License-Identifier: Apache-2.0
"""Algorithm choice: timed on real operands, kept, saved, loaded, refused across library versions."""

from __future__ import annotations

import json

import pytest
import torch
from accuracy import sqnr_per_item
from products import dequantize, make_quantizer, multiply, random_operands

import transformer_engine_batched as teb
from transformer_engine_batched import _C
from transformer_engine_batched.native import to_native
from transformer_engine_batched.plan import WORKSPACE_LIMIT_BYTES
from transformer_engine_batched.problem import Matrix, Problem


@pytest.fixture(autouse=True)
def no_choices():
    """Each test starts and ends without choices."""
    teb.clear_choices()
    yield
    teb.clear_choices()


def operands(m=512):
    a, b = random_operands("TN", 8, m, 256, 256)
    a, b = make_quantizer("current")(a), make_quantizer("current")(b)
    return a, b, multiply(dequantize(a), dequantize(b), "TN")


def test_choices_are_kept_saved_and_loaded(tmp_path):
    a, b, expected = operands()
    path = tmp_path / "choices.json"
    with teb.autotune(path):
        out = teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16)
    assert sqnr_per_item(out, expected).min() > 50
    (choice,) = teb.list_choices()
    assert choice["microseconds"] <= choice["microseconds_of_first"]
    teb.clear_choices()
    assert teb.list_choices() == []
    assert teb.load_choices(path) == 1
    assert teb.list_choices() == [choice]
    again = teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16)
    assert torch.equal(again, out)


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="Hopper's algorithms")
def test_fast_accumulation_takes_the_tiles_that_were_measured():
    """Not the heuristic's first choice: benchmarks/algorithms.py."""
    a, b = (torch.randn(8, 2048, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a, b = make_quantizer("current")(a), make_quantizer("current")(b)
    with teb.autotune():
        teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16)
        teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16, use_split_accumulator=True)
    fast, split = teb.list_choices()
    assert fast["microseconds_of_first"] < 0.97 * fast["microseconds_of_heuristic"]
    assert split["microseconds_of_first"] == split["microseconds_of_heuristic"]


def test_single_call_argument():
    a, b, _ = operands(528)
    teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16)
    assert teb.list_choices() == []
    teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16, autotune=True)
    assert len(teb.list_choices()) == 1
    with teb.autotune():
        teb.batched_general_gemm(a, b, out_dtype=torch.float32, autotune=False)
    assert len(teb.list_choices()) == 1


def test_accumulation_is_not_repeated():
    a, b, expected = operands()
    out = torch.ones(8, 512, 256, device="cuda")
    with teb.autotune():
        teb.batched_general_gemm(a, b, out=out, accumulate=True, use_split_accumulator=True)
    assert sqnr_per_item(out, expected + 1.0).min() > 70


def test_capture_of_an_unknown_problem_is_refused():
    a, b, _ = operands(544)
    out = torch.empty(8, 544, 256, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"):
        with torch.cuda.graph(graph), teb.autotune():
            teb.batched_general_gemm(a, b, out=out)
    with teb.autotune():
        teb.batched_general_gemm(a, b, out=out)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), teb.autotune():
        teb.batched_general_gemm(a, b, out=out)


def test_a_file_of_another_library_is_refused(tmp_path):
    a, b, _ = operands()
    path = tmp_path / "choices.json"
    with teb.autotune(path):
        teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16)
    content = json.loads(path.read_text())
    content["cublaslt"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not valid across GPU models and library versions"):
        teb.load_choices(path)


def test_a_damaged_file_is_refused(tmp_path):
    a, b, _ = operands()
    path = tmp_path / "choices.json"
    with teb.autotune(path):
        teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16)
    content = json.loads(path.read_text())
    content["choices"][0]["algorithm"] = "ff" * (len(content["choices"][0]["algorithm"]) // 2)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="changed or damaged"):
        teb.load_choices(path)


def test_an_algorithm_of_another_problem_is_refused(tmp_path):
    a, b, _ = operands()
    with teb.autotune():
        teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16)
    (choice,) = teb.list_choices()
    plain = torch.randn(2, 32, 32, device="cuda")
    problem = Problem(
        *(2, 32, 32, 32), *(Matrix("fp32", 32, 1024, False), Matrix("fp32", 32, 1024, True)),
        d=Matrix("fp32", 32, 1024), workspace_limit=WORKSPACE_LIMIT_BYTES,
    )  # fmt: skip
    alignment = _C.alignment_of(_C.Pointers(*[plain.data_ptr()] * 3, 0, 0, 0, 0, 0))
    _C.store_choice(to_native(problem), alignment, bytes.fromhex(choice["algorithm"]))
    with pytest.raises(teb.UnsupportedError, match="stored autotuned algorithm"):
        teb.batched_general_gemm(plain, plain.clone())
