# SPDX-License-Identifier: Apache-2.0
"""`python -m transformer_engine_batched info`, and what importing the package does and does not do."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import transformer_engine_batched as teb
from transformer_engine_batched import __main__ as command_line
from transformer_engine_batched import support
from transformer_engine_batched.support import Device


def run_python(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    return done


def test_command_prints_versions_and_the_table():
    done = run_python("-m", "transformer_engine_batched", "info")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name in ("transformer_engine_batched", "Transformer Engine", "torch", "Python"):
        assert any(re.fullmatch(rf"{name} +\d+\.\d+\S*", line) for line in lines), name
    for name in ("cuBLASLt compiled against", "cuBLASLt loaded"):
        assert any(re.fullmatch(rf"{name} +\d+\.\d+\.\d+", line) for line in lines), name
    assert "cpu: CPU" in lines
    for fmt in support.FORMATS:
        assert any(line.strip().startswith(support.FORMAT_TITLES[fmt]) for line in lines)


def test_command_needs_a_command():
    done = run_python("-m", "transformer_engine_batched")
    assert done.returncode == 2 and "info" in done.stderr


@pytest.mark.parametrize(
    "version, text", [(130100, "13.1.0"), (120805, "12.8.5"), (131402, "13.14.2")]
)
def test_cublaslt_version(version, text):
    assert command_line.format_cublaslt_version(version) == text


def test_table_comes_from_support(monkeypatch, capsys):
    hopper = Device("Test GPU", (9, 0), 130100)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        command_line,
        "describe_device",
        lambda device: hopper if device.type == "cuda" else support.CPU,
    )
    command_line.print_info()
    text = capsys.readouterr().out
    assert "cuda:0: Test GPU, compute capability 9.0" in text
    table = text.partition("Test GPU")[2]
    for fmt in support.FORMATS:
        engine, remark = support.describe_support(fmt, hopper)
        expected = f"{engine}: {remark}" if remark else engine
        line = next(x for x in table.splitlines() if support.FORMAT_TITLES[fmt] in x)
        assert line.endswith(expected)


def test_import_touches_no_gpu_and_takes_no_memory():
    code = (
        "import torch\n"
        "def refuse(*_, **__): raise AssertionError('CUDA was initialised')\n"
        "torch.cuda._lazy_init = refuse\n"
        "torch._C._cuda_init = refuse\n"
        "import transformer_engine_batched\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_import_order_does_not_matter():
    # The package itself brings torch, whose libraries the extension links to.
    done = run_python("-c", "import transformer_engine_batched as teb; print(teb.__version__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == teb.__version__


def test_missing_extension_says_how_to_build_it():
    code = (
        "import sys\n"
        "sys.modules['transformer_engine_batched._C'] = None\n"
        "import transformer_engine_batched\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 1
    assert "C++ extension cannot be loaded" in done.stderr and "make build" in done.stderr


def test_a_te_that_has_the_function_already_is_left_alone():
    code = (
        "import torch\n"
        "from transformer_engine.pytorch import cpp_extensions\n"
        "cpp_extensions.batched_general_gemm = len\n"
        "try:\n"
        "    import transformer_engine_batched\n"
        "except ImportError as error:\n"
        "    assert 'exists already' in str(error), error\n"
        "assert cpp_extensions.batched_general_gemm is len\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_public_names():
    assert sorted(teb.__all__) == teb.__all__ or set(teb.__all__) == {*teb.__all__}
    for name in teb.__all__:
        assert hasattr(teb, name)
        if name != "__version__":
            assert getattr(teb, name).__doc__


@pytest.mark.parametrize("count", (0, -1, 1.5, "8", None))
def test_sm_limit_wants_a_positive_integer(count):
    with pytest.raises(ValueError, match=rf"limit_sms\(count={count!r}\): expected an integer"):
        with teb.limit_sms(count):
            pass


def test_sm_limit(monkeypatch):
    from transformer_engine_batched import plan

    monkeypatch.setattr(plan, "_num_sms", lambda index: 132)
    monkeypatch.delenv("NVTE_EXT_MARGIN_SM", raising=False)
    assert plan.current_sm_count(0) == 0
    with teb.limit_sms(100):
        assert plan.current_sm_count(0) == 100
        with teb.limit_sms(50):
            assert plan.current_sm_count(0) == 50
        with teb.limit_sms(500):
            assert plan.current_sm_count(0) == 0
        assert plan.current_sm_count(0) == 100
    for margin, expected in (("32", 100), ("0", 0), ("132", 0), ("1000", 0)):
        monkeypatch.setenv("NVTE_EXT_MARGIN_SM", margin)
        assert plan.current_sm_count(0) == expected
    with teb.limit_sms(64):
        assert plan.current_sm_count(0) == 64
