# SPDX-License-Identifier: Apache-2.0
"""Steps of a set-up that is resumed where it stopped: what is still to do, and running one command.

Input: steps with the values they depend on, and the folder of stamps that finished steps left.
Standard library only, and syntax that Python 3.6 can read: the check that says "this Python is too
old" runs from here. Must not know what is installed; that is tools/bootstrap.py's part.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time


class SetupError(RuntimeError):
    """The set-up cannot go on; the text says why and what to do."""


class Step:
    """One step of the set-up.

    Parameters
    ----------
    name : str
        Name of its stamp.
    title : str
        What it does, for the reader.
    inputs : object
        Whatever the result depends on (versions, requirements), as JSON would have it. A change
        redoes the step.
    action : callable
        Does it; called without arguments.
    needs : tuple of Step
        Steps that it builds upon; when one of them is redone, so is this one.
    is_intact : callable
        Whether its result is still there; called without arguments, must be quick.
    """

    def __init__(self, name, title, inputs, action, needs=(), is_intact=lambda: True):
        self.name = name
        self.title = title
        self.inputs = inputs
        self.action = action
        self.needs = needs
        self.is_intact = is_intact

    def key(self):
        """Digest of the step's inputs and of all it builds upon."""
        content = json.dumps([self.name, self.inputs, [need.key() for need in self.needs]])
        return hashlib.sha256(content.encode()).hexdigest()


def pending_steps(steps, stamps):
    """The steps that have to run, in order.

    Parameters
    ----------
    steps : list of Step
        All steps, each after the ones it needs.
    stamps : dict
        Key left by each finished step, by name.
    """
    pending = []
    for step in steps:
        is_done = stamps.get(step.name) == step.key() and step.is_intact()
        if not is_done or any(need in pending for need in step.needs):
            pending.append(step)
    return pending


