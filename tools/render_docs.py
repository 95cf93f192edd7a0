# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and plots of README.md and docs/ from stored results and the support table.

Input: `benchmarks/results/h200/*.json` (`SUITES`) and `transformer_engine_batched.support`. Output:
the text between `<!-- generated: NAME -->` and `<!-- end -->` in the Markdown files, and
`docs/img/*.png`.

    python tools/render_docs.py            # rewrite
    python tools/render_docs.py --check    # change nothing; exit 1 and say what differs

Needs no GPU. Matplotlib is imported only to draw.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (
    attention_error,
    blockwise_suite,
    einsum_suite,
    goals,
    module_suite,
    training,
    triangle_suite,
)
from benchmarks.peers import BASELINE, VARIANTS

_BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_LABELS = {variant.name: variant.label for variant in VARIANTS}

Results = dict[str, Any]

# Stored results -> the command that makes them.
SUITES = {
    "gemm": "make gpu-bench",
    "host": "make gpu-bench",
    "module": "make gpu-bench",
    "einsum": "make gpu-bench",
    "triangle": "make gpu-bench",
    "blockwise": "make gpu-bench",
    "training": "python benchmarks/training.py",
    "attention_error": "python benchmarks/attention_error.py",
    "quantize_kernels": "python benchmarks/quantize_kernels.py",
    "block_quantize_kernels": "python benchmarks/block_quantize_kernels.py --compare-only",
    "algorithms": "python benchmarks/algorithms.py",
}


class Point:
    """The rows of one point by variant, and its sizes."""

    def __init__(self, rows: dict[str, dict[str, Any]]) -> None:
        self.rows = rows
        sizes = next(iter(rows.values()))
        self.batch, self.m, self.n, self.k = (sizes[x] for x in ("batch", "m", "n", "k"))


def read_results(folder: Path) -> dict[str, Results | None]:
    """Results by suite, None for one without results."""
    found: dict[str, Results | None] = {}
    for suite in SUITES:
        path = folder / f"{suite}.json"
        found[suite] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def format_caption(meta: dict[str, Any]) -> str:
    """The line under a table or plot: GPU, versions, commit, date and command."""
    commit = (meta["commit"] or "unknown")[:12] + (" with local changes" if meta["dirty"] else "")
    parts = [
        meta["gpu"],
        f"driver {meta['driver']}",
        f"torch {meta['torch']}",
        f"Transformer Engine {meta['te']}",
        f"cuBLASLt {meta['cublaslt']}",
        *([f"cuEquivariance {meta['cuequivariance']}"] if meta.get("cuequivariance") else ()),
        f"Python {meta['python']}",
        f"commit {commit}",
        meta["date"],
        f"`{meta['command']}`",
    ]
    unfinished = "" if meta.get("complete", True) else " The run was stopped before its end."
    return f"<sub>{', '.join(str(part) for part in parts)}.{unfinished}</sub>"


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(lines)


def _missing(suite: str) -> str:
    return (
        f"_Not measured yet: `{SUITES[suite]}` on the GPU writes "
        f"`benchmarks/results/h200/{suite}.json`._"
    )


