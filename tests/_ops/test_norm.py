"""The operators of the norms by themselves: opcheck, strides, statistics, and their routes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from normally._ops import activation
from normally._ops.group_norm import group_norm
from normally._ops.layer_norm import layer_norm
from normally._ops.local_response_norm import local_response_norm
from normally._ops.norm import NEED_INPUT, NEED_PARAMETERS, Norm
from normally._ops.rms_norm import CASTING_CODES, rms_norm
from tests.helpers import (
    BOTH_HALVES,
    DTYPES,
    assert_same_bits,
    checkered,
    lay_out,
    layouts_of,
    spread,
    values,
)
from tests.norm_helpers import parameter_dtype, ramp

NEED_ALL = NEED_INPUT | NEED_PARAMETERS

# opcheck's own machinery imports torch's scripted decompositions.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning"
)


def act(name: str | None) -> tuple[int, float]:
    return activation.encode(name, None, "test")


@dataclass(frozen=True)
class Variant:
    """One operator with its settings, and the sizes of its parameters in an input of a shape."""

    norm: Norm
    settings: tuple[Any, ...]
    #: The dimensions that the parameters have, from and to; None without parameters.
    parameters: tuple[int, int | None] | None
    mask: tuple[int, int | None]  # the dimensions in which a mask has size 1
    has_bias: bool = True
    adds: bool = False

    def arguments(
        self,
        x: Tensor,
        *,
        residual: bool = False,
        affine: bool = True,
        mask: bool = False,
        requires_grad: bool = False,
    ) -> tuple[Any, ...]:
        """What the forward operator takes, by position."""
        weight = bias = None
        if affine and self.parameters is not None:
            size = tuple(x.shape[slice(*self.parameters)])
            weight = ramp(size, -0.5, 2, parameter_dtype(x.dtype))
            bias = ramp(size, -1, 1, parameter_dtype(x.dtype)) if self.has_bias else None
        other = values(tuple(x.shape), x.dtype, seed=2) if residual and self.adds else None
        tensors = [x, other, weight, bias]
        if requires_grad:
            tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
        kept = None
        if mask:
            shape = list(x.shape)
            shape[slice(*self.mask)] = [1] * len(shape[slice(*self.mask)])
            kept = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
        return (*tensors, kept, *self.settings)


VARIANTS = {
    "layer_norm": Variant(layer_norm, (2, 1, 1e-5, *act(None)), (2, 3), (2, 3), adds=True),
    "layer_norm gelu": Variant(layer_norm, (2, 1, 0.1, *act("gelu")), (2, 3), (2, 3), adds=True),
    "layer_norm of 2": Variant(layer_norm, (1, 2, 1e-5, *act(None)), (1, 3), (1, 3), adds=True),
    "layer_norm first": Variant(layer_norm, (1, 1, 1e-5, *act("relu")), (1, 2), (1, 2), adds=True),
    "rms_norm": Variant(rms_norm, (2, 1e-6, 0, False), (2, 3), (2, 3), has_bias=False, adds=True),
    "rms_norm of 2": Variant(
        rms_norm, (1, 1e-6, CASTING_CODES["gemma"], True), (1, 3), (1, 3), has_bias=False, adds=True
    ),
    "rms_norm llama": Variant(
        rms_norm, (2, 1e-6, CASTING_CODES["llama"], False), (2, 3), (2, 3), False, True
    ),
    "group_norm": Variant(group_norm, (2, 1e-5, *act(None)), (1, 2), (1, 2)),
    "group_norm silu": Variant(group_norm, (1, 1e-5, *act("silu")), (1, 2), (1, 2)),
    "instance_norm": Variant(group_norm, (4, 1e-5, *act("elu")), (1, 2), (1, 2)),
    "local_response_norm": Variant(local_response_norm, (3, 0.5, 0.75, 1.0), None, (1, 2)),
}  # fmt: skip
SHAPE = (3, 4, 5)
QUICK = ("test_schema", "test_faketensor", "test_autograd_registration")


def operators(variant: Variant) -> tuple[Any, Any]:
    name = variant.norm.forward._schema.name.removeprefix("normally::")
    assert variant.norm.forward is getattr(torch.ops.normally, name).default
    return variant.norm.forward, getattr(torch.ops.normally, f"{name}_backward").default


def cases(variant: Variant) -> Iterator[dict[str, bool]]:
    """What may be there and what may not, without what the norm has not at all."""
    for residual, affine, mask in itertools.product((False, True), repeat=3):
        if (residual and not variant.adds) or (affine and variant.parameters is None):
            continue
        yield {"residual": residual, "affine": affine, "mask": mask}


def backward_arguments(
    variant: Variant, forward: tuple[Any, ...], need: int = NEED_ALL
) -> tuple[Any, ...]:
    """What the backward operator takes after a forward with these arguments."""
    x, residual, weight, bias, mask, *settings = forward
    output, total, stats = variant.norm.forward(*forward)
    normalized = x if residual is None else total
    g = torch.empty_like(output).copy_(values(tuple(x.shape), x.dtype, seed=3))
    grad_sum = None if residual is None else g.flip(0)
    return (g, grad_sum, normalized.detach(), weight, bias, mask, stats, *settings, need)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    variant = VARIANTS[name]
    forward, _ = operators(variant)
    for index, (layout, case) in enumerate(
        itertools.product(layouts_of(3)[:: 2 if dtype is torch.float32 else 5], cases(variant))
    ):
        x = lay_out(values(SHAPE, dtype), layout)
        given = variant.arguments(x, requires_grad=True, **case)
        # Tracing takes most of the time; its result hardly depends on layout and dtype.
        is_first = index == 1 and dtype is torch.float32
        utils = (*QUICK, "test_aot_dispatch_dynamic") if is_first else QUICK
        torch.library.opcheck(forward, given, test_utils=utils, atol=1e-2, rtol=1e-2)


@spread("name, dtype, half", VARIANTS, DTYPES, BOTH_HALVES)
def test_opcheck_of_the_backward(name: str, dtype: torch.dtype, half: int) -> None:
    variant = VARIANTS[name]
    _, backward = operators(variant)
    # Neighbours differ in the mask: in pairs, so that both halves have some with and without.
    turns = [turn for turn in enumerate(cases(variant)) if (turn[0] // 2 + turn[0]) % 2 == half]
    for index, case in turns:
        x = lay_out(values(SHAPE, dtype), ("contiguous", "channels_last", "strided")[index % 3])
        given = list(
            backward_arguments(variant, variant.arguments(x, **case), (NEED_ALL, 1, 2)[index % 3])
        )
        for position in range(5):
            if given[position] is not None:
                given[position] = given[position].detach().requires_grad_()
        is_first = index == turns[-1][0] and dtype is torch.float32
        utils = (*QUICK, "test_aot_dispatch_dynamic") if is_first else QUICK
        torch.library.opcheck(backward, tuple(given), test_utils=utils, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck_of_nothing(name: str) -> None:
    variant = VARIANTS[name]
    for shape in ((0, 4, 5), (3, 4, 0)):
        given = variant.arguments(torch.empty(shape), requires_grad=True)
        torch.library.opcheck(variant.norm.forward, given, test_utils=QUICK)


def strides(x: Tensor) -> list[int]:
    """Those that mean something: along a dimension of 1 nobody walks."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@spread("name, shape, half", VARIANTS, (SHAPE, (2, 4, 1), (1, 4, 7)), BOTH_HALVES)
