"""Run the grid of an experiment, keep every finished run, make verdict and page.

out/<name>/<data>-<budget>/runs/<variant>-seed<n>.json    one finished run each
out/<name>/<data>-<budget>/result.json                    verdict, effects, machine
out/<name>/<data>-<budget>/report.html, figures/          the page and its figures
out/<name>/<data>-<budget>/<name>.py, picture.svg         its code; what the index shows of it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from .. import report
from . import data as data_module
from . import page
from .experiment import Experiment, Results
from .plan import Grid, Plan, plan
from .progress import Progress
from .storage import write_json
from .verdict import Verdict
from .workers import Cell, Listen, Workers, in_processes, on_ray, serial

ENGINES = ("local", "ray")


def run(
    experiment: Experiment,
    *,
    data: str | None = None,
    budget: str = "quick",
    seeds: int | None = None,
    out: str | Path = "runs",
    jobs: int = 1,
    engine: str = "local",
    progress: Progress | None = None,
) -> Results:
    """Measure what is not on disk yet; a stopped run continues where it was.

    Args:
        experiment: what to run.
        data: one of the experiment's data sets; None takes the first that is on this machine.
        budget: one of the experiment's budgets.
        seeds: how many; None takes the budget's number.
        out: the folder of all results.
        jobs: runs at a time, in processes of one thread each; 1 measures in this process. The
            numbers are the same. A script that asks for more needs the usual
            `if __name__ == "__main__":`.
        engine: "local", or "ray" for a cluster, where `jobs` does not matter.
        progress: is told of every run and epoch.

    Raises:
        ValueError: if an argument is not possible.
        RuntimeError: if a run failed; those that ended are kept.
    """
    chosen = plan(experiment, data=data, budget=budget, seeds=seeds, out=out)
    [(_, results)] = run_all([chosen], jobs=jobs, engine=engine, progress=progress)
    return results


def run_all(
    plans: Sequence[Plan],
    *,
    jobs: int = 1,
    engine: str = "local",
    progress: Progress | None = None,
) -> Iterator[tuple[Plan, Results]]:
    """Measure several experiments with the same workers; arguments as in `run`.

    Yields:
        Each plan with its results as soon as its last run has ended.
    """
    workers, progress = _workers(jobs, engine), progress or Progress()
    tasks = [task for chosen in plans for task in _tasks(chosen)]
    total = sum(len(chosen.grid) for chosen in plans)
    progress.begin(total - len(tasks), total)
    left = Counter(id(task.plan) for task in tasks)
    for chosen in plans:
        if not left[id(chosen)]:
            yield chosen, _results(chosen, chosen.grid)
    failures = []
    for alone, work in ((False, workers), (True, serial)):
        group = [task for task in tasks if task.cell.alone == alone]
        with closing(work([task.cell for task in group], _listener(progress, group))) as outcomes:
            for index, outcome in outcomes:
                task = group[index]
                if outcome.record is None:
                    failures.append(f"{task.label}\n{outcome.error}")
                    continue
                store, cell = task.plan.store, task.cell
                store.save(
                    cell.variant, cell.seed, outcome.record, outcome.seconds, outcome.machine
                )
                progress.finish(index, task.label)
                left[id(task.plan)] -= 1
                if not left[id(task.plan)]:
                    yield task.plan, _results(task.plan, task.plan.grid)
    if failures:
        raise RuntimeError(
            f"lab: {len(failures)} of {total} runs failed; the others are kept. "
            "The same command tries again.\n\n" + "\n".join(failures)
        )


@dataclass(frozen=True)
class _Task:
    """A run that is not on disk yet."""

    plan: Plan
    cell: Cell

    @property
    def label(self) -> str:
        return f"{self.plan.experiment.name}: {self.cell.variant}, seed {self.cell.seed}"


def _tasks(chosen: Plan) -> list[_Task]:
    experiment, stored = chosen.experiment, chosen.stored(chosen.grid)
    cells = [
        Cell(
            experiment.measure,
            variant,
            seed,
            chosen.data,
            chosen.settings,
            alone=variant in experiment.alone,
        )
        for variant, seed in chosen.grid
        if (variant, seed) not in stored
    ]
    return [_Task(chosen, cell) for cell in cells]


def _listener(progress: Progress, tasks: Sequence[_Task]) -> Listen:
    """From what workers say to what the progress shows."""

    def listen(index: int, done: int, total: int) -> None:
        if total == 0:
            progress.run(index, tasks[index].label)
        else:
            progress.epoch(index, done, total)

    return listen


def recorded(
    experiment: Experiment,
    *,
    data: str | None = None,
    budget: str = "quick",
    seeds: int | None = None,
    out: str | Path = "runs",
) -> Results:
    """The runs on disk, without measuring; arguments as in `run`."""
    chosen = plan(experiment, data=data, budget=budget, seeds=seeds, out=out)
    found = {
        int(path.stem.rpartition("-seed")[2]) for path in chosen.folder.glob("runs/*-seed*.json")
    }
    return _results(
        chosen, [(variant, seed) for seed in sorted(found) for variant in experiment.variants]
    )


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
    folder = Plan(experiment, results.data.name, budget, results.budget, Path(out)).folder
    verdict = experiment.judge(results)
    with report.style():
        made = page.page(experiment, results, verdict, budget)
        written = report.write(made, folder / "report.html")
        figure = page.first_figure(made)
        if figure is not None:
            (folder / "picture.svg").write_text(page.picture(figure), encoding="utf-8")
    page.write_source(experiment, folder)
    write_json(
        folder / "result.json",
        {
            "experiment": experiment.name,
            "title": experiment.title,
            "claim": experiment.claim,
            "data": results.data.name,
            "budget": {"name": budget, **results.budget},
            "runs": len(results.records),
            "seeds": results.seeds(*experiment.variants),
            "verdict": verdict.as_json(),
            "figure": figure and f"figures/{figure.name}.svg",
            "measured_with": list(results.machines),
        },
    )
    return verdict, written


def _workers(jobs: int, engine: str) -> Workers:
    if engine not in ENGINES:
        raise ValueError(f"lab: engine must be one of {', '.join(ENGINES)}. Got engine={engine!r}.")
    if jobs < 1:
        raise ValueError(f"lab: jobs must be 1 or more. Got jobs={jobs}.")
    if engine == "ray":
        return on_ray
    return serial if jobs == 1 else in_processes(jobs)


def _results(chosen: Plan, grid: Grid) -> Results:
    """Read from disk: a resumed experiment and an uninterrupted one see the same values."""
    return Results(
        chosen.stored(grid),
        data_module.load(chosen.data),
        chosen.settings,
        chosen.settings["seeds"],
        chosen.store.machines(),
    )