def _format(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _format_rate(tflops: float | None) -> str:
    return _format(tflops, 0 if tflops is None or tflops >= 10 else 1)


def _format_ratio(ratio: float | None) -> str:
    return _format(ratio, 2 if ratio is None or ratio >= 0.1 else 3)


def _points(gemm: Results, kinds: tuple[str, ...]) -> list[Point]:
    """The points of the given kinds in the order of N."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in gemm["rows"]:
        if row["kind"] in kinds:
            rows.setdefault(row["point"], {})[row["variant"]] = row
    return sorted((Point(x) for x in rows.values()), key=lambda point: point.n)


def _names(points: list[Point]) -> list[str]:
    return [v.name for v in VARIANTS if any(v.name in point.rows for point in points)]


def _footnotes(points: list[Point]) -> str:
    """Why a cell is empty; one line for each reason of each variant."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for point in points:
        for name, row in point.rows.items():
            if row["median_ms"] is None:
                size = f"N={row['n']}, B={row['batch']}"
                reasons.setdefault((name, row["reason"] or "unknown"), []).append(size)
    lines = [
        f"- no time for {_LABELS[name]} at {'; '.join(sizes)}: {reason}"
        for (name, reason), sizes in reasons.items()
    ]
    return "\n\n" + "\n".join(lines) if lines else ""


def _grid(
    gemm: Results,
    kinds: tuple[str, ...],
    cell: Callable[[dict[str, Any]], str],
    names: list[str] | None = None,
    notes: bool = False,
) -> str:
    """A table of points (rows) by variants (columns), its footnotes and its caption."""
    points = _points(gemm, kinds)
    names = [n for n in _names(points) if names is None or n in names]
    is_square = kinds == ("square",)
    body = []
    for point in points:
        size = str(point.n) if is_square else f"{point.m} x {point.n} x {point.k}"
        cells = [cell(point.rows[n]) if n in point.rows else "-" for n in names]
        body.append([size, str(point.batch), *cells])
    head = ["N" if is_square else "M x N x K", "B", *(_LABELS[n] for n in names)]
    below = _footnotes(points) if notes else ""
    return f"{_table(head, body)}{below}\n\n{format_caption(gemm['meta'])}"


_HEADLINE = ["torch_bmm", "ours_split", "ours_fast", "ours_fast_tuned", "te_loop"]


def _rate_and_ratio(row: dict[str, Any]) -> str:
    if row["tflops"] is None:
        return "-"
    ratio = "" if row["variant"] == BASELINE.name else f" ({_format_ratio(row['ratio_to_bf16'])}x)"
    return _format_rate(row["tflops"]) + ratio


def _noise(row: dict[str, Any]) -> str:
    first, again = row["median_ms"], row["repeat_ms"]
    return "-" if not first or not again else f"{abs(again / first - 1) * 100:.1f} %"


def _host(host: Results) -> str:
    body = [
        [
            row["label"],
            _format(row["median_us"], 1),
            "-" if row["quartiles_us"] is None else "{:.1f} to {:.1f}".format(*row["quartiles_us"]),
            (row["reason"] or "").replace("|", "\\|"),
        ]
        for row in host["rows"]
    ]
    table = _table(["call", "median, us", "quartiles, us", "note"], body)
    return f"{table}\n\n{format_caption(host['meta'])}"


def _goals(results: dict[str, Results | None], chosen: tuple[goals.Goal, ...]) -> str:
    body = []
    for outcome in goals.evaluate(results, chosen):
        goal = outcome.goal
        units = {"median_us": "us", "peak_mib": "MiB", "gbps": "GB/s", "tflops": "TFLOP/s"}
        unit = f" {units[goal.field]}" if goal.field in units else "x"
        sign = "at least" if goal.is_minimum else "at most"
        verdict = {None: "not measured", True: "reached", False: "missed"}[outcome.is_reached]
        measured = _format(outcome.measured, 2, unit)
        body.append([goal.text, f"{sign} {goal.bound:g}{unit}", measured, verdict])
    return _table(["goal", "bound", "measured", ""], body)


def _pictures(results: Results, plots: dict[str, Plot], folder: str) -> str:
    pictures = "\n\n".join(f"![{plot[0]}]({folder}/{name})" for name, plot in plots.items())
    return f"{pictures}\n\n{format_caption(results['meta'])}"


_MODULE_LABELS = {variant.name: variant.label for variant in module_suite.VARIANTS}


def _module(module: Results, pass_name: str) -> str:
    """Milliseconds of a pass and, in brackets, times torch.bmm BF16; sizes by variants."""
    points: dict[str, dict[str, dict[str, Any]]] = {}
    for row in module["rows"]:
        if row.get("pass") == pass_name:
            points.setdefault(row["point"], {})[row["variant"]] = row
    notes, body = [], []
    for rows in points.values():
        sizes = next(iter(rows.values()))
        cells = []
        for name, label in _MODULE_LABELS.items():
            row = rows.get(name)
            if row is None or row["median_ms"] is None:
                cells.append("-")
                if row is not None:
                    notes.append(f"- no time for {label} at N={row['size']}: {row['reason']}")
                continue
            is_baseline = name == module_suite.BASELINE.name
            ratio = "" if is_baseline else f" ({_format_ratio(row['ratio_to_bf16'])}x)"
            cells.append(_format(row["median_ms"], 3) + ratio)
        body.append([str(sizes["size"]), str(sizes["batch"]), *cells])
    table = _table(["N", "B", *_MODULE_LABELS.values()], body)
    below = "\n\n" + "\n".join(notes) if notes else ""
    return f"{table}{below}\n\n{format_caption(module['meta'])}"


def _module_checks(module: Results) -> str:
    """Accuracy and saved bytes of the timed steps."""
    body = []
    for row in module["rows"]:
        if row.get("pass") != module_suite.FORWARD_BACKWARD:
            continue
        decibels = [_format(db, 1) for db in row["sqnr_db"] or (None,) * 3]
        saved = row["saved_bytes"]
        mebibytes = _format(None if saved is None else saved / 2**20, 0)
        label = _MODULE_LABELS[row["variant"]]
        ratio = _format(row["saved_ratio"], 2)
        body.append([str(row["size"]), str(row["batch"]), label, *decibels, mebibytes, ratio])
    heads = [
        "product, dB",
        "gradient of a, dB",
        "gradient of b, dB",
        "saved, MiB",
        "of torch.bmm's",
    ]
    return f"{_table(['N', 'B', 'variant', *heads], body)}\n\n{format_caption(module['meta'])}"


def _module_verdict(module: Results) -> str:
    """Where a step is faster in BF16, in words, from the rows."""
    slower = [
        f"N={row['size']} with {_MODULE_LABELS[row['variant']]} ({_format_ratio(row['ratio_to_bf16'])}x)"
        for row in module["rows"]
        if row.get("pass") == module_suite.FORWARD_BACKWARD
        and row["variant"] != module_suite.BASELINE.name
        and row["ratio_to_bf16"] is not None
        and row["ratio_to_bf16"] < 1
    ]
    if not slower:
        return "At none of these sizes is a step in BF16 faster."
    return "A step in BF16 is faster at " + ", ".join(slower) + "."


def _module_host(module: Results) -> str:
    return _host({**module, "rows": [row for row in module["rows"] if "case" in row]})


def _einsum(einsum: Results, pass_name: str) -> str:
    """Milliseconds of a pass and, in brackets, times torch.einsum BF16; sizes by variants."""
    points: dict[str, dict[str, dict[str, Any]]] = {}
    for row in einsum["rows"]:
        if row["pass"] == pass_name:
            points.setdefault(row["point"], {})[row["variant"]] = row
    notes, body = [], []
    for rows in points.values():
        first = next(iter(rows.values()))
        cells = []
        for name, label in einsum_suite.LABELS.items():
            row = rows.get(name)
            if row is None or row["median_ms"] is None:
                cells.append("-")
                if row is not None:
                    notes.append(f"- no time for {label} at N={first['size']}: {row['reason']}")
                continue
            is_baseline = name == einsum_suite.BASELINE.name
            ratio = "" if is_baseline else f" ({_format_ratio(row['ratio_to_einsum'])}x)"
            cells.append(_format(row["median_ms"], 3) + ratio)
        body.append([str(first["size"]), first["mode"], *cells])
    table = _table(["N", "direction", *einsum_suite.LABELS.values()], body)
    below = "\n\n" + "\n".join(notes) if notes else ""
    return f"{table}{below}\n\n{format_caption(einsum['meta'])}"


def _einsum_checks(einsum: Results) -> str:
    """Worst slices in dB (result, gradients) and peak memory of a training step."""
    body = [
        [
            str(row["size"]),
            row["mode"],
            einsum_suite.LABELS[row["variant"]],
            ", ".join(_format(db, 1) for db in row["sqnr_db"] or ()),
            _format(row["peak_mib"], 0),
        ]
        for row in einsum["rows"]
        if row["pass"] == einsum_suite.FORWARD_BACKWARD and row["size"] >= 512
    ]
    head = ["N", "direction", "variant", "worst slice, dB: y, grad a, grad b", "peak, MiB"]
    return f"{_table(head, body)}\n\n{format_caption(einsum['meta'])}"


def _einsum_kernels(einsum: Results) -> str:
    """Bandwidth of the kernels; sizes in columns."""
    rows = [row for row in einsum["rows"] if row["pass"] == einsum_suite.KERNEL]
    sizes = sorted({row["size"] for row in rows})
    found = {(row["variant"], row["size"]): row["gbps"] for row in rows}
    body = [
        [label, str(moved), *(_format(found.get((name, size)), 0) for size in sizes)]
        for name, (label, moved) in einsum_suite.KERNELS.items()
    ]
    head = ["kernel", "bytes an element", *(f"N={size}, GB/s" for size in sizes)]
    return f"{_table(head, body)}\n\n{format_caption(einsum['meta'])}"


def _blockwise(blockwise: Results) -> str:
    """TFLOP/s on the rows that count; points by variants."""
    points: dict[str, dict[str, dict[str, Any]]] = {}
    for row in blockwise["rows"]:
        points.setdefault(row["point"], {})[row["variant"]] = row
    below, body = [], []
    for rows in points.values():
        first = next(iter(rows.values()))
        cells = [
            _format_rate(rows[name]["tflops"]) if name in rows else "-"
            for name in blockwise_suite.LABELS
        ]
        sizes = " x ".join(str(first[size]) for size in "mnk")
        scales = f"1x128 x {first['b_rows']}x128"
        ours = rows[blockwise_suite.OURS]
        body.append(
            [
                *(str(first["batch"]), sizes, scales, blockwise_suite.MASK_LABELS[first["mask"]]),
                *(*cells, _format(ours["sqnr_db"], 1), _format_ratio(ours["ratio_to_all_rows"])),
            ]
        )
        below += [
            f"- no time for {blockwise_suite.LABELS[name]} at {row['point']}: {row['reason']}"
            for name, row in rows.items()
            if row["median_ms"] is None
        ]
    head = ["items", "M x N x K", "scales", "rows", *blockwise_suite.LABELS.values()]
    table = _table([*head, "ours, dB", "ours, time per row over all rows"], body)
    footnotes = "\n\n" + "\n".join(below) if below else ""
    return f"{table}{footnotes}\n\n{format_caption(blockwise['meta'])}"


def _triangle(
    triangle: Results, pass_name: str, cell: Callable[[dict[str, Any]], str], notes: bool = False
) -> str:
    """A table of points (rows) by variants (columns)."""
    points: dict[str, dict[str, dict[str, Any]]] = {}
    for row in triangle["rows"]:
        if row["pass"] == pass_name:
            points.setdefault(row["point"], {})[row["variant"]] = row
    below, body = [], []
    for rows in points.values():
        first = next(iter(rows.values()))
        cells = [cell(rows[name]) if name in rows else "-" for name in triangle_suite.LABELS]
        body.append([str(first["size"]), first["mode"], *cells])
        below += [
            f"- no time for {triangle_suite.LABELS[name]} at N={row['size']}, {row['mode']}: {row['reason']}"
            for name, row in rows.items()
            if notes and row["median_ms"] is None
        ]
    table = _table(["N", "direction", *triangle_suite.LABELS.values()], body)
    footnotes = "\n\n" + "\n".join(below) if below else ""
    return f"{table}{footnotes}\n\n{format_caption(triangle['meta'])}"


def _triangle_time(row: dict[str, Any]) -> str:
    ratio = row["ratio_to_cuequivariance"]
    is_peer = row["variant"] == triangle_suite.PEER.name
    shown = "" if is_peer or ratio is None else f" ({_format_ratio(ratio)}x)"
    return "-" if row["median_ms"] is None else _format(row["median_ms"], 3) + shown


def _triangle_checks(row: dict[str, Any]) -> str:
    decibels = row["sqnr_db"] or {}
    names = ("contraction", "slice", "out", "grad")
    return ", ".join(_format(decibels.get(name), 1) for name in names)


def _training(results: Results) -> str:
    body = []
    for name, found in training.summarize(results["rows"]).items():
        verdict = {None: "", True: "within 2 %", False: "missed"}[found["is_reached"]]
        deviation = found["deviation"]
        body.append(
            [
                training.LABELS[name],
                f"{found['final_loss']:.4f}",
                f"{found['lowest']:.4f} to {found['highest']:.4f}",
                "-" if deviation is None else f"{100 * deviation:+.2f} %",
                verdict,
                f"{found['seconds']:.0f}",
            ]
        )
    heads = ["recipe", "final loss", "seeds", "against BF16", "", "seconds, all seeds"]
    return f"{_table(heads, body)}\n\n{format_caption(results['meta'])}"


def _attention(results: Results) -> str:
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        rows.setdefault(row["label"], {})[row["tensor"]] = row
    body = [
        [label, *(f"{found[t]['worst_db']:.1f} ({found[t]['median_db']:.1f})" for t in found)]
        for label, found in rows.items()
    ]
    titles = ["scores", "output", "gradient of q", "gradient of k", "gradient of v"]
    return f"{_table(['recipe', *titles], body)}\n\n{format_caption(results['meta'])}"


def _quantize_kernels(results: Results) -> str:
    """GB/s of the kernels in use and of TE's, E4M3, by shape."""
    return _bandwidths(
        results, [r for r in results["rows"] if r["fp8"] == "e4m3" and "rows" not in r]
    )


def _block_casts(results: Results) -> str:
    """GB/s of the casts with 128-blocks and of TE's, by shape; rows of a sweep name their tile in brackets."""
    return _bandwidths(results, [r for r in results["rows"] if r["gbps"] and "(" not in r["what"]])


def _bandwidths(results: Results, rows: list[dict[str, Any]]) -> str:
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in rows))
    found = {(r["what"], tuple(r["shape"])): r["gbps"] for r in rows}
    body = [
        [
            what,
            *(f"{found[what, shape]:.0f}" if (what, shape) in found else "-" for shape in shapes),
        ]
        for what in dict.fromkeys(r["what"] for r in rows)
    ]
    titles = ["GB/s", *("[" + ", ".join(map(str, shape)) + "]" for shape in shapes)]
    return f"{_table(titles, body)}\n\n{format_caption(results['meta'])}"


