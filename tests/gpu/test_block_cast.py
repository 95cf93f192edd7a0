# SPDX-License-Identifier: Apache-2.0
"""Casts to FP8 with 128-blocks on the GPU: the bytes of the reference and of TE, and how they run."""

from __future__ import annotations

import pytest
import torch
import transformer_engine.pytorch as te
from block_data import bits, special_matrix
from expected_codes import LAYOUTS, TORCH_FP8
from products import FP8

import transformer_engine_batched as teb
from transformer_engine_batched.kernels import block_quantize
from transformer_engine_batched.kernels.block_quantize import Tile, quantize_blocks
from transformer_engine_batched.reference import blockwise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = ((0.0, False), (0.0, True), (1e-2, False), (1e-4, True))


def check(x, layout, square, fp8="e4m3", epsilon=0.0, power_of_two=False, aligned=False, name=""):
    """Every byte of the copies asked for."""
    made = quantize_blocks(
        x, fp8, square=square, rowwise=layout[0], transposed=layout[1], amax_epsilon=epsilon,
        power_of_two=power_of_two, aligned_scales=aligned,
    )  # fmt: skip
    for copy, source, wanted in zip(made, (x, x.mT), layout):
        assert (copy is not None) == wanted
        if not wanted:
            continue
        codes, scale_inv = blockwise.cast_blocks(
            source, TORCH_FP8[fp8], square=square, amax_epsilon=epsilon, power_of_two=power_of_two
        )
        case = (name, tuple(x.shape), x.dtype, fp8, layout, square, epsilon, power_of_two, aligned)
        assert torch.equal(copy.codes, codes), (case, int((copy.codes != codes).sum()))
        assert torch.equal(bits(copy.scale_inv), bits(scale_inv)), case


