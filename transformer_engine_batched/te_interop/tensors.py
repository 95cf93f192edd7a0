# SPDX-License-Identifier: Apache-2.0
"""TE's quantized tensors: which buffer holds which copy, what its dims mean, how a class is told from its storage."""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch  # before TE: it loads the libraries that TE links to
import transformer_engine.pytorch
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage, Quantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
    Float8BlockwiseQTensorStorage,
)
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage
from transformer_engine.pytorch.tensor.storage.nvfp4_tensor_storage import NVFP4TensorStorage

from ..errors import UnsupportedError

# Keyed by plain integers: TE's enum hashes in Python, and operands are read at every call.
FP8_DTYPES = {int(DType.kFloat8E4M3): "e4m3", int(DType.kFloat8E5M2): "e5m2"}
HIGH_PRECISION_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Codes(NamedTuple):
    """One copy of an operand: elements and what makes them numbers.

    Parameters
    ----------
    fmt : str
        Format as in `support.FORMATS`.
    dtype : str
        "e4m3", "e5m2", or the high-precision type.
    data : torch.Tensor
        The elements; uint8 for FP8.
    scale_inv : torch.Tensor, optional
        FP32 ``[1]``, the E8M0 buffer of an MXFP8 tensor, or the FP32 buffer of a 128-block tensor.
    moved_last_dim : bool
        Whether `data` is TE's transposed copy ``[last, *leading]`` of a tensor ``[*leading, last]``.
    swizzled : bool
        Whether MXFP8 scales are already in 128x4 tiles (over the flattened matrix).
    columnwise : bool
        Whether MXFP8 blocks run along the rows.
    square : bool
        Whether 128-block scales are of 128 x 128 elements, not of 1 x 128.
    item_blocks : bool
        Whether 128-blocks start anew in each item, and `scale_inv` is ``[*batch, rows or blocks of rows, blocks]``
        of the matrices as stored; TE's belong to the flattened tensor.
    """

    fmt: str
    dtype: str
    data: torch.Tensor
    scale_inv: Optional[torch.Tensor] = None
    moved_last_dim: bool = False
    swizzled: bool = False
    columnwise: bool = False
    square: bool = False
    item_blocks: bool = False


def is_quantized(x: object) -> bool:
    """Whether `x` is one of TE's quantized tensors or storages."""
    return isinstance(x, QuantizedTensorStorage)


