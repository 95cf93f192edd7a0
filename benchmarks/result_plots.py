# SPDX-License-Identifier: Apache-2.0
"""Stored results as plots: what is drawn, and whether a drawn one is of the stored results.

Input: a folder of results. Output: PNG files. Matplotlib is imported only to draw.
"""

from __future__ import annotations

import hashlib
import statistics
from pathlib import Path
from typing import Any, Callable

from benchmarks import stored_results, training
from benchmarks.result_tables import (
    LABELS,
    SQUARE,
    Results,
    collect_points,
    format_caption,
    list_variants,
)

_STYLES = {
    "torch_bmm": ("#555555", "o", "-"),
    "ours_split": ("#0072B2", "s", "-"),
    "ours_fast": ("#56B4E9", "^", "-"),
    "ours_split_tuned": ("#0072B2", "s", ":"),
    "ours_fast_tuned": ("#D55E00", "D", "-"),
    "te_loop": ("#009E73", "v", "--"),
    "te_loop_fast": ("#009E73", "^", ":"),
    "te_grouped": ("#CC79A7", "<", "--"),
    "scaled_mm_loop": ("#E69F00", ">", "--"),
    "scaled_grouped_mm": ("#8C6BB1", "P", "--"),
}
_TRAINING_STYLES = {
    "bf16": ("#555555", "-"),
    "delayed": ("#0072B2", "-"),
    "current": ("#D55E00", "--"),
    "mxfp8": ("#009E73", ":"),
    "bf16_without_triangles": ("#BBBBBB", "-"),
}
# A single step's loss depends on its graphs; a curve is the mean over this many steps and over the seeds.
_SMOOTHING_STEPS = 10


def write_plots(results_folder: Path, image_folder: Path) -> None:
    """Draw every plot. Each carries the digest of its results, for `find_stale_plots`."""
    for suite, plots in _PLOTS_OF_SUITE.items():
        stored = stored_results.read(results_folder / f"{suite}.json")
        if stored is None:
            continue
        image_folder.mkdir(parents=True, exist_ok=True)
        source = _digest(results_folder / f"{suite}.json")
        for name, (_, draw) in plots.items():
            draw(stored).savefig(image_folder / name, dpi=150, metadata={"Source": source})


def find_stale_plots(results_folder: Path, image_folder: Path) -> list[str]:
    """Plots that are missing or were drawn from other results. Pixels are not compared."""
    problems = []
    for suite, plots in _PLOTS_OF_SUITE.items():
        stored = results_folder / f"{suite}.json"
        if not stored.exists():
            continue
        for name in plots:
            path = image_folder / name
            if not path.exists():
                problems.append(f"docs/img/{name}: missing, but there are results to draw")
            elif _digest(stored).encode() not in path.read_bytes():
                problems.append(f"docs/img/{name}: drawn from other results than the stored ones")
    return problems


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def format_pictures(results: Results, plots: dict[str, Plot], folder: str) -> str:
    """Markdown that shows plots of `folder`, and their caption."""
    pictures = "\n\n".join(f"![{plot[0]}]({folder}/{name})" for name, plot in plots.items())
    return f"{pictures}\n\n{format_caption(results['meta'])}"


def _draw(gemm: Results, field: str, ylabel: str, title: str) -> Any:
    """A figure of `field` over N, one line per variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    points = collect_points(gemm, SQUARE)
    figure, axes = pyplot.subplots(figsize=(8.0, 4.6), layout="constrained")
    for name in list_variants(points):
        rows = [p.rows[name] for p in points if name in p.rows]
        sizes = [row["n"] for row in rows if row[field] is not None]
        values = [row[field] for row in rows if row[field] is not None]
        if not values:
            continue
        color, marker, line = _STYLES[name]
        label = LABELS[name].replace("`", "")
        axes.plot(sizes, values, line, color=color, marker=marker, markersize=5, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(ticker.FixedLocator([p.n for p in points]))
    axes.xaxis.set_major_formatter(ticker.FixedFormatter([f"{p.n}\nB={p.batch}" for p in points]))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("N (M = N = K) and batch B")
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _draw_training(results: Results) -> Any:
    """Two panels: losses over steps, and what each recipe's loss differs from BF16's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[list[float]]] = {}
    for row in results["rows"]:
        curves.setdefault(row["recipe"], []).append(row["losses"])
    means = {}
    for name, runs in curves.items():
        mean = [statistics.fmean(step) for step in zip(*runs)]
        means[name] = [
            statistics.fmean(mean[max(0, i - _SMOOTHING_STEPS + 1) : i + 1])
            for i in range(len(mean))
        ]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.0, 4.2), layout="constrained")
    baseline = means.get(training.BASELINE)
    for name, mean in means.items():
        color, line = _TRAINING_STYLES[name]
        left.plot(mean, line, color=color, label=training.LABELS[name])
        if name in training.QUANTIZED and baseline is not None:
            relative = [100 * (x / y - 1) for x, y in zip(mean, baseline)]
            right.plot(relative, line, color=color, label=training.LABELS[name])
    bound = 100 * training.MAXIMUM_DEVIATION
    right.axhspan(-bound, bound, color="#eeeeee", zorder=0)
    left.set_ylim(bottom=0)
    left.set_ylabel("binary cross-entropy, nats")
    right.set_ylabel("difference from BF16, %")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    num_seeds = max(len(runs) for runs in curves.values())
    figure.suptitle(f"Training, mean of {num_seeds} seeds, {results['meta']['gpu']}", fontsize=11)
    return figure


# Words for readers who do not see it, and how it is drawn.
Plot = tuple[str, Callable[[Results], Any]]
PLOTS: dict[str, Plot] = {
    "gemm_tflops.png": (
        "TFLOP/s over N for each variant",
        lambda gemm: _draw(
            gemm, "tflops", "TFLOP/s", f"Batched product, BF16 out, {gemm['meta']['gpu']}"
        ),
    ),
    "gemm_speedup.png": (
        "Speed-up over torch.bmm in BF16 over N for each variant",
        lambda gemm: _draw(
            gemm, "ratio_to_bf16", "times torch.bmm BF16", f"Speed-up, {gemm['meta']['gpu']}"
        ),
    ),
}
TRAINING_PLOTS: dict[str, Plot] = {
    "training.png": ("Loss over training steps for each recipe", _draw_training)
}
_PLOTS_OF_SUITE = {"gemm": PLOTS, "training": TRAINING_PLOTS}
