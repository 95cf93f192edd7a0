# SPDX-License-Identifier: Apache-2.0
"""`te.BatchedEinsum` and `teb.einsum`, emulated on the CPU: values against FP64, layouts, state, refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import make_quantizer, random_values, sqnr_per_item
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from training import (
    QUANTIZED,
    RECIPES,
    STATELESS,
    QuantizeCalls,
    SavedTensors,
    assert_same_state,
    delayed_state,
    quantized,
)
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, Format
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

import transformer_engine_batched as teb
from transformer_engine_batched import memory_layout

OUTGOING, INCOMING = "bikd,bjkd->bijd", "bkid,bkjd->bijd"
# (whole, worst slice) of the result, and of gradients, dB. E5M2 gradients have 24.6 dB at the most, E4M3 28.5.
HYBRID = ((27.5, 26.0), (24.0, 22.5))
E4M3 = ((27.5, 26.0), (27.5, 26.0))
PLAIN = ((140.0, 140.0), (140.0, 140.0))
BOUNDS = {"none": PLAIN, "delayed": HYBRID, "current": HYBRID, "mxfp8": E4M3, "block": E4M3}


@pytest.fixture(autouse=True)
def emulated_and_fresh(monkeypatch):
    """Inside `emulate()`, without TE's state of other tests; TE compiles its update of scales otherwise."""
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    FP8GlobalStateManager.reset()
    with torch.compiler.set_stance("force_eager"), teb.emulate():
        yield
    FP8GlobalStateManager.reset()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The products are small: threads would only wait for each other on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


class Data:
    """Operands of an equation and the gradient of its result."""

    def __init__(self, equation, a_shape, b_shape, dtype=torch.float32, *, seed=0):
        self.equation = equation
        shapes = a_shape, b_shape
        self.a, self.b = (
            random_values(shape, 3 * seed + i).to(dtype).requires_grad_()
            for i, shape in enumerate(shapes)
        )
        y = torch.einsum(equation, torch.empty(a_shape), torch.empty(b_shape))
        self.grad = random_values(tuple(y.shape), 3 * seed + 2).to(dtype)

    def step(self, contract, recipe=None):
        """Result and gradients."""
        with quantized(recipe):
            y = contract(self.a, self.b)
        return y.detach(), *torch.autograd.grad(y, (self.a, self.b), self.grad)

    def exact(self):
        """The same in FP64 by torch.einsum."""
        a, b = (x.detach().double().requires_grad_() for x in (self.a, self.b))
        y = torch.einsum(self.equation, a, b)
        return y.detach(), *torch.autograd.grad(y, (a, b), self.grad.double())


def triangle(equation=OUTGOING, n=40, k=37, channels=6, batch=2, **options):
    """Operands of a channel-last contraction."""
    shape = (batch, n, k, channels) if equation == OUTGOING else (batch, k, n, channels)
    return Data(equation, shape, shape, **options)


def assert_accurate(step, data, bounds):
    """Each tensor as a whole; with channels last, also its worst slice."""
    for index, (result, exact) in enumerate(zip(step, data.exact())):
        assert result.shape == exact.shape
        whole, worst = bounds[min(index, 1)]
        flat = [x.reshape(1, -1) for x in (result, exact)]
        assert sqnr_per_item(*flat).min() >= whole, index
        if data.equation in (OUTGOING, INCOMING):
            assert result.is_contiguous()
            slices = [x.permute(0, 3, 1, 2) for x in (result, exact)]
            assert sqnr_per_item(*slices).min() >= worst, index


# --- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("equation", (OUTGOING, INCOMING))
def test_both_directions_against_fp64(equation, recipe):
    module, made = te.BatchedEinsum(equation), RECIPES[recipe]()
    for seed in range(3 if recipe == "delayed" else 1):
        data = triangle(equation, seed=seed)
        assert_accurate(data.step(module, made), data, BOUNDS[recipe])


