# SPDX-License-Identifier: Apache-2.0
"""Suite `einsum`: channel-last contractions by `te.BatchedEinsum`, against torch.einsum in BF16, and its kernels.

Input: one CUDA GPU. Output: rows of device time and peak memory per point, variant and pass, quantization and
layout changes included, and rows of kernels with the bandwidth of the bytes that must move. Each variant passes
the correctness gate first or has no time. Inputs need no rotation from N = 1024 on: a pass reads and writes many
times the cache; below, operands may stay in it, for all variants.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Callable, Mapping

import torch

from benchmarks import timing
from benchmarks.module_suite import HeadStartClock
from benchmarks.stored_results import clean_reason
from benchmarks.training import make_region

Row = dict[str, Any]

FORWARD_BACKWARD = "forward_backward"
FORWARD = "forward"
KERNEL = "kernel"
PASSES = (FORWARD_BACKWARD, FORWARD)
EQUATIONS = {"outgoing": "bikd,bjkd->bijd", "incoming": "bkid,bkjd->bijd"}
CHANNELS = 128
# Worst sampled slice against FP64 of the BF16 operands, dB: result and gradients. E4M3 x E4M3 has 28.5 on normal
# data, E5M2 x E4M3 24.6; BF16 is capped at 55.6 by the rounding of the result.
MINIMUM_DB = {"bf16": (50.0, 50.0), "float8": (27.5, 24.0)}


@dataclass(frozen=True)
class EinsumPoint:
    """Pairs ``[1, size, size, CHANNELS]``, contracted in one direction."""

    size: int
    mode: str = "outgoing"

    @property
    def name(self) -> str:
        """Key of the point in the stored results."""
        return f"N{self.size}_{self.mode}"


@dataclass(frozen=True)
class KernelPoint:
    """The kernels alone, on a pair ``[1, size, size, CHANNELS]``."""

    size: int

    @property
    def name(self) -> str:
        """Key of the point in the stored results."""
        return f"N{self.size}_kernels"


POINTS = (
    KernelPoint(1024),
    KernelPoint(2048),
    *(EinsumPoint(size) for size in (256, 384, 512, 712, 1024)),
    *(EinsumPoint(2048, mode) for mode in EQUATIONS),
)
QUICK = (KernelPoint(1024), EinsumPoint(512), EinsumPoint(2048))


@dataclass(frozen=True)
class EinsumVariant:
    """How the contraction is run; a costly variant has its largest points only."""

    name: str
    label: str
    recipe: str = "bf16"
    is_tuned: bool = False
    smallest: int = 0

    def runs_at(self, point: EinsumPoint) -> bool:
        """Whether it has rows at a point."""
        return point.size >= self.smallest


BASELINE = EinsumVariant("torch_einsum", "torch.einsum BF16")
VARIANTS = (
    BASELINE,
    EinsumVariant("torch_compile", "the same, torch.compile", smallest=2048),
    EinsumVariant("ours_delayed", "delayed scaling", "delayed"),
    EinsumVariant("ours_current", "current scaling", "current"),
    EinsumVariant("ours_delayed_tuned", "delayed scaling, autotune", "delayed", is_tuned=True),
)
LABELS = {variant.name: variant.label for variant in VARIANTS}
# Kernel -> (label, bytes that must move for an element of BF16).
KERNELS = {
    "copy": ("device-to-device copy", 4),
    "ours_rowwise": ("FP8 codes of the matrices", 3),
    "ours_transposed": ("FP8 codes of their transposes", 3),
    "ours_both": ("both", 4),
    "ours_current_both": ("both, current scaling (two reads)", 6),
    "ours_permute": ("result back to channel-last", 4),
    "torch_permute": ("the same, torch", 4),
}


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int = 12
    warmup: int = 2


class Step:
    """One training step (or one inference) of a variant, as a user writes it."""

    def __init__(self, variant: EinsumVariant, point: EinsumPoint, device: str) -> None:
        import transformer_engine.pytorch as te

        equation = EQUATIONS[point.mode]
        generator = torch.Generator(device=device).manual_seed(0)
        shape = (1, point.size, point.size, CHANNELS)
        options = {"generator": generator, "device": device, "dtype": torch.bfloat16}
        self.a, self.b, self.grad = (torch.randn(shape, **options) for _ in range(3))
        self.a.requires_grad_()
        self.b.requires_grad_()
        self.equation = equation
        self.region = make_region(variant.recipe)
        if variant.recipe != "bf16":
            self.contract = te.BatchedEinsum(equation)
            return
        # Two arguments: torch.einsum is given the equation in front.
        self.contract = lambda a, b: torch.einsum(equation, a, b)
        if variant.name == "torch_compile":
            self.contract = torch.compile(self.contract)

    def run(self, pass_name: str) -> tuple[torch.Tensor, ...]:
        """The pass of that name: result, and gradients if it has them."""
        if pass_name == FORWARD:
            with torch.no_grad(), self.region():
                return (self.contract(self.a, self.b),)
        with self.region():
            y = self.contract(self.a, self.b)
        return y.detach(), *torch.autograd.grad(y, (self.a, self.b), self.grad)

    def measure_sqnr(self, pass_name: str) -> list[float]:
        """Worst of three channels in dB, of the result and of each gradient."""
        found = []
        channels = [0, CHANNELS // 2, CHANNELS - 1]
        results = self.run(pass_name)
        a, b, grad = (x.detach()[..., channels].double() for x in (self.a, self.b, self.grad))
        a.requires_grad_()
        b.requires_grad_()
        # torch's own einsum is slow for a strided batch, not wrong.
        y = torch.einsum(self.equation, a, b)
        exact = y.detach(), *torch.autograd.grad(y, (a, b), grad)
        for result, wanted in zip(results, exact):
            error = (result[..., channels].double() - wanted).square().sum((0, 1, 2))
            ratio = 10 * torch.log10(wanted.square().sum((0, 1, 2)) / error)
            found.append(ratio.nan_to_num(-1000.0).min().item())
        return found


def measure_peak_mib(step: Step, pass_name: str) -> float:
    """MiB that a warm pass takes at its peak beyond its inputs, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step.run(pass_name)
    torch.cuda.synchronize()
    del results
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def empty_row(point: EinsumPoint | KernelPoint, variant: str, pass_name: str) -> Row:
    """The row of a variant that has not run yet; every field that rows have."""
    return {
        "point": point.name,
        "mode": None,
        **asdict(point),
        "channels": CHANNELS,
        "variant": variant,
        "pass": pass_name,
        "sqnr_db": None,
        "median_ms": None,
        "quartiles_ms": None,
        "samples": 0,
        "ratio_to_einsum": None,
        "gbps": None,
        "peak_mib": None,
        "reason": None,
    }