def _algorithms(results: Results) -> str:
    """Time of the algorithm that is taken and of the heuristic's first, over the fastest's."""
    rows = {}
    for row in results["rows"]:
        name = f"{row['m']} x {row['n']} x {row['k']} | {row['batch']}"
        rows.setdefault(name, {})[row["accumulation"]] = row
    body = []
    for name, found in rows.items():
        cells = []
        for row in (found["fast"], found["split"]):
            ratios = (row[field] / row["fastest_us"] for field in ("taken_us", "heuristic_us"))
            cells += [f"{row['fastest_us']:.1f}", *(f"{ratio:.2f}" for ratio in ratios)]
        body.append([name, *cells])
    columns = ("{}: fastest, us", "{}: ours / fastest", "{}: heuristic's / fastest")
    titles = [column.format(name) for name in ("fast", "split") for column in columns]
    return f"{_table(['M x N x K', 'B', *titles], body)}\n\n{format_caption(results['meta'])}"


def _support(results: dict[str, Results | None]) -> str:
    from transformer_engine_batched import support

    return support.format_table()


def _from(
    suite: str, render: Callable[[Results], str]
) -> Callable[[dict[str, Results | None]], str]:
    return lambda results: render(results[suite]) if results[suite] else _missing(suite)


def _from_gemm(render: Callable[[Results], str]) -> Callable[[dict[str, Results | None]], str]:
    return _from("gemm", render)


