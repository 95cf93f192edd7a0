# SPDX-License-Identifier: Apache-2.0
"""Casts to FP8 with 128-blocks without a GPU: values, layouts, refusals, and the kernel interpreted."""

from __future__ import annotations

import pytest
import torch
import transformer_engine.pytorch as te
from block_data import bits, special_matrix
from expected_codes import LAYOUTS, TORCH_FP8
from interpreted import IS_INTERPRETED, give_device_arithmetic, run_interpreted

import transformer_engine_batched as teb
from transformer_engine_batched.kernels import block_quantize
from transformer_engine_batched.kernels.block_quantize import Tile, quantize_blocks
from transformer_engine_batched.reference import blockwise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((256, 256), (2, 128, 384), (2, 3, 40, 200), (3, 389, 130), (5, 1), (1, 16), (1, 130, 712))


class TestByHand:
    """The rule, on blocks whose scales are known without it."""

    __test__ = not IS_INTERPRETED

    def test_each_block_has_its_own_scale(self):
        x = torch.ones(2, 384)
        x[0, 128:256] = 3.5
        x[1, 383] = -896.0
        values, scale_inv = teb.per_token_cast_to_fp8(x)
        expected = torch.tensor([[1 / 448, 1 / 128, 1 / 448], [1 / 448, 1 / 448, 2.0]])
        torch.testing.assert_close(scale_inv, expected, rtol=1e-6, atol=0)
        assert values.dtype == torch.float8_e4m3fn
        assert values[1, 383].item() == -448.0 and values[0, 0].item() == 448.0

    def test_square_blocks(self):
        x = torch.ones(200, 130)
        x[0, 0], x[199, 129] = 3.5, 7.0
        values, scale_inv = teb.per_block_cast_to_fp8(x)
        expected = torch.tensor([[1 / 128, 1 / 448], [1 / 448, 1 / 64]])
        torch.testing.assert_close(scale_inv, expected, rtol=1e-6, atol=0)
        assert values[127, 0].item() == 128.0 and values[128, 129].item() == 64.0

    @pytest.mark.parametrize("cast", (teb.per_token_cast_to_fp8, teb.per_block_cast_to_fp8))
    def test_zeros(self, cast):
        """No NaN, whatever epsilon is: by default the clamp of DeepGEMM's cast."""
        values, scale_inv = cast(torch.zeros(128, 256))
        assert bool((values.float() == 0).all())
        torch.testing.assert_close(scale_inv, torch.full_like(scale_inv, 1e-4 / 448))
        values, scale_inv = cast(torch.zeros(128, 256), epsilon=0.0)
        assert bool((values.float() == 0).all()) and bool((scale_inv == 1.0).all())

    def test_powers_of_two_round_the_range_up(self):
        x = torch.rand(64, 256) + 0.1
        plain, rounded = (teb.per_token_cast_to_fp8(x, power_of_two=p) for p in (False, True))
        assert torch.equal(bits(rounded.scale_inv) & 0x7FFFFF, torch.zeros_like(bits(x[:, :2])))
        ratio = rounded.scale_inv / plain.scale_inv
        assert bool(((ratio >= 0.999) & (ratio < 2.0)).all())

    def test_m_major_scales(self):
        x = torch.randn(2, 33, 300)
        plain = teb.per_token_cast_to_fp8(x)
        aligned = teb.per_token_cast_to_fp8(x, scale_layout="m_major")
        assert torch.equal(plain.scale_inv, aligned.scale_inv)
        assert plain.scale_inv.stride() == (99, 3, 1)
        assert aligned.scale_inv.stride() == (33, 1, 68)

    @pytest.mark.parametrize("power_of_two", (False, True))
    @pytest.mark.parametrize("shape", SHAPES)
    def test_end_to_end(self, shape, power_of_two):
        """Normal data keeps 28 dB, ragged edges included, in both layouts."""
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for square, cast in ((False, teb.per_token_cast_to_fp8), (True, teb.per_block_cast_to_fp8)):
            made = cast(x, power_of_two=power_of_two, with_transpose=True)
            for tensor, expected in zip(made, (x, x.mT)):
                rows = 128 if square else 1
                factors = tensor.scale_inv.repeat_interleave(128, -1).repeat_interleave(rows, -2)
                factors = factors[..., : expected.shape[-2], : expected.shape[-1]]
                error = (tensor.values.double() * factors - expected).norm() / expected.norm()
                assert error < 0.04 or x.numel() < 64 and error < 0.0626


