# SPDX-License-Identifier: Apache-2.0
"""What is decided once for a kind of call, and the steps that each call takes.

`Launch.prepare` turns described operands into a `Problem`, packed copies, an output buffer and epilogue
steps; `Launch.run` carries them out on tensors. Checks of users' arguments are the caller's; a `Launch`
is immutable and serves all calls of the same shapes, strides and types.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Callable, Optional

import torch

from .block_scales import item_scales
from .kernels.memory import empty_strided
from .operands import (
    FoldedBatch,
    Operand,
    PackedCopy,
    contiguous_strides,
    fold_batch,
    has_single_stride,
    round_up,
)
from .plan import (
    SCALE_ALIGNMENT,
    WORKSPACE_LIMIT_BYTES,
    CublasLtPlan,
    aligned_scalar,
    current_sm_count,
)
from .problem import Problem, element_bytes
from .reference.product import TORCH_DTYPES, ReferencePlan
from .support import (
    Device,
    fused_bias_dtype,
    max_leading_dimension_bytes,
    native_output_dtypes,
    required_alignment,
    supports_fp8_output,
    supports_non_tn,
)

_PLANS = {"cublaslt": CublasLtPlan, "reference": ReferencePlan}
_SCALE_MODES = {"float8": "tensor", "mxfp8": "block32"}


@dataclass(frozen=True)
class Input:
    """One operand of a product as the caller has it.

    Parameters
    ----------
    operand : Operand
        The matrices that are multiplied (after any transposition), batch not yet broadcast.
    dtype : str
        Element type, "e4m3" and so on.
    is_aligned : bool
        Whether the first element lies at a multiple of 16 bytes.
    scales : tuple, optional
        MXFP8: (num_items, rows, cols, columnwise, swizzled) of the stored scales.
    """

    operand: Operand
    dtype: str
    is_aligned: bool = True
    scales: Optional[tuple[int, int, int, bool, bool]] = None


@dataclass(frozen=True)
class Output:
    """The result as the caller wants it.

    Parameters
    ----------
    dtype : str
    given : Operand, optional
        Where it lies, if the caller gave a buffer.
    is_aligned : bool
        Whether the given buffer starts at a multiple of 16 bytes.
    fp8 : str, optional
        FP8 type to be written with a scale known beforehand (delayed scaling).
    """

    dtype: str
    given: Optional[Operand] = None
    is_aligned: bool = True
    fp8: Optional[str] = None


@dataclass(frozen=True)
class Extras:
    """Everything else that decides a launch."""

    fast_accumulation: bool = False
    allow_tf32: bool = False
    accumulate: bool = False
    gelu: bool = False
    bias_dtype: Optional[str] = None
    bias_operand: Optional[Operand] = None  # [*batch, 1, n]
    fuse_epilogue: bool = True


@dataclass(frozen=True)
class Launch:
    """A prepared product. See the module docstring."""

    plan: object
    folded: FoldedBatch
    copy_a: Optional[Callable[[torch.Tensor], torch.Tensor]]
    copy_b: Optional[Callable[[torch.Tensor], torch.Tensor]]
    scales_a: Optional[Callable[[torch.Tensor], torch.Tensor]]
    scales_b: Optional[Callable[[torch.Tensor], torch.Tensor]]
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]
    out_dtype: torch.dtype
    buffer_shape: Optional[tuple[int, ...]]  # of the buffer that D is cut from, if it is not `out`
    buffer_dtype: torch.dtype
    bias_is_fused: bool
    gelu_is_fused: bool
    gelu: bool
    has_fp8_output: bool
    is_plain: bool  # nothing to do after the product
    is_simple: bool  # nor before it: one launch of cuBLASLt is all
    arguments: dict  # of `prepare`

    @classmethod
    def prepare(
        cls,
        *,
        fmt: str,
        engine: str,
        device: Device,
        device_index: int,
        a: Input,
        b: Input,
        out: Output,
        batch_shape: tuple[int, ...],
        extras: Extras,
    ) -> "Launch":
        """Decides copies, padding, output buffer and epilogue of ``a @ b``."""
        arguments = {
            "fmt": fmt,
            "engine": engine,
            "device": device,
            "device_index": device_index,
            "a": a,
            "b": b,
            "out": out,
            "batch_shape": batch_shape,
            "extras": extras,
        }
        alignment = required_alignment(fmt)
        m, k, n = a.operand.rows, a.operand.cols, b.operand.cols
        fp8_output = out.fp8 is not None and supports_fp8_output(
            fmt, a.dtype, b.dtype, out.fp8, prod(batch_shape)
        )
        native = fp8_output or out.dtype in native_output_dtypes(fmt, a.dtype)
        d_dtype = out.fp8 if fp8_output else out.dtype if native else "fp32"
        n_multiple = max(1, alignment.n_bytes_multiple // element_bytes(d_dtype))
        padded_n = round_up(n, n_multiple)

        # Both contiguous along k is what every format takes; it is also what Hopper's FP8 insists on.
        tn_only = not supports_non_tn(fmt, device)
        limit = max_leading_dimension_bytes(device.cublaslt)
        # The library walks block scales item after item, whatever the batch strides of the codes.
        in_order = fmt == "mxfp8"
        choose = _Chooser(alignment.address_multiple, tn_only, limit, in_order)
        a_operand, a_transposed, a_copy = choose.orient(
            a, batch_shape, preferred=False, row_multiple=1, col_multiple=alignment.k_multiple
        )
        b_operand, b_transposed, b_copy = choose.orient(
            b,
            batch_shape,
            preferred=True,
            row_multiple=alignment.k_multiple,
            col_multiple=n_multiple,
        )

        given = out.given
        is_direct = native and padded_n == n
        if given is not None and is_direct:
            is_direct = _is_writable(given, d_dtype, alignment.address_multiple, out.is_aligned)
            is_direct &= not in_order or has_single_stride(batch_shape, given.batch_strides)
        d_shape = (*batch_shape, m, padded_n)
        d_operand = (
            given
            if is_direct and given is not None
            else Operand.from_strides(d_shape, contiguous_strides(d_shape))
        )

        has_bias = extras.bias_operand is not None
        fuse = extras.fuse_epilogue and padded_n == n and native
        bias_strides = (0,) * len(batch_shape)
        if has_bias:
            bias_strides = extras.bias_operand.expand(batch_shape).batch_strides
        bias_is_fused = (
            fuse
            and has_bias
            and extras.bias_dtype == fused_bias_dtype(fmt, d_dtype)
            and (not in_order or has_single_stride(batch_shape, bias_strides))
        )
        gelu_is_fused = fuse and extras.gelu and (bias_is_fused or not has_bias)
        if fp8_output and (has_bias and not bias_is_fused or extras.gelu and not gelu_is_fused):
            # What follows the product must precede its quantization: write high precision first.
            return cls.prepare(**{**arguments, "out": Output(out.dtype)})

        folded = fold_batch(
            batch_shape,
            a_operand.batch_strides,
            b_operand.batch_strides,
            d_operand.batch_strides,
            bias_strides if bias_is_fused else (0,) * len(batch_shape),
        )
        scale_mode = _SCALE_MODES.get(fmt, "none")
        strides = folded.strides
        problem = Problem(
            batch=folded.size,
            m=m,
            n=padded_n,
            k=round_up(k, alignment.k_multiple),
            a=a_operand.matrix(a.dtype, scale_mode, strides[0], a_transposed),
            b=b_operand.matrix(b.dtype, scale_mode, strides[1], b_transposed),
            d=d_operand.matrix(d_dtype, "tensor" if fp8_output else "none", strides[2], False),
            epilogue=_EPILOGUES[bias_is_fused, gelu_is_fused],
            bias_dtype=extras.bias_dtype if bias_is_fused else "bf16",
            bias_batch_stride=strides[3],
            accumulate=extras.accumulate,
            fast_accumulation=extras.fast_accumulation and fmt in ("float8", "mxfp8"),
            allow_tf32=extras.allow_tf32,
            amax_d=fp8_output,
            device=device_index,
            sm_count=current_sm_count(device_index) if engine == "cublaslt" else 0,
            workspace_limit=WORKSPACE_LIMIT_BYTES,
        )
        is_plain = is_direct and bias_is_fused == has_bias and gelu_is_fused == extras.gelu
        return cls(
            plan=_PLANS[engine](problem),
            folded=folded,
            copy_a=None if a_copy is None else _make_copy(a.operand, a_copy),
            copy_b=None if b_copy is None else _make_copy(b.operand, b_copy),
            scales_a=_make_scales(a, batch_shape),
            scales_b=_make_scales(b, batch_shape),
            out_shape=(*batch_shape, m, n),
            out_strides=contiguous_strides((*batch_shape, m, n)),
            out_dtype=torch.uint8 if fp8_output else TORCH_DTYPES[out.dtype],
            buffer_shape=None if is_direct else d_shape,
            buffer_dtype=torch.uint8 if fp8_output else TORCH_DTYPES[d_dtype],
            bias_is_fused=bias_is_fused,
            gelu_is_fused=gelu_is_fused,
            gelu=extras.gelu,
            has_fp8_output=fp8_output,
            is_plain=is_plain,
            is_simple=is_plain
            and engine == "cublaslt"
            and len(folded.offsets) == 1
            and a_copy is None
            and b_copy is None
            and a.scales is None
            and not fp8_output,
            arguments=arguments,
        )

    def unfused(self) -> Optional["Launch"]:
        """The launch with bias and GELU after the product; None if nothing is fused."""
        if not (self.bias_is_fused or self.gelu_is_fused):
            return None
        extras = replace(self.arguments["extras"], fuse_epilogue=False)
        return Launch.prepare(**{**self.arguments, "extras": extras})

    def run_at(
        self, a: int, b: int, scale_inv_a: int, scale_inv_b: int, device_index: int
    ) -> torch.Tensor:
        """The product of a launch that `is_simple`, for addresses of operands and scales that are aligned."""
        out = empty_strided(self.out_shape, self.out_strides, self.buffer_dtype, device_index)
        pointers = (a, b, out.data_ptr(), scale_inv_a, scale_inv_b, 0, 0, 0)
        self.plan.launch(pointers, out, 1.0, 0.0, None)
        return out

    def run(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        scale_inv_a: Optional[torch.Tensor] = None,
        scale_inv_b: Optional[torch.Tensor] = None,
        quantizer: Optional[object] = None,
        out: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        autotune: Optional[bool] = None,
    ) -> torch.Tensor:
        """Multiplies; returns `out`, a new tensor, or, if `has_fp8_output`, FP8 codes.

        `a` and `b` hold the elements at the strides that were described. `bias` has the dtype that was
        described and is ``[n]`` or ``[*batch, n]``. FP8 output reads the `scale` and writes the `amax` of
        `quantizer`.
        """
        if self.is_simple:
            if out is None:
                out = empty_strided(
                    self.out_shape, self.out_strides, self.buffer_dtype, a.get_device()
                )
            scales = (0, 0)
            if scale_inv_a is not None:
                scales = (scale_inv_a.data_ptr(), scale_inv_b.data_ptr())
            if (scales[0] | scales[1]) % SCALE_ALIGNMENT == 0:
                bias_address = 0 if bias is None else bias.data_ptr()
                pointers = (
                    a.data_ptr(), b.data_ptr(), out.data_ptr(), *scales, 0, 0, bias_address
                )  # fmt: skip
                self.plan.launch(pointers, out, alpha, beta, autotune)
                return out
        if self.copy_a is not None:
            a = self.copy_a(a)
        if self.copy_b is not None:
            b = self.copy_b(b)
        if self.scales_a is not None:
            scale_inv_a, scale_inv_b = self.scales_a(scale_inv_a), self.scales_b(scale_inv_b)
        elif scale_inv_a is not None:
            scale_inv_a, scale_inv_b = aligned_scalar(scale_inv_a), aligned_scalar(scale_inv_b)
        if self.buffer_shape is not None:
            d = a.new_empty(self.buffer_shape, dtype=self.buffer_dtype)
            if beta != 0.0:
                d[..., : self.out_shape[-1]].copy_(out)
        elif out is None:
            d = out = a.new_empty(self.out_shape, dtype=self.buffer_dtype)
        else:
            d = out
        scale_d = amaxes = amax_d = None
        if self.has_fp8_output:
            scale_d = aligned_scalar(quantizer.scale)
            amax_d = quantizer.amax
            if len(self.folded.offsets) > 1 or amax_d.data_ptr() % SCALE_ALIGNMENT:
                # Each launch overwrites its amax: one for each, at aligned addresses.
                row = SCALE_ALIGNMENT // 4
                amaxes = a.new_empty((len(self.folded.offsets), row), dtype=torch.float32)
        fused_bias = bias if self.bias_is_fused else None
        for index, offsets in enumerate(self.folded.offsets):
            if amaxes is not None:
                amax_d = amaxes[index, :1]
            self.plan.run(
                a, b, d, offsets, scale_inv_a, scale_inv_b, scale_d, amax_d, fused_bias, alpha, beta,
                autotune,
            )  # fmt: skip
        if amaxes is not None:
            quantizer.amax.copy_(amaxes[:, 0].max())
        if self.is_plain:
            return out
        if self.buffer_shape is not None:
            d = d[..., : self.out_shape[-1]]
        apply_epilogue(
            d, None if self.bias_is_fused else bias, self.gelu and not self.gelu_is_fused
        )
        if self.buffer_shape is not None:
            if out is None:
                out = a.new_empty(self.out_shape, dtype=self.out_dtype)
            out.copy_(d)
        return out


@dataclass(frozen=True)
class EmptyLaunch:
    """A product without elements to multiply: ``beta * out``, then bias and GELU. Call as `Launch`."""

    out_shape: tuple[int, ...]
    out_dtype: torch.dtype
    gelu: bool
    has_fp8_output: bool = False

    def run(
        self,
        a: torch.Tensor,
        b: torch.Tensor,  # pylint: disable=unused-argument # the call is that of `Launch`
        scale_inv_a: Optional[torch.Tensor] = None,  # pylint: disable=unused-argument
        scale_inv_b: Optional[torch.Tensor] = None,  # pylint: disable=unused-argument
        quantizer: Optional[object] = None,  # pylint: disable=unused-argument
        out: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
        alpha: float = 1.0,  # pylint: disable=unused-argument
        beta: float = 0.0,
        autotune: Optional[bool] = None,  # pylint: disable=unused-argument
    ) -> torch.Tensor:
        """Returns `out` or a new tensor."""
        if out is None:
            out = a.new_zeros(self.out_shape, dtype=self.out_dtype)
        elif beta == 0.0:
            out.zero_()
        else:
            out.mul_(beta)
        apply_epilogue(out, bias, self.gelu)
        return out


def apply_epilogue(d: torch.Tensor, bias: Optional[torch.Tensor], gelu: bool) -> None:
    """Bias and GELU in place, where they are not part of the product."""
    if bias is not None:
        d.add_(bias if bias.dim() == 1 else bias.unsqueeze(-2))
    if gelu:
        d.copy_(torch.nn.functional.gelu(d, approximate="tanh"))


_EPILOGUES = {
    (False, False): "none",
    (True, False): "bias",
    (False, True): "gelu",
    (True, True): "gelu_bias",
}


@dataclass(frozen=True)
class _Chooser:
    """Reads an operand where it lies if the library takes that, else from a packed copy."""

    address_multiple: int
    tn_only: bool
    max_ld_bytes: Optional[int]
    in_order: bool  # items must follow one another: broadcast operands are repeated

    def orient(
        self,
        x: Input,
        batch_shape: tuple[int, ...],
        *,
        preferred: bool,
        row_multiple: int,
        col_multiple: int,
    ) -> tuple[Operand, bool, Optional[PackedCopy]]:
        """(operand as read, whether it is transposed, the copy to make or None)."""
        operand = x.operand.expand(batch_shape)
        transposed = operand.choose_orientation(preferred)
        fits = (
            transposed is not None
            and (transposed == preferred or not self.tn_only)
            and operand.rows % row_multiple == 0
            and operand.cols % col_multiple == 0
            and self._has_good_addresses(x, operand, transposed)
            and not (self.in_order and not self._is_in_order(operand))
        )
        if fits:
            return operand, transposed, None
        copy = operand.packed(
            transposed=preferred,
            row_multiple=row_multiple,
            col_multiple=col_multiple,
            repeat=self.in_order,
        )
        return copy.operand, preferred, copy

    @staticmethod
    def _is_in_order(operand: Operand) -> bool:
        is_broadcast = any(
            size > 1 and stride == 0
            for size, stride in zip(operand.batch_shape, operand.batch_strides)
        )
        return not is_broadcast and has_single_stride(operand.batch_shape, operand.batch_strides)

    def _has_good_addresses(self, x: Input, operand: Operand, transposed: bool) -> bool:
        size = element_bytes(x.dtype)
        ld_bytes = operand.leading_dimension(transposed) * size
        if self.max_ld_bytes is not None and ld_bytes > self.max_ld_bytes:
            return False
        if self.address_multiple == 1:
            return True
        steps = [ld_bytes] + [
            stride * size
            for count, stride in zip(operand.batch_shape, operand.batch_strides)
            if count > 1
        ]
        return x.is_aligned and all(step % self.address_multiple == 0 for step in steps)


def _is_writable(out: Operand, dtype: str, address_multiple: int, is_aligned: bool) -> bool:
    """Whether the library can write to the caller's buffer where it lies."""
    if not out.fits(False):
        return False
    if address_multiple == 1:
        return True
    size = element_bytes(dtype)
    steps = [out.leading_dimension(False) * size] + [
        stride * size for count, stride in zip(out.batch_shape, out.batch_strides) if count > 1
    ]
    return is_aligned and all(step % address_multiple == 0 for step in steps)


