# SPDX-License-Identifier: Apache-2.0
"""A mixture-of-experts layer in FP8 with block scales: one product for all experts, forward and backward.

    python examples/moe_fp8.py

First the practice challenge of the DeepGEMM tutorial: 8 experts with 64 to 144 tokens each, hidden size 2048, in FP8
beside a loop of plain products, with errors, memory and (on a GPU) times. Then a layer of two experts that learns,
beside the same layer in high precision. Runs on Hopper GPUs, and small on a CPU through the exact reference.

Input: random data. Output: two tables. Must not import private modules of the package: this is a user.
"""

from __future__ import annotations

import argparse
import sys
from typing import Callable, NamedTuple, Optional

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import transformer_engine_batched as teb

CHALLENGE_TOKENS = (64, 128, 96, 112, 88, 144, 72, 104)
MIB = 2**20


class Groups(NamedTuple):
    """Where the tokens of each expert stand in one matrix.

    Parameters
    ----------
    m_indices : torch.Tensor
        INT32 ``[rows]``: the expert of each row, -1 for padding.
    ks : torch.Tensor
        INT32 ``[experts]``: rows of each expert, padding included.
    rows : torch.Tensor
        INT64 ``[tokens]``: the row of each token.
    """

    m_indices: torch.Tensor
    ks: torch.Tensor
    rows: torch.Tensor


def group_tokens(experts: torch.Tensor, num_experts: int) -> Groups:
    """Sorts tokens by expert and pads each expert's rows as the grouped product wants them.

    Parameters
    ----------
    experts : torch.Tensor
        INT64 ``[tokens]``: the expert of each token.
    num_experts : int
    """
    alignment = teb.get_m_alignment_for_contiguous_layout()
    counts = torch.bincount(experts, minlength=num_experts)
    padded = (counts + alignment - 1) // alignment * alignment
    starts = padded.cumsum(0) - padded
    first_tokens = counts.cumsum(0) - counts
    order = experts.argsort(stable=True)
    sorted_experts = experts[order]
    position = torch.arange(len(experts), device=experts.device) - first_tokens[sorted_experts]
    rows = torch.empty_like(experts)
    rows[order] = starts[sorted_experts] + position
    m_indices = torch.full((int(padded.sum()),), -1, dtype=torch.int32, device=experts.device)
    m_indices[rows] = experts.int()
    return Groups(m_indices, padded.int(), rows)


class _GroupedLinear(torch.autograd.Function):
    """``y[row] = weight[expert of row] @ x[row]`` with three FP8 products: y, the gradient of x, that of weight."""

    @staticmethod
    def forward(ctx, x, weight, groups):
        # pylint: disable=missing-function-docstring,arguments-differ
        # One read of x for the product here and for the weight gradient later; what is kept is FP8.
        x_fp8, x_turned = teb.per_token_cast_to_fp8(x, with_transpose=True)
        weight_fp8 = teb.per_block_cast_to_fp8(weight)
        # Rows of padding stay zero.
        y = x.new_zeros(x.shape[0], weight.shape[1])
        teb.grouped_gemm_fp8_nt_contiguous(
            x_fp8.values,
            weight_fp8.values,
            x_fp8.scale_inv,
            weight_fp8.scale_inv,
            groups.m_indices,
            out=y,
        )
        ctx.save_for_backward(*x_turned, weight)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx, grad_y):
        # pylint: disable=missing-function-docstring,arguments-differ
        x_values, x_scale_inv, weight = ctx.saved_tensors
        groups = ctx.groups
        # Gradients are small: no lower bound of the amax.
        grad, grad_turned = teb.per_token_cast_to_fp8(grad_y, epsilon=0.0, with_transpose=True)
        _, weight_turned = teb.per_block_cast_to_fp8(weight, with_transpose=True)
        grad_x = grad_y.new_zeros(grad_y.shape[0], weight.shape[2])
        teb.grouped_gemm_fp8_nt_contiguous(
            grad.values,
            weight_turned.values,
            grad.scale_inv,
            weight_turned.scale_inv,
            groups.m_indices,
            out=grad_x,
        )
        # FP32, as weight gradients are accumulated.
        grad_weight = torch.zeros(weight.shape, device=weight.device)
        teb.grouped_gemm_fp8_k_grouped(
            grad_turned.values, x_values, grad_turned.scale_inv, x_scale_inv, groups.ks, grad_weight
        )
        return grad_x, grad_weight.to(weight.dtype), None


