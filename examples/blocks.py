# SPDX-License-Identifier: Apache-2.0
"""The whole triangle block in each recipe, forward and backward, beside what there is without the package.

Input: the block of `triangle` with its weights, a pair representation, a mask and a gradient. The block is
loaded into ``te.TriangleMultiplication`` and run as a model runs it: BF16 activations, `te.autocast` around the
forward. Lines to compare with: the plain block, and NVIDIA cuEquivariance's function if it is installed. Without a GPU
activations are FP32, which a CPU multiplies many times faster than BF16.
Must not import: `protein`, `picture`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Callable, Iterator

import torch
import transformer_engine.pytorch as te
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, MXFP8BlockScaling

import transformer_engine_batched as teb
from transformer_engine_batched import support
from transformer_engine_batched.plan import describe_device

from triangle import TriangleMultiplication


@dataclass(frozen=True)
class Arm:
    """A way to run the block.

    Attributes
    ----------
    name : str
        As it stands in the tables, where the dtype of the activations is filled in.
    make_recipe : callable or None
        TE's recipe; None for BF16.
    scaling : str
        As `te.TriangleMultiplication` has it.
    min_output_db, min_gradient_db : float
        What output and gradients must reach; below, the demo fails. E4M3 operands give 28.5 dB on normal data,
        E5M2 gradients 24.5.
    """

    name: str
    make_recipe: Callable[[], object] | None = None
    scaling: str = "recipe"
    min_output_db: float = 27.0
    min_gradient_db: float = 20.0

    @property
    def format(self) -> str:
        """Name of the format in the support table of the package."""
        if self.make_recipe is None:
            return "bf16"
        return "mxfp8" if self.make_recipe is MXFP8BlockScaling else "float8"


PLAIN = Arm("torch, {dtype}", None, "recipe", 35.0, 30.0)
PEER = Arm("cuEquivariance, {dtype}", None, "recipe", 35.0, 30.0)
OURS = (
    Arm("{dtype}", None, "recipe", 35.0, 30.0),
    Arm("Float8 delayed", DelayedScaling),
    Arm("Float8 current", Float8CurrentScaling),
    Arm("Float8 bound", Float8CurrentScaling, "bound"),
    Arm("MXFP8", MXFP8BlockScaling),
)


@dataclass
class BlockMeasurement:
    """One row: SQNR in dB against FP64, times in milliseconds or None, memory beyond the inputs in MiB."""

    name: str
    engine: str
    output_db: float
    gradient_z_db: float
    gradient_weights_db: float
    passed: bool
    forward_ms: float | None = None
    step_ms: float | None = None
    peak_mib: float | None = None


@dataclass
class BlockInputs:
    """FP32 ``[1, N, N, C]`` pair representations of this step and the one before, mask, gradient."""

    z: torch.Tensor
    earlier: torch.Tensor
    mask: torch.Tensor
    gradient: torch.Tensor


def compare_blocks(
    block: TriangleMultiplication,
    inputs: BlockInputs,
    median_ms: Callable[[Callable[[], object]], float],
    step: Callable[[str], None],
) -> list[BlockMeasurement]:
    """All arms on one block; `median_ms` times a call on a GPU, `step` is told what comes next."""
    device = inputs.z.device
    dtype = activation_dtype(device)
    step("reference in FP64")
    expected = _reference(block, inputs)
    rows = []
    for arm in (PLAIN, PEER, *OURS):
        if arm is PEER and find_peer() is None:
            continue
        name = arm.name.format(dtype=_TITLES[dtype])
        step(name)
        is_ours = arm in OURS
        native = support.find_native_engine(arm.format, describe_device(device)).engine
        with (
            torch.enable_grad(),
            contextlib.nullcontext() if native else teb.emulate(),
            # TE compiles its update of delayed scales: seconds, and a C++ compiler.
            torch.compiler.set_stance("default" if native else "force_eager"),
        ):
            run = _make_run(arm, block, inputs)
            if is_ours:
                engine = (
                    "emulated" if not native else ("fused" if device.type == "cuda" else "composed")
                )
            else:
                engine = "peer" if arm is PEER else "torch"
            # The step before: delayed scaling records its amaxes.
            run(inputs.earlier.to(dtype), backward=True)
            z = inputs.z.to(dtype)
            row = _judge(arm, name, engine, run(z, backward=True), expected)
            if native and device.type == "cuda":
                row.forward_ms = median_ms(lambda: run(z, backward=False))
                row.step_ms = median_ms(lambda: run(z, backward=True))
                row.peak_mib = _peak_mib(lambda: run(z, backward=True))
        rows.append(row)
    return rows


_TITLES = {torch.bfloat16: "BF16", torch.float32: "FP32"}


def activation_dtype(device: torch.device) -> torch.dtype:
    """BF16, on a CPU FP32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def find_peer() -> Callable | None:
    """cuEquivariance's function, if it is installed."""
    try:
        from cuequivariance_torch import triangle_multiplicative_update
    except ImportError:
        return None
    return triangle_multiplicative_update if torch.cuda.is_available() else None


