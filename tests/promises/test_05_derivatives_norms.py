"""Promise 5 for all norms, batch norm with masks among them: a derivative is right or it raises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from tests import norms
from tests.helpers import ACTS, KINKS, lay_out, spread, values
from tests.norms import Norm, Shape

# torch scripts its own forward-mode decompositions when they are first used.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning"
)

LAYOUTS = ("contiguous", "channels_last", "strided")
NORMS = (*norms.ALL, norms.BATCH, norms.FROZEN, norms.EVALUATION)
# As few values as have a batch, a channel or group, a position, and an odd size.
SMALL: dict[str, Shape] = {
    "layer_norm": (4, 5), "rms_norm": (4, 5), "group_norm": (2, 4, 3),
    "local_response_norm": (2, 4, 3), "batch_norm": (2, 4, 3),
}  # fmt: skip


def small(norm: Norm) -> Shape:
    return (2, 3, 2, 2)[-4:] if (norm.num_dims or 0) > 1 else SMALL[norm.operator]


def inputs(
    norm: Norm, layout: str = "contiguous", act: str | None = None, *, adds: bool = False
) -> list[Tensor]:
    """Input, parameters and residual in double, clear of the activation's kinks."""
    shape = small(norm)
    parameters = [p for p in norm.parameters(shape, torch.float64) if p is not None]
    for seed in range(100):
        x = lay_out(values(shape, torch.float64, seed=seed), layout)
        residual = [values(shape, torch.float64, seed=seed + 1000)] if adds else []
        z = norm.formula(x, *norm.parameters(shape, torch.float64))
        if all(float((z - kink).abs().min()) > 1e-3 for kink in KINKS.get(act or "", ())):
            return [t.detach().requires_grad_() for t in (x, *parameters, *residual)]
    raise AssertionError("no seed keeps clear of the kinks")


def function(norm: Norm, *, adds: bool = False, **options: Any) -> Callable[..., Any]:
    """The norm as a function of the list that `inputs` gives."""

    def call(x: Tensor, *rest: Tensor) -> Any:
        given = iter(rest)
        weight = next(given) if norm.has_weight else None
        bias = next(given) if norm.has_bias else None
        if adds:
            assert norm.adds is not None
            return norm.adds(x, next(given), weight, bias, **options)
        return norm.ours(x, weight, bias, **options)

    return call


#: The mask of a norm by its kind: none, one that varies everywhere, one of whole rows.
MASKS: dict[str, Callable[[Norm], Tensor | None]] = {
    "no mask": lambda norm: None,
    "mask": lambda norm: norm.mask(small(norm)),
    "mask of rows": lambda norm: norm.mask(small(norm), whole_rows=True),
}


@spread("norm, layout, mask", NORMS, LAYOUTS, MASKS, keep=3)
def test_gradcheck(norm: Norm, layout: str, mask: str) -> None:
    act = "silu" if norm.has_act else None
    call = function(norm, mask=MASKS[mask](norm), **({"act": act} if act else {}))
    given = inputs(norm, layout, act)
    assert gradcheck(call, given, check_forward_ad=True, check_batched_grad=True)
    if layout == "contiguous":
        assert gradgradcheck(call, given)


@spread("norm, layout, mask", norms.WITH_RESIDUAL, LAYOUTS, MASKS, keep=3)
def test_gradcheck_with_a_residual(norm: Norm, layout: str, mask: str) -> None:
    """Both outputs have a gradient, and both terms of the sum."""
    call = function(norm, adds=True, mask=MASKS[mask](norm))
    given = inputs(norm, layout, adds=True)
    assert gradcheck(call, given, check_forward_ad=True, check_batched_grad=True)
    if layout == "contiguous":
        assert gradgradcheck(call, given)


