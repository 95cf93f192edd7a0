# SPDX-License-Identifier: Apache-2.0
"""Where cuBLASLt looks for the MXFP8 scale of a block: 128x4 tiles, packed per batch item.

Inputs are uint8 scale buffers (torch tensors on any device) and plain sizes. Must not import
Transformer Engine, the compiled extension or anything that knows of a product.

A matrix of block scales has an outer and an inner dimension. Inner counts the 32-blocks along the
contracted dimension, outer the rows (or columns) that are not contracted. cuBLASLt reads it in
tiles of 128 outer by 4 inner scales, 512 bytes each. A strided batch is the tiled matrices of its
items one after the other, each padded on its own, with no gap between them.

Source: https://docs.nvidia.com/cuda/cublas/ , section "1D block scaling factors layout". It says
nothing about batches; padding per item is what NVIDIA's nvmath-python does (example
``example36_nvfp4_batched.py``: item b starts at b times the size of one item).
"""

from __future__ import annotations

from typing import TypeVar

import torch

from .errors import UnsupportedError

BLOCK_SIZE = 32
"""Elements that share one scale."""

TILE_OUTER = 128
"""Scales of a tile along the outer dimension."""

TILE_INNER = 4
"""Scales of a tile along the contracted dimension."""

_TILE_BYTES = TILE_OUTER * TILE_INNER
# Inside a tile the 128 outer indices are four groups of 32: bytes of the same index within the
# group are neighbours, so that 32 rows of 16 bytes make up the tile.
_GROUP = 32
_GROUPS = TILE_OUTER // _GROUP

Index = TypeVar("Index", int, torch.Tensor)


def packed_scale_size(outer: int, inner: int) -> int:
    """Bytes of the packed scales of one batch item: whole tiles.

    ``round_up(outer, 128) * round_up(inner, 4)``, always a multiple of 512.

    Parameters
    ----------
    outer : int
        Rows (or columns) that are not contracted.
    inner : int
        Blocks along the contracted dimension.

    Returns
    -------
    int
        Size in bytes; also the distance from one batch item to the next.

    Examples
    --------
    >>> packed_scale_size(129, 5)
    2048
    """
    return _round_up(outer, TILE_OUTER) * _round_up(inner, TILE_INNER)


def tile_offset(outer_index: Index, inner_index: Index, outer: int, inner: int) -> Index:
    """Byte offset of one scale inside the packed scales of its batch item.

    With ``L = round_up(inner, 4)``::

        tile    = ((inner_index // 4) * 4 + (outer_index // 128) * L) * 128
        in_tile = (outer_index % 32) * 16 + (outer_index % 128) // 32 * 4 + inner_index % 4
        offset  = tile + in_tile

    Parameters
    ----------
    outer_index, inner_index : int or torch.Tensor
        Indices, both ints or both integer tensors that broadcast. May point into the padding.
    outer, inner : int
        Size of the scale matrix of one item.

    Returns
    -------
    int or torch.Tensor
        Offset in bytes, in the type of the indices.

    Raises
    ------
    ValueError
        If an int index lies outside the padded matrix. Tensors are not looked into.

    Notes
    -----
    Source: https://docs.nvidia.com/cuda/cublas/ , "1D block scaling factors layout".

    Examples
    --------
    >>> tile_offset(33, 5, outer=129, inner=5)
    533
    """
    padded_outer, padded_inner = _round_up(outer, TILE_OUTER), _round_up(inner, TILE_INNER)
    for name, index, size in (
        ("outer_index", outer_index, padded_outer),
        ("inner_index", inner_index, padded_inner),
    ):
        if isinstance(index, int) and not 0 <= index < size:
            raise ValueError(
                f"{name} {index} lies outside the tiles of a {outer} x {inner} scale matrix, "
                f"which end at {size}"
            )
    tile = (inner_index // TILE_INNER * TILE_INNER + outer_index // TILE_OUTER * padded_inner) * (
        TILE_OUTER
    )
    row_in_tile = outer_index % _GROUP
    group = outer_index % TILE_OUTER // _GROUP
    return (
        tile
        + row_in_tile * (_GROUPS * TILE_INNER)
        + group * TILE_INNER
        + (inner_index % TILE_INNER)
    )


