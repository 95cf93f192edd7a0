# SPDX-License-Identifier: Apache-2.0
"""Tunes the FP8 casts with 128-blocks: bandwidth of tiles, beside TE's Float8BlockQuantizer.

    python benchmarks/block_quantize_kernels.py --out block_quantize_kernels.json

Input: one Hopper GPU with Transformer Engine. Output: a table on the terminal and all rows as JSON. A candidate whose
bytes are not the reference's gets no time. The winners go into `TILES` of
`transformer_engine_batched/kernels/block_quantize.py` by hand.

Bandwidth counts the bytes that must move: one read of x and one byte for each code written; scales are 1/32 of a copy
at the most and not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

import transformer_engine.pytorch as te

from benchmarks import stored_results
from benchmarks.timing import CudaClock, describe_error, interleave
from transformer_engine_batched.kernels import block_quantize
from transformer_engine_batched.kernels.block_quantize import Tile
from transformer_engine_batched.reference import blockwise

SHAPES = ((32, 2048, 2048), (8, 4096, 4096), (512, 512, 512))
COPIES = {"rowwise": (True, False), "transposed": (False, True), "both": (True, True)}
ROUNDS, WARMUP = 9, 2
# (warps, registers) of the explicit kernel; rows and warps of the other one, which rows of 1 x 128 alone may take.
EXPLICIT = ((8, 0), (8, 80), (8, 96), (4, 0), (4, 160), (4, 168), (16, 0))
PLAIN = ((16, 2), (32, 4), (64, 4), (64, 8), (128, 8))

# (square, copies, tile)
Candidate = tuple[bool, str, Tile]


def list_candidates() -> list[Candidate]:
    """All tiles of all copies."""
    tiles = [Tile(128, warps, registers, True) for warps, registers in EXPLICIT]
    plain = [(False, "rowwise", Tile(rows, warps)) for rows, warps in PLAIN]
    return plain + [
        (square, name, tile) for square in (False, True) for name in COPIES for tile in tiles
    ]


def make_call(x: torch.Tensor, candidate: Candidate, aligned: bool) -> Callable[..., Any]:
    """A cast with one tile."""
    square, name, tile = candidate
    plan = block_quantize._make_plan(
        x.shape, x.stride(), x.dtype, True, square, *COPIES[name], aligned, tile
    )
    return lambda _=0: block_quantize._launch(x, plan, "e4m3", 0.0, True)


def has_right_bytes(x: torch.Tensor, candidate: Candidate) -> bool:
    """The gate: codes and scales of `x` are the reference's."""
    try:
        made = make_call(x, candidate, True)()
    except Exception as error:  # does not compile
        print(describe_error(error))
        return False
    for copy, source in zip(made, (x, x.mT)):
        if copy is None:
            continue
        codes, scale_inv = blockwise.cast_blocks(
            source, torch.float8_e4m3fn, square=candidate[0], power_of_two=True
        )
        if not (torch.equal(copy.codes, codes) and torch.equal(copy.scale_inv, scale_inv)):
            return False
    return True


def compile_together(x: torch.Tensor, candidates: list[Candidate]) -> None:
    """Compiles the kernels, many at a time; an error shows again when one is launched."""
    find_launcher = block_quantize._launch_kernel

    def find_compiler(tile: Tile) -> Callable[..., None]:
        limited = find_launcher(tile)._kernel

        def compile_kernel(num_programs: int, arguments: tuple, _: Any, num_warps: int) -> None:
            limited._kernel.warmup(
                *arguments, grid=(num_programs,), num_warps=num_warps, **limited._options
            )

        return compile_kernel

    try:
        block_quantize._launch_kernel = find_compiler
        with ThreadPoolExecutor() as pool:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                for candidate in candidates:
                    for aligned in (False, True):
                        make_call(x, candidate, aligned)()
    finally:
        block_quantize._launch_kernel = find_launcher


def measure(
    calls: dict[str, Callable[..., Any]], moved: dict[str, int], shape: tuple[int, ...]
) -> list[dict[str, Any]]:
    """A row for each call, timed in turns."""
    samples = interleave(calls, CudaClock(), ROUNDS, WARMUP)
    rows = []
    for name in calls:
        ms = samples[name].median
        row = {"shape": list(shape), "what": name, "ms": ms, "reason": samples[name].reason}
        rows.append(row | {"gbps": moved[name] / ms / 1e6 if ms else None})
    return rows


