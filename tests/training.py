# SPDX-License-Identifier: Apache-2.0
"""Recipes, operands, exact results and bounds for tests of differentiable products, on any device.

Inputs are names of recipes and cases. Exact values come from torch's own FP64 autograd: must not import the
package's codes or engines.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Callable, Iterator, NamedTuple, Optional

import torch  # before TE: it loads the libraries that TE links to
import transformer_engine.pytorch as te
from accuracy import END_TO_END_BOUNDS_DB, OUTPUT_BOUNDS_DB, random_values, sqnr_per_item
from transformer_engine.common.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    Recipe,
)

# A history shorter than most tests, so that amaxes also leave it. The margin of one bit is for data of the
# next step that is larger than all before it, which would saturate: normal data of another seed may be.
RECIPES = {
    "none": lambda: None,
    "delayed": lambda: DelayedScaling(amax_history_len=3, margin=1),
    "current": Float8CurrentScaling,
    "mxfp8": MXFP8BlockScaling,
    "block": Float8BlockScaling,
}
QUANTIZED = ("delayed", "current", "mxfp8", "block")
STATELESS = ("current", "mxfp8", "block")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Lowest SQNR in dB of any item against FP64 of the original data. Operands are E4M3, gradients of the
# output E5M2 per tensor (HYBRID is the recipes' default) and E4M3 in blocks.
FORWARD_BOUND_DB = END_TO_END_BOUNDS_DB["e4m3", "e4m3"]
GRADIENT_BOUNDS_DB = {
    "delayed": END_TO_END_BOUNDS_DB["e5m2", "e4m3"],
    "current": END_TO_END_BOUNDS_DB["e5m2", "e4m3"],
    "mxfp8": END_TO_END_BOUNDS_DB["e4m3", "e4m3"],
    "block": END_TO_END_BOUNDS_DB["e4m3", "e4m3"],
}
# Few elements may all be near their worst: half a unit in the last place is 6.02 p dB for p bits of
# significand, 18 for a single E5M2 code.
ONE_ROW_SLACK_DB = 3.0
VECTOR_SLACK_DB = 6.0
# High precision on a GPU, whose FP32 sums are not exact: as in tests/gpu/test_products.py.
PLAIN_GPU_BOUNDS_DB = {torch.float32: 120.0, torch.float16: 68.0, torch.bfloat16: 50.0}


class Case(NamedTuple):
    """How both operands are made: shapes as stored, and the view of it that is the operand."""

    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    view_a: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    view_b: Callable[[torch.Tensor], torch.Tensor] = lambda x: x


def _mT(x: torch.Tensor) -> torch.Tensor:
    return x.mT


CASES = {
    "plain": Case((4, 32, 64), (4, 64, 48)),
    "matrices": Case((32, 64), (64, 48)),
    "a.mT": Case((4, 64, 32), (4, 64, 48), view_a=_mT),
    "b.mT": Case((4, 32, 64), (4, 48, 64), view_b=_mT),
    "both.mT": Case((4, 64, 32), (4, 48, 64), _mT, _mT),
    "a has no batch": Case((32, 64), (4, 64, 48)),
    "b has no batch": Case((4, 32, 64), (64, 48)),
    "a has a dim of 1": Case((1, 32, 64), (4, 64, 48)),
    "each repeats the other": Case((3, 1, 32, 64), (2, 64, 48)),
    "a expanded": Case((32, 64), (4, 64, 48), view_a=lambda x: x.expand(4, 32, 64)),
    "both expanded": Case(
        (32, 64), (48, 64), lambda x: x.expand(3, 32, 64), lambda x: x.expand(3, 48, 64).mT
    ),
    "batch dims swapped": Case((4, 3, 32, 64), (3, 4, 64, 48), lambda x: x.transpose(0, 1)),
    "every second item": Case((2, 6, 32, 64), (2, 3, 64, 48), lambda x: x[:, ::2]),
    "rows interleave items": Case((32, 4, 64), (4, 64, 48), lambda x: x.transpose(0, 1)),
    "every second column": Case((4, 32, 128), (4, 64, 96), lambda x: x[..., ::2], lambda x: x[..., 1::2]),
    "channels last": Case((32, 64, 3), (64, 48, 3), lambda x: x.permute(2, 0, 1), lambda x: x.permute(2, 0, 1)),
    "ragged": Case((3, 7, 33), (3, 33, 389)),
    "ragged.mT": Case((3, 33, 7), (3, 389, 33), _mT, _mT),
    "ragged, long sums": Case((2, 33, 389), (2, 389, 7)),
    "ragged, repeated": Case((5, 33, 7), (389, 7), view_b=_mT),
    "one item": Case((1, 32, 64), (1, 64, 48)),
    "one row": Case((3, 1, 64), (3, 64, 48)),
    "one column": Case((3, 32, 64), (3, 64, 1)),
    "vector by matrix": Case((64,), (4, 64, 48)),
    "matrix by vector": Case((4, 32, 64), (64,)),
    "vectors": Case((389,), (389,)),
}  # fmt: skip

EMPTY_CASES = {
    "no items": Case((0, 32, 64), (0, 64, 48)),
    "no items, b repeated": Case((0, 32, 64), (64, 48)),
    "no rows": Case((4, 0, 64), (4, 64, 48)),
    "no columns": Case((4, 32, 64), (4, 64, 0)),
    "nothing to sum": Case((4, 32, 0), (4, 0, 48)),
}


class Step(NamedTuple):
    """What a forward and a backward give, or what they should."""

    out: torch.Tensor
    grad_a: Optional[torch.Tensor]
    grad_b: Optional[torch.Tensor]


class Data(NamedTuple):
    """Both operands, leaves of autograd, and the gradient of the output."""

    a: torch.Tensor
    b: torch.Tensor
    grad_output: torch.Tensor


def make_data(
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    requires_grad: tuple[bool, bool] = (True, True),
) -> Data:
    """Data of a case, of order one; every item has a magnitude of its own, so that swapped items show.

    The magnitudes are those of every seed, as the scales of delayed scaling want it.
    """
    operands = []
    for index, (shape, view) in enumerate(
        ((case.a_shape, case.view_a), (case.b_shape, case.view_b))
    ):
        stored = random_values(shape, 10 * seed + index)
        if len(shape) > 2:
            sizes = random_values(shape[:-2] + (1, 1), index).abs().clamp(max=2) + 0.5
            stored = stored * sizes
        # The dtype changes before the view: the strides of the view are what is tested.
        operand = view(stored.to(device, dtype)).detach()
        operands.append(operand.requires_grad_(requires_grad[index]))
    out_shape = torch.matmul(*(x.detach() for x in operands)).shape
    return Data(*operands, random_values(out_shape, 10 * seed + 5).to(device, dtype))


def exact_step(data: Data) -> Step:
    """Product and gradients in FP64 by torch.matmul."""
    a, b = (x.detach().double().requires_grad_() for x in data[:2])
    out = torch.matmul(a, b)
    grads = torch.autograd.grad(out, (a, b), data.grad_output.double())
    return Step(out.detach(), *grads)


@contextmanager
def quantized(recipe: Optional[Recipe], **options: object) -> Iterator[None]:
    """`te.autocast` with a recipe; nothing at all for None."""
    with nullcontext() if recipe is None else te.autocast(enabled=True, recipe=recipe, **options):
        yield


def run_step(multiply: Callable, data: Data, recipe: Optional[Recipe] = None) -> Step:
    """Product under the recipe, backward outside of the region as in training; leaves `.grad` alone."""
    with quantized(recipe):
        out = multiply(data.a, data.b)
    wanted = [x for x in data[:2] if x.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, data.grad_output) if wanted else ())
    return Step(out.detach(), *(next(grads) if x.requires_grad else None for x in data[:2]))


def assert_step_accurate(
    step: Step, data: Data, recipe_name: str, plain_bounds: Optional[dict] = None
) -> None:
    """Fails unless output and gradients have torch.matmul's shapes and dtypes and reach the bounds."""
    expected = exact_step(data)
    vector = min(data.a.dim(), data.b.dim()) < 2
    for name, result, exact, leaf in zip(Step._fields, step, expected, (None, data.a, data.b)):
        if leaf is not None and not leaf.requires_grad:
            assert result is None, name
            continue
        dtype = data.a.dtype if leaf is None else leaf.dtype
        assert result.shape == exact.shape and result.dtype == dtype, (name, result.shape, dtype)
        assert result.device == data.a.device and not result.requires_grad, name
        if recipe_name == "none":
            bound = (plain_bounds or OUTPUT_BOUNDS_DB)[dtype]
        else:
            bound = FORWARD_BOUND_DB if leaf is None else GRADIENT_BOUNDS_DB[recipe_name]
        if exact.numel() == 0:
            continue
        if vector:
            worst = _vector_sqnr(name, result, exact, data) + VECTOR_SLACK_DB
        else:
            worst = sqnr_per_item(result, exact).min().item()
            worst += ONE_ROW_SLACK_DB if 1 in exact.shape[-2:] else 0.0
        assert worst >= bound, f"{name}: {worst:.1f} dB, expected {bound} dB"


