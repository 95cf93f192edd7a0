# SPDX-License-Identifier: Apache-2.0
"""State of `te.BatchedMatmul` between steps: checkpoints, copies, recipes that change. Needs no GPU.

What is compared is bit for bit, and always trained apart: TE updates all modules that exist at once.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import transformer_engine.pytorch as te
from training import (
    CASES,
    QUANTIZED,
    RECIPES,
    Case,
    assert_same_state,
    assert_same_trace,
    assert_step_accurate,
    delayed_state,
    exact_step,
    make_data,
    quantized,
    run_step,
    train,
)
from transformer_engine.common.recipe import (
    CustomRecipe,
    DelayedScaling,
    Float8CurrentScaling,
    Format,
    MXFP8BlockScaling,
)
from transformer_engine.pytorch.quantization import DelayedScalingRequest, FP8GlobalStateManager

import transformer_engine_batched as teb

CASE = Case((3, 16, 32), (3, 32, 48))
BATCHES = [make_data(CASE, seed=seed) for seed in range(8)]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """TE's state is that of this test alone, loads its own checkpoints and compiles nothing."""
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    FP8GlobalStateManager.reset()
    with torch.compiler.set_stance("force_eager"):
        yield
    FP8GlobalStateManager.reset()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The products are small: threads would only wait for each other on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


class Model(torch.nn.Module):
    """A product with a trained operand, as a checkpoint has it."""

    def __init__(self):
        super().__init__()
        self.product = te.BatchedMatmul(name="product")
        self.weight = torch.nn.Parameter(torch.ones(32))

    def forward(self, a, b):
        return self.product(a * self.weight, b)


