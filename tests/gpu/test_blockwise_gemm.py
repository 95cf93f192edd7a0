# SPDX-License-Identifier: Apache-2.0
"""Block-scaled products on the GPU: the CUDA kernel in all modes against FP64 of the dequantised operands.

Every output holds NaN before.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from blockwise_cases import KERNEL_BOUNDS_DB, make_operand, poisoned_out

from transformer_engine_batched.kernels import blockwise_gemm_triton
from transformer_engine_batched.kernels.blockwise_gemm import (
    TILES,
    Tile,
    multiply_blockwise,
    multiply_blockwise_k_grouped,
)

GRANULARITIES = ((1, 128), (1, 1), (128, 1), (128, 128))

pytestmark = pytest.mark.skipif(
    torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for Hopper"
)


def check(out, exact):
    assert_accurate(out, exact, KERNEL_BOUNDS_DB[out.dtype])


def make_sides(
    num_items,
    m,
    n,
    k,
    granularities=(1, 128),
    layouts=("flat", "item"),
    fp8=("e4m3", "e4m3"),
):
    return [
        make_operand(
            num_items, rows, k, granularities[i], layouts[i], i + 1, fp8=fp8[i], device="cuda"
        )
        for i, rows in enumerate((m, n))
    ]


def multiply(sides, out, **options):
    a, b = sides
    multiply_blockwise(a.codes, b.codes, a.scales, b.scales, out, **options)


def exact_product(sides):
    return sides[0].exact @ sides[1].exact.mT


class TestBatched:
    @pytest.mark.parametrize("granularities", GRANULARITIES)
    @pytest.mark.parametrize("tile", [*TILES, None])
    @pytest.mark.parametrize("sizes", [(2, 512, 512, 512), (3, 389, 712, 384), (1, 1, 8, 128)])
    def test_tiles(self, sizes, tile, granularities):
        sides = make_sides(*sizes, granularities, ("flat", "flat"))
        out = poisoned_out(sizes[:3], torch.bfloat16, "cuda")
        multiply(sides, out, tile=tile)
        check(out, exact_product(sides))

    @pytest.mark.parametrize("layouts", [("flat", "item"), ("item", "flat"), ("shared", "item")])
    @pytest.mark.parametrize("granularities", GRANULARITIES)
    def test_layouts_of_scales(self, granularities, layouts):
        sides = make_sides(3, 200, 264, 640, granularities, layouts)
        out = poisoned_out((3, 200, 264), torch.float32, "cuda")
        multiply(sides, out)
        check(out, exact_product(sides))

    @pytest.mark.parametrize("dtype", KERNEL_BOUNDS_DB)
    @pytest.mark.parametrize("k", [16, 96, 300, 1040])
    def test_k_need_be_no_multiple_of_128(self, k, dtype):
        sides = make_sides(3, 130, 203, k)
        out = poisoned_out((3, 130, 203), dtype, "cuda")
        multiply(sides, out)
        check(out, exact_product(sides))

    @pytest.mark.parametrize("fp8", [("e5m2", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e5m2")])
    def test_formats(self, fp8):
        sides = make_sides(2, 200, 264, 640, fp8=fp8)
        for is_named in (False, True):
            out = poisoned_out((2, 200, 264), torch.float32, "cuda")
            codes = [side.codes.view(torch.uint8) if is_named else side.codes for side in sides]
            multiply_blockwise(*codes, sides[0].scales, sides[1].scales, out, formats=fp8)
            check(out, exact_product(sides))

    @pytest.mark.parametrize("n, padding", [(712, 0), (713, 3), (713, 0), (712, 24)])
    @pytest.mark.parametrize("accumulate", [False, True])
    def test_rows_of_out(self, n, padding, accumulate):
        sides = make_sides(3, 389, n, 384)
        for dtype in (torch.float32,) if accumulate else KERNEL_BOUNDS_DB:
            fill = 3000.0 if accumulate else None
            out = poisoned_out((3, 389, n), dtype, "cuda", padding, fill)
            beside = out.as_strided((3, 389, padding), out.stride(), n)
            before = beside.clone()
            multiply(sides, out, accumulate=accumulate)
            check(out, exact_product(sides) + (fill or 0.0))
            assert torch.equal(beside.nan_to_num(), before.nan_to_num())

    @pytest.mark.parametrize("num_sms", [1, 5, 17])
    @pytest.mark.parametrize("tile", TILES)
    def test_many_tiles_on_few_sms(self, tile, num_sms):
        sides = make_sides(19, 300, 200, 256)
        out = poisoned_out((19, 300, 200), torch.bfloat16, "cuda")
        multiply(sides, out, tile=tile, num_sms=num_sms)
        check(out, exact_product(sides))

    def test_views(self):
        a, _ = make_sides(4, 256, 8, 256)
        b = make_operand(1, 256, 256, 128, "shared", 2, device="cuda")
        exact = a.exact @ b.exact.mT
        interleaved = a.codes.view(torch.uint8).transpose(0, 1).contiguous().transpose(0, 1)
        for a_codes in (a.codes, interleaved):
            for b_codes in (b.codes, b.codes.expand(4, -1, -1)):
                out = poisoned_out((256, 4, 256), torch.bfloat16, "cuda").transpose(0, 1)
                multiply_blockwise(a_codes, b_codes, a.scales, b.scales, out)
                check(out, exact)

    @pytest.mark.parametrize("sizes", [(0, 8, 8, 128), (2, 0, 8, 128), (2, 8, 0, 128)])
    def test_empty(self, sizes):
        sides = make_sides(*sizes)
        multiply(sides, poisoned_out(sizes[:3], torch.bfloat16, "cuda"))

    def test_same_bits_each_time(self):
        sides = make_sides(8, 512, 512, 2048)
        outs = [poisoned_out((8, 512, 512), torch.float32, "cuda") for _ in range(5)]
        for out in outs:
            multiply(sides, out)
        assert all(torch.equal(out, outs[0]) for out in outs)

    def test_beyond_2_to_the_31_elements(self):
        sides = make_sides(1, 128, 128, 256)
        a, b = (side.codes.view(torch.uint8) for side in sides)
        a = a.expand(140000, -1, -1).reshape(140000, 128, 256)
        out = torch.full((140000, 128, 128), torch.nan, dtype=torch.bfloat16, device="cuda")
        scales = [side.scales._replace(rows_per_item=0) for side in sides]
        multiply_blockwise(a, b, *scales, out)
        assert a.numel() > 1 << 31 and out.numel() > 1 << 31
        check(out[-1:], exact_product(sides))
        assert torch.equal(out, out[:1].expand_as(out))


class TestMasked:
    @pytest.mark.parametrize("granularities", GRANULARITIES)
    @pytest.mark.parametrize("tile", [*TILES, None])
    def test_rows(self, tile, granularities):
        rows = [300, 0, 1, 129, 1000, -5, 64]
        sides = make_sides(7, 300, 264, 256, granularities, ("flat", "flat"))
        self.check_rows(sides, rows, tile=tile)

    @pytest.mark.parametrize(
        "rows", [[0] * 70, [0] * 69 + [300], [5] + [0] * 69, [7 * i % 301 for i in range(70)]]
    )
    def test_many_items(self, rows):
        sides = make_sides(70, 300, 136, 256)
        self.check_rows(sides, rows, expected_m=64)

    @staticmethod
    def check_rows(sides, rows, **options):
        shape = (len(rows), sides[0].codes.shape[1], sides[1].codes.shape[1])
        out = poisoned_out(shape, torch.bfloat16, "cuda")
        multiply(
            sides, out, masked_m=torch.tensor(rows, dtype=torch.int32, device="cuda"), **options
        )
        exact = exact_product(sides)
        for item, count in enumerate(max(0, min(x, shape[1])) for x in rows):
            check(out[item : item + 1, :count], exact[item : item + 1, :count])
            assert out[item, count:].isnan().all()

    def test_rows_of_nan_past_the_mask_do_no_harm(self):
        sides = make_sides(2, 300, 264, 256)
        masked_m = torch.tensor([100, 70], dtype=torch.int32, device="cuda")
        out = poisoned_out((2, 300, 264), torch.bfloat16, "cuda")
        sides[0].codes.view(torch.uint8)[0, 100:] = 0x7F
        sides[0].scales.values[:, 370:] = torch.nan
        multiply(sides, out, masked_m=masked_m)
        exact = exact_product(sides)
        check(out[:1, :100], exact[:1, :100])
        check(out[1:, :70], exact[1:, :70])

    def test_graph(self):
        sides = make_sides(6, 300, 256, 256)
        masked_m = torch.zeros(6, dtype=torch.int32, device="cuda")
        out = poisoned_out((6, 300, 256), torch.bfloat16, "cuda")
        multiply(sides, out, masked_m=masked_m)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            multiply(sides, out, masked_m=masked_m)
        assert out.isnan().all()
        masked_m.fill_(300)
        graph.replay()
        check(out, exact_product(sides))


class TestGroups:
    @pytest.mark.parametrize("granularities", GRANULARITIES)
    @pytest.mark.parametrize("tile", [*(tile for tile in TILES if tile.rows <= 128), None])
    def test_contiguous(self, tile, granularities):
        sizes, used = (128, 0, 256, 384, 128), (128, 0, 200, 300, 1)
        groups = [g for g, (s, u) in enumerate(zip(sizes, used)) for g in [g] * u + [-1] * (s - u)]
        groups = torch.tensor(groups + [-1] * 128, dtype=torch.int32, device="cuda")
        a = make_operand(1, len(groups), 384, granularities[0], "item", 1, device="cuda")
        b = make_operand(5, 264, 384, granularities[1], "flat", 2, device="cuda")
        out = poisoned_out((len(groups), 264), torch.bfloat16, "cuda")
        multiply_blockwise(
            a.codes[0], b.codes, a.scales, b.scales, out, m_indices=groups, tile=tile
        )
        is_used = groups >= 0
        exact = torch.einsum("mk,mnk->mn", a.exact[0, is_used], b.exact[groups[is_used].long()])
        check(out[is_used][None], exact[None])
        assert out[~is_used].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("accumulate", [False, True])
    @pytest.mark.parametrize("granularities", GRANULARITIES)
    def test_k_grouped(self, granularities, accumulate, dtype):
        if accumulate and dtype != torch.float32:
            return
        sizes = [256, 0, 128, 640] * 10
        a, b = make_sides(1, 200, 328, sum(sizes), granularities)
        before = 3000.0 if accumulate else 0.0
        out = poisoned_out((40, 200, 328), dtype, "cuda", fill=before if accumulate else None)
        sizes_there = torch.tensor(sizes, dtype=torch.int32, device="cuda")
        multiply_blockwise_k_grouped(
            a.codes[0], b.codes[0], a.scales, b.scales, out, sizes_there, accumulate=accumulate
        )
        parts = zip(a.exact[0].split(sizes, 1), b.exact[0].split(sizes, 1))
        check(out, before + torch.stack([x @ y.T for x, y in parts]))


class TestTritonForm:
    """The readable form runs on the GPU, too, and says the same."""

    @pytest.mark.parametrize("granularities", GRANULARITIES)
    def test_batched(self, granularities):
        sides = make_sides(3, 389, 712, 384, granularities, ("flat", "flat"))
        out = poisoned_out((3, 389, 712), torch.bfloat16, "cuda")
        a, b = sides
        blockwise_gemm_triton.multiply_blockwise(a.codes, b.codes, a.scales, b.scales, out)
        check(out, exact_product(sides))

    def test_masked(self):
        a, b = make_sides(3, 300, 264, 256)
        out = poisoned_out((3, 300, 264), torch.bfloat16, "cuda")
        rows = [300, 0, 77]
        blockwise_gemm_triton.multiply_blockwise(
            a.codes,
            b.codes,
            a.scales,
            b.scales,
            out,
            masked_m=torch.tensor(rows, dtype=torch.int32, device="cuda"),
        )
        exact = exact_product((a, b))
        for item, count in enumerate(rows):
            check(out[item : item + 1, :count], exact[item : item + 1, :count])
            assert out[item, count:].isnan().all()


def test_a_thread_without_a_context():
    import threading

    sides = make_sides(2, 64, 128, 128)
    out = poisoned_out((2, 64, 128), torch.bfloat16, "cuda")
    errors = []

    def run():
        try:
            multiply(sides, out, tile=Tile(64, 128, 2))
            torch.cuda.synchronize()
        except Exception as error:  # pylint: disable=broad-except
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors
    check(out, exact_product(sides))
