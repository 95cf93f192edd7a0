# SPDX-License-Identifier: Apache-2.0
"""Products of FP8 tensors with FP32 block scales: masked rows, rows of many groups, groups along K.

Input: plain FP8 tensors and their inverse scales, as `block_cast` makes them. Signatures and meanings are those of
FlashInfer and DeepGEMM. Arguments are checked here; the device and the support table decide between the Hopper kernel
and the reference. Must not know of TE's tensors.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple, Optional, Sequence

import torch

from .emulation import current_emulation
from .kernels import blockwise_gemm
from .kernels.blockwise_gemm import BlockScales
from .operands import has_internal_overlap, round_up
from .plan import current_sm_count, describe_device
from .support import check_fp8_pair, find_groupwise_engine

_BLOCK = 128
# Codes of a row start at multiples of this many bytes where the kernel reads them.
_PITCH = 16
_FP8_NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_GRANULARITIES = ((1, 128, 128), (1, 1, 128), (128, 128, 128))

# Rows: where a group may start in the contiguous layout.
_GROUP_ALIGNMENT = 128


class _Operand(NamedTuple):
    """Codes that the kernel reads, and the scales of their rows."""

    codes: torch.Tensor
    scale_inv: torch.Tensor
    granularity: int


def get_m_alignment_for_contiguous_layout() -> int:
    """Rows to a multiple of which each group's rows are padded in `grouped_gemm_fp8_nt_contiguous`: 128.

    Examples
    --------
    >>> import transformer_engine_batched as teb
    >>> teb.get_m_alignment_for_contiguous_layout()
    128
    """
    return _GROUP_ALIGNMENT


def batched_gemm_fp8_nt_groupwise(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    scale_granularity_mnk: tuple[int, int, int] = (1, 128, 128),
    out: Optional[torch.Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """``out[i, :masked_m[i]] = dequantize(a[i, :masked_m[i]]) @ dequantize(b[i]).T`` for each item i.

    FlashInfer's ``batch_deepgemm_fp8_nt_groupwise``, and DeepGEMM's masked grouped product. How many rows of each
    item are computed is read on the device: nothing waits for it, and the call can be captured in a CUDA
    graph and replayed with other counts.

    Parameters
    ----------
    a : torch.Tensor
        FP8 ``[B, M, K]``, E4M3 or E5M2.
    b : torch.Tensor
        FP8 ``[B, N, K]``; E4M3 if `a` is E5M2.
    a_scale : torch.Tensor
        FP32 inverse scales ``[B, M, ceil(K / 128)]``, with ``m`` granularity 128 ``[B, ceil(M / 128), ...]``.
        Any strides.
    b_scale : torch.Tensor
        FP32 ``[B, ceil(N / 128), ceil(K / 128)]``, with ``n`` granularity 1 ``[B, N, ...]``.
    masked_m : torch.Tensor
        INT32 ``[B]``: rows of each item to compute. On the device of `a`, where a count beyond M means M and a
        negative one 0; or on the CPU, where they are refused, and from where it is copied.
    expected_m : int
        About how many rows an item has. It picks the tile shape and never changes the result.
    scale_granularity_mnk : tuple of int
        ``(1, 128, 128)``, ``(1, 1, 128)`` or ``(128, 128, 128)``: elements per scale along M, N and K.
    out : torch.Tensor, optional
        ``[B, M, N]`` of BF16, FP16 or FP32, any strides. Rows past ``masked_m[i]`` are left as they are.
    out_dtype : torch.dtype, optional
        Of a new `out`, default BF16; ignored if `out` is given. Rows past ``masked_m[i]`` of a new one are not
        initialised.

    Returns
    -------
    torch.Tensor
        `out`.

    Raises
    ------
    TypeError, ValueError
        Wrong dtypes, shapes, devices, granularity, or counts that the host can see to be wrong.
    UnsupportedError
        On a CUDA device other than Hopper, outside of `emulate()`.

    Notes
    -----
    Each block of 128 along K is summed by tensor cores and added in FP32. CPU tensors, and everything inside
    ``emulate("reference")``, go through the exact reference. Codes whose rows do not start at multiples of 16
    bytes (K no such multiple, or strided views) are read from a packed copy. Tiles that lie past an item's rows cost
    nothing. `limit_sms` holds. Not differentiable.

    Sources: https://docs.flashinfer.ai/generated/flashinfer.gemm.batch_deepgemm_fp8_nt_groupwise.html and
    https://github.com/deepseek-ai/DeepGEMM.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> a, a_scale = teb.per_token_cast_to_fp8(torch.rand(2, 16, 256))
    >>> b, b_scale = teb.per_block_cast_to_fp8(torch.rand(2, 128, 256))
    >>> masked_m = torch.tensor([16, 5], dtype=torch.int32)
    >>> teb.batched_gemm_fp8_nt_groupwise(a, b, a_scale, b_scale, masked_m, expected_m=11).shape
    torch.Size([2, 16, 128])
    """
    granularity_m, granularity_n = _check_granularity(scale_granularity_mnk)
    if not isinstance(expected_m, int) or isinstance(expected_m, bool) or expected_m < 0:
        raise ValueError(
            f"expected_m={expected_m!r}: expected a count of rows that the host knows, such as "
            "min(int(masked_m.float().mean()) + 1, M)"
        )
    _check_codes(a, b, ("B", "M", "K"), ("B", "N", "K"))
    num_items, rows, size = a.shape
    cols = b.shape[1]
    if b.shape[0] != num_items:
        raise ValueError(
            f"a {list(a.shape)} and b {list(b.shape)} have {num_items} and {b.shape[0]} items: expected as many"
        )
    _check_scales("a_scale", a_scale, a, (num_items, rows, size), granularity_m)
    _check_scales("b_scale", b_scale, b, (num_items, cols, size), granularity_n)
    _check_counts(masked_m, "masked_m", num_items)
    if not masked_m.is_cuda:
        for item, count in enumerate(masked_m.tolist()):
            if not 0 <= count <= rows:
                raise ValueError(
                    f"masked_m[{item}] = {count}: item {item} of a {list(a.shape)} has {rows} rows"
                )
    masked_m = _on_device(masked_m, "masked_m", a)
    out = _make_out(out, out_dtype, (num_items, rows, cols), a)
    left = _readable(_Operand(a, a_scale, granularity_m))
    right = _readable(_Operand(b, b_scale, granularity_n))
    if out.numel() == 0:
        return out

    def multiply(engine: ModuleType, target: torch.Tensor) -> None:
        engine.multiply_blockwise(
            left.codes,
            right.codes,
            _describe_scales(left),
            _describe_scales(right),
            target,
            masked_m=masked_m,
            expected_m=max(1, min(expected_m, rows)),
            num_sms=_num_sms(a),
        )

    return _run(multiply, out, a)


def grouped_gemm_fp8_nt_contiguous(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    m_indices: torch.Tensor,
    scale_granularity_mnk: tuple[int, int, int] = (1, 128, 128),
    out: Optional[torch.Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """``out[m] = dequantize(a[m]) @ dequantize(b[m_indices[m]]).T`` for each row m of a group.

    DeepGEMM's ``m_grouped_gemm_fp8_fp8_bf16_nt_contiguous``: the rows of all groups (tokens of experts) stand in one
    matrix, one group after the other.

    Parameters
    ----------
    a : torch.Tensor
        FP8 ``[M, K]``.
    b : torch.Tensor
        FP8 ``[G, N, K]``, a matrix for each group.
    a_scale : torch.Tensor
        FP32 inverse scales ``[M, ceil(K / 128)]``, with ``m`` granularity 128 ``[ceil(M / 128), ...]``. Any strides.
    b_scale : torch.Tensor
        FP32 ``[G, ceil(N / 128), ceil(K / 128)]``, with ``n`` granularity 1 ``[G, N, ...]``.
    m_indices : torch.Tensor
        INT32 ``[M]``: the group of each row, -1 for padding. A group starts at a multiple of 128 rows
        (`get_m_alignment_for_contiguous_layout`), and padding follows its rows. Groups without rows do not
        occur in it. On the device of `a`, where none of this can be checked, or on the CPU, where it is.
    scale_granularity_mnk, out, out_dtype
        As for `batched_gemm_fp8_nt_groupwise`; `out` is ``[M, N]``, and its rows of padding are left as they are.

    Returns
    -------
    torch.Tensor
        `out`.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        As `batched_gemm_fp8_nt_groupwise`.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> a, a_scale = teb.per_token_cast_to_fp8(torch.randn(256, 128))
    >>> b, b_scale = teb.per_block_cast_to_fp8(torch.randn(2, 64, 128))
    >>> m_indices = torch.tensor([0] * 100 + [-1] * 28 + [1] * 128, dtype=torch.int32)
    >>> teb.grouped_gemm_fp8_nt_contiguous(a, b, a_scale, b_scale, m_indices).shape
    torch.Size([256, 64])
    """
    granularity_m, granularity_n = _check_granularity(scale_granularity_mnk)
    _check_codes(a, b, ("M", "K"), ("G", "N", "K"))
    rows, size = a.shape
    num_groups, cols, _ = b.shape
    _check_scales("a_scale", a_scale, a, (rows, size), granularity_m)
    _check_scales("b_scale", b_scale, b, (num_groups, cols, size), granularity_n)
    _check_counts(m_indices, "m_indices", rows)
    if not m_indices.is_cuda:
        _check_groups(m_indices, num_groups)
    m_indices = _on_device(m_indices, "m_indices", a)
    out = _make_out(out, out_dtype, (rows, cols), a)
    if out.numel() == 0 or num_groups == 0:
        return out
    left = _readable(_Operand(a[None], a_scale[None], granularity_m))
    right = _readable(_Operand(b, b_scale, granularity_n))

    def multiply(engine: ModuleType, target: torch.Tensor) -> None:
        engine.multiply_blockwise(
            left.codes[0],
            right.codes,
            _describe_scales(left),
            _describe_scales(right),
            target,
            m_indices=m_indices,
            num_sms=_num_sms(a),
        )

    return _run(multiply, out, a)


def grouped_gemm_fp8_k_grouped(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    ks: torch.Tensor | Sequence[int],
    out: torch.Tensor,
    accumulate: bool = True,
) -> torch.Tensor:
    """``out[g] += dequantize(a[:, k0:k1]) @ dequantize(b[:, k0:k1]).T``, with the columns of group g.

    DeepGEMM's k-grouped product: the weight gradients of all experts in one call. With `a` the transposed output
    gradient ``[N, tokens]`` and `b` the transposed input ``[K, tokens]``, out is ``[G, N, K]``.

    Parameters
    ----------
    a : torch.Tensor
        FP8 ``[M, T]``, the columns of all groups side by side.
    b : torch.Tensor
        FP8 ``[N, T]``.
    a_scale, b_scale : torch.Tensor
        FP32 inverse scales ``[M, ceil(T / 128)]`` and ``[N, ceil(T / 128)]``, any strides:
        ``per_token_cast_to_fp8(x, with_transpose=True)[1]`` makes codes and scales from ``x [T, M]``.
    ks : torch.Tensor or sequence of int
        Columns of each group, ``[G]``: multiples of 128 (pad with zeros) whose sum is at most T; 0 for a group
        without any. An INT32 tensor on the device of `a`, where they cannot be checked, or numbers that the host knows.
    out : torch.Tensor
        ``[G, M, N]``, FP32; without `accumulate` also BF16 or FP16.
    accumulate : bool, default = True
        Add to `out`, in FP32. Otherwise a group without columns gives zeros.

    Returns
    -------
    torch.Tensor
        `out`.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        As `batched_gemm_fp8_nt_groupwise`.

    Examples
    --------
    >>> import torch, transformer_engine_batched as teb
    >>> x, grad = torch.randn(384, 64), torch.randn(384, 32)
    >>> _, (xt, xt_scale) = teb.per_token_cast_to_fp8(x, with_transpose=True)
    >>> _, (gt, gt_scale) = teb.per_token_cast_to_fp8(grad, with_transpose=True)
    >>> weight_grad = torch.zeros(3, 32, 64)
    >>> teb.grouped_gemm_fp8_k_grouped(gt, xt, gt_scale, xt_scale, [128, 0, 256], weight_grad).shape
    torch.Size([3, 32, 64])
    """
    _check_codes(a, b, ("M", "T"), ("N", "T"))
    _check_scales("a_scale", a_scale, a, tuple(a.shape), 1)
    _check_scales("b_scale", b_scale, b, tuple(b.shape), 1)
    if not isinstance(ks, torch.Tensor):
        ks = torch.tensor(list(ks), dtype=torch.int32)
    num_groups = ks.numel()
    _check_counts(ks, "ks", num_groups)
    if not ks.is_cuda:
        sizes = ks.tolist()
        for group, count in enumerate(sizes):
            if count < 0 or count % _BLOCK:
                raise ValueError(
                    f"ks[{group}] = {count}: expected a multiple of {_BLOCK}; pad the group with columns of zeros"
                )
        if sum(sizes) > a.shape[1]:
            raise ValueError(
                f"ks adds up to {sum(sizes)} columns, and a {list(a.shape)} has {a.shape[1]}"
            )
    ks = _on_device(ks, "ks", a)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out: expected a torch.Tensor, got {type(out).__name__}")
    out = _make_out(out, None, (num_groups, a.shape[0], b.shape[0]), a)
    if accumulate and out.dtype != torch.float32:
        raise TypeError(
            f"out has dtype {out.dtype}: sums are kept in float32; pass a float32 out, or accumulate=False"
        )
    if out.numel() == 0:
        return out
    left = _readable(_Operand(a[None], a_scale[None], 1))
    right = _readable(_Operand(b[None], b_scale[None], 1))

    def multiply(engine: ModuleType, target: torch.Tensor) -> None:
        engine.multiply_blockwise_k_grouped(
            left.codes[0],
            right.codes[0],
            _describe_scales(left),
            _describe_scales(right),
            target,
            ks,
            accumulate=accumulate,
            num_sms=_num_sms(a),
        )

    return _run(multiply, out, a)


# --- checks of arguments ----------------------------------------------------------------------------------


def _check_granularity(granularity: tuple[int, int, int]) -> tuple[int, int]:
    if tuple(granularity) not in _GRANULARITIES:
        raise ValueError(f"scale_granularity_mnk={granularity}: expected one of {_GRANULARITIES}")
    return tuple(granularity)[:2]


def _check_codes(
    a: torch.Tensor, b: torch.Tensor, a_dims: tuple[str, ...], b_dims: tuple[str, ...]
) -> None:
    for name, x, dims in (("a", a, a_dims), ("b", b, b_dims)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in _FP8_NAMES:
            raise TypeError(
                f"{name} has dtype {x.dtype}: expected torch.float8_e4m3fn or torch.float8_e5m2, as "
                "teb.per_token_cast_to_fp8 and teb.per_block_cast_to_fp8 make them"
            )
        if x.dim() != len(dims):
            raise ValueError(f"{name} has shape {list(x.shape)}: expected [{', '.join(dims)}]")
    check_fp8_pair(_FP8_NAMES[a.dtype], _FP8_NAMES[b.dtype], "a", "b")
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"a {list(a.shape)} and b {list(b.shape)} differ in their last dim, which is contracted"
        )
    if a.device != b.device:
        raise ValueError(f"a is on {a.device}, b on {b.device}: move them to one device")


def _check_scales(
    name: str, scale: torch.Tensor, codes: torch.Tensor, shape: tuple[int, ...], granularity: int
) -> None:
    if not isinstance(scale, torch.Tensor) or scale.dtype != torch.float32:
        came = scale.dtype if isinstance(scale, torch.Tensor) else type(scale).__name__
        raise TypeError(f"{name}: expected float32 inverse scales, got {came}")
    *batch, rows, size = shape
    wanted = (*batch, -(-rows // granularity), -(-size // _BLOCK))
    if tuple(scale.shape) != wanted:
        raise ValueError(
            f"{name} has shape {list(scale.shape)}: expected {list(wanted)} for codes {list(codes.shape)} with one "
            f"scale for {granularity} x {_BLOCK} elements"
        )
    if scale.device != codes.device:
        raise ValueError(f"{name} is on {scale.device}, its codes on {codes.device}")


def _check_counts(counts: torch.Tensor, name: str, size: int) -> None:
    if not isinstance(counts, torch.Tensor) or counts.dtype != torch.int32:
        came = counts.dtype if isinstance(counts, torch.Tensor) else type(counts).__name__
        raise TypeError(f"{name}: expected an int32 tensor, got {came}")
    if tuple(counts.shape) != (size,):
        raise ValueError(f"{name} has shape {list(counts.shape)}: expected [{size}]")


def _check_groups(m_indices: torch.Tensor, num_groups: int) -> None:
    """The rule of the contiguous layout, where the host can see it."""
    rows = m_indices.numel()
    if rows and (int(m_indices.min()) < -1 or int(m_indices.max()) >= num_groups):
        raise ValueError(
            f"m_indices holds values from {int(m_indices.min())} to {int(m_indices.max())}: expected groups 0 to "
            f"{num_groups - 1}, and -1 for padding"
        )
    padded = torch.nn.functional.pad(m_indices, (0, -rows % _GROUP_ALIGNMENT), value=-1)
    blocks = padded.view(-1, _GROUP_ALIGNMENT)
    is_wrong = ((blocks != blocks[:, :1]) & (blocks >= 0)).any(1).nonzero().flatten()
    if is_wrong.numel():
        first = int(is_wrong[0]) * _GROUP_ALIGNMENT
        raise ValueError(
            f"m_indices: rows {first} to {first + _GROUP_ALIGNMENT - 1} belong to more than one group, or padding "
            f"precedes a group. Start each group at a multiple of {_GROUP_ALIGNMENT} rows and pad its end with -1."
        )


def _on_device(counts: torch.Tensor, name: str, codes: torch.Tensor) -> torch.Tensor:
    if counts.is_cuda and counts.device != codes.device:
        raise ValueError(f"{name} is on {counts.device}, a on {codes.device}")
    return counts.to(codes.device).contiguous()


def _make_out(
    out: Optional[torch.Tensor],
    out_dtype: Optional[torch.dtype],
    shape: tuple[int, ...],
    codes: torch.Tensor,
) -> torch.Tensor:
    if out is None:
        dtype = torch.bfloat16 if out_dtype is None else out_dtype
        if dtype not in _OUT_DTYPES:
            raise TypeError(f"out_dtype={dtype}: expected bfloat16, float16 or float32")
        return torch.empty(shape, dtype=dtype, device=codes.device)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out: expected a torch.Tensor, got {type(out).__name__}")
    if out.dtype not in _OUT_DTYPES:
        raise TypeError(f"out has dtype {out.dtype}: expected bfloat16, float16 or float32")
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {list(out.shape)}, the product {list(shape)}")
    if out.device != codes.device:
        raise ValueError(f"out is on {out.device}, a on {codes.device}")
    if has_internal_overlap(tuple(out.shape), out.stride()):
        raise ValueError(
            f"out of shape {list(out.shape)} and strides {list(out.stride())} has elements that share memory"
        )
    return out


# --- what the engines read --------------------------------------------------------------------------------


def _num_sms(codes: torch.Tensor) -> Optional[int]:
    return current_sm_count(codes.get_device()) or None if codes.is_cuda else None


def _readable(x: _Operand) -> _Operand:
    """Codes with contiguous rows at aligned addresses; a packed copy if they have to be moved.

    `x.codes` has three dims.
    """
    return x._replace(codes=align_codes(x.codes)) if x.codes.is_cuda else x


def align_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[*batch, rows, K]`` whose rows are contiguous and start at multiples of 16 bytes; a copy if need be."""
    if is_aligned(codes):
        return codes
    *shape, size = codes.shape
    packed = torch.empty((*shape, round_up(size, _PITCH)), dtype=torch.uint8, device=codes.device)[
        ..., :size
    ]
    packed.copy_(codes.view(torch.uint8))
    return packed.view(codes.dtype)


