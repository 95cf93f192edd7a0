# SPDX-License-Identifier: Apache-2.0
"""Per-tensor FP8 quantization: one read of a matrix batch writes its codes, their transpose, or both.

Inputs are CUDA tensors (CPU tensors where Triton interprets), outputs are plain tensors of codes.
Must not import Transformer Engine or a sibling package of `kernels`.

The bytes are those of TE 2.20.2's kernels, whose rules are written down in
`reference/quantizers.py`: FP32 arithmetic, one rounding per operation, saturating round to nearest
even, NaN becomes 0x7F and is passed over by the amax.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl

from .launcher import BoundLaunch, Pointer
from .memory import empty_strided

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORMATS = ("e4m3", "e5m2")
# What may be on the CPU: there Triton runs only where TRITON_INTERPRET was set before its import.
_IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


class Tile(NamedTuple):
    """Elements that one program handles, and its warps."""

    rows: int
    cols: int
    num_warps: int


# By what is written. The fastest of a sweep on an H200, `benchmarks/quantize_kernels.py`.
TILES = {
    "rowwise": Tile(16, 512, 4),
    "transposed": Tile(128, 64, 4),
    "both": Tile(64, 64, 4),
    "amax": Tile(32, 256, 8),
}
# Programs that look for an amax, at most: each leaves the amax of its tiles, and every program of the cast
# reads them all. Memory for them needs no zeroing, which would be a launch of its own.
MAX_PARTIALS = 528


class Plan(NamedTuple):
    """All that a launch needs to know of a tensor's dimensions."""

    num_programs: int
    num_rows: int
    num_cols: int
    row_stride: int
    batch_stride: int
    rowwise_shape: Optional[tuple[int, ...]]
    transposed_shape: Optional[tuple[int, ...]]
    is_even: bool
    multiple: int
    tile: Tile


def can_quantize(x: torch.Tensor) -> bool:
    """Whether the kernels read `x` as it lies in memory; if not, a contiguous copy of it will do.

    Asked for are FP32, BF16 or FP16, at least two dims, a contiguous last dim, and batch dims that
    merge into one stride.

    Parameters
    ----------
    x : torch.Tensor
        Any plain tensor.

    Returns
    -------
    bool
        False also for a tensor that is not on a CUDA device.

    Examples
    --------
    >>> x = torch.empty(4, 64, 32, device="cuda")
    >>> can_quantize(x), can_quantize(x.mT), can_quantize(x.transpose(0, 1))
    (True, False, True)
    """
    return (
        (x.is_cuda or _IS_INTERPRETED)
        and x.dtype in _INPUT_DTYPES
        and x.ndim >= 2
        and (x.numel() == 0 or _read_strides(x.shape, x.stride()) is not None)
    )


def quantize_float8(
    x: torch.Tensor,
    scale: torch.Tensor,
    amax: torch.Tensor,
    fp8_dtype: str,
    *,
    rowwise: bool,
    transposed: bool,
    multiple: int = 16,
) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor], torch.Tensor]:
    """Delayed scaling: ``codes = fp8(float(x) * scale)`` and ``amax = max(amax, max(|x|))``.

    One kernel, which reads `x` once. The host does not wait for it.

    Parameters
    ----------
    x : torch.Tensor
        FP32, BF16 or FP16 ``[*batch, R, C]``; see `can_quantize`.
    scale : torch.Tensor
        float32, one element, any address.
    amax : torch.Tensor
        float32, one element, any address; updated in place. A NaN in `x` is passed over, one that is
        already in `amax` stays. An empty `x` leaves it alone.
    fp8_dtype : {"e4m3", "e5m2"}
        Format of the codes.
    rowwise : bool
        Whether to return the codes in the layout of `x`.
    transposed : bool
        Whether to return the codes of each item's transpose.
    multiple : int, default = 16
        Both matrix dims are padded with zero codes to a multiple of this. A multiple of 16.

    Returns
    -------
    codes : torch.Tensor or None
        uint8 ``[*batch, R_p, C_p]``, contiguous; ``R_p`` and ``C_p`` are R and C rounded up.
    transposed_codes : torch.Tensor or None
        uint8 ``[*batch, C_p, R_p]``, contiguous, with memory of its own.
    scale_inv : torch.Tensor
        float32 ``[1]``, ``1 / scale``.

    Raises
    ------
    TypeError
        If a dtype is not one of those above.
    ValueError
        If the strides of `x`, `fp8_dtype`, `multiple`, `scale` or `amax` do not fit, or nothing is
        to be written.

    Notes
    -----
    Source of the rules: TE 2.20.2, ``common/util/vectorized_pointwise.h`` (``unary_kernel``) and
    ``common/utils.cuh`` (``atomicMaxFloat``, ``reciprocal``).

    Examples
    --------
    >>> x = torch.ones(2, 20, 32, device="cuda")
    >>> one, amax = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    >>> codes, turned, _ = quantize_float8(x, one, amax, "e4m3", rowwise=True, transposed=True)
    >>> codes.shape, turned.shape
    (torch.Size([2, 32, 32]), torch.Size([2, 32, 32]))
    """
    cast = find_cast(x, fp8_dtype, rowwise=rowwise, transposed=transposed, multiple=multiple)
    return cast.with_scale(x, scale, amax)