def _vector_sqnr(name: str, result: torch.Tensor, exact: torch.Tensor, data: Data) -> float:
    """Against the energy that random operands give on average: a few sums may happen to be near zero."""
    squares = Data(*(x.detach().double().square() for x in data))
    energy = exact_step(squares)[Step._fields.index(name)].sum()
    noise = (result.double() - exact).square().sum()
    return float("inf") if noise == 0 else (10 * torch.log10(energy / noise)).item()


class Trace(NamedTuple):
    """What training gave: results of each step, and the state of delayed scaling after it."""

    steps: list[Step]
    states: list[dict[str, torch.Tensor]]


def train(
    module: torch.nn.Module,
    recipe: Optional[Recipe],
    batches: list[Data],
    multiply: Optional[Callable] = None,
) -> Trace:
    """Steps over batches. Modules that are compared are to be trained one after the other, with
    `FP8GlobalStateManager.reset()` between them: TE's updates are those of all modules there are.
    """
    steps, states = [], []
    for data in batches:
        steps.append(run_step(multiply or module, data, recipe))
        states.append(delayed_state(module) if recipe is not None and recipe.delayed() else {})
    return Trace(steps, states)


def assert_same_trace(left: Trace, right: Trace) -> None:
    """Bit for bit."""
    assert len(left.steps) == len(right.steps)
    for x, y in zip(left.steps, right.steps):
        assert_same_step(x, y)
    for x, y in zip(left.states, right.states):
        assert_same_state(x, y)


