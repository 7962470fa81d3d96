"""Saved and peak bytes where both are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normally.bench.measure import make_step
from normally.bench.memory import peak_bytes, saved_bytes


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(8, 16, 32, requires_grad=True)


ONE = 8 * 16 * 32 * 4


def test_relu_saves_its_output(x):
    assert saved_bytes(nn.ReLU(), [x]) == ONE


def test_a_sum_saves_nothing(x):
    assert saved_bytes(nn.Identity(), [x]) == 0


def test_batch_norm_saves_input_and_two_statistics(x):
    assert saved_bytes(nn.BatchNorm1d(16), [x]) == ONE + 2 * 16 * 4


def test_a_storage_counts_once_and_whole(x):
    class Square(nn.Module):
        def forward(self, input):
            return input[:4] * input[4:]

    assert saved_bytes(Square(), [x]) == ONE


def test_parameters_do_not_count(x):
    # A linear layer's backward needs the input and the weight.
    assert saved_bytes(nn.Linear(32, 5), [x]) == ONE


def test_peak_of_relu(x):
    if not torch.profiler.kineto_available():
        pytest.skip("this torch has no profiler")
    forward = make_step(nn.ReLU(), [x], "forward", [torch.ones_like(x)])
    assert peak_bytes(forward) == ONE
    # The output lives until its gradient exists.
    both = make_step(nn.ReLU(), [x], "forward_backward", [torch.ones_like(x)])
    assert peak_bytes(both) == 2 * ONE
