# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and plots of README.md and docs/ from stored results and the support table.

Input: `benchmarks/results/h200/{gemm,host}.json` and `transformer_engine_batched.support`. Output:
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
import sys
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import goals
from benchmarks.peers import BASELINE, VARIANTS

_BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_LABELS = {variant.name: variant.label for variant in VARIANTS}

Results = dict[str, Any]


class Point:
    """The rows of one point by variant, and its sizes."""

    def __init__(self, rows: dict[str, dict[str, Any]]) -> None:
        self.rows = rows
        sizes = next(iter(rows.values()))
        self.batch, self.m, self.n, self.k = (sizes[x] for x in ("batch", "m", "n", "k"))


def read_results(folder: Path) -> dict[str, Results | None]:
    """`{"gemm": ..., "host": ...}`, None for a suite without results."""
    found: dict[str, Results | None] = {}
    for suite in ("gemm", "host"):
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
        f"Python {meta['python']}",
        f"commit {commit}",
        meta["date"],
        f"`{meta['command']}`",
    ]
    unfinished = "" if meta["complete"] else " The run was stopped before its end."
    return f"<sub>{', '.join(str(part) for part in parts)}.{unfinished}</sub>"


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(lines)


def _missing(suite: str) -> str:
    return (
        f"_Not measured yet: `make gpu-bench` on the GPU writes "
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


def _goals(results: dict[str, Results | None]) -> str:
    body = []
    for outcome in goals.evaluate(results):
        goal = outcome.goal
        unit = "x" if goal.suite == "gemm" else " us"
        sign = "at least" if goal.is_minimum else "at most"
        verdict = {None: "not measured", True: "reached", False: "missed"}[outcome.is_reached]
        measured = _format(outcome.measured, 2, unit)
        body.append([goal.text, f"{sign} {goal.bound:g}{unit}", measured, verdict])
    return _table(["goal", "bound", "measured", ""], body)


def _pictures(gemm: Results, names: tuple[str, ...], folder: str) -> str:
    pictures = "\n\n".join(f"![{PLOTS[name][0]}]({folder}/{name})" for name in names)
    return f"{pictures}\n\n{format_caption(gemm['meta'])}"


def _support(results: dict[str, Results | None]) -> str:
    from transformer_engine_batched import support

    return support.format_table()


def _from_gemm(render: Callable[[Results], str]) -> Callable[[dict[str, Results | None]], str]:
    return lambda results: render(results["gemm"]) if results["gemm"] else _missing("gemm")


SQUARE, OTHER = ("square",), ("ragged", "rectangular")
BLOCKS: dict[str, Callable[[dict[str, Results | None]], str]] = {
    "support": _support,
    "goals": _goals,
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
    "gemm-plots": _from_gemm(lambda gemm: _pictures(gemm, tuple(PLOTS), "img")),
    "gemm-plot-readme": _from_gemm(lambda gemm: _pictures(gemm, ("gemm_speedup.png",), "docs/img")),
    "host": lambda results: _host(results["host"]) if results["host"] else _missing("host"),
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


# File name -> (words for readers who do not see it, how it is drawn).
PLOTS: dict[str, tuple[str, Callable[[Results], Any]]] = {
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


def _digest(results: Path) -> str:
    return hashlib.sha256((results / "gemm.json").read_bytes()).hexdigest()


def write_plots(results_folder: Path, image_folder: Path) -> None:
    """Draw every plot. Each carries the digest of its results, for `find_stale_plots`."""
    gemm = read_results(results_folder)["gemm"]
    if gemm is None:
        return
    image_folder.mkdir(parents=True, exist_ok=True)
    for name, (_, draw) in PLOTS.items():
        draw(gemm).savefig(
            image_folder / name, dpi=150, metadata={"Source": _digest(results_folder)}
        )


def find_stale_plots(results_folder: Path, image_folder: Path) -> list[str]:
    """Plots that are missing or were drawn from other results. Pixels are not compared."""
    if not (results_folder / "gemm.json").exists():
        return []
    problems = []
    for name in PLOTS:
        path = image_folder / name
        if not path.exists():
            problems.append(f"docs/img/{name}: missing, but there are results to draw")
        elif _digest(results_folder).encode() not in path.read_bytes():
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
