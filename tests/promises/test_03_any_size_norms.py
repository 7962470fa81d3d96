"""Promise 3 for the norms without running statistics: statistics hold at any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import norms
from tests.device import functional
from tests.helpers import lay_out
from tests.norms import Shape

LARGEST = 2**25
# The promise's number, relative.
ERROR = 1e-6

#: A norm and an input that is one group, its size still to be divided by `DIVISOR`.
ONE_GROUP = {
    "layer_norm": (norms.LAYER, (1, LARGEST)),
    "layer_norm of 2 dims": (norms.LAYER_2, (1, 2**11, LARGEST // 2**11)),
    "layer_norm dim=1": (norms.LAYER_FIRST, (1, LARGEST // 2, 2)),
    "rms_norm": (norms.RMS, (1, LARGEST)),
    "group_norm": (norms.GROUP_1, (1, 2**5, LARGEST // 2**15, 2**10)),
    "group_norm of few positions": (norms.GROUP_1, (1, 2**11, LARGEST // 2**11)),
    "instance_norm": (norms.INSTANCE, (1, 1, LARGEST)),
}
LAYOUTS = {2: ("contiguous",), 3: ("contiguous", "channels_last"), 4: ("contiguous", "order 0231")}


def uniform(shape: Shape) -> Tensor:
    """A mean of 1 and a spread of 1: a float32 running sum stops growing at 2^24."""
    return torch.rand(shape).mul_(12**0.5).add_(1 - 3**0.5)


@pytest.mark.parametrize(
    "divisor", [16, pytest.param(1, marks=pytest.mark.slow)], ids=["2^21", "2^25"]
)
@pytest.mark.parametrize("case", ONE_GROUP)
def test_statistics_of_one_group(case: str, divisor: int) -> None:
    norm, (*sizes, last) = ONE_GROUP[case]
    if last < divisor:
        sizes[-1], divisor = sizes[-1] // divisor, 1
    x = uniform((*sizes, last // divisor))
    groups = norm.rows(x).double()
    for layout in LAYOUTS[x.dim()]:
        y = norm.rows(norm.ours(lay_out(x, layout), None, None))
        centred = norm in norms.CENTRED
        for group, found in zip(groups, y, strict=True):
            mean = group.mean() if centred else 0.0
            square = (group - mean).square().mean()
            expected = (group - mean) * (square + (1e-5 if centred else 1e-6)).rsqrt()
            # What is off in the mean and what in the variance, each up to the promise's number.
            assert float((found - expected).abs().max()) <= 2 * ERROR, layout
            # One identity beside the formula: what was normalized is.
            wide = found.double()
            assert abs(float(wide.square().mean()) - 1) <= 2e-5  # eps is a part of this
            if centred:
                assert abs(float(wide.mean())) <= ERROR


@pytest.mark.parametrize(
    "shape",
    [(4, 3, 2**17), pytest.param((4, 1, 2**23), marks=pytest.mark.slow)],
    ids=["2^17", "2^23"],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_running_statistics_of_instances(shape: Shape, layout: str) -> None:
    x = lay_out(uniform(shape), layout)
    mean, var = torch.zeros(shape[1]), torch.zeros(shape[1])
    with torch.no_grad():
        functional.instance_norm(x, mean, var, momentum=1.0)
    wanted = x.double().mean((0, 2))
    assert float(((mean - wanted) / wanted).abs().max()) <= ERROR
    wanted = x.double().var(2).mean(0)
    assert float(((var - wanted) / wanted).abs().max()) <= ERROR


#: Inputs with as many values as there are terms in the gradient of each of the few parameters.
PARAMETERS = {
    "layer_norm": (norms.LAYER, (LARGEST // 4, 4)),
    "layer_norm dim=1": (norms.LAYER_FIRST, (2**5, 4, LARGEST // 2**7)),
    "rms_norm": (norms.RMS, (LARGEST // 4, 4)),
    "group_norm": (norms.GROUP_1, (2**5, 4, LARGEST // 2**7)),
    "group_norm of few positions": (norms.GROUP_1, (LARGEST // 8, 4, 2)),
    "instance_norm": (norms.INSTANCE, (1, 4, LARGEST // 4)),
}


@pytest.mark.parametrize(
    "divisor", [32, pytest.param(1, marks=pytest.mark.slow)], ids=["2^20", "2^25"]
)
@pytest.mark.parametrize("case", PARAMETERS)
def test_parameter_gradients(case: str, divisor: int) -> None:
    """Sums of 2^23 terms a parameter: exact only where float32 does not add them one by one."""
    norm, shape = PARAMETERS[case]
    largest = shape.index(max(shape))
    shape = tuple(n // divisor if d == largest else n for d, n in enumerate(shape))
    layouts = LAYOUTS[3][: 1 if len(shape) == 2 else 2]
    x = uniform(shape)
    normalized = norm.formula(x.double())
    dims = [d for d in range(x.dim()) if d != norm.channel_dim % x.dim()]
    for layout in layouts:
        laid = lay_out(x, layout)
        leaves = [
            None if p is None else torch.ones_like(p).requires_grad_()
            for p in norm.parameters(shape)
        ]
        y = norm.ours(laid, *leaves)
        # x̂ of its own sign: all terms add up.
        g = normalized.sign().float()
        present = [leaf for leaf in leaves if leaf is not None]
        gradients = torch.autograd.grad(y, present, g)
        wanted = (normalized.abs().sum(dims), g.double().sum(dims))
        torch.testing.assert_close(gradients[0].double(), wanted[0], rtol=ERROR, atol=0)
        if norm.has_bias:
            error = (gradients[1] - wanted[1]).abs()
            assert float(error.max()) <= ERROR * x.numel() / 4
            ones = torch.autograd.grad(norm.ours(laid, *leaves).sum(), present)[1]
            torch.testing.assert_close(
                ones.double(), torch.full_like(wanted[1], x.numel() / 4), rtol=ERROR, atol=0
            )
