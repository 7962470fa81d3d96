"""The page of one experiment: the frame that is the same for all."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path

from ..report import Card, Code, Figure, Items, Page, Section, Table, standalone
from .experiment import Experiment, Results
from .verdict import Effect, Verdict

TONES = {"holds": "good", "does not hold": "bad", "inconclusive": "unsure"}


def page(
    experiment: Experiment,
    results: Results,
    verdict: Verdict,
    budget: str,
) -> Page:
    """Claim and verdict first, then what the experiment shows, then how it was done."""
    cards, sections = experiment.present(results)
    seeds = results.seeds(*experiment.variants)
    missing = results.planned_seeds - len(seeds)
    command = experiment.command or (
        f"normally lab run {experiment.name} --data {results.data.name} --budget {budget}"
    )
    summary = verdict.sentence
    if missing > 0:
        summary += f" **{missing} of {results.planned_seeds} planned seeds are not finished.**"
    return Page(
        title=experiment.title,
        eyebrow=f"normally lab · {experiment.name} · {results.data.name} · {budget}",
        badge=f"The claim {verdict.status}" if verdict.status != "inconclusive" else "Inconclusive",
        tone=TONES[verdict.status],
        summary=summary,
        cards=cards,
        sections=[
            *sections,
            _verdict_section(experiment, verdict),
            _protocol_section(experiment, results, seeds),
            _code_section(experiment),
        ],
        footer=[
            *(f"Measured with {machine}." for machine in results.machines),
            f"Make it again: `{command}`. The numbers are in `result.json` and `runs/`, the "
            "figures as SVG and PDF files in `figures/`, beside this page.",
        ],
    )


def _verdict_section(experiment: Experiment, verdict: Verdict) -> Section:
    rows = [
        [
            criterion.effect.name,
            number(criterion.effect.estimate, criterion.effect.unit),
            f"{number(criterion.effect.low)} to {number(criterion.effect.high)}",
            f"≥ {number(criterion.at_least, criterion.effect.unit)}",
            criterion.status,
        ]
        for criterion in verdict.criteria
    ]
    return Section(
        "The claim and its test",
        [
            f"**Claim.** {experiment.claim}",
            f"**Source.** {experiment.source}",
            f"**Prediction.** {experiment.prediction}",
            "**Thresholds,** fixed before the runs:",
            Items(experiment.thresholds),
            Table(
                ["effect", "mean over seeds", "95 % interval", "threshold", "verdict"],
                rows,
                "Bootstrap interval over paired seeds. A criterion holds or fails only when the "
                "whole interval lies on one side of its threshold; with few seeds the interval "
                "is as wide as the seeds differ.",
            ),
        ],
    )


def _protocol_section(experiment: Experiment, results: Results, seeds: list[int]) -> Section:
    numbers = ", ".join(
        f"{key.replace('_', ' ')} {value}"
        for key, value in results.budget.items()
        if key != "seeds" and isinstance(value, int | float)
    )
    return Section(
        "Protocol",
        [
            Items(
                [
                    f"Data: {results.data.description}.",
                    *experiment.protocol,
                    f"Seeds: {', '.join(map(str, seeds)) or 'none'}; {numbers}.",
                ]
            )
        ],
    )


def _code_section(experiment: Experiment) -> Section:
    name = source_name(experiment)
    return Section(
        "Code",
        [
            "The whole experiment, protocol and thresholds included, is one file.",
            Code(name, source(experiment), link=name),
        ],
    )


def source(experiment: Experiment) -> str:
    """The text of the experiment's file."""
    return inspect.getsource(sys.modules[experiment.measure.__module__])


def source_name(experiment: Experiment) -> str:
    """Its file's name."""
    return f"{experiment.name.replace('-', '_')}.py"


def write_source(experiment: Experiment, folder: Path) -> None:
    """Put the experiment's file beside its page."""
    (folder / source_name(experiment)).write_text(source(experiment), encoding="utf-8")


def first_figure(page: Page) -> Figure | None:
    """The one that shows the claim."""
    blocks = (block for section in page.sections for block in section.content)
    return next((block for block in blocks if isinstance(block, Figure)), None)


def picture(figure: Figure) -> str:
    """The drawing that stands for it in the index: its first panel, as an SVG file."""
    return standalone(replace(figure, panels=figure.panels[:1]))


def effect_card(label: str, effect: Effect) -> Card:
    """An effect as a number that matters, with its interval below."""
    return Card(label, number(effect.estimate, effect.unit), interval(effect))


def interval(effect: Effect) -> str:
    """The interval as a card's note; it breaks before its numbers only."""
    low, high = number(effect.low), number(effect.high)
    return (
        f"{100 * effect.confidence:g} % interval {low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high}"
    )


def number(value: float, unit: str = "") -> str:
    """Three figures, as a reader wants them.

    >>> number(0.98765), number(12.345, "points"), number(1234.5), number(-0.2)
    ('0.988', '12.3 points', '1,234', '−0.2')
    """
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    text = digits.replace("-", "−")
    return f"{text} {unit}".strip() if unit != "×" else f"{text} ×"
