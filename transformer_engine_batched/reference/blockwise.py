# SPDX-License-Identifier: Apache-2.0
"""Quantization to FP8 with one FP32 scale per 128 elements or per 128 x 128, byte for byte as TE's kernels.

Inputs are a torch tensor and TE's `Float8BlockQuantizer`; the result is TE's own tensor class, laid out as
on Hopper. Must not import the compiled extension, TE's kernels or a module that runs a product.
"""

from __future__ import annotations

import math

import torch  # before TE: it loads the libraries that TE links to
import transformer_engine.pytorch as te
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
    Float8BlockwiseQTensorStorage,
)

from . import codes as fp8_codes
from .decoding import BLOCKWISE_SIZE, expand_blocks
from .quantizers import check_input, magnitudes_of, scale_from_amax

_FP8_DTYPES = {
    te.DType.kFloat8E4M3: torch.float8_e4m3fn,
    te.DType.kFloat8E5M2: torch.float8_e5m2,
}


def quantize(
    x: torch.Tensor, quantizer: te.Float8BlockQuantizer
) -> Float8BlockwiseQTensor | Float8BlockwiseQTensorStorage:
    """Quantize a tensor into TE's own class: ``codes = fp8(x * scale)``, ``scale_inv = 1 / scale`` per block.

    ``[..., last]`` is taken as the matrix ``[rows, last]`` of all leading dimensions together, so that
    blocks along the rows cross items of a batch whose row count is no multiple of 128. The column-wise
    copy is the row-wise copy of the transposed matrix.

    Parameters
    ----------
    x : torch.Tensor
        float32, float16 or bfloat16 ``[..., last]``, any strides, sizes and device. Read without autograd.
    quantizer : Float8BlockQuantizer
        TE's object: FP8 type, `block_scaling_dim` 1 (1 x 128) or 2 (128 x 128), `force_pow_2_scales`,
        `amax_epsilon` and usages. 128 x 128 in column-wise usage alone, which TE's kernel does not make,
        works here.

    Returns
    -------
    Float8BlockwiseQTensor or Float8BlockwiseQTensorStorage
        The storage class if ``quantizer.internal``. Row-wise codes ``[..., last]``, column-wise codes
        ``[last, ...]``; float32 scales of `Float8BlockQuantizer.get_scale_shape`: of 1 x 128 blocks
        ``[blocks, rows]``, of 128 x 128 ``[blocks of rows, blocks]``, the last dimension padded with zeros
        to a multiple of 4. TE leaves the padding unwritten.

    Raises
    ------
    TypeError
        If `x` is not a plain tensor of one of the three dtypes or `quantizer` is another one.
    ValueError
        If no usage is set, or `x` has no dimension.

    Notes
    -----
    NaN and infinity, as in the kernels: a NaN becomes code 0x7F and is passed over by the amax; a block
    with an infinity, or with nothing but zeros and NaN while `amax_epsilon` is 0, has scale 1. A scale
    beyond FP32 is replaced by the largest finite value of the dtype of `x`. Blocks at the edge that are
    not full count as if filled up with zeros.

    Sources, TE 2.20.2: ``common/transpose/quantize_transpose_vector_blockwise.cu``,
    ``quantize_transpose_square_blockwise.cu``, ``common/recipe/recipe_common.cuh``
    (``compute_scale_from_types``) and ``pytorch/csrc/quantizer.cpp``.

    Examples
    --------
    >>> quantizer = te.Float8BlockQuantizer(te.DType.kFloat8E4M3, rowwise=True, columnwise=False)
    >>> quantize(torch.tensor([[1.0, -0.5]]), quantizer).dequantize()
    tensor([[ 1.0000, -0.5000]])
    """
    _check_quantizer(quantizer)
    check_input(x)
    buffers = {
        "rowwise_data": None,
        "rowwise_scale_inv": None,
        "columnwise_data": None,
        "columnwise_scale_inv": None,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "is_2D_scaled": quantizer.block_scaling_dim == 2,
    }
    with torch.no_grad():
        matrix = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        for usage, columnwise, wanted in (
            ("rowwise", False, quantizer.rowwise_usage),
            ("columnwise", True, quantizer.columnwise_usage),
        ):
            if not wanted:
                continue
            data, scale_inv = _quantize_matrix(matrix.t() if columnwise else matrix, quantizer)
            shape = quantizer.get_columnwise_shape(x.shape) if columnwise else x.shape
            buffer = data.new_zeros(
                quantizer.get_scale_shape(x.shape, columnwise), dtype=torch.float32
            )
            buffer[: scale_inv.shape[0], : scale_inv.shape[1]] = scale_inv
            buffers[f"{usage}_data"] = data.view(shape)
            buffers[f"{usage}_scale_inv"] = buffer
    if quantizer.internal:
        return Float8BlockwiseQTensorStorage(**buffers, fake_dtype=x.dtype)
    return Float8BlockwiseQTensor(shape=x.shape, dtype=x.dtype, device=x.device, **buffers)


