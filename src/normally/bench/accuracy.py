"""How far a result is from the exact one, for inputs whose mean is far from zero.

Inputs have standard deviation 1 and mean 1, 1e3 and 1e5, and γ = 1, β = 0, so outputs have unit
scale. Rounding an input to a half dtype comes before the exact result: it is nobody's error here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .operator import Case, Operator

#: |mean|/std of the inputs.
RATIOS = (1.0, 1e3, 1e5)
_FEWEST_CHANNELS = 16  # a vector of them


def sample_size(
    size: Sequence[int], limit: int, fewest_channels: int = _FEWEST_CHANNELS
) -> tuple[int, ...]:
    """A smaller size whose comparison is cheap: fewer samples, then fewer channels.

    Positions stay whole, since the length of a sum is what the error grows with.

    >>> sample_size((32, 64, 112, 112), 1 << 20)
    (1, 64, 112, 112)
    >>> sample_size((2, 16, 8, 8), 1 << 20)
    (2, 16, 8, 8)
    """
    first, channels, *positions = size
    per_channel = math.prod(positions)
    first = min(first, max(1, limit // (channels * per_channel)))
    while first * channels * per_channel > limit and channels % (2 * fewest_channels) == 0:
        channels //= 2
    return (first, channels, *positions)


def errors(
    operator: Operator, case: Case, builds: Mapping[str, Callable[[Case], nn.Module]], limit: int
) -> dict[str, dict[str, float | None]]:
    """For each contender the largest |output - exact| at `RATIOS`: "1", "1e+03" and "1e+05".

    Infinity where the result is not finite and the exact one is; None where the dtype cannot hold
    the inputs. Every contender gets the same numbers, on about `limit` elements. The first one's
    parameters are those that the exact result is made with.
    """
    fewest = case.shape.options.get("num_groups", _FEWEST_CHANNELS)
    size = sample_size(case.shape.size, limit, fewest)
    case = replace(case, shape=replace(case.shape, size=size))
    modules = {name: build(case) for name, build in builds.items()}
    found: dict[str, dict[str, float | None]] = {name: {} for name in builds}
    for ratio in RATIOS:
        key = "1" if ratio == 1 else f"{ratio:.0e}"
        inputs = make_inputs(case, torch.Generator().manual_seed(int(ratio)), mean=ratio)
        finite = all(tensor.isfinite().all() for tensor in inputs)
        exact: tuple[Tensor, ...] = ()
        for name, module in modules.items():
            found[name][key] = None
            if not finite:
                continue
            with torch.no_grad():
                if case.mode == "evaluation":
                    operator.fit(module.eval(), inputs[0])
                if not exact:  # fresh modules of one composition hold the same parameters
                    exact = _as_tuple(operator.exact(module, inputs))
                found[name][key] = _largest_error(_as_tuple(module(*inputs)), exact)
    return found


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _largest_error(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of all outputs; a NaN must not hide behind another output's number."""
    errors = [
        (output.double() - right).abs().max().item()
        for output, right in zip(outputs, exact, strict=True)
    ]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def make_inputs(case: Case, generator: torch.Generator, mean: float = 0.0) -> list[Tensor]:
    """The input around `mean`, and the residual around 0, in the case's dtype and layout."""
    means = (mean, 0.0) if case.has_residual else (mean,)
    return [
        torch.randn(case.shape.size, generator=generator)
        .add_(m)
        .to(case.torch_dtype)
        .contiguous(memory_format=case.memory_format)
        for m in means
    ]