def delayed_state(module: te.BatchedMatmul) -> dict[str, torch.Tensor]:
    """Copies of scales and amax histories of a module under DelayedScaling."""
    return {
        f"{name}_{direction}": getattr(module.fp8_meta[f"scaling_{direction}"], name).clone()
        for direction in ("fwd", "bwd")
        for name in ("scale", "amax_history")
    }


def assert_same_state(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), (name, left[name], right[name])


def assert_same_step(left: Step, right: Step) -> None:
    """Bit for bit."""
    for name, x, y in zip(Step._fields, left, right):
        assert (x is None and y is None) or torch.equal(x, y), name


class SavedTensors:
    """Context that records what autograd saves for backward, as ``tensors``."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        self.tensors.append(x)
        return x

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    @property
    def num_bytes(self) -> int:
        """Of all storages that are kept alive, each counted once."""
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors
        }
        return sum(storages.values())


class QuantizeCalls:
    """Records what `quantize_operand` is asked for: ``(name, along_last, along_rows)``."""

    def __init__(self, monkeypatch) -> None:
        from transformer_engine_batched import autograd

        self.calls: list[tuple[str, bool, bool]] = []
        quantize_operand = autograd.quantize_operand

        def record(x, quantizer, name, *, along_last, along_rows):
            self.calls.append((name, along_last, along_rows))
            return quantize_operand(
                x, quantizer, name, along_last=along_last, along_rows=along_rows
            )

        monkeypatch.setattr(autograd, "quantize_operand", record)


def matrix_codes(copy: object, rows: int, cols: int) -> torch.Tensor:
    """Codes of a `Copy` as ``[*batch, rows, cols]``, whatever their order in memory, without padding."""
    data = copy.codes.data
    if copy.codes.moved_last_dim:
        data = data.movedim(0, -1)
    if copy.transposed:
        data = data.mT
    return data[..., :rows, :cols]
