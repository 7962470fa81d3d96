"""The section that experiments on training share: curves of all sides, and their table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import report
from .experiment import Results
from .figures import curves
from .page import number
from .verdict import Effect


@dataclass(frozen=True)
class Side:
    """A variant as it is drawn and named."""

    variant: str
    label: str
    color: str
    dashed: bool = False


def final_accuracy(results: Results, variant: str, seeds: Sequence[int]) -> list[float]:
    """Test accuracy after the last epoch in percent, by seed."""
    return [100 * row[-1] for row in results.get(variant, "test_accuracy", seeds)]


def last_accuracy(results: Results, variant: str, seeds: Sequence[int]) -> list[float]:
    """Test accuracy of the last weights, as `training.final_scores` has it, in percent by seed."""
    return [100 * value for value in results.get(variant, "final_test", seeds)]


def higher(effect: Effect) -> str:
    """A difference of accuracies within a sentence: "1.2 points lower"."""
    return f"{number(abs(effect.estimate))} points {'higher' if effect.estimate >= 0 else 'lower'}"


def tuned(
    results: Results,
    variants: Sequence[str],
    seeds: Sequence[int],
    score: Callable[[Results, str, Sequence[int]], list[float]] = final_accuracy,
) -> tuple[list[str], list[float]]:
    """For each seed the variant that did best with the *other* seeds, and its score.

    So a side may choose its learning rate from a grid without being judged by what it was chosen
    for. With one seed alone the choice is its own.

    Args:
        results: with what `training.fit` records.
        variants: the same side at each learning rate.
        seeds: for which all variants are there.
        score: what counts, by seed; more is better.
    """
    table = np.array([score(results, variant, seeds) for variant in variants])
    table = table.reshape(len(variants), len(seeds))
    rows = chosen_by_others(table)
    return [variants[row] for row in rows], [
        float(table[row, column]) for column, row in enumerate(rows)
    ]


def chosen_by_others(scores: np.ndarray) -> list[int]:
    """For each column (a seed) the row whose mean over the other columns is highest.

    >>> chosen_by_others(np.array([[9, 5, 5], [6, 6, 6]]))
    [1, 0, 0]
    """
    columns = range(scores.shape[1])
    others = [np.delete(scores, c, axis=1) if len(columns) > 1 else scores for c in columns]
    return [int(table.mean(1).argmax()) for table in others]


def section(
    results: Results,
    title: str,
    text: str,
    panels: Sequence[tuple[str, Sequence[Side]]],
    *,
    bottom: float = 0.0,
) -> report.Section:
    """Test accuracy by epoch, a panel each, and a table of all sides.

    Args:
        results: with what `training.fit` records.
        title: of the section.
        text: its first paragraph.
        panels: for each its title and its sides; sides of one label share colour and dashes.
        bottom: where the axis of the accuracy begins, in percent.
    """
    epochs = range(1, results.budget["epochs"] + 1)
    sides = [side for _, group in panels for side in group]
    seeds = results.seeds(*(side.variant for side in sides))
    canvases = []
    for heading, group in panels:
        canvas, axes = report.panel("epoch", "test accuracy (%)", heading)
        axes.set(ylim=(bottom, 100 + 0.03 * (100 - bottom)), xlim=(1, max(len(epochs), 2)))
        for side in group:
            rows = results.get(side.variant, "test_accuracy", seeds)
            lines = [[100 * value for value in row] for row in rows]
            curves(axes, epochs, lines, side.color, dashed=side.dashed)
        canvases.append(canvas)
    keys = list(dict.fromkeys(report.Key(s.label, s.color, s.dashed) for s in sides))
    rows = [
        [heading, side.label, *_outcome(results, side.variant, seeds)]
        for heading, group in panels
        for side in group
    ]
    return report.Section(
        title,
        [
            text,
            report.Figure(
                "training-curves",
                canvases,
                f"Line: median of {len(seeds)} seeds; band: from the lowest to the highest.",
                keys,
            ),
            report.Table(
                ["", "side", "test accuracy", "lowest – highest", "training loss", "diverged"],
                rows,
                "Medians over seeds after the last epoch; loss in nats. A seed has diverged when "
                "its loss stopped being finite.",
                text_columns=2,
            ),
        ],
    )


def _outcome(results: Results, variant: str, seeds: Sequence[int]) -> list[str]:
    accuracy = final_accuracy(results, variant, seeds)
    losses = [row[-1] for row in results.get(variant, "train_loss", seeds)]
    loss = float(np.median([np.inf if value is None else value for value in losses]))
    return [
        f"{np.median(accuracy):.1f} %",
        f"{min(accuracy):.1f} – {max(accuracy):.1f} %",
        "infinite" if np.isinf(loss) else number(loss),
        f"{losses.count(None)} of {len(losses)}",
    ]