def grouped_linear_fp8(x: torch.Tensor, weight: torch.Tensor, groups: Groups) -> torch.Tensor:
    """``[rows, K]`` times ``[experts, N, K]`` in FP8; differentiable."""
    return _GroupedLinear.apply(x, weight, groups)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The same by a loop of plain products."""
    parts = zip(x.split(groups.ks.tolist()), weight)
    return torch.cat([rows @ matrix.t() for rows, matrix in parts])


class MoELayer(nn.Module):
    """``y = gate * down[e] gelu(up[e] x)`` with e the expert that a linear router likes best.

    Parameters
    ----------
    hidden, inner, num_experts : int
    linear : callable
        `grouped_linear_fp8` or `grouped_linear`.
    """

    def __init__(self, hidden: int, inner: int, num_experts: int, linear: Callable) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(num_experts, hidden) / hidden**0.5)
        self.up = nn.Parameter(torch.randn(num_experts, inner, hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, inner) / inner**0.5)
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]`` to the same."""
        # The router decides in FP32, so that both layers decide alike.
        gate, experts = (x.float() @ self.router.float().t()).softmax(-1).max(-1)
        groups = group_tokens(experts, len(self.up))
        rows = x.new_zeros(len(groups.m_indices), x.shape[1]).index_copy(0, groups.rows, x)
        inner = nn.functional.gelu(self.linear(rows, self.up, groups), approximate="tanh")
        out = self.linear(inner, self.down, groups)[groups.rows]
        return out * gate.unsqueeze(-1).to(out.dtype)


def count_saved_bytes(
    layer: nn.Module, run: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, int]:
    """The result of a forward, and the bytes that it keeps for backward besides the parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(kept.values())


def measure_ms(call: Callable[[], object], device: torch.device) -> Optional[float]:
    """Median of 10 runs on a GPU; a CPU runs the reference, whose time says nothing."""
    if device.type != "cuda":
        return None
    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[5]


class ChallengeResult(NamedTuple):
    """What the challenge measures: lowest SQNR of any expert, bytes of operands, milliseconds."""

    sqnr_db: float
    fp8_bytes: int
    bf16_bytes: int
    fp8_ms: Optional[float]
    bf16_ms: Optional[float]


def run_challenge(device: torch.device, hidden: int) -> ChallengeResult:
    """The tutorial's five steps: groups, FP8, the product, comparison with plain PyTorch, time and memory."""
    generator = torch.Generator().manual_seed(0)
    num_experts = len(CHALLENGE_TOKENS)
    experts = torch.arange(num_experts).repeat_interleave(torch.tensor(CHALLENGE_TOKENS)).to(device)
    groups = group_tokens(experts, num_experts)
    tokens = torch.randn(len(experts), hidden, generator=generator).to(device, torch.bfloat16)
    weight = torch.randn(num_experts, hidden, hidden, generator=generator).to(
        device, torch.bfloat16
    )
    x = tokens.new_zeros(len(groups.m_indices), hidden)
    x[groups.rows] = tokens

    x_fp8 = teb.per_token_cast_to_fp8(x, scale_layout="m_major")
    weight_fp8 = teb.per_block_cast_to_fp8(weight)
    out = torch.empty(len(x), hidden, device=device, dtype=torch.bfloat16)

    def multiply() -> torch.Tensor:
        return teb.grouped_gemm_fp8_nt_contiguous(
            x_fp8.values,
            weight_fp8.values,
            x_fp8.scale_inv,
            weight_fp8.scale_inv,
            groups.m_indices,
            out=out,
        )

    result = multiply()[groups.rows]
    ratios = []
    for expert in range(num_experts):
        is_mine = experts == expert
        expected = tokens[is_mine].double() @ weight[expert].double().t()
        ratios.append(float(teb.quantization_error(expected, result[is_mine]).sqnr_db))
    return ChallengeResult(
        min(ratios),
        sum(part.nbytes for part in (*x_fp8, *weight_fp8)),
        x.nbytes + weight.nbytes,
        measure_ms(multiply, device),
        measure_ms(lambda: grouped_linear(x, weight, groups), device),
    )


