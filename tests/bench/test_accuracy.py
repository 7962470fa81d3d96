"""The error column: it sees an error, and it does not invent one."""

from __future__ import annotations

import math

import torch
from torch import nn

from normally.bench.accuracy import RATIOS, errors, make_inputs, sample_size
from normally.bench.batch_norm import BatchNorm
from normally.bench.operator import Case
from normally.bench.shapes import Shape

SHAPE = Shape("1", "batch_norm", (4, 8, 6, 6), "relu")
KEYS = ["1", "1e+03", "1e+05"]


class Naive(nn.BatchNorm2d):
    """E[x²] - E[x]², which cancels."""

    def forward(self, input):
        mean = input.mean((0, 2, 3), keepdim=True)
        var = input.square().mean((0, 2, 3), keepdim=True) - mean.square()
        return (input - mean) / (var.abs() + self.eps).sqrt()


def test_the_error_of_a_cancelling_formula_shows():
    case = Case(SHAPE, "contiguous", "float32", fused=False)
    naive = errors(BatchNorm(), case, {"naive": lambda _: Naive(8)}, 1 << 20)["naive"]
    assert list(naive) == KEYS
    assert naive["1"] < 1e-5
    assert naive["1e+05"] > 0.1


def test_ours_has_no_error_beyond_rounding():
    for layout in ("contiguous", "channels_last"):
        for mode in ("forward", "evaluation"):
            case = Case(SHAPE, layout, "float32", fused=True, mode=mode)
            found = errors(BatchNorm(), case, {"ours": BatchNorm().ours}, 1 << 20)["ours"]
            # Promise 1: at most 1e-6 at unit scale for any mean.
            assert all(error <= 1e-6 for error in found.values()), (layout, mode, found)


def test_inputs_that_a_dtype_cannot_hold_give_no_number():
    case = Case(SHAPE, "contiguous", "float16", fused=False)
    found = errors(BatchNorm(), case, {"ours": BatchNorm().ours}, 1 << 20)["ours"]
    assert found["1e+05"] is None  # float16 ends at 65504
    assert found["1e+03"] is not None


def test_a_result_that_is_not_finite_is_an_infinite_error():
    class Broken(nn.BatchNorm2d):
        def forward(self, input):
            return input * float("nan")

    case = Case(SHAPE, "contiguous", "float32", fused=False)
    builds = {"ours": BatchNorm().ours, "broken": lambda _: Broken(8)}
    found = errors(BatchNorm(), case, builds, 1 << 20)
    assert set(found["broken"].values()) == {math.inf}
    assert max(found["ours"].values()) < 1e-5


def test_inputs_have_the_layout_the_dtype_and_the_mean():
    shape = Shape("2", "batch_norm", (4, 8, 6, 6), "relu", residual=True)
    case = Case(shape, "channels_last", "bfloat16", fused=True)
    x, residual = make_inputs(case, torch.Generator().manual_seed(0), mean=RATIOS[1])
    assert x.dtype == residual.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert abs(x.float().mean().item() - 1e3) < 1
    assert abs(residual.float().mean().item()) < 0.2


def test_a_sample_keeps_positions_and_some_channels():
    assert sample_size((2, 64, 512, 512), 1 << 20) == (1, 16, 512, 512)
    assert sample_size((125000, 50), 1 << 19) == (10485, 50)
    assert sample_size((1, 768), 1 << 20) == (1, 768)
    # GroupNorm's 32 groups need their 32 channels.
    assert sample_size((1, 128, 512, 512), 1 << 20, 32) == (1, 32, 512, 512)
