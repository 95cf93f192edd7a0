# SPDX-License-Identifier: Apache-2.0
"""The variants that are timed: ours, torch.bmm in BF16, and other ways to multiply FP8 batches.

Input: operand sets and an output buffer. Output: a function per variant that runs one product and
returns `[B, M, N]`. What a variant needs (per-item tensors, row scales)
is prepared outside the timing. Transformer Engine and this package are imported when a variant is
prepared, so that one that cannot be imported costs only its own row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Sequence

import torch

from benchmarks.points import Operands

Call = Callable[[int], Any]


@dataclass(frozen=True)
class Variant:
    """One way to compute the product.

    Attributes
    ----------
    name, label : str
        Key in the stored results; words for tables.
    accumulation : str
        ``"bf16"``, ``"split"`` or ``"fast"``: names its gate.
    prepare : callable
        `(sets, out) -> call`; `call(i)` multiplies set `i` modulo their number.
    is_looped : bool
        One launch per item, so costly for large batches.
    is_tuned : bool
        Timed in the second phase, after algorithm choice by measurement.
    on_every_point : bool
        Also at ragged and rectangular sizes.
    """

    name: str
    label: str
    accumulation: str
    prepare: Callable[[Sequence[Operands], torch.Tensor], Call]
    is_looped: bool = False
    is_tuned: bool = False
    on_every_point: bool = False


def _prepare_torch_bmm(sets: Sequence[Operands], out: torch.Tensor) -> Call:
    pairs = [(x.left, x.right.mT) for x in sets]

    def call(i: int) -> torch.Tensor:
        left, right = pairs[i % len(pairs)]
        return torch.bmm(left, right, out=out)

    return call


def _prepare_ours(
    sets: Sequence[Operands], out: torch.Tensor, use_split_accumulator: bool, is_tuned: bool
) -> Call:
    import transformer_engine_batched as teb

    def call(i: int) -> torch.Tensor:
        x = sets[i % len(sets)]
        return teb.batched_general_gemm(
            x.right_fp8,
            x.left_fp8,
            out_dtype=out.dtype,
            layout="TN",
            out=out,
            use_split_accumulator=use_split_accumulator,
        )

    if is_tuned:
        with teb.autotune():
            call(0)
    return call


def _ours(use_split_accumulator: bool, is_tuned: bool) -> Variant:
    accumulation = "split" if use_split_accumulator else "fast"

    def prepare(sets: Sequence[Operands], out: torch.Tensor) -> Call:
        return _prepare_ours(sets, out, use_split_accumulator, is_tuned)

    return Variant(
        name=f"ours_{accumulation}" + ("_tuned" if is_tuned else ""),
        label=f"ours, {accumulation}" + (", autotune" if is_tuned else ""),
        accumulation=accumulation,
        prepare=prepare,
        is_tuned=is_tuned,
        on_every_point=True,
    )


def split_items(x: Any) -> list[Any]:
    """The items of a batched Float8 tensor as TE tensors that share its codes and scale.

    TE's storage class is used: it is what TE's own modules pass, and costs the host less than the
    tensor class.
    """
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    whole = x.get_metadata()
    return [
        Float8TensorStorage(
            data=codes,
            fp8_scale_inv=whole["fp8_scale_inv"],
            fp8_dtype=whole["fp8_dtype"],
            fake_dtype=whole["fake_dtype"],
        )
        for codes in whole["data"].unbind(0)
    ]


def _prepare_te_loop(
    sets: Sequence[Operands], out: torch.Tensor, use_split_accumulator: bool = True
) -> Call:
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    items = [list(zip(split_items(x.right_fp8), split_items(x.left_fp8))) for x in sets]
    outs = list(out.unbind(0))

    def call(i: int) -> torch.Tensor:
        for (right, left), item_out in zip(items[i % len(items)], outs):
            general_gemm(
                right,
                left,
                out_dtype=out.dtype,
                layout="TN",
                out=item_out,
                use_split_accumulator=use_split_accumulator,
            )
        return out

    return call


def _prepare_te_grouped(sets: Sequence[Operands], out: torch.Tensor) -> Call:
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    items = [(split_items(x.right_fp8), split_items(x.left_fp8)) for x in sets]
    outs = list(out.unbind(0))
    no_quantizers = [None] * len(outs)
    rows = [out.shape[1]] * len(outs)

    def call(i: int) -> torch.Tensor:
        right, left = items[i % len(items)]
        general_grouped_gemm(
            right,
            left,
            outs,
            no_quantizers,
            out.dtype,
            layout="TN",
            m_splits=rows,
            use_split_accumulator=True,
        )
        return out

    return call


def _unpack(x: Any) -> tuple[torch.Tensor, torch.Tensor]:
    stored = x.get_metadata()
    return stored["data"].view(torch.float8_e4m3fn), stored["fp8_scale_inv"]


def _prepare_scaled_mm_loop(sets: Sequence[Operands], out: torch.Tensor) -> Call:
    prepared = []
    for x in sets:
        (left, left_scale), (right, right_scale) = _unpack(x.left_fp8), _unpack(x.right_fp8)
        prepared.append((list(zip(left.unbind(0), right.mT.unbind(0))), left_scale, right_scale))
    outs = list(out.unbind(0))

    def call(i: int) -> torch.Tensor:
        items, left_scale, right_scale = prepared[i % len(prepared)]
        for (left, right), item_out in zip(items, outs):
            torch._scaled_mm(
                left, right, left_scale, right_scale, out_dtype=out.dtype, out=item_out
            )
        return out

    return call


def _prepare_scaled_grouped_mm(sets: Sequence[Operands], out: torch.Tensor) -> Call:
    def spread(scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        # This kernel takes one scale per row.
        return scale.expand(codes.shape[0], codes.shape[1]).contiguous()

    prepared = []
    for x in sets:
        (left, left_scale), (right, right_scale) = _unpack(x.left_fp8), _unpack(x.right_fp8)
        prepared.append((left, right.mT, spread(left_scale, left), spread(right_scale, right)))

    def call(i: int) -> torch.Tensor:
        return torch._scaled_grouped_mm(*prepared[i % len(prepared)], out_dtype=out.dtype)

    return call


BASELINE = Variant("torch_bmm", "torch.bmm BF16", "bf16", _prepare_torch_bmm, on_every_point=True)
TE_LOOP = Variant("te_loop", "loop of TE `general_gemm`", "split", _prepare_te_loop, is_looped=True)
TE_LOOP_FAST = Variant(
    "te_loop_fast",
    "loop of TE `general_gemm`, fast",
    "fast",
    partial(_prepare_te_loop, use_split_accumulator=False),
    is_looped=True,
)
VARIANTS = (
    BASELINE,
    _ours(use_split_accumulator=True, is_tuned=False),
    _ours(use_split_accumulator=False, is_tuned=False),
    _ours(use_split_accumulator=True, is_tuned=True),
    _ours(use_split_accumulator=False, is_tuned=True),
    TE_LOOP,
    TE_LOOP_FAST,
    Variant(
        "te_grouped", "TE `general_grouped_gemm`", "split", _prepare_te_grouped, is_looped=True
    ),
    Variant(
        "scaled_mm_loop",
        "loop of `torch._scaled_mm`",
        "split",
        _prepare_scaled_mm_loop,
        is_looped=True,
    ),
    Variant("scaled_grouped_mm", "`torch._scaled_grouped_mm`", "split", _prepare_scaled_grouped_mm),
)
