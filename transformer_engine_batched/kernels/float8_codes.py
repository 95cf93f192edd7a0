# SPDX-License-Identifier: Apache-2.0
"""FP8 codes and their scale in Triton: what all kernels that quantize have in common.

The arithmetic is that of TE 2.20.2's kernels, whose rules are written down in `reference/quantizers.py`. Must not import
Transformer Engine or a sibling package of `kernels`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("e4m3", "e5m2")
# What may be on the CPU: there Triton runs only where TRITON_INTERPRET was set before its import.
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def raise_amax(amax_ptr, known_amax, amax):
    """``*amax_ptr = max(*amax_ptr, amax)`` on the bits, as TE's atomicMaxFloat.

    They order floats that are not negative, and a NaN that is there is larger than all. `known_amax`
    was read when the program began; it spares most programs the queue for one address.
    """
    # From zero, because the maximum of nothing but NaN is NaN.
    bits = tl.maximum(amax, 0.0).to(tl.int32, bitcast=True)
    is_larger = bits > known_amax.to(tl.int32, bitcast=True)
    tl.atomic_max(amax_ptr.to(tl.pointer_type(tl.int32)), bits, mask=is_larger, sem="relaxed")


@triton.jit
def load_amax(amaxes_ptr, NUM_PARTIALS: tl.constexpr, WAITS: tl.constexpr):
    """The largest of the amaxes that the kernel of `tensor_amax` left.

    With `WAITS`, that kernel may still run until here: see `BoundLaunch`.
    """
    if WAITS:
        gdc_wait()
    if NUM_PARTIALS == 1:
        return tl.load(amaxes_ptr)
    parts = tl.arange(0, triton.next_power_of_2(NUM_PARTIALS))
    return tl.max(tl.load(amaxes_ptr + parts, mask=parts < NUM_PARTIALS, other=0.0))


@triton.jit
def compute_scale(amax, amax_epsilon, FP8_MAX: tl.constexpr, POWER_OF_2: tl.constexpr):
    """`reference.quantizers.scale_from_amax`, operation by operation."""
    amax = tl.where(amax < amax_epsilon, amax_epsilon, amax)
    scale = tl.div_rn(tl.full((), FP8_MAX, tl.float32), amax)
    scale = tl.where(scale == float("inf"), 3.4028234663852886e38, scale)
    if POWER_OF_2:
        scale = (scale.to(tl.int32, bitcast=True) & -8388608).to(tl.float32, bitcast=True)
    is_usable = (amax > 0.0) & (amax < float("inf"))
    return tl.where(is_usable, scale, 1.0)


@triton.jit
def encode(values, scale, E5M2: tl.constexpr):
    """FP8 codes as bytes: `cvt.rn.satfinite` on the device."""
    if E5M2:
        return (values * scale).to(tl.float8e5).to(tl.uint8, bitcast=True)
    return (values * scale).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
