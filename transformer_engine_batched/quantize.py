# SPDX-License-Identifier: Apache-2.0
"""`quantize`: TE's quantizer objects on any device.

Chooses, by the support table, TE's own kernel or the exact reference quantizer for a tensor. Must not know
of products.
"""

from __future__ import annotations

import torch
from transformer_engine.pytorch.quantized_tensor import Quantizer

from .emulation import current_emulation
from .errors import UnsupportedError
from .plan import describe_device
from .reference import blockwise as reference_blockwise
from .reference import quantizers as reference_quantizers
from .support import FORMAT_TITLES, find_native_quantizer
from .te_interop.quantizers import is_quantizer, quantizer_format
from .te_interop.tensors import is_quantized


def quantize(x: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """Quantizes a tensor with one of TE's quantizers: ``codes = saturate(x * scale)``.

    Through TE's own kernel where TE has one for the device; inside `emulate()` otherwise through a
    reference quantizer, which writes the same bytes.

    Parameters
    ----------
    x : torch.Tensor
        FP32, FP16 or BF16, any strides, shape ``[*leading, last]``.
    quantizer : Float8Quantizer, Float8CurrentScalingQuantizer, MXFP8Quantizer or Float8BlockQuantizer
        TE's object; says the FP8 type, the scale rule, and which copies are made (row-wise for products
        along the last dim, column-wise for products along the other dims). A `Float8Quantizer` uses its
        `scale` and updates its `amax`.

    Returns
    -------
    Float8Tensor, MXFP8Tensor or Float8BlockwiseQTensor
        TE's own class with the nominal dtype and shape of `x`, or its storage class if
        `quantizer.internal`. The result carries no gradient.

    Raises
    ------
    UnsupportedError
        If the device lacks the format and `emulate()` is not active.
    ValueError
        MXFP8: if the last dim or the product of the others is not a multiple of 32.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> import transformer_engine_torch as tex
    >>> from transformer_engine.pytorch import Float8CurrentScalingQuantizer
    >>> quantizer = Float8CurrentScalingQuantizer(tex.DType.kFloat8E4M3, device="cpu")
    >>> with teb.emulate():
    ...     x = teb.quantize(torch.randn(4, 64, 64), quantizer)
    >>> type(x).__name__, tuple(x.shape)
    ('Float8Tensor', (4, 64, 64))
    """
    if not is_quantizer(quantizer):
        raise TypeError(
            f"quantizer: expected one of TE's quantizers, got {type(quantizer).__name__}"
        )
    if is_quantized(x):
        raise TypeError(
            f"x is a {type(x).__name__} already: use it as it is, or call its dequantize() first"
        )
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    fmt = quantizer_format(quantizer)
    device = describe_device(x.device)
    emulation = current_emulation()
    answer = find_native_quantizer(fmt, device)
    with torch.no_grad():
        if answer.engine == "te" and not emulation.force_reference:
            return quantizer(x.contiguous())
        if emulation.enabled and fmt == "float8_block":
            return reference_blockwise.quantize(x, quantizer)
        if emulation.enabled and fmt in ("float8", "mxfp8"):
            return reference_quantizers.quantize(x, quantizer)
    raise UnsupportedError(
        f"quantization to {FORMAT_TITLES[fmt]} was asked for on {device.name}: {answer.reason}."
        + (
            " To do it with the exact reference quantizer, do so inside "
            "`with transformer_engine_batched.emulate():`."
            if fmt in ("float8", "mxfp8", "float8_block")
            else ""
        )
    )
