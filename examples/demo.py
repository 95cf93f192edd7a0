# SPDX-License-Identifier: Apache-2.0
"""Triangle multiplication on a real protein complex: its contraction in BF16 and in three FP8 recipes, then the
whole block through ``te.TriangleMultiplication``, forward and backward.

Input: ``examples/data/1tii_ca.csv``. Output: tables on the terminal, ``triangle_1tii.png`` and
``triangle_1tii.json`` in ``--out``.
Must not import: of ``transformer_engine_batched``, anything but its top level and what it says of
devices.

Run it with ``make demo``, or ``python examples/demo.py --help``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import transformer_engine_batched as teb
from transformer_engine_batched import support
from transformer_engine_batched.__main__ import collect_versions
from transformer_engine_batched.plan import describe_device

import picture
from blocks import OURS, BlockInputs, BlockMeasurement, compare_blocks, find_peer
from protein import Complex, pair_features, pair_representation, read_complex
from recipes import RECIPES, Recipe, count_bytes, multiply
from triangle import DIRECTIONS, TriangleMultiplication, contract

HERE = Path(__file__).resolve().parent
CHANNELS = 128
CPU_CROP = 256
# The whole block, backward included, takes a CPU several times as long as its contraction.
CPU_BLOCK_CROP = 64
# The step before, on which delayed scaling calibrates, sees the atoms where they were a moment ago.
# Angstrom per axis: thermal motion in a crystal with a B factor of 20 square angstrom, sqrt(B / (8
# pi^2)).
THERMAL_MOTION = 0.5
WARM_UPS, REPEATS = 5, 20


@dataclass
class Measurement:
    """One row of the table: SQNR in dB as `sqnr_db` has it, times in milliseconds or None."""

    name: str
    engine: str
    sqnr_db: float
    worst_db: float
    worst_channel: int
    output_db: float
    operand_bytes: int
    padded_size: int
    passed: bool = True
    product_ms: float | None = None
    with_quantization_ms: float | None = None
    channel_sqnr_db: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    """All rows of one direction, and what the picture shows of it."""

    direction: str
    distance: np.ndarray
    num_channels: int
    measurements: list[Measurement] = field(default_factory=list)
    blocks: list[BlockMeasurement] = field(default_factory=list)
    block_size: int = 0
    channel: int = 0
    channel_product: np.ndarray | None = None
    channel_error: np.ndarray | None = None


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Triangle multiplication of PDB 1TII with the contraction in BF16 and FP8.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--crop",
        type=int,
        default=None,
        metavar="N",
        help=f"first N residues; 0: all; default: all on a GPU, {CPU_CROP} without one",
    )
    parser.add_argument("--device", default=None, help="cuda or cpu; default: cuda if there is one")
    parser.add_argument(
        "--out", type=Path, default=HERE / "out", metavar="DIR", help="folder of the results"
    )
    parser.add_argument("--seed", type=int, default=0, help="of projection and weights")
    parser.add_argument(
        "--hidden", type=int, default=128, metavar="D", help="contracted channels, the batch"
    )
    options = parser.parse_args(arguments)
    if options.crop is not None and options.crop < 0:
        parser.error(f"--crop must be 0 or more, got {options.crop}")
    if options.hidden < 1:
        parser.error(f"--hidden must be 1 or more, got {options.hidden}")
    return options


def sqnr_db(reference: torch.Tensor, value: torch.Tensor) -> tuple[float, list[float]]:
    """``10 log10(sum ref^2 / sum (ref - value)^2)`` in FP64: of all, and of each item of dim 0."""
    reference = reference.double().flatten(1)
    noise = (reference - value.double().flatten(1)).square().sum(dim=1)
    signal = reference.square().sum(dim=1)
    return _decibels(signal.sum(), noise.sum()), _decibels(signal, noise)


def _decibels(signal: torch.Tensor, noise: torch.Tensor) -> float | list[float]:
    return (10 * torch.log10(signal / noise)).tolist()


def median_ms(call: Callable[[], object]) -> float:
    """Median of `REPEATS` calls on the GPU after `WARM_UPS`, by CUDA events."""
    for _ in range(WARM_UPS):
        call()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def compare(
    direction: str,
    complex_: Complex,
    options: argparse.Namespace,
    device: torch.device,
    step: Callable[[str], None],
) -> Comparison:
    """Run one direction of the block with every recipe; `step` is told what comes next."""
    step(f"{direction}: pair representation and projections")
    z = pair_representation(complex_, CHANNELS, options.seed, device)
    # Every residue of the file has coordinates, so no pair is masked out.
    mask = torch.ones(z.shape[:3], device=device)
    block = TriangleMultiplication(direction, CHANNELS, options.hidden, options.seed + 1).to(device)
    earlier = pair_representation(
        complex_.displaced(THERMAL_MOTION, options.seed), CHANNELS, options.seed, device
    )
    calibration = [x[0].bfloat16() for x in block.operands(earlier, mask)]
    del earlier
    a, b = (x[0] for x in block.operands(z, mask))

    step(f"{direction}: reference in FP64")
    reference = contract(a.double(), b.double(), direction)
    expected = block.finish(z, reference[None])

    def measure(name: str, engine: str, product: torch.Tensor, operand_bytes: int) -> Measurement:
        overall, channels = sqnr_db(reference, product)
        worst = min(range(len(channels)), key=channels.__getitem__)
        return Measurement(
            name=name,
            engine=engine,
            sqnr_db=overall,
            worst_db=channels[worst],
            worst_channel=worst,
            output_db=sqnr_db(expected, block.finish(z, product[None]))[0],
            operand_bytes=operand_bytes,
            padded_size=len(complex_),
            channel_sqnr_db=channels,
        )

    step(f"{direction}: FP32")
    product = contract(a, b, direction)
    distance = pair_features(complex_).distance.numpy()
    result = Comparison(direction, distance, num_channels=len(reference))
    result.measurements.append(measure("FP32", "torch", product, a.nbytes + b.nbytes))
    if device.type == "cuda":
        elapsed = median_ms(lambda: contract(a, b, direction))
        result.measurements[0].product_ms = elapsed
        result.measurements[0].with_quantization_ms = elapsed
    # In a model the operands of the contraction arrive in BF16, so that is what the recipes are
    # given.
    a, b = a.bfloat16(), b.bfloat16()

    for recipe in RECIPES:
        step(f"{direction}: {recipe.name}")
        row, product = run_recipe(recipe, a, b, calibration, direction, device, measure)
        result.measurements.append(row)
        if recipe.name == picture.SHOWN_RECIPE:
            result.channel = row.worst_channel
            shown = reference[row.worst_channel]
            result.channel_product = shown.cpu().numpy()
            result.channel_error = (product[row.worst_channel] - shown).cpu().numpy()
    del a, b, reference, expected, product
    result.block_size = min(
        len(complex_), CPU_BLOCK_CROP if device.type != "cuda" else len(complex_)
    )
    result.blocks = run_blocks(block, complex_.crop(result.block_size), options, device, step)
    return result


def run_blocks(
    block: TriangleMultiplication,
    complex_: Complex,
    options: argparse.Namespace,
    device: torch.device,
    step: Callable[[str], None],
) -> list[BlockMeasurement]:
    """The whole block in each recipe, forward and backward."""
    now, before = (
        pair_representation(x, CHANNELS, options.seed, device)
        for x in (complex_, complex_.displaced(THERMAL_MOTION, options.seed))
    )
    generator = torch.Generator().manual_seed(options.seed + 2)
    gradient = torch.randn(now.shape, generator=generator).to(device)
    inputs = BlockInputs(now, before, torch.ones(now.shape[:3], device=device), gradient)
    return compare_blocks(
        block, inputs, median_ms, lambda name: step(f"{block.direction} block: {name}")
    )


def count_steps() -> int:
    """Calls of `step` for one direction."""
    contraction = 3 + len(RECIPES)
    return contraction + 2 + (find_peer() is not None) + len(OURS)


def run_recipe(
    recipe: Recipe,
    a: torch.Tensor,
    b: torch.Tensor,
    calibration: list[torch.Tensor],
    direction: str,
    device: torch.device,
    measure: Callable[..., Measurement],
) -> tuple[Measurement, torch.Tensor]:
    """One recipe: quantize, multiply, compare, and on hardware that runs it, time."""
    size = a.shape[-1]
    native = support.find_native_engine(recipe.format, describe_device(device)).engine
    with contextlib.nullcontext() if native else teb.emulate():
        quantizers = [None, None]
        if recipe.make_quantizer is not None:
            columnwise = direction == "incoming"
            quantizers = [recipe.make_quantizer(x, columnwise) for x in calibration]

        def prepare() -> list[torch.Tensor]:
            return [recipe.prepare(x, quantizer) for x, quantizer in zip((a, b), quantizers)]

        operands = prepare()
        product = multiply(*operands, direction, size)
        num_bytes = sum(count_bytes(operand) for operand in operands)
        row = measure(recipe.name, native or "emulated", product, num_bytes)
        row.padded_size = operands[0].shape[-1]
        row.passed = row.sqnr_db >= recipe.min_sqnr_db and row.worst_db >= recipe.min_slice_db
        if native and device.type == "cuda":
            row.product_ms = median_ms(lambda: multiply(*operands, direction, size))
            row.with_quantization_ms = median_ms(lambda: multiply(*prepare(), direction, size))
    return row, product


def show_header(
    console: Console,
    complex_: Complex,
    total: int,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """What is about to run, and on what."""
    size = len(complex_)
    chains = "  ".join(f"{name} {end - first}" for name, first, end in complex_.chain_spans())
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    grid.add_row("Complex", f"PDB 1TII, {size} of {total} residues; chains: {chains}")
    grid.add_row("Pair representation", f"[1, N, N, {CHANNELS}] with N = {size}, FP32")
    grid.add_row(
        "Contraction",
        f"D = {options.hidden} products of [N, N] x [N, N], "
        f"{2 * options.hidden * size**3 / 1e9:.3g} GFLOP per direction",
    )
    grid.add_row("Mask", f"none of the {size} x {size} pairs is masked: all residues are resolved")
    grid.add_row("Device", describe_device(device).name if device.type == "cuda" else cpu_name())
    versions = ", ".join(f"{name} {version}" for name, version in collect_versions().items())
    grid.add_row("Versions", versions)
    console.print(Panel(grid, title="Triangle multiplication, batched FP8", title_align="left"))
    if device.type != "cuda":
        note = "No GPU in use: FP8 is emulated with exact arithmetic, so no times are shown."
        if size < total:
            note += f" The first {size} residues keep it short; --crop 0 runs all {total}."
        console.print(note, style="yellow")


def cpu_name() -> str:
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def show_comparison(console: Console, comparison: Comparison, with_times: bool) -> None:
    """The table of one direction."""
    formula = {
        "outgoing": "out[d,i,j] = sum_k a[d,i,k] b[d,j,k]   (layout TN, row-wise codes)",
        "incoming": "out[d,i,j] = sum_k a[d,k,i] b[d,k,j]   (layout NT, column-wise codes)",
    }
    # No vertical lines, and no air in a narrow window: the ten columns fit into 80 characters.
    padding = (0, 1 if console.width >= 96 else 0)
    table = Table(box=box.SIMPLE_HEAD, padding=padding, collapse_padding=True, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for heading in ("SQNR\ndB", "worst\nslice", "block\noutput", "size\nMiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    if with_times:
        for heading in ("time\nms", "over\nBF16", "+quant\nms", "over\nBF16"):
            table.add_column(heading, justify="right", no_wrap=True)
    baseline = next(row for row in comparison.measurements if row.name == "BF16")
    for row in comparison.measurements:
        cells = [
            row.name,
            row.engine,
            f"{row.sqnr_db:.1f}",
            f"{row.worst_db:.1f}",
            f"{row.output_db:.1f}",
            f"{row.operand_bytes / 2**20:.1f}",
        ]
        if with_times:
            for mine, theirs in (
                (row.product_ms, baseline.product_ms),
                (row.with_quantization_ms, baseline.with_quantization_ms),
            ):
                cells += ["-", "-"] if mine is None else [f"{mine:.3f}", f"{theirs / mine:.2f}x"]
        table.add_row(*cells, style=None if row.passed else "red")
    console.print()
    console.print(Text(comparison.direction, "bold"), Text(formula[comparison.direction]))
    console.print(table)


def show_blocks(console: Console, comparison: Comparison, with_times: bool) -> None:
    """The whole block of one direction."""
    padding = (0, 1 if console.width >= 96 else 0)
    table = Table(box=box.SIMPLE_HEAD, padding=padding, collapse_padding=True, pad_edge=False)
    table.add_column("block", no_wrap=True)
    table.add_column("pipeline", no_wrap=True)
    headings = ["output\ndB", "grad z\ndB", "weights\ndB"]
    if with_times:
        headings += ["forward\nms", "over\ntorch", "+backward\nms", "over\ntorch", "peak\nMiB"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    baseline = comparison.blocks[0]
    for row in comparison.blocks:
        decibels = (row.output_db, row.gradient_z_db, row.gradient_weights_db)
        cells = [row.name, row.engine, *(f"{db:.1f}" for db in decibels)]
        if with_times:
            for mine, theirs in (
                (row.forward_ms, baseline.forward_ms),
                (row.step_ms, baseline.step_ms),
            ):
                cells += ["-", "-"] if mine is None else [f"{mine:.3f}", f"{theirs / mine:.2f}x"]
            cells.append("-" if row.peak_mib is None else f"{row.peak_mib:.0f}")
        table.add_row(*cells, style=None if row.passed else "red")
    console.print()
    size = comparison.block_size
    console.print(Text(f"{comparison.direction}, the whole block", "bold"), f"N = {size}")
    console.print(table)


def show_notes(console: Console, comparisons: list[Comparison], with_times: bool) -> None:
    """What the columns mean, as far as this run needs it."""
    rows = [row for comparison in comparisons for row in comparison.measurements]
    size = len(comparisons[0].distance)
    notes = [
        "SQNR: signal over quantization noise against FP64, higher is better, 6 dB more is half "
        "the error. Worst slice: the lowest of the channels. Block output: after LayerNorm, "
        "projection and gate."
    ]
    blocks = [row for comparison in comparisons for row in comparison.blocks]
    notes.append(
        "The whole block: te.TriangleMultiplication with the weights of the plain one, forward and backward, SQNR "
        "against FP64. Weights: the lowest of the six gradients. Bound: scales from the weights alone."
    )
    if not any(row.engine == "peer" for row in blocks):
        missing = "not installed" if with_times else "needs a GPU"
        notes.append(f"cuEquivariance has no line here: {missing}.")
    padded = {row.name: row.padded_size for row in rows if row.padded_size != size}
    if padded:
        sizes = ", ".join(f"{name} {value}" for name, value in padded.items())
        notes.append(f"N = {size} is padded with zeros before it is quantized: {sizes}.")
    notes.append(
        "Size: both factors as stored, codes and scales. Incoming, the per-tensor quantizers "
        "of Transformer Engine keep row-wise codes beside the column-wise ones."
    )
    if any(row.engine == "emulated" for row in rows):
        notes.append("Emulated: exact arithmetic of a recipe this device lacks, so without a time.")
    if with_times:
        notes.append(
            f"Times: CUDA events, median of {REPEATS} after {WARM_UPS} warm-ups; '+quant' pads "
            "and quantizes both operands first. Over BF16: how many times faster than that row."
        )
    console.print()
    for note in notes:
        console.print(note, style="dim", highlight=False)


def save_results(
    path: Path,
    comparisons: list[Comparison],
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """The numbers behind tables and picture, as JSON."""
    shown = {"seed": options.seed, "hidden": options.hidden, "crop": len(comparisons[0].distance)}
    content = {
        "command": "python examples/demo.py "
        + " ".join(f"--{name} {value}" for name, value in shown.items()),
        "device": describe_device(device).name,
        "versions": collect_versions(),
        "directions": {
            comparison.direction: [asdict(row) for row in comparison.measurements]
            for comparison in comparisons
        },
        "blocks": {
            comparison.direction: {
                "size": comparison.block_size,
                "rows": [asdict(row) for row in comparison.blocks],
            }
            for comparison in comparisons
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 when every recipe reached the accuracy its format must have, else 1."""
    options = parse_arguments(arguments)
    started = time.perf_counter()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    crop = options.crop
    if crop is None:
        crop = 0 if device.type == "cuda" else CPU_CROP
    whole = read_complex(HERE / "data" / "1tii_ca.csv")
    complex_ = whole.crop(crop)

    console = Console()
    if not console.is_terminal:
        # In a file or a log there is no window to fit into, and the default of 80 columns cuts the
        # tables.
        console = Console(width=110)
    show_header(console, complex_, len(whole), options, device)

    columns = (
        TextColumn("{task.description:<46}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    comparisons = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(DIRECTIONS) * count_steps() + 1)
        finished = itertools.count()

        def step(description: str) -> None:
            progress.update(task, description=description, completed=next(finished))

        for direction in DIRECTIONS:
            comparisons.append(compare(direction, complex_, options, device, step))
        step("picture")
        options.out.mkdir(parents=True, exist_ok=True)
        image = options.out / "triangle_1tii.png"
        picture.draw(image, complex_, comparisons)
        numbers = options.out / "triangle_1tii.json"
        save_results(numbers, comparisons, options, device)

    with_times = device.type == "cuda"
    for comparison in comparisons:
        show_comparison(console, comparison, with_times)
        show_blocks(console, comparison, with_times)
    show_notes(console, comparisons, with_times)
    console.print()
    console.print(f"Picture: {image}\nNumbers: {numbers}", soft_wrap=True, highlight=False)
    console.print(f"Done in {time.perf_counter() - started:.0f} s.", highlight=False)

    failed = [
        f"{comparison.direction} {row.name}"
        for comparison in comparisons
        for row in comparison.measurements
        if not row.passed
    ]
    failed += [
        f"{comparison.direction} block {row.name}"
        for comparison in comparisons
        for row in comparison.blocks
        if not row.passed
    ]
    if failed:
        console.print(
            f"Below the accuracy its format must have: {', '.join(failed)}", style="bold red"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
