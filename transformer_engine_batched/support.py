# SPDX-License-Identifier: Apache-2.0
"""What runs where: the one table of format x device -> engine, and the library's rules.

Pure values: formats, devices and version numbers in, engine names or reasons out. Other modules ask here
and never test a compute capability or a library version themselves. Must not import torch or TE.

Sources: cuBLAS manual, "Narrow Precision Data Types Usage" and `cublasLtMatmul`
(https://docs.nvidia.com/cuda/cublas/); the CUDA release notes for the fault ranges; and our own probe of
cuBLAS 13.1.0 on an H200, benchmarks/results/h200/probe.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from .errors import UnsupportedError

HIGH_PRECISION = ("fp32", "fp16", "bf16")
FP8_DTYPES = ("e4m3", "e5m2")
FORMATS = ("fp32", "fp16", "bf16", "float8", "mxfp8", "float8_block", "nvfp4")

# What TE calls the recipes that make these formats.
FORMAT_TITLES = {
    "fp32": "FP32",
    "fp16": "FP16",
    "bf16": "BF16",
    "float8": "Float8, one scale per tensor (DelayedScaling, Float8CurrentScaling)",
    "mxfp8": "MXFP8 (MXFP8BlockScaling)",
    "float8_block": "Float8 128-blocks (Float8BlockScaling)",
    "nvfp4": "NVFP4 (NVFP4BlockScaling)",
}


@dataclass(frozen=True)
class Device:
    """What the table needs to know of a device.

    Parameters
    ----------
    name : str
        As shown to users.
    capability : tuple of int, optional
        CUDA compute capability; None for a CPU.
    cublaslt : int
        Version of the loaded cuBLASLt, e.g. 130100; 0 if it is not loaded.
    """

    name: str
    capability: Optional[tuple[int, int]] = None
    cublaslt: int = 0

    @property
    def is_cuda(self) -> bool:
        """Whether this is a CUDA device."""
        return self.capability is not None


CPU = Device("CPU")


@dataclass(frozen=True)
class Answer:
    """An engine ("cublaslt", "blockwise", "reference"; "mxfp8": that of MXFP8, after conversion), or None with the reason."""

    engine: Optional[str]
    reason: str = ""


def _in_blackwell_family(capability: tuple[int, int]) -> bool:
    # TE, pytorch/utils.py, is_non_tn_fp8_gemm_supported: 10.x and 11.x, not 12.x.
    return (10, 0) <= capability < (12, 0)


def find_native_engine(fmt: str, device: Device) -> Answer:
    """The engine that runs a product of two operands of this format without emulation."""
    if fmt in HIGH_PRECISION:
        return Answer("cublaslt" if device.is_cuda else "reference")
    if fmt == "nvfp4":
        return Answer(None, "batched NVFP4 has no engine in this package yet")
    if fmt == "float8_block":
        if device.capability == (9, 0):
            return Answer("blockwise")
        if device.is_cuda and _in_blackwell_family(device.capability):
            return Answer("mxfp8")
        return Answer(
            None,
            "the kernel for 128-block scales is for compute capability 9.0 (Hopper), Blackwell (10.x) takes them as "
            "MXFP8, and cuBLASLt runs them for single matrices only",
        )
    if not device.is_cuda:
        return Answer(None, "FP8 tensor cores need a CUDA device")
    if fmt == "float8":
        if device.capability < (8, 9):
            return Answer(None, "FP8 tensor cores need compute capability 8.9 or higher")
        return Answer("cublaslt")
    if fmt == "mxfp8":
        if device.capability < (10, 0):
            return Answer(None, "MXFP8 tensor cores need compute capability 10.0 or higher")
        if not _in_blackwell_family(device.capability):
            return Answer(None, "TE has no MXFP8 on compute capability 12.0 and higher yet")
        return Answer("cublaslt")
    raise AssertionError(f"unknown format {fmt}")


def find_engine(fmt: str, device: Device, *, emulate: bool, force_reference: bool = False) -> str:
    """The engine for a product, or an `UnsupportedError` with the reason and the way out.

    With `emulate`, a format that the device lacks runs with exact arithmetic: on the reference engine,
    or, for MXFP8 on a CUDA device and for Float8 128-blocks, as a product of the decoded
    operands in BF16 or FP32 ("decoded"). With `force_reference` everything runs on the reference engine,
    decoded operands, too.
    """
    if emulate and fmt == "float8_block":
        answer = find_native_engine(fmt, device)
        return "decoded" if force_reference or answer.engine is None else answer.engine
    if emulate and force_reference and fmt != "nvfp4":
        return "reference"
    answer = find_native_engine(fmt, device)
    if answer.engine is not None:
        return answer.engine
    if fmt == "nvfp4":
        raise UnsupportedError(
            f"a batched product of {FORMAT_TITLES[fmt]} operands was asked for: {answer.reason}. "
            "Quantize with Float8CurrentScalingQuantizer or MXFP8Quantizer instead."
        )
    if emulate:
        return "decoded" if fmt == "mxfp8" and device.is_cuda else "reference"
    raise UnsupportedError(
        f"a batched product of {FORMAT_TITLES[fmt]} operands was asked for on {device.name}: "
        f"{answer.reason}. To run it here with exact but slow arithmetic, do so inside "
        "`with transformer_engine_batched.emulate():`."
    )


def find_native_quantizer(fmt: str, device: Device) -> Answer:
    """Whether TE's own kernels quantize to this format on the device ("te"), or why not.

    TE's MXFP8 kernel is compiled for compute capability 10.0 and does nothing below it: it returns
    uninitialised memory without an error (measured on an H200 with TE 2.20.2), so it is not called there.
    128-blocks are TE's own on Hopper; on Blackwell TE turns them into MXFP8 in its products.
    """
    if not device.is_cuda:
        return Answer(None, "TE's quantization kernels need a CUDA device")
    if fmt == "float8":
        if device.capability < (8, 9):
            return Answer(None, "TE quantizes to FP8 on compute capability 8.9 or higher")
        return Answer("te")
    if fmt == "mxfp8":
        if device.capability < (10, 0):
            return Answer(None, "TE quantizes to MXFP8 on compute capability 10.0 or higher")
        return Answer("te")
    if fmt == "float8_block":
        if device.capability != (9, 0):
            return Answer(None, "TE keeps Float8 128-blocks on compute capability 9.0 only")
        return Answer("te")
    return Answer(None, f"{FORMAT_TITLES[fmt]} operands have no batched product here yet")


def find_groupwise_engine(device: Device, *, emulate: bool, force_reference: bool = False) -> str:
    """Who multiplies plain FP8 tensors with 128-block scales: "blockwise" (Hopper) or "reference".

    The reference is the engine of CPU tensors, which have no other; on other CUDA devices it asks for `emulate`.
    """
    if not device.is_cuda or emulate and force_reference:
        return "reference"
    if device.capability == (9, 0):
        return "blockwise"
    if emulate:
        return "reference"
    raise UnsupportedError(
        f"a product of FP8 tensors with 128-block scales was asked for on {device.name}: the kernel is for compute "
        "capability 9.0 (Hopper). To run it here with exact but slow arithmetic, do so inside "
        "`with transformer_engine_batched.emulate():`."
    )


def find_block_caster(device: Device, *, emulate: bool, force_reference: bool = False) -> str:
    """Who casts to FP8 with 128-blocks: the kernel ("triton"), or "reference" on a CPU and in `emulate()`."""
    if not device.is_cuda or emulate and force_reference:
        return "reference"
    if device.capability >= (8, 9):
        return "triton"
    if emulate:
        return "reference"
    raise UnsupportedError(
        f"a cast to FP8 was asked for on {device.name}: FP8 needs compute capability 8.9 or higher. To do it "
        "with the exact reference, do so inside `with transformer_engine_batched.emulate():`."
    )


def supports_non_tn(fmt: str, device: Device) -> bool:
    """Whether the contracted dim of an operand may be the strided one.

    FP8 on Ada, Hopper and 12.x takes both operands contiguous along the contracted dim ("TN") only.
    """
    return fmt in HIGH_PRECISION or device.is_cuda and _in_blackwell_family(device.capability)


# --- sizes and strides --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """What an engine wants of sizes and addresses. 1: anything goes.

    Parameters
    ----------
    k_multiple : int
        Of the contracted size, in elements.
    n_bytes_multiple : int
        Of a row of the output, in bytes.
    address_multiple : int
        Of addresses, leading dimensions and batch strides, in bytes.
    """

    k_multiple: int = 1
    n_bytes_multiple: int = 1
    address_multiple: int = 1


_ANY = Alignment()
# Probed on cuBLAS 13.1.0, compute capability 9.0: K % 16, rows of D % 16 bytes, addresses, leading
# dimensions and batch strides of A, B and D % 16 bytes; any M. The manual asks for as much.
_FP8 = Alignment(k_multiple=16, n_bytes_multiple=16, address_multiple=16)
# A block of 32 has one scale, so K is padded to whole blocks.
_MXFP8 = Alignment(k_multiple=32, n_bytes_multiple=16, address_multiple=16)


def required_alignment(fmt: str) -> Alignment:
    """The sizes and addresses that the library takes for a format; others are packed into them."""
    return {"float8": _FP8, "mxfp8": _MXFP8}.get(fmt, _ANY)


def max_leading_dimension_bytes(cublaslt: int) -> Optional[int]:
    """Largest leading dimension, or None for no limit.

    CUB-9572: wrong results or out-of-bounds access where ld * element size exceeds int32, from CUDA 12.6
    Update 2 (cuBLAS 12.6.3); fixed in 13.2.0 and in the patch releases 12.8.5, 12.9.2 and 13.1.1.
    """
    fixed = cublaslt >= 130200 or cublaslt in (120805, 120902, 130101)
    return None if cublaslt < 120603 or fixed else 2**31 - 1


def scalar_scale_alignment(cublaslt: int) -> int:
    """Bytes to which the address of a per-tensor scale must be aligned.

    Entry 5728938: cuBLAS 12.9 to 13.2.0 wrongly demand 16 for FP32 scalars; others take any float.
    """
    return 16 if 120900 <= cublaslt < 130201 else 4


# --- types --------------------------------------------------------------------------------------------


def check_fp8_pair(left: str, right: str, left_name: str, right_name: str) -> None:
    """Refuses e5m2 x e5m2, which no tensor core multiplies."""
    if left == right == "e5m2":
        raise UnsupportedError(
            f"operands {left_name} and {right_name} are both E5M2: tensor cores multiply E4M3 x E4M3, "
            "E4M3 x E5M2 and E5M2 x E4M3 only. Quantize one of them to E4M3."
        )


def native_output_dtypes(fmt: str, left: str) -> tuple[str, ...]:
    """Output types that a product of this format can be written in directly."""
    if fmt in ("float8", "mxfp8"):
        return ("fp32", "fp16", "bf16")
    return ("fp32",) if left == "fp32" else (left, "fp32")


def fused_bias_dtype(fmt: str, out_dtype: str) -> Optional[str]:
    """The bias type that the epilogue takes for this output type."""
    if fmt in ("float8", "mxfp8"):
        return "fp16" if out_dtype == "fp16" else "bf16"
    return out_dtype


def supports_fp8_output(fmt: str, left: str, right: str, out_dtype: str, batch: int) -> bool:
    """Whether the library can write FP8 with a per-tensor scale and amax.

    E5M2 output needs an E5M2 operand. With an amax address the library does not split batches beyond the
    grid limit of 65535 by itself (manual, section 3.1.1).
    """
    return fmt == "float8" and (out_dtype == "e4m3" or "e5m2" in (left, right)) and batch <= 65535


# --- the table, for people ------------------------------------------------------------------------------

_TABLE_DEVICES = (
    ("CPU", CPU),
    ("Ada (8.9)", Device("Ada", (8, 9), 130100)),
    ("Hopper (9.0)", Device("Hopper", (9, 0), 130100)),
    ("Blackwell (10.x)", Device("Blackwell", (10, 0), 130100)),
)


def describe_support(fmt: str, device: Device) -> tuple[str, str]:
    """(engine, remark) of a format on a device, as `info` shows it."""
    answer = find_native_engine(fmt, device)
    if answer.engine is not None:
        return answer.engine, ""
    if fmt == "nvfp4":
        return "-", answer.reason
    return "emulate() only", answer.reason


def format_table() -> str:
    """The support table as Markdown: formats in rows, device families in columns."""
    lines = [
        "| format | " + " | ".join(title for title, _ in _TABLE_DEVICES) + " |",
        "|---" * (len(_TABLE_DEVICES) + 1) + "|",
    ]
    for fmt in FORMATS:
        cells = [describe_support(fmt, device)[0] for _, device in _TABLE_DEVICES]
        lines.append(f"| {FORMAT_TITLES[fmt]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
