# SPDX-License-Identifier: Apache-2.0
"""Products of known signatures against those that describe everything anew: the same bits, state and memory.

On the CPU the fused kernels run in Triton's interpreter, in a process of their own; products are the reference's.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
import transformer_engine.pytorch as te
import transformer_engine_torch as tex
from interpreted import IS_INTERPRETED, give_device_arithmetic, run_interpreted
from torch.utils.checkpoint import checkpoint
from training import SavedTensors, quantized
from transformer_engine.common.recipe import Float8CurrentScaling
from transformer_engine.pytorch import Float8CurrentScalingQuantizer
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from warm_steps import CASES, RECIPES, compare_steps

import transformer_engine_batched as teb
from transformer_engine_batched import (
    autograd,
    compiled_product,
    quantized_operand,
    warm_product,
)
from transformer_engine_batched.te_interop.quantizers import has_amax_reduction
from transformer_engine_batched.te_interop.recipes import make_stateless_quantizers


def test_interpreted():
    run_interpreted(__file__)


def memory_at(dtype, address):
    """A tensor for the interpreter, which knows no addresses."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)


@pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1")
class TestInterpreted:
    """With the interpreter in place of the device."""

    @pytest.fixture(autouse=True)
    def on_cpu(self, monkeypatch):
        give_device_arithmetic(monkeypatch)
        monkeypatch.setattr(quantized_operand, "_find_kernels", lambda fmt, device: (True, True))
        monkeypatch.setattr(warm_product, "Address", memory_at)
        monkeypatch.setattr(autograd, "_warm_products", {})
        monkeypatch.setattr(quantized_operand, "_prepared", {})
        FP8GlobalStateManager.reset()
        with teb.emulate():
            yield
        FP8GlobalStateManager.reset()

    @pytest.mark.parametrize("recipe", ("delayed", "current"))
    @pytest.mark.parametrize("case", CASES)
    def test_the_same_bits(self, monkeypatch, case, recipe):
        product = compare_steps(monkeypatch, CASES[case], recipe)
        # One signature of gradients was met, and either they are a cast and two products, or sums over items.
        is_sum = case in ("b has no batch", "each repeats the other")
        assert [x is None for x in product.gradients.values()] == [is_sum]

    def test_gradients_in_e4m3(self, monkeypatch):
        compare_steps(monkeypatch, CASES["plain"], "e4m3")

    @pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("fp32", "fp16"))
    @pytest.mark.parametrize("recipe", ("delayed", "current"))
    def test_other_inputs(self, monkeypatch, recipe, dtype):
        compare_steps(monkeypatch, CASES["ragged"], recipe, dtype)

    @pytest.mark.parametrize("needs", ((True, False), (False, True), (False, False)))
    def test_some_gradients(self, monkeypatch, needs):
        product = compare_steps(monkeypatch, CASES["plain"], "current", needs=needs)
        assert (product.saved.b is not None, product.saved.a is not None) == needs

    def test_large_operands_are_cast_one_by_one(self, monkeypatch):
        from transformer_engine_batched.kernels import cast_pair

        assert compare_steps(monkeypatch, CASES["plain"], "delayed")._pair is not None
        monkeypatch.setattr(cast_pair, "MAX_ELEMENTS", 100)
        for recipe in ("delayed", "current"):
            product = compare_steps(monkeypatch, CASES["plain"], recipe)
            assert product._pair is None and product._search is None

    def test_one_tensor_is_saved_of_the_codes_alone(self):
        a = torch.randn(2, 64, 64, requires_grad=True)
        b = torch.randn(2, 64, 64, requires_grad=True)
        module = te.BatchedMatmul()
        for _ in range(2):
            with SavedTensors() as saved, quantized(Float8CurrentScaling()):
                module(a, b)
            assert len(saved.tensors) == 1
            assert saved.num_bytes <= 2 * a.numel() + 4 * warm_product.ALIGNMENT

    @pytest.mark.parametrize("use_reentrant", (False, True))
    def test_a_recomputed_forward_saves_the_same(self, use_reentrant):
        """The first forward finds the product, and the second one, in the checkpoint, knows it."""
        a, b = (torch.randn(2, 32, 32, requires_grad=True) for _ in "ab")
        module = te.BatchedMatmul()
        with quantized(Float8CurrentScaling()):
            y = checkpoint(module, a, b, use_reentrant=use_reentrant)
            found = torch.autograd.grad(y.sum(), (a, b)) if not use_reentrant else None
            if use_reentrant:
                y.sum().backward()
                found = a.grad, b.grad
            expected = torch.autograd.grad(module(a, b).sum(), (a, b))
        assert all(torch.equal(x, y) for x, y in zip(found, expected))

    def test_what_a_compiled_graph_saves_is_apart(self):
        a, b = torch.randn(2, 32, 48), torch.randn(2, 48, 16)
        quantizers = make_stateless_quantizers(Float8CurrentScaling(), a.device)
        arguments = (a, b, torch.float32, autograd.Quantization(*quantizers), True, True)
        (memory,) = autograd.multiply(*arguments).tensors
        for _ in range(2):
            forward = autograd.multiply(*arguments, is_apart=True)
            a_codes, a_scale, b_codes, b_scale = forward.tensors
            assert (a_codes.shape, b_codes.shape) == ((2, 48, 32), (2, 48, 16))
            assert a_scale.shape == b_scale.shape == (1,) and a_scale.dtype is torch.float32
            assert len({x.untyped_storage().data_ptr() for x in forward.tensors}) == 4
        together = [x[2].codes for x in autograd.multiply(*arguments).saved.attach((memory,))]
        assert torch.equal(together[0].data, a_codes) and torch.equal(together[1].data, b_codes)
        assert torch.equal(together[0].scale_inv, a_scale)

    @pytest.mark.parametrize("needs", ((True, True), (True, False), (False, True)))
    def test_the_operator_of_compiled_graphs(self, needs):
        """`torch.compile`'s operator saves tensors of the layout that its graphs are told."""
        a, b = torch.randn(2, 32, 48), torch.randn(2, 48, 16)
        leaves = [x.requires_grad_() for x, needed in zip((a, b), needs) if needed]
        module, recipe = te.BatchedMatmul(), Float8CurrentScaling()
        graph = torch.compile(
            lambda: compiled_product.differentiable_matmul(a, b, torch.float32, recipe),
            backend="aot_eager",
            fullgraph=True,
        )
        with quantized(recipe):
            expected = torch.autograd.grad(module(a, b).sum(), leaves)
            for function in (graph, graph, graph.__wrapped__):
                found = torch.autograd.grad(function().sum(), leaves)
                assert all(torch.equal(x, y) for x, y in zip(found, expected))

    def test_operands_that_do_not_fit_are_refused_as_ever(self):
        module = te.BatchedMatmul()
        for _ in range(2):
            with quantized(Float8CurrentScaling()):
                with pytest.raises(
                    ValueError, match="contracted sizes differ, 20 of a and 24 of b"
                ):
                    module(torch.randn(2, 16, 20), torch.randn(2, 24, 16))
                with pytest.raises(ValueError, match="batch"):
                    module(torch.randn(2, 16, 16), torch.randn(3, 16, 16))

    def test_what_hooks_have_moved_is_read_where_it_lies(self):
        a = torch.randn(2, 32, 32, requires_grad=True)
        b = torch.randn(2, 32, 32, requires_grad=True)
        module, grads = te.BatchedMatmul(), []

        def move(x):
            moved = torch.empty(x.numel() + 3, dtype=x.dtype)[3:]
            return moved.copy_(x)

        for unpack in (lambda x: x, lambda x: x, lambda x: x, move):
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack)
            with hooks, quantized(Float8CurrentScaling()):
                y = module(a, b)
            grads.append(torch.autograd.grad(y.sum(), (a, b)))
        for found in grads[1:]:
            assert all(torch.equal(x, y) for x, y in zip(grads[0], found))

    def test_state_that_no_kernel_takes_is_refused_before_anything_is_written(self):
        a, b = torch.randn(2, 32, 32), torch.randn(2, 32, 32)
        module = te.BatchedMatmul()
        for _ in range(2):
            with quantized(RECIPES["delayed"]()), torch.no_grad():
                module(a, b)
        (product,) = [x for x, _ in autograd._warm_products.values()]
        good, bad = module.quantizers["scaling_fwd"][:2]
        before = good.amax.clone()
        bad.scale = bad.scale.double()
        with pytest.raises(ValueError, match="`scale` must be one float32"):
            product(1000 * a, b, good, bad)
        assert torch.equal(good.amax, before)

    def test_shared_amaxes_are_not_kept(self):
        quantizer = Float8CurrentScalingQuantizer(tex.DType.kFloat8E4M3, device=torch.device("cpu"))
        assert not has_amax_reduction(quantizer)
        quantizer.with_amax_reduction = True
        assert has_amax_reduction(quantizer)
        a, b = torch.randn(2, 16, 16), torch.randn(2, 16, 16)
        quantization = autograd.Quantization(quantizer, quantizer, quantizer)
        arguments = (a, b, torch.float32, quantization, (True, True), False)
        assert autograd._find_product(0, *arguments) is None
        quantizer.with_amax_reduction = False
        assert autograd._find_product(0, *arguments) is not None


def test_modules_with_a_product_in_use_are_copied():
    """Nothing of a product is in the module's own state."""
    module = te.BatchedMatmul()
    with teb.emulate(), te.autocast(enabled=True, recipe=Float8CurrentScaling()):
        module(torch.randn(2, 16, 16), torch.randn(2, 16, 16))
    assert not any(isinstance(x, warm_product.WarmProduct) for x in vars(module).values())
