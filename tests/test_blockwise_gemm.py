# SPDX-License-Identifier: Apache-2.0
"""Block-scaled products without a GPU: launches as values, the kernel's source under NVRTC, the Triton form interpreted."""

from __future__ import annotations

import re
import struct
import subprocess
import sys

import pytest
import torch
from accuracy import assert_accurate, sqnr_per_item
from blockwise_cases import add_as_tensor_cores, make_operand, poisoned_out
from interpreted import IS_INTERPRETED, give_device_arithmetic, run_interpreted
from sass import assert_one_thread_copies

from transformer_engine_batched.kernels import blockwise_gemm, nvrtc
from transformer_engine_batched.kernels.blockwise_gemm import (
    TILES,
    Problem,
    Tile,
    find_reason_against,
    choose_tile,
    multiply_blockwise,
    multiply_blockwise_k_grouped,
    num_stages,
    prepare_launch,
    shared_bytes,
)

WIDE, TALL = Tile(128, 256, 2), Tile(256, 128, 1)
# Of the struct that ends a launch's parameters; the tensor maps and four addresses come before.
FIELDS = (
    "a_scale_row_stride a_scale_k_stride a_scale_item_rows b_scale_row_stride b_scale_k_stride "
    "b_scale_item_rows out_item_stride out_row_stride a_scale_shift b_scale_shift a_item_step "
    "b_item_step num_items num_rows num_cols num_k_blocks tiles_n num_tiles split_from is_out_aligned"
).split()
FORMAT = "<8q12i"


