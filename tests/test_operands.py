# SPDX-License-Identifier: Apache-2.0
"""Batching as arithmetic: addresses counted one by one, against those of torch and of the formulas.

Inputs are shapes and strides. Allocates tensors of a few hundred elements at most; sizes beyond that are
plain integers.
"""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformer_engine_batched.operands import (
    Operand,
    broadcast_shapes,
    contiguous_strides,
    fold_batch,
    has_internal_overlap,
    num_elements_spanned,
    round_up,
)

sizes = st.integers(1, 4)
shapes = st.lists(sizes, min_size=2, max_size=5).map(tuple)


@st.composite
def views(draw):
    """A view of a flat arange, so that the values of its elements are their addresses."""
    shape = draw(shapes)
    padded = tuple(size + draw(st.integers(0, 2)) for size in shape)
    order = draw(st.permutations(range(len(shape))))
    flat = torch.arange(prod(padded))
    view = flat.reshape([padded[dim] for dim in order])
    inverse = [order.index(dim) for dim in range(len(shape))]
    view = view.permute(inverse)
    for dim, size in enumerate(shape):
        start = draw(st.integers(0, padded[dim] - size))
        step = draw(st.sampled_from((1, 1, 2)))
        view = view.narrow(dim, start, size)[(slice(None),) * dim + (slice(None, None, step),)]
    for dim, size in enumerate(view.shape):
        if size == 1 and draw(st.booleans()):
            view = view.expand(*view.shape[:dim], draw(sizes), *view.shape[dim + 1 :])
    return view


def addresses(operand: Operand) -> list[int]:
    """Addresses of all elements relative to the first, in the order of the indices."""
    ranges = [range(size) for size in (*operand.batch_shape, operand.rows, operand.cols)]
    strides = (*operand.batch_strides, operand.row_stride, operand.col_stride)
    return [sum(i * step for i, step in zip(index, strides)) for index in product(*ranges)]


def view_addresses(view: torch.Tensor) -> list[int]:
    return (view - view.flatten()[0]).flatten().tolist()


@given(views())
def test_operand_of_a_view_has_its_addresses(view):
    operand = Operand.from_strides(tuple(view.shape), view.stride())
    assert addresses(operand) == view_addresses(view)
    assert addresses(operand.mT) == view_addresses(view.mT)
    assert operand.mT.mT == operand


@given(views())
def test_matrix_reads_what_the_operand_describes(view):
    operand = Operand.from_strides(tuple(view.shape), view.stride())
    for preferred in (False, True):
        transposed = operand.choose_orientation(preferred)
        if transposed is None:
            assert not operand.fits(False) and not operand.fits(True)
            continue
        assert operand.fits(transposed)
        assert transposed == preferred or not operand.fits(preferred)
        matrix = operand.matrix("fp32", "none", 0, transposed)
        _, row_stride, col_stride = matrix.strides()
        first = view[(0,) * (view.dim() - 2)]
        found = first.flatten()[0] + torch.tensor(
            [
                [r * row_stride + c * col_stride for c in range(operand.cols)]
                for r in range(operand.rows)
            ]
        )
        assert torch.equal(found, first)
        # cuBLASLt refuses a leading dimension below the contiguous size.
        assert matrix.ld >= (operand.rows if transposed else operand.cols)


@given(views())
def test_a_view_with_a_contiguous_matrix_dim_needs_no_copy(view):
    operand = Operand.from_strides(tuple(view.shape), view.stride())
    rows, cols = view.shape[-2:]
    row_stride, col_stride = view.stride()[-2:]
    readable = (col_stride == 1 and row_stride >= cols) or (row_stride == 1 and col_stride >= rows)
    if readable:
        assert operand.choose_orientation(False) is not None


def fold(views_: list[torch.Tensor]) -> list[list[int]]:
    """Addresses of the items of each view, as the folded batch visits them."""
    shape = tuple(views_[0].shape[:-2])
    folded = fold_batch(shape, *(view.stride()[:-2] for view in views_))
    visited = [[] for _ in views_]
    for offsets in folded.offsets:
        for item in range(folded.size):
            for which, (offset, stride) in enumerate(zip(offsets, folded.strides)):
                visited[which].append(offset + item * stride)
    return visited


@given(st.data())
def test_fold_batch_visits_every_item_of_all_operands_together(data):
    batch = data.draw(st.lists(sizes, min_size=0, max_size=4).map(tuple))
    views_ = []
    for _ in range(data.draw(st.integers(1, 3))):
        own = tuple(data.draw(st.sampled_from((size, size, 1))) for size in batch)
        order = data.draw(st.permutations(range(len(batch))))
        gap = data.draw(st.integers(0, 1))
        base = torch.empty([own[dim] + gap for dim in order] + [2, 3])
        view = base.permute([order.index(dim) for dim in range(len(batch))] + [-2, -1])
        view = view[tuple(slice(0, size) for size in own)]
        views_.append(view.expand(*batch, 2, 3))
    items = [
        [sum(i * step for i, step in zip(index, view.stride())) for view in views_]
        for index in product(*(range(size) for size in batch))
    ]
    assert sorted(zip(*fold(views_))) == sorted(map(tuple, items))


