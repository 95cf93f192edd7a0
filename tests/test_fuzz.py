# SPDX-License-Identifier: Apache-2.0
"""Random products on a grid where every format is exact, compared bit for bit.

A case follows from its seed alone. Values are multiples of a half with three significant bits, the largest
always there, so that all scales are powers of two, all codes exact and all sums exact in FP32: whatever
differs is a fault of layout, not of rounding. More cases: ``pytest tests/test_fuzz.py --fuzz-cases 5000``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from math import prod

import pytest
import torch
from accuracy import (
    HIGH_PRECISION,
    LAYOUTS,
    RECIPES,
    Operand,
    contracts_last_dim,
    exact_product,
    make_operand,
    operand_shape,
)

import transformer_engine_batched as teb
from transformer_engine_batched.support import check_fp8_pair

# 3.5 is 448 / 2^7 and 57344 / 2^14: scales of current scaling become powers of two.
_LARGEST = 3.5
_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, _LARGEST)
_SIZES = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65)
_BLOCK_SIZES = (32, 64, 96, 160)
_VIEWS = (
    "contiguous",
    "transposed",
    "sliced",
    "interleaved",
    "expanded",
    "strided",
    "batch reversed",
)


@dataclass(frozen=True)
class Case:
    """What one seed stands for."""

    seed: int
    recipe: str
    layout: str
    batch_a: tuple[int, ...]
    batch_b: tuple[int, ...]
    m: int
    n: int
    k: int
    fp8: tuple[str, str]
    views: tuple[str, str]
    swizzled: bool
    internal: bool
    out_dtype: str
    out_view: str
    alpha: float
    beta: float
    accumulate: bool
    bias: str
    use_split_accumulator: bool

    @classmethod
    def from_seed(cls, seed: int) -> "Case":
        """Draws a case."""
        draw = random.Random(seed)
        recipe, layout = draw.choice(RECIPES), draw.choice(LAYOUTS)
        batch = tuple(draw.choice((1, 2, 3, 3)) for _ in range(draw.choice((0, 1, 2, 2, 3))))
        sizes = [draw.choice(_SIZES) for _ in range(3)]
        if recipe == "mxfp8":
            sizes = [draw.choice(_BLOCK_SIZES) for _ in range(3)]
            if layout == "TN" and draw.random() < 0.4:
                # TE wants whole blocks of the flattened rows only: items of any size, if there are enough.
                batch = draw.choice(((32,), (4, 8), (8, 1, 4)))
                sizes[:2] = draw.choice(_SIZES), draw.choice(_SIZES)
        elif draw.random() < 0.08:
            sizes[draw.randrange(3)] = 0
        is_whole = recipe != "mxfp8" or not any(size % 32 for size in sizes)
        batches = [batch, batch]
        if is_whole and draw.random() < 0.5:
            which = draw.randrange(2)
            own = tuple(draw.choice((1, size)) for size in batch)
            batches[which] = own[draw.randrange(len(own) + 1) :] if draw.random() < 0.5 else own
        accumulate = draw.random() < 0.3
        return cls(
            seed=seed,
            recipe=recipe,
            layout=layout,
            batch_a=batches[0],
            batch_b=batches[1],
            m=sizes[0],
            n=sizes[1],
            k=sizes[2],
            fp8=draw.choice(
                (("e4m3", "e4m3"),) * 3 + (("e4m3", "e5m2"), ("e5m2", "e4m3"), ("e5m2", "e5m2"))
            ),
            views=(draw.choice(_VIEWS), draw.choice(_VIEWS)),
            swizzled=recipe == "mxfp8" and draw.random() < 0.5,
            internal=draw.random() < 0.3,
            out_dtype=draw.choice(tuple(HIGH_PRECISION)),
            out_view=draw.choice(("none", *(kind for kind in _VIEWS if kind != "expanded"))),
            alpha=draw.choice((1.0, 1.0, -0.5, 2.0)),
            beta=draw.choice((1.0, -2.0, 0.5)) if accumulate else 0.0,
            accumulate=accumulate,
            bias=draw.choice(("none", "none", "shared", "per item")),
            use_split_accumulator=draw.random() < 0.5,
        )

    def __str__(self) -> str:
        values = ", ".join(f"{x.name}={getattr(self, x.name)!r}" for x in fields(self))
        return (
            f"Case({values})\n"
            f'repeat: python -m pytest "tests/test_fuzz.py::test_case[{self.seed}]"'
            f" --fuzz-cases {self.seed + 1}"
        )


def grid_values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random FP32 values of the grid, 3.5 among them."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, len(_GRID), shape, generator=generator)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    values = torch.tensor(_GRID)[index] * sign
    if values.numel():
        values.view(-1)[0] = _LARGEST
    return values


def spread_blocks(values: torch.Tensor, last_dim: bool, seed: int) -> torch.Tensor:
    """Each 32-block along the contracted dim times a power of two, so that block scales differ."""
    blocks = values.reshape(-1, values.shape[-1])
    blocks = blocks.unflatten(1, (-1, 32)) if last_dim else blocks.unflatten(0, (-1, 32))
    dim = -1 if last_dim else 1
    generator = torch.Generator().manual_seed(seed)
    shape = [1 if d == dim % 3 else size for d, size in enumerate(blocks.shape)]
    factors = torch.exp2(torch.randint(-2, 3, shape, generator=generator).float())
    return (blocks * factors).reshape(values.shape)


def make_view(kind: str, values: torch.Tensor) -> torch.Tensor:
    """The values (or, if expanded, those of its first item) as a view of other memory."""
    *batch, rows, cols = values.shape
    if kind == "expanded" and batch and batch[0] > 1:
        return values[:1].clone().expand(values.shape)
    if kind == "transposed":
        return values.mT.contiguous().mT
    if kind == "interleaved" and batch:
        return values.movedim(-2, 0).contiguous().movedim(0, -2)
    if kind == "batch reversed":
        # The first batch dim is the innermost: no single stride describes the items.
        order = (*range(len(batch) - 1, -1, -1), -2, -1)
        return values.permute(order).contiguous().permute(order)
    if kind in ("sliced", "strided"):
        step = 2 if kind == "strided" else 1
        memory = values.new_full((*batch, rows + 1, step * (cols + 3)), torch.nan)
        view = memory[..., 1:, 3 * step :: step]
        view.copy_(values)
        return view
    return values.clone()


def make_fuzz_operand(case: Case, name: str, device: str) -> Operand:
    which = "AB".index(name)
    batch = (case.batch_a, case.batch_b)[which]
    shape = operand_shape(case.layout, name, case.m, case.n, case.k, batch)
    seed = 2 * case.seed + which
    last_dim = contracts_last_dim(case.layout, name)
    values = grid_values(shape, seed)
    if case.recipe == "mxfp8":
        values = spread_blocks(values, last_dim, seed)
    values = values.to(device)
    if case.recipe in HIGH_PRECISION:
        view = make_view(case.views[which], values.to(HIGH_PRECISION[case.recipe]))
        return Operand(view, view.double())
    operand = make_operand(
        case.recipe,
        shape,
        last_dim=last_dim,
        seed=0,
        fp8=case.fp8[which],
        swizzled=case.swizzled,
        internal=case.internal,
        device=device,
        values=values,
    )
    assert torch.equal(operand.exact, values.double()), "the grid is not exact"
    return operand


def is_supported(case: Case) -> bool:
    """What the support table says of a case."""
    if case.recipe in HIGH_PRECISION:
        return True
    try:
        check_fp8_pair(*case.fp8, "A", "B")
    except teb.UnsupportedError:
        return False
    return True


def run_case(case: Case, device: str = "cpu") -> None:
    """Runs a case inside `emulate()`; fails unless all bits are as expected."""
    with teb.emulate():
        a, b = (make_fuzz_operand(case, name, device) for name in "AB")
        expected = case.alpha * exact_product(case.layout, a.exact, b.exact)
        out_dtype = HIGH_PRECISION[case.out_dtype]
        options = {}
        if case.bias != "none":
            # One that is added after a rounding would be rounded twice: FP32 only, where nothing rounds.
            out_dtype = torch.float32
            shape = (case.n,) if case.bias == "shared" else (*expected.shape[:-2], case.n)
            bias = grid_values(shape, 7).to(device)
            options["bias"] = bias if case.seed % 2 else bias.bfloat16()
        out = None
        if case.out_view != "none" or case.accumulate:
            before = grid_values(tuple(expected.shape), 8).to(device, out_dtype)
            kind = "contiguous" if case.out_view == "none" else case.out_view
            out = make_view(kind, before)
            if case.accumulate:
                expected = expected + case.beta * before.double()
                options.update(accumulate=True, beta=case.beta)
            else:
                out.fill_(torch.nan)
        if case.bias != "none":
            bias = options["bias"].double()
            expected = expected + (bias if case.bias == "shared" else bias.unsqueeze(-2))
        call = lambda: teb.batched_general_gemm(
            a.tensor,
            b.tensor,
            layout=case.layout,
            out_dtype=out_dtype,
            out=out,
            alpha=case.alpha,
            use_split_accumulator=case.use_split_accumulator,
            **options,
        )
        if not is_supported(case):
            with pytest.raises(teb.UnsupportedError):
                call()
            return
        result = call()
    assert out is None or result is out
    assert result.dtype == out_dtype
    torch.testing.assert_close(result, expected.float().to(out_dtype), rtol=0, atol=0)


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--fuzz-cases")))


def test_case(seed):
    case = Case.from_seed(seed)
    try:
        run_case(case)
    except BaseException:
        print(case)
        raise


def test_cases_cover_every_choice():
    cases = [Case.from_seed(seed) for seed in range(400)]
    assert {case.recipe for case in cases} == set(RECIPES)
    assert {case.layout for case in cases} == set(LAYOUTS)
    assert {case.out_view for case in cases} >= {"none", "transposed", "interleaved"}
    for name in ("swizzled", "internal", "accumulate", "use_split_accumulator"):
        assert {getattr(case, name) for case in cases} == {False, True}
    assert any(prod((case.m, case.n, case.k)) == 0 for case in cases)
    assert any(len(case.batch_a) != len(case.batch_b) for case in cases)
    assert sum(not is_supported(case) for case in cases) < 60


def test_case_is_made_again_from_its_seed():
    assert Case.from_seed(17) == Case.from_seed(17)
    assert "test_case[17]" in str(Case.from_seed(17))
