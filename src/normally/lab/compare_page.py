"""Verdict and page of `normally lab compare`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import report
from .comparison import chosen_by_others, tuned
from .experiment import Results
from .page import interval, number
from .verdict import Criterion, Effect, Verdict, decide, paired_effect

_COLORS = (
    report.BLUE,
    report.VERMILLION,
    report.GREEN,
    report.PURPLE,
    report.ORANGE,
    report.GREY,
)


def variant(norm: str, batch_size: int, lr: float) -> str:
    """The name of a run, fit for a file."""
    return f"{norm.replace(':', '')}-batch{batch_size}-lr{lr:g}"


def judge(results: Results, margin: float) -> Verdict:
    """One criterion a batch size; the claim holds if one holds."""
    gains = [_gain(results, size) for size in _sizes(results)]
    criteria = [Criterion(effect, margin) for effect, _ in gains]
    first = _norms(results)[0]
    parts = [
        f"At batch size {size} the best of the others, {best}, ends {number(abs(gain.estimate))} "
        f"points {'above' if gain.estimate >= 0 else 'below'} {first}"
        for size, (gain, best) in zip(_sizes(results), gains, strict=True)
    ]
    return decide(criteria, ". ".join(parts) + ".", one_suffices=True)


def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """Accuracy over batch size, and every cell of the grid."""
    cards = []
    for size in _sizes(results):
        norm, values = _winner(results, size)
        gain, _ = _gain(results, size)
        cards.append(
            report.Card(
                f"Best at batch size {size}",
                norm,
                f"{np.mean(values):.1f} % test accuracy; best of the others − "
                f"{_norms(results)[0]}: {interval(gain)} points",
            )
        )
    return cards, [_figure(results), _table(results)]


def _figure(results: Results) -> report.Section:
    sizes = _sizes(results)
    canvas, axes = report.panel("batch size", "test accuracy (%)", width=6.2, height=3.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    keys = []
    for index, norm in enumerate(_norms(results)):
        color, dashed = _COLORS[index % len(_COLORS)], index >= len(_COLORS)
        rows = np.array([_scores(results, norm, size)[1] for size in sizes])
        style = (0, (5, 2)) if dashed else "-"
        axes.fill_between(sizes, rows.min(1), rows.max(1), color=color, alpha=0.18, linewidth=0)
        axes.plot(sizes, np.median(rows, 1), color=color, linestyle=style, marker="o")
        keys.append(report.Key(norm, color, dashed))
    return report.Section(
        "Accuracy by batch size",
        [
            "Each normalization at its own best learning rate.",
            report.Figure(
                "accuracy-by-batch-size",
                [canvas],
                f"After the last epoch. Line: median of {len(_seeds(results))} seeds; band: from "
                "the lowest to the highest.",
                keys,
                columns=1,
            ),
        ],
    )


def _table(results: Results) -> report.Section:
    rows = []
    for size in _sizes(results):
        for norm in _norms(results):
            chosen, values = _scores(results, norm, size)
            rates = sorted({results.budget["grid"][name]["lr"] for name in chosen})
            refused = results.get(chosen[0], "refused", _seeds(results))[0]
            rows.append(
                [
                    str(size),
                    norm,
                    f"{np.median(values):.1f} %",
                    f"{min(values):.1f} – {max(values):.1f} %",
                    " or ".join(f"{rate:g}" for rate in rates),
                    f"cannot train: {refused}" if refused else "",
                ]
            )
    head = ["batch size", "norm", "test accuracy", "lowest – highest", "learning rate", ""]
    return report.Section(
        "All numbers",
        [
            report.Table(
                head,
                rows,
                "Medians over seeds after the last epoch. Learning rate: those that the other "
                "seeds chose.",
                text_columns=2,
            )
        ],
    )


def _gain(results: Results, size: int) -> tuple[Effect, str]:
    """The best of the other norms against the first, and which that is for most seeds."""
    first, *others = _norms(results)
    _, own = _scores(results, first, size)
    table = [_scores(results, norm, size)[1] for norm in others]
    rows = chosen_by_others(np.array(table))
    best = [table[row][column] for column, row in enumerate(rows)]
    name = f"best of the others − {first}, batch size {size}"
    return paired_effect(name, best, own, "points"), others[max(set(rows), key=rows.count)]


def _winner(results: Results, size: int) -> tuple[str, list[float]]:
    scores = {norm: _scores(results, norm, size)[1] for norm in _norms(results)}
    best = max(scores, key=lambda norm: float(np.mean(scores[norm])))
    return best, scores[best]


def _scores(results: Results, norm: str, size: int) -> tuple[list[str], list[float]]:
    """The variants that the seeds chose, and their accuracy by seed."""
    names = [
        name
        for name, cell in results.budget["grid"].items()
        if cell["norm"] == norm and cell["batch_size"] == size
    ]
    return tuned(results, names, _seeds(results))


def _seeds(results: Results) -> list[int]:
    return results.seeds(*results.budget["grid"])


def _norms(results: Results) -> list[str]:
    return list(dict.fromkeys(cell["norm"] for cell in results.budget["grid"].values()))


def _sizes(results: Results) -> Sequence[int]:
    return sorted({cell["batch_size"] for cell in results.budget["grid"].values()})