def is_aligned(codes: torch.Tensor) -> bool:
    """Whether rows of codes ``[*batch, rows, K]`` are contiguous and start at multiples of 16 bytes."""
    steps = [step for size, step in zip(codes.shape[:-1], codes.stride()[:-1]) if size > 1]
    is_contiguous = codes.stride(-1) == 1 or codes.shape[-1] <= 1
    return is_contiguous and codes.data_ptr() % _PITCH == 0 and not any(s % _PITCH for s in steps)


def _describe_scales(x: _Operand) -> BlockScales:
    """`BlockScales` of scales ``[items, rows or blocks of rows, blocks]``."""
    return describe_scales(x.scale_inv, x.granularity)


def describe_scales(scale_inv: torch.Tensor, granularity: int) -> BlockScales:
    """`BlockScales` of scales ``[items, rows or blocks of rows, blocks]`` of any strides.

    The kernel counts rows from item to item, so that the step of an item is to be a number of rows: if it is not,
    the scales are copied.
    """
    num_items, num_rows, _ = scale_inv.shape
    item_stride, row_stride, block_stride = scale_inv.stride()
    if num_rows == 1:
        row_stride = max(item_stride, 1)
    if num_items == 1:
        item_stride = 0
    if row_stride == 0 or item_stride % row_stride:
        return describe_scales(scale_inv.contiguous(), granularity)
    rows_per_item = item_stride // row_stride * granularity
    return BlockScales(scale_inv, granularity, row_stride, block_stride, rows_per_item)


def _run(multiply, out: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:  # noqa: ANN001
    """Runs a product on the engine of its device, into `out` or through a copy of it."""
    emulation = current_emulation()
    engine = find_groupwise_engine(
        describe_device(codes.device),
        emulate=emulation.enabled,
        force_reference=emulation.force_reference,
    )
    if engine == "reference":
        from .reference import blockwise_product

        multiply(blockwise_product, out)
        return out
    if out.stride(-1) == 1 or out.shape[-1] == 1:
        multiply(blockwise_gemm, out)
        return out
    # The copy begins as `out` does, for what is accumulated or left as it is.
    target = out.contiguous()
    multiply(blockwise_gemm, target)
    return out.copy_(target)
