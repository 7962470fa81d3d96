"""Instance norm's part of the benchmark: its modules agree, and its floors are counted by hand."""

from __future__ import annotations

from torch import nn

from normally.bench.instance_norm import InstanceNorm
from normally.bench.operator import Case
from normally.bench.shapes import Shape, select

from .helpers import check_same_function, floors

OPERATOR = InstanceNorm()


def test_ours_theirs_and_the_exact_result_are_the_same_function():
    shape = Shape("7b", "instance_norm", (2, 5, 3, 4, 6))
    check_same_function(OPERATOR, shape, tolerance=2e-5)


def test_parameters_are_there():
    (shape,) = select("instance_norm")
    for module in (
        OPERATOR.ours(Case(shape, "contiguous", "bfloat16", True)),
        OPERATOR.theirs(Case(shape, "contiguous", "bfloat16", True)),
    ):
        assert isinstance(module, nn.InstanceNorm3d)
        assert [p.shape for p in module.parameters()] == [(32,), (32,)]


def test_floor():
    # One channel of one sample has 64³ values: 1 MiB in float32.
    fits = {"forward": 2, "forward_backward": 5, "evaluation": 2}
    too_large = {"forward": 3, "forward_backward": 8, "evaluation": 3}
    assert floors(OPERATOR, "7b", "float32", 1 << 20) == fits
    assert floors(OPERATOR, "7b", "float32", (1 << 20) - 1) == too_large
    assert floors(OPERATOR, "7b", "bfloat16", 1 << 19) == fits


def test_targets_count_both_layouts():
    assert [(t.dtype, OPERATOR.count(t)) for t in OPERATOR.targets] == [
        ("float32", 2),
        ("bfloat16", 2),
    ]
