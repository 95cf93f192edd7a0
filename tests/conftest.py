# SPDX-License-Identifier: Apache-2.0
"""Settings and fixtures of all tests. Its folder is on the import path, also for tests/gpu."""

from __future__ import annotations

import pytest
import torch  # noqa: F401  # before TE: it loads the libraries that TE links to
from hypothesis import settings

import transformer_engine_batched as teb
from transformer_engine_batched import gemm

# Examples are the same in every run; the time of one says nothing on a busy machine.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz-cases", type=int, default=400, help="how many random products test_fuzz.py runs"
    )


@pytest.fixture
def emulated():
    """The whole test runs inside `teb.emulate()`."""
    with teb.emulate():
        yield


@pytest.fixture
def fresh_launches():
    """No prepared launch from before the test is used, and none from it after."""
    gemm._launches.clear()
    yield
    gemm._launches.clear()
