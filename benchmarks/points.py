# SPDX-License-Identifier: Apache-2.0
"""The products that are timed, and their operands.

Input: a list of sizes below. Output: `Point` values and seeded `Operands`. Imports torch only: how
an operand becomes FP8 is the caller's argument, so that everything here also runs on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import torch

# Data cached from the call before would flatter a memory-bound product, so inputs rotate over as
# many sets as are needed to hold this many times the L2 cache.
L2_FILLS = 2


@dataclass(frozen=True)
class Point:
    """One batched product `out[b] = left[b] @ right[b]^T`, left `[B, M, K]`, right `[B, N, K]`.

    Attributes
    ----------
    kind : str
        ``"square"`` (all variants run), ``"ragged"`` or ``"rectangular"`` (ours and torch.bmm
        only).
    """

    batch: int
    m: int
    n: int
    k: int
    kind: str = "square"

    @property
    def flops(self) -> int:
        """Floating-point operations of the product, a multiply-add counted as two."""
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def name(self) -> str:
        """Key of the point in the stored results."""
        return f"B{self.batch}_M{self.m}_N{self.n}_K{self.k}"

    def count_sets(self, l2_bytes: int) -> int:
        """Input sets to rotate over, so that their FP8 codes (one byte each) exceed the cache."""
        set_bytes = self.batch * (self.m + self.n) * self.k
        return max(1, -(-L2_FILLS * l2_bytes // set_bytes))


def _square(size: int, batch: int, kind: str = "square") -> Point:
    return Point(batch, size, size, size, kind)


SQUARE = tuple(
    _square(size, batch)
    for size, batch in (
        (128, 4096),
        (256, 1024),
        (512, 512),
        (1024, 128),
        (2048, 32),
        (4096, 8),
        (8192, 2),
    )
)
OTHER = (
    _square(389, 128, "ragged"),
    _square(712, 128, "ragged"),
    _square(1000, 128, "ragged"),
    Point(32, 2048, 2048, 128, "rectangular"),
)
QUICK = (_square(512, 512), _square(2048, 32), _square(712, 128, "ragged"))


@dataclass
class Operands:
    """One set of inputs: the BF16 data, and the same data quantized with one scale per tensor."""

    left: torch.Tensor
    right: torch.Tensor
    left_fp8: Any
    right_fp8: Any


def make_operands(
    point: Point, seed: int, device: str, quantize: Callable[[torch.Tensor], Any]
) -> Operands:
    """Draw standard normal BF16 operands from `seed` and quantize them with `quantize`."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(rows: int) -> torch.Tensor:
        shape = (point.batch, rows, point.k)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    left, right = draw(point.m), draw(point.n)
    return Operands(left, right, quantize(left), quantize(right))
