# SPDX-License-Identifier: Apache-2.0
"""Build and set-up: one version, working Makefile targets, and a set-up that resumes where it stopped.

Input: the build files of this source tree. Installs nothing and reaches no network. Must not need a
GPU.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "tools" / "bootstrap.py").is_file():
    pytest.skip("the build files come with a checkout only", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tools"))

import bootstrap  # noqa: E402
import build_extension  # noqa: E402
import setup_steps  # noqa: E402
from setup_steps import SetupError, Step  # noqa: E402

# One version


def test_version_is_the_same_everywhere(tmp_path):
    import transformer_engine_batched as teb
    from transformer_engine_batched import _version

    assert teb.__version__ == _version.__version__
    # CMake reads it with the lines that stand in CMakeLists.txt.
    lines = (ROOT / "CMakeLists.txt").read_text().splitlines()
    script = [line for line in lines if "TEB_VERSION" in line and "project(" not in line]
    script.append('message(STATUS "version=${TEB_VERSION}")')
    (tmp_path / "version.cmake").write_text(
        "\n".join(script).replace(
            "transformer_engine_batched/", f"{ROOT}/transformer_engine_batched/"
        )
    )
    answer = subprocess.run(
        [build_extension.find_cmake(), "-P", str(tmp_path / "version.cmake")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"version={_version.__version__}\n" in answer.stdout + answer.stderr
    assert (
        "transformer_engine_batched._version.__version__" in (ROOT / "pyproject.toml").read_text()
    )


def test_pinned_versions_satisfy_the_package():
    from packaging.requirements import Requirement

    dependencies = bootstrap.read_requirements(
        (ROOT / "pyproject.toml").read_text(), "dependencies"
    )
    ranges = {Requirement(text).name: Requirement(text).specifier for text in dependencies}
    assert bootstrap.TORCH_VERSION in ranges["torch"]
    assert bootstrap.TE_VERSION in ranges["transformer_engine"]


def test_every_folder_of_the_package_is_packaged():
    from setuptools import find_packages

    packages = set(find_packages(str(ROOT), include=["transformer_engine_batched*"]))
    modules = (ROOT / "transformer_engine_batched").rglob("*.py")
    assert packages == {".".join(path.parent.relative_to(ROOT).parts) for path in modules}


def test_every_source_that_is_compiled_at_run_time_is_packaged():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / "transformer_engine_batched"
    patterns = settings["package-data"]["transformer_engine_batched"]
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    assert packaged == {path for path in package.rglob("*.cu*") if path.suffix in (".cu", ".cuh")}
    assert packaged


# Makefile


def dry_run(*arguments: str) -> str:
    """What make would run."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    # The make that runs the tests must not hand its variables down.
    environment = {name: value for name, value in environment.items() if "MAKE" not in name}
    return subprocess.run(
        ["make", "-n", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    "target, program",
    [
        ("demo", "examples/demo.py"),
        ("test", "-m pytest tests --ignore=tests/gpu"),
        ("gpu-test", "-m pytest tests/gpu"),
        ("gpu-bench", "benchmarks/run.py"),
        ("lint", "-m black --check"),
        ("build", "tools/bootstrap.py"),
    ],
)
def test_target_sets_up_and_runs(target, program):
    commands = dry_run(target)
    assert commands.index("tools/bootstrap.py") <= commands.index(program)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["gpu-test", "gpu-bench", "build", "lint"])
def test_target_uses_a_given_python_as_it_is(target):
    commands = dry_run(target, "PYTHON=python3")
    assert "bootstrap" not in commands and ".venv" not in commands
    assert "PYTHONPATH=" in commands and " python3 " in commands


# What is still to do


class Recorder:
    """Three steps, of which the last builds upon the first; they note what ran."""

    def __init__(self, version: str = "1"):
        self.ran: list[str] = []
        self.damaged = ""
        self.fails = ""
        base = self.step("base", version)
        self.steps = [base, self.step("other", "1"), self.step("top", "1", needs=(base,))]

    def step(self, name: str, inputs: str, needs: tuple = ()) -> Step:
        def action() -> None:
            if name == self.fails:
                raise SetupError("planted")
            self.ran.append(name)

        return Step(name, f"the step {name}", inputs, action, needs, lambda: name != self.damaged)

    def run(self, folder: Path) -> list[str]:
        setup_steps.run_steps(self.steps, str(folder), say=lambda line: None)
        return self.ran


