# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ extension with CMake, for the interpreter that runs this file.

Input: csrc/, CMakeLists.txt and cmake/ of this source tree, and what the interpreter can see:
cmake, ninja and pybind11 (from pip or the system) and the CUDA libraries that
cmake/FindCublasLt.cmake finds.
Output: ``transformer_engine_batched/_C.<abi>.so``, in place, and the folder ``build/cmake-*``.
Run as ``python tools/build_extension.py``; setup.py calls :func:`build_extension`. Must not import
torch or the package itself.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CMAKE_MINIMUM = (3, 18)  # as in CMakeLists.txt
SOURCE_PATTERNS = (
    "CMakeLists.txt",
    "cmake/*.cmake",
    "csrc/*",
    "transformer_engine_batched/_version.py",
)
# Settings of the environment that change what is built.
ENVIRONMENT = ("TEB_CUDA_ROOT", "CUDAToolkit_ROOT", "CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS")


class BuildError(RuntimeError):
    """The extension could not be built; the text says what to do."""


def find_program(name: str) -> str | None:
    """Path of ``cmake`` or ``ninja``: beside the interpreter first, then on PATH."""
    beside = Path(sysconfig.get_path("scripts"), name)
    return str(beside) if beside.is_file() else shutil.which(name)


def find_cmake() -> str:
    """Path of a CMake that is new enough, or :class:`BuildError`."""
    advice = f"`{sys.executable} -m pip install cmake` brings it"
    cmake = find_program("cmake")
    if cmake is None:
        raise BuildError(f"cmake was not found; {advice}")
    answer = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"version (\d+)\.(\d+)", answer.stdout)
    if version is None:
        raise BuildError(f"{cmake} does not run: {answer.stderr.strip()}; {advice}")
    if tuple(map(int, version.groups())) < CMAKE_MINIMUM:
        raise BuildError(
            f"{cmake} is version {version[1]}.{version[2]}, and at least "
            f"{CMAKE_MINIMUM[0]}.{CMAKE_MINIMUM[1]} is needed; {advice}"
        )
    return cmake


def extension_path(output_dir: Path) -> Path:
    """Where the extension of this interpreter goes."""
    return output_dir / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))


def hash_sources(root: Path) -> str:
    """Digest of the names and contents of all files that the extension is built from."""
    digest = hashlib.sha256()
    for pattern in SOURCE_PATTERNS:
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def hash_configuration(cmake_args: tuple[str, ...] = ()) -> str:
    """Digest of what CMake is told and finds out: interpreter, packages, programs, environment."""
    facts = {
        "interpreter": [sys.prefix, sys.version],
        "packages": {name: find_version(name) for name in ("torch", "nvidia-cublas", "pybind11")},
        "programs": {name: find_program(name) for name in ("cmake", "ninja")},
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "arguments": cmake_args,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def describe_result(inputs: str, extension: Path) -> str:
    """The stamp: what was built, and from what. An extension that pip or CMake put there differs."""
    state = extension.stat() if extension.is_file() else None
    return f"{inputs} {state and (state.st_size, state.st_mtime_ns)}"


def find_version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(command: list[str], doing: str) -> None:
    """Runs a command; on failure shows all it said."""
    answer = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    # A compiler's warnings are worth a line even when the build succeeds.
    if answer.returncode or "warning:" in answer.stdout:
        print(answer.stdout, flush=True)
    if answer.returncode:
        raise BuildError(f"{doing} failed, see above; the command was: {' '.join(command)}")


def build_extension(
    output_dir: Path | None = None, build_dir: Path | None = None, cmake_args: tuple[str, ...] = ()
) -> Path:
    """Configures and compiles; returns the path of the extension.

    Parameters
    ----------
    output_dir : Path, optional
        Folder for the extension; the package in this source tree unless given.
    build_dir : Path, optional
        CMake's folder; unless given, one for each configuration under ``build/``, so that no
        cached answer of CMake outlives the question.
    cmake_args : tuple of str
        Further arguments for CMake's configuration, such as ``-DTEB_CUDA_ROOT=/usr/local/cuda``.

    Raises
    ------
    BuildError
        CMake is missing or too old, or the configuration or the compile failed.
    """
    output_dir = output_dir or ROOT / "transformer_engine_batched"
    if build_dir is None:
        build_dir = ROOT / "build" / f"cmake-{hash_configuration(cmake_args)[:12]}"
    cmake = find_cmake()
    ninja = find_program("ninja")
    configure = [cmake, "-S", str(ROOT), "-B", str(build_dir)]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DTEB_OUTPUT_DIR={output_dir}"]
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run([*configure, *cmake_args], "configuring the C++ extension")
    # Another configuration may have put its own there, which would look up to date.
    extension = extension_path(output_dir)
    extension.unlink(missing_ok=True)
    jobs = len(os.sched_getaffinity(0))
    run([cmake, "--build", str(build_dir), "--parallel", str(jobs)], "compiling the C++ extension")
    if not extension.is_file():
        raise BuildError(f"CMake ended without an error and without making {extension}")
    return extension


def main() -> int:
    """Builds in place, unless the extension there was made from the same inputs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="build even if nothing has changed")
    args, cmake_args = parser.parse_known_args()

    extension = extension_path(ROOT / "transformer_engine_batched")
    stamp = ROOT / "build" / f"{extension.name}.inputs"
    inputs = hash_sources(ROOT) + hash_configuration(tuple(cmake_args))
    is_current = stamp.is_file() and stamp.read_text() == describe_result(inputs, extension)
    if is_current and not args.force:
        return 0
    started = time.monotonic()
    print(f"building the C++ extension {extension.name} (about 15 s)", flush=True)
    try:
        stamp.unlink(missing_ok=True)
        build_extension(cmake_args=tuple(cmake_args))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stamp.write_text(describe_result(inputs, extension))
    print(f"built in {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
