# SPDX-License-Identifier: Apache-2.0
"""The support table: every cell, every library rule, and the texts of its refusals.

Plain values in and out; needs neither torch nor a GPU.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from transformer_engine_batched import support
from transformer_engine_batched.errors import UnsupportedError
from transformer_engine_batched.support import CPU, Device

TURING = Device("Turing", (7, 5), 130100)
AMPERE = Device("Ampere", (8, 0), 130100)
ADA = Device("Ada", (8, 9), 130100)
HOPPER = Device("Hopper", (9, 0), 130100)
BLACKWELL = Device("Blackwell", (10, 0), 130100)
BLACKWELL_ULTRA = Device("Blackwell Ultra", (10, 3), 130100)
BLACKWELL_CONSUMER = Device("Blackwell 12.0", (12, 0), 130100)
GPUS = (TURING, AMPERE, ADA, HOPPER, BLACKWELL, BLACKWELL_ULTRA, BLACKWELL_CONSUMER)


def engine(fmt, device):
    return support.find_native_engine(fmt, device).engine


@pytest.mark.parametrize("fmt", ("fp32", "fp16", "bf16"))
def test_high_precision_runs_everywhere(fmt):
    assert engine(fmt, CPU) == "reference"
    assert {engine(fmt, device) for device in GPUS} == {"cublaslt"}


def test_float8_runs_from_ada_on():
    found = [engine("float8", device) for device in (CPU, *GPUS)]
    assert found == [None, None, None] + ["cublaslt"] * 5


def test_mxfp8_runs_on_datacenter_blackwell():
    found = [engine("mxfp8", device) for device in (CPU, *GPUS)]
    assert found == [None, None, None, None, None, "cublaslt", "cublaslt", None]


@pytest.mark.parametrize("emulate, force", [(False, False), (True, False), (True, True)])
def test_formats_without_engine_are_refused_everywhere(emulate, force):
    for device in (CPU, *GPUS):
        with pytest.raises(UnsupportedError, match="Quantize with Float8CurrentScalingQuantizer"):
            support.find_engine("nvfp4", device, emulate=emulate, force_reference=force)


def test_128_blocks_run_on_hopper_as_mxfp8_on_blackwell_and_decoded_elsewhere():
    for device in (CPU, *GPUS):
        native = {(9, 0): "blockwise", (10, 0): "mxfp8", (10, 3): "mxfp8"}.get(device.capability)
        for force in (False, True):
            found = support.find_engine("float8_block", device, emulate=True, force_reference=force)
            assert found == (native if native and not force else "decoded")
        if native:
            assert support.find_engine("float8_block", device, emulate=False) == native
            continue
        with pytest.raises(UnsupportedError, match="128-block scales is for.*Hopper.*emulate"):
            support.find_engine("float8_block", device, emulate=False)


def test_plain_128_block_products_run_on_hopper_and_the_cpu():
    for device in (CPU, *GPUS):
        forced = support.find_groupwise_engine(device, emulate=True, force_reference=True)
        assert forced == "reference"
        if device is CPU or device.capability == (9, 0):
            engine = "reference" if device is CPU else "blockwise"
            for emulate in (False, True):
                assert support.find_groupwise_engine(device, emulate=emulate) == engine
            continue
        assert support.find_groupwise_engine(device, emulate=True) == "reference"
        with pytest.raises(UnsupportedError, match="128-block scales.*Hopper.*emulate"):
            support.find_groupwise_engine(device, emulate=False)


@pytest.mark.parametrize(
    "fmt, device, expected",
    [
        ("float8", CPU, "reference"),
        ("float8", AMPERE, "reference"),
        ("float8", HOPPER, "cublaslt"),
        ("mxfp8", CPU, "reference"),
        ("mxfp8", HOPPER, "decoded"),
        ("mxfp8", BLACKWELL_CONSUMER, "decoded"),
        ("mxfp8", BLACKWELL, "cublaslt"),
        ("bf16", HOPPER, "cublaslt"),
    ],
)
def test_emulation_fills_only_the_gaps(fmt, device, expected):
    assert support.find_engine(fmt, device, emulate=True) == expected
    assert support.find_engine(fmt, device, emulate=True, force_reference=True) == "reference"


@pytest.mark.parametrize(
    "fmt, device, reason",
    [
        ("float8", CPU, r"on CPU: FP8 tensor cores need a CUDA device"),
        ("float8", AMPERE, r"on Ampere: FP8 tensor cores need compute capability 8\.9"),
        ("mxfp8", HOPPER, r"on Hopper: MXFP8 tensor cores need compute capability 10\.0"),
        ("mxfp8", BLACKWELL_CONSUMER, r"12\.0: TE has no MXFP8"),
    ],
)
def test_refusals_say_what_was_asked_the_device_and_the_way_out(fmt, device, reason):
    with pytest.raises(UnsupportedError, match=reason) as caught:
        support.find_engine(fmt, device, emulate=False)
    assert support.FORMAT_TITLES[fmt] in str(caught.value)
    assert "transformer_engine_batched.emulate()" in str(caught.value)


def test_te_mxfp8_kernel_is_never_called_below_blackwell():
    # It returns uninitialised memory there (see the docstring of find_native_quantizer).
    for device in (CPU, TURING, AMPERE, ADA, HOPPER):
        assert support.find_native_quantizer("mxfp8", device).engine is None
    assert support.find_native_quantizer("mxfp8", BLACKWELL).engine == "te"


def test_te_float8_kernel_runs_from_ada_on():
    found = [support.find_native_quantizer("float8", device).engine for device in (CPU, *GPUS)]
    assert found == [None, None, None] + ["te"] * 5
    assert support.find_native_quantizer("nvfp4", HOPPER).engine is None


def test_te_block_kernel_is_called_on_hopper_only():
    found = [
        device.name
        for device in (CPU, *GPUS)
        if support.find_native_quantizer("float8_block", device).engine == "te"
    ]
    assert found == ["Hopper"]


def test_only_datacenter_blackwell_takes_strided_fp8():
    found = {device.name for device in GPUS if support.supports_non_tn("float8", device)}
    assert found == {"Blackwell", "Blackwell Ultra"}
    assert not support.supports_non_tn("float8", CPU)
    assert all(support.supports_non_tn("bf16", device) for device in (CPU, *GPUS))


def test_required_alignment():
    assert support.required_alignment("bf16") == support.Alignment(1, 1, 1)
    assert support.required_alignment("float8") == support.Alignment(16, 16, 16)
    assert support.required_alignment("mxfp8") == support.Alignment(32, 16, 16)


@pytest.mark.parametrize(
    "version, has_limit",
    [
        (0, False),
        (120602, False),
        (120603, True),
        (120804, True),
        (120805, False),
        (120902, False),
        (130100, True),
        (130101, False),
        (130200, False),
        (140000, False),
    ],
)
def test_leading_dimension_limit_holds_for_the_faulty_versions(version, has_limit):
    assert support.max_leading_dimension_bytes(version) == (2**31 - 1 if has_limit else None)


@pytest.mark.parametrize(
    "version, expected",
    [(0, 4), (120899, 4), (120900, 16), (130100, 16), (130200, 16), (130201, 4), (130300, 4)],
)
def test_scale_address_alignment(version, expected):
    assert support.scalar_scale_alignment(version) == expected


def test_e5m2_pairs():
    for pair in (("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3")):
        support.check_fp8_pair(*pair, "A", "B")
    with pytest.raises(
        UnsupportedError, match="operands A and B are both E5M2.*one of them to E4M3"
    ):
        support.check_fp8_pair("e5m2", "e5m2", "A", "B")


@pytest.mark.parametrize(
    "fmt, left, expected",
    [
        ("fp32", "fp32", {"fp32"}),
        ("fp16", "fp16", {"fp16", "fp32"}),
        ("bf16", "bf16", {"bf16", "fp32"}),
        ("float8", "e4m3", {"fp32", "fp16", "bf16"}),
        ("mxfp8", "e5m2", {"fp32", "fp16", "bf16"}),
    ],
)
def test_native_output_dtypes(fmt, left, expected):
    assert set(support.native_output_dtypes(fmt, left)) == expected


@pytest.mark.parametrize(
    "fmt, out, expected",
    [
        ("bf16", "bf16", "bf16"),
        ("bf16", "fp32", "fp32"),
        ("float8", "fp16", "fp16"),
        ("float8", "bf16", "bf16"),
        ("float8", "fp32", "bf16"),
        ("float8", "e4m3", "bf16"),
    ],
)
def test_fused_bias_dtype(fmt, out, expected):
    assert support.fused_bias_dtype(fmt, out) == expected


@pytest.mark.parametrize(
    "fmt, left, right, out, batch, expected",
    [
        ("float8", "e4m3", "e4m3", "e4m3", 8, True),
        ("float8", "e4m3", "e4m3", "e5m2", 8, False),
        ("float8", "e4m3", "e5m2", "e5m2", 8, True),
        ("float8", "e5m2", "e4m3", "e4m3", 8, True),
        ("float8", "e4m3", "e4m3", "e4m3", 65535, True),
        ("float8", "e4m3", "e4m3", "e4m3", 65536, False),
        ("mxfp8", "e4m3", "e4m3", "e4m3", 8, False),
        ("bf16", "bf16", "bf16", "e4m3", 8, False),
    ],
)
def test_fp8_output(fmt, left, right, out, batch, expected):
    assert support.supports_fp8_output(fmt, left, right, out, batch) is expected


def test_describe_support_agrees_with_the_engine():
    for device in (CPU, *GPUS):
        for fmt in support.FORMATS:
            text, remark = support.describe_support(fmt, device)
            native = support.find_native_engine(fmt, device)
            if native.engine is not None:
                assert (text, remark) == (native.engine, "")
                continue
            assert remark == native.reason
            try:
                support.find_engine(fmt, device, emulate=True)
                assert text == "emulate() only"
            except UnsupportedError:
                assert text == "-"


def test_format_table_has_a_row_for_each_format():
    lines = support.format_table().splitlines()
    assert len(lines) == 2 + len(support.FORMATS)
    assert len({line.count("|") for line in lines}) == 1
    assert "| emulate() only | emulate() only | emulate() only | cublaslt |" in lines[-3]


def test_support_imports_no_torch():
    source = Path(support.__file__).read_text(encoding="utf-8")
    imported = [
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [x.name for x in node.names]
        )
    ]
    assert set(imported) == {"__future__", "dataclasses", "typing", "errors"}
