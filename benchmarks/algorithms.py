# SPDX-License-Identifier: Apache-2.0
"""Which of cuBLASLt's algorithms is taken for FP8 products, what the heuristic puts first, and which is fastest.

    python benchmarks/algorithms.py --out algorithms.json

Input: one CUDA GPU with Transformer Engine. Output: a table on the terminal and JSON. The times are those of
`teb.autotune()`: all algorithms offered, interleaved, on one set of operands. What is taken for fast accumulation is
ordered in `csrc/plan.cpp` (`kFastestOfHopper`) by this table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

import transformer_engine.pytorch as te
from transformer_engine.pytorch import Float8CurrentScalingQuantizer

import transformer_engine_batched as teb
from benchmarks import stored_results

# Items, rows, columns, contracted.
SHAPES = (
    *((4096, 128, 128, 128), (1024, 256, 256, 256), (256, 384, 384, 384), (512, 512, 512, 512)),
    *((128, 720, 720, 720), (128, 768, 768, 768), (128, 1024, 1024, 1024), (32, 1024, 1024, 1024)),
    *((128, 1536, 1536, 1536), (32, 2048, 2048, 2048), (128, 2048, 2048, 2048)),
    *((8, 4096, 4096, 4096), (2, 8192, 8192, 8192), (32, 2048, 2048, 128), (256, 1024, 1024, 64)),
    *((256, 1024, 64, 1024), (64, 512, 2048, 1024), (16, 4096, 1024, 512), (8, 128, 4096, 4096)),
)


def measure(shape: tuple[int, int, int, int], use_split_accumulator: bool) -> dict[str, Any]:
    """A row: microseconds of the algorithm that is taken, the heuristic's first and the fastest."""
    batch, m, n, k = shape
    quantizer = Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3, device="cuda")
    left, right = (
        teb.quantize(torch.randn(batch, rows, k, device="cuda", dtype=torch.bfloat16), quantizer)
        for rows in (m, n)
    )
    teb.clear_choices()
    with teb.autotune():
        teb.batched_general_gemm(
            right, left, out_dtype=torch.bfloat16, use_split_accumulator=use_split_accumulator
        )
    (choice,) = teb.list_choices()
    return {
        **dict(zip(("batch", "m", "n", "k"), shape)),
        "accumulation": "split" if use_split_accumulator else "fast",
        "taken_us": choice["microseconds_of_first"],
        "heuristic_us": choice["microseconds_of_heuristic"],
        "fastest_us": choice["microseconds"],
        "fastest": choice["description"],
    }


def main(arguments: list[str]) -> int:
    """Measures, prints, stores; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file of all rows")
    parser.add_argument("--commit", help="commit of the tree, where it has no .git")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    rows = []
    for split in (False, True):
        for shape in SHAPES:
            row = measure(shape, split)
            rows.append(row)
            taken, first = (row[name] / row["fastest_us"] for name in ("taken_us", "heuristic_us"))
            print(
                f"{row['accumulation']:5} {str(shape):26} fastest {row['fastest_us']:8.1f} us, "
                f"taken {taken:.3f}, heuristic's {first:.3f}"
            )
    if options.out:
        meta = stored_results.collect_meta(arguments, options.commit)
        meta["command"] = "python benchmarks/algorithms.py"
        options.out.parent.mkdir(parents=True, exist_ok=True)
        stored_results.write(options.out, meta, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