@pytest.mark.parametrize("recipe", (DelayedScaling, Float8CurrentScaling))
def test_e4m3_gradients(recipe):
    made = recipe(fp8_format=Format.E4M3)
    module = te.BatchedEinsum(OUTGOING)
    for seed in range(2):
        data = triangle(seed=seed % 1)
        step = data.step(module, made)
    assert_accurate(step, data, E4M3)


@pytest.mark.parametrize("size", (1, 16, 33))
def test_a_wrong_slice_shows(size):
    data = triangle(n=size, k=64)
    step = [x.clone() for x in data.step(te.BatchedEinsum(OUTGOING))]
    step[0][0, ..., 3] *= 1.1
    with pytest.raises(AssertionError):
        assert_accurate(step, data, HYBRID)


@pytest.mark.parametrize("recipe", ("none", "current", "mxfp8"))
@pytest.mark.parametrize(
    "equation, a_shape, b_shape",
    (
        ("bhqd,bhkd->bhqk", (2, 3, 33, 32), (2, 3, 48, 32)),
        ("bqhd,bkhd->bhqk", (2, 33, 3, 32), (2, 48, 3, 32)),
        ("bhqk,bkhd->bqhd", (2, 3, 33, 48), (2, 48, 3, 32)),
        ("ij,jk", (33, 64), (64, 40)),
        ("...ikd,...jkd->...ijd", (2, 24, 40, 5), (2, 24, 40, 5)),
        ("kjd,kid->ijd", (64, 24, 3), (64, 40, 3)),
        ("xykz,kzn->nyx", (6, 7, 8, 9), (8, 9, 20)),
        ("aib,bjc->aijc", (7, 8, 40), (40, 9, 6)),
        ("bid,jd->bij", (3, 24, 64), (32, 64)),
        ("bikd,bjkd->bijd", (2, 24, 40, 3), (1, 24, 40, 3)),
        ("bik,bkj->bij", (2, 24, 1), (2, 40, 32)),
        ("i,j->ij", (40,), (33,)),
        ("bi,bi->bi", (5, 40), (5, 40)),
    ),
)
def test_equations(equation, a_shape, b_shape, recipe):
    data = Data(equation, a_shape, b_shape)
    made = RECIPES[recipe]()
    step = data.step(te.BatchedEinsum(equation), made)
    # A product of one element each has no sum to average errors.
    slack = 3.0 if len(a_shape) < 3 else 0.0
    bounds = [[db - slack for db in pair] for pair in BOUNDS[recipe]]
    assert_accurate(step, data, bounds)
    for found, wanted in zip(data.step(lambda a, b: teb.einsum(equation, a, b), made), step):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("recipe", ("none", *QUANTIZED))
@pytest.mark.parametrize("shape", ((0, 8, 16, 4), (2, 0, 16, 4), (2, 8, 0, 4), (2, 8, 16, 0)))
def test_empty(shape, recipe):
    data = Data(OUTGOING, shape, shape)
    for result, exact in zip(
        data.step(te.BatchedEinsum(OUTGOING), RECIPES[recipe]()), data.exact()
    ):
        assert result.shape == exact.shape and not result.any()


@pytest.mark.parametrize("recipe", STATELESS)
def test_the_product_is_batched_matmul_s(recipe):
    """Quantized from a permuted view: the codes and the sums are those of a copy."""
    data, made = triangle(n=32, k=64), RECIPES[recipe]()
    module = te.BatchedMatmul()

    def by_hand(a, b):
        left, right = a.permute(0, 3, 1, 2).contiguous(), b.permute(0, 3, 2, 1).contiguous()
        return module(left, right).permute(0, 2, 3, 1)

    for found, wanted in zip(data.step(te.BatchedEinsum(OUTGOING), made), data.step(by_hand, made)):
        assert torch.equal(found, wanted)


