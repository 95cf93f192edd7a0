# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of block-scaled products on a CPU: its source, compiled as C++ with hopper_emulation.h.

What is emulated is tensor maps, barriers, copies, swizzles, the registers of tensor core products and warp shuffles; so
schedulers, descriptors, scales, edges and stores are those of the GPU. Three SMs, so that each CTA gets several tiles.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from accuracy import assert_accurate
from blockwise_cases import make_operand, poisoned_out

from transformer_engine_batched.kernels import blockwise_gemm, nvrtc
from transformer_engine_batched.kernels.blockwise_gemm import (
    TILES,
    Tile,
    multiply_blockwise,
    multiply_blockwise_k_grouped,
)

_RUN = """
extern "C" void run(const void* bytes, int num_ctas) {
  Params params;
  std::memcpy(&params, bytes, sizeof(params));
  run_emulated<const Params>(multiply_blockwise, params, num_ctas, kThreads);
}
"""


class EmulatedKernel:
    """Stands for `nvrtc.Kernel`."""

    def __init__(self, folder, definitions):
        self._folder = folder
        self._options = [f"-D{name}={value}" for name, value in definitions]

    def launch(self, num_ctas, parameters, device_index):
        assert device_index == -1
        name = hashlib.sha256(repr(self._options).encode()).hexdigest()[:16]
        library = self._folder / f"{name}.so"
        if not library.exists():
            source = self._folder / f"{name}.cpp"
            source.write_text(nvrtc._read_source("blockwise_gemm.cu") + _RUN)
            options = "-std=c++20 -O1 -shared -fPIC -pthread -w -Wno-psabi".split()
            compiler = os.environ.get("CXX", "c++")
            command = [compiler, *options, *self._options, "-o", str(library), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
        ctypes.CDLL(str(library)).run(parameters, num_ctas)


def encode_tensor_map(address, sizes, strides, box):
    """As hopper_emulation.h reads it."""
    assert address % 16 == 0 and all(stride % 16 == 0 for stride in strides)
    return struct.pack("<9Q56x", address, *sizes, *strides, *box)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    header = Path(__file__).with_name("hopper_emulation.h").read_text(encoding="utf-8")
    (folder / "hopper.cuh").write_text(header, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def emulation(folder, monkeypatch):
    monkeypatch.setattr(blockwise_gemm, "_get_kernel", lambda x, *_: EmulatedKernel(folder, x))
    monkeypatch.setattr(blockwise_gemm, "_check_device", lambda *tensors: None)
    monkeypatch.setattr(blockwise_gemm, "_num_sms", lambda device_index: 3)
    monkeypatch.setattr(blockwise_gemm, "encode_tensor_map", encode_tensor_map)
    blockwise_gemm.prepare_launch.cache_clear()
    yield
    blockwise_gemm.prepare_launch.cache_clear()


def make_sides(
    num_items,
    m,
    n,
    k,
    granularities=(1, 128),
    layouts=("flat", "item"),
    fp8=("e4m3", "e4m3"),
):
    return [
        make_operand(num_items, rows, k, granularities[i], layouts[i], i + 1, fp8=fp8[i])
        for i, rows in enumerate((m, n))
    ]


def multiply(sides, out, **options):
    a, b = sides
    multiply_blockwise(a.codes, b.codes, a.scales, b.scales, out, **options)


def exact_product(sides):
    return sides[0].exact @ sides[1].exact.mT


@pytest.mark.parametrize(
    "tile, granularities",
    [
        (TILES[0], (1, 128)),
        (TILES[0], (128, 1)),
        (TILES[1], (128, 128)),
        (TILES[1], (1, 1)),
        (TILES[2], (1, 128)),
        (TILES[2], (1, 1)),
        (TILES[3], (1, 1)),
        (TILES[4], (1, 128)),
        (TILES[5], (1, 128)),
        (TILES[5], (1, 1)),
    ],
)
def test_tiles(tile, granularities):
    sides = make_sides(2, 200, 264, 300, granularities)
    out = poisoned_out((2, 200, 264), torch.bfloat16)
    multiply(sides, out, tile=tile)
    assert_accurate(out, exact_product(sides))


def test_more_k_blocks_than_stages():
    sides = make_sides(1, 200, 136, 1300, (1, 1), ("item", "flat"))
    out = poisoned_out((1, 200, 136), torch.float32)
    multiply(sides, out, tile=TILES[1])
    assert_accurate(out, exact_product(sides), 120.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_unaligned_rows_and_formats(dtype):
    fp8 = ("e5m2", "e4m3") if dtype == torch.float32 else ("e4m3", "e5m2")
    sides = make_sides(2, 70, 203, 96, fp8=fp8)
    out = poisoned_out((2, 70, 203), dtype, row_padding=3)
    multiply(sides, out)
    assert_accurate(out, exact_product(sides), 66.0)


def test_blocks_of_scales_across_items():
    sides = make_sides(3, 70, 200, 128, (128, 128), ("flat", "flat"))
    out = poisoned_out((3, 70, 200), torch.bfloat16)
    multiply(sides, out, tile=TILES[1])
    assert_accurate(out, exact_product(sides))


def test_one_matrix_for_all_items():
    a = make_operand(3, 70, 128, 1, "flat", 1)
    b = make_operand(1, 136, 128, 128, "shared", 2)
    out = poisoned_out((3, 70, 136), torch.bfloat16)
    multiply_blockwise(a.codes, b.codes.expand(3, -1, -1), a.scales, b.scales, out)
    assert_accurate(out, a.exact @ b.exact.mT)


@pytest.mark.parametrize("tile", [TILES[0], TILES[3], TILES[5]])
def test_masked(tile):
    rows = [200, 0, 1, 129, 1000, -5] + [0] * 30 + [3, 0]
    sides = make_sides(len(rows), 200, 136, 128)
    out = poisoned_out((len(rows), 200, 136), torch.bfloat16)
    multiply(sides, out, masked_m=torch.tensor(rows, dtype=torch.int32), tile=tile)
    exact = exact_product(sides)
    for item, count in enumerate(max(0, min(x, 200)) for x in rows):
        assert_accurate(out[item : item + 1, :count], exact[item : item + 1, :count])
        assert out[item, count:].isnan().all()


def test_contiguous():
    groups = torch.tensor([0] * 128 + [2] * 70 + [-1] * 58 + [1] * 128 + [-1] * 128)
    groups = groups.to(torch.int32)
    a, b = make_operand(1, len(groups), 256, 1, "item", 1), make_operand(3, 136, 256, 1, "flat", 2)
    out = poisoned_out((len(groups), 136), torch.bfloat16)
    multiply_blockwise(a.codes[0], b.codes, a.scales, b.scales, out, m_indices=groups)
    is_used = groups >= 0
    exact = torch.einsum("mk,mnk->mn", a.exact[0, is_used], b.exact[groups[is_used].long()])
    assert_accurate(out[is_used][None], exact[None])
    assert out[~is_used].isnan().all()


@pytest.mark.parametrize("accumulate", [False, True])
def test_k_grouped(accumulate):
    sizes = [256, 0, 128] + [0] * 30 + [128, 0, 128]
    a, b = make_sides(1, 40, 72, sum(sizes), (1, 1), ("flat", "flat"))
    before = 3000.0 if accumulate else 0.0
    out = poisoned_out((36, 40, 72), torch.float32, fill=before if accumulate else None)
    group_sizes = torch.tensor(sizes, dtype=torch.int32)
    multiply_blockwise_k_grouped(
        a.codes[0],
        b.codes[0],
        a.scales,
        b.scales,
        out,
        group_sizes,
        accumulate=accumulate,
        tile=Tile(64, 128, 2),
    )
    parts = zip(a.exact[0].split(sizes, 1), b.exact[0].split(sizes, 1))
    assert_accurate(out, before + torch.stack([x @ y.T for x, y in parts]), 120.0)
