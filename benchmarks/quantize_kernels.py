# SPDX-License-Identifier: Apache-2.0
"""Tunes the FP8 quantization kernels: bandwidth of tiles, beside TE's own quantizers.

    python benchmarks/quantize_kernels.py --out quantize_kernels.json

Input: one CUDA GPU with Transformer Engine. Output: a table of the fastest candidates on the terminal
and all of them as JSON. A candidate whose bytes are not the reference's gets no time. The winners go
into `TILES` of `transformer_engine_batched/kernels/float8_quantize.py` by hand.

Bandwidth counts the bytes that must move: one read of x and one byte for each code written; current
scaling reads x twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

import transformer_engine.pytorch as te

from benchmarks import stored_results
from benchmarks.timing import CudaClock, describe_error, interleave, time_host
from transformer_engine_batched.kernels import float8_quantize, tensor_amax
from transformer_engine_batched.kernels.float8_quantize import Tile
from transformer_engine_batched.kernels.launcher import BoundLaunch
from transformer_engine_batched.reference import codes as fp8_codes
from transformer_engine_batched.reference import quantizers

SHAPES = ((32, 2048, 2048), (8, 4096, 4096), (512, 512, 512))
LAYOUTS = {"rowwise": (True, False), "transposed": (False, True), "both": (True, True)}
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
TE_FORMATS = {"e4m3": te.DType.kFloat8E4M3, "e5m2": te.DType.kFloat8E5M2}
WARPS = (2, 4, 8, 16)
# Elements of a thread: enough 16-byte loads in flight, not so many that registers run out.
ELEMENTS_PER_THREAD = {"rowwise": (32, 64, 128), "transposed": (32, 64), "both": (32, 64)}
ELEMENTS_PER_THREAD["amax"] = ELEMENTS_PER_THREAD["rowwise"]
ROUNDS, WARMUP = 7, 2
FINALISTS = 4


def list_tiles(name: str) -> list[Tile]:
    """Candidates of a layout."""
    if name in ("rowwise", "amax"):
        sizes = ((16, 256), (32, 256), (16, 512), (64, 128), (8, 1024), (64, 256))
    else:
        sizes = ((64, 64), (128, 32), (64, 128), (128, 64), (128, 128), (256, 64), (256, 32))
    return [
        Tile(rows, cols, num_warps)
        for rows, cols in sizes
        for num_warps in WARPS
        if rows * cols // (32 * num_warps) in ELEMENTS_PER_THREAD[name]
    ]


def make_call(x: torch.Tensor, name: str, tile: Tile | None, fp8_dtype: str) -> Callable[..., Any]:
    """A cast by delayed scaling with one tile (the table's if None), or a search of the amax."""
    float8_quantize._make_plan.cache_clear()
    tensor_amax.make_amax_plan.cache_clear()
    layouts = (*LAYOUTS.get(name, (True, True)), 16)
    with mock.patch.dict(float8_quantize.TILES, {} if tile is None else {name: tile}):
        cast = float8_quantize.Cast(
            x.shape, x.stride(), x.dtype, x.get_device(), fp8_dtype, layouts, (0.0, False)
        )
    if name == "amax":

        def search(_: int = 0) -> torch.Tensor:
            amaxes = cast.allocate_amaxes()
            cast._find(x, amaxes, None, None)
            return amaxes

        return search
    scale, amax = torch.full((1,), 40.0, device="cuda"), torch.zeros(1, device="cuda")
    return lambda _=0: cast.with_scale(x, scale, amax)


def count_bytes(x: torch.Tensor, name: str, *, reads: int = 1) -> int:
    """Bytes that must move."""
    written = 0 if name == "amax" else sum(LAYOUTS[name])
    return x.numel() * (reads * x.element_size() + written)


def has_right_bytes(x: torch.Tensor, name: str, tile: Tile | None, fp8_dtype: str) -> bool:
    """The gate: codes of `x` are the reference's."""
    try:
        made = make_call(x, name, tile, fp8_dtype)()
    except Exception as error:  # does not compile
        print(describe_error(error))
        return False
    if name == "amax":
        return torch.equal(made.amax(0, keepdim=True), quantizers.tensor_amax(x))
    expected = fp8_codes.encode(x.float() * 40.0, FORMATS[fp8_dtype])
    pad = (0, -x.shape[-1] % 16, 0, -x.shape[-2] % 16)
    expected = torch.nn.functional.pad(expected, pad)
    return all(
        y is None or torch.equal(y, wanted) for y, wanted in zip(made, (expected, expected.mT))
    )


def _compile(launch: BoundLaunch, *tensors: torch.Tensor | None) -> None:
    """Stands in for a launch: compiles the kernel and does not launch it."""
    launch._kernel.warmup(
        *tensors, *launch._constants, grid=(launch._num_programs,), num_warps=launch._num_warps
    )


def compile_together(calls: list[Callable[..., Any]]) -> None:
    """Compiles what the calls launch, many at a time; an error shows again when one is launched."""
    with mock.patch.object(BoundLaunch, "__call__", _compile), ThreadPoolExecutor() as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            for call in calls:
                call()


def sweep(x: torch.Tensor, name: str, tiles: list[Tile], fp8_dtype: str) -> list[dict[str, Any]]:
    """One row for each tile, the fastest first."""
    calls = {tile: make_call(x, name, tile, fp8_dtype) for tile in tiles}
    samples = interleave(
        {str(tile): call for tile, call in calls.items()}, CudaClock(), ROUNDS, WARMUP
    )
    rows = []
    for tile in tiles:
        sample = samples[str(tile)]
        row = {"shape": list(x.shape), "what": name, "fp8": fp8_dtype, **tile._asdict()}
        row |= {"ms": sample.median, "reason": sample.reason}
        if sample.median:
            row["gbps"] = count_bytes(x, name) / sample.median / 1e6
        rows.append(row)
    return sorted(rows, key=lambda row: -row.get("gbps", 0.0))


def compare(x: torch.Tensor, fp8_dtype: str) -> list[dict[str, Any]]:
    """The public functions with their table of tiles, TE's quantizers and a copy, in one run."""
    scale, amax = torch.full((1,), 40.0, device="cuda"), torch.zeros(1, device="cuda")
    calls, moved = {"copy": lambda _: x.clone()}, {"copy": 2 * x.numel() * x.element_size()}
    for name, (rowwise, transposed) in LAYOUTS.items():
        asked = {"rowwise": rowwise, "transposed": transposed}
        calls[f"delayed {name}"] = lambda _, asked=asked: float8_quantize.quantize_float8(
            x, scale, amax, fp8_dtype, **asked
        )
        moved[f"delayed {name}"] = count_bytes(x, name)
        calls[f"current {name}"] = lambda _, asked=asked: float8_quantize.quantize_float8_current(
            x, fp8_dtype, **asked
        )
        moved[f"current {name}"] = count_bytes(x, name, reads=2)
        if rowwise:
            fp8 = TE_FORMATS[fp8_dtype]
            delayed = te.Float8Quantizer(scale, amax, fp8, rowwise=True, columnwise=transposed)
            current = te.Float8CurrentScalingQuantizer(
                fp8, device="cuda", rowwise=True, columnwise=transposed
            )
            for kind, quantizer in (("delayed", delayed), ("current", current)):
                calls[f"TE {kind} {name}"] = lambda _, quantizer=quantizer: quantizer(x)
                moved[f"TE {kind} {name}"] = moved[f"{kind} {name}"]
    samples = interleave(calls, CudaClock(), 2 * ROUNDS, WARMUP)
    return [
        {
            "shape": list(x.shape),
            "what": name,
            "fp8": fp8_dtype,
            "ms": samples[name].median,
            "gbps": moved[name] / samples[name].median / 1e6 if samples[name].median else None,
            "reason": samples[name].reason,
        }
        for name in calls
    ]


def measure_host() -> dict[str, float | None]:
    """Microseconds that the host spends in a call, on a matrix too small to hold it up."""
    x = torch.randn(2, 64, 64, device="cuda").bfloat16()
    scale, amax = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    calls = {
        "delayed": lambda: float8_quantize.quantize_float8(
            x, scale, amax, "e4m3", rowwise=True, transposed=True
        ),
        "current": lambda: float8_quantize.quantize_float8_current(
            x, "e4m3", rowwise=True, transposed=True
        ),
        "TE delayed": lambda: te_quantizer(x),
    }
    te_quantizer = te.Float8Quantizer(
        scale, amax, TE_FORMATS["e4m3"], rowwise=True, columnwise=True
    )
    return {
        name: time_host(call, torch.cuda.synchronize, chunks=10).per_call.median
        for name, call in calls.items()
    }


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """A short table."""
    print(title)
    for row in rows:
        tile = " ".join(f"{key}={row[key]}" for key in Tile._fields if key in row)
        speed = f"{row['gbps']:6.0f} GB/s {row['ms']:.4f} ms" if row.get("gbps") else row["reason"]
        print(f"  {speed}  {row['what']} {tile}")


def main(arguments: list[str]) -> int:
    """Gate, sweep, comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file of all rows")
    parser.add_argument("--commit", help="commit of the tree, where it has no .git")
    parser.add_argument("--show", type=int, default=6, help="candidates shown of each sweep")
    parser.add_argument("--compare-only", action="store_true", help="the table's tiles only")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    torch.manual_seed(0)
    ragged = torch.randn(2, 389, 1000, device="cuda").bfloat16()
    small = torch.randn(3, 512, 1024, device="cuda").bfloat16()
    tiles = {name: [] if options.compare_only else list_tiles(name) for name in (*LAYOUTS, "amax")}
    compile_together(
        [make_call(small, name, tile, "e4m3") for name in tiles for tile in tiles[name]]
    )
    errors: list[str] = []
    print(f"{sum(map(len, tiles.values()))} kernels after {time.perf_counter() - began:.0f} s")

    for name, candidates in tiles.items():
        right = [tile for tile in candidates if has_right_bytes(small, name, tile, "e4m3")]
        for tile in set(candidates) - set(right):
            print(f"WRONG BYTES: {name} {tile}")
            errors.append(f"wrong bytes: {name} {tile}")
        tiles[name] = right
        for fp8_dtype in FORMATS:
            for x in (ragged, small):
                if not has_right_bytes(x, name, None, fp8_dtype):
                    print(f"WRONG BYTES: {name}, the table's tile, {fp8_dtype}")
                    errors.append(f"wrong bytes: {name} {fp8_dtype}")

    rows = []
    for shape in SHAPES:
        x = torch.randn(shape, device="cuda").bfloat16()
        for name, candidates in tiles.items():
            if not candidates:
                continue
            found = sweep(x, name, candidates, "e4m3")
            best = [Tile(*(row[key] for key in Tile._fields)) for row in found[:FINALISTS]]
            if name != "amax":
                finalists = best
                compile_together([make_call(x, name, tile, "e4m3") for tile in finalists])
                found = sweep(x, name, finalists, "e4m3") + found[FINALISTS:]
            rows += found
            print_rows(f"{list(shape)} {name}, sweep", found[: options.show])
        for fp8_dtype in FORMATS:
            found = compare(x, fp8_dtype)
            rows += found
            print_rows(f"{list(shape)} {fp8_dtype}, table's tiles and TE", found)
        del x
    host = measure_host()
    print("host, microseconds:", {name: value and round(value, 1) for name, value in host.items()})
    if options.out:
        meta = stored_results.collect_meta(arguments, options.commit)
        # That function names the main program; this one is another.
        meta["command"] = "python benchmarks/quantize_kernels.py"
        options.out.parent.mkdir(parents=True, exist_ok=True)
        meta |= {"host_us": host, "errors": errors}
        options.out.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    print(f"{time.perf_counter() - began:.0f} s")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