def _prepare(step: Step, variant: EinsumVariant, rows: Mapping[str, Row]) -> None:
    """Warms up, checks, and fills accuracy and peak memory."""
    if variant.is_tuned:
        import transformer_engine_batched as teb

        with teb.autotune():
            for pass_name in PASSES:
                step.run(pass_name)
    # Delayed scaling begins with a scale of 1; two steps give it a history.
    for _ in range(2):
        step.run(FORWARD_BACKWARD)
    gates = MINIMUM_DB["bf16" if variant.recipe == "bf16" else "float8"]
    for pass_name, row in rows.items():
        row["sqnr_db"] = step.measure_sqnr(pass_name)
        row["peak_mib"] = measure_peak_mib(step, pass_name)
        for name, found, bound in zip(
            ("result", "gradient", "gradient"), row["sqnr_db"], (gates[0], *gates[1:] * 2)
        ):
            if found < bound:
                row["reason"] = f"{name} at {found:.1f} dB, under the gate of {bound} dB"


def _fill(row: Row, found: timing.Samples) -> None:
    if found.reason is not None or found.median is None:
        row["reason"] = clean_reason(found.reason or "no samples")
        return
    row.update(median_ms=found.median, quartiles_ms=found.quartiles, samples=len(found.values))


def measure_point(
    point: EinsumPoint, clock: Any, settings: Settings, lost: Mapping[str, str] | None = None
) -> list[Row]:
    """Rows of one point, one per variant and pass; `lost` as in the other suites.

    Raises
    ------
    timing.DeviceLostError
        If the device stops answering; the process cannot measure anything more.
    """
    variants = [variant for variant in VARIANTS if variant.runs_at(point)]
    rows = {v.name: {p: empty_row(point, v.name, p) for p in PASSES} for v in variants}
    steps = {}
    # Tuned ones last: a choice serves all products of its kind.
    for tuned in (False, True):
        phase = {}
        for variant in (v for v in variants if v.is_tuned == tuned):
            mine = rows[variant.name]
            for row in mine.values():
                row["reason"] = (lost or {}).get(variant.name)
            if variant.name in (lost or {}):
                continue
            try:
                phase[variant.name] = Step(variant, point, "cuda")
                _prepare(phase[variant.name], variant, mine)
            except Exception as error:
                phase.pop(variant.name, None)
                for row in mine.values():
                    row["reason"] = clean_reason(timing.describe_error(error))
                timing.check_device(variant.name, error, clock.settle)
        for pass_name in PASSES:
            calls = {
                name: (lambda _, step=step: step.run(pass_name))
                for name, step in phase.items()
                if rows[name][pass_name]["reason"] is None
            }
            for name, found in timing.interleave(
                calls, clock, settings.rounds, settings.warmup
            ).items():
                _fill(rows[name][pass_name], found)
        steps |= phase
    for pass_name in PASSES:
        baseline = rows[BASELINE.name][pass_name]["median_ms"]
        for mine in rows.values():
            if baseline and mine[pass_name]["median_ms"]:
                mine[pass_name]["ratio_to_einsum"] = baseline / mine[pass_name]["median_ms"]
    return [row for mine in rows.values() for row in mine.values()]


