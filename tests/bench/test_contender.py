"""Another library's contender: after the rounds, by itself, over our median."""

from __future__ import annotations

import pytest
import torch

from normally.bench import session as sessions
from normally.bench.batch_norm import BatchNorm
from normally.bench.contender import Contender
from normally.bench.operator import Case
from normally.bench.session import Session
from normally.bench.shapes import Shape

from .helpers import TINY, make_results

SHAPE = Shape("1", "batch_norm", (2, 4, 3, 3), "relu")


class Other(Contender):
    """torch's layers again, for the contiguous cases that are no evaluation."""

    name = "other"

    def __init__(self, fails=False):
        self.fails = fails

    def describe(self):
        return "other 1.0"

    def has(self, operator, case):
        return case.layout == "contiguous" and case.mode != "evaluation"

    def build(self, operator, case):
        if self.fails:
            raise RuntimeError("out of order")
        return operator.theirs(case)

    def make_step(self, module, inputs, mode, grads):
        return lambda: module(*inputs)


def measure(monkeypatch, other, layout="contiguous"):
    calls = []

    def interleave(steps, budget):
        calls.append((tuple(steps), budget.seconds))
        times = {"normally": [1.0, 2.0, 9.0], "torch": [2.0, 2.0, 9.0], "other": [4.0, 6.0]}
        return {name: times[name] for name in steps}

    monkeypatch.setattr(sessions, "interleave", interleave)
    results = make_results([])
    session = Session(results, TINY, [torch.get_num_threads()], others=[other])
    session.measure(BatchNorm(), [Case(SHAPE, layout, "float32", True)], lambda _: None)
    return results, calls


def test_it_is_timed_after_the_rounds_and_by_itself(monkeypatch):
    results, calls = measure(monkeypatch, Other())
    pair, alone = (("normally", "torch"), TINY.seconds), (("other",), TINY.seconds / 2)
    assert calls == [pair, alone, pair, alone, pair]
    forward, both, evaluation = results.records
    assert "other" not in evaluation.timings
    for record in (forward, both):
        assert record.rounds == 3
        # 4 and 6 over the median of ours, 2; torch's is the median of 2, 1 and 1.
        assert record.speedup["other"].median == pytest.approx(2.5)
        assert record.speedup["torch"].median == pytest.approx(1.0)
        assert record.timings["other"].error == record.timings["torch"].error
        assert record.timings["other"].saved_bytes is None
    assert results.compared == ["torch", "other"]


def test_cases_that_it_does_not_have_are_absent(monkeypatch):
    results, _ = measure(monkeypatch, Other(), layout="channels_last")
    assert all(list(record.timings) == ["normally", "torch"] for record in results.records)
    assert results.compared == ["torch"]


def test_what_raises_is_reported_and_spoils_nothing(monkeypatch):
    results, _ = measure(monkeypatch, Other(fails=True))
    assert results.records[0].failed == {"other": "RuntimeError: out of order"}
    assert list(results.records[0].timings) == ["normally", "torch"]
