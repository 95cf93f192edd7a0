# SPDX-License-Identifier: Apache-2.0
"""Operands, exact results and error bounds for tests of products, on any device.

Inputs are sizes and recipe names. Decodes quantized tensors with torch alone: must not import the
package's own codes, tiles or engines, of which it is to be independent (quantizing is `teb.quantize`'s
job, so FP8 recipes on a device without them need `teb.emulate()` around the call).
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch  # before TE: it loads the libraries that TE links to
import transformer_engine.pytorch as te

import transformer_engine_batched as teb

HIGH_PRECISION = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUANTIZED = ("float8_delayed", "float8_current", "mxfp8")
RECIPES = (*HIGH_PRECISION, *QUANTIZED)

TE_DTYPES = {"e4m3": te.DType.kFloat8E4M3, "e5m2": te.DType.kFloat8E5M2}
_TORCH_FP8 = {
    te.DType.kFloat8E4M3: torch.float8_e4m3fn,
    te.DType.kFloat8E5M2: torch.float8_e5m2,
}

# Lowest SQNR in dB of any batch item, against the FP64 product of the dequantised operands. What is left
# is the rounding of the output: for p bits of significand its error is uniform within half a unit in the
# last place, and over mantissas of normal data the SQNR is 6.02 p + 7.5 dB: 55.6 for BF16 (p = 8), 73.7
# for FP16 (p = 11), 152 for FP32 (p = 24). The slack of 4 to 12 dB is for small items, whose errors vary,
# and for the second rounding of a bias or GELU that is added to the rounded product.
OUTPUT_BOUNDS_DB = {torch.float32: 140.0, torch.float16: 68.0, torch.bfloat16: 50.0}
# The few elements of a small item may all be near their worst, half a unit: 6.02 p dB.
_FEW_ELEMENTS = 64
_FEW_ELEMENTS_SLACK_DB = 3.0

# Against the FP64 product of the original data: the rounding of codes counts, too. 3 (E4M3) and 2 (E5M2)
# mantissa bits on normal data; measured 28.5 and 24.5 dB, so 1.5 dB of slack.
END_TO_END_BOUNDS_DB = {("e4m3", "e4m3"): 27.0, ("e4m3", "e5m2"): 23.0, ("e5m2", "e4m3"): 23.0}

LAYOUTS = ("TN", "NN", "NT")


def sqnr_per_item(result: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Signal to quantization noise ratio ``10 log10(|expected|^2 / |result - expected|^2)`` in dB.

    Parameters
    ----------
    result, expected : torch.Tensor
        ``[*batch, rows, cols]``, equal shapes; `expected` in FP64 and finite.

    Returns
    -------
    torch.Tensor
        FP64 ``[items]``: infinity where an item is exact, minus infinity where an element is not finite or
        an item that should be zero is not.
    """
    assert result.shape == expected.shape, (result.shape, expected.shape)
    assert expected.dtype == torch.float64 and bool(expected.isfinite().all())
    size = expected.shape[-2] * expected.shape[-1]
    expected = expected.reshape(-1, size)
    noise = (result.double().reshape(-1, size) - expected).square().sum(-1)
    ratio = 10 * torch.log10(expected.square().sum(-1) / noise)
    ratio = torch.where(noise == 0, torch.inf, ratio)
    return torch.where(noise.isfinite(), ratio, -torch.inf)


def assert_accurate(
    result: torch.Tensor, expected: torch.Tensor, bound_db: Optional[float] = None
) -> None:
    """Fails unless every batch item reaches the bound of the result's dtype (or `bound_db`)."""
    assert tuple(result.shape) == tuple(expected.shape), (result.shape, expected.shape)
    if expected.numel() == 0:
        return
    if bound_db is None:
        bound_db = OUTPUT_BOUNDS_DB[result.dtype]
        if result.shape[-2] * result.shape[-1] < _FEW_ELEMENTS:
            bound_db -= _FEW_ELEMENTS_SLACK_DB
    ratios = sqnr_per_item(result, expected)
    worst = int(ratios.argmin())
    assert (
        ratios[worst] >= bound_db
    ), f"item {worst} of {len(ratios)}: {ratios[worst]:.1f} dB, expected {bound_db} dB"


class Operand(NamedTuple):
    """An operand as a caller passes it, and the numbers that it stands for in FP64."""

    tensor: object
    exact: torch.Tensor


class Sides(NamedTuple):
    """Both operands of a product and the exact product."""

    a: Operand
    b: Operand
    expected: torch.Tensor


def contracts_last_dim(layout: str, name: str) -> bool:
    """Whether the product of a layout runs along the last dim of operand "A" or "B"."""
    return layout[0] == "T" if name == "A" else layout[1] == "N"


