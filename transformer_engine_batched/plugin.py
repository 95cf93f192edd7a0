# SPDX-License-Identifier: Apache-2.0
"""Attaches the package's names to Transformer Engine. Knows all other modules; none knows it."""

from __future__ import annotations

from . import emulation, te_interop
from .batched_einsum import BatchedEinsum
from .gemm import batched_general_gemm
from .module import BatchedMatmul
from .triangle import TriangleMultiplication


def attach() -> None:
    """Adds the modules to `transformer_engine.pytorch` and `batched_general_gemm` to its cpp_extensions."""
    te_interop.add_to_pytorch("BatchedEinsum", BatchedEinsum)
    te_interop.add_to_pytorch("BatchedMatmul", BatchedMatmul)
    te_interop.add_to_pytorch("TriangleMultiplication", TriangleMultiplication)
    te_interop.add_to_cpp_extensions("batched_general_gemm", batched_general_gemm)
    emulation.add_context(te_interop.all_recipes_supported)
