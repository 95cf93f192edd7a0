# SPDX-License-Identifier: Apache-2.0
"""`te.BatchedMatmul` and `teb.bmm` under torch.compile: one graph, the bits of the eager product."""

from __future__ import annotations

import pytest
import torch
import transformer_engine.pytorch as te
from torch._dynamo.testing import CompileCounterWithBackend
from transformer_engine.common.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
)
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

import transformer_engine_batched as teb

pytestmark = pytest.mark.usefixtures("emulated", "fresh_graphs")

RECIPES = {
    "plain": None,
    "current": Float8CurrentScaling(),
    "mxfp8": MXFP8BlockScaling(),
    "block": Float8BlockScaling(),
}
# Operands as they are stored, and what the product makes of them.
CASES = {
    "as_stored": ((3, 24, 40), (3, 40, 56), lambda a, b: (a, b)),
    "transposed": ((3, 40, 24), (3, 56, 40), lambda a, b: (a.mT, b.mT)),
    "broadcast": ((3, 24, 40), (40, 56), lambda a, b: (a, b)),
    "repeated": ((24, 40), (2, 40, 56), lambda a, b: (a.expand(2, 24, 40), b)),
    "ragged": ((2, 5, 17, 33), (5, 33, 7), lambda a, b: (a, b)),
    "vector": ((40,), (3, 40, 56), lambda a, b: (a, b)),
}


