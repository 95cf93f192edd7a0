# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts example on the GPU: the tutorial's challenge at its size, gradients, training, memory."""

from __future__ import annotations

import pytest
import torch
from moe_checks import check_gradients, check_training, moe_fp8

DEVICE = torch.device("cuda")

pytestmark = pytest.mark.skipif(
    torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for Hopper"
)


def test_challenge():
    """8 experts, hidden 2048: E4M3 of normal data allows 28 dB; half the bytes but for the scales."""
    result = moe_fp8.run_challenge(DEVICE, 2048)
    assert result.sqnr_db > 28.0
    assert 0.48 < 1 - result.fp8_bytes / result.bf16_bytes < 0.5
    assert result.fp8_ms > 0 and result.bf16_ms > 0


def test_gradients():
    check_gradients(DEVICE)


def test_training():
    check_training(DEVICE, hidden=256, num_tokens=512, num_steps=12)


def test_memory_that_a_forward_keeps():
    """What the allocator holds for backward is what the example counts."""
    kept = {}
    for linear in (moe_fp8.grouped_linear_fp8, moe_fp8.grouped_linear):
        layer = moe_fp8.MoELayer(512, 1024, 2, linear).to(DEVICE, torch.bfloat16)
        x = torch.randn(1024, 512, device=DEVICE, dtype=torch.bfloat16)
        layer(x).sum().backward()  # what is made once
        layer.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out, counted = moe_fp8.count_saved_bytes(layer, lambda: layer(x))
        torch.cuda.synchronize()
        kept[linear] = torch.cuda.memory_allocated() - before
        # Less x, which was there before; more by the result and by small tensors that are not saved.
        assert abs(kept[linear] - counted) <= 0.1 * counted + out.nbytes + x.nbytes
        del out
    assert kept[moe_fp8.grouped_linear_fp8] < 0.9 * kept[moe_fp8.grouped_linear]
