# SPDX-License-Identifier: Apache-2.0
"""How `te.BatchedMatmul` is executed: synchronization, memory, CUDA graphs, streams and threads."""

from __future__ import annotations

import threading

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import random_values
from training import (
    CASES,
    RECIPES,
    Case,
    Data,
    Step,
    assert_same_state,
    assert_same_step,
    assert_step_accurate,
    delayed_state,
    make_data,
    quantized,
    run_step,
    train,
)
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

import transformer_engine_batched as teb

NATIVE = ("delayed", "current")
LARGE = Case((5, 256, 384), (5, 384, 640))
MIB = 2**20


@pytest.fixture(autouse=True)
def fresh():
    """TE's state is that of this test alone."""
    FP8GlobalStateManager.reset()
    yield
    FP8GlobalStateManager.reset()


def on_gpu(case, dtype=torch.bfloat16, **options):
    """Data of a case on the GPU."""
    return make_data(case, dtype, device="cuda", **options)


def copy_into(target: Data, source: Data) -> None:
    """New values in the memory of `target`."""
    with torch.no_grad():
        for x, y in zip(target, source):
            x.copy_(y)


# --- synchronization and memory ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("plain", "both.mT", "ragged", "b has no batch"))
@pytest.mark.parametrize("recipe", ("none", *NATIVE))
def test_no_synchronization(recipe, name):
    data, module, made = on_gpu(CASES[name]), te.BatchedMatmul(), RECIPES[recipe]()
    for _ in range(2):
        run_step(module, data, made)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = run_step(module, data, made)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_step_accurate(step, data, recipe)


def test_no_synchronization_in_bmm():
    data, made = on_gpu(CASES["plain"]), RECIPES["current"]()
    run_step(teb.bmm, data, made)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_step(teb.bmm, data, made)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_growth(function):
    """Bytes that a warm call takes at its peak, its results included."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("transposed", ((0, 0), (1, 0), (0, 1), (1, 1)), ids=str)
@pytest.mark.parametrize("recipe", NATIVE)
def test_no_high_precision_copy(recipe, transposed):
    """Inputs of 32 MiB in BF16: 16 MiB for each copy in FP8, and the output; no more than that."""
    operands = [torch.randn(16, 1024, 1024, device="cuda").bfloat16() for _ in range(2)]
    a, b = (x.mT if flip else x for x, flip in zip(operands, transposed))
    module, made = te.BatchedMatmul(), RECIPES[recipe]()
    # Half of an input is what the allocator and a workspace may add.
    slack = 12 * MIB

    def forward():
        with quantized(made):
            return module(a, b)

    assert peak_growth(forward) <= (32 + 2 * 16) * MIB + slack
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    assert peak_growth(forward) <= (32 + 4 * 16) * MIB + slack


@pytest.mark.parametrize("recipe", NATIVE)
def test_backward_needs_two_copies_of_the_gradient(recipe):
    a, b, grad_output = (torch.randn(16, 1024, 1024, device="cuda").bfloat16() for _ in range(3))
    data = Data(a.requires_grad_(), b.requires_grad_(), grad_output)
    module, made = te.BatchedMatmul(), RECIPES[recipe]()
    # Saved 2 x 16, in forward 2 x 16 more and the output of 32, in backward two copies of the gradient of
    # 16 each, the output of 32 and two gradients of 32.
    largest = max(32 + 4 * 16, 32 + 2 * 16 + 2 * 16 + 2 * 32) * MIB
    assert peak_growth(lambda: run_step(module, data, made)) <= largest + 12 * MIB


def test_a_repeated_operand_is_quantized_once():
    stored = torch.randn(1024, 1024, device="cuda").bfloat16()
    b = torch.randn(32, 1024, 64, device="cuda").bfloat16()
    module, made = te.BatchedMatmul(), RECIPES["current"]()

    def forward():
        with quantized(made):
            return module(stored.expand(32, 1024, 1024), b)

    # 32 codes of stored would be 32 MiB.
    assert peak_growth(forward) <= 16 * MIB


# --- CUDA graphs ----------------------------------------------------------------------------------------


def warm_up(function, count: int = 3) -> None:
    """Runs on a side stream, as capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(count):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ("large", "both.mT", "ragged", "b has no batch"))
@pytest.mark.parametrize("recipe", ("none", *NATIVE))
def test_cuda_graph_of_forward_and_backward(recipe, name):
    case = CASES.get(name, LARGE)
    made = RECIPES[recipe]()
    batches = [on_gpu(case, seed=seed) for seed in range(5)]
    expected = train(te.BatchedMatmul(), made, batches)
    FP8GlobalStateManager.reset()
    module, static = te.BatchedMatmul(), on_gpu(case, seed=9)
    warm_up(lambda: run_step(module, static, made))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = run_step(module, static, made)
    if recipe == "delayed":
        module.reset_fp8_meta_tensors()
    for index, data in enumerate(batches):
        copy_into(static, data)
        for x in step:
            x.fill_(float("nan"))
        graph.replay()
        if recipe == "delayed":
            # The update of the gradients' scales belongs to no graph, as in TE's modules.
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
            assert_same_state(expected.states[index], delayed_state(module))
        assert_same_step(expected.steps[index], step)


