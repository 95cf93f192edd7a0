# SPDX-License-Identifier: Apache-2.0
"""The C++ layer without a driver: descriptors made by the real cuBLASLt, read back, and obeyed.

A plan's attributes are read back and the product is computed from them in numpy as cuBLASLt's manual
defines it, column-major, on memory laid out by the row-major problem. A wrong swap, leading dimension,
stride or operation gives other numbers. Needs the extension, no GPU.
"""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_engine_batched import _C
from transformer_engine_batched.native import problem_from_dict, problem_to_dict, to_native
from transformer_engine_batched.problem import Matrix, Problem, element_bytes

# Enumerators of library_types.h, cublas_api.h and cublasLt.h.
CUDA_TYPES = {"fp32": 0, "fp16": 2, "bf16": 14, "e4m3": 28, "e5m2": 29}
ORDER_COL = 0
OP_N, OP_T = 0, 1
COMPUTE_32F, COMPUTE_32F_FAST_TF32 = 68, 77
EPILOGUES = {"none": 1, "bias": 4, "gelu": 32, "gelu_bias": 36}
SCALE_SCALAR_32F, SCALE_VEC32_UE8M0 = 0, 2


def make_matrix(
    dtype, rows, cols, *, transposed=False, gap=0, skip=0, scale_mode=None, broadcast=False
):
    """A matrix with `gap` unused elements after each row and `skip` after each item."""
    ld = (rows if transposed else cols) + gap
    stride = 0 if broadcast else ld * (cols if transposed else rows) + skip
    if scale_mode is None:
        scale_mode = "tensor" if element_bytes(dtype) == 1 else "none"
    return Matrix(dtype, ld, stride, transposed, scale_mode)


def make_problem(m=4, n=6, k=8, batch=3, left="bf16", right=None, out="bf16", **changes):
    problem = Problem(
        batch=batch,
        m=m,
        n=n,
        k=k,
        a=make_matrix(left, m, k),
        b=make_matrix(right or left, k, n, transposed=True),
        d=make_matrix(out, m, n),
    )
    return replace(problem, **changes)


def read_back(problem):
    return _C.read_back_plan(to_native(problem))


def fill_memory(matrix, batch, rows, cols, seed):
    """Flat memory, all of it random, and the row-major matrices that lie in it."""
    item, row, col = matrix.strides()
    size = 1 + (batch - 1) * item + (rows - 1) * row + (cols - 1) * col
    memory = np.random.default_rng(seed).standard_normal(size + 5)
    b, r, c = np.ogrid[:batch, :rows, :cols]
    return memory, memory[b * item + r * row + c * col]


def column_major(memory, plan, prefix, operation, batch):
    """The matrices op(X) that cuBLASLt reads: element (i, j) of item b at b * stride + j * ld + i."""
    rows, cols = plan[f"{prefix}.rows"], plan[f"{prefix}.cols"]
    b, i, j = np.ogrid[:batch, :rows, :cols]
    matrices = memory[b * plan[f"{prefix}.batch_stride"] + j * plan[f"{prefix}.ld"] + i]
    return matrices.swapaxes(1, 2) if operation == OP_T else matrices


def obey(plan, problem, memory_a, memory_b):
    """Memory of D after D = op(A) op(B) by the descriptors alone; their first operand is our b."""
    batch = plan["lt_d.batch_count"]
    left = column_major(memory_b, plan, "lt_a", plan["trans_a"], batch)
    right = column_major(memory_a, plan, "lt_b", plan["trans_b"], batch)
    result = left @ right
    rows, cols = plan["lt_d.rows"], plan["lt_d.cols"]
    assert result.shape == (batch, rows, cols)
    ld, stride = plan["lt_d.ld"], plan["lt_d.batch_stride"]
    memory = np.full(problem.batch * problem.d.batch_stride + problem.m * problem.d.ld + 5, np.nan)
    b, i, j = np.ogrid[:batch, :rows, :cols]
    memory[b * stride + j * ld + i] = result
    return memory


def check_plan_computes_the_product(problem):
    plan = read_back(problem)
    for prefix in ("lt_a", "lt_b", "lt_d"):
        assert plan[f"{prefix}.order"] == ORDER_COL
        assert plan[f"{prefix}.batch_count"] == problem.batch
        assert plan[f"{prefix}.ld"] >= plan[f"{prefix}.rows"]
    memory_a, a = fill_memory(problem.a, problem.batch, problem.m, problem.k, 0)
    memory_b, b = fill_memory(problem.b, problem.batch, problem.k, problem.n, 1)
    memory = obey(plan, problem, memory_a, memory_b)
    items, row, col = np.ogrid[: problem.batch, : problem.m, : problem.n]
    item_stride, row_stride, col_stride = problem.d.strides()
    where = items * item_stride + row * row_stride + col * col_stride
    np.testing.assert_allclose(memory[where], a @ b, rtol=1e-12)
    # Nothing but the product was written.
    untouched = np.ones(memory.size, bool)
    untouched[where] = False
    assert np.isnan(memory[untouched]).all()


