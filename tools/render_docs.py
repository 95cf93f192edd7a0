# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and plots of README.md and docs/ from stored results and the support table.

Input: `benchmarks/results/h200/*.json` (`SUITES`) and `transformer_engine_batched.support`. Output:
the text between `<!-- generated: NAME -->` and `<!-- end -->` in the Markdown files, and
`docs/img/*.png`.

    python tools/render_docs.py            # rewrite
    python tools/render_docs.py --check    # change nothing; exit 1 and say what differs

Needs no GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import einsum_suite, goals, module_suite, stored_results, triangle_suite
from benchmarks import result_plots as plots
from benchmarks import result_tables as tables
from benchmarks.peers import BASELINE
from benchmarks.result_tables import Results

_BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

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
    "triangle_kernels": "python benchmarks/triangle_kernels.py --chosen-only",
}


def _missing(suite: str) -> str:
    return (
        f"_Not measured yet: `{SUITES[suite]}` on the GPU writes "
        f"`benchmarks/results/h200/{suite}.json`._"
    )


def _support(results: dict[str, Results | None]) -> str:
    from transformer_engine_batched import support

    return support.format_table()


def _from(
    suite: str, render: Callable[[Results], str]
) -> Callable[[dict[str, Results | None]], str]:
    return lambda results: render(results[suite]) if results[suite] else _missing(suite)


def _from_gemm(render: Callable[[Results], str]) -> Callable[[dict[str, Results | None]], str]:
    return _from("gemm", render)


BLOCKS: dict[str, Callable[[dict[str, Results | None]], str]] = {
    "support": _support,
    "goals": lambda results: tables.format_goals(results, goals.GOALS),
    "gemm-headline": _from_gemm(
        lambda gemm: tables.format_gemm(
            gemm, tables.SQUARE, tables.format_rate_and_ratio, tables.HEADLINE
        )
    ),
    "gemm-tflops": _from_gemm(
        lambda gemm: tables.format_gemm(
            gemm, tables.SQUARE, lambda row: tables.format_rate(row["tflops"]), notes=True
        )
    ),
    "gemm-ms": _from_gemm(
        lambda gemm: tables.format_gemm(
            gemm, tables.SQUARE, lambda row: tables.format_number(row["median_ms"], 3)
        )
    ),
    "gemm-over-bf16": _from_gemm(
        lambda gemm: tables.format_gemm(
            gemm, tables.SQUARE, lambda row: tables.format_ratio(row["ratio_to_bf16"])
        )
    ),
    "gemm-over-te-loop": _from_gemm(
        lambda gemm: tables.format_gemm(
            gemm, tables.SQUARE, lambda row: tables.format_ratio(row["ratio_to_te_loop"])
        )
    ),
    "gemm-accuracy": _from_gemm(
        lambda gemm: tables.format_gemm(
            gemm,
            (*tables.SQUARE, *tables.OTHER),
            lambda row: tables.format_number(row["sqnr_db"], 1),
        )
    ),
    "gemm-noise": _from_gemm(
        lambda gemm: tables.format_gemm(gemm, tables.SQUARE, tables.format_noise, [BASELINE.name])
    ),
    "gemm-other-shapes": _from_gemm(
        lambda gemm: tables.format_gemm(
            gemm, tables.OTHER, tables.format_rate_and_ratio, notes=True
        )
    ),
    "gemm-plots": _from_gemm(lambda gemm: plots.format_pictures(gemm, plots.PLOTS, "img")),
    "gemm-plot-readme": _from_gemm(
        lambda gemm: plots.format_pictures(
            gemm, {"gemm_speedup.png": plots.PLOTS["gemm_speedup.png"]}, "docs/img"
        )
    ),
    "host": _from("host", tables.format_host),
    "module-goals": lambda results: (
        tables.format_goals(results, goals.MODULE_GOALS)
        if results["module"]
        else _missing("module")
    ),
    "module-verdict": _from("module", tables.format_module_verdict),
    "module-step": _from(
        "module", lambda x: tables.format_module(x, module_suite.FORWARD_BACKWARD)
    ),
    "module-forward": _from("module", lambda x: tables.format_module(x, module_suite.FORWARD)),
    "module-checks": _from("module", tables.format_module_checks),
    "module-host": _from("module", tables.format_module_host),
    "einsum-goals": lambda results: (
        tables.format_goals(results, goals.EINSUM_GOALS)
        if results["einsum"]
        else _missing("einsum")
    ),
    "einsum-forward": _from("einsum", lambda x: tables.format_einsum(x, einsum_suite.FORWARD)),
    "einsum-step": _from(
        "einsum", lambda x: tables.format_einsum(x, einsum_suite.FORWARD_BACKWARD)
    ),
    "einsum-kernels": _from("einsum", tables.format_einsum_kernels),
    "einsum-checks": _from("einsum", tables.format_einsum_checks),
    "blockwise-goals": lambda results: (
        tables.format_goals(results, goals.BLOCKWISE_GOALS)
        if results["blockwise"]
        else _missing("blockwise")
    ),
    "blockwise": _from("blockwise", tables.format_blockwise),
    "block-casts": _from("block_quantize_kernels", tables.format_block_casts),
    "triangle-goals": lambda results: (
        tables.format_goals(results, goals.TRIANGLE_GOALS)
        if results["triangle"]
        else _missing("triangle")
    ),
    "triangle-headline": _from("triangle", tables.format_triangle_headline),
    "triangle-forward": _from(
        "triangle",
        lambda x: tables.format_triangle(
            x, triangle_suite.FORWARD, tables.format_triangle_time, notes=True
        ),
    ),
    "triangle-step": _from(
        "triangle",
        lambda x: tables.format_triangle(
            x, triangle_suite.FORWARD_BACKWARD, tables.format_triangle_time, notes=True
        ),
    ),
    "triangle-memory": _from(
        "triangle",
        lambda x: tables.format_triangle(
            x, triangle_suite.FORWARD_BACKWARD, lambda row: tables.format_number(row["peak_mib"], 0)
        ),
    ),
    "triangle-checks": _from(
        "triangle",
        lambda x: tables.format_triangle(
            x, triangle_suite.FORWARD_BACKWARD, tables.format_triangle_checks
        ),
    ),
    "triangle-kernels": _from("triangle_kernels", tables.format_triangle_kernels),
    "training": _from("training", tables.format_training),
    "training-plot": _from(
        "training", lambda x: plots.format_pictures(x, plots.TRAINING_PLOTS, "img")
    ),
    "quantize-kernels": _from("quantize_kernels", tables.format_quantize_kernels),
    "algorithms": _from("algorithms", tables.format_algorithms),
    "attention-error": _from("attention_error", tables.format_attention),
}


def read_results(folder: Path) -> dict[str, Results | None]:
    """Results by suite, None for one without results."""
    return {suite: stored_results.read(folder / f"{suite}.json") for suite in SUITES}


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
        return problems + plots.find_stale_plots(results_folder, image_folder)
    plots.write_plots(results_folder, image_folder)
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