def test_finished_steps_are_not_repeated(tmp_path):
    assert Recorder().run(tmp_path) == ["base", "other", "top"]
    assert Recorder().run(tmp_path) == []


def test_setup_resumes_at_the_step_that_failed(tmp_path):
    first = Recorder()
    first.fails = "other"
    with pytest.raises(SetupError, match="planted"):
        first.run(tmp_path)
    assert first.ran == ["base"]
    assert Recorder().run(tmp_path) == ["other", "top"]


def test_changed_input_redoes_the_step_and_what_builds_upon_it(tmp_path):
    Recorder("1").run(tmp_path)
    assert Recorder("2").run(tmp_path) == ["base", "top"]


def test_failed_redo_leaves_no_stamp_of_the_earlier_result(tmp_path):
    Recorder("1").run(tmp_path)
    broken = Recorder("2")
    broken.fails = "base"
    with pytest.raises(SetupError):
        broken.run(tmp_path)
    assert Recorder("1").run(tmp_path) == ["base", "top"]


def test_lost_result_is_made_again_with_what_builds_upon_it(tmp_path):
    Recorder().run(tmp_path)
    second = Recorder()
    second.damaged = "base"
    assert second.run(tmp_path) == ["base", "top"]


def test_torn_stamp_counts_as_none(tmp_path):
    Recorder().run(tmp_path)
    (tmp_path / "other").write_text('{"key": "12')
    assert Recorder().run(tmp_path) == ["other"]


# Commands


def make_runner(tmp_path: Path, lines: list[str], **options) -> setup_steps.Runner:
    return setup_steps.Runner(str(tmp_path / "log"), dict(os.environ), lines.append, **options)


def test_command_that_waits_shows_signs_of_life(tmp_path):
    lines: list[str] = []
    runner = make_runner(tmp_path, lines, interval_seconds=0.1)
    output = runner.run(["sh", "-c", "echo '[3/7] c++ -c a.cpp'; sleep 1.5"], "compiling")
    assert output == "[3/7] c++ -c a.cpp\n"
    assert lines and "3 of 7 files compiled" in lines[0]


def test_failed_command_shows_its_end_and_the_cause(tmp_path):
    runner = make_runner(tmp_path, [])
    with pytest.raises(SetupError, match=r"(?s)pip install failed.*3\).*No space.*8 GB") as error:
        runner.run(["sh", "-c", "echo 'OSError: No space left on device'; exit 3"], "pip install")
    assert str(tmp_path / "log") in str(error.value)


def test_interruption_ends_the_grandchildren(tmp_path):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.7)
        with pytest.raises(KeyboardInterrupt):
            make_runner(tmp_path, []).run(["sh", "-c", "sleep 60 & echo $!; wait"], "waiting")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    sleeper = int((tmp_path / "log").read_text().split()[-1])
    deadline = time.monotonic() + 10
    while is_running(sleeper) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(sleeper)


