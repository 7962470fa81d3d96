"""Progress bars over runs and epochs."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Progress:
    """Says nothing; what the engine calls. Runs go by their index, as several go on at once."""

    def begin(self, done: int, total: int) -> None:
        """`done` of `total` runs are on disk already."""

    def run(self, index: int, label: str) -> None:
        """A run starts."""

    def epoch(self, index: int, done: int, total: int) -> None:
        """The run has come so far."""

    def finish(self, index: int, label: str) -> None:
        """The run has ended and is on disk."""


class Bars(Progress):
    """A bar for all and one for each run on its way; in a file one line a run."""

    def __init__(self, console: Console) -> None:
        self._console = console
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
        self._all = self._bars.add_task("", unit="runs", total=None)
        self._runs: dict[int, TaskID] = {}

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

    def begin(self, done: int, total: int) -> None:
        """Reset the bar of all."""
        self._done, self._total = done, total
        self._bars.update(self._all, description="all", completed=done, total=total)
        if done:
            self._console.print(f"{done} of {total} runs are on disk already.")

    def run(self, index: int, label: str) -> None:
        """Show one more bar."""
        self._runs[index] = self._bars.add_task(f"  {label}", unit="epochs", total=None)

    def epoch(self, index: int, done: int, total: int) -> None:
        """Move the run's bar."""
        if index in self._runs:
            self._bars.update(self._runs[index], completed=done, total=total)

    def finish(self, index: int, label: str) -> None:
        """Move the bar of all and take the run's away."""
        self._done += 1
        self._bars.update(self._all, completed=self._done)
        if index in self._runs:
            self._bars.remove_task(self._runs.pop(index))
        if not self._console.is_terminal:
            self._console.print(f"  {self._done}/{self._total} {label}", highlight=False)
