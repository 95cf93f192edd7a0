# SPDX-License-Identifier: Apache-2.0
"""A product as the first CUDA work of a thread, which then has no CUDA context yet."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import threading, torch, transformer_engine_batched as teb
a, b = (torch.randn(4, 64, 64, device="cuda").bfloat16() for _ in range(2))
out = torch.empty(4, 64, 64, device="cuda", dtype=torch.bfloat16)
expected = torch.bmm(a, b)
failures = []

def work():
    try:
        teb.bmm(a, b, out=out)
    except BaseException as error:
        failures.append(error)

for _ in range(2):  # the second takes over the handle of the first, whose making had bound a context
    out.zero_()
    torch.cuda.synchronize()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
torch.cuda.synchronize()
assert not failures, failures
torch.testing.assert_close(out, expected)
"""


def test_first_work_of_a_thread():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
