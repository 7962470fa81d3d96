"""A case's records: who is timed, what is kept, and what happens to one that raises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from normally.bench.batch_norm import BatchNorm
from normally.bench.gpu import accuracy, session
from normally.bench.gpu.library import Library
from normally.bench.gpu.results import GpuResults
from normally.bench.gpu.session import Session
from normally.bench.gpu.steps import make_grads, make_inputs, make_step
from normally.bench.gpu.timing import DeviceLostError
from normally.bench.main import OPERATORS
from normally.bench.operator import Case
from normally.bench.shapes import Shape

from .gpu_helpers import DEVICE, GPU_MACHINE, FakeTimer

CPU = torch.device("cpu")
IMAGE = Shape("2", "batch_norm", (2, 4, 3, 3), "relu", residual=True)
ROWS = Shape("11a", "add_rms_norm", (4, 8), residual=True)


class Other(Library):
    """torch's layers again; no backward of rows."""

    name = "other"

    def __init__(self, fails=False):
        self.fails = fails

    def has(self, operator, case):
        return operator.name == "batch_norm" or case.mode == "forward"

    def build(self, operator, case):
        if self.fails:
            raise RuntimeError("out of order " + "!" * 1000)
        return operator.theirs(case)


def measure(shape=IMAGE, libraries=(), timer=None, operator=None, dtype="float32"):
    results = GpuResults(GPU_MACHINE, {}, "2026-11-21T00:00:00+00:00")
    timer = timer or FakeTimer()
    run = Session(results, timer, DEVICE, libraries)
    run.measure_copy([dtype])
    operator = operator or OPERATORS[shape.operator]
    case = Case(shape, "contiguous", dtype, True, threads=0)
    run.measure(operator, case)
    return results, timer, run, (operator, case)


def test_every_mode_has_a_record():
    results, timer, _, _ = measure()
    forward, backward, both = results.records
    assert [r.mode for r in results.records] == ["forward", "backward", "forward_backward"]
    assert timer.calls == [
        ("normally", "torch", "copy"), ("normally", "torch"), ("normally", "torch"),
    ]  # fmt: skip
    for record in results.records:
        assert set(record.timings) == {"normally", "torch"}
        assert record.speedup["torch"].median == pytest.approx(2.0)
        assert record.rounds == 3
        assert list(record.timings["normally"].error) == ["1", "1e+03", "1e+05"]
    assert forward.copy_seconds.median == pytest.approx(3e-3)
    assert both.copy_seconds is None
    assert backward.eager == backward.host == {}
    assert both.eager_speedup("torch") == pytest.approx(2.0)
    assert both.eager_speedup("other") is None
    assert both.timings["torch"].saved_bytes > 0
    assert forward.timings["torch"].saved_bytes is None
    assert both.floor_bytes == forward.floor_bytes + backward.floor_bytes


def test_two_outputs_get_a_gradient_each():
    results, *_ = measure(ROWS)
    assert not any(record.failed for record in results.records)


def test_a_library_is_timed_in_the_modes_that_it_has():
    results, *_ = measure(ROWS, [Other()])
    assert [set(record.timings) for record in results.records] == [
        {"normally", "torch", "other"}, {"normally", "torch"}, {"normally", "torch"},
    ]  # fmt: skip
    results, *_ = measure(IMAGE, [Other()])
    assert all(record.speedup["other"].median == 3.0 for record in results.records)


def test_one_that_raises_is_reported_and_spoils_nothing():
    results, *_ = measure(IMAGE, [Other(fails=True)])
    for record in results.records:
        assert record.failed["other"].startswith("RuntimeError: out of order !!!")
        assert len(record.failed["other"]) < 320
        assert set(record.timings) == {"normally", "torch"}


def test_a_case_without_ours_has_times_but_no_speed_up():
    class Faulty(BatchNorm):
        def ours(self, case):
            return nn.BatchNorm2d(3)

    results, *_ = measure(operator=Faulty())
    for record in results.records:
        assert set(record.timings) == {"torch"}
        assert record.speedup == {}
        assert "normally" in record.failed


def test_a_broken_device_ends_the_session():
    with pytest.raises(DeviceLostError):
        measure(timer=FakeTimer(lost=True))


def test_what_is_compiled_enters_into_the_records(monkeypatch):
    results, timer, run, entry = measure()
    monkeypatch.setattr(session, "compiled", lambda module: module)
    before = list(results.records)
    run.measure_compiled(*entry)
    assert timer.calls[3:] == [
        ("normally", "torch.compile", "copy"), *[("normally", "torch.compile")] * 2,
    ]  # fmt: skip
    for record, old in zip(results.records, before, strict=True):
        assert record.timings["normally"] == old.timings["normally"]
        assert record.timings["torch"] == old.timings["torch"]
        assert record.speedup["torch.compile"].median == pytest.approx(2.0)
        assert ("torch.compile" in record.eager) == (record.mode != "backward")
        assert record.copy_seconds == old.copy_seconds


def test_a_compilation_that_fails_is_reported(monkeypatch):
    def fails(module):
        raise RuntimeError("no backend")

    results, _, run, entry = measure()
    monkeypatch.setattr(session, "compiled", fails)
    run.measure_compiled(*entry)
    assert all(r.failed == {"torch.compile": "RuntimeError: no backend"} for r in results.records)


def test_a_backward_can_be_repeated():
    operator, case = OPERATORS["batch_norm"], Case(IMAGE, "contiguous", "float32", True)
    inputs = [tensor.requires_grad_() for tensor in make_inputs(case, CPU)]
    grads = make_grads(operator, case, CPU)
    for build in (operator.ours, operator.theirs):
        module = build(case)
        backward = make_step(module, inputs, "backward", grads)
        both = make_step(module, inputs, "forward_backward", grads)
        for first, again, whole in zip(backward(), backward(), both(), strict=True):
            assert torch.equal(first, again)
            torch.testing.assert_close(first, whole)


def test_inputs_have_the_cases_dtype_layout_and_mean():
    case = Case(IMAGE, "channels_last", "bfloat16", True)
    x, residual = make_inputs(case, CPU, mean=1e3)
    assert x.dtype is residual.dtype is torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert abs(x.float().mean() - 1e3) < 10
    assert abs(residual.float().mean()) < 1
    assert torch.equal(x, make_inputs(case, CPU, mean=1e3)[0])


def find_errors(builds, dtype="float32"):
    case = Case(IMAGE, "contiguous", dtype, True)
    return accuracy.errors(OPERATORS["batch_norm"], case, builds, CPU, 1 << 20)


def test_errors_are_those_of_a_training_forward():
    case = Case(IMAGE, "contiguous", "float32", True)
    operator = OPERATORS["batch_norm"]

    class Broken(nn.Module):
        def forward(self, *inputs):
            return inputs[0] * math.nan

    def fails():
        raise RuntimeError

    found = find_errors({"ours": lambda: operator.ours(case), "broken": Broken, "fails": fails})
    assert "fails" not in found
    assert set(found["broken"].values()) == {math.inf}
    # Promise 1: at most 1e-6 at unit scale for any mean; sums with the residual reach 4.
    assert all(error <= 4e-6 for error in found["ours"].values())


def test_inputs_that_a_dtype_cannot_hold_have_no_error():
    operator, case = OPERATORS["batch_norm"], Case(IMAGE, "contiguous", "float16", True)
    found = find_errors({"torch": lambda: operator.theirs(case)}, "float16")
    assert found["torch"]["1e+05"] is None  # float16 ends at 65504
    assert found["torch"]["1e+03"] is not None
