# SPDX-License-Identifier: Apache-2.0
"""Tests that need a CUDA device with FP8. Run by `make gpu-test`; a machine without one is an error."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:  # pylint: disable=unused-argument
    """Refuses to pass by running nothing."""
    if not torch.cuda.is_available():
        raise pytest.UsageError("tests/gpu needs a CUDA device; `make test` runs the others")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same data in each run."""
    torch.manual_seed(20260401)
