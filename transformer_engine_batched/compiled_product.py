# SPDX-License-Identifier: Apache-2.0
"""The product as operators of torch, which torch.compile keeps whole in its graphs.

`transformer_engine_batched::matmul` and `::matmul_backward` run `autograd.multiply` and
`autograd.compute_gradients`, the arithmetic of the eager product. What a graph cannot hold crosses as text: the
quantizers of recipes that keep no state. Also here: which calls torch.compile cannot trace, and why.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from typing import Iterator, NamedTuple, Optional, Sequence

import torch
from transformer_engine.common.recipe import Recipe

from . import emulation
from .autograd import Quantization, with_switches, compute_gradients, multiply
from .emulation import Emulation, current_emulation
from .quantized_operand import Copy, CopyLayout, describe_copy
from .sharded_product import is_sharded
from .te_interop.quantizers import decode_quantizer, encode_quantizer
from .te_interop.recipes import (
    accumulator_settings,
    active_recipe,
    is_calibrating,
    make_stateless_quantizers,
)
from .te_interop.tensors import HIGH_PRECISION_DTYPES, Codes, is_quantized

_PLAIN = ""
_NAMESPACE = "transformer_engine_batched"


class _Switch:
    """The state of `emulate()` where torch.compile can see it, and compile again when it changes.

    A graph holds the state for backward, which runs in threads that do not know it.
    """

    def __init__(self) -> None:
        self.enabled = False
        self.force_reference = False


_switch = _Switch()


@contextmanager
def mirror_emulation() -> Iterator[None]:
    """For `emulation.add_context`: shows the state of `emulate()` to torch.compile."""
    before = _switch.enabled, _switch.force_reference
    _switch.enabled, _switch.force_reference = current_emulation()
    try:
        yield
    finally:
        _switch.enabled, _switch.force_reference = before


emulation.add_context(mirror_emulation)


def why_not_traceable(a: torch.Tensor, b: torch.Tensor) -> Optional[str]:
    """Why a product must run between two graphs, or None. Traceable itself."""
    if is_quantized(a) or is_quantized(b):
        return "operands that are quantized already are not traced"
    if is_sharded(a) or is_sharded(b):
        return "products of DTensors are not traced"
    if is_calibrating():
        return "calibration records amaxes"
    recipe = active_recipe()
    if recipe is not None and (recipe.delayed() or recipe.custom()):
        return f"{type(recipe).__name__} keeps scales between steps"
    return None


def differentiable_matmul(
    a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, recipe: Optional[Recipe]
) -> torch.Tensor:
    """`autograd.differentiable_matmul` in a graph, under a recipe that keeps no state or without one."""
    is_recorded = torch.is_grad_enabled()
    quantization, epsilons = _PLAIN, (0.0, 0.0, 0.0)
    if recipe is not None:
        quantization, epsilons = _encode(recipe, a.device)
    return torch.ops.transformer_engine_batched.matmul(
        a,
        b,
        out_dtype,
        quantization,
        *epsilons,
        is_recorded and a.requires_grad,
        is_recorded and b.requires_grad,
        _switch.enabled,
        _switch.force_reference,
    )[0]


def _encode(recipe: Recipe, device: torch.device) -> tuple[str, tuple[float, ...]]:
    """Quantizers and accumulation of a recipe as text, and the amax epsilons; traceable."""
    quantizers = [encode_quantizer(x) for x in make_stateless_quantizers(recipe, device)]
    settings = accumulator_settings(recipe)
    split = f"{int(settings.forward)} {int(settings.grad_a)} {int(settings.grad_b)}"
    return ";".join([text for text, _ in quantizers] + [split]), tuple(x for _, x in quantizers)


@lru_cache(maxsize=256)
def _decode(text: str, epsilons: tuple[float, ...], device: torch.device) -> Quantization:
    if text == _PLAIN:
        return Quantization()
    *quantizers, split = text.split(";")
    return Quantization(
        *(decode_quantizer(x, epsilon, device) for x, epsilon in zip(quantizers, epsilons)),
        *(x == "1" for x in split.split()),
    )


# --- forward ----------------------------------------------------------------------------------------------


def _matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype,
    quantization: str,
    a_epsilon: float,
    b_epsilon: float,
    grad_epsilon: float,
    needs_a: bool,
    needs_b: bool,
    emulated: bool,
    force_reference: bool,
) -> list[torch.Tensor]:
    """The product, and what is saved for the gradients: codes and scales, if there are any."""
    if current_emulation() != (emulated, force_reference):
        raise RuntimeError(
            f"this graph was compiled {'inside' if emulated else 'outside'} emulate() and runs in a thread where "
            f"the switch is {current_emulation()}: enter emulate() in the thread that calls the compiled function"
        )
    settings = _decode(quantization, (a_epsilon, b_epsilon, grad_epsilon), a.device)
    forward = multiply(a.detach(), b.detach(), out_dtype, settings, needs_a, needs_b, is_apart=True)
    saved = [] if quantization == _PLAIN else _select(forward.tensors, needs_a, needs_b)
    described = _describe_saved(a, b, quantization, needs_a, needs_b, emulated, force_reference)
    for layout, data, scale_inv in zip(described, saved[::2], saved[1::2]):
        assert (data.shape, scale_inv.shape) == (layout.data_shape, layout.scale_shape), layout
        assert layout.data_strides in (None, data.stride()), (layout, data.stride())
        assert layout.scale_strides in (None, scale_inv.stride()), (layout, scale_inv.stride())
    return [forward.out, *saved]


def _select(tensors: Sequence[torch.Tensor], needs_a: bool, needs_b: bool) -> list[torch.Tensor]:
    """Of data and scales of a, which the gradient of b reads, and of b, those needed."""
    return [*(tensors[:2] if needs_b else ()), *(tensors[2:] if needs_a else ())]


def _describe_saved(
    a: torch.Tensor,
    b: torch.Tensor,
    quantization: str,
    needs_a: bool,
    needs_b: bool,
    emulated: bool,
    force_reference: bool,
) -> list[CopyLayout]:
    """Of each copy that is saved."""
    if quantization == _PLAIN:
        return []
    # Layouts do not depend on epsilons, which may be symbols here.
    settings = _decode(quantization, (0.0, 0.0, 0.0), a.device)
    state = Emulation(emulated, force_reference)
    layouts = []
    if needs_b:
        layouts.append(describe_copy(a, settings.a, False, state))
    if needs_a:
        layouts.append(describe_copy(b, settings.b, True, state))
    return layouts


def _fake_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype,
    quantization: str,
    a_epsilon: float,
    b_epsilon: float,
    grad_epsilon: float,
    needs_a: bool,
    needs_b: bool,
    emulated: bool,
    force_reference: bool,
) -> list[torch.Tensor]:
    torch._check(
        a.shape[-1] == b.shape[-2],
        lambda: f"operands a {list(a.shape)} and b {list(b.shape)}: the contracted sizes differ",
    )
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    outputs = [a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=out_dtype)]
    for layout in _describe_saved(a, b, quantization, needs_a, needs_b, emulated, force_reference):
        for shape, strides, dtype in (
            (layout.data_shape, layout.data_strides, torch.uint8),
            (layout.scale_shape, layout.scale_strides, layout.scale_dtype),
        ):
            if strides is None:
                outputs.append(a.new_empty(shape, dtype=dtype))
            else:
                outputs.append(a.new_empty_strided(shape, strides, dtype=dtype))
    return outputs


# --- backward ---------------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """A saved copy without its tensors; crosses as text."""

    fmt: str
    dtype: str
    moved_last_dim: bool = False
    columnwise: bool = False
    square: bool = False
    item_blocks: bool = False
    transposed: bool = False

    @classmethod
    def of(cls, layout: CopyLayout) -> "_Saved":
        """Of a copy that is described."""
        flags = {name: getattr(layout.hollow, name) for name in cls._fields[:-1]}
        return cls(**flags, transposed=layout.transposed)

    def encode(self) -> str:
        """For `decode`: types, and the names of the flags that are set.

        By name, because torch keeps compiled graphs on disk, where they outlive a version of this class.
        """
        return " ".join((self.fmt, self.dtype, *(n for n in self._fields[2:] if getattr(self, n))))

    @classmethod
    def decode(cls, text: str) -> "_Saved":
        """What `encode` gave."""
        fmt, dtype, *flags = text.split()
        return cls(fmt, dtype, **dict.fromkeys(flags, True))

    def attach(self, data: torch.Tensor, scale_inv: Optional[torch.Tensor]) -> Copy:
        """The copy with its tensors."""
        codes = Codes(
            self.fmt,
            self.dtype,
            data,
            scale_inv,
            moved_last_dim=self.moved_last_dim,
            columnwise=self.columnwise,
            square=self.square,
            item_blocks=self.item_blocks,
        )
        return Copy(codes, self.transposed)


def _matmul_backward(
    grad_output: torch.Tensor,
    saved: Sequence[torch.Tensor],
    layouts: str,
    a_shape: Sequence[int],
    b_shape: Sequence[int],
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    quantization: str,
    a_epsilon: float,
    b_epsilon: float,
    grad_epsilon: float,
    needs_a: bool,
    needs_b: bool,
    emulated: bool,
    force_reference: bool,
) -> list[torch.Tensor]:
    """Gradients of a and of b, those needed."""
    step = 1 if quantization == _PLAIN else 2
    copies = [
        _Saved.decode(text).attach(*saved[step * i : step * i + step], *[None] * (2 - step))
        for i, text in enumerate(layouts.split(";"))
    ]
    a_shape, b_shape = torch.Size(a_shape), torch.Size(b_shape)
    a_saved = (*a_shape[-2:], copies.pop(0)) if needs_b else None
    b_saved = (*b_shape[-2:], copies.pop(0)) if needs_a else None
    with with_switches((Emulation(emulated, force_reference), False)):
        grads = compute_gradients(
            grad_output,
            a_saved,
            b_saved,
            ((a_shape, a_dtype, None), (b_shape, b_dtype, None)),
            _decode(quantization, (a_epsilon, b_epsilon, grad_epsilon), grad_output.device),
        )
    return [grad.contiguous() for grad in grads if grad is not None]


def _fake_matmul_backward(
    grad_output: torch.Tensor,
    saved: Sequence[torch.Tensor],
    layouts: str,
    a_shape: Sequence[int],
    b_shape: Sequence[int],
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    quantization: str,
    a_epsilon: float,
    b_epsilon: float,
    grad_epsilon: float,
    needs_a: bool,
    needs_b: bool,
    emulated: bool,
    force_reference: bool,
) -> list[torch.Tensor]:
    # pylint: disable=unused-argument
    operands = ((needs_a, a_shape, a_dtype), (needs_b, b_shape, b_dtype))
    return [
        grad_output.new_empty(shape, dtype=dtype) for needed, shape, dtype in operands if needed
    ]


def _setup_context(ctx: object, inputs: tuple, output: list[torch.Tensor]) -> None:
    a, b, _, quantization, *epsilons, needs_a, needs_b, emulated, force_reference = inputs
    if quantization == _PLAIN:
        kept = [x for x, is_kept in ((a, needs_b), (b, needs_a)) if is_kept]
        names = (HIGH_PRECISION_DTYPES[x.dtype] for x in kept)
        saved = [_Saved(name, name) for name in names]
    else:
        kept = output[1:]
        layouts = _describe_saved(a, b, quantization, needs_a, needs_b, emulated, force_reference)
        saved = [_Saved.of(x) for x in layouts]
    ctx.save_for_backward(*kept)
    ctx.set_materialize_grads(False)
    ctx.needs = needs_a, needs_b
    ctx.arguments = (
        ";".join(x.encode() for x in saved),
        a.shape,
        b.shape,
        a.dtype,
        b.dtype,
        quantization,
        *epsilons,
        needs_a,
        needs_b,
        emulated,
        force_reference,
    )


def _backward(ctx: object, grads: list[Optional[torch.Tensor]]) -> tuple:
    needs_a, needs_b = ctx.needs
    grad_a = grad_b = None
    if grads[0] is not None:
        found = torch.ops.transformer_engine_batched.matmul_backward(
            grads[0], list(ctx.saved_tensors), *ctx.arguments
        )
        grad_a = found[0] if needs_a else None
        grad_b = found[-1] if needs_b else None
    return grad_a, grad_b, *[None] * 9


# The layout of what is saved follows from the operands' strides, which a compiler must not change.
_TAGS = (torch.Tag.needs_exact_strides,)
_operator = torch.library.custom_op(f"{_NAMESPACE}::matmul", _matmul, mutates_args=(), tags=_TAGS)
_operator.register_fake(_fake_matmul)
_operator.register_autograd(_backward, setup_context=_setup_context)
torch.library.custom_op(
    f"{_NAMESPACE}::matmul_backward", _matmul_backward, mutates_args=(), tags=_TAGS
).register_fake(_fake_matmul_backward)
