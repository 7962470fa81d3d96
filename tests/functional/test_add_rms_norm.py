"""`add_rms_norm`: the sum, its norm, and what comes back through both."""

from __future__ import annotations

import itertools

import pytest
import torch

from normally.reference import CASTINGS
from tests.device.functional import add_rms_norm, rms_norm
from tests.helpers import (
    BOTH_HALVES,
    DTYPES,
    assert_same_bits,
    half_of,
    lay_out,
    layouts_of,
    spread,
    values,
)
from tests.norm_helpers import check_norm, parameter_dtype, ramp

SHAPES = [(3, 1), (5, 17), (4, 64), (2, 513), (1, 4097), (3, 5, 33), (2, 3, 4, 5), (2, 2, 3, 2, 7)]


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_every_layout(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    """Each layout of the input beside another one of the residual."""
    weight = ramp(shape[-1:], -1.5, 1.6, parameter_dtype(dtype))
    layouts = layouts_of(len(shape))
    for index, layout in half_of(half, layouts, start=SHAPES.index(shape)):
        check_norm(
            "rms_norm",
            lay_out(values(shape, dtype, seed=index), layout),
            weight if index % 3 else None,
            None,
            lay_out(values(shape, dtype, seed=1), layouts[index % len(layouts)]),
            gradient=("contiguous", "expanded batch", layout)[index % 3],
            casting=CASTINGS[index % 3],
            zero_centered_weight=index % 2 == 0,
        )


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_a_sum_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The sum has the promoted dtype, as in torch, and so has its norm."""
    x, residual = values((3, 5, 17), dtypes[0]), values((3, 5, 17), dtypes[1], seed=1)
    check_norm("rms_norm", x, None, None, residual)


@pytest.mark.parametrize("shape", [(1, 5, 17), (17,), (3, 1, 17), (3, 5, 1), (1,), ()], ids=str)
def test_a_residual_that_is_broadcast(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        check_norm("rms_norm", values((3, 5, 17), dtype), None, None, torch.randn(shape).to(dtype))


def test_the_parts_are_those_of_torch() -> None:
    """The sum is torch's bit for bit, rounded to its dtype, and the output rms_norm's of it."""
    for dtype, casting in itertools.product(DTYPES, CASTINGS):
        x, residual = values((6, 4, 33), dtype), values((6, 4, 33), dtype, seed=1)
        weight = torch.randn(33, dtype=dtype)
        y, total = add_rms_norm(x, residual, (33,), weight, 1e-6, casting=casting)
        assert_same_bits(total, x + residual)
        assert_same_bits(y, rms_norm(x + residual, (33,), weight, 1e-6, casting=casting))


@pytest.mark.parametrize("used", ["output", "sum"])
def test_only_one_of_the_two_is_used(used: str) -> None:
    x, residual = values((4, 17), torch.float64), values((4, 17), torch.float64, seed=1)
    results = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        if fused:
            y, total = add_rms_norm(*leaves, (17,))
        else:
            total = leaves[0] + leaves[1]
            y = rms_norm(total, (17,))
        (y.sin() if used == "output" else total.sin()).sum().backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results)


def test_a_stack_of_blocks() -> None:
    """The sum of one block is the residual of the next, as in a transformer."""
    hidden = values((2, 5, 16), torch.float64)
    results = []
    for fused in (True, False):
        leaf, stream = hidden.clone().requires_grad_(), hidden.flip(0)
        branch = leaf
        for _ in range(4):
            if fused:
                y, stream = add_rms_norm(branch, stream, (16,))
            else:
                stream = branch + stream
                y = rms_norm(stream, (16,))
            branch = y.sin()
        (gradient,) = torch.autograd.grad((branch + stream).square().sum(), leaf)
        results.append(gradient)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    x = torch.empty(shape, requires_grad=True)
    y, total = add_rms_norm(x, torch.empty(shape), shape[1:])
    assert y.shape == total.shape == shape
    (y.sum() + total.sum()).backward()
    assert x.grad is not None
    assert x.grad.shape == shape
