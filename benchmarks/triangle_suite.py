# SPDX-License-Identifier: Apache-2.0
"""Suite `triangle`: the whole triangle multiplicative update, `te.TriangleMultiplication` and its alternatives.

Input: one CUDA GPU; cuEquivariance if it is installed. Output: rows of device time and peak memory per point,
variant and pass (forward and backward, or forward alone without gradients). Pair representation and parameters
are BF16, normal data, with a mask. All casts and scale updates are in the time. Each variant passes the
correctness gate first or has no time; the reference is the plain module in FP32 without TF32.

Inputs rotate over as many sets as hold twice the L2 cache.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Callable, Mapping, Sequence

import torch

from benchmarks import gate, timing
from benchmarks.module_suite import HeadStartClock
from benchmarks.points import L2_FILLS
from benchmarks.stored_results import clean_reason
from benchmarks.training import make_region

Row = dict[str, Any]

FORWARD_BACKWARD = "forward_backward"
FORWARD = "forward"
PASSES = (FORWARD_BACKWARD, FORWARD)
MODES = ("outgoing", "incoming")
CHANNELS = 128

# dB against FP32. The contraction, its worst channel: E4M3 has 28.5 on normal data. The output has the error of
# the contraction. Gradients of z and of weights: E5M2 x E4M3 has 24.5, the recipes' default for gradients.
MINIMUM_DB = {
    "float8": {"contraction": 27.5, "slice": 26.0, "out": 27.5, "grad": 23.0},
    "bf16": {"contraction": 40.0, "slice": 40.0, "out": 38.0, "grad": 36.0},
}
PARAMETERS = (
    "norm_in_weight",
    "norm_in_bias",
    "p_in_weight",
    "g_in_weight",
    "norm_out_weight",
    "norm_out_bias",
    "p_out_weight",
    "g_out_weight",
)
WEIGHTS = tuple(name for name in PARAMETERS if name[0] in "pg")


@dataclass(frozen=True)
class TrianglePoint:
    """One pair representation ``[1, size, size, CHANNELS]`` and a direction."""

    size: int
    mode: str

    @property
    def name(self) -> str:
        """Key of the point in the stored results."""
        return f"N{self.size}_{self.mode}"

    def count_sets(self, l2_bytes: int) -> int:
        """Input sets to rotate over, so that their pair representations exceed the cache."""
        return max(1, -(-L2_FILLS * l2_bytes // (2 * CHANNELS * self.size**2)))


POINTS = tuple(
    TrianglePoint(size, mode) for size in (256, 384, 512, 768, 1024, 2048) for mode in MODES
)
QUICK = (TrianglePoint(384, "outgoing"), TrianglePoint(1024, "incoming"))


@dataclass(frozen=True)
class TriangleVariant:
    """A way to compute the block; `recipe` and `scaling` are ours."""

    name: str
    label: str
    recipe: str = "bf16"
    scaling: str = "recipe"

    @property
    def format(self) -> str:
        """Key of `MINIMUM_DB`."""
        return "bf16" if self.recipe == "bf16" else "float8"

    def runs_at(self, point: TrianglePoint) -> bool:
        """torch.compile takes half a minute for a point, so that it has three."""
        return self.name != "compiled" or (
            point.mode == "outgoing" and point.size in (512, 1024, 2048)
        )


BASELINE = TriangleVariant("eager", "torch, BF16")
PEER = TriangleVariant("cuequivariance", "cuEquivariance, BF16")
VARIANTS = (
    BASELINE,
    TriangleVariant("compiled", "torch.compile, BF16"),
    PEER,
    TriangleVariant("ours_bf16", "ours, BF16"),
    TriangleVariant("ours_delayed", "ours, delayed scaling", "delayed"),
    TriangleVariant("ours_bound", "ours, scale from the weights", "current", "bound"),
    TriangleVariant("ours_current", "ours, current scaling", "current"),
)
LABELS = {variant.name: variant.label for variant in VARIANTS}


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int = 15
    warmup: int = 3


@dataclass
class Inputs:
    """One set; all variants share the parameters."""

    z: torch.Tensor
    mask: torch.Tensor
    grad: torch.Tensor


def make_inputs(point: TrianglePoint, device: str, seed: int = 0) -> Inputs:
    """Normal BF16 data and a mask that drops a tenth of the pairs."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (1, point.size, point.size, CHANNELS)
    z, grad = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    mask = torch.rand(shape[:-1], generator=generator, device=device) > 0.1
    return Inputs(z.requires_grad_(), mask.to(torch.bfloat16), grad)