def through_state_dict(module, make):
    """A new module with the state of one, by way of a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    FP8GlobalStateManager.reset()
    result = make()
    result.load_state_dict(torch.load(file, weights_only=False), strict=True)
    return result


def through_deepcopy(module, make):
    return copy.deepcopy(module)


def through_pickle(module, make):
    data = pickle.dumps(module)
    FP8GlobalStateManager.reset()
    return pickle.loads(data)


def through_torch_save(module, make):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    FP8GlobalStateManager.reset()
    return torch.load(file, weights_only=False)


COPIES = (through_state_dict, through_deepcopy, through_pickle, through_torch_save)


@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("recipe", QUANTIZED)
def test_training_goes_on_bit_for_bit(recipe, make_copy, emulated):
    made = RECIPES[recipe]()
    whole = train(te.BatchedMatmul(name="x"), made, BATCHES)
    FP8GlobalStateManager.reset()
    module = te.BatchedMatmul(name="x")
    first = train(module, made, BATCHES[:4])
    resumed = make_copy(module, lambda: te.BatchedMatmul(name="x"))
    assert type(resumed) is te.BatchedMatmul and resumed.name == "x"
    rest = train(resumed, made, BATCHES[4:])
    assert_same_trace(whole, type(whole)(first.steps + rest.steps, first.states + rest.states))


@pytest.mark.parametrize("make_copy", COPIES[1:])
def test_a_copy_is_one_of_its_own(make_copy, emulated):
    """The scales of a copy are not those of the original, also where both go on in one process."""
    made = RECIPES["delayed"]()
    module = te.BatchedMatmul()
    train(module, made, BATCHES[:2])
    before = delayed_state(module)
    other = make_copy(module, None)
    train(other, made, [BATCHES[0]])
    other.fp8_meta["scaling_fwd"].scale.fill_(5.0)
    assert torch.equal(delayed_state(module)["scale_fwd"], before["scale_fwd"])
    for quantizer, scale in zip(
        other.quantizers["scaling_fwd"], other.fp8_meta["scaling_fwd"].scale
    ):
        assert quantizer.scale.item() == scale.item() == 5.0  # fmt: skip


@pytest.mark.parametrize("make_copy", COPIES)
def test_a_copy_of_a_module_that_never_ran(make_copy, emulated):
    made = RECIPES["delayed"]()
    expected = train(te.BatchedMatmul(), made, BATCHES[:3])
    FP8GlobalStateManager.reset()
    assert_same_trace(
        expected, train(make_copy(te.BatchedMatmul(), te.BatchedMatmul), made, BATCHES[:3])
    )


def test_checkpoint_of_a_model(emulated):
    made, model = RECIPES["delayed"](), Model()
    train(model.product, made, BATCHES[:3], multiply=model)
    state = model.state_dict()
    assert set(state) == {"weight", "product._extra_state"}
    assert state["product._extra_state"].dtype == torch.uint8
    assert state["product._extra_state"].device.type == "cpu"
    restored = through_state_dict(model, Model)
    assert_same_state(delayed_state(model.product), delayed_state(restored.product))


@pytest.mark.parametrize("recipe", ("none", "current", "mxfp8"))
def test_extra_state_of_stateless_recipes_is_empty(recipe, emulated):
    module = te.BatchedMatmul()
    train(module, RECIPES[recipe](), BATCHES[:1])
    assert module.get_extra_state().numel() == 0
    te.BatchedMatmul().load_state_dict(module.state_dict(), strict=True)


def test_state_without_emulation_and_without_running():
    """Saving and loading need no GPU and no recipe."""
    module = te.BatchedMatmul()
    assert module.get_extra_state().numel() == 0
    module.set_extra_state(module.get_extra_state())
    module.load_state_dict(module.state_dict(), strict=True)
    module.set_extra_state(None)


def test_loading_into_a_module_that_ran(emulated):
    made = RECIPES["delayed"]()
    module = te.BatchedMatmul()
    train(module, made, BATCHES[:3])
    state, saved = module.state_dict(), delayed_state(module)
    expected = train(module, made, BATCHES[3:5])
    FP8GlobalStateManager.reset()
    other = te.BatchedMatmul()
    train(other, made, BATCHES[5:])
    other.load_state_dict(state, strict=True)
    assert_same_state(saved, delayed_state(other))
    assert_same_trace(expected, train(other, made, BATCHES[3:5]))


def test_a_checkpoint_survives_inference(emulated):
    """Forward without gradients leaves the scales alone."""
    made, module = RECIPES["delayed"](), te.BatchedMatmul()
    train(module, made, BATCHES[:2])
    before = delayed_state(module)
    with torch.no_grad(), quantized(made):
        module(BATCHES[3].a, BATCHES[3].b)
    after = delayed_state(module)
    assert torch.equal(before["scale_fwd"], after["scale_fwd"])
    assert torch.equal(before["amax_history_fwd"][1:], after["amax_history_fwd"][1:])


@pytest.mark.parametrize("lengths", ((3, 5), (5, 2), (4, 1), (1, 4)))
def test_amax_history_length_changes(lengths, emulated):
    """Longer keeps all amaxes, shorter the first rows; forward and backward keep their own."""
    short, long = (DelayedScaling(amax_history_len=length, margin=1) for length in lengths)
    module = te.BatchedMatmul()
    train(module, short, BATCHES[:3])
    before = delayed_state(module)
    module.adjust_amax_history_length(lengths[1])
    after = delayed_state(module)
    rows = min(lengths)
    for name, columns in (("fwd", 3), ("bwd", 2)):
        history = after[f"amax_history_{name}"]
        assert history.shape == (lengths[1], columns)
        assert torch.equal(history[:rows], before[f"amax_history_{name}"][:rows])
        assert torch.equal(after[f"scale_{name}"], before[f"scale_{name}"])
    assert [quantizer.amax.data_ptr() for quantizer in module.quantizers["scaling_fwd"]] == [
        module.fp8_meta["scaling_fwd"].amax_history[0, i].data_ptr() for i in range(3)
    ]
    # And by a recipe of another length, in training: new amaxes come in, the scales follow.
    for data in BATCHES[3:]:
        with quantized(long):
            out = module(data.a, data.b)
        out.backward(data.grad_output)
    state = delayed_state(module)
    count = min(lengths[1] - 1, 5)  # rows behind the first, which is for the step to come
    seen = {
        "fwd": [
            [data.a.detach().abs().max(), data.b.detach().abs().max(), 0.0] for data in BATCHES
        ],
        "bwd": [[data.grad_output.abs().max(), 0.0] for data in BATCHES],
    }
    for name, amaxes in seen.items():
        history = state[f"amax_history_{name}"]
        assert history.shape == (lengths[1], len(amaxes[0]))
        if count:
            # Each step turns the history by a row: the newest amax is the last.
            assert torch.equal(history[-count:], torch.tensor(amaxes[-count:])), name
    recent = torch.tensor(seen["fwd"][-lengths[1] :])[:, :2].max(0).values
    torch.testing.assert_close(state["scale_fwd"][:2], 448.0 / 2 / recent, rtol=2e-7, atol=0.0)
    recent = torch.tensor(seen["bwd"][-lengths[1] :])[:, :1].max(0).values
    torch.testing.assert_close(state["scale_bwd"][:1], 57344.0 / 2 / recent, rtol=2e-7, atol=0.0)


@pytest.mark.parametrize("lengths", ((3, 6), (6, 3)))
@pytest.mark.parametrize("ran", (False, True))
def test_checkpoint_across_history_lengths(lengths, ran, emulated):
    """Loading takes over the length of the checkpoint; the recipe of the next step changes it."""
    saved, wanted = (DelayedScaling(amax_history_len=length, margin=1) for length in lengths)
    module = te.BatchedMatmul()
    train(module, saved, BATCHES[:4])
    state = module.state_dict()
    expected = train(module, wanted, BATCHES[4:])
    FP8GlobalStateManager.reset()
    other = te.BatchedMatmul()
    if ran:
        train(other, wanted, BATCHES[:1])
    other.load_state_dict(state, strict=True)
    found = train(other, wanted, BATCHES[4:])
    assert_same_trace(expected, found)
    assert found.states[-1]["amax_history_fwd"].shape[0] == lengths[1]


def test_history_length_change_is_that_of_a_fresh_module(emulated):
    """After as many steps as the history is long, nothing is left of the other length."""
    module = te.BatchedMatmul()
    train(module, DelayedScaling(amax_history_len=6, margin=1), BATCHES[:4])
    wanted = DelayedScaling(amax_history_len=2, margin=1)
    found = train(module, wanted, BATCHES[4:])
    FP8GlobalStateManager.reset()
    expected = train(te.BatchedMatmul(), wanted, BATCHES[4:])
    assert_same_state(expected.states[-1], found.states[-1])
    for x, y in zip(expected.steps[-1], found.steps[-1]):
        assert torch.equal(x, y)


# --- recipes that change ------------------------------------------------------------------------------


def test_recipe_changes_between_steps(emulated):
    module = te.BatchedMatmul()
    for names in (
        ("none", "delayed"),
        ("current", "mxfp8"),
        ("delayed", "none"),
        ("mxfp8", "delayed"),
    ):
        for name in names:
            data = make_data(CASE, seed=1)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Recipe type changed")
                for _ in range(2):
                    step = run_step(module, data, RECIPES[name]())
            assert_step_accurate(step, data, name)


def test_recipe_type_change_warns(emulated):
    module = te.BatchedMatmul()
    run_step(module, BATCHES[0], Float8CurrentScaling())
    with pytest.warns(UserWarning, match="Recipe type changed from Float8CurrentScaling to MXFP8"):
        run_step(module, BATCHES[0], MXFP8BlockScaling())


@pytest.mark.parametrize("recipe", (Float8CurrentScaling,))
def test_format_changes_between_steps(recipe, emulated):
    """HYBRID, then E4M3 in both directions: gradients get the 4 dB that E4M3 has over E5M2."""
    module, data = te.BatchedMatmul(), make_data(CASES["plain"])
    for _ in range(2):
        run_step(module, data, recipe(fp8_format=Format.HYBRID))
    for _ in range(2):
        step = run_step(module, data, recipe(fp8_format=Format.E4M3))
    assert_step_accurate(step, data, "mxfp8")


def test_format_of_delayed_scaling_does_not_change(emulated):
    """Scales for E5M2's range would saturate E4M3."""
    module, data = te.BatchedMatmul(), make_data(CASES["plain"])
    run_step(module, data, DelayedScaling(fp8_format=Format.HYBRID))
    with pytest.raises(teb.UnsupportedError, match="fp8_format of DelayedScaling changed to E4M3"):
        run_step(module, data, DelayedScaling(fp8_format=Format.E4M3))