SQUARE, OTHER = ("square",), ("ragged", "rectangular")
BLOCKS: dict[str, Callable[[dict[str, Results | None]], str]] = {
    "support": _support,
    "goals": lambda results: _goals(results, goals.GOALS),
    "gemm-headline": _from_gemm(lambda gemm: _grid(gemm, SQUARE, _rate_and_ratio, _HEADLINE)),
    "gemm-tflops": _from_gemm(
        lambda gemm: _grid(gemm, SQUARE, lambda row: _format_rate(row["tflops"]), notes=True)
    ),
    "gemm-ms": _from_gemm(
        lambda gemm: _grid(gemm, SQUARE, lambda row: _format(row["median_ms"], 3))
    ),
    "gemm-over-bf16": _from_gemm(
        lambda gemm: _grid(gemm, SQUARE, lambda row: _format_ratio(row["ratio_to_bf16"]))
    ),
    "gemm-over-te-loop": _from_gemm(
        lambda gemm: _grid(gemm, SQUARE, lambda row: _format_ratio(row["ratio_to_te_loop"]))
    ),
    "gemm-accuracy": _from_gemm(
        lambda gemm: _grid(gemm, (*SQUARE, *OTHER), lambda row: _format(row["sqnr_db"], 1))
    ),
    "gemm-noise": _from_gemm(lambda gemm: _grid(gemm, SQUARE, _noise, [BASELINE.name])),
    "gemm-other-shapes": _from_gemm(lambda gemm: _grid(gemm, OTHER, _rate_and_ratio, notes=True)),
    "gemm-plots": _from_gemm(lambda gemm: _pictures(gemm, PLOTS, "img")),
    "gemm-plot-readme": _from_gemm(
        lambda gemm: _pictures(gemm, {"gemm_speedup.png": PLOTS["gemm_speedup.png"]}, "docs/img")
    ),
    "host": _from("host", _host),
    "module-goals": lambda results: (
        _goals(results, goals.MODULE_GOALS) if results["module"] else _missing("module")
    ),
    "module-verdict": _from("module", _module_verdict),
    "module-step": _from("module", lambda x: _module(x, module_suite.FORWARD_BACKWARD)),
    "module-forward": _from("module", lambda x: _module(x, module_suite.FORWARD)),
    "module-checks": _from("module", _module_checks),
    "module-host": _from("module", _module_host),
    "einsum-goals": lambda results: (
        _goals(results, goals.EINSUM_GOALS) if results["einsum"] else _missing("einsum")
    ),
    "einsum-forward": _from("einsum", lambda x: _einsum(x, einsum_suite.FORWARD)),
    "einsum-step": _from("einsum", lambda x: _einsum(x, einsum_suite.FORWARD_BACKWARD)),
    "einsum-kernels": _from("einsum", _einsum_kernels),
    "einsum-checks": _from("einsum", _einsum_checks),
    "blockwise-goals": lambda results: (
        _goals(results, goals.BLOCKWISE_GOALS) if results["blockwise"] else _missing("blockwise")
    ),
    "blockwise": _from("blockwise", _blockwise),
    "block-casts": _from("block_quantize_kernels", _block_casts),
    "triangle-goals": lambda results: (
        _goals(results, goals.TRIANGLE_GOALS) if results["triangle"] else _missing("triangle")
    ),
    "triangle-forward": _from(
        "triangle", lambda x: _triangle(x, triangle_suite.FORWARD, _triangle_time, notes=True)
    ),
    "triangle-step": _from(
        "triangle",
        lambda x: _triangle(x, triangle_suite.FORWARD_BACKWARD, _triangle_time, notes=True),
    ),
    "triangle-memory": _from(
        "triangle",
        lambda x: _triangle(
            x, triangle_suite.FORWARD_BACKWARD, lambda row: _format(row["peak_mib"], 0)
        ),
    ),
    "triangle-checks": _from(
        "triangle", lambda x: _triangle(x, triangle_suite.FORWARD_BACKWARD, _triangle_checks)
    ),
    "training": _from("training", _training),
    "training-plot": _from("training", lambda x: _pictures(x, TRAINING_PLOTS, "img")),
    "quantize-kernels": _from("quantize_kernels", _quantize_kernels),
    "algorithms": _from("algorithms", _algorithms),
    "attention-error": _from("attention_error", _attention),
}


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


