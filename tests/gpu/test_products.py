# SPDX-License-Identifier: Apache-2.0
"""Values of batched products on the GPU, per batch item, against FP64 of the dequantised operands."""

from __future__ import annotations

import pytest
import torch
from accuracy import sqnr_per_item
from products import (
    FP8,
    dequantize,
    make_quantizer,
    multiply,
    operand_shapes,
    random_operands,
)
from transformer_engine.pytorch import MXFP8Quantizer

import transformer_engine_batched as teb
from transformer_engine_batched.errors import UnsupportedError

# dB against FP64 of the dequantised operands, worst batch item. Rounding alone caps BF16 at 55.6 and FP16 at
# 73.7 dB. Hopper keeps about 14 bits inside a tensor-core accumulation (DeepSeek-V3, section 3.3.2), which
# split accumulation promotes to FP32 now and then: measured 80 to 86 dB for FP32 output.
GATES = {torch.bfloat16: 52.0, torch.float16: 68.0, torch.float32: 76.0}
# Fast accumulation: measured 53.4 dB for BF16 output at K = 4096.
FAST_GATE = 50.0
PLAIN_GATES = {torch.bfloat16: 54.0, torch.float16: 72.0, torch.float32: 120.0}

LAYOUTS = ("TN", "NN", "NT")


def check(out, expected, gate):
    """Every item at or above the gate, and nothing left unwritten."""
    assert out.shape == expected.shape
    assert not out.isnan().any()
    assert sqnr_per_item(out, expected).min() >= gate