def is_running(process: int) -> bool:
    """Whether a process lives; a zombie that its new parent has not collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    "log, advice",
    [
        ("g++: fatal error: Killed signal terminated program cc1plus", "MAX_JOBS=1"),
        ("fatal error: Python.h: No such file or directory", "python3-dev"),
        ("Temporary failure in name resolution\nNo matching distribution found for x", "network"),
        ("ERROR: No matching distribution found for torch==9\n", "no torch==9 for this Python"),
        ("error: something else", ""),
    ],
)
def test_diagnosis(log, advice):
    found = setup_steps.diagnose(log)
    assert advice in found and bool(found) == bool(advice)


# The environment


def test_old_python_is_refused_with_the_way_out():
    bootstrap.check_python((3, 10, 0))
    with pytest.raises(SetupError, match=r"Python 3\.10 or newer is needed.* is 3\.9\..*make"):
        bootstrap.check_python((3, 9, 1))


@pytest.mark.parametrize("name", ["bootstrap.py", "setup_steps.py"])
def test_setup_can_be_read_by_an_old_python(name):
    source = (ROOT / "tools" / name).read_text()
    ast.parse(source, feature_version=(3, 6))
    assert "from __future__" not in source


def test_environment_keeps_its_python(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    assert bootstrap.find_kept_python(str(venv), sys.prefix) is None  # not made by us
    (venv / "setup-steps").mkdir()
    assert bootstrap.find_kept_python(str(venv), sys.prefix) == str(venv / "bin" / "python")
    assert bootstrap.find_kept_python(str(venv), str(venv)) is None  # running in it already
    (venv / "bin" / "python").unlink()
    assert bootstrap.find_kept_python(str(venv), sys.prefix) is None


def test_foreign_environment_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("data")
    with pytest.raises(SetupError, match="not made by this set-up"):
        bootstrap.Environment(str(tmp_path), lock=0).make_venv()
    assert (tmp_path / "precious").read_text() == "data"


def test_environment_hides_what_would_misdirect_pip(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.invalid/simple")
    variables = bootstrap.Environment("/nowhere/venv", lock=0).variables()
    assert "PYTHONPATH" not in variables and "PIP_TARGET" not in variables
    assert variables["PIP_INDEX_URL"] == "https://index.invalid/simple"
    assert variables["PATH"].startswith("/nowhere/venv/bin:")


def test_half_installed_distribution_is_found_and_removed(tmp_path):
    requirements = ["torch==2.11.0", "nvidia-cuda-crt==13.0.*", "pytest>=8"]
    for name in ("torch-2.11.0.dist-info", "nvidia_cuda_crt-13.0.88.dist-info"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "INSTALLER").write_text("pip")
    (tmp_path / "~orch").mkdir()
    assert bootstrap.has_distributions(str(tmp_path), requirements)
    assert not bootstrap.has_distributions(str(tmp_path), ["torch==2.12.0"])

    (tmp_path / "torch-2.11.0.dist-info" / "INSTALLER").unlink()
    assert not bootstrap.has_distributions(str(tmp_path), requirements)
    bootstrap.remove_broken_distributions(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia_cuda_crt-13.0.88.dist-info"]


def test_requirement_lists_are_read_from_pyproject():
    text = 'requires = [\n    "a[b]>=1",\n    "c",\n]\ntest = [\n    "d",\n]\n'
    assert bootstrap.read_requirements(text, "requires") == ["a[b]>=1", "c"]
    assert bootstrap.read_requirements(text, "test") == ["d"]
    with pytest.raises(SetupError, match="'demo'"):
        bootstrap.read_requirements(text, "demo")


def test_steps_follow_the_versions(monkeypatch):
    def keys() -> dict[str, str]:
        return {step.name: step.key() for step in bootstrap.Environment("/v", lock=0).steps()}

    before = keys()
    monkeypatch.setattr(bootstrap, "TORCH", ["torch==2.12.0"])
    changed = {name for name, key in keys().items() if key != before[name]}
    assert changed == {"torch", "te_torch"}


# The C++ extension


def test_sources_are_hashed_by_content(tmp_path):
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "plan.cpp"
    source.write_text("int a;")
    before = build_extension.hash_sources(tmp_path)
    os.utime(source, (1, 1))
    assert build_extension.hash_sources(tmp_path) == before
    source.write_text("int b;")
    assert build_extension.hash_sources(tmp_path) != before


def test_replaced_extension_is_noticed(tmp_path):
    extension = tmp_path / "_C.so"
    extension.write_text("ours")
    os.utime(extension, (1, 1))
    before = build_extension.describe_result("inputs", extension)
    extension.write_text("from another interpreter")
    assert build_extension.describe_result("inputs", extension) != before


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_extension_takes_the_libraries_that_torch_loaded():
    from transformer_engine_batched import _C

    dynamic = subprocess.run(
        ["readelf", "-dW", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert [name for name in needed if name.startswith("libcublasLt.so.")]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    # The driver's library is absent on a machine without a GPU.
    assert not [name for name in needed if name.startswith("libcuda.so")]


def test_toolkit_without_cublas_is_named_and_refused(tmp_path):
    (tmp_path / "toolkit" / "include").mkdir(parents=True)
    (tmp_path / "toolkit" / "include" / "cuda_runtime_api.h").write_text(
        "#define CUDART_VERSION  13000\n"
    )
    answer = subprocess.run(
        [
            build_extension.find_cmake(),
            *["-S", str(ROOT), "-B", str(tmp_path / "build")],
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTEB_CUDA_ROOT={tmp_path / 'toolkit'}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode != 0
    assert f"not {tmp_path / 'toolkit'}: no cublasLt.h" in answer.stdout
    assert "TEB_CUDA_ROOT" in answer.stderr
