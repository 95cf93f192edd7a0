# SPDX-License-Identifier: Apache-2.0
"""The file of algorithm choices and the switch, without a GPU: nothing is timed here.

An algorithm is 64 opaque bytes to everything above the library, so any bytes serve.
"""

from __future__ import annotations

import json
import threading

import pytest

import transformer_engine_batched as teb
from transformer_engine_batched import autotuning
from transformer_engine_batched.native import to_native
from transformer_engine_batched.problem import Matrix, Problem

BINDING = {"gpu": "Test GPU", "cublaslt": 130100}


def make_problem(m=64, **changes):
    values = {
        "batch": 4,
        "m": m,
        "n": 32,
        "k": 128,
        "a": Matrix("e4m3", 128, m * 128, False, "tensor"),
        "b": Matrix("e5m2", 128, 32 * 128, True, "tensor"),
        "d": Matrix("bf16", 32, m * 32),
        **changes,
    }
    return Problem(**values)


def make_choice(byte=7):
    return {
        "algorithm": (bytes([byte]) * 64).hex(),
        "description": "Algorithm(id=66)",
        "rank_offered": 3,
        "microseconds": 10.5,
        "microseconds_of_first": 12.25,
        "microseconds_of_heuristic": 12.75,
    }


def store(problem, alignment=(256, 256, 256, 256), choice=None):
    autotuning._store(problem, alignment, to_native(problem), choice or make_choice())


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(autotuning, "_binding", lambda: dict(BINDING))
    teb.clear_choices()
    yield
    teb.clear_choices()


def test_choices_come_back_from_a_file(tmp_path):
    path = tmp_path / "choices.json"
    store(make_problem())
    store(make_problem(), alignment=(16, 16, 16, 256), choice=make_choice(8))
    store(make_problem(m=96, epilogue="gelu_bias", accumulate=True, sm_count=100))
    before = teb.list_choices()
    teb.save_choices(path)
    teb.clear_choices()
    assert teb.list_choices() == []
    assert teb.load_choices(path) == 3
    assert teb.list_choices() == before


def test_a_choice_is_listed_with_its_problem_and_times():
    store(make_problem())
    (entry,) = teb.list_choices()
    assert entry["problem"]["m"] == 64 and entry["problem"]["b"]["dtype"] == "e5m2"
    assert entry["alignment"] == [256] * 4
    assert entry["microseconds"] < entry["microseconds_of_first"]
    assert bytes.fromhex(entry["algorithm"]) == b"\7" * 64
    json.dumps(entry)


def test_file_format(tmp_path):
    path = tmp_path / "choices.json"
    store(make_problem())
    teb.save_choices(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) >= {"format", "gpu", "cublaslt", "choices"}
    assert content["gpu"] == "Test GPU" and content["cublaslt"] == 130100
    assert content["format"].startswith("transformer_engine_batched algorithm choices")
    assert list(tmp_path.iterdir()) == [path]  # nothing temporary stays


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("gpu", "Other GPU", "Other GPU.*but this process has.*Test GPU"),
        ("cublaslt", 130200, "130200.*but this process has.*130100"),
        ("format", "something else", "something else"),
    ],
)
def test_a_file_of_another_machine_is_refused(tmp_path, name, value, text):
    path = tmp_path / "choices.json"
    store(make_problem())
    teb.save_choices(path)
    teb.clear_choices()
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, name: value}), encoding="utf-8")
    before = path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=text) as caught:
        teb.load_choices(path)
    assert "not valid across GPU models and library versions" in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=text):
        with teb.autotune(path):
            raise AssertionError("the context was entered")
    assert teb.list_choices() == [] and not autotuning.is_active()
    assert path.read_text(encoding="utf-8") == before


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "choices.json"
    store(make_problem())
    teb.save_choices(path)
    teb.clear_choices()
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("07" * 64, "08" + "07" * 63), encoding="utf-8")
    with pytest.raises(ValueError, match="was changed or damaged.*tune again"):
        teb.load_choices(path)
    assert teb.list_choices() == []


def test_loading_keeps_what_the_process_has(tmp_path):
    path = tmp_path / "choices.json"
    store(make_problem())
    teb.save_choices(path)
    teb.clear_choices()
    store(make_problem(m=96), choice=make_choice(9))
    teb.load_choices(path)
    assert {entry["problem"]["m"] for entry in teb.list_choices()} == {64, 96}


def test_algorithm_of_a_wrong_size_is_refused():
    with pytest.raises(ValueError, match="a stored algorithm has 3 bytes, expected 64"):
        store(make_problem(), choice={**make_choice(), "algorithm": "000000"})
    assert teb.list_choices() == []


def test_a_stored_problem_is_checked():
    with pytest.raises(ValueError, match="leading dimension smaller than a row"):
        store(make_problem(a=Matrix("e4m3", 8, 64 * 128, False, "tensor")))


def test_context_reads_and_writes_its_file(tmp_path):
    path = tmp_path / "choices.json"
    with teb.autotune(path):
        assert autotuning.is_active()
        store(make_problem())
    assert not autotuning.is_active()
    teb.clear_choices()
    with teb.autotune(str(path)):
        assert len(teb.list_choices()) == 1
    assert json.loads(path.read_text(encoding="utf-8"))["choices"]


def test_context_without_a_file_writes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with teb.autotune():
        store(make_problem())
    assert len(teb.list_choices()) == 1 and list(tmp_path.iterdir()) == []


def test_context_ends_with_an_error():
    with pytest.raises(KeyError):
        with teb.autotune():
            raise KeyError
    assert not autotuning.is_active()


def test_switch_is_that_of_its_thread():
    seen = []
    with teb.autotune():
        thread = threading.Thread(target=lambda: seen.append(autotuning.is_active()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_a_known_problem_is_not_tuned_again():
    problem = make_problem()
    store(problem, alignment=(16, 32, 64, 256))
    # Would need a GPU if it did anything.
    autotuning.tune(problem, to_native(problem), (16, 32, 64, 0, 0, 0, 0, 0), None, 1.0, 0.0)
