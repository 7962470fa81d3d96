"""How a GPU is timed: replays of a CUDA graph with a cold cache, and eager calls as they come.

A replay has no call overhead, so it is what the kernels take. Before each one, a buffer of several
times the L2 is written and then read: nothing of the last replay is in the cache, and no line that
was written waits to be written back. Events around the replay alone take the time; nothing is
subtracted. The host runs ahead while the buffer is written, so no replay waits for it.

An eager sample is many steps in flight: its time a step is what training sees, whichever of
device and host is slower, and the host's own time is taken before anything is waited for.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

import torch

from ..measure import Step
from .device import Device

Replay = Callable[[], object]


class Flight(NamedTuple):
    """Samples of eager steps: seconds a step, and seconds that the host took for its calls."""

    wall: list[float]
    host: list[float]


@dataclass(frozen=True)
class Budget:
    """How often everything is timed."""

    rounds: int = 21
    fewest_rounds: int = 5
    seconds: float = 0.25  # for the rounds of a case, once it has the fewest
    eager_rounds: int = 5
    eager_seconds: float = 4e-3  # the length of a sample
    eager_calls: tuple[int, int] = (5, 50)  # fewest and most; the driver's queue holds 1024
    copy_bytes: int = 1 << 30
    flush_bytes: int = 256 << 20  # or four times the L2, if that is more


class Deadline:
    """A number of seconds from now."""

    def __init__(self, seconds: float, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative once it has passed."""
        return self._end - self._clock()

    @property
    def passed(self) -> bool:
        """Whether nothing new is to be begun."""
        return self.left <= 0

    def part(self, share: float) -> Deadline:
        """One at a share of what is left."""
        return Deadline(share * self.left, self._clock)


class DeviceLostError(RuntimeError):
    """The device answers nothing any more: what follows would fail, too."""


class Timer(Protocol):
    """What a session asks for; `GraphTimer` is the one that measures."""

    device: torch.device

    def scope(self) -> AbstractContextManager[object]:
        """Where tensors and steps are made."""

    def prepare(self, step: Step) -> Replay:
        """Something that repeats the step's kernels."""

    def rounds(self, replays: Mapping[str, Replay]) -> dict[str, list[float]]:
        """Seconds a replay, one entry a round; the contenders take turns."""

    def in_flight(self, steps: Mapping[str, Step]) -> dict[str, Flight]:
        """Eager steps; the contenders take turns, a sample each."""

    def copy_speeds(self, dtype: torch.dtype) -> list[float]:
        """Bytes read and written a second, one entry a copy."""

    def wait(self) -> None:
        """Until the device is idle; raises `DeviceLostError` if it is no more."""

    def release(self) -> None:
        """Give back the memory of what was measured."""


class GraphTimer:
    """Times on the current CUDA device, all of it on one stream of its own."""

    def __init__(self, device: Device, budget: Budget) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._budget = budget
        self._stream = torch.cuda.Stream(self.device)
        count = max(4 * device.l2_bytes, budget.flush_bytes) // 4
        gc.freeze()  # what torch's import made is no garbage: collections need not look at it
        with self.scope():
            self._buffer = torch.zeros(count, device=self.device)
            self._sum = torch.zeros((), device=self.device)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Work is on the stream, and it is done at the end."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def prepare(self, step: Step) -> Replay:
        """Capture the step in a graph, after two calls that compile and load what it needs."""
        with torch.cuda.stream(self._stream):
            step()
            step()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # `torch.cuda.graph` would give all free memory back before each capture.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            except BaseException:
                with suppress(RuntimeError):  # the step's own error is the one to tell
                    graph.capture_end()
                raise
            graph.capture_end()
            graph.replay()
            self._stream.synchronize()
        return graph.replay

    def rounds(self, replays: Mapping[str, Replay]) -> dict[str, list[float]]:
        """Until the budget's rounds, or its seconds with the fewest of them."""
        budget = self._budget
        times: dict[str, list[float]] = {name: [] for name in replays}
        done, start = 0, perf_counter()
        while replays and done < budget.rounds:
            if done >= budget.fewest_rounds and perf_counter() - start >= budget.seconds:
                break
            events = {name: self._one(replay) for name, replay in replays.items()}
            self._stream.synchronize()
            for name, (first, last) in events.items():
                times[name].append(first.elapsed_time(last) / 1e3)
            done += 1
        return times

    def _one(self, replay: Replay) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            self._buffer.fill_(1.0)
            torch.sum(self._buffer, 0, out=self._sum)
            first.record(self._stream)
            replay()
            last.record(self._stream)
        return first, last

    def in_flight(self, steps: Mapping[str, Step]) -> dict[str, Flight]:
        """Samples of at least the budget's length, in turns; each step was called before."""
        budget = self._budget
        flights = {name: Flight([], []) for name in steps}
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                fewest, most = budget.eager_calls
                calls = {}
                for name, step in steps.items():
                    seconds, _ = self._sample(step, fewest)
                    calls[name] = min(most, max(fewest, math.ceil(budget.eager_seconds / seconds)))
                for _ in range(budget.eager_rounds):
                    for name, step in steps.items():
                        wall, host = self._sample(step, calls[name])
                        flights[name].wall.append(wall)
                        flights[name].host.append(host)
        finally:
            if collecting:
                gc.enable()
        return flights

    def _sample(self, step: Step, calls: int) -> tuple[float, float]:
        self._stream.synchronize()
        start = perf_counter()
        for _ in range(calls):
            step()
        called = perf_counter()
        self._stream.synchronize()
        return (perf_counter() - start) / calls, (called - start) / calls

    def copy_speeds(self, dtype: torch.dtype) -> list[float]:
        """The faster of the driver's copy and of a kernel that reads and writes."""
        count = self._budget.copy_bytes // dtype.itemsize
        with self.scope():
            source = torch.ones(count, dtype=dtype, device=self.device)
            target = torch.ones_like(source)
            replays = {
                "driver": self.prepare(lambda: target.copy_(source)),
                "kernel": self.prepare(lambda: torch.neg(source, out=target)),
            }
        moved = 2 * source.numel() * source.element_size()
        speeds = [[moved / t for t in times] for times in self.rounds(replays).values()]
        return max(speeds, key=lambda values: sorted(values)[len(values) // 2])

    def wait(self) -> None:
        """An error of a kernel stays with the device: everything after it would report it."""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise DeviceLostError(str(error)) from error

    def release(self) -> None:
        """Graphs hold their memory until they are collected."""
        gc.collect()
        torch.cuda.empty_cache()
