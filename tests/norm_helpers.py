"""The one comparison with the float64 formula of every norm but batch norm, whose is in helpers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normally import reference
from tests.device import functional, has_kernels
from tests.helpers import (
    KINKS,
    arithmetic,
    assert_same_bits,
    assert_within,
    is_dense,
    lay_out,
    rounding,
)


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """What parameters usually have: float32 beside half inputs."""
    return dtype if dtype is torch.float64 else torch.float32


def ramp(shape: tuple[int, ...], first: float, last: float, dtype: torch.dtype) -> Tensor:
    """Parameters that are all different."""
    return torch.linspace(first, last, math.prod(shape), dtype=dtype).view(shape)


def channels_beside(x: Tensor) -> tuple[int, ...]:
    return (1, -1, *(1,) * (x.dim() - 2))


@dataclass(frozen=True)
class Together:
    """Which values share their statistics: a view of the input, and its dimensions."""

    view: tuple[int, ...]
    dims: tuple[int, ...]

    def moments(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each element's group, in the input's shape."""
        kept = None if mask is None else mask.expand(x.shape).reshape(self.view)
        return tuple(  # type: ignore[return-value]
            t.expand(self.view).reshape(x.shape)
            for t in reference.moments(x.reshape(self.view), self.dims, kept)
        )

    def peak(self, x: Tensor) -> Tensor:
        """The largest value of each element's group, in the input's shape."""
        if not x.numel():
            return x
        largest = x.reshape(self.view).amax(self.dims, keepdim=True)
        return largest.expand(self.view).reshape(x.shape)


