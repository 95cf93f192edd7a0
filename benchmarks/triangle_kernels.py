# SPDX-License-Identifier: Apache-2.0
"""Tunes the kernels of the triangle multiplicative update: time, bandwidth and rate of tiles, kernel by kernel.

    python benchmarks/triangle_kernels.py --out triangle_kernels.json

Input: one CUDA GPU. Output: a table on the terminal and JSON. A candidate whose
results are not near FP64 gets no time. The winners go into the `choose_..._tile` functions by hand.

Bytes are those that must move, each tensor once; operations those of the matrix products, gates and projections
that backward computes again among them. The share of the roof is the larger of bytes over the bandwidth of a copy
and operations over 750 TFLOP/s (BF16, torch.bmm on an H200), over the time.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterator

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from benchmarks import stored_results
from benchmarks.timing import CudaClock, describe_error, interleave
from transformer_engine_batched.kernels import (
    triangle_backward,
    triangle_forward,
    triangle_output,
    triangle_output_backward,
    triangle_project,
    triangle_project_backward,
    triangle_tiles,
    triangle_weight_gradients,
)
from transformer_engine_batched.kernels.triangle_gradients import NormShare
from transformer_engine_batched.kernels.triangle_tiles import GatedProjection, Norm, Tile
from transformer_engine_batched.kernels.turn_codes import turn_codes

SIZES = (256, 384, 768, 1024, 2048)
TUNED_SIZES = (1024, 2048)
CHANNELS = 128
RATE = 750e12
MINIMUM_DB = {torch.uint8: 24.0, torch.bfloat16: 44.0}
ROUNDS, WARMUP = 9, 3


class Data:
    """BF16 tensors of one item, D = H = 128, normal; a mask and no biases, as Boltz has it."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        def weight(rows: int) -> torch.Tensor:
            return normal(rows, CHANNELS) / CHANNELS**0.5

        d = CHANNELS
        self.n = n
        self.z = 2 * normal(1, n, n, d) + 1
        self.c, self.grad_a, self.grad_b = (normal(1, d, n, n) for _ in range(3))
        self.grad_out = normal(1, n, n, d)
        self.norm_in, self.norm_out = (Norm(1 + normal(d) / 5, normal(d) / 5) for _ in range(2))
        self.projection = GatedProjection(weight(2 * d), None, weight(2 * d), None)
        self.output = GatedProjection(weight(d), None, weight(d), None)
        self.mask = (torch.rand(1, n, n, device="cuda") > 0.2).bfloat16()
        self.scales = torch.tensor([20.0, 30.0], device="cuda")
        self.amaxes = torch.zeros(2, device="cuda")
        self.codes = torch.randint(0, 256, (2 * d, n, n), device="cuda", dtype=torch.uint8)
        self.share = triangle_output_backward.output_backward(
            self.grad_out, self.c, self.z, self.norm_in, self.norm_out, self.output
        ).norm_in

    def take_share(self) -> NormShare:
        """What the operands' backward is given; its result takes the place of a part, where it is compared of a copy."""
        share = self.share
        return share._replace(grad_hat=share.grad_hat.clone()) if self.n <= 256 else share

    def project_operands(
        self,
        mode: str = "outgoing",
        fp8_dtype: str | None = "e4m3",
        module: ModuleType = triangle_forward,
    ) -> tuple:
        """Operands a and b."""
        scales = None if fp8_dtype is None else self.scales
        made = module.project_operands(
            self.z, self.norm_in, self.projection, self.mask, mode=mode, fp8_dtype=fp8_dtype,
            scales=scales, amaxes=self.amaxes,
        )  # fmt: skip
        return made[:2]

    def find_amaxes(self, module: ModuleType = triangle_forward) -> tuple:
        """The amaxes of both."""
        return (module.find_operand_amaxes(self.z, self.norm_in, self.projection, self.mask),)

    def project_output(self, module: ModuleType = triangle_forward) -> tuple:
        """The block's output."""
        arguments = (self.c, self.z, self.norm_in, self.norm_out, self.output)
        return (module.project_output(*arguments),)

    def output_backward(self) -> tuple:
        """grad_c alone has a scale of its own: 64."""
        found = triangle_backward.output_backward(
            self.grad_out, self.c, self.z, self.norm_in, self.norm_out, self.output,
            fp8_dtype="e5m2", scale=self.scales.new_full((1,), 64.0), amax=self.amaxes[:1],
        )  # fmt: skip
        return found.grad_c, found.norm_in.grad_hat, *found.norm_out[:2]

    def project_backward(self) -> tuple:
        """grad_z and LN_in's gradients."""
        found = triangle_backward.project_backward(
            self.grad_a, self.grad_b, self.z, self.norm_in, self.projection, self.mask,
            self.take_share(),
        )  # fmt: skip
        return found.z, *found.norm[:2]

    def whole_output_backward(self) -> tuple:
        """All gradients, in CUDA C++."""
        found = triangle_output_backward.output_backward(
            self.grad_out, self.c, self.z, self.norm_in, self.norm_out, self.output,
            fp8_dtype="e5m2", scale=self.scales.new_full((1,), 64.0), amax=self.amaxes[:1],
        )  # fmt: skip
        return found.grad_c, found.norm_in.grad_hat, *found.norm_out[:2], *found.output[::2]

    def whole_project_backward(self) -> tuple:
        """All gradients, in CUDA C++."""
        found = triangle_project_backward.project_backward(
            self.grad_a, self.grad_b, self.z, self.norm_in, self.projection, self.mask,
            self.take_share(),
        )  # fmt: skip
        return found.z, *found.norm[:2], *found.projection[::2]

    def output_weights(self) -> tuple:
        """Gradients of Wo and Wgo."""
        arguments = (self.grad_out, self.c, self.z, self.norm_in, self.norm_out, self.output)
        return triangle_weight_gradients.find_output_gradients(*arguments)[::2]

    def projection_weights(self) -> tuple:
        """Gradients of Wp and Wg."""
        arguments = (self.grad_a, self.grad_b, self.z, self.norm_in, self.projection, self.mask)
        return triangle_weight_gradients.find_projection_gradients(*arguments)[::2]

    def turn(self) -> tuple:
        """Both operands' codes transposed."""
        return (turn_codes(self.codes),)


