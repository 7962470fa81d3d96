"""Run the grid of an experiment, keep every finished run, make verdict and page.

out/<name>/<data>-<budget>/runs/<variant>-seed<n>.json    one finished run each
out/<name>/<data>-<budget>/result.json                    verdict, effects, machine
out/<name>/<data>-<budget>/report.html, figures/          the page and its figures
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import environment, report
from . import data as data_module
from . import page
from .experiment import Experiment, Record, Results, Run
from .fingerprint import fingerprint
from .progress import Progress
from .storage import Store, write_json
from .verdict import Verdict


def run(
    experiment: Experiment,
    *,
    data: str | None = None,
    budget: str = "quick",
    seeds: int | None = None,
    out: str | Path = "runs",
    progress: Progress | None = None,
) -> Results:
    """Measure what is not on disk yet; a stopped run continues where it was.

    Seeds go round outermost, so that a run stopped half-way has whole seeds to compare.

    Args:
        experiment: what to run.
        data: one of the experiment's data sets; None takes its first.
        budget: one of the experiment's budgets.
        seeds: how many; None takes the budget's number.
        out: the folder of all results.
        progress: is told of every run and epoch.

    Raises:
        ValueError: if data, budget or seeds is not possible.
    """
    settings, data = plan(experiment, budget, seeds), chosen_data(experiment, data)
    dataset = data_module.load(data)
    store = _store(experiment, data, budget, settings, Path(out))
    grid = [(variant, seed) for seed in range(settings["seeds"]) for variant in experiment.variants]
    records = _stored(store, grid)
    progress = progress or Progress()
    machine = environment.sentence(environment.describe())
    progress.begin(experiment.name, len(records), len(grid))
    for variant, seed in grid:
        if (variant, seed) in records:
            continue
        progress.run(f"{variant}, seed {seed}")
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            record = experiment.measure(Run(variant, seed, dataset, settings, progress.epoch))
        store.save(variant, seed, record, time.perf_counter() - started, machine)
        # Read back what was written: a resumed run and an uninterrupted one see the same values.
        records |= _stored(store, [(variant, seed)])
        progress.finish()
    return Results(records, dataset, settings, settings["seeds"], store.machines())


def recorded(
    experiment: Experiment,
    *,
    data: str | None = None,
    budget: str = "quick",
    seeds: int | None = None,
    out: str | Path = "runs",
) -> Results:
    """The runs on disk, without measuring; arguments as in `run`."""
    settings, data = plan(experiment, budget, seeds), chosen_data(experiment, data)
    store = _store(experiment, data, budget, settings, Path(out))
    found = {
        int(path.stem.rpartition("-seed")[2]) for path in store.folder.glob("runs/*-seed*.json")
    }
    grid = [(variant, seed) for seed in sorted(found) for variant in experiment.variants]
    records = _stored(store, grid)
    return Results(records, data_module.load(data), settings, settings["seeds"], store.machines())


def conclude(
    experiment: Experiment,
    results: Results,
    *,
    budget: str = "quick",
    out: str | Path = "runs",
) -> tuple[Verdict, Path]:
    """Judge the results and write `result.json` and the page beside the runs.

    Returns:
        The verdict and the page's path.
    """
    folder = _folder(experiment, results.data.name, budget, Path(out))
    verdict = experiment.judge(results)
    write_json(
        folder / "result.json",
        {
            "experiment": experiment.name,
            "claim": experiment.claim,
            "data": results.data.name,
            "budget": {"name": budget, **results.budget},
            "runs": len(results.records),
            "verdict": verdict.as_json(),
            "measured_with": list(results.machines),
        },
    )
    with report.style():
        made = page.page(experiment, results, verdict, budget)
        return verdict, report.write(made, folder / "report.html")


def plan(experiment: Experiment, budget: str, seeds: int | None) -> dict[str, Any]:
    """The budget's settings with this number of seeds; ValueError where they make no sense."""
    if budget not in experiment.budgets:
        raise ValueError(
            f"lab: budget must be one of {', '.join(experiment.budgets)}. Got budget={budget!r}."
        )
    settings = dict(experiment.budgets[budget])
    if seeds is not None:
        settings["seeds"] = seeds
    if settings["seeds"] < 1:
        raise ValueError(f"lab: seeds must be 1 or more. Got seeds={settings['seeds']}.")
    return settings


def chosen_data(experiment: Experiment, data: str | None) -> str:
    """The data set's name, the experiment's first for None; ValueError if it may not use it."""
    name = experiment.data[0] if data is None else data
    if name not in experiment.data:
        raise ValueError(
            f"lab: data must be one of {', '.join(experiment.data)}. "
            f"Got data={name!r} for {experiment.name}."
        )
    return name


def _folder(experiment: Experiment, data: str, budget: str, out: Path) -> Path:
    return out / experiment.name / f"{data}-{budget}"


def _store(
    experiment: Experiment, data: str, budget: str, settings: Mapping[str, Any], out: Path
) -> Store:
    digest = fingerprint(experiment.measure, data, settings)
    return Store(_folder(experiment, data, budget, out), digest)


def _stored(store: Store, grid: list[tuple[str, int]]) -> dict[tuple[str, int], Record]:
    loaded = {(variant, seed): store.load(variant, seed) for variant, seed in grid}
    return {cell: record for cell, record in loaded.items() if record is not None}