def cast_blocks(
    x: torch.Tensor,
    fp8: torch.dtype,
    *,
    square: bool,
    amax_epsilon: float = 0.0,
    power_of_two: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and inverse scales of the blocks of each matrix of a batch: ``codes = fp8(x * scale)``.

    Blocks start anew in each matrix, which is where this differs from `quantize`.

    Parameters
    ----------
    x : torch.Tensor
        float32, float16 or bfloat16 ``[*batch, R, C]``, any sizes and strides.
    fp8 : torch.dtype
        ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
    square : bool
        Blocks of 128 x 128 elements instead of 1 x 128.
    amax_epsilon, power_of_two
        As in `scale_from_amax`.

    Returns
    -------
    codes : torch.Tensor
        uint8 ``[*batch, R, C]``, contiguous.
    scale_inv : torch.Tensor
        float32 ``[*batch, R, ceil(C / 128)]``, square ``[*batch, ceil(R / 128), ceil(C / 128)]``.

    Examples
    --------
    >>> codes, scale_inv = cast_blocks(torch.full((2, 1, 200), 3.5), torch.float8_e4m3fn, square=True)
    >>> tuple(codes.shape), scale_inv.flatten().tolist()
    ((2, 1, 200), [0.0078125, 0.0078125, 0.0078125, 0.0078125])
    """
    *batch, rows, cols = x.shape
    scale_rows = -(-rows // BLOCKWISE_SIZE) if square else rows
    num_blocks = -(-cols // BLOCKWISE_SIZE)
    if x.numel() == 0:
        scale_inv = torch.empty(*batch, scale_rows, num_blocks, device=x.device)
        return torch.empty(x.shape, dtype=torch.uint8, device=x.device), scale_inv
    bottom = scale_rows * BLOCKWISE_SIZE - rows if square else 0
    matrix = torch.nn.functional.pad(x, (0, 0, 0, bottom)).reshape(-1, cols)
    scales = block_scales(
        matrix,
        fp8,
        square=square,
        force_pow_2_scales=power_of_two,
        amax_epsilon=amax_epsilon,
    )
    factors = expand_blocks(scales, tuple(matrix.shape), square=square)
    data = fp8_codes.encode(matrix.float() * factors, fp8)
    data = data.view(*batch, rows + bottom, cols)[..., :rows, :].contiguous()
    return data, scales.reciprocal().view(*batch, scale_rows, num_blocks)


def block_scales(
    matrix: torch.Tensor,
    fp8: torch.dtype,
    *,
    square: bool,
    force_pow_2_scales: bool = True,
    amax_epsilon: float = 0.0,
) -> torch.Tensor:
    """Scale of each block: ``scale = fp8_max / max(amax, amax_epsilon)`` by the rules of `scale_from_amax`.

    Parameters
    ----------
    matrix : torch.Tensor
        float32, float16 or bfloat16 ``[rows, cols]``, any sizes.
    fp8 : torch.dtype
        ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
    square : bool
        Blocks of 128 x 128 elements instead of 1 x 128.
    force_pow_2_scales, amax_epsilon
        As in `scale_from_amax`.

    Returns
    -------
    torch.Tensor
        float32 ``[rows, ceil(cols / 128)]``, square ``[ceil(rows / 128), ceil(cols / 128)]``.

    Examples
    --------
    >>> block_scales(torch.full((1, 200), 3.5), torch.float8_e4m3fn, square=False)
    tensor([[128., 128.]])
    """
    rows, cols = matrix.shape
    bottom = -rows % BLOCKWISE_SIZE if square else 0
    padded = torch.nn.functional.pad(magnitudes_of(matrix), (0, -cols % BLOCKWISE_SIZE, 0, bottom))
    num_blocks = padded.shape[1] // BLOCKWISE_SIZE
    if square:
        blocks = padded.view(
            padded.shape[0] // BLOCKWISE_SIZE, BLOCKWISE_SIZE, num_blocks, BLOCKWISE_SIZE
        )
        amax = blocks.amax((1, 3))
    else:
        amax = padded.view(rows, num_blocks, BLOCKWISE_SIZE).amax(2)
    return scale_from_amax(
        amax,
        fp8,
        force_pow_2_scales=force_pow_2_scales,
        amax_epsilon=amax_epsilon,
        largest=torch.finfo(matrix.dtype).max,
    )


def _quantize_matrix(
    matrix: torch.Tensor, quantizer: te.Float8BlockQuantizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[rows, cols]`` and inverse scales in TE's order, without padding."""
    fp8 = _FP8_DTYPES[quantizer.dtype]
    square = quantizer.block_scaling_dim == 2
    scales = block_scales(
        matrix,
        fp8,
        square=square,
        force_pow_2_scales=quantizer.force_pow_2_scales,
        amax_epsilon=quantizer.amax_epsilon,
    )
    factors = expand_blocks(scales, tuple(matrix.shape), square=square)
    data = fp8_codes.encode(matrix.float() * factors, fp8).contiguous()
    scale_inv = scales.reciprocal()
    return data, scale_inv if square else scale_inv.t()


def _check_quantizer(quantizer: te.Float8BlockQuantizer) -> None:
    if not isinstance(quantizer, te.Float8BlockQuantizer):
        raise TypeError(f"a Float8BlockQuantizer was asked for and {type(quantizer).__name__} came")
    if not (quantizer.rowwise_usage or quantizer.columnwise_usage):
        raise ValueError(
            "Float8BlockQuantizer has neither row-wise nor column-wise usage, so there is nothing to "
            "write; call quantizer.set_usage(rowwise=True)"
        )
    if quantizer.block_scaling_dim not in (1, 2):
        raise ValueError(
            f"Float8BlockQuantizer has block_scaling_dim={quantizer.block_scaling_dim}: expected 1 "
            "(1 x 128) or 2 (128 x 128)"
        )
    if quantizer.dtype not in _FP8_DTYPES:
        raise TypeError(
            f"Float8BlockQuantizer asks for {quantizer.dtype!r}; its dtype must be one of "
            f"{', '.join(str(dtype) for dtype in _FP8_DTYPES)}"
        )