class TestAgainstReference:
    """The public functions and `reference.blockwise.cast_blocks`, which is tested against TE's bytes."""

    __test__ = not IS_INTERPRETED

    @pytest.mark.parametrize("square", (False, True))
    def test_blocks_start_anew_in_each_item(self, square):
        x = torch.randn(3, 200, 300)
        codes, scale_inv = blockwise.cast_blocks(x, torch.float8_e4m3fn, square=square)
        for item in range(3):
            one = blockwise.cast_blocks(x[item], torch.float8_e4m3fn, square=square)
            assert torch.equal(codes[item], one[0]) and torch.equal(scale_inv[item], one[1])

    @pytest.mark.parametrize("epsilon", (0.0, 1e-2))
    @pytest.mark.parametrize("power_of_two", (False, True))
    @pytest.mark.parametrize("square", (False, True))
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_matrix_is_quantized_as_by_te(self, dtype, square, power_of_two, epsilon):
        x = special_matrix(dtype)[0]
        cast = teb.per_block_cast_to_fp8 if square else teb.per_token_cast_to_fp8
        made = cast(x, epsilon=epsilon, power_of_two=power_of_two, with_transpose=True)
        quantizer = te.Float8BlockQuantizer(
            te.DType.kFloat8E4M3,
            rowwise=True,
            columnwise=True,
            amax_epsilon=epsilon,
            force_pow_2_scales=power_of_two,
            block_scaling_dim=2 if square else 1,
        )
        expected = blockwise.quantize(x, quantizer)
        for usage, tensor in zip(("rowwise", "columnwise"), made):
            data = getattr(expected, f"_{usage}_data")
            scale_inv = getattr(expected, f"_{usage}_scale_inv")
            rows, blocks = tensor.scale_inv.shape
            scale_inv = scale_inv[:rows, :blocks] if square else scale_inv[:blocks, :rows].t()
            assert torch.equal(tensor.values.view(torch.uint8), data)
            assert torch.equal(bits(tensor.scale_inv), bits(scale_inv))

    @pytest.mark.parametrize("shape", ((0, 128), (2, 0, 256), (0, 3, 128), (4, 0)))
    def test_empty(self, shape):
        values, scale_inv = teb.per_token_cast_to_fp8(torch.empty(shape))
        assert values.shape == torch.Size(shape)
        assert scale_inv.shape == (*shape[:-1], -(-shape[-1] // 128))
        values, scale_inv = teb.per_block_cast_to_fp8(torch.empty(shape))
        assert scale_inv.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))

    @pytest.mark.parametrize(
        "view",
        (
            lambda x: x.mT,
            lambda x: x[:, ::2, 3:],
            lambda x: x[:1].expand(3, -1, -1),
            lambda x: x[1],
        ),
    )
    def test_views(self, view):
        x = view(torch.randn(3, 140, 200))
        for cast in (teb.per_token_cast_to_fp8, teb.per_block_cast_to_fp8):
            made, expected = cast(x), cast(x.clone(memory_format=torch.contiguous_format))
            assert torch.equal(made.values.view(torch.uint8), expected.values.view(torch.uint8))
            assert torch.equal(made.scale_inv, expected.scale_inv)

    def test_no_gradient(self):
        values, scale_inv = teb.per_token_cast_to_fp8(torch.randn(4, 128, requires_grad=True))
        assert not (values.requires_grad or scale_inv.requires_grad)


