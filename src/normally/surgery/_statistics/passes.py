"""Passes over the data, and the statistics of what batch norms get in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from ..._ops import sync_batch_norm
from .._batches import Batches
from .._progress import Told
from .findings import Call, Findings
from .partial_sums import PartialSums
from .tap import Answer, tapped, values_of


class _Enough(BaseException):
    """Ends a forward of which no more is needed; no Exception, which a model might catch."""


class Passes:
    """Runs the model over all batches, as often as it is asked to.

    Args:
        layers: what may be measured, by path.
        batches: the data.
        sums: where what was found is kept; a pass that is there already is not run again.
        tell: told after every batch how many are done, and how many there will be.
    """

    def __init__(
        self,
        layers: Mapping[str, torch.nn.Module],
        batches: Batches,
        sums: PartialSums,
        tell: Told,
    ) -> None:
        self._layers, self._batches, self._sums, self._tell = layers, batches, sums, tell
        #: How many passes there will be, as far as that is known.
        self.expected = 1

    @torch.no_grad()
    def run(
        self,
        answer: Callable[[Call, Findings], Answer],
        measures: Callable[[str, int], bool] = lambda path, position: True,
        until: tuple[str, int] | None = None,
    ) -> Findings:
        """One pass over the data.

        Args:
            answer: what normalizes in a call, given what was found before its batch.
            measures: whether a layer is measured that is called as the position-th in a forward.
            until: where a forward may end: at this layer's call of that number, the first being 1.
        """
        found = self._sums.begin()
        if found.is_complete:
            return found
        calls: list[Call] = []

        def see(path: str, x: Tensor, mask: Tensor | None) -> Answer:
            wanted = measures(path, len(calls))
            stats = sync_batch_norm.statistics(x, mask) if wanted else None
            call = Call(path, stats, values_of(x, mask))
            calls.append(call)
            if until is not None and until == (path, sum(c.path == path for c in calls)):
                raise _Enough
            return answer(call, found)

        with tapped(self._layers, see) as called:
            for batch in self._batches.since(found.batches):
                calls.clear()
                called.clear()
                with suppress(_Enough):
                    self._batches.forward(batch)
                hidden = frozenset(called - {call.path for call in calls})
                found = found.plus(calls, hidden)
                self._sums.put(found)
                count = self._batches.count
                self._tell(self._sums.batches, None if count is None else count * self.expected)
        found = replace(found, is_complete=True)
        self._sums.put(found)
        return found
