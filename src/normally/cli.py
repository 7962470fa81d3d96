"""The command `normally`: lab, bench, env."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    _missing: str | None = error.name
else:
    _missing = None

if TYPE_CHECKING:
    from typer import Typer

# What the extra [lab] installs, by the names that are imported.
_OPTIONAL = {"jinja2", "markupsafe", "matplotlib", "numpy", "rich", "sklearn", "typer"}


def main() -> None:
    """Entry point. Exit status 2 where a package of the extra [lab] is missing."""
    if _missing is not None:
        _say_missing(_missing)
    try:
        create_app()()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _OPTIONAL:
            raise
        _say_missing(error.name)


def create_app() -> Typer:
    """The commands as one typer application."""
    from .lab.commands import app as lab

    app = typer.Typer(
        help="Normalization layers for PyTorch: experiments, benchmarks, environment.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # a traceback that can be pasted into a report
    )
    app.add_typer(lab, name="lab")
    app.command()(bench)
    app.command()(env)
    return app


def bench(
    operators: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Default: all of them.")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(help="Numbers or labels, such as 1,2,5a; default: all.")
    ] = None,
    dtypes: Annotated[str, typer.Option(help="Such as float32,bfloat16.")] = "float32,bfloat16",
    layouts: Annotated[str, typer.Option()] = "contiguous,channels_last",
    threads: Annotated[
        str | None,
        typer.Option(help="Such as 1,2; default: what torch uses, and 1 too in a full run."),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="quick (about two minutes) or full (about ten).")
    ] = "quick",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write numbers here.")] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write a page here.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Measure torch.compile of torch's layers too.")
    ] = False,
    also: Annotated[
        str, typer.Option(help="Other libraries: flax (the extra [bench]), onednn.")
    ] = "",
) -> None:
    """Time our operators against torch's on this machine; Ctrl-C keeps what was measured.

    Exit status 0, 1 where something raised, 2 for options that make no sense, 130 after Ctrl-C.
    """
    from . import bench as benchmarks

    counts = _split(threads or "")
    if not all(count.isdecimal() for count in counts):
        raise typer.BadParameter(f"bench: threads must be whole numbers. Got threads={threads}.")
    try:
        status = benchmarks.run(
            operators or (),
            shapes=_split(shapes) if shapes else None,
            dtypes=_split(dtypes),
            layouts=_split(layouts),
            threads=[int(count) for count in counts] or None,
            budget=budget,
            json_path=json_path,
            html_path=html_path,
            compile=compile,
            also=_split(also),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(status)


def env(
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Versions, instruction set, backend of each device, threads, huge pages, caches."""
    from .environment import describe

    facts = describe()
    if json:
        print(json_format.dumps(facts, indent=2))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        table.add_row(name.replace("_", " "), "-" if value is None else str(value))
    console = Console()
    # In a file no line is folded: one fact, one line.
    console.print(table, width=None if console.is_terminal else 10_000, crop=False)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _say_missing(package: str) -> None:
    print(
        f"normally: the command line needs the package {package.partition('.')[0]}. "
        'Install it with: pip install "normally[lab]"',
        file=sys.stderr,
    )
    raise SystemExit(2)
