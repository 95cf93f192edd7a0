# SPDX-License-Identifier: Apache-2.0
"""Weights of `te.TriangleMultiplication`: how they start, where they come from, and that they are kept.

The public models' modules are restated here from their formulas, with their names.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import random_values
from torch import nn
from training import RECIPES, quantized
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from triangle_reference import Size, make_inputs, overall_sqnr, randomize

import transformer_engine_batched as teb
from transformer_engine_batched.triangle import block as triangle

SIZE = Size(2, 11, 12, 20)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """TE's state is that of this test alone, loads its own checkpoints and compiles nothing."""
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    FP8GlobalStateManager.reset()
    with torch.compiler.set_stance("force_eager"), teb.emulate():
        yield
    FP8GlobalStateManager.reset()


class OpenFold(nn.Module):
    """OpenFold's block: projections of their own; AlphaFold 3's reproductions leave the biases out."""

    def __init__(self, dim, hidden, outgoing, bias=True):
        super().__init__()
        self._outgoing = outgoing
        self.layer_norm_in, self.layer_norm_out = nn.LayerNorm(dim), nn.LayerNorm(hidden)
        for name in ("linear_a_p", "linear_a_g", "linear_b_p", "linear_b_g"):
            setattr(self, name, nn.Linear(dim, hidden, bias=bias))
        self.linear_g = nn.Linear(dim, dim, bias=bias)
        self.linear_z = nn.Linear(hidden, dim, bias=bias)

    def operands(self, x, mask):
        return [
            mask * torch.sigmoid(getattr(self, f"linear_{name}_g")(x)) * getattr(self, f"linear_{name}_p")(x)
            for name in "ab"
        ]  # fmt: skip

    def forward(self, z, mask):
        x = self.layer_norm_in(z)
        a, b = (operand.movedim(-1, -3) for operand in self.operands(x, mask[..., None]))
        product = a @ b.mT if self._outgoing else a.mT @ b
        out = self.linear_z(self.layer_norm_out(product.movedim(-3, -1)))
        return out * torch.sigmoid(self.linear_g(x))


class OpenFoldFused(OpenFold):
    """The form of AlphaFold-Multimer: both projections in one linear map, that of `a` first."""

    def __init__(self, dim, hidden, outgoing):
        super().__init__(dim, hidden, outgoing)
        for name in ("linear_a_p", "linear_a_g", "linear_b_p", "linear_b_g"):
            delattr(self, name)
        self.linear_ab_p = nn.Linear(dim, 2 * hidden)
        self.linear_ab_g = nn.Linear(dim, 2 * hidden)

    def operands(self, x, mask):
        both = mask * torch.sigmoid(self.linear_ab_g(x)) * self.linear_ab_p(x)
        hidden = both.shape[-1] // 2
        return both[..., :hidden], both[..., hidden:]


class Boltz(nn.Module):
    """Boltz's block, ``hidden = dim``; the direction is the class there."""

    def __init__(self, dim, outgoing):
        super().__init__()
        self.equation = "bikd,bjkd->bijd" if outgoing else "bkid,bkjd->bijd"
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.p_in, self.g_in = (nn.Linear(dim, 2 * dim, bias=False) for _ in range(2))
        self.p_out, self.g_out = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, z, mask):
        x = self.norm_in(z)
        a, b = torch.chunk(self.p_in(x) * self.g_in(x).sigmoid() * mask[..., None], 2, dim=-1)
        product = torch.einsum(self.equation, a, b)
        return self.p_out(self.norm_out(product)) * self.g_out(x).sigmoid()


def make_public(name, mode):
    """(module with trained-like weights, its loader)."""
    outgoing = mode == "outgoing"
    load = te.TriangleMultiplication.from_openfold
    if name == "openfold":
        module = OpenFold(SIZE.dim, SIZE.hidden, outgoing)
    elif name == "openfold3":
        module = OpenFold(SIZE.dim, SIZE.hidden, outgoing, bias=False)
    elif name == "multimer":
        module = OpenFoldFused(SIZE.dim, SIZE.hidden, outgoing)
    else:
        module, load = Boltz(SIZE.dim, outgoing), te.TriangleMultiplication.from_boltz
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            noise = random_values(tuple(parameter.shape), 7 + index)
            parameter.copy_(0.4 * noise + (0.7 if parameter.dim() == 1 else 0.0))
    return module, load


