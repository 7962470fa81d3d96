"""`add_layer_norm`: the sum, its norm, and what comes back through both."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.device.functional import add_layer_norm, layer_norm
from tests.helpers import (
    ACTS,
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
    wide = parameter_dtype(dtype)
    weight, bias = ramp(shape[-1:], -1.5, 1.6, wide), ramp(shape[-1:], 0.7, -0.9, wide)
    layouts = layouts_of(len(shape))
    for index, layout in half_of(half, layouts, start=SHAPES.index(shape)):
        check_norm(
            "layer_norm",
            lay_out(values(shape, dtype, seed=index), layout),
            weight if index % 3 else None,
            bias if index % 5 else None,
            lay_out(values(shape, dtype, seed=1), layouts[index % len(layouts)]),
            act=ACTS[index % len(ACTS)],
            gradient=("contiguous", "expanded batch", layout)[index % 3],
        )


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_a_sum_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The sum has the promoted dtype, as in torch, and so has its norm."""
    x, residual = values((3, 5, 17), dtypes[0]), values((3, 5, 17), dtypes[1], seed=1)
    check_norm("layer_norm", x, None, None, residual)


@pytest.mark.parametrize("shape", [(1, 5, 17), (17,), (3, 1, 17), (3, 5, 1), (1,), ()], ids=str)
def test_a_residual_that_is_broadcast(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        residual = torch.randn(shape).to(dtype)
        check_norm("layer_norm", values((3, 5, 17), dtype), None, None, residual, act="gelu")


def test_the_parts_are_those_of_torch() -> None:
    """The sum is torch's bit for bit, and the output layer_norm's of it."""
    for dtype in DTYPES:
        x, residual = values((6, 4, 33), dtype), values((6, 4, 33), dtype, seed=1)
        y, total = add_layer_norm(x, residual, (33,), act="silu")
        assert_same_bits(total, x + residual)
        assert_same_bits(y, layer_norm(x + residual, (33,), act="silu"))


@pytest.mark.parametrize("used", ["output", "sum"])
def test_only_one_of_the_two_is_used(used: str) -> None:
    x, residual = values((4, 17), torch.float64), values((4, 17), torch.float64, seed=1)
    results = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        if fused:
            y, total = add_layer_norm(*leaves, (17,))
        else:
            total = leaves[0] + leaves[1]
            y = layer_norm(total, (17,))
        (y if used == "output" else total).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results)


def test_the_same_tensor_twice() -> None:
    x = values((4, 17), torch.float64).requires_grad_()
    y, total = add_layer_norm(x, x, (17,))
    (gradient,) = torch.autograd.grad([y, total], x, [torch.ones_like(y), torch.ones_like(y)])
    # The output does not change with a common factor of the input but by eps; its sum is 0.
    torch.testing.assert_close(gradient, torch.full_like(x, 2.0), rtol=1e-12, atol=1e-12)


def test_only_what_needs_a_gradient_gets_one() -> None:
    tensors = (values((4, 17), torch.float32), values((4, 17), torch.float32, seed=1))
    for needed in ((True, False), (False, True)):
        x, residual = (t.clone().requires_grad_(n) for t, n in zip(tensors, needed, strict=True))
        y, total = add_layer_norm(x, residual, (17,))
        (y * total).sum().backward()
        assert (x.grad is not None, residual.grad is not None) == needed


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    x = torch.empty(shape, requires_grad=True)
    y, total = add_layer_norm(x, torch.empty(shape), shape[1:])
    assert y.shape == total.shape == shape
    (y.sum() + total.sum()).backward()
    assert x.grad is not None
    assert x.grad.shape == shape
