# SPDX-License-Identifier: Apache-2.0
"""An operand of a differentiable product: quantized once, into the copies that forward and backward read.

A product reads an operand along its last dim or along its rows, and FP8 wants a copy for each direction.
Input: a tensor and TE's quantizer. Output: `Copies`, whose codes `gemm` multiplies. Must not know of
autograd.

What depends only on the tensor's description and the quantizer's settings is decided once and kept as a
`Quantize` under their signature, as `gemm` keeps its launches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Callable, NamedTuple, Optional

import torch
from transformer_engine.pytorch.quantized_tensor import Quantizer

from .block_cast import cast_blocks, describe_block_codes, describe_block_scales
from .emulation import Emulation, current_emulation
from .operand_conversion import decode_codes
from .operands import round_up
from .plan import describe_device
from .quantize import quantize
from .reference.product import TORCH_DTYPES
from .support import find_native_quantizer, supports_non_tn
from .te_interop.quantizers import (
    block_scaling_options,
    cast_settings,
    copy_quantizer,
    current_scaling_group,
    current_scaling_options,
    describe_buffers,
    has_square_blocks,
    is_delayed_quantizer,
    quantizer_format,
    quantizer_fp8_dtype,
)
from .te_interop.tensors import (
    HIGH_PRECISION_DTYPES,
    Codes,
    has_rowwise_copy,
    is_quantized,
    logical_shape,
    nominal_dtype,
    quantizer_of,
    read_codes,
)

_MXFP8_BLOCK = 32
# The fused kernel pads rows and columns to this, what a product asks of FP8 sizes.
_FUSED_MULTIPLE = 16


class Copy(NamedTuple):
    """Codes of an operand ``[*batch, rows, cols]``, possibly stored transposed and padded with zeros."""

    codes: Codes
    transposed: bool

    @property
    def rows(self) -> int:
        """Rows with padding."""
        return self._size(self.transposed)

    @property
    def cols(self) -> int:
        """Columns with padding."""
        return self._size(not self.transposed)

    def _size(self, is_last: bool) -> int:
        """Columns of the matrices as stored, or their rows."""
        shape = self.codes.data.shape
        if self.codes.moved_last_dim:
            return shape[0] if is_last else shape[-1]
        return shape[-1] if is_last else shape[-2]


def trim(copy: Copy, rows: int, cols: int) -> Copy:
    """The copy without its padding: a view, which the product may have to pack."""
    if (
        (copy.rows, copy.cols) == (rows, cols)
        or copy.codes.fmt != "float8"
        or copy.codes.moved_last_dim
    ):
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
    if is_quantized(x):
        rows, cols = logical_shape(x)[-2:]
        # A copy that the tensor lacks is packed from the other one by the product.
        last = Copy(read_codes(x, name, True, _anywhere), False) if along_last else None
        by_rows = Copy(read_codes(x, name, False, _anywhere), False) if along_rows else None
        return Copies(rows, cols, last, by_rows)
    return find_quantize(x, quantizer, along_last, along_rows)(x, quantizer, name)


def find_quantize(
    x: torch.Tensor, quantizer: Quantizer, along_last: bool, along_rows: bool
) -> "Quantize":
    """How operands like `x` are quantized, decided once."""
    emulation = current_emulation()
    key = (
        x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16, along_last, along_rows,
        cast_settings(quantizer), emulation,
    )  # fmt: skip
    quantize_one = _prepared.get(key)
    if quantize_one is None:
        quantize_one = _prepare(x, quantizer, along_last, along_rows, emulation)
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = quantize_one
    return quantize_one


# Quantizes an operand of one signature: (operand, quantizer, name) -> its copies.
Quantize = Callable[[torch.Tensor, Quantizer, str], Copies]

# Cleared when full: ragged workloads see many shapes, few of them again.
_MAX_PREPARED = 4096
_prepared: dict[tuple, Quantize] = {}


def _prepare(
    x: torch.Tensor, quantizer: Quantizer, along_last: bool, along_rows: bool, emulation: Emulation
) -> Quantize:
    return _choose_kind(x, quantizer, emulation)(x, quantizer, along_last, along_rows)


def _choose_kind(x: torch.Tensor, quantizer: Quantizer, emulation: Emulation) -> type:
    """Which class quantizes operands like `x`; chosen here and nowhere else."""
    fmt = quantizer_format(quantizer)
    if fmt == "float8_block":
        return BlockCast
    if _find_kernels(fmt, x.device)[1] and x.numel() > 0 and not emulation.force_reference:
        return FusedCast
    return StoredCast


class CopyLayout(NamedTuple):
    """A copy without its tensors, and what those look like.

    Parameters
    ----------
    data_shape, scale_shape : tuple
        Of uint8 codes and of their scales.
    data_strides, scale_strides : tuple
        Contiguous ones may be None.
    scale_dtype : torch.dtype
    hollow : Codes
        Without tensors.
    transposed : bool
        As in `Copy`.
    """

    data_shape: tuple[int, ...]
    data_strides: Optional[tuple[int, ...]]
    scale_shape: tuple[int, ...]
    scale_strides: Optional[tuple[int, ...]]
    scale_dtype: torch.dtype
    hollow: Codes
    transposed: bool


def describe_copy(
    x: torch.Tensor, quantizer: Quantizer, is_along_last: bool, emulation: Emulation
) -> CopyLayout:
    """The layout of a copy that `quantize_operand` makes of `x`; `x` may be a tensor without data."""
    return _choose_kind(x, quantizer, emulation).describe_copy(x, quantizer, is_along_last)


def _anywhere(device: torch.device) -> bool:  # pylint: disable=unused-argument
    return True


def _flip(copy: Optional[Copy]) -> Optional[Copy]:
    return None if copy is None else Copy(copy.codes, not copy.transposed)


def _is_flipped(x: torch.Tensor) -> bool:
    """Whether an operand is the transposed view of what is stored."""
    return bool(x.stride(-2) == 1 and x.stride(-1) != 1)


def _as_stored(x: torch.Tensor, is_flipped: bool) -> torch.Tensor:
    """The operand as it lies in memory: not transposed, an item that is repeated once."""
    x = x.mT if is_flipped else x
    for dim in range(x.dim() - 2):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


class StoredCast:
    """A `Quantize` through TE's tensors: its own kernels, and the reference quantizers.

    Parameters
    ----------
    x, quantizer
        One of the operands and quantizers that it is for.
    along_last, along_rows : bool
        The copies that are made.
    """

    def __init__(
        self, x: torch.Tensor, quantizer: Quantizer, along_last: bool, along_rows: bool
    ) -> None:
        self._fmt = quantizer_format(quantizer)
        self._is_flipped = _is_flipped(x)
        self._is_native = _find_kernels(self._fmt, x.device)[0]
        self._rowwise, self._columnwise = (
            (along_rows, along_last) if self._is_flipped else (along_last, along_rows)
        )

    def __call__(self, x: torch.Tensor, quantizer: Quantizer, name: str) -> Copies:
        by_last, by_rows = self._quantize(_as_stored(x, self._is_flipped), quantizer, name)
        if self._is_flipped:
            by_last, by_rows = _flip(by_rows), _flip(by_last)
        return Copies(x.shape[-2], x.shape[-1], by_last, by_rows)

    def _quantize(
        self, x: torch.Tensor, quantizer: Quantizer, name: str
    ) -> tuple[Optional[Copy], Optional[Copy]]:
        if self._fmt == "mxfp8":
            *_, rows, cols = x.shape
            padded_rows, padded_cols = _pad_to_blocks(x.shape)[-2:]
            if (padded_rows, padded_cols) != (rows, cols):
                x = torch.nn.functional.pad(x, [0, padded_cols - cols, 0, padded_rows - rows])
        # TE's kernels for one scale per tensor and per 128 x 128 block make no column-wise copy alone.
        with_rowwise = self._rowwise or (
            self._is_native and (self._fmt == "float8" or has_square_blocks(quantizer))
        )
        quantized = quantize(x, copy_quantizer(quantizer, with_rowwise, self._columnwise))
        by_last = by_rows = None
        if self._rowwise:
            by_last = Copy(read_codes(quantized, name, True, _anywhere), False)
        if self._columnwise:
            by_rows = Copy(read_codes(quantized, name, False, _anywhere), False)
        return by_last, by_rows

    @staticmethod
    def describe_copy(x: torch.Tensor, quantizer: Quantizer, is_along_last: bool) -> CopyLayout:
        """See the function of this name."""
        fmt, is_flipped = quantizer_format(quantizer), _is_flipped(x)
        shape = tuple(_as_stored(x, is_flipped).shape)
        rowwise = is_along_last != is_flipped
        buffers = describe_buffers(
            quantizer, _pad_to_blocks(shape) if fmt == "mxfp8" else shape, rowwise, x.device
        )
        hollow = Codes(
            fmt,
            quantizer_fp8_dtype(quantizer),
            None,
            moved_last_dim=buffers.moved_last_dim,
            columnwise=fmt == "mxfp8" and not rowwise,
            square=has_square_blocks(quantizer),
        )
        return CopyLayout(
            buffers.data_shape,
            None,
            buffers.scale_shape,
            None,
            buffers.scale_dtype,
            hollow,
            is_flipped,
        )


def _pad_to_blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """MXFP8 blocks must neither cross items nor end early, and TE quantizes whole blocks only."""
    return (*shape[:-2], round_up(shape[-2], _MXFP8_BLOCK), round_up(shape[-1], _MXFP8_BLOCK))


@lru_cache(maxsize=None)
def _find_kernels(fmt: str, device: torch.device) -> tuple[bool, bool]:
    """Whether TE quantizes to the format on the device, and whether our fused kernel does.

    The fused kernel is for devices where FP8 wants a transposed copy; elsewhere one copy serves both ways.
    """
    info = describe_device(device)
    is_native = find_native_quantizer(fmt, info).engine == "te"
    return is_native, is_native and fmt == "float8" and not supports_non_tn(fmt, info)


class FusedCast:
    """A `Quantize` that writes both copies with one kernel, padded to what the product wants.

    Parameters
    ----------
    x, quantizer
        One of the operands and quantizers that it is for.
    along_last, along_rows : bool
        The copies that are made.
    """

    def __init__(
        self, x: torch.Tensor, quantizer: Quantizer, along_last: bool, along_rows: bool
    ) -> None:
        # Triton takes a second to import, and only a GPU needs it
        from .kernels import channel_last, float8_quantize

        self.rows, self.cols = x.shape[-2:]
        self.is_flipped = _is_flipped(x)
        self.is_delayed = is_delayed_quantizer(quantizer)
        rowwise, transposed = (
            (along_rows, along_last) if self.is_flipped else (along_last, along_rows)
        )
        stored = _as_stored(x, self.is_flipped)
        kernels = float8_quantize
        self.is_packed = False
        if not float8_quantize.can_quantize(stored):
            if channel_last.can_quantize(stored):
                kernels = channel_last
            else:
                self.is_packed = True
                stored = stored.contiguous()
        self.fp8_dtype = quantizer_fp8_dtype(quantizer)
        rule = {} if self.is_delayed else current_scaling_options(quantizer)
        self.cast = kernels.find_cast(
            stored,
            self.fp8_dtype,
            rowwise=rowwise,
            transposed=transposed,
            multiple=_FUSED_MULTIPLE,
            **rule,
        )

    def find_source(self, x: torch.Tensor) -> torch.Tensor:
        """What the kernel reads: by the strides of what is stored, which begins where `x` does, or a packed copy."""
        return _as_stored(x, self.is_flipped).contiguous() if self.is_packed else x

    def __call__(self, x: torch.Tensor, quantizer: Quantizer, name: str) -> Copies:
        # pylint: disable=unused-argument
        x = self.find_source(x)
        if self.is_delayed:
            codes, turned, scale_inv = self.cast.with_scale(x, quantizer.scale, quantizer.amax)
        else:
            codes, turned, scale_inv = self.cast.with_own_scale(x, current_scaling_group(quantizer))
        if self.is_flipped:
            codes, turned = turned, codes
        return Copies(
            self.rows,
            self.cols,
            self._wrap(codes, scale_inv, False),
            self._wrap(turned, scale_inv, True),
        )

    def _wrap(
        self, codes: Optional[torch.Tensor], scale_inv: Optional[torch.Tensor], is_along_rows: bool
    ) -> Optional[Copy]:
        """Codes as a copy: those along the rows are of the transposed matrix, also of a flipped operand."""
        if codes is None:
            return None
        return Copy(Codes("float8", self.fp8_dtype, codes, scale_inv), is_along_rows)

    @staticmethod
    def describe_copy(x: torch.Tensor, quantizer: Quantizer, is_along_last: bool) -> CopyLayout:
        """See the function of this name."""
        is_flipped = _is_flipped(x)
        *batch, rows, cols = _as_stored(x, is_flipped).shape
        sizes = round_up(rows, _FUSED_MULTIPLE), round_up(cols, _FUSED_MULTIPLE)
        if is_along_last == is_flipped:
            sizes = sizes[::-1]
        hollow = Codes("float8", quantizer_fp8_dtype(quantizer), None)
        return CopyLayout(
            (*batch, *sizes), None, (1,), None, torch.float32, hollow, not is_along_last
        )


class BlockCast:
    """A `Quantize` to 128-blocks of each item of its own, whatever its rows: TE's would cross items.

    The same bytes on every device. Parameters as those of `StoredCast`.
    """

    def __init__(
        self, x: torch.Tensor, quantizer: Quantizer, along_last: bool, along_rows: bool
    ) -> None:
        self._is_flipped = _is_flipped(x)
        rowwise, transposed = (
            (along_rows, along_last) if self._is_flipped else (along_last, along_rows)
        )
        self._dtype = quantizer_fp8_dtype(quantizer)
        self._rule = block_scaling_options(quantizer)
        self._layouts = {"rowwise": rowwise, "transposed": transposed}

    def __call__(self, x: torch.Tensor, quantizer: Quantizer, name: str) -> Copies:
        # pylint: disable=unused-argument
        codes, turned = cast_blocks(
            _as_stored(x, self._is_flipped),
            TORCH_DTYPES[self._dtype],
            aligned_scales=True,
            **self._layouts,
            **self._rule,
        )
        if self._is_flipped:
            codes, turned = turned, codes
        return Copies(x.shape[-2], x.shape[-1], self._wrap(codes, False), self._wrap(turned, True))

    def _wrap(self, copy: Optional[tuple], is_along_rows: bool) -> Optional[Copy]:
        """Codes along the rows are of the transposed matrix."""
        if copy is None:
            return None
        square = self._rule["square"]
        codes = Codes("float8_block", self._dtype, *copy, square=square, item_blocks=True)
        return Copy(codes, is_along_rows)

    @staticmethod
    def describe_copy(x: torch.Tensor, quantizer: Quantizer, is_along_last: bool) -> CopyLayout:
        """See the function of this name."""
        is_flipped = _is_flipped(x)
        *batch, rows, cols = _as_stored(x, is_flipped).shape
        if is_along_last == is_flipped:
            rows, cols = cols, rows
        square = has_square_blocks(quantizer)
        shape = (*batch, rows, cols)
        scale_shape, scale_strides = describe_block_scales(shape, square)
        hollow = Codes(
            "float8_block", quantizer_fp8_dtype(quantizer), None, square=square, item_blocks=True
        )
        return CopyLayout(
            shape,
            describe_block_codes(shape),
            scale_shape,
            scale_strides,
            torch.float32,
            hollow,
            not is_along_last,
        )
