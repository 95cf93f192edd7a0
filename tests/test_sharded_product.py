# SPDX-License-Identifier: Apache-2.0
"""Which products of shards are products, and what is refused; in one process that stands for two.

Values, gradients and collectives of several processes: tests/distributed/run_distributed.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Replicate,
    Shard,
    init_device_mesh,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

import transformer_engine_batched as teb
from transformer_engine_batched.sharded_product import find_placements

BATCHED = (8, 4, 6), (8, 6, 5)
R, P = Replicate(), Partial()


@pytest.mark.parametrize(
    "of_a, of_b, shapes, expected",
    (
        (Shard(0), Shard(0), BATCHED, (Shard(0), Shard(0), Shard(0))),
        (Shard(-3), Shard(0), BATCHED, (Shard(0), Shard(-3), Shard(0))),
        (Shard(2), Shard(1), BATCHED, (P, Shard(2), Shard(1))),
        (Shard(1), R, BATCHED, (Shard(1), Shard(1), P)),
        (R, Shard(2), BATCHED, (Shard(2), P, Shard(2))),
        (R, R, BATCHED, (R, R, R)),
        # Batch dims of one operand alone, before and within those of the other.
        (Shard(0), R, ((8, 4, 6), (6, 5)), (Shard(0), Shard(0), P)),
        (R, Shard(0), ((4, 6), (8, 6, 5)), (Shard(0), P, Shard(0))),
        (Shard(0), R, ((8, 3, 4, 6), (3, 6, 5)), (Shard(0), Shard(0), P)),
        (Shard(1), Shard(0), ((8, 3, 4, 6), (3, 6, 5)), (Shard(1), Shard(1), Shard(0))),
        (Shard(0), R, ((4, 6), (8, 6, 5)), (Shard(1), Shard(0), P)),
        (Shard(0), R, ((8, 4, 6), (1, 6, 5)), (Shard(0), Shard(0), P)),
    ),
    ids=str,
)
def test_placements(of_a, of_b, shapes, expected):
    assert find_placements(of_a, of_b, *shapes) == expected


@pytest.mark.parametrize(
    "of_a, of_b, shapes",
    (
        (Shard(0), Shard(1), BATCHED),
        (Shard(0), R, BATCHED),  # each rank has all items of b, and would have to choose
        (R, Shard(0), BATCHED),
        (Shard(2), R, BATCHED),
        (R, Shard(1), BATCHED),
        (Shard(1), Shard(2), BATCHED),
        (Shard(1), Shard(1), BATCHED),
        (Shard(0), Shard(0), ((8, 3, 4, 6), (3, 6, 5))),
        (Shard(0), Shard(0), ((8, 4, 6), (1, 6, 5))),
        # Quantization of a sum is not the sum of quantized parts.
        (P, R, BATCHED),
        (R, P, BATCHED),
        (P, Shard(2), BATCHED),
        (Shard(1), P, BATCHED),
    ),
    ids=str,
)
def test_no_placements(of_a, of_b, shapes):
    assert find_placements(of_a, of_b, *shapes) is None


class TestOneOfTwo:
    """Rank 0 of 2, alone."""

    @pytest.fixture(autouse=True)
    def group(self):
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        self.mesh = init_device_mesh("cpu", (2,))
        yield
        dist.destroy_process_group()

    def shard(self, *shape, dim=0, mesh=None):
        return DTensor.from_local(torch.randn(shape), mesh or self.mesh, [Shard(dim)])

    def test_a_tensor_and_a_dtensor(self):
        for a, b in ((torch.randn(4, 4, 6), self.shard(2, 6, 5)), (self.shard(2, 4, 6), "b")):
            with pytest.raises(
                teb.UnsupportedError, match="and [ab] a DTensor: make both DTensors"
            ):
                te.BatchedMatmul()(a, b)

    def test_a_vector(self):
        with pytest.raises(teb.UnsupportedError, match="operand b is a DTensor of 1 dims"):
            te.BatchedMatmul()(self.shard(2, 4, 6), self.shard(3))

    def test_two_meshes(self):
        other = DeviceMesh("cpu", [1, 0])
        with pytest.raises(teb.UnsupportedError, match="lie on different meshes"):
            te.BatchedMatmul()(self.shard(2, 4, 6), self.shard(2, 6, 5, mesh=other))

    def test_options_of_bmm(self):
        with pytest.raises(teb.UnsupportedError, match="bmm of DTensors with alpha"):
            teb.bmm(self.shard(2, 4, 6), self.shard(2, 6, 5), alpha=2.0)

    def test_bmm_is_the_module(self):
        a, b = self.shard(2, 4, 6), self.shard(2, 6, 5)
        y = teb.bmm(a, b)
        assert torch.equal(y.to_local(), te.BatchedMatmul()(a, b).to_local())
        torch.testing.assert_close(y.to_local(), a.to_local() @ b.to_local())
        assert (y.shape, y.placements) == ((4, 4, 5), (Shard(0),))
        assert teb.bmm(a, b, out_dtype=torch.float16).dtype is torch.float16

    def test_it_runs_between_two_graphs(self):
        module = te.BatchedMatmul()
        a, b = self.shard(2, 4, 6), self.shard(2, 6, 5)
        found = torch.compile(lambda a, b: module(a, b), backend="eager")(a, b)
        assert torch.equal(found.to_local(), module(a, b).to_local())
