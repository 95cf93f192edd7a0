# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the triangle's operands on a CPU: its source, compiled as C++ with hopper_emulation.h.

Tensor maps, barriers, copies, swizzles, the registers of tensor core products and shuffles are emulated, so that the
order of positions, the norm in place, edges, codes and stores are those of the GPU. Three SMs, so that each CTA gets
several tiles.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from sass import assert_one_thread_copies
from triangle_kernel_cases import (
    CODE_DB,
    VALUE_DB,
    Case,
    assert_near,
    cut_padding,
    decode,
    find_expected,
    make_data,
)

from transformer_engine_batched.kernels import (
    memory,
    nvrtc,
    triangle_project,
    triangle_tiles,
    turn_codes,
)
from transformer_engine_batched.kernels.triangle_project import (
    check_operands,
    find_operand_amaxes,
    find_reason_against,
    project_operands,
)
from transformer_engine_batched.kernels.triangle_tiles import GatedProjection, Norm

BF16 = torch.bfloat16
SMALL = Case(1, 17, 64, 64, BF16)

_RUN = """
extern "C" void run(const void* bytes, int num_ctas) {
  Params params;
  std::memcpy(&params, bytes, sizeof(params));
  run_emulated<const Params>(ENTRY, params, num_ctas, kThreads);
}
"""