PUBLIC = ("openfold", "openfold3", "multimer", "boltz")


@pytest.mark.parametrize("mode", triangle.MODES)
@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("as_state", (False, True), ids=("module", "state dict"))
def test_public_models_in_fp32(as_state, name, mode):
    module, load = make_public(name, mode)
    inputs = make_inputs(SIZE)
    if as_state:
        state = {f"blocks.0.tri.{key}": value for key, value in module.state_dict().items()}
        state["blocks.0.other.weight"] = torch.zeros(1)
        block = load(state, mode, prefix="blocks.0.tri.")
    else:
        block = load(module, mode)
    assert block.bias == (name in ("openfold", "multimer")) and block.mode == mode
    # Exact but for the order of FP32 sums.
    expected = module(inputs.z, inputs.mask)
    assert expected.abs().mean() > 0.1
    out = block(inputs.z, inputs.mask)
    assert overall_sqnr(out, expected.detach().double()) > 120
    grads = [torch.autograd.grad(x, inputs.z, inputs.grad_output)[0] for x in (out, expected)]
    assert overall_sqnr(grads[0], grads[1].double()) > 115
    # The other direction, and `a` exchanged with `b`, would not pass.
    other = "incoming" if mode == "outgoing" else "outgoing"
    wrong = load(module.state_dict(), other)(inputs.z, inputs.mask)
    assert overall_sqnr(wrong, expected.detach().double()) < 10
    with torch.no_grad():
        for weight in (block.p_in_weight, block.g_in_weight):
            weight.copy_(weight.roll(weight.shape[0] // 2, dims=0))
    assert overall_sqnr(block(inputs.z, inputs.mask), expected.detach().double()) < 30


def test_loaded_weights_are_copies_of_their_dtype():
    module, load = make_public("boltz", "outgoing")
    block = load(module.bfloat16(), "outgoing")
    assert block.p_in_weight.dtype == torch.bfloat16 and block.p_in_weight.device.type == "cpu"
    assert torch.equal(block.p_in_weight, module.p_in.weight)
    with torch.no_grad():
        block.p_in_weight.zero_()
    assert module.p_in.weight.any()
    assert load(module, "outgoing", params_dtype=torch.float32).p_in_weight.dtype == torch.float32


def test_eps_is_the_module_s():
    module, load = make_public("boltz", "outgoing")
    module.norm_in.eps = module.norm_out.eps = 1e-3
    assert load(module, "outgoing").eps == 1e-3
    assert load(module, "outgoing", eps=1e-6).eps == 1e-6
    assert load(module.state_dict(), "outgoing").eps == 1e-5
    module.norm_out.eps = 1e-5
    with pytest.raises(ValueError, match="different eps"):
        load(module, "outgoing")


def test_wrong_weights_are_refused():
    module, load = make_public("openfold", "outgoing")
    with pytest.raises(ValueError, match="mode='incoming' was asked for, but .* 'outgoing'"):
        load(module, "incoming")
    state = module.state_dict()
    with pytest.raises(ValueError, match="missing linear_z.bias; unknown linear_q.bias"):
        load(
            {"linear_q.bias" if k == "linear_z.bias" else k: v for k, v in state.items()},
            "outgoing",
        )
    with pytest.raises(
        ValueError, match="missing g_in.bias, g_in.weight, .*unknown .*linear_a_g.weight"
    ):
        te.TriangleMultiplication.from_boltz(state, "outgoing")
    with pytest.raises(ValueError, match="no weights begin with the prefix 'trunk.'"):
        load(state, "outgoing", prefix="trunk.")
    state["linear_z.weight"] = state["linear_z.weight"][:, 1:]
    with pytest.raises(
        ValueError, match=r"p_out_weight was to be of shape \[12, 20\], .* \[12, 19\]"
    ):
        load(state, "outgoing")


# --- how they start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", (True, False))
def test_a_fresh_block_starts_as_the_published_ones(bias):
    block = te.TriangleMultiplication(64, 96, bias=bias, device="cpu")
    assert not block(random_values((1, 5, 5, 64), 0)).any()
    assert (
        not block.p_out_weight.any()
        and not block.g_in_weight.any()
        and not block.g_out_weight.any()
    )
    assert abs(block.p_in_weight.std() * 8 - 1) < 0.05
    names = {"p_in": 0.0, "g_in": 1.0, "p_out": 0.0, "g_out": 1.0}
    for name, value in names.items():
        found = getattr(block, f"{name}_bias")
        assert found is None if not bias else (found == value).all()


def test_normal_start_is_seeded_and_not_zero():
    def make(seed):
        torch.manual_seed(seed)
        return te.TriangleMultiplication(16, init="normal", device="cpu")

    z = random_values((1, 6, 6, 16), 0)
    assert torch.equal(make(1)(z), make(1)(z)) and not torch.equal(make(1)(z), make(2)(z))
    assert make(1)(z).abs().mean() > 0.05


def test_meta_device():
    block = te.TriangleMultiplication(16, init="normal", device="meta")
    assert block.p_in_weight.is_meta
    block.reset_parameters()
    if not torch.cuda.is_available():
        assert block.p_in_weight.device.type == "cpu"
    assert block.p_in_weight.std() > 0.1 and (block.norm_in_weight == 1).all()


def test_repr_and_names():
    block = te.TriangleMultiplication(16, 32, "incoming", bias=True, device="cpu", name="tri")
    assert repr(block) == (
        "TriangleMultiplication(dim=16, hidden=32, mode='incoming', bias=True, eps=1e-05, "
        "scaling='recipe', pipeline='auto', name='tri')"
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    assert shapes == {
        "norm_in_weight": (16,),
        "norm_in_bias": (16,),
        "p_in_weight": (64, 16),
        "p_in_bias": (64,),
        "g_in_weight": (64, 16),
        "g_in_bias": (64,),
        "norm_out_weight": (32,),
        "norm_out_bias": (32,),
        "p_out_weight": (16, 32),
        "p_out_bias": (16,),
        "g_out_weight": (16, 16),
        "g_out_bias": (16,),
    }
    assert teb.TriangleMultiplication is te.TriangleMultiplication


# --- that they are kept ---------------------------------------------------------------------------------


def through_state_dict(block):
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    result = te.TriangleMultiplication(SIZE.dim, SIZE.hidden, bias=True, device="cpu")
    result.load_state_dict(torch.load(file, weights_only=False), strict=True)
    return result


def through_torch_save(block):
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(block):
    return pickle.loads(pickle.dumps(block))


@pytest.mark.parametrize(
    "make_copy", (through_state_dict, through_torch_save, through_pickle, copy.deepcopy)
)
@pytest.mark.parametrize("recipe", ("none", "delayed", "current"))
def test_training_goes_on_bit_for_bit(recipe, make_copy):
    made = RECIPES[recipe]()

    def step(block, optimizer, seed):
        inputs = make_inputs(SIZE, seed=seed)
        with quantized(made):
            out = block(inputs.z, inputs.mask)
        optimizer.zero_grad()
        out.backward(inputs.grad_output)
        optimizer.step()
        return out.detach()

    def train(block, seeds):
        optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
        return [step(block, optimizer, seed) for seed in seeds]

    block = te.TriangleMultiplication(SIZE.dim, SIZE.hidden, bias=True, device="cpu")
    randomize(block)
    first = copy.deepcopy(block)
    whole = train(block, range(5))
    FP8GlobalStateManager.reset()
    begun = train(first, range(3))
    FP8GlobalStateManager.reset()
    rest = train(make_copy(first), range(3, 5))
    for expected, found in zip(whole, begun + rest, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize(
    "move", (lambda x: x.to("cpu"), lambda x: x.train().eval(), lambda x: x.float())
)
def test_moves_change_nothing(move):
    block, inputs = te.TriangleMultiplication(12, 20, bias=True, device="cpu"), make_inputs(SIZE)
    randomize(block)
    expected = block(inputs.z, inputs.mask)
    assert torch.equal(move(block)(inputs.z, inputs.mask), expected)
