# SPDX-License-Identifier: Apache-2.0
"""An operand of a differentiable product: quantized once, into the copies that forward and backward read.

A product reads an operand along its last dim or along its rows, and FP8 wants a copy for each direction.
Input: a tensor and TE's quantizer. Output: `Copies`, whose codes `gemm` multiplies. Must not know of
autograd.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Optional

import torch

from .emulation import current_emulation
from .gemm import decode_codes
from .operands import round_up
from .plan import describe_device
from .quantize import quantize
from .support import find_native_quantizer, supports_non_tn
from .te_interop import (
    HIGH_PRECISION_DTYPES,
    Codes,
    Quantizer,
    copy_quantizer,
    current_scaling_options,
    has_rowwise_copy,
    has_square_blocks,
    is_delayed_quantizer,
    is_quantized,
    logical_shape,
    nominal_dtype,
    quantizer_format,
    quantizer_fp8_dtype,
    quantizer_of,
    read_codes,
)

# MXFP8 blocks must neither cross items nor end early, and TE quantizes whole blocks only.
_MXFP8_BLOCK = 32


class Copy(NamedTuple):
    """Codes of an operand ``[*batch, rows, cols]``, possibly stored transposed and padded with zeros."""

    codes: Codes
    transposed: bool

    def sizes(self) -> tuple[int, int]:
        """Rows and columns with padding."""
        rows, cols = logical_sizes(self.codes)
        return (cols, rows) if self.transposed else (rows, cols)


def logical_sizes(codes: Codes) -> tuple[int, int]:
    """Rows and columns of the matrices that codes hold, as stored."""
    shape = codes.data.shape
    return (shape[-1], shape[0]) if codes.moved_last_dim else (shape[-2], shape[-1])


def trim(copy: Copy, rows: int, cols: int) -> Copy:
    """The copy without its padding: a view, which the product may have to pack."""
    if copy.sizes() == (rows, cols) or copy.codes.fmt != "float8" or copy.codes.moved_last_dim:
        return copy
    if copy.transposed:
        rows, cols = cols, rows
    return Copy(copy.codes._replace(data=copy.codes.data[..., :rows, :cols]), copy.transposed)


def dequantize(x: torch.Tensor) -> torch.Tensor:
    """High-precision values of a quantized tensor, also where TE's kernels cannot run."""
    device = describe_device(x.device)
    fmt = quantizer_format(quantizer_of(x))
    if fmt == "float8" or find_native_quantizer(fmt, device).engine == "te":
        return x.dequantize()
    by_last = has_rowwise_copy(x)
    return decode_codes(read_codes(x, "x", by_last, _anywhere)).to(nominal_dtype(x))


class Copies(NamedTuple):
    """A quantized operand.

    Parameters
    ----------
    rows, cols : int
        Sizes without padding.
    along_last : Copy, optional
        For products that contract the columns.
    along_rows : Copy, optional
        For products that contract the rows.
    """

    rows: int
    cols: int
    along_last: Optional[Copy]
    along_rows: Optional[Copy]


def plain_operand(x: torch.Tensor) -> Copies:
    """A high-precision operand: one tensor serves both directions."""
    dtype = HIGH_PRECISION_DTYPES[x.dtype]
    copy = Copy(Codes(dtype, dtype, x), False)
    return Copies(x.shape[-2], x.shape[-1], copy, copy)