def pack_tiles(scales: torch.Tensor) -> torch.Tensor:
    """Scale matrices into cuBLASLt's tiles, each batch item padded with zeros on its own.

    ``packed[b, tile_offset(r, c, outer, inner)] = scales[b, r, c]``

    Parameters
    ----------
    scales : torch.Tensor
        uint8 ``[batch, outer, inner]``, any strides.

    Returns
    -------
    torch.Tensor
        uint8 ``[batch, packed_scale_size(outer, inner)]``, contiguous.

    Raises
    ------
    TypeError
        If `scales` is not uint8.
    ValueError
        If `scales` is not 3-D.

    Examples
    --------
    >>> pack_tiles(torch.ones(2, 96, 5, dtype=torch.uint8)).shape
    torch.Size([2, 1024])
    """
    _require(scales, 3, "scales", "[batch, outer, inner]")
    batch, outer, inner = scales.shape
    outer_tiles, inner_tiles = _tiles(outer, inner)
    padding = (0, inner_tiles * TILE_INNER - inner, 0, outer_tiles * TILE_OUTER - outer)
    padded = torch.nn.functional.pad(scales, padding) if any(padding) else scales
    tiled = padded.reshape(batch, outer_tiles, _GROUPS, _GROUP, inner_tiles, TILE_INNER)
    packed = tiled.permute(0, 1, 4, 3, 2, 5)
    return packed.reshape(batch, outer_tiles * inner_tiles * _TILE_BYTES).contiguous()


