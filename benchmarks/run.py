# SPDX-License-Identifier: Apache-2.0
"""Entry point of the benchmarks: `python benchmarks/run.py [--suite gemm|host|module|einsum|triangle|blockwise|all] [--quick]`.

Input: one CUDA GPU with Transformer Engine and this package. Output: a file for each suite, such as `gemm.json`,
in a folder named after the GPU (`benchmarks/results/h200`), a table on the terminal, and exit code 1
if one of our own variants failed. Results are written after every point, so a stopped run keeps
what it has. If the device stops answering, the program starts itself anew without the variant that
broke it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
# Suites whose module `benchmarks.<name>_suite` has POINTS, QUICK, `make_measure`, `name_calls`, `format_rows`
# and `find_failures`, and whose goals are `goals.SUITE_GOALS[name]`.
POINT_SUITES = ("einsum", "triangle", "blockwise")

if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from benchmarks import goals, stored_results
from benchmarks.timing import DeviceLostError


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/run.py", description=__doc__)
    parser.add_argument(
        "--suite", choices=("gemm", "host", "module", *POINT_SUITES, "all"), default="all"
    )
    parser.add_argument("--quick", action="store_true", help="three points, few rounds")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: named after the GPU)"
    )
    parser.add_argument(
        "--commit", help="commit of the tree, where it has no .git; -dirty marks changes"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the results in --out")
    return parser.parse_args(arguments)


def choose_folder(gpu: str, is_quick: bool) -> Path:
    """`benchmarks/results/h200` for "NVIDIA H200"; quick runs have a folder of their own."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-")
    return ROOT / "benchmarks" / "results" / (f"{slug}-quick" if is_quick else slug)


