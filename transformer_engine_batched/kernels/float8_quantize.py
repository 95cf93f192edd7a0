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
from typing import Optional

import torch
import triton
import triton.language as tl

from .float8_codes import (
    FORMATS,
    INPUT_DTYPES,
    IS_INTERPRETED,
    compute_scale,
    encode,
    load_amax,
    raise_amax,
)
from .launcher import BoundLaunch, Pointer
from .matrix_tiles import (
    TILES,
    Plan,
    Tile,
    load_tile,
    locate_tile,
    read_strides,
    store_tile,
    tile_plan,
)
from .memory import empty_strided
from .tensor_amax import NO_SEARCH, bind_search, plan_search


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
        (x.is_cuda or IS_INTERPRETED)
        and x.dtype in INPUT_DTYPES
        and x.ndim >= 2
        and (x.numel() == 0 or read_strides(x.shape, x.stride()) is not None)
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
        if fp8_dtype not in FORMATS:
            raise ValueError(f'fp8_dtype must be "e4m3" or "e5m2" and came as {fp8_dtype!r}')
        rowwise, transposed, multiple = layouts
        description = (shape, strides, dtype, device_index >= 0)
        both = _make_plan(*description, rowwise, transposed, multiple)
        self._device_index = device_index
        self._is_empty = not both.num_programs
        self._codes = describe_codes(both.rowwise_shape)
        self._transposed = describe_codes(both.transposed_shape)
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
        self.search = NO_SEARCH if self._is_empty else plan_search(shape, strides, device_index)
        self._find = bind_search(self.search)
        self._num_partials = self.search.num_programs
        self._casts = [
            tuple(
                (plan, _bind_cast(plan, scale_rule, is_e5m2, num_partials, waits))
                for plan in plans
                if not self._is_empty
            )
            for num_partials, waits in ((1, False), (self._num_partials, self.search.is_awaited))
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


def describe_codes(shape: Optional[tuple[int, ...]]) -> Optional[tuple[tuple, tuple]]:
    """Shape and strides of a contiguous tensor."""
    return None if shape is None else (shape, torch.empty(shape, device="meta").stride())


def _bind_cast(
    plan: Plan, scale_rule: tuple[float, bool], is_e5m2: bool, num_partials: int, waits: bool
) -> BoundLaunch:
    tile = plan.tile
    constants = (
        plan.num_rows, plan.num_cols, plan.row_stride, plan.batch_stride, *scale_rule, is_e5m2,
        plan.is_even, plan.multiple, num_partials, waits, tile.rows, tile.cols,
    )  # fmt: skip
    return BoundLaunch(_cast_kernel, plan.num_programs, tile.num_warps, constants, waits=waits)


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
    if dtype not in INPUT_DTYPES:
        raise TypeError(
            f"the FP8 kernel reads float32, bfloat16 or float16 and x came as {came}; convert it first"
        )
    if not (is_cuda or IS_INTERPRETED):
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
    read = read_strides(shape, strides)
    if read is None:
        raise ValueError(
            "the FP8 kernel reads a contiguous last dim and batch dims that merge into one stride, "
            f"and x came as {came}; pass x.contiguous()"
        )
    row_stride, batch_stride = read
    num_items = math.prod(shape[:-2])
    may_fold = not transposed and padded_rows == rows
    return tile_plan(plan, num_items, row_stride, batch_stride, may_fold)


@triton.jit
def cast_tile(
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
    WAITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Casts the tile of a program. Without `scale_ptr` the scale comes from amaxes, which are only read."""
    FP8_MAX: tl.constexpr = 57344.0 if E5M2 else 448.0
    if scale_ptr is None:
        # The end of x was read last and may still be in the L2 cache.
        program = num_programs - 1 - program
    item, first_row, first_col = locate_tile(
        program, num_rows, num_cols, MULTIPLE, BLOCK_ROWS, BLOCK_COLS
    )
    padded_rows = tl.cdiv(num_rows, MULTIPLE).to(tl.int64) * MULTIPLE
    padded_cols = tl.cdiv(num_cols, MULTIPLE).to(tl.int64) * MULTIPLE
    x_ptr += item * batch_stride
    cols = first_col + tl.arange(0, BLOCK_COLS)
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    x = load_tile(x_ptr, rows, cols, num_rows, num_cols, row_stride, EVEN)

    # After the load, which then is under way while the scale is computed.
    if scale_ptr is None:
        amax = load_amax(amax_ptr, NUM_PARTIALS, WAITS)
        scale = compute_scale(amax, amax_epsilon, FP8_MAX, POWER_OF_2)
    else:
        amax = tl.load(amax_ptr)
        scale = tl.load(scale_ptr)
    scale_inv = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
    tl.store(scale_inv_ptr, scale_inv, mask=program == 0)

    x = x.to(tl.float32)
    codes = encode(x, scale, E5M2)
    if not EVEN:
        # The product of a padding zero and the scale need not be +0.
        is_inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
        codes = tl.where(is_inside, codes, 0).to(tl.uint8)
    offset = item * padded_rows * padded_cols
    if codes_ptr is not None:
        store_tile(codes_ptr + offset, codes, rows, cols, padded_rows, padded_cols, EVEN)
    if transposed_ptr is not None:
        store_tile(
            transposed_ptr + offset, tl.trans(codes), cols, rows, padded_cols, padded_rows, EVEN
        )
    if scale_ptr is not None:
        raise_amax(amax_ptr, amax, tl.max(tl.abs(x)))


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
    WAITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program casts one tile."""
    cast_tile(
        tl.program_id(0), tl.num_programs(0), x_ptr, codes_ptr, transposed_ptr, scale_ptr, amax_ptr,
        scale_inv_ptr, num_rows, num_cols, row_stride, batch_stride, amax_epsilon, POWER_OF_2, E5M2, EVEN,
        MULTIPLE, NUM_PARTIALS, WAITS, BLOCK_ROWS, BLOCK_COLS,
    )  # fmt: skip
