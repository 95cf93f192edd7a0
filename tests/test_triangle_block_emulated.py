# SPDX-License-Identifier: Apache-2.0
"""Forward of the fused triangle block with its CUDA kernels emulated on a CPU: what they are given, what they leave.

tests/gpu/test_triangle.py is the same on a GPU, with gradients.
"""

from __future__ import annotations

import pytest
import torch
from test_triangle import make_block
from test_triangle_project_emulated import EmulatedKernel, encode_tensor_map, folder
from training import RECIPES, quantized
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from triangle_reference import Size, exact_result, make_inputs, overall_sqnr

import transformer_engine_batched as teb
from transformer_engine_batched.kernels import (
    triangle,
    triangle_output,
    triangle_project,
    triangle_tiles,
)
from transformer_engine_batched.triangle import block as block_module

__all__ = ["folder"]
SIZE = Size(2, 17, 64, 64)
# SQNR in dB of the output: of codes on both sides of the contraction, or of BF16.
OUT_DB = {"none": 40.0, "current": 27.0, "delayed": 27.0}


@pytest.fixture(autouse=True)
def emulation(folder, monkeypatch):  # pylint: disable=redefined-outer-name
    """CPU tensors take the fused pipeline, in CUDA alone; new memory holds NaN or 0xFF."""

    def get_output_kernel(definitions):
        sizes = dict(definitions)
        num_bytes = triangle_output.shared_bytes(sizes["DIM"], sizes["HIDDEN"])
        return EmulatedKernel(
            folder, definitions, num_bytes, "triangle_output.cu", "project_output"
        )

    def get_project_kernel(definitions, num_bytes):
        return EmulatedKernel(folder, definitions, num_bytes)

    for module, get_kernel in (
        (triangle_output, get_output_kernel),
        (triangle_project, get_project_kernel),
    ):
        monkeypatch.setattr(module, "_get_kernel", get_kernel)
        monkeypatch.setattr(module, "encode_tensor_map", encode_tensor_map)
    monkeypatch.setattr(triangle_project, "turn_codes", lambda x: x.mT.contiguous())
    monkeypatch.setattr(triangle_tiles, "IS_INTERPRETED", True)
    monkeypatch.setattr(triangle_tiles, "num_multiprocessors", lambda device_index: 3)
    monkeypatch.setattr(triangle, "_found", {})
    monkeypatch.setattr(triangle, "_TRITON_FORMS", {})
    monkeypatch.setattr(triangle, "_runs_cuda_forms", lambda device_index: True)
    monkeypatch.setattr(
        block_module, "choose_pipeline", lambda *_, **__: block_module.Pipeline("fused")
    )
    FP8GlobalStateManager.reset()
    torch.use_deterministic_algorithms(True)
    with torch.compiler.set_stance("force_eager"), teb.emulate():
        yield
    torch.use_deterministic_algorithms(False)
    FP8GlobalStateManager.reset()


@pytest.mark.parametrize("mode", block_module.MODES)
@pytest.mark.parametrize(
    "recipe, scaling", (("none", "recipe"), ("current", "recipe"), ("delayed", "bound"))
)
def test_forward(mode, recipe, scaling):
    block = make_block(SIZE, mode, params_dtype=torch.bfloat16, scaling=scaling)
    inputs = make_inputs(SIZE, torch.bfloat16)
    made = RECIPES[recipe]()
    expected = exact_result(block, inputs).out
    with quantized(made):
        with torch.no_grad():
            alone = block(inputs.z, inputs.mask)
        out = block(inputs.z, inputs.mask)
    assert torch.equal(alone, out) and out.requires_grad and not alone.requires_grad
    assert overall_sqnr(out.detach(), expected) > OUT_DB[recipe]
    scale_invs = out.grad_fn.saved_tensors[5]
    assert (scale_invs is None) == (recipe == "none")
