# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter with the arithmetic of a GPU, for tests of kernels on the CPU.

Triton decides at its import whether it interprets, so such tests run in a process of their own, started
with `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import torch

from transformer_engine_batched.reference import codes as fp8_codes

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(path: str) -> None:
    """Runs the tests of classes `TestInterpreted` of a file in a process where Triton interprets."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "TestInterpreted", path],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def give_device_arithmetic(monkeypatch) -> None:
    """Gives the interpreter of Triton 3.6 the device's conversions and maximum.

    Its own drop the carry of a rounding to FP8 and do not saturate, truncate to BF16 and mistake its subnormals, and its
    `maxnum` returns NaN where the device returns the other operand.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float
    formats = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def convert(data, source, target, rounding_mode):
        if source == tl.bfloat16 and target == tl.float32:
            return data.view(np.uint16).astype(np.uint32) << 16
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(np.array(data.view(np.float32)))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        if source == tl.float32 and target in formats:
            values = torch.from_numpy(np.array(data, dtype=np.float32))
            return fp8_codes.encode(values, formats[target]).numpy()
        return original(data, source, target, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_maxnumf",
        lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax),
    )

    # Scalars are arrays of one element there, which NumPy from 2.5 on makes no integer of.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index)