def make_parameters(device: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """Weights of variance ``1 / fan_in``, none zero, so that every gradient counts."""
    generator = torch.Generator(device=device).manual_seed(seed)
    found = {}
    for name in PARAMETERS:
        rows = 2 * CHANNELS if "_in_weight" in name and name[0] in "pg" else CHANNELS
        shape = (rows, CHANNELS) if name in WEIGHTS else (CHANNELS,)
        value = torch.randn(shape, generator=generator, device=device)
        if name in WEIGHTS:
            value = value / CHANNELS**0.5
        else:
            value = 0.1 * value + (1.0 if name.endswith("_weight") else 0.0)
        found[name] = value.bfloat16().requires_grad_()
    return found


def evaluate_plainly(
    z: torch.Tensor, mask: torch.Tensor, parameters: Mapping[str, torch.Tensor], mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The block as the public models write it, and its contraction ``[1, N, N, D]``."""
    functional = torch.nn.functional
    shape = (CHANNELS,)
    x = functional.layer_norm(z, shape, parameters["norm_in_weight"], parameters["norm_in_bias"])
    gated = torch.sigmoid(functional.linear(x, parameters["g_in_weight"]))
    gated = gated * functional.linear(x, parameters["p_in_weight"]) * mask[..., None]
    a, b = gated.chunk(2, dim=-1)
    c = torch.einsum("bikd,bjkd->bijd" if mode == "outgoing" else "bkid,bkjd->bijd", a, b)
    normed = functional.layer_norm(
        c, shape, parameters["norm_out_weight"], parameters["norm_out_bias"]
    )
    gate_out = torch.sigmoid(functional.linear(x, parameters["g_out_weight"]))
    return gate_out * functional.linear(normed, parameters["p_out_weight"]), c


Call = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_call(
    variant: TriangleVariant, mode: str, parameters: Mapping[str, torch.Tensor]
) -> tuple[Call, list[torch.Tensor]]:
    """What computes the block from `z` and `mask`, and its parameters in the order of `PARAMETERS`."""
    leaves = list(parameters.values())
    if variant.name in ("eager", "compiled"):

        def call(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return evaluate_plainly(z, mask, parameters, mode)[0]

        if variant.name == "compiled":
            torch._dynamo.reset()
            return torch.compile(call, dynamic=False), leaves
        return call, leaves
    if variant.name == "cuequivariance":
        from cuequivariance_torch import triangle_multiplicative_update

        return (
            lambda z, mask: triangle_multiplicative_update(z, mode, mask=mask, **parameters),
            leaves,
        )
    import transformer_engine_batched as teb

    block = teb.TriangleMultiplication(
        CHANNELS,
        mode=mode,
        scaling=variant.scaling,
        params_dtype=torch.bfloat16,
        device=leaves[0].device,
    )
    with torch.no_grad():
        for name, value in parameters.items():
            getattr(block, name).copy_(value)
    return block, [getattr(block, name) for name in PARAMETERS]


class Step:
    """One training step (or one inference) of a variant, as a user writes it."""

    def __init__(
        self,
        variant: TriangleVariant,
        point: TrianglePoint,
        sets: Sequence[Inputs],
        parameters: Mapping[str, torch.Tensor],
    ) -> None:
        self.sets = sets
        self.is_ours = variant.name.startswith("ours")
        self.region = nullcontext if variant.recipe == "bf16" else make_region(variant.recipe)
        self.call, self.leaves = make_call(variant, point.mode, parameters)

    def forward_backward(self, number: int = 0) -> tuple[torch.Tensor, ...]:
        """Output, gradient of z and gradients of all parameters."""
        x = self.sets[number % len(self.sets)]
        with self.region():
            out = self.call(x.z, x.mask)
        return out.detach(), *torch.autograd.grad(out, (x.z, *self.leaves), x.grad)

    def forward(self, number: int = 0) -> tuple[torch.Tensor]:
        """The output alone; no gradient is prepared."""
        x = self.sets[number % len(self.sets)]
        with torch.no_grad(), self.region():
            return (self.call(x.z, x.mask),)

    def run(self, pass_name: str, number: int = 0) -> tuple[torch.Tensor, ...]:
        """The pass of that name."""
        return (
            self.forward_backward(number) if pass_name == FORWARD_BACKWARD else self.forward(number)
        )

    def contraction(self) -> torch.Tensor | None:
        """What the fused block saves of it for backward, ``[1, D, N_p, N_p]``; None of the others."""
        x = self.sets[0]
        with self.region():
            out = self.call(x.z, x.mask)
        product = None
        if self.is_ours:
            from transformer_engine_batched.triangle.autograd import saved_product

            product = saved_product(out)
        torch.autograd.grad(out, x.z, x.grad)  # delayed scaling counts passes
        return product


def measure_peak_mib(step: Step, pass_name: str, device: str) -> float | None:
    """Highest allocation of a pass beyond what was there before, results included."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run(pass_name)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compute_exactly(
    inputs: Inputs, parameters: Mapping[str, torch.Tensor], mode: str
) -> dict[str, torch.Tensor]:
    """Contraction ``[1, D, N, N]``, output and gradients in FP32."""
    leaves = {name: value.detach().float().requires_grad_() for name, value in parameters.items()}
    z = inputs.z.detach().float().requires_grad_()
    is_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        out, c = evaluate_plainly(z, inputs.mask.float(), leaves, mode)
        grads = torch.autograd.grad(out, (z, *leaves.values()), inputs.grad.float())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = is_tf32
    return {
        "contraction": c.detach().movedim(-1, 1).contiguous(),
        "out": out.detach(),
        **dict(zip(("z", *PARAMETERS), grads)),
    }


def _sqnr(result: torch.Tensor, exact: torch.Tensor) -> float:
    """SQNR of a whole tensor in dB."""
    return round(float(gate.measure_sqnr(result.reshape(1, -1), exact.reshape(1, -1))), 2)


def judge(
    results: Sequence[torch.Tensor],
    contraction: torch.Tensor | None,
    exact: Mapping[str, torch.Tensor],
    minimum_db: Mapping[str, float],
) -> tuple[dict[str, float | None], str | None]:
    """dB of contraction, its worst channel, output and gradients, and the reason if one is too low.

    `results` are the output and, if they were computed, gradients of z and parameters. Those of LayerNorms are
    sums of few terms and are not judged.
    """
    found: dict[str, float | None] = {"contraction": None, "slice": None, "grad": None}
    if contraction is not None:
        size = exact["contraction"].shape[-1]
        product = contraction[..., :size, :size]
        found["contraction"] = _sqnr(product, exact["contraction"])
        channels = gate.measure_sqnr(product[0], exact["contraction"][0])
        found["slice"] = round(float(channels.min()), 2)
    found["out"] = _sqnr(results[0], exact["out"])
    if len(results) > 1:
        named = dict(zip(("z", *PARAMETERS), results[1:]))
        found["grad"] = min(_sqnr(named[name], exact[name]) for name in ("z", *WEIGHTS))
    for name, db in found.items():
        if db is not None and db < minimum_db[name]:
            return found, f"{name}: {db} dB against FP32, the gate is {minimum_db[name]:g} dB"
    return found, None


def empty_row(point: TrianglePoint, variant: TriangleVariant, pass_name: str) -> Row:
    """The row of a variant that has not run yet; every field that rows have."""
    return {
        "point": point.name,
        **asdict(point),
        "variant": variant.name,
        "pass": pass_name,
        "sqnr_db": None,
        "gate_db": MINIMUM_DB[variant.format],
        "median_ms": None,
        "quartiles_ms": None,
        "samples": 0,
        "peak_mib": None,
        "ratio_to_eager": None,
        "ratio_to_cuequivariance": None,
        "reason": None,
    }


def _prepare(
    variant: TriangleVariant,
    point: TrianglePoint,
    rows: Sequence[Row],
    sets: Sequence[Inputs],
    parameters: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    clock: Any,
    device: str,
) -> Step | None:
    """Warms up, checks the results, and fills the rows' accuracy, memory or reasons."""
    try:
        step = Step(variant, point, sets, parameters)
        # Delayed scaling begins with a scale of 1; two steps give it a history.
        for _ in range(2):
            step.forward_backward()
        contraction = step.contraction()
        for row in rows:
            results = step.run(row["pass"])
            db, reason = judge(results, contraction, exact, row["gate_db"])
            del results
            row.update(sqnr_db=db, reason=reason)
        del contraction
        for row in rows:
            row["peak_mib"] = measure_peak_mib(step, row["pass"], device)
        clock.settle()
        return step
    except Exception as error:
        for row in rows:
            row["reason"] = clean_reason(timing.describe_error(error))
        timing.check_device(variant.name, error, clock.settle)
        return None


def measure_point(
    point: TrianglePoint,
    clock: Any,
    settings: Settings,
    lost: Mapping[str, str] | None = None,
    device: str = "cuda",
    variants: Sequence[TriangleVariant] = VARIANTS,
    l2_bytes: int = 0,
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
    variants = [variant for variant in variants if variant.runs_at(point)]
    rows = {(v.name, p): empty_row(point, v, p) for v in variants for p in PASSES}
    for (name, _), row in rows.items():
        row["reason"] = (lost or {}).get(name)
    try:
        sets = [make_inputs(point, device, seed) for seed in range(point.count_sets(l2_bytes))]
        parameters = make_parameters(device)
        exact = compute_exactly(sets[0], parameters, point.mode)
        clock.settle()
    except Exception as error:
        timing.check_device(None, error, clock.settle)
        for row in rows.values():
            row["reason"] = row["reason"] or clean_reason(timing.describe_error(error))
        return list(rows.values())
    steps = {}
    for variant in variants:
        mine = [rows[variant.name, p] for p in PASSES]
        if all(row["reason"] is None for row in mine):
            steps[variant.name] = _prepare(
                variant, point, mine, sets, parameters, exact, clock, device
            )
    del exact
    for pass_name in PASSES:
        calls = {
            name: (lambda number, step=step: step.run(pass_name, number))
            for name, step in steps.items()
            if step is not None and rows[name, pass_name]["reason"] is None
        }
        samples = timing.interleave(calls, clock, settings.rounds, settings.warmup)
        medians = {name: found.median for name, found in samples.items()}
        for name, found in samples.items():
            _fill_times(rows[name, pass_name], found, medians)
    return list(rows.values())


def _fill_times(row: Row, found: timing.Samples, medians: Mapping[str, float | None]) -> None:
    if found.reason is not None or found.median is None:
        row["reason"] = clean_reason(found.reason or "no samples")
        return
    row.update(median_ms=found.median, quartiles_ms=found.quartiles, samples=len(found.values))
    for variant in (BASELINE, PEER):
        median = medians.get(variant.name)
        row[f"ratio_to_{variant.name}"] = None if median is None else median / found.median


def format_rows(results: dict[str, Any]) -> list[str]:
    """Lines for the terminal."""
    heads = f"{'ms':>9}{'MiB':>8}{'/eager':>8}{'/cuEq':>7}"
    lines = [f"{'point':18}{'variant':18}{'pass':18}{heads}  dB"]

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    for row in results["rows"]:
        decibels = ", ".join(f"{k} {number(db, 1)}" for k, db in (row["sqnr_db"] or {}).items())
        lines.append(
            f"{row['point']:18}{row['variant']:18}{row['pass']:18}{number(row['median_ms'], 3):>9}"
            f"{number(row['peak_mib'], 0):>8}{number(row['ratio_to_eager'], 2):>8}"
            f"{number(row['ratio_to_cuequivariance'], 2):>7}  {decibels}"
            + (f"  {row['reason']}" if row["reason"] else "")
        )
    return lines


def find_failures(results: dict[str, Any]) -> list[str]:
    """Rows of our own variants without a time."""
    return [
        f"triangle {row['point']} {row['variant']} {row['pass']}: {row['reason']}"
        for row in results["rows"]
        if row["variant"].startswith("ours") and row["median_ms"] is None
    ]


def make_measure(is_quick: bool) -> Callable[[TrianglePoint, Mapping[str, str]], list[Row]]:
    """What `run.run_suite` calls for a point on the current GPU."""
    settings = Settings(rounds=6) if is_quick else Settings()
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    clock = HeadStartClock()
    return lambda point, lost: measure_point(point, clock, settings, lost, l2_bytes=l2_bytes)


def name_calls(point: TrianglePoint) -> list[str]:
    """Names of all calls that `measure_point` makes."""
    return [variant.name for variant in VARIANTS if variant.runs_at(point)]
