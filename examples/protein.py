# SPDX-License-Identifier: Apache-2.0
"""From C-alpha coordinates to an AlphaFold-like pair representation.

Input: a CSV of residues (``chain,residue_number,residue,x,y,z``) such as
``examples/data/1tii_ca.csv``. Output: ``[1, N, N, D]``.
Must not import: ``transformer_engine_batched`` or Transformer Engine. What is fed to the FP8
products must not depend on them.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

# AlphaFold 2, supplementary information, algorithm 4: residue offsets are clipped to +-32.
# AlphaFold-Multimer adds one more bin for two residues of different chains.
MAX_OFFSET = 32
OTHER_CHAIN = 2 * MAX_OFFSET + 1
NUM_POSITION_BINS = OTHER_CHAIN + 1

# AlphaFold 2, supplementary information, table 1, template_distogram: bins of equal width from 3.25
# to 50.75 angstrom and one for all that is larger. Bin 0 here holds what is closer than the first
# edge: in practice a residue with itself.
DISTANCE_EDGES = torch.linspace(3.25, 50.75, 39, dtype=torch.float64)
NUM_DISTANCE_BINS = len(DISTANCE_EDGES) + 1


@dataclass(frozen=True)
class Complex:
    """Residues of a complex, in file order.

    Attributes
    ----------
    chains : tuple of str
        Chain identifier of each residue, length N.
    numbers : torch.Tensor
        ``[N]`` int64, number of the residue within its chain.
    coordinates : torch.Tensor
        ``[N, 3]`` float64, angstrom.
    """

    chains: tuple[str, ...]
    numbers: torch.Tensor
    coordinates: torch.Tensor

    def __len__(self) -> int:
        return len(self.chains)

    def crop(self, size: int) -> Complex:
        """The first `size` residues across chains; 0, or more than there are, keeps all."""
        if size < 0:
            raise ValueError(f"crop must be 0 (all residues) or a positive number, got {size}")
        end = size or len(self)
        return Complex(self.chains[:end], self.numbers[:end], self.coordinates[:end])

    def displaced(self, sigma: float, seed: int) -> Complex:
        """The same complex with every atom moved by normal noise of `sigma` angstrom per axis."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.coordinates.shape, generator=generator, dtype=torch.float64)
        return replace(self, coordinates=self.coordinates + sigma * noise)

    def chain_spans(self) -> list[tuple[str, int, int]]:
        """``(chain, first, end)`` for each run of residues of one chain, in file order."""
        spans: list[tuple[str, int, int]] = []
        for index, chain in enumerate(self.chains):
            if spans and spans[-1][0] == chain:
                spans[-1] = (chain, spans[-1][1], index + 1)
            else:
                spans.append((chain, index, index + 1))
        return spans


