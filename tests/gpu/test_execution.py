# SPDX-License-Identifier: Apache-2.0
"""How products are executed: memory, streams, threads, graphs, sizes beyond 32 bits, SM limit."""

from __future__ import annotations

import threading

import pytest
import torch
from accuracy import sqnr_per_item
from products import dequantize, make_quantizer, multiply, random_operands

import transformer_engine_batched as teb
from transformer_engine_batched import _C


def float8_operands(batch=4, m=64, n=96, k=128, layout="TN"):
    """Quantized operands and their product in FP64."""
    a, b = random_operands(layout, batch, m, n, k)
    a, b = make_quantizer("current")(a), make_quantizer("current")(b)
    return a, b, multiply(dequantize(a), dequantize(b), layout)


def count_allocations(function):
    """(allocations, bytes) that a warm call makes on the device."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    result = function()
    after = torch.cuda.memory_stats()
    del result
    return tuple(
        after[name] - before[name]
        for name in ("allocation.all.allocated", "allocated_bytes.all.allocated")
    )


@pytest.mark.parametrize(
    "make",
    (
        lambda: torch.randn(4, 64, 128, device="cuda").bfloat16(),
        lambda: torch.randn(4, 128, 64, device="cuda").bfloat16().mT,
        lambda: torch.randn(4, 80, 200, device="cuda").bfloat16()[:, 8:72, 16:144],
        lambda: torch.randn(64, 4, 128, device="cuda").bfloat16().transpose(0, 1),
        lambda: torch.randn(128, 4, 64, device="cuda").bfloat16().permute(1, 2, 0),
        lambda: torch.randn(64, 128, device="cuda").bfloat16().expand(4, 64, 128),
        lambda: torch.randn(2, 64, 2, 128, device="cuda").bfloat16().transpose(1, 2),
    ),
)
def test_views_are_not_copied(make):
    a = make()
    b = torch.randn(*a.shape[:-2], 128, 48, device="cuda").bfloat16()
    out = torch.empty(*a.shape[:-1], 48, device="cuda", dtype=torch.bfloat16)
    count, size = count_allocations(lambda: teb.bmm(a, b, out=out))
    # At most the workspace: these small products want none or a tile counter.
    assert size <= 512 * max(count, 1) and count <= 2


@pytest.mark.parametrize("layout", ("TN", "NN", "NT"))
def test_only_output_and_workspace_are_allocated(layout):
    a, b, expected = float8_operands(8, 512, 512, 512, layout)
    count, size = count_allocations(
        lambda: teb.batched_general_gemm(a, b, layout=layout, out_dtype=torch.bfloat16)
    )
    assert count <= 2
    assert expected.numel() * 2 <= size <= expected.numel() * 2 + 1024


def test_a_view_with_no_contiguous_dim_takes_one_copy():
    a = torch.randn(4, 64, 256, device="cuda").bfloat16()[..., ::2]
    b = torch.randn(4, 128, 48, device="cuda").bfloat16()
    out = torch.empty(4, 64, 48, device="cuda", dtype=torch.bfloat16)
    _, size = count_allocations(lambda: teb.bmm(a, b, out=out))
    assert size <= a.numel() * 2 + 1024
    assert sqnr_per_item(out, a.double() @ b.double()).min() > 54


def test_no_synchronization():
    a, b, _ = float8_operands()
    teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16)
        teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16, bias=a._scale_inv.new_zeros(96))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n", (96, 37))
def test_graph_capture_and_replay(n):
    a, b, _ = float8_operands(n=n)
    out = torch.empty(4, 64, n, device="cuda", dtype=torch.bfloat16)
    call = lambda: teb.batched_general_gemm(a, b, out=out, use_split_accumulator=True)  # noqa: E731
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        fresh_a, fresh_b, expected = float8_operands(n=n)
        for x, y in ((a, fresh_a), (b, fresh_b)):
            x._data.copy_(y._data)
            x._scale_inv.copy_(y._scale_inv)
        out.fill_(float("nan"))
        graph.replay()
        assert sqnr_per_item(out, expected).min() > 52


def test_capture_without_a_warm_call():
    a, b, expected = float8_operands(m=72)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16, use_split_accumulator=True)
    graph.replay()
    assert sqnr_per_item(out, expected).min() > 52


def test_two_streams_at_once():
    problems = [float8_operands(16, 512, 512, 512) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for stream, (a, b, _), outs in zip(streams, problems, results):
            with torch.cuda.stream(stream):
                outs.append(teb.batched_general_gemm(a, b, out_dtype=torch.float32))
    torch.cuda.synchronize()
    for (_, _, expected), outs in zip(problems, results):
        assert all(torch.equal(out, outs[0]) for out in outs)
        assert sqnr_per_item(outs[0], expected).min() > 50


def test_eight_threads():
    problems = [float8_operands(3, 32 + 16 * i, 64, 96) for i in range(8)]
    torch.cuda.synchronize()
    failures = []

    def work(index):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for step in range(100):
                    a, b, expected = problems[(index + step) % 8]
                    out = teb.batched_general_gemm(
                        a, b, out_dtype=torch.bfloat16, use_split_accumulator=True
                    )
                    assert sqnr_per_item(out, expected).min() > 52
        except BaseException as error:  # pylint: disable=broad-except
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_formats_alternate_on_one_handle():
    a8, b8, expected8 = float8_operands()
    a16, b16 = random_operands("TN", 4, 64, 96, 128)
    expected16 = multiply(a16, b16, "TN")
    for _ in range(10):
        out8 = teb.batched_general_gemm(
            a8, b8, out_dtype=torch.bfloat16, use_split_accumulator=True
        )
        out16 = teb.batched_general_gemm(a16, b16)
        assert sqnr_per_item(out8, expected8).min() > 52
        assert sqnr_per_item(out16, expected16).min() > 54


def test_repeatable():
    a, b, _ = float8_operands(32, 512, 512, 1024)
    first = teb.batched_general_gemm(a, b, out_dtype=torch.float32)
    for _ in range(5):
        assert torch.equal(teb.batched_general_gemm(a, b, out_dtype=torch.float32), first)


@pytest.mark.parametrize("batch", (65535, 65536, 70001))
@pytest.mark.parametrize("kind", ("plain", "current"))
def test_large_batches(batch, kind):
    a, b = random_operands("TN", batch, 16, 16, 32)
    if kind == "current":
        a, b = make_quantizer(kind)(a), make_quantizer(kind)(b)
    expected = multiply(dequantize(a), dequantize(b), "TN")
    out = teb.batched_general_gemm(a, b, out_dtype=torch.float32, use_split_accumulator=True)
    assert sqnr_per_item(out, expected).min() > 70


def test_large_batch_with_fp8_output():
    a, b = random_operands("TN", 65600, 16, 16, 32)
    a, b = make_quantizer("current")(a), make_quantizer("current")(b)
    quantizer = make_quantizer("delayed", scale=1.0, columnwise=False)
    out = teb.batched_general_gemm(
        a, b, quantization_params=quantizer, out_dtype=torch.bfloat16, use_split_accumulator=True
    )
    expected = multiply(dequantize(a), dequantize(b), "TN")
    assert abs(quantizer.amax.item() / expected.abs().max().item() - 1) < 5e-3
    assert sqnr_per_item(dequantize(out), expected).median() > 31


@pytest.mark.parametrize("kind", ("plain", "current"))
def test_offsets_beyond_32_bits(kind):
    # 5 items of 2^29.2 elements: item 4 starts beyond 2^31 elements.
    rows, k = 9728, 64 * 1024
    b = torch.empty(5, rows, k, device="cuda", dtype=torch.bfloat16)
    for item in range(5):
        b[item].normal_(std=item + 1.0)
    a = torch.randn(5, 16, k, device="cuda").bfloat16()
    if kind == "current":
        a = make_quantizer(kind, columnwise=False)(a)
        b = make_quantizer(kind, columnwise=False)(b)
        values_a, values_b = (
            dequantize(a),
            b._data[:, -256:].view(torch.float8_e4m3fn).double() * b._scale_inv,
        )
    else:
        values_a, values_b = a.double(), b[:, -256:].double()
    assert b.numel() > 2**31
    out = teb.batched_general_gemm(a, b, out_dtype=torch.float32, use_split_accumulator=True)
    expected = values_b @ values_a.mT
    assert sqnr_per_item(out[:, -256:], expected).min() > 50


def test_output_beyond_32_bits():
    a, b = random_operands("TN", 3, 28000, 28016, 64)
    a = make_quantizer("current", columnwise=False)(a)
    b = make_quantizer("current", columnwise=False)(b)
    out = teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16, use_split_accumulator=True)
    assert out.numel() > 2**31
    expected = dequantize(b)[:, -200:] @ dequantize(a).mT
    assert sqnr_per_item(out[:, -200:], expected).min() > 52


def test_leading_dimension_beyond_32_bits_is_packed():
    # ld = 2^31 + 16 bytes: cuBLAS 13.1.0 would read elsewhere (CUB-9572).
    flat = torch.empty(2**31 * 2, device="cuda", dtype=torch.uint8)
    codes = flat.as_strided((1, 2, 32), (0, 2**31 + 16, 1))
    values = torch.randn(1, 2, 32, device="cuda").to(torch.float8_e4m3fn)
    codes.copy_(values.view(torch.uint8))
    b = make_quantizer("delayed", scale=1.0, columnwise=False)(torch.zeros(1, 2, 32, device="cuda"))
    b._data = codes
    a = make_quantizer("delayed", scale=1.0, columnwise=False)(
        torch.randn(1, 16, 32, device="cuda")
    )
    out = teb.batched_general_gemm(a, b, out_dtype=torch.float32, use_split_accumulator=True)
    assert sqnr_per_item(out, values.double() @ dequantize(a).mT).min() > 70


@pytest.mark.parametrize("how", ("context", "environment"))
def test_sm_limit(how, monkeypatch):
    a, b, expected = float8_operands(32, 1024, 1024, 1024)

    def seconds():
        call = lambda: teb.batched_general_gemm(  # noqa: E731
            a, b, out_dtype=torch.bfloat16, use_split_accumulator=True
        )
        assert sqnr_per_item(call(), expected).min() > 52
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    free = min(seconds() for _ in range(3))
    if how == "context":
        with teb.limit_sms(33):
            limited = min(seconds() for _ in range(3))
    else:
        count = torch.cuda.get_device_properties(0).multi_processor_count
        monkeypatch.setenv("NVTE_EXT_MARGIN_SM", str(count - 33))
        limited = min(seconds() for _ in range(3))
    # A quarter of the SMs: at least twice as slow if the limit took hold.
    assert limited > 2 * free


def test_plans_are_kept():
    a, b, _ = float8_operands()
    teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16)
    count = _C.num_plans(0)
    for _ in range(5):
        teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16)
    assert _C.num_plans(0) == count
    teb.batched_general_gemm(a, b, out_dtype=torch.float32)
    assert _C.num_plans(0) == count + 1