def quantize_float8_current(
    x: torch.Tensor,
    fp8_dtype: str,
    *,
    rowwise: bool,
    transposed: bool,
    multiple: int = 16,
    amax_epsilon: float = 0.0,
    force_pow_2_scales: bool = False,
    amax_reduction_group: Optional[torch.distributed.ProcessGroup] = None,
) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor], torch.Tensor]:
    """Current scaling: ``scale = fp8_max / max(|x|)``, ``codes = fp8(float(x) * scale)``.

    Two kernels that each read `x` once: one finds the amax, the other computes the scale from it on
    the device and writes the codes. The host does not wait for either.

    Parameters
    ----------
    x, fp8_dtype, rowwise, transposed, multiple
        As in `quantize_float8`.
    amax_epsilon : float, default = 0.0
        Lower bound of the amax, rounded to FP32.
    force_pow_2_scales : bool, default = False
        Whether the scale is rounded down to a power of two.
    amax_reduction_group : ProcessGroup, optional
        The amax is the largest of all ranks of this group. An empty `x` takes no part, as in TE: all
        ranks must have data, or none.

    Returns
    -------
    codes, transposed_codes, scale_inv
        As in `quantize_float8`. An amax of zero or infinity, and an empty `x`, give scale 1.

    Raises
    ------
    TypeError, ValueError
        As in `quantize_float8`.

    Notes
    -----
    Source of the scale's rule: TE 2.20.2, ``compute_scale_from_amax`` in
    ``common/recipe/recipe_common.cuh``, bit for bit `reference.quantizers.scale_from_amax`.

    Examples
    --------
    >>> x = torch.full((2, 16, 32), 3.5, device="cuda")
    >>> codes, _, scale_inv = quantize_float8_current(x, "e4m3", rowwise=True, transposed=False)
    >>> scale_inv.item()  # 3.5 / 448
    0.0078125
    """
    cast = find_cast(
        x,
        fp8_dtype,
        rowwise=rowwise,
        transposed=transposed,
        multiple=multiple,
        amax_epsilon=amax_epsilon,
        force_pow_2_scales=force_pow_2_scales,
    )
    return cast.with_own_scale(x, amax_reduction_group)


def find_cast(
    x: torch.Tensor,
    fp8_dtype: str,
    *,
    rowwise: bool,
    transposed: bool,
    multiple: int = 16,
    amax_epsilon: float = 0.0,
    force_pow_2_scales: bool = False,
) -> "Cast":
    """The `Cast` of all tensors like `x`; parameters as in `quantize_float8_current`."""
    return _make_cast(
        x.shape,
        x.stride(),
        x.dtype,
        x.get_device(),
        x.data_ptr() % 16,
        fp8_dtype,
        (rowwise, transposed, multiple),
        (amax_epsilon, force_pow_2_scales),
    )


