# SPDX-License-Identifier: Apache-2.0
"""Attaches the package's names to Transformer Engine. Knows all other modules; none knows it."""

from __future__ import annotations

from . import te_interop
from .gemm import batched_general_gemm


def attach() -> None:
    """Makes `transformer_engine.pytorch.cpp_extensions.batched_general_gemm` importable."""
    te_interop.add_to_cpp_extensions("batched_general_gemm", batched_general_gemm)
