"""`run`: what `normally bench` does, from its options to its table, JSON and page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import environment
from . import page, table
from .add_rms_norm import AddRMSNorm
from .batch_norm import BatchNorm
from .contender import Contender
from .group_norm import GroupNorm
from .instance_norm import InstanceNorm
from .layer_norm import LayerNorm
from .measure import BUDGETS, Budget
from .operator import DTYPES, LAYOUTS, MODES, Case, Operator
from .results import Results
from .rms_norm import RMSNorm
from .session import Session
from .shapes import select
from .with_flax import Flax
from .with_onednn import OneDNN

_KINDS = (BatchNorm, InstanceNorm, GroupNorm, LayerNorm, RMSNorm, AddRMSNorm)
#: What can be measured, by name.
OPERATORS: dict[str, Operator] = {kind.name: kind() for kind in _KINDS}
#: What can be measured beside ours and torch's, by what `also` takes.
OTHERS: dict[str, Contender] = {other.name.lower(): other for other in (Flax(), OneDNN())}

_INTERRUPTED = 130  # what a shell reports for Ctrl-C


def run(
    operators: Sequence[str] = (),
    *,
    shapes: Sequence[str | int] | None = None,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    layouts: Sequence[str] = LAYOUTS,
    threads: int | Sequence[int] | None = None,
    budget: str | Budget = "quick",
    json_path: str | os.PathLike[str] | None = None,
    html_path: str | os.PathLike[str] | None = None,
    compile: bool = False,
    also: Sequence[str] = (),
) -> int:
    """Measure, print a table, and write what was asked for; Ctrl-C keeps what was measured.

    Args:
        operators: names of `OPERATORS`; none means all.
        shapes: numbers 1 to 12 or labels such as "5a"; None means all that the operators have.
        dtypes: of "float32", "bfloat16", "float16" and "float64".
        layouts: of "contiguous" and "channels_last".
        threads: one number or several; None is what torch uses, and 1 as well in a full run.
        budget: "quick" (minutes), "full" (about ten minutes a number of threads) or a `Budget`.
        json_path: where the JSON goes, if anywhere.
        html_path: where the page goes, if anywhere.
        compile: measure torch.compile of torch's composition too.
        also: of "flax" (the extra [bench]) and "onednn", in the cases that they have.

    Returns:
        0; 1 where something that was to be measured raised; 130 after Ctrl-C.

    Raises:
        ValueError: for a name or number that does not exist, or what is not installed.
    """
    chosen = [OPERATORS[name] for name in _known("operators", operators or OPERATORS, OPERATORS)]
    dtypes = _known("dtypes", dtypes, DTYPES)
    layouts = _known("layouts", layouts, LAYOUTS)
    if isinstance(budget, str):
        budget = BUDGETS[_known("budget", [budget], BUDGETS)[0]]
    others = {name: OTHERS[name] for name in _known("also", also, OTHERS)}
    counts = _thread_counts(threads, budget)
    plan = [
        (operator, group)
        for operator in chosen
        for group in operator.groups(select(operator.name, shapes), dtypes, layouts)
    ]
    if not plan:
        names = ", ".join(operator.name for operator in chosen)
        raise ValueError(f"bench: shapes must be among those of {names}. Got shapes={shapes}.")

    results = Results(
        machine=environment.describe(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        options={
            "operators": [operator.name for operator in chosen],
            "shapes": None if shapes is None else [str(shape) for shape in shapes],
            "dtypes": list(dtypes),
            "layouts": list(layouts),
            "threads": list(counts),
            "budget": budget.name,
            "compile": compile,
            "also": list(others),
        },
        others={other.name: other.describe() for other in others.values()},
    )
    try:
        session = Session(results, budget, counts, compile, list(others.values()))
        _measure(session, plan)
        results.complete = True
    except KeyboardInterrupt:
        pass
    out = table.console()
    table.show(results, chosen, out)
    if json_path is not None:
        out.print(f"JSON: {results.write(json_path)}", soft_wrap=True)
    if html_path is not None:
        out.print(f"Page: {page.write(results, chosen, html_path)}", soft_wrap=True)
    if not results.complete:
        return _INTERRUPTED
    return 1 if any(record.failed for record in results.records) else 0


def _measure(session: Session, plan: list[tuple[Operator, list[Case]]]) -> None:
    """With a bar on stderr, so that a table in a pipe stays clean."""
    total = sum(len(group) for _, group in plan) * len(MODES) * len(session.threads)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=total)

        def tell(case: Case) -> None:
            started = len(session.results.records)
            what = f"{case.shape.title} {case.layout} {case.dtype} {case.mode}"
            bar.update(task, completed=started, description=what)

        for operator, group in plan:
            session.measure(operator, group, tell)


def _thread_counts(threads: int | Sequence[int] | None, budget: Budget) -> list[int]:
    everything = torch.get_num_threads()
    if threads is None:
        return sorted({1, everything}) if budget.name == "full" else [everything]
    counts = [threads] if isinstance(threads, int) else list(threads)
    if not counts or min(counts) < 1:
        raise ValueError(f"bench: threads must be 1 or more. Got threads={threads}.")
    return counts


def _known(argument: str, given: Any, allowed: Any) -> list[str]:
    names = list(given)
    for name in names:
        if name not in allowed:
            options = ", ".join(repr(option) for option in allowed)
            raise ValueError(f"bench: {argument} must be among {options}. Got {name!r}.")
    return names