def test_fake_results_look_like_the_real_ones(name: str, shape: tuple[int, ...], half: int) -> None:
    variant = VARIANTS[name]
    for layout, case in checkered(half, layouts_of(3), list(cases(variant))):
        forward = variant.arguments(lay_out(values(shape, torch.float32), layout), **case)
        backward = backward_arguments(variant, forward)
        for operator, given in zip(operators(variant), (forward, backward), strict=True):
            real = operator(*given)
            with FakeTensorMode() as mode:
                fake = operator(
                    *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given)
                )
            for ours, shown in zip(real, fake, strict=True):
                assert ours.shape == shown.shape, (layout, case)
                assert strides(ours) == strides(shown), (layout, case)
                assert ours.dtype is shown.dtype, (layout, case)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_backward_computes_what_is_needed(name: str) -> None:
    """The rest comes back empty; what comes back does not depend on what else was asked for."""
    variant = VARIANTS[name]
    _, backward = operators(variant)
    for case in cases(variant):
        forward = variant.arguments(values(SHAPE, torch.float32), **case)
        full = backward(*backward_arguments(variant, forward))
        # Nobody calls a backward for nothing.
        for need in (NEED_INPUT, NEED_PARAMETERS) if case["affine"] else (NEED_INPUT,):
            results = backward(*backward_arguments(variant, forward, need))
            asked = (need & NEED_INPUT, need & NEED_PARAMETERS, need & NEED_PARAMETERS)
            for found, wanted, is_asked in zip(results, full, asked, strict=True):
                if is_asked:
                    # Sums that are not wanted may leave another loop: rounding, no more.
                    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)
                else:
                    assert found.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["group_norm", "group_norm silu", "instance_norm"])