def _draw(gemm: Results, field: str, ylabel: str, title: str) -> Any:
    """A figure of `field` over N, one line per variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    points = _points(gemm, SQUARE)
    figure, axes = pyplot.subplots(figsize=(8.0, 4.6), layout="constrained")
    for name in _names(points):
        rows = [p.rows[name] for p in points if name in p.rows]
        sizes = [row["n"] for row in rows if row[field] is not None]
        values = [row[field] for row in rows if row[field] is not None]
        if not values:
            continue
        color, marker, line = _STYLES[name]
        label = _LABELS[name].replace("`", "")
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


_TRAINING_STYLES = {
    "bf16": ("#555555", "-"),
    "delayed": ("#0072B2", "-"),
    "current": ("#D55E00", "--"),
    "mxfp8": ("#009E73", ":"),
    "bf16_without_triangles": ("#BBBBBB", "-"),
}
# A single step's loss depends on its graphs; a curve is the mean over this many steps and over the seeds.
_SMOOTHING_STEPS = 10


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


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_plots(results_folder: Path, image_folder: Path) -> None:
    """Draw every plot. Each carries the digest of its results, for `find_stale_plots`."""
    results = read_results(results_folder)
    for suite, plots in _PLOTS_OF_SUITE.items():
        stored = results[suite]
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


def render_text(text: str, results: dict[str, Results | None], where: str) -> str:
    """`text` with every generated block written anew.

    Raises
    ------
    ValueError
        For a block that no renderer knows, or a marker without its end.
    """
    if text.count("<!-- generated:") != len(_BLOCK.findall(text)):
        raise ValueError(f"{where}: a `<!-- generated: NAME -->` has no `<!-- end -->` after it")

    def replace(match: re.Match[str]) -> str:
        opening, name, _, closing = match.groups()
        if name not in BLOCKS:
            known = ", ".join(sorted(BLOCKS))
            raise ValueError(f"{where}: unknown generated block {name!r}; known: {known}")
        return f"{opening}\n{BLOCKS[name](results).strip()}\n\n{closing}"

    return _BLOCK.sub(replace, text)


def _find_differences(old: str, new: str) -> list[str]:
    pairs = zip(_BLOCK.findall(old), _BLOCK.findall(new))
    return [before[1] for before, after in pairs if before != after]


def find_documents(root: Path) -> list[Path]:
    """README.md and every Markdown file of docs/."""
    return [p for p in [root / "README.md", *sorted((root / "docs").rglob("*.md"))] if p.exists()]


def render(root: Path, is_check: bool) -> list[str]:
    """Write the documents and plots of `root`, or, with `is_check`, say what differs."""
    results_folder, image_folder = root / "benchmarks/results/h200", root / "docs/img"
    results = read_results(results_folder)
    problems = []
    for path in find_documents(root):
        old = path.read_text(encoding="utf-8")
        new = render_text(old, results, path.name)
        if is_check:
            name = path.relative_to(root).as_posix()
            problems += [f"{name}: block {b!r} differs" for b in _find_differences(old, new)]
        elif new != old:
            path.write_text(new, encoding="utf-8")
    if is_check:
        return problems + find_stale_plots(results_folder, image_folder)
    write_plots(results_folder, image_folder)
    return []


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the generated parts of the docs.")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    problems = render(ROOT, parser.parse_args().check)
    for problem in problems:
        print(problem)
    if problems:
        print("Run `python tools/render_docs.py` to write them anew.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