def read_complex(path: str | Path) -> Complex:
    """Read a CSV of residues; lines that start with ``#`` give its source and are skipped.

    Parameters
    ----------
    path : str or pathlib.Path
        File with the columns ``chain,residue_number,residue,x,y,z``; coordinates in angstrom.

    Raises
    ------
    ValueError
        When a column is missing, there is no residue, or a coordinate is not a finite number.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(line for line in file if not line.startswith("#"))
        missing = {"chain", "residue_number", "x", "y", "z"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path}: columns {sorted(missing)} are missing, found {reader.fieldnames}"
            )
        rows = list(reader)
    if not rows:
        raise ValueError(f"{path}: no residues in the file")
    coordinates = torch.tensor(
        [[float(row[axis]) for axis in "xyz"] for row in rows], dtype=torch.float64
    )
    if not coordinates.isfinite().all():
        bad = int((~coordinates.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(f"{path}: coordinates of residue {bad} are not finite: {rows[bad]}")
    return Complex(
        chains=tuple(row["chain"] for row in rows),
        numbers=torch.tensor([int(row["residue_number"]) for row in rows]),
        coordinates=coordinates,
    )


@dataclass(frozen=True)
class PairFeatures:
    """What is known about each pair (i, j) of residues; ``[N, N]`` unless said otherwise.

    Attributes
    ----------
    position : torch.Tensor
        int64; ``clip(number_i - number_j, -32, 32) + 32`` within a chain, `OTHER_CHAIN` otherwise.
    same_chain : torch.Tensor
        bool.
    distance : torch.Tensor
        float64, C-alpha distance in angstrom.
    distance_bin : torch.Tensor
        int64; number of `DISTANCE_EDGES` that lie below the distance.
    direction : torch.Tensor
        ``[N, N, 3]`` float64; unit vector from i to j in the frame of residue i, 0 where ``i ==
        j``: AlphaFold 2's template_unit_vector, with frames of C-alpha atoms alone.
    """

    position: torch.Tensor
    same_chain: torch.Tensor
    distance: torch.Tensor
    distance_bin: torch.Tensor
    direction: torch.Tensor


def local_frames(complex_: Complex) -> torch.Tensor:
    """An orthonormal frame at each residue, from its C-alpha atom and those before and after it.

    The first axis points to the next atom, the second to the previous one as far as it is at right
    angles to the first, the third is their cross product. The ends of a chain take the frame of
    their neighbour; a chain of one or two residues, which only a crop leaves, has none: its frames
    are 0.

    Returns
    -------
    torch.Tensor
        ``[N, 3, 3]`` float64; row ``m`` is axis ``m``.
    """
    x = complex_.coordinates
    frames = torch.zeros(len(complex_), 3, 3, dtype=torch.float64)
    for _, first, end in complex_.chain_spans():
        if end - first < 3:
            continue
        middle = torch.arange(first, end).clamp(first + 1, end - 2)
        first_axis = torch.nn.functional.normalize(x[middle + 1] - x[middle], dim=-1)
        back = x[middle - 1] - x[middle]
        back = back - (back * first_axis).sum(dim=-1, keepdim=True) * first_axis
        second_axis = torch.nn.functional.normalize(back, dim=-1)
        third_axis = torch.linalg.cross(first_axis, second_axis)
        frames[first:end] = torch.stack((first_axis, second_axis, third_axis), dim=1)
    return frames


def pair_features(complex_: Complex) -> PairFeatures:
    """Relative position, chain, distance and direction of all pairs of residues."""
    chain_index = {chain: index for index, chain in enumerate(dict.fromkeys(complex_.chains))}
    chain = torch.tensor([chain_index[name] for name in complex_.chains])
    same_chain = chain[:, None] == chain[None, :]
    offset = complex_.numbers[:, None] - complex_.numbers[None, :]
    position = offset.clamp(-MAX_OFFSET, MAX_OFFSET) + MAX_OFFSET
    # Differences instead of torch.cdist: its matrix-product route is not exactly symmetric and not
    # exactly 0 on the diagonal.
    delta = complex_.coordinates[None, :, :] - complex_.coordinates[:, None, :]
    distance = delta.square().sum(dim=-1).sqrt()
    return PairFeatures(
        position=torch.where(same_chain, position, OTHER_CHAIN),
        same_chain=same_chain,
        distance=distance,
        distance_bin=torch.bucketize(distance, DISTANCE_EDGES),
        direction=torch.nn.functional.normalize(
            torch.einsum("imx,ijx->ijm", local_frames(complex_), delta), dim=-1
        ),
    )


def pair_representation(
    complex_: Complex,
    channels: int = 128,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """``z[0, i, j] = (P[position] + S[same_chain] + D[distance_bin] + direction @ U) / 2``.

    A seeded normal projection of three one-hot features and a unit vector to `channels`. A one-hot
    vector times a matrix is a row of that matrix, so rows are looked up and no one-hot is stored.
    The factor gives `z` a variance of about one, what a LayerNorm expects.

    Parameters
    ----------
    complex_ : Complex
        N residues.
    channels : int
        D, size of the last dimension.
    seed : int
        The same seed gives the same bits on every device: the projection is drawn on the CPU.
    device : torch.device or str
        Where the result is to be.

    Returns
    -------
    torch.Tensor
        ``[1, N, N, channels]``, float32, contiguous.

    Examples
    --------
    >>> complex_ = read_complex("examples/data/1tii_ca.csv").crop(64)
    >>> pair_representation(complex_).shape
    torch.Size([1, 64, 64, 128])
    """
    generator = torch.Generator().manual_seed(seed)
    features = pair_features(complex_)
    lookups = (
        (NUM_POSITION_BINS, features.position),
        (2, features.same_chain.long()),
        (NUM_DISTANCE_BINS, features.distance_bin),
    )
    projection = torch.randn(3, channels, generator=generator)
    z = features.direction.to(device, torch.float32) @ projection.to(device)
    for num_bins, index in lookups:
        table = torch.randn(num_bins, channels, generator=generator)
        z += torch.nn.functional.embedding(index.to(device), table.to(device))
    z /= math.sqrt(1 + len(lookups))
    return z[None]
