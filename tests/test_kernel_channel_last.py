# SPDX-License-Identifier: Apache-2.0
"""The channel-last kernels without a GPU: launch plans, what Triton compiles, bytes under its interpreter.

Triton decides at its import whether it interprets, so the tests of bytes run in a process of their own.
"""

from __future__ import annotations

import pytest
import torch
import triton
from expected_codes import LAYOUTS, TORCH_FP8, assert_codes, special_values
from interpreted import IS_INTERPRETED, give_device_arithmetic, run_interpreted

from transformer_engine_batched.kernels import channel_last, permute
from transformer_engine_batched.kernels.channel_last import (
    Tile,
    can_quantize,
    find_cast,
)
from transformer_engine_batched.kernels.permute import copy_permuted
from transformer_engine_batched.reference import quantizers

# Views ``[*batch, R, C]`` of a tensor ``[B, N, M, D]`` that are contiguous along a batch dim.
VIEWS = {
    "b d n m": (0, 3, 1, 2),
    "b d m n": (0, 3, 2, 1),
    "d b n m": (3, 0, 1, 2),
    "n d b m": (1, 3, 0, 2),
}


class TestPlan:
    """What is described, how tiles fit, and what is refused."""

    @staticmethod
    def plan(x, *, rowwise=True, transposed=True, multiple=16, tile=None):
        return channel_last._make_plan(
            x.shape, x.stride(), torch.bfloat16, True, rowwise, transposed, multiple, tile
        )

    def test_programs_cover_the_padded_matrices(self):
        x = torch.empty(2, 100, 70, 40, device="meta").permute(0, 3, 1, 2)
        plan = self.plan(x, tile=Tile(64, 16, 32, 64, 32, 4))
        assert (plan.rowwise_shape, plan.transposed_shape) == ((2, 40, 112, 80), (2, 40, 80, 112))
        # Items of the other dims, groups, channel tiles, programs of both layouts in a group.
        assert plan.num_programs == 2 * (2 * 3) * 2 * (64 * 32 // 16 + 64 * 32 // 64)
        assert not plan.is_even and not plan.is_flipped
        assert (plan.channels, plan.inner) == ((40, 1, 1), (2, 280000, 40))

    def test_rows_are_further_apart_than_columns(self):
        x = torch.empty(1, 64, 128, 32, device="meta").permute(0, 3, 2, 1)
        plan = self.plan(x, transposed=False)
        assert plan.is_flipped and (plan.num_rows, plan.num_cols) == (64, 128)
        assert plan.rowwise_shape == (1, 32, 128, 64) and plan.transposed_shape is None

    @pytest.mark.parametrize("rowwise, transposed", LAYOUTS)
    @pytest.mark.parametrize("channels", (1, 3, 16, 24, 64, 128, 130, 200, 384))
    @pytest.mark.parametrize("rows, cols", ((16, 16), (16, 4096), (400, 400), (2048, 32)))
    def test_tiles_fit(self, rows, cols, channels, rowwise, transposed):
        tile = channel_last._choose_tile(rows, cols, channels, rowwise, transposed)
        assert all(value & (value - 1) == 0 for value in tile)
        assert tile.channels <= triton.next_power_of_2(channels) and tile.num_warps <= 4
        assert tile.row_run <= triton.next_power_of_2(rows)
        assert tile.col_run <= triton.next_power_of_2(cols)
        if rowwise:
            assert tile.group_cols % tile.col_run == 0
        if transposed:
            assert tile.group_rows % tile.row_run == 0
        runs = tile.col_run * rowwise, tile.row_run * transposed
        assert max(runs) * tile.channels <= 16384

    def test_refusals(self):
        x = torch.empty(2, 32, 64, 8, device="meta").permute(0, 3, 1, 2)
        with pytest.raises(ValueError, match=r"contiguous batch dim.*stride \(16384, 512, 8, 1\)"):
            self.plan(x.permute(0, 2, 3, 1))
        with pytest.raises(ValueError, match="neither rowwise nor transposed"):
            self.plan(x, rowwise=False, transposed=False)
        with pytest.raises(ValueError, match="multiple of 16.*came as 24"):
            self.plan(x, multiple=24)
        with pytest.raises(TypeError, match="torch.float64.*convert it first"):
            channel_last._make_plan(x.shape, x.stride(), torch.float64, True, True, True, 16)
        if not IS_INTERPRETED:
            with pytest.raises(ValueError, match="on the CPU"):
                channel_last._make_plan(x.shape, x.stride(), torch.float32, False, True, True, 16)

    def test_other_layouts_are_for_others(self):
        x = torch.empty(2, 32, 64, 8, device="meta")
        channels = x.permute(0, 3, 1, 2)
        described = lambda y: channel_last._describe(y.shape, y.stride()) is not None  # noqa: E731
        assert described(channels) and described(channels.mT) and described(channels[:, :5])
        assert described(channels[:, :, :30]) is False  # two steps between items: no amax in rows
        assert described(channels[:1, :, :30])
        for other in (x, x.mT, channels[:, :, :, :1][..., 0], channels[:, :, :0], channels[:, ::2]):
            assert not described(other)

    def test_permutations_that_are_torch_s(self):
        x = torch.empty(2, 8, 32, 64, device="meta")
        target = torch.empty(2, 32, 64, 8, device="meta").permute(0, 3, 1, 2)
        make = lambda y, z: permute._make_plan(
            y.shape, y.stride(), z.stride(), 2, y.shape[-1]
        )  # noqa: E731
        plan = make(x, target)
        assert (plan.read, plan.written) == ((64, 1, 8), (8, 2048, 1))
        assert make(target, x) is not None
        for pair in (
            (x, x),
            (target, target),
            (x[..., ::2], target[..., ::2]),
            (x[:0], target[:0]),
        ):
            assert make(*pair) is None


# Sizes that decide how wide an access at an edge may be.
_MULTIPLES_OF_16 = ("num_channels", "num_readable", "num_written")


class TestCompiled:
    """What Triton makes of the kernels for Hopper; it needs no GPU."""

    __test__ = not IS_INTERPRETED

    @staticmethod
    def compile(kernel, num_warps, *, missing=(), dtype="bf16", **constants):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        constants |= {name: None for name in missing}
        signature, attributes = {}, {}
        for index, parameter in enumerate(kernel.params):
            name = parameter.name
            if name in constants:
                signature[name] = "constexpr"
                continue
            is_code, is_value = name in ("codes_ptr", "transposed_ptr"), name in (
                "x_ptr",
                "out_ptr",
            )
            signature[name] = (
                f"*{dtype}"
                if is_value
                else "*u8" if is_code else "*fp32" if "_ptr" in name else "i32"
            )
            if name == "amax_epsilon":
                signature[name] = "fp32"
            elif is_code or is_value or "stride" in name or name in _MULTIPLES_OF_16:
                attributes[(index,)] = [["tt.divisibility", 16]]
        places = {parameter.name: index for index, parameter in enumerate(kernel.params)}
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(places[name],): value for name, value in constants.items()},
            attrs=attributes,
        )
        return triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}
        )

    @pytest.mark.parametrize("is_even", (True, False))
    @pytest.mark.parametrize("dtype", ("bf16", "fp32"))
    @pytest.mark.parametrize(
        "missing", ((), ("transposed_ptr",), ("codes_ptr",), ("scale_ptr",)), ids=str
    )
    def test_values_are_turned_and_not_codes(self, missing, dtype, is_even):
        """The assembler (ptxas 12.8) misplaces FP8 codes of which bytes are moved apart."""
        rowwise, transposed = "codes_ptr" not in missing, "transposed_ptr" not in missing
        tile = channel_last._choose_tile(2048, 2048, 128, rowwise, transposed)
        kernel = self.compile(
            channel_last._cast_kernel,
            tile.num_warps,
            missing=missing,
            dtype=dtype,
            POWER_OF_2=False,
            E5M2=False,
            EVEN=is_even,
            MULTIPLE=16,
            NUM_PARTIALS=528 if "scale_ptr" in missing else 1,
            ROW_RUN=tile.row_run,
            COL_RUN=tile.col_run,
            CHANNELS=tile.channels,
            GROUP_ROWS=tile.group_rows,
            GROUP_COLS=tile.group_cols,
        )
        turns = [line for line in kernel.asm["ttgir"].splitlines() if "ttg.convert_layout" in line]
        wide = "xi32," if dtype == "fp32" else "xbf16,"
        assert len(turns) >= rowwise + transposed
        assert all("xi8," not in line and "xf8" not in line for line in turns)
        assert sum(wide in line for line in turns) >= rowwise + transposed
        ptx = kernel.asm["ptx"]
        assert "cvt.rn.satfinite.e4m3x2.f32" in ptx and ".ftz" not in ptx
        assert "ld.global" in ptx and ".v4.b32" in ptx and "st.global.v4.b32" in ptx

    @pytest.mark.parametrize("is_even", (True, False))
    def test_permutation(self, is_even):
        tile = permute.TILES[2]
        kernel = self.compile(
            permute._permute_kernel,
            tile.num_warps,
            EVEN=is_even,
            BLOCK_READ=tile.read,
            BLOCK_WRITTEN=tile.written,
        )
        ptx = kernel.asm["ptx"]
        assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx


