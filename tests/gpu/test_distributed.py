# SPDX-License-Identifier: Apache-2.0
"""Several GPUs through NCCL: runs tests/distributed/run_distributed.py under torchrun.

Input: two GPUs or more on this machine; what needs more than there are is skipped. Must not set up a process
group of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "distributed" / "run_distributed.py"


@pytest.mark.parametrize("num_ranks", (2, 4))
def test_distributed(num_ranks):
    count = torch.cuda.device_count()
    if count < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs, this machine has {count}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), str(SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and "FAIL" not in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("PASS") == 19, done.stdout
