# SPDX-License-Identifier: Apache-2.0
"""What ptxas made of a kernel, read from its machine code with the disassembler that comes with Triton."""

from __future__ import annotations

import subprocess
from pathlib import Path

import triton


def disassemble(cubin: bytes, folder: Path) -> str:
    """The machine code as text; `folder` is where the disassembler may read a file."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assert_one_thread_copies(cubin: bytes, folder: Path, num_elections: int) -> None:
    """Bulk copies are issued once, by the lane of `elect_lane`, and not by each lane in its turn.

    ptxas elects once more for each copy that it puts into a loop over lanes, and may then skip coordinates of the
    second and third one (see `elect_lane`). `num_elections` counts the kernel's own.
    """
    text = disassemble(cubin, folder)
    assert text.count("UTMALDG") >= 2
    assert text.count("ELECT") == num_elections
    assert "BRA.U.ANY" not in text