class Cast:
    """What is decided once for tensors of one description, and the launches that each of them takes.

    Made by `find_cast`, for tensors of one shape, stride, dtype, device and alignment by 16.

    Parameters
    ----------
    shape, strides, dtype, device_index
        Of the tensors.
    fp8_dtype : {"e4m3", "e5m2"}
    layouts : tuple
        `rowwise`, `transposed` and `multiple` as in `quantize_float8`.
    scale_rule : tuple
        `amax_epsilon` and `force_pow_2_scales` as in `quantize_float8_current`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: torch.dtype,
        device_index: int,
        fp8_dtype: str,
        layouts: tuple[bool, bool, int],
        scale_rule: tuple[float, bool],
    ) -> None:
        if fp8_dtype not in _FORMATS:
            raise ValueError(f'fp8_dtype must be "e4m3" or "e5m2" and came as {fp8_dtype!r}')
        rowwise, transposed, multiple = layouts
        description = (shape, strides, dtype, device_index >= 0)
        both = _make_plan(*description, rowwise, transposed, multiple)
        self._device_index = device_index
        self._is_empty = not both.num_programs
        self._codes = _describe(both.rowwise_shape)
        self._transposed = _describe(both.transposed_shape)
        # One kernel for both layouts of FP32 gives a wrong transpose with Triton 3.6 on an H200: a quarter of
        # the codes at wrong places, the same ones at each run of the tile in use. The row-wise codes are right,
        # racecheck finds no hazard, and BF16 and FP16, of which 16-bit values are turned, come out right; the
        # cause is probably the one that channel_last.py (_cast_line) avoids. tests/gpu/test_kernel_float8_quantize.py
        # compares every byte.
        plans = [both]
        if rowwise and transposed and dtype == torch.float32:
            plans = [
                _make_plan(*description, True, False, multiple),
                _make_plan(*description, False, True, multiple),
            ]
        is_e5m2 = fp8_dtype == "e5m2"
        self.search = _NO_SEARCH if self._is_empty else _plan_search(shape, strides)
        self._find = _bind_search(self.search)
        self._num_partials = self.search.num_programs
        self._casts = [
            tuple(
                (plan, _bind_cast(plan, scale_rule, is_e5m2, num_partials))
                for plan in plans
                if not self._is_empty
            )
            for num_partials in (1, self._num_partials)
        ]

    def with_scale(
        self, x: torch.Tensor, scale: torch.Tensor, amax: torch.Tensor
    ) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor], torch.Tensor]:
        """As `quantize_float8`."""
        self.check_state(x, scale, amax)
        if self.is_elsewhere():
            with torch.cuda.device(self._device_index):
                return self.with_scale(x, scale, amax)
        return self._write(x, scale, amax)

    def check_state(self, x: torch.Tensor, scale: torch.Tensor, amax: torch.Tensor) -> None:
        """Raises a `ValueError` unless they are what `with_scale` takes."""
        for name, state in (("scale", scale), ("amax", amax)):
            if (
                state.get_device() != self._device_index
                or state.dtype is not torch.float32
                or state.numel() != 1
            ):
                raise ValueError(
                    f"`{name}` must be one float32 on {x.device}, where x is, and came as {state.dtype}, "
                    f"shape {tuple(state.shape)}, device {state.device}"
                )

    def with_own_scale(
        self,
        x: torch.Tensor,
        amax_reduction_group: Optional[torch.distributed.ProcessGroup] = None,
    ) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor], torch.Tensor]:
        """As `quantize_float8_current`."""
        if self.is_elsewhere():
            with torch.cuda.device(self._device_index):
                return self.with_own_scale(x, amax_reduction_group)
        amaxes = None
        if not self._is_empty:
            amaxes = self.allocate_amaxes()
            self.find_amaxes_to(x, amaxes)
            if amax_reduction_group is not None:
                amax = amaxes.amax(0, keepdim=True)
                torch.distributed.all_reduce(
                    amax, op=torch.distributed.ReduceOp.MAX, group=amax_reduction_group
                )
                amaxes.copy_(amax)
        return self._write(x, None, amaxes)

    def is_elsewhere(self) -> bool:
        """Whether another device than that of the tensors is current."""
        return self._device_index >= 0 and torch._C._cuda_getDevice() != self._device_index

    def allocate_amaxes(self) -> torch.Tensor:
        """Memory for the largest magnitudes of parts of a tensor."""
        return empty_strided((self._num_partials,), (1,), torch.float32, self._device_index)

    def _write(
        self,
        x: torch.Tensor,
        scale: Optional[torch.Tensor],
        amax: Optional[torch.Tensor],
    ) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor], torch.Tensor]:
        """Allocates the outputs and launches the cast; without a `scale` it is computed from `amax`."""
        device_index = self._device_index
        codes = transposed = None
        if self._codes is not None:
            codes = empty_strided(*self._codes, torch.uint8, device_index)
        if self._transposed is not None:
            transposed = empty_strided(*self._transposed, torch.uint8, device_index)
        if self._is_empty:
            inverse = (
                torch.ones(1, device=x.device) if scale is None else scale.reshape(1).reciprocal()
            )
            return codes, transposed, inverse
        scale_inv = empty_strided((1,), (1,), torch.float32, device_index)
        self.write_to(x, codes, transposed, scale, amax, scale_inv)
        return codes, transposed, scale_inv

    @property
    def shapes(self) -> tuple[Optional[tuple[int, ...]], Optional[tuple[int, ...]]]:
        """Of the codes and of the transposed ones; None of those that are not made."""
        return tuple(None if x is None else tuple(x[0]) for x in (self._codes, self._transposed))

    @property
    def num_amaxes(self) -> int:
        """Of parts of a tensor, as `find_amaxes_to` leaves them."""
        return self._num_partials

    def launches(self, is_delayed: bool) -> tuple[BoundLaunch, ...]:
        """What `write_to` launches, with a scale or without."""
        return tuple(launch for _, launch in self._casts[0 if is_delayed else 1])

    def find_amaxes_to(self, x: torch.Tensor, amaxes: Pointer) -> None:
        """Writes the largest magnitudes of parts of a tensor, `num_amaxes` floats."""
        self._find(x, amaxes, None, None)

    def write_to(
        self,
        x: torch.Tensor,
        codes: Pointer,
        transposed: Pointer,
        scale: Optional[torch.Tensor],
        amax: Pointer,
        scale_inv: Pointer,
    ) -> None:
        """Launches the cast; without a `scale` it is computed from `amax`, which `find_amaxes_to` left."""
        for plan, launch in self._casts[0 if scale is not None else 1]:
            launch(
                x,
                None if plan.rowwise_shape is None else codes,
                None if plan.transposed_shape is None else transposed,
                scale,
                amax,
                scale_inv,
            )


@lru_cache(maxsize=4096)
def _make_cast(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device_index: int,
    misalignment: int,  # Triton compiles for it.  pylint: disable=unused-argument
    fp8_dtype: str,
    layouts: tuple[bool, bool, int],
    scale_rule: tuple[float, bool],
) -> Cast:
    return Cast(shape, strides, dtype, device_index, fp8_dtype, layouts, scale_rule)


def _describe(shape: Optional[tuple[int, ...]]) -> Optional[tuple[tuple, tuple]]:
    """Shape and strides of a contiguous tensor."""
    return None if shape is None else (shape, torch.empty(shape, device="meta").stride())


class Search(NamedTuple):
    """How the amaxes of a tensor are found."""

    num_programs: int
    num_warps: int
    constants: tuple


_NO_SEARCH = Search(0, 0, (0, 0, 0, 0, 0, 0, True, True, 1, 1))


def _plan_search(shape: tuple[int, ...], strides: tuple[int, ...]) -> Search:
    plan = _make_amax_plan(shape, strides)
    tile = plan.tile
    num_programs = min(plan.num_programs, MAX_PARTIALS)
    # One item, one column of whole tiles, no gaps between rows.
    is_flat = plan.is_even and tile.cols == plan.num_cols == plan.row_stride
    constants = (
        num_programs, plan.num_programs, plan.num_rows, plan.num_cols, plan.row_stride,
        plan.batch_stride, is_flat, plan.is_even, tile.rows, tile.cols,
    )  # fmt: skip
    return Search(num_programs, tile.num_warps, constants)


def _bind_search(x: Search, y: Search = _NO_SEARCH) -> BoundLaunch:
    """The launch that finds the amaxes of one tensor, or of two."""
    return BoundLaunch(
        _amax_kernel,
        x.num_programs + y.num_programs,
        max(x.num_warps, y.num_warps),
        (*x.constants, *y.constants),
    )


class AmaxPair:
    """Finds the amaxes of two tensors with one launch, for tensors of two casts."""

    def __init__(self, x: Cast, y: Cast) -> None:
        self._launch = _bind_search(x.search, y.search)

    def __call__(
        self, x: torch.Tensor, x_amaxes: Pointer, y: torch.Tensor, y_amaxes: Pointer
    ) -> None:
        """As `Cast.find_amaxes_to` for each of them."""
        self._launch(x, x_amaxes, y, y_amaxes)


def _bind_cast(
    plan: Plan, scale_rule: tuple[float, bool], is_e5m2: bool, num_partials: int
) -> BoundLaunch:
    tile = plan.tile
    constants = (
        plan.num_rows, plan.num_cols, plan.row_stride, plan.batch_stride, *scale_rule, is_e5m2,
        plan.is_even, plan.multiple, num_partials, tile.rows, tile.cols,
    )  # fmt: skip
    return BoundLaunch(_cast_kernel, plan.num_programs, tile.num_warps, constants)


@lru_cache(maxsize=4096)
def _make_plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    is_cuda: bool,
    rowwise: bool,
    transposed: bool,
    multiple: int,
    tile: Optional[Tile] = None,
) -> Plan:
    """Checks a tensor's description and prepares its launches; `tile` overrules the table."""
    came = f"{dtype}, shape {tuple(shape)}, stride {tuple(strides)}"
    if dtype not in _INPUT_DTYPES:
        raise TypeError(
            f"the FP8 kernel reads float32, bfloat16 or float16 and x came as {came}; convert it first"
        )
    if not (is_cuda or _IS_INTERPRETED):
        raise ValueError(f"the FP8 kernel reads CUDA tensors and x came as {came} on the CPU")
    if len(shape) < 2:
        raise ValueError(f"the FP8 kernel needs a matrix, [*batch, R, C], and x came as {came}")
    if not (rowwise or transposed):
        raise ValueError("neither rowwise nor transposed codes were asked for; ask for one of them")
    if multiple < 16 or multiple % 16:
        raise ValueError(f"codes are padded to a multiple of 16, and multiple came as {multiple}")
    rows, cols = shape[-2:]
    padded_rows, padded_cols = (-(-size // multiple) * multiple for size in (rows, cols))
    rowwise_shape = (*shape[:-2], padded_rows, padded_cols) if rowwise else None
    transposed_shape = (*shape[:-2], padded_cols, padded_rows) if transposed else None
    name = "both" if rowwise and transposed else "rowwise" if rowwise else "transposed"
    plan = Plan(
        num_programs=0,
        num_rows=rows,
        num_cols=cols,
        row_stride=0,
        batch_stride=0,
        rowwise_shape=rowwise_shape,
        transposed_shape=transposed_shape,
        is_even=True,
        multiple=multiple,
        tile=TILES[name] if tile is None else tile,
    )
    if math.prod(shape) == 0:
        return plan
    read = _read_strides(shape, strides)
    if read is None:
        raise ValueError(
            "the FP8 kernel reads a contiguous last dim and batch dims that merge into one stride, "
            f"and x came as {came}; pass x.contiguous()"
        )
    row_stride, batch_stride = read
    num_items = math.prod(shape[:-2])
    may_fold = not transposed and padded_rows == rows
    return _tile_plan(plan, num_items, row_stride, batch_stride, may_fold)


@lru_cache(maxsize=4096)
def _make_amax_plan(
    shape: tuple[int, ...], strides: tuple[int, ...], tile: Optional[Tile] = None
) -> Plan:
    """The launch that finds the amax of a tensor that `_make_plan` has accepted."""
    row_stride, batch_stride = _read_strides(shape, strides)
    num_items, rows, cols = math.prod(shape[:-2]), shape[-2], shape[-1]
    tile = TILES["amax"] if tile is None else tile
    is_contiguous = row_stride == cols and (num_items == 1 or batch_stride == rows * cols)
    num_elements = num_items * rows * cols
    if is_contiguous and num_elements % (tile.rows * tile.cols) == 0:
        num_items, rows, cols, row_stride = 1, num_elements // tile.cols, tile.cols, tile.cols
    plan = Plan(
        num_programs=0,
        num_rows=rows,
        num_cols=cols,
        row_stride=0,
        batch_stride=0,
        rowwise_shape=None,
        transposed_shape=None,
        is_even=True,
        multiple=1,
        tile=tile,
    )
    return _tile_plan(plan, num_items, row_stride, batch_stride, may_fold=True)


def _tile_plan(
    plan: Plan, num_items: int, row_stride: int, batch_stride: int, may_fold: bool
) -> Plan:
    """Completes a plan: items folded into rows if possible, a tile no larger than the matrix."""
    rows, cols = plan.num_rows, plan.num_cols
    if may_fold and (num_items == 1 or batch_stride == rows * row_stride):
        rows, num_items, batch_stride = num_items * rows, 1, 0
    padded_rows, padded_cols = (-(-size // plan.multiple) * plan.multiple for size in (rows, cols))
    # What one dim does not need goes to the other.
    tile = plan.tile
    most_rows, most_cols = (triton.next_power_of_2(size) for size in (padded_rows, padded_cols))
    tile_cols = min(tile.cols, most_cols)
    tile_rows = min(tile.rows * tile.cols // tile_cols, most_rows)
    tile_cols = min(tile.rows * tile.cols // tile_rows, most_cols)
    return plan._replace(
        num_programs=num_items * -(-padded_rows // tile_rows) * -(-padded_cols // tile_cols),
        num_rows=rows,
        row_stride=row_stride,
        batch_stride=batch_stride,
        is_even=rows % tile_rows == 0
        and cols % tile_cols == 0
        and (rows, cols) == (padded_rows, padded_cols),
        tile=tile._replace(rows=tile_rows, cols=tile_cols),
    )


def _read_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> Optional[tuple[int, int]]:
    """Row stride and the one batch stride of a tensor that is not empty; None if there is no such."""
    if shape[-1] != 1 and strides[-1] != 1:
        return None
    batch_stride, reached = 0, None
    for size, stride in zip(reversed(shape[:-2]), reversed(strides[:-2])):
        if size == 1:
            continue
        if reached is None:
            batch_stride, reached = stride, size * stride
        elif stride == reached:
            reached *= size
        else:
            return None
    return (strides[-2] if shape[-2] > 1 else shape[-1]), batch_stride


@triton.jit
def _locate_tile(
    program,
    num_rows,
    num_cols,
    MULTIPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Item, first row and first column of a program, columns fastest."""
    padded_rows = tl.cdiv(num_rows, MULTIPLE) * MULTIPLE
    padded_cols = tl.cdiv(num_cols, MULTIPLE) * MULTIPLE
    tiles_per_row = tl.cdiv(padded_cols, BLOCK_COLS)
    tiles_per_item = tl.cdiv(padded_rows, BLOCK_ROWS) * tiles_per_row
    item = program // tiles_per_item
    tile = program % tiles_per_item
    first_row = (tile // tiles_per_row) * BLOCK_ROWS
    first_col = (tile % tiles_per_row) * BLOCK_COLS
    return item.to(tl.int64), first_row, first_col


@triton.jit
def _load(
    x_ptr,
    rows,
    cols,
    num_rows,
    num_cols,
    row_stride,
    EVEN: tl.constexpr,
):
    """One tile; zeros beyond the matrix."""
    pointers = x_ptr + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    if EVEN:
        return tl.load(pointers)
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _raise_amax(amax_ptr, known_amax, amax):
    """``*amax_ptr = max(*amax_ptr, amax)`` on the bits, as TE's atomicMaxFloat.

    They order floats that are not negative, and a NaN that is there is larger than all. `known_amax`
    was read when the program began; it spares most programs the queue for one address.
    """
    # From zero, because the maximum of nothing but NaN is NaN.
    bits = tl.maximum(amax, 0.0).to(tl.int32, bitcast=True)
    is_larger = bits > known_amax.to(tl.int32, bitcast=True)
    tl.atomic_max(amax_ptr.to(tl.pointer_type(tl.int32)), bits, mask=is_larger, sem="relaxed")


@triton.jit
def _load_amax(amaxes_ptr, NUM_PARTIALS: tl.constexpr):
    """The largest of the amaxes that `_amax_kernel` left."""
    if NUM_PARTIALS == 1:
        return tl.load(amaxes_ptr)
    parts = tl.arange(0, triton.next_power_of_2(NUM_PARTIALS))
    return tl.max(tl.load(amaxes_ptr + parts, mask=parts < NUM_PARTIALS, other=0.0))


@triton.jit
def _compute_scale(amax, amax_epsilon, FP8_MAX: tl.constexpr, POWER_OF_2: tl.constexpr):
    """`reference.quantizers.scale_from_amax`, operation by operation."""
    amax = tl.where(amax < amax_epsilon, amax_epsilon, amax)
    scale = tl.div_rn(tl.full((), FP8_MAX, tl.float32), amax)
    scale = tl.where(scale == float("inf"), 3.4028234663852886e38, scale)
    if POWER_OF_2:
        scale = (scale.to(tl.int32, bitcast=True) & -8388608).to(tl.float32, bitcast=True)
    is_usable = (amax > 0.0) & (amax < float("inf"))
    return tl.where(is_usable, scale, 1.0)


@triton.jit
def _encode(values, scale, E5M2: tl.constexpr):
    """FP8 codes as bytes: `cvt.rn.satfinite` on the device."""
    if E5M2:
        return (values * scale).to(tl.float8e5).to(tl.uint8, bitcast=True)
    return (values * scale).to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _store(ptr, codes, rows, cols, num_rows, num_cols, EVEN: tl.constexpr):
    """One tile of a contiguous matrix, as far as it reaches."""
    pointers = ptr + rows.to(tl.int64)[:, None] * num_cols + cols[None, :]
    if EVEN:
        tl.store(pointers, codes)
    else:
        tl.store(pointers, codes, mask=(rows < num_rows)[:, None] & (cols < num_cols)[None, :])


@triton.jit
def _search_amax(
    x_ptr,
    amaxes_ptr,
    program,
    num_programs,
    num_tiles,
    num_rows,
    num_cols,
    row_stride,
    batch_stride,
    FLAT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Leaves the amax of every tile whose number is the program's, modulo the number of programs."""
    # From zero, because the maximum of nothing but NaN is NaN.
    amaxes = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    tile = program
    while tile < num_tiles:
        if FLAT:
            # No divisions: they would hold back the loads of a loop as short as this.
            rows = tl.arange(0, BLOCK_ROWS)[:, None]
            pointers = x_ptr + tile.to(tl.int64) * (BLOCK_ROWS * BLOCK_COLS)
            x = tl.load(pointers + rows * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :])
        else:
            item, first_row, first_col = _locate_tile(
                tile, num_rows, num_cols, 1, BLOCK_ROWS, BLOCK_COLS
            )
            rows = first_row + tl.arange(0, BLOCK_ROWS)
            cols = first_col + tl.arange(0, BLOCK_COLS)
            x = _load(x_ptr + item * batch_stride, rows, cols, num_rows, num_cols, row_stride, EVEN)
        amaxes = tl.maximum(amaxes, tl.abs(x.to(tl.float32)))
        tile += num_programs
    tl.store(amaxes_ptr + program, tl.max(amaxes))


@triton.jit
def _amax_kernel(
    x_ptr,
    x_amaxes_ptr,
    y_ptr,
    y_amaxes_ptr,
    x_programs,
    x_tiles,
    x_rows,
    x_cols,
    x_row_stride,
    x_batch_stride,
    X_FLAT: tl.constexpr,
    X_EVEN: tl.constexpr,
    X_BLOCK_ROWS: tl.constexpr,
    X_BLOCK_COLS: tl.constexpr,
    y_programs,
    y_tiles,
    y_rows,
    y_cols,
    y_row_stride,
    y_batch_stride,
    Y_FLAT: tl.constexpr,
    Y_EVEN: tl.constexpr,
    Y_BLOCK_ROWS: tl.constexpr,
    Y_BLOCK_COLS: tl.constexpr,
):
    """Amaxes of parts of one tensor, or of two: the first programs are for `x`, the others for `y`."""
    program = tl.program_id(0)
    if y_ptr is None or program < x_programs:
        _search_amax(
            x_ptr, x_amaxes_ptr, program, x_programs, x_tiles, x_rows, x_cols, x_row_stride,
            x_batch_stride, X_FLAT, X_EVEN, X_BLOCK_ROWS, X_BLOCK_COLS,
        )  # fmt: skip
    else:
        _search_amax(
            y_ptr, y_amaxes_ptr, program - x_programs, y_programs, y_tiles, y_rows, y_cols, y_row_stride,
            y_batch_stride, Y_FLAT, Y_EVEN, Y_BLOCK_ROWS, Y_BLOCK_COLS,
        )  # fmt: skip


@triton.jit
def _cast_tile(
    program,
    num_programs,
    x_ptr,
    codes_ptr,
    transposed_ptr,
    scale_ptr,
    amax_ptr,
    scale_inv_ptr,
    num_rows,
    num_cols,
    row_stride,
    batch_stride,
    amax_epsilon,
    POWER_OF_2: tl.constexpr,
    E5M2: tl.constexpr,
    EVEN: tl.constexpr,
    MULTIPLE: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Casts the tile of a program. Without `scale_ptr` the scale comes from amaxes, which are only read."""
    FP8_MAX: tl.constexpr = 57344.0 if E5M2 else 448.0
    if scale_ptr is None:
        # The end of x was read last and may still be in the L2 cache.
        program = num_programs - 1 - program
    item, first_row, first_col = _locate_tile(
        program, num_rows, num_cols, MULTIPLE, BLOCK_ROWS, BLOCK_COLS
    )
    padded_rows = tl.cdiv(num_rows, MULTIPLE).to(tl.int64) * MULTIPLE
    padded_cols = tl.cdiv(num_cols, MULTIPLE).to(tl.int64) * MULTIPLE
    x_ptr += item * batch_stride
    cols = first_col + tl.arange(0, BLOCK_COLS)
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    x = _load(x_ptr, rows, cols, num_rows, num_cols, row_stride, EVEN)

    # After the load, which then is under way while the scale is computed.
    if scale_ptr is None:
        amax = _load_amax(amax_ptr, NUM_PARTIALS)
        scale = _compute_scale(amax, amax_epsilon, FP8_MAX, POWER_OF_2)
    else:
        amax = tl.load(amax_ptr)
        scale = tl.load(scale_ptr)
    scale_inv = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
    tl.store(scale_inv_ptr, scale_inv, mask=program == 0)

    x = x.to(tl.float32)
    codes = _encode(x, scale, E5M2)
    if not EVEN:
        # The product of a padding zero and the scale need not be +0.
        is_inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
        codes = tl.where(is_inside, codes, 0).to(tl.uint8)
    offset = item * padded_rows * padded_cols
    if codes_ptr is not None:
        _store(codes_ptr + offset, codes, rows, cols, padded_rows, padded_cols, EVEN)
    if transposed_ptr is not None:
        _store(transposed_ptr + offset, tl.trans(codes), cols, rows, padded_cols, padded_rows, EVEN)
    if scale_ptr is not None:
        _raise_amax(amax_ptr, amax, tl.max(tl.abs(x)))


# The scalars of a recipe lie side by side in one tensor, so their alignment says nothing.
@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "amax_ptr", "scale_inv_ptr"])
def _cast_kernel(
    x_ptr,
    codes_ptr,
    transposed_ptr,
    scale_ptr,
    amax_ptr,
    scale_inv_ptr,
    num_rows,
    num_cols,
    row_stride,
    batch_stride,
    amax_epsilon,
    POWER_OF_2: tl.constexpr,
    E5M2: tl.constexpr,
    EVEN: tl.constexpr,
    MULTIPLE: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program casts one tile."""
    _cast_tile(
        tl.program_id(0), tl.num_programs(0), x_ptr, codes_ptr, transposed_ptr, scale_ptr, amax_ptr,
        scale_inv_ptr, num_rows, num_cols, row_stride, batch_stride, amax_epsilon, POWER_OF_2, E5M2, EVEN,
        MULTIPLE, NUM_PARTIALS, BLOCK_ROWS, BLOCK_COLS,
    )  # fmt: skip