def run_suite(
    path: Path,
    meta: dict[str, Any],
    items: Sequence[Any],
    measure: Callable[[Any, Mapping[str, str]], list[dict[str, Any]]],
    name_calls: Callable[[Any], Sequence[str]],
    is_resumed: bool,
    forget: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure every item (a point or a case) and write `path` after each.

    Parameters
    ----------
    measure : callable
        `(item, lost) -> rows`; `lost` maps the calls that must not run again to the reason.
    name_calls : callable
        Names of all calls that `measure` makes for an item.
    is_resumed : bool
        Keep the rows that `path` has and go on with the rest.
    forget : callable
        Called before each item: what an earlier one has tuned must not show in this one's untuned variants.

    Raises
    ------
    DeviceLostError
        After the call that broke the device has been written down in `meta["lost"]`.
    """
    stored = stored_results.read(path) if is_resumed else None
    rows = list(stored["rows"]) if stored else []
    before = stored["meta"] if stored else {"lost": {}, "done": []}
    meta = {**meta, "complete": False, "lost": before["lost"], "done": before["done"]}
    for item in items:
        if item.name in meta["done"]:
            continue
        start = time.perf_counter()
        print(f"{item.name} ...", end=" ", flush=True)
        forget()
        try:
            rows += measure(item, meta["lost"].get(item.name, {}))
        except DeviceLostError as error:
            names = name_calls(item)
            culprits = [error.call] if error.call in names else names
            reason = f"the device stopped answering: {stored_results.clean_reason(error.reason)}"
            meta["lost"].setdefault(item.name, {}).update(dict.fromkeys(culprits, reason))
            stored_results.write(path, meta, rows)
            raise
        meta["done"].append(item.name)
        stored_results.write(path, meta, rows)
        print(f"{time.perf_counter() - start:.1f} s", flush=True)
    meta["complete"] = True
    stored_results.write(path, meta, rows)
    return {"meta": meta, "rows": rows}


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _format_module(module: dict[str, Any]) -> list[str]:
    lines = [f"{'point':14}{'variant':22}{'pass':18}{'ms':>9}{'/bf16':>7}  dB"]
    for row in module["rows"]:
        reason = f"  {row['reason']}" if row["reason"] else ""
        if "case" in row:
            lines.append(
                f"host time: {row['label']:43}{_number(row['median_us'], 1):>9} us{reason}"
            )
        else:
            decibels = ", ".join(_number(db, 1) for db in row["sqnr_db"] or ())
            lines.append(
                f"{row['point']:14}{row['variant']:22}{row['pass']:18}{_number(row['median_ms'], 4):>9}"
                f"{_number(row['ratio_to_bf16'], 2):>7}  {decibels}{reason}"
            )
    return lines


def format_summary(
    gemm: dict[str, Any] | None,
    host: dict[str, Any] | None,
    module: dict[str, Any] | None = None,
    further: Mapping[str, dict[str, Any]] | None = None,
) -> str:
    """Short plain table of everything measured, with the reasons for gaps, and the goals."""
    lines = []
    if gemm is not None:
        heads = f"{'ms':>9}{'TFLOP/s':>9}{'/bf16':>7}{'/te loop':>9}{'dB':>7}"
        lines.append(f"{'point':26}{'variant':20}{heads}")
        for row in gemm["rows"]:
            lines.append(
                f"{row['point']:26}{row['variant']:20}{_number(row['median_ms'], 4):>9}"
                f"{_number(row['tflops'], 0):>9}{_number(row['ratio_to_bf16'], 2):>7}"
                f"{_number(row['ratio_to_te_loop'], 2):>9}{_number(row['sqnr_db'], 1):>7}"
                + (f"  {row['reason']}" if row["reason"] else "")
            )
    if host is not None:
        lines.append(f"{'host time of a call':46}{'us':>9}")
        for row in host["rows"]:
            reason = f"  {row['reason']}" if row["reason"] else ""
            lines.append(f"{row['case']:46}{_number(row['median_us'], 2):>9}{reason}")
    further = further or {}
    results = {"gemm": gemm, "host": host, "module": module, **further}
    lines += _format_module(module) if module is not None else []
    for name, found in further.items():
        lines += _load_suite(name).format_rows(found)
    chosen = goals.GOALS if gemm is not None or host is not None else ()
    chosen = (*chosen, *(goals.MODULE_GOALS if module is not None else ()))
    for name in further:
        chosen = (*chosen, *goals.SUITE_GOALS[name])
    for outcome in goals.evaluate(results, chosen):
        verdict = {None: "not measured", True: "reached", False: "MISSED"}[outcome.is_reached]
        sign = ">=" if outcome.goal.is_minimum else "<="
        lines.append(
            f"{verdict:13} {outcome.goal.text}: {_number(outcome.measured, 2)} "
            f"(goal {sign} {outcome.goal.bound:g})"
        )
    return "\n".join(lines)


def find_failures(
    gemm: dict[str, Any] | None,
    host: dict[str, Any] | None,
    module: dict[str, Any] | None = None,
    further: Mapping[str, dict[str, Any]] | None = None,
) -> list[str]:
    """Rows of our own variants without a time."""
    failures = [
        x for name, found in (further or {}).items() for x in _load_suite(name).find_failures(found)
    ]
    for row in gemm["rows"] if gemm else []:
        if row["variant"].startswith("ours") and row["median_ms"] is None:
            failures.append(f"{row['point']} {row['variant']}: {row['reason']}")
    for row in host["rows"] if host else []:
        if row["case"].startswith("ours") and row["median_us"] is None:
            failures.append(f"host {row['case']}: {row['reason']}")
    for row in module["rows"] if module else []:
        name = row.get("case") or row["variant"]
        if name.startswith("ours") and row.get("median_us", row.get("median_ms")) is None:
            where = row.get("point", "host time")
            failures.append(f"module {where} {name}: {row['reason']}")
    return failures


def _load_suite(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}_suite")


def _measure_on_gpu(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    import torch

    if not torch.cuda.is_available():
        print("The benchmarks need a CUDA GPU; torch sees none.", file=sys.stderr)
        return 2
    import transformer_engine.pytorch  # noqa: F401  registers the types of quantized tensors

    import transformer_engine_batched as teb
    from benchmarks import gemm_suite, host_suite, module_suite, peers, points, timing

    meta = stored_results.collect_meta(arguments, options.commit)
    folder = options.out or choose_folder(meta["gpu"] or "gpu", options.quick)
    clock = timing.CudaClock()
    measure_suite = partial(run_suite, forget=teb.clear_choices)
    gemm = host = module = None
    if options.suite in ("host", "all"):
        operands, out = host_suite.make_inputs()
        host = measure_suite(
            folder / "host.json",
            meta,
            host_suite.CASES,
            lambda case, lost: [host_suite.measure_case(case, operands, out, clock.settle, lost)],
            lambda case: [case.name],
            options.resume,
        )
    if options.suite in ("gemm", "all"):
        quick = gemm_suite.Settings(rounds=8, loop_rounds=2)
        settings = quick if options.quick else gemm_suite.Settings()
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        gemm = measure_suite(
            folder / "gemm.json",
            meta,
            points.QUICK if options.quick else (*points.SQUARE, *points.OTHER),
            lambda point, lost: gemm_suite.measure_point(
                point, peers.VARIANTS, clock, settings, lost, l2_bytes=l2_bytes
            ),
            lambda point: [variant.name for variant in peers.VARIANTS],
            options.resume,
        )
    if options.suite in ("module", "all"):
        settings = module_suite.Settings(rounds=8) if options.quick else module_suite.Settings()
        step_clock = module_suite.HeadStartClock()

        def measure_module(item: Any, lost: Mapping[str, str]) -> list[dict[str, Any]]:
            if isinstance(item, module_suite.HostCase):
                return [module_suite.measure_host(item, clock.settle, lost)]
            return module_suite.measure_point(item, step_clock, settings, lost)

        module = measure_suite(
            folder / "module.json",
            meta,
            (*module_suite.HOST_CASES, *module_suite.POINTS),
            measure_module,
            lambda item: (
                [item.name]
                if isinstance(item, module_suite.HostCase)
                else [variant.name for variant in module_suite.VARIANTS]
            ),
            options.resume,
        )
    further = {}
    for name in POINT_SUITES:
        if options.suite in (name, "all"):
            suite = _load_suite(name)
            further[name] = measure_suite(
                folder / f"{name}.json",
                meta,
                suite.QUICK if options.quick else suite.POINTS,
                suite.make_measure(options.quick),
                suite.name_calls,
                options.resume,
            )
    print(format_summary(gemm, host, module, further))
    failures = find_failures(gemm, host, module, further)
    if failures:
        print("\nOurs without a time:\n" + "\n".join(failures))
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(arguments)
    try:
        return _measure_on_gpu(options, arguments)
    except DeviceLostError as error:
        print(f"\nThe device stopped answering ({error}); starting anew without it.", flush=True)
        if "--resume" not in arguments:
            arguments.append("--resume")
        os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *arguments])


if __name__ == "__main__":
    sys.exit(main())
