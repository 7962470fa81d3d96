"""Promise 2 for the norms without running statistics: a constant becomes exactly the bias.

RMS norm has no bias and subtracts nothing: a constant c becomes c/√(c² + eps)·weight there.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests import norms
from tests.device import functional
from tests.helpers import DTYPES, arithmetic, lay_out
from tests.norms import Norm, Shape

CONSTANTS = (0.1, 0.3, 1.0, 3.14159, 1e3, 65503.9, 1e7, 1.7e9, 1e15, 1e22, 1e30)
LAYOUTS = ("contiguous", "channels_last", "strided")


def constants_of(dtype: torch.dtype) -> list[float]:
    return [sign * c for c in CONSTANTS for sign in (1, -1) if c <= torch.finfo(dtype).max]


def bias_like(norm: Norm, bias: Tensor, shape: Shape) -> Tensor:
    """The bias where the norm adds it."""
    if norm.num_dims is None:
        bias = bias.view(1, -1, *(1,) * (len(shape) - 2))
    return bias.expand(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("norm", "shape"), norms.cases(norms.CENTRED))
def test_constant_groups(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    weight, bias = norm.parameters(shape, dtype)
    assert weight is not None
    assert bias is not None
    expected = bias_like(norm, bias.to(dtype), shape)
    for constant, layout in itertools.product(constants_of(dtype), LAYOUTS):
        x = lay_out(torch.full(shape, constant, dtype=dtype), layout)
        y = norm.ours(x, None, None)
        assert torch.count_nonzero(y) == 0, (constant, layout)
        y = norm.ours(x, None, bias)
        assert torch.equal(y, expected), (constant, layout)
        y = norm.ours(x, weight * 1e3, bias, act="relu")
        assert torch.equal(y, expected.relu()), (constant, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("norm", "shape"), norms.cases(norms.CENTRED))
def test_constant_where_it_is_kept(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    _, bias = norm.parameters(shape, dtype)
    assert bias is not None
    mask = norm.mask(shape)
    expected = torch.where(mask, bias_like(norm, bias.to(dtype), shape), 0)
    for constant, layout in itertools.product(constants_of(dtype), LAYOUTS):
        padding = torch.randn(shape).to(dtype)
        x = torch.where(mask, torch.full(shape, constant, dtype=dtype), padding)
        y = norm.ours(lay_out(x, layout), None, bias, mask=mask)
        assert torch.equal(y, expected), (constant, layout)


@pytest.mark.parametrize("norm", norms.CENTRED, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_constant_group_among_others(norm: Norm, layout: str) -> None:
    for shape in norm.shapes:
        rows = norm.rows(torch.randn(shape))
        rows[0] = 1e7 + 1
        y = norm.rows(norm.ours(lay_out(norm.from_rows(rows, shape), layout), None, None))
        assert torch.count_nonzero(y[0]) == 0, shape
        others = y[1:] if rows.shape[1] > 1 else y[:0]  # one value alone is a constant, too
        assert torch.count_nonzero(others) == others.numel(), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [norms.RMS, norms.RMS_2], ids=str)
def test_rms_norm_of_a_constant(norm: Norm, dtype: torch.dtype) -> None:
    """Six roundings in float32: the mean, the sum with eps, the root, the quotient, two products.

    Those before the root count half, so they are four half units; one more is the result's dtype's.
    """
    unit = arithmetic(dtype) if dtype is torch.float64 else 2 * torch.finfo(torch.float32).eps
    result = torch.finfo(dtype)
    for shape, constant, layout in itertools.product(norm.shapes, constants_of(dtype), LAYOUTS):
        x = lay_out(torch.full(shape, constant, dtype=dtype), layout)
        weight, _ = norm.parameters(shape, dtype)
        y, expected = norm.ours(x, weight, None), norm.formula(x.double(), weight)
        bound = (unit + result.eps / 2) * expected.abs() + result.smallest_normal * result.eps
        assert bool(((y - expected).abs() <= bound).all()), (shape, constant, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_running_variance_of_constant_instances_is_zero(layout: str) -> None:
    """The samples' own variances are averaged, and their means: not the batch's variance."""
    for constant in (0.1, 1e7, 1e15):
        x = lay_out(torch.full((4, 3, 7, 5), constant), layout)
        mean, var = torch.zeros(3), torch.ones(3)
        functional.instance_norm(x, mean, var, momentum=1.0)
        assert torch.equal(mean, x[0, :, 0, 0])
        assert torch.equal(var, torch.zeros(3))
        functional.instance_norm(x * torch.arange(1.0, 5).view(4, 1, 1, 1), mean, var, momentum=1.0)
        assert torch.equal(var, torch.zeros(3))
