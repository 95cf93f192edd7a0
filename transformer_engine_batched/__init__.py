# SPDX-License-Identifier: Apache-2.0
"""Batched FP8 matrix products for NVIDIA Transformer Engine.

Importing the package adds its names to Transformer Engine and touches no GPU.
"""

import torch as _torch  # noqa: F401  # loads the CUDA libraries that the extension links to

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"transformer_engine_batched's C++ extension cannot be loaded ({error}). In a checkout, build it "
        "with `make build`; otherwise reinstall the package with `pip install --no-build-isolation .` in "
        "an environment that has torch for CUDA 13."
    ) from error

from . import plugin as _plugin
from ._version import __version__
from .autotuning import autotune, clear_choices, list_choices, load_choices, save_choices
from .block_cast import per_block_cast_to_fp8, per_token_cast_to_fp8
from .batched_einsum import BatchedEinsum, einsum
from .emulation import emulate
from .errors import UnsupportedError
from .gemm import batched_general_gemm
from .groupwise import (
    batched_gemm_fp8_nt_groupwise,
    get_m_alignment_for_contiguous_layout,
    grouped_gemm_fp8_k_grouped,
    grouped_gemm_fp8_nt_contiguous,
)
from .memory_estimate import MemoryEstimate, estimate_memory
from .module import BatchedMatmul, bmm
from .plan import limit_sms
from .quantization_error import QuantizationError, quantization_error
from .quantize import quantize
from .quantized_bmm.switch import disable_quantized_bmm, enable_quantized_bmm
from .triangle.block import TriangleMultiplication

_plugin.attach()

__all__ = [
    "BatchedEinsum",
    "BatchedMatmul",
    "MemoryEstimate",
    "QuantizationError",
    "TriangleMultiplication",
    "UnsupportedError",
    "__version__",
    "autotune",
    "batched_gemm_fp8_nt_groupwise",
    "batched_general_gemm",
    "bmm",
    "clear_choices",
    "disable_quantized_bmm",
    "einsum",
    "emulate",
    "enable_quantized_bmm",
    "estimate_memory",
    "get_m_alignment_for_contiguous_layout",
    "grouped_gemm_fp8_k_grouped",
    "grouped_gemm_fp8_nt_contiguous",
    "limit_sms",
    "list_choices",
    "load_choices",
    "per_block_cast_to_fp8",
    "per_token_cast_to_fp8",
    "quantization_error",
    "quantize",
    "save_choices",
]
