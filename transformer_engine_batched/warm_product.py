# SPDX-License-Identifier: Apache-2.0
"""Products and gradients of operands like those of earlier ones: from one look-up to the launches.

`quantized_operand` and `gemm` describe operands and codes at every call and make a tensor of each copy. What they
decide follows from signatures alone. It is kept here for operands that the fused kernels quantize: the launches, and
where codes and scales lie in a few allocations, one for what is read at once and one for what is saved for backward.
Must not know of autograd.
"""

from __future__ import annotations

import math
from typing import Hashable, NamedTuple, Optional, Sequence

import torch
from transformer_engine.pytorch.quantized_tensor import Quantizer

from . import _C
from .errors import UnsupportedError
from .gemm import find_launch, multiply_codes
from .kernels.memory import Address, empty_strided
from .launch import Launch
from .memory_layout import Strides, arrange
from .operands import broadcast_shapes, round_up
from .quantized_operand import Copy, FusedCast
from .te_interop.tensors import Codes

# Bytes up to which cuBLASLt's choice of an algorithm depends on addresses (csrc/plan.cpp).
ALIGNMENT = 256
_MAX_GRADIENTS = 64

Memories = Sequence[Optional[torch.Tensor]]
Addresses = Sequence[int]
# Rows and columns without padding, and the codes.
Saved = Optional[tuple[int, int, Copy]]


