# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of README.md and docs/ are those of the stored results.

Input: the repository as it is. Must not write anything. Plots are compared by the digest of the
results they carry, not by pixels.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_generated_parts_are_current():
    command = [sys.executable, str(ROOT / "tools" / "render_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_performance_page_has_its_tables():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for name in ("goals", "gemm-tflops", "gemm-plots", "gemm-over-bf16", "gemm-accuracy", "host"):
        assert f"<!-- generated: {name} -->" in text