def _reference(block: TriangleMultiplication, inputs: BlockInputs) -> tuple[torch.Tensor, ...]:
    """Output, gradient of z and gradients of the weights in FP64."""
    exact = TriangleMultiplication(block.direction, inputs.z.shape[-1], block.linear_z.in_features)
    exact = exact.double().to(inputs.z.device)
    exact.load_state_dict(block.state_dict())
    z = inputs.z.double().requires_grad_()
    weights = [p.requires_grad_() for p in exact.parameters() if p.dim() == 2]
    with torch.enable_grad():
        out = exact(z, inputs.mask.double())
        grads = torch.autograd.grad(out, (z, *weights), inputs.gradient.double())
    return out.detach(), *grads


Run = Callable[..., tuple[torch.Tensor, ...]]


def _make_run(arm: Arm, block: TriangleMultiplication, inputs: BlockInputs) -> Run:
    """``run(z, backward)``: output, and with `backward` the gradients, weights in the order of the plain block."""
    dtype = activation_dtype(inputs.z.device)
    mask, gradient = inputs.mask.to(dtype), inputs.gradient.to(dtype)
    collect: Callable[[list[torch.Tensor]], list[torch.Tensor]] = lambda grads: grads
    region = contextlib.nullcontext
    if arm in OURS:
        call = te.TriangleMultiplication.from_openfold(
            block, block.direction, scaling=arm.scaling, params_dtype=dtype
        )
        weights = [call.p_in_weight, call.g_in_weight, call.p_out_weight, call.g_out_weight]
        collect = _split_ours
        if arm.make_recipe is not None:
            recipe = arm.make_recipe()
            region = lambda: te.autocast(enabled=True, recipe=recipe)  # noqa: E731
    elif arm is PEER:
        ours = te.TriangleMultiplication.from_openfold(block, block.direction, params_dtype=dtype)
        parameters = dict(ours.named_parameters())
        weights = [ours.p_in_weight, ours.g_in_weight, ours.p_out_weight, ours.g_out_weight]
        collect, update = _split_ours, find_peer()
        call = lambda z, mask: update(z, block.direction, mask=mask, **parameters)  # noqa: E731
    else:
        call = TriangleMultiplication(
            block.direction, inputs.z.shape[-1], block.linear_z.in_features
        )
        call = call.to(inputs.z.device, dtype)
        call.load_state_dict(block.state_dict())
        weights = [p.requires_grad_() for p in call.parameters() if p.dim() == 2]

    def run(z: torch.Tensor, backward: bool) -> tuple[torch.Tensor, ...]:
        z = z.detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward), region():
            out = call(z, mask)
        if not backward:
            return (out,)
        grad_z, *grads = torch.autograd.grad(out, (z, *weights), gradient)
        return out.detach(), grad_z, *collect(grads)

    return run


def _split_ours(grads: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Gradients of p_in, g_in, p_out, g_out as those of a_p, a_g, b_p, b_g, z, g."""
    p_in, g_in, p_out, g_out = grads
    for p, g in zip(p_in.chunk(2), g_in.chunk(2)):
        yield p
        yield g
    yield p_out
    yield g_out


def _judge(
    arm: Arm,
    name: str,
    engine: str,
    results: tuple[torch.Tensor, ...],
    expected: tuple[torch.Tensor, ...],
) -> BlockMeasurement:
    def sqnr(result: torch.Tensor, exact: torch.Tensor) -> float:
        noise = (result.double() - exact).square().sum()
        return (10 * torch.log10(exact.square().sum() / noise)).item()

    output, z, *weights = (sqnr(*pair) for pair in zip(results, expected, strict=True))
    worst = min(weights)
    passed = output >= arm.min_output_db and min(z, worst) >= arm.min_gradient_db
    return BlockMeasurement(name, engine, output, z, worst, passed)


def _peak_mib(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
