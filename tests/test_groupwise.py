# SPDX-License-Identifier: Apache-2.0
"""FP8 products with plain block scales on the CPU: the field's examples, layouts, refusals."""

from __future__ import annotations

import field_examples
import pytest
import torch
from accuracy import assert_accurate, random_values
from block_data import cast, make_masked

import transformer_engine_batched as teb

GRANULARITIES = ((1, 128, 128), (1, 1, 128), (128, 128, 128))
# FP64 of the dequantised operands, whose rounding to the output's dtype is all that is left.
KERNEL_DB = 50.0


def counts(*values):
    return torch.tensor(values, dtype=torch.int32)


class TestFieldExamples:
    """Examples of FlashInfer and of the DeepGEMM tutorial, on random data wherever they use empty tensors."""

    @pytest.fixture(autouse=True)
    def seed(self):
        torch.manual_seed(20260403)

    def test_flashinfer(self):
        field_examples.run_flashinfer_example("cpu")

    def test_tutorial(self):
        field_examples.run_first_gemm("cpu")
        field_examples.run_grouped_gemm("cpu")
        field_examples.run_weight_gradient("cpu")

    def test_tutorial_casts(self):
        field_examples.assert_casts_agree("cpu")


class TestMasked:
    """`batched_gemm_fp8_nt_groupwise`."""

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("sizes", ((130, 200, 256), (40, 17, 389), (1, 1, 1), (128, 128, 130)))
    def test_granularities(self, sizes, granularity):
        operands, expected = make_masked(3, *sizes, granularity)
        m = sizes[0]
        masked_m = counts(m, m // 2, 0)
        out = torch.full(expected.shape, torch.nan)
        made = teb.batched_gemm_fp8_nt_groupwise(*operands, masked_m, m, granularity, out=out)
        assert made is out
        for item, count in enumerate(masked_m.tolist()):
            assert_accurate(out[item, :count], expected[item, :count])
            assert bool(out[item, count:].isnan().all())

    @pytest.mark.parametrize("dtype", (None, torch.float32, torch.float16))
    def test_out_dtypes(self, dtype):
        operands, expected = make_masked(2, 16, 32, 256)
        out = teb.batched_gemm_fp8_nt_groupwise(*operands, counts(16, 16), 16, out_dtype=dtype)
        assert out.dtype == (dtype or torch.bfloat16)
        assert_accurate(out, expected, KERNEL_DB)

    def test_end_to_end(self):
        a, b = random_values((4, 64, 512), 1), random_values((4, 128, 512), 2)
        (qa, sa), (qb, sb) = teb.per_token_cast_to_fp8(a), teb.per_block_cast_to_fp8(b)
        out = teb.batched_gemm_fp8_nt_groupwise(qa, qb, sa, sb, counts(64, 64, 64, 64), 64)
        assert_accurate(out, a.double() @ b.double().mT, 28.0)

    def test_all_rows_masked(self):
        operands, expected = make_masked(2, 16, 32, 256)
        out = torch.full(expected.shape, 7.0)
        teb.batched_gemm_fp8_nt_groupwise(*operands, counts(0, 0), 0, out=out)
        assert bool((out == 7.0).all())

    @pytest.mark.parametrize(
        "fp8", ((torch.float8_e5m2, torch.float8_e4m3fn), (torch.float8_e4m3fn, torch.float8_e5m2))
    )
    def test_e5m2(self, fp8):
        a, b = random_values((2, 16, 256), 1), random_values((2, 32, 256), 2)
        a, a_scale, a64 = cast(a, 1, fp8_dtype=fp8[0])
        b, b_scale, b64 = cast(b, 128, fp8_dtype=fp8[1])
        out = teb.batched_gemm_fp8_nt_groupwise(a, b, a_scale, b_scale, counts(16, 16), 16)
        assert_accurate(out, a64 @ b64.mT)

    def test_views(self):
        """Codes, scales and out that are not contiguous."""
        operands, expected = make_masked(3, 40, 48, 200, (1, 1, 128))
        a, b, a_scale, b_scale = operands
        out = torch.full((40, 3, 48), torch.nan).transpose(0, 1)
        teb.batched_gemm_fp8_nt_groupwise(
            a.mT.contiguous().mT, b[:, :, :].transpose(0, 1).contiguous().transpose(0, 1),
            a_scale.mT.contiguous().mT, b_scale.permute(2, 1, 0).contiguous().permute(2, 1, 0),
            counts(40, 40, 40), 40, (1, 1, 128), out=out,
        )  # fmt: skip
        assert_accurate(out, expected)

    def test_zeros_give_zeros(self):
        """Blocks whose amax is 0: no NaN from their scales."""
        values = random_values((2, 16, 256), 1)
        values[:, :, :128] = 0.0
        values[1] = 0.0
        codes, scale_inv = teb.per_token_cast_to_fp8(values)
        b, b_scale = teb.per_block_cast_to_fp8(torch.zeros(2, 128, 256))
        out = teb.batched_gemm_fp8_nt_groupwise(codes, b, scale_inv, b_scale, counts(16, 16), 16)
        assert bool((out == 0).all())

    def test_empty(self):
        operands, _ = make_masked(2, 16, 32, 256)
        a, b, a_scale, b_scale = operands
        out = teb.batched_gemm_fp8_nt_groupwise(
            a[:, :0], b, a_scale[:, :0], b_scale, counts(0, 0), 0
        )
        assert out.shape == (2, 0, 32)
        out = teb.batched_gemm_fp8_nt_groupwise(a[:0], b[:0], a_scale[:0], b_scale[:0], counts(), 0)
        assert out.shape == (0, 16, 32)

    def test_a_nan_stays_in_its_row(self):
        values = random_values((1, 16, 256), 1)
        values[0, 3, 5] = torch.nan
        codes, scale_inv = teb.per_token_cast_to_fp8(values)
        b, b_scale = teb.per_block_cast_to_fp8(random_values((1, 32, 256), 2))
        out = teb.batched_gemm_fp8_nt_groupwise(codes, b, scale_inv, b_scale, counts(16), 16)[0]
        assert bool(out[3].isnan().all()) and not bool(out[[0, 1, 2, 4]].isnan().any())


class TestContiguous:
    """`grouped_gemm_fp8_nt_contiguous`."""

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_groups(self, granularity):
        """Groups of 100, none, 256 and 1 rows, in an order of their own."""
        n, k = 40, 200
        m_indices = counts(*([2] * 100 + [-1] * 28 + [0] * 256 + [3] * 1 + [-1] * 127))
        a, a_scale, a64 = cast(random_values((512, k), 1), granularity[0])
        b, b_scale, b64 = cast(random_values((4, n, k), 2), granularity[1])
        out = torch.full((512, n), torch.nan)
        teb.grouped_gemm_fp8_nt_contiguous(a, b, a_scale, b_scale, m_indices, granularity, out=out)
        is_row = m_indices >= 0
        expected = (a64[:, None] @ b64[m_indices.clamp(min=0)].mT)[:, 0]
        assert_accurate(out[is_row], expected[is_row])
        assert bool(out[~is_row].isnan().all())

    def test_padding_alone_and_no_rows(self):
        a, a_scale, _ = cast(random_values((128, 128), 1), 1)
        b, b_scale, _ = cast(random_values((2, 16, 128), 2), 128)
        out = torch.full((128, 16), 3.0)
        m_indices = torch.full((128,), -1, dtype=torch.int32)
        teb.grouped_gemm_fp8_nt_contiguous(a, b, a_scale, b_scale, m_indices, out=out)
        assert bool((out == 3.0).all())
        made = teb.grouped_gemm_fp8_nt_contiguous(a[:0], b, a_scale[:0], b_scale, m_indices[:0])
        assert made.shape == (0, 16)

    @pytest.mark.parametrize(
        "m_indices, match",
        (
            ([0] * 100 + [1] * 28, "rows 0 to 127 belong to more than one group"),
            ([-1] * 10 + [0] * 118, "padding precedes a group"),
            ([0] * 127 + [2], "values from 0 to 2: expected groups 0 to 1"),
            ([0] * 127 + [-2], "values from -2"),
        ),
    )
    def test_the_layout_is_checked(self, m_indices, match):
        a, a_scale, _ = cast(random_values((128, 128), 1), 1)
        b, b_scale, _ = cast(random_values((2, 16, 128), 2), 128)
        with pytest.raises(ValueError, match=match):
            teb.grouped_gemm_fp8_nt_contiguous(a, b, a_scale, b_scale, counts(*m_indices))


class TestKGrouped:
    """`grouped_gemm_fp8_k_grouped`."""

    @pytest.mark.parametrize("ks", ([128, 0, 256, 128], [512], [0, 0], [128, 128]))
    @pytest.mark.parametrize("as_tensor", (False, True))
    def test_sums(self, ks, as_tensor):
        """Groups of no columns among them, and columns past the last group."""
        total = 512
        x, grad = random_values((total, 48), 1), random_values((total, 40), 2)
        _, (xt, xt_scale) = teb.per_token_cast_to_fp8(x, with_transpose=True)
        _, (gt, gt_scale) = teb.per_token_cast_to_fp8(grad, with_transpose=True)
        x64 = cast(x.mT.contiguous(), 1)[2]
        g64 = cast(grad.mT.contiguous(), 1)[2]
        before = random_values((len(ks), 40, 48), 3)
        for accumulate in (True, False):
            out = before.clone()
            sizes = counts(*ks) if as_tensor else ks
            teb.grouped_gemm_fp8_k_grouped(gt, xt, gt_scale, xt_scale, sizes, out, accumulate)
            start = 0
            for group, size in enumerate(ks):
                columns = slice(start, start + size)
                expected = g64[:, columns] @ x64[:, columns].mT
                if accumulate:
                    expected = expected + before[group].double()
                if accumulate or size:
                    assert_accurate(out[group], expected, 120.0)
                else:
                    assert bool((out[group] == 0).all())
                start += size

    @pytest.mark.parametrize(
        "ks, error, match",
        (
            ([100, 28], ValueError, r"ks\[0\] = 100: expected a multiple of 128"),
            ([-128], ValueError, r"ks\[0\] = -128"),
            ([512, 128], ValueError, "adds up to 640 columns"),
            (torch.tensor([128]), TypeError, "ks: expected an int32 tensor, got torch.int64"),
        ),
    )
    def test_sizes_are_checked(self, ks, error, match):
        codes, scale_inv = teb.per_token_cast_to_fp8(random_values((16, 512), 1))
        out = torch.zeros(len(ks), 16, 16)
        with pytest.raises(error, match=match):
            teb.grouped_gemm_fp8_k_grouped(codes, codes, scale_inv, scale_inv, ks, out)

    def test_sums_need_fp32(self):
        codes, scale_inv = teb.per_token_cast_to_fp8(random_values((16, 128), 1))
        out = torch.zeros(1, 16, 16, dtype=torch.bfloat16)
        with pytest.raises(TypeError, match="sums are kept in float32"):
            teb.grouped_gemm_fp8_k_grouped(codes, codes, scale_inv, scale_inv, [128], out)
        teb.grouped_gemm_fp8_k_grouped(
            codes, codes, scale_inv, scale_inv, [128], out, accumulate=False
        )


class TestRefusals:
    """Each message names the operand, what came and what was expected."""

    @staticmethod
    def call(**changes):
        (a, b, a_scale, b_scale), _ = make_masked(2, 16, 32, 256)
        arguments = {
            "a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale, "masked_m": counts(16, 16),
            "expected_m": 16,
        }  # fmt: skip
        return teb.batched_gemm_fp8_nt_groupwise(**(arguments | changes))

    @pytest.mark.parametrize(
        "changes, error, match",
        (
            ({"masked_m": counts(16, 17)}, ValueError, r"masked_m\[1\] = 17: item 1 of a \[2, 16, 256\] has 16 rows"),
            ({"masked_m": counts(-1, 0)}, ValueError, r"masked_m\[0\] = -1"),
            ({"masked_m": counts(16)}, ValueError, r"masked_m has shape \[1\]: expected \[2\]"),
            ({"masked_m": torch.tensor([1, 1])}, TypeError, "masked_m: expected an int32 tensor, got torch.int64"),
            ({"masked_m": [16, 16]}, TypeError, "masked_m: expected an int32 tensor, got list"),
            ({"expected_m": 2.5}, ValueError, "expected_m=2.5"),
            ({"expected_m": -1}, ValueError, "expected_m=-1"),
            ({"scale_granularity_mnk": (1, 128, 64)}, ValueError, r"\(1, 128, 64\): expected one of"),
            ({"scale_granularity_mnk": (1, 1, 128)}, ValueError, r"b_scale has shape \[2, 1, 2\]: expected \[2, 32, 2\]"),
            ({"a": torch.zeros(2, 16, 256)}, TypeError, "a has dtype torch.float32.*per_token_cast_to_fp8"),
            ({"b": "b"}, TypeError, "b: expected a torch.Tensor, got str"),
            ({"a": torch.zeros(16, 256).to(torch.float8_e4m3fn)}, ValueError, r"a has shape \[16, 256\]: expected \[B, M, K\]"),
            ({"b": torch.zeros(3, 32, 256).to(torch.float8_e4m3fn)}, ValueError, "2 and 3 items"),
            ({"b": torch.zeros(2, 32, 128).to(torch.float8_e4m3fn)}, ValueError, "differ in their last dim"),
            ({"a_scale": torch.zeros(2, 16, 3)}, ValueError, r"a_scale has shape \[2, 16, 3\]: expected \[2, 16, 2\]"),
            ({"a_scale": torch.zeros(2, 16, 2).double()}, TypeError, "a_scale: expected float32"),
            ({"out": torch.zeros(2, 16, 33)}, ValueError, r"out has shape \[2, 16, 33\], the product \[2, 16, 32\]"),
            ({"out": torch.zeros(2, 16, 32).double()}, TypeError, "out has dtype torch.float64"),
            ({"out": torch.zeros(1, 16, 32).expand(2, -1, -1)}, ValueError, "elements that share memory"),
            ({"out": 3}, TypeError, "out: expected a torch.Tensor, got int"),
            ({"out_dtype": torch.float64}, TypeError, "out_dtype=torch.float64"),
        ),
    )  # fmt: skip
    def test_messages(self, changes, error, match):
        with pytest.raises(error, match=match):
            self.call(**changes)

    def test_both_e5m2(self):
        changes = {
            name: torch.zeros(shape).to(torch.float8_e5m2)
            for name, shape in (("a", (2, 16, 256)), ("b", (2, 32, 256)))
        }
        with pytest.raises(teb.UnsupportedError, match="both E5M2"):
            self.call(**changes)

    def test_nothing_is_written_before_all_checks(self):
        out = torch.full((2, 16, 32), 5.0)
        with pytest.raises(ValueError):
            self.call(out=out, masked_m=counts(16, 17))
        assert bool((out == 5.0).all())
