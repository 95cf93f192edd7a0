# SPDX-License-Identifier: Apache-2.0
"""Inputs, FP64 results and checks for tests of the triangle kernels, on any device.

Written from the formulas with torch's FP64 autograd; must not import the package's kernels beyond the two tuples
that name parameters.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from transformer_engine_batched.kernels.triangle_tiles import GatedProjection, Norm

TORCH_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# Lowest SQNR in dB against FP64 of what passes through a few roundings of 2^-24, 2^-12 or 2^-9: the tensor cores'
# operands, and one of the result. Measured on an H200: 127, 68 and 49 at the least.
VALUE_DB = {torch.float32: 115.0, torch.float16: 64.0, torch.bfloat16: 46.0}
# Codes of normal data times a gate: E4M3 31.5 dB measured, E5M2 25.5.
CODE_DB = {"e4m3": 30.0, "e5m2": 24.0}


class Case(NamedTuple):
    """Sizes and kinds of one test."""

    batch: int
    n: int
    dim: int
    hidden: int
    dtype: torch.dtype = torch.float32
    weight_dtype: Optional[torch.dtype] = None
    has_bias: bool = True
    mask: Optional[str] = "float"


class Data(NamedTuple):
    """All tensors that forward and backward read; views of padded buffers where they may be."""

    z: torch.Tensor
    norm_in: Norm
    norm_out: Norm
    projection: GatedProjection
    output: GatedProjection
    mask: Optional[torch.Tensor]
    c: torch.Tensor
    grad_out: torch.Tensor
    grad_a: torch.Tensor
    grad_b: torch.Tensor


class Expected(NamedTuple):
    """FP64 results: operands ``[B, H, N, N]`` in the layout of z's positions, output, gradients."""

    a: torch.Tensor
    b: torch.Tensor
    out: torch.Tensor
    grad_c: torch.Tensor
    grad_z: torch.Tensor
    norm_in: tuple
    norm_out: tuple
    projection: tuple
    output: tuple


def make_data(case: Case, device: str = "cpu", seed: int = 0) -> Data:
    """Normal data; z has a mean of one, weights keep the variance."""
    generator = torch.Generator().manual_seed(seed)
    batch, n, dim, hidden, dtype, weight_dtype, has_bias, mask_kind = case
    weight_dtype = weight_dtype or dtype

    def normal(*shape: int, kind: torch.dtype = weight_dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, kind)

    def make_norm(size: int) -> Norm:
        if not has_bias:
            return Norm(None, None, 1e-3)
        return Norm(1 + 0.2 * normal(size), 0.2 * normal(size), 1e-5)

    def make_projection(p_shape: tuple, g_shape: tuple) -> GatedProjection:
        values = []
        for rows, cols in (p_shape, g_shape):
            values += [normal(rows, cols) / cols**0.5, normal(rows) if has_bias else None]
        return GatedProjection(*values)

    mask = None
    if mask_kind is not None:
        mask = (torch.rand(batch, n, n, generator=generator) > 0.25).to(device)
        if mask_kind == "float":
            mask = mask.to(dtype) * 0.75
    padded = -(-n // 16) * 16
    return Data(
        z=2 * normal(batch, n, n, dim, kind=dtype) + 1,
        norm_in=make_norm(dim),
        norm_out=make_norm(hidden),
        projection=make_projection((2 * hidden, dim), (2 * hidden, dim)),
        output=make_projection((dim, hidden), (dim, dim)),
        mask=mask,
        c=normal(batch, hidden, n, padded + 16)[..., :n],
        grad_out=normal(batch, n, n, dim, kind=dtype),
        grad_a=normal(batch, hidden, n, padded)[..., :n],
        grad_b=normal(batch, hidden, padded, padded)[:, :, :n, :n],
    )


def find_expected(data: Data) -> Expected:
    """The formulas in FP64."""

    def leaf(x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        return None if x is None else x.detach().double().requires_grad_()

    z, c = leaf(data.z), leaf(data.c)
    norm_in, norm_out, projection, output = (
        [leaf(x) for x in parameters]
        for parameters in (data.norm_in[:2], data.norm_out[:2], data.projection, data.output)
    )
    functional = torch.nn.functional
    x = functional.layer_norm(z, z.shape[-1:], *norm_in, data.norm_in.eps)
    values = functional.linear(x, *projection[:2]) * functional.linear(x, *projection[2:]).sigmoid()
    if data.mask is not None:
        values = values * data.mask.double()[..., None]
    a, b = values.permute(0, 3, 1, 2).chunk(2, 1)
    y = c.permute(0, 2, 3, 1)
    y = functional.layer_norm(y, y.shape[-1:], *norm_out, data.norm_out.eps)
    out = functional.linear(y, *output[:2]) * functional.linear(x, *output[2:]).sigmoid()
    loss = (out * data.grad_out.double()).sum()
    loss = loss + (a * data.grad_a.double()).sum() + (b * data.grad_b.double()).sum()
    loss.backward()

    def grads(parameters: list) -> tuple:
        return tuple(None if x is None else x.grad for x in parameters)

    return Expected(
        a.detach(), b.detach(), out.detach(), c.grad, z.grad, *map(
            grads, (norm_in, norm_out, projection, output)
        )
    )  # fmt: skip


def decode(codes: torch.Tensor, fp8_dtype: str, scale_inv: torch.Tensor) -> torch.Tensor:
    """Codes as FP64 numbers."""
    return codes.view(TORCH_FP8[fp8_dtype]).double() * scale_inv.double()


def assert_near(result: torch.Tensor, expected: torch.Tensor, bound_db: float, name: str) -> None:
    """Shape, and the SQNR of the whole tensor."""
    assert tuple(result.shape) == tuple(expected.shape), (name, result.shape, expected.shape)
    noise = (result.double() - expected).square().sum()
    ratio = 10 * torch.log10(expected.square().sum() / noise)
    assert noise == 0 or ratio >= bound_db, f"{name}: {ratio:.1f} dB, expected {bound_db} dB"


def assert_all_near(results: tuple, expected: tuple, bound_db: float, name: str) -> None:
    """`assert_near` of each tensor; None where None is expected."""
    assert len(results) == len(expected)
    for index, (result, wanted) in enumerate(zip(results, expected)):
        assert (result is None) == (wanted is None), (name, index)
        if wanted is not None:
            assert_near(result, wanted, bound_db, f"{name}[{index}]")


def cut_padding(x: torch.Tensor, n: int) -> torch.Tensor:
    """``[..., N_p, N_p]`` without its padding, which must be zero to the bit."""
    size = -(-n // 16) * 16
    assert x.shape[-2:] == (size, size) and x.is_contiguous()
    bits = x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])
    assert not bits[..., n:, :].any() and not bits[..., n:].any()
    return x[..., :n, :n]