def together(name: str, x: Tensor, settings: dict[str, Any]) -> Together:
    shape = tuple(x.shape)
    if name == "group_norm":
        n, channels, groups = shape[0], shape[1], settings["num_groups"]
        return Together((n, groups, channels // groups, math.prod(shape[2:])), (2, 3))
    if name == "instance_norm":
        return Together(shape, tuple(range(2, len(shape))))
    if name == "batch_norm":
        return Together(shape, (0, *range(2, len(shape))))
    if settings.get("dim") is not None:
        return Together(shape, (settings["dim"] % len(shape),))
    return Together(shape, tuple(range(len(shape) - len(normalized(x, settings)), len(shape))))


def normalized(x: Tensor, settings: dict[str, Any]) -> tuple[int, ...]:
    """`normalized_shape`, by default the last dimension or `dim`."""
    if settings.get("dim") is not None:
        return (x.shape[settings["dim"]],)
    return tuple(settings.get("normalized_shape", x.shape[-1:]))


def call(
    name: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The public function: output and, with a residual, the sum."""
    options: dict[str, Any] = {**settings, "mask": mask}
    if name != "local_response_norm":
        options["weight"] = weight
    if name not in ("local_response_norm", "rms_norm"):
        options["bias"] = bias
    if name in ("layer_norm", "rms_norm"):
        options["normalized_shape"] = normalized(x, settings)
    if name == "batch_norm":  # adds before the activation and returns no sum
        options["residual"], residual = residual, None
    if residual is None:
        return getattr(functional, name)(x, **options), None
    output: tuple[Tensor, Tensor] = getattr(functional, f"add_{name}")(x, residual, **options)
    return output


def formula(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    settings: dict[str, Any],
) -> Tensor:
    """The reference's output in x's dtype."""
    options = {"mask": None if mask is None else mask.expand(mask_shape(name, x, settings))}
    options = {**settings, **options}
    if name in ("layer_norm", "rms_norm"):
        options["normalized_shape"] = normalized(x, settings)
    if name == "rms_norm":
        options.setdefault("eps", None)
        return reference.rms_norm(x, weight=weight, **options)
    if name == "layer_norm":
        return reference.layer_norm(x, weight=weight, bias=bias, **options)
    if name == "group_norm":
        return reference.group_norm(x, weight=weight, bias=bias, **options)
    if name == "instance_norm":
        return reference.group_norm(x, x.shape[1], weight, bias, **options)
    if name == "frozen_batch_norm":
        mean, var = options.pop("running_mean"), options.pop("running_var")
        return reference.batch_norm(x, mean, var, weight, bias, **options)
    options.pop("mask")
    return reference.local_response_norm(reference.hide(x, mask), **options)


def mask_shape(name: str, x: Tensor, settings: dict[str, Any]) -> tuple[int, ...]:
    """The input's shape with 1 in place of its channels."""
    rows = name in ("layer_norm", "rms_norm") and settings.get("dim") is None
    dim = settings.get("dim")
    channel = x.dim() - 1 if rows else (1 if dim is None else dim % x.dim())
    return tuple(1 if d == channel else n for d, n in enumerate(x.shape))


@dataclass(frozen=True)
class Sizes:
    """How large the terms of output and gradients are: what errors are relative to."""

    z: Tensor | None  # before the activation, float64
    output: Tensor
    gradients: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # of input, weight, bias


def sizes_of(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    settings: dict[str, Any],
) -> Sizes:
    """Of an input in float64; `dtype` is the one that was computed with."""
    x = reference.hide(x, mask)
    if name == "local_response_norm":
        return _response_sizes(x, **settings)
    eps = settings.get("eps", None if name == "rms_norm" else 1e-5)
    rows = name in ("layer_norm", "rms_norm") and settings.get("dim") is None
    beside = normalized(x, settings) if rows else channels_beside(x)
    if settings.get("dim") is not None:
        beside = tuple(-1 if d == settings["dim"] % x.dim() else 1 for d in range(x.dim()))
    w: Tensor | float = 1.0
    if weight is not None:
        w = weight.detach().double().abs().view(beside)
        w = 1 + w if settings.get("zero_centered_weight") else w
    b: Tensor | float = 0.0 if bias is None else bias.detach().double().abs().view(beside)

    group = None
    mean: Tensor | float
    if name == "frozen_batch_norm":
        mean, var = (settings[k].double().view(beside) for k in ("running_mean", "running_var"))
    else:
        group = together(name, x, settings)
        mean, var = group.moments(x, mask)
        if name == "rms_norm":
            mean, var = 0.0, group.moments(x.square(), mask)[0]
            eps = reference.default_eps(dtype) if eps is None else eps
    rstd = (var + eps).rsqrt()
    x_hat = reference.hide((x - mean) * rstd, mask)
    # Without a mean nothing is subtracted and the error is relative.
    output = w * x_hat.abs() + b + (0 if name == "rms_norm" else 1)
    if settings.get("casting") == "llama":
        # What was rounded to the input's dtype before the weight may have been a near tie.
        output = output * max(1.0, rounding(dtype) / arithmetic(dtype))
    signed = x_hat * (weight.detach().double().view(beside) if weight is not None else 1.0)
    z = signed + (bias.detach().double().view(beside) if bias is not None else 0.0)

    def gradients(dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # dx = rstd·(w·dz - mean(w·dz) - x̂·mean(w·dz·x̂)), and mean|x̂| ≤ 1.
        of_input = rstd * (w * dz if group is None else group.peak(w * dz) * (2 + x_hat.abs()))
        padded = (1,) * (x.dim() - len(beside)) + (beside if not rows else (-1,) * len(beside))
        others = [d for d, n in enumerate(padded) if n != -1]
        # The same x̂ as in the output, as exact as there.
        of_weight = dz * (x_hat.abs() + (0 if name == "rms_norm" else 1))
        if settings.get("casting") == "llama":
            of_weight = of_weight * max(1.0, rounding(dtype) / arithmetic(dtype))
        return of_input, _sum_over(of_weight, others), _sum_over(dz, others)

    return Sizes(z, output, gradients)


def _sum_over(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims) if dims else x


def _response_sizes(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Sizes:
    """y = x·D^-β with D = k + α/size·Σx²: a power multiplies the relative error of D by β."""

    def window(t: Tensor, below: int, above: int) -> Tensor:
        edges = (0, 0) * (t.dim() - 2) + (below, above)
        return F.pad(t, edges).unfold(1, size, 1).sum(-1)

    below, above = size // 2, (size - 1) // 2
    base = k + alpha / size * window(x.square(), below, above)
    # The logarithm is rounded too, and a unit of it counts β·|ln D| times.
    power = base**-beta * (1 + abs(beta) * (1 + base.log().abs()))

    def gradients(dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # dx = g·D^-β - 2αβ/size·x·Σ g·x·D^(-β-1), the sum over the channels whose window has x.
        others = window(dz * x.abs() * power / base, above, below)
        slope = 2 * alpha * abs(beta) / size * x.abs() * others
        return dz * power + slope, dz, dz

    return Sizes(None, x.abs() * power, gradients)


def check_norm(
    name: str,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    gradient: str = "contiguous",
    hidden_gradient: float | None = None,
    **settings: Any,
) -> None:
    """Output, sum and all gradients of one call against float64.

    Args:
        name: of the public function without "add_".
        x: the input, in any layout.
        weight: or None.
        bias: or None.
        residual: calls add_… instead.
        mask: of the input's number of dimensions, 1 at the channels.
        gradient: the layout of what comes back to the output and to the sum.
        hidden_gradient: what comes back where the mask hides, for instance NaN.
        settings: of the norm; `normalized_shape` is the last dimension by default.
    """
    given = (x, residual, weight, bias)
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    y, total = call(name, *leaves, mask, settings)  # type: ignore[arg-type]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    assert y.dtype is dtype
    assert y.shape == x.shape
    if is_dense(x) and dtype is x.dtype:
        assert y.stride() == x.stride()

    added = x.detach()
    if residual is not None:
        assert total is not None
        added = reference.hide(x.to(dtype) + residual.detach().to(dtype), mask)
        assert_same_bits(total, added, "sum")
        if is_dense(x) and dtype is x.dtype:
            assert total.stride() == x.stride()
    wide = [
        None if t is None else t.detach().double().requires_grad_() for t in (added, weight, bias)
    ]
    if name == "rms_norm" and settings.get("eps") is None:
        settings = {**settings, "eps": reference.default_eps(dtype)}
    expected = formula(name, *wide, mask, settings)  # type: ignore[arg-type]
    sizes = sizes_of(name, added.double(), weight, bias, mask, dtype, settings)
    rounded = expected
    if settings.get("casting") == "llama":
        rounded = formula(name, added, weight, bias, mask, settings).double()
    assert_within(y, rounded, sizes.output, dtype, "output")

    generator = torch.Generator().manual_seed(7)
    g = lay_out(torch.randn(y.shape, generator=generator).to(dtype), gradient)
    act = settings.get("act")
    if act in KINKS:
        # Within the rounding of a kink either side's derivative is right: not asked there.
        assert sizes.z is not None
        distance = torch.stack([(sizes.z - kink).abs() for kink in KINKS[act]]).amin(0)
        near = distance <= 4 * arithmetic(dtype) * sizes.output
        g = torch.where(near, torch.zeros_like(g), g) if bool(near.any()) else g
    g_sum = torch.randn(y.shape, generator=generator).to(dtype)
    if hidden_gradient is not None:
        assert mask is not None
        g, g_sum = (torch.where(mask, t, hidden_gradient) for t in (g, g_sum))
    outputs, cotangents = ([y], [g]) if total is None else ([y, total], [g, g_sum])
    present = [leaf for leaf in leaves if leaf is not None]
    results = iter(torch.autograd.grad(outputs, present, cotangents))
    found = [None if leaf is None else next(results) for leaf in leaves]
    for leaf, found_gradient in zip(leaves, found, strict=True):
        if leaf is not None and found_gradient is not None:
            assert found_gradient.dtype is leaf.dtype
            assert found_gradient.shape == leaf.shape

    g, g_sum = (reference.hide(t.double(), mask) for t in (g, g_sum))
    present = [leaf for leaf in wide if leaf is not None]
    results = iter(torch.autograd.grad(expected, present, g))
    wanted = [None if leaf is None else next(results) for leaf in wide]
    dz = g.abs()
    if act is not None:
        z = sizes.z.clone().requires_grad_()  # type: ignore[union-attr]
        (dz,) = torch.autograd.grad(reference.activate(z, act, settings.get("act_param")), z, g)
        # act' moves with the rounding of z: by no more than |act''| ≤ 2 of it, for every act here.
        dz = dz.abs() + 2 * g.abs() * sizes.output
    of_input, of_weight, of_bias = sizes.gradients(dz)
    is_formula = not has_kernels() or (
        mask is not None and _varies_inside(name, mask, added, settings)
    )
    if settings.get("casting") == "llama" and is_formula:
        # Its derivative is rounded where it rounds itself.
        of_input = of_input * max(1.0, rounding(dtype) / arithmetic(dtype))
    if total is not None:
        assert wanted[0] is not None
        if is_formula:  # its gradient is rounded before that of the sum is added
            of_input = of_input + wanted[0].abs() * rounding(dtype) / arithmetic(dtype)
        wanted[0] = wanted[0] + g_sum
        of_input = of_input + g_sum.abs()
    for index, (size, parameter) in enumerate(((of_weight, "weight"), (of_bias, "bias")), start=1):
        if wanted[index] is not None:
            assert_within(found[index + 1], wanted[index], size, dtype, f"gradient of {parameter}")  # type: ignore[arg-type]
    _check_terms(found[:2], wanted[0], of_input, dtype)  # type: ignore[arg-type]
    if mask is not None:
        hidden = ~mask.expand(x.shape)
        assert torch.count_nonzero(y[hidden]) == 0
        assert found[0] is not None
        assert torch.count_nonzero(found[0][hidden]) == 0


def _varies_inside(name: str, mask: Tensor, x: Tensor, settings: dict[str, Any]) -> bool:
    """Whether a mask is not one of whole rows."""
    if settings.get("dim") is not None or name not in ("layer_norm", "rms_norm"):
        return False
    inside = range(x.dim() - len(normalized(x, settings)), x.dim())
    return any(mask.shape[d] > 1 and mask.stride(d) != 0 for d in inside)


def _check_terms(
    found: list[Tensor | None], wanted: Tensor, size: Tensor, dtype: torch.dtype
) -> None:
    """The gradients of input and residual, which are that of their sum."""
    for gradient, name in zip(found, ("input", "residual"), strict=True):
        if gradient is None:
            continue
        summed = wanted.sum_to_size(gradient.shape)
        bound = size
        if gradient.shape != wanted.shape:
            # autograd sums what was already rounded to the sum's dtype.
            bound = (size + wanted.abs() * rounding(dtype) / arithmetic(dtype)).sum_to_size(
                gradient.shape
            )
            # torch itself adds up in float32, a rounding a term of the sum so far.
            bound = bound * 4
        elif gradient.dtype is not dtype:  # rounded to the sum's dtype, then to its own
            bound = size + wanted.abs() * rounding(dtype) / arithmetic(dtype)
        assert_within(gradient, summed, bound, dtype, f"gradient of {name}")