@pytest.fixture
def filled_memory():
    """New outputs hold 0xFF, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("square", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, square, dtype):
    for shape in (
        (3, 256, 512),
        (2, 389, 712),
        (2, 2, 40, 1000),
        (5, 1),
        (64, 16, 256),
        (1, 130, 129),
    ):
        for aligned in (False, True):
            check(torch.randn(shape, device="cuda").to(dtype), layout, square, aligned=aligned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("square", (False, True))
@pytest.mark.parametrize("fp8", TORCH_FP8)
def test_values(fp8, square, dtype):
    """Zeros, NaN, infinities, subnormals; every BF16 and FP16 number, FP32 numbers of random bits."""
    if dtype == torch.float32:
        patterns = torch.randint(-(2**31), 2**31 - 1, (2, 512, 1024), device="cuda").int()
    else:
        patterns = torch.arange(-(2**15), 2**15, device="cuda").short().reshape(1, 256, 256)
        patterns = torch.cat([patterns, patterns.mT, patterns.flip(1)])
    for rule in RULES:
        for x in (special_matrix(dtype).cuda(), patterns.view(dtype)):
            check(x, (True, True), square, fp8, *rule)


@pytest.mark.parametrize("tile", (Tile(128, 4), Tile(128, 8, 0, True), Tile(128, 4, 0, True)))
def test_both_kernels(monkeypatch, tile):
    """The readable kernel and the one with layouts, with other warps than the table's."""
    for key in block_quantize.TILES:
        monkeypatch.setitem(block_quantize.TILES, key, tile)
    block_quantize._make_plan.cache_clear()
    # Both copies of FP32, and of square blocks, come out wrong from the plain kernel with Triton 3.6.
    for square, dtype in ((False, torch.bfloat16), (False, torch.float16), (True, torch.bfloat16)):
        for layout in LAYOUTS:
            if tile.is_explicit or not (square and layout == (True, True)):
                check(torch.randn(2, 300, 389, device="cuda").to(dtype), layout, square)
    block_quantize._make_plan.cache_clear()


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("square", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_programs_than_tiles(layout, square, dtype):
    options = {"square": square, "rowwise": layout[0], "transposed": layout[1]}
    for shape in ((3, 256, 512), (2, 389, 712)):
        x = torch.randn(shape, device="cuda").to(dtype)
        expected = quantize_blocks(x, "e4m3", **options)
        for limit in (1, 7):
            made = quantize_blocks(x, "e4m3", max_programs=limit, **options)
            for copy, same in zip(filter(None, made), filter(None, expected)):
                assert torch.equal(copy.codes, same.codes)
                assert torch.equal(bits(copy.scale_inv), bits(same.scale_inv))


@pytest.mark.parametrize("cast", (teb.per_token_cast_to_fp8, teb.per_block_cast_to_fp8))
def test_sm_limit(cast, monkeypatch):
    grids = []

    def find_recorder(tile):
        return lambda num_programs, *others: grids.append(num_programs)

    monkeypatch.setattr(block_quantize, "_launch_kernel", find_recorder)
    x = torch.randn(2, 389, 712, device="cuda")
    with teb.limit_sms(5):
        cast(x, with_transpose=True)
    cast(x, with_transpose=True)
    assert grids == [5, 2 * 4 * 6]


@pytest.mark.skipif(
    torch.cuda.get_device_capability() != (9, 0), reason="TE keeps 128-blocks on Hopper only"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("dim", (1, 2))
def test_the_bytes_of_te(dim, fp8, dtype):
    """Codes and scales of TE's own kernels, in the layout of its buffers."""
    for power_of_two in (True, False):
        for shape in ((256, 512), (2, 128, 384), (389, 712), (3, 40, 200)):
            x = torch.randn(shape, device="cuda").to(dtype)
            x.view(-1, shape[-1])[:, :128] = 0.0
            quantizer = te.Float8BlockQuantizer(
                FP8[fp8],
                rowwise=True,
                columnwise=True,
                block_scaling_dim=dim,
                force_pow_2_scales=power_of_two,
            )
            expected = quantizer(x)
            made = quantize_blocks(
                x.view(-1, shape[-1]), fp8, square=dim == 2, transposed=True,
                power_of_two=power_of_two, aligned_scales=True,
            )  # fmt: skip
            for usage, copy in zip(("rowwise", "columnwise"), made):
                data = getattr(expected, f"_{usage}_data")
                assert torch.equal(copy.codes, data.view(copy.codes.shape)), (shape, usage)
                rows, blocks = copy.scale_inv.shape
                scale_inv = getattr(expected, f"_{usage}_scale_inv")
                scale_inv = scale_inv[:rows, :blocks] if dim == 2 else scale_inv[:blocks, :rows].t()
                assert torch.equal(bits(copy.scale_inv), bits(scale_inv)), (shape, usage)


@pytest.mark.parametrize("cast", (teb.per_token_cast_to_fp8, teb.per_block_cast_to_fp8))
def test_public_functions_are_those_of_the_cpu(cast):
    for shape in ((2, 130, 200), (389, 712), (0, 128), (4, 0)):
        x = torch.randn(shape)
        for tensor, expected in zip(
            cast(x.cuda(), with_transpose=True), cast(x, with_transpose=True)
        ):
            values = tensor.values.view(torch.uint8).cpu()
            assert torch.equal(values, expected.values.view(torch.uint8))
            assert torch.equal(bits(tensor.scale_inv.cpu()), bits(expected.scale_inv))


def test_views_and_streams():
    x = torch.randn(4, 300, 520, device="cuda").bfloat16()
    for view in (x.mT, x[:, ::2, 8:], x[1:, 3:], x.transpose(0, 1), x[:1].expand(3, -1, -1)):
        for cast in (teb.per_token_cast_to_fp8, teb.per_block_cast_to_fp8):
            made, expected = cast(view), cast(view.contiguous())
            assert torch.equal(made.values.view(torch.uint8), expected.values.view(torch.uint8))
            assert torch.equal(made.scale_inv, expected.scale_inv)


def test_graph():
    x = torch.randn(2, 256, 384, device="cuda").bfloat16()
    teb.per_token_cast_to_fp8(x, with_transpose=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = teb.per_token_cast_to_fp8(x, with_transpose=True)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for tensor, expected in zip(made, teb.per_token_cast_to_fp8(x, with_transpose=True)):
        assert torch.equal(tensor.values.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(tensor.scale_inv, expected.scale_inv)
