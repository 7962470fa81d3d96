"""Time contenders against each other: interleaved, in one process, fresh outputs every step.

A round times every contender once, in turn (A B A B ...), so that whatever else the machine does
meets all of them; the speed-up is the median of the rounds' ratios, not the ratio of two medians
taken minutes apart. A step that is too short for the clock is repeated within a sample.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from time import perf_counter

import torch
from torch import Tensor, nn

Step = Callable[[], object]


@dataclass(frozen=True)
class Budget:
    """How long a case may take: until `rounds` and `settle`, or `seconds`, whichever is first."""

    name: str
    rounds: int
    settle: float  # seconds that even the quickest case is watched for
    seconds: float  # enough for the slowest
    fewest_rounds: int = 3  # without which there is no spread
    sample: float = 200e-6  # the least duration of a sample
    error_elements: int = 1 << 19  # elements that the float64 comparison is made on
    copy_rounds: int = 8  # of the yardstick, before every group of cases
    copy_piece: int = 32 << 20  # bytes that one copy of the yardstick moves


BUDGETS = {
    "quick": Budget("quick", rounds=7, settle=0.05, seconds=0.3),
    "full": Budget("full", rounds=20, settle=0.2, seconds=2.0, error_elements=1 << 21),
}


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value.

        >>> Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def make_step(
    module: nn.Module, inputs: Sequence[Tensor], mode: str, grads: Sequence[Tensor]
) -> Step:
    """One training or inference step that creates its outputs anew and drops them.

    `grads` has one gradient for each output.

    The backward asks for its gradients by `torch.autograd.grad`: nothing accumulates between
    steps, and a residual that receives the output's own gradient is not copied into `.grad`,
    which in a network, where the residual is no leaf, would not happen either.
    """
    if mode != "forward_backward":
        return lambda: module(*inputs)
    wanted = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    return lambda: torch.autograd.grad(module(*inputs), wanted, grads)


def time_sample(step: Step, calls: int) -> float:
    """Seconds a call, over `calls` calls."""
    start = perf_counter()
    for _ in repeat(None, calls):
        step()
    return (perf_counter() - start) / calls


def calls_per_sample(step: Step, least: float) -> int:
    """How many calls make a sample of at least `least` seconds.

    >>> calls_per_sample(lambda: None, least=0.0)
    1
    """
    calls = 1
    while time_sample(step, calls) * calls < least:
        calls *= 2
    return calls


def interleave(steps: Mapping[str, Step], budget: Budget) -> dict[str, list[float]]:
    """Seconds a call, one entry a round, for every contender; each was called before.

    The garbage collector is off meanwhile: a collection would fall on one contender by chance.
    """
    calls = {name: calls_per_sample(step, budget.sample) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = perf_counter()
        rounds = 0
        while True:
            for name, step in steps.items():
                times[name].append(time_sample(step, calls[name]))
            rounds += 1
            elapsed = perf_counter() - start
            settled = rounds >= budget.rounds and elapsed >= budget.settle
            if rounds >= budget.fewest_rounds and (settled or elapsed >= budget.seconds):
                return times
    finally:
        if collecting:
            gc.enable()


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times faster ours is, round by round."""
    return Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])
