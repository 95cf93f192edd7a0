# SPDX-License-Identifier: Apache-2.0
"""Trains a small Pairformer-like block with each recipe: `python benchmarks/training.py`.

Input: one CUDA GPU with Transformer Engine and this package (or `--device cpu`, where everything is
emulated). Output: `training.json` in a folder named after the GPU: every loss of every run, and exit
code 1 if a recipe's final loss is not within 2 % of BF16's. What is not a triangle product is the same BF16
arithmetic in all runs. Must not tune anything per recipe.

The task
--------
Items belong to hidden clusters; which pairs share one is seen through noise: a pair of the same cluster
has an edge with probability 0.45, any other with 0.12. The model says for every pair whether its items
share a cluster (binary cross-entropy, nats). One edge says little; what says more is how many neighbours
two items have in common, which is the triangle product of the edges. A run whose triangle products are
replaced by one of their operands shows how far one gets without.

New graphs are drawn at every step, the same ones for every recipe, so that the loss is that of data never seen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from benchmarks import stored_results

# Final losses are compared with this bound; the final loss is the mean of the last FINAL_STEPS.
MAXIMUM_DEVIATION = 0.02
FINAL_STEPS = 20
BASELINE = "bf16"
WITHOUT_TRIANGLES = "bf16_without_triangles"
LABELS = {
    "bf16": "BF16",
    "delayed": "Float8, delayed scaling",
    "current": "Float8, current scaling",
    "mxfp8": "MXFP8, emulated",
    WITHOUT_TRIANGLES: "BF16 without triangle products",
}
QUANTIZED = ("delayed", "current", "mxfp8")


@dataclass(frozen=True)
class Settings:
    """Sizes of a run."""

    num_steps: int = 300
    num_warmup_steps: int = 20
    batch: int = 4
    num_items: int = 64
    channels: int = 64
    num_blocks: int = 2
    learning_rate: float = 3e-3
    num_clusters: int = 5
    edge_within: float = 0.45
    edge_between: float = 0.12


def draw_graphs(
    settings: Settings, seed: int, step: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Seen edges and hidden truth of a step, both FP32 ``[batch, items, items]`` of 0 and 1.

    Drawn on the CPU, so that they are the same on every device.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    size = (settings.batch, settings.num_items)
    clusters = torch.randint(settings.num_clusters, size, generator=generator)
    same = (clusters[:, :, None] == clusters[:, None, :]).float()
    chance = settings.edge_between + (settings.edge_within - settings.edge_between) * same
    upper = (torch.rand(chance.shape, generator=generator) < chance).float().triu(1)
    return (upper + upper.mT).to(device), same.to(device)


class TriangleMultiplication(nn.Module):
    """``z_ij += gate * project(norm(sum_k a_ik b_jk))`` (outgoing), or ``sum_k a_ki b_kj`` (incoming).

    The form of AlphaFold 2, algorithms 11 and 12. The product is a `BatchedMatmul` of
    ``[batch, channels, items, items]`` views; without `has_product`, `a` takes its place.
    """

    def __init__(self, channels: int, is_outgoing: bool, has_product: bool) -> None:
        import transformer_engine_batched as teb

        super().__init__()
        self.is_outgoing = is_outgoing
        self.norm_in = nn.LayerNorm(channels)
        self.project_in = nn.Linear(channels, 2 * channels, bias=False)
        self.gate_in = nn.Linear(channels, 2 * channels)
        self.norm_out = nn.LayerNorm(channels)
        self.project_out = nn.Linear(channels, channels, bias=False)
        self.gate_out = nn.Linear(channels, channels)
        self.product = teb.BatchedMatmul(name="triangle") if has_product else None

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """The update of ``z [batch, items, items, channels]``."""
        x = self.norm_in(z)
        gated = torch.sigmoid(self.gate_in(x)) * self.project_in(x)
        a, b = gated.permute(0, 3, 1, 2).chunk(2, dim=1)
        if self.product is None:
            mixed = a
        elif self.is_outgoing:
            mixed = self.product(a, b.mT)
        else:
            mixed = self.product(a.mT, b)
        mixed = self.project_out(self.norm_out(mixed.permute(0, 2, 3, 1)))
        return torch.sigmoid(self.gate_out(x)) * mixed


class PairModel(nn.Module):
    """Edges to logits: blocks of two triangle multiplications and a transition, with residuals."""

    def __init__(self, settings: Settings, has_product: bool = True) -> None:
        super().__init__()
        channels = settings.channels
        self.embed = nn.Linear(2, channels)
        self.updates = nn.ModuleList()
        for _ in range(settings.num_blocks):
            self.updates += [
                TriangleMultiplication(channels, is_outgoing=True, has_product=has_product),
                TriangleMultiplication(channels, is_outgoing=False, has_product=has_product),
                nn.Sequential(
                    nn.LayerNorm(channels),
                    nn.Linear(channels, 2 * channels),
                    nn.GELU(),
                    nn.Linear(2 * channels, channels),
                ),
            ]
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 1))

    def forward(self, edges: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, items, items]``; the diagonal is marked in the input."""
        diagonal = torch.eye(edges.shape[-1], device=edges.device).expand_as(edges)
        z = self.embed(torch.stack((edges, diagonal), dim=-1))
        for update in self.updates:
            z = z + update(z)
        return self.head(z).squeeze(-1)