@pytest.mark.parametrize("dtype", CUDA_TYPES)
@pytest.mark.parametrize("a_transposed", (False, True))
@pytest.mark.parametrize("b_transposed", (False, True))
def test_plan_computes_the_product(dtype, a_transposed, b_transposed):
    problem = make_problem(
        left=dtype,
        right="e4m3" if dtype == "e5m2" else dtype,
        out="bf16",
        a=make_matrix(dtype, 4, 8, transposed=a_transposed, gap=3, skip=7),
        b=make_matrix("e4m3" if dtype == "e5m2" else dtype, 8, 6, transposed=b_transposed, gap=2),
        d=make_matrix("bf16", 4, 6, gap=1, skip=11),
    )
    check_plan_computes_the_product(problem)


@pytest.mark.parametrize("name", ("a", "b"))
def test_plan_broadcasts_with_stride_zero(name):
    problem = make_problem()
    problem = replace(problem, **{name: replace(getattr(problem, name), batch_stride=0)})
    check_plan_computes_the_product(problem)
    assert read_back(problem)[f"lt_{'b' if name == 'a' else 'a'}.batch_stride"] == 0


def test_plan_of_interleaved_batches():
    # [S, G, D] with G as batch: the batch stride is below the leading dimension.
    check_plan_computes_the_product(
        make_problem(
            a=Matrix("bf16", ld=3 * 8, batch_stride=8),
            b=Matrix("bf16", ld=3 * 8, batch_stride=8, transposed=True),
            d=Matrix("bf16", ld=3 * 6, batch_stride=6),
        )
    )


dims = st.integers(1, 9)


@given(dims, dims, dims, st.integers(1, 4), st.data())
def test_plan_computes_any_product(m, n, k, batch, data):
    def matrix(dtype, rows, cols, transposed, may_broadcast):
        return make_matrix(
            dtype,
            rows,
            cols,
            transposed=transposed,
            gap=data.draw(st.integers(0, 3)),
            skip=data.draw(st.integers(0, 3)),
            broadcast=may_broadcast and data.draw(st.booleans()),
        )

    check_plan_computes_the_product(
        make_problem(
            m,
            n,
            k,
            batch,
            a=matrix("bf16", m, k, data.draw(st.booleans()), True),
            b=matrix("bf16", k, n, data.draw(st.booleans()), True),
            d=matrix("bf16", m, n, False, False),
        )
    )


def test_types_stay_with_their_operands():
    plan = read_back(make_problem(left="e4m3", right="e5m2", out="fp16"))
    assert plan["lt_b.type"] == CUDA_TYPES["e4m3"]
    assert plan["lt_a.type"] == CUDA_TYPES["e5m2"]
    assert plan["lt_d.type"] == CUDA_TYPES["fp16"]
    assert "lt_c.type" not in plan


def test_fp8_output_has_a_c_of_16_bits_with_the_layout_of_d():
    problem = make_problem(left="e4m3", out="e4m3", d=make_matrix("e4m3", 4, 6, gap=2, skip=5))
    plan = read_back(problem)
    assert plan["lt_d.type"] == CUDA_TYPES["e4m3"]
    assert plan["lt_c.type"] == CUDA_TYPES["bf16"]
    for name in ("rows", "cols", "ld", "batch_count", "batch_stride"):
        assert plan[f"lt_c.{name}"] == plan[f"lt_d.{name}"]


def test_strides_and_leading_dimensions_keep_64_bits():
    problem = make_problem(
        m=70000,
        a=Matrix("bf16", ld=2**31 + 16, batch_stride=2**47 + 8),
        b=Matrix("bf16", ld=8, batch_stride=2**33, transposed=True),
        d=Matrix("bf16", ld=2**32 + 6, batch_stride=2**48),
    )
    plan = read_back(problem)
    assert plan["lt_b.ld"] == 2**31 + 16
    assert plan["lt_b.batch_stride"] == 2**47 + 8
    assert plan["lt_a.batch_stride"] == 2**33
    assert plan["lt_d.ld"] == 2**32 + 6
    assert plan["lt_d.batch_stride"] == 2**48
    assert plan["lt_d.cols"] == 70000


def test_batch_count_up_to_int32():
    assert read_back(make_problem(batch=2**31 - 1))["lt_a.batch_count"] == 2**31 - 1
    with pytest.raises(ValueError, match="batch count beyond int32 in Problem.batch=2147483648"):
        to_native(make_problem(batch=2**31))


