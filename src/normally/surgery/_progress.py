"""Progress of long work: a bar where rich is installed, or a function of the caller's."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Called with the number of units that are done, and of all, None where that is not known.
Told = Callable[[int, int | None], Any]


@contextmanager
def told(
    progress: bool | Told | None, title: str, is_first: bool, unit: str = "batches"
) -> Iterator[Told]:
    """Whom to tell how far it is: nobody, a bar on stderr, or the caller.

    Args:
        progress: None is a bar if this process is the first, rich is installed and stderr is a
            terminal; True is a bar in any case.
        title: what is going on.
        is_first: whether this is the first of several processes, or the only one.
        unit: what is counted.

    Raises:
        ImportError: if there must be a bar and rich is not installed.
    """
    if callable(progress):
        yield progress
        return
    has_rich = importlib.util.find_spec("rich") is not None
    if progress is True and not has_rich:
        raise ImportError(f"{title}: progress=True needs rich, as pip install rich brings it.")
    if progress is None:
        progress = is_first and has_rich and sys.stderr.isatty()
    if not progress:
        yield lambda done, total: None
        return
    # By name at run time: the layers need torch and nothing else.
    rich: Any = importlib.import_module("rich.progress")
    console = importlib.import_module("rich.console").Console(stderr=True)
    columns = (
        rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(),
        rich.TextColumn(unit), rich.TimeElapsedColumn(), rich.TimeRemainingColumn(),
    )  # fmt: skip
    with rich.Progress(*columns, console=console, transient=console.is_terminal) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