@dataclass(frozen=True)
class Kernel:
    """What is timed: `products` and `tensors` count D x D matrix products of and BF16 tensors of all positions."""

    call: Callable[[Data], tuple]
    products: int
    tensors: float
    module: ModuleType | None = None
    chooser: str = ""
    candidates: tuple[Tile, ...] = ()


_OPERANDS = (triangle_forward, "choose_operand_tile")
KERNELS = {
    "operands": Kernel(
        lambda data: data.project_operands(), 4, 2, *_OPERANDS,
        (
            Tile(64, 64, 4, 2, 2, True), Tile(64, 64, 4, 2, 1, True), Tile(64, 64, 8, 2, 2, True),
            Tile(64, 64, 8, 2, 1, True), Tile(128, 64, 8, 1, 1, True), Tile(64, 32, 4, 3, 1, False),
        ),
    ),
    "operands, incoming": Kernel(lambda data: data.project_operands("incoming"), 4, 2),
    "operands, BF16": Kernel(lambda data: data.project_operands(fp8_dtype=None), 4, 3),
    "operands, amax": Kernel(lambda data: data.find_amaxes(), 4, 1),
    "operands, CUDA": Kernel(lambda data: data.project_operands(module=triangle_project), 4, 2),
    "operands, incoming, CUDA": Kernel(
        lambda data: data.project_operands("incoming", module=triangle_project), 4, 2
    ),
    "operands, BF16, CUDA": Kernel(
        lambda data: data.project_operands(fp8_dtype=None, module=triangle_project), 4, 3
    ),
    "operands, amax, CUDA": Kernel(lambda data: data.find_amaxes(triangle_project), 4, 1),
    "output": Kernel(
        lambda data: data.project_output(), 2, 3, triangle_forward, "choose_output_tile",
        (
            Tile(64, 128, 4, 2, 1, True), Tile(64, 64, 4, 2, 1, True), Tile(64, 128, 8, 2, 1, True),
            Tile(64, 64, 8, 2, 1, True), Tile(128, 64, 8, 1, 1, True),
        ),
    ),
    "output, CUDA": Kernel(lambda data: data.project_output(triangle_output), 2, 3),
    "turn": Kernel(lambda data: data.turn(), 0, 2),
    "output_backward": Kernel(
        lambda data: data.output_backward(), 4, 4.5, triangle_backward, "choose_output_tile",
        (
            Tile(64, 128, 8, 1, 1, True), Tile(64, 128, 8, 1, 1, False), Tile(32, 128, 8, 2, 1, True),
            Tile(128, 128, 8, 1, 1, False),
        ),
    ),
    "output weights": Kernel(
        lambda data: data.output_weights(), 4, 3, triangle_weight_gradients, "choose_output_tile",
        (
            Tile(64, 128, 8, 1, 1), Tile(64, 64, 4, 2, 1), Tile(32, 64, 4, 2, 2),
            Tile(64, 128, 8, 1, 2), Tile(32, 128, 8, 1, 1),
        ),
    ),
    "project_backward": Kernel(
        lambda data: data.project_backward(), 8, 5, triangle_backward, "choose_input_tile",
        (
            Tile(64, 64, 4, 2, 2), Tile(64, 64, 8, 2, 2), Tile(64, 64, 8, 1, 2),
            Tile(128, 64, 8, 1, 2), Tile(64, 32, 4, 2, 2),
        ),
    ),
    "projection weights": Kernel(
        lambda data: data.projection_weights(), 8, 3, triangle_weight_gradients,
        "choose_projection_tile",
        (
            Tile(64, 64, 4, 2, 1), Tile(128, 64, 8, 1, 1), Tile(64, 64, 8, 2, 1),
            Tile(64, 64, 8, 2, 2), Tile(32, 64, 8, 2, 2),
        ),
    ),
    # Activations and weights together; codes are turned by a second kernel.
    "output_backward, CUDA": Kernel(lambda data: data.whole_output_backward(), 6, 6.5),
    "project_backward, CUDA": Kernel(lambda data: data.whole_project_backward(), 12, 5),
}  # fmt: skip


