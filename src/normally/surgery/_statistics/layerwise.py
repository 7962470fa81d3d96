"""`recalibrate(layerwise=True)`: one layer after the other, each behind those that are right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .everybody import Everybody
from .findings import Call, Findings
from .order import Block, blocks, relations
from .passes import Passes
from .population import Populations, count, write
from .tap import Answer, has_variance

#: How often statistics that depend on themselves are measured again.
_MAX_TURNS = 50

#: How far they may still move: in standard deviations, and relative to the variance.
_TOLERANCE = 1e-6


def layer_by_layer(passes: Passes, everybody: Everybody, layers: Mapping[str, Any]) -> Populations:
    """All layers in the order of execution, in evaluation, earlier ones with new statistics."""
    with _lent(layers):
        # Where a forward begins nothing depends on statistics: these are right at once.
        first = passes.run(
            lambda call, before: "running", measures=lambda path, position: position == 0
        )
        counts = count(everybody, first, layers)
        order = _order(everybody, first.orders, counts)
        later = [block for block in order if block.has_ancestors or block.depends_on_itself]
        passes.expected = 1 + sum(len(b.paths) + b.depends_on_itself for b in later)
        stats: dict[str, Tensor] = {}
        remarks: dict[str, str] = {}
        for block in order:
            if block in later:
                found, remark = _Settling(block, passes, everybody, layers, first).run()
                remarks.update(dict.fromkeys(block.paths, remark))
            else:
                found = everybody.statistics(first.stats, block.paths)
                write(layers[block.paths[0]], found[block.paths[0]])
            stats.update(found)
    stats.update(everybody.statistics({}, [path for path in layers if path not in stats]))
    return Populations(stats, counts, first.hidden, remarks)


def _order(
    everybody: Everybody, orders: frozenset[tuple[str, ...]], counts: Mapping[str, int]
) -> list[Block]:
    """The same in all processes: one of them may have met other layers, or none."""
    paths = list(counts)
    own = relations(orders, paths)
    total = everybody.total(own.flatten().tolist(), "the order of the layers")
    before = torch.tensor(total, dtype=own.dtype).view_as(own)
    return blocks(before, [bool(n) for n in counts.values()], paths)


class _Settling:
    """Measures the layers of a block, behind all that comes before it.

    Each is measured behind those of the block that are called before it, which is all that there is
    to do where the block is one layer, or where layers are called again with other inputs (a
    network that takes two images). Where a layer gets what its own output has become, its
    statistics depend on themselves: all are measured again with those that were measured, until
    they stay. Where they do not come closer, half of each step is taken.
    """

    def __init__(
        self,
        block: Block,
        passes: Passes,
        everybody: Everybody,
        layers: Mapping[str, Any],
        first: Findings,
    ) -> None:
        self._block, self._passes, self._everybody = block, passes, everybody
        self._layers, self._first = layers, first

    def run(self) -> tuple[dict[str, Tensor], str]:
        """The statistics by path, and a remark if they did not converge."""
        paths, layers = self._block.paths, self._layers
        current: dict[str, Tensor] = {}
        for position, path in enumerate(paths):
            fresh = paths[position:] if self._block.depends_on_itself else ()
            current.update(self._measure((path,), fresh))
            write(layers[path], current[path])
        if not self._block.depends_on_itself:
            return current, ""
        step, last = 1.0, math.inf
        for turn in range(_MAX_TURNS):
            measured = self._measure(paths)
            moved = max(_distance(layers[p], current[p], measured[p]) for p in paths)
            current = {p: _between(current[p], measured[p], step) for p in paths}
            for path in paths:
                write(layers[path], current[path])
            if moved <= 1:
                return current, ""
            if turn and moved > last / 2:
                step = 0.5
            last = moved
            self._passes.expected += 1
        return current, (
            f"did not converge in {_MAX_TURNS} turns, as what it gets depends on its own output: "
            f"the last was off by {moved * _TOLERANCE:.1e}"
        )

    def _measure(self, wanted: Sequence[str], fresh: Sequence[str] = ()) -> dict[str, Tensor]:
        """The statistics of these layers; the `fresh` ones have none yet, but their batches'."""

        def answer(call: Call, before: Findings) -> Answer:
            own = call.path in fresh and has_variance(self._layers[call.path], call.values)
            return "batch" if own else "running"

        found = self._passes.run(
            answer, measures=lambda path, position: path in wanted, until=self._until(wanted)
        )
        if found.batches != self._first.batches:
            raise self._everybody.error(
                "data must give as many batches each time. "
                f"Got {self._first.batches} in the first pass and {found.batches} in a later one."
            )
        return self._everybody.statistics(found.stats, wanted)

    def _until(self, wanted: Sequence[str]) -> tuple[str, int] | None:
        """The last call of a forward that is needed, where that is known."""
        if len(wanted) > 1:
            return None
        calls = {order.count(wanted[0]) for order in self._first.orders}
        # Where forwards differ, one of another batch might call it more often.
        known = len(self._first.orders) == 1 or not self._block.depends_on_itself
        return (wanted[0], max(calls, default=1)) if known else None


def _between(before: Tensor, after: Tensor, step: float) -> Tensor:
    """So far from one to the other; the other where the first is not finite."""
    return torch.where(before.isfinite(), before.lerp(after, step), after)


def _distance(layer: Any, before: Tensor, after: Tensor) -> float:
    """How far statistics have moved, as a multiple of what may be left."""
    rounding = torch.finfo(layer.running_mean.dtype).eps
    spread = after[1] + layer.eps
    mean = (after[0] - before[0]).abs()
    mean = mean / (_TOLERANCE * spread.sqrt() + rounding * after[0].abs())
    var = (after[1] - before[1]).abs() / ((_TOLERANCE + rounding) * spread)
    largest: float = torch.maximum(mean, var).nan_to_num(0, 0).max().item()
    return largest


@contextmanager
def _lent(layers: Mapping[str, Any]) -> Iterator[None]:
    """Copies in the place of the running statistics: what is written to them is not kept."""
    names = ("running_mean", "running_var")
    own = {path: [layer._buffers[name] for name in names] for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer._buffers.update({n: t.clone() for n, t in zip(names, own[path], strict=True)})
        yield
    finally:
        for path, layer in layers.items():
            layer._buffers.update(dict(zip(names, own[path], strict=True)))