def operand_shape(
    layout: str, name: str, m: int, n: int, k: int, batch: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Shape of operand "A" or "B" of `batched_general_gemm`."""
    rows = n if name == "A" else m
    return (*batch, rows, k) if contracts_last_dim(layout, name) else (*batch, k, rows)


def exact_product(layout: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """TE's convention in FP64: ``op(B) @ op(A)``."""
    a, b = a.double(), b.double()
    return (b if layout[1] == "N" else b.mT) @ (a.mT if layout[0] == "T" else a)


def random_values(
    shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Normal FP32 data of order one, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device)


def make_quantizer(
    recipe: str,
    fp8: str = "e4m3",
    *,
    scale: float = 16.0,
    swizzled: bool = False,
    internal: bool = False,
    device: torch.device | str = "cpu",
) -> te.Quantizer:
    """TE's quantizer of a recipe, for row-wise and column-wise use.

    `scale` is that of delayed scaling. The default of 16 leaves room for 28 sigma and is no identity, so
    that a scale that is lost or applied twice shows.
    """
    usage = {"rowwise": True, "columnwise": True}
    dtype = TE_DTYPES[fp8]
    if recipe == "float8_delayed":
        state = torch.full((1,), scale, device=device), torch.zeros(1, device=device)
        quantizer = te.Float8Quantizer(*state, dtype, **usage)
    elif recipe == "float8_current":
        quantizer = te.Float8CurrentScalingQuantizer(dtype, device=torch.device(device), **usage)
    elif recipe == "mxfp8":
        quantizer = te.MXFP8Quantizer(dtype, **usage)
        quantizer.optimize_for_gemm = swizzled
    else:
        raise AssertionError(f"no quantizer for {recipe}")
    quantizer.internal = internal
    return quantizer


def make_operand(
    recipe: str,
    shape: tuple[int, ...],
    *,
    last_dim: bool,
    seed: int,
    fp8: str = "e4m3",
    swizzled: bool = False,
    internal: bool = False,
    device: torch.device | str = "cpu",
    values: Optional[torch.Tensor] = None,
) -> Operand:
    """An operand of a recipe from random (or given) values, contracted along its last dim or not."""
    values = random_values(shape, seed, device) if values is None else values
    if recipe in HIGH_PRECISION:
        tensor = values.to(HIGH_PRECISION[recipe])
        return Operand(tensor, tensor.double())
    quantizer = make_quantizer(recipe, fp8, internal=internal, device=device)
    tensor = teb.quantize(values.bfloat16(), quantizer)
    exact = dequantize(tensor, last_dim=last_dim)
    if swizzled:
        quantizer.optimize_for_gemm = True
        tensor = teb.quantize(values.bfloat16(), quantizer)
    return Operand(tensor, exact)


def make_sides(
    recipe: str,
    layout: str,
    *,
    m: int,
    n: int,
    k: int,
    batch_a: tuple[int, ...] = (3,),
    batch_b: Optional[tuple[int, ...]] = None,
    seed: int = 0,
    fp8: tuple[str, str] = ("e4m3", "e4m3"),
    **options: object,
) -> Sides:
    """Both operands of a layout, every item with data of its own, and their exact product."""
    batches = {"A": batch_a, "B": batch_a if batch_b is None else batch_b}
    operands = [
        make_operand(
            recipe,
            operand_shape(layout, name, m, n, k, batches[name]),
            last_dim=contracts_last_dim(layout, name),
            seed=2 * seed + index,
            fp8=fp8[index],
            **options,
        )
        for index, name in enumerate("AB")
    ]
    return Sides(*operands, exact_product(layout, operands[0].exact, operands[1].exact))


def dequantize(x: object, *, last_dim: bool = True) -> torch.Tensor:
    """Numbers of TE's Float8 or (compact, not swizzled) MXFP8 tensor in FP64.

    Parameters
    ----------
    last_dim : bool
        MXFP8: which of its two copies, whose numbers differ: that with blocks along the last dim or along
        the dim before it.
    """
    fp8 = _TORCH_FP8[x._fp8_dtype]
    if hasattr(x, "_scale_inv"):
        codes = x._data if x._data is not None else x._transpose.movedim(0, -1)
        return codes.contiguous().view(fp8).double() * x._scale_inv.double()
    data = x._rowwise_data if last_dim else x._columnwise_data
    scales = x._rowwise_scale_inv if last_dim else x._columnwise_scale_inv
    rows, cols = data.numel() // data.shape[-1], data.shape[-1]
    if last_dim:
        factors = scales[:rows, : cols // 32].repeat_interleave(32, dim=1)
    else:
        factors = scales[: rows // 32, :cols].repeat_interleave(32, dim=0)
    factors = torch.exp2(factors.double() - 127).reshape(data.shape)
    return data.view(fp8).double() * factors
