"""Inputs in every layout, and the one comparison with the float64 reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from normally import reference
from tests.device import DEVICE as DEVICE
from tests.device import cpu_only as cpu_only
from tests.device import functional
from tests.device import has_kernels as has_kernels
from tests.device import needs_kernels as needs_kernels
from tests.device import needs_native as needs_native
from tests.device import on_device as on_device

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTS = (None, *reference.ACTIVATIONS)

#: Where the derivative of an activation jumps.
KINKS = {
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "leaky_relu": (0.0,),
    "elu": (0.0,),
    "hardswish": (-3.0, 3.0),
    "hardsigmoid": (-3.0, 3.0),
}


#: An axis for `spread`: which of two halves of what a test loops over.
BOTH_HALVES = (0, 1)


def spread(names: str, *axes: Iterable[Any], keep: int = 2) -> pytest.MarkDecorator:
    """`parametrize` by the product of `axes`: one case of `keep` now, the others are slow.

    Now are those whose positions on the axes add up to a multiple of `keep`. So every two values of
    two axes meet where a third axis has `keep` values or more; of two axes alone, every value
    occurs. In "shape groups, dtype" the values of the first of two axes are pairs.
    """
    groups = [name.split() for name in names.split(", ")]
    cases = []
    for places in itertools.product(*(enumerate(axis) for axis in axes)):
        chosen = [value for _, value in places]
        flat = [
            item
            for group, value in zip(groups, chosen, strict=True)
            for item in (value if len(group) > 1 else (value,))
        ]
        is_slow = sum(place for place, _ in places) % keep != 0
        marks = [pytest.mark.slow] if is_slow else []
        cases.append(pytest.param(*flat, id="-".join(map(str, flat)), marks=marks))
    return pytest.mark.parametrize([name for group in groups for name in group], cases)


def checkered(half: int, *axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """One half of the product of `axes`, as the fields of one colour of a chessboard."""
    return [
        tuple(value for _, value in places)
        for places in itertools.product(*(list(enumerate(axis)) for axis in axes))
        if sum(place for place, _ in places) % 2 == half
    ]


def half_of(half: int, options: Sequence[Any], start: int) -> list[tuple[int, Any]]:
    """One half of `enumerate(options, start)`, neighbours together.

    Of every second one all turns would be odd or all even, and what takes turns by two or by four
    would not meet every value of the axis that decides the half.
    """
    return [turn for k, turn in enumerate(enumerate(options, start)) if k // 2 % 2 == half]


def arithmetic(dtype: torch.dtype) -> float:
    """Allowed error of the computation itself, relative to the largest term of a sum.

    float64: 450 roundings of 2^-53, for sums of up to 2^19 shifted values and an exponential.
    float32 and half inputs compute in float32: promise 1's 1e-6 is 8 units in the last place,
    enough for a product, two sums and an exponential of 4 units.
    """
    return 1e-13 if dtype is torch.float64 else 1e-6


def rounding(dtype: torch.dtype) -> float:
    """One unit in the last place for the final cast: half of it is the cast, half a near tie."""
    return torch.finfo(dtype).eps


def assert_within(
    actual: Tensor, expected: Tensor, scale: Tensor | float, dtype: torch.dtype, what: str
) -> None:
    """|actual - expected| ≤ arithmetic·scale + rounding·|expected|, and the same NaN and inf."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    found, wanted = actual.detach().double(), expected.detach().double()
    # What the result's dtype cannot hold becomes infinite there.
    wanted = torch.where(wanted.isfinite(), wanted, wanted.to(actual.dtype).double())
    bound = arithmetic(dtype) * scale + rounding(actual.dtype) * wanted.abs()
    # Below the smallest normal number the rounding is absolute.
    bound = bound + torch.finfo(actual.dtype).smallest_normal * rounding(actual.dtype)
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    error = torch.where(same, torch.zeros_like(found), (found - wanted).abs())
    excess = error - bound
    assert bool((excess <= 0).all()), (  # NaN fails too
        f"{what}: error {error.max().item():.3e} at {int(excess.nan_to_num(math.inf).argmax())}, "
        f"expected {wanted.flatten()[excess.nan_to_num(math.inf).argmax()]:.6e}, "
        f"allowed {bound.broadcast_to(error.shape).flatten()[excess.argmax()]:.3e}"
    )


def assert_same_bits(actual: Tensor | None, expected: Tensor | None, what: str = "") -> None:
    """Equal bit for bit, NaN included."""
    if actual is None or expected is None:
        assert actual is expected, what
        return
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[actual.element_size()]
    a, b = (t.detach().contiguous().view(integer) for t in (actual, expected))
    assert torch.equal(a, b), f"{what}: {int((a != b).sum())} of {a.numel()} differ in their bits"


def permutations_of(ndim: int) -> tuple[str, ...]:
    """Names of six dense memory orders of an `ndim` tensor, the identity among them."""
    orders = {
        2: ["01", "10"],
        3: ["012", "021", "102", "120", "201", "210"],
        4: ["0123", "0231", "1023", "3210", "2031", "0132"],
        5: ["01234", "02341", "10234", "43210", "20314", "01243"],
    }
    return tuple(f"order {order}" for order in orders[ndim])