def quantize_operand(
    x: torch.Tensor,
    quantizer: Quantizer,
    name: str,
    *,
    along_last: bool,
    along_rows: bool,
) -> Copies:
    """Quantizes an operand ``[*batch, rows, cols]`` into the copies asked for, with one read of it.

    A transposed view is quantized as it is stored and a broadcast batch once; neither is copied in high
    precision. A tensor that is quantized already is used as it is.
    """
    rows, cols = logical_shape(x)[-2:] if is_quantized(x) else x.shape[-2:]
    if is_quantized(x):
        # A copy that the tensor lacks is packed from the other one by the product.
        last = Copy(read_codes(x, name, True, _anywhere), False) if along_last else None
        by_rows = Copy(read_codes(x, name, False, _anywhere), False) if along_rows else None
        return Copies(rows, cols, last, by_rows)
    is_flipped = x.stride(-2) == 1 and x.stride(-1) != 1
    stored = _without_broadcast(x.mT if is_flipped else x)
    rowwise, columnwise = (along_rows, along_last) if is_flipped else (along_last, along_rows)
    by_last, by_rows = _quantize_stored(stored, quantizer, name, rowwise, columnwise)
    if is_flipped:
        by_last, by_rows = _flip(by_rows), _flip(by_last)
    return Copies(rows, cols, by_last, by_rows)


def _anywhere(device: torch.device) -> bool:  # pylint: disable=unused-argument
    return True


def _flip(copy: Optional[Copy]) -> Optional[Copy]:
    return None if copy is None else Copy(copy.codes, not copy.transposed)


def _without_broadcast(x: torch.Tensor) -> torch.Tensor:
    for dim in range(x.dim() - 2):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def _quantize_stored(
    x: torch.Tensor, quantizer: Quantizer, name: str, rowwise: bool, columnwise: bool
) -> tuple[Optional[Copy], Optional[Copy]]:
    fmt = quantizer_format(quantizer)
    is_native, is_fused = _find_kernels(fmt, x.device)
    if is_fused and x.numel() > 0 and not current_emulation().force_reference:
        return _quantize_fused(x, quantizer, rowwise, columnwise)
    if fmt == "mxfp8":
        padding = [
            0,
            round_up(x.shape[-1], _MXFP8_BLOCK) - x.shape[-1],
            0,
            round_up(x.shape[-2], _MXFP8_BLOCK) - x.shape[-2],
        ]
        if any(padding):
            x = torch.nn.functional.pad(x, padding)
    # TE's kernels for one scale per tensor and per 128 x 128 block make no column-wise copy alone.
    with_rowwise = rowwise or (is_native and (fmt == "float8" or has_square_blocks(quantizer)))
    quantized = quantize(x, copy_quantizer(quantizer, with_rowwise, columnwise))
    by_last = Copy(read_codes(quantized, name, True, _anywhere), False) if rowwise else None
    by_rows = Copy(read_codes(quantized, name, False, _anywhere), False) if columnwise else None
    return by_last, by_rows


@lru_cache(maxsize=None)
def _find_kernels(fmt: str, device: torch.device) -> tuple[bool, bool]:
    """Whether TE quantizes to the format on the device, and whether our fused kernel does.

    The fused kernel is for devices where FP8 wants a transposed copy; elsewhere one copy serves both ways.
    """
    info = describe_device(device)
    is_native = find_native_quantizer(fmt, info).engine == "te"
    return is_native, is_native and fmt == "float8" and not supports_non_tn(fmt, info)


def _quantize_fused(
    x: torch.Tensor, quantizer: Quantizer, rowwise: bool, columnwise: bool
) -> tuple[Optional[Copy], Optional[Copy]]:
    """One kernel for both copies, padded to what the product wants."""
    from .kernels import float8_quantize  # Triton takes a second to import, and only a GPU needs it

    if not float8_quantize.can_quantize(x):
        x = x.contiguous()
    dtype = quantizer_fp8_dtype(quantizer)
    if is_delayed_quantizer(quantizer):
        codes, transposed, scale_inv = float8_quantize.quantize_float8(
            x, quantizer.scale, quantizer.amax, dtype, rowwise=rowwise, transposed=columnwise
        )
    else:
        codes, transposed, scale_inv = float8_quantize.quantize_float8_current(
            x, dtype, rowwise=rowwise, transposed=columnwise, **current_scaling_options(quantizer)
        )
    by_last = Copy(Codes("float8", dtype, codes, scale_inv), False) if rowwise else None
    by_rows = Copy(Codes("float8", dtype, transposed, scale_inv), True) if columnwise else None
    return by_last, by_rows