class TestInOwnProcess:
    """Starts the interpreted tests."""

    __test__ = not IS_INTERPRETED

    def test_interpreted(self):
        run_interpreted(__file__)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and division by zero
class TestInterpreted:
    """The kernels' bytes, on the CPU."""

    __test__ = IS_INTERPRETED

    @pytest.fixture(autouse=True)
    def device_arithmetic(self, monkeypatch):
        give_device_arithmetic(monkeypatch)

    @pytest.fixture(autouse=True)
    def seed_and_filled_memory(self):
        """New outputs hold 0xFF, so that padding which is not written shows."""
        torch.manual_seed(20260402)
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
    @pytest.mark.parametrize(
        "shape, dtype", (((2, 19, 20, 3), torch.bfloat16), ((1, 16, 16, 24), torch.float32))
    )
    def test_delayed(self, shape, dtype, view, layout):
        x = torch.randn(shape).to(dtype).permute(view)
        scale, amax = torch.tensor([37.5]), torch.tensor([0.25])
        rowwise, transposed = layout
        outputs = find_cast(x, "e4m3", rowwise=rowwise, transposed=transposed).with_scale(
            x, scale, amax
        )
        assert_codes(outputs, x, scale, "e4m3", layout)
        assert amax.item() == x.abs().max().item()

    @pytest.mark.parametrize("fp8_dtype", TORCH_FP8)
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
    @pytest.mark.parametrize("scale", (-3.0, 1.5e30, float("nan")))
    def test_values(self, dtype, fp8_dtype, scale):
        x = special_values(dtype).reshape(1, 16, 16, 16).permute(0, 3, 1, 2)
        scale, amax = torch.tensor([scale]), torch.zeros(1)
        outputs = find_cast(x, fp8_dtype, rowwise=True, transposed=True).with_scale(x, scale, amax)
        assert_codes(outputs, x, scale, fp8_dtype, (True, True))
        assert amax.item() == float("inf")

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("scale", (-1.0, float("inf")))
    def test_padding_is_zero_whatever_the_scale(self, scale, layout):
        x = torch.randn(1, 17, 20, 3).permute(0, 3, 1, 2)
        scale, amax = torch.tensor([scale]), torch.zeros(1)
        rowwise, transposed = layout
        outputs = find_cast(
            x, "e5m2", rowwise=rowwise, transposed=transposed, multiple=32
        ).with_scale(x, scale, amax)
        assert_codes(outputs, x, scale, "e5m2", layout, 32)

    def test_views_of_larger_tensors(self):
        whole = torch.randn(3, 18, 12, 6).half()
        for x in (whole[..., 2:5], whole[2:, ..., 4:], whole[:1, 3:, :11], whole[:2, :, :1]):
            x = x.permute(0, 3, 1, 2)
            assert can_quantize(x)
            scale, amax = torch.tensor([2.0]), torch.zeros(1)
            outputs = find_cast(x, "e4m3", rowwise=True, transposed=True).with_scale(x, scale, amax)
            assert_codes(outputs, x, scale, "e4m3", (True, True))
            assert amax.item() == x.abs().max().item()

    def test_amax_keeps_what_is_larger_and_passes_over_nan(self):
        x = torch.randn(1, 16, 10, 4).permute(0, 3, 1, 2)
        x[0, 1, 2, 3] = nan = float("nan")
        for layout in LAYOUTS:
            for start in (0.0, 100.0, nan):
                amax = torch.tensor([start])
                find_cast(x, "e4m3", rowwise=layout[0], transposed=layout[1]).with_scale(
                    x, torch.ones(1), amax
                )
                found = quantizers.tensor_amax(x).item()
                assert torch.equal(amax.isnan(), torch.tensor([start != start]))
                assert start != start or amax.item() == max(start, found)

    @pytest.mark.parametrize("power_of_2", (False, True))
    @pytest.mark.parametrize("largest", (0.0, 1e-40, 0.1, 3.3, 3.4e38, float("inf")))
    def test_current_scale(self, largest, power_of_2):
        x = torch.linspace(-1, 1, 16 * 12 * 3).reshape(1, 16, 12, 3) * largest
        x = x.nan_to_num(nan=0.5).permute(0, 3, 1, 2)
        x[0, 0, 0, 0] = float("nan")
        rule = {"amax_epsilon": 0.05, "force_pow_2_scales": power_of_2}
        outputs = find_cast(x, "e5m2", rowwise=True, transposed=True, **rule).with_own_scale(x)
        scale = quantizers.scale_from_amax(quantizers.tensor_amax(x), torch.float8_e5m2, **rule)
        assert_codes(outputs, x, scale, "e5m2", (True, True))

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
    @pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
    def test_permutation(self, view, dtype):
        wanted = torch.randn(2, 19, 37, 5).to(dtype).permute(view)
        target = torch.empty(2, 19, 37, 5, dtype=dtype).permute(view)
        cut = torch.randn(*wanted.shape[:-1], 48).to(dtype)[..., : wanted.shape[-1]].copy_(wanted)
        for x in (wanted.contiguous(), cut):
            target.fill_(float("nan"))
            assert copy_permuted(x, target) is target
            assert torch.equal(target, wanted)
        back = torch.full_like(wanted, float("nan"), memory_format=torch.contiguous_format)
        assert torch.equal(copy_permuted(wanted, back), wanted)

    def test_permutation_checks_its_arguments(self):
        x = torch.empty(2, 3, 4)
        for out in (torch.empty(2, 4, 3), x.half()):
            with pytest.raises(ValueError, match="both must be the same"):
                copy_permuted(x, out)
