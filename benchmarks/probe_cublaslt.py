# SPDX-License-Identifier: Apache-2.0
"""Asks the loaded cuBLASLt what it runs: sizes, strides, types, epilogues of strided batches.

Each case is planned and launched through the C++ layer alone and compared with FP64. The answers are the
source of the alignment and epilogue rules in `transformer_engine_batched/support.py`.

    python benchmarks/probe_cublaslt.py --out benchmarks/results/h200/probe.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import time

import torch

from transformer_engine_batched import _C

DTYPES = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def make_operand(dtype, batch, rows, cols, ld, batch_stride, offset_bytes=0):
    """A random operand [batch, rows, cols] with the given strides; the gaps are filled with NaN."""
    torch_dtype = DTYPES[dtype]
    size = (0 if batch_stride == 0 else (batch - 1) * batch_stride) + (rows - 1) * ld + cols
    element = torch.empty((), dtype=torch_dtype).element_size()
    offset = offset_bytes // element
    flat = torch.full((size + offset,), float("nan"), device="cuda", dtype=torch.float32)
    flat = flat.to(torch_dtype)
    values = torch.randn(1 if batch_stride == 0 else batch, rows, cols, device="cuda")
    values = values.to(torch_dtype)
    view = flat.as_strided(values.shape, (batch_stride, ld, 1), offset)
    view.view(torch.uint8 if element == 1 else torch_dtype).copy_(
        values.view(torch.uint8 if element == 1 else torch_dtype)
    )
    return flat, offset * element, values.double().expand(batch, rows, cols)


def probe(
    *,
    batch=3,
    m=64,
    n=64,
    k=64,
    a="e4m3",
    b="e4m3",
    d="bf16",
    ld_a=None,
    ld_b=None,
    ld_d=None,
    stride_a=None,
    stride_b=None,
    stride_d=None,
    offset_a=0,
    scale_offset=0,
    layout="TN",
    epilogue="none",
    bias="bf16",
    bias_per_item=False,
    accumulate=False,
    amax=False,
    fast=False,
    repeat=0,
):
    """Plans, launches and checks one case; returns a record of what happened."""
    is_fp8 = a in ("e4m3", "e5m2")
    a_transposed, b_transposed = {"TN": (False, True), "NN": (False, False), "NT": (True, False)}[
        layout
    ]
    a_shape = (k, m) if a_transposed else (m, k)
    b_shape = (n, k) if b_transposed else (k, n)
    ld_a = a_shape[1] if ld_a is None else ld_a
    ld_b = b_shape[1] if ld_b is None else ld_b
    ld_d = n if ld_d is None else ld_d
    stride_a = a_shape[0] * ld_a if stride_a is None else stride_a
    stride_b = b_shape[0] * ld_b if stride_b is None else stride_b
    stride_d = m * ld_d if stride_d is None else stride_d
    a_flat, a_offset, a_value = make_operand(a, batch, *a_shape, ld_a, stride_a, offset_a)
    b_flat, b_offset, b_value = make_operand(b, batch, *b_shape, ld_b, stride_b)
    scale = _C.ScaleMode.tensor if is_fp8 else _C.ScaleMode.none

    def matrix(dtype, ld, stride, transposed, scale_mode):
        return _C.Matrix(
            dtype=getattr(_C.DataType, dtype),
            ld=ld,
            batch_stride=stride,
            transposed=transposed,
            scale_mode=scale_mode,
        )

    d_fp8 = d in ("e4m3", "e5m2")
    problem = _C.Problem(
        batch=batch,
        m=m,
        n=n,
        k=k,
        a=matrix(a, ld_a, stride_a, a_transposed, scale),
        b=matrix(b, ld_b, stride_b, b_transposed, scale),
        d=matrix(d, ld_d, stride_d, False, _C.ScaleMode.tensor if d_fp8 else _C.ScaleMode.none),
        epilogue=getattr(_C.Epilogue, epilogue),
        bias_dtype=getattr(_C.DataType, bias),
        bias_batch_stride=n if bias_per_item else 0,
        accumulate=accumulate,
        fast_accumulation=fast,
        allow_tf32=False,
        amax_d=amax,
        device=0,
        sm_count=0,
        workspace_limit=32 << 20,
    )
    scales = torch.full((64,), 99.0, device="cuda")
    index = scale_offset // 4
    scales[index], scales[index + 16] = 0.5, 0.25
    d_scale = torch.tensor([2.0], device="cuda")
    amax_d = torch.tensor([0.125], device="cuda")
    out = torch.full((batch * stride_d + m * ld_d,), 1.0, device="cuda").to(DTYPES[d])
    bias_value = torch.randn(batch if bias_per_item else 1, n, device="cuda").to(DTYPES[bias])
    pointers = (
        a_flat.data_ptr() + a_offset,
        b_flat.data_ptr() + b_offset,
        out.data_ptr(),
        scales.data_ptr() + scale_offset,
        scales.data_ptr() + scale_offset + 64,
        d_scale.data_ptr(),
        amax_d.data_ptr(),
        bias_value.data_ptr(),
    )
    stream = torch.cuda.current_stream().cuda_stream
    record = {}
    try:
        algorithms = _C.query_algorithms(problem, _C.Pointers(*pointers))
        record["algorithms"] = len(algorithms)
        record["workspace"] = algorithms[0].workspace_bytes
        workspace = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
        launch = lambda: _C.matmul(  # noqa: E731
            problem,
            *pointers,
            1.0,
            1.0 if accumulate else 0.0,
            workspace.data_ptr(),
            workspace.numel(),
            stream,
        )
        launch()
        torch.cuda.synchronize()
        if repeat:
            start = time.perf_counter()
            for _ in range(repeat):
                launch()
            record["host_us"] = (time.perf_counter() - start) / repeat * 1e6
            torch.cuda.synchronize()
    except (RuntimeError, ValueError) as error:
        record["error"] = str(error)[:90]
        return record
    if a_transposed:
        a_value = a_value.mT
    if b_transposed:
        b_value = b_value.mT
    expected = a_value @ b_value * (0.125 if is_fp8 else 1.0)
    if accumulate:
        expected = expected + 1.0
    if "bias" in epilogue:
        expected = expected + bias_value.double()[:, None, :]
    if "gelu" in epilogue:
        expected = torch.nn.functional.gelu(expected, approximate="tanh")
    result = out.as_strided((batch, m, n), (stride_d, ld_d, 1)).double()
    if d_fp8:
        record["amax_ratio"] = float(amax_d / expected.abs().max())
        result = result / 2.0
    error = (result - expected).square().sum((1, 2))
    signal = expected.square().sum((1, 2))
    record["sqnr"] = round(float((10 * torch.log10(signal / error)).min()), 1)
    return record


def cases():
    """Names and arguments of the probed cases."""
    for m in (1, 8, 16, 24, 389):
        yield f"fp8 m={m}", dict(m=m)
    for n, d in itertools.product((1, 4, 8, 16, 24, 389), ("bf16", "fp32", "fp16")):
        yield f"fp8 n={n} d={d}", dict(n=n, d=d)
    for k in (1, 8, 16, 24, 32, 48, 712, 720):
        yield f"fp8 k={k}", dict(k=k)
        padded = (k + 15) // 16 * 16
        if padded != k:
            yield f"fp8 k={k} ld padded", dict(k=k, ld_a=padded, ld_b=padded)
    yield "fp8 n=389 ldd=392", dict(n=389, ld_d=392)
    yield "fp8 n=389 ldd=400", dict(n=389, ld_d=400)
    yield "fp8 stride_a % 16 != 0", dict(stride_a=64 * 64 + 8)
    yield "fp8 offset_a 8", dict(offset_a=8)
    yield "fp8 scale offset 4", dict(scale_offset=4)
    yield "fp8 stride_d odd", dict(stride_d=64 * 64 + 3)
    yield "fp8 interleaved (ld = batch * k)", dict(ld_a=192, stride_a=64)
    yield "fp8 interleaved output", dict(ld_d=192, stride_d=64)
    yield "fp8 broadcast a", dict(stride_a=0)
    yield "fp8 broadcast b", dict(stride_b=0)
    for layout in ("NN", "NT"):
        yield f"fp8 {layout}", dict(layout=layout)
    for a, b in (("e4m3", "e5m2"), ("e5m2", "e4m3")):
        yield f"{a} x {b}", dict(a=a, b=b)
        yield f"{a} x {b} fp32", dict(a=a, b=b, d="fp32")
    yield "fp8 accumulate bf16", dict(accumulate=True)
    yield "fp8 accumulate fp32", dict(accumulate=True, d="fp32")
    yield "fp8 accumulate fp16", dict(accumulate=True, d="fp16")
    yield "fp8 batch 65535", dict(batch=65535, m=16, n=16, k=16)
    yield "fp8 batch 65537", dict(batch=65537, m=16, n=16, k=16)
    yield "bf16 batch 65537", dict(batch=65537, m=16, n=16, k=16, a="bf16", b="bf16")
    for d, amax in itertools.product(("e4m3", "e5m2"), (False, True)):
        yield f"fp8 out {d} amax={amax}", dict(d=d, amax=amax)
        yield f"e5m2 x e4m3 out {d} amax={amax}", dict(a="e5m2", d=d, amax=amax)
    yield "fp8 out e4m3 fast", dict(d="e4m3", amax=True, fast=True)
    yield "fp8 out n=24", dict(d="e4m3", amax=True, n=24)
    yield "fp8 out bias", dict(d="e4m3", amax=True, epilogue="bias")
    for a, d, bias in (
        ("e4m3", "bf16", "bf16"),
        ("e4m3", "fp32", "bf16"),
        ("e4m3", "fp32", "fp32"),
        ("e4m3", "fp16", "fp16"),
        ("bf16", "bf16", "bf16"),
        ("bf16", "fp32", "bf16"),
        ("bf16", "fp32", "fp32"),
        ("fp16", "fp16", "fp16"),
        ("fp32", "fp32", "fp32"),
    ):
        for epilogue in ("bias", "gelu", "gelu_bias"):
            for item in (False, True) if "bias" in epilogue else (False,):
                yield f"{a}->{d} {epilogue} bias={bias} per_item={item}", dict(
                    a=a, b=a, d=d, epilogue=epilogue, bias=bias, bias_per_item=item
                )
    yield "fp8 bias accumulate", dict(epilogue="bias", accumulate=True)
    for a, d in (("bf16", "fp32"), ("fp16", "fp32"), ("fp16", "bf16"), ("bf16", "fp16")):
        yield f"{a}->{d}", dict(a=a, b=a, d=d)
    for layout in ("TN", "NN", "NT"):
        for a in ("bf16", "fp32"):
            yield f"{a} {layout} odd sizes", dict(a=a, b=a, d=a, m=37, n=41, k=43, layout=layout)
    yield "fp8 fast", dict(fast=True)
    yield "host time fp8 128", dict(batch=2, m=128, n=128, k=128, repeat=200)
    yield "host time bf16 128", dict(batch=2, m=128, n=128, k=128, a="bf16", b="bf16", repeat=200)
    for size, batch in ((512, 512), (2048, 32), (4096, 8)):
        for fast in (False, True):
            yield f"fp8 {size} x{batch} fast={fast}", dict(
                batch=batch, m=size, n=size, k=size, fast=fast
            )


def main():
    """Runs all cases, prints a line for each and stores the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    records = {}
    for name, arguments in cases():
        records[name] = probe(**arguments)
        print(f"{name:45s} {records[name]}", flush=True)
    meta = {
        "gpu": torch.cuda.get_device_name(),
        "cublaslt": _C.loaded_version(),
        "torch": torch.__version__,
    }
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump({"meta": meta, "records": records}, file, indent=1)


if __name__ == "__main__":
    main()