@contextmanager
def only(kernel: Kernel, tile: Tile | None) -> Iterator[None]:
    """One tile for a kernel; of backward's functions only the kernel for activations."""
    kept = [(kernel.module, kernel.chooser)] if tile is not None else []
    weights = triangle_weight_gradients
    if kernel.module is triangle_backward:
        kept += [(weights, "find_output_gradients"), (weights, "find_projection_gradients")]
        kept += [(triangle_backward, "turn_codes")]
    saved = [(module, name, getattr(module, name)) for module, name in kept]
    try:
        for module, name in kept:
            setattr(module, name, lambda *_: GatedProjection(None, None, None, None))
        if tile is not None:
            setattr(kernel.module, kernel.chooser, lambda *_: tile)
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


def find_expected(data: Data) -> dict[str, tuple]:
    """FP64 results of each kernel, by torch's autograd."""

    def leaf(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.double().requires_grad_()

    z, c = leaf(data.z), leaf(data.c)
    norm_in, norm_out = ([leaf(x) for x in norm[:2]] for norm in (data.norm_in, data.norm_out))
    wp, wg = (leaf(x) for x in data.projection[::2])
    wo, wgo = (leaf(x) for x in data.output[::2])
    normalize = torch.nn.functional.layer_norm
    x = normalize(z, (CHANNELS,), *norm_in, data.norm_in.eps)
    y = normalize(c.permute(0, 2, 3, 1), (CHANNELS,), *norm_out, data.norm_out.eps)
    values = (x @ wp.mT) * (x @ wg.mT).sigmoid() * data.mask.double()[..., None]
    a, b = values.permute(0, 3, 1, 2).chunk(2, 1)
    out = (y @ wo.mT) * (x @ wgo.mT).sigmoid()
    leaves = (c, x, *norm_out, wo, wgo)
    grads = list(torch.autograd.grad(out, leaves, data.grad_out.double(), retain_graph=True))
    outputs = (a, b, x)
    grad_outputs = [data.grad_a.double(), data.grad_b.double(), grads[1]]
    inputs = torch.autograd.grad(outputs, (z, *norm_in, wp, wg), grad_outputs)
    # Of hat, less its mean.
    grad_hat = grads[1] * norm_in[0]
    grads[1] = grad_hat - grad_hat.mean(-1, keepdim=True)
    a, b, out = a.detach(), b.detach(), out.detach()
    expected = {
        "operands": (a, b),
        "operands, incoming": (a.mT, b.mT),
        "operands, BF16": (a, b),
        "operands, amax": (torch.stack([a.abs().max(), b.abs().max()]),),
        "output": (out,),
        "turn": (data.codes.mT,),
        "output_backward": grads[:4],
        "output weights": grads[4:],
        "project_backward": inputs[:3],
        "projection weights": inputs[3:],
    }
    # The same in CUDA C++.
    expected |= {f"{name}, CUDA": x for name, x in expected.items()}
    return expected | {"output_backward, CUDA": grads, "project_backward, CUDA": inputs}


def decode(data: Data, name: str, index: int, result: torch.Tensor) -> torch.Tensor:
    """Codes as numbers."""
    if result.dtype != torch.uint8 or name == "turn":
        return result.double()
    if name.startswith("output_backward"):
        return result.view(torch.float8_e5m2).double() / 64
    return result.view(torch.float8_e4m3fn).double() / data.scales[index].double()


def is_right(data: Data, name: str, tile: Tile | None, expected: tuple) -> bool:
    """The gate."""
    kernel = KERNELS[name]
    try:
        with only(kernel, tile):
            results = kernel.call(data)
        for index, (result, wanted) in enumerate(zip(results, expected)):
            error = (decode(data, name, index, result) - wanted.double()).square().sum()
            ratio = 10 * torch.log10(wanted.double().square().sum() / error)
            if error != 0 and not ratio >= MINIMUM_DB.get(result.dtype, 44.0):
                print(f"WRONG: {name} {tile}: result {index} has {ratio:.1f} dB")
                return False
    except Exception as error:  # does not compile
        print(f"FAILED: {name} {tile}: {describe_error(error)}")
        return False
    return True


def compile_together(data: Data, wanted: list[tuple[str, Tile | None]]) -> None:
    """Compiles the candidates' kernels, many at a time; an error shows again when one is launched."""
    launch = triangle_tiles.launch

    def compile_only(kernel, num_programs, num_warps, tensors, constants, programs=1):
        registers = 65536 // (programs * num_warps * 32) // 8 * 8
        limit = {"maxnreg": registers} if registers < 255 else {}
        arguments = (*tensors, *constants)
        kernel.warmup(*arguments, grid=(num_programs,), num_warps=num_warps, **limit)

    try:
        triangle_tiles.launch = compile_only
        with ThreadPoolExecutor() as pool:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                for name, tile in wanted:
                    with only(KERNELS[name], tile):
                        KERNELS[name].call(data)
    finally:
        triangle_tiles.launch = launch


def time_kernels(
    data: Data, wanted: list[tuple[str, Tile | None]], bandwidth: float
) -> list[dict[str, Any]]:
    """A row for each kernel and tile."""
    calls = {}
    for name, tile in wanted:

        def call(_: int, name: str = name, tile: Tile | None = tile) -> None:
            with only(KERNELS[name], tile):
                KERNELS[name].call(data)

        calls[f"{name} {tile}"] = call
    samples = interleave(calls, CudaClock(), ROUNDS, WARMUP)
    rows = []
    for name, tile in wanted:
        sample, kernel = samples[f"{name} {tile}"], KERNELS[name]
        row = {"n": data.n, "kernel": name, "tile": tile and list(tile), "reason": sample.reason}
        if sample.median:
            moved = kernel.tensors * 2 * data.n**2 * CHANNELS
            operations = kernel.products * 2 * data.n**2 * CHANNELS**2
            seconds = sample.median / 1e3
            roof = max(moved / bandwidth, operations / RATE)
            row |= {"ms": sample.median, "gbps": moved / seconds / 1e9}
            row |= {"tflops": operations / seconds / 1e12, "roof": roof / seconds}
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A table, a line for each row."""
    for row in rows:
        numbers = row["reason"]
        if row.get("ms"):
            numbers = (
                f"{row['ms']:8.3f} ms {row['gbps']:6.0f} GB/s {row['tflops']:5.0f} TFLOP/s "
                f"{row['roof']:5.0%} of the roof"
            )
        print(f"{row['n']:5} {row['kernel']:24} {row['tile'] or '':26} {numbers}")


def main(arguments: list[str]) -> int:
    """Gate, sweep, the table's tiles at all sizes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file of all rows")
    parser.add_argument("--commit", help="commit of the tree, where it has no .git")
    parser.add_argument("--chosen-only", action="store_true", help="the table's tiles only")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    data = Data(256)
    chosen = [(name, None) for name in KERNELS]
    candidates = [(name, tile) for name in KERNELS for tile in KERNELS[name].candidates]
    candidates = [] if options.chosen_only else candidates
    compile_together(data, chosen + candidates)
    expected = find_expected(data)
    right = {job for job in chosen + candidates if is_right(data, *job, expected[job[0]])}
    print(f"{len(right)} of {len(chosen + candidates)} after {time.perf_counter() - began:.0f} s")
    del expected
    source = torch.empty(2**30, dtype=torch.int16, device="cuda").random_()
    samples = interleave({"copy": lambda _: source.clone()}, CudaClock(), ROUNDS, WARMUP)
    bandwidth = 4 * source.numel() / samples["copy"].median * 1e3
    print(f"copy: {bandwidth / 1e9:.0f} GB/s")
    del source
    rows = []
    for n in SIZES:
        data = Data(n)
        wanted = chosen + (candidates if n in TUNED_SIZES else [])
        found = time_kernels(data, [job for job in wanted if job in right], bandwidth)
        print_rows(found)
        rows += found
        del data
    if options.out:
        meta = stored_results.collect_meta(arguments, options.commit)
        meta["command"] = "python benchmarks/triangle_kernels.py"
        if options.chosen_only:
            meta["command"] += " --chosen-only"
        meta["gbps_copy"] = bandwidth / 1e9
        stored_results.write(options.out, meta, rows)
    print(f"{time.perf_counter() - began:.0f} s")
    return 0 if len(right) == len(chosen + candidates) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