def test_statistics_are_the_formulas(name: str, dtype: torch.dtype) -> None:
    """Mean, biased variance and count of every sample and group: running statistics read them."""
    variant = VARIANTS[name]
    assert variant.norm.statistics is not None
    for layout, mask in itertools.product(layouts_of(3), (False, True)):
        x = lay_out(values((3, 4, 33), dtype), layout)
        given = variant.arguments(x, mask=mask)
        stats = variant.norm.forward(*given)[2]
        wanted = variant.norm.statistics(x, given[4], *given[5:])
        assert stats.dtype is torch.float64
        # Means and variances near 1 of some ten float32 terms before double ones.
        tolerance = 1e-13 if dtype is torch.float64 else 5e-7
        torch.testing.assert_close(stats, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_route_gives_the_same(name: str) -> None:
    """Without a derivative, with one, under a transform, in forward mode, and compiled."""
    variant = VARIANTS[name]
    norm = variant.norm
    for case in cases(variant):
        x = values(SHAPE, torch.float64)
        plain = variant.arguments(x, **case)
        output, total = norm(*plain)
        with_grad = norm(*variant.arguments(x, requires_grad=True, **case))
        assert_same_bits(with_grad[0], output)
        if case["residual"]:  # without one there is no sum
            assert_same_bits(with_grad[1], total)
        assert with_grad[0].requires_grad
        g = values(SHAPE, torch.float64, seed=4)
        leaves = [t for t in variant.arguments(x, requires_grad=True, **case)[:4] if t is not None]
        given = variant.arguments(x, **case)

        def outputs(*tensors: Tensor, given: tuple[Any, ...] = given) -> tuple[Tensor, ...]:
            left = iter(tensors)
            filled = [None if t is None else next(left) for t in given[:4]]
            found = norm(*filled, *given[4:])
            return found if given[1] is not None else found[:1]

        cotangents = (g, g.flip(0)) if case["residual"] else (g,)
        eager = torch.autograd.grad(outputs(*leaves), leaves, cotangents)
        found, vjp = torch.func.vjp(outputs, *(leaf.detach() for leaf in leaves))
        torch.testing.assert_close(found[0], output, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(vjp(cotangents), eager, rtol=1e-12, atol=1e-12)
        # <g, J t> is <Jᵀ g, t>: forward mode against reverse mode.
        tangents = tuple(torch.randn_like(leaf) for leaf in leaves)
        found, pushed = torch.func.jvp(outputs, tuple(t.detach() for t in leaves), tangents)
        torch.testing.assert_close(found[0], output, rtol=1e-12, atol=1e-12)
        left = sum((c * p).sum() for c, p in zip(cotangents, pushed, strict=True))
        right = sum((e * t).sum() for e, t in zip(eager, tangents, strict=True))
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
        # Each sample alone, vmapped, as a batch of one.
        if not case["mask"]:
            samples = torch.vmap(lambda t, given=given: norm(t[None], None, *given[2:])[0][0])(x)
            wanted = norm(x, None, *given[2:])[0]
            torch.testing.assert_close(samples, wanted, rtol=1e-12, atol=1e-12)


def test_statistics_have_no_derivative() -> None:
    """They are saved; a derivative through them would be silently wrong if it were forgotten."""
    for variant in VARIANTS.values():
        given = variant.arguments(values(SHAPE, torch.float64), requires_grad=True)
        output, _, stats = variant.norm.forward(*given)
        assert output.requires_grad
        assert not stats.requires_grad


@pytest.mark.parametrize("name", VARIANTS)
def test_a_dispatch_mode_may_watch(name: str) -> None:
    """As flop counters, profilers and activation checkpointing do, forward and backward."""
    variant = VARIANTS[name]
    given = variant.arguments(values(SHAPE, torch.float32), requires_grad=True)
    plain = torch.autograd.grad(variant.norm(*given)[0].sum(), given[0])
    with FlopCounterMode(display=False):
        watched = torch.autograd.grad(variant.norm(*given)[0].sum(), given[0])
    assert_same_bits(watched[0], plain[0])
