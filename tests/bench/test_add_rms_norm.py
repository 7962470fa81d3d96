"""The sum and its RMS norm: two outputs, and a gradient for each."""

from __future__ import annotations

import math

import torch
from torch import nn

from normally.bench.accuracy import errors, make_inputs
from normally.bench.add_rms_norm import AddRMSNorm, TorchAddNorm
from normally.bench.measure import make_step
from normally.bench.operator import Case
from normally.bench.shapes import Shape, select

from .helpers import check_same_function, floors

OPERATOR = AddRMSNorm()
SHAPE = Shape("11a", "add_rms_norm", (9, 33), residual=True)
CASE = Case(SHAPE, "contiguous", "float32", True)


def test_ours_theirs_and_the_exact_result_are_the_same_function():
    check_same_function(OPERATOR, SHAPE, tolerance=2e-5)


def test_there_is_one_variant():
    (group,) = OPERATOR.groups([SHAPE], ["float32"], ["contiguous"])
    assert group == [CASE]
    assert CASE.has_residual


def test_both_gradients_reach_both_inputs():
    x, residual = (t.requires_grad_() for t in make_inputs(CASE, torch.Generator().manual_seed(0)))
    zero, one = torch.zeros(SHAPE.size), torch.ones(SHAPE.size)
    for build in (OPERATOR.ours, OPERATOR.theirs):
        module = build(CASE)
        for grads in ([zero, one], [one, zero]):
            dx, dresidual, dweight = make_step(module, [x, residual], "forward_backward", grads)()
            assert torch.equal(dx, dresidual)
            assert dx.abs().max() > 0
            # The sum alone passes its gradient through and gives the weight none.
            assert (dweight.abs().max() == 0) == (grads[0] is zero)


def test_an_error_of_either_output_shows():
    class Off(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.right, self.first, self.second = OPERATOR.theirs(CASE), first, second

        def forward(self, input, residual):
            output, total = self.right(input, residual)
            return output + self.first, total + self.second

    builds = {
        "right": OPERATOR.theirs,
        "norm": lambda _: Off(1.0, 0.0),
        "sum": lambda _: Off(0.0, 1.0),
        "none": lambda _: Off(0.0, math.nan),
    }
    found = {name: e["1"] for name, e in errors(OPERATOR, CASE, builds, 1 << 20).items()}
    assert found["right"] < 1e-6
    assert abs(found["norm"] - 1) < 1e-5
    assert abs(found["sum"] - 1) < 1e-5
    assert found["none"] == math.inf


def test_theirs_is_a_sum_and_torchs_layer():
    module = OPERATOR.theirs(CASE)
    assert isinstance(module, TorchAddNorm)
    assert type(module.norm) is nn.RMSNorm


def test_floor():
    # x, residual, sum and output; sum, two gradients and one for both inputs.
    expected = {"forward": 4, "forward_backward": 4 + 4, "evaluation": 4}
    for shape in select("add_rms_norm"):
        assert floors(OPERATOR, shape.label, "float32", 32 << 10) == expected
