"""The operator of frozen batch norm as an operator: schema, shapes, autograd, compilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normally import functional
from normally._ops.frozen_batch_norm import frozen_batch_norm, operator
from tests.helpers import assert_same_bits, values

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def arguments(
    dtype: torch.dtype, affine: bool = True, masked: bool = False
) -> tuple[Tensor | float | None, ...]:
    x = values((3, 4, 5), dtype).requires_grad_()
    mean, var, weight, bias = (torch.rand(4, dtype=dtype) + 0.5 for _ in range(4))
    mask = torch.rand(3, 1, 5) < 0.5 if masked else None
    return x, mean, var, weight if affine else None, bias if affine else None, mask, 1e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, affine: bool, masked: bool) -> None:
    torch.library.opcheck(operator, arguments(dtype, affine, masked))


def test_a_learnt_weight_has_the_derivative_of_batch_norm_on_every_route() -> None:
    x, mean, var, weight, bias, mask, eps = arguments(torch.float64, masked=True)
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    leaves = [x, weight.requires_grad_(), bias.requires_grad_()]

    def loss(call, *tensors: Tensor) -> Tensor:
        return call(tensors[0], mean, var, *tensors[1:], mask, eps).sin().sum()

    y = functional.batch_norm(x, mean, var, weight, bias, eps=eps, mask=mask)
    expected = torch.autograd.grad(y.sin().sum(), leaves)
    for call in (operator, frozen_batch_norm, torch.compile(frozen_batch_norm, backend="eager")):
        found = torch.autograd.grad(loss(call, *leaves), leaves)
        torch.testing.assert_close(found, expected)
    detached = [leaf.detach() for leaf in leaves]
    found = torch.func.grad(lambda *t: loss(frozen_batch_norm, *t), argnums=(0, 1, 2))(*detached)
    torch.testing.assert_close(found, expected)

    # Mapped over, a tensor does not say any more that a derivative by it is taken.
    def total(stacked: Tensor) -> Tensor:
        each = torch.func.vmap(
            lambda w: frozen_batch_norm(detached[0], mean, var, w, detached[2], mask, eps)
        )
        return each(stacked).sin().sum()

    mapped = torch.func.grad(total)(torch.stack((detached[1], detached[1] + 1)))
    torch.testing.assert_close(mapped[0], expected[1])


def test_statistics_that_require_a_gradient_are_refused() -> None:
    x, mean, var, *rest = arguments(torch.float64)
    assert isinstance(mean, Tensor)
    with pytest.raises(ValueError, match="running_mean and running_var must be constants"):
        frozen_batch_norm(x, mean.clone().requires_grad_(), var, *rest)
    with pytest.raises(ValueError, match="running_mean and running_var must be constants"):
        torch.func.grad(lambda m: frozen_batch_norm(x, m, var, *rest).sum())(mean)
    with pytest.raises(ValueError, match="running_mean and running_var must be constants"):
        operator(x, mean.clone().requires_grad_(), var, *rest)


def test_a_buffer_changed_before_the_backward_raises() -> None:
    x, mean, var, *rest = arguments(torch.float32)
    assert isinstance(var, Tensor)
    y = frozen_batch_norm(x, mean, var, *rest)
    var.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_bits_of_batch_norm_in_evaluation() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x, mean, var, weight, bias, _, eps = arguments(dtype)
        expected = functional.batch_norm(x, mean, var, weight, bias, eps=eps)
        assert_same_bits(frozen_batch_norm(x, mean, var, weight, bias, None, eps), expected)
