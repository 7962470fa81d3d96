"""Promise 5: a derivative is right or it raises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from normally import nn, reference
from tests.device.functional import batch_norm
from tests.helpers import ACTS, KINKS, lay_out, spread, values

# torch scripts its own forward-mode decompositions when they are first used.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning"
)

LAYOUTS = ("contiguous", "channels_last", "strided")


def inputs(layout: str, act: str | None, with_residual: bool) -> list[Tensor]:
    """Double inputs whose z keeps clear of the activation's kinks, where nothing is to check."""
    shape = (3, 2, 5)
    weight = torch.tensor([1.3, -0.7]).double()
    bias = torch.tensor([0.4, 0.2]).double()
    for seed in range(100):
        x = lay_out(values(shape, torch.float64, seed=seed), layout)
        residual = values(shape, torch.float64, seed=seed + 1000) if with_residual else None
        z = reference.batch_norm(x, weight=weight, bias=bias, residual=residual)
        given = [x, weight, bias] + ([] if residual is None else [residual])
        evaluated = reference.batch_norm(x, *RUNNING, weight, bias, residual=residual)
        kinks = KINKS.get(act or "", ())
        if all(float((t - kink).abs().min()) > 1e-3 for t in (z, evaluated) for kink in kinks):
            return [t.detach().requires_grad_() for t in given]
    raise AssertionError("no seed keeps clear of the kinks")


RUNNING = (torch.tensor([0.3, -0.4]).double(), torch.tensor([1.7, 0.6]).double())
AXES = (True, False), ACTS, (False, True)


def function(training: bool, act: str | None) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        running = (None, None) if training else RUNNING
        return batch_norm(x, *running, weight, bias, training, act=act, residual=residual, eps=1e-3)

    return call


@spread("training, act, with_residual, layout", *AXES, LAYOUTS, keep=3)
def test_gradcheck(training: bool, act: str | None, with_residual: bool, layout: str) -> None:
    given = inputs(layout, act, with_residual)
    assert gradcheck(function(training, act), given, check_forward_ad=True, check_batched_grad=True)


@spread("training, act, with_residual", *AXES)
def test_gradgradcheck(training: bool, act: str | None, with_residual: bool) -> None:
    given = inputs("contiguous", act, with_residual)
    assert gradgradcheck(function(training, act), given)
    if act in (None, "relu", "gelu"):
        assert gradgradcheck(function(training, act), inputs("channels_last", act, with_residual))


