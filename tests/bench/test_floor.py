"""Tensors that must move, counted by hand; each operator's own floor is beside the operator."""

from __future__ import annotations

import pytest

from normally.bench.floor import BACKWARD, FORWARD, bytes_of, sweeps
from normally.bench.operator import Case
from normally.bench.shapes import Shape

# 2·3·5 values; a sample of 15 is normalized together: 60 bytes in float32.
SHAPE = Shape("10a", "layer_norm", (2, 3, 5))


def test_sweeps():
    assert [sweeps(FORWARD, fits) for fits in (True, False)] == [2, 3]
    assert [sweeps(BACKWARD, fits) for fits in (True, False)] == [3, 5]


@pytest.mark.parametrize(
    ("mode", "cache", "tensors"),
    [
        ("forward", 60, 2),
        ("forward", 59, 3),
        ("evaluation", 60, 2),
        ("evaluation", 59, 3),
        ("forward_backward", 60, 5),
        ("forward_backward", 59, 8),
    ],
)
def test_bytes(mode, cache, tensors):
    case = Case(SHAPE, "contiguous", "float32", True, mode)
    assert bytes_of(case, 15, cache) == tensors * 30 * 4


def test_half_the_bytes_fit_half_the_cache():
    case = Case(SHAPE, "contiguous", "bfloat16", True)
    assert bytes_of(case, 15, 30) == 2 * 30 * 2
