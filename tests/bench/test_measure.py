"""Interleaving, statistics, and what a step is; no test here looks at a clock's result."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from normally.bench.measure import (
    Budget,
    Spread,
    calls_per_sample,
    interleave,
    make_step,
    speedup,
)


def test_contenders_take_turns():
    order: list[str] = []
    steps = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    budget = Budget("tiny", rounds=4, settle=0.0, seconds=60.0, sample=0.0)
    times = interleave(steps, budget)
    assert order[2:] == ["a", "b"] * 4  # after one call each to choose the calls a sample
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4}


def test_the_slowest_case_still_has_its_fewest_rounds():
    budget = Budget("tiny", rounds=100, settle=0.0, seconds=0.0, fewest_rounds=3, sample=0.0)
    assert len(interleave({"a": lambda: None}, budget)["a"]) == 3


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled):
    seen = []
    budget = Budget("tiny", rounds=1, settle=0.0, seconds=0.0, fewest_rounds=1, sample=0.0)
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        interleave({"a": lambda: seen.append(gc.isenabled())}, budget)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen[-1] is False


def test_short_steps_are_repeated_within_a_sample():
    calls = calls_per_sample(lambda: None, least=1e-4)
    assert calls > 1
    assert calls & (calls - 1) == 0


def test_speedup_is_the_median_of_the_ratios():
    # The ratio of the medians would be 2/2 = 1.
    ratio = speedup([1.0, 2.0, 4.0], [2.0, 8.0, 1.0])
    assert ratio.median == 2.0
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_training_step_leaves_no_gradients():
    module = nn.BatchNorm1d(3)
    x = torch.randn(4, 3, requires_grad=True)
    step = make_step(module, [x], "forward_backward", [torch.ones(4, 3)])
    gradients = step()
    assert [g.shape for g in gradients] == [(4, 3), (3,), (3,)]
    assert x.grad is None
    assert module.weight.grad is None


def test_outputs_are_fresh():
    step = make_step(nn.ReLU(), [torch.randn(1000)], "forward", [torch.ones(1000)])
    first, second = step(), step()
    assert first.data_ptr() != second.data_ptr()
