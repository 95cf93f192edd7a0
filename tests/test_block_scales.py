# SPDX-License-Identifier: Apache-2.0
"""Scale tiles against the formula of the cuBLAS manual and TE's index function, byte by byte.

The expectations are loops over plain integers that share no code with the package. Needs no GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch  # before TE: it loads the libraries that TE links to
import transformer_engine.pytorch as te
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_engine_batched import block_scales
from transformer_engine_batched.block_scales import (
    gather_packed,
    item_scales,
    pack_tiles,
    packed_scale_size,
    tile_offset,
    unpack_tiles,
)
from transformer_engine_batched.errors import UnsupportedError
from transformer_engine_batched.reference.quantizers import mxfp8_block_scales, quantize

OUTERS = (1, 96, 128, 129, 389)
INNERS = (1, 4, 5, 8, 23)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def documented_offset(r: int, c: int, inner: int) -> int:
    """The manual's text: tiles of 128 x 4 in rows, and the place inside a tile."""
    tiles_in_a_row = -(-inner // 4)
    tile = (r // 128) * tiles_in_a_row + c // 4
    return tile * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + (c % 4)


def documented_packing(matrix: np.ndarray) -> np.ndarray:
    """One item, [outer, inner], packed scale by scale."""
    outer, inner = matrix.shape
    out = np.zeros(-(-outer // 128) * -(-inner // 4) * 512, np.uint8)
    for r in range(outer):
        for c in range(inner):
            out[documented_offset(r, c, inner)] = matrix[r, c]
    return out


def random_scales(*shape: int, device: str = "cpu") -> torch.Tensor:
    """Bytes of which none is 0, so that padding is told from data."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(1, 256, shape, generator=generator).to(device, torch.uint8)


def check_packing(pack, batch: int, outer: int, inner: int, device: str = "cpu") -> None:
    scales = random_scales(batch, outer, inner, device=device)
    packed = pack(scales)
    assert packed.shape == (batch, packed_scale_size(outer, inner))
    assert packed.is_contiguous() and packed.dtype == torch.uint8
    for b in range(batch):
        expected = documented_packing(scales[b].cpu().numpy())
        np.testing.assert_array_equal(packed[b].cpu().numpy(), expected)


def test_sizes():
    for outer in OUTERS:
        for inner in INNERS:
            size = packed_scale_size(outer, inner)
            assert size % 512 == 0 and size >= outer * inner
            # Every address of the padded matrix is used once.
            rows = range(-(-outer // 128) * 128)
            cols = range(-(-inner // 4) * 4)
            offsets = {tile_offset(r, c, outer, inner) for r in rows for c in cols}
            assert offsets == set(range(size))
    assert packed_scale_size(0, 5) == 0 and packed_scale_size(5, 0) == 0


@pytest.mark.parametrize("inner", INNERS)
def test_tile_offset_of_ints_and_of_tensors(inner):
    for outer in OUTERS:
        expected = [[documented_offset(r, c, inner) for c in range(inner)] for r in range(outer)]
        rows, cols = torch.arange(outer).unsqueeze(1), torch.arange(inner).unsqueeze(0)
        assert tile_offset(rows, cols, outer, inner).tolist() == expected
        assert tile_offset(outer - 1, inner - 1, outer, inner) == expected[-1][-1]


def test_tile_offset_is_the_manuals_inverse():
    """The manual gives the way back as well: outer = ((o % 16) / 4) * 32 + o / 16, inner = o % 4."""
    for offset in range(512):
        outer, inner = (offset % 16) // 4 * 32 + offset // 16, offset % 4
        assert tile_offset(outer, inner, 128, 4) == offset


def test_tile_offset_outside_the_tiles():
    with pytest.raises(ValueError, match="outer_index 128 lies outside .* 100 x 5 .* end at 128"):
        tile_offset(128, 0, 100, 5)
    with pytest.raises(ValueError, match="inner_index -1 lies outside .* end at 8"):
        tile_offset(0, -1, 100, 5)
    assert tile_offset(127, 7, 100, 5) == 1023


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("outer", OUTERS)
def test_pack_is_the_documented_formula(outer, inner, batch, device):
    check_packing(pack_tiles, batch, outer, inner, device)
    scales = random_scales(batch, outer, inner, device=device)
    packed = pack_tiles(scales)
    assert torch.equal(gather_packed(packed, outer, inner), scales)
    assert torch.equal(unpack_tiles(packed, outer, inner), scales)


def test_pack_reads_any_strides():
    base = random_scales(7, 3, 390)
    scales = base.permute(1, 2, 0)[:, ::3]
    assert torch.equal(pack_tiles(scales), pack_tiles(scales.contiguous()))
    expanded = random_scales(1, 40, 6).expand(3, 40, 6)
    assert torch.equal(pack_tiles(expanded), pack_tiles(expanded[:1]).repeat(3, 1))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
def test_empty(shape):
    packed = pack_tiles(random_scales(*shape))
    assert packed.shape == (shape[0], packed_scale_size(*shape[1:]))
    assert unpack_tiles(packed, *shape[1:]).shape == shape
    assert gather_packed(packed, *shape[1:]).shape == shape


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 400), st.integers(1, 40))
def test_round_trips(batch, outer, inner):
    scales = random_scales(batch, outer, inner)
    packed = pack_tiles(scales)
    assert torch.equal(unpack_tiles(packed, outer, inner), scales)
    assert torch.equal(gather_packed(packed, outer, inner), scales)
    assert torch.equal(pack_tiles(unpack_tiles(packed, outer, inner)), packed)
    assert packed.count_nonzero() == scales.numel()


def round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def te_buffer(num_items, rows, cols, columnwise: bool, swizzled: bool, device="cpu"):
    """A flattened matrix of scales in TE's buffer, and the same as one array per item.

    Compact buffers carry garbage in their padding, as TE's do.
    """
    flat_rows = num_items * rows
    flat = (
        random_scales(flat_rows // 32, cols) if columnwise else random_scales(flat_rows, cols // 32)
    )
    if columnwise:
        shape = round_up(flat_rows // 32, 4), round_up(cols, 128)
        items = [flat[b * (rows // 32) : (b + 1) * (rows // 32)].t() for b in range(num_items)]
    else:
        shape = round_up(flat_rows, 128), round_up(cols // 32, 4)
        items = [flat[b * rows : (b + 1) * rows] for b in range(num_items)]
    if swizzled:
        # TE swizzles column-wise scales with the column as the outer index.
        outer_first = flat.t() if columnwise else flat
        buffer = torch.from_numpy(documented_packing(outer_first.numpy())).view(shape)
    else:
        buffer = random_scales(*shape)
        buffer[: flat.shape[0], : flat.shape[1]] = flat
    return buffer.to(device), [item.numpy() for item in items]


def check_item_scales(function, sizes, columnwise, swizzled, device="cpu") -> None:
    buffer, items = te_buffer(*sizes, columnwise, swizzled, device)
    num_items, rows, cols = sizes
    packed = function(
        buffer, num_items=num_items, rows=rows, cols=cols, columnwise=columnwise, swizzled=swizzled
    )
    assert packed.is_contiguous()
    assert packed.shape[0] == num_items
    for got, item in zip(packed, items):
        np.testing.assert_array_equal(got.cpu().numpy(), documented_packing(item))


ROWWISE_SIZES = ((1, 96, 160), (2, 48, 32), (2, 129, 256), (3, 389, 736), (2, 128, 160), (3, 1, 32))
COLUMNWISE_SIZES = (
    (1, 160, 96),
    (2, 32, 1),
    (2, 256, 129),
    (3, 736, 389),
    (2, 160, 128),
    (2, 96, 5),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("sizes", ROWWISE_SIZES)
def test_item_scales_rowwise(sizes, swizzled, device):
    check_item_scales(item_scales, sizes, False, swizzled, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("sizes", COLUMNWISE_SIZES)
def test_item_scales_columnwise(sizes, swizzled, device):
    check_item_scales(item_scales, sizes, True, swizzled, device)


@pytest.mark.parametrize(
    "sizes, columnwise, is_view",
    [
        ((1, 96, 160), False, True),
        ((3, 128, 160), False, True),
        ((2, 384, 32), False, True),
        ((2, 96, 160), False, False),
        ((1, 96, 160), True, True),
        ((3, 128, 96), True, True),
        ((2, 256, 128), True, True),
        ((2, 128, 129), True, False),
        ((2, 96, 128), True, False),
    ],
)
def test_swizzled_scales_are_a_view_where_tiles_are_whole_items(sizes, columnwise, is_view):
    check_item_scales(item_scales, sizes, columnwise, True)
    buffer, _ = te_buffer(*sizes, columnwise, True)
    num_items, rows, cols = sizes
    packed = item_scales(
        buffer, num_items=num_items, rows=rows, cols=cols, columnwise=columnwise, swizzled=True
    )
    assert (packed.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()) == is_view
    inner = (rows if columnwise else cols) // 32
    assert packed.shape == (num_items, packed_scale_size(cols if columnwise else rows, inner))


@settings(max_examples=40, deadline=None)
@given(
    num_items=st.integers(1, 4),
    rows=st.integers(1, 12),
    cols=st.integers(1, 12),
    ragged=st.integers(0, 31),
    columnwise=st.booleans(),
    swizzled=st.booleans(),
)
def test_item_scales_of_any_size(num_items, rows, cols, ragged, columnwise, swizzled):
    if columnwise:
        sizes = num_items, rows * 32, cols * 32 + ragged
    else:
        sizes = num_items, rows * 32 + ragged, cols * 32
    check_item_scales(item_scales, sizes, columnwise, swizzled)


@pytest.mark.parametrize("columnwise", [False, True])
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("sizes", [(0, 32, 64), (2, 0, 64), (2, 32, 0)])
def test_item_scales_empty(sizes, swizzled, columnwise):
    check_item_scales(item_scales, sizes, columnwise, swizzled)


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("shape", [(2, 96, 160), (3, 128, 64), (2, 4, 64, 96), (2, 16, 32)])
def test_scales_of_a_quantized_batch_are_those_of_its_items(shape, swizzled):
    """From quantizer to the address that hardware reads, against each item on its own."""
    quantizer = te.MXFP8Quantizer(te.DType.kFloat8E4M3)
    quantizer.optimize_for_gemm = swizzled
    torch.manual_seed(1)
    x = torch.randn(shape) * torch.exp2(torch.randint(-20, 20, shape))
    parts = quantize(x, quantizer).get_metadata()
    rows, cols = shape[-2:]
    items = x.reshape(-1, rows, cols)
    for columnwise, name in ((False, "rowwise"), (True, "columnwise")):
        if columnwise and rows % 32:
            continue
        outer, inner = (cols, rows // 32) if columnwise else (rows, cols // 32)
        packed = item_scales(
            parts[f"{name}_scale_inv"],
            num_items=len(items),
            rows=rows,
            cols=cols,
            columnwise=columnwise,
            swizzled=swizzled,
        )
        read = gather_packed(packed, outer, inner)
        for item, scales in zip(items, read):
            expected = mxfp8_block_scales(item, torch.float8_e4m3fn, columnwise=columnwise)
            assert torch.equal(scales.t() if columnwise else scales, expected)


def test_blocks_that_cross_items_are_refused():
    scales = torch.zeros(4, 128, dtype=torch.uint8)
    options = {"cols": 64, "columnwise": True, "swizzled": False}
    with pytest.raises(
        UnsupportedError, match=r"\[2, 48, 64\].*cross.*pad every item with 16 rows"
    ):
        item_scales(scales, num_items=2, rows=48, **options)
    with pytest.raises(ValueError, match=r"\[1, 48, 64\] cannot exist: num_items \* rows = 48"):
        item_scales(scales, num_items=1, rows=48, **options)
    with pytest.raises(ValueError, match=r"\[1, 64, 48\] cannot exist: cols = 48"):
        item_scales(scales, num_items=1, rows=64, cols=48, columnwise=False, swizzled=False)


def test_buffers_that_are_refused():
    options = {"num_items": 2, "rows": 96, "cols": 64, "columnwise": False, "swizzled": True}
    with pytest.raises(ValueError, match=r"\(256, 4\) in TE and came with shape \(4, 256\)"):
        item_scales(torch.zeros(4, 256, dtype=torch.uint8), **options)
    with pytest.raises(ValueError, match="two-dimensional scale buffer and came as torch.uint8"):
        item_scales(torch.zeros(1024, dtype=torch.uint8), **options)
    with pytest.raises(TypeError, match="must be torch.uint8 .* torch.int32"):
        item_scales(torch.zeros(256, 4, dtype=torch.int32), **options)
    with pytest.raises(TypeError, match="`scales` must be torch.uint8"):
        pack_tiles(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match=r"`scales` must be \[batch, outer, inner\]"):
        pack_tiles(torch.zeros(2, 3, dtype=torch.uint8))
    for read in (unpack_tiles, gather_packed):
        with pytest.raises(ValueError, match="129 x 4 matrix are 1024 bytes per item .* as 512"):
            read(torch.zeros(1, 512, dtype=torch.uint8), 129, 4)


def planted_flattened_rows(scales, *, num_items, rows, cols, columnwise, swizzled):
    """Packs the flattened matrix once instead of every item on its own, and cuts it in pieces."""
    inner = cols // 32
    packed = pack_tiles(scales[None, : num_items * rows, :inner])[0]
    out = packed.new_zeros(num_items, packed_scale_size(rows, inner)).flatten()
    out[: packed.numel()] = packed[: out.numel()]
    return out.view(num_items, -1)


def planted_untransposed(scales, *, num_items, rows, cols, columnwise, swizzled):
    """Takes the row blocks as the outer dimension of column-wise scales."""
    compact = scales[: num_items * rows // 32, :cols]
    return pack_tiles(compact.reshape(num_items, rows // 32, cols))


def planted_swapped_items(scales, *, num_items, **options):
    return item_scales(scales, num_items=num_items, **options).flip(0).contiguous()


def test_packing_over_the_flattened_rows_is_noticed():
    for sizes in ROWWISE_SIZES[1:4]:
        with pytest.raises(AssertionError):
            check_item_scales(planted_flattened_rows, sizes, False, False)
    # Where the tiles of the flattened matrix are the items', there is nothing to notice.
    check_item_scales(planted_flattened_rows, (2, 128, 160), False, False)


def test_other_planted_bugs_are_noticed():
    with pytest.raises(AssertionError):
        check_item_scales(planted_untransposed, (2, 256, 129), True, False)
    with pytest.raises(AssertionError):
        check_item_scales(planted_swapped_items, (2, 96, 160), False, False)

    def swapped_groups(scales):
        return pack_tiles(scales).view(len(scales), -1, 16, 32).transpose(2, 3).flatten(1)

    with pytest.raises(AssertionError):
        check_packing(swapped_groups, 1, 96, 4)
    with pytest.raises(AssertionError):
        check_packing(lambda scales: pack_tiles(scales.roll(1, 1)), 2, 129, 5)
    assert block_scales.TILE_OUTER == 128 and block_scales.TILE_INNER == 4
