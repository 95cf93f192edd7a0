# SPDX-License-Identifier: Apache-2.0
"""128-blocks as MXFP8, TE's way on Blackwell: the same numbers, and products from them. Needs no GPU."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from block_data import make_block_operand, make_block_sides

import transformer_engine_batched as teb
from transformer_engine_batched import gemm, support
from transformer_engine_batched.block_conversion import convert_to_mxfp8
from transformer_engine_batched.reference.decoding import decode_mxfp8
from transformer_engine_batched.te_interop.tensors import read_codes


def decode(codes):
    assert codes.fmt == "mxfp8"
    return decode_mxfp8(
        codes.data.contiguous(),
        codes.scale_inv,
        torch.float8_e4m3fn,
        columnwise=False,
        swizzled=False,
    )


@pytest.mark.parametrize("dim", (1, 2))
@pytest.mark.parametrize("last_dim", (True, False))
@pytest.mark.parametrize(
    "shape", ((3, 128, 256), (2, 96, 160), (2, 2, 32, 384), (1, 130, 64), (40, 200))
)
def test_numbers_stay(shape, last_dim, dim):
    """Exactly, also where 128-blocks cross items."""
    tensor, exact = make_block_operand(shape, dim, last_dim, 1)
    codes, transposed = convert_to_mxfp8(
        read_codes(tensor, "x", last_dim, lambda device: False), False, "x"
    )
    assert transposed != last_dim
    values = decode(codes).double()
    size = shape[-1] if last_dim else shape[-2]
    assert codes.data.shape[-1] % 32 == 0 and bool((values[..., size:] == 0).all())
    values = values[..., :size]
    assert torch.equal(values if last_dim else values.mT, exact)


def test_scales_that_are_no_powers_of_two_show():
    tensor, _ = make_block_operand((2, 128, 128), 1, True, 1, force_pow_2_scales=False)
    codes, _ = convert_to_mxfp8(read_codes(tensor, "x", True, lambda device: False), False, "x")
    assert bool(decode(codes).isnan().any())


def test_blocks_that_would_cross_items_are_refused():
    tensor, _ = make_block_operand((2, 40, 128), 1, False, 1)
    with pytest.raises(teb.UnsupportedError, match="operand x .* 40 rows are no multiple of 32"):
        convert_to_mxfp8(read_codes(tensor, "x", False, lambda device: False), False, "x")


@pytest.mark.parametrize("dims", ((1, 1), (1, 2), (2, 1)))
@pytest.mark.parametrize("layout", ("TN", "NN", "NT"))
def test_products(layout, dims, monkeypatch, fresh_launches):
    """Through the MXFP8 path: its tiles of scales and its engine, here the reference."""
    original = gemm.find_engine

    def find_engine(fmt, *arguments, **options):
        return "mxfp8" if fmt == "float8_block" else original(fmt, *arguments, **options)

    monkeypatch.setattr(gemm, "find_engine", find_engine)
    a, b, expected = make_block_sides(layout, 64, 96, 160, dims)
    with teb.emulate("reference"):
        out = teb.batched_general_gemm(a, b, layout=layout, out_dtype=torch.float32)
    assert_accurate(out, expected)


@pytest.mark.parametrize("rows", (64, 40))
def test_training(rows, monkeypatch, fresh_launches):
    """Blocks of each item of its own, which the module makes, convert whatever the rows."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling

    original = gemm.find_engine
    monkeypatch.setattr(
        gemm,
        "find_engine",
        lambda fmt, *x, **y: "mxfp8" if fmt == "float8_block" else original(fmt, *x, **y),
    )
    a = torch.randn(3, rows, 72, requires_grad=True)
    b = torch.randn(3, 72, 56, requires_grad=True)
    grad = torch.randn(3, rows, 56)
    with teb.emulate("reference"), te.autocast(enabled=True, recipe=Float8BlockScaling()):
        y = te.BatchedMatmul()(a, b)
    y.backward(grad)
    a64, b64 = a.detach().double(), b.detach().double()
    for made, expected in (
        (y, a64 @ b64),
        (a.grad, grad.double() @ b64.mT),
        (b.grad, a64.mT @ grad.double()),
    ):
        assert_accurate(made.detach(), expected, 27.0)


def test_blackwell_converts():
    blackwell = support.Device("Blackwell", (10, 0), 130100)
    assert support.find_engine("float8_block", blackwell, emulate=False) == "mxfp8"
    consumer = support.Device("Blackwell", (12, 0), 130100)
    with pytest.raises(teb.UnsupportedError, match="Blackwell"):
        support.find_engine("float8_block", consumer, emulate=False)