def unpack_tiles(packed: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Scale matrices back out of cuBLASLt's tiles; the inverse of `pack_tiles`.

    ``scales[b, r, c] = packed[b, tile_offset(r, c, outer, inner)]``

    Parameters
    ----------
    packed : torch.Tensor
        uint8 ``[batch, packed_scale_size(outer, inner)]``.
    outer, inner : int
        Size of the scale matrix of one item.

    Returns
    -------
    torch.Tensor
        uint8 ``[batch, outer, inner]``.

    Raises
    ------
    TypeError
        If `packed` is not uint8.
    ValueError
        If `packed` is not 2-D or its items are not whole tiles of an `outer` x `inner` matrix.

    Examples
    --------
    >>> scales = torch.arange(7, dtype=torch.uint8).view(1, 7, 1)
    >>> unpack_tiles(pack_tiles(scales), 7, 1).flatten().tolist()
    [0, 1, 2, 3, 4, 5, 6]
    """
    _require_packed(packed, outer, inner)
    batch = packed.shape[0]
    outer_tiles, inner_tiles = _tiles(outer, inner)
    tiled = packed.reshape(batch, outer_tiles, inner_tiles, _GROUP, _GROUPS, TILE_INNER)
    padded = tiled.permute(0, 1, 4, 3, 2, 5).reshape(
        batch, outer_tiles * TILE_OUTER, inner_tiles * TILE_INNER
    )
    return padded[:, :outer, :inner]


def gather_packed(packed: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Read each scale from the address that the documented formula gives, as hardware would.

    ``scales[b, r, c] = packed[b, tile_offset(r, c, outer, inner)]``, by index arithmetic alone: it
    shares no code with `pack_tiles`, so a wrong packing shows.

    Parameters
    ----------
    packed : torch.Tensor
        uint8 ``[batch, packed_scale_size(outer, inner)]``.
    outer, inner : int
        Size of the scale matrix of one item.

    Returns
    -------
    torch.Tensor
        uint8 ``[batch, outer, inner]``.

    Raises
    ------
    TypeError
        If `packed` is not uint8.
    ValueError
        If `packed` is not 2-D or its items are not whole tiles of an `outer` x `inner` matrix.

    Examples
    --------
    >>> gather_packed(torch.arange(512).to(torch.uint8).view(1, 512), 2, 2).tolist()
    [[[0, 1], [16, 17]]]
    """
    _require_packed(packed, outer, inner)
    outer_index = torch.arange(outer, device=packed.device).unsqueeze(1)
    inner_index = torch.arange(inner, device=packed.device).unsqueeze(0)
    return packed[:, tile_offset(outer_index, inner_index, outer, inner)]


def item_scales(
    scales: torch.Tensor,
    *,
    num_items: int,
    rows: int,
    cols: int,
    columnwise: bool,
    swizzled: bool,
) -> torch.Tensor:
    """Scales of a TE MXFP8 tensor ``[num_items, rows, cols]``, packed per item for cuBLASLt.

    TE quantizes the flattened matrix ``[num_items * rows, cols]`` and pads, or tiles, that matrix as
    a whole; cuBLASLt wants every item padded and tiled on its own, along the dimension its blocks
    run: ``outer, inner = rows, cols / 32`` row-wise and ``cols, rows / 32`` column-wise.

    Parameters
    ----------
    scales : torch.Tensor
        uint8 E8M0 codes in TE's shape, row-wise
        ``[round_up(num_items * rows, 128), round_up(cols / 32, 4)]``, column-wise
        ``[round_up(num_items * rows / 32, 4), round_up(cols, 128)]``.
    num_items, rows, cols : int
        Batch size and the size of one item, as stored (not transposed).
    columnwise : bool
        Whether the blocks run along the rows.
    swizzled : bool
        Whether TE has tiled the buffer already (``optimize_for_gemm``). A column-wise buffer keeps
        the shape above then, but holds the tiles of its transpose: outer is `cols`.

    Returns
    -------
    torch.Tensor
        uint8 ``[num_items, packed_scale_size(outer, inner)]``, contiguous. A view of `scales`, with
        no copy, where TE's tiles already are those of the items one after the other: `swizzled` and
        one item, or `rows` a multiple of 128 (column-wise also `cols` of at most 128).

    Raises
    ------
    TypeError
        If `scales` is not uint8.
    ValueError
        If the shape of `scales` is not TE's for these sizes, or the blocks do not divide the
        flattened matrix.
    UnsupportedError
        If column-wise blocks cross from one item to the next, because `rows` is no multiple of 32.

    Notes
    -----
    Source of TE's layouts, 2.20.2: ``MXFP8Quantizer.get_scale_shape``; ``gemm_swizzled_scale_idx``
    in ``common/cast/mxfp8/swizzle.cuh``, called with (column, row block) for column-wise scales in
    ``common/cast/mxfp8/quantize_mxfp8.cuh``.

    Examples
    --------
    >>> scales = torch.zeros(256, 4, dtype=torch.uint8)  # TE's row-wise scales of [2, 96, 128]
    >>> packed = item_scales(
    ...     scales, num_items=2, rows=96, cols=128, columnwise=False, swizzled=False
    ... )
    >>> packed.shape
    torch.Size([2, 512])
    """
    what = f"{'column' if columnwise else 'row'}-wise MXFP8 scales of [{num_items}, {rows}, {cols}]"
    flat_rows = num_items * rows
    blocked, name = (flat_rows, "num_items * rows") if columnwise else (cols, "cols")
    if blocked % BLOCK_SIZE:
        raise ValueError(
            f"{what} cannot exist: {name} = {blocked} is not a multiple of {BLOCK_SIZE}"
        )
    if columnwise and num_items > 1 and rows % BLOCK_SIZE:
        raise UnsupportedError(
            f"{what} were asked for per item, but TE's blocks of {BLOCK_SIZE} run over the "
            f"flattened rows and cross from one item to the next, as {rows} rows are not a "
            f"multiple of {BLOCK_SIZE}; pad every item with {-rows % BLOCK_SIZE} rows of zeros "
            "before quantizing, or quantize the transposed tensor row-wise"
        )
    if columnwise:
        outer, inner = cols, rows // BLOCK_SIZE
        flat_outer, flat_inner = cols, flat_rows // BLOCK_SIZE
        te_shape = _round_up(flat_inner, TILE_INNER), _round_up(flat_outer, TILE_OUTER)
    else:
        outer, inner = rows, cols // BLOCK_SIZE
        flat_outer, flat_inner = flat_rows, inner
        te_shape = _round_up(flat_outer, TILE_OUTER), _round_up(flat_inner, TILE_INNER)
    _require(scales, 2, "scales", "TE's two-dimensional scale buffer")
    if tuple(scales.shape) != te_shape:
        raise ValueError(
            f"{what} have shape {te_shape} in TE and came with shape {tuple(scales.shape)}, stride "
            f"{scales.stride()}, device {scales.device}; check the sizes and `columnwise`"
        )

    if swizzled:
        items_are_whole_tiles = rows % TILE_OUTER == 0 and (not columnwise or cols <= TILE_OUTER)
        if num_items == 1 or items_are_whole_tiles:
            return scales.contiguous().view(num_items, packed_scale_size(outer, inner))
        flat = unpack_tiles(scales.reshape(1, -1), flat_outer, flat_inner)[0]
    else:
        flat = scales.t() if columnwise else scales
        flat = flat[:flat_outer, :flat_inner]
    # The batch is folded into the inner dimension column-wise and into the outer one row-wise.
    if columnwise:
        return pack_tiles(flat.reshape(outer, num_items, inner).transpose(0, 1))
    return pack_tiles(flat.reshape(num_items, outer, inner))


def _tiles(outer: int, inner: int) -> tuple[int, int]:
    """Number of tiles along each dimension."""
    return -(-outer // TILE_OUTER), -(-inner // TILE_INNER)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _require(tensor: torch.Tensor, ndim: int, name: str, layout: str) -> None:
    came = f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
    if tensor.dtype != torch.uint8:
        raise TypeError(f"`{name}` must be torch.uint8 (E8M0 codes) and came as {came}")
    if tensor.ndim != ndim:
        raise ValueError(f"`{name}` must be {layout} and came as {came}")


def _require_packed(packed: torch.Tensor, outer: int, inner: int) -> None:
    _require(packed, 2, "packed", "[batch, packed_scale_size(outer, inner)]")
    size = packed_scale_size(outer, inner)
    if packed.shape[1] != size:
        raise ValueError(
            f"the packed scales of a {outer} x {inner} matrix are {size} bytes per item and came "
            f"as {packed.shape[1]} (shape {tuple(packed.shape)}, device {packed.device})"
        )
