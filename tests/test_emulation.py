# SPDX-License-Identifier: Apache-2.0
"""`emulate()`: where the switch holds, what it changes, what it leaves alone. Needs no GPU."""

from __future__ import annotations

import asyncio
import doctest
import threading

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import QUANTIZED, assert_accurate, make_quantizer, make_sides

import transformer_engine_batched as teb
from transformer_engine_batched import emulation, gemm, quantize
from transformer_engine_batched.emulation import current_emulation
from transformer_engine_batched.reference import quantizers
from transformer_engine_batched.support import Device


def state():
    current = current_emulation()
    return current.enabled, current.force_reference


def test_switch_nests_and_is_restored():
    assert state() == (False, False)
    with teb.emulate():
        assert state() == (True, False)
        with teb.emulate(engine="reference"):
            assert state() == (True, True)
            with teb.emulate():
                assert state() == (True, False)
            assert state() == (True, True)
        assert state() == (True, False)
    assert state() == (False, False)


def test_switch_is_restored_after_an_error():
    with pytest.raises(KeyError):
        with teb.emulate():
            raise KeyError
    assert state() == (False, False)


@pytest.mark.parametrize("engine", ("cublaslt", "", "Reference", 1, True))
def test_unknown_engine(engine):
    with pytest.raises(ValueError, match='emulate.engine=.*expected None or "reference"'):
        with teb.emulate(engine):
            pass
    assert state() == (False, False)


def test_switch_is_that_of_its_thread():
    seen = []
    with teb.emulate():
        thread = threading.Thread(target=lambda: seen.append(state()))
        thread.start()
        thread.join()
    assert seen == [(False, False)]


def test_switch_is_that_of_its_task():
    async def inside(entered, left):
        with teb.emulate():
            entered.set()
            await left.wait()
            return state()

    async def outside(entered, left):
        await entered.wait()
        found = state()
        left.set()
        return found

    async def both():
        entered, left = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(inside(entered, left), outside(entered, left))

    assert asyncio.run(both()) == [(True, False), (False, False)]


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_a_launch_made_inside_is_not_used_outside(recipe, fresh_launches):
    with teb.emulate():
        sides = make_sides(recipe, "TN", m=32, n=32, k=32)
        teb.batched_general_gemm(sides.a.tensor, sides.b.tensor)
    with pytest.raises(teb.UnsupportedError, match="emulate"):
        teb.batched_general_gemm(sides.a.tensor, sides.b.tensor)


@pytest.mark.parametrize("recipe", ("bf16", *QUANTIZED))
def test_both_engines_of_a_cpu_give_the_same_bits(recipe):
    with teb.emulate():
        sides = make_sides(recipe, "NT", m=32, n=64, k=96)
        default = teb.batched_general_gemm(sides.a.tensor, sides.b.tensor, layout="NT")
    with teb.emulate("reference"):
        forced = teb.batched_general_gemm(sides.a.tensor, sides.b.tensor, layout="NT")
    assert torch.equal(default, forced)
    assert_accurate(default, sides.expected)


@pytest.mark.parametrize("recipe", ("fp32", "fp16", "bf16"))
def test_high_precision_needs_no_switch(recipe):
    sides = make_sides(recipe, "NN", m=5, n=6, k=7)
    assert_accurate(
        teb.batched_general_gemm(sides.a.tensor, sides.b.tensor, layout="NN"), sides.expected
    )


@pytest.mark.parametrize("recipe", QUANTIZED)
@pytest.mark.parametrize("internal", (False, True))
def test_quantize_makes_tes_own_classes(recipe, internal):
    x = torch.randn(2, 32, 64, dtype=torch.float16, requires_grad=True)
    with teb.emulate():
        out = teb.quantize(x, make_quantizer(recipe, internal=internal))
    kind = te.MXFP8Tensor if recipe == "mxfp8" else te.Float8Tensor
    storage = te.MXFP8TensorStorage if recipe == "mxfp8" else te.Float8TensorStorage
    assert type(out) is (storage if internal else kind)
    assert tuple(out.size()) == (2, 32, 64) and out._dtype == torch.float16
    assert internal or not out.requires_grad


def test_quantize_of_a_view_is_that_of_its_values():
    x = torch.randn(4, 64, 32)
    views = x.mT, x[:, ::2], x.transpose(0, 1)
    with teb.emulate():
        for view in views:
            for recipe in QUANTIZED:
                one = teb.quantize(view, make_quantizer(recipe))
                two = teb.quantize(view.contiguous(), make_quantizer(recipe))
                for left, right in zip(one.get_data_tensors(), two.get_data_tensors()):
                    assert torch.equal(left, right)


class FakeQuantizer(te.Float8CurrentScalingQuantizer):
    """Says when TE's own kernel is called."""

    calls = 0

    def __call__(self, x):
        FakeQuantizer.calls += 1
        return "from TE"


@pytest.mark.parametrize(
    "capability, engine, expected",
    [
        ((9, 0), None, "from TE"),
        ((9, 0), "off", "from TE"),
        ((9, 0), "reference", "from the reference"),
        ((8, 0), None, "from the reference"),
        ((8, 0), "off", teb.UnsupportedError),
    ],
)
def test_who_quantizes_on_a_gpu(monkeypatch, capability, engine, expected):
    monkeypatch.setattr(
        quantize_module(), "describe_device", lambda _: Device("GPU", capability, 130100)
    )
    monkeypatch.setattr(quantizers, "quantize", lambda x, quantizer: "from the reference")
    quantizer = FakeQuantizer(te.DType.kFloat8E4M3, device=torch.device("cpu"))

    def run():
        return teb.quantize(torch.randn(2, 16, 16), quantizer)

    if expected is teb.UnsupportedError:
        with pytest.raises(teb.UnsupportedError, match="on GPU: TE quantizes to FP8 on .* 8.9"):
            run()
    elif engine == "off":
        assert run() == expected
    else:
        with teb.emulate(engine):
            assert run() == expected


@pytest.mark.parametrize("emulated", (False, True))
def test_tes_mxfp8_kernel_is_not_called_on_hopper(monkeypatch, emulated):
    class Fake(te.MXFP8Quantizer):
        def __call__(self, x):
            raise AssertionError("TE's kernel was called")

    monkeypatch.setattr(
        quantize_module(), "describe_device", lambda _: Device("GPU", (9, 0), 130100)
    )
    quantizer = Fake(te.DType.kFloat8E4M3)
    if emulated:
        with teb.emulate():
            assert isinstance(teb.quantize(torch.randn(2, 32, 32), quantizer), te.MXFP8Tensor)
    else:
        with pytest.raises(teb.UnsupportedError, match="MXFP8 on compute capability 10.0"):
            teb.quantize(torch.randn(2, 32, 32), quantizer)


def quantize_module():
    """`teb.quantize` is the function; this is the module of that name."""
    import sys

    return sys.modules["transformer_engine_batched.quantize"]


@pytest.mark.parametrize(
    "module", (gemm, emulation, quantize_module()), ids=lambda module: module.__name__
)
def test_examples_of_docstrings_run(module):
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0
    assert quantize is teb.quantize or quantize.__name__.endswith("quantize")
