# SPDX-License-Identifier: Apache-2.0
"""Conversions of a `Problem`: to the C++ layer's value and to JSON-ready values and back.

Imports the extension and the value, nothing else.
"""

from __future__ import annotations

from dataclasses import asdict, fields

from . import _C
from .problem import Matrix, Problem


def _to_native_matrix(matrix: Matrix) -> _C.Matrix:
    return _C.Matrix(
        dtype=getattr(_C.DataType, matrix.dtype),
        ld=matrix.ld,
        batch_stride=matrix.batch_stride,
        transposed=matrix.transposed,
        scale_mode=getattr(_C.ScaleMode, matrix.scale_mode),
    )


def to_native(problem: Problem) -> _C.Problem:
    """The problem as the C++ layer's value, checked by it."""
    values = {field.name: getattr(problem, field.name) for field in fields(problem)}
    for name in ("a", "b", "d"):
        values[name] = _to_native_matrix(values[name])
    values["epilogue"] = getattr(_C.Epilogue, problem.epilogue)
    values["bias_dtype"] = getattr(_C.DataType, problem.bias_dtype)
    native = _C.Problem(**values)
    native.check()
    return native


def problem_from_dict(values: dict) -> Problem:
    """The inverse of `dataclasses.asdict`, for stored problems."""
    values = dict(values)
    for name in ("a", "b", "d"):
        values[name] = Matrix(**values[name])
    return Problem(**values)


def problem_to_dict(problem: Problem) -> dict:
    """The problem as JSON-ready values."""
    return asdict(problem)