class TestRefusals:
    """What is refused, and what the message says."""

    __test__ = not IS_INTERPRETED

    @pytest.mark.parametrize(
        "x, options, error, match",
        (
            (torch.ones(128), {}, ValueError, r"shape \[128\].*unsqueeze"),
            (torch.ones(2, 128).int(), {}, TypeError, "dtype torch.int32"),
            ("x", {}, TypeError, "got str"),
            (torch.ones(2, 128), {"epsilon": -1.0}, ValueError, "epsilon=-1.0"),
            (torch.ones(2, 128), {"epsilon": float("nan")}, ValueError, "epsilon=nan"),
            (torch.ones(2, 128), {"fp8_dtype": torch.int8}, TypeError, "fp8_dtype=torch.int8"),
            (torch.ones(2, 128), {"scale_layout": "rows"}, ValueError, "scale_layout='rows'"),
        ),
    )
    def test_messages(self, x, options, error, match):
        with pytest.raises(error, match=match):
            teb.per_token_cast_to_fp8(x, **options)

    def test_old_devices(self):
        from transformer_engine_batched.support import CPU, Device, find_block_caster

        ampere = Device("Ampere", (8, 0))
        with pytest.raises(teb.UnsupportedError, match=r"Ampere.*8\.9.*emulate"):
            find_block_caster(ampere, emulate=False)
        assert find_block_caster(ampere, emulate=True) == "reference"
        assert find_block_caster(CPU, emulate=False) == "reference"
        hopper = Device("Hopper", (9, 0))
        assert find_block_caster(hopper, emulate=True) == "triton"
        assert find_block_caster(hopper, emulate=True, force_reference=True) == "reference"

    @pytest.mark.parametrize(
        "arguments, match",
        (
            (((64,), (1,)), r"needs a matrix.*shape \(64,\)"),
            (((2, 32, 64), (2048, 1, 32)), r"contiguous last dim.*pass x.contiguous"),
            (((2, 3, 32, 64), (2048, 8192, 64, 1)), "batch dims that merge"),
        ),
    )
    def test_kernel_plans(self, arguments, match):
        shape, strides = arguments
        with pytest.raises(ValueError, match=match):
            block_quantize._make_plan(
                torch.Size(shape), strides, torch.bfloat16, True, False, True, True, False
            )


class TestPlan:
    """Programs, folding and layouts of outputs."""

    __test__ = not IS_INTERPRETED

    @staticmethod
    def plan(shape, *, square=False, rowwise=True, transposed=False, aligned=False, tile=None):
        strides = torch.empty(shape, device="meta").stride()
        return block_quantize._make_plan(
            torch.Size(shape),
            strides,
            torch.bfloat16,
            True,
            square,
            rowwise,
            transposed,
            aligned,
            tile,
        )

    def test_rows_fold_where_no_block_spans_them(self):
        tile = Tile(128, 8)
        assert self.plan((64, 16, 256), tile=tile).num_tiles == 8 * 2
        assert self.plan((64, 16, 256), tile=tile, square=True).num_tiles == 64 * 2
        assert self.plan((64, 16, 256), tile=tile, transposed=True).num_tiles == 64 * 2

    def test_rows_of_codes_are_aligned(self):
        layout = self.plan((3, 20, 130), square=True, transposed=True).transposed
        assert layout.codes_shape == (3, 130, 32) and layout.num_cols == 20
        assert layout.view_shape == (3, 2, 1)

    def test_aligned_scales_are_te_s(self):
        quantizer = te.Float8BlockQuantizer(te.DType.kFloat8E4M3, rowwise=True, columnwise=True)
        for square in (False, True):
            quantizer.block_scaling_dim = 2 if square else 1
            for rows, cols in ((384, 256), (200, 389), (5, 7)):
                plan = self.plan((rows, cols), square=square, transposed=True, aligned=True)
                for layout, columnwise in ((plan.rowwise, False), (plan.transposed, True)):
                    expected = quantizer.get_scale_shape((rows, cols), columnwise)
                    assert layout.scale_shape == expected

    @pytest.mark.parametrize("key", sorted(block_quantize.TILES))
    def test_the_table_holds_whole_blocks(self, key):
        square, what = key
        tile = block_quantize.TILES[key]
        assert tile.rows == 128 or not square and what == "rowwise"


