# SPDX-License-Identifier: Apache-2.0
"""Suite `blockwise`: batched FP8 products with a scale per 128 elements of K, and masked rows.

Input: one Hopper GPU. Output: one row of device time per point and variant. Codes are E4M3 of normal data, scales of
all rows differ, the output is BF16. Each variant passes the correctness gate first or has no time: the worst item
against FP64 of the dequantised operands, with an output that held NaN before, and that still does where rows are masked.

Operands and output of each point together exceed the L2 cache several times over.

DeepGEMM takes part where it can be imported. Of its builds, these load with torch 2.11; it compiles its kernels with nvcc
at their first use:

    pip install --no-deps sgl-deep-gemm==0.1.0 apache-tvm-ffi==0.1.9

    python -m benchmarks.blockwise_suite    # times of every tile shape at the points, to choose tiles by
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import torch

from benchmarks import gate, timing
from benchmarks.stored_results import clean_reason
from transformer_engine_batched.kernels.blockwise_gemm import BlockScales

Row = dict[str, Any]
Call = Callable[[int], None]

GATE_DB = 50.0
OURS = "ours"
LABELS = {
    OURS: "ours",
    "triton": "ours, Triton form",
    "deep_gemm": "DeepGEMM",
    "cublaslt_loop": "loop of `torch._scaled_mm` (cuBLASLt)",
}
_OUR_FORMS = (OURS, "triton")
MASK_LABELS = {
    "none": "no mask",
    "all": "masked, all rows",
    "half": "masked, half the rows of each item",
    "every_other": "masked, all rows of every other item",
}
# Variants with a launch for each item take part in this many rounds where items are many.
_MANY_ITEMS = 128
_LOOP_ROUNDS = 4


@dataclass(frozen=True)
class BlockwisePoint:
    """`out[b] = a[b] @ b[b]^T`; `b_rows` is the number of rows of b per scale, `mask` says which rows of a count."""

    batch: int
    m: int
    n: int
    k: int
    b_rows: int = 128
    mask: str = "none"

    @property
    def name(self) -> str:
        """Key of the point in the stored results."""
        mask = "" if self.mask == "none" else f"_masked_{self.mask}"
        return f"B{self.batch}_M{self.m}_N{self.n}_K{self.k}_1x128_{self.b_rows}x128{mask}"

    @property
    def num_rows(self) -> list[int]:
        """Rows of each item that are computed."""
        if self.mask == "half":
            return [self.m // 2] * self.batch
        if self.mask == "every_other":
            return [0 if item % 2 else self.m for item in range(self.batch)]
        return [self.m] * self.batch

    @property
    def flops(self) -> int:
        """Floating-point operations on the rows that count."""
        return 2 * sum(self.num_rows) * self.n * self.k


SIZES = ((4096, 8), (2048, 32), (1024, 128), (512, 512))
POINTS = (
    *(BlockwisePoint(batch, size, size, size) for size, batch in SIZES),
    BlockwisePoint(8, 4096, 7168, 2048),
    *(BlockwisePoint(batch, size, size, size, b_rows=1) for size, batch in SIZES),
    *(
        BlockwisePoint(batch, m, n, k, mask=mask)
        for batch, m, n, k in ((32, 2048, 2048, 2048), (8, 4096, 4096, 4096))
        for mask in ("all", "half")
    ),
    # Is time proportional to the rows that count? (Not at the first, where all rows are less than one tile for each SM.)
    *(
        BlockwisePoint(batch, m, 2048, 2048, mask=mask)
        for batch, m in (
            (8, 128),
            (8, 4096),
            (32, 1024),
            (32, 4096),
            (256, 128),
            (256, 1024),
            (256, 4096),
        )
        for mask in ("all", "every_other")
    ),
)
QUICK = (POINTS[1], POINTS[6], POINTS[10])


class Operands(NamedTuple):
    """Codes and scales of a point in the layouts of TE: a ``[K / 128, B * M]``; b ``[K / 128, B * N]`` or 128x128."""

    a: torch.Tensor
    b: torch.Tensor
    a_scales: BlockScales
    b_scales: BlockScales
    masked_m: torch.Tensor | None


def _make_codes(num_items: int, rows: int, size_k: int, generator: torch.Generator) -> torch.Tensor:
    codes = torch.empty(
        (num_items, rows, size_k), dtype=torch.float8_e4m3fn, device=generator.device
    )
    for item in codes:
        # Of a hundred million normal numbers some exceed 5.6, and what lies beyond 448 would become NaN.
        numbers = torch.randn((rows, size_k), generator=generator, device=generator.device)
        item.copy_(numbers.mul_(80).clamp_(-448, 448))
    return codes


def make_operands(point: BlockwisePoint, device: str = "cuda") -> Operands:
    """Seeded operands of a point."""
    generator = torch.Generator(device=device).manual_seed(0)
    a = _make_codes(point.batch, point.m, point.k, generator)
    b = _make_codes(point.batch, point.n, point.k, generator)
    blocks = -(-point.k // 128)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device) / 64 + 1 / 64

    a_scales = draw(blocks, point.batch * point.m)
    if point.b_rows == 1:
        values = draw(blocks, point.batch * point.n)
        b_scales = BlockScales(values, 1, 1, values.stride(0), point.n)
    else:
        values = draw(point.batch, -(-point.n // 128), blocks)
        b_scales = BlockScales(values, 128, blocks, 1, values.shape[1] * 128)
    masked_m = None
    if point.mask != "none":
        masked_m = torch.tensor(point.num_rows, dtype=torch.int32, device=device)
    return Operands(
        a, b, BlockScales(a_scales, 1, 1, a_scales.stride(0), point.m), b_scales, masked_m
    )


def _scales_of_item(scales: BlockScales, item: int, rows: int) -> torch.Tensor:
    """FP32 ``[rows or blocks of rows, K / 128]`` of one item; a view."""
    if scales.granularity == 1:
        return scales.values[:, item * rows : (item + 1) * rows].T
    return scales.values[item]


def multiply_exactly(operands: Operands, item: int, num_rows: int) -> torch.Tensor:
    """FP64 product of the dequantised operands of an item, first rows."""

    def decode(codes: torch.Tensor, scales: BlockScales) -> torch.Tensor:
        rows, size_k = codes.shape[1:]
        factors = _scales_of_item(scales, item, rows).double()
        factors = factors.repeat_interleave(scales.granularity, 0)[:rows]
        return codes[item].double() * factors.repeat_interleave(128, 1)[:, :size_k]

    a, b = decode(operands.a, operands.a_scales), decode(operands.b, operands.b_scales)
    return a[:num_rows] @ b.T


def _prepare_ours(operands: Operands, out: torch.Tensor) -> Call:
    from transformer_engine_batched.kernels.blockwise_gemm import multiply_blockwise

    return lambda _: multiply_blockwise(*operands[:4], out, masked_m=operands.masked_m)


def _prepare_triton(operands: Operands, out: torch.Tensor) -> Call:
    from transformer_engine_batched.kernels.blockwise_gemm_triton import multiply_blockwise

    return lambda _: multiply_blockwise(*operands[:4], out, masked_m=operands.masked_m)


def _prepare_deep_gemm(operands: Operands, out: torch.Tensor) -> Call:
    import deep_gemm

    a, b, a_scales, b_scales, masked_m = operands
    num_items, num_rows, _ = a.shape
    # Its layout is that of an item with M contiguous; ours runs over the rows of all items.
    values = a_scales.values.view(-1, num_items, num_rows).transpose(0, 1).contiguous()
    if masked_m is not None:
        expected_m = int(masked_m.float().mean())
        left = a, values.mT
        return lambda _: deep_gemm.m_grouped_fp8_fp4_gemm_nt_masked(
            left, (b, b_scales.values), out, masked_m, expected_m
        )
    left = a.transpose(0, 1), values.permute(2, 0, 1)
    target = out.transpose(0, 1)
    return lambda _: deep_gemm.fp8_einsum("bhr,hdr->bhd", left, (b, b_scales.values), target)


def _prepare_cublaslt_loop(operands: Operands, out: torch.Tensor) -> Call:
    a, b, a_scales, b_scales, _ = operands
    items = [
        (
            a[item],
            b[item].T,
            _scales_of_item(a_scales, item, a.shape[1]).T.contiguous().T,
            (
                _scales_of_item(b_scales, item, b.shape[1]).T.contiguous()
                if b_scales.granularity == 1
                else b_scales.values[item].T
            ),
            out[item],
        )
        for item in range(len(a))
    ]

    def call(_: int) -> None:
        for left, right, left_scales, right_scales, target in items:
            torch._scaled_mm(
                left, right, left_scales, right_scales, out_dtype=out.dtype, out=target
            )

    return call


_PREPARE: dict[str, Callable[[Operands, torch.Tensor], Call]] = {
    OURS: _prepare_ours,
    "triton": _prepare_triton,
    "deep_gemm": _prepare_deep_gemm,
    "cublaslt_loop": _prepare_cublaslt_loop,
}


def name_calls(point: BlockwisePoint) -> Sequence[str]:
    """Variants that run at a point: no loop takes a mask; DeepGEMM at sizes with a goal, and only if it is there."""
    names = [*_OUR_FORMS]
    is_goal = point.m == point.n == point.k and point.b_rows == 128
    if is_goal and importlib.util.find_spec("deep_gemm") is not None:
        names.append("deep_gemm")
    if point.mask == "none":
        names.append("cublaslt_loop")
    return names


def judge(point: BlockwisePoint, operands: Operands, out: torch.Tensor) -> gate.Verdict:
    """The worst of eight items spread over the batch; rows past the mask must hold the NaN they held."""
    worst = gate.Verdict(True, None, None, None)
    for item in sorted({i * (point.batch - 1) // 7 for i in range(8)}):
        rows = point.num_rows[item]
        if not bool(out[item, rows:].isnan().all()):
            return gate.Verdict(False, None, item, f"item {item}: rows past the mask were written")
        if rows:
            exact = multiply_exactly(operands, item, rows)
            found = gate.judge(out[item : item + 1, :rows], exact[None], GATE_DB)
            if worst.sqnr_db is None or found.sqnr_db < worst.sqnr_db:
                reason = found.reason and found.reason.replace("item 0", f"item {item}")
                worst = gate.Verdict(found.passed, found.sqnr_db, item, reason)
    return worst


def _empty_row(point: BlockwisePoint, variant: str) -> Row:
    empty = ("sqnr_db", "worst_item", "median_ms", "quartiles_ms", "tflops", "ratio_to_all_rows")
    row = {"point": point.name, **asdict(point), "variant": variant, "gate_db": GATE_DB}
    return {**row, **dict.fromkeys(empty), "samples": 0, "reason": None}


def measure_point(
    point: BlockwisePoint,
    clock: Any,
    rounds: int,
    lost: Mapping[str, str],
    all_rows_ms: dict[tuple, float],
    device: str = "cuda",
) -> list[Row]:
    """Rows of one point, one for each variant.

    `all_rows_ms` remembers the times of points whose masks leave all rows: the point with half of the rows, which
    follows, is put beside it. ``ratio_to_all_rows`` is its time per row over that with all rows.
    """
    rows = {name: _empty_row(point, name) for name in name_calls(point)}
    calls: dict[str, Call] = {}
    try:
        operands = make_operands(point, device)
        out = torch.empty((point.batch, point.m, point.n), dtype=torch.bfloat16, device=device)
        clock.settle()
    except Exception as error:
        timing.check_device(None, error, clock.settle)
        for row in rows.values():
            row["reason"] = clean_reason(timing.describe_error(error))
        return list(rows.values())
    for name, row in rows.items():
        if name in lost:
            row["reason"] = lost[name]
            continue
        try:
            call = _PREPARE[name](operands, out)
            out.fill_(torch.nan)
            call(0)
            clock.settle()
            verdict = judge(point, operands, out)
        except Exception as error:
            row["reason"] = clean_reason(timing.describe_error(error))
            timing.check_device(name, error, clock.settle)
            continue
        row.update(sqnr_db=verdict.sqnr_db, worst_item=verdict.worst_item, reason=verdict.reason)
        if verdict.passed:
            calls[name] = call
    wanted = {"cublaslt_loop": _LOOP_ROUNDS} if point.batch >= _MANY_ITEMS else {}
    for name, samples in timing.interleave(calls, clock, rounds, 5, wanted).items():
        row, median = rows[name], samples.median
        if samples.reason is not None:
            row["reason"] = clean_reason(samples.reason)
            continue
        row.update(
            median_ms=median,
            quartiles_ms=samples.quartiles,
            samples=len(samples.values),
            tflops=point.flops / (median * 1e-3) / 1e12,
        )
        key = (name, point.batch, point.m, point.n, point.k)
        per_row = median / sum(point.num_rows)
        if point.mask == "all":
            all_rows_ms[key] = per_row
        elif point.mask != "none" and key in all_rows_ms:
            row["ratio_to_all_rows"] = per_row / all_rows_ms[key]
    return list(rows.values())


def make_measure(is_quick: bool) -> Callable[[BlockwisePoint, Mapping[str, str]], list[Row]]:
    """What `run.run_suite` calls for each point."""
    clock, all_rows_ms = timing.CudaClock(), {}
    rounds = 8 if is_quick else 20
    return lambda point, lost: measure_point(point, clock, rounds, lost, all_rows_ms)


def format_rows(found: dict[str, Any]) -> list[str]:
    """Lines for the terminal."""
    lines = [f"{'point':48}{'variant':16}{'ms':>9}{'TFLOP/s':>9}{'dB':>7}{'/all rows':>10}"]
    for row in found["rows"]:
        numbers = [
            "-" if row[field] is None else f"{row[field]:.{digits}f}"
            for field, digits in (
                ("median_ms", 4),
                ("tflops", 0),
                ("sqnr_db", 1),
                ("ratio_to_all_rows", 2),
            )
        ]
        cells = "".join(f"{x:>{width}}" for x, width in zip(numbers, (9, 9, 7, 10)))
        reason = f"  {row['reason']}" if row["reason"] else ""
        lines.append(f"{row['point']:48}{row['variant']:16}{cells}{reason}")
    return lines


def find_failures(found: dict[str, Any]) -> list[str]:
    """Rows of our own variants without a time."""
    return [
        f"blockwise {row['point']} {row['variant']}: {row['reason']}"
        for row in found["rows"]
        if row["variant"] in _OUR_FORMS and row["median_ms"] is None
    ]


def time_tiles(point: BlockwisePoint, clock: Any, rounds: int = 12) -> dict[str, float]:
    """Median milliseconds of our kernel with each tile shape, and with the one that it chooses."""
    from transformer_engine_batched.kernels.blockwise_gemm import TILES, multiply_blockwise

    operands = make_operands(point)
    out = torch.empty((point.batch, point.m, point.n), dtype=torch.bfloat16, device="cuda")

    def prepare(tile: Any) -> Call:
        options = {"masked_m": operands.masked_m, "tile": tile}
        return lambda _: multiply_blockwise(*operands[:4], out, **options)

    calls = {"chosen": prepare(None)}
    calls.update({f"{x.rows}x{x.cols}": prepare(x) for x in TILES})
    samples = timing.interleave(calls, clock, rounds, 3)
    return {name: found.median for name, found in samples.items()}


if __name__ == "__main__":
    for each in POINTS:
        times = time_tiles(each, timing.CudaClock())
        cells = ", ".join(f"{name} {ms:.4f}" for name, ms in times.items())
        print(f"{each.name}, ms: {cells}", flush=True)