@pytest.mark.parametrize("training", [True, False])
def test_third_derivative(training: bool) -> None:
    """The double backward is a formula too, so it goes on.

    The plain formula is the oracle: torch's own batch norm is off by its full size here, in
    training, without a word.
    """
    given = inputs("contiguous", "silu", with_residual=True)
    plain = given[0].detach().clone().requires_grad_()

    def third(x: Tensor, y: Tensor) -> Tensor:
        for _ in range(3):
            (y,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        return y

    running = (None, None) if training else RUNNING
    formula = reference.batch_norm(
        plain, *running, *given[1:3], 1e-3, residual=given[3], act="silu"
    )
    ours = third(given[0], function(training, "silu")(*given))
    torch.testing.assert_close(ours, third(plain, formula), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("born_on_device")
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["none", "relu", "relu6", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_penalty_step(
    dtype: torch.dtype, act: str, training: bool, with_residual: bool
) -> None:
    """A training step whose loss holds a gradient: saved statistics that carry none err by 40 %."""
    activation = None if act == "none" else act
    x0 = values((6, 3, 4, 5), dtype)
    gradients = []
    for ours in (True, False):
        torch.manual_seed(5)
        convolution = torch.nn.Conv2d(3, 4, 3, padding=1, dtype=dtype)
        layer = (nn if ours else torch.nn).BatchNorm2d(4, dtype=dtype)
        torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
        head = torch.nn.Linear(4, 1, dtype=dtype)
        residual = torch.randn(6, 4, 4, 5, dtype=dtype) if with_residual else None
        layer.train(training)
        x = x0.clone().requires_grad_()
        hidden = convolution(x)
        if ours:
            assert isinstance(layer, nn.BatchNorm2d)
            layer.act = activation
            z = layer(hidden, residual)
        else:
            z = layer(hidden)
            z = reference.activate(z if residual is None else z + residual, activation)
        score = head(z.mean((2, 3)).tanh())
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        loss = score.mean() + 10 * ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
        modules = torch.nn.ModuleList([convolution, layer, head])
        gradients.append(torch.autograd.grad(loss, [*modules.parameters(), x]))
    # Two sums of a hundred terms in different order, squared and scaled by ten.
    tolerance = 1e-10 if dtype is torch.float64 else 2e-4
    for ours_, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_forward_mode_equals_backward_mode(act: str | None, training: bool) -> None:
    given = inputs("channels_last", act, with_residual=True)
    call = function(training, act)
    tangents = [torch.randn_like(t) for t in given]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(given, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(call(*duals)).tangent
    cotangent = torch.randn_like(tangent)
    backward = torch.autograd.grad(call(*given), given, cotangent)
    total = sum((a * b).sum() for a, b in zip(backward, tangents, strict=True))
    torch.testing.assert_close((tangent * cotangent).sum(), total)


@pytest.mark.usefixtures("born_on_device")
def test_forward_mode_updates_the_running_statistics_once() -> None:
    x = values((6, 3, 4), torch.float32)
    ours, theirs = nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    for layer in (ours, theirs):
        with forward_ad.dual_level():
            layer(forward_ad.make_dual(x, torch.ones_like(x)))
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_functorch(training: bool) -> None:
    given = [t.detach() for t in inputs("contiguous", "silu", with_residual=True)]
    call = function(training, "silu")

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        running = (None, None) if training else RUNNING
        return F.silu(F.batch_norm(x, *running, weight, bias, training, eps=1e-3) + residual)

    for transform in (
        lambda f: torch.func.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1, 2, 3)),
        lambda f: torch.func.jacrev(lambda *a: f(*a).sum((0, 2)), argnums=(0, 1)),
        lambda f: torch.func.jacfwd(lambda *a: f(*a).sum((0, 2)), argnums=(0, 1)),
        lambda f: torch.func.hessian(lambda *a: (f(*a) ** 3).sum(), argnums=1),
        lambda f: torch.func.jacrev(torch.func.jacrev(lambda *a: (f(*a) ** 3).sum(), 1), 2),
        lambda f: torch.func.grad(
            lambda *a: (torch.func.grad(lambda *b: (f(*b) ** 2).sum())(*a) ** 2).sum()
        ),
    ):
        torch.testing.assert_close(transform(call)(*given), transform(plain)(*given))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", "leaky_relu", "gelu"])
def test_batched_gradients_with_a_residual(act: str, training: bool) -> None:
    """`is_grads_batched` maps over the backward, with whatever the forward saved."""
    given = [t.detach().float().requires_grad_() for t in inputs("contiguous", act, True)]
    running = (None, None) if training else [t.float() for t in RUNNING]
    y = batch_norm(given[0], *running, *given[1:3], training, act=act, residual=given[3])
    g = torch.randn(4, *y.shape)
    batched = torch.autograd.grad(y, given, g, is_grads_batched=True, retain_graph=True)
    for index in range(4):
        one = torch.autograd.grad(y, given, g[index], retain_graph=True)
        for a, b in zip(batched, one, strict=True):
            torch.testing.assert_close(a[index], b)


@pytest.mark.usefixtures("born_on_device")
def test_what_was_saved_may_not_change() -> None:
    """In-place on what the backward needs raises; on the running statistics it does not matter."""
    layer = nn.BatchNorm1d(3)
    x = torch.randn(4, 3)
    doubled = (x.requires_grad_() * 2).contiguous()
    y = layer(doubled)
    with torch.no_grad():
        doubled.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.usefixtures("born_on_device")
def test_a_buffer_in_the_graph_is_guarded_by_its_version() -> None:
    """Training writes the buffers in place: a graph that saved them must hear of it."""
    layer = nn.BatchNorm1d(3)
    scale = torch.ones(3, requires_grad=True)
    product = scale * layer.running_mean
    layer(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