def _make_copy(source: Operand, copy: PackedCopy) -> Callable[[torch.Tensor], torch.Tensor]:
    """One packed copy of an operand, padding zeroed: zero codes add nothing to a product."""
    base = source.expand(copy.base_shape)
    rows, cols = (source.cols, source.rows) if copy.transposed else (source.rows, source.cols)
    row_stride, col_stride = (
        (source.col_stride, source.row_stride)
        if copy.transposed
        else (source.row_stride, source.col_stride)
    )
    shape = (*copy.base_shape, rows, cols)
    strides = (*base.batch_strides, row_stride, col_stride)
    padded_rows, padded_cols = copy.stored_shape[-2:]

    def make(data: torch.Tensor) -> torch.Tensor:
        source_view = data.as_strided(shape, strides, data.storage_offset())
        packed = data.new_empty(copy.stored_shape)
        if padded_rows > rows:
            packed[..., rows:, :].zero_()
        if padded_cols > cols:
            packed[..., cols:].zero_()
        target = packed[..., :rows, :cols]
        if data.is_cuda and source_view.stride(-1) != 1:
            # Channels last: torch's copy reads such a view at a tenth of the speed.
            from .kernels.permute import copy_permuted  # Triton takes a second to import

            copy_permuted(source_view, target)
        else:
            wide = _widest_dtype(source_view, target)
            target.view(wide).copy_(source_view.view(wide))
        return packed

    return make


