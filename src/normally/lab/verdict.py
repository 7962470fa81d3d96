"""From paired measurements to a verdict: effect, confidence interval, threshold.

Two sides of a comparison share their seed: the same initial weights and the same order of the
data. So each seed gives one difference, and the effect is their mean. The interval is the
percentile bootstrap (Efron 1979) over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Status = Literal["holds", "does not hold", "inconclusive"]

# Below three seeds the bootstrap knows next to nothing; no verdict is drawn from it.
MIN_SEEDS = 3


@dataclass(frozen=True)
class Effect:
    """A mean over seeds with its confidence interval, in `unit`."""

    name: str
    values: tuple[float, ...]
    estimate: float
    low: float
    high: float
    unit: str = ""
    confidence: float = 0.95

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.estimate:.3g}{unit} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Criterion:
    """An effect and the threshold, fixed before the runs, that it has to reach.

    `decidable` is False where the runs could not show the effect, whatever its number says.
    """

    effect: Effect
    at_least: float
    decidable: bool = True

    @property
    def status(self) -> Status:
        """Holds or fails only when the whole interval lies on one side of the threshold."""
        if not self.decidable or len(self.effect.values) < MIN_SEEDS:
            return "inconclusive"
        if self.effect.low >= self.at_least:
            return "holds"
        return "does not hold" if self.effect.high < self.at_least else "inconclusive"


@dataclass(frozen=True)
class Verdict:
    """What the criteria say together, and the sentence that explains it."""

    status: Status
    sentence: str
    criteria: tuple[Criterion, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `result.json`."""
        return {
            "status": self.status,
            "sentence": self.sentence,
            "criteria": [
                {
                    "effect": criterion.effect.name,
                    "unit": criterion.effect.unit,
                    "estimate": criterion.effect.estimate,
                    "confidence": criterion.effect.confidence,
                    "interval": [criterion.effect.low, criterion.effect.high],
                    "by_seed": list(criterion.effect.values),
                    "at_least": criterion.at_least,
                    "status": criterion.status,
                }
                for criterion in self.criteria
            ],
        }


def bootstrap(
    values: Sequence[float],
    statistic: Callable[..., Any] = np.mean,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic(values, axis=-1)`.

    The resampling has its own fixed generator: the same values give the same interval.

    Args:
        values: independent measurements.
        statistic: takes an array and `axis`.
        confidence: between 0 and 1.
        resamples: how often to draw.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: without values, or with a value that is not finite.

    >>> bootstrap([2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(
            f"bootstrap: values must be finite numbers, at least one. Got values={list(values)}."
        )
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, sample.size, (resamples, sample.size))
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistic(sample[drawn], axis=-1), [tail, 1 - tail])
    return float(low), float(high)


def paired_effect(
    name: str,
    treated: Sequence[float],
    control: Sequence[float],
    unit: str = "",
    *,
    ratio: bool = False,
    confidence: float = 0.95,
) -> Effect:
    """Mean difference treated - control over seeds, with its bootstrap interval.

    Args:
        name: what is compared, in words.
        treated: one value a seed.
        control: one value a seed, in the same order.
        unit: of the difference.
        ratio: compare treated / control instead, as the geometric mean over seeds.
        confidence: of the interval.

    Raises:
        ValueError: if the sides differ in length, or a ratio is asked of values not positive.

    >>> effect = paired_effect("accuracy", [0.9, 0.8, 0.9], [0.5, 0.6, 0.5])
    >>> round(effect.estimate, 2), round(effect.low, 2), round(effect.high, 2)
    (0.33, 0.2, 0.4)
    """
    if len(treated) != len(control):
        raise ValueError(
            "paired_effect: treated and control must hold the same seeds. "
            f"Got {len(treated)} and {len(control)} values."
        )
    if not ratio:
        values = [float(a) - float(b) for a, b in zip(treated, control, strict=True)]
        low, high = bootstrap(values, confidence=confidence)
        return Effect(
            name, tuple(values), math.fsum(values) / len(values), low, high, unit, confidence
        )
    if min((*treated, *control), default=0) <= 0:
        raise ValueError(f"paired_effect: a ratio of {name!r} needs positive values.")
    logs = [math.log(a / b) for a, b in zip(treated, control, strict=True)]
    low, high = (math.exp(end) for end in bootstrap(logs, confidence=confidence))
    estimate = math.exp(math.fsum(logs) / len(logs))
    return Effect(name, tuple(map(math.exp, logs)), estimate, low, high, unit, confidence)


def decide(criteria: Sequence[Criterion], sentence: str, *, one_suffices: bool = False) -> Verdict:
    """A claim holds when every criterion holds and fails when one of them fails.

    With `one_suffices` it is the other way round: it holds when one holds, and fails when all fail.
    """
    found = {criterion.status for criterion in criteria}
    strong: Status = "holds" if one_suffices else "does not hold"  # one of them is enough
    weak: Status = "does not hold" if one_suffices else "holds"  # all have to be
    status: Status = "inconclusive"
    if strong in found:
        status = strong
    elif found == {weak}:
        status = weak
    return Verdict(status, sentence, tuple(criteria))
