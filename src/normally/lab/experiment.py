"""What an experiment is: text first, then how to measure, judge and show it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..report import Card, Section
from .data import Dataset
from .verdict import Verdict

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One cell of the grid, as `measure` gets it; torch is seeded with `seed` before."""

    variant: str
    seed: int
    data: Dataset
    budget: Mapping[str, Any]
    advance: Callable[[int, int], None] = lambda done, total: None

    def epochs(self) -> Iterator[int]:
        """0, 1, … `budget["epochs"]` - 1, shown in the progress bar."""
        total = self.budget["epochs"]
        for epoch in range(total):
            yield epoch
            self.advance(epoch + 1, total)


@dataclass(frozen=True)
class Results:
    """The finished runs of an experiment, and the machines they were measured on."""

    records: Mapping[tuple[str, int], Record]
    data: Dataset
    budget: Mapping[str, Any]
    planned_seeds: int
    machines: Sequence[str] = ()

    def seeds(self, *variants: str) -> list[int]:
        """The seeds for which every one of these variants is there: the pairs."""
        found = sorted({seed for _, seed in self.records})
        return [s for s in found if all((variant, s) in self.records for variant in variants)]

    def get(self, variant: str, key: str, seeds: Sequence[int] | None = None) -> list[Any]:
        """One value a seed, in the order of `seeds`."""
        seeds = self.seeds(variant) if seeds is None else seeds
        return [self.records[variant, seed][key] for seed in seeds]


@dataclass
class Experiment:
    """One claim and its test.

    The text comes first and is fixed before the first run; the three functions are attached with
    the decorators `measures`, `judges` and `presents`. `experiments/quickstart.py` shows it.

    Args:
        name: as on the command line, words joined by hyphens; the module has underscores.
        title: the page's heading.
        claim: one sentence that can turn out false.
        source: where the claim comes from.
        prediction: what the runs should show if it is true.
        protocol: what is done, a line each.
        thresholds: what makes the verdict, a line each.
        variants: the sides that are compared; each is run with every seed.
        budgets: for "quick" and "full" at least `seeds`, and what `measure` asks for.
        data: the data sets it may use, of `lab.data.NAMES`; the first that is on this machine is
            taken by default.
        alone: variants that measure time: nothing else runs beside them.
        command: that makes it again, where it is not `normally lab run`.
    """

    name: str
    title: str
    claim: str
    source: str
    prediction: str
    protocol: Sequence[str]
    thresholds: Sequence[str]
    variants: Sequence[str]
    budgets: Mapping[str, Mapping[str, Any]]
    data: Sequence[str] = ("digits", "fashion-mnist", "mnist")
    alone: Collection[str] = ()
    command: str = ""
    measure: Callable[[Run], Record] = field(init=False, repr=False)
    judge: Callable[[Results], Verdict] = field(init=False, repr=False)
    present: Callable[[Results], tuple[Sequence[Card], Sequence[Section]]] = field(
        init=False, repr=False
    )

    def measures(self, function: Callable[[Run], Record]) -> Callable[[Run], Record]:
        """Decorator: run one variant with one seed; returns plain numbers, lists and dicts."""
        self.measure = function
        return function

    def judges(self, function: Callable[[Results], Verdict]) -> Callable[[Results], Verdict]:
        """Decorator: the verdict from the finished runs."""
        self.judge = function
        return function

    def presents(
        self, function: Callable[[Results], tuple[Sequence[Card], Sequence[Section]]]
    ) -> Callable[[Results], tuple[Sequence[Card], Sequence[Section]]]:
        """Decorator: the page's cards and sections; figures are drawn in the house style."""
        self.present = function
        return function