def _widest_dtype(*views: torch.Tensor) -> torch.dtype:
    """Integer type of up to 8 bytes in which all views can be copied: one-byte copies are slow."""
    for dtype, size in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2)):
        if all(
            view.stride(-1) == 1
            and size > view.element_size()
            and view.data_ptr() % size == 0
            and view.storage_offset() * view.element_size() % size == 0
            and all(
                x * view.element_size() % size == 0 for x in (view.shape[-1], *view.stride()[:-1])
            )
            for view in views
        ):
            return dtype
    return views[0].dtype


def _make_scales(
    x: Input, batch_shape: tuple[int, ...]
) -> Optional[Callable[[torch.Tensor], torch.Tensor]]:
    """Block scales packed per item of the broadcast batch."""
    if x.scales is None:
        return None
    num_items, rows, cols, columnwise, swizzled = x.scales
    own_shape = (1,) * (len(batch_shape) - len(x.operand.batch_shape)) + x.operand.batch_shape

    def make(scales: torch.Tensor) -> torch.Tensor:
        packed = item_scales(
            scales,
            num_items=num_items,
            rows=rows,
            cols=cols,
            columnwise=columnwise,
            swizzled=swizzled,
        )
        if own_shape == batch_shape:
            return packed
        repeated = packed.reshape(*own_shape, -1).expand(*batch_shape, -1)
        return repeated.reshape(prod(batch_shape), -1).contiguous()

    return make
