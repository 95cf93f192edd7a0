# SPDX-License-Identifier: Apache-2.0
"""What users of FlashInfer and DeepGEMM write, for this package: their examples with the import changed.

Sources: https://docs.flashinfer.ai/generated/flashinfer.gemm.batch_deepgemm_fp8_nt_groupwise.html, and the tutorial
"DeepGEMM Essentials" (https://dev.to, Vuk Rosic). Used by the tests of both devices.
"""

from __future__ import annotations

import torch
from accuracy import sqnr_per_item

import transformer_engine_batched as teb

# Line for line; only the module names in the two imports are this package's.
FLASHINFER = """
import torch
from transformer_engine_batched import batched_gemm_fp8_nt_groupwise as batch_deepgemm_fp8_nt_groupwise
from transformer_engine_batched import per_token_cast_to_fp8, per_block_cast_to_fp8

# Setup: 2 groups, 128 tokens per group, 4096 hidden size, 2048 expert size
m, n, k = 128, 2048, 4096
group_size = 2

# Create float32 inputs
a = torch.rand((group_size, m, k), device="cuda", dtype=torch.float32)
b = torch.rand((group_size, n, k), device="cuda", dtype=torch.float32)
masked_m = torch.randint(0, m, (group_size,), device="cuda", dtype=torch.int32)
a_fp8 = torch.empty_like(a, device="cuda", dtype=torch.float8_e4m3fn)
a_scale = torch.empty((group_size, m, k // 128), device="cuda", dtype=torch.float32)
b_fp8 = torch.empty_like(b, device="cuda", dtype=torch.float8_e4m3fn)
b_scale = torch.empty(
    (group_size, n // 128, k // 128), device="cuda", dtype=torch.float32
)
for i in range(group_size):
    a_fp8[i], a_scale[i] = per_token_cast_to_fp8(a[i])
    b_fp8[i], b_scale[i] = per_block_cast_to_fp8(b[i])

expected_m = min(int(masked_m.float().mean()) + 1, m)

# Perform batch GEMM
result = batch_deepgemm_fp8_nt_groupwise(
    a_fp8, b_fp8, a_scale, b_scale, masked_m, expected_m, out_dtype=torch.bfloat16
)
print(result.shape)  # torch.Size([2, 128, 2048])
"""

# Of the rows that are computed, against the inputs in FP64. The tutorial's data is normal.
END_TO_END_DB = 28.0


def run_flashinfer_example(device: str) -> dict:
    """The names that the example leaves behind; its result is checked."""
    names: dict = {}
    exec(FLASHINFER.replace('"cuda"', f'"{device}"'), names)  # pylint: disable=exec-used
    assert names["result"].shape == (2, 128, 2048) and names["result"].dtype == torch.bfloat16
    expected = names["a"].double() @ names["b"].double().mT
    for item, count in enumerate(names["masked_m"].tolist()):
        made = names["result"][item, :count]
        if count:
            # The data is not centred, so the signal is large; its rounding errors are those of normal data.
            assert sqnr_per_item(made[None], expected[item, None, :count]).min() > 40.0
    return names


def cast_to_fp8_per_token(x: torch.Tensor):
    """The tutorial's part 3."""
    assert x.dim() == 2
    m, n = x.shape
    pad_size = (128 - (n % 128)) % 128
    if pad_size > 0:
        x = torch.nn.functional.pad(x, (0, pad_size), value=0)
    x_view = x.view(m, -1, 128)
    x_amax = x_view.abs().float().amax(dim=2).clamp(1e-4)
    fp8_data = (x_view * (448.0 / x_amax.unsqueeze(2))).to(torch.float8_e4m3fn)
    scale_factors = x_amax / 448.0
    return fp8_data.view(m, -1)[:, :n], scale_factors


