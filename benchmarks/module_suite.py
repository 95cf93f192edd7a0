# SPDX-License-Identifier: Apache-2.0
"""Suite `module`: `te.BatchedMatmul` in training, quantization included, against torch.bmm in BF16.

Input: one CUDA GPU. Output: rows of device time per point, variant and pass (forward and backward, or
forward alone without gradients), and rows of host time. BF16 operands come from the caller in each call, so
that all casts are in the time, and so is the update of scales when an autocast region of delayed
scaling ends. Each variant passes the correctness gate first or has no time.

As in the suite `gemm`, a point has two phases: as it comes, and after `teb.autotune()`, each with the baseline
beside it. Inputs need no rotation: a step reads and writes five times 256 MiB, which leaves nothing of the
operands in the cache.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Callable, Mapping, Sequence

import torch

from benchmarks import gate, timing
from benchmarks.stored_results import clean_reason
from benchmarks.training import make_region

Row = dict[str, Any]

FORWARD_BACKWARD = "forward_backward"
FORWARD = "forward"
PASSES = (FORWARD_BACKWARD, FORWARD)

# Worst sampled item against FP64 of the BF16 operands, dB. On normal data E4M3 x E4M3 has 28.5 dB and
# E5M2 x E4M3 24.5 dB; BF16 is capped at 55.6 dB by the rounding of the result.
MINIMUM_DB = {"bf16": (50.0, 50.0), "float8": (27.0, 23.0)}


@dataclass(frozen=True)
class ModulePoint:
    """Square products ``[batch, size, size]``."""

    size: int
    batch: int

    @property
    def name(self) -> str:
        """Key of the point in the stored results."""
        return f"B{self.batch}_N{self.size}"

    def count_flops(self, pass_name: str) -> int:
        """Floating-point operations; backward has two products."""
        return 2 * self.batch * self.size**3 * (3 if pass_name == FORWARD_BACKWARD else 1)


POINTS = (
    ModulePoint(512, 512),
    ModulePoint(1024, 128),
    ModulePoint(2048, 32),
    ModulePoint(4096, 8),
)
HOST_POINT = ModulePoint(128, 2)


@dataclass(frozen=True)
class ModuleVariant:
    """A recipe (or torch.bmm), as it comes or tuned."""

    name: str
    label: str
    recipe: str
    is_tuned: bool = False


BASELINE = ModuleVariant("torch_bmm", "torch.bmm BF16", "bf16")
VARIANTS = (
    BASELINE,
    ModuleVariant("ours_delayed", "delayed scaling", "delayed"),
    ModuleVariant("ours_current", "current scaling", "current"),
    ModuleVariant("ours_delayed_tuned", "delayed scaling, autotune", "delayed", is_tuned=True),
    ModuleVariant("ours_current_tuned", "current scaling, autotune", "current", is_tuned=True),
)


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int = 20
    warmup: int = 4


@dataclass
class Inputs:
    """BF16 operands and the gradient of the product, ``[batch, size, size]`` each."""

    a: torch.Tensor
    b: torch.Tensor
    grad: torch.Tensor


class HeadStartClock(timing.CudaClock):
    """A head start of 0.5 ms: the host enqueues a whole step before the device begins.

    The host's share is measured apart, and a captured step has none.
    """

    _HEAD_START_CYCLES = 1_000_000


def make_inputs(point: ModulePoint, device: str, seed: int = 0) -> Inputs:
    """Standard normal data."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (point.batch, point.size, point.size)
    a, b, grad = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    return Inputs(a.requires_grad_(), b.requires_grad_(), grad)


class Step:
    """One training step (or one inference) of a variant, as a user writes it."""

    def __init__(self, variant: ModuleVariant, inputs: Inputs, region: Callable[[], Any]) -> None:
        import transformer_engine_batched as teb

        self.inputs = inputs
        self.region = region
        self.multiply = torch.bmm if variant.recipe == "bf16" else teb.BatchedMatmul()

    def forward_backward(self) -> tuple[torch.Tensor, ...]:
        """Product and both gradients."""
        x = self.inputs
        with self.region():
            y = self.multiply(x.a, x.b)
        return y.detach(), *torch.autograd.grad(y, (x.a, x.b), x.grad)

    def forward(self) -> tuple[torch.Tensor]:
        """The product alone; no gradient is prepared."""
        with torch.no_grad(), self.region():
            return (self.multiply(self.inputs.a, self.inputs.b),)

    def run(self, pass_name: str) -> tuple[torch.Tensor, ...]:
        """The pass of that name."""
        return self.forward_backward() if pass_name == FORWARD_BACKWARD else self.forward()

    def count_saved_bytes(self) -> int:
        """Bytes that autograd keeps between forward and backward; a storage counts once."""
        storages: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), self.region():
            y = self.multiply(self.inputs.a, self.inputs.b)
        torch.autograd.grad(y, (self.inputs.a, self.inputs.b), self.inputs.grad)
        return sum(storages.values())


