# SPDX-License-Identifier: Apache-2.0
"""Parsing of einsum equations, against torch.einsum on random equations."""

from __future__ import annotations

import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_engine_batched.equation import check_equation, parse_equation, plan_contraction


def contract(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What a plan says, with torch.matmul for the product."""
    plan = plan_contraction(equation, a.shape, b.shape, a.stride(), b.stride())
    a = a.permute(plan.a_dims).expand(plan.a_shape).reshape(plan.a_matrix)
    b = b.permute(plan.b_dims).expand(plan.b_shape).reshape(plan.b_matrix)
    out = torch.matmul(a, b).reshape(plan.product_shape).permute(plan.output_dims)
    assert tuple(out.shape) == plan.output_shape
    return out


def random_integers(shape, seed: int) -> torch.Tensor:
    """Their sums of products are exact in FP64, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, tuple(shape), generator=generator).double()


@st.composite
def cases(draw):
    """(equation, shape of a, shape of b)."""
    letters = draw(st.permutations(string.ascii_letters))[:6]
    parts = {
        letter: draw(st.sampled_from(("batch", "row", "col", "contracted"))) for letter in letters
    }
    letters = letters[: draw(st.integers(0, 6))]
    sizes = {letter: draw(st.integers(1, 3)) for letter in letters}

    def shuffled(*wanted: str) -> list[str]:
        return draw(st.permutations([x for x in letters if parts[x] in wanted]))

    texts, shapes = [], []
    dots = draw(st.sampled_from(("none", "both", "a", "b")))
    ellipsis = [draw(st.integers(1, 2)) for _ in range(draw(st.integers(0, 2)))]
    for name, own in (("a", "row"), ("b", "col")):
        mine = shuffled("batch", "contracted", own)
        # Any operand may repeat a dim that both have.
        shape = [1 if parts[x] != own and draw(st.integers(0, 5)) == 0 else sizes[x] for x in mine]
        if dots in ("both", name):
            place = draw(st.integers(0, len(mine)))
            count = draw(st.integers(0, len(ellipsis))) if dots == "both" else len(ellipsis)
            shape[place:place] = ellipsis[len(ellipsis) - count :]
            mine = [*mine[:place], "...", *mine[place:]]
        texts.append("".join(mine))
        shapes.append(tuple(shape))
    equation = ",".join(texts)
    once = {x for x in letters if parts[x] in ("row", "col")}
    if {x for x in letters if parts[x] != "contracted"} == once and draw(st.booleans()):
        return equation, *shapes
    output = shuffled("batch", "row", "col")
    if dots != "none":
        place = draw(st.integers(0, len(output)))
        output = [*output[:place], "...", *output[place:]]
    equation += "->" + "".join(output)
    spaces = draw(st.lists(st.integers(0, len(equation)), max_size=3))
    for place in sorted(spaces, reverse=True):
        # Not inside an arrow or an ellipsis, where torch takes none.
        if equation[place - 1 : place] not in ("-", "."):
            equation = equation[:place] + " " + equation[place:]
    return equation, *shapes


@settings(max_examples=300, deadline=None)
@given(cases(), st.integers(0, 1000))
def test_random_equations_are_those_of_torch(case, seed):
    equation, a_shape, b_shape = case
    a, b = random_integers(a_shape, seed), random_integers(b_shape, seed + 1)
    assert torch.equal(contract(equation, a, b), torch.einsum(equation, a, b))


@pytest.mark.parametrize(
    "equation, a_shape, b_shape",
    (
        ("bikd,bjkd->bijd", (2, 3, 5, 4), (2, 6, 5, 4)),
        ("bkid,bkjd->bijd", (2, 5, 3, 4), (2, 5, 6, 4)),
        ("kjd,kid->ijd", (5, 3, 4), (5, 6, 4)),
        ("...ikd,...jkd->...ijd", (2, 3, 5, 4), (6, 5, 4)),
        ("bhqd,bhkd->bhqk", (2, 3, 5, 4), (2, 3, 6, 4)),
        ("ab...,...cb->ca...", (2, 3, 2, 2), (2, 2, 4, 3)),
        ("ij,jk", (2, 3), (3, 4)),
        ("ba,Ac", (2, 3), (4, 5)),
        ("...,...", (2, 3), (3,)),
        ("i,j->ij", (4,), (5,)),
        ("i,i->", (4,), (4,)),
        ("i,i->i", (4,), (4,)),
        (",->", (), ()),
        ("ij,jk->ik", (3, 1), (4, 5)),
        ("ij,jk->ik", (3, 0), (0, 5)),
        ("...ij,...jk->ik", (2, 3, 4), (2, 4, 5)),
        ("a1b,bc->ac".replace("1", ""), (2, 3), (3, 4)),
    ),
)
def test_equations(equation, a_shape, b_shape):
    a, b = random_integers(a_shape, 0), random_integers(b_shape, 1)
    assert torch.equal(contract(equation, a, b), torch.einsum(equation, a, b))


