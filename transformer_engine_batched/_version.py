# SPDX-License-Identifier: Apache-2.0
"""The version, in its one place: the package, setup.py's metadata and CMake all read it here."""

__version__ = "0.1.0"