def nominal_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype of a tensor, or the one that a quantized tensor stands for."""
    return x._dtype if isinstance(x, QuantizedTensorStorage) else x.dtype


def logical_shape(x: QuantizedTensorStorage) -> tuple[int, ...]:
    """Shape of the tensor that a quantized tensor stands for."""
    return tuple(x.size())


def quantizer_of(x: QuantizedTensorStorage) -> Quantizer:
    """The quantizer that a quantized tensor carries, or one like it."""
    return x._get_quantizer()


def read_codes(
    x: object, name: str, last_dim: bool, allow_strided: Callable[[torch.device], bool]
) -> Codes:
    """The copy of an operand that a product along its last (or second to last) dim reads.

    Parameters
    ----------
    x : torch.Tensor or QuantizedTensorStorage
    name : str
        Of the operand, for messages.
    last_dim : bool
        Whether the contracted dim is the last one ("row-wise" in TE's words) or the one before it.
    allow_strided : callable
        Whether a device multiplies FP8 operands whose contracted dim is strided, so that TE keeps no
        transposed copy there.
    """
    if isinstance(x, Float8TensorStorage):
        return _read_float8(x, name, last_dim, allow_strided)
    if isinstance(x, MXFP8TensorStorage):
        return _read_mxfp8(x, name, last_dim)
    if isinstance(x, Float8BlockwiseQTensorStorage):
        return _read_blockwise(x, name, last_dim, allow_strided)
    if isinstance(x, NVFP4TensorStorage):
        # The caller's support table says why there is no engine; the buffers are not read.
        return Codes("nvfp4", "e2m1", _any_buffer(x))
    if isinstance(x, QuantizedTensorStorage):
        raise UnsupportedError(
            f"operand {name} is a {type(x).__name__}: batched products take Float8 and MXFP8 tensors "
            "(or torch tensors: call its dequantize())"
        )
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"operand {name}: expected a torch.Tensor or a TE quantized tensor, got {type(x).__name__}"
        )
    dtype = HIGH_PRECISION_DTYPES.get(x.dtype)
    if dtype is None:
        raise TypeError(
            f"operand {name} has dtype {x.dtype}: expected float32, float16, bfloat16 or a TE quantized "
            "tensor"
        )
    return Codes(dtype, dtype, x)


def has_rowwise_copy(x: QuantizedTensorStorage) -> bool:
    """Whether a quantized tensor has data for products along its last dim."""
    return bool(x.get_usages().get("rowwise"))


def _any_buffer(x: QuantizedTensorStorage) -> torch.Tensor:
    return next(t for t in x.get_data_tensors() if t is not None)


def _read_float8(
    x: Float8TensorStorage, name: str, last_dim: bool, allow_strided: Callable[[torch.device], bool]
) -> Codes:
    dtype = FP8_DTYPES[int(x._fp8_dtype)]
    transpose = None if x._transpose_invalid else x._transpose
    # The copy that is contiguous along the contracted dim; where the device takes strided ones, the other
    # copy serves as well.
    contiguous, strided = (x._data, transpose) if last_dim else (transpose, x._data)
    if contiguous is not None:
        return Codes("float8", dtype, contiguous, x._scale_inv, not last_dim)
    if strided is not None and allow_strided(strided.device):
        return Codes("float8", dtype, strided, x._scale_inv, last_dim)
    raise _missing_copy(x, name, last_dim)


def _read_mxfp8(x: MXFP8TensorStorage, name: str, last_dim: bool) -> Codes:
    data = x._rowwise_data if last_dim else x._columnwise_data
    scale_inv = x._rowwise_scale_inv if last_dim else x._columnwise_scale_inv
    if data is None or scale_inv is None:
        raise _missing_copy(x, name, last_dim)
    return Codes(
        "mxfp8",
        FP8_DTYPES[int(x._fp8_dtype)],
        data,
        scale_inv,
        swizzled=bool(x._with_gemm_swizzled_scales),
        columnwise=not last_dim,
    )


def _read_blockwise(
    x: Float8BlockwiseQTensorStorage,
    name: str,
    last_dim: bool,
    allow_strided: Callable[[torch.device], bool],
) -> Codes:
    dtype, square = FP8_DTYPES[int(x._fp8_dtype)], bool(x._is_2D_scaled)
    copies = (
        (x._rowwise_data, x._rowwise_scale_inv, False),
        (x._columnwise_data, x._columnwise_scale_inv, True),
    )
    for data, scale_inv, moved in copies if last_dim else reversed(copies):
        if data is None or scale_inv is None:
            continue
        # The two copies hold the same numbers only if blocks are square.
        if moved == last_dim and not (square and allow_strided(data.device)):
            continue
        return Codes("float8_block", dtype, data, scale_inv, moved, square=square)
    raise _missing_copy(x, name, last_dim)


def _missing_copy(x: QuantizedTensorStorage, name: str, last_dim: bool) -> ValueError:
    usage = "rowwise" if last_dim else "columnwise"
    dim = "last" if last_dim else "second to last"
    return ValueError(
        f"operand {name} ({type(x).__name__} of shape {list(logical_shape(x))}) is contracted along its "
        f"{dim} dim, but has no {usage} data: quantize it with a quantizer of {usage}=True"
        + (
            f", or call its update_usage({usage}_usage=True) first"
            if isinstance(x, Float8TensorStorage) and not last_dim
            else ""
        )
    )


def make_float8(
    quantizer: Float8Quantizer, codes: torch.Tensor, fake_dtype: torch.dtype
) -> Float8TensorStorage:
    """TE's tensor (or storage, if `quantizer.internal`) around codes written with `quantizer.scale`.

    The column-wise copy is made if the quantizer asks for it, where TE itself keeps one.
    """
    scale_inv = quantizer.scale.detach().reshape(1).reciprocal()
    transpose = None
    if quantizer.columnwise_usage and keeps_transposed_copy(codes.device):
        transpose = codes.movedim(-1, 0).contiguous()
    arguments = {
        "data": codes,
        "fp8_scale_inv": scale_inv,
        "fp8_dtype": quantizer.dtype,
        "data_transpose": transpose,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=fake_dtype, **arguments)
    return Float8Tensor(shape=codes.shape, dtype=fake_dtype, device=codes.device, **arguments)


def keeps_transposed_copy(device: torch.device) -> bool:
    """Whether TE keeps a transposed copy of per-tensor FP8 data for column-wise use on this device.

    On a CPU, where TE's kernels do not run, the tensors are laid out as on Hopper.
    """
    if device.type != "cuda":
        return True
    return not transformer_engine.pytorch.utils.is_non_tn_fp8_gemm_supported()
