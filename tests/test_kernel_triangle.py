# SPDX-License-Identifier: Apache-2.0
"""The triangle kernels without a GPU: what is refused, what Triton compiles, values under its interpreter.

Triton decides at its import whether it interprets, so the tests of values run in a process of their own.
"""

from __future__ import annotations

import pytest
import torch
import triton
from interpreted import IS_INTERPRETED, give_device_arithmetic, run_interpreted
from triangle_kernel_cases import (
    CODE_DB,
    TORCH_FP8,
    VALUE_DB,
    Case,
    assert_all_near,
    assert_near,
    cut_padding,
    decode,
    find_expected,
    make_data,
)
from triangle_operand_gradients import find_output_share

from transformer_engine_batched.kernels import (
    triangle_backward,
    triangle_forward,
    triangle_weight_gradients,
)
from transformer_engine_batched.kernels.triangle_backward import output_backward, project_backward
from transformer_engine_batched.kernels.triangle_forward import (
    find_operand_amaxes,
    project_operands,
    project_output,
)
from transformer_engine_batched.kernels.triangle_tiles import GatedProjection, Norm, Tile
from transformer_engine_batched.kernels.turn_codes import turn_codes
from transformer_engine_batched.reference import codes as fp8_codes
from transformer_engine_batched.reference import quantizers

SMALL = Case(1, 4, 16, 16)


class TestRefusals:
    """Error texts."""

    @staticmethod
    def project(data, **changes):
        arguments = {
            "z": data.z,
            "norm": data.norm_in,
            "projection": data.projection,
            "mask": data.mask,
            "mode": "outgoing",
        }
        return project_operands(**(arguments | changes))

    def test_device(self):
        if not IS_INTERPRETED:
            with pytest.raises(ValueError, match="run on CUDA devices and z came on cpu"):
                self.project(make_data(SMALL))

    @pytest.mark.parametrize("shape", ((4, 4, 16), (1, 4, 5, 16), (1, 4, 4, 24), (1, 4, 4, 0)))
    def test_shape_of_z(self, shape):
        match = r"must be \[B, N, N, D\] with D a multiple of 16 and came as shape"
        with pytest.raises(ValueError, match=match):
            self.project(make_data(SMALL), z=torch.zeros(shape))


class TestInterpretedRefusals:
    """Error texts behind the check of the device."""

    __test__ = IS_INTERPRETED

    @pytest.mark.parametrize(
        "changes, error, match",
        [
            ({"mode": "sideways"}, ValueError, "`mode` must be .* came as 'sideways'"),
            ({"fp8_dtype": "e3m4"}, ValueError, "`fp8_dtype` must be .* came as 'e3m4'"),
            ({"fp8_dtype": "e4m3"}, ValueError, "FP8 operands need `scales`, or `amaxes`"),
            ({"scales": torch.ones(2)}, ValueError, "`scales` came without fp8_dtype"),
            ({"turned": True}, ValueError, "turned ones with FP8 only"),
            ({"kept": False}, ValueError, "ask for kept or turned operands"),
            ({"mask": torch.ones(1, 4, 5)}, ValueError, r"`mask` must be \[1, 4, 4\]"),
            ({"norm": Norm(torch.ones(8), None)}, ValueError, r"`norm.weight` must be .*\[16\]"),
            (
                {"amaxes": torch.zeros(3)},
                ValueError,
                "`amaxes` must be 2 contiguous float32 .* came as torch.float32, shape",
            ),
        ],
    )
    def test_operands(self, changes, error, match):
        with pytest.raises(error, match=match):
            TestRefusals.project(make_data(SMALL), **changes)

    def test_z(self):
        data = make_data(SMALL)
        with pytest.raises(ValueError, match="`z` must be contiguous .* stride"):
            TestRefusals.project(data, z=data.z.transpose(1, 2))
        with pytest.raises(TypeError, match="`z` must be FP32, BF16 or FP16 .* torch.float64"):
            TestRefusals.project(data, z=data.z.double())

    def test_weights(self):
        data = make_data(SMALL)
        p, p_bias, g, g_bias = data.projection
        with pytest.raises(TypeError, match="both weights of `projection` must have one dtype"):
            TestRefusals.project(data, projection=GatedProjection(p, p_bias, g.half(), g_bias))
        with pytest.raises(ValueError, match="2 H rows with H a multiple of 16"):
            TestRefusals.project(data, projection=GatedProjection(p[:16], None, g[:16], None))
        shifted = torch.zeros(p.numel() + 1)[1:].view(p.shape)
        with pytest.raises(ValueError, match="must begin at a multiple of 16 bytes; pass a clone"):
            TestRefusals.project(data, projection=GatedProjection(shifted, None, g, None))

    def test_channel_first(self):
        data = make_data(SMALL)
        with pytest.raises(ValueError, match="`c` must be contiguous in its last dim"):
            project_output(data.c.mT, data.z, data.norm_in, data.norm_out, data.output)
        with pytest.raises(ValueError, match="`grad_b` must be torch.float32"):
            project_backward(
                data.grad_a, data.grad_b.half(), data.z, data.norm_in, data.projection, None
            )

    def test_codes(self):
        for codes in (torch.zeros(16, 16), torch.zeros(8, 16, dtype=torch.uint8)):
            with pytest.raises(ValueError, match="`codes` must be contiguous uint8"):
                turn_codes(codes)