def layouts_of(ndim: int) -> tuple[str, ...]:
    names = ["contiguous", "expanded batch", "expanded channel", "sliced", "strided", "flipped C"]
    return (*names, *permutations_of(ndim)[1:])


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` (but see the expanded ones) in another memory layout."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return lay_out(x, "order " + "0" + "".join(map(str, range(2, x.dim()))) + "1")
    if layout == "expanded batch":  # the first sample, repeated by stride 0
        return x[:1].expand(x.shape)
    if layout == "expanded channel":
        return x[:, :1].expand(x.shape)
    if layout == "sliced":  # an offset, and rows that are longer than what is used of them
        base = x.new_full([size + 3 for size in x.shape], math.nan)
        view = base[tuple(slice(1, 1 + size) for size in x.shape)]
        return view.copy_(x)
    if layout == "strided":  # every second channel, and every second element of a row
        steps = [1, 2, *(1,) * (x.dim() - 2)]
        steps[-1] = 2
        base = x.new_full([n * step for n, step in zip(x.shape, steps, strict=True)], math.nan)
        return base[tuple(slice(0, None, step) for step in steps)].copy_(x)
    if layout == "flipped C":  # channel innermost among samples, samples of another tensor between
        base = x.new_full((x.shape[1], 2, *x.shape[2:], x.shape[0]), math.nan)
        view = base[:, 1].movedim(-1, 0)
        return view.copy_(x)
    order = [int(digit) for digit in layout.removeprefix("order ")]
    inverse = [order.index(d) for d in range(len(order))]
    return x.permute(order).contiguous().permute(inverse)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values with another mean and spread in every channel."""
    generator = torch.Generator().manual_seed(seed)
    per_channel = (1, -1, *(1,) * (len(shape) - 2))
    channels = shape[1]
    spread = (0.5 + torch.rand(channels, generator=generator)).view(per_channel)
    mean = torch.randn(channels, generator=generator).view(per_channel)
    return (torch.randn(shape, generator=generator) * spread + mean).to(dtype)


def is_dense(x: Tensor) -> bool:
    """Whether `x` fills its memory without holes or overlap, in some order."""
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda s: (s[1], s[0])):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


@dataclass(frozen=True)
class Terms:
    """The parts of the formula in float64: what errors are measured against."""

    normalized: Tensor
    rstd: Tensor
    z: Tensor
    count: int


def batch_norm_terms(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    correction: int,
    mask: Tensor | None = None,
) -> Terms:
    """x̂, 1/√(var+eps) and z of `(N, C, *)`, detached; 0 where `mask` is False."""
    x = reference.hide(x.detach().double(), mask)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    dims = [d for d in range(x.dim()) if d != 1]
    count = math.prod(x.shape[d] for d in dims)
    if mask is not None:
        count = int(mask.expand(x[:, :1].shape).sum())
    if mean is None or var is None:
        mean, var = reference.moments(x, dims, mask)
        var = var * (count / (count - correction)) if correction else var
    else:
        mean, var = mean.detach().double().view(shape), var.detach().double().view(shape)
    rstd = (var + eps).rsqrt()
    normalized = reference.hide((x - mean) * rstd, mask)
    z = normalized
    if weight is not None:
        z = z * weight.detach().double().view(shape)
    if bias is not None:
        z = z + bias.detach().double().view(shape)
    if residual is not None:
        z = z + reference.hide(residual.detach().double(), mask)
    return Terms(normalized, rstd, z, count)


def check_batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    training: bool = True,
    act: str | None = None,
    act_param: float | None = None,
    eps: float = 1e-5,
    correction: int = 0,
    unbiased: bool = True,
    momentum: float = 0.1,
    gradient: str = "contiguous",
    mask: Tensor | None = None,
) -> None:
    """Forward, running statistics and all gradients of one call against float64.

    `mask` has the input's number of dimensions and 1 at the channels.
    """
    shape = (1, -1, *(1,) * (x.dim() - 2))
    channels = x.shape[1]
    parameter_dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    running_mean = torch.linspace(-0.5, 0.5, channels, dtype=parameter_dtype)
    running_var = torch.linspace(0.5, 2.0, channels, dtype=parameter_dtype)
    before = running_mean.clone(), running_var.clone()

    leaves = [
        None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)
    ]
    y = functional.batch_norm(
        leaves[0], running_mean, running_var, leaves[1], leaves[2], training, momentum, eps,
        act=act, act_param=act_param, residual=leaves[3], correction=correction, unbiased=unbiased,
        mask=mask,
    )  # fmt: skip

    wide = [
        None if t is None else t.detach().double().requires_grad_()
        for t in (x, weight, bias, residual)
    ]
    statistics = (None, None) if training else (before[0].double(), before[1].double())
    expected = reference.batch_norm(
        wide[0], *statistics, wide[1], wide[2], eps,
        residual=wide[3], act=act, act_param=act_param, correction=correction, mask=mask,
    )  # fmt: skip
    promoted = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    assert y.dtype is promoted
    if is_dense(x) and promoted is x.dtype:
        assert y.stride() == x.stride()
    terms = batch_norm_terms(
        x, statistics[0], statistics[1], weight, bias, residual, eps, correction, mask
    )
    w = 1.0 if weight is None else weight.detach().double().abs().view(shape)
    size = 1 + w * terms.normalized.abs()
    size = size + (0 if bias is None else bias.detach().double().abs().view(shape))
    if residual is not None:
        size = size + reference.hide(residual.detach().double().abs(), mask)
    # A residual of another dtype is added to an output that was rounded to the input's already.
    inner = 1.0
    if residual is not None and residual.dtype is not x.dtype:
        inner = 2 * max(rounding(t) for t in (x.dtype, promoted)) / arithmetic(promoted)
    assert_within(y, expected, inner * size, promoted, "output")

    after = running_mean, running_var
    _check_running(x, before, after, training, momentum, unbiased, terms, mask)

    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    g = lay_out(g, gradient)
    if act in KINKS:
        # Within the rounding of a kink either side's derivative is right: not asked there.
        distance = torch.stack([(terms.z - kink).abs() for kink in KINKS[act]]).amin(0)
        near = distance <= 4 * inner * arithmetic(promoted) * size
        g = torch.where(near, torch.zeros_like(g), g) if bool(near.any()) else g
    present = [(a, b) for a, b in zip(leaves, wide, strict=True) if a is not None]
    actual = torch.autograd.grad(y, [a for a, _ in present], g)
    wanted = torch.autograd.grad(expected, [b for _, b in present], g.double())
    for (leaf, _), gradient_of in zip(present, actual, strict=True):
        assert gradient_of.dtype is leaf.dtype
        assert gradient_of.shape == leaf.shape
    kept = reference.hide(g, mask)
    _check_gradients(leaves, actual, wanted, kept, terms, w, inner, act, act_param)
    if mask is not None:
        hidden = ~mask.expand(x.shape)
        assert torch.count_nonzero(y[hidden]) == 0
        assert torch.count_nonzero(actual[0][hidden]) == 0


def _check_running(
    x: Tensor,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    training: bool,
    momentum: float,
    unbiased: bool,
    terms: Terms,
    mask: Tensor | None = None,
) -> None:
    if not training or terms.count == 0:
        assert_same_bits(after[0], before[0], "running_mean with nothing to learn")
        assert_same_bits(after[1], before[1], "running_var with nothing to learn")
        return
    dims = [d for d in range(x.dim()) if d != 1]
    x = reference.hide(x.detach().double(), mask)
    mean, var = (t.flatten() for t in reference.moments(x, dims, mask))
    if unbiased:
        var = reference.unbiased(var, terms.count)
    # |mean| alone would ask for more than a sum of values of both signs can give.
    largest = x.abs().amax(dims)
    for name, old, new, batch, size in (
        ("running_mean", before[0], after[0], mean, largest),
        ("running_var", before[1], after[1], var, var + 1),
    ):
        wanted = reference.running_average(old.double(), batch, momentum)
        assert_within(new, wanted, size, new.dtype, name)


def _check_gradients(
    leaves: list[Tensor | None],
    actual: tuple[Tensor, ...],
    wanted: tuple[Tensor, ...],
    g: Tensor,
    terms: Terms,
    w: Tensor | float,
    inner: float,
    act: str | None,
    act_param: float | None,
) -> None:
    """Each gradient against the size of the terms it is a sum of, not of what is left of them."""
    z = terms.z.clone().requires_grad_()
    (dz,) = torch.autograd.grad(reference.activate(z, act, act_param), z, g.double())
    # act' moves with the rounding of z: by no more than |act''| ≤ 2 of it, for every act here.
    dz = dz.abs() + g.double().abs() * (1 + terms.z.abs()) * (0 if act is None else 1)
    dims = [d for d in range(dz.dim()) if d != 1]
    peak = dz.amax(dims, keepdim=True) if dz.numel() else dz.sum(dims, keepdim=True)
    sizes = {
        0: w * terms.rstd * peak * (2 + terms.normalized.abs()),
        1: (dz * (terms.normalized.abs() + 1e-3)).sum(dims),
        2: dz.sum(dims),
        3: dz,
    }
    names = ("input", "weight", "bias", "residual")
    results = iter(zip(actual, wanted, strict=True))
    for index, leaf in enumerate(leaves):
        if leaf is None:
            continue
        found, expected = next(results)
        size = sizes[index]
        if index == 3 and leaf.shape != dz.shape:
            # autograd sums what was already rounded to the residual's dtype
            cast = rounding(leaf.dtype) / arithmetic(leaf.dtype)
            size = dz.sum_to_size(leaf.shape) * max(1.0, cast)
        arithmetic_of = leaves[0].dtype  # type: ignore[union-attr]
        assert_within(found, expected, inner * size, arithmetic_of, f"gradient of {names[index]}")