def test_calibration(emulated):
    """Amaxes are recorded while the product stays in high precision."""
    made, module, data = RECIPES["delayed"](), te.BatchedMatmul(), BATCHES[0]
    plain = run_step(te.BatchedMatmul(), data)
    with te.autocast(enabled=False, calibrating=True, recipe=made):
        out = module(data.a, data.b)
    assert torch.equal(out, plain.out)
    out.backward(data.grad_output)
    assert torch.equal(data.a.grad, plain.grad_a)
    data.a.grad = data.b.grad = None
    amaxes = module.fp8_meta["scaling_fwd"].amax_history[0]
    assert torch.equal(amaxes[:2], torch.stack([x.detach().abs().max() for x in data[:2]]))
    assert module.get_extra_state().numel() > 0
    restored = te.BatchedMatmul()
    restored.load_state_dict(module.state_dict())
    assert torch.equal(restored.fp8_meta["scaling_fwd"].amax_history[0], amaxes)
    # What was recorded counts at the end of the first quantized region.
    run_step(module, make_data(CASE, seed=3), made)
    scale = delayed_state(module)["scale_fwd"]
    assert (
        scale[:2] <= 448.0 / 2 / amaxes.new_tensor([x.detach().abs().max() for x in data[:2]])
    ).all()


def test_margin_and_algorithm_are_the_recipe_s(emulated):
    recipe = DelayedScaling(amax_history_len=4, amax_compute_algo="most_recent", margin=2)
    module = te.BatchedMatmul()
    for data in BATCHES[:3]:
        run_step(module, data, recipe)
        amaxes = torch.stack([x.detach().abs().max() for x in data[:2]])
        found = delayed_state(module)["scale_fwd"][:2]
        torch.testing.assert_close(found, 448.0 / 4 / amaxes, rtol=2e-7, atol=0.0)


