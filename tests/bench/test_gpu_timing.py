"""What is done around a replay, and when it ends; no test here looks at a clock's result."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from normally.bench.gpu import timing
from normally.bench.gpu.timing import Budget, Deadline, DeviceLostError, GraphTimer

from .gpu_helpers import DEVICE


class Cuda:
    """torch.cuda as far as a timer asks, with a log of what was done."""

    OutOfMemoryError = torch.cuda.OutOfMemoryError

    def __init__(self):
        self.log = []
        cuda = self

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                pass

            def synchronize(self):
                cuda.log.append("wait")

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                cuda.log.append("event")

            def elapsed_time(self, other):
                return 2.0

        class CUDAGraph:
            def capture_begin(self, capture_error_mode):
                cuda.log.append("begin")

            def capture_end(self):
                cuda.log.append("end")

            def replay(self):
                cuda.log.append("replay")

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph

    def current_device(self):
        return 0

    def current_stream(self, device):
        return self.Stream()

    def stream(self, stream):
        return contextlib.nullcontext()

    def synchronize(self, device=None):
        self.log.append("synchronize")


class Torch:
    """torch with another `cuda` and the CPU as its device."""

    def __init__(self, cuda):
        self.cuda = cuda

    def __getattr__(self, name):
        return getattr(torch, name)

    def device(self, *_):
        return torch.device("cpu")

    def sum(self, *args, **kwargs):
        self.cuda.log.append("read")
        return torch.sum(*args, **kwargs)


BUDGET = Budget(
    rounds=3, fewest_rounds=2, seconds=60.0, eager_rounds=2, eager_seconds=0.0,
    eager_calls=(2, 4), copy_bytes=64, flush_bytes=64,
)  # fmt: skip


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    monkeypatch.setattr(timing, "torch", Torch(fake))
    return fake


def make_timer(budget=BUDGET):
    device = SimpleNamespace(l2_bytes=32)
    return GraphTimer(device, budget)


def test_the_buffer_is_several_times_the_l2(cuda):
    buffer = make_timer()._buffer
    assert buffer.numel() * buffer.element_size() == 4 * 32
    real = Budget()
    assert max(4 * DEVICE.l2_bytes, real.flush_bytes) >= 2 * DEVICE.l2_bytes


def test_a_step_is_warm_before_it_is_captured(cuda):
    timer = make_timer()
    replay = timer.prepare(lambda: cuda.log.append("step"))
    assert cuda.log == ["step", "step", "wait", "begin", "step", "end", "replay", "wait"]
    replay()
    assert cuda.log[-1] == "replay"


def test_a_step_that_cannot_be_captured_says_why(cuda):
    def step():
        if "begin" in cuda.log:
            raise ValueError("a copy to the host")

    with pytest.raises(ValueError, match="a copy to the host"):
        make_timer().prepare(step)
    assert cuda.log[-1] == "end"  # the stream takes work again


def test_events_are_around_the_replay_alone_and_the_cache_is_cold(cuda):
    timer = make_timer()
    timer._buffer.zero_()
    seen = []

    def replay():
        seen.append(timer._buffer.sum().item())
        cuda.log.append("replay")

    times = timer.rounds({"a": replay})
    assert times == {"a": [0.002] * 3}
    assert cuda.log == ["read", "event", "replay", "event", "wait"] * 3
    assert seen == [timer._buffer.numel()] * 3  # written before each


def test_contenders_take_turns(cuda):
    order = []
    make_timer().rounds({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert order == ["a", "b"] * 3


def test_rounds_end_with_their_time_but_not_before_the_fewest(cuda):
    timer = make_timer(Budget(rounds=9, fewest_rounds=2, seconds=0.0, flush_bytes=64))
    assert timer.rounds({"a": lambda: None}) == {"a": [0.002] * 2}
    assert timer.rounds({}) == {}


def test_eager_steps_are_in_flight_together(cuda):
    timer = make_timer()
    flights = timer.in_flight({name: lambda n=name: cuda.log.append(n) for name in "ab"})
    assert set(flights) == {"a", "b"}
    for flight in flights.values():
        assert len(flight.wall) == len(flight.host) == 2
        assert all(host <= wall for wall, host in zip(*flight, strict=True))
    # Two calls of each to choose how many make a sample; then samples in turns, none waited for.
    samples = "".join(cuda.log).split("wait")
    assert samples == ["", "aa", "", "bb", "", "aa", "", "bb", "", "aa", "", "bb", ""]


def test_the_copy_counts_what_is_read_and_written(cuda):
    speeds = make_timer().copy_speeds(torch.bfloat16)
    assert speeds == [pytest.approx(2 * 64 / 0.002)] * 3


def test_a_device_that_is_lost_is_told_apart(cuda, monkeypatch):
    def broken(device=None):
        raise RuntimeError("an illegal memory access was encountered")

    timer = make_timer()
    timer.wait()
    monkeypatch.setattr(cuda, "synchronize", broken, raising=False)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        timer.wait()


def test_a_deadline():
    now = [100.0]
    deadline = Deadline(10.0, lambda: now[0])
    half = deadline.part(0.5)
    assert (deadline.left, half.left, half.passed) == (10.0, 5.0, False)
    now[0] = 106.0
    assert half.passed
    assert not deadline.passed
    now[0] = 111.0
    assert deadline.passed
    assert deadline.left == -1.0
