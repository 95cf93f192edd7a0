# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts example: its layout of tokens, its gradients, and that it learns. Needs no GPU."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate, random_values
from moe_checks import check_gradients, check_training, moe_fp8

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


def test_training():
    check_training(CPU, hidden=128, num_tokens=192, num_steps=12)


def test_command(capsys):
    assert moe_fp8.main(["--device", "cpu", "--hidden", "128", "--steps", "8"]) == 0
    printed = capsys.readouterr().out
    assert "SQNR of the worst expert" in printed and "kept for backward" in printed
