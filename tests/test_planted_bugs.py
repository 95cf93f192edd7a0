# SPDX-License-Identifier: Apache-2.0
"""The gates of the other tests, shown to bite: each bug is planted, and the assertion must fail.

The bugs are those that other projects shipped (a lost scale, items mixed up, a dropped tile, flattened
scale tiles) and that a cosine or `allclose` on small numbers lets through. Needs no GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import (
    assert_accurate,
    dequantize,
    make_operand,
    make_quantizer,
    make_sides,
    random_values,
    sqnr_per_item,
)
from test_fuzz import Case, run_case
from test_plan_values import check_plan_computes_the_product, make_matrix, make_problem

import test_plan_values
import transformer_engine_batched as teb
from transformer_engine_batched import block_scales
from transformer_engine_batched import launch as launch_module
from transformer_engine_batched.reference.product import ReferencePlan

pytestmark = pytest.mark.usefixtures("emulated", "fresh_launches")

# Slack of the FP32 bound against an exact engine: far less error than any bug below is caught.
FP32 = torch.float32


@pytest.fixture
def plant(monkeypatch):
    """Puts a changed engine in the place of the reference engine."""

    def plant_engine(change_problem=None, change_result=None):
        class Faulty(ReferencePlan):
            def __init__(self, problem):
                super().__init__(change_problem(problem) if change_problem else problem)

            def run(self, a, b, d, *args, **options):
                super().run(a, b, d, *args, **options)
                if change_result:
                    change_result(d)

        monkeypatch.setitem(launch_module._PLANS, "reference", Faulty)

    return plant_engine


def product(recipe="float8_current", batch=(64,), m=32, n=32, k=128, layout="TN", **options):
    sides = make_sides(recipe, layout, m=m, n=n, k=k, batch_a=batch)
    out = teb.batched_general_gemm(
        sides.a.tensor, sides.b.tensor, layout=layout, **{"out_dtype": FP32, **options}
    )
    return out, sides.expected


def assert_gate_bites(result, expected):
    with pytest.raises(AssertionError, match="dB, expected"):
        assert_accurate(result, expected)


def zero_one_item(d):
    d[17] = 0


def swap_two_items(d):
    d[[5, 6]] = d[[6, 5]]


def scale_by_two(d):
    d.mul_(2)


def scale_by_a_hundredth(d):
    d.mul_(1.01)


def transpose_items(d):
    d.copy_(d.mT.clone())


def drop_a_row(d):
    d[3, -1] = d[3, -2]


def negate_one_column(d):
    d[:, :, 7].neg_()


def keep_only_bf16(d):
    d.copy_(d.bfloat16())


def one_nan(d):
    d[63, 31, 31] = torch.nan


RESULT_BUGS = (
    zero_one_item,
    swap_two_items,
    scale_by_two,
    scale_by_a_hundredth,
    transpose_items,
    drop_a_row,
    negate_one_column,
    keep_only_bf16,
    one_nan,
)


def drop_last_tile_of_k(problem):
    return replace(problem, k=problem.k - 16)


def forget_batch_stride_of_a(problem):
    return replace(problem, a=replace(problem.a, batch_stride=0))


def halve_batch_stride_of_b(problem):
    return replace(problem, b=replace(problem.b, batch_stride=problem.b.batch_stride // 2))


def wrong_leading_dimension(problem):
    return replace(problem, a=replace(problem.a, ld=problem.a.ld - 16))


def forget_the_transposition(problem):
    return replace(problem, b=replace(problem.b, transposed=not problem.b.transposed))


def swap_fp8_types(problem):
    return replace(problem, a=replace(problem.a, dtype="e5m2"))


PROBLEM_BUGS = (
    drop_last_tile_of_k,
    forget_batch_stride_of_a,
    halve_batch_stride_of_b,
    wrong_leading_dimension,
    swap_fp8_types,
)


def test_without_a_bug_the_gate_is_open(plant):
    plant()
    for recipe in ("bf16", "float8_current", "mxfp8"):
        assert_accurate(*product(recipe))


@pytest.mark.parametrize("bug", RESULT_BUGS, ids=lambda bug: bug.__name__)
def test_wrong_results_are_caught(plant, bug):
    plant(change_result=bug)
    assert_gate_bites(*product())


@pytest.mark.parametrize("bug", [bug for bug in RESULT_BUGS if bug is not keep_only_bf16])
def test_wrong_results_are_caught_in_bf16(plant, bug):
    plant(change_result=bug)
    assert_gate_bites(*product(out_dtype=torch.bfloat16))


@pytest.mark.parametrize("bug", PROBLEM_BUGS, ids=lambda bug: bug.__name__)
def test_wrong_problems_are_caught(plant, bug):
    plant(change_problem=bug)
    assert_gate_bites(*product())


def test_forgotten_transposition_is_caught(plant):
    plant(change_problem=forget_the_transposition)
    assert_gate_bites(*product("bf16", m=32, n=32, k=32))


def test_lost_scale_is_caught(monkeypatch):
    monkeypatch.setattr(launch_module, "aligned_scalar", torch.ones_like)
    assert_gate_bites(*product())


def test_bias_of_the_first_item_for_all_is_caught(plant):
    plant(change_problem=lambda problem: replace(problem, bias_batch_stride=0))
    bias = random_values((64, 32), 3).bfloat16()
    out, expected = product("float8_current", bias=bias)
    assert_gate_bites(out, expected + bias.double()[:, None])


def test_forgotten_padding_is_caught(monkeypatch):
    # Whatever was in the memory of a packed copy takes part in the product.
    zero = torch.Tensor.zero_
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: self)
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *args, **options: new_empty(self, *args, **options).fill_(0x70),  # 128 in E4M3
    )
    out, expected = product(k=120)
    monkeypatch.setattr(torch.Tensor, "zero_", zero)
    assert_gate_bites(out, expected)


# --- block scales -----------------------------------------------------------------------------------------


def off_by_one(packed, **_):
    return torch.where(packed < 254, packed + 1, packed)


def of_the_next_item(packed, **_):
    return packed.roll(1, 0)


def not_in_tiles(packed, *, outer, inner):
    items = block_scales.unpack_tiles(packed, outer, inner)
    padded = torch.nn.functional.pad(items, (0, -inner % 4, 0, -outer % 128))
    return padded.flatten(1)


def over_flattened_rows(packed, *, outer, inner):
    """TE's own tiling of the flattened matrix, cut into items: what a naive caller passes on."""
    items = block_scales.unpack_tiles(packed, outer, inner)
    flat = block_scales.pack_tiles(items.reshape(1, -1, inner)).flatten()
    return torch.nn.functional.pad(flat, (0, packed.numel() - flat.numel())).view(packed.shape)