def test_compute_type():
    assert read_back(make_problem(left="fp32", out="fp32"))["compute_type"] == COMPUTE_32F
    tf32 = make_problem(left="fp32", out="fp32", allow_tf32=True)
    assert read_back(tf32)["compute_type"] == COMPUTE_32F_FAST_TF32
    # The switch is for FP32 operands; others keep full FP32 sums.
    assert read_back(make_problem(allow_tf32=True))["compute_type"] == COMPUTE_32F


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogue(epilogue):
    plan = read_back(make_problem(epilogue=epilogue))
    assert plan["epilogue"] == EPILOGUES[epilogue]


@pytest.mark.parametrize("bias_dtype", ("fp32", "fp16", "bf16"))
@pytest.mark.parametrize("stride", (0, 6, 2**33))
def test_bias(bias_dtype, stride):
    plan = read_back(make_problem(epilogue="bias", bias_dtype=bias_dtype, bias_batch_stride=stride))
    assert plan["bias_type"] == CUDA_TYPES[bias_dtype]
    assert plan["bias_batch_stride"] == stride


def test_fast_accumulation():
    for fast in (False, True):
        plan = read_back(make_problem(left="e4m3", fast_accumulation=fast))
        assert plan["fast_accum"] == int(fast)


def test_scale_modes():
    tensor = read_back(make_problem(left="e4m3"))
    assert (tensor["scale_mode_a"], tensor["scale_mode_b"]) == (SCALE_SCALAR_32F,) * 2
    block = make_problem(
        m=4,
        n=6,
        k=64,
        a=make_matrix("e4m3", 4, 64, scale_mode="block32"),
        b=make_matrix("e5m2", 64, 6, transposed=True, scale_mode="block32"),
    )
    plan = read_back(block)
    assert (plan["scale_mode_a"], plan["scale_mode_b"]) == (SCALE_VEC32_UE8M0,) * 2
    assert (plan["lt_a.type"], plan["lt_b.type"]) == (CUDA_TYPES["e5m2"], CUDA_TYPES["e4m3"])


def test_sm_count():
    assert read_back(make_problem())["sm_count_target"] == 0
    assert read_back(make_problem(sm_count=100))["sm_count_target"] == 100


# A problem in which each field has a value that another legal one can replace.
FULL = make_problem(left="e4m3", right="e4m3", out="bf16", epilogue="bias")
CHANGES = {
    "batch": 2,
    "m": 3,
    "n": 5,
    "k": 7,
    "epilogue": "gelu_bias",
    "bias_dtype": "fp16",
    "bias_batch_stride": 6,
    "accumulate": True,
    "fast_accumulation": True,
    "allow_tf32": True,
    "device": 1,
    "sm_count": 100,
    "workspace_limit": 32,
}
MATRIX_CHANGES = {
    "dtype": "e5m2",
    "ld": 99,
    "batch_stride": 999,
    "transposed": True,
}


def changed_problems():
    for name, value in CHANGES.items():
        yield name, FULL, replace(FULL, **{name: value})
    for which, (name, value) in product("ab", MATRIX_CHANGES.items()):
        matrix = getattr(FULL, which)
        value = not matrix.transposed if name == "transposed" else value
        base = replace(FULL, **{which: replace(matrix, ld=50)})
        changed = replace(getattr(base, which), **{name: value})
        yield f"{which}.{name}", base, replace(base, **{which: changed})
    for name, value in (("dtype", "fp16"), ("ld", 99), ("batch_stride", 999)):
        yield f"d.{name}", FULL, replace(FULL, d=replace(FULL.d, **{name: value}))
    fp8 = replace(FULL, d=make_matrix("e4m3", 4, 6))
    yield "amax_d", fp8, replace(fp8, amax_d=True)
    block = make_problem(left="e4m3", k=64)
    scaled = {
        name: replace(getattr(block, name), scale_mode="block32", batch_stride=999) for name in "ab"
    }
    tensor = {name: replace(matrix, scale_mode="tensor") for name, matrix in scaled.items()}
    yield "scale_mode", replace(block, **tensor), replace(block, **scaled)


@pytest.mark.parametrize(
    "name, base, other", list(changed_problems()), ids=[name for name, *_ in changed_problems()]
)
def test_every_field_is_part_of_the_key(name, base, other):
    one, same, two = to_native(base), to_native(base), to_native(other)
    assert one == same and hash(one) == hash(same)
    assert not one == two
    assert hash(one) != hash(two)
    assert repr(one) != repr(two)