class TestInOwnProcess:
    """Starts the interpreted tests."""

    __test__ = not IS_INTERPRETED

    def test_interpreted(self):
        run_interpreted(__file__)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and division by zero
class TestInterpreted:
    """The kernel's bytes, on the CPU."""

    __test__ = IS_INTERPRETED

    @pytest.fixture(autouse=True)
    def device_arithmetic(self, monkeypatch):
        """Also poisons new memory, so that what is not written shows."""
        give_device_arithmetic(monkeypatch)
        torch.manual_seed(20260402)
        torch.use_deterministic_algorithms(True)
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
        torch.use_deterministic_algorithms(False)

    @staticmethod
    def check(
        x,
        layout,
        square,
        fp8="e4m3",
        epsilon=0.0,
        power_of_two=False,
        aligned=False,
        max_programs=0,
    ):
        rowwise, transposed = layout
        made = quantize_blocks(
            x, fp8, square=square, rowwise=rowwise, transposed=transposed, amax_epsilon=epsilon,
            power_of_two=power_of_two, aligned_scales=aligned, max_programs=max_programs,
        )  # fmt: skip
        for copy, source, wanted in zip(made, (x, x.mT), layout):
            assert (copy is not None) == wanted
            if not wanted:
                continue
            codes, scale_inv = blockwise.cast_blocks(
                source,
                TORCH_FP8[fp8],
                square=square,
                amax_epsilon=epsilon,
                power_of_two=power_of_two,
            )
            if source.numel():
                assert copy.codes.stride(-1) == 1 and copy.codes.stride(-2) % 16 == 0
            assert torch.equal(copy.codes, codes)
            assert copy.scale_inv.shape == scale_inv.shape
            assert torch.equal(bits(copy.scale_inv), bits(scale_inv))

    @pytest.mark.parametrize("aligned", (False, True))
    @pytest.mark.parametrize("square", (False, True))
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", ((256, 256), (2, 3, 40, 200), (5, 1)))
    def test_layouts(self, shape, layout, square, aligned):
        self.check(torch.randn(shape).bfloat16(), layout, square, aligned=aligned)

    @pytest.mark.parametrize("square", (False, True))
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_limit_of_programs(self, layout, square, monkeypatch):
        """Fewer programs than tiles, a number that does not divide theirs; and more than there are."""
        find_launcher, grids = block_quantize._launch_kernel, []

        def find_recorder(tile):
            def launch(num_programs, *others):
                grids.append(num_programs)
                find_launcher(tile)(num_programs, *others)

            return launch

        monkeypatch.setattr(block_quantize, "_launch_kernel", find_recorder)
        x = torch.randn(3, 260, 300).bfloat16()
        for limit in (1, 4, 1000):
            self.check(x, layout, square, max_programs=limit)
        assert grids[:2] == [1, 4] and 4 < grids[2] < 1000

    @pytest.mark.parametrize("rule", ((0.0, False), (0.0, True), (1e-2, False)))
    @pytest.mark.parametrize("square", (False, True))
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_values(self, dtype, square, rule):
        fp8 = "e5m2" if rule[1] else "e4m3"
        self.check(special_matrix(dtype), (True, True), square, fp8, *rule)

    @pytest.mark.parametrize(
        "view",
        (
            lambda x: x.transpose(0, 1),
            lambda x: x[:, ::2, 8:56],
            lambda x: x[:1].expand(3, -1, -1),
            lambda x: x.view(3, 2, 12, 64)[:, :, :, 1:],
        ),
    )
    def test_views(self, view):
        for square in (False, True):
            self.check(view(torch.randn(3, 24, 64).half()), (True, True), square)

    @pytest.mark.parametrize("shape", ((0, 128), (2, 0, 256), (4, 0)))
    def test_empty(self, shape):
        for square in (False, True):
            self.check(torch.empty(shape), (True, False), square)
