"""The statistics of all values that a batch norm gets, and how they become its running ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._report import Change
from .everybody import Everybody
from .findings import Call, Findings
from .passes import Passes
from .tap import Answer, has_variance


class Populations(NamedTuple):
    """What was found, of all processes together."""

    #: By path (3, C) float64: mean, biased variance and number of values, 0 for layers without any.
    stats: dict[str, Tensor]
    #: By path, in how many batches the layer got values.
    counts: dict[str, int]
    #: Paths of layers that were called and whose input was not seen.
    hidden: frozenset[str] = frozenset()
    #: By path, what there is to say beside the numbers.
    remarks: Mapping[str, str] = {}


def at_once(
    passes: Passes, everybody: Everybody, layers: Mapping[str, Any], prior: float
) -> Populations:
    """All layers in one pass, each normalizing with the batch's own statistics meanwhile.

    With a `prior` it is that part of the running statistics and the rest of the batch's.
    """

    def answer(call: Call, before: Findings) -> Answer:
        assert call.stats is not None  # all are measured
        layer = layers[call.path]
        if has_variance(layer, call.values):
            return "batch" if prior == 0 else mixed(layer, call.stats, prior)
        earlier = before.stats.get(call.path)
        if earlier is not None and bool((earlier[2] > 1).all()):
            return earlier[0], earlier[1]
        return "running"

    found = passes.run(answer)
    counts = count(everybody, found, layers)
    return Populations(everybody.statistics(found.stats, layers), counts, found.hidden)


def count(everybody: Everybody, found: Findings, layers: Mapping[str, Any]) -> dict[str, int]:
    """In how many batches each layer got values.

    Raises:
        ValueError: if there was no batch.
    """
    own = [found.batches, *(found.counts.get(path, 0) for path in layers)]
    batches, *counts = everybody.total(own, "the number of batches")
    if batches == 0:
        raise everybody.error("data must have at least one batch. Got none.")
    return dict(zip(layers, map(int, counts), strict=True))


def mixed(layer: Any, stats: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    """The mean and variance prior · running + (1 - prior) · new."""
    own = layer.running_mean.to(stats), layer.running_var.to(stats)
    return own[0].lerp(stats[0], 1 - prior), own[1].lerp(stats[1], 1 - prior)


def write(layer: Any, stats: Tensor, prior: float = 0.0) -> Tensor:
    """Make `stats` the running statistics; which channels have taken them.

    A channel whose new mean or variance is not finite in the buffer's dtype keeps its old ones.
    """
    n = stats[2]
    if getattr(layer, "unbiased", True):
        stats = torch.stack((stats[0], stats[1] * (n / (n - 1)), n))
    if prior:
        stats = torch.stack((*mixed(layer, stats, prior), n))
    buffers = layer.running_mean, layer.running_var
    new = [value.to(buffer.dtype) for value, buffer in zip(stats, buffers, strict=False)]
    sound: Tensor = new[0].isfinite() & new[1].isfinite()
    with torch.no_grad():
        for buffer, value in zip(buffers, new, strict=True):
            buffer.copy_(torch.where(sound, value, buffer))
    return sound


def store(
    everybody: Everybody, layers: Mapping[str, Any], found: Populations, prior: float
) -> list[Change]:
    """Write all statistics and counters, or none if there is an exception; a line a layer.

    Raises:
        ValueError: if no layer was called, or if there is a single value per channel.
    """
    if not any(found.counts.values()) and not found.hidden:
        raise everybody.error(
            "data must lead the model through its batch norms. Got outputs without a call of one; "
            "what calls the model can be given as forward=."
        )
    for path, stats in found.stats.items():
        if bool((stats[2] == 1).any()):
            raise everybody.error(
                "Expected more than 1 value per channel in all batches together, got 1 in "
                f"{path or 'the model itself'}: it has no variance. Give more data."
            )
    with _undone(layers):
        return [_store(path, layers[path], found, prior) for path in layers]


def _store(path: str, layer: Any, found: Populations, prior: float) -> Change:
    stats, batches = found.stats[path], found.counts[path]
    kind = type(layer).__name__
    if not batches:
        reason = "its forward is its own, and what it normalizes was not seen"
        never = "the model did not call it with values"
        return Change(path, kind, False, reason if path in found.hidden else never)
    before = layer.running_mean.clone(), layer.running_var.clone()
    sound = write(layer, stats, prior)
    bad = int((~sound).sum())
    skipped = layer._buffers.get("_skipped_updates")
    if skipped is not None:  # those of an older past do not count for the new statistics
        skipped.copy_(torch.where(sound, 0, skipped + 1))
    refused = f"{bad} of {len(sound)} channels not finite and left as they were"
    if bad == len(sound):
        return Change(path, kind, False, refused)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(batches)
    note = f"{int(stats[2, 0]):,} values a channel in {batches:,} batches; {_moved(layer, before)}"
    remarks = [note, refused if bad else "", found.remarks.get(path, "")]
    return Change(path, kind, True, "; ".join(filter(None, remarks)))


def _moved(layer: Any, before: tuple[Tensor, Tensor]) -> str:
    """How far the statistics were off, in words; σ are the old standard deviations."""
    mean, var = layer.running_mean.double(), layer.running_var.double()
    old_mean, old_var = before[0].double(), before[1].double()
    by = ((mean - old_mean).abs() / (old_var + layer.eps).sqrt()).nan_to_num(0, 0).max().item()
    ratio = (var + layer.eps) / (old_var + layer.eps)
    ratio = torch.maximum(ratio, 1 / ratio).nan_to_num(1, 1).max().item()
    return f"means moved by up to {by:.2g} σ, variances by a factor of up to {ratio:.3g}"


@contextmanager
def _undone(layers: Mapping[str, Any]) -> Iterator[None]:
    """On an exception all buffers are what they were."""
    before = [
        (buffer, buffer.clone())
        for layer in layers.values()
        for buffer in layer._buffers.values()
        if buffer is not None
    ]
    try:
        yield
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