def sample_items(batch: int) -> list[int]:
    """First, middle and last."""
    return sorted({0, batch // 2, batch - 1})


def multiply_exactly(inputs: Inputs, items: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Product and gradients of some items in FP64."""
    a, b, grad = (x.detach()[list(items)].double() for x in (inputs.a, inputs.b, inputs.grad))
    return a @ b, grad @ b.mT, a.mT @ grad


def judge(
    results: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    items: Sequence[int],
    minimum_db: tuple[float, float],
) -> tuple[list[float], str | None]:
    """dB of the worst sampled item of each result, and the reason if one is under its gate.

    `minimum_db` is that of the product and that of the gradients.
    """
    found, reason = [], None
    for name, index, result, expected in zip("y a b".split(), range(3), results, exact):
        verdict = gate.judge(result[list(items)], expected, minimum_db[min(index, 1)])
        found.append(verdict.sqnr_db)
        if not verdict.passed and reason is None:
            title = "product" if name == "y" else f"gradient of {name}"
            reason = f"{title}: {verdict.reason}"
    return found, reason


def empty_row(point: ModulePoint, variant: ModuleVariant, pass_name: str) -> Row:
    """The row of a variant that has not run yet; every field that rows of device time have."""
    return {
        "point": point.name,
        **asdict(point),
        "variant": variant.name,
        "pass": pass_name,
        "sqnr_db": None,
        "gate_db": MINIMUM_DB["bf16" if variant.recipe == "bf16" else "float8"],
        "median_ms": None,
        "quartiles_ms": None,
        "samples": 0,
        "tflops": None,
        "baseline_ms": None,
        "repeat_ms": None,
        "ratio_to_bf16": None,
        "saved_bytes": None,
        "saved_ratio": None,
        "reason": None,
    }


def _admit(
    step: Step, rows: Sequence[Row], exact: Sequence[torch.Tensor], items: Sequence[int], clock: Any
) -> None:
    """Warms up, checks the results, and fills the rows' accuracy, saved bytes or reasons."""
    # Delayed scaling begins with a scale of 1; two steps give it a history.
    for _ in range(2):
        step.forward_backward()
    for row in rows:
        db, reason = judge(step.run(row["pass"]), exact, items, row["gate_db"])
        row.update(sqnr_db=db, reason=reason)
        if row["pass"] == FORWARD_BACKWARD:
            row["saved_bytes"] = step.count_saved_bytes()
    clock.settle()


def _prepare(
    variant: ModuleVariant,
    rows: Sequence[Row],
    inputs: Inputs,
    exact: Sequence[torch.Tensor],
    items: Sequence[int],
    region: Callable[[], Any],
    clock: Any,
) -> Step | None:
    try:
        step = Step(variant, inputs, region)
        if variant.is_tuned:
            import transformer_engine_batched as teb

            with teb.autotune():
                step.forward_backward()
                step.forward()
        _admit(step, rows, exact, items, clock)
        return step
    except Exception as error:
        for row in rows:
            row["reason"] = clean_reason(timing.describe_error(error))
        timing.check_device(variant.name, error, clock.settle)
        return None


def _time_phase(
    point: ModulePoint,
    variants: Sequence[ModuleVariant],
    rows: Mapping[tuple[str, str], Row],
    inputs: Inputs,
    exact: Sequence[torch.Tensor],
    regions: Mapping[str, Callable[[], Any]],
    clock: Any,
    settings: Settings,
) -> None:
    items = sample_items(point.batch)
    steps = {}
    for variant in variants:
        mine = [rows[variant.name, p] for p in PASSES]
        if all(row["reason"] is None for row in mine):
            steps[variant.name] = _prepare(
                variant, mine, inputs, exact, items, regions[variant.recipe], clock
            )
    for pass_name in PASSES:
        calls = {
            name: (lambda _, step=step: step.run(pass_name))
            for name, step in steps.items()
            if step is not None and rows[name, pass_name]["reason"] is None
        }
        samples = timing.interleave(calls, clock, settings.rounds, settings.warmup)
        baseline = samples[BASELINE.name].median if BASELINE.name in samples else None
        for name, found in samples.items():
            _fill_times(rows[name, pass_name], point, found, baseline)


def _fill_times(
    row: Row, point: ModulePoint, found: timing.Samples, baseline: float | None
) -> None:
    if found.reason is not None or found.median is None:
        row["reason"] = clean_reason(found.reason or "no samples")
        return
    row.update(
        median_ms=found.median,
        quartiles_ms=found.quartiles,
        samples=len(found.values),
        tflops=point.count_flops(row["pass"]) / (found.median * 1e-3) / 1e12,
        baseline_ms=baseline,
        ratio_to_bf16=None if baseline is None else baseline / found.median,
    )


def _fill_saved_ratios(rows: Mapping[tuple[str, str], Row]) -> None:
    baseline = rows[BASELINE.name, FORWARD_BACKWARD]["saved_bytes"]
    for row in rows.values():
        if row["saved_bytes"] is not None and baseline:
            row["saved_ratio"] = row["saved_bytes"] / baseline


def measure_point(
    point: ModulePoint,
    clock: Any,
    settings: Settings,
    lost: Mapping[str, str] | None = None,
    device: str = "cuda",
    variants: Sequence[ModuleVariant] = VARIANTS,
) -> list[Row]:
    """Rows of one point, one per variant and pass.

    Parameters
    ----------
    lost : mapping of variant to reason, optional
        Variants not to run again, because the device stopped answering with them.

    Raises
    ------
    timing.DeviceLostError
        If the device stops answering; the process cannot measure anything more.
    """
    rows = {(v.name, p): empty_row(point, v, p) for v in variants for p in PASSES}
    for (name, _), row in rows.items():
        row["reason"] = (lost or {}).get(name)
    try:
        inputs = make_inputs(point, device)
        exact = multiply_exactly(inputs, sample_items(point.batch))
        clock.settle()
    except Exception as error:
        timing.check_device(None, error, clock.settle)
        for row in rows.values():
            row["reason"] = row["reason"] or clean_reason(timing.describe_error(error))
        return list(rows.values())
    as_is = [v for v in variants if not v.is_tuned]
    tuned = [v for v in variants if v.is_tuned]
    untouched = {key: dict(row) for key, row in rows.items() if key[0] == BASELINE.name}
    regions = {name: make_region(name) for name in {v.recipe for v in variants}}
    _time_phase(point, as_is, rows, inputs, exact, regions, clock, settings)
    if tuned:
        second = {**rows, **untouched}
        _time_phase(point, [BASELINE, *tuned], second, inputs, exact, regions, clock, settings)
        for p in PASSES:
            rows[BASELINE.name, p]["repeat_ms"] = second[BASELINE.name, p]["median_ms"]
    _fill_saved_ratios(rows)
    return list(rows.values())


# Host time: a case is a call at a size where the device is never the limit.


@dataclass(frozen=True)
class HostCase:
    """`prepare(inputs)` sets a call up and returns it, with a context it runs in."""

    name: str
    label: str
    prepare: Callable[[Inputs], tuple[Callable[[], Any], Any]]


def _prepare_forward(recipe: str, is_training: bool) -> Callable[[Inputs], tuple]:
    """The module's forward alone, inside a region that is open already."""

    def prepare(x: Inputs) -> tuple[Callable[[], Any], Any]:
        import transformer_engine_batched as teb

        module = teb.BatchedMatmul()
        a, b = (x.a, x.b) if is_training else (x.a.detach(), x.b.detach())
        return lambda: module(a, b), make_region(recipe)()

    return prepare


def _prepare_step(recipe: str) -> Callable[[Inputs], tuple]:
    """Region, forward and backward, as a training step has them."""

    def prepare(x: Inputs) -> tuple[Callable[[], Any], Any]:
        step = Step(ModuleVariant("", "", recipe), x, make_region(recipe))
        return step.forward_backward, nullcontext()

    return prepare


def _prepare_bmm(x: Inputs) -> tuple[Callable[[], Any], Any]:
    return lambda: torch.bmm(x.a, x.b), nullcontext()


HOST_CASES = (
    HostCase("ours_delayed", "forward, delayed scaling", _prepare_forward("delayed", True)),
    HostCase("ours_current", "forward, current scaling", _prepare_forward("current", True)),
    HostCase(
        "ours_delayed_inference",
        "forward without gradients, delayed scaling",
        _prepare_forward("delayed", False),
    ),
    HostCase(
        "ours_current_inference",
        "forward without gradients, current scaling",
        _prepare_forward("current", False),
    ),
    HostCase("ours_delayed_step", "autocast, forward, backward, delayed", _prepare_step("delayed")),
    HostCase("ours_current_step", "autocast, forward, backward, current", _prepare_step("current")),
    HostCase("torch_bmm", "torch.bmm BF16, forward", _prepare_bmm),
    HostCase("torch_bmm_step", "torch.bmm BF16, forward, backward", _prepare_step("bf16")),
)


def measure_host(
    case: HostCase,
    settle: Callable[[], None],
    lost: Mapping[str, str] | None = None,
    device: str = "cuda",
    chunks: int = 20,
) -> Row:
    """Host time of one case; raises `timing.DeviceLostError` if the device stops answering."""
    row: Row = {
        "case": case.name,
        "label": case.label,
        "median_us": None,
        "quartiles_us": None,
        "calls": 0,
        "drain_us": None,
        "reason": (lost or {}).get(case.name),
    }
    if row["reason"] is not None:
        return row
    try:
        call, scope = case.prepare(make_inputs(HOST_POINT, device))
        with scope:
            result = timing.time_host(call, settle, chunks=chunks)
    except Exception as error:
        row["reason"] = clean_reason(timing.describe_error(error))
        timing.check_device(case.name, error, settle)
        return row
    samples = result.per_call
    row.update(
        median_us=samples.median,
        quartiles_us=samples.quartiles,
        calls=len(samples.values),
        drain_us=result.drain_us,
        reason=samples.reason,
    )
    return row
