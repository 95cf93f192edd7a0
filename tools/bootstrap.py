# SPDX-License-Identifier: Apache-2.0
"""Makes the environment of `make demo` and `make test`.

Input: Python 3.10+, a C++ compiler, pyproject.toml's requirement lists, and pip's own configuration
(which index, which proxy). No CUDA toolkit: the wheels that torch brings have what Transformer
Engine (TE) and we compile against.
Output: .venv with torch, TE and our extension, a log in build/setup.log, and TE's compiled wheel in
the user's cache folder.
Every finished step leaves a stamp in .venv, so that a later call goes on where an earlier one
stopped, and does nothing when there is nothing to do.

Standard library only, and syntax that Python 3.6 can read, so that an old Python gets the message
below and not a SyntaxError. Must not import anything that it installs.
"""

import argparse
import ast
import glob
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time

from setup_steps import (
    Runner,
    SetupError,
    Step,
    format_duration,
    pending_steps,
    read_stamps,
    run_steps,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.path.join(ROOT, "build")
PYTHON_MINIMUM = (3, 10)

# What the project is developed and measured with; the package itself accepts a range.
TORCH_VERSION = "2.11.0"
TE_VERSION = "2.20.2"
TORCH = ["torch==" + TORCH_VERSION]
TE_LIBRARY = ["transformer_engine==" + TE_VERSION, "transformer_engine_cu13==" + TE_VERSION]
# CUDA 13 wheels keep these headers apart from the runtime's, and torch does not ask for them.
CUDA_HEADERS = ["nvidia-cuda-crt==13.0.*", "nvidia-cuda-cccl==13.0.*"]
# TE 2.20's build uses pkg_resources, which setuptools 81 removed.
TE_BUILD_TOOLS = ["setuptools<81", "packaging"]

# Measured: the finished environment takes 6 GB, and while torch is installed, pip holds 2.5 GB of
# downloads beside what it has unpacked.
DISK_BYTES_WITH_TORCH = 8e9
DISK_BYTES_WITHOUT_TORCH = 1.5e9
# One of TE's files takes this much of the compiler.
COMPILER_MEMORY_BYTES = 2e9


def say(line):
    """Prints a line at once: what follows may take minutes."""
    print(line, flush=True)


def read_requirements(pyproject, name):
    """The requirement list ``name = [...]`` of pyproject.toml's text.

    tomllib came with Python 3.11; a TOML array of strings is a Python list as well.
    """
    found = re.search(r"^{} = (\[.*?^\])".format(re.escape(name)), pyproject, re.M | re.S)
    if found is None:
        raise SetupError("pyproject.toml has no list {!r}".format(name))
    return ast.literal_eval(found.group(1))


def check_python(version_info):
    """Refuses a Python that is too old, and names newer ones that are installed."""
    if tuple(version_info[:2]) >= PYTHON_MINIMUM:
        return
    newer = []
    for minor in range(10, 15):
        path = shutil.which("python3.{}".format(minor))
        # pyenv has a stand-in for every version, also for those that are not switched on.
        if path and subprocess.call([path, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            newer.append("python3.{}".format(minor))
    raise SetupError(
        "Python {}.{} or newer is needed, and {} is {}.{}. {}".format(
            PYTHON_MINIMUM[0],
            PYTHON_MINIMUM[1],
            sys.executable,
            version_info[0],
            version_info[1],
            (
                "Found here: {}. Try `make PYTHON={} ...`.".format(", ".join(newer), newer[-1])
                if newer
                else "Install one and name it with `make PYTHON=python3.12 ...`."
            ),
        )
    )


def check_machine():
    """Refuses what would fail after minutes of downloads."""
    if not sys.platform.startswith("linux"):
        raise SetupError(
            "Transformer Engine has packages for Linux only, and this is " + sys.platform
        )
    headers = sysconfig.get_paths()["include"]
    if not os.path.exists(os.path.join(headers, "Python.h")):
        raise SetupError(
            "{} has no C headers ({}/Python.h). Install them: on Debian and Ubuntu "
            "`apt install python3-dev`, on Fedora `dnf install python3-devel`.".format(
                sys.executable, headers
            )
        )
    if find_compiler() is None:
        raise SetupError(
            "No C++ compiler was found (looked for $CXX, c++, g++, clang++). Install one: on "
            "Debian and Ubuntu `apt install g++`, on Fedora `dnf install gcc-c++`."
        )


def find_compiler():
    """Path of the C++ compiler, or None."""
    names = os.environ.get("CXX", "").split()[:1] + ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def check_disk(directory, needed_bytes):
    """Refuses to begin with too little room on the disk."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise SetupError(
            "{} has {:.1f} GB free and {:.1f} GB are needed (pip's cache may take 2.5 GB more, "
            "`pip cache dir` says where). Make room, or put the environment elsewhere with `make "
            "VENV=/other/disk/venv ...`.".format(directory, free_bytes / 1e9, needed_bytes / 1e9)
        )


def count_jobs():
    """How many compilers fit into the machine at once."""
    jobs = len(os.sched_getaffinity(0))
    try:
        with open("/proc/meminfo") as file:
            available = re.search(r"MemAvailable: +(\d+) kB", file.read())
        jobs = min(jobs, int(int(available.group(1)) * 1024 // COMPILER_MEMORY_BYTES))
    except (OSError, AttributeError):
        pass
    return max(jobs, 1)


def has_distributions(site_packages, requirements):
    """Whether every requirement pinned with ``==`` is installed, completely, in that version."""
    for requirement in requirements:
        name, pinned, version = requirement.partition("==")
        pattern = "{}-{}*.dist-info".format(re.sub(r"[-_.]+", "_", name).lower(), version)
        if pinned and not glob.glob(os.path.join(site_packages, pattern, "INSTALLER")):
            return False
    return True


def remove_broken_distributions(site_packages):
    """Removes what an interrupted pip left: it believes in packages that are only half there.

    pip writes INSTALLER after all files of a package. Without the metadata, it installs anew.
    """
    for path in glob.glob(os.path.join(site_packages, "*.dist-info")):
        if not os.path.exists(os.path.join(path, "INSTALLER")):
            shutil.rmtree(path)
    # pip renames what it is about to replace to a name that starts with a tilde.
    for path in glob.glob(os.path.join(site_packages, "~*")):
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


class Environment:
    """The virtual environment, and the steps that fill it.

    Parameters
    ----------
    venv : str
        Its folder. What is there already is replaced only if it came from here.
    lock : int
        File descriptor of the lock, inherited by the commands: should this process be killed, the
        next one waits for what is still running.
    """

    def __init__(self, venv, lock):
        self.venv = os.path.abspath(venv)
        self.stamps = os.path.join(self.venv, "setup-steps")
        self.python = os.path.join(self.venv, "bin", "python")
        self.site_packages = os.path.join(
            self.venv, "lib", "python{}.{}".format(*sys.version_info[:2]), "site-packages"
        )
        self.temporary = os.path.join(self.venv, "tmp")
        self.runner = Runner(
            os.path.join(BUILD, "setup.log"), self.variables(), say, keep_open=(lock,)
        )

    def variables(self):
        """The environment variables of all commands: pip's settings stay, its targets do not."""
        variables = dict(os.environ)
        for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER"):
            variables.pop(name, None)
        variables["VIRTUAL_ENV"] = self.venv
        variables["PATH"] = os.path.join(self.venv, "bin") + os.pathsep + variables["PATH"]
        variables["PYTHONUNBUFFERED"] = "1"
        variables["PIP_USER"] = "0"
        # Beside the environment: pip unpacks gigabytes, and /tmp is often in memory.
        variables["TMPDIR"] = self.temporary
        variables.setdefault("MAX_JOBS", str(count_jobs()))
        # Fixed so, because torch's build looks for a compiler called c++ otherwise.
        variables.setdefault("CXX", find_compiler() or "c++")
        # TE would take a toolkit's headers where it finds one, and not every toolkit has cuBLAS's.
        variables["NVTE_BUILD_USE_NVIDIA_WHEELS"] = "1"
        # TE would add our commit to its own version, and pip refuse the package for it.
        variables["NVTE_NO_LOCAL_VERSION"] = "1"
        return variables

    def steps(self):
        """All steps, in order."""
        with open(os.path.join(ROOT, "pyproject.toml")) as file:
            pyproject = file.read()
        lists = ("requires", "test", "demo", "bench", "lint")
        tools = sum((read_requirements(pyproject, name) for name in lists), TE_BUILD_TOOLS)
        tools = sorted(set(tools))

        venv = Step(
            "venv",
            "virtual environment {} with Python {}".format(self.venv, platform.python_version()),
            [self.venv, ROOT, sys.base_prefix, sys.version],
            self.make_venv,
            is_intact=lambda: runs_python(self.python),
        )
        tools_step = self.pip_step("tools", "build and test tools", tools, [venv])
        torch = self.pip_step(
            "torch",
            "torch {}: a download of about 2.5 GB, minutes".format(TORCH_VERSION),
            TORCH,
            [venv],
            self.check_torch,
        )
        te_library = self.pip_step(
            "te_library",
            "Transformer Engine {}: its library, and CUDA's headers".format(TE_VERSION),
            TE_LIBRARY + CUDA_HEADERS,
            [venv],
        )
        te_torch_pin = ["transformer_engine_torch==" + TE_VERSION]
        te_torch = Step(
            "te_torch",
            "Transformer Engine {}: its torch extension, compiled here unless there is a wheel "
            "(about 20 minutes on 2 cores)".format(TE_VERSION),
            te_torch_pin,
            self.make_te_torch,
            [torch, te_library],
            lambda: has_distributions(self.site_packages, te_torch_pin),
        )
        return [venv, tools_step, torch, te_library, te_torch]

    def pip_step(self, name, title, requirements, needs, check=lambda: None):
        """A step that installs requirements from pip's index, and checks the outcome."""

        def install():
            self.pip("install", *requirements, doing="pip install")
            check()

        return Step(
            name,
            title,
            requirements,
            install,
            needs,
            lambda: has_distributions(self.site_packages, requirements),
        )

    def pip(self, command, *arguments, **options):
        """Runs the environment's pip."""
        remove_broken_distributions(self.site_packages)
        os.makedirs(self.temporary, exist_ok=True)
        quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
        return self.runner.run(
            [self.python, "-m", "pip", command] + quiet + list(arguments), **options
        )

    def make_venv(self):
        """Makes the environment anew."""
        if os.path.isdir(self.venv):
            if os.listdir(self.venv) and not os.path.exists(self.stamps):
                raise SetupError(
                    "{} exists and was not made by this set-up. Move it away, or choose another "
                    "place with `make VENV=/path ...`.".format(self.venv)
                )
            shutil.rmtree(self.venv)
        # First of all, so that an interrupted environment is known as ours.
        os.makedirs(self.stamps)
        os.makedirs(self.temporary)
        try:
            # The Python below any environment that we run in: that one may be about to go.
            python = getattr(sys, "_base_executable", sys.executable)
            self.runner.run([python, "-m", "venv", self.venv], "making the environment")
        except SetupError as error:
            if "ensurepip" in str(error):
                raise SetupError(
                    "{}\nThis Python cannot make virtual environments: on Debian and Ubuntu "
                    "`apt install python3-venv`.".format(error)
                )
            raise
        # The checkout itself is the package: no copy of it to keep up to date.
        with open(os.path.join(self.site_packages, "transformer_engine_batched.pth"), "w") as file:
            file.write(ROOT + "\n")

    def check_torch(self):
        """Refuses a torch without CUDA 13, which some indexes offer under the same version."""
        code = "import torch; print('cuda of torch:', torch.version.cuda)"
        answer = self.runner.run([self.python, "-c", code], "importing torch")
        found = re.search("cuda of torch: (.*)", answer).group(1)
        if not found.startswith("13."):
            raise SetupError(
                "pip's index gave a torch {} that was built for CUDA {}; the one of PyPI, for CUDA "
                "13.0, is needed. See `pip config list`.".format(TORCH_VERSION, found)
            )

    def make_te_torch(self):
        """Installs TE's torch extension from a kept wheel, a downloaded one, or by compiling it."""
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        # A wheel works with the torch and the Python it was made for, and its name says neither.
        build = "te{}-torch{}-{}-{}".format(
            TE_VERSION, TORCH_VERSION, sys.implementation.cache_tag, platform.machine()
        )
        kept = os.path.join(cache, "transformer_engine_batched", build)
        wheel = next(iter(glob.glob(os.path.join(kept, "*.whl"))), None)
        if wheel:
            say("      from {}".format(wheel))
            try:
                return self.install_te_torch(wheel)
            except SetupError as error:
                say("      the kept wheel does not work, building it anew: {}".format(error))
        # Not in the environment's folder: a compile of ten minutes outlives a new environment.
        source = self.unpack_te_torch(os.path.join(BUILD, build))
        try:
            wheel = self.build_te_torch(source, {})
            self.install_te_torch(wheel)
        except SetupError as error:
            if self.has_compiled(source) or os.environ.get("NVTE_PYTORCH_FORCE_BUILD") == "TRUE":
                raise
            say("      the ready-made wheel does not work, compiling: {}".format(error))
            wheel = self.build_te_torch(source, {"NVTE_PYTORCH_FORCE_BUILD": "TRUE"})
            self.install_te_torch(wheel)
        try:
            os.makedirs(kept, exist_ok=True)
            shutil.copy(wheel, kept)
            say("      kept for the next time in {}".format(kept))
        except OSError as error:
            say("      not kept for the next time: {}".format(error))
        shutil.rmtree(os.path.join(BUILD, build))

    def unpack_te_torch(self, folder):
        """Fetches and unpacks the sources; a compile that was interrupted there goes on."""
        name = "transformer_engine_torch-{}".format(TE_VERSION)
        archive = os.path.join(folder, name + ".tar.gz")
        if not os.path.exists(archive):
            os.makedirs(folder, exist_ok=True)
            self.pip(
                *["download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"],
                *["--dest", folder, "transformer_engine_torch==" + TE_VERSION],
                doing="downloading the sources of transformer_engine_torch",
            )
        # Every time, for a build may have changed them; the files keep the archive's times, so
        # that ninja sees which objects are up to date.
        with tarfile.open(archive) as file:
            file.extractall(
                folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
            )
        return os.path.join(folder, name)

    def build_te_torch(self, source, environment):
        """Makes the wheel; returns its path."""
        wheels = os.path.join(source, "wheels")
        shutil.rmtree(wheels, ignore_errors=True)
        self.pip(
            *["wheel", "-v", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source],
            doing="building transformer_engine_torch",
            environment=environment,
        )
        return glob.glob(os.path.join(wheels, "*.whl"))[0]

    def has_compiled(self, source):
        """Whether the compiler was at work there, rather than a download."""
        return bool(glob.glob(os.path.join(source, "build", "temp*", "**", "*.o"), recursive=True))

    def install_te_torch(self, wheel):
        """Installs a wheel of TE's torch extension and imports it."""
        self.pip("install", "--force-reinstall", "--no-deps", wheel, doing="installing " + wheel)
        self.pip("install", wheel, doing="installing what transformer_engine_torch needs")
        self.runner.run(
            [self.python, "-c", "import torch, transformer_engine.pytorch"],
            "importing Transformer Engine",
        )


def set_up(environment):
    """Brings the environment up to date, then the extension; returns the exit status."""
    started = time.time()
    steps = environment.steps()
    pending = pending_steps(steps, read_stamps(environment.stamps))
    if pending:
        check_machine()
        has_torch = all(step.name != "torch" for step in pending)
        check_disk(
            os.path.dirname(environment.venv),
            DISK_BYTES_WITHOUT_TORCH if has_torch else DISK_BYTES_WITH_TORCH,
        )
        say("set-up of {}; details in {}".format(environment.venv, environment.runner.log_path))
        if len(pending) < len(steps):
            say("{} of {} steps are done already".format(len(steps) - len(pending), len(steps)))
        if os.path.exists(environment.stamps):
            shutil.rmtree(environment.temporary, ignore_errors=True)
        run_steps(steps, environment.stamps, say)
        shutil.rmtree(environment.temporary, ignore_errors=True)
        say("set-up finished in {}".format(format_duration(time.time() - started)))
    builder = os.path.join(ROOT, "tools", "build_extension.py")
    return subprocess.call([environment.python, builder], env=environment.variables())


def runs_python(python):
    """Whether an interpreter is there and starts."""
    try:
        return subprocess.call([python, "-I", "-S", "-c", ""], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def find_kept_python(venv, prefix):
    """The Python of an environment made earlier, if it should go on instead of the one at prefix.

    An environment keeps its Python when a shell has another one first on PATH.
    """
    python = os.path.join(venv, "bin", "python")
    is_ours = os.path.isdir(os.path.join(venv, "setup-steps"))
    is_running = os.path.realpath(venv) == os.path.realpath(prefix)
    return python if is_ours and not is_running and runs_python(python) else None


def take_lock(path):
    """Waits until no other set-up works in this checkout; returns the lock's file descriptor."""
    import fcntl

    lock = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        say("waiting for another set-up in this folder to end")
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def stop(signal_number, frame):
    """Makes a request to end look like Ctrl-C, so that the running command is ended, too."""
    raise KeyboardInterrupt


def main():
    """Sets up and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"), help="folder to set up")
    parser.add_argument(
        "--with-this-python",
        action="store_true",
        help="make it anew if it was made with another Python",
    )
    arguments = parser.parse_args()
    kept = None if arguments.with_this_python else find_kept_python(arguments.venv, sys.prefix)
    if kept:
        os.execv(kept, [kept, os.path.abspath(__file__), "--venv", arguments.venv])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        check_python(sys.version_info)
        os.makedirs(BUILD, exist_ok=True)
        lock = take_lock(os.path.join(BUILD, "setup.lock"))
        environment = Environment(arguments.venv, lock)
        os.makedirs(os.path.dirname(environment.venv), exist_ok=True)
        return set_up(environment)
    except (SetupError, OSError) as error:
        print("error: {}".format(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
