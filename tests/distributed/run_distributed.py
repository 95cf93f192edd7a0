# SPDX-License-Identifier: Apache-2.0
"""Products over several processes: shared amaxes, DDP, sharded batches, sharded K.

    torchrun --standalone --nproc-per-node 2 tests/distributed/run_distributed.py                # NCCL
    torchrun --standalone --nproc-per-node 2 tests/distributed/run_distributed.py --device cpu   # gloo

Input: the environment that torchrun sets, one GPU per process (or a CPU, where FP8 is emulated). Output: a line
PASS or FAIL per check on rank 0, with the lowest SQNR that it found; exit code 1 if a check failed on any rank.
Must not need anything but torch, TE and this package.

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
LEVELS: list[float] = []  # dB that a check found
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
    LEVELS.append(db)
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
    """TE's Linear and the product in one model and region, with shared amaxes: the same codes.

    Scales are those of one process up to the power of two by which each rank's loss is larger, so all codes are the same and
    the gradients differ as in `check_ddp_delayed`: three roundings to BF16 (each rank's gradient, their sum, the whole
    batch's), 55.6 dB each and 50.8 dB together. One amax off by a unit of BF16 would round all codes anew: 28 dB.
    """
    for mine, expected in zip(*train_ddp(ranks, torch.bfloat16, DelayedScaling, te.Linear)):
        require_sqnr(mine[None], expected[None], 40.0)


# Of a, b and the gradients of both along the one dim of the mesh, for operands [B, M, K] and [B, K, N] or [K, N].
LAYOUTS = {
    "batch": (Shard(0), Shard(0), Shard(0), Shard(0), Shard(0)),
    "inner": (Shard(2), Shard(1), Partial(), Shard(2), Shard(1)),
    "rows": (Shard(1), Replicate(), Shard(1), Shard(1), Partial()),
    "columns": (Replicate(), Shard(2), Shard(2), Partial(), Shard(2)),
    "one matrix for a sharded batch": (Shard(0), Replicate(), Shard(0), Shard(0), Partial()),
}


def distribute(ranks: Ranks, x: torch.Tensor, placement: Any) -> DTensor:
    """A tensor that all ranks have, as a DTensor of equal or unequal shards; no communication."""
    local = x
    if placement.is_shard():
        # The last ranks may have none.
        parts = x.split(-(-x.shape[placement.dim] // ranks.size), placement.dim)
        empty = x.narrow(placement.dim, 0, 0)
        local = parts[ranks.rank] if ranks.rank < len(parts) else empty
    return DTensor.from_local(
        local.contiguous(),
        ranks.mesh,
        [placement],
        run_check=False,
        shape=x.shape,
        stride=x.stride(),
    )


def check_dtensors(
    ranks: Ranks, layout: str, region: Callable[[], Any], minimum_db: float, uneven: bool = False
) -> None:
    """The module on DTensors: no communication, and what each rank has of the product and the gradients.

    Partial sums are reduced at the end, where they are asked for.
    """
    dtype = torch.float32 if minimum_db > 60 else torch.bfloat16
    of_a, of_b, of_y, of_grad_a, of_grad_b = LAYOUTS[layout]
    batch, rows, cols, inner = (ranks.size * x + uneven for x in (BATCH, ROWS, COLS, INNER))
    a = draw(ranks, 5, batch, rows, inner, dtype=dtype)
    b_shape = (inner, cols) if layout.startswith("one matrix") else (batch, inner, cols)
    b = draw(ranks, 6, *b_shape, dtype=dtype)
    a_shard = distribute(ranks, a, of_a).requires_grad_()
    b_shard = distribute(ranks, b, of_b).requires_grad_()
    exact = a.double() @ b.double()
    grad = draw(ranks, 7, *exact.shape, dtype=dtype)
    # The gradient of partial sums is the same for each of them.
    grad_shard = distribute(ranks, grad, Replicate() if of_y == Partial() else of_y)
    with CollectiveCounter() as counter:
        with region():
            y = te.BatchedMatmul()(a_shard, b_shard)
        y.backward(grad_shard)
    require(not counter.names, f"collectives ran: {counter.names}")
    found = (y, a_shard.grad, b_shard.grad)
    for x, placement in zip(found, (of_y, of_grad_a, of_grad_b)):
        require(tuple(x.placements) == (placement,), f"{x.placements}, expected {placement}")
    with CollectiveCounter() as counter:
        product = y.detach().redistribute(placements=[Replicate()]).to_local()
    require(len(counter.names) == 1, f"expected one collective: {counter.names}")
    require(product.shape == exact.shape, f"{product.shape}, expected {exact.shape}")
    require_sqnr(product, exact, minimum_db)
    backward_db = minimum_db if minimum_db > 60 else minimum_db - 4
    grads = grad.double() @ b.double().mT, a.double().mT @ grad.double()
    for x, expected, shape in zip(found[1:], grads, (a.shape, b.shape)):
        expected = expected.sum_to_size(shape)
        if len(shape) == 2:
            expected = expected[None]
        require_sqnr(x.full_tensor().view(expected.shape), expected, backward_db)


def check_dtensor_refusals(ranks: Ranks) -> None:
    """Placements that would need communication, and shapes that do not fit on some ranks only, are errors on all."""
    module = te.BatchedMatmul()
    a = draw(ranks, 5, ranks.size * BATCH, ROWS, INNER + 1)
    b = draw(ranks, 6, ranks.size * BATCH, INNER, COLS)
    cases = (
        (
            a[..., :INNER],
            Shard(0),
            b,
            Shard(1),
            teb.UnsupportedError,
            "redistribute an operand first",
        ),
        (a[..., :INNER], Partial(), b, Replicate(), teb.UnsupportedError, "redistribute"),
        (a, Shard(2), b, Shard(1), ValueError, "contracted sizes differ"),
    )
    for x, of_x, y, of_y, kind, words in cases:
        try:
            module(distribute(ranks, x, of_x), distribute(ranks, y, of_y))
        except kind as error:
            require(words in str(error), f"{error}")
        else:
            require(False, f"{of_x}, {of_y} was not refused")


def check_local_map(ranks: Ranks) -> None:
    """The module through torch's `local_map`, K-sharded."""
    a = draw(ranks, 5, BATCH, ROWS, ranks.size * INNER)
    b = draw(ranks, 6, BATCH, ranks.size * INNER, COLS)
    multiply = local_map(
        te.BatchedMatmul(),
        out_placements=[Partial()],
        in_placements=([Shard(2)], [Shard(1)]),
        device_mesh=ranks.mesh,
    )
    y = multiply(distribute(ranks, a, Shard(2)), distribute(ranks, b, Shard(1)))
    require_sqnr(y.full_tensor(), a.double() @ b.double(), 90.0)


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
    "DTensors, batch-sharded, FP32": lambda r: check_dtensors(r, "batch", nullcontext, 90.0),
    "DTensors, batch-sharded, current scaling": lambda r: check_dtensors(
        r, "batch", current_region, 27.0
    ),
    "DTensors, batch-sharded unevenly, FP32": lambda r: check_dtensors(
        r, "batch", nullcontext, 90.0, uneven=True
    ),
    "DTensors, K-sharded and reduced, FP32": lambda r: check_dtensors(
        r, "inner", nullcontext, 90.0
    ),
    "DTensors, K-sharded and reduced, current scaling": lambda r: check_dtensors(
        r, "inner", current_region, 27.0
    ),
    "DTensors, K-sharded unevenly, FP32": lambda r: check_dtensors(
        r, "inner", nullcontext, 90.0, uneven=True
    ),
    "DTensors, rows sharded": lambda r: check_dtensors(r, "rows", current_region, 27.0),
    "DTensors, columns sharded": lambda r: check_dtensors(r, "columns", current_region, 27.0),
    "DTensors, one matrix for a sharded batch": lambda r: check_dtensors(
        r, "one matrix for a sharded batch", current_region, 27.0
    ),
    "DTensors: placements without a rule": check_dtensor_refusals,
    "DTensors through local_map": check_local_map,
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
            LEVELS.clear()
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
            level = f" ({min(LEVELS):.1f} dB)" if LEVELS else ""
            print(
                f"{'FAIL' if failures else 'PASS'} {name}{level}", *failures, sep="\n  ", flush=True
            )
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
            is_right = run_checks(ranks)
        dist.barrier()  # no rank's end breaks another's connections
        return 0 if is_right else 1
    finally:
        gc.collect()  # DDP's reducers go before the process group that they use
        dist.destroy_process_group()


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    # Without the interpreter's end: torch 2.11 seldom, about once in 10 runs on a busy machine, aborts there
    # ("terminate called without an active exception": a thread of gloo's that nobody joined).
    os._exit(exit_code)
