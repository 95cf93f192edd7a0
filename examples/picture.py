# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: what goes in, what comes out, and how far each number format is off.

Input: the comparisons of both directions and the complex. Output: one PNG.
Must not import: ``transformer_engine_batched`` or Transformer Engine. It draws what was measured
and measures nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # A machine without a screen; must come before pyplot.

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

if TYPE_CHECKING:
    from demo import Comparison
    from protein import Complex

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLORS = {
    "BF16": "#56606b",
    "Float8 delayed": "#e69f00",
    "Float8 current": "#0072b2",
    "MXFP8": "#009e73",
}
# Per-tensor recipes often agree to a tenth of a decibel: a wide pale line under a thin one keeps
# both visible.
LINES = {
    "BF16": {"linewidth": 2},
    "Float8 delayed": {"linewidth": 6, "alpha": 0.45},
    "Float8 current": {"linewidth": 1.8},
    "MXFP8": {"linewidth": 1.8, "linestyle": (0, (4, 2))},
}
SHOWN_RECIPE = "Float8 current"


def draw(path: Path, complex_: Complex, comparisons: list[Comparison]) -> None:
    """Draw the six panels to the PNG at `path`."""
    style = {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#8a929b",
        "axes.labelcolor": "#333b44",
        "xtick.color": "#333b44",
        "ytick.color": "#333b44",
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(14, 8.8), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.07)
        # Two figures in one, so that the labels of the charts do not push the maps about.
        maps, charts = figure.subfigures(2, 1, height_ratios=(1.08, 1), hspace=0.04)
        map_axes = maps.subplots(1, 3)
        outgoing = comparisons[0]
        _draw_distances(map_axes[0], complex_, outgoing.distance)
        _draw_product(map_axes[1], complex_, outgoing)
        _draw_error(map_axes[2], complex_, outgoing)
        chart_axes = charts.subplots(1, 3)
        chart_axes[1].sharey(chart_axes[0])
        for axis, comparison in zip(chart_axes, comparisons):
            _draw_channels(axis, comparison)
        _draw_summary(chart_axes[2], comparisons)
        figure.suptitle(
            f"Triangle multiplication on PDB 1TII, {len(complex_)} residues: "
            "all channels in one batched FP8 product",
            fontsize=13,
            fontweight="bold",
        )
        figure.savefig(path, dpi=130, facecolor="white")
        plt.close(figure)


def _draw_map(axis, complex_, values, title, label, **options):
    """A picture of an ``[N, N]`` matrix with its chains marked."""
    size = len(complex_)
    image = axis.imshow(
        values, extent=(0, size, size, 0), interpolation="nearest", rasterized=True, **options
    )
    spans = complex_.chain_spans()
    for _, first, _ in spans[1:]:
        axis.axhline(first, color="#333b44", linewidth=0.5, alpha=0.6)
        axis.axvline(first, color="#333b44", linewidth=0.5, alpha=0.6)
    centres = [(first + end) / 2 for _, first, end in spans]
    names = [name for name, _, _ in spans]
    axis.set_xticks(centres, names)
    axis.set_yticks(centres, names)
    axis.tick_params(length=0)
    axis.set_xlabel("residue j (chain)")
    axis.set_ylabel("residue i (chain)")
    axis.set_title(title, loc="left")
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.8, aspect=28, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _draw_distances(axis, complex_, distance):
    title = "In: distances between C-alpha atoms"
    _draw_map(axis, complex_, distance, title, "angstrom", cmap="magma_r", vmin=0)


def _draw_product(axis, complex_, comparison):
    product = comparison.channel_product
    limit = float(np.quantile(np.abs(product), 0.995))
    title = f"Out: the sum over k, channel {comparison.channel} of {comparison.num_channels}"
    label = r"$\sum_k a_{ik}\,b_{jk}$"
    options = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    _draw_map(axis, complex_, product, title, label, **options)


def _draw_error(axis, complex_, comparison):
    rms = np.sqrt(np.mean(np.square(comparison.channel_product)))
    error = 100 * comparison.channel_error / rms
    limit = float(np.quantile(np.abs(error), 0.995))
    title = f"Its error in {SHOWN_RECIPE} (worst channel)"
    options = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}
    _draw_map(axis, complex_, error, title, "% of the channel's rms", **options)


def _shown(comparison):
    return [row for row in comparison.measurements if row.name in COLORS]


def _draw_channels(axis, comparison):
    """One curve per recipe: the channels, worst first, so that the left end is the worst slice."""
    for row in _shown(comparison):
        values = np.sort(row.channel_sqnr_db)
        rank = np.arange(1, len(values) + 1)
        axis.plot(rank, values, color=COLORS[row.name], label=row.name, **LINES[row.name])
        axis.plot(1, values[0], "o", color=COLORS[row.name], markersize=5, clip_on=False)
    axis.set_title(f"SQNR of each channel, {comparison.direction}", loc="left")
    axis.set_xlabel("channels, worst first")
    if comparison.direction == "outgoing":
        axis.set_ylabel("SQNR against FP64, dB")
    axis.set_xlim(1, len(values))
    axis.grid(axis="y", color="#dfe3e8", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.78), ncols=2)


def _draw_summary(axis, comparisons):
    """Worst slice (bar) and whole contraction (mark) of each recipe and direction."""
    labels, ticks, position = [], [], 0.0
    highest = max(row.sqnr_db for comparison in comparisons for row in _shown(comparison))
    for comparison in comparisons:
        axis.text(0, position, comparison.direction, va="center", fontweight="bold")
        position += 0.9
        for row in _shown(comparison):
            color = COLORS[row.name]
            axis.barh(position, row.worst_db, height=0.72, color=color)
            axis.plot(
                row.sqnr_db, position, "D", color=color, markeredgecolor="white", markersize=8
            )
            text = {"va": "center", "color": "white", "fontweight": "bold"}
            axis.text(0.02 * highest, position, f"{row.worst_db:.1f}", **text)
            axis.text(1.06 * highest, position, f"{row.sqnr_db:.1f}", va="center", color=color)
            emulated = "\n(emulated)" if row.engine == "emulated" else ""
            labels.append(row.name + emulated)
            ticks.append(position)
            position += 1
        position += 0.3
    axis.set_xlim(0, 1.2 * highest)
    axis.set_yticks(ticks, labels)
    axis.set_ylim(position - 0.6, -0.6)
    axis.set_xlabel("SQNR, dB; bar: worst channel, mark: all channels together")
    axis.set_title("Worst channel and all channels", loc="left")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#dfe3e8", linewidth=0.8)
    axis.set_axisbelow(True)
