# SPDX-License-Identifier: Apache-2.0
"""`python -m transformer_engine_batched info`: versions, devices and what runs on them."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

import torch

from . import _C, __version__
from .plan import describe_device
from .support import FORMAT_TITLES, FORMATS, describe_support


def format_cublaslt_version(version: int) -> str:
    """E.g. 130100 -> "13.1.0"."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def collect_versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    driver = _C.driver_version()
    return {
        "transformer_engine_batched": __version__,
        "Transformer Engine": metadata.version("transformer_engine"),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "cuBLASLt compiled against": format_cublaslt_version(_C.compiled_version()),
        "cuBLASLt loaded": format_cublaslt_version(_C.loaded_version()),
        "CUDA driver API": "none" if driver == 0 else f"{driver // 1000}.{driver % 1000 // 10}",
    }


def print_info() -> None:
    """Prints versions, then a support table for each device."""
    for name, version in collect_versions().items():
        print(f"{name:28s} {version}")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        info = describe_device(device)
        capability = (
            f", compute capability {info.capability[0]}.{info.capability[1]}"
            if info.is_cuda
            else ""
        )
        print(f"\n{device}: {info.name}{capability}")
        for fmt in FORMATS:
            engine, remark = describe_support(fmt, info)
            print(f"  {FORMAT_TITLES[fmt]:68s} {engine}{': ' + remark if remark else ''}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m transformer_engine_batched")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices and what runs on them")
    parser.parse_args()
    print_info()


if __name__ == "__main__":
    main()