def make_recipe(name: str) -> Any:
    """TE's recipe with its defaults, None for BF16."""
    from transformer_engine.common import recipe

    classes: dict[str, Callable[[], Any]] = {
        "delayed": recipe.DelayedScaling,
        "current": recipe.Float8CurrentScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
    }
    return classes[name]() if name in classes else None


def make_region(name: str) -> Callable[[], Any]:
    """What opens one autocast region of a recipe; for BF16, nothing."""
    import transformer_engine.pytorch as te

    recipe = make_recipe(name)
    # TE's autocast asks for the GPU even where it is disabled.
    return nullcontext if recipe is None else partial(te.autocast, enabled=True, recipe=recipe)


@contextmanager
def recipe_scope(name: str, device: str) -> Iterator[Callable[[], Any]]:
    """A context for a whole run; gives what opens one autocast region of the recipe.

    What the device cannot run is emulated: MXFP8 before Blackwell, everything on a CPU.
    """
    import transformer_engine_batched as teb

    lacks_mxfp8 = device == "cpu" or torch.cuda.get_device_capability()[0] < 10
    is_emulated = name in QUANTIZED and (device == "cpu" or (name == "mxfp8" and lacks_mxfp8))
    with teb.emulate() if is_emulated else nullcontext():
        yield make_region(name)


def train(
    name: str,
    seed: int,
    settings: Settings,
    device: str,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Losses of all steps of one run."""
    torch.manual_seed(seed)
    model = PairModel(settings, has_product=name != WITHOUT_TRIANGLES).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / settings.num_warmup_steps)
    )
    losses = []
    with recipe_scope(name, device) as region:
        for step in range(settings.num_steps):
            edges, same = draw_graphs(settings, seed, step, device)
            with torch.autocast(device, dtype=torch.bfloat16):
                with region():
                    logits = model(edges)
            loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), same)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            report(step, losses[-1])
    return torch.stack(losses).tolist()


def final_loss(losses: Sequence[float]) -> float:
    """Mean of the last steps."""
    return statistics.fmean(losses[-FINAL_STEPS:])


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per recipe: the final loss over seeds, its deviation from BF16's, and the verdict.

    The deviation is that of the means over seeds, relative: ``loss / loss_bf16 - 1``. `is_reached` is
    None for the runs that are no recipe of FP8, and where BF16 has no run.
    """
    finals: dict[str, list[float]] = {}
    for row in rows:
        finals.setdefault(row["recipe"], []).append(row["final_loss"])
    baseline = statistics.fmean(finals[BASELINE]) if BASELINE in finals else None
    summary = {}
    for name, values in finals.items():
        mean = statistics.fmean(values)
        deviation = None if baseline is None else mean / baseline - 1
        is_reached = None
        if name in QUANTIZED and deviation is not None:
            is_reached = abs(deviation) <= MAXIMUM_DEVIATION
        summary[name] = {
            "final_loss": mean,
            "lowest": min(values),
            "highest": max(values),
            "deviation": deviation,
            "is_reached": is_reached,
            "seconds": sum(r["seconds"] for r in rows if r["recipe"] == name),
        }
    return summary


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/training.py", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--recipes", nargs="+", choices=tuple(LABELS), default=tuple(LABELS))
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each recipe")
    parser.add_argument("--steps", type=int, default=Settings.num_steps)
    parser.add_argument("--items", type=int, default=Settings.num_items)
    parser.add_argument("--channels", type=int, default=Settings.channels)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--commit", help="commit of the tree, where it has no .git")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train all runs and store them; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA GPU; --device cpu trains with emulated FP8.", file=sys.stderr)
        return 2
    from benchmarks.run import choose_folder

    settings = Settings(num_steps=options.steps, num_items=options.items, channels=options.channels)
    meta = stored_results.collect_meta(arguments, options.commit)
    meta["command"] = meta["command"].replace("benchmarks/run.py", "benchmarks/training.py")
    meta.update(settings=asdict(settings), device=options.device, complete=False)
    name_of_device = meta["gpu"] if options.device == "cuda" else "cpu"
    path = (options.out or choose_folder(name_of_device, False)) / "training.json"
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for name in options.recipes:
            start = time.perf_counter()
            losses = train(name, seed, settings, options.device)
            seconds = time.perf_counter() - start
            rows.append(
                {
                    "recipe": name,
                    "label": LABELS[name],
                    "seed": seed,
                    "final_loss": final_loss(losses),
                    "seconds": round(seconds, 2),
                    "losses": [round(loss, 5) for loss in losses],
                }
            )
            stored_results.write(path, meta, rows)
            print(f"seed {seed} {name:24} {final_loss(losses):.4f} {seconds:6.1f} s", flush=True)
    meta["complete"] = True
    stored_results.write(path, meta, rows)
    is_failed = False
    for name, result in summarize(rows).items():
        verdict = {None: "", True: "within 2 %", False: "MISSED: not within 2 %"}[
            result["is_reached"]
        ]
        is_failed |= result["is_reached"] is False
        deviation = result["deviation"]
        relative = "" if deviation is None else f"{100 * deviation:+.2f} %"
        print(f"{LABELS[name]:32} {result['final_loss']:.4f} {relative:>10} {verdict}")
    return 1 if is_failed else 0


if __name__ == "__main__":
    sys.exit(main())