# --- CustomRecipe -------------------------------------------------------------------------------------


def make_custom(seen):
    """Current scaling by role: E5M2 for gradients."""

    def qfactory(role):
        seen.append(role)
        dtype = (
            te.DType.kFloat8E5M2 if role.tensor_type.startswith("grad") else te.DType.kFloat8E4M3
        )
        return te.Float8CurrentScalingQuantizer(dtype, device=torch.device("cpu"))

    return CustomRecipe(qfactory=qfactory)


def test_custom_recipe_sees_roles(emulated):
    seen = []
    module = te.BatchedMatmul(name="triangle")
    data = make_data(CASES["plain"])
    step = run_step(module, data, make_custom(seen))
    assert [role.tensor_type for role in seen] == ["a", "b", "output", "grad_output", "grad_a"]
    assert {role.name for role in seen} == {"triangle"}
    assert {role.module_type for role in seen} == {"batched_matmul"}
    assert_step_accurate(step, data, "current")
    expected = run_step(te.BatchedMatmul(), data, Float8CurrentScaling())
    for x, y in zip(expected, step):
        assert torch.equal(x, y)


def test_boundary_roles_can_be_set(emulated):
    seen = []
    module, recipe = te.BatchedMatmul(), make_custom(seen)
    role = type(module.get_quantizer_roles(fwd=True, num_quantizers=3)[0])
    run_step(module, BATCHES[0], recipe)
    seen.clear()
    module.output_quantizer_role = role(module_type="linear", tensor_type="input", name="next")
    module.grad_input_quantizer_role = role(
        module_type="linear", tensor_type="grad_output", name="back"
    )
    assert module.get_quantizer_roles(fwd=True, num_quantizers=3)[2].name == "next"
    assert module.get_quantizer_roles(fwd=False, num_quantizers=2)[1].name == "back"


def test_custom_recipe_with_delayed_scaling(emulated):
    """Slots that ask for delayed scaling are updated as under DelayedScaling."""

    def qfactory(role):  # pylint: disable=unused-argument
        return DelayedScalingRequest(amax_history_len=3, margin=1)

    custom = CustomRecipe(qfactory=qfactory)
    module = te.BatchedMatmul()
    found, states = [], []
    for data in BATCHES[:4]:
        found.append(run_step(module, data, custom))
        states.append(delayed_state(module))
    FP8GlobalStateManager.reset()
    expected = train(te.BatchedMatmul(), RECIPES["delayed"](), BATCHES[:4])
    assert_same_trace(expected, type(expected)(found, states))


def test_scales_are_the_recipe_s_at_the_time(emulated):
    """Reset brings scales and histories back to the start."""
    made, module = RECIPES["delayed"](), te.BatchedMatmul()
    expected = train(module, made, BATCHES[:3])
    module.reset_fp8_meta_tensors()
    assert (delayed_state(module)["scale_fwd"] == 1).all()
    assert_same_trace(expected, train(module, made, BATCHES[:3]))


# --- the rest of an nn.Module --------------------------------------------------------------------------


