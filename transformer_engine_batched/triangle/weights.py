# SPDX-License-Identifier: Apache-2.0
"""Names of the triangle block's weights in public models -> ours.

Input: a module or a state dict. Output: `BlockWeights`. Must not know of the module that takes them.

Sources of the names: OpenFold, openfold/model/triangular_multiplicative_update.py (its multimer form has fused
projections), from which OpenFold3 and Protenix took theirs, without biases; Boltz,
boltz/model/layers/triangular_mult.py. In all of them `a` is the operand of ``i`` in both directions.
"""

from __future__ import annotations

from typing import Mapping, NamedTuple, Optional, Union

import torch

Source = Union[torch.nn.Module, Mapping[str, torch.Tensor]]

# Our linear maps -> theirs; two names are stacked, `a` above `b`.
_OPENFOLD = {
    "p_in": ("linear_a_p", "linear_b_p"),
    "g_in": ("linear_a_g", "linear_b_g"),
    "p_out": ("linear_z",),
    "g_out": ("linear_g",),
}
_OPENFOLD_FUSED = {**_OPENFOLD, "p_in": ("linear_ab_p",), "g_in": ("linear_ab_g",)}
_OPENFOLD_NORMS = {"norm_in": "layer_norm_in", "norm_out": "layer_norm_out"}

_BOLTZ = {"p_in": ("p_in",), "g_in": ("g_in",), "p_out": ("p_out",), "g_out": ("g_out",)}
_BOLTZ_NORMS = {"norm_in": "norm_in", "norm_out": "norm_out"}


class BlockWeights(NamedTuple):
    """Weights under our names, and what else the source says of itself.

    Parameters
    ----------
    tensors : dict of str to torch.Tensor
        ``{norm_in, norm_out, p_in, g_in, p_out, g_out}_{weight, bias}``; linear biases all or none.
    eps : float, optional
        Of the LayerNorms, if the source is a module.
    """

    tensors: dict[str, torch.Tensor]
    eps: Optional[float]

    @property
    def dim(self) -> int:
        """Channels of the pair representation."""
        return self.tensors["p_in_weight"].shape[1]

    @property
    def hidden(self) -> int:
        """Channels that are contracted."""
        return self.tensors["p_in_weight"].shape[0] // 2

    @property
    def has_bias(self) -> bool:
        """Whether the linear maps have biases."""
        return "p_in_bias" in self.tensors


def read_openfold(source: Source, prefix: str = "") -> BlockWeights:
    """Weights of OpenFold's ``TriangleMultiplicativeUpdate`` or of its fused form."""
    found, eps = _read(source, prefix)
    is_fused = "linear_ab_p.weight" in found
    return _collect(found, eps, _OPENFOLD_FUSED if is_fused else _OPENFOLD, _OPENFOLD_NORMS)


def read_boltz(source: Source, prefix: str = "") -> BlockWeights:
    """Weights of Boltz's ``TriangleMultiplicationOutgoing`` and ``TriangleMultiplicationIncoming``."""
    return _collect(*_read(source, prefix), _BOLTZ, _BOLTZ_NORMS)


def check_mode(source: Source, mode: str) -> None:
    """Refuses a direction that the source, if it is a module, says it does not have."""
    is_outgoing = getattr(source, "_outgoing", None)
    if isinstance(is_outgoing, bool) and is_outgoing != (mode == "outgoing"):
        theirs = "outgoing" if is_outgoing else "incoming"
        raise ValueError(f"mode={mode!r} was asked for, but the module given is {theirs!r}")


def _read(source: Source, prefix: str) -> tuple[dict[str, torch.Tensor], Optional[float]]:
    eps = None
    if isinstance(source, torch.nn.Module):
        found = {getattr(x, "eps", None) for x in source.modules()} - {None}
        if len(found) > 1:
            raise ValueError(
                f"the LayerNorms of the module given have different eps, {sorted(found)}: this block has one"
            )
        eps = found.pop() if found else None
        source = source.state_dict()
    tensors = {
        name[len(prefix) :]: value for name, value in source.items() if name.startswith(prefix)
    }
    if not tensors:
        raise ValueError(
            f"no weights begin with the prefix {prefix!r}; the state dict has "
            + ", ".join(sorted(source)[:4])
            + (", ..." if len(source) > 4 else "")
        )
    return tensors, eps


def _collect(
    found: Mapping[str, torch.Tensor],
    eps: Optional[float],
    linears: Mapping[str, tuple[str, ...]],
    norms: Mapping[str, str],
) -> BlockWeights:
    """Every tensor of the source under our name; an error names those missing and those left over."""
    wanted = {f"{ours}_weight": [f"{x}.weight" for x in names] for ours, names in linears.items()}
    if any(
        name.endswith(".bias") and name.rpartition(".")[0] not in norms.values() for name in found
    ):
        wanted.update(
            {f"{ours}_bias": [f"{x}.bias" for x in names] for ours, names in linears.items()}
        )
    for ours, name in norms.items():
        wanted[f"{ours}_weight"] = [f"{name}.weight"]
        wanted[f"{ours}_bias"] = [f"{name}.bias"]
    names = {name for sources in wanted.values() for name in sources}
    missing, extra = sorted(names - set(found)), sorted(set(found) - names)
    if missing or extra:
        raise ValueError(
            "the weights given are not those of a triangle multiplication of this model: "
            + "; ".join(
                f"{what} {', '.join(rows)}"
                for what, rows in (("missing", missing), ("unknown", extra))
                if rows
            )
        )
    tensors = {
        ours: torch.cat([found[name].detach() for name in sources])
        for ours, sources in wanted.items()
    }
    return BlockWeights(tensors, eps)
