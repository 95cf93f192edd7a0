# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts example: its layout of tokens, its gradients, and that it learns. Needs no GPU."""

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

CPU = torch.device("cpu")


@pytest.mark.parametrize("counts", ((5, 0, 130), (128, 128), (0, 0, 1), (1,), (300, 1, 0, 7)))
def test_groups(counts):
    """Each expert's tokens in order, from a multiple of 128 rows on; the rest is padding."""
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    experts = experts[torch.randperm(len(experts), generator=torch.Generator().manual_seed(0))]
    groups = moe_fp8.group_tokens(experts, len(counts))
    assert groups.ks.tolist() == [-(-count // 128) * 128 for count in counts]
    start = 0
    for expert, (count, size) in enumerate(zip(counts, groups.ks.tolist())):
        expected = [expert] * count + [-1] * (size - count)
        assert groups.m_indices[start : start + size].tolist() == expected
        rows = groups.rows[experts == expert]
        assert rows.tolist() == list(range(start, start + count))
        start += size
    assert start == len(groups.m_indices)


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


def test_gradients():
    check_gradients(CPU)


def test_plain_layer_is_the_same_function():
    experts = torch.tensor([1] * 7 + [0] * 150)
    groups = moe_fp8.group_tokens(experts, 2)
    x, weight = random_values((len(groups.m_indices), 96), 1), random_values((2, 48, 96), 2)
    expected = moe_fp8.grouped_linear(x, weight, groups)[groups.rows]
    assert_accurate(
        moe_fp8.grouped_linear_fp8(x, weight, groups)[groups.rows], expected.double(), 28.0
    )


def test_challenge():
    result = moe_fp8.run_challenge(CPU, 128)
    assert result.sqnr_db > 28.0
    assert 0.48 < 1 - result.fp8_bytes / result.bf16_bytes < 0.5
    assert result.fp8_ms is None


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


def test_training():
    check_training(CPU, hidden=128, num_tokens=192, num_steps=12)


def test_command(capsys):
    assert moe_fp8.main(["--device", "cpu", "--hidden", "128", "--steps", "8"]) == 0
    printed = capsys.readouterr().out
    assert "SQNR of the worst expert" in printed and "kept for backward" in printed
