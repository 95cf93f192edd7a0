# SPDX-License-Identifier: Apache-2.0
"""FP8 products with block scales on the Hopper kernel, and Float8BlockScaling outside of `emulate()`."""

from __future__ import annotations

import field_examples
import pytest
import torch
from accuracy import assert_accurate
from block_data import cast
from block_data import make_masked as make_masked_on
from blockwise_cases import KERNEL_BOUNDS_DB

import transformer_engine_batched as teb

pytestmark = pytest.mark.skipif(
    torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for Hopper"
)

GRANULARITIES = ((1, 128, 128), (1, 1, 128), (128, 128, 128))


def counts(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def make_masked(*arguments):
    return make_masked_on(*arguments, device="cuda")


def check_rows(out, expected, rows):
    """Rows that are computed, and poison in the others."""
    for item, count in enumerate(rows):
        assert_accurate(out[item, :count], expected[item, :count], KERNEL_BOUNDS_DB[out.dtype])
        assert bool(out[item, count:].isnan().all()), item


def test_field_examples():
    field_examples.run_flashinfer_example("cuda")
    field_examples.run_first_gemm("cuda")
    field_examples.run_grouped_gemm("cuda")
    field_examples.run_weight_gradient("cuda")
    field_examples.assert_casts_agree("cuda")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "sizes", ((130, 200, 256), (40, 24, 389), (1, 1, 1), (300, 389, 712), (128, 130, 1024))
)
def test_granularities(sizes, granularity, dtype):
    operands, expected = make_masked(3, *sizes, granularity)
    m = sizes[0]
    for rows in ((m, m // 2, 0), (m, m, m), (0, 1, m - 1)):
        out = torch.full(expected.shape, torch.nan, device="cuda", dtype=dtype)
        teb.batched_gemm_fp8_nt_groupwise(*operands, counts(*rows), max(rows), granularity, out=out)
        check_rows(out, expected, rows)


def test_counts_on_the_device_are_clamped():
    operands, expected = make_masked(3, 130, 200, 256)
    out = torch.full(expected.shape, torch.nan, device="cuda")
    teb.batched_gemm_fp8_nt_groupwise(*operands, counts(1000, -5, 2**31 - 1), 130, out=out)
    check_rows(out, expected, (130, 0, 130))


def test_counts_on_the_host_are_checked():
    operands, expected = make_masked(2, 130, 200, 256)
    with pytest.raises(ValueError, match=r"masked_m\[1\] = 131"):
        teb.batched_gemm_fp8_nt_groupwise(*operands, counts(1, 131).cpu(), 66)
    out = torch.full(expected.shape, torch.nan, device="cuda")
    teb.batched_gemm_fp8_nt_groupwise(*operands, counts(1, 130).cpu(), 66, out=out)
    check_rows(out, expected, (1, 130))


def test_graph_follows_the_counts():
    """No synchronisation: captured once, replayed with other counts."""
    operands, expected = make_masked(4, 300, 256, 512)
    masked_m = counts(300, 300, 300, 300)
    out = torch.full(expected.shape, torch.nan, device="cuda")
    teb.batched_gemm_fp8_nt_groupwise(*operands, masked_m, 150, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        teb.batched_gemm_fp8_nt_groupwise(*operands, masked_m, 150, out=out)
    for rows in ((300, 0, 17, 129), (0, 0, 0, 0), (1, 300, 128, 256)):
        masked_m.copy_(counts(*rows))
        out.fill_(torch.nan)
        graph.replay()
        check_rows(out, expected, rows)


def test_views_and_other_streams():
    operands, expected = make_masked(3, 130, 200, 389, (1, 1, 128))
    a, b, a_scale, b_scale = operands
    views = (
        a.mT.contiguous().mT, b.transpose(0, 1).contiguous().transpose(0, 1),
        a_scale.mT.contiguous().mT, b_scale.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    )  # fmt: skip
    for shape in ((130, 3, 200), (3, 130, 200)):
        out = torch.full(shape, torch.nan, device="cuda")
        out = out.transpose(0, 1) if shape[0] == 130 else out.mT.contiguous().mT
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            teb.batched_gemm_fp8_nt_groupwise(*views, counts(130, 7, 0), 46, (1, 1, 128), out=out)
        torch.cuda.current_stream().wait_stream(stream)
        check_rows(out, expected, (130, 7, 0))


@pytest.mark.parametrize("limit", (1, 40, 1000))
def test_sm_limit(limit):
    operands, expected = make_masked(3, 130, 200, 256)
    out = torch.full(expected.shape, torch.nan, device="cuda")
    with teb.limit_sms(limit):
        teb.batched_gemm_fp8_nt_groupwise(*operands, counts(130, 7, 0), 46, out=out)
    check_rows(out, expected, (130, 7, 0))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_contiguous(granularity):
    n, k = 200, 712
    sizes = {2: 100, 0: 300, 3: 1, 4: 512}
    m_indices = []
    for group, rows in sizes.items():
        m_indices += [group] * rows + [-1] * (-rows % 128)
    m_indices = counts(*m_indices)
    total = len(m_indices)
    a, a_scale, a64 = cast(torch.randn(total, k, device="cuda"), granularity[0])
    b, b_scale, b64 = cast(torch.randn(5, n, k, device="cuda"), granularity[1])
    out = torch.full((total, n), torch.nan, device="cuda", dtype=torch.bfloat16)
    teb.grouped_gemm_fp8_nt_contiguous(a, b, a_scale, b_scale, m_indices, granularity, out=out)
    for group in sizes:
        rows = m_indices == group
        assert_accurate(out[rows], a64[rows] @ b64[group].mT, KERNEL_BOUNDS_DB[out.dtype])
    assert bool(out[m_indices < 0].isnan().all())


@pytest.mark.parametrize("accumulate", (True, False))
@pytest.mark.parametrize("ks", ((128, 0, 256, 128), (0, 0), (1024,), (128,) * 8))
def test_k_grouped(ks, accumulate):
    total, m, n = 1024, 200, 389
    x, grad = torch.randn(total, n, device="cuda"), torch.randn(total, m, device="cuda")
    _, (xt, xt_scale) = teb.per_token_cast_to_fp8(x, with_transpose=True)
    _, (gt, gt_scale) = teb.per_token_cast_to_fp8(grad, with_transpose=True)
    x64, g64 = (cast(y.mT.contiguous(), 1)[2] for y in (x, grad))
    before = torch.randn(len(ks), m, n, device="cuda")
    for sizes in (list(ks), counts(*ks)):
        out = before.clone()
        teb.grouped_gemm_fp8_k_grouped(gt, xt, gt_scale, xt_scale, sizes, out, accumulate)
        start = 0
        for group, size in enumerate(ks):
            expected = g64[:, start : start + size] @ x64[:, start : start + size].mT
            if accumulate:
                expected = expected + before[group].double()
            if accumulate or size:
                assert_accurate(out[group], expected, KERNEL_BOUNDS_DB[out.dtype])
            else:
                assert bool((out[group] == 0).all())
            start += size


def test_reference_engine_agrees():
    operands, _ = make_masked(3, 130, 200, 389)
    results = []
    for context in (teb.emulate(), teb.emulate("reference")):
        with context:
            results.append(
                teb.batched_gemm_fp8_nt_groupwise(
                    *operands, counts(130, 130, 130), 130, out_dtype=torch.float32
                )
            )
    assert_accurate(results[0], results[1].double(), KERNEL_BOUNDS_DB[torch.float32])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("sizes", ((1024, 2048, 4096), (300, 389, 712)))
def test_estimated_memory_is_the_peak(sizes, granularity):
    """Operands, scales and output of a product, to the byte; nothing else is allocated."""
    m, n, k = sizes
    sources = torch.randn(2, m, k, device="cuda"), torch.randn(2, n, k, device="cuda")
    casts = [
        teb.per_token_cast_to_fp8 if g == 1 else teb.per_block_cast_to_fp8 for g in granularity
    ]
    masked_m = counts(m, m)

    def run():
        (a, a_scale), (b, b_scale) = (cast(x) for cast, x in zip(casts, sources))
        return teb.batched_gemm_fp8_nt_groupwise(a, b, a_scale, b_scale, masked_m, m, granularity)

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    peak = torch.cuda.max_memory_allocated() - before
    estimate = teb.estimate_memory(sizes, batch=2, scale_granularity_mnk=granularity)
    assert peak == estimate.total
