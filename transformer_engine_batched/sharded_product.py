# SPDX-License-Identifier: Apache-2.0
"""Products of `DTensor`s: each rank multiplies its shards, and what that is of the whole follows from how they lie.

No rule here communicates: operands that would have to be moved first are refused, and a sum over ranks is left
to who asks for it (`Partial`). Must not know of quantization.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .errors import UnsupportedError
from .operands import contiguous_strides


class Placements(NamedTuple):
    """Of a product and of the gradients of both operands, along one dim of the mesh."""

    out: Placement
    grad_a: Placement
    grad_b: Placement


def is_sharded(x: object) -> bool:
    """Whether `x` is a `DTensor`."""
    return isinstance(x, DTensor)


def multiply_shards(
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], a: object, b: object
) -> DTensor:
    """``a @ b`` of two DTensors through ``multiply(local_a, local_b)``; differentiable.

    Raises
    ------
    UnsupportedError
        If one is no `DTensor` or lies on another mesh, and for placements without a rule in `find_placements`.
    ValueError
        For shapes that do not fit, on all ranks alike.
    """
    for name, x, other in (("a", a, "b"), ("b", b, "a")):
        if not is_sharded(x):
            raise UnsupportedError(
                f"operand {name} is a {type(x).__name__} and {other} a DTensor: make both DTensors "
                "(DTensor.from_local, distribute_tensor), or multiply local shards"
            )
        if x.dim() < 2:
            raise UnsupportedError(
                f"operand {name} is a DTensor of {x.dim()} dims: expected at least 2"
            )
    if a.device_mesh != b.device_mesh:
        raise UnsupportedError(
            f"operands a and b lie on different meshes, {a.device_mesh} and {b.device_mesh}"
        )
    # What shards say by themselves may be an error on some ranks and none on others.
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"operands a {list(a.shape)} and b {list(b.shape)}: the contracted sizes differ, {a.shape[-1]} of a "
            f"and {b.shape[-2]} of b"
        )
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = torch.Size((*batch, a.shape[-2], b.shape[-1]))
    found = []
    for index, (of_a, of_b) in enumerate(zip(a.placements, b.placements)):
        placements = find_placements(of_a, of_b, tuple(a.shape), tuple(b.shape))
        if placements is None:
            raise UnsupportedError(
                f"operands a {list(a.shape)}, {of_a}, and b {list(b.shape)}, {of_b}, along dim {index} of the mesh: "
                "a product of shards needs both sharded along one batch dim, both along the contracted dim, or one "
                "of them replicated and the other sharded along what is its own; redistribute an operand first"
            )
        found.append(placements)
    out = multiply(
        _Shard.apply(a, tuple(x.grad_a for x in found)),
        _Shard.apply(b, tuple(x.grad_b for x in found)),
    )
    return DTensor.from_local(
        out,
        a.device_mesh,
        [x.out for x in found],
        run_check=False,
        shape=shape,
        stride=contiguous_strides(shape),
    )


class _Shard(torch.autograd.Function):
    """`DTensor.to_local` with ``grad_placements``.

    torch's own (2.11) computes the shape that the gradient has on all ranks from this rank's part, which is wrong where
    shards are unequal.
    """

    # pylint: disable=missing-function-docstring

    @staticmethod
    def forward(ctx: object, x: DTensor, grad_placements: tuple[Placement, ...]) -> torch.Tensor:
        ctx.whole = x.device_mesh, grad_placements, x.shape
        return x.detach().to_local()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[DTensor, None]:
        mesh, placements, shape = ctx.whole
        strides = contiguous_strides(shape)
        local = grad.contiguous()
        whole = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=strides
        )
        return whole, None


def find_placements(
    of_a: Placement, of_b: Placement, shape_a: tuple[int, ...], shape_b: tuple[int, ...]
) -> Optional[Placements]:
    """What the product of shards is along one dim of the mesh; None if it is no shard of the product.

    An operand that all ranks have whole gets a part of its gradient on each: `Partial`, as in torch's own
    products.

    Examples
    --------
    >>> find_placements(Shard(0), Shard(0), (8, 4, 6), (8, 6, 5)).out
    Shard(dim=0)
    >>> find_placements(Shard(2), Shard(1), (8, 4, 6), (8, 6, 5)).out
    Partial(sum)
    >>> find_placements(Shard(1), Replicate(), (8, 4, 6), (6, 5))
    Placements(out=Shard(dim=1), grad_a=Shard(dim=1), grad_b=Partial(sum))
    """
    dims = len(shape_a), len(shape_b)
    dim_a, dim_b = (_sharded_dim(x, n) for x, n in zip((of_a, of_b), dims))
    rank = max(dims)
    if dim_a is None and dim_b is None:
        is_replicated = type(of_a) is Replicate and type(of_b) is Replicate
        return Placements(Replicate(), Replicate(), Replicate()) if is_replicated else None
    if dim_a is not None and dim_b is not None:
        if (dim_a, dim_b) == (-1, -2):
            return Placements(Partial(), of_a, of_b)
        is_batch = dim_a == dim_b and dim_a < -2 and shape_a[dim_a] == shape_b[dim_b]
        return Placements(Shard(rank + dim_a), of_a, of_b) if is_batch else None
    if dim_b is None:
        is_own = dim_a == -2 or dim_a < -2 and _is_broadcast(shape_b, dim_a)
        if not (is_own and type(of_b) is Replicate):
            return None
        return Placements(Shard(rank + dim_a), of_a, Partial())
    is_own = dim_b == -1 or dim_b < -2 and _is_broadcast(shape_a, dim_b)
    if not (is_own and type(of_a) is Replicate):
        return None
    return Placements(Shard(rank + dim_b), Partial(), of_b)


def _sharded_dim(placement: Placement, rank: int) -> Optional[int]:
    """The dim of a shard, counted from the last one, which is -1."""
    return placement.dim % rank - rank if type(placement) is Shard else None


def _is_broadcast(shape: tuple[int, ...], dim: int) -> bool:
    """Whether each item along a batch dim of the product reads the same of this operand."""
    return -dim > len(shape) or shape[dim] == 1