class TrainingResult(NamedTuple):
    """Losses of each step, and bytes kept for backward."""

    losses: list[float]
    saved_bytes: int


def train(
    device: torch.device, linear: Callable, *, hidden: int, num_tokens: int, num_steps: int
) -> TrainingResult:
    """Two experts learn what a fixed random network does to their tokens."""
    torch.manual_seed(1)
    layer = MoELayer(hidden, 2 * hidden, 2, linear).to(device, torch.bfloat16)
    teacher = MoELayer(hidden, 2 * hidden, 2, grouped_linear).to(device, torch.bfloat16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3)
    losses, saved_bytes = [], 0
    for _ in range(num_steps):
        x = torch.randn(num_tokens, hidden).to(device, torch.bfloat16)
        with torch.no_grad():
            target = teacher(x).float()
        out, saved_bytes = count_saved_bytes(layer, lambda x=x: layer(x))
        loss = nn.functional.mse_loss(out.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return TrainingResult(losses, saved_bytes)


def print_challenge(result: ChallengeResult, console: Console) -> None:
    """A table of the challenge."""
    table = Table(title="8 experts, 64 to 144 tokens: one FP8 product beside a loop in BF16")
    for title in ("", "FP8, block scales", "BF16"):
        table.add_column(title, justify="left" if not title else "right")
    table.add_row("SQNR of the worst expert (dB)", f"{result.sqnr_db:.1f}", "")
    table.add_row(
        "operands (MiB)", f"{result.fp8_bytes / MIB:.1f}", f"{result.bf16_bytes / MIB:.1f}"
    )
    table.add_row("saved", f"{100 * (1 - result.fp8_bytes / result.bf16_bytes):.0f} %", "")
    if result.fp8_ms is not None:
        table.add_row("time (ms)", f"{result.fp8_ms:.3f}", f"{result.bf16_ms:.3f}")
    console.print(table)


def print_training(fp8: TrainingResult, plain: TrainingResult, console: Console) -> None:
    """A table of both trainings."""
    table = Table(title=f"A layer of two experts, {len(fp8.losses)} steps")
    for title in ("", "FP8, block scales", "BF16"):
        table.add_column(title, justify="left" if not title else "right")
    for name, step in (("first loss", 0), ("last loss", -1)):
        table.add_row(name, f"{fp8.losses[step]:.4f}", f"{plain.losses[step]:.4f}")
    table.add_row(
        "kept for backward (MiB)", f"{fp8.saved_bytes / MIB:.2f}", f"{plain.saved_bytes / MIB:.2f}"
    )
    table.add_row("saved", f"{100 * (1 - fp8.saved_bytes / plain.saved_bytes):.0f} %", "")
    console.print(table)


def main(arguments: list[str]) -> int:
    """Both parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--hidden", type=int, help="default: 2048 on a GPU, 256 on a CPU")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    hidden = options.hidden or (2048 if device.type == "cuda" else 256)
    console = Console()
    challenge = run_challenge(device, hidden)
    print_challenge(challenge, console)
    sizes = {"hidden": hidden // 2, "num_tokens": 2 * hidden, "num_steps": options.steps}
    fp8, plain = (train(device, linear, **sizes) for linear in (grouped_linear_fp8, grouped_linear))
    print_training(fp8, plain, console)
    learned = fp8.losses[-1] < 0.9 * fp8.losses[0]
    return 0 if challenge.sqnr_db > 25 and learned else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
