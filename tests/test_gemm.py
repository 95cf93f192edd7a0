# SPDX-License-Identifier: Apache-2.0
"""`batched_general_gemm` and `bmm` on the CPU: numbers, views, copies, epilogues, outputs.

Expected values are FP64 products of the dequantised operands, item by item. Errors are in
test_gemm_errors.py. Needs no GPU.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import transformer_engine.pytorch as te
from accuracy import (
    END_TO_END_BOUNDS_DB,
    HIGH_PRECISION,
    LAYOUTS,
    OUTPUT_BOUNDS_DB,
    QUANTIZED,
    RECIPES,
    TE_DTYPES,
    assert_accurate,
    dequantize,
    exact_product,
    make_operand,
    make_quantizer,
    make_sides,
    operand_shape,
    random_values,
    sqnr_per_item,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_engine.pytorch import cpp_extensions

import transformer_engine_batched as teb
from transformer_engine_batched import _C, gemm, gemm_arguments
from transformer_engine_batched import launch as launch_module
from transformer_engine_batched.reference.product import ReferencePlan

pytestmark = pytest.mark.usefixtures("emulated")

OUT_DTYPES = tuple(HIGH_PRECISION.values())
SIZES = {"aligned": (48, 80, 96), "ragged": (31, 7, 65), "one": (1, 1, 1), "long": (7, 389, 31)}
MXFP8_SIZES = {"aligned": (64, 96, 128), "small": (32, 32, 32), "odd blocks": (96, 160, 96)}


def sizes_of(recipe):
    return MXFP8_SIZES if recipe == "mxfp8" else SIZES


def run(sides, layout, **options):
    return teb.batched_general_gemm(sides.a.tensor, sides.b.tensor, layout=layout, **options)


def poisoned(shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype)


# --- every layout, recipe and size ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", range(4))
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_product(recipe, layout, size, out_dtype):
    all_sizes = list(sizes_of(recipe).values())
    m, n, k = all_sizes[size % len(all_sizes)]
    sides = make_sides(recipe, layout, m=m, n=n, k=k, seed=size)
    assert_accurate(run(sides, layout, out_dtype=out_dtype), sides.expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ("float8_delayed", "float8_current", "mxfp8"))
@pytest.mark.parametrize("fp8", [("e4m3", "e5m2"), ("e5m2", "e4m3")])
def test_mixed_fp8_types(recipe, layout, fp8):
    sides = make_sides(recipe, layout, m=32, n=64, k=96, fp8=fp8)
    assert_accurate(run(sides, layout, out_dtype=torch.float32), sides.expected)


@pytest.mark.parametrize("recipe", QUANTIZED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_storage_classes(recipe, layout):
    sides = make_sides(recipe, layout, m=32, n=64, k=96, internal=True)
    assert not isinstance(sides.a.tensor, torch.Tensor)
    out = run(sides, layout)
    assert out.dtype == torch.bfloat16  # the nominal dtype of A
    assert_accurate(out, sides.expected)


@pytest.mark.parametrize("recipe", QUANTIZED)
@pytest.mark.parametrize("fp8", [("e4m3", "e4m3"), ("e4m3", "e5m2")])
def test_end_to_end_error_is_that_of_the_format(recipe, fp8):
    data = [random_values((4, 128, 128), seed) for seed in range(2)]
    a, b = (
        make_operand(recipe, x.shape, last_dim=True, seed=0, fp8=kind, values=x.bfloat16()).tensor
        for x, kind in zip(data, fp8)
    )
    out = teb.batched_general_gemm(a, b, out_dtype=torch.float32)
    expected = exact_product("TN", *(x.bfloat16() for x in data))
    assert_accurate(out, expected, END_TO_END_BOUNDS_DB[fp8])


# --- batch dims -------------------------------------------------------------------------------------------

BATCHES = {
    "none": ((), ()),
    "one": ((1,), (1,)),
    "three": ((3,), (3,)),
    "two dims": ((2, 3), (2, 3)),
    "three dims": ((2, 1, 3), (2, 1, 3)),
    "A everywhere": ((), (4,)),
    "B everywhere": ((4,), ()),
    "A repeats outer": ((3,), (2, 3)),
    "B repeats inner": ((2, 3), (2, 1)),
    "not foldable": ((2, 1), (1, 3)),
    "not foldable, three dims": ((2, 1, 3), (1, 2, 1)),
    "long": ((70,), (70,)),
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("recipe", ("fp32", "bf16", "float8_current", "mxfp8"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_dims(recipe, layout, batches):
    sides = make_sides(recipe, layout, m=32, n=64, k=32, batch_a=batches[0], batch_b=batches[1])
    assert_accurate(run(sides, layout, out_dtype=torch.float32), sides.expected)


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("recipe", ("bf16", "float8_current"))
def test_batch_dims_of_ragged_sizes(recipe, batches):
    sides = make_sides(recipe, "NN", m=5, n=9, k=11, batch_a=batches[0], batch_b=batches[1])
    assert_accurate(run(sides, "NN", out_dtype=torch.float32), sides.expected)


@pytest.mark.parametrize("recipe", ("bf16", "float8_current", "mxfp8"))
def test_bmm_is_a_at_b(recipe):
    a = make_operand(recipe, (2, 3, 64, 32), last_dim=True, seed=0)
    b = make_operand(recipe, (3, 32, 96), last_dim=False, seed=1)
    out = teb.bmm(a.tensor, b.tensor, out_dtype=torch.float32)
    assert_accurate(out, a.exact @ b.exact)


def test_bmm_is_torch_matmul_on_the_examples():
    a, b = random_values((3, 8, 32), 0), random_values((32, 4), 1)
    torch.testing.assert_close(teb.bmm(a, b), a @ b, rtol=1e-5, atol=1e-5)


# --- empty sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ("fp32", "bf16", "float8_current"))
@pytest.mark.parametrize("empty", ("batch", "m", "n", "k"))
def test_empty_sizes(recipe, layout, empty):
    sizes = {"batch": 2, "m": 16, "n": 32, "k": 16, empty: 0}
    shapes = [
        operand_shape(layout, name, sizes["m"], sizes["n"], sizes["k"], (sizes["batch"],))
        for name in "AB"
    ]
    a, b = (
        make_operand(recipe, shape, last_dim=True, seed=0, values=torch.randn(shape)).tensor
        for shape in shapes
    )
    shape = (sizes["batch"], sizes["m"], sizes["n"])
    out = teb.batched_general_gemm(a, b, layout=layout, out_dtype=torch.float32)
    assert out.shape == shape and out.dtype == torch.float32 and not out.any()
    given = poisoned(shape, torch.float32)
    assert teb.batched_general_gemm(a, b, layout=layout, out=given) is given
    assert not given.any()


def test_nothing_contracted_leaves_beta_out_bias_and_gelu():
    a, b = torch.randn(2, 4, 0), torch.randn(2, 3, 0)
    before, bias = random_values((2, 3, 4), 0), random_values((2, 4), 1)
    out = before.clone()
    teb.batched_general_gemm(a, b, out=out, accumulate=True, beta=0.5, bias=bias, gelu=True)
    expected = torch.nn.functional.gelu(0.5 * before + bias[:, None], approximate="tanh")
    torch.testing.assert_close(out, expected)


# --- views ------------------------------------------------------------------------------------------------


def as_view(kind, values):
    """A view of other memory that has these values."""
    *batch, rows, cols = values.shape
    if kind == "contiguous":
        return values.clone()
    if kind == "transposed":
        return values.mT.contiguous().mT
    if kind == "sliced":
        memory = torch.full((*batch, rows + 3, cols + 5), torch.nan, dtype=values.dtype)
        view = memory[..., 1 : rows + 1, 2 : cols + 2]
    elif kind == "interleaved":
        memory = torch.full((rows, *batch, cols + 1), torch.nan, dtype=values.dtype)
        view = memory.movedim(0, -2)[..., :cols]
    elif kind == "interleaved columns":
        memory = torch.full((cols, *batch, rows), torch.nan, dtype=values.dtype)
        view = memory.movedim(0, -1)
    elif kind == "gaps between items":
        memory = torch.full((2 * batch[0], *batch[1:], rows, cols), torch.nan, dtype=values.dtype)
        view = memory[::2]
    elif kind == "batch last":
        memory = torch.full((rows, cols, *batch), torch.nan, dtype=values.dtype)
        view = memory.movedim((0, 1), (-2, -1))
    elif kind == "every other column":
        memory = torch.full((*batch, rows, 2 * cols), torch.nan, dtype=values.dtype)
        view = memory[..., ::2]
    else:
        raise AssertionError(kind)
    view.copy_(values)
    return view


READ_IN_PLACE = (
    "contiguous",
    "transposed",
    "sliced",
    "interleaved",
    "interleaved columns",
    "gaps between items",
)
COPIED = ("batch last", "every other column")


class CountCopies(TorchDispatchMode):
    """Counts operations that make or fill memory of another layout, and all allocations."""

    COPIES = ("copy_", "clone", "_to_copy", "contiguous", "pad", "constant_pad_nd", "cat")
    ALLOCATIONS = ("empty", "new_empty", "zeros", "new_zeros", "empty_strided", "new_empty_strided")

    def __init__(self):
        super().__init__()
        self.copies, self.allocations = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.COPIES:
            self.copies.append(name)
        if name in self.ALLOCATIONS:
            self.allocations.append(name)
        return func(*args, **(kwargs or {}))


class SilentPlan:
    """Stands for an engine, so that what a launch itself does can be counted."""

    def __init__(self, problem):
        self.problem = problem
        self.seen = []

    def run(self, a, b, d, *_, **__):
        self.seen.append((a, b, d))


@pytest.fixture
def silent_engine(monkeypatch, fresh_launches):
    monkeypatch.setitem(launch_module._PLANS, "reference", SilentPlan)


def last_launch():
    return list(gemm._launches.values())[-1]


@pytest.mark.parametrize("kind_a", READ_IN_PLACE + COPIED)
@pytest.mark.parametrize("kind_b", READ_IN_PLACE + COPIED)
def test_views_have_the_right_product(kind_a, kind_b):
    a, b = random_values((3, 6, 10), 0), random_values((3, 10, 4), 1)
    out = teb.bmm(as_view(kind_a, a), as_view(kind_b, b))
    assert_accurate(out, a.double() @ b.double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", OUT_DTYPES)
@pytest.mark.parametrize("kind", READ_IN_PLACE + COPIED)
def test_views_in_every_layout(layout, dtype, kind):
    a, b = (
        random_values(operand_shape(layout, name, 5, 7, 9, (2, 3)), seed).to(dtype)
        for seed, name in enumerate("AB")
    )
    out = teb.batched_general_gemm(
        as_view(kind, a), as_view(kind, b), layout=layout, out_dtype=torch.float32
    )
    assert_accurate(out, exact_product(layout, a, b))


@pytest.mark.parametrize("kind", READ_IN_PLACE + COPIED)
@pytest.mark.parametrize("name", ("a", "b"))
@pytest.mark.usefixtures("silent_engine")
def test_views_are_read_in_place_or_from_one_packed_copy(kind, name):
    operands = {"a": random_values((3, 6, 10), 0), "b": random_values((3, 10, 4), 1)}
    operands[name] = as_view(kind, operands[name])
    with CountCopies() as counted:
        teb.bmm(operands["a"], operands["b"])
    launch = last_launch()
    copies = {"a": launch.copy_a, "b": launch.copy_b}
    other = "b" if name == "a" else "a"
    assert copies[other] is None
    seen = dict(zip("ab", launch.plan.seen[0]))
    assert seen[other] is operands[other]
    if kind in COPIED:
        assert copies[name] is not None
        assert counted.copies == ["copy_"]
        assert len(counted.allocations) == 2  # the packed copy and the output
    else:
        assert copies[name] is None and seen[name] is operands[name]
        assert counted.copies == []
        assert len(counted.allocations) == 1


@pytest.mark.usefixtures("silent_engine")
def test_broadcast_operands_are_not_repeated():
    a, b = random_values((1, 6, 10), 0), random_values((50, 10, 4), 1)
    with CountCopies() as counted:
        teb.bmm(a, b)
        teb.bmm(a.expand(50, 6, 10), b)
        teb.bmm(b.mT, random_values((10, 2), 2))
    assert counted.copies == []
    assert all(
        launch.copy_a is None and launch.copy_b is None for launch in gemm._launches.values()
    )


@pytest.mark.usefixtures("silent_engine")
def test_packed_copy_of_a_broadcast_operand_has_one_item():
    base = random_values((6, 20), 0)[:, ::2]
    teb.bmm(base.expand(50, 6, 10), random_values((50, 10, 4), 1))
    a, _, _ = last_launch().plan.seen[0]
    assert a.numel() == 6 * 10


@pytest.mark.parametrize("recipe", ("float8_current", "float8_delayed"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("silent_engine")
def test_aligned_fp8_is_read_in_place(recipe, layout):
    sides = make_sides(recipe, layout, m=48, n=80, k=96)
    with CountCopies() as counted:
        run(sides, layout)
    launch = last_launch()
    assert launch.copy_a is None and launch.copy_b is None and launch.buffer_shape is None
    # The scales may be moved once, to an address that the library takes (support.py); no data is.
    assert all(name == "clone" for name in counted.copies) and len(counted.copies) <= 2
    assert len(counted.allocations) == 1


@pytest.mark.parametrize(
    "size, num_copies, has_buffer",
    [((31, 80, 96), 0, False), ((48, 77, 96), 1, True), ((48, 80, 90), 2, False)],
    ids=["ragged M", "ragged N", "ragged K"],
)
@pytest.mark.usefixtures("silent_engine")
def test_ragged_fp8_is_packed_once(size, num_copies, has_buffer):
    m, n, k = size
    sides = make_sides("float8_current", "TN", m=m, n=n, k=k)
    run(sides, "TN")
    launch = last_launch()
    assert (launch.copy_a is not None) + (launch.copy_b is not None) == num_copies
    assert (launch.buffer_shape is not None) == has_buffer
    problem = launch.plan.problem
    assert (problem.m, problem.n % 8, problem.k % 16) == (m, 0, 0)
    for operand in launch.plan.seen[0][:2]:
        assert operand.data_ptr() % 16 == 0


def test_padding_is_zero_and_only_padding(fresh_launches, monkeypatch):
    monkeypatch.setitem(launch_module._PLANS, "reference", SilentPlan)
    # What an allocation holds before is anything; make it NaN codes.
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *args, **options: new_empty(self, *args, **options).fill_(127),
    )
    sides = make_sides("float8_current", "TN", m=5, n=3, k=10)
    run(sides, "TN")
    a, b, _ = last_launch().plan.seen[0]
    for packed, source in ((a, sides.b.tensor), (b, sides.a.tensor)):
        rows, cols = source.shape[-2:]
        assert packed.shape[-1] == 16 and packed.shape[-2] >= rows
        assert torch.equal(packed[..., :rows, :cols], source._data)
        assert not packed[..., rows:, :].any() and not packed[..., cols:].any()


# --- outputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READ_IN_PLACE + COPIED)
@pytest.mark.parametrize("recipe", ("fp32", "bf16", "float8_current", "mxfp8"))
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_out_views_are_written_in_full_and_nothing_else(kind, recipe, out_dtype):
    sides = make_sides(recipe, "TN", m=32, n=64, k=32)
    out = as_view(kind, poisoned((3, 32, 64), out_dtype))
    storage = torch.empty(0, dtype=out_dtype).set_(out.untyped_storage())
    storage.fill_(-77.0)
    before = storage.clone()
    out.fill_(torch.nan)
    assert run(sides, "TN", out=out) is out
    assert_accurate(out, sides.expected)
    out.fill_(-77.0)
    assert torch.equal(storage, before)


@pytest.mark.parametrize("recipe", ("bf16", "float8_current", "mxfp8"))
def test_out_whose_batch_dims_do_not_fold(recipe):
    # [2, 3] items stored as [3, 2]: no single stride, so several launches.
    sides = make_sides(recipe, "TN", m=32, n=64, k=32, batch_a=(2, 3))
    out = poisoned((3, 2, 32, 64), torch.float32).transpose(0, 1)
    run(sides, "TN", out=out)
    assert_accurate(out, sides.expected)


@pytest.mark.parametrize("recipe", ("bf16", "float8_current", "mxfp8"))
def test_out_of_sliced_batch_dims(recipe):
    sides = make_sides(recipe, "NN", m=32, n=64, k=32, batch_a=(3, 2))
    out = poisoned((3, 4, 32, 64), torch.float32)[:, 1:3]
    run(sides, "NN", out=out)
    assert_accurate(out, sides.expected)


@pytest.mark.parametrize("size", ("ragged", "long", "one"))
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("accumulate", (False, True))
def test_ragged_fp8_out(size, out_dtype, accumulate):
    m, n, k = SIZES[size]
    sides = make_sides("float8_current", "NT", m=m, n=n, k=k)
    before = random_values((3, m, n), 9).to(out_dtype)
    out = before.clone() if accumulate else poisoned((3, m, n), out_dtype)
    run(sides, "NT", out=out, accumulate=accumulate)
    assert_accurate(out, sides.expected + (before.double() if accumulate else 0))


def test_default_out_dtype_is_the_nominal_dtype_of_a():
    for dtype in OUT_DTYPES:
        x = random_values((2, 16, 16), 0).to(dtype)
        assert teb.batched_general_gemm(x, x).dtype == dtype
        quantized = teb.quantize(x, make_quantizer("float8_current"))
        assert teb.batched_general_gemm(quantized, quantized).dtype == dtype
        assert teb.bmm(quantized, quantized).dtype == dtype


@pytest.mark.parametrize("recipe", ("fp32", "fp16", "bf16"))
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_output_is_rounded_once(recipe, out_dtype):
    # Bitwise: the FP64 sum, to FP32, to the output type. A type that the library cannot write is made
    # from FP32, not from the operands' type.
    sides = make_sides(recipe, "NN", m=6, n=5, k=40)
    out = run(sides, "NN", out_dtype=out_dtype)
    assert torch.equal(out, sides.expected.float().to(out_dtype))


@pytest.mark.parametrize("recipe", ("fp32", "bf16", "float8_delayed", "mxfp8"))
@pytest.mark.parametrize("alpha", (0.0, 1.0, -0.375))
@pytest.mark.parametrize("beta", (None, 0.0, 1.0, -2.5))
def test_alpha_and_beta(recipe, alpha, beta):
    sides = make_sides(recipe, "TN", m=32, n=64, k=32)
    before = random_values((3, 32, 64), 7)
    out = before.clone()
    run(sides, "TN", alpha=alpha, beta=beta, accumulate=True, out=out)
    factor = 1.0 if beta is None else beta
    expected = alpha * sides.expected + factor * before.double()
    if alpha == 0.0 and factor == 0.0:
        assert not out.any()
    else:
        assert_accurate(out, expected)


def test_beta_of_zero_does_not_read_out():
    sides = make_sides("bf16", "TN", m=4, n=8, k=16)
    out = poisoned((3, 4, 8), torch.float32)
    run(sides, "TN", out=out, accumulate=True, beta=0.0)
    assert_accurate(out, sides.expected)


def test_alpha_may_differ_between_calls_of_one_shape():
    sides = make_sides("bf16", "TN", m=4, n=8, k=16)
    for alpha in (1.0, 0.5, -3.0):
        out = run(sides, "TN", alpha=alpha, out_dtype=torch.float32)
        assert_accurate(out, alpha * sides.expected)


def test_nan_stays_in_its_item():
    for recipe in ("bf16", "float8_current", "mxfp8"):
        values = random_values((3, 32, 64), 0)
        values[1, 5, 7] = torch.nan
        a = make_operand(recipe, values.shape, last_dim=True, seed=0, values=values)
        b = make_operand(recipe, (3, 64, 64), last_dim=True, seed=1)
        out = teb.batched_general_gemm(b.tensor, a.tensor, out_dtype=torch.float32)
        is_nan = out.isnan()
        assert is_nan[1, 5].all() and is_nan.sum() == 64
        exact = a.exact.nan_to_num(0.0)
        exact[1, 5] = 0.0
        clean = exact_product("TN", b.exact, exact)
        assert_accurate(out.masked_fill(is_nan, 0.0), clean)


def test_infinity_stays_in_its_row():
    a, b = random_values((2, 3, 8), 0), random_values((2, 4, 8), 1)
    a[0, 2, 3] = torch.inf
    out = teb.batched_general_gemm(b, a)
    assert out[0, 2].isinf().all() and out.isinf().sum() == 4


# --- bias and GELU ----------------------------------------------------------------------------------------


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("gelu", (False, True))
@pytest.mark.parametrize("bias_dtype", (None, *OUT_DTYPES))
@pytest.mark.parametrize("per_item", (False, True))
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("recipe", ("bf16", "float8_current", "mxfp8"))
def test_bias_and_gelu(recipe, out_dtype, per_item, bias_dtype, gelu):
    sides = make_sides(recipe, "TN", m=32, n=64, k=32)
    expected = sides.expected
    bias = None
    if bias_dtype is not None:
        bias = random_values((3, 64) if per_item else (64,), 5).to(bias_dtype)
        expected = expected + (bias.double()[:, None] if per_item else bias.double())
    if gelu:
        expected = gelu_tanh(expected)
    out = run(sides, "TN", out_dtype=out_dtype, bias=bias, gelu=gelu)
    # Added after the product, a bias meets a result that is rounded already: 3 dB.
    bound = min(OUTPUT_BOUNDS_DB[out_dtype], 130.0) - (1.0 if gelu else 0.0)
    assert_accurate(out, expected, bound)


@pytest.mark.parametrize("recipe", ("bf16", "float8_current"))
@pytest.mark.parametrize("n", (7, 64))
@pytest.mark.parametrize("accumulate", (False, True))
def test_bias_gelu_and_accumulation_come_in_this_order(recipe, n, accumulate):
    sides = make_sides(recipe, "NN", m=5, n=n, k=32, batch_a=(2, 3))
    bias, before = random_values((2, 3, n), 5), random_values((2, 3, 5, n), 6)
    out = before.clone()
    run(sides, "NN", out=out, bias=bias, gelu=True, alpha=0.5, accumulate=accumulate)
    linear = 0.5 * sides.expected + (before.double() if accumulate else 0)
    assert_accurate(out, gelu_tanh(linear + bias.double()[..., None, :]), 120.0)


@pytest.mark.parametrize("kind", ("every other", "expanded", "transposed", "sliced"))
def test_bias_views(kind):
    sides = make_sides("bf16", "TN", m=4, n=8, k=16, batch_a=(2, 3))
    values = random_values((2, 3, 8), 5).bfloat16()
    bias = {
        "every other": lambda: random_values((2, 3, 16), 5).bfloat16()[..., ::2],
        "expanded": lambda: values[:, :1].expand(2, 3, 8),
        "transposed": lambda: values.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda: random_values((2, 3, 13), 5).bfloat16()[..., 2:10],
    }[kind]()
    out = run(sides, "TN", bias=bias, out_dtype=torch.bfloat16)
    assert_accurate(out, sides.expected + bias.double()[..., None, :])


@pytest.mark.parametrize(
    "recipe, out_dtype, bias_dtype, is_fused",
    [
        ("bf16", torch.bfloat16, torch.bfloat16, True),
        ("bf16", torch.bfloat16, torch.float32, False),
        ("fp32", torch.float32, torch.float32, True),
        ("fp32", torch.bfloat16, torch.bfloat16, False),
        ("float8_current", torch.bfloat16, torch.bfloat16, True),
        ("float8_current", torch.float32, torch.bfloat16, True),
        ("float8_current", torch.float32, torch.float32, False),
        ("float8_current", torch.float16, torch.float16, True),
        ("float8_current", torch.float16, torch.bfloat16, False),
    ],
)
def test_bias_is_fused_where_the_library_offers_it(
    recipe, out_dtype, bias_dtype, is_fused, fresh_launches
):
    sides = make_sides(recipe, "TN", m=16, n=32, k=32)
    for gelu in (False, True):
        bias = random_values((32,), 5).to(bias_dtype)
        run(sides, "TN", bias=bias, out_dtype=out_dtype, gelu=gelu)
        launch = last_launch()
        assert launch.bias_is_fused == is_fused
        assert launch.gelu_is_fused == (gelu and is_fused)
        name = {(False, False): "none", (True, False): "bias", (True, True): "gelu_bias"}
        assert launch.plan.problem.epilogue == name.get((is_fused, gelu), "none")


@pytest.mark.parametrize("bias_shape", ((64,), (3, 64)))
def test_a_library_without_the_epilogue_gets_it_after_the_product(
    bias_shape, monkeypatch, fresh_launches
):
    class Refusing(ReferencePlan):
        def run(self, *args, **options):
            if self.problem.epilogue != "none":
                raise _C.NotSupportedError("no algorithm")
            return super().run(*args, **options)

    monkeypatch.setitem(launch_module._PLANS, "reference", Refusing)
    sides = make_sides("float8_current", "TN", m=16, n=64, k=32)
    bias = random_values(bias_shape, 5).bfloat16()
    expected = gelu_tanh(sides.expected + bias.double().reshape(-1, 1, 64))
    for _ in range(2):  # the second call finds the launch that works
        out = run(sides, "TN", bias=bias, gelu=True, out_dtype=torch.float32)
        assert_accurate(out, expected, 120.0)
    assert not last_launch().bias_is_fused and last_launch().gelu


# --- FP8 output -------------------------------------------------------------------------------------------


def nearest_codes(values, fp8):
    """Codes of FP32 values by looking at all of them: nearest, ties to even, saturating."""
    table = torch.arange(256).to(torch.uint8).view(fp8).double()
    positive = table[:128][table[:128].isfinite()]
    distance = (values.double().abs().reshape(-1, 1) - positive).abs()
    nearest = distance.min(dim=1, keepdim=True).values
    candidates = distance == nearest
    is_even = torch.arange(len(positive)) % 2 == 0
    ranked = candidates * (1 + is_even)
    codes = ranked.argmax(dim=1).to(torch.uint8)
    return (codes | (values.reshape(-1).signbit() * 128).to(torch.uint8)).reshape(values.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", (32, 48, 24, 7))
@pytest.mark.parametrize("fp8, out_fp8", [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e5m2", "e5m2")])
def test_delayed_output_codes_and_amax(layout, n, fp8, out_fp8):
    sides = make_sides("float8_current", layout, m=5, n=n, k=32, fp8=("e4m3", fp8))
    quantizer = make_quantizer("float8_delayed", out_fp8, scale=12.0)
    out = run(sides, layout, quantization_params=quantizer)
    assert isinstance(out, te.Float8Tensor) and out.shape == (3, 5, n)
    assert out.dtype == torch.bfloat16
    exact = sides.expected.float()
    expected = nearest_codes(exact * 12.0, _torch_fp8(out_fp8))
    assert torch.equal(out._data, expected)
    assert quantizer.amax.item() == exact.abs().max().item()
    assert out._scale_inv.item() == torch.tensor(12.0).reciprocal().item()
    torch.testing.assert_close(dequantize(out), sides.expected, rtol=0.13, atol=0.01)


def _torch_fp8(name):
    return {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]


def test_delayed_output_is_written_by_the_product_where_it_can_be(fresh_launches):
    for fp8, out_fp8, fused in (
        ("e4m3", "e4m3", True),
        ("e4m3", "e5m2", False),
        ("e5m2", "e5m2", True),
    ):
        sides = make_sides("float8_current", "TN", m=16, n=32, k=32, fp8=("e4m3", fp8))
        quantizer = make_quantizer("float8_delayed", out_fp8)
        out = run(sides, "TN", quantization_params=quantizer)
        assert last_launch().has_fp8_output == fused
        assert quantizer.amax.item() > 0
        assert out._fp8_dtype == TE_DTYPES[out_fp8]


@pytest.mark.parametrize("bias_dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("gelu", (False, True))
@pytest.mark.parametrize("n", (32, 24))
def test_delayed_output_after_bias_and_gelu(bias_dtype, gelu, n):
    sides = make_sides("float8_current", "TN", m=16, n=n, k=32)
    bias = random_values((n,), 4).to(bias_dtype)
    quantizer = make_quantizer("float8_delayed", scale=8.0)
    out = run(sides, "TN", quantization_params=quantizer, bias=bias, gelu=gelu)
    expected = sides.expected + bias.double()
    expected = gelu_tanh(expected) if gelu else expected
    # Each item has E4M3's error and no more.
    assert sqnr_per_item(dequantize(out), expected).min() > 27.0
    assert quantizer.amax.item() == pytest.approx(expected.abs().max().item(), rel=2**-8)


@pytest.mark.parametrize("batches", [((2, 1), (1, 3)), ((2, 3), (2, 1))])
def test_delayed_output_amax_is_that_of_all_launches(batches):
    for seed in range(4):
        sides = make_sides(
            "float8_current",
            "TN",
            m=16,
            n=32,
            k=32,
            batch_a=batches[0],
            batch_b=batches[1],
            seed=seed,
        )
        quantizer = make_quantizer("float8_delayed")
        out = run(sides, "TN", quantization_params=quantizer)
        assert quantizer.amax.item() == sides.expected.float().abs().max().item()
        assert sqnr_per_item(dequantize(out), sides.expected).min() > 27.0


@pytest.mark.parametrize("columnwise", (False, True))
@pytest.mark.parametrize("internal", (False, True))
def test_delayed_output_can_be_multiplied_again(columnwise, internal):
    sides = make_sides("float8_current", "TN", m=16, n=32, k=32)
    quantizer = make_quantizer("float8_delayed", internal=internal)
    quantizer.set_usage(rowwise=True, columnwise=columnwise)
    out = run(sides, "TN", quantization_params=quantizer)
    assert isinstance(out, torch.Tensor) != internal
    other = make_operand("float8_current", (3, 16, 32), last_dim=True, seed=9)
    if columnwise:
        again = teb.batched_general_gemm(other.tensor, out, layout="NT", out_dtype=torch.float32)
        expected = exact_product("NT", other.exact, dequantize(out))
    else:
        again = teb.batched_general_gemm(other.tensor, out, layout="TN", out_dtype=torch.float32)
        expected = exact_product("TN", other.exact, dequantize(out))
    assert_accurate(again, expected)


@pytest.mark.parametrize("recipe", ("bf16", "float8_current", "mxfp8"))
@pytest.mark.parametrize("out_recipe", QUANTIZED)
def test_other_outputs_are_quantized_after_the_product(recipe, out_recipe):
    sides = make_sides(recipe, "TN", m=32, n=64, k=32)
    out = run(sides, "TN", quantization_params=make_quantizer(out_recipe, scale=8.0))
    if out_recipe != "float8_delayed" or recipe != "float8_current":
        expected = teb.quantize(run(sides, "TN"), make_quantizer(out_recipe, scale=8.0))
        torch.testing.assert_close(dequantize(out), dequantize(expected), rtol=0, atol=0)
    assert sqnr_per_item(dequantize(out), sides.expected).min() > 27.0


@pytest.mark.parametrize("out_recipe", ("float8_delayed", "float8_current"))
def test_quantized_output_of_an_empty_product(out_recipe):
    a = make_operand(
        "float8_current", (2, 32, 0), last_dim=True, seed=0, values=torch.randn(2, 32, 0)
    )
    out = teb.batched_general_gemm(
        a.tensor, a.tensor, quantization_params=make_quantizer(out_recipe)
    )
    assert out.shape == (2, 32, 32) and not out._data.any()


# --- gradients, autocast, autotune, TE --------------------------------------------------------------------


def test_inputs_that_require_grad_are_taken_under_no_grad():
    x = torch.randn(2, 4, 8, requires_grad=True)
    with torch.no_grad():
        out = teb.batched_general_gemm(x, x)
    assert not out.requires_grad
    assert_accurate(
        teb.batched_general_gemm(x.detach(), x.detach()), exact_product("TN", x, x).detach()
    )


def test_bmm_follows_autocast_like_torch():
    a, b = torch.randn(2, 4, 8), torch.randn(2, 8, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = teb.bmm(a, b), torch.bmm(a, b)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert_accurate(out, a.bfloat16().double() @ b.bfloat16().double())


def test_autocast_leaves_quantized_operands_and_the_general_gemm_alone():
    a = make_operand("float8_current", (2, 16, 32), last_dim=True, seed=0)
    b = make_operand("float8_current", (2, 32, 48), last_dim=False, seed=1)
    plain = torch.randn(2, 4, 8)
    with torch.autocast("cpu", dtype=torch.float16):
        out = teb.bmm(a.tensor, b.tensor)
        assert teb.batched_general_gemm(plain, plain).dtype == torch.float32
    assert out.dtype == torch.bfloat16
    assert_accurate(out, a.exact @ b.exact)


@pytest.mark.parametrize("autotune", (None, False, True))
def test_autotune_is_accepted_where_there_is_nothing_to_choose(autotune):
    sides = make_sides("float8_current", "TN", m=16, n=32, k=32)
    out = run(sides, "TN", autotune=autotune, out_dtype=torch.float32)
    assert_accurate(out, sides.expected)
    assert teb.list_choices() == []


@pytest.mark.parametrize("split", (False, True))
def test_split_accumulation_is_part_of_the_problem(split, fresh_launches):
    sides = make_sides("float8_current", "TN", m=16, n=32, k=32)
    out = run(sides, "TN", use_split_accumulator=split, out_dtype=torch.float32)
    assert last_launch().plan.problem.fast_accumulation == (not split)
    assert_accurate(out, sides.expected)
    sides = make_sides("bf16", "TN", m=16, n=32, k=32)
    run(sides, "TN", use_split_accumulator=split)
    assert not last_launch().plan.problem.fast_accumulation


def test_tf32_follows_torch(fresh_launches):
    sides = make_sides("fp32", "TN", m=4, n=4, k=4)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            run(sides, "TN")
            assert last_launch().plan.problem.allow_tf32 == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_te_has_the_function():
    assert cpp_extensions.batched_general_gemm is teb.batched_general_gemm


def test_signature_is_that_of_general_gemm():
    theirs = inspect.signature(cpp_extensions.general_gemm).parameters
    ours = inspect.signature(teb.batched_general_gemm).parameters
    shared = [
        name
        for name, parameter in ours.items()
        if parameter.kind == parameter.POSITIONAL_OR_KEYWORD
    ]
    assert shared == list(theirs)[: len(shared)]
    assert set(theirs) - set(shared) == set(gemm_arguments._COMMUNICATION)
    for name in shared:
        assert ours[name].default == theirs[name].default, name
        assert ours[name].kind == theirs[name].kind, name


def test_calls_of_general_gemm_pass_through():
    # All parameters by position, and communication parameters at their defaults.
    a, b = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    out = teb.batched_general_gemm(
        a, b, torch.float32, None, False, None, 2.0, None, False, "TN", None, None, False, False
    )
    assert_accurate(out, 2 * exact_product("TN", a, b))
    out = teb.batched_general_gemm(
        a, b, grad=True, ub=None, ub_type=None, extra_output=None, bulk_overlap=False
    )
    assert_accurate(out, exact_product("TN", a, b))


def test_cache_of_launches_is_bounded_and_harmless(fresh_launches, monkeypatch):
    monkeypatch.setattr(gemm, "_MAX_LAUNCHES", 5)
    for size in range(1, 20):
        sides = make_sides("bf16", "TN", m=size, n=3, k=4)
        assert_accurate(run(sides, "TN", out_dtype=torch.float32), sides.expected)
        assert len(gemm._launches) <= 5


def test_a_launch_serves_other_data_of_the_same_shapes(fresh_launches):
    for seed in range(3):
        sides = make_sides("float8_delayed", "NT", m=16, n=32, k=32, seed=seed)
        assert_accurate(run(sides, "NT", out_dtype=torch.float32), sides.expected)
    assert len(gemm._launches) == 1


def test_misaligned_operands():
    # FP8 codes at an address that is no multiple of 16 are packed; the launch of aligned ones is not used.
    sides = make_sides("float8_current", "TN", m=16, n=32, k=32)
    run(sides, "TN", out_dtype=torch.float32)
    data = sides.b.tensor._data
    memory = torch.empty(data.numel() + 1, dtype=torch.uint8)
    memory[1:] = data.flatten()
    sides.b.tensor._data = memory[1:].view(data.shape)
    assert_accurate(run(sides, "TN", out_dtype=torch.float32), sides.expected)


def test_misaligned_out():
    sides = make_sides("float8_current", "TN", m=16, n=32, k=32)
    out = poisoned((3 * 16 * 32 + 1,), torch.float32)[1:].view(3, 16, 32)
    assert_accurate(run(sides, "TN", out=out), sides.expected)


# --- the short way of a warm call -------------------------------------------------------------------------


class RecordingPlan(SilentPlan):
    """Stands for the cublaslt engine: keeps the addresses of the short way, or the tensors of the long."""

    def __init__(self, problem):
        super().__init__(problem)
        self.launched = []

    def launch(self, pointers, out, alpha, beta, autotune):
        self.launched.append((pointers, out, alpha, beta))


@pytest.fixture
def recorded_cublaslt(monkeypatch, fresh_launches):
    monkeypatch.setattr(gemm, "find_engine", lambda *_, **__: "cublaslt")
    monkeypatch.setitem(launch_module._PLANS, "cublaslt", RecordingPlan)


@pytest.mark.parametrize("recipe", ("bf16", "float8_current"))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.usefixtures("recorded_cublaslt")
def test_short_way_hands_over_the_addresses(recipe, with_bias):
    sides = make_sides(recipe, "TN", m=16, n=32, k=32)
    bias = random_values((32,), 3).bfloat16() if with_bias else None
    out = torch.zeros(3, 16, 32, dtype=torch.bfloat16)
    run(sides, "TN", out=out, bias=bias, alpha=0.5, accumulate=True, beta=2.0)
    ((pointers, written, alpha, beta),) = last_launch().plan.launched
    left, right = sides.b.tensor, sides.a.tensor
    expected = [left.data_ptr(), right.data_ptr(), out.data_ptr(), 0, 0, 0, 0, 0]
    if recipe != "bf16":
        expected[:2] = left._data.data_ptr(), right._data.data_ptr()
        expected[3:5] = left._scale_inv.data_ptr(), right._scale_inv.data_ptr()
    if with_bias:
        expected[7] = bias.data_ptr()
    assert list(pointers) == expected
    assert written is out and (alpha, beta) == (0.5, 2.0)


@pytest.mark.parametrize(
    "change",
    ("ragged", "float32 bias", "gelu after it", "fp16 from bf16", "batch loop", "scale address"),
)
@pytest.mark.usefixtures("recorded_cublaslt")
def test_short_way_is_not_taken_where_there_is_more_to_do(change):
    recipe = "bf16" if change == "fp16 from bf16" else "float8_current"
    batches = ((2, 1), (1, 3)) if change == "batch loop" else ((3,), (3,))
    n = 30 if change == "ragged" else 32
    sides = make_sides(recipe, "TN", m=16, n=n, k=32, batch_a=batches[0], batch_b=batches[1])
    options = {}
    if change in ("float32 bias", "gelu after it"):
        options.update(bias=torch.randn(32), gelu=change == "gelu after it")
    if change == "fp16 from bf16":
        options.update(out_dtype=torch.float16)
    if change == "scale address":
        scale = sides.a.tensor._scale_inv
        sides.a.tensor._scale_inv = torch.cat([scale, scale])[1:]
    run(sides, "TN", **options)
    plan = last_launch().plan
    assert plan.launched == [] and len(plan.seen) == (2 if change == "batch loop" else 1)


def test_copies_of_operands_in_misaligned_memory():
    # Memory that does not start at a multiple of 8 bytes, as numpy's and memory-mapped files' may not.
    for start in range(0, 16, 4):
        memory = bytearray(4 * 2 * 6 * 10 + 64)
        flat = torch.frombuffer(memory, dtype=torch.float32, offset=start)
        for skip in range(4):
            values = flat[skip : skip + 96].view(2, 6, 8)
            values.copy_(random_values((2, 6, 8), skip))
            expanded = values[:, :1].expand(2, 6, 8)
            for x in (values, expanded):
                assert_accurate(teb.bmm(x, x.mT), x.double() @ x.double().mT)