class EmulatedKernel:
    """Stands for `nvrtc.Kernel`."""

    def __init__(
        self,
        folder,
        definitions,
        num_bytes,
        file_name="triangle_project.cu",
        entry="project_operands",
    ):
        self._folder = folder
        self._file_name = file_name
        definitions = (*definitions, ("ENTRY", entry))
        self._options = [f"-D{name}={value}" for name, value in definitions]
        assert num_bytes <= 232448

    def launch(self, num_ctas, parameters, device_index):
        assert device_index == -1
        name = hashlib.sha256(repr(self._options).encode()).hexdigest()[:16]
        library = self._folder / f"{name}.so"
        if not library.exists():
            source = self._folder / f"{name}.cpp"
            source.write_text(nvrtc._read_source(self._file_name) + _RUN)
            options = "-std=c++20 -O2 -shared -fPIC -pthread -w -Wno-psabi".split()
            compiler = os.environ.get("CXX", "c++")
            command = [compiler, *options, *self._options, "-o", str(library), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
        ctypes.CDLL(str(library)).run(parameters, num_ctas)


def encode_tensor_map(address, sizes, strides, box):
    """As hopper_emulation.h reads it."""
    assert address % 16 == 0 and all(stride % 16 == 0 for stride in strides)
    words = (address, *sizes, *strides, *box)
    return struct.pack("<16Q", *words, *(0,) * (16 - len(words)))


def empty_strided(shape, strides, dtype, device_index):
    """Refuses what torch's allocation on a GPU refuses, `torch.Size` too."""
    assert type(shape) is type(strides) is tuple and all(type(n) is int for n in shape + strides)
    return memory.empty_strided(shape, strides, dtype, device_index)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The headers of the kernels; that of the GPU's instructions is the emulation's."""
    folder = tmp_path_factory.mktemp("emulated")
    for header in Path(nvrtc.__file__).parent.glob("*.cuh"):
        shutil.copy(header, folder)
    shutil.copy(Path(__file__).with_name("hopper_emulation.h"), folder / "hopper.cuh")
    return folder


@pytest.fixture(autouse=True)
def emulation(folder, monkeypatch):
    """The kernel on the CPU; new outputs hold NaN or 0xFF, so that what is not written shows."""
    monkeypatch.setattr(
        triangle_project, "_get_kernel", lambda *arguments: EmulatedKernel(folder, *arguments)
    )
    monkeypatch.setattr(triangle_project, "encode_tensor_map", encode_tensor_map)
    for module in (triangle_project, turn_codes):
        monkeypatch.setattr(module, "empty_strided", empty_strided)
    monkeypatch.setattr(triangle_tiles, "IS_INTERPRETED", True)
    monkeypatch.setattr(triangle_tiles, "num_multiprocessors", lambda device_index: 3)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def inputs(data):
    return data.z, data.norm_in, data.projection, data.mask


@pytest.mark.parametrize("mode", ("outgoing", "incoming"))
@pytest.mark.parametrize(
    "case",
    (
        SMALL,
        Case(2, 72, 64, 64, BF16, has_bias=False, mask="bool"),
        Case(1, 32, 128, 128, BF16, has_bias=False),
        Case(2, 17, 128, 64, BF16, mask=None),
        Case(1, 128, 64, 64, BF16, has_bias=False, mask=None),
    ),
)
def test_codes(case, mode):
    data = make_data(case)
    expected = find_expected(data)
    scales, amaxes = torch.tensor([20.0, 30.0]), torch.tensor([0.0, 1e4])
    result = project_operands(
        *inputs(data), mode=mode, fp8_dtype="e4m3", scales=scales, amaxes=amaxes
    )
    assert torch.equal(result.scale_invs, 1 / scales)
    assert result.scale_invs.stride() == (4,)  # 16 bytes, for cuBLASLt
    for index, wanted in enumerate(expected[:2]):
        wanted = wanted if mode == "outgoing" else wanted.mT
        decoded = decode(cut_padding(result[index], case.n), "e4m3", result.scale_invs[index])
        assert_near(decoded, wanted, CODE_DB["e4m3"], mode)
    torch.testing.assert_close(amaxes[0].double(), expected.a.abs().max(), rtol=0.02, atol=0)
    assert amaxes[1] == 1e4


@pytest.mark.parametrize("mode", ("outgoing", "incoming"))
@pytest.mark.parametrize(
    "case", (SMALL, Case(2, 40, 64, 128, BF16, mask="bool"), Case(1, 32, 128, 128, BF16, mask=None))
)
def test_values(case, mode):
    data = make_data(case)
    expected = find_expected(data)
    amaxes = torch.zeros(2)
    result = project_operands(*inputs(data), mode=mode, amaxes=amaxes)
    assert result.scale_invs is None
    for index, wanted in enumerate(expected[:2]):
        wanted = wanted if mode == "outgoing" else wanted.mT
        assert_near(cut_padding(result[index], case.n), wanted, VALUE_DB[BF16], mode)
    assert torch.equal(amaxes, find_operand_amaxes(*inputs(data)))


@pytest.mark.parametrize("fp8_dtype", ("e4m3", "e5m2"))
@pytest.mark.parametrize("is_power_of_2", (False, True))
def test_current_scaling(fp8_dtype, is_power_of_2):
    data = make_data(SMALL)
    expected = find_expected(data)
    amaxes = find_operand_amaxes(*inputs(data))
    before = amaxes.clone()
    result = project_operands(
        *inputs(data), mode="outgoing", fp8_dtype=fp8_dtype, amaxes=amaxes,
        force_pow_2_scales=is_power_of_2,
    )  # fmt: skip
    assert torch.equal(amaxes, before)
    scales = {"e4m3": 448.0, "e5m2": 57344.0}[fp8_dtype] / amaxes
    if is_power_of_2:
        scales = scales.log2().floor().exp2()
    assert torch.equal(result.scale_invs, 1 / scales)
    for index, wanted in enumerate(expected[:2]):
        decoded = decode(cut_padding(result[index], 17), fp8_dtype, result.scale_invs[index])
        assert_near(decoded, wanted, CODE_DB[fp8_dtype], fp8_dtype)


def test_not_finite():
    data = make_data(SMALL._replace(mask=None))
    data.z[0, 3, 5, 7] = float("nan")
    data.projection.bias_p[2] = float("inf")
    amaxes = torch.zeros(2)
    result = project_operands(
        *inputs(data), mode="outgoing", fp8_dtype="e4m3", scales=torch.ones(2), amaxes=amaxes
    )
    for codes in (result.a, result.b):
        assert (codes[0, :, 3, 5] == 0x7F).all()
        assert ((codes & 0x7F) == 0x7F).sum() == codes.shape[1]
        cut_padding(codes, 17)
    assert (cut_padding(result.a, 17)[0, 2].flatten()[:50] == 0x7E).all()  # the largest
    assert amaxes[0] == float("inf") and 0 < amaxes[1] < float("inf")


def test_empty():
    data = make_data(SMALL)
    result = project_operands(
        data.z[:0], *inputs(data)[1:3], None, mode="outgoing", fp8_dtype="e4m3",
        scales=torch.tensor([2.0, 4.0]),
    )  # fmt: skip
    assert result.a.shape == (0, 64, 32, 32)
    assert result.scale_invs.tolist() == [0.5, 0.25]


class TestRefusals:
    """Reasons and error texts."""

    @pytest.mark.parametrize(
        "case, match",
        [
            (Case(1, 4, 64, 64), "z must be BF16 and came as torch.float32"),
            (Case(1, 4, 64, 64, BF16, torch.float16), "weights must be BF16 .* torch.float16"),
            (Case(1, 4, 96, 64, BF16), "D must be 64 or 128 .* came as 96 and 64"),
            (Case(1, 4, 64, 48, BF16), "H a multiple of 64; they came as 64 and 48"),
            (Case(1, 4, 128, 192, BF16), "weights of D = 128, H = 192 do not fit"),
        ],
    )
    def test_sizes(self, case, match):
        data = make_data(case)
        with pytest.raises(ValueError, match=match):
            check_operands(*inputs(data))

    def test_parameters(self):
        data = make_data(SMALL)
        z, norm, projection, mask = inputs(data)
        assert find_reason_against(z, norm, projection, mask) is None
        half = Norm(norm.weight.half(), None)
        assert "norm.weight must be FP32 or BF16" in find_reason_against(z, half, projection, mask)
        biased = GatedProjection(*projection[:3], projection.bias_g.half())
        assert "projection.bias_g must be FP32 or BF16" in find_reason_against(
            z, norm, biased, mask
        )
        assert "mask must be FP32, BF16" in find_reason_against(z, norm, projection, mask.half())
        shifted = torch.zeros(z.numel() + 1, dtype=BF16)[1:].view(z.shape)
        assert "z must begin at a multiple" in find_reason_against(shifted, norm, projection, mask)

    @pytest.mark.parametrize(
        "changes, match",
        [
            ({"mode": "sideways"}, "`mode` must be .* came as 'sideways'"),
            ({"fp8_dtype": "e3m4"}, "`fp8_dtype` must be .* came as 'e3m4'"),
            ({"fp8_dtype": "e4m3"}, "FP8 operands need `scales`, or `amaxes`"),
            ({"scales": torch.ones(2)}, "`scales` came without fp8_dtype"),
            ({"turned": True}, "turned ones with FP8 only"),
        ],
    )
    def test_options(self, changes, match):
        with pytest.raises(ValueError, match=match):
            project_operands(*inputs(make_data(SMALL)), **({"mode": "outgoing"} | changes))

    def test_shapes(self):
        data = make_data(SMALL)
        check_operands(*inputs(data))
        with pytest.raises(ValueError, match=r"`mask` must be \[1, 17, 17\]"):
            check_operands(*inputs(data._replace(mask=torch.ones(1, 4, 5))))


@pytest.mark.parametrize("out_type", ("NONE", "E4M3", "E5M2", "BF16"))
def test_compiles(out_type, tmp_path):
    """For the GPU, too."""
    definitions = {"OUT_TYPE": out_type, "IS_EVEN": int(out_type != "BF16"), "HAS_BIAS": 1}
    cubin = nvrtc.compile_cubin(nvrtc._read_source("triangle_project.cu"), definitions)
    assert_one_thread_copies(cubin, tmp_path, num_elections=1)
