# SPDX-License-Identifier: Apache-2.0
"""The timing core: interleaved device times and host times of a call.

Input: functions to call. Output: samples and their medians. The clocks are arguments, so the
schedule is tested without a GPU. Must not know what is being timed.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Mapping

import torch


class DeviceLostError(RuntimeError):
    """After an error of `call` the device answers no more: only a new process can go on."""

    def __init__(self, call: str | None, reason: str) -> None:
        super().__init__(f"{call or 'some call'}: {reason}")
        self.call = call
        self.reason = reason


class CudaClock:
    """Times a region of the current stream with CUDA events.

    Each region starts on an idle device, else a loop of launches would hide its host time behind what
    others have queued. Then the device spins for about 0.1 ms. The host uses that head start to enqueue
    the region, so a single kernel is timed without the host's share; a loop of hundreds of launches
    stays bound by the host, as it is in use.
    """

    _HEAD_START_CYCLES = 200_000  # 0.1 ms at 2 GHz

    def start(self) -> Any:
        """Mark the start of a region; returns the token for `stop` and `read_ms`."""
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(self._HEAD_START_CYCLES)
        pair[0].record()
        return pair

    def stop(self, token: Any) -> None:
        """Mark the end of the region."""
        token[1].record()

    def read_ms(self, token: Any) -> float:
        """Milliseconds between the marks; call `settle` before."""
        return token[0].elapsed_time(token[1])

    def settle(self) -> None:
        """Wait for the device; raises what went wrong on it."""
        torch.cuda.synchronize()


@dataclass
class Samples:
    """Times of one call, in the unit of its clock, or the reason why there are none."""

    values: list[float] = field(default_factory=list)
    reason: str | None = None

    @property
    def median(self) -> float | None:
        """Median, None without samples."""
        return statistics.median(self.values) if self.values else None

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """First and third quartile, None below two samples."""
        if len(self.values) < 2:
            return None
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def describe_error(error: BaseException) -> str:
    """Type and first line of an error, short enough for a table's footnote."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:240]


def check_device(name: str | None, error: BaseException, settle: Callable[[], None]) -> None:
    """After `error` in the call `name`: raise `DeviceLostError` if the device answers no more."""
    try:
        settle()
    except Exception as fatal:
        raise DeviceLostError(name, describe_error(error)) from fatal


def takes_part(round_index: int, rounds: int, wanted: int) -> bool:
    """Whether a call that wants `wanted` of `rounds` rounds runs in this one; spread evenly."""
    return (round_index + 1) * wanted // rounds > round_index * wanted // rounds


def interleave(
    calls: Mapping[str, Callable[[int], Any]],
    clock: Any,
    rounds: int,
    warmup: int,
    wanted: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, Samples]:
    """Time several calls in one run, round by round.

    Each round runs every call once, in an order drawn anew, so that all meet the same clocks and
    temperatures and none always follows the same neighbour. A call that raises is dropped with its
    reason; the others go on.

    Parameters
    ----------
    calls : mapping of name to function
        Each is given the running number of its call, to rotate its inputs.
    clock : object
        `start`, `stop`, `read_ms` and `settle` as `CudaClock` has them.
    rounds, warmup : int
        Timed rounds, and calls before them (at most one for a call that wants fewer rounds than
        all).
    wanted : mapping, optional
        Rounds that a costly call takes part in; all by default.

    Returns
    -------
    dict of name to Samples
        In milliseconds.
    """
    wanted = {name: min(rounds, (wanted or {}).get(name, rounds)) for name in calls}
    samples = {name: Samples() for name in calls}
    numbers = dict.fromkeys(calls, 0)
    tokens: list[tuple[str, Any]] = []

    def run(name: str, is_timed: bool) -> None:
        try:
            token = clock.start() if is_timed else None
            calls[name](numbers[name])
            if is_timed:
                clock.stop(token)
                tokens.append((name, token))
        except Exception as error:
            samples[name].reason = describe_error(error)
            check_device(name, error, clock.settle)
        numbers[name] += 1

    def settle() -> None:
        try:
            clock.settle()
        except Exception as error:
            check_device(None, error, clock.settle)

    order = random.Random(seed)
    with _garbage_collection_off():
        for name in calls:
            for _ in range(warmup if wanted[name] == rounds else min(warmup, 1)):
                if samples[name].reason is None:
                    run(name, is_timed=False)
        settle()
        for index in range(rounds):
            for name in order.sample(list(calls), len(calls)):
                if samples[name].reason is None and takes_part(index, rounds, wanted[name]):
                    run(name, is_timed=True)
        settle()
    for name, token in tokens:
        if samples[name].reason is None:
            samples[name].values.append(clock.read_ms(token))
    return samples


@dataclass
class HostSamples:
    """Host time of a call in microseconds, and how long the device lagged behind at the end."""

    per_call: Samples
    drain_us: float | None = None


def time_host(
    call: Callable[[], Any],
    settle: Callable[[], None],
    chunks: int = 20,
    calls_per_chunk: int = 100,
    now_ns: Callable[[], int] = time.perf_counter_ns,
) -> HostSamples:
    """Host time of `call`, never waiting for the device inside a chunk.

    A chunk stays well under the roughly thousand launches a CUDA stream queues before the host is
    made to wait. After each chunk the wait for the device is timed: if it is more than half the
    chunk's own time, the device was the limit and the samples say nothing about the host, so none
    are given.
    """
    result = HostSamples(Samples())
    drains, chunk_times = [], []
    for _ in range(calls_per_chunk):
        call()
    settle()
    with _garbage_collection_off():
        for _ in range(chunks):
            marks = [now_ns()]
            for _ in range(calls_per_chunk):
                call()
                marks.append(now_ns())
            settle()
            drains.append((now_ns() - marks[-1]) / 1e3)
            chunk_times.append((marks[-1] - marks[0]) / 1e3)
            result.per_call.values += [
                (end - start) / 1e3 for start, end in zip(marks[:-1], marks[1:])
            ]
    result.drain_us = statistics.median(drains)
    if result.drain_us > statistics.median(chunk_times) / 2:
        result.per_call = Samples(
            reason=f"the device lagged {result.drain_us:.0f} us behind a chunk of "
            f"{calls_per_chunk} calls: its speed was measured, not the host's"
        )
    return result
