# SPDX-License-Identifier: Apache-2.0
"""Stored results as Markdown tables, each with its caption.

Input: the results of a suite as `stored_results` reads them. Output: text. Must not draw or write files.
"""

from __future__ import annotations

from typing import Any, Callable

from benchmarks import blockwise_suite, einsum_suite, goals, module_suite, training, triangle_suite
from benchmarks.peers import BASELINE, VARIANTS

Results = dict[str, Any]

LABELS = {variant.name: variant.label for variant in VARIANTS}
_MODULE_LABELS = {variant.name: variant.label for variant in module_suite.VARIANTS}
# Kinds of points of the gemm suite, and the variants of its first table.
SQUARE, OTHER = ("square",), ("ragged", "rectangular")
HEADLINE = ["torch_bmm", "ours_split", "ours_fast", "ours_fast_tuned", "te_loop"]


class Point:
    """The rows of one point by variant, and its sizes."""

    def __init__(self, rows: dict[str, dict[str, Any]]) -> None:
        self.rows = rows
        sizes = next(iter(rows.values()))
        self.batch, self.m, self.n, self.k = (sizes[x] for x in ("batch", "m", "n", "k"))


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


def _format_table(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(lines)


def format_number(value: float | None, digits: int, unit: str = "") -> str:
    """A number, or - where there is none."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def format_rate(tflops: float | None) -> str:
    """TFLOP/s: a decimal below 10."""
    return format_number(tflops, 0 if tflops is None or tflops >= 10 else 1)


def format_ratio(ratio: float | None) -> str:
    """A ratio: a third decimal below 0.1."""
    return format_number(ratio, 2 if ratio is None or ratio >= 0.1 else 3)


def collect_points(gemm: Results, kinds: tuple[str, ...]) -> list[Point]:
    """The points of the given kinds in the order of N."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in gemm["rows"]:
        if row["kind"] in kinds:
            rows.setdefault(row["point"], {})[row["variant"]] = row
    return sorted((Point(x) for x in rows.values()), key=lambda point: point.n)


def list_variants(points: list[Point]) -> list[str]:
    """Names of the variants that some point has, in the order of `peers`."""
    return [v.name for v in VARIANTS if any(v.name in point.rows for point in points)]


def format_gemm(
    gemm: Results,
    kinds: tuple[str, ...],
    cell: Callable[[dict[str, Any]], str],
    names: list[str] | None = None,
    notes: bool = False,
) -> str:
    """A table of points (rows) by variants (columns), its footnotes and its caption."""
    points = collect_points(gemm, kinds)
    names = [n for n in list_variants(points) if names is None or n in names]
    is_square = kinds == SQUARE
    body = []
    for point in points:
        size = str(point.n) if is_square else f"{point.m} x {point.n} x {point.k}"
        cells = [cell(point.rows[n]) if n in point.rows else "-" for n in names]
        body.append([size, str(point.batch), *cells])
    head = ["N" if is_square else "M x N x K", "B", *(LABELS[n] for n in names)]
    below = _format_footnotes(points) if notes else ""
    return f"{_format_table(head, body)}{below}\n\n{format_caption(gemm['meta'])}"


def _format_footnotes(points: list[Point]) -> str:
    """Why a cell is empty; one line for each reason of each variant."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for point in points:
        for name, row in point.rows.items():
            if row["median_ms"] is None:
                size = f"N={row['n']}, B={row['batch']}"
                reasons.setdefault((name, row["reason"] or "unknown"), []).append(size)
    lines = [
        f"- no time for {LABELS[name]} at {'; '.join(sizes)}: {reason}"
        for (name, reason), sizes in reasons.items()
    ]
    return "\n\n" + "\n".join(lines) if lines else ""


def format_rate_and_ratio(row: dict[str, Any]) -> str:
    """TFLOP/s and, in brackets, times BF16."""
    if row["tflops"] is None:
        return "-"
    ratio = "" if row["variant"] == BASELINE.name else f" ({format_ratio(row['ratio_to_bf16'])}x)"
    return format_rate(row["tflops"]) + ratio


def format_noise(row: dict[str, Any]) -> str:
    """How far a second measurement was from the first."""
    first, again = row["median_ms"], row["repeat_ms"]
    return "-" if not first or not again else f"{abs(again / first - 1) * 100:.1f} %"


def format_host(host: Results) -> str:
    """Host time of calls."""
    body = [
        [
            row["label"],
            format_number(row["median_us"], 1),
            "-" if row["quartiles_us"] is None else "{:.1f} to {:.1f}".format(*row["quartiles_us"]),
            (row["reason"] or "").replace("|", "\\|"),
        ]
        for row in host["rows"]
    ]
    table = _format_table(["call", "median, us", "quartiles, us", "note"], body)
    return f"{table}\n\n{format_caption(host['meta'])}"


def format_goals(results: dict[str, Results | None], chosen: tuple[goals.Goal, ...]) -> str:
    """Goals, what was measured, and whether they are reached."""
    body = []
    for outcome in goals.evaluate(results, chosen):
        goal = outcome.goal
        units = {"median_us": "us", "peak_mib": "MiB", "gbps": "GB/s", "tflops": "TFLOP/s"}
        unit = f" {units[goal.field]}" if goal.field in units else "x"
        sign = "at least" if goal.is_minimum else "at most"
        verdict = {None: "not measured", True: "reached", False: "missed"}[outcome.is_reached]
        measured = format_number(outcome.measured, 2, unit)
        body.append([goal.text, f"{sign} {goal.bound:g}{unit}", measured, verdict])
    return _format_table(["goal", "bound", "measured", ""], body)


def format_module(module: Results, pass_name: str) -> str:
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
            ratio = "" if is_baseline else f" ({format_ratio(row['ratio_to_bf16'])}x)"
            cells.append(format_number(row["median_ms"], 3) + ratio)
        body.append([str(sizes["size"]), str(sizes["batch"]), *cells])
    table = _format_table(["N", "B", *_MODULE_LABELS.values()], body)
    below = "\n\n" + "\n".join(notes) if notes else ""
    return f"{table}{below}\n\n{format_caption(module['meta'])}"


def format_module_checks(module: Results) -> str:
    """Accuracy and saved bytes of the timed steps."""
    body = []
    for row in module["rows"]:
        if row.get("pass") != module_suite.FORWARD_BACKWARD:
            continue
        decibels = [format_number(db, 1) for db in row["sqnr_db"] or (None,) * 3]
        saved = row["saved_bytes"]
        mebibytes = format_number(None if saved is None else saved / 2**20, 0)
        label = _MODULE_LABELS[row["variant"]]
        ratio = format_number(row["saved_ratio"], 2)
        body.append([str(row["size"]), str(row["batch"]), label, *decibels, mebibytes, ratio])
    heads = [
        "product, dB",
        "gradient of a, dB",
        "gradient of b, dB",
        "saved, MiB",
        "of torch.bmm's",
    ]
    return (
        f"{_format_table(['N', 'B', 'variant', *heads], body)}\n\n{format_caption(module['meta'])}"
    )


def format_module_verdict(module: Results) -> str:
    """Where a step is faster in BF16, in words, from the rows."""
    slower = [
        f"N={row['size']} with {_MODULE_LABELS[row['variant']]} ({format_ratio(row['ratio_to_bf16'])}x)"
        for row in module["rows"]
        if row.get("pass") == module_suite.FORWARD_BACKWARD
        and row["variant"] != module_suite.BASELINE.name
        and row["ratio_to_bf16"] is not None
        and row["ratio_to_bf16"] < 1
    ]
    if not slower:
        return "At none of these sizes is a step in BF16 faster."
    return "A step in BF16 is faster at " + ", ".join(slower) + "."


def format_module_host(module: Results) -> str:
    """Host time of the module's calls."""
    return format_host({**module, "rows": [row for row in module["rows"] if "case" in row]})


def format_einsum(einsum: Results, pass_name: str) -> str:
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
            ratio = "" if is_baseline else f" ({format_ratio(row['ratio_to_einsum'])}x)"
            cells.append(format_number(row["median_ms"], 3) + ratio)
        body.append([str(first["size"]), first["mode"], *cells])
    table = _format_table(["N", "direction", *einsum_suite.LABELS.values()], body)
    below = "\n\n" + "\n".join(notes) if notes else ""
    return f"{table}{below}\n\n{format_caption(einsum['meta'])}"


def format_einsum_checks(einsum: Results) -> str:
    """Worst slices in dB (result, gradients) and peak memory of a training step."""
    body = [
        [
            str(row["size"]),
            row["mode"],
            einsum_suite.LABELS[row["variant"]],
            ", ".join(format_number(db, 1) for db in row["sqnr_db"] or ()),
            format_number(row["peak_mib"], 0),
        ]
        for row in einsum["rows"]
        if row["pass"] == einsum_suite.FORWARD_BACKWARD and row["size"] >= 512
    ]
    head = ["N", "direction", "variant", "worst slice, dB: y, grad a, grad b", "peak, MiB"]
    return f"{_format_table(head, body)}\n\n{format_caption(einsum['meta'])}"


def format_einsum_kernels(einsum: Results) -> str:
    """Bandwidth of the kernels; sizes in columns."""
    rows = [row for row in einsum["rows"] if row["pass"] == einsum_suite.KERNEL]
    sizes = sorted({row["size"] for row in rows})
    found = {(row["variant"], row["size"]): row["gbps"] for row in rows}
    body = [
        [label, str(moved), *(format_number(found.get((name, size)), 0) for size in sizes)]
        for name, (label, moved) in einsum_suite.KERNELS.items()
    ]
    head = ["kernel", "bytes an element", *(f"N={size}, GB/s" for size in sizes)]
    return f"{_format_table(head, body)}\n\n{format_caption(einsum['meta'])}"


def format_blockwise(blockwise: Results) -> str:
    """TFLOP/s on the rows that count; points by variants."""
    points: dict[str, dict[str, dict[str, Any]]] = {}
    for row in blockwise["rows"]:
        points.setdefault(row["point"], {})[row["variant"]] = row
    below, body = [], []
    for rows in points.values():
        first = next(iter(rows.values()))
        cells = [
            format_rate(rows[name]["tflops"]) if name in rows else "-"
            for name in blockwise_suite.LABELS
        ]
        sizes = " x ".join(str(first[size]) for size in "mnk")
        scales = f"1x128 x {first['b_rows']}x128"
        ours = rows[blockwise_suite.OURS]
        body.append(
            [
                *(str(first["batch"]), sizes, scales, blockwise_suite.MASK_LABELS[first["mask"]]),
                *(
                    *cells,
                    format_number(ours["sqnr_db"], 1),
                    format_ratio(ours["ratio_to_all_rows"]),
                ),
            ]
        )
        below += [
            f"- no time for {blockwise_suite.LABELS[name]} at {row['point']}: {row['reason']}"
            for name, row in rows.items()
            if row["median_ms"] is None
        ]
    head = ["items", "M x N x K", "scales", "rows", *blockwise_suite.LABELS.values()]
    table = _format_table([*head, "ours, dB", "ours, time per row over all rows"], body)
    footnotes = "\n\n" + "\n".join(below) if below else ""
    return f"{table}{footnotes}\n\n{format_caption(blockwise['meta'])}"


def format_triangle(
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
    table = _format_table(["N", "direction", *triangle_suite.LABELS.values()], body)
    footnotes = "\n\n" + "\n".join(below) if below else ""
    return f"{table}{footnotes}\n\n{format_caption(triangle['meta'])}"


def format_triangle_time(row: dict[str, Any]) -> str:
    """Milliseconds and, in brackets, times cuEquivariance."""
    ratio = row["ratio_to_cuequivariance"]
    is_peer = row["variant"] == triangle_suite.PEER.name
    shown = "" if is_peer or ratio is None else f" ({format_ratio(ratio)}x)"
    return "-" if row["median_ms"] is None else format_number(row["median_ms"], 3) + shown


def format_triangle_headline(triangle: Results) -> str:
    """Both passes of the outgoing update: torch, cuEquivariance, ours with delayed scaling."""
    names = ("eager", triangle_suite.PEER.name, "ours_delayed")
    passes = (triangle_suite.FORWARD, triangle_suite.FORWARD_BACKWARD)
    rows = {
        (row["size"], row["pass"], row["variant"]): row
        for row in triangle["rows"]
        if row["mode"] == "outgoing"
    }
    body = []
    for size in sorted({size for size, _, _ in rows}):
        found = [rows.get((size, name, variant)) for name in passes for variant in names]
        cells = ["-" if row is None else format_triangle_time(row) for row in found]
        body.append([str(size), *cells])
    titles = [
        f"{name.replace('_', ' + ')}: {triangle_suite.LABELS[variant]}"
        for name in passes
        for variant in names
    ]
    return f"{_format_table(['N', *titles], body)}\n\n{format_caption(triangle['meta'])}"


def format_triangle_checks(row: dict[str, Any]) -> str:
    """Worst slices in dB."""
    decibels = row["sqnr_db"] or {}
    names = ("contraction", "slice", "out", "grad")
    return ", ".join(format_number(decibels.get(name), 1) for name in names)


def format_training(results: Results) -> str:
    """Final losses by recipe, against BF16."""
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
    return f"{_format_table(heads, body)}\n\n{format_caption(results['meta'])}"


def format_attention(results: Results) -> str:
    """Errors of attention by recipe: worst (median) in dB."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        rows.setdefault(row["label"], {})[row["tensor"]] = row
    body = [
        [label, *(f"{found[t]['worst_db']:.1f} ({found[t]['median_db']:.1f})" for t in found)]
        for label, found in rows.items()
    ]
    titles = ["scores", "output", "gradient of q", "gradient of k", "gradient of v"]
    return f"{_format_table(['recipe', *titles], body)}\n\n{format_caption(results['meta'])}"


def format_quantize_kernels(results: Results) -> str:
    """GB/s of the kernels in use and of TE's, E4M3, by shape."""
    return _format_bandwidths(
        results, [r for r in results["rows"] if r["fp8"] == "e4m3" and "rows" not in r]
    )


def format_block_casts(results: Results) -> str:
    """GB/s of the casts with 128-blocks and of TE's, by shape; rows of a sweep name their tile in brackets."""
    return _format_bandwidths(
        results, [r for r in results["rows"] if r["gbps"] and "(" not in r["what"]]
    )


def _format_bandwidths(results: Results, rows: list[dict[str, Any]]) -> str:
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
    return f"{_format_table(titles, body)}\n\n{format_caption(results['meta'])}"


def format_triangle_kernels(results: Results, sizes: tuple[int, ...] = (1024, 2048)) -> str:
    """Time of each kernel with its tile, and its share of the roof."""
    rows = {(row["kernel"], row["n"]): row for row in results["rows"] if row["tile"] is None}
    body = []
    for name in dict.fromkeys(name for name, n in rows if n in sizes):
        cells = [name]
        for n in sizes:
            row = rows.get((name, n), {})
            if row.get("ms") is None:
                cells += ["-"] * 4
                continue
            cells += [
                f"{row['ms']:.3f}",
                f"{row['gbps']:.0f}",
                f"{row['tflops']:.0f}",
                f"{row['roof']:.0%}",
            ]
        body.append(cells)
    titles = [
        f"N={n}: {title}" for n in sizes for title in ("ms", "GB/s", "TFLOP/s", "of the roof")
    ]
    note = (
        f"The roof is the larger of bytes over {results['meta']['gbps_copy']:.0f} GB/s, the rate of a copy in the "
        "same run, and operations over 750 TFLOP/s."
    )
    table = _format_table(["kernel", *titles], body)
    return f"{table}\n\n{note}\n\n{format_caption(results['meta'])}"


def format_algorithms(results: Results) -> str:
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
    return (
        f"{_format_table(['M x N x K', 'B', *titles], body)}\n\n{format_caption(results['meta'])}"
    )
