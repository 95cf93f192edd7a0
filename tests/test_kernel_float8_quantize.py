# SPDX-License-Identifier: Apache-2.0
"""The fused FP8 quantization kernels without a GPU: launch plans, and bytes under Triton's interpreter.

Triton decides at its import whether it interprets, so the tests of bytes run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
from expected_codes import LAYOUTS, TORCH_FP8, assert_codes, special_values

from transformer_engine_batched.kernels import float8_quantize, tensor_amax
from transformer_engine_batched.kernels.float8_quantize import (
    Tile,
    can_quantize,
    quantize_float8,
    quantize_float8_current,
)
from transformer_engine_batched.reference import codes as fp8_codes
from transformer_engine_batched.reference import quantizers

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def forget_plans():
    """After this, plans are made with the tiles of now."""
    for function in (
        float8_quantize._make_plan, float8_quantize._make_cast, tensor_amax.make_amax_plan
    ):  # fmt: skip
        function.cache_clear()


class TestPlan:
    """Numbers of programs, folding, and what is refused."""

    @staticmethod
    def plan(shape, *, strides=None, rowwise=True, transposed=True, multiple=16, tile=None):
        strides = strides or torch.empty(shape, device="meta").stride()
        return float8_quantize._make_plan(
            torch.Size(shape), strides, torch.bfloat16, True, rowwise, transposed, multiple, tile
        )

    def test_tiles_cover_the_padded_matrix(self):
        plan = self.plan((3, 100, 70), tile=Tile(32, 64, 4))
        assert (plan.rowwise_shape, plan.transposed_shape) == ((3, 112, 80), (3, 80, 112))
        assert plan.num_programs == 3 * 4 * 2
        assert not plan.is_even

    def test_even_needs_whole_tiles_and_no_padding(self):
        tile = Tile(32, 64, 4)
        assert self.plan((3, 64, 128), tile=tile).is_even
        assert not self.plan((3, 48, 128), tile=tile).is_even
        assert not self.plan((3, 64, 96), tile=tile).is_even
        assert not self.plan((3, 64, 128), tile=tile, multiple=256).is_even

    def test_row_wise_items_fold_into_rows(self):
        tile = Tile(64, 64, 4)
        folded = self.plan((4, 16, 64), transposed=False, tile=tile)
        assert (folded.num_rows, folded.batch_stride, folded.num_programs) == (64, 0, 1)
        # Neither where items are padded, nor apart in memory, nor turned each for itself.
        assert self.plan((4, 17, 64), transposed=False, tile=tile).num_rows == 17
        apart = self.plan((4, 16, 64), strides=(2048, 64, 1), transposed=False, tile=tile)
        assert (apart.num_rows, apart.num_programs) == (16, 4)
        assert self.plan((4, 16, 64), tile=tile).num_rows == 16

    def test_a_narrow_matrix_gets_a_narrow_tile_of_as_many_elements(self):
        tile = self.plan((1, 4096, 32), tile=Tile(64, 128, 4)).tile
        assert (tile.rows, tile.cols) == (256, 32)
        tile = self.plan((1, 16, 4096), tile=Tile(64, 128, 4)).tile
        assert (tile.rows, tile.cols) == (16, 512)
        tile = self.plan((1, 16, 16), tile=Tile(64, 128, 4)).tile
        assert (tile.rows, tile.cols) == (16, 16)

    @pytest.mark.parametrize("name", sorted(float8_quantize.TILES))
    def test_the_table_holds_what_triton_takes(self, name):
        tile = float8_quantize.TILES[name]
        for value in (tile.rows, tile.cols, tile.num_warps):
            assert value & (value - 1) == 0
        assert tile.rows >= 16 and tile.cols >= 16

    @pytest.mark.parametrize(
        "arguments, error, match",
        [
            ({"shape": (64,)}, ValueError, r"needs a matrix.*shape \(64,\)"),
            (
                {"shape": (2, 32, 64), "strides": (2048, 1, 32)},
                ValueError,
                r"contiguous last dim.*stride \(2048, 1, 32\); pass x.contiguous\(\)",
            ),
            (
                {"shape": (2, 3, 32, 64), "strides": (2048, 8192, 64, 1)},
                ValueError,
                "batch dims that merge into one stride",
            ),
            ({"shape": (2, 32, 64), "multiple": 8}, ValueError, "multiple of 16.*came as 8"),
            (
                {"shape": (2, 32, 64), "rowwise": False, "transposed": False},
                ValueError,
                "neither rowwise nor transposed",
            ),
        ],
    )
    def test_refusals(self, arguments, error, match):
        with pytest.raises(error, match=match):
            self.plan(**arguments)

    def test_dtype_and_device_are_refused(self):
        shape, strides = (2, 16, 16), (256, 16, 1)
        make = float8_quantize._make_plan
        with pytest.raises(TypeError, match="torch.float64.*convert it first"):
            make(shape, strides, torch.float64, True, True, True, 16)
        if not IS_INTERPRETED:
            with pytest.raises(ValueError, match="on the CPU"):
                make(shape, strides, torch.float32, False, True, True, 16)
            assert not can_quantize(torch.empty(2, 16, 16))


class TestCompiled:
    """What Triton and ptxas make of the kernels for Hopper; neither needs a GPU."""

    __test__ = not IS_INTERPRETED

    @staticmethod
    def compile(kernel, tile, *, missing=(), dtype="bf16", aligned=True, **constants):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        constants |= {name: None for name in missing}
        signature, attributes = {}, {}
        for index, parameter in enumerate(kernel.params):
            name = parameter.name
            if name in constants:
                signature[name] = "constexpr"
                continue
            is_code = name in ("codes_ptr", "transposed_ptr")
            signature[name] = (
                f"*{dtype}"
                if name in ("x_ptr", "y_ptr")
                else "*u8" if is_code else "*fp32" if "_ptr" in name else "i32"
            )
            if name == "amax_epsilon":
                signature[name] = "fp32"
            elif is_code or aligned and (name in ("x_ptr", "y_ptr") or signature[name] == "i32"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        places = {parameter.name: index for index, parameter in enumerate(kernel.params)}
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(places[name],): value for name, value in constants.items()},
            attrs=attributes,
        )
        return triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.num_warps}
        )

    @pytest.mark.parametrize("is_even", (True, False))
    @pytest.mark.parametrize("is_e5m2", (True, False))
    @pytest.mark.parametrize(
        "name, missing",
        (
            ("rowwise", ("transposed_ptr",)),
            ("transposed", ("codes_ptr",)),
            ("both", ()),
            ("both", ("scale_ptr",)),
        ),
    )
    def test_cast(self, name, missing, is_e5m2, is_even):
        tile = float8_quantize.TILES[name]
        kernel = self.compile(
            float8_quantize._cast_kernel,
            tile,
            missing=missing,
            POWER_OF_2=False,
            E5M2=is_e5m2,
            EVEN=is_even,
            MULTIPLE=16,
            NUM_PARTIALS=tensor_amax.MAX_PARTIALS if "scale_ptr" in missing else 1,
            WAITS="scale_ptr" in missing,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLS=tile.cols,
        )
        ptx = kernel.asm["ptx"]
        # The instruction that the reference writes down; FP32 subnormals are not flushed.
        assert f"cvt.rn.satfinite.{'e5m2' if is_e5m2 else 'e4m3'}x2.f32" in ptx
        assert "div.rn.f32" in ptx and ".ftz" not in ptx
        # 16-byte accesses, also at a ragged edge that is a multiple of 16.
        assert "ld.global.v4.b32" in ptx
        assert "st.global.v4.b32" in ptx
        # The wait for the search of the amax: behind the load of x, before its result is read and codes are written.
        wait = ptx.find("griddepcontrol.wait")
        assert (wait >= 0) == ("scale_ptr" in missing)
        if wait >= 0:
            assert ptx.find("ld.global.v4.b32") < wait < ptx.find("st.global")

    @pytest.mark.parametrize("is_flat", (True, False))
    @pytest.mark.parametrize("is_pair", (True, False))
    def test_amax(self, is_flat, is_pair):
        tile = float8_quantize.TILES["amax"]
        constants = {
            "FLAT": is_flat,
            "EVEN": True,
            "BLOCK_ROWS": tile.rows,
            "BLOCK_COLS": tile.cols,
        }
        kernel = self.compile(
            tensor_amax._amax_kernel,
            tile,
            missing=() if is_pair else ("y_ptr", "y_amaxes_ptr"),
            IS_AWAITED=is_pair,
            **{f"{name}_{key}": value for name in "XY" for key, value in constants.items()},
        )
        assert "ld.global.v4.b32" in kernel.asm["ptx"]
        assert ("griddepcontrol.launch_dependents" in kernel.asm["ptx"]) == is_pair


class TestInOwnProcess:
    """Starts the interpreted tests."""

    __test__ = not IS_INTERPRETED

    def test_interpreted(self):
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-k", "TestInterpreted", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
        assert " passed" in run.stdout


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and division by zero
class TestInterpreted:
    """The kernels' bytes, on the CPU."""

    __test__ = IS_INTERPRETED

    @pytest.fixture(autouse=True)
    def device_arithmetic(self, monkeypatch):
        """Gives the interpreter of Triton 3.6 the device's conversions and maximum.

        Its own drop the carry of a rounding to FP8 and do not saturate, mistake BF16 subnormals, and
        its `maxnum` returns NaN where the device returns the other operand.
        """
        import numpy as np
        import triton.language as tl
        from triton.runtime import interpreter

        original = interpreter._convert_float
        formats = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

        def convert(data, source, target, rounding_mode):
            if source == tl.bfloat16 and target == tl.float32:
                return data.view(np.uint16).astype(np.uint32) << 16
            if source == tl.float32 and target in formats:
                values = torch.from_numpy(np.array(data, dtype=np.float32))
                return fp8_codes.encode(values, formats[target]).numpy()
            return original(data, source, target, rounding_mode)

        monkeypatch.setattr(interpreter, "_convert_float", convert)
        monkeypatch.setattr(
            interpreter.InterpreterBuilder,
            "create_maxnumf",
            lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax),
        )

    @pytest.fixture(autouse=True)
    def seed_and_filled_memory(self):
        """New outputs hold 0xFF, so that padding which is not written shows."""
        torch.manual_seed(20260402)
        torch.use_deterministic_algorithms(True)
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.fixture
    def small_tiles(self, monkeypatch):
        """Several programs in each direction; returns a function that sets the tiles."""

        def use(rows=16, cols=32):
            for name in float8_quantize.TILES:
                monkeypatch.setitem(float8_quantize.TILES, name, Tile(rows, cols, 4))
            forget_plans()

        yield use
        forget_plans()

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", ((2, 32, 64), (2, 3, 40, 72), (3, 19, 37), (1, 1), (16, 16)))
    def test_delayed_layouts(self, small_tiles, layout, shape):
        small_tiles()
        x = torch.randn(shape).bfloat16()
        scale, amax = torch.tensor([37.5]), torch.tensor([0.25])
        rowwise, transposed = layout
        outputs = quantize_float8(x, scale, amax, "e4m3", rowwise=rowwise, transposed=transposed)
        assert_codes(outputs, x, scale, "e4m3", layout)
        assert amax.item() == max(0.25, x.abs().max().item())

    @pytest.mark.parametrize("fp8_dtype", TORCH_FP8)
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
    @pytest.mark.parametrize("scale", (1.0, -3.0, 2.0**-9, 1.5e30, float("inf"), float("nan")))
    def test_delayed_values(self, dtype, fp8_dtype, scale):
        x = special_values(dtype)
        scale, amax = torch.tensor([scale]), torch.zeros(1)
        outputs = quantize_float8(x, scale, amax, fp8_dtype, rowwise=True, transposed=True)
        assert_codes(outputs, x, scale, fp8_dtype, (True, True))
        assert amax.item() == float("inf")

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("multiple", (16, 32, 128))
    @pytest.mark.parametrize("scale", (-1.0, float("inf")))
    def test_padding_is_zero_whatever_the_scale(self, small_tiles, layout, multiple, scale):
        small_tiles()
        x = torch.randn(2, 33, 50)
        scale, amax = torch.tensor([scale]), torch.zeros(1)
        rowwise, transposed = layout
        outputs = quantize_float8(
            x, scale, amax, "e5m2", rowwise=rowwise, transposed=transposed, multiple=multiple
        )
        assert_codes(outputs, x, scale, "e5m2", layout, multiple)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(
        "view",
        (
            lambda x: x.transpose(0, 1),
            lambda x: x[:, ::2, 8:56],
            lambda x: x[1:, 3:21],
            lambda x: x[:1].expand(3, -1, -1),
            lambda x: x.view(3, 2, 12, 64)[:, :, :, 1:],
            lambda x: x.view(3, 24, 2, 32).transpose(1, 2)[1],
            lambda x: x[:, :1].transpose(0, 1),
            lambda x: x.reshape(-1, 1)[:40],
        ),
    )
    def test_views(self, small_tiles, layout, view):
        small_tiles()
        x = view(torch.randn(3, 24, 64).half())
        assert can_quantize(x)
        scale, amax = torch.tensor([2.0]), torch.zeros(1)
        rowwise, transposed = layout
        outputs = quantize_float8(x, scale, amax, "e4m3", rowwise=rowwise, transposed=transposed)
        assert_codes(outputs, x, scale, "e4m3", layout)
        assert amax.item() == x.abs().max().item()
        current = quantize_float8_current(x, "e4m3", rowwise=rowwise, transposed=transposed)
        found = quantizers.scale_from_amax(quantizers.tensor_amax(x), torch.float8_e4m3fn)
        assert_codes(current, x, found, "e4m3", layout)

    def test_what_cannot_be_read_is_refused(self):
        x = torch.randn(2, 16, 32)
        for view in (x.mT, x.expand(4, 2, 16, 32).transpose(0, 1), x.double(), x[0, 0]):
            assert not can_quantize(view)
            with pytest.raises((ValueError, TypeError), match=r"x came as .*shape"):
                quantize_float8_current(view, "e4m3", rowwise=True, transposed=False)
            if view.ndim > 1 and view.dtype == torch.float32:
                assert can_quantize(view.contiguous())

    def test_amax_keeps_what_is_larger_and_its_neighbours(self, small_tiles):
        small_tiles()
        x = torch.randn(2, 32, 64)
        nan = float("nan")
        x[1, 3, 4] = nan
        for start in (0.0, 2.0, 100.0, nan):
            state = torch.tensor([[7.0, 3.0], [8.0, start], [9.0, -1.0]])
            scale, amax = state[0, 1], state[1, 1]
            quantize_float8(x, scale, amax, "e4m3", rowwise=True, transposed=False)
            found = quantizers.tensor_amax(x).item()
            wanted = torch.tensor([[7.0, 3.0], [8.0, max(start, found)], [9.0, -1.0]])
            wanted[1, 1] = nan if start != start else wanted[1, 1]
            assert torch.equal(state.view(torch.int32), wanted.view(torch.int32))

    def test_amax_of_nothing_but_nan_is_zero(self):
        x, amax = torch.full((1, 16, 16), float("nan")), torch.zeros(1)
        outputs = quantize_float8(x, torch.ones(1), amax, "e5m2", rowwise=True, transposed=True)
        assert_codes(outputs, x, torch.ones(1), "e5m2", (True, True))
        assert amax.item() == 0.0

    @pytest.mark.parametrize("power_of_2", (False, True))
    @pytest.mark.parametrize("fp8_dtype", TORCH_FP8)
    @pytest.mark.parametrize("epsilon", (0.0, 0.75))
    @pytest.mark.parametrize(
        "largest",
        (0.0, 1e-45, 1e-40, 1e-30, 0.1, 0.75, 1.0, 3.3, 448.0, 449.0, 1e30, 3.4e38, float("inf")),
    )
    def test_current_scale(self, power_of_2, fp8_dtype, epsilon, largest):
        x = torch.linspace(-1, 1, 2 * 16 * 32).reshape(2, 16, 32) * largest
        x = x.nan_to_num(nan=0.5)
        x[0, 0, 0] = float("nan")
        outputs = quantize_float8_current(
            x,
            fp8_dtype,
            rowwise=True,
            transposed=True,
            amax_epsilon=epsilon,
            force_pow_2_scales=power_of_2,
        )
        scale = quantizers.scale_from_amax(
            quantizers.tensor_amax(x),
            TORCH_FP8[fp8_dtype],
            force_pow_2_scales=power_of_2,
            amax_epsilon=epsilon,
        )
        assert_codes(outputs, x, scale, fp8_dtype, (True, True))

    @pytest.mark.parametrize("shape", ((0, 16, 16), (2, 0, 16), (2, 5, 0)))
    def test_empty(self, monkeypatch, shape):
        x, scale, amax = torch.empty(shape), torch.tensor([4.0]), torch.tensor([3.0])
        outputs = quantize_float8(x, scale, amax, "e4m3", rowwise=True, transposed=True)
        assert_codes(outputs, x, scale, "e4m3", (True, True))
        assert amax.item() == 3.0
        # Ranks without data take no part in the reduction.
        monkeypatch.setattr(torch.distributed, "all_reduce", None)
        outputs = quantize_float8_current(
            x, "e4m3", rowwise=True, transposed=True, amax_reduction_group=object()
        )
        assert_codes(outputs, x, torch.ones(1), "e4m3", (True, True))

    @pytest.mark.parametrize("strides", (None, (4096, 64, 1)))
    def test_a_pair_has_the_amaxes_of_each(self, strides, small_tiles):
        """Whole tiles without gaps and not, and more tiles than programs."""
        small_tiles()
        x, y = torch.randn(3, 32, 64), 5 * torch.randn(2, 20, 33)
        if strides is not None:
            x = torch.randn(3 * 4096).as_strided((3, 32, 64), strides)
        casts = [
            float8_quantize.find_cast(z, "e4m3", rowwise=True, transposed=True) for z in (x, y)
        ]
        x_amaxes, y_amaxes = (cast.allocate_amaxes() for cast in casts)
        tensor_amax.AmaxPair(*(cast.search for cast in casts))(x, x_amaxes, y, y_amaxes)
        for z, cast, found in zip((x, y), casts, (x_amaxes, y_amaxes)):
            assert torch.equal(found.amax(0, keepdim=True), quantizers.tensor_amax(z))
            codes, turned, scale_inv = (torch.empty_like(t) for t in cast.with_own_scale(z))
            cast.write_to(z, codes, turned, None, found, scale_inv)
            for mine, alone in zip((codes, turned, scale_inv), cast.with_own_scale(z)):
                assert torch.equal(mine, alone)

    def test_current_reduces_the_amax_over_the_group(self, monkeypatch):
        calls = []

        def all_reduce(tensor, op, group):
            calls.append((tensor.clone(), op, group))
            tensor.fill_(11.0)

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        x, group = torch.randn(2, 16, 16), object()
        outputs = quantize_float8_current(
            x, "e4m3", rowwise=True, transposed=False, amax_reduction_group=group
        )
        assert len(calls) == 1 and calls[0][1:] == (torch.distributed.ReduceOp.MAX, group)
        assert torch.equal(calls[0][0], quantizers.tensor_amax(x))
        scale = quantizers.scale_from_amax(torch.tensor([11.0]), torch.float8_e4m3fn)
        assert_codes(outputs, x, scale, "e4m3", (True, False))

    def test_arguments_are_checked(self):
        x, one = torch.randn(2, 16, 16), torch.ones(1)
        asked = {"rowwise": True, "transposed": False}
        with pytest.raises(ValueError, match="`scale` must be one float32.*torch.float64"):
            quantize_float8(x, one.double(), one, "e4m3", **asked)
        with pytest.raises(ValueError, match=r"`amax` must be one float32.*shape \(2,\)"):
            quantize_float8(x, one, torch.ones(2), "e4m3", **asked)
        with pytest.raises(ValueError, match='must be "e4m3" or "e5m2".*e3m4'):
            quantize_float8(x, one, one, "e3m4", **asked)
