"""Group norm's part of the benchmark: its modules agree, and its floors are counted by hand."""

from __future__ import annotations

from normally.bench.group_norm import GroupNorm
from normally.bench.shapes import Shape

from .helpers import check_same_function, floors

OPERATOR = GroupNorm()


def test_ours_theirs_and_the_exact_result_are_the_same_function():
    shape = Shape("9a", "group_norm", (2, 12, 5, 7), "silu", options={"num_groups": 4})
    check_same_function(OPERATOR, shape, tolerance=2e-5)


def test_floor():
    # Shape 9c has groups of 4 channels of 512² values: 4 MiB in float32. The activation is free.
    fits = {"forward": 2, "forward_backward": 5, "evaluation": 2}
    too_large = {"forward": 3, "forward_backward": 8, "evaluation": 3}
    assert floors(OPERATOR, "9c", "float32", 4 << 20) == fits
    assert floors(OPERATOR, "9c", "float32", 2 << 20) == too_large
    assert floors(OPERATOR, "9c", "bfloat16", 2 << 20) == fits


def test_targets_count_three_shapes_in_both_layouts():
    assert [(t.dtype, OPERATOR.count(t)) for t in OPERATOR.targets] == [
        ("float32", 6),
        ("bfloat16", 6),
    ]
