"""RMS norm's part of the benchmark: its modules agree, and its floors are counted by hand."""

from __future__ import annotations

import torch

from normally.bench.accuracy import errors
from normally.bench.operator import Case
from normally.bench.rms_norm import RMSNorm
from normally.bench.shapes import Shape, select

from .helpers import check_same_function, floors

OPERATOR = RMSNorm()


def test_ours_theirs_and_the_exact_result_are_the_same_function():
    check_same_function(OPERATOR, Shape("11a", "rms_norm", (9, 33)), tolerance=2e-5)


def test_the_exact_result_has_the_eps_of_the_inputs_dtype():
    # Of inputs of 1e-4 the squares are 1e-8: eps, 1.2e-7 in float32, decides the result.
    case = Case(Shape("11a", "rms_norm", (2, 8)), "contiguous", "float32", True)
    module = OPERATOR.theirs(case)
    x = torch.full((2, 8), 1e-4)
    exact = OPERATOR.exact(module, [x])
    torch.testing.assert_close(module(x), exact.float())
    assert exact.max() < 0.3


def test_the_weight_has_the_inputs_dtype():
    (shape,) = select("rms_norm", ["11c"])
    for dtype, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        case = Case(shape, "contiguous", dtype, True)
        assert OPERATOR.ours(case).weight.dtype is expected
        assert OPERATOR.theirs(case).weight.dtype is expected


def test_ours_has_no_error_beyond_rounding():
    case = Case(Shape("11a", "rms_norm", (64, 256)), "contiguous", "float32", True)
    found = errors(OPERATOR, case, {"ours": OPERATOR.ours}, 1 << 20)["ours"]
    # Promise 1: at most 1e-6 at unit scale for any mean.
    assert all(error <= 1e-6 for error in found.values()), found


def test_floor():
    expected = {"forward": 2, "forward_backward": 5, "evaluation": 2}
    for label in ("11a", "11b", "11c", "11d"):
        assert floors(OPERATOR, label, "float32", 32 << 10) == expected


def test_targets_count_four_shapes():
    assert [(t.dtype, OPERATOR.count(t)) for t in OPERATOR.targets] == [
        ("float32", 4),
        ("bfloat16", 4),
    ]