def sweep(x: torch.Tensor, candidates: list[Candidate]) -> list[dict[str, Any]]:
    """Every tile, the fastest of each kind of copy first."""
    calls, moved = {}, {}
    for candidate in candidates:
        square, name, tile = candidate
        for aligned in (False, True):
            key = f"{title(square, name, aligned)} {tuple(tile)}"
            calls[key] = make_call(x, candidate, aligned)
            moved[key] = x.numel() * (x.element_size() + sum(COPIES[name]))
    return sorted(measure(calls, moved, x.shape), key=lambda row: -(row["gbps"] or 0.0))


def title(square: bool, name: str, aligned: bool) -> str:
    """What is cast, in words."""
    return f"{'128x128' if square else '1x128'} {name}{', aligned scales' if aligned else ''}"


def compare(x: torch.Tensor) -> list[dict[str, Any]]:
    """The table's tiles, TE's quantizers and a copy, in one run."""
    calls: dict[str, Callable[..., Any]] = {"copy": lambda _: x.clone()}
    moved = {"copy": 2 * x.numel() * x.element_size()}

    def cast(_: int, **options: Any) -> Any:
        return block_quantize.quantize_blocks(x, "e4m3", power_of_two=True, **options)

    for square in (False, True):
        for name, (rowwise, transposed) in COPIES.items():
            for aligned in (False, True):
                key = title(square, name, aligned)
                calls[key] = partial(
                    cast,
                    square=square,
                    rowwise=rowwise,
                    transposed=transposed,
                    aligned_scales=aligned,
                )
                moved[key] = x.numel() * (x.element_size() + rowwise + transposed)
            if rowwise:
                quantizer = te.Float8BlockQuantizer(
                    te.DType.kFloat8E4M3,
                    rowwise=True,
                    columnwise=transposed,
                    block_scaling_dim=2 if square else 1,
                )
                key = f"TE {title(square, name, False)}"
                calls[key] = lambda _, quantizer=quantizer: quantizer(x)
                moved[key] = moved[title(square, name, False)]
    return measure(calls, moved, x.shape)


def main(arguments: list[str]) -> int:
    """Gate, sweep, comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file of all rows")
    parser.add_argument("--commit", help="commit of the tree, where it has no .git")
    parser.add_argument("--show", type=int, default=30, help="candidates shown of each sweep")
    parser.add_argument("--compare-only", action="store_true", help="the table's tiles only")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    torch.manual_seed(0)
    ragged = torch.randn(2, 389, 1000, device="cuda").bfloat16()
    small = torch.randn(3, 512, 1024, device="cuda").bfloat16()
    known = [(*key, tile) for key, tile in block_quantize.TILES.items()]
    candidates = known if options.compare_only else list_candidates()
    for x in (small, ragged):
        compile_together(x, candidates)
    errors = [
        f"wrong bytes: {candidate}"
        for candidate in candidates
        if not all(has_right_bytes(x, candidate) for x in (small, ragged))
    ]
    print(*errors, sep="\n")
    candidates = [x for x in candidates if f"wrong bytes: {x}" not in errors]
    rows = []
    for shape in SHAPES:
        x = torch.randn(shape, device="cuda").bfloat16()
        found = [] if options.compare_only else sweep(x, candidates)
        compared = compare(x)
        for name, some in (("sweep", found[: options.show]), ("table's tiles and TE", compared)):
            print(f"{list(shape)}, {name}")
            for row in some:
                speed = (
                    f"{row['gbps']:6.0f} GB/s {row['ms']:.4f} ms" if row["gbps"] else row["reason"]
                )
                print(f"  {speed}  {row['what']}")
        rows += found + compared
        del x
    if options.out:
        meta = stored_results.collect_meta(arguments, options.commit)
        # That function names the main program; this one is another.
        meta |= {"command": "python benchmarks/block_quantize_kernels.py", "errors": errors}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    print(f"{time.perf_counter() - began:.0f} s")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
