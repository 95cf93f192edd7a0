# SPDX-License-Identifier: Apache-2.0
"""Steps of two modules on the same data, one of which describes its products anew each time.

For tests of `warm_product` on the CPU and on a GPU.
"""

from __future__ import annotations

import torch
import transformer_engine.pytorch as te
from training import Case, assert_same_state, delayed_state, make_data, quantized
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, Format
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from transformer_engine_batched import autograd
from transformer_engine_batched.warm_product import WarmProduct

RECIPES = {
    "delayed": lambda: DelayedScaling(amax_history_len=3),
    "current": Float8CurrentScaling,
    "e4m3": lambda: DelayedScaling(fp8_format=Format.E4M3, margin=1),
}
CASES = {
    "plain": Case((2, 32, 48), (2, 48, 16)),
    "ragged": Case((2, 21, 35), (2, 35, 19)),
    "transposed": Case((2, 48, 32), (2, 16, 48), lambda x: x.mT, lambda x: x.mT),
    "channel-last": Case(
        (1, 16, 16, 16),
        (1, 16, 16, 16),
        lambda x: x.permute(0, 3, 1, 2),
        lambda x: x.permute(0, 3, 2, 1),
    ),
    "b has no batch": Case((2, 32, 48), (48, 16)),
    "each repeats the other": Case((2, 1, 16, 32), (3, 32, 16)),
    "packed": Case(
        (2, 3, 16, 32), (2, 3, 32, 16), lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1)
    ),
}


def run_steps(case, recipe, dtype, needs, device):
    """(results of three steps, the module). The first finds products and launches, the others know them."""
    module, results = te.BatchedMatmul(), []
    for seed in range(3):
        data = make_data(case, dtype, seed=seed, requires_grad=needs, device=device)
        with quantized(recipe):
            y = module(data.a, data.b)
        wanted = [x for x in data[:2] if x.requires_grad]
        grads = torch.autograd.grad(y, wanted, data.grad_output) if wanted else ()
        results.append((y.detach(), *grads))
    return results, module


def compare_steps(
    monkeypatch, case, recipe_name, dtype=torch.bfloat16, needs=(True, True), device="cpu"
) -> WarmProduct:
    """Asserts equal bits, strides and state of both modules; the product that was kept."""
    results, states = [], []
    with monkeypatch.context() as patch:
        for is_kept in (True, False):
            FP8GlobalStateManager.reset()
            patch.setattr(autograd, "_warm_products", {})
            found, module = run_steps(case, RECIPES[recipe_name](), dtype, needs, device)
            results.append(found)
            states.append({} if recipe_name == "current" else delayed_state(module))
            if is_kept:
                ((product, _),) = autograd._warm_products.values()
                patch.setattr(autograd, "_find_product", lambda *_: None)
    FP8GlobalStateManager.reset()
    for step, pairs in enumerate(zip(*results)):
        for mine, theirs in zip(*pairs):
            assert mine.stride() == theirs.stride()
            assert torch.equal(mine, theirs), f"step {step}"
    assert_same_state(*states)
    return product
