# SPDX-License-Identifier: Apache-2.0
"""Algorithm choice by timing: `autotune()` and the file of choices.

cuBLASLt's heuristic offers up to eight algorithms. Untuned, its first is taken, or for fast accumulation the one
that was found to be fastest for most sizes (csrc/plan.cpp); neither is always the best. Here they are timed on the
operands of a real call, and the best is kept for that problem, address alignment, GPU and library version. Must not import TE.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager
from contextvars import ContextVar
from statistics import median
from typing import Iterator, Union

import torch

from . import _C
from .native import problem_from_dict, problem_to_dict, to_native
from .problem import Problem

_FILE_FORMAT = "transformer_engine_batched algorithm choices, 1"
# One timed sample should be long against the resolution of CUDA events (about 0.5 microseconds) and the
# launch gaps, and short enough that tuning eight algorithms takes well under a second.
_SAMPLE_SECONDS = 0.5e-3
_NUM_SAMPLES = 9
# An algorithm replaces the one that is taken untuned only if it is faster by more than the noise of the samples.
_MIN_GAIN = 0.01

_active: ContextVar[bool] = ContextVar("transformer_engine_batched_autotune", default=False)

# (problem, alignment) -> {"algorithm": hex, "description": str, ...}; the C++ layer has its own copy.
_choices: dict[tuple[Problem, tuple[int, ...]], dict] = {}


def is_active() -> bool:
    """Whether calls in this thread tune problems that have no choice yet."""
    return _active.get()


@contextmanager
def autotune(path: Union[str, os.PathLike, None] = None) -> Iterator[None]:
    """Times the algorithms offered for each new problem inside and keeps the best.

    The first call of a problem (shapes, strides, types, epilogue, address alignment, SM limit, device) is
    slow: it times up to eight algorithms on the call's own operands, waiting for the GPU. All later calls
    of the process use the choice, inside and outside the context. `out` of an accumulating call is
    touched once, as always: the timing writes to a scratch buffer.

    Parameters
    ----------
    path : str or path-like, optional
        JSON file of choices: loaded first if it exists, written at the end. It is bound to GPU model and
        cuBLASLt version; a file of another one is refused with a `ValueError`.

    Examples
    --------
    >>> with teb.autotune("choices.json"):
    ...     out = teb.batched_general_gemm(a_fp8, b_fp8, layout="TN", out_dtype=torch.bfloat16)
    """
    if path is not None and os.path.exists(path):
        load_choices(path)
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)
    if path is not None:
        save_choices(path)


def tune(
    problem: Problem,
    native: _C.Problem,
    pointers: tuple[int, ...],
    d: torch.Tensor,
    alpha: float,
    beta: float,
) -> None:
    """Finds and stores the fastest algorithm for a problem at these addresses, unless it is known."""
    native_pointers = _C.Pointers(*pointers)
    alignment = tuple(_C.alignment_of(native_pointers))
    if (problem, alignment) in _choices:
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "autotune: a problem without a choice was met during CUDA graph capture, where nothing can be "
            "timed. Run the call once before the capture."
        )
    with torch.cuda.device(d.device):
        algorithms = _C.query_algorithms(native, native_pointers)
        scratch = None
        if problem.accumulate:
            # Same strides, another address: the caller's values must be read and written once only.
            size = d.untyped_storage().nbytes() + 256
            scratch = torch.empty(size, dtype=torch.uint8, device=d.device)
            target = scratch.data_ptr() + pointers[2] % 256
            native_pointers = _C.Pointers(*pointers[:2], target, *pointers[3:])
        seconds = _time_algorithms(algorithms, native, native_pointers, alpha, beta, d.device)
    best = min(range(len(algorithms)), key=seconds.__getitem__)
    if seconds[best] > (1 - _MIN_GAIN) * seconds[0]:
        best = 0
    heuristic = min(range(len(algorithms)), key=lambda i: algorithms[i].rank)
    _store(
        problem,
        alignment,
        native,
        {
            "algorithm": algorithms[best].to_bytes().hex(),
            "description": repr(algorithms[best]),
            "rank_offered": algorithms[best].rank,
            "microseconds": seconds[best] * 1e6,
            "microseconds_of_first": seconds[0] * 1e6,
            "microseconds_of_heuristic": seconds[heuristic] * 1e6,
        },
    )


def _time_algorithms(
    algorithms: list,
    native: _C.Problem,
    pointers: _C.Pointers,
    alpha: float,
    beta: float,
    device: torch.device,
) -> list[float]:
    """Median seconds of each algorithm, samples of all interleaved so that clocks drift alike."""
    stream = torch.cuda.current_stream(device)
    workspace = torch.empty(
        max(max(algorithm.workspace_bytes for algorithm in algorithms), 1),
        dtype=torch.uint8,
        device=device,
    )

    def sample(algorithm: _C.Algorithm, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        for _ in range(repeats):
            _C.matmul_with(
                algorithm,
                native,
                pointers,
                alpha,
                beta,
                workspace.data_ptr(),
                workspace.numel(),
                stream.cuda_stream,
            )
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    warm = [min(sample(algorithm, 1) for _ in range(3)) for algorithm in algorithms]
    repeats = [max(1, int(_SAMPLE_SECONDS / seconds)) for seconds in warm]
    samples: list[list[float]] = [[] for _ in algorithms]
    for _ in range(_NUM_SAMPLES):
        for index, algorithm in enumerate(algorithms):
            samples[index].append(sample(algorithm, repeats[index]))
    return [median(values) for values in samples]


def _store(problem: Problem, alignment: tuple[int, ...], native: _C.Problem, choice: dict) -> None:
    _C.store_choice(native, list(alignment), bytes.fromhex(choice["algorithm"]))
    _choices[(problem, alignment)] = choice


def list_choices() -> list[dict]:
    """The choices of this process, with the times that decided them."""
    return [
        {"problem": problem_to_dict(problem), "alignment": list(alignment), **choice}
        for (problem, alignment), choice in _choices.items()
    ]


def clear_choices() -> None:
    """Forgets all choices: the heuristic's first algorithm is used again."""
    _choices.clear()
    _C.clear_choices()


def _binding() -> dict:
    return {"gpu": torch.cuda.get_device_name(), "cublaslt": _C.loaded_version()}


def _digest(choices: list[dict]) -> str:
    # The library crashes on bytes that never were an algorithm, so none but our own reach it.
    return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()


def save_choices(path: Union[str, os.PathLike]) -> None:
    """Writes the choices of this process as JSON, bound to GPU model and cuBLASLt version."""
    choices = list_choices()
    content = {"format": _FILE_FORMAT, **_binding(), "sha256": _digest(choices), "choices": choices}
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(temporary, path)


def load_choices(path: Union[str, os.PathLike]) -> int:
    """Reads choices that `save_choices` wrote; returns how many.

    Raises
    ------
    ValueError
        If the file is of another format, GPU model or cuBLASLt version, or was changed.
    """
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    expected = {"format": _FILE_FORMAT, **_binding()}
    found = {name: content.get(name) for name in expected}
    if found != expected:
        raise ValueError(
            f"{os.fspath(path)} holds algorithm choices for {found}, but this process has {expected}: "
            "choices are not valid across GPU models and library versions; tune into another file"
        )
    if content.get("sha256") != _digest(content["choices"]):
        raise ValueError(
            f"{os.fspath(path)} was changed or damaged after it was written: delete it and tune again"
        )
    for entry in content["choices"]:
        problem = problem_from_dict(entry.pop("problem"))
        _store(problem, tuple(entry.pop("alignment")), to_native(problem), entry)
    return len(content["choices"])