def test_autocast_and_dtypes():
    data = triangle(dtype=torch.bfloat16)
    step = data.step(te.BatchedEinsum(OUTGOING), Float8CurrentScaling())
    assert [x.dtype for x in step] == [torch.bfloat16] * 3
    with torch.autocast("cpu", torch.bfloat16):
        data = triangle()
        y = teb.einsum(OUTGOING, data.a, data.b)
        assert y.dtype == torch.bfloat16
        assert te.BatchedEinsum(OUTGOING)(data.a, data.b).dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), data.a)[0].dtype == torch.float32


# --- layouts and what is saved ---------------------------------------------------------------------------


@pytest.mark.parametrize("equation", (OUTGOING, INCOMING))
def test_gradients_lie_where_their_operands_do(equation):
    data = triangle(equation)
    module = te.BatchedEinsum(equation)
    with SavedTensors() as saved, quantized(Float8CurrentScaling()):
        y = module(data.a, data.b)
    assert y.is_contiguous()
    assert {x.dtype for x in saved.tensors} == {torch.uint8, torch.float32}
    views = []
    data.a.register_hook(lambda grad: views.append(grad.stride()))
    y.backward(data.grad)
    assert views == [data.a.stride()] and data.b.grad.is_contiguous()


def test_one_quantization_of_each_operand(monkeypatch):
    recorded = QuantizeCalls(monkeypatch)
    triangle().step(te.BatchedEinsum(OUTGOING), Float8CurrentScaling())
    assert recorded.calls == [(name, True, True) for name in ("a", "b", "grad_output")]


@pytest.mark.parametrize(
    "x, strides",
    (
        (torch.empty(2, 5, 7, 3).permute(0, 3, 1, 2), (105, 1, 21, 3)),
        (torch.empty(2, 5, 7, 3).permute(0, 3, 2, 1), (105, 1, 3, 21)),
        (torch.empty(2, 5, 9, 4)[:, :, :7, :3].permute(0, 3, 1, 2), (105, 1, 21, 3)),
        (torch.empty(5, 7, 3).permute(2, 0, 1), (1, 21, 3)),
        (torch.empty(2, 5, 7, 3), None),
        (torch.empty(2, 3, 5, 7).mT, None),
        (torch.empty(1, 5, 7).expand(3, 5, 7), None),
        (torch.empty(5, 7, 1).permute(2, 0, 1), None),
        (torch.empty(0, 7, 3).permute(2, 0, 1), None),
        (torch.empty(4, 6), None),
    ),
)
def test_layout_of_gradients(x, strides):
    assert memory_layout.find_layout(x) == strides
    found = memory_layout.arrange(x, strides)
    assert torch.equal(found, x) or x.numel()
    assert found.stride() == strides if strides else found.is_contiguous()


# --- state -----------------------------------------------------------------------------------------------


def train(contract, steps=range(4)):
    """Steps under delayed scaling. TE updates the scales of all modules that it knows together."""
    made = RECIPES["delayed"]()
    return [triangle(seed=seed).step(contract, made) for seed in steps]


def assert_same_steps(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(x, y, strict=True))


def test_state_is_batched_matmul_s():
    module, other = te.BatchedEinsum(OUTGOING), te.BatchedMatmul()
    expected = train(
        lambda a, b: other(a.permute(0, 3, 1, 2), b.permute(0, 3, 2, 1)).permute(0, 2, 3, 1)
    )
    FP8GlobalStateManager.reset()
    assert_same_steps(train(module), expected)
    assert_same_state(delayed_state(module), delayed_state(other))