@pytest.mark.parametrize("recipe", NATIVE)
def test_cuda_graph_of_inference(recipe):
    made, module, static = RECIPES[recipe](), te.BatchedMatmul(), on_gpu(LARGE, seed=9)
    run_step(module, static, made)

    def forward(data):
        with torch.no_grad(), quantized(made):
            return module(data.a, data.b)

    warm_up(lambda: forward(static))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(static)
    for seed in range(3):
        data = on_gpu(LARGE, seed=seed)
        copy_into(static, data)
        graph.replay()
        assert torch.equal(out, forward(data))


class Chain(torch.nn.Module):
    """Two products, one after the other."""

    def __init__(self):
        super().__init__()
        self.first = te.BatchedMatmul(name="first")
        self.second = te.BatchedMatmul(name="second")

    def forward(self, a, b):
        middle = self.first(a, b)
        return self.second(middle, b.mT)


@pytest.mark.parametrize("make", (te.BatchedMatmul, Chain))
@pytest.mark.parametrize("recipe", NATIVE)
def test_make_graphed_callables(recipe, make):
    made = RECIPES[recipe]()
    shape = LARGE if make is te.BatchedMatmul else Case((5, 128, 128), (5, 128, 128))
    batches = [on_gpu(shape, seed=seed) for seed in range(5)]
    eager = make()
    modules = lambda model: [
        m for m in model.modules() if isinstance(m, te.BatchedMatmul)
    ]  # noqa: E731
    steps, states = [], []
    for data in batches:
        steps.append(run_step(eager, data, made))
        states.append([delayed_state(m) if recipe == "delayed" else {} for m in modules(eager)])
    FP8GlobalStateManager.reset()
    model, sample = make(), on_gpu(shape, seed=9)
    graphed = te.make_graphed_callables(model, (sample.a, sample.b), enabled=True, recipe=made)
    for data, step, state in zip(batches, steps, states):
        assert_same_step(step, run_step(graphed, data, made))
        for m, expected in zip(modules(model), state):
            assert_same_state(expected, delayed_state(m) if recipe == "delayed" else {})


# --- streams, threads, many modules ----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", NATIVE)
def test_two_modules_in_one_region(recipe):
    made, chain = RECIPES[recipe](), Chain()
    for seed in range(3):
        data = on_gpu(Case((3, 128, 128), (3, 128, 128)), seed=seed)
        with quantized(made):
            out = chain(data.a, data.b)
        grads = torch.autograd.grad(out, data[:2], data.grad_output)
        assert all(bool(x.isfinite().all()) for x in (out, *grads))
        if recipe == "delayed":
            for module in (chain.first, chain.second):
                for direction in ("fwd", "bwd"):
                    history = delayed_state(module)[f"amax_history_{direction}"]
                    assert (history[1:, 0] > 0).sum() == min(seed + 1, 2)


def test_two_streams():
    data = [on_gpu(LARGE, seed=seed) for seed in range(2)]
    made, module = RECIPES["current"](), te.BatchedMatmul()
    expected = [run_step(module, x, made) for x in data]
    streams = [torch.cuda.Stream() for _ in data]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(10):
        for stream, x, found in zip(streams, data, results):
            with torch.cuda.stream(stream):
                found.append(run_step(module, x, made))
    torch.cuda.synchronize()
    for step, found in zip(expected, results):
        for other in found:
            assert_same_step(step, other)


def test_threads_without_a_region():
    """High precision and backward in threads; regions of te.autocast are those of the process."""
    data = [on_gpu(CASES["plain"], seed=seed) for seed in range(4)]
    expected = [run_step(te.BatchedMatmul(), x) for x in data]
    torch.cuda.synchronize()
    failures = []

    def work(index):
        try:
            module = te.BatchedMatmul()
            for _ in range(20):
                assert_same_step(expected[index], run_step(module, data[index]))
        except BaseException as error:  # pylint: disable=broad-except
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("recipe", NATIVE)
def test_repeatable(recipe):
    data, made = on_gpu(LARGE), RECIPES[recipe]()
    traces = []
    for _ in range(2):
        FP8GlobalStateManager.reset()
        traces.append(train(te.BatchedMatmul(), made, [data] * 3))
    for one, other in zip(*(trace.steps for trace in traces)):
        assert_same_step(one, other)


def test_non_contiguous_gradients_of_views():
    """Gradients of two slices of one tensor, as attention has them."""
    x = random_values((4, 64, 3, 64), 1, "cuda").bfloat16().requires_grad_()
    module = te.BatchedMatmul()
    with quantized(RECIPES["current"]()):
        q, k = x[:, :, 0], x[:, :, 1]
        out = module(q, k.mT)
    out.sum().backward()
    assert x.grad.shape == x.shape and not x.grad[:, :, 2].any()
    ones = torch.ones_like(out)
    step = Step(out.detach(), x.grad[:, :, 0], x.grad[:, :, 1].mT)
    assert_step_accurate(
        step, Data(q.detach().requires_grad_(), k.mT.detach().requires_grad_(), ones), "current"
    )