def make_problem(num_items=4, m=512, n=512, k=384, **changes):
    problem = Problem(
        mode="BATCHED",
        a_shape=(num_items, m, k),
        a_strides=(m * k, k, 1),
        b_shape=(num_items, n, k),
        b_strides=(n * k, k, 1),
        out_shape=(num_items, m, n),
        out_strides=(m * n, n, 1),
        formats=("e4m3", "e4m3"),
        out_type="BF16",
        accumulate=False,
        a_scales=(1, 1, num_items * m, m),
        b_scales=(128, k // 128, 1, n),
        expected_rows=None,
        is_aligned=True,
        num_sms=132,
        tile=TALL,
    )
    return problem._replace(**changes)


def read_constants(problem):
    constants = prepare_launch(problem).constants
    return dict(zip(FIELDS, struct.unpack_from(FORMAT, constants)))


def read_definitions(problem):
    return prepare_launch(problem).kernel._definitions


class TestLaunch:
    """What a problem decides."""

    def test_constants(self):
        constants = read_constants(make_problem(m=500, k=400, a_strides=(200000, 400, 1)))
        assert constants == {
            "a_scale_row_stride": 1,
            "a_scale_k_stride": 2000,
            "a_scale_item_rows": 500,
            "b_scale_row_stride": 3,
            "b_scale_k_stride": 1,
            "b_scale_item_rows": 512,
            "out_item_stride": 500 * 512,
            "out_row_stride": 512,
            "a_scale_shift": 0,
            "b_scale_shift": 7,
            "a_item_step": 1,
            "b_item_step": 1,
            "num_items": 4,
            "num_rows": 500,
            "num_cols": 512,
            "num_k_blocks": 4,
            "tiles_n": 4,
            "num_tiles": 64,  # 32, fewer than SMs, so in halves
            "split_from": 0,
            "is_out_aligned": 1,
        }

    def test_a_last_round_with_few_tiles_is_split(self):
        few = read_constants(make_problem(num_items=34, m=256))
        assert (few["split_from"], few["num_tiles"]) == (132, 132 + 2 * 4)
        many = read_constants(make_problem(num_items=50, m=256))
        assert (many["split_from"], many["num_tiles"]) == (200, 200)
        masked = read_constants(make_problem(num_items=34, m=256, mode="MASKED"))
        assert (masked["split_from"], masked["num_tiles"]) == (136, 136)

    def test_tensor_maps(self):
        launch = prepare_launch(make_problem())
        assert launch.a_map == ((384, 512, 4), (384, 512 * 384), (128, 128, 1))
        # Items of rows that interleave: what is sliced from [M, B, K].
        apart = make_problem(a_strides=(384, 4 * 384, 1), tile=WIDE)
        assert prepare_launch(apart).a_map == ((384, 512, 4), (4 * 384, 384), (128, 128, 1))
        small = prepare_launch(make_problem(tile=Tile(64, 256, 2)))
        assert (small.a_map[2], small.b_map[2]) == ((128, 64, 1), (128, 128, 1))
        assert prepare_launch(make_problem(tile=Tile(192, 128, 1, 3))).a_map[2] == (128, 192, 1)

    def test_one_matrix_serves_all_items(self):
        for change in ({"b_shape": (1, 512, 384)}, {"b_strides": (0, 384, 1)}):
            problem = make_problem(**change)
            assert prepare_launch(problem).b_map[0] == (384, 512, 1)
            assert read_constants(problem)["b_item_step"] == 0

    def test_strides_of_single_rows_are_not_looked_at(self):
        problem = make_problem(
            num_items=1, m=1, k=40, a_strides=(7, 3, 1), b_strides=(512 * 48, 48, 1)
        )
        assert prepare_launch(problem).a_map == ((40, 1, 1), (48, 48), (128, 128, 1))

    @pytest.mark.parametrize(
        "scales, tile, expected",
        [
            ((128, 3, 1, 512), TALL, 0),
            ((128, 3, 1, 520), TALL, 1),  # blocks that begin within an item
            ((1, 1, 512, 512), TALL, 1),
            ((128, 3, 1, 512), Tile(128, 192, 1), 1),  # tiles that split a block
        ],
    )
    def test_scales_per_tile_or_per_column(self, scales, tile, expected):
        assert (
            read_definitions(make_problem(b_scales=scales, tile=tile))["B_PER_COLUMN"] == expected
        )

    @pytest.mark.parametrize(
        "change",
        [
            {"is_aligned": False},
            {"out_strides": (512 * 516, 516, 1)},
            {"out_strides": (512 * 512 + 1, 512, 1)},
        ],
    )
    def test_unaligned_rows_of_out(self, change):
        assert read_constants(make_problem(**change))["is_out_aligned"] == 0

    def test_no_more_ctas_than_tiles_or_sms(self):
        assert prepare_launch(make_problem(num_items=1, m=256)).num_ctas == 8  # four tiles, split
        assert prepare_launch(make_problem(num_items=99)).num_ctas == 132
        assert prepare_launch(make_problem(num_items=99, num_sms=7)).num_ctas == 7

    @pytest.mark.parametrize("per_column", [False, True])
    @pytest.mark.parametrize("tile", TILES)
    def test_shared_memory_fits(self, tile, per_column):
        assert num_stages(tile, per_column) >= 4
        assert shared_bytes(tile, per_column) <= 232448

    def test_choice_of_tiles(self):
        def choose(**options):
            return choose_tile(make_problem(**options))

        assert choose(num_items=32, m=2048, n=2048, k=2048).rows >= 128
        assert choose(num_items=256, m=64, n=2048, k=2048).rows == 64
        masked = {"num_items": 64, "m": 4096, "n": 2048, "k": 2048, "mode": "MASKED"}
        assert choose(**masked, expected_rows=40).rows == 64
        assert choose(**masked, expected_rows=4096).rows >= 128
        for b_scales in ((128, 32, 1, 4096), (1, 1, 4096, 4096)):
            for m in (64, 128, 4096):
                options = {"num_items": 1, "m": m, "n": 4096, "k": 4096, "mode": "CONTIGUOUS"}
                assert choose(**options, b_scales=b_scales).rows <= 128

    def test_a_scale_per_column_wants_three_warpgroups(self):
        """Not where a tile of 192 rows would be half empty."""
        for size, num_items, expected in (
            (4096, 8, 3),
            (2048, 32, 3),
            (512, 512, 2),
            (256, 999, 2),
        ):
            for per_scale, warpgroups in ((1, expected), (128, 2)):
                b_scales = (per_scale, 1, size, size)
                sizes = {"num_items": num_items, "m": size, "n": size, "k": size}
                tile = choose_tile(make_problem(**sizes, b_scales=b_scales))
                assert tile.warpgroups == warpgroups, (size, per_scale)

    @pytest.mark.parametrize(
        "change, match",
        [
            ({"a_scales": (64, 1, 4, 512)}, "a_scales: .*1 or 128 rows.*came as 64"),
            ({"b_scales": (1, 1 << 23, 1, 512)}, "b_scales: row_stride must be below"),
            ({"out_shape": (1 << 30, 512, 512)}, "too many tiles"),
            ({"num_sms": 0}, "num_sms must be at least 1"),
        ],
    )
    def test_refusals(self, change, match):
        with pytest.raises(ValueError, match=match):
            prepare_launch(make_problem(**change))


class TestRefusals:
    """Reasons, before anything is launched."""

    @staticmethod
    def reason(
        a=(2, 64, 256), b=(2, 32, 256), out=(2, 64, 32), out_dtype=torch.bfloat16, **options
    ):
        a, b = (
            torch.empty(x, dtype=torch.float8_e4m3fn) if isinstance(x, tuple) else x for x in (a, b)
        )
        return find_reason_against(a, b, torch.empty(out, dtype=out_dtype), **options)

    def test_reasons(self):
        codes = torch.empty((2, 64, 256), dtype=torch.uint8)
        assert "all tensors must be on one CUDA device" in self.reason()
        assert "must hold FP8 codes" in self.reason(a=codes.float())
        assert "a must have 3 dims" in self.reason(a=(64, 256))
        indices = torch.empty(64, dtype=torch.int32)
        assert "a must have 2 dims" in self.reason(m_indices=indices)
        assert "K, must be contiguous" in self.reason(a=codes.mT)
        assert "multiples of 16 bytes; pad K" in self.reason(a=(2, 64, 250), b=(2, 32, 250))
        assert "multiples of 16 bytes" in self.reason(a=codes.view(-1)[8:-248].view(2, -1, 16))
        assert "agree in their last dim" in self.reason(b=(2, 32, 128))
        assert "agree in their first dim" in self.reason(b=(3, 32, 256))
        assert r"out must have shape (2, 64, 32) and has (2, 64, 31)" in self.reason(
            out=(2, 64, 31)
        )
        assert "out must be bfloat16" in self.reason(out_dtype=torch.float64)
        assert "accumulation is into float32" in self.reason(accumulate=True)
        assert "its last dim must be contiguous" in find_reason_against(
            codes, codes, torch.empty(2, 64, 64).mT
        )

    def test_k_needs_no_multiple_of_128(self):
        padded = torch.empty((2, 64, 304), dtype=torch.uint8)[..., :299]
        assert "CUDA device" in self.reason(a=padded, b=padded, out=(2, 64, 64))

    def test_errors(self):
        a = make_operand(2, 32, 128, 1, "item", 1)
        out = torch.empty(2, 32, 32)
        with pytest.raises(ValueError, match="multiply_blockwise: all tensors must be on one CUDA"):
            multiply_blockwise(a.codes, a.codes, a.scales, a.scales, out)
        with pytest.raises(ValueError, match=r"must be \[M, K\], \[N, K\], \[G, M, N\]"):
            multiply_blockwise_k_grouped(a.codes, a.codes, a.scales, a.scales, out, None)
        sizes = torch.zeros(3, dtype=torch.int32)
        with pytest.raises(
            ValueError, match=r"group_sizes must be a contiguous int32 tensor \[2\]"
        ):
            multiply_blockwise_k_grouped(a.codes[0], a.codes[0], a.scales, a.scales, out, sizes)

    def test_masked_m(self, monkeypatch):
        monkeypatch.setattr(blockwise_gemm, "_check_device", lambda *tensors: None)
        a = make_operand(2, 32, 128, 1, "item", 1)
        arguments = (a.codes, a.codes, a.scales, a.scales, torch.empty(2, 32, 32))
        for wrong in (torch.zeros(2), torch.zeros(3, dtype=torch.int32)):
            with pytest.raises(
                ValueError, match=r"masked_m must be a contiguous int32 tensor \[2\]"
            ):
                multiply_blockwise(*arguments, masked_m=wrong)


class TestSimulatedSums:
    """The arithmetic from which tests on the GPU take bounds."""

    def test_thirteen_bits_behind_the_leading_one(self):
        a, b = torch.ones(1, 64, dtype=torch.float64), torch.zeros(3, 64, dtype=torch.float64)
        b[:, 0] = 1.0
        b[:, 1] = torch.tensor([2.0**-13, 2.0**-14, -(2.0**-14)], dtype=torch.float64)
        assert add_as_tensor_cores(a, b).tolist() == [[1 + 2.0**-13, 1.0, 1.0]]
        b[:, 1] = 1.0  # the sum's own leading one
        b[:, 33] = 2.0**-13
        assert add_as_tensor_cores(a, b).tolist() == [[2.0] * 3]

    def test_blocks_are_added_exactly(self):
        a, b = torch.ones(1, 256, dtype=torch.float64), torch.zeros(1, 256, dtype=torch.float64)
        b[0, 127], b[0, 128] = 1.0, 2.0**-20
        assert add_as_tensor_cores(a, b).item() == 1 + 2.0**-20

    def test_normal_data(self):
        """78 dB, as measured on an H200."""
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn((2, 2, 64, 512), generator=generator).mul_(30).to(torch.float8_e4m3fn)
        a, b = a.double(), b.double()
        ratios = sqnr_per_item(add_as_tensor_cores(a, b), a @ b.mT)
        assert bool(((ratios - 78).abs() < 1).all()), ratios


class TestSource:
    """The kernel's source compiles, and agrees with what Python passes."""

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    @staticmethod
    def source(appended=""):
        return nvrtc._read_source("blockwise_gemm.cu") + appended

    def test_fields_are_passed_in_the_order_of_the_struct(self):
        body = re.search(r"struct Params \{(.*?)\n\};", self.source(), re.DOTALL).group(1)
        body = re.sub("//.*", "", body)
        integers = [
            (kind, name)
            for kind, names in re.findall(r"^  (i64|int) ([\w, ]+);", body, re.MULTILINE)
            for name in names.split(", ")
        ]
        kinds = ["i64"] * 8 + ["int"] * 12
        assert integers == list(zip(kinds, FIELDS))
        assert struct.calcsize(FORMAT) == 8 * 8 + 12 * 4

    @pytest.mark.parametrize(
        "problem",
        [
            make_problem(mode="MASKED", tile=WIDE),
            make_problem(
                mode="K_GROUPED", b_scales=(1, 1, 2048, 512), out_type="FP32", accumulate=True
            ),
            make_problem(mode="CONTIGUOUS", tile=Tile(64, 256, 2), formats=("e5m2", "e4m3")),
        ],
    )
    def test_it_compiles_and_the_structs_agree(self, problem):
        launch = prepare_launch(problem)
        num_bytes = 2 * nvrtc.TENSOR_MAP_BYTES + 4 * 8 + len(launch.constants)
        checks = [
            f"static_assert(sizeof(Params) == {num_bytes});",
            f"static_assert(kOffsetBarriers + 16 * NUM_STAGES == {launch.kernel._shared_bytes});",
            f"static_assert(kThreads == {launch.kernel._num_threads});",
        ]
        cubin = nvrtc.compile_cubin(self.source("\n".join(checks)), launch.kernel._definitions)
        assert cubin.startswith(b"\x7fELF") and b"multiply_blockwise" in cubin

    @pytest.mark.parametrize("tile", [TALL, WIDE, Tile(64, 128, 2), Tile(192, 128, 1, 3)])
    @pytest.mark.parametrize("mode", ["BATCHED", "MASKED", "CONTIGUOUS", "K_GROUPED"])
    def test_one_thread_copies(self, mode, tile, tmp_path):
        launch = prepare_launch(make_problem(mode=mode, tile=tile))
        cubin = nvrtc.compile_cubin(self.source(), launch.kernel._definitions)
        assert_one_thread_copies(cubin, tmp_path, num_elections=1)

    def test_machine_code_is_kept(self, monkeypatch):
        source = 'extern "C" __global__ void nothing() {}'
        cubin = nvrtc.compile_cubin(source, {})
        (path,) = nvrtc.cache_folder().iterdir()
        assert path.read_bytes() == cubin
        monkeypatch.setattr(nvrtc, "_compile", lambda *arguments: pytest.fail("compiled again"))
        assert nvrtc.compile_cubin(source, {}) == cubin
        monkeypatch.setattr(nvrtc, "_compile", lambda *arguments: b"other")
        assert nvrtc.compile_cubin(source, {"X": 1}) == b"other"
        assert nvrtc.compile_cubin(source + " ", {}) == b"other"

    def test_a_folder_that_cannot_be_written_is_no_error(self, tmp_path, monkeypatch):
        file = tmp_path / "file"
        file.touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
        assert nvrtc.compile_cubin('extern "C" __global__ void nothing() {}', {})

    def test_errors_come_with_the_log(self):
        with pytest.raises(RuntimeError, match='(?s)-DX="y".*undefined'):
            nvrtc.compile_cubin("__device__ int f() { return undefined; }", {"X": '"y"'})


class TestBindings:
    """cuda-bindings is imported when a kernel is asked for, and not before."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        nvrtc.load_bindings.cache_clear()
        yield
        nvrtc.load_bindings.cache_clear()

    def test_reading_needs_none(self):
        program = (
            "import sys; sys.modules['cuda.bindings'] = None\n"
            "import torch\n"
            "from transformer_engine_batched import groupwise\n"
            "from transformer_engine_batched.kernels.blockwise_gemm import TILES, prepare_launch\n"
            "print(groupwise.describe_scales(torch.ones(2, 3, 4), 1)[1:], len(TILES))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, f"(1, 4, 1, 3) {len(TILES)}\n"), done.stderr

    def test_a_kernel_says_what_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(ImportError, match="a kernel in CUDA C.*pip install 'cuda-bindings"):
            nvrtc.compile_cubin("", {})

    def test_a_thread_without_a_context_gets_that_of_the_current_device(self, monkeypatch):
        """Once; any other status is an error at once."""
        status = nvrtc.load_bindings().driver.CUresult
        bound, answers = [], [status.CUDA_ERROR_INVALID_CONTEXT, status.CUDA_SUCCESS]
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "set_device", bound.append)
        assert nvrtc._call_driver(lambda x: (answers.pop(0), x), 7) == 7 and bound == [3]
        with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_CONTEXT"):
            nvrtc._call_driver(lambda: (status.CUDA_ERROR_INVALID_CONTEXT,))
        with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
            nvrtc._call_driver(lambda: (status.CUDA_ERROR_INVALID_VALUE,))
        assert bound == [3, 3]


@pytest.mark.skipif(IS_INTERPRETED, reason="is the process that is started here")
def test_triton_form():
    run_interpreted(__file__)


@pytest.mark.skipif(not IS_INTERPRETED, reason="runs in a process of its own")
class TestInterpreted:
    """The Triton form against exact products: it is what the CUDA kernel is read by."""

    @pytest.fixture(autouse=True)
    def arithmetic(self, monkeypatch):
        give_device_arithmetic(monkeypatch)

    @pytest.mark.parametrize(
        "granularities, layouts, fp8",
        [
            ((1, 128), ("flat", "item"), ("e4m3", "e4m3")),
            ((1, 1), ("item", "flat"), ("e4m3", "e5m2")),
            ((128, 128), ("flat", "flat"), ("e5m2", "e4m3")),
            ((128, 1), ("item", "shared"), ("e4m3", "e4m3")),
        ],
    )
    def test_batched(self, granularities, layouts, fp8):
        from transformer_engine_batched.kernels import blockwise_gemm_triton as triton_form

        a = make_operand(2, 70, 300, granularities[0], layouts[0], 1, fp8=fp8[0])
        b = make_operand(2, 136, 300, granularities[1], layouts[1], 2, fp8=fp8[1])
        out = poisoned_out((2, 70, 136), torch.float32, row_padding=8)
        codes = (a.codes.view(torch.uint8), b.codes.view(torch.uint8))
        triton_form.multiply_blockwise(*codes, a.scales, b.scales, out, formats=fp8)
        assert_accurate(out, a.exact @ b.exact.mT, 130.0)

    def test_accumulate(self):
        from transformer_engine_batched.kernels import blockwise_gemm_triton as triton_form

        a = make_operand(1, 40, 128, 1, "flat", 1)
        out = poisoned_out((1, 40, 40), torch.float32, fill=100.0)
        triton_form.multiply_blockwise(a.codes, a.codes, a.scales, a.scales, out, accumulate=True)
        assert_accurate(out, 100.0 + a.exact @ a.exact.mT, 130.0)

    def test_masked(self):
        from transformer_engine_batched.kernels import blockwise_gemm_triton as triton_form

        a = make_operand(4, 70, 128, 1, "flat", 1)
        b = make_operand(4, 24, 128, 128, "item", 2)
        out = poisoned_out((4, 70, 24), torch.bfloat16)
        masked_m = torch.tensor([70, 0, 3, 1000], dtype=torch.int32)
        triton_form.multiply_blockwise(a.codes, b.codes, a.scales, b.scales, out, masked_m=masked_m)
        exact = a.exact @ b.exact.mT
        for item, rows in enumerate((70, 0, 3, 70)):
            assert_accurate(out[item : item + 1, :rows], exact[item : item + 1, :rows])
            assert out[item, rows:].isnan().all()

    def test_contiguous(self):
        from transformer_engine_batched.kernels import blockwise_gemm_triton as triton_form

        groups = torch.tensor([0] * 128 + [2] * 100 + [-1] * 156, dtype=torch.int32)
        a = make_operand(1, len(groups), 128, 1, "item", 1)
        b = make_operand(3, 24, 128, 128, "item", 2)
        out = poisoned_out((len(groups), 24), torch.bfloat16)
        triton_form.multiply_blockwise(
            a.codes[0], b.codes, a.scales, b.scales, out, m_indices=groups
        )
        exact = torch.cat([a.exact[0, :128] @ b.exact[0].T, a.exact[0, 128:228] @ b.exact[2].T])
        assert_accurate(out[None, :228], exact[None])
        assert out[228:].isnan().all()

    @pytest.mark.parametrize("accumulate", [False, True])
    def test_k_grouped(self, accumulate):
        from transformer_engine_batched.kernels import blockwise_gemm_triton as triton_form

        sizes = [256, 0, 128]
        a, b = make_operand(1, 40, 384, 1, "flat", 1), make_operand(1, 24, 384, 1, "item", 2)
        out = poisoned_out((3, 40, 24), torch.float32, fill=5.0 if accumulate else None)
        triton_form.multiply_blockwise_k_grouped(
            a.codes[0],
            b.codes[0],
            a.scales,
            b.scales,
            out,
            torch.tensor(sizes, dtype=torch.int32),
            accumulate=accumulate,
        )
        before = 5.0 if accumulate else 0.0
        for group, (first, size) in enumerate(zip((0, 256, 256), sizes)):
            columns = slice(first, first + size)
            exact = before + a.exact[0, :, columns] @ b.exact[0, :, columns].T
            assert_accurate(out[group : group + 1], exact[None], 130.0)