class _Arena:
    """Parts of one allocation."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.num_bytes = 0

    def add(self, num_bytes: int) -> tuple[int, int]:
        """Where a new part lies: the number of the allocation, and the offset."""
        offset = self.num_bytes
        self.num_bytes += round_up(num_bytes, ALIGNMENT)
        return self.index, offset


class Part(NamedTuple):
    """Codes and their scale in allocations: for each the number of the allocation and the offset in it.

    Parameters
    ----------
    codes, scale : tuple
    shape : tuple
        Of the codes.
    fp8_dtype : str
    """

    codes: tuple[int, int]
    scale: tuple[int, int]
    shape: tuple[int, ...]
    fp8_dtype: str

    def read(self, memories: Memories) -> Codes:
        """As tensors."""
        data, scale = memories[self.codes[0]], memories[self.scale[0]]
        first, last = self.codes[1], self.codes[1] + math.prod(self.shape)
        scale_inv = scale[self.scale[1] : self.scale[1] + 4].view(torch.float32)
        return Codes("float8", self.fp8_dtype, data[first:last].view(self.shape), scale_inv)


class _Cast:
    """A cast whose outputs are parts of allocations.

    Parameters
    ----------
    fused : FusedCast
    last, rows : _Arena, optional
        For codes along the last dim, and along the rows; None if there are none.
    scale, scratch : _Arena
        For `scale_inv`, and for amaxes.
    """

    def __init__(
        self,
        fused: FusedCast,
        last: Optional[_Arena],
        rows: Optional[_Arena],
        scale: _Arena,
        scratch: _Arena,
    ) -> None:
        self.fused, self.cast = fused, fused.cast
        self.is_delayed = fused.is_delayed
        self._scale = scale.add(4)
        shapes = self.cast.shapes
        self.last = self._place(last, shapes[fused.is_flipped])
        self.rows = self._place(rows, shapes[not fused.is_flipped])
        self._amaxes = None if self.is_delayed else scratch.add(4 * self.cast.num_amaxes)

    def _place(self, arena: Optional[_Arena], shape: Optional[tuple[int, ...]]) -> Optional[Part]:
        if arena is None:
            return None
        return Part(arena.add(math.prod(shape)), self._scale, shape, self.fused.fp8_dtype)

    def read_state(
        self, x: torch.Tensor, quantizer: Quantizer
    ) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        """Scale and amax of delayed scaling; raises a `ValueError` for what the kernel cannot take."""
        if not self.is_delayed:
            return None, None
        scale, amax = quantizer.scale, quantizer.amax
        self.cast.check_state(x, scale, amax)
        return scale, amax

    def point(
        self,
        x: torch.Tensor,
        state: tuple[Optional[torch.Tensor], Optional[torch.Tensor]],
        bases: Addresses,
    ) -> tuple:
        """The arguments of `Cast.write_to`, and where amaxes go if there is no state."""
        scale, amax = state
        if scale is None:
            index, offset = self._amaxes
            amax = Address(torch.float32, bases[index] + offset)
        codes, turned = self.last, self.rows
        if codes is not None:
            index, offset = codes.codes
            codes = Address(torch.uint8, bases[index] + offset)
        if turned is not None:
            index, offset = turned.codes
            turned = Address(torch.uint8, bases[index] + offset)
        if self.fused.is_flipped:
            codes, turned = turned, codes
        index, offset = self._scale
        return x, codes, turned, scale, amax, Address(torch.float32, bases[index] + offset)


class _Product:
    """The product of two parts.

    Parameters
    ----------
    left, right : Part
        The codes of `right` are those of the transposed factor.
    out_dtype : torch.dtype
    use_split_accumulator : bool
    shape : tuple
        Of the result, without padding and with all repeated items.
    """

    def __init__(
        self,
        left: Part,
        right: Part,
        out_dtype: torch.dtype,
        use_split_accumulator: bool,
        shape: tuple[int, ...],
    ) -> None:
        self._parts = left, right
        self._places = left.codes, right.codes, left.scale, right.scale
        self._options = out_dtype, use_split_accumulator
        self._shape = torch.Size(shape)
        # Found at the first run, if all there is to do is one launch of cuBLASLt.
        self._launch: Optional[Launch] = None

    def run(
        self, memories: Memories, bases: Addresses, device_index: int, strides: Optional[Strides]
    ) -> torch.Tensor:
        """The result, contiguous or with these strides."""
        if self._launch is None:
            out = self._run_codes(memories)
        else:
            addresses = [bases[index] + offset for index, offset in self._places]
            try:
                out = self._launch.run_at(*addresses, device_index)
            except _C.NotSupportedError as error:
                raise UnsupportedError(str(error)) from error
        if out.shape != self._shape:
            # Codes are padded, and where both operands repeat an item, one product served for all of them.
            rows, cols = self._shape[-2:]
            return arrange(out[..., :rows, :cols].expand(self._shape), strides)
        return out if strides is None else arrange(out, strides)

    def _run_codes(self, memories: Memories) -> torch.Tensor:
        left, right = (part.read(memories) for part in self._parts)
        launch = find_launch(left, False, right, True, *self._options)
        if isinstance(launch, Launch) and launch.is_simple:
            self._launch = launch
        return multiply_codes(left, False, right, True, *self._options)


class SavedParts(NamedTuple):
    """What backward reads: of each operand rows and columns without padding and its codes, if they are needed."""

    a: Optional[tuple[int, int, Part]]
    b: Optional[tuple[int, int, Part]]

    def attach(self, tensors: Sequence[torch.Tensor]) -> tuple[Saved, Saved]:
        """Of a along the rows and of b along the last dim, from the one tensor that was saved."""
        memories = (None, *tensors)
        return tuple(
            None if x is None else (*x[:2], Copy(x[2].read(memories), is_transposed))
            for x, is_transposed in ((self.a, True), (self.b, False))
        )


class WarmProduct:
    """The forward product of one signature, and the gradients of its operands.

    Parameters
    ----------
    a, b : torch.Tensor
        Operands like those that it is for.
    casts : tuple
        Of a (along the last dim, and along the rows if b needs a gradient) and b (along the rows, and along the last dim if
        a does).
    needs : tuple
        Whether a and b need gradients.
    out_dtype, use_split_accumulator
        Of the product.
    is_apart : bool
        Whether what is saved has a tensor for codes and for scales of each operand, not one for all.
    """

    def __init__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        casts: tuple[FusedCast, FusedCast],
        needs: tuple[bool, bool],
        out_dtype: torch.dtype,
        use_split_accumulator: bool,
        is_apart: bool,
    ) -> None:
        needs_a, needs_b = needs
        self._device_index = a.get_device()
        scratch = _Arena(0)
        arenas = [scratch]
        if is_apart:
            arenas += [_Arena(index) for index in range(1, 5)]
            kept_a, scale_a, kept_b, scale_b = arenas[1:]
        elif needs_a or needs_b:
            arenas.append(_Arena(1))
            kept_a = scale_a = kept_b = scale_b = arenas[1]
        else:
            kept_a = scale_a = kept_b = scale_b = scratch
        self._a = _Cast(casts[0], scratch, kept_a if needs_b else None, scale_a, scratch)
        self._b = _Cast(casts[1], kept_b if needs_a else None, scratch, scale_b, scratch)
        self._sizes = tuple((arena.num_bytes,) for arena in arenas)
        self._is_apart = is_apart
        self.saved = SavedParts(
            (*a.shape[-2:], self._a.rows) if needs_b else None,
            (*b.shape[-2:], self._b.last) if needs_a else None,
        )
        batch = broadcast_shapes(tuple(a.shape[:-2]), tuple(b.shape[:-2]))
        self._product = _Product(
            self._a.last,
            self._b.rows,
            out_dtype,
            use_split_accumulator,
            (*batch, a.shape[-2], b.shape[-1]),
        )
        self._search = self._pair = None
        if self._a.is_delayed == self._b.is_delayed:
            self._find_pairs()
        # None for those that are not a cast and a product for each.
        self.gradients: dict[Hashable, Optional[WarmGradients]] = {}

    def _find_pairs(self) -> None:
        # Triton takes a second to import, and only a GPU needs it
        from .kernels.cast_pair import CastPair, can_pair, is_small
        from .kernels.tensor_amax import AmaxPair

        casts = self._a.cast, self._b.cast
        if not is_small(*casts):
            # A cast right after its own search finds the end of the tensor in the L2 cache.
            return
        if not self._a.is_delayed:
            self._search = AmaxPair(*(cast.search for cast in casts))
        if can_pair(*casts):
            self._pair = CastPair(*casts, self._a.is_delayed)

    def __call__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        a_quantizer: Quantizer,
        b_quantizer: Quantizer,
        out_strides: Optional[Strides] = None,
    ) -> tuple[torch.Tensor, tuple[Optional[torch.Tensor], ...]]:
        """The product, and what is to be saved."""
        a_state, b_state = self._a.read_state(a, a_quantizer), self._b.read_state(b, b_quantizer)
        index = self._device_index
        if self._a.cast.is_elsewhere():
            with torch.cuda.device(index):
                return self(a, b, a_quantizer, b_quantizer, out_strides)
        a, b = self._a.fused.find_source(a), self._b.fused.find_source(b)
        memories = [empty_strided(size, (1,), torch.uint8, index) for size in self._sizes]
        bases = [x.data_ptr() for x in memories]
        a_pointers, b_pointers = self._a.point(a, a_state, bases), self._b.point(b, b_state, bases)
        if self._search is not None:
            self._search(a, a_pointers[4], b, b_pointers[4])
        if self._pair is not None:
            self._pair(*a_pointers, *b_pointers)
        else:
            for cast, pointers in ((self._a, a_pointers), (self._b, b_pointers)):
                if self._search is None:
                    _find_amaxes(cast, pointers)
                cast.cast.write_to(*pointers)
        out = self._product.run(memories, bases, index, out_strides)
        return out, self._select_saved(memories)

    def _select_saved(self, memories: list[torch.Tensor]) -> tuple[Optional[torch.Tensor], ...]:
        if not self._is_apart:
            return tuple(memories[1:])
        tensors = []
        for part in (self._a.rows, self._b.last):
            codes = None if part is None else part.read(memories)
            tensors += (None, None) if codes is None else (codes.data, codes.scale_inv)
        return tuple(tensors)

    def find_gradients(
        self,
        key: Hashable,
        grad_output: torch.Tensor,
        fused: Optional[FusedCast],
        operands: tuple[tuple, tuple],
        splits: tuple[bool, bool],
    ) -> Optional["WarmGradients"]:
        """The gradients of this key, if they are a cast and a product for each; kept in `gradients`.

        Parameters
        ----------
        grad_output : torch.Tensor
            A gradient like those that it is for.
        fused : FusedCast, optional
            How it is quantized; None if in another way.
        operands : tuple
            (shape, dtype, strides of the gradient or None) of a and of b.
        splits : tuple
            `use_split_accumulator` of both products.
        """
        if len(self.gradients) >= _MAX_GRADIENTS:
            self.gradients.clear()
        targets = [
            None if part is None else (tuple(x[0]), x[1], x[2], split)
            for part, x, split in zip((self.saved.b, self.saved.a), operands, splits)
        ]
        # Others are sums over items.
        batch = tuple(grad_output.shape[:-2])
        is_direct = all(x is None or x[0][:-2] == batch for x in targets)
        found = None
        if fused is not None and is_direct:
            found = WarmGradients(grad_output, fused, self.saved, targets)
        self.gradients[key] = found
        return found


class WarmGradients:
    """The gradients of the operands of a `WarmProduct`, for gradients of its result of one signature.

    Parameters
    ----------
    grad_output, fused
        As in `WarmProduct.find_gradients`.
    parts : SavedParts
    targets : sequence
        Shape, dtype, strides and `use_split_accumulator` of each gradient; None if it is not needed.
    """

    def __init__(
        self,
        grad_output: torch.Tensor,
        fused: FusedCast,
        parts: SavedParts,
        targets: Sequence[Optional[tuple]],
    ) -> None:
        self._device_index = grad_output.get_device()
        scratch = _Arena(0)
        needs_a, needs_b = (x is not None for x in targets)
        self._cast = _Cast(
            fused, scratch if needs_a else None, scratch if needs_b else None, scratch, scratch
        )
        self._size = (scratch.num_bytes,)
        self._products: list[Optional[tuple[_Product, Optional[Strides]]]] = [None, None]
        if needs_a:
            shape, dtype, strides, split = targets[0]
            self._products[0] = _Product(self._cast.last, parts.b[2], dtype, split, shape), strides
        if needs_b:
            shape, dtype, strides, split = targets[1]
            self._products[1] = _Product(parts.a[2], self._cast.rows, dtype, split, shape), strides

    def __call__(
        self, grad_output: torch.Tensor, saved: torch.Tensor, quantizer: Quantizer
    ) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        """Gradients of a and of b, None where not needed; `saved` is what forward saved."""
        state = self._cast.read_state(grad_output, quantizer)
        index = self._device_index
        if self._cast.cast.is_elsewhere():
            with torch.cuda.device(index):
                return self(grad_output, saved, quantizer)
        memories = empty_strided(self._size, (1,), torch.uint8, index), saved
        bases = memories[0].data_ptr(), saved.data_ptr()
        pointers = self._cast.point(self._cast.fused.find_source(grad_output), state, bases)
        _find_amaxes(self._cast, pointers)
        self._cast.cast.write_to(*pointers)
        return tuple(
            None if x is None else x[0].run(memories, bases, index, x[1]) for x in self._products
        )


def _find_amaxes(cast: _Cast, pointers: tuple) -> None:
    if not cast.is_delayed:
        cast.cast.find_amaxes_to(pointers[0], pointers[4])
