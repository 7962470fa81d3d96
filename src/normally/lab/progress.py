"""Progress bars over runs and epochs."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Progress:
    """Says nothing; what the engine calls."""

    def begin(self, name: str, done: int, total: int) -> None:
        """`done` of `total` runs are on disk already."""

    def run(self, label: str) -> None:
        """A run starts."""

    def epoch(self, done: int, total: int) -> None:
        """The run has come so far."""

    def finish(self) -> None:
        """The run is on disk."""


class Bars(Progress):
    """Two bars in a terminal; in a file one line a run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._label = ""
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            transient=True,
            disable=not console.is_terminal,
        )
        self._runs = self._bars.add_task("", unit="runs", total=None)
        self._epochs = self._bars.add_task("", unit="epochs", total=None)

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def begin(self, name: str, done: int, total: int) -> None:
        """Reset both bars."""
        self._done, self._total = done, total
        self._bars.update(self._runs, description=name, completed=done, total=total)
        if done:
            self._console.print(f"{name}: {done} of {total} runs are on disk already.")

    def run(self, label: str) -> None:
        """Restart the epochs' bar."""
        self._label = label
        self._bars.reset(self._epochs, description=f"  {label}", total=None)

    def epoch(self, done: int, total: int) -> None:
        """Move the epochs' bar."""
        self._bars.update(self._epochs, completed=done, total=total)

    def finish(self) -> None:
        """Move the runs' bar."""
        self._done += 1
        self._bars.update(self._runs, completed=self._done)
        if not self._console.is_terminal:
            self._console.print(f"  {self._done}/{self._total} {self._label}", highlight=False)
