# SPDX-License-Identifier: Apache-2.0
"""The triangle multiplicative update of AlphaFold 2, with a contraction that can be exchanged.

Input: a pair representation ``[B, N, N, C]`` and a pair mask ``[B, N, N]``. The steps are separate
methods, so that one projection can be contracted in several number formats.
Must not import: ``transformer_engine_batched`` or Transformer Engine. This is the plain block those
are compared on.
Source: Jumper et al. 2021, https://doi.org/10.1038/s41586-021-03819-2, supplementary algorithms 11
(outgoing) and 12 (incoming).
"""

from __future__ import annotations

import math
from typing import Callable

import torch
from torch import nn

DIRECTIONS = ("outgoing", "incoming")


def contract(a: torch.Tensor, b: torch.Tensor, direction: str) -> torch.Tensor:
    """``sum_k a[.., i, k] b[.., j, k]`` (outgoing) or ``sum_k a[.., k, i] b[.., k, j]`` (incoming).

    Parameters
    ----------
    a, b : torch.Tensor
        ``[..., N, N]``; the leading dims (channels) are batch.
    direction : str
        "outgoing" or "incoming".

    Returns
    -------
    torch.Tensor
        ``[..., N, N]`` in the dtype of `a`.
    """
    return a @ b.mT if direction == "outgoing" else a.mT @ b


class TriangleMultiplication(nn.Module):
    """``out = sigmoid(G_o x) * P_o LN(contract(a, b))`` with ``x = LN(z)``.

    ``a = mask * sigmoid(G_a x) * P_a x``, ``b = mask * sigmoid(G_b x) * P_b x``.

    AlphaFold starts the output projection at zero, so that a fresh block returns exactly 0. Here
    every weight is drawn from a seeded normal with variance ``1 / fan_in``, else there would be
    nothing to compare.

    Parameters
    ----------
    direction : str
        "outgoing" (algorithm 11) or "incoming" (algorithm 12).
    channels : int
        C, last dimension of the pair representation.
    hidden : int
        D, number of channels that are contracted: the batch of the matrix product.
    seed : int
        The same seed gives the same weights.

    Raises
    ------
    ValueError
        For any other direction.

    Examples
    --------
    >>> block = TriangleMultiplication("outgoing", channels=8, hidden=4)
    >>> block(torch.randn(1, 5, 5, 8), torch.ones(1, 5, 5)).shape
    torch.Size([1, 5, 5, 8])
    """

    def __init__(
        self, direction: str, channels: int = 128, hidden: int = 128, seed: int = 0
    ) -> None:
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {DIRECTIONS}, got {direction!r}")
        super().__init__()
        self.direction = direction
        # OpenFold's names, so that te.TriangleMultiplication.from_openfold takes the block as it is.
        self.layer_norm_in = nn.LayerNorm(channels)
        self.linear_a_p, self.linear_a_g = nn.Linear(channels, hidden), nn.Linear(channels, hidden)
        self.linear_b_p, self.linear_b_g = nn.Linear(channels, hidden), nn.Linear(channels, hidden)
        self.layer_norm_out = nn.LayerNorm(hidden)
        self.linear_z = nn.Linear(hidden, channels)
        self.linear_g = nn.Linear(channels, channels)
        self.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_children():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 1 / math.sqrt(module.in_features), generator=generator)
                # AlphaFold's gates start open: bias 1.
                module.bias.fill_(1.0 if name.endswith("_g") else 0.0)

    def operands(self, z: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two factors of the contraction, channel first.

        Parameters
        ----------
        z : torch.Tensor
            ``[B, N, N, C]``.
        mask : torch.Tensor
            ``[B, N, N]``; 0 removes a pair from every sum.

        Returns
        -------
        a, b : torch.Tensor
            ``[B, D, N, N]``, contiguous.
        """
        x = self.layer_norm_in(z)

        def factor(project: nn.Linear, gate: nn.Linear) -> torch.Tensor:
            gated = torch.sigmoid(gate(x)) * project(x) * mask[..., None]
            return gated.permute(0, 3, 1, 2).contiguous()

        return factor(self.linear_a_p, self.linear_a_g), factor(self.linear_b_p, self.linear_b_g)

    def finish(self, z: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """``sigmoid(G_o LN(z)) * P_o LN(product)``.

        Parameters
        ----------
        z : torch.Tensor
            ``[B, N, N, C]``, as given to `operands`.
        product : torch.Tensor
            ``[B, D, N, N]``, the contraction; any float dtype.

        Returns
        -------
        torch.Tensor
            ``[B, N, N, C]`` in the dtype of `z`; the residual connection is the caller's.
        """
        gate = torch.sigmoid(self.linear_g(self.layer_norm_in(z)))
        channel_last = product.to(z.dtype).permute(0, 2, 3, 1)
        return gate * self.linear_z(self.layer_norm_out(channel_last))

    def forward(
        self,
        z: torch.Tensor,
        mask: torch.Tensor,
        contraction: Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor] = contract,
    ) -> torch.Tensor:
        """The whole update ``[B, N, N, C]``; `contraction` is called as `contract` is."""
        a, b = self.operands(z, mask)
        return self.finish(z, contraction(a, b, self.direction))