SCALE_BUGS = (off_by_one, of_the_next_item, not_in_tiles, over_flattened_rows)


@pytest.mark.parametrize("bug", SCALE_BUGS, ids=lambda bug: bug.__name__)
@pytest.mark.parametrize("rows", (96, 160))
def test_wrong_block_scales_are_caught(monkeypatch, bug, rows):
    def faulty(scales, *, rows, cols, columnwise, **options):
        packed = block_scales.item_scales(
            scales, rows=rows, cols=cols, columnwise=columnwise, **options
        )
        outer, inner = (cols, rows // 32) if columnwise else (rows, cols // 32)
        return bug(packed, outer=outer, inner=inner)

    monkeypatch.setattr(launch_module, "item_scales", faulty)
    # Blocks of very different magnitudes, so that every scale has a value of its own.
    values = random_values((4, rows, 160), 0) * torch.exp2(random_values((4, rows, 160), 1) * 4)
    a = make_operand("mxfp8", values.shape, last_dim=True, seed=0, values=values)
    out = teb.batched_general_gemm(a.tensor, a.tensor, out_dtype=FP32)
    assert_gate_bites(out, a.exact @ a.exact.mT)


def test_launches_that_all_read_the_first_scales_are_caught(monkeypatch):
    # Several launches of one product, as if block scales had offsets like codes.
    monkeypatch.setattr(launch_module, "has_single_stride", lambda *_: True)
    sides = make_sides("mxfp8", "TN", m=32, n=64, k=32, batch_a=(2, 3))
    out = torch.empty(3, 2, 32, 64).transpose(0, 1)
    teb.batched_general_gemm(sides.a.tensor, sides.b.tensor, out=out)
    assert_gate_bites(out, sides.expected)


# --- codes of an FP8 output -------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", ("scale", "inverse"))
def test_wrong_output_scale_is_caught(monkeypatch, bug):
    quantizer = make_quantizer("float8_delayed", scale=12.0)
    out, expected = product(out_dtype=None, quantization_params=quantizer)
    assert_accurate(dequantize(out), expected, 27.0)
    out._scale_inv = out._scale_inv * 2 if bug == "scale" else quantizer.scale.clone()
    with pytest.raises(AssertionError, match="dB"):
        assert_accurate(dequantize(out), expected, 27.0)


# --- the plan's descriptors -------------------------------------------------------------------------------


def swap_operands(plan):
    for name in ("rows", "cols", "ld", "batch_stride"):
        a, b = f"lt_a.{name}", f"lt_b.{name}"
        plan[a], plan[b] = plan[b], plan[a]
    plan["trans_a"], plan["trans_b"] = plan["trans_b"], plan["trans_a"]


def change(name, function):
    def bug(plan):
        plan[name] = function(plan[name])

    bug.__name__ = name
    return bug


PLAN_BUGS = (
    swap_operands,
    change("trans_a", lambda op: 1 - op),
    change("trans_b", lambda op: 1 - op),
    change("lt_a.ld", lambda ld: ld - 1),
    change("lt_b.ld", lambda ld: ld - 1),
    change("lt_d.ld", lambda ld: ld + 1),
    change("lt_a.batch_stride", lambda stride: stride - 1),
    change("lt_b.batch_stride", lambda stride: 0),
    change("lt_d.batch_stride", lambda stride: stride - 1),
    change("lt_a.rows", lambda rows: rows - 1),
    change("lt_d.batch_count", lambda count: count - 1),
)


@pytest.mark.parametrize("bug", PLAN_BUGS, ids=lambda bug: bug.__name__)
def test_wrong_descriptors_are_caught(monkeypatch, bug):
    real = test_plan_values.read_back

    def faulty(problem):
        plan = real(problem)
        bug(plan)
        return plan

    # Square, so that no shape gives a swapped operand away.
    problem = make_problem(
        6,
        6,
        6,
        a=make_matrix("bf16", 6, 6, gap=3, skip=2),
        b=make_matrix("bf16", 6, 6, transposed=True, gap=1, skip=5),
        d=make_matrix("bf16", 6, 6, gap=2, skip=4),
    )
    check_plan_computes_the_product(problem)
    monkeypatch.setattr(test_plan_values, "read_back", faulty)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        check_plan_computes_the_product(problem)


# --- the fuzz test ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bug",
    (
        lambda d: d.mul_(2),
        lambda d: d[..., 0].neg_(),
        lambda d: d.copy_(d.flip(-2)),
        lambda d: d[..., 0, 0].add_(0.25),
    ),
    ids=("scaled", "column negated", "rows reversed", "one element off"),
)
def test_fuzz_catches(plant, bug):
    plant(change_result=bug)
    caught = 0
    for seed in range(20):
        try:
            run_case(Case.from_seed(seed))
        except AssertionError:
            caught += 1
    assert caught >= 5


