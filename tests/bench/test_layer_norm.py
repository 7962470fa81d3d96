"""Layer norm's part of the benchmark: its modules agree, and its floors are counted by hand."""

from __future__ import annotations

from normally.bench.layer_norm import LayerNorm
from normally.bench.shapes import Shape

from .helpers import check_same_function, floors

OPERATOR = LayerNorm()


def test_ours_theirs_and_the_exact_result_are_the_same_function():
    check_same_function(OPERATOR, Shape("10a", "layer_norm", (9, 33)), tolerance=2e-5)


def test_floor():
    expected = {"forward": 2, "forward_backward": 5, "evaluation": 2}
    for label in ("10a", "10b", "12b"):
        for dtype in ("float32", "bfloat16"):
            assert floors(OPERATOR, label, dtype, 32 << 10) == expected


def test_targets_are_with_and_without_the_single_row():
    counts = {(t.dtype, t.numbers): OPERATOR.count(t) for t in OPERATOR.targets}
    assert counts == {
        ("float32", (10, 12)): 3,
        ("float32", (10,)): 2,
        ("bfloat16", (10, 12)): 3,
        ("bfloat16", (10,)): 2,
    }