class TestCompiled:
    """What Triton and ptxas make of the kernels for Hopper; neither needs a GPU."""

    __test__ = not IS_INTERPRETED

    COMMON = {"DIM": 128, "HIDDEN": 128, "SMALL": False, "EVEN": True, "PRECISION": "ieee"}
    CHUNKS = {"DIM_CHUNK": 128, "HIDDEN_CHUNK": 128}

    @classmethod
    def compile(cls, kernel, tile: Tile, types=None, **constants):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = [parameter.name for parameter in kernel.params]
        constants = (
            cls.COMMON
            | constants
            | {
                "p_bias_ptr": None,
                "g_bias_ptr": None,
                "POSITIONS": tile.positions,
                "CHANNELS": tile.channels,
                "STAGES": tile.num_stages,
            }
        )
        if "RESIDENT" in names:
            constants["RESIDENT"] = tile.is_resident
        floats = ("sums_ptr", "scale_ptr", "amax_ptr", "scales_ptr", "amaxes_ptr")
        signature, attributes = {}, {}
        for index, name in enumerate(names):
            if name in constants:
                signature[name] = "constexpr"
                continue
            kind = "*bf16" if name.endswith("_ptr") else "fp32" if "eps" in name else "i32"
            if name in floats or "scale_inv" in name:
                kind = "*fp32"
            signature[name] = (types or {}).get(name, kind)
            if kind == "i32" or name.endswith("_ptr") and kind != "*fp32":
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=attributes,
        )
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.num_warps}
        )
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        # 228 KiB of a multiprocessor, of which each program takes 1 KiB for itself.
        assert compiled.metadata.shared + 1024 <= 228 * 1024 // tile.programs_per_multiprocessor
        return compiled.asm["ptx"]

    def test_operands(self):
        tile = triangle_forward.choose_operand_tile(128, 128, torch.bfloat16)
        ptx = self.compile(
            triangle_forward._operands_kernel,
            tile,
            {"both_ptr": "*u8"},
            CHUNK=128,
            VECTOR=16,
            INCOMING=False,
            FP8=True,
            E5M2=False,
            POWER_OF_2=False,
        )
        # The sigmoid is one approximation each; codes are rounded as the reference writes down, and stored
        # by 16 from the registers that the tensor cores have filled.
        assert "ex2.approx.ftz.f32" in ptx and "rcp.approx.ftz.f32" in ptx
        assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
        assert "st.global.v4.b32" in ptx

    @pytest.mark.parametrize("dim, hidden", ((256, 256), (384, 128), (640, 64)))
    def test_wide_operands_fit_where_nothing_is_written(self, dim, hidden):
        """Amaxes only: weights of one block of channels at a time, as where operands are stored."""
        tile = triangle_forward.choose_operand_tile(dim, hidden, torch.bfloat16)
        sizes = {"DIM": dim, "HIDDEN": hidden, "both_ptr": None, "scales_ptr": None}
        options = {"CHUNK": 128, "VECTOR": 8, "INCOMING": False, "FP8": False, "E5M2": False}
        self.compile(
            triangle_forward._operands_kernel,
            tile,
            **sizes,
            **options,
            scale_invs_ptr=None,
            POWER_OF_2=False,
        )

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
    def test_tiles_of_all_sizes_fit(self, dtype):
        for dim in range(16, 1040, 16):
            for hidden in (16, 48, 128, 256, 512):
                operands = triangle_forward.choose_operand_tile(dim, hidden, dtype)
                output = triangle_forward.choose_output_tile(dim, hidden, dtype)
                assert hidden % operands.channels == dim % output.channels == 0
                for tile, weights, values in (
                    (operands, 2 * operands.channels * dim, operands.positions * dim),
                    (output, output.channels * max(dim, hidden), output.positions * (dim + hidden)),
                ):
                    assert min(tile.positions, tile.channels) >= 16
                    assert tile.is_resident or (weights + values) * dtype.itemsize <= 232448
        with pytest.raises(ValueError, match="no tile of D = 8192, H = 16 .* fits into the shared"):
            triangle_forward.choose_operand_tile(8192, 16, dtype)

    def test_output(self):
        tile = triangle_forward.choose_output_tile(128, 128, torch.bfloat16)
        ptx = self.compile(triangle_forward._output_kernel, tile, **self.CHUNKS)
        assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx

    def test_output_backward(self):
        tile = triangle_backward.choose_output_tile(128, 128, torch.bfloat16)
        ptx = self.compile(
            triangle_backward._output_kernel,
            tile,
            {"grad_c_ptr": "*u8"},
            FP8=True,
            E5M2=True,
            **self.CHUNKS,
        )
        assert "cvt.rn.satfinite.e5m2x2.f32" in ptx

    def test_project_backward(self):
        tile = triangle_backward.choose_input_tile(128, 128, torch.bfloat16)
        self.compile(triangle_backward._input_kernel, tile, CHUNK=128)

    def test_weight_gradients(self):
        tile = triangle_weight_gradients.choose_projection_tile(128, 128, torch.bfloat16)
        self.compile(triangle_weight_gradients._projection_kernel, tile, CHUNK=128)
        tile = triangle_weight_gradients.choose_output_tile(128, 128, torch.bfloat16)
        self.compile(triangle_weight_gradients._output_kernel, tile, **self.CHUNKS)


