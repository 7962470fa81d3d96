"""`normally lab`: list, run, compare, report."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import compare as compare_module
from . import data as data_module
from . import engine, index, registry
from .experiment import Experiment, Results
from .plan import Plan, core_seconds, plan
from .progress import Bars
from .storage import read_json

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
Jobs = Annotated[
    int | None, typer.Option(help="Runs at a time; default: the number of cores.", min=1)
]
Engine = Annotated[
    str, typer.Option("--engine", help="local, or ray: the cluster that RAY_ADDRESS names.")
]


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
    jobs: Jobs = None,
    engine_: Engine = "local",
) -> None:
    """Run experiments and make their pages.

    Finished runs are kept: the same command continues a stopped one.
    """
    console = _console()
    plans = _plans(console, _chosen(names, all_), data, budget, seeds, out, strict=not all_)
    _run(console, plans, jobs, engine_, out)


@app.command()
def compare(
    factory: Annotated[str, typer.Argument(help="module:function that makes your model.")],
    data: Annotated[
        str,
        typer.Option(
            help="module:function; takes a batch size, gives what to train on and what to test "
            f"on. Or one of {', '.join(data_module.NAMES)}."
        ),
    ],
    norms: Annotated[
        str, typer.Option(help="Normalizations; the first is what the others are compared with.")
    ] = "batch,layer,group:8,rms,none",
    batch_sizes: Annotated[str, typer.Option(help="Of the training.")] = "4,32,128",
    lrs: Annotated[str, typer.Option(help="Learning rates, the same for each.")] = "0.01,0.1,1",
    epochs: Annotated[int, typer.Option(help="Passes over the training data.", min=1)] = 5,
    seeds: Annotated[int, typer.Option(help="Number of seeds.", min=1)] = 3,
    out: Out = Path("runs"),
    jobs: Jobs = None,
    engine_: Engine = "local",
) -> None:
    """Train your own model under each normalization: which one at which batch size?

    Finished runs are kept: the same command continues a stopped one.
    """
    console = _console()
    try:
        experiment = compare_module.make(
            factory,
            data,
            norms=_words(norms),
            batch_sizes=[int(word) for word in _words(batch_sizes)],
            lrs=[float(word) for word in _words(lrs)],
            epochs=epochs,
            seeds=seeds,
        )
        compare_module.check(experiment)
        made = plan(experiment, budget="compare", seeds=seeds, out=out)
    except (ValueError, TypeError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    _run(console, [made], jobs, engine_, out)


def _run(console: Console, plans: list[Plan], jobs: int | None, engine_: str, out: Path) -> None:
    """Measure, conclude each experiment as it ends, and say where the pages are."""
    if engine_ not in engine.ENGINES:
        known = ", ".join(engine.ENGINES)
        raise typer.BadParameter(f"lab: engine must be one of {known}. Got engine={engine_!r}.")
    jobs = jobs or _cores()
    _announce_length(console, plans, jobs)
    pages: list[Path] = []
    broken: list[str] = []
    try:
        with Bars(console) as bars:
            running = engine.run_all(plans, jobs=jobs, engine=engine_, progress=bars)
            for plan, results in running:
                try:
                    pages.append(_conclude(console, plan, results))
                except Exception:  # a page must not take the runs of the others with it
                    broken.append(f"{plan.experiment.name}: no verdict.\n{traceback.format_exc()}")
    except KeyboardInterrupt:
        console.print(
            "Stopped. Finished runs are kept: the same command continues, and "
            f"`normally lab report --out {out}` shows what is there.",
            highlight=False,
        )
        raise typer.Exit(130) from None
    except (ImportError, RuntimeError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    finally:
        pages += [index.write(out)] if pages else []
    _announce(console, pages)
    if broken:
        console.print("\n".join(broken), style="red", markup=False, highlight=False)
        raise typer.Exit(1)


@app.command()
def report(out: Out = Path("runs")) -> None:
    """Make all pages again from the runs on disk, and the index of them."""
    console = _console()
    pages = []
    for name, data, budget in index.kept(out):
        experiment = _known(out, name, data, budget)
        if experiment is None:
            console.print(f"{name} ({data}, {budget}): no experiment of this version; left out.")
            continue
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


def _known(out: Path, name: str, data: str, budget: str) -> Experiment | None:
    if name in registry.experiments():
        return registry.find(name)
    result = read_json(out / name / f"{data}-{budget}" / "result.json")
    return compare_module.remade(result["budget"]) if result and budget == "compare" else None


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


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


def _plans(
    console: Console,
    chosen: list[Experiment],
    data: str | None,
    budget: str,
    seeds: int | None,
    out: Path,
    *,
    strict: bool,
) -> list[Plan]:
    """Say what is wrong before the first run, not after the third experiment."""
    plans = []
    try:
        for experiment in chosen:
            wanted = data if strict or data in experiment.data else None
            made = plan(experiment, data=wanted, budget=budget, seeds=seeds, out=out)
            plans.append(made)
            if made.data != (data or experiment.data[0]):
                _say_other_data(console, made, data)
        for name in sorted({made.data for made in plans}):
            data_module.load(name)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    return plans


def _say_other_data(console: Console, made: Plan, data: str | None) -> None:
    name, first = made.experiment.name, made.experiment.data[0]
    if data is not None:
        console.print(f"{name} does not use {data}: {made.data} instead.", highlight=False)
        return
    source = data_module.SOURCES[first]
    console.print(
        f"{name}: {first} is not on this machine: {made.data} instead. "
        f"--data {first} downloads it ({source.megabytes} MB).",
        highlight=False,
    )


def _announce_length(console: Console, plans: list[Plan], jobs: int) -> None:
    """What is ahead, before it starts."""
    runs = sum(len(made.grid) - len(made.stored(made.grid)) for made in plans)
    if not runs:
        return
    lengths = [core_seconds(made) for made in plans]
    known = [length for length in lengths if length is not None]
    if len(known) == len(plans):
        text = f"about {_duration(sum(known) / jobs)} with --jobs {jobs}, as earlier runs say"
    elif plans[0].budget == "full":
        text = "this may take a night; a quick run before would tell how long"
    else:
        text = "minutes each"
    many = "an experiment" if len(plans) == 1 else f"{len(plans)} experiments"
    console.print(f"{runs} runs of {many}: {text}.", highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _conclude(console: Console, made: Plan, results: Results) -> Path:
    verdict, page = engine.conclude(made.experiment, results, budget=made.budget, out=made.out)
    style = _STYLES[verdict.status]
    console.print(f"[bold]{made.experiment.name}[/]: [{style}]{verdict.status}[/]")
    console.print(verdict.sentence, highlight=False, markup=False)
    return page


def _cores() -> int:
    """Those that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _announce(console: Console, pages: list[Path]) -> None:
    console.print()
    for page in pages:
        console.print(f"Page: {page}", soft_wrap=True, highlight=False)
        console.print(f"      {page.as_uri()}", soft_wrap=True, highlight=False)