def read_stamps(folder):
    """Keys of the finished steps, by name; a stamp that cannot be read counts as none."""
    stamps = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        try:
            with open(os.path.join(folder, name)) as file:
                stamps[name] = json.load(file)["key"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
    return stamps


def write_stamp(folder, step, seconds):
    """Marks a step as finished; whole or not at all."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, step.name)
    with open(path + ".new", "w") as file:
        json.dump({"key": step.key(), "seconds": round(seconds, 1)}, file)
    os.replace(path + ".new", path)


def remove_stamp(folder, step):
    """Marks a step as not finished."""
    path = os.path.join(folder, step.name)
    if os.path.exists(path):
        os.remove(path)


def run_steps(steps, folder, say):
    """Runs all pending steps; returns how many there were."""
    pending = pending_steps(steps, read_stamps(folder))
    for step in pending:
        remove_stamp(folder, step)
    for number, step in enumerate(pending, 1):
        prefix = "[{}/{}]".format(number, len(pending))
        say("{} {}".format(prefix, step.title))
        started = time.time()
        step.action()
        seconds = time.time() - started
        write_stamp(folder, step, seconds)
        say("{} done in {}".format(prefix, format_duration(seconds)))
    return len(pending)


def format_duration(seconds):
    """``8 s``, ``2 min 05 s`` or ``1 h 02 min``."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return "{} s".format(seconds)
    if seconds < 3600:
        return "{} min {:02d} s".format(seconds // 60, seconds % 60)
    return "{} h {:02d} min".format(seconds // 3600, seconds % 3600 // 60)


def describe_progress(log_tail):
    """The end of a log in a few words: how many files are compiled, or pip's last line."""
    compiled = re.findall(r"\[(\d+)/(\d+)\] \S*(?:c\+\+|g\+\+|clang|cc|nvcc)", log_tail)
    if compiled:
        return "{} of {} files compiled".format(*compiled[-1])
    lines = [line.strip() for line in log_tail.splitlines() if line.strip()]
    return lines[-1] if lines else ""


# What a failed command's output says, and what to do about it; the first that matches counts.
CAUSES = (
    (
        r"No space left on device|Errno 28\b",
        "the disk is full: about 8 GB are needed, and 2.5 GB for pip's cache.",
    ),
    (
        r"Killed signal|signal terminated program cc1plus|out of memory|Cannot allocate memory",
        "the compiler ran out of memory: try again with MAX_JOBS=1.",
    ),
    (r"Python\.h: No such file", "Python's headers are missing: install python3-dev."),
    (
        r"Temporary failure in name resolution|Name or service not known|NewConnectionError"
        r"|Network is unreachable|ConnectTimeout|Connection refused|Max retries exceeded"
        r"|Read timed out|ProxyError",
        "the package index could not be reached: is there a network, and does `pip config list` "
        "show the index and proxy that this machine should use?",
    ),
    (
        r"SSLError|CERTIFICATE_VERIFY_FAILED",
        "the package index's certificate was refused: `pip config set global.cert FILE` names "
        "the authorities to trust.",
    ),
    (
        r"No matching distribution found for (\S+)",
        "the package index has no {0} for this Python and system: another Python can be given "
        "with `make PYTHON=python3.12 ...`.",
    ),
)


def diagnose(log):
    """What to do about a failure, read from the command's output; empty if nothing is known."""
    for pattern, advice in CAUSES:
        found = re.search(pattern, log)
        if found:
            return advice.format(*found.groups())
    return ""


class Runner:
    """Runs commands with their output in a log file, and says how they get on.

    Parameters
    ----------
    log_path : str
        File that all output is appended to.
    environment : dict
        Environment of the commands.
    say : callable
        Prints one line.
    keep_open : tuple of int
        File descriptors that the commands inherit.
    interval_seconds : float
        Time between two signs of life where the output is no terminal.
    """

    def __init__(self, log_path, environment, say, keep_open=(), interval_seconds=30.0):
        self.log_path = log_path
        self.environment = environment
        self.say = say
        self.keep_open = keep_open
        self.interval_seconds = interval_seconds

    def run(self, command, doing, directory=None, environment=None):
        """Runs one command and returns what it printed; raises SetupError if it fails."""
        is_terminal = sys.stdout.isatty()
        environment = dict(self.environment, **(environment or {}))
        with open(self.log_path, "ab") as log, open(self.log_path, "rb") as reader:
            log.write("\n$ {}\n".format(" ".join(command)).encode())
            log.flush()
            start = reader.seek(0, os.SEEK_END)
            # A process group of its own, so that an interruption can end the compilers below, too.
            process = subprocess.Popen(
                command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=self.keep_open,
                start_new_session=True,
            )
            try:
                self._wait(process, reader, start, is_terminal)
            except BaseException:
                end_process_group(process)
                raise
            finally:
                if is_terminal:
                    sys.stdout.write("\r\033[K")
                    sys.stdout.flush()
            reader.seek(start)
            output = reader.read().decode(errors="replace")
        if process.returncode:
            raise SetupError(self._explain(output, doing, process.returncode))
        return output

    def _wait(self, process, reader, start, is_terminal):
        started = last = time.time()
        while True:
            try:
                process.wait(0.5)
                return
            except subprocess.TimeoutExpired:
                pass
            if time.time() - last < (1.0 if is_terminal else self.interval_seconds):
                continue
            last = time.time()
            size = reader.seek(0, os.SEEK_END)
            reader.seek(max(start, size - 20000))
            progress = describe_progress(reader.read().decode(errors="replace"))
            line = "      {}: {}".format(format_duration(last - started), progress)
            line = line[: shutil.get_terminal_size((100, 24)).columns - 1]
            if is_terminal:
                sys.stdout.write("\r\033[K" + line)
                sys.stdout.flush()
            else:
                self.say(line)

    def _explain(self, output, doing, returncode):
        tail = "\n".join("  | " + line[:200] for line in output.rstrip().splitlines()[-25:])
        advice = diagnose(output)
        return "{} failed (exit status {}). Its last lines:\n{}\n{}The whole log: {}".format(
            doing, returncode, tail, advice and "Likely cause: " + advice + "\n", self.log_path
        )


def end_process_group(process):
    """Ends a process that leads its own group, and all that it started."""
    # SIGINT first: pip then removes its temporary files, and ninja its half-written objects.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5.0)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