@pytest.mark.parametrize("how", ("state_dict", "deepcopy", "pickle"))
def test_state_goes_through_a_checkpoint(how):
    module = te.BatchedEinsum(OUTGOING)
    train(module)
    if how == "state_dict":
        other = te.BatchedEinsum(OUTGOING)
        other.load_state_dict(module.state_dict())
    else:
        other = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    assert other.equation == OUTGOING
    expected = train(module, [4, 5])
    FP8GlobalStateManager.reset()
    assert_same_steps(train(other, [4, 5]), expected)
    assert_same_state(delayed_state(module), delayed_state(other))


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_recompute_gives_the_same(use_reentrant):
    data, made = triangle(), Float8CurrentScaling()
    module = te.BatchedEinsum(OUTGOING)
    expected = data.step(module, made)

    def block(a, b):
        with quantized(made):
            return module(a, b) * 1.0

    out = torch_checkpoint(block, data.a, data.b, use_reentrant=use_reentrant)
    out.backward(data.grad)
    assert_same_steps([(out, data.a.grad, data.b.grad)], [expected])


def test_roles_name_the_module():
    module = te.BatchedEinsum(OUTGOING, name="contract")
    roles = module.get_quantizer_roles(fwd=True, num_quantizers=3)
    assert [(x.module_type, x.tensor_type, x.name) for x in roles] == [
        ("batched_einsum", name, "contract") for name in ("a", "b", "output")
    ]
    assert repr(module) == f"BatchedEinsum('{OUTGOING}', name='contract')"


# --- refusals ----------------------------------------------------------------------------------------------


def test_equations_are_checked_when_the_module_is_made():
    with pytest.raises(ValueError, match="index 'l' of operand a is summed over alone"):
        te.BatchedEinsum("ijl,jk->ik")
    with pytest.raises(ValueError, match="index 'i' occurs 2 times in operand a"):
        te.BatchedEinsum("iij,jk->ik")


def test_sizes_are_checked():
    module = te.BatchedEinsum("ij,jk->ik")
    with pytest.raises(ValueError, match="index 'j' has size 3 in operand a"):
        module(torch.empty(2, 3), torch.empty(4, 5))
    with pytest.raises(TypeError, match="operand b has dtype torch.int64"):
        module(torch.empty(2, 3), torch.ones(3, 4, dtype=torch.int64))


def test_einsum_wants_a_recipe_without_state():
    a = torch.randn(16, 16)
    with quantized(DelayedScaling()):
        with pytest.raises(
            teb.UnsupportedError, match=r"BatchedEinsum\('ij,jk->ik'\) for this product"
        ):
            teb.einsum("ij,jk->ik", a, a)


def test_quantized_operands():
    """As they are stored, or not at all."""
    a, b = random_values((3, 32, 64), 0), random_values((3, 64, 48), 1)
    a_codes, b_codes = (teb.quantize(x, make_quantizer("float8_current")) for x in (a, b))
    with quantized(Float8CurrentScaling()), torch.no_grad():
        found = te.BatchedEinsum("bik,bkj->bij")(a_codes, b_codes)
        assert torch.equal(found, te.BatchedMatmul()(a_codes, b_codes))
        with pytest.raises(teb.UnsupportedError, match="operand b is a Float8Tensor.*dequantize"):
            te.BatchedEinsum("bik,bjk->bij")(
                a_codes, teb.quantize(b.mT.contiguous(), make_quantizer("float8_current"))
            )
    with pytest.raises(teb.UnsupportedError, match="einsum of quantized tensors.*bmm"):
        teb.einsum("bik,bkj->bij", a_codes, b_codes)


def test_second_derivatives_are_refused():
    data = triangle(n=8, k=8)
    y = teb.einsum(OUTGOING, data.a, data.b)
    (grad,) = torch.autograd.grad(y.sum(), data.a, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_torch_compile_runs_it_between_graphs():
    data = triangle(n=8, k=8)
    compiled = torch.compile(lambda a, b: teb.einsum(OUTGOING, a, b) * 2, backend="eager")
    with torch.compiler.set_stance("default"):
        assert torch.equal(compiled(data.a, data.b), teb.einsum(OUTGOING, data.a, data.b) * 2)
