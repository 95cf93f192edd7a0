# SPDX-License-Identifier: Apache-2.0
"""The structure that docs/design.md draws: arrows point down, and TE's private attributes are read in one place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch  # noqa: F401  # before TE: it loads the libraries that TE links to
import transformer_engine.pytorch as te

import transformer_engine_batched as teb

PACKAGE = Path(teb.__file__).parent
DESIGN = PACKAGE.parent / "docs" / "design.md"
if not DESIGN.is_file():
    pytest.skip("the documents come with a checkout only", allow_module_level=True)
# What the map leaves out: the entry points above all layers, and what all may raise.
ENTRIES = {"__init__", "__main__", "_version"}
LOWEST = "errors"


def read_layers() -> list[str]:
    """Modules and folders of the package from top to bottom, as the first block of docs/design.md lists them."""
    block = DESIGN.read_text(encoding="utf-8").split("```")[1]
    names = [name.removesuffix(".py").rstrip("/") for name in re.findall(r"\w+(?:\.py|/)", block)]
    layers = [name for name in names if name in list_units()]
    assert len(set(layers)) == len(layers), "a module is listed twice"
    return [*layers, LOWEST]


def list_units() -> set[str]:
    """Top-level modules and folders."""
    units = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in list_sources()}
    return units - ENTRIES


def list_sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def find_unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def find_imports(source: str, depth: int) -> set[str]:
    """Units of the package that a file imports, at its head or in a function; `depth`: how many folders it is in."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.split(".")[0] for name in names}
    return found


def test_map_is_complete():
    assert set(read_layers()) == list_units()


def test_arrows_point_down():
    rank = {name: index for index, name in enumerate(read_layers())}
    wrong = []
    for path in list_sources():
        unit, depth = find_unit(path), len(path.relative_to(PACKAGE).parts) - 1
        if unit in ENTRIES:
            continue
        imported = find_imports(path.read_text(encoding="utf-8"), depth)
        wrong += [
            f"{unit} imports {name}" for name in imported & rank.keys() if rank[name] <= rank[unit]
        ]
    assert not wrong


def test_kernels_know_plain_tensors_only():
    for path in (PACKAGE / "kernels").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "transformer_engine." not in re.sub(r'""".*?"""', "", source, flags=re.DOTALL), path
        assert not find_imports(source, 1), path


def find_private_names() -> set[str]:
    """Private attributes and module variables of TE's tensors, quantizers, recipes and modules."""
    folder = Path(te.__file__).parent
    files = [
        *folder.glob("tensor/**/*.py"),
        folder / "module" / "base.py",
        folder / "quantization.py",
    ]
    files += [folder / "distributed.py", folder / "quantized_tensor.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assigned = re.findall(r"\w\.(_[a-zA-Z0-9]\w*)(?:: [^=\n]+)? = ", text)
    declared = re.findall(r"^ *(?:def )?(_[a-zA-Z0-9]\w*)(?=:| = |\()", text, flags=re.MULTILINE)
    return {*assigned, *declared}


def find_private_reads(source: str, private: set[str]) -> list[str]:
    """TE's private names that a file imports, or reads of anything but its own objects and torch's modules."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "transformer_engine"
        ):
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
        elif isinstance(node, ast.Attribute) and node.attr in private:
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls") and not owner.startswith("torch"):
                found.append(f"{owner}.{node.attr}")
    return found


def test_private_attributes_of_te_are_read_in_one_place():
    private = find_private_names()
    assert {"_rowwise_data", "_fp8_dtype", "_2X_ACC_FPROP", "_has_delayed_scaling_state"} <= private
    for path in list_sources():
        if find_unit(path) != "te_interop":
            assert find_private_reads(path.read_text(encoding="utf-8"), private) == [], path


@pytest.mark.parametrize(
    "planted",
    (
        "x = tensor._rowwise_data",
        "from transformer_engine.pytorch.quantization import _has_delayed_scaling_state",
    ),
)
def test_a_planted_read_is_found(planted):
    assert find_private_reads(planted, find_private_names())
    assert find_imports("from ..gemm import bmm\nfrom . import nvrtc", 1) == {"gemm"}
