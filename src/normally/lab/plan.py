"""What is to be measured: one experiment on one data set with one budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import data as data_module
from .experiment import Experiment, Record
from .fingerprint import fingerprint
from .storage import Store

Grid = list[tuple[str, int]]


@dataclass(frozen=True)
class Plan:
    """An experiment with everything chosen; made by `plan`."""

    experiment: Experiment
    data: str
    budget: str
    settings: Mapping[str, Any]
    out: Path

    @property
    def folder(self) -> Path:
        """Where its runs, result and page are kept."""
        return self.out / self.experiment.name / f"{self.data}-{self.budget}"

    @cached_property
    def store(self) -> Store:
        """The runs of this version of the experiment's code."""
        return Store(self.folder, fingerprint(self.experiment.measure, self.data, self.settings))

    @property
    def grid(self) -> Grid:
        """All runs. Seeds go round outermost: what is stopped half-way has whole seeds."""
        seeds = range(self.settings["seeds"])
        return [(variant, seed) for seed in seeds for variant in self.experiment.variants]

    def stored(self, grid: Grid) -> dict[tuple[str, int], Record]:
        """Those of these runs that are on disk."""
        store = self.store
        loaded = {(variant, seed): store.load(variant, seed) for variant, seed in grid}
        return {cell: record for cell, record in loaded.items() if record is not None}


def plan(
    experiment: Experiment,
    *,
    data: str | None = None,
    budget: str = "quick",
    seeds: int | None = None,
    out: str | Path = "runs",
) -> Plan:
    """Choose, and say what is impossible before anything is measured.

    Args:
        experiment: what to run.
        data: one of the experiment's data sets; None takes the first that is on this machine.
        budget: one of the experiment's budgets.
        seeds: how many; None takes the budget's number.
        out: the folder of all results.

    Raises:
        ValueError: if data, budget or seeds is not possible.
    """
    if budget not in experiment.budgets:
        raise ValueError(
            f"lab: budget must be one of {', '.join(experiment.budgets)}. Got budget={budget!r}."
        )
    settings = dict(experiment.budgets[budget])
    if seeds is not None:
        settings["seeds"] = seeds
    if settings["seeds"] < 1:
        raise ValueError(f"lab: seeds must be 1 or more. Got seeds={settings['seeds']}.")
    if data is None:
        there = filter(data_module.available, experiment.data)
        data = next(there, experiment.data[0])
    if data not in experiment.data:
        raise ValueError(
            f"lab: data must be one of {', '.join(experiment.data)}. "
            f"Got data={data!r} for {experiment.name}."
        )
    return Plan(experiment, data, budget, settings, Path(out))


def core_seconds(plan: Plan) -> float | None:
    """How long all runs take on one core, from runs on disk; None where there are none.

    Runs of this very plan count first; else those of another budget, in proportion to the images
    that a run sees. A guess, to choose between a coffee and a night.
    """
    found = plan.store.seconds()
    if found:
        return math.fsum(found) / len(found) * len(plan.grid)
    for budget in plan.experiment.budgets:
        other = Plan(plan.experiment, plan.data, budget, plan.experiment.budgets[budget], plan.out)
        found = other.store.seconds()
        if found:
            factor = _images_seen(plan.settings) / _images_seen(other.settings)
            return math.fsum(found) / len(found) * len(plan.grid) * factor
    return None


def _images_seen(settings: Mapping[str, Any]) -> float:
    """By one run, up to a factor that is the same for all budgets of an experiment."""
    if "steps" in settings:
        epoch = settings["steps"] * settings.get("batch_size", 1)
    else:
        epoch = settings.get("train_images", 1)
    return float(settings.get("epochs", 1) * epoch)