class TestInOwnProcess:
    """Starts the interpreted tests."""

    __test__ = not IS_INTERPRETED

    def test_interpreted(self):
        run_interpreted(__file__)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and division by zero
class TestInterpreted:
    """The kernels' values, on the CPU. Sizes are small: Triton's interpreter takes seconds a launch."""

    __test__ = IS_INTERPRETED

    @pytest.fixture(autouse=True)
    def device_arithmetic(self, monkeypatch):
        give_device_arithmetic(monkeypatch)

    @pytest.fixture(autouse=True)
    def filled_memory(self):
        """New outputs hold NaN or 0xFF, so that what is not written shows."""
        torch.use_deterministic_algorithms(True)
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("mode", ("outgoing", "incoming"))
    @pytest.mark.parametrize(
        "case",
        (
            Case(2, 9, 32, 16),
            Case(1, 16, 16, 32, torch.bfloat16, has_bias=False, mask=None),
            Case(1, 17, 48, 16, torch.float32, torch.bfloat16, mask="bool"),
        ),
    )
    def test_operands(self, case, mode):
        data = make_data(case)
        expected = find_expected(data)
        operands = project_operands(
            data.z, data.norm_in, data.projection, data.mask, mode=mode
        )  # fmt: skip
        dtype = case.weight_dtype or case.dtype
        assert operands[2:] == (None, None, None)
        for name, operand, wanted in zip("ab", operands, expected):
            assert operand.dtype == dtype
            operand = cut_padding(operand, case.n)
            wanted = wanted if mode == "outgoing" else wanted.mT
            assert_near(operand, wanted, VALUE_DB[dtype], name)
            if data.mask is not None:
                mask = data.mask if mode == "outgoing" else data.mask.mT
                assert not operand.masked_select((mask == 0)[:, None]).any()

    def test_codes_are_those_of_the_reference(self):
        """FP32 operands, quantized by the reference, are what the kernel writes at once."""
        case = Case(2, 9, 32, 16)
        data = make_data(case)
        arguments = (data.z, data.norm_in, data.projection, data.mask)
        plain = project_operands(*arguments, mode="incoming")
        amaxes = torch.stack([operand.abs().max() for operand in plain[:2]])
        assert torch.equal(find_operand_amaxes(*arguments), amaxes)
        found = torch.tensor([0.5, 1e3])
        scales = torch.tensor([20.0, 1e3])
        options = {"mode": "incoming", "turned": True}
        delayed = project_operands(
            *arguments, fp8_dtype="e4m3", scales=scales, amaxes=found, **options
        )
        assert torch.equal(found, torch.maximum(amaxes, torch.tensor([0.5, 1e3])))
        assert torch.equal(delayed.scale_invs, scales.reciprocal())
        current = project_operands(*arguments, fp8_dtype="e5m2", amaxes=amaxes, **options)
        own = [quantizers.scale_from_amax(amax, TORCH_FP8["e5m2"]) for amax in amaxes.split(1)]
        assert torch.equal(current.scale_invs, torch.cat(own).reciprocal())
        for operands, factors, fp8 in ((delayed, scales.split(1), "e4m3"), (current, own, "e5m2")):
            for index in range(2):
                values = cut_padding(plain[index], case.n) * factors[index]
                codes = cut_padding(operands[index], case.n)
                assert torch.equal(codes, fp8_codes.encode(values, TORCH_FP8[fp8]))
                assert torch.equal(operands[index + 2], operands[index].mT)

    def test_all_masked_item_is_zero(self):
        case = Case(2, 9, 16, 16, torch.bfloat16)
        data = make_data(case)
        data.mask[1] = 0
        scales = torch.full((2,), 3.0)
        arguments = (data.z, data.norm_in, data.projection, data.mask)
        operands = project_operands(*arguments, mode="outgoing", fp8_dtype="e4m3", scales=scales)
        for operand in operands[:2]:
            assert not decode(operand[1], "e4m3", torch.ones(1)).any()
            assert decode(operand[0], "e4m3", torch.ones(1)).any()

    @pytest.mark.parametrize(
        "case",
        (
            Case(2, 9, 32, 16),
            Case(1, 17, 48, 32, torch.float16, has_bias=False),
            Case(1, 16, 32, 32, torch.bfloat16),
        ),
    )
    def test_output(self, case):
        data = make_data(case)
        out = project_output(data.c, data.z, data.norm_in, data.norm_out, data.output)
        assert out.dtype == case.dtype and out.is_contiguous()
        assert_near(out, find_expected(data).out, VALUE_DB[case.dtype], "out")

    @pytest.mark.parametrize(
        "case, fp8_dtype, is_delayed",
        (
            (Case(2, 9, 32, 16), None, False),
            (Case(1, 17, 48, 32, torch.float16, has_bias=False), "e5m2", True),
            (Case(1, 16, 32, 32, torch.bfloat16, mask="bool"), "e4m3", False),
        ),
    )
    def test_backward(self, case, fp8_dtype, is_delayed):
        data = make_data(case)
        expected = find_expected(data)
        bound = VALUE_DB[case.dtype]
        states = {}
        if is_delayed:
            states = {"scale": torch.tensor([16.0]), "amax": torch.zeros(1)}
        found = output_backward(
            data.grad_out,
            data.c,
            data.z,
            data.norm_in,
            data.norm_out,
            data.output,
            fp8_dtype=fp8_dtype,
            **states,
        )
        if fp8_dtype is None:
            assert found.grad_c_turned is None and found.scale_inv is None
            assert_near(cut_padding(found.grad_c, case.n), expected.grad_c, bound, "grad_c")
        else:
            assert torch.equal(found.grad_c_turned, found.grad_c.mT)
            grad_c = decode(cut_padding(found.grad_c, case.n), fp8_dtype, found.scale_inv)
            assert_near(grad_c, expected.grad_c, CODE_DB[fp8_dtype], "grad_c")
        if is_delayed:
            amax = expected.grad_c.abs().max().item()
            assert states["amax"].item() == pytest.approx(amax, rel=2.0**-8)
        assert_all_near(found.norm_out[:2], expected.norm_out, bound, "norm_out")
        assert_all_near(found.output, expected.output, bound, "output")
        share = find_output_share(data)
        assert_near(found.norm_in.grad_hat, share.grad_hat.double(), bound, "grad_hat")
        sums = [x.norm_sums.double().sum(0).view(2, -1) for x in (found.norm_in, share)]
        assert_all_near(*sums, bound, "norm_in_sums")
        grads = project_backward(
            data.grad_a,
            data.grad_b,
            data.z,
            data.norm_in,
            data.projection,
            data.mask,
            found.norm_in,
        )
        assert_near(grads.z, expected.grad_z, bound, "grad_z")
        assert_all_near(grads.norm[:2], expected.norm_in, bound, "norm_in")
        assert_all_near(grads.projection, expected.projection, bound, "projection")

    def test_chunks_of_channels(self, monkeypatch):
        """Several chunks and blocks of channels, as D = 384 and H = 256 have."""
        for module in (triangle_forward, triangle_backward, triangle_weight_gradients):
            monkeypatch.setattr(module.tiles, "largest_chunk", lambda size, limit: 16)
        case = Case(1, 6, 48, 32)
        for module in (triangle_forward, triangle_backward, triangle_weight_gradients):
            for name in dir(module):
                if name.startswith("choose_"):
                    getattr(module, name).cache_clear()
        try:
            self.test_operands(case, "incoming")
            self.test_output(case)
            self.test_backward(case, None, False)
        finally:
            for module in (triangle_forward, triangle_backward, triangle_weight_gradients):
                for name in dir(module):
                    if name.startswith("choose_"):
                        getattr(module, name).cache_clear()

    @pytest.mark.parametrize("shape", ((0, 4, 4, 16), (1, 0, 0, 16)))
    def test_empty(self, shape):
        data = make_data(SMALL)
        z = torch.zeros(shape)
        mask = torch.zeros(shape[:3])
        scales = torch.full((2,), 2.0)
        operands = project_operands(
            z, data.norm_in, data.projection, mask, mode="outgoing", fp8_dtype="e4m3", scales=scales
        )
        assert operands.a.numel() == 0
        assert torch.equal(operands.scale_invs, torch.full((2,), 0.5))
        assert not find_operand_amaxes(z, data.norm_in, data.projection, mask).any()
        c = torch.zeros(shape[0], 16, *shape[1:3])
        assert project_output(c, z, data.norm_in, data.norm_out, data.output).shape == z.shape
        found = output_backward(z, c, z, data.norm_in, data.norm_out, data.output)
        assert found.grad_c.numel() == 0 and not found.output.weight_p.any()
        grads = project_backward(c, c, z, data.norm_in, data.projection, mask, found.norm_in)
        assert grads.z.shape == z.shape and not grads.projection.weight_g.any()

    @pytest.mark.parametrize("shape", ((3, 16, 32), (144, 128), (0, 16, 16)))
    def test_turn_codes(self, shape):
        codes = torch.randint(0, 256, shape, dtype=torch.uint8)
        turned = turn_codes(codes)
        assert turned.is_contiguous() and torch.equal(turned, codes.mT)
