# SPDX-License-Identifier: Apache-2.0
"""Stored results: what a run was made on, and one JSON file per suite.

Input: rows of a suite. Output: `{"meta": {...}, "rows": [...]}`. Nothing that names the machine's
user, host or folders is written. The GPU is asked only by `collect_meta`.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any, Callable, Sequence

ROOT = Path(__file__).resolve().parents[1]
# Words of the command line that say where things are on this machine, not what was measured.
_LOCAL_OPTIONS = {"--out", "--commit", "--resume"}


def _or_none(ask: Callable[[], Any]) -> Any:
    """The answer, or None: a version that cannot be asked must not cost the results."""
    try:
        return ask()
    except Exception:
        return None


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def find_commit(given: str | None) -> tuple[str | None, bool | None]:
    """Commit and whether the tree differs from it.

    `given` wins, since a copied tree has no `.git`; a suffix ``-dirty`` marks it as changed, as in
    ``git describe --dirty``.
    """
    if given is not None:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    commit = _or_none(lambda: _run("git", "rev-parse", "HEAD"))
    if commit is None:
        return None, None
    return commit, _or_none(lambda: bool(_run("git", "status", "--porcelain")))


def describe_command(arguments: Sequence[str]) -> str:
    """The command that repeats a run, without the options that name places on this machine."""
    kept, skip_next = [], False
    for word in arguments:
        name = word.split("=", 1)[0]
        if skip_next:
            skip_next = False
        elif name in _LOCAL_OPTIONS:
            skip_next = "=" not in word and name != "--resume"
        else:
            kept.append(word)
    return " ".join(["python benchmarks/run.py", *kept])


def _format_cublaslt(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _ask_cublaslt() -> str:
    from transformer_engine_batched import _C

    return _format_cublaslt(_C.loaded_version())


def _ask_version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


def collect_meta(arguments: Sequence[str], commit: str | None) -> dict[str, Any]:
    """All that a reader needs to repeat the run. Unknown entries are None."""
    import torch

    found_commit, is_dirty = find_commit(commit)
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "commit": found_commit,
        "dirty": is_dirty,
        "gpu": _or_none(torch.cuda.get_device_name),
        "driver": _or_none(lambda: _run(*driver)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "te": _or_none(lambda: _ask_version("transformer_engine")),
        "cublaslt": _or_none(_ask_cublaslt),
        "cuequivariance": _or_none(lambda: _ask_version("cuequivariance_ops_torch_cu13")),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": describe_command(arguments),
    }


def clean_reason(reason: str) -> str:
    """An error text without folders of this machine: absolute paths keep their last part only."""
    return re.sub(r"(?<![\w.])/(?:[^\s:'\"()/]+/)+", "", reason)


def write(path: Path, meta: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Replace `path` in one step, so that a stopped run leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"meta": meta, "rows": rows}, indent=1, allow_nan=False)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any] | None:
    """The stored results, or None if there are none yet."""
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))
