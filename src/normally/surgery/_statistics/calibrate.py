"""Measure batch norms over data and write what was found: for `recalibrate` and `adapt`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .._batches import Batches
from .._evaluation import evaluation
from .._progress import Told, told
from .._report import Change
from .everybody import Everybody
from .layerwise import layer_by_layer
from .partial_sums import PartialSums, identity
from .passes import Passes
from .population import at_once, store


class Options(NamedTuple):
    """How statistics are measured; see `recalibrate`."""

    layerwise: bool = False
    #: The part of the running statistics that stays.
    prior: float = 0.0
    group: Any = None
    progress: bool | Told | None = False
    resume: str | os.PathLike[str] | None = None


def calibrate(
    model: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    batches: Batches,
    options: Options,
    caller: str,
) -> list[Change]:
    """Measure the layers and write their statistics; a line of the report for each."""
    everybody = Everybody(options.group, layers, caller)
    with (
        _partial_sums(model, layers, batches, options, everybody, caller) as sums,
        told(options.progress, caller, everybody.rank == 0) as tell,
        evaluation(model),
    ):
        passes = Passes(layers, batches, sums, tell)
        if options.layerwise:
            passes.expected = len(layers)
            populations = layer_by_layer(passes, everybody, layers)
        else:
            populations = at_once(passes, everybody, layers, options.prior)
        return store(everybody, layers, populations, options.prior)


def _partial_sums(
    model: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    batches: Batches,
    options: Options,
    everybody: Everybody,
    caller: str,
) -> PartialSums:
    if options.resume is None:
        return PartialSums(None, "", {}, layers, caller)
    path = os.fspath(options.resume)
    if everybody.size > 1:
        path = f"{path}.rank{everybody.rank}"
    settings = {
        "layerwise": options.layerwise,
        "steps": batches.steps,
        "processes": everybody.size,
        "rank": everybody.rank,
        "layers": list(layers),
    }
    return PartialSums(path, identity(model), settings, layers, caller)