@pytest.mark.parametrize(
    "view, size, stride",
    [
        (torch.empty(4, 5, 2, 3), 20, 6),
        (torch.empty(4, 5, 2, 3).mT, 20, 6),
        (torch.empty(4, 5, 6, 8)[:, :, :2, :3], 20, 48),
        (torch.empty(7, 4, 3).transpose(0, 1), 4, 3),  # [S, G, D] with G as batch
        (torch.empty(1, 6, 1, 2, 3), 6, 6),
        (torch.empty(2, 3).expand(4, 5, 2, 3), 20, 0),
        (torch.empty(2, 3), 1, 0),
    ],
    ids=["contiguous", "transposed", "sliced", "interleaved", "ones", "broadcast", "matrix"],
)
def test_fold_batch_merges_what_one_stride_describes(view, size, stride):
    folded = fold_batch(tuple(view.shape[:-2]), view.stride()[:-2])
    assert (folded.size, folded.strides, folded.offsets) == (size, (stride,), ((0,),))


def test_fold_batch_loops_around_the_largest_dim():
    # A repeats along the first dim, B along the second: no single stride serves both.
    folded = fold_batch((2, 9), (0, 6), (4, 0))
    assert folded.size == 9
    assert folded.strides == (6, 0)
    assert folded.offsets == ((0, 0), (0, 4))
    folded = fold_batch((9, 2), (6, 0), (0, 4))
    assert (folded.size, folded.strides, folded.offsets) == (9, (6, 0), ((0, 0), (0, 4)))


def test_fold_batch_beyond_32_bits():
    item = 50000 * 60000  # 3e9 elements
    folded = fold_batch((3, 4), (4 * item, item))
    assert (folded.size, folded.strides) == (12, (item,))
    folded = fold_batch((3, 4), (5 * item, item))
    assert (folded.size, folded.strides) == (4, (item,))
    assert folded.offsets == ((0,), (5 * item,), (10 * item,))


def test_leading_dimension_and_span_beyond_32_bits():
    shape, strides = (2, 70000, 50000), (2**33, 2**32, 1)
    operand = Operand.from_strides(shape, strides)
    assert operand.leading_dimension(False) == 2**32
    assert operand.matrix("bf16", "none", 2**33, False).strides() == (2**33, 2**32, 1)
    assert num_elements_spanned(shape, strides) == 1 + 2**33 + 69999 * 2**32 + 49999
    assert contiguous_strides((3, 70000, 50000)) == (3_500_000_000, 50000, 1)


@given(views(), st.sampled_from((1, 4, 16)), st.sampled_from((1, 4, 16)), st.booleans())
def test_packed_copy_is_padded_readable_and_not_repeated(view, row_multiple, col_multiple, flip):
    operand = Operand.from_strides(tuple(view.shape), view.stride())
    for repeat in (False, True):
        copy = operand.packed(
            transposed=flip, row_multiple=row_multiple, col_multiple=col_multiple, repeat=repeat
        )
        read = copy.operand
        assert read.batch_shape == operand.batch_shape
        assert read.rows == round_up(operand.rows, row_multiple)
        assert read.cols == round_up(operand.cols, col_multiple)
        assert read.fits(flip)
        assert max(addresses(read)) + 1 == prod(copy.stored_shape)
        repeated = [
            size
            for size, stride in zip(operand.batch_shape, operand.batch_strides)
            if stride == 0 and not repeat
        ]
        items = prod(operand.batch_shape) // prod(repeated)
        assert prod(copy.stored_shape) == items * read.rows * read.cols
        if repeat:
            assert len(set(addresses(read))) == len(addresses(read))


@given(views())
def test_expand_is_that_of_torch(view):
    operand = Operand.from_strides(tuple(view.shape), view.stride())
    wanted = (2, *(3 if size == 1 else size for size in view.shape[:-2]))
    expanded = view.expand(*wanted, *view.shape[-2:])
    assert addresses(operand.expand(wanted)) == view_addresses(expanded)


@given(
    st.lists(st.lists(st.sampled_from((1, 1, 2, 3)), max_size=4).map(tuple), min_size=2, max_size=3)
)
def test_broadcast_shapes_is_that_of_torch(batches):
    try:
        expected = tuple(torch.broadcast_shapes(*batches))
    except RuntimeError:
        expected = None
    assert broadcast_shapes(*batches) == expected


def test_broadcast_shapes_of_empty_batches():
    assert broadcast_shapes((0,), (1,)) == (0,)
    assert broadcast_shapes((), (0, 2)) == (0, 2)
    assert broadcast_shapes((0,), (2,)) is None


@given(views())
def test_num_elements_spanned(view):
    shape, strides = tuple(view.shape), view.stride()
    relative = view_addresses(view)
    assert num_elements_spanned(shape, strides) == max(relative) + 1
    assert num_elements_spanned((0, *shape), (1, *strides)) == 0


@given(shapes, st.data())
def test_no_internal_overlap_means_that_all_addresses_differ(shape, data):
    strides = tuple(data.draw(st.integers(0, 40)) for _ in shape)
    reached = [
        sum(i * step for i, step in zip(index, strides))
        for index in product(*(range(size) for size in shape))
    ]
    if not has_internal_overlap(shape, strides):
        assert len(set(reached)) == len(reached)


@given(shapes, st.data())
def test_dense_views_have_no_internal_overlap(shape, data):
    order = data.draw(st.permutations(range(len(shape))))
    view = torch.empty([size + 1 for size in shape]).permute(order)
    view = view[tuple(slice(0, size - 1) for size in view.shape)]
    assert not has_internal_overlap(tuple(view.shape), view.stride())
    expanded = view.unsqueeze(0).expand(2, *view.shape)
    assert has_internal_overlap(tuple(expanded.shape), expanded.stride())


@pytest.mark.parametrize("value, expected", [(0, 0), (1, 16), (16, 16), (17, 32), (389, 400)])
def test_round_up(value, expected):
    assert round_up(value, 16) == expected
