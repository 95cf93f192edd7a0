# SPDX-License-Identifier: Apache-2.0
"""Products over several processes: shared amaxes, DDP, sharded batches, sharded K.

    torchrun --standalone --nproc-per-node 2 tests/distributed/run_distributed.py                # NCCL
    torchrun --standalone --nproc-per-node 2 tests/distributed/run_distributed.py --device cpu   # gloo

Input: the environment that torchrun sets, one GPU per process (or a CPU, where FP8 is emulated). Output: a line
PASS or FAIL per check on rank 0; exit code 1 if a check failed on any rank. Must not need anything
but torch, TE and this package.

Data of integers: -7 to 7 with 7 among them gives delayed scaling the scale 448 / 7 = 64, with which all of them are
FP8 numbers and all sums exact, so results are equal bit for bit in whatever order the hardware adds. A scale
of another amax (3 on odd ranks) rounds, and shows.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, Callable

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.experimental import local_map
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

import transformer_engine_batched as teb

BATCH, ROWS, COLS, INNER = 4, 64, 96, 128  # of one rank
COLLECTIVES = ("c10d", "_c10d_functional", "_dtensor")


class Ranks:
    """This process among the others."""

    def __init__(self, device_type: str) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device(device_type, local if device_type == "cuda" else None)
        self.mesh = init_device_mesh(device_type, (self.size,))

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """`x` of every rank, equal shapes."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return parts

    def own_items(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's share of a tensor that all ranks have."""
        return x.chunk(self.size, dim)[self.rank]


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        words = ("reduce", "gather", "scatter", "broadcast", "all_to_all", "send", "recv")
        if name.split(".")[0] in COLLECTIVES and any(word in name for word in words):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def draw(ranks: Ranks, seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal data, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(ranks.device, dtype)


def draw_integers(ranks: Ranks, seed: int, *shape: int) -> torch.Tensor:
    """BF16 integers: up to 7 on even ranks' shares of dim 0, up to 3 on odd ones'."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-7, 8, shape, generator=generator).bfloat16()
    x[0].view(-1)[0] = 7
    for rank, part in enumerate(x.chunk(ranks.size)):
        if rank % 2:
            part.clamp_(-3, 3)
    return x.to(ranks.device)


def sqnr(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal-to-noise ratio of the worst item in dB."""
    expected = expected.double().flatten(1)
    noise = (result.double().flatten(1) - expected).square().sum(1)
    return float((10 * torch.log10(expected.square().sum(1) / noise)).min())


def require(condition: bool, message: str) -> None:
    """Fails the check; `assert` would vanish under -O."""
    if not condition:
        raise RuntimeError(message)


def require_sqnr(result: torch.Tensor, expected: torch.Tensor, minimum_db: float) -> None:
    """Fails unless the worst item reaches `minimum_db`."""
    db = sqnr(result, expected)
    require(db >= minimum_db, f"{db:.1f} dB, expected at least {minimum_db:g}")


def forget_modules() -> None:
    """The modules used so far are not updated any more.

    TE updates (and reduces) all modules with delayed scaling whenever a region ends, also those that were
    called in another region before.
    """
    FP8GlobalStateManager.reset()


def read_scales(module: te.BatchedMatmul) -> dict[str, torch.Tensor]:
    """Amax histories and scales of a module with delayed scaling."""
    return {
        f"{direction} {name}": getattr(module.fp8_meta[direction], name).clone()
        for direction in ("scaling_fwd", "scaling_bwd")
        for name in ("amax_history", "scale")
    }


def step_delayed(
    module: te.BatchedMatmul, recipe: DelayedScaling, group: Any, *inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Product and gradients of one training step."""
    a, b, grad = inputs
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    with te.autocast(enabled=True, recipe=recipe, amax_reduction_group=group):
        y = module(a, b)
    return y.detach(), *torch.autograd.grad(y, (a, b), grad)


def check_amax_reduction(ranks: Ranks) -> None:
    """Histories and scales are equal on all ranks, and are those of the largest amax of any rank."""
    module, recipe = te.BatchedMatmul(), DelayedScaling(amax_history_len=4)
    largest = []
    for step in range(3):
        seed = 100 * step + ranks.rank
        factor = 1.0 + ranks.rank + 10 * (step == 1)
        inputs = [
            factor * draw(ranks, seed + 10 * i, *shape, dtype=torch.bfloat16)
            for i, shape in enumerate(
                ((BATCH, ROWS, INNER), (BATCH, INNER, COLS), (BATCH, ROWS, COLS))
            )
        ]
        amaxes = torch.stack([x.abs().max().float() for x in inputs])
        largest.append(torch.stack(ranks.gather(amaxes)).amax(0))
        step_delayed(module, recipe, dist.group.WORLD, *inputs)
    for name, mine in read_scales(module).items():
        for rank, theirs in enumerate(ranks.gather(mine)):
            require(torch.equal(mine, theirs), f"{name} differs from rank {rank}: {mine}, {theirs}")
    # An update writes an amax to the end of the history, and the next ones move it to the front.
    for direction, index, column in (("fwd", 0, 0), ("fwd", 1, 1), ("bwd", 0, 2)):
        history = module.fp8_meta[f"scaling_{direction}"].amax_history[:, index]
        expected = {float(x[column]) for x in largest}
        found = {float(x) for x in history if x != 0}
        require(found == expected, f"{direction} {index}: {sorted(found)}, not {sorted(expected)}")


def check_reduction_is_optional(ranks: Ranks) -> None:
    """Without `reduce_amax`, ranks with other data have other scales: the check above can fail."""
    module, recipe = te.BatchedMatmul(), DelayedScaling(amax_history_len=4, reduce_amax=False)
    factor = 1.0 + ranks.rank
    shapes = ((BATCH, ROWS, INNER), (BATCH, INNER, COLS), (BATCH, ROWS, COLS))
    inputs = [factor * draw(ranks, i, *s, dtype=torch.bfloat16) for i, s in enumerate(shapes)]
    step_delayed(module, recipe, dist.group.WORLD, *inputs)
    scales = ranks.gather(module.fp8_meta["scaling_fwd"].scale)
    require(not torch.equal(scales[0], scales[1]), "scales are equal without reduce_amax")


def check_shared_scales(ranks: Ranks) -> None:
    """With shared scales, each rank's product is the share of one process's product, bit for bit."""
    shapes = ((BATCH, ROWS, INNER), (BATCH, INNER, COLS), (BATCH, ROWS, COLS))
    whole = [draw_integers(ranks, i, ranks.size * s[0], *s[1:]) for i, s in enumerate(shapes)]
    shares = [ranks.own_items(x) for x in whole]
    module, single = te.BatchedMatmul(), te.BatchedMatmul()
    recipe, alone = DelayedScaling(), DelayedScaling(reduce_amax=False)
    for _ in range(3):
        results = step_delayed(module, recipe, dist.group.WORLD, *shares)
    forget_modules()
    for _ in range(3):
        expected = step_delayed(single, alone, None, *whole)
    scales = read_scales(module), read_scales(single)
    for name, value in scales[0].items():
        require(torch.equal(value, scales[1][name]), f"{name}: {value}, alone {scales[1][name]}")
    require(float(scales[0]["scaling_fwd scale"][0]) == 64.0, f"{scales[0]}")
    for name, result, whole_result in zip(("product", "grad a", "grad b"), results, expected):
        share = ranks.own_items(whole_result)
        require(torch.equal(result, share), f"{name}: {sqnr(result, share):.1f} dB, not equal")


class Model(torch.nn.Module):
    """Two projections of the input, multiplied: ``(x Pᵀ) (x Qᵀ)ᵀ`` for each item.

    The projections are `linear`s: torch.nn.Linear, or TE's, which is quantized, too.
    """

    def __init__(self, dtype: torch.dtype, linear: type) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        options = {"params_dtype": dtype} if linear is te.Linear else {"dtype": dtype}
        self.p, self.q = (linear(64, INNER, bias=False, **options) for _ in range(2))
        with torch.no_grad():
            for weight in (self.p.weight, self.q.weight):
                weight.copy_(torch.randn(INNER, 64, generator=generator) / 8)
        self.product = te.BatchedMatmul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, rows, rows]`` of ``[batch, rows, 64]``."""
        return self.product(self.p(x), self.q(x).mT)


def train_ddp(
    ranks: Ranks, dtype: torch.dtype, recipe: Any, linear: type = torch.nn.Linear
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients after three steps: of DDP over all ranks, and of one process with the whole batch."""
    model, single = (Model(dtype, linear).to(ranks.device) for _ in range(2))
    ddp = DistributedDataParallel(
        model, device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None
    )
    x = draw(ranks, 1, ranks.size * BATCH, ROWS, 64, dtype=dtype)
    target = draw(ranks, 2, ranks.size * BATCH, ROWS, ROWS, dtype=torch.float32)

    def region(group: Any, reduce_amax: bool) -> Any:
        if recipe is None:
            return nullcontext()
        options = {"reduce_amax": reduce_amax} if recipe is DelayedScaling else {}
        return te.autocast(enabled=True, recipe=recipe(**options), amax_reduction_group=group)

    for net, inputs, wanted, group in (
        (ddp, ranks.own_items(x), ranks.own_items(target), dist.group.WORLD),
        (single, x, target, None),
    ):
        forget_modules()
        for _ in range(3):
            net.zero_grad()
            with region(group, group is not None):
                y = net(inputs)
            # DDP averages over ranks, and each rank's mean is over its own items.
            (y.float() * wanted).sum(dim=(1, 2)).mean().backward()
    return [p.grad for p in model.parameters()], [p.grad for p in single.parameters()]


def check_ddp_fp32(ranks: Ranks) -> None:
    """High precision: gradients of DDP are those of the whole batch, up to the order of FP32 sums."""
    for mine, expected in zip(*train_ddp(ranks, torch.float32, None)):
        require_sqnr(mine[None], expected[None], 90.0)


def check_ddp_delayed(ranks: Ranks) -> None:
    """Delayed scaling with shared amaxes: the same codes, so the gradients differ by BF16 rounding only."""
    for mine, expected in zip(*train_ddp(ranks, torch.bfloat16, DelayedScaling)):
        require_sqnr(mine[None], expected[None], 40.0)


def check_ddp_current(ranks: Ranks) -> None:
    """Current scaling: each rank has scales of its own, so the gradients differ by FP8 rounding."""
    for mine, expected in zip(*train_ddp(ranks, torch.bfloat16, Float8CurrentScaling)):
        require_sqnr(mine[None], expected[None], 20.0)


def check_ddp_linear(ranks: Ranks) -> None:
    """TE's Linear and the product in one model and region, with shared amaxes: the same codes."""
    for mine, expected in zip(*train_ddp(ranks, torch.bfloat16, DelayedScaling, te.Linear)):
        require_sqnr(mine[None], expected[None], 30.0)


def make_dtensor_operands(
    ranks: Ranks, placements: tuple[Any, Any], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, DTensor, DTensor]:
    """Operands as every rank has them whole, and as DTensors."""
    shape_a = (ranks.size * BATCH, ROWS, ranks.size * INNER)
    a = draw(ranks, 5, *shape_a, dtype=dtype)
    b = draw(ranks, 6, shape_a[0], shape_a[2], COLS, dtype=dtype)
    shards = []
    for x, placement in zip((a, b), placements):
        local = ranks.own_items(x, placement.dim).contiguous()
        shards.append(DTensor.from_local(local, ranks.mesh, [placement]).requires_grad_())
    return a, b, *shards


def multiply_local(
    module: te.BatchedMatmul, placements: tuple[Any, Any], out_placement: Any, mesh: Any
) -> Callable[[DTensor, DTensor], DTensor]:
    """The module on each rank's shards: what a user writes for DTensors."""
    return local_map(
        module,
        out_placements=[out_placement],
        in_placements=([placements[0]], [placements[1]]),
        device_mesh=mesh,
    )


def check_dtensor_batch(ranks: Ranks, region: Callable[[], Any], minimum_db: float) -> None:
    """A batch-sharded product: no communication, forward and backward."""
    dtype = torch.float32 if minimum_db > 60 else torch.bfloat16
    placements = (Shard(0), Shard(0))
    a, b, a_shard, b_shard = make_dtensor_operands(ranks, placements, dtype)
    multiply = multiply_local(te.BatchedMatmul(), placements, Shard(0), ranks.mesh)
    grad = draw(ranks, 7, a.shape[0], ROWS, COLS, dtype=dtype)
    grad_shard = DTensor.from_local(ranks.own_items(grad), ranks.mesh, [Shard(0)])
    with CollectiveCounter() as counter:
        with region():
            y = multiply(a_shard, b_shard)
        y.backward(grad_shard)
    require(not counter.names, f"collectives ran: {counter.names}")
    require(tuple(y.placements) == (Shard(0),), f"placements {y.placements}")
    backward_db = minimum_db if minimum_db > 60 else minimum_db - 4
    exact = a.double() @ b.double()
    grads = grad.double() @ b.double().mT, a.double().mT @ grad.double()
    require_sqnr(y.to_local().detach(), ranks.own_items(exact), minimum_db)
    for x, expected in zip((a_shard, b_shard), grads):
        require_sqnr(x.grad.to_local(), ranks.own_items(expected), backward_db)


def check_dtensor_inner(ranks: Ranks, region: Callable[[], Any], minimum_db: float) -> None:
    """A K-sharded product: partial sums on each rank, and their reduction when it is asked for."""
    dtype = torch.float32 if minimum_db > 60 else torch.bfloat16
    placements = (Shard(2), Shard(1))
    a, b, a_shard, b_shard = make_dtensor_operands(ranks, placements, dtype)
    multiply = multiply_local(te.BatchedMatmul(), placements, Partial(), ranks.mesh)
    with CollectiveCounter() as before:
        with region():
            partial_sums = multiply(a_shard, b_shard)
    require(not before.names, f"collectives ran: {before.names}")
    with CollectiveCounter() as counter:
        y = partial_sums.redistribute(placements=[Replicate()])
        local = y.to_local()
    require(len(counter.names) == 1, f"expected one reduction: {counter.names}")
    exact = a.double() @ b.double()
    require_sqnr(local.detach(), exact, minimum_db)
    grad = draw(ranks, 7, *exact.shape, dtype=dtype)
    y.backward(DTensor.from_local(grad, ranks.mesh, [Replicate()]))
    backward_db = minimum_db if minimum_db > 60 else minimum_db - 4
    grads = grad.double() @ b.double().mT, a.double().mT @ grad.double()
    for x, expected, placement in zip((a_shard, b_shard), grads, placements):
        mine = ranks.own_items(expected, placement.dim)
        require_sqnr(x.grad.to_local(), mine, backward_db)


def check_plain_inner(ranks: Ranks) -> None:
    """K-sharded without DTensor: the module on the local shards, then `all_reduce`."""
    a = draw(ranks, 8, BATCH, ROWS, ranks.size * INNER, dtype=torch.bfloat16)
    b = draw(ranks, 9, BATCH, ranks.size * INNER, COLS, dtype=torch.bfloat16)
    with te.autocast(enabled=True, recipe=Float8CurrentScaling()):
        y = te.BatchedMatmul()(ranks.own_items(a, 2), ranks.own_items(b, 1)).float()
    dist.all_reduce(y)
    require_sqnr(y, a.double() @ b.double(), 27.0)


def current_region() -> Any:
    """An autocast region of current scaling."""
    return te.autocast(enabled=True, recipe=Float8CurrentScaling())


CHECKS: dict[str, Callable[[Ranks], None]] = {
    "amax histories and scales are equal on all ranks": check_amax_reduction,
    "scales differ where amaxes are not reduced": check_reduction_is_optional,
    "shared scales: products and gradients equal one process's bit for bit": check_shared_scales,
    "DDP gradients equal the whole batch's, FP32": check_ddp_fp32,
    "DDP gradients equal the whole batch's, delayed scaling": check_ddp_delayed,
    "DDP gradients equal the whole batch's, current scaling": check_ddp_current,
    "batch-sharded DTensors without communication, FP32": lambda r: check_dtensor_batch(
        r, nullcontext, 90.0
    ),
    "batch-sharded DTensors without communication, current scaling": lambda r: check_dtensor_batch(
        r, current_region, 27.0
    ),
    "K-sharded DTensors and their reduction, FP32": lambda r: check_dtensor_inner(
        r, nullcontext, 90.0
    ),
    "K-sharded DTensors and their reduction, current scaling": lambda r: check_dtensor_inner(
        r, current_region, 27.0
    ),
    "K-sharded tensors and all_reduce, current scaling": check_plain_inner,
}

# TE's own modules need a GPU.
CUDA_CHECKS = {
    "DDP gradients equal the whole batch's, delayed scaling, with te.Linear": check_ddp_linear,
}


def run_checks(ranks: Ranks) -> bool:
    """Runs every check on all ranks; whether all passed everywhere."""
    is_passed = True
    checks = {**CHECKS, **(CUDA_CHECKS if ranks.device.type == "cuda" else {})}
    for name, check in checks.items():
        text = ""
        try:
            forget_modules()
            check(ranks)
        except Exception:
            text = f"rank {ranks.rank}:\n{traceback.format_exc()}"
        texts: list[Any] = [None] * ranks.size
        # A rank that failed before a collective of the check leaves the others waiting in it, until the
        # process group's timeout ends the run.
        dist.all_gather_object(texts, text)
        failures = [t for t in texts if t]
        is_passed &= not failures
        if ranks.rank == 0:
            print(f"{'FAIL' if failures else 'PASS'} {name}", *failures, sep="\n  ", flush=True)
    return is_passed


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device_type = parser.parse_args().device
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo", timeout=timedelta(seconds=60)
    )
    try:
        ranks = Ranks(device_type)
        with teb.emulate() if device_type == "cpu" else nullcontext():
            return 0 if run_checks(ranks) else 1
    finally:
        gc.collect()  # DDP's reducers go before the process group that they use
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
