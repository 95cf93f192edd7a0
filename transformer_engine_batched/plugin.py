# SPDX-License-Identifier: Apache-2.0
"""Attaches the package's names to Transformer Engine. Knows all other modules; none knows it."""

from __future__ import annotations

import transformer_engine.pytorch

from . import emulation
from .batched_einsum import BatchedEinsum
from .gemm import batched_general_gemm
from .module import BatchedMatmul
from .te_interop.recipes import all_recipes_supported
from .triangle.block import TriangleMultiplication


def attach() -> None:
    """Adds the modules to `transformer_engine.pytorch` and `batched_general_gemm` to its cpp_extensions."""
    add_to_pytorch("BatchedEinsum", BatchedEinsum)
    add_to_pytorch("BatchedMatmul", BatchedMatmul)
    add_to_pytorch("TriangleMultiplication", TriangleMultiplication)
    add_to_cpp_extensions("batched_general_gemm", batched_general_gemm)
    emulation.add_context(all_recipes_supported)


def add_to_pytorch(name: str, value: object) -> None:
    """Adds a name to `transformer_engine.pytorch`, never replacing one of TE's."""
    _add_name(transformer_engine.pytorch, "transformer_engine.pytorch", name, value)


def add_to_cpp_extensions(name: str, function: object) -> None:
    """Adds a function to `transformer_engine.pytorch.cpp_extensions`, never replacing one of TE's."""
    module = transformer_engine.pytorch.cpp_extensions
    _add_name(module, "transformer_engine.pytorch.cpp_extensions", name, function)


def _add_name(module: object, where: str, name: str, value: object) -> None:
    existing = getattr(module, name, value)
    if existing is not value:
        raise ImportError(
            f"{where}.{name} exists already: this version of Transformer Engine has its own; use that one, "
            "or an older Transformer Engine"
        )
    setattr(module, name, value)