def test_parts_of_the_triangle_update():
    for equation, a_dims in (("bikd,bjkd->bijd", (0, 3, 1, 2)), ("bkid,bkjd->bijd", (0, 3, 2, 1))):
        parsed = parse_equation(equation, 4, 4)
        assert (parsed.batch, parsed.rows, parsed.cols, parsed.contracted) == (
            ("b", "d"), ("i",), ("j",), ("k",)
        )  # fmt: skip
        assert plan_contraction(equation, (1, 4, 4, 3), (1, 4, 4, 3)).a_dims == a_dims


def test_merged_dims_are_views():
    """Indices of one part are taken in the order in which they lie in memory."""
    a, b = torch.empty(5, 4, 3, 2).permute(2, 0, 3, 1), torch.empty(7, 2, 6, 4).permute(0, 3, 1, 2)
    plan = plan_contraction("xyki,mikn->xymn", a.shape, b.shape, a.stride(), b.stride())
    left = a.permute(plan.a_dims).reshape(plan.a_matrix)
    assert plan.a_matrix == (15, 8) and plan.output_shape == (3, 5, 7, 6)
    assert left.shape == (15, 8)
    a = torch.empty(6, 5, 8)
    plan = plan_contraction("yxk,kn->xyn", a.shape, (8, 3), a.stride(), (3, 1))
    assert a.permute(plan.a_dims).reshape(plan.a_matrix).data_ptr() == a.data_ptr()


@pytest.mark.parametrize(
    "equation, shapes, match",
    (
        ("ij,jk,kl->il", ((2, 3), (3, 4)), "has 3 operands: expected two"),
        ("ij->ij", ((2, 3), (3, 4)), "has 1 operand: expected two"),
        ("iij,jk->ik", ((2, 2, 3), (3, 4)), "index 'i' occurs 2 times in operand a.*diagonal"),
        ("ij,jkk->ik", ((2, 3), (3, 4, 4)), "index 'k' occurs 2 times in operand b"),
        ("ijl,jk->ik", ((2, 3, 5), (3, 4)), r"index 'l' of operand a is summed over alone.*a\.sum"),
        ("ij,jkl->ik", ((2, 3), (3, 4, 5)), r"index 'l' of operand b is summed over alone.*b\.sum"),
        ("...ij,jk->ik", ((7, 2, 3), (3, 4)), "index of the ellipsis of operand a is summed over alone"),
        ("ij,jk->ikl", ((2, 3), (3, 4)), "index 'l' of the output is in no operand"),
        ("ij,jk->iki", ((2, 3), (3, 4)), "index 'i' occurs 2 times in the output"),
        ("ij,jk->ik", ((2, 3), (4, 5)), r"index 'j' has size 3 in operand a \[2, 3\] and 4 in operand b \[4, 5\]"),
        ("ij,jk->ik", ((2, 3, 4), (4, 5)), "operand a has 3 dims and 'ij' names 2"),
        ("...ijk,jk->i", ((2, 3), (4, 5)), "operand a has 2 dims and '...ijk' names 3 besides the ellipsis"),
        ("i.j,jk->ik", ((2, 3), (3, 4)), "'.' is no index"),
        ("......ij,jk->ik", ((2, 3), (3, 4)), "'.' is no index"),
        ("i1,1k->ik", ((2, 3), (3, 4)), "'1' is no index"),
        ("ij,jk->ik->ik", ((2, 3), (3, 4)), "'-' is no index"),
    ),
)  # fmt: skip
def test_refusals(equation, shapes, match):
    with pytest.raises(ValueError, match=match):
        plan_contraction(equation, *shapes)


def test_equations_are_checked_without_operands():
    for equation in ("bikd,bjkd->bijd", "...ij,...jk->ik", "i,j", ","):
        check_equation(equation)
    with pytest.raises(ValueError, match="index 'i' occurs 2 times in operand a"):
        check_equation("ii,ij->j")
    with pytest.raises(TypeError, match="expected a str, got int"):
        check_equation(5)