def test_every_python_field_is_changed_above():
    covered = {name.partition(".")[0] for name, _, _ in changed_problems()} - {"scale_mode"}
    assert covered == {field.name for field in fields(Problem)}


def test_small_problems_have_different_hashes():
    hashes = {
        hash(to_native(make_problem(m, n, k, batch)))
        for m, n, k, batch in product(range(1, 9), repeat=4)
    }
    assert len(hashes) == 8**4


BAD_PROBLEMS = {
    "empty": (dict(k=0), "empty product in Problem"),
    "a.ld": (dict(a=Matrix("bf16", 7, 32)), "operand a: leading dimension smaller than a row"),
    "b.ld": (dict(b=Matrix("bf16", 5, 48)), "operand b: leading dimension smaller than a row"),
    "b.ld transposed": (
        dict(b=Matrix("bf16", 7, 48, transposed=True)),
        "operand b: leading dimension smaller than a row",
    ),
    "d.ld": (dict(d=Matrix("bf16", 5, 24)), "operand d: leading dimension smaller than a row"),
    "stride": (dict(a=Matrix("bf16", 8, -1)), "operand a: negative batch stride"),
    "scale": (dict(a=Matrix("bf16", 8, 32, scale_mode="tensor")), "operand a: FP8 needs a scale"),
    "no scale": (dict(b=Matrix("e4m3", 8, 48, True)), "operand b: FP8 needs a scale"),
    "modes": (
        dict(a=Matrix("e4m3", 8, 32, scale_mode="tensor")),
        "operands a and b: different scale modes",
    ),
    "e5m2": (
        dict(
            a=Matrix("e5m2", 8, 32, scale_mode="tensor"),
            b=Matrix("e5m2", 8, 48, True, scale_mode="tensor"),
        ),
        "e5m2 x e5m2 has no tensor-core instruction",
    ),
    "d transposed": (dict(d=Matrix("bf16", 8, 48, True)), "operand d: transposed output"),
    "d block": (dict(d=Matrix("e4m3", 8, 48, False, "block32")), "operand d: block-scaled output"),
    "d broadcast": (dict(d=Matrix("bf16", 6, 0)), "operand d: broadcast output"),
    "amax": (dict(amax_d=True), "amax of an output that is not FP8"),
    "accumulate": (
        dict(d=Matrix("e4m3", 6, 24, scale_mode="tensor"), accumulate=True),
        "accumulation into FP8",
    ),
    "fast": (dict(fast_accumulation=True), "fast accumulation of other than FP8"),
    "block broadcast": (
        dict(
            k=64,
            a=Matrix("e4m3", 64, 0, scale_mode="block32"),
            b=Matrix("e4m3", 64, 384, True, scale_mode="block32"),
        ),
        "broadcast batch of a block-scaled operand",
    ),
    "limit": (dict(workspace_limit=-1), "negative limit"),
}


@pytest.mark.parametrize("changes, text", BAD_PROBLEMS.values(), ids=BAD_PROBLEMS)
def test_check_refuses_and_names_the_problem(changes, text):
    with pytest.raises(ValueError, match=text) as caught:
        to_native(make_problem(**changes))
    assert "Problem(batch=3, m=4, n=6" in str(caught.value)


def test_repr_is_the_whole_problem():
    problem = make_problem(
        left="e4m3",
        right="e5m2",
        out="e4m3",
        epilogue="bias",
        fast_accumulation=True,
        amax_d=True,
        sm_count=100,
        workspace_limit=64,
    )
    assert repr(to_native(problem)) == (
        "Problem(batch=3, m=4, n=6, k=8, a=e4m3(ld=8, batch_stride=32, scale=tensor), "
        "b=e5m2(ld=8, batch_stride=48, transposed, scale=tensor), "
        "d=e4m3(ld=6, batch_stride=24, scale=tensor), epilogue=bias, bias=bf16(batch_stride=0), "
        "fast_accumulation, amax_d, sm_count=100, device=0, workspace_limit=64)"
    )


def test_stored_problems_come_back():
    for _, base, other in changed_problems():
        for problem in (base, other):
            assert problem_from_dict(problem_to_dict(problem)) == problem


def test_alignment_is_the_largest_power_of_two_up_to_256():
    pointers = _C.Pointers(0x1000, 0x1010, 0x1008, 1, 2, 3, 4, 0x1002)
    assert tuple(_C.alignment_of(pointers)) == (256, 16, 8, 2)
    assert tuple(_C.alignment_of(_C.Pointers(*[0] * 8))) == (256,) * 4


def test_matrix_strides():
    assert Matrix("bf16", 10, 100).strides() == (100, 10, 1)
    assert Matrix("bf16", 10, 100, True).strides() == (100, 1, 10)
