"""How far a result is from the exact one, for inputs whose mean is far from zero.

Inputs have standard deviation 1 and mean 1, 1e3 and 1e5, and γ = 1, β = 0, so outputs have unit
scale. Rounding an input to a half dtype comes before the exact result: it is nobody's error here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .operator import Case, Operator

#: |mean|/std of the inputs.
RATIOS = (1.0, 1e3, 1e5)
_FEWEST_CHANNELS = 32  # at least a vector of them, and GroupNorm's 32 groups


def sample_size(size: Sequence[int], limit: int) -> tuple[int, ...]:
    """A smaller size whose comparison is cheap: fewer samples, then fewer channels.

    Positions stay whole, since the length of a sum is what the error grows with.

    >>> sample_size((32, 64, 112, 112), 1 << 20)
    (2, 32, 112, 112)
    >>> sample_size((2, 16, 8, 8), 1 << 20)
    (2, 16, 8, 8)
    """
    first, channels, *positions = size
    per_channel = math.prod(positions)
    if first > 2:
        first = min(first, max(2, limit // (channels * per_channel)))
    while first * channels * per_channel > limit and channels % 2 == 0:
        if channels // 2 < _FEWEST_CHANNELS:
            break
        channels //= 2
    return (first, channels, *positions)


def errors(
    operator: Operator, case: Case, build: Callable[[Case], nn.Module], limit: int
) -> dict[str, float | None]:
    """Largest |output - exact| for each of `RATIOS`, under "1", "1e+03" and "1e+05".

    Infinity where the result is not finite and the exact one is; None where the dtype cannot hold
    the inputs. Every contender gets the same numbers.
    """
    case = replace(case, shape=replace(case.shape, size=sample_size(case.shape.size, limit)))
    module = build(case).train(case.mode != "evaluation")
    found: dict[str, float | None] = {}
    for ratio in RATIOS:
        inputs = make_inputs(case, torch.Generator().manual_seed(int(ratio)), mean=ratio)
        key = "1" if ratio == 1 else f"{ratio:.0e}"
        if not all(tensor.isfinite().all() for tensor in inputs):
            found[key] = None
            continue
        with torch.no_grad():
            if not module.training:
                operator.fit(module, inputs[0])
            # Before the call, which may update what the exact result is computed from.
            exact = operator.exact(module, inputs)
            largest = (module(*inputs).double() - exact).abs().max().item()
        found[key] = largest if math.isfinite(largest) else math.inf
    return found


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