@pytest.fixture
def fresh_graphs():
    """No graph of another test counts against the limit of compilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_leaves(*shapes, dtype=torch.bfloat16, requires_grad=(True, True)):
    generator = torch.Generator().manual_seed(20260403)
    return [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_(needed)
        for shape, needed in zip(shapes, requires_grad)
    ]


def run_step(function, leaves, recipe):
    """The result and the gradients of the leaves that need one."""
    with te.autocast(enabled=recipe is not None, recipe=recipe):
        out = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    if not wanted:
        return [out]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x, y)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make", (te.BatchedMatmul, lambda: teb.bmm), ids=("module", "bmm"))
def test_one_graph_and_the_bits_of_eager(make, recipe, case):
    if make is not te.BatchedMatmul and case == "vector":
        pytest.skip("the same code as the module's")
    multiply = make()
    a_shape, b_shape, view = CASES[case]

    def function(a, b):
        return multiply(*view(a, b)) * 2

    leaves = make_leaves(a_shape, b_shape)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = run_step(function, leaves, RECIPES[recipe])
    assert_same_bits(run_step(compiled, leaves, RECIPES[recipe]), expected)


@pytest.mark.parametrize("recipe", ("plain", "current"))
def test_with_the_default_compiler(recipe):
    multiply = te.BatchedMatmul()

    def function(a, b):
        return multiply(a.abs(), b.mT) * 2

    leaves = make_leaves((2, 24, 40), (2, 56, 40))
    expected = run_step(function, leaves, RECIPES[recipe])
    found = run_step(torch.compile(function, fullgraph=True), leaves, RECIPES[recipe])
    assert_same_bits(found, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_some_gradients_and_none(recipe):
    multiply = te.BatchedMatmul()
    compiled = torch.compile(multiply, fullgraph=True, backend="aot_eager")
    for requires_grad in ((True, False), (False, True), (False, False)):
        leaves = make_leaves((2, 32, 64), (2, 64, 32), requires_grad=requires_grad)
        expected = run_step(multiply, leaves, RECIPES[recipe])
        assert_same_bits(run_step(compiled, leaves, RECIPES[recipe]), expected)
    with torch.no_grad(), te.autocast(enabled=recipe != "plain", recipe=RECIPES[recipe]):
        leaves = make_leaves((2, 32, 64), (2, 64, 32))
        assert torch.equal(compiled(*leaves), multiply(*leaves))


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_graph_serves_many_sizes(recipe):
    multiply = te.BatchedMatmul()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(multiply, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for batch, rows, inner, cols in ((3, 24, 40, 56), (2, 33, 70, 17), (5, 64, 96, 32)):
        leaves = make_leaves((batch, rows, inner), (batch, inner, cols))
        expected = run_step(multiply, leaves, RECIPES[recipe])
        assert_same_bits(run_step(compiled, leaves, RECIPES[recipe]), expected)
        counts.append(counter.frame_count)
    # Dynamo may begin anew within the first. Graphs know contiguous tensors from others, and codes of 128-blocks
    # are contiguous only for sizes that are multiples of 16, as the last ones are.
    assert counts[0] == counts[1]
    assert len(set(counts[1:])) == (2 if recipe == "block" else 1)


@pytest.mark.parametrize("recipe", ("current", "mxfp8", "block"))
def test_saved_for_backward_are_codes(recipe):
    saved = []

    def keep(x):
        saved.append(x)
        return x

    leaves = make_leaves((2, 64, 128), (2, 128, 64))
    compiled = torch.compile(te.BatchedMatmul(), fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run_step(compiled, leaves, RECIPES[recipe])
    sizes = {str(x.dtype): 0 for x in saved}
    for x in saved:
        sizes[str(x.dtype)] += x.numel() * x.element_size()
    num_elements = sum(x.numel() for x in leaves)
    assert "torch.bfloat16" not in sizes
    assert num_elements <= sum(sizes.values()) <= 1.1 * num_elements


@pytest.mark.parametrize("recipe", ("current", "mxfp8", "block"))
def test_the_region_may_be_inside(recipe):
    multiply = te.BatchedMatmul()

    def function(a, b):
        with te.autocast(enabled=True, recipe=RECIPES[recipe]):
            return multiply(a, b)

    leaves = make_leaves((2, 32, 64), (2, 64, 32))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits(run_step(compiled, leaves, None), run_step(function, leaves, None))


def test_another_recipe_and_the_switch_of_emulation_compile_again():
    multiply = te.BatchedMatmul()
    leaves = make_leaves((2, 32, 64), (2, 64, 32))
    compiled = torch.compile(multiply, fullgraph=True, backend="aot_eager")
    for recipe in (None, RECIPES["current"], RECIPES["mxfp8"]):
        expected = run_step(multiply, leaves, recipe)
        assert_same_bits(run_step(compiled, leaves, recipe), expected)
        with teb.emulate(engine="reference"):
            assert_same_bits(run_step(compiled, leaves, recipe), expected)


def test_epsilon_of_the_recipe_arrives():
    recipe = Float8CurrentScaling()
    recipe.fp8_quant_fwd_inp = type(recipe.fp8_quant_fwd_inp)(amax_epsilon=64.0)
    leaves = make_leaves((2, 32, 64), (2, 64, 32))
    multiply = te.BatchedMatmul()
    expected = run_step(multiply, leaves, recipe)
    assert not torch.equal(expected[0], run_step(te.BatchedMatmul(), leaves, RECIPES["current"])[0])
    for dynamic in (False, True):
        compiled = torch.compile(multiply, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        assert_same_bits(run_step(compiled, leaves, recipe), expected)


def test_delayed_scaling_runs_between_two_graphs():
    recipe, counter = DelayedScaling(), CompileCounterWithBackend("aot_eager")

    def train(compile_function):
        # Regions update the scales of all modules that are known.
        FP8GlobalStateManager.reset()
        module = te.BatchedMatmul()
        step = compile_function(lambda a, b: module(a * 2, b) * 2)
        leaves = make_leaves((2, 32, 64), (2, 64, 32))
        results = [x for _ in range(3) for x in run_step(step, leaves, recipe)]
        return [*results, module.fp8_meta["scaling_fwd"].amax_history]

    expected = train(lambda function: function)
    found = train(lambda function: torch.compile(function, backend=counter))
    assert expected[-1].any()
    assert_same_bits(found, expected)
    assert counter.frame_count >= 2


def test_delayed_scaling_does_not_fit_in_one_graph():
    leaves = make_leaves((2, 32, 64), (2, 64, 32))
    compiled = torch.compile(te.BatchedMatmul(), fullgraph=True, backend="eager")
    with te.autocast(enabled=True, recipe=DelayedScaling()):
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match="DelayedScaling keeps scales between steps"
        ):
            compiled(*leaves)


def test_what_is_not_traced_runs_between_graphs():
    a, b = make_leaves((2, 32, 64), (2, 64, 32), requires_grad=(False, False))
    out = torch.empty(2, 32, 32, dtype=torch.bfloat16)
    compiled = torch.compile(lambda a, b: teb.bmm(a, b, alpha=2.0, out=out), backend="eager")
    assert torch.equal(compiled(a, b), teb.bmm(a, b, alpha=2.0))


def test_a_wrong_shape_is_refused():
    compiled = torch.compile(te.BatchedMatmul(), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="the contracted sizes differ"):
        compiled(*make_leaves((2, 32, 64), (2, 48, 32)))


@pytest.mark.parametrize("case", ("as_stored", "transposed", "broadcast", "ragged"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_opcheck(recipe, case):
    from transformer_engine_batched import compiled_product

    a_shape, b_shape, view = CASES[case]
    quantization, epsilons = "", (0.0, 0.0, 0.0)
    if recipe != "plain":
        quantization, epsilons = compiled_product._encode(RECIPES[recipe], torch.device("cpu"))
    a, b = (
        x.detach().requires_grad_()
        for x in view(*make_leaves(a_shape, b_shape, requires_grad=(False, False)))
    )
    settings = (quantization, *epsilons, True, True, True, False)
    torch.library.opcheck(
        torch.ops.transformer_engine_batched.matmul.default, (a, b, a.dtype, *settings)
    )


def test_a_graph_refuses_another_state_of_emulation():
    a, b = make_leaves((2, 32, 64), (2, 64, 32), requires_grad=(False, False))
    settings = ("", 0.0, 0.0, 0.0, False, False, False, False)
    with pytest.raises(RuntimeError, match=r"compiled outside emulate\(\)"):
        torch.ops.transformer_engine_batched.matmul(a, b, a.dtype, *settings)