@pytest.mark.parametrize("out_dtype", GATES)
@pytest.mark.parametrize("kind", ("current", "delayed"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float8(layout, kind, out_dtype):
    a, b = random_operands(layout, 5, 96, 160, 224)
    a, b = make_quantizer(kind)(a), make_quantizer(kind)(b)
    expected = multiply(dequantize(a), dequantize(b), layout)
    for split, gate in ((True, GATES[out_dtype]), (False, min(FAST_GATE, GATES[out_dtype]))):
        out = teb.batched_general_gemm(
            a, b, layout=layout, out_dtype=out_dtype, use_split_accumulator=split
        )
        assert out.dtype == out_dtype
        check(out, expected, gate)


@pytest.mark.parametrize("dtypes", (("e4m3", "e5m2"), ("e5m2", "e4m3")))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_fp8(layout, dtypes):
    a, b = random_operands(layout, 3, 64, 96, 128)
    a, b = make_quantizer("current", dtypes[0])(a), make_quantizer("current", dtypes[1])(b)
    expected = multiply(dequantize(a), dequantize(b), layout)
    out = teb.batched_general_gemm(
        a, b, layout=layout, out_dtype=torch.bfloat16, use_split_accumulator=True
    )
    check(out, expected, GATES[torch.bfloat16])


def test_e5m2_pair_is_refused():
    a, b = random_operands("TN", 2, 32, 32, 32)
    a, b = make_quantizer("current", "e5m2")(a), make_quantizer("current", "e5m2")(b)
    with pytest.raises(UnsupportedError, match="both E5M2"):
        teb.batched_general_gemm(a, b)


@pytest.mark.parametrize("dtype", PLAIN_GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain(layout, dtype):
    a, b = random_operands(layout, 5, 37, 41, 43, dtype)
    expected = multiply(a, b, layout)
    check(teb.batched_general_gemm(a, b, layout=layout), expected, PLAIN_GATES[dtype])
    for out_dtype in PLAIN_GATES:
        out = teb.batched_general_gemm(a, b, layout=layout, out_dtype=out_dtype)
        check(out, expected, min(PLAIN_GATES[dtype], PLAIN_GATES[out_dtype]) - 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "sizes", ((1, 1, 1), (7, 5, 3), (17, 33, 389), (389, 389, 389), (712, 24, 40))
)
def test_ragged_float8(layout, sizes):
    m, n, k = sizes
    a, b = random_operands(layout, 3, m, n, k)
    a, b = make_quantizer("current")(a), make_quantizer("current")(b)
    expected = multiply(dequantize(a), dequantize(b), layout)
    for out_dtype, gate in GATES.items():
        out = teb.batched_general_gemm(
            a, b, layout=layout, out_dtype=out_dtype, use_split_accumulator=True
        )
        assert out.is_contiguous()
        # One product of a few terms has no averaging: its rounding error may be the worst case.
        check(out, expected, gate if min(sizes) > 4 else gate - 8)


@pytest.mark.parametrize(
    "batches", (((), (3,)), ((3,), ()), ((2, 1), (1, 3)), ((4, 1, 2), (3, 1)), ((1,), (5,)))
)
@pytest.mark.parametrize("kind", ("plain", "current"))
def test_broadcast(batches, kind):
    sizes = operand_shapes("TN", 48, 64, 80)
    a, b = (
        torch.randn(*batch, *size, device="cuda").bfloat16() for batch, size in zip(batches, sizes)
    )
    expected = multiply(a, b, "TN")
    if kind == "current":
        a, b = make_quantizer(kind)(a), make_quantizer(kind)(b)
        expected = multiply(dequantize(a), dequantize(b), "TN")
    out = teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16, use_split_accumulator=True)
    check(out, expected, GATES[torch.bfloat16])


@pytest.mark.parametrize("per_item", (False, True))
@pytest.mark.parametrize("bias_dtype", PLAIN_GATES)
@pytest.mark.parametrize("out_dtype", GATES)
@pytest.mark.parametrize("gelu", (False, True))
@pytest.mark.parametrize("kind", ("plain", "current"))
def test_epilogue(kind, gelu, out_dtype, bias_dtype, per_item):
    a, b = random_operands("TN", 3, 32, 40, 64)
    expected = multiply(a, b, "TN")
    if kind == "current":
        a, b = make_quantizer(kind)(a), make_quantizer(kind)(b)
        expected = multiply(dequantize(a), dequantize(b), "TN")
    bias = torch.randn(*((3,) if per_item else ()), 40, device="cuda", dtype=bias_dtype)
    expected = expected + (bias.double()[:, None] if per_item else bias.double())
    if gelu:
        expected = torch.nn.functional.gelu(expected, approximate="tanh")
    out = teb.batched_general_gemm(
        a, b, out_dtype=out_dtype, bias=bias, gelu=gelu, use_split_accumulator=True
    )
    # Where the library does not fuse, the product is rounded once more before the bias: half a bit.
    check(out, expected, GATES[out_dtype] - 3)


@pytest.mark.parametrize("kind", ("plain", "current"))
@pytest.mark.parametrize("n", (64, 37))
def test_accumulate(kind, n):
    a, b = random_operands("TN", 4, 48, n, 64)
    expected = multiply(a, b, "TN")
    if kind == "current":
        a, b = make_quantizer(kind)(a), make_quantizer(kind)(b)
        expected = multiply(dequantize(a), dequantize(b), "TN")
    start = torch.randn(4, 48, n, device="cuda")
    out = start.clone()
    result = teb.batched_general_gemm(
        a, b, out=out, accumulate=True, alpha=0.5, beta=-2.0, use_split_accumulator=True
    )
    assert result is out
    check(out, 0.5 * expected - 2.0 * start.double(), GATES[torch.float32])


@pytest.mark.parametrize("kind", ("plain", "current"))
def test_out_views(kind):
    a, b = random_operands("TN", 4, 32, 48, 64)
    expected = multiply(a, b, "TN")
    if kind == "current":
        a, b = make_quantizer(kind)(a), make_quantizer(kind)(b)
        expected = multiply(dequantize(a), dequantize(b), "TN")
    whole = torch.full((32, 4, 64), float("nan"), device="cuda", dtype=torch.bfloat16)
    for view in (
        whole.transpose(0, 1)[..., :48],  # interleaved batch, padded rows
        whole.transpose(0, 1)[..., 3:51],  # misaligned for FP8: through a packed copy
        torch.full((4, 48, 32), float("nan"), device="cuda", dtype=torch.bfloat16).mT,
    ):
        whole.fill_(float("nan"))
        out = teb.batched_general_gemm(a, b, out=view, use_split_accumulator=True)
        assert out is view
        check(view, expected, GATES[torch.bfloat16])
        if view._base is whole:  # nothing outside the view was touched
            assert whole.isnan().sum() == whole.numel() - view.numel()


@pytest.mark.parametrize("fused_format", ("e4m3", "e5m2"))
def test_fp8_output(fused_format):
    a, b = random_operands("TN", 4, 64, 96, 128)
    a, b = make_quantizer("current")(a), make_quantizer("current", fused_format)(b)
    expected = multiply(dequantize(a), dequantize(b), "TN")
    for n_note, quantizer in (
        ("delayed", make_quantizer("delayed", fused_format, scale=0.75)),
        ("current", make_quantizer("current", fused_format)),
    ):
        out = teb.batched_general_gemm(
            a,
            b,
            quantization_params=quantizer,
            out_dtype=torch.bfloat16,
            use_split_accumulator=True,
        )
        assert type(out).__name__ == "Float8Tensor" and out.dtype == torch.bfloat16, n_note
        # One rounding to E4M3 is worth 31.5 dB on normal data, to E5M2 25.5 dB.
        check(dequantize(out), expected, 31.0 if fused_format == "e4m3" else 25.0)
        assert torch.equal(out._transpose, out._data.movedim(-1, 0).contiguous())
        if n_note == "delayed":
            ratio = quantizer.amax.double() / expected.abs().max()
            assert abs(ratio.item() - 1) < 2e-3


def test_fp8_output_amax_at_an_odd_address():
    a, b = random_operands("TN", 2, 32, 32, 32)
    a, b = make_quantizer("current")(a), make_quantizer("current")(b)
    expected = multiply(dequantize(a), dequantize(b), "TN")
    history, scales = torch.zeros(8, device="cuda"), torch.full((8,), 0.5, device="cuda")
    quantizer = make_quantizer("delayed")
    quantizer.scale, quantizer.amax = scales[3:4], history[5:6]
    out = teb.batched_general_gemm(a, b, quantization_params=quantizer, use_split_accumulator=True)
    assert abs(history[5].item() / expected.abs().max().item() - 1) < 2e-3
    assert history.count_nonzero() == 1
    check(dequantize(out), expected, 31.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scalar_scales_at_odd_addresses(layout):
    a, b = random_operands(layout, 2, 32, 32, 32)
    a, b = make_quantizer("current")(a), make_quantizer("current")(b)
    expected = multiply(dequantize(a), dequantize(b), layout)
    for x, index in ((a, 1), (b, 3)):
        shared = torch.full((4,), 7.0, device="cuda")
        shared[index] = x._scale_inv[0]
        x._scale_inv = shared[index : index + 1]
    out = teb.batched_general_gemm(
        a, b, layout=layout, out_dtype=torch.float32, use_split_accumulator=True
    )
    check(out, expected, GATES[torch.float32])


@pytest.mark.parametrize("swizzled", (False, True))
@pytest.mark.parametrize("engine", (None, "reference"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_emulated_mxfp8(layout, engine, swizzled):
    a, b = random_operands(layout, 3, 96, 160, 224)
    quantizer = MXFP8Quantizer(FP8["e4m3"])
    quantizer.optimize_for_gemm = swizzled
    with teb.emulate(engine=engine):
        out = teb.batched_general_gemm(
            teb.quantize(a, quantizer), teb.quantize(b, quantizer), layout=layout
        )
    # End to end, so E4M3's own error: 28.5 dB on normal data.
    check(out, multiply(a, b, layout), 27.0)


def test_mxfp8_without_emulation_names_the_way_out():
    x = torch.randn(2, 64, 64, device="cuda")
    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("this device has MXFP8")
    with pytest.raises(UnsupportedError, match="emulate"):
        teb.quantize(x, MXFP8Quantizer(FP8["e4m3"]))


def test_reference_engine_agrees_with_cublaslt():
    a, b = random_operands("TN", 3, 48, 64, 96)
    a, b = make_quantizer("current")(a), make_quantizer("current")(b)
    out = teb.batched_general_gemm(a, b, out_dtype=torch.float32, use_split_accumulator=True)
    with teb.emulate(engine="reference"):
        reference = teb.batched_general_gemm(a, b, out_dtype=torch.float32)
    check(reference, multiply(dequantize(a), dequantize(b), "TN"), 140.0)
    check(out, reference.double(), GATES[torch.float32])


def test_a_nan_stays_in_its_item():
    a, b = random_operands("TN", 4, 32, 32, 32)
    b[2, 5, 7] = float("nan")
    a, b = make_quantizer("delayed")(a), make_quantizer("delayed")(b)
    out = teb.batched_general_gemm(a, b, out_dtype=torch.bfloat16)
    assert out[2, 5].isnan().all() and out.isnan().sum() == 32


@pytest.mark.parametrize("b_view", ("transposed", "sliced", "interleaved", "channel"))
def test_bmm_reads_views(b_view):
    a = torch.randn(4, 24, 40, device="cuda").bfloat16()
    b = {
        "transposed": lambda: torch.randn(4, 56, 40, device="cuda").bfloat16().mT,
        "sliced": lambda: torch.randn(4, 64, 100, device="cuda").bfloat16()[:, 3:43, 9:65],
        "interleaved": lambda: torch.randn(40, 4, 56, device="cuda").bfloat16().transpose(0, 1),
        "channel": lambda: torch.randn(40, 56, 4, device="cuda").bfloat16().permute(2, 0, 1),
    }[b_view]()
    check(teb.bmm(a, b), a.double() @ b.double(), PLAIN_GATES[torch.bfloat16])


def test_bmm_under_autocast():
    a, b = torch.randn(3, 32, 40, device="cuda"), torch.randn(3, 40, 48, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = teb.bmm(a, b)
    assert out.dtype == torch.bfloat16
    check(out, a.bfloat16().double() @ b.bfloat16().double(), PLAIN_GATES[torch.bfloat16])
