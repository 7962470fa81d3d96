"""`normally lab`: list, run, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import data as data_module
from . import engine, index, registry
from .experiment import Experiment
from .progress import Bars

app = typer.Typer(help="Experiments on what is claimed about normalization.", no_args_is_help=True)
_STYLES = {"holds": "green", "does not hold": "red", "inconclusive": "yellow"}

Names = Annotated[list[str] | None, typer.Argument(help="Experiments; see `normally lab list`.")]
Data = Annotated[
    str | None,
    typer.Option(help=f"Data set: {', '.join(data_module.NAMES)}; default: each experiment's own."),
]
Budget = Annotated[str, typer.Option(help="quick: minutes. full: more seeds and epochs.")]
Seeds = Annotated[int | None, typer.Option(help="Number of seeds; default: the budget's.", min=1)]
Out = Annotated[Path, typer.Option(help="Folder of all results.")]


@app.command("list")
def list_() -> None:
    """The experiments and their claims."""
    table = Table(box=None, pad_edge=False)
    table.add_column("experiment", style="bold", no_wrap=True)
    table.add_column("data", no_wrap=True)
    table.add_column("claim")
    for experiment in registry.experiments().values():
        table.add_row(experiment.name, " ".join(experiment.data), experiment.claim)
    _console().print(table)


@app.command()
def run(
    names: Names = None,
    all_: Annotated[bool, typer.Option("--all", help="Every experiment.")] = False,
    data: Data = None,
    budget: Budget = "quick",
    seeds: Seeds = None,
    out: Out = Path("runs"),
) -> None:
    """Run experiments and make their pages.

    Finished runs are kept: the same command continues a stopped one.
    """
    console = _console()
    chosen = _chosen(names, all_)
    _check(data, budget, chosen)
    pages = []
    try:
        with Bars(console) as bars:
            for experiment in chosen:
                results = engine.run(
                    experiment, data=data, budget=budget, seeds=seeds, out=out, progress=bars
                )
                verdict, page = engine.conclude(experiment, results, budget=budget, out=out)
                style = _STYLES[verdict.status]
                console.print(f"[bold]{experiment.name}[/]: [{style}]{verdict.status}[/]")
                console.print(verdict.sentence, highlight=False)
                pages.append(page)
    except KeyboardInterrupt:
        console.print("Stopped. Finished runs are kept; the same command continues.")
        raise typer.Exit(130) from None
    if len(pages) > 1:
        pages.append(index.write(out))
    else:
        index.write(out)
    _announce(console, pages)


@app.command()
def report(out: Out = Path("runs")) -> None:
    """Make all pages again from the runs on disk, and the index of them."""
    console = _console()
    pages = []
    for name, data, budget in index.kept(out):
        experiment = registry.find(name)
        results = engine.recorded(experiment, data=data, budget=budget, out=out)
        if not results.seeds(*experiment.variants):
            console.print(f"{name} ({data}, {budget}): no complete seed of this version; left out.")
            continue
        pages.append(engine.conclude(experiment, results, budget=budget, out=out)[1])
    if not pages:
        console.print(f"No finished experiment in {out}. Run one: normally lab run quickstart")
        raise typer.Exit(1)
    pages.append(index.write(out))
    _announce(console, pages)


def _console() -> Console:
    return Console(soft_wrap=not Console().is_terminal)


def _chosen(names: list[str] | None, all_: bool) -> list[Experiment]:
    if all_ == bool(names):
        raise typer.BadParameter("name experiments or give --all. See `normally lab list`.")
    if all_:
        return list(registry.experiments().values())
    try:
        return [registry.find(name) for name in names or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _check(data: str | None, budget: str, chosen: list[Experiment]) -> None:
    """Say what is wrong before the first run, not after the third experiment."""
    try:
        for experiment in chosen:
            engine.plan(experiment, budget, None)
        for name in sorted({engine.chosen_data(experiment, data) for experiment in chosen}):
            data_module.load(name)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None


def _announce(console: Console, pages: list[Path]) -> None:
    console.print()
    for page in pages:
        console.print(f"Page: {page}", soft_wrap=True, highlight=False)
        console.print(f"      {page.as_uri()}", soft_wrap=True, highlight=False)
