# SPDX-License-Identifier: Apache-2.0
"""`quantization_error` and `estimate_memory`: numbers known by hand, and refusals. Needs no GPU."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import make_quantizer, random_values, sqnr_per_item
from block_data import cast

import transformer_engine_batched as teb


class TestQuantizationError:
    """Per item, of every form of a quantized tensor."""

    def test_by_hand(self):
        x = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[0.0, 5.0]]])
        error = teb.quantization_error(x, torch.tensor([[[3.0, 3.5]], [[0.0, 0.0]], [[0.0, 5.0]]]))
        assert error.max_error.tolist() == [0.5, 0.0, 0.0]
        assert error.relative_error.tolist() == pytest.approx([0.1, 0.0, 0.0])
        assert error.sqnr_db.tolist() == pytest.approx([20.0, math.inf, math.inf])
        assert (
            str(error) == "SQNR 20.0 dB, relative error 1.00e-01, max error 0.5 (worst of 3 items)"
        )

    @pytest.mark.parametrize("granularity", (1, 128))
    @pytest.mark.parametrize("shape", ((3, 200, 300), (1, 1, 130), (2, 128, 128), (2, 2, 40, 72)))
    def test_casts(self, shape, granularity):
        x = random_values(shape, 1)
        codes, scale_inv, numbers = cast(x, granularity)
        error = teb.quantization_error(x, (codes, scale_inv))
        expected = sqnr_per_item(numbers, x.double()).view(shape[:-2])
        torch.testing.assert_close(error.sqnr_db, expected)
        assert error.max_error.shape == shape[:-2]
        assert torch.equal(error.max_error, (numbers - x.double()).abs().amax((-2, -1)))
        assert bool((error.sqnr_db > 25).all())

    @pytest.mark.parametrize("recipe", ("float8_current", "mxfp8"))
    def test_tensors_of_te(self, recipe, emulated):
        x = random_values((2, 64, 96), 1)
        error = teb.quantization_error(x, teb.quantize(x, make_quantizer(recipe)))
        assert bool((error.sqnr_db > 27).all()) and bool((error.sqnr_db < 40).all())

    def test_a_lost_item_shows(self):
        """In that item alone."""
        x = random_values((4, 64, 128), 1)
        codes, scale_inv = teb.per_token_cast_to_fp8(x)
        scale_inv[2] *= 2
        ratios = teb.quantization_error(x, (codes, scale_inv)).sqnr_db
        assert ratios[2] < 1.0 and bool((ratios[[0, 1, 3]] > 28).all())

    def test_empty_and_nan(self):
        assert str(teb.quantization_error(torch.empty(0, 3, 4), torch.empty(0, 3, 4))) == "no items"
        x = torch.ones(1, 2, 2)
        error = teb.quantization_error(x, torch.full_like(x, torch.nan))
        assert bool(error.sqnr_db.isnan().all())

    @pytest.mark.parametrize(
        "x, q, error, match",
        (
            (torch.ones(3), torch.ones(3), ValueError, r"x has shape \[3\]"),
            ("x", torch.ones(2, 2), TypeError, "got str"),
            (torch.ones(2, 2), torch.ones(2, 3), ValueError, r"q has shape \[2, 3\], x \[2, 2\]"),
            (torch.ones(2, 2), 3, TypeError, "q: expected.*got int"),
            (torch.ones(2, 2), (torch.ones(2, 2),) * 3, TypeError, "q: expected.*got tuple"),
            (torch.ones(2, 2), (torch.ones(2, 2), torch.ones(2, 2)), ValueError, r"scale_inv has shape \[2, 2\]"),
        ),
    )  # fmt: skip
    def test_refusals(self, x, q, error, match):
        with pytest.raises(error, match=match):
            teb.quantization_error(x, q)


class TestEstimateMemory:
    """Bytes by hand, and of the very tensors that the casts make."""

    def test_by_hand(self):
        estimate = teb.estimate_memory((1024, 2048, 4096), "gemm")
        assert estimate.codes == (1024 + 2048) * 4096
        assert estimate.scales == 4 * (1024 * 32 + 16 * 32)
        assert estimate.output == 1024 * 2048 * 2 and estimate.workspace == 0
        assert estimate.total == estimate.codes + estimate.scales + estimate.output
        assert estimate.high_precision == 2 * estimate.codes + estimate.output
        gradient = teb.estimate_memory((2048, 4096, 8192), "weight_gradient")
        assert gradient.output == 2048 * 4096 * 4
        assert gradient.scales == 4 * (2048 + 4096) * 64

    @pytest.mark.parametrize("granularity", ((1, 128, 128), (1, 1, 128), (128, 128, 128)))
    @pytest.mark.parametrize("with_transpose", (False, True))
    def test_is_what_the_casts_allocate(self, granularity, with_transpose):
        """Sizes whose rows need no padding: the reference does not pad them."""
        batch, m, n, k = 3, 208, 48, 144
        estimate = teb.estimate_memory(
            (m, n, k), batch=batch, scale_granularity_mnk=granularity, with_transpose=with_transpose
        )
        tensors = []
        for rows, per_scale in ((m, granularity[0]), (n, granularity[1])):
            function = teb.per_token_cast_to_fp8 if per_scale == 1 else teb.per_block_cast_to_fp8
            made = function(random_values((batch, rows, k), 1), with_transpose=with_transpose)
            tensors += made if with_transpose else [made]
        assert estimate.codes == sum(x.values.numel() for x in tensors)
        assert estimate.scales == sum(4 * x.scale_inv.numel() for x in tensors)

    @pytest.mark.parametrize(
        "arguments, match",
        (
            (((1, 2, 3), "conv"), "operation='conv'"),
            (((1, 2),), r"shape=\(1, 2\)"),
            (((1, 2, -3),), r"shape=\(1, 2, -3\)"),
            (((1, 2, 3.0),), r"shape=\(1, 2, 3.0\)"),
        ),
    )
    def test_refusals(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            teb.estimate_memory(*arguments)
        with pytest.raises(ValueError, match="scale_granularity_mnk"):
            teb.estimate_memory((1, 2, 3), scale_granularity_mnk=(1, 1, 1))
