# SPDX-License-Identifier: Apache-2.0
"""Casts to FP8 with one scale per 128 elements of a row, or per 128 x 128 elements.

Input: torch tensors. Output: FP8 tensors and their FP32 inverse scales. Device and support table decide
between the fused kernel and the reference, which write the same bytes. Must not know of products.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch

from .emulation import current_emulation
from .operands import round_up
from .plan import current_sm_count, describe_device
from .reference import blockwise as reference
from .support import find_block_caster

_FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SCALE_LAYOUTS = ("k_major", "m_major")
# Floats: a row of scales starts at a multiple of 16 bytes, as bulk copies and cuBLAS want it.
_PITCH_MULTIPLE = 16  # bytes
_SCALE_MULTIPLE = 4

# DeepSeek's and DeepGEMM's casts, and with them FlashInfer's, clamp the amax here, so that a block of zeros
# has a finite scale.
DEFAULT_EPSILON = 1e-4


class CastTensor(NamedTuple):
    """FP8 values and the factors that undo their scaling: ``x ~ values * scale_inv``, block by block."""

    values: torch.Tensor
    scale_inv: torch.Tensor


def per_token_cast_to_fp8(
    x: torch.Tensor,
    *,
    epsilon: float = DEFAULT_EPSILON,
    power_of_two: bool = False,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_layout: str = "k_major",
    with_transpose: bool = False,
) -> CastTensor | tuple[CastTensor, CastTensor]:
    """FP8 with one scale for each 128 elements of a row: ``values = fp8(x / scale_inv)``.

    ``scale_inv = 1 / (fp8_max / max(amax, epsilon))``, with amax the largest magnitude of the block. What
    activations and gradients take, and the name under which DeepGEMM and FlashInfer have it.

    Parameters
    ----------
    x : torch.Tensor
        FP32, FP16 or BF16 ``[*batch, M, K]``, any sizes and strides; K need be no multiple of 128.
    epsilon : float, default = 1e-4
        Lower bound of the amax, so that a block of zeros has a finite scale. Blocks below it lose range:
        for gradients, which may be tiny, pass 0. With 0, a block of zeros has scale 1 (TE's rule).
    power_of_two : bool, default = False
        Round scales to powers of two (values lose up to one binade of range, products no accuracy in
        scaling): DeepGEMM's ``use_ue8m0``, TE's ``force_pow_2_scales``.
    fp8_dtype : torch.dtype
        ``torch.float8_e4m3fn`` (default) or ``torch.float8_e5m2``.
    scale_layout : {"k_major", "m_major"}
        Strides of the scales, whose shape is the same: contiguous, or with M contiguous and steps of K
        that are multiples of 16 bytes (what cuBLAS's kernels and DeepGEMM read).
    with_transpose : bool, default = False
        Also cast ``x.mT``, whose blocks run along M: from the same read of `x`, what a weight gradient
        needs.

    Returns
    -------
    CastTensor
        ``(values, scale_inv)``: values ``[*batch, M, K]`` of `fp8_dtype`, whose rows lie a multiple of 16
        bytes apart; scale_inv FP32 ``[*batch, M, ceil(K / 128)]``. With `with_transpose` a pair,
        that of `x` and that of ``x.mT``: values ``[*batch, K, M]``, scale_inv ``[*batch, K, ceil(M / 128)]``.

    Raises
    ------
    TypeError, ValueError
        Another dtype, fewer than two dims, an epsilon that is negative or not finite.
    UnsupportedError
        On a CUDA device without FP8 (below compute capability 8.9), outside of `emulate()`.

    Notes
    -----
    A NaN becomes NaN and does not count in the amax; an infinity saturates, and its block has scale 1.
    The bytes are those of TE's Float8BlockQuantizer of the flattened matrix. No gradient flows.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> values, scale_inv = teb.per_token_cast_to_fp8(torch.full((4, 256), 3.5))
    >>> values.dtype, tuple(scale_inv.shape), scale_inv[0, 0].item()
    (torch.float8_e4m3fn, (4, 2), 0.0078125)
    """
    if scale_layout not in _SCALE_LAYOUTS:
        raise ValueError(f"scale_layout={scale_layout!r}: expected one of {_SCALE_LAYOUTS}")
    return _cast_for_user(
        x, False, epsilon, power_of_two, fp8_dtype, scale_layout == "m_major", with_transpose
    )


def per_block_cast_to_fp8(
    x: torch.Tensor,
    *,
    epsilon: float = DEFAULT_EPSILON,
    power_of_two: bool = False,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    with_transpose: bool = False,
) -> CastTensor | tuple[CastTensor, CastTensor]:
    """FP8 with one scale for each 128 x 128 elements: ``values = fp8(x / scale_inv)``.

    As `per_token_cast_to_fp8`, with square blocks: what weights take. Each matrix of a batch has blocks of
    its own; those at its edges may be smaller.

    Parameters
    ----------
    x : torch.Tensor
        FP32, FP16 or BF16 ``[*batch, N, K]``, any sizes and strides.
    epsilon, power_of_two, fp8_dtype
        As in `per_token_cast_to_fp8`.
    with_transpose : bool, default = False
        Also return the codes of ``x.mT``, the same numbers in the other order, from the same read.

    Returns
    -------
    CastTensor
        ``(values, scale_inv)``: values ``[*batch, N, K]``, scale_inv FP32
        ``[*batch, ceil(N / 128), ceil(K / 128)]``, contiguous. With `with_transpose` a pair.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        As `per_token_cast_to_fp8`.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> values, scale_inv = teb.per_block_cast_to_fp8(torch.randn(8, 256, 384))
    >>> tuple(values.shape), tuple(scale_inv.shape)
    ((8, 256, 384), (8, 2, 3))
    """
    return _cast_for_user(x, True, epsilon, power_of_two, fp8_dtype, False, with_transpose)


def _cast_for_user(
    x: torch.Tensor,
    square: bool,
    epsilon: float,
    power_of_two: bool,
    fp8_dtype: torch.dtype,
    aligned_scales: bool,
    with_transpose: bool,
) -> CastTensor | tuple[CastTensor, CastTensor]:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}: expected float32, float16 or bfloat16")
    if x.dim() < 2:
        raise ValueError(
            f"x has shape {list(x.shape)}: expected a matrix, [*batch, rows, K]; unsqueeze a vector"
        )
    if fp8_dtype not in _FORMATS:
        raise TypeError(f"fp8_dtype={fp8_dtype}: expected torch.float8_e4m3fn or torch.float8_e5m2")
    if not 0.0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon={epsilon}: expected a finite number, not negative")
    copies = cast_blocks(
        x,
        fp8_dtype,
        square=square,
        rowwise=True,
        transposed=with_transpose,
        epsilon=epsilon,
        power_of_two=power_of_two,
        aligned_scales=aligned_scales,
    )
    made = tuple(
        CastTensor(values.view(fp8_dtype), scale_inv) for values, scale_inv in filter(None, copies)
    )
    return made if with_transpose else made[0]


def cast_blocks(
    x: torch.Tensor,
    fp8_dtype: torch.dtype,
    *,
    square: bool,
    rowwise: bool,
    transposed: bool,
    epsilon: float,
    power_of_two: bool,
    aligned_scales: bool,
) -> tuple[Optional[tuple], Optional[tuple]]:
    """Codes (uint8) and inverse scales of `x` and of its transpose, as asked for.

    `kernels.block_quantize.quantize_blocks` where the support table has it, else the reference.
    """
    emulation = current_emulation()
    engine = find_block_caster(
        describe_device(x.device),
        emulate=emulation.enabled,
        force_reference=emulation.force_reference,
    )
    with torch.no_grad():
        if engine == "triton":
            from .kernels import block_quantize  # Triton takes a second to import

            if not block_quantize.can_quantize(x):
                x = x.contiguous()
            return block_quantize.quantize_blocks(
                x,
                _FORMATS[fp8_dtype],
                square=square,
                rowwise=rowwise,
                transposed=transposed,
                amax_epsilon=epsilon,
                power_of_two=power_of_two,
                aligned_scales=aligned_scales,
                max_programs=current_sm_count(x.get_device()) if x.is_cuda else 0,
            )
        rule = {"square": square, "amax_epsilon": epsilon, "power_of_two": power_of_two}
        copies = []
        for source, wanted in ((x, rowwise), (x.mT, transposed)):
            if not wanted:
                copies.append(None)
                continue
            codes, scale_inv = reference.cast_blocks(source, fp8_dtype, **rule)
            scale_inv = _align(scale_inv, square) if aligned_scales else scale_inv
            copies.append((_pitch(codes), scale_inv))
        return tuple(copies)


def describe_block_codes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of codes ``[*batch, rows, cols]``, also of symbolic sizes: rows begin at multiples of 16 bytes."""
    *batch, rows, cols = shape
    pitch = round_up(cols, _PITCH_MULTIPLE)
    strides, step = [pitch, 1], rows * pitch
    for size in reversed(batch):
        strides.insert(0, step)
        step = step * size
    return tuple(strides)


def describe_block_scales(
    shape: tuple[int, ...], square: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of the aligned scales of codes ``[*batch, rows, cols]``, also of symbolic sizes."""
    *batch, rows, cols = shape
    blocks = round_up(cols, 128) // 128
    if square:
        rows = round_up(rows, 128) // 128
        strides, step = [round_up(blocks, _SCALE_MULTIPLE), 1], rows * round_up(
            blocks, _SCALE_MULTIPLE
        )
    else:
        num_rows = math.prod((*batch, rows))
        strides, step = [1, round_up(num_rows, _SCALE_MULTIPLE)], rows
    for size in reversed(batch):
        strides.insert(0, step)
        step = step * size
    return (*batch, rows, blocks), tuple(strides)


def _pitch(codes: torch.Tensor) -> torch.Tensor:
    """The same codes in the memory layout that `quantize_blocks` writes."""
    *others, cols = codes.shape
    pitch = round_up(cols, _PITCH_MULTIPLE)
    if pitch == cols:
        return codes
    return codes.new_zeros(*others, pitch)[..., :cols].copy_(codes)


def _align(scales: torch.Tensor, square: bool) -> torch.Tensor:
    """The same scales in the memory layout that `quantize_blocks(aligned_scales=True)` writes."""
    *batch, rows, blocks = scales.shape
    if square:
        ld = round_up(blocks, _SCALE_MULTIPLE)
        buffer = scales.new_empty(*batch, rows, ld)[..., :blocks]
    else:
        num_rows = math.prod((*batch, rows))
        buffer = scales.new_empty(blocks, round_up(num_rows, _SCALE_MULTIPLE))
        buffer = buffer[:, :num_rows].t().unflatten(0, (*batch, rows))
    return buffer.copy_(scales)