def cast_to_fp8_per_block(x: torch.Tensor):
    """The tutorial's part 4."""
    m, n = x.shape
    padded_m = ((m + 127) // 128) * 128
    padded_n = ((n + 127) // 128) * 128
    x_padded = torch.zeros((padded_m, padded_n), dtype=x.dtype, device=x.device)
    x_padded[:m, :n] = x
    x_view = x_padded.view(-1, 128, x_padded.size(1) // 128, 128)
    x_amax = x_view.abs().float().amax(dim=(1, 3), keepdim=True).clamp(1e-4)
    x_scaled = (x_view * (448.0 / x_amax)).to(torch.float8_e4m3fn)
    scale_factors = (x_amax / 448.0).view(x_view.size(0), x_view.size(2))
    return x_scaled.view_as(x_padded)[:m, :n], scale_factors


def assert_casts_agree(device: str) -> None:
    """The tutorial's casts and ours: scales within rounding, numbers within a step of FP8."""
    generator = torch.Generator().manual_seed(11)
    for shape in ((128, 512), (256, 712), (200, 256)):
        x = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        x[:, :128] = 0.0
        for mine, theirs, rows in (
            (teb.per_token_cast_to_fp8, cast_to_fp8_per_token, 1),
            (teb.per_block_cast_to_fp8, cast_to_fp8_per_block, 128),
        ):
            values, scale_inv = mine(x)
            their_values, their_scale_inv = theirs(x)
            assert values.shape == their_values.shape and values.dtype == their_values.dtype
            torch.testing.assert_close(scale_inv, their_scale_inv, rtol=1e-6, atol=0)
            factors = scale_inv.repeat_interleave(128, 1).repeat_interleave(rows, 0)
            factors = factors[: x.shape[0], : x.shape[1]]
            difference = (values.float() - their_values.float()).abs()
            # The tutorial's factor is rounded twice (torch divides a number by a tensor as a product with the
            # reciprocal), which moves ties of BF16 numbers to the neighbouring code.
            assert bool((difference <= their_values.float().abs() / 8).all())
            assert (difference > 0).float().mean() < 5e-3
            error = (values.float() * factors - x.float()).norm() / x.float().norm()
            assert error < 0.04


def run_first_gemm(device: str) -> None:
    """Parts 1 to 6: one product of `[128, 512]` and `[256, 512]`; a single matrix is a batch of one."""
    m, n, k = 128, 256, 512
    lhs = torch.randn((m, k), device=device, dtype=torch.bfloat16)
    rhs = torch.randn((n, k), device=device, dtype=torch.bfloat16)
    output = torch.full((m, n), torch.nan, device=device, dtype=torch.bfloat16)
    lhs_fp8, lhs_scales = teb.per_token_cast_to_fp8(lhs, scale_layout="m_major")
    rhs_fp8, rhs_scales = teb.per_block_cast_to_fp8(rhs)
    all_rows = torch.tensor([m], device=device, dtype=torch.int32)
    teb.batched_gemm_fp8_nt_groupwise(
        lhs_fp8[None],
        rhs_fp8[None],
        lhs_scales[None],
        rhs_scales[None],
        all_rows,
        m,
        out=output[None],
    )
    expected = lhs.double() @ rhs.double().t()
    assert sqnr_per_item(output[None], expected[None]).min() >= END_TO_END_DB
    # The tutorial's own scales do as well.
    lhs_fp8, lhs_scales = cast_to_fp8_per_token(lhs)
    rhs_fp8, rhs_scales = cast_to_fp8_per_block(rhs)
    again = teb.batched_gemm_fp8_nt_groupwise(
        lhs_fp8[None], rhs_fp8[None], lhs_scales[None], rhs_scales[None], all_rows, m
    )
    assert sqnr_per_item(again, expected[None]).min() >= END_TO_END_DB


def run_grouped_gemm(device: str) -> None:
    """Parts 8 to 11: four experts of 128, 96, 112 and 144 tokens in one matrix."""
    n, k = 256, 512
    num_experts = 4
    tokens_per_expert = [128, 96, 112, 144]
    alignment = teb.get_m_alignment_for_contiguous_layout()
    aligned_tokens = [((t + alignment - 1) // alignment) * alignment for t in tokens_per_expert]
    total_aligned = sum(aligned_tokens)
    lhs_grouped = torch.randn((total_aligned, k), device=device, dtype=torch.bfloat16)
    rhs_grouped = torch.randn((num_experts, n, k), device=device, dtype=torch.bfloat16)
    output_grouped = torch.full((total_aligned, n), torch.nan, device=device, dtype=torch.bfloat16)
    m_indices = torch.empty(total_aligned, device=device, dtype=torch.int32)
    start = 0
    for expert_id, (tokens, aligned) in enumerate(zip(tokens_per_expert, aligned_tokens)):
        m_indices[start : start + tokens] = expert_id
        m_indices[start + tokens : start + aligned] = -1
        start += aligned
    lhs_fp8, lhs_scales = teb.per_token_cast_to_fp8(lhs_grouped, scale_layout="m_major")
    rhs_fp8, rhs_scales = teb.per_block_cast_to_fp8(rhs_grouped)
    teb.grouped_gemm_fp8_nt_contiguous(
        lhs_fp8, rhs_fp8, lhs_scales, rhs_scales, m_indices, out=output_grouped
    )
    valid_mask = m_indices != -1
    start = 0
    for expert_id, (tokens, aligned) in enumerate(zip(tokens_per_expert, aligned_tokens)):
        rows = slice(start, start + tokens)
        expected = lhs_grouped[rows].double() @ rhs_grouped[expert_id].double().t()
        assert sqnr_per_item(output_grouped[None, rows], expected[None]).min() >= END_TO_END_DB
        start += aligned
    assert bool(output_grouped[~valid_mask].isnan().all())


def run_weight_gradient(device: str) -> None:
    """Parts 12 and 13: ``weight_grad += grad_output.T @ activations`` in FP32."""
    m_grad, k_grad, n_grad = 256, 1024, 512
    activations = torch.randn((m_grad, k_grad), device=device, dtype=torch.bfloat16)
    grad_output = torch.randn((m_grad, n_grad), device=device, dtype=torch.bfloat16)
    weight_grad = torch.randn((n_grad, k_grad), device=device, dtype=torch.float) * 0.1
    original_grad = weight_grad.clone()
    _, (act_fp8, act_scales) = teb.per_token_cast_to_fp8(activations, with_transpose=True)
    _, (grad_fp8, grad_scales) = teb.per_token_cast_to_fp8(grad_output, with_transpose=True)
    teb.grouped_gemm_fp8_k_grouped(
        grad_fp8, act_fp8, grad_scales, act_scales, [m_grad], weight_grad[None]
    )
    expected = original_grad.double() + grad_output.double().t() @ activations.double()
    assert sqnr_per_item(weight_grad[None], expected[None]).min() >= END_TO_END_DB