# --- the measure ------------------------------------------------------------------------------------------


def test_measures_of_others_let_these_through(plant):
    plant(change_result=zero_one_item)
    out, expected = product()
    cosine = torch.nn.functional.cosine_similarity(
        out.double().flatten(), expected.flatten(), dim=0
    )
    assert cosine > 0.99
    assert_gate_bites(out, expected)


def test_sqnr_is_its_formula():
    expected = torch.ones(3, 2, 2, dtype=torch.float64)
    result = expected.clone()
    result[0, 0, 0] += 0.2  # |signal|^2 = 4, |noise|^2 = 0.04: 20 dB
    result[2] *= 1.1  # 4 / 0.04
    ratios = sqnr_per_item(result, expected)
    torch.testing.assert_close(ratios[[0, 2]], torch.full((2,), 20.0, dtype=torch.float64))
    assert ratios[1] == torch.inf


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_sqnr_of_what_is_not_finite(value):
    expected = torch.ones(2, 2, 2, dtype=torch.float64)
    result = expected.clone()
    result[1, 0, 0] = value
    assert sqnr_per_item(result, expected).tolist() == [torch.inf, -torch.inf]
    with pytest.raises(AssertionError):
        assert_accurate(result, expected, 0.0)


def test_sqnr_of_zero_items():
    expected = torch.zeros(2, 2, 2, dtype=torch.float64)
    result = expected.clone()
    result[1, 0, 0] = 1e-30
    assert sqnr_per_item(result, expected).tolist() == [torch.inf, -torch.inf]


def test_gate_wants_equal_shapes_and_a_finite_expectation():
    expected = torch.ones(2, 2, 2, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_accurate(torch.ones(2, 2, 1), expected)
    with pytest.raises(AssertionError):
        assert_accurate(torch.ones(2, 2, 2), expected * torch.nan)
    with pytest.raises(AssertionError):
        assert_accurate(torch.ones(2, 2, 2), expected.float())