@spread("norm, act, layout", (norms.LAYER, norms.LAYER_FIRST, norms.GROUP), ACTS, LAYOUTS, keep=3)
def test_gradcheck_of_activations(norm: Norm, act: str | None, layout: str) -> None:
    given = inputs(norm, layout, act)
    assert gradcheck(function(norm, act=act), given, check_forward_ad=True)
    if layout == "contiguous":
        assert gradgradcheck(function(norm, act=act), given)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_only_some_gradients_wanted(norm: Norm) -> None:
    """What is not asked for is not computed, and what is does not change."""
    given = [t.detach() for t in inputs(norm)]
    cotangent = torch.randn(small(norm), dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in given]
    complete = torch.autograd.grad(function(norm)(*leaves), leaves, cotangent)
    for wanted in itertools.product((False, True), repeat=len(given)):
        if any(wanted):
            leaves = [t.clone().requires_grad_(w) for t, w in zip(given, wanted, strict=True)]
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            some = torch.autograd.grad(function(norm)(*leaves), asked, cotangent)
            right = [g for g, w in zip(complete, wanted, strict=True) if w]
            for a, b in zip(some, right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_third_derivative(norm: Norm) -> None:
    """The double backward is a formula too, so it goes on; the plain formula is the oracle."""
    results = []
    for call in (norm.ours, norm.formula):
        x, *parameters = inputs(norm)
        y = call(x, *parameters, *(None,) * (2 - len(parameters)))
        for _ in range(3):
            (y,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        results.append(y)
    scale = float(results[1].detach().abs().max())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm", [n for n in NORMS if n.num_dims in (1, None)], ids=str)
def test_gradient_penalty_step(norm: Norm, dtype: torch.dtype) -> None:
    """A training step whose loss holds a gradient: saved statistics that carry none err by 40 %."""
    is_last = norm.num_dims is not None
    gradients = []
    for normalize in (norm.ours, norm.theirs):
        torch.manual_seed(5)
        x = torch.randn((6, 7, 4) if is_last else (6, 4, 7), dtype=dtype, requires_grad=True)
        first, head = (torch.nn.Linear(n, m, dtype=dtype) for n, m in ((x.shape[2],) * 2, (4, 1)))
        weight, bias = (
            p if p is None else p.to(dtype).clone().requires_grad_()
            for p in norm.parameters(tuple(x.shape), dtype)
        )
        hidden = normalize(first(x), weight, bias)
        pooled = hidden.tanh().mean(1 if is_last else 2)
        score = head(pooled)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        loss = score.mean() + 10 * ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
        leaves = [t for t in (x, weight, bias, *first.parameters(), head.weight) if t is not None]
        gradients.append(torch.autograd.grad(loss, leaves))
    # Two sums of a hundred terms in different order, squared and scaled by ten.
    tolerance = 1e-10 if dtype is torch.float64 else 2e-4
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_functorch(norm: Norm) -> None:
    given = [t.detach() for t in inputs(norm, "channels_last")]
    last = len(given) - 1
    both = (0, last) if last else 0

    def plain(x: Tensor, *parameters: Tensor) -> Tensor:
        return norm.theirs(x, *parameters, *(None,) * (2 - len(parameters)))

    for transform in (
        lambda f: torch.func.grad(lambda *a: (f(*a) ** 2).sum(), argnums=tuple(range(last + 1))),
        lambda f: torch.func.jacrev(lambda *a: f(*a).sum(0), argnums=both),
        lambda f: torch.func.jacfwd(lambda *a: f(*a).sum(0), argnums=both),
        lambda f: torch.func.hessian(lambda *a: (f(*a) ** 3).sum(), argnums=last),
        lambda f: torch.func.jacrev(torch.func.jacrev(lambda *a: (f(*a) ** 3).sum(), 0), last),
        lambda f: torch.func.grad(
            lambda *a: (torch.func.grad(lambda *b: (f(*b) ** 2).sum())(*a) ** 2).sum()
        ),
        lambda f: (
            lambda *a: torch.vmap(f, in_dims=(0, *(None,) * last))(
                torch.stack((a[0], 2 * a[0] + 1)), *a[1:]
            )
        ),
        lambda f: (
            lambda *a: torch.vmap(  # gradients per sample
                torch.func.grad(lambda *b: (f(*b) ** 2).sum(), argnums=tuple(range(last + 1))),
                in_dims=(0, *(None,) * last),
            )(torch.stack((a[0], 2 * a[0] + 1)), *a[1:])
        ),
    ):
        torch.testing.assert_close(transform(function(norm))(*given), transform(plain)(*given))


@pytest.mark.parametrize("norm", norms.WITH_RESIDUAL, ids=str)
def test_functorch_with_a_residual(norm: Norm) -> None:
    given = [t.detach() for t in inputs(norm, adds=True)]
    fused = function(norm, adds=True)

    def plain(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        parameters = rest[:-1]
        total = x + rest[-1]
        return norm.theirs(total, *parameters, *(None,) * (2 - len(parameters))), total

    for transform in (
        lambda f: torch.func.grad(lambda *a: sum((y**2).sum() for y in f(*a)), argnums=(0, 1, -1)),
        lambda f: torch.func.jacrev(lambda *a: f(*a)[0].sum(0), argnums=(0, 1, -1)),
        lambda f: torch.func.hessian(lambda *a: sum((y**3).sum() for y in f(*a)), argnums=1),
        lambda f: (
            lambda *a: torch.vmap(f, in_dims=(0, *(None,) * (len(given) - 1)))(
                torch.stack((a[0], 2 * a[0] + 1)), *a[1:]
            )
        ),
    ):
        torch.testing.assert_close(transform(fused)(*given), transform(plain)(*given))


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_forward_mode_equals_backward_mode(norm: Norm) -> None:
    options = {"act": "gelu"} if norm.has_act else {}
    for mask in (None, norm.mask(small(norm))):
        given = inputs(norm, "channels_last")
        call = function(norm, mask=mask, **options)
        tangents = [torch.randn_like(t) for t in given]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(given, tangents, strict=True)]
            tangent = forward_ad.unpack_dual(call(*duals)).tangent
        cotangent = torch.randn_like(tangent)
        backward = torch.autograd.grad(call(*given), given, cotangent)
        total = sum((a * b).sum() for a, b in zip(backward, tangents, strict=True))
        torch.testing.assert_close((tangent * cotangent).sum(), total)


@pytest.mark.parametrize("norm", norms.WITH_RESIDUAL, ids=str)
def test_one_of_two_outputs_used(norm: Norm) -> None:
    """The gradient of the unused output is nothing, not something undefined."""
    given = inputs(norm, adds=True)
    for used in (0, 1):
        leaves = [t.detach().requires_grad_() for t in given]
        y = function(norm, adds=True)(*leaves)[used]
        actual = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        total = leaves[0] + leaves[-1]
        plain = (function(norm)(total, *leaves[1:-1]), total)[used]
        wanted = torch.autograd.grad(plain.square().sum(), leaves, allow_unused=True)
        for a, b in zip(actual, wanted, strict=True):
            assert (a is None or not a.any()) if b is None else torch.allclose(a, b, atol=1e-12)
