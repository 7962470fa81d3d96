"""What a pass over the data has found out about the inputs of batch norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ... import distributed


class Call(NamedTuple):
    """One call of a layer."""

    path: str
    #: (3, C) float64: mean, biased variance and number of values; None where it is not measured.
    stats: Tensor | None
    #: How many values a channel has.
    values: int


@dataclass(frozen=True)
class Findings:
    """What was found so far. It never changes, so an interrupt finds whole batches only."""

    batches: int = 0
    #: By path the statistics of all values so far, as in `Call`.
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    #: By path, in how many batches the layer got values.
    counts: Mapping[str, int] = field(default_factory=dict)
    #: The paths in the order of the calls, of every kind of forward that there was.
    orders: frozenset[tuple[str, ...]] = frozenset()
    #: Paths of layers that were called and whose input was not seen.
    hidden: frozenset[str] = frozenset()
    is_complete: bool = False

    def plus(self, calls: list[Call], hidden: frozenset[str]) -> Findings:
        """This and one more batch."""
        stats, counts = dict(self.stats), dict(self.counts)
        for call in calls:
            if call.stats is not None:
                before = [stats[call.path]] if call.path in stats else []
                stats[call.path] = distributed.merge(torch.stack((*before, call.stats)))
        for path in {call.path for call in calls if call.values}:
            counts[path] = counts.get(path, 0) + 1
        order = tuple(call.path for call in calls)
        return Findings(
            self.batches + 1, stats, counts, self.orders | {order}, self.hidden | hidden, False
        )
