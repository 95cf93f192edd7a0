# SPDX-License-Identifier: Apache-2.0
"""Two tensors cast to FP8 with one launch, for sizes at which the host is slower than the device.

The arithmetic is `float8_quantize`'s. Must not import Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

import math
import triton
import triton.language as tl

from .float8_quantize import Cast, cast_tile
from .launcher import Pointer

# Elements of both tensors, at most: for about so many the device needs as long (4 bytes each, read and written) as the
# host for a launch, some microseconds. Above, nothing is gained, and the tiles of
# `float8_quantize.TILES` were tuned for launches of one tensor.
MAX_ELEMENTS = 1 << 22


class CastPair:
    """The launches of two casts as one.

    Parameters
    ----------
    x, y : Cast
        For which `can_pair` is true.
    is_delayed : bool
        Whether their scales are given.
    """

    def __init__(self, x: Cast, y: Cast, is_delayed: bool) -> None:
        (of_x,), (of_y,) = x.launches(is_delayed), y.launches(is_delayed)
        self._launch = of_x.beside(of_y, _cast_pair_kernel)

    def __call__(self, *pointers: Pointer) -> None:
        """The arguments of `Cast.write_to` for `x`, then those for `y`."""
        self._launch(*pointers)


def is_small(x: Cast, y: Cast) -> bool:
    """Whether the host is slower than the device for two tensors."""
    shapes = (next(shape for shape in cast.shapes if shape is not None) for cast in (x, y))
    return sum(map(math.prod, shapes)) <= MAX_ELEMENTS


def can_pair(x: Cast, y: Cast) -> bool:
    """Whether two casts are one launch each, of this kernel."""
    is_ours = type(x) is Cast and type(y) is Cast
    return is_ours and len(x.launches(True)) == 1 and len(y.launches(True)) == 1


@triton.jit(
    do_not_specialize_on_alignment=[
        "x_scale_ptr",
        "x_amax_ptr",
        "x_scale_inv_ptr",
        "y_scale_ptr",
        "y_amax_ptr",
        "y_scale_inv_ptr",
    ]
)
def _cast_pair_kernel(
    x_ptr,
    x_codes_ptr,
    x_transposed_ptr,
    x_scale_ptr,
    x_amax_ptr,
    x_scale_inv_ptr,
    y_ptr,
    y_codes_ptr,
    y_transposed_ptr,
    y_scale_ptr,
    y_amax_ptr,
    y_scale_inv_ptr,
    x_programs,
    x_rows,
    x_cols,
    x_row_stride,
    x_batch_stride,
    x_amax_epsilon,
    X_POWER_OF_2: tl.constexpr,
    X_E5M2: tl.constexpr,
    X_EVEN: tl.constexpr,
    X_MULTIPLE: tl.constexpr,
    X_NUM_PARTIALS: tl.constexpr,
    X_WAITS: tl.constexpr,
    X_BLOCK_ROWS: tl.constexpr,
    X_BLOCK_COLS: tl.constexpr,
    y_programs,
    y_rows,
    y_cols,
    y_row_stride,
    y_batch_stride,
    y_amax_epsilon,
    Y_POWER_OF_2: tl.constexpr,
    Y_E5M2: tl.constexpr,
    Y_EVEN: tl.constexpr,
    Y_MULTIPLE: tl.constexpr,
    Y_NUM_PARTIALS: tl.constexpr,
    Y_WAITS: tl.constexpr,
    Y_BLOCK_ROWS: tl.constexpr,
    Y_BLOCK_COLS: tl.constexpr,
):
    """A program casts one tile: the first ones of `x`, the others of `y`."""
    program = tl.program_id(0)
    if program < x_programs:
        cast_tile(
            program, x_programs, x_ptr, x_codes_ptr, x_transposed_ptr, x_scale_ptr, x_amax_ptr, x_scale_inv_ptr,
            x_rows, x_cols, x_row_stride, x_batch_stride, x_amax_epsilon, X_POWER_OF_2, X_E5M2, X_EVEN,
            X_MULTIPLE, X_NUM_PARTIALS, X_WAITS, X_BLOCK_ROWS, X_BLOCK_COLS,
        )  # fmt: skip
    else:
        cast_tile(
            program - x_programs, y_programs, y_ptr, y_codes_ptr, y_transposed_ptr, y_scale_ptr, y_amax_ptr,
            y_scale_inv_ptr, y_rows, y_cols, y_row_stride, y_batch_stride, y_amax_epsilon, Y_POWER_OF_2, Y_E5M2,
            Y_EVEN, Y_MULTIPLE, Y_NUM_PARTIALS, Y_WAITS, Y_BLOCK_ROWS, Y_BLOCK_COLS,
        )  # fmt: skip
