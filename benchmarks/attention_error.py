# SPDX-License-Identifier: Apache-2.0
"""Error of an unfused attention whose two products are quantized: `python benchmarks/attention_error.py`.

Input: one CUDA GPU with Transformer Engine and this package (or `--device cpu`, where FP8 is emulated).
Output: `attention_error.json` in a folder named after the GPU: forward and gradient error of each recipe
against FP64. The softmax is FP32 in all of them. Must not time anything.

The attention is ``softmax(mask(q kᵀ / sqrt(d))) v``, causal, with `te.BatchedMatmul` for ``q kᵀ`` and for
the product with `v`. FP64 computes the same from the same BF16 inputs, so what is measured is what the
arithmetic adds. The error is the signal-to-noise ratio of each head of each batch item, in dB:
``10 log10(sum exact^2 / sum (result - exact)^2)``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import torch

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from benchmarks import gate, stored_results
from benchmarks.training import BASELINE, LABELS, QUANTIZED, recipe_scope

RECIPES = (BASELINE, *QUANTIZED)
TENSORS = ("scores", "out", "grad_q", "grad_k", "grad_v")
# Worst head, in dB. What FP8 costs here is the result, not a bound: 28.5 dB for one product, less for two in
# a row with a softmax in between whose gradient is a small difference. Below these, something is broken: a
# wrong factor of two gives 0 dB at the most.
MINIMUM_DB = {BASELINE: 35.0, "quantized": 15.0}


@dataclass(frozen=True)
class Shape:
    """Sizes of the attention."""

    batch: int = 4
    heads: int = 16
    length: int = 1024
    head_dim: int = 64


def draw_inputs(shape: Shape, seed: int, device: str) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output: standard normal BF16 ``[batch, heads, length, head_dim]``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape.batch, shape.heads, shape.length, shape.head_dim)
    return [torch.randn(sizes, generator=generator).to(device, torch.bfloat16) for _ in range(4)]


def attend(
    inputs: Sequence[torch.Tensor],
    score_product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    value_product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    softmax_dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Scores, output and gradients with the given products."""
    q, k, v, grad_out = inputs
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    length, head_dim = q.shape[-2:]
    scores = score_product(q * head_dim**-0.5, k.mT)
    is_future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    masked = scores.to(softmax_dtype).masked_fill(is_future, -torch.inf)
    out = value_product(torch.softmax(masked, dim=-1).to(q.dtype), v)
    grads = torch.autograd.grad(out, (q, k, v), grad_out)
    return dict(zip(TENSORS, (scores.detach(), out.detach(), *grads)))


def run_recipe(name: str, shape: Shape, device: str, num_steps: int = 3) -> dict[str, torch.Tensor]:
    """Results of the last of some steps on new data each: delayed scaling has a history by then."""
    import transformer_engine_batched as teb

    score_product = teb.BatchedMatmul(name="scores")
    value_product = teb.BatchedMatmul(name="values")
    with recipe_scope(name, device) as region:
        for step in range(num_steps):
            inputs = draw_inputs(shape, num_steps - 1 - step, device)
            with region():
                results = attend(inputs, score_product, value_product, torch.float32)
    return results


def measure(shape: Shape, device: str, recipes: Sequence[str] = RECIPES) -> list[dict[str, Any]]:
    """One row per recipe and tensor: dB of the worst and of the median head."""
    inputs = [x.double() for x in draw_inputs(shape, 0, device)]
    exact = attend(inputs, torch.matmul, torch.matmul, torch.float64)
    rows = []
    for name in recipes:
        results = run_recipe(name, shape, device)
        minimum = MINIMUM_DB.get(name, MINIMUM_DB["quantized"])
        for tensor in TENSORS:
            db = gate.measure_sqnr(results[tensor].flatten(0, 1), exact[tensor].flatten(0, 1))
            rows.append(
                {
                    "recipe": name,
                    "label": LABELS[name],
                    "tensor": tensor,
                    "worst_db": round(float(db.min()), 2),
                    "median_db": round(float(db.median()), 2),
                    "gate_db": minimum,
                    "passed": bool(db.min() >= minimum),
                }
            )
    return rows


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/attention_error.py", description=__doc__
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, default=Shape.batch)
    parser.add_argument("--heads", type=int, default=Shape.heads)
    parser.add_argument("--length", type=int, default=Shape.length)
    parser.add_argument("--head-dim", type=int, default=Shape.head_dim)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--commit", help="commit of the tree, where it has no .git")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all recipes and store them; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA GPU; --device cpu runs with emulated FP8.", file=sys.stderr)
        return 2
    from benchmarks.run import choose_folder

    shape = Shape(options.batch, options.heads, options.length, options.head_dim)
    meta = stored_results.collect_meta(arguments, options.commit)
    meta["command"] = meta["command"].replace("benchmarks/run.py", "benchmarks/attention_error.py")
    meta.update(settings=asdict(shape), device=options.device, complete=True)
    name_of_device = meta["gpu"] if options.device == "cuda" else "cpu"
    path = (options.out or choose_folder(name_of_device, False)) / "attention_error.json"
    rows = measure(shape, options.device)
    stored_results.write(path, meta, rows)
    for row in rows:
        verdict = "" if row["passed"] else f"  MISSED: below {row['gate_db']:g} dB"
        print(
            f"{row['label']:28} {row['tensor']:8} worst {row['worst_db']:6.2f} dB, "
            f"median {row['median_db']:6.2f} dB{verdict}"
        )
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
