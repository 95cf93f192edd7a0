# SPDX-License-Identifier: Apache-2.0
"""Packaging: everything static is in pyproject.toml; here only the C++ extension, through CMake.

Input: the environment that the package is installed into, whose torch brings the CUDA libraries.
Must not import torch: it is no build requirement.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
from build_extension import build_extension  # noqa: E402


class CMakeBuild(build_ext):
    """Leaves the compile to CMake; setuptools only says where the result belongs."""

    def build_extension(self, ext: Extension) -> None:
        # Afresh each time: an isolated build leaves paths in CMake's cache that are gone the next.
        shutil.rmtree(self.build_temp, ignore_errors=True)
        build_extension(
            output_dir=Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            build_dir=Path(self.build_temp).resolve(),
        )


setup(
    ext_modules=[Extension("transformer_engine_batched._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