def make_kernel_calls(size: int) -> dict[str, Callable[[int], Any]]:
    """Each kernel as a call, after its result has been compared with torch's."""
    from transformer_engine_batched.kernels.channel_last import find_cast
    from transformer_engine_batched.kernels.permute import copy_permuted

    stored = torch.randn(1, size, size, CHANNELS, device="cuda").bfloat16()
    x = stored.permute(0, 3, 1, 2)
    scale, amax = torch.full((1,), 40.0, device="cuda"), torch.zeros(1, device="cuda")
    layouts = {"rowwise": (True, False), "transposed": (False, True), "both": (True, True)}

    def cast(rowwise: bool, transposed: bool) -> tuple:
        return find_cast(x, "e4m3", rowwise=rowwise, transposed=transposed).with_scale(
            x, scale, amax
        )

    for channel in (0, CHANNELS - 1):
        wanted = (x[0, channel].float() * 40).to(torch.float8_e4m3fn).view(torch.uint8)
        for layout in layouts.values():
            codes, turned, _ = cast(*layout)
            assert codes is None or torch.equal(codes[0, channel], wanted)
            assert turned is None or torch.equal(turned[0, channel], wanted.mT)
    result = x.contiguous()
    out = torch.full_like(stored, float("nan")).permute(0, 3, 1, 2)
    assert torch.equal(copy_permuted(result, out), result)
    target = torch.empty_like(stored)
    calls = {f"ours_{name}": (lambda _, y=layout: cast(*y)) for name, layout in layouts.items()}
    return calls | {
        "copy": lambda _: target.copy_(stored),
        "ours_current_both": lambda _: find_cast(
            x, "e4m3", rowwise=True, transposed=True
        ).with_own_scale(x),
        "ours_permute": lambda _: copy_permuted(result, out),
        "torch_permute": lambda _: out.copy_(result),
    }


def measure_kernels(
    point: KernelPoint, clock: Any, settings: Settings, lost: Mapping[str, str] | None = None
) -> list[Row]:
    """Rows of the kernels at one size."""
    rows = {name: empty_row(point, name, KERNEL) for name in KERNELS}
    calls = {k: v for k, v in make_kernel_calls(point.size).items() if k not in (lost or {})}
    num_elements = point.size**2 * CHANNELS
    for name, found in timing.interleave(calls, clock, settings.rounds, settings.warmup).items():
        _fill(rows[name], found)
        if rows[name]["median_ms"]:
            rows[name]["gbps"] = num_elements * KERNELS[name][1] / rows[name]["median_ms"] / 1e6
    for name, reason in (lost or {}).items():
        rows[name]["reason"] = reason
    return list(rows.values())


def format_rows(results: dict[str, Any]) -> list[str]:
    """Lines for the terminal."""
    lines = [f"{'point':18}{'variant':20}{'pass':18}{'ms':>9}{'x':>7}{'GB/s':>6}{'MiB':>7}  dB"]
    for row in results["rows"]:
        shown = [
            "-" if row[name] is None else f"{row[name]:.{digits}f}"
            for name, digits in (
                ("median_ms", 4),
                ("ratio_to_einsum", 2),
                ("gbps", 0),
                ("peak_mib", 0),
            )
        ]
        decibels = ", ".join(f"{db:.1f}" for db in row["sqnr_db"] or ())
        lines.append(
            f"{row['point']:18}{row['variant']:20}{row['pass']:18}{shown[0]:>9}{shown[1]:>7}{shown[2]:>6}"
            f"{shown[3]:>7}  {decibels}" + (f"  {row['reason']}" if row["reason"] else "")
        )
    return lines


def find_failures(results: dict[str, Any]) -> list[str]:
    """Rows of our own variants without a time."""
    return [
        f"einsum {row['point']} {row['variant']} {row['pass']}: {row['reason']}"
        for row in results["rows"]
        if row["variant"].startswith("ours") and row["median_ms"] is None
    ]


def make_measure(is_quick: bool) -> Callable[[Any, Mapping[str, str]], list[Row]]:
    """What `run.run_suite` calls for a point on the current GPU."""
    settings = Settings(rounds=6) if is_quick else Settings()
    clock = HeadStartClock()

    def measure(point: EinsumPoint | KernelPoint, lost: Mapping[str, str]) -> list[Row]:
        measure_one = measure_kernels if isinstance(point, KernelPoint) else measure_point
        return measure_one(point, clock, settings, lost)

    return measure


def name_calls(point: EinsumPoint | KernelPoint) -> list[str]:
    """Names of all calls that a point makes."""
    if isinstance(point, KernelPoint):
        return list(KERNELS)
    return [variant.name for variant in VARIANTS if variant.runs_at(point)]
