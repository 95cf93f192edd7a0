# SPDX-License-Identifier: Apache-2.0
"""What the mixture-of-experts example must do on any device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from accuracy import assert_accurate, random_values

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))

import moe_fp8  # noqa: E402


def check_gradients(device):
    """Forward and both gradients of each expert against FP64; an expert without tokens gets a zero gradient."""
    experts = torch.tensor([2] * 70 + [0] * 150, device=device)
    groups = moe_fp8.group_tokens(experts, 3)
    tokens = random_values((220, 96), 1, device)
    weight = random_values((3, 48, 96), 2, device).requires_grad_()
    x = tokens.new_zeros(len(groups.m_indices), 96)
    x[groups.rows] = tokens
    x.requires_grad_()
    grad = torch.zeros(len(x), 48, device=device)
    grad[groups.rows] = random_values((220, 48), 3, device)
    y = moe_fp8.grouped_linear_fp8(x, weight, groups)
    y.backward(grad)
    for expert in (0, 2):
        rows = groups.rows[experts == expert]
        x64, w64, g64 = (
            x[rows].double().detach(),
            weight[expert].double().detach(),
            grad[rows].double(),
        )
        assert_accurate(y[rows], x64 @ w64.t(), 28.0)
        assert_accurate(x.grad[rows], g64 @ w64, 28.0)
        assert_accurate(weight.grad[expert], g64.t() @ x64, 28.0)
    assert bool((weight.grad[1] == 0).all())
    padding = groups.m_indices < 0
    assert bool((y[padding] == 0).all()) and bool((x.grad[padding] == 0).all())


def check_training(device, **sizes):
    """Both learn, alike, and FP8 keeps less for backward."""
    fp8, plain = (
        moe_fp8.train(device, linear, **sizes)
        for linear in (moe_fp8.grouped_linear_fp8, moe_fp8.grouped_linear)
    )
    assert fp8.losses[-1] < 0.9 * fp8.losses[0]
    for mine, other in zip(fp8.losses, plain.losses):
        assert mine == pytest.approx(other, rel=0.03)
    assert fp8.saved_bytes < 0.9 * plain.saved_bytes