def test_repr_names_it():
    assert "BatchedMatmul" in repr(te.BatchedMatmul(name="tri")) and "'tri'" in repr(
        te.BatchedMatmul("tri")
    )
    assert "BatchedMatmul" in repr(torch.nn.Sequential(te.BatchedMatmul()))


def test_it_has_no_parameters():
    module = te.BatchedMatmul()
    assert not list(module.parameters()) and not list(module.buffers())
    assert isinstance(module, te.module.base.TransformerEngineBaseModule)
    assert te.BatchedMatmul is teb.BatchedMatmul


@pytest.mark.parametrize("recipe", QUANTIZED)
@pytest.mark.parametrize(
    "move",
    (
        lambda m: m.to("cpu"), lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float(),
        lambda m: m.cpu(), lambda m: m.eval(), lambda m: m.train(), lambda m: m.requires_grad_(False),
    ),
)  # fmt: skip
def test_moves_and_modes_change_nothing(move, recipe, emulated):
    made = RECIPES[recipe]()
    expected = train(te.BatchedMatmul(), made, BATCHES[:4])
    FP8GlobalStateManager.reset()
    module = te.BatchedMatmul()
    first = train(module, made, BATCHES[:2])
    assert move(module) is module
    rest = train(module, made, BATCHES[2:4])
    assert_same_trace(expected, type(first)(first.steps + rest.steps, first.states + rest.states))


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_backward_outside_of_emulation(recipe):
    """Backward ends as forward began, the update of scales included."""
    made = RECIPES[recipe]()
    with teb.emulate():
        expected = train(te.BatchedMatmul(), made, BATCHES[:2])
    FP8GlobalStateManager.reset()
    module = te.BatchedMatmul()
    for data, step in zip(BATCHES, expected.steps):
        with teb.emulate(), quantized(made):
            out = module(data.a, data.b)
        grads = torch.autograd.grad(out, data[:2], data.grad_output)
        for x, y in zip((out, *grads), step):
            assert torch.equal(x, y)
    if recipe == "delayed":
        assert_same_state(expected.states[-1], delayed_state(module))


def test_emulation_leaves_the_environment_alone(monkeypatch):
    import os

    for value in (None, "0", "1"):
        if value is None:
            monkeypatch.delenv("NVTE_UNFUSED_FP8_UPDATE", raising=False)
        else:
            monkeypatch.setenv("NVTE_UNFUSED_FP8_UPDATE", value)
        with teb.emulate():
            with teb.emulate():
                pass
            train(te.BatchedMatmul(), RECIPES["delayed"](), BATCHES[:1])
        assert os.environ.get("NVTE_UNFUSED_FP8_UPDATE") == value


def test_support_checks_of_te_are_restored():
    from transformer_engine.pytorch import quantization

    names = ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT")
    before = [getattr(quantization, name) for name in names]
    with pytest.raises(KeyError):
        with teb.emulate():
            assert te.is_mxfp8_available()
            raise KeyError
    assert [getattr(quantization, name) for name in names] == before


def test_an_error_in_forward_leaves_the_module_usable(emulated):
    made, module = RECIPES["delayed"](), te.BatchedMatmul()
    with pytest.raises(ValueError, match="contracted sizes differ"):
        with quantized(made):
            module(torch.ones(2, 16, 32), torch.ones(2, 16, 32))
    step = run_step(module, BATCHES[0], made)
    assert step.out.shape == exact_step(BATCHES[0]).out.shape


def test_many_modules_of_one_model(emulated):
    """Each has scales of its own."""
    made = RECIPES["delayed"]()
    modules = [te.BatchedMatmul() for _ in range(3)]
    datas = [make_data(CASES["plain"], seed=1)._replace() for _ in modules]
    datas = [
        type(data)((data.a.detach() * 2.0**i).requires_grad_(), data.b, data.grad_output)
        for i, data in enumerate(datas)
    ]
    with quantized(made):
        outs = [module(data.a, data.b) for module, data in zip(modules, datas)]
    sum(outs).sum().backward()
    scales = torch.stack([delayed_state(module)["scale_fwd"] for module in modules])
    assert torch.equal(scales[:, 0] * torch.tensor([1.0, 2.0, 4.0]), scales[0, 0].expand(3))
    assert torch.equal(scales[:, 1], scales[0, 1].expand(3))
