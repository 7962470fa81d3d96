"""`update_running_stats_`: one in-place update, checked by opcheck and by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from normally._ops import running_stats
from normally.functional import batch_norm
from tests.helpers import DTYPES, needs_kernels

OP = torch.ops.normally.update_running_stats_.default


def arguments(
    dtype: torch.dtype = torch.float32, momentum: float | None = 0.1, unbiased: bool = True,
    counted: bool = True, skipping: bool = True,
) -> list[Any]:  # fmt: skip
    return [
        torch.tensor([0.5, -1.0, 2.0], dtype=dtype), torch.tensor([1.0, 2.0, 0.5], dtype=dtype),
        torch.tensor(4) if counted else None,
        torch.tensor([0, 1, 2]) if skipping else None,
        torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [10.0, 10.0, 10.0]], dtype=torch.float64),
        momentum, unbiased,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_opcheck(momentum: float | None, dtype: torch.dtype) -> None:
    for unbiased, skipping in itertools.product((True, False), repeat=2):
        given = arguments(dtype, momentum, unbiased, True, skipping)
        torch.library.opcheck(OP, tuple(given))


@pytest.mark.parametrize("missing", [0, 1])
def test_one_buffer_alone(missing: int) -> None:
    given = arguments()
    given[missing] = None
    OP(*given)
    kept = given[1 - missing]
    wanted = {0: [1.0 * 0.9 + 4 / 9, 2 * 0.9 + 5 / 9, 0.45 + 6 / 9], 1: [0.55, -0.7, 2.1]}
    assert kept.tolist() == pytest.approx(wanted[missing], rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(dtype: torch.dtype) -> None:
    given = arguments(dtype)
    OP(*given)
    tolerance = {"rel": 2 * torch.finfo(dtype).eps}
    assert given[0].tolist() == pytest.approx([0.55, -0.7, 2.1], **tolerance)
    variance = [0.9 * v + 0.1 * b * 10 / 9 for v, b in ((1.0, 4.0), (2.0, 5.0), (0.5, 6.0))]
    assert given[1].tolist() == pytest.approx(variance, **tolerance)
    assert given[2].item() == 5
    assert given[3].tolist() == [0, 1, 2]


def test_cumulative_counts_only_what_entered() -> None:
    given = arguments(momentum=None, unbiased=False)
    OP(*given)  # the fifth batch; 0, 1 and 2 of them were refused
    assert given[0].tolist() == pytest.approx([0.5 + 0.5 / 5, -1 + 3 / 4, 2 + 1 / 3], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_a_bad_channel_is_refused_and_counted(row: int, bad: float) -> None:
    given = arguments()
    given[4][row, 1] = bad
    OP(*given)
    assert (given[0][1].item(), given[1][1].item()) == (-1.0, 2.0)
    assert given[3].tolist() == [0, 2, 2]
    assert given[0][0].item() == pytest.approx(0.55)


def test_a_channel_without_values_is_left_alone() -> None:
    given = arguments()
    given[4][2, 1] = 0
    OP(*given)
    assert (given[0][1].item(), given[1][1].item()) == (-1.0, 2.0)
    assert given[2].item() == 5
    assert given[3].tolist() == [0, 1, 2]


def test_a_batch_without_values_changes_nothing() -> None:
    given, before = arguments(), arguments()
    given[4][2] = 0
    OP(*given)
    for new, old in zip(given[:4], before[:4], strict=True):
        assert torch.equal(new, old)


def test_a_variance_beyond_the_buffer_is_refused() -> None:
    given = arguments(torch.float16)
    given[4][1, 0] = 1e6
    OP(*given)
    assert given[1][0].item() == 1.0
    assert given[3].tolist() == [1, 1, 2]


def test_buffers_of_any_stride() -> None:
    given, plain = arguments(), arguments()
    base = torch.zeros(3, 2)
    base[:, 0] = given[0]
    given[0] = base[:, 0]
    OP(*given)
    OP(*plain)
    assert torch.equal(given[0], plain[0])
    assert not base[:, 1].any()


def test_versions_move_so_that_autograd_hears_of_it() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    batch_norm(torch.randn(4, 3), mean, var, training=True)
    assert mean._version > 0
    assert var._version > 0


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_kernel_equals_fallback(momentum: float | None, dtype: torch.dtype) -> None:
    for unbiased, counted, skipping in itertools.product((True, False), repeat=3):
        if momentum is None and not counted:
            continue
        ours = arguments(dtype, momentum, unbiased, counted, skipping)
        plain = arguments(dtype, momentum, unbiased, counted, skipping)
        ours[4][0, 2] = plain[4][0, 2] = math.nan
        OP(*ours)
        running_stats._update_fallback(*plain)
        for a, b in zip(ours[:4], plain[:4], strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=0)
