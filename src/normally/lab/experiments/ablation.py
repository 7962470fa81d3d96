"""Which of LeNet's four batch normalizations are needed.

A reader of d2l left out batch norms of its LeNet, one or two at a time, and compared the test
accuracies after ten epochs, of one run each: .861 with all four, .769 and .774 without that of the
first or second convolution, .857 without that of either dense layer. The conclusion was that those
of the dense layers can be dropped and those of the convolutions cannot. Nobody had dropped both of
the dense layers; here that is a side too.

One run each is a weak ground: with batch normalization the test accuracy of this network bounces by
several points from epoch to epoch (experiment `lenet`), because evaluation uses running averages.
So the sides are judged with recalibrated statistics, those of all training images under the last
weights. The raw accuracies of the last epoch, which the reader looked at, stand in the table.

"Can be dropped" is a claim of equivalence, so it has a margin: less than 2 points are lost. "Cannot
be dropped" is that at least 2 are lost; the reader's numbers were 9. The quick budget trains for 5
epochs, 560 steps, since there are eight sides; the full one for as many steps as the reader.
"""

from __future__ import annotations

import numpy as np

from normally import report
from normally.lab import d2l
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves, intervals
from normally.lab.page import effect_card, number
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

MARGIN = 2.0
ALL = "1234"
# A variant is named by the layers that keep their batch norm: 1, 2 convolutions, 3, 4 dense.
REPORTED = (
    d2l.Reported(ALL, "all four", 0.268, 0.901, 0.861),
    d2l.Reported("24", "only 2nd and 4th", test=0.787),
    d2l.Reported("13", "only 1st and 3rd", test=0.820),
    d2l.Reported("234", "without the 1st (convolution)", test=0.769),
    d2l.Reported("134", "without the 2nd (convolution)", test=0.774),
    d2l.Reported("124", "without the 3rd (dense)", test=0.857),
    d2l.Reported("123", "without the 4th (dense)", test=0.857),
    d2l.Reported("12", "without both dense"),
)
LABELS = {row.variant: row.label for row in REPORTED}
DENSE, CONVOLUTIONS = ("124", "123", "12"), ("234", "134")

EXPERIMENT = Experiment(
    name="ablation",
    title="Which of LeNet's batch norms are needed",
    claim="Of LeNet's four batch normalizations those of the dense layers can be dropped and those "
    "of the convolutions cannot.",
    source=d2l.SOURCE,
    prediction="Without that of either dense layer, or of both, the test accuracy is the same as "
    "with all four; without that of either convolution it is about 9 points lower.",
    protocol=[
        *d2l.PROTOCOL,
        "Learning rate 1.0 on all sides, as reported. The quick budget has 5 epochs, 560 steps.",
        "Judged by the test accuracy of the last weights with recalibrated statistics (mean and "
        "variance of all training images): the running averages of single epochs bounce by more "
        "than the differences in question.",
    ],
    thresholds=[
        f"Without the batch norm of the 3rd layer, of the 4th, and of both, less than {MARGIN:g} "
        "percentage points of test accuracy are lost: three criteria.",
        f"Without that of the 1st layer, and of the 2nd, at least {MARGIN:g} points are lost: two "
        "criteria.",
        "The claim holds if all hold, and fails if one fails.",
    ],
    variants=[row.variant for row in REPORTED],
    budgets={"quick": {**d2l.QUICK, "epochs": 5}, "full": d2l.FULL},
    data=("fashion-mnist", "digits", "mnist"),
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train with the batch norms that the variant names."""
    return d2l.train(run, 1.0, positions=tuple(map(int, run.variant)))


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The five criteria of the thresholds above."""
    kept = [_effect(results, variant, lost=False) for variant in DENSE]
    lost = [_effect(results, variant) for variant in CONVOLUTIONS]
    parts = [
        f"{LABELS[variant]} {_change(_effect(results, variant))}"
        for variant in (*DENSE, *CONVOLUTIONS)
    ]
    return decide(
        [*(Criterion(e, -MARGIN) for e in kept), *(Criterion(e, MARGIN) for e in lost)],
        f"Against all four, test accuracy is {'; '.join(parts)}. Between the last two epochs the "
        f"raw accuracy of the network with all four changes by {number(_bounce(results))} points.",
    )


def _effect(results: Results, variant: str, *, lost: bool = True) -> Effect:
    """Points of test accuracy that a variant has less (or more) than all four."""
    seeds = results.seeds(*EXPERIMENT.variants)
    whole, part = (d2l.percent(results.get(v, "final_test", seeds)) for v in (ALL, variant))
    if lost:
        return paired_effect(f"lost {LABELS[variant]}", whole, part, "points")
    return paired_effect(f"gained {LABELS[variant]}", part, whole, "points")


def _change(lost: Effect) -> str:
    return f"{number(abs(lost.estimate))} points {'lower' if lost.estimate > 0 else 'higher'}"


def _bounce(results: Results) -> float:
    """Mean absolute change of the raw test accuracy between the last two epochs, all four."""
    rows = results.get(ALL, "test_accuracy", results.seeds(*EXPERIMENT.variants))
    return float(np.mean([100 * abs(row[-1] - row[-2]) if len(row) > 1 else 0.0 for row in rows]))


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """What each missing batch norm costs, reported and found."""
    cards = []
    for variant in ("12", "123", "234", "134"):
        effect = _effect(results, variant)
        label = f"Test accuracy lost {LABELS[variant]}"
        cards.append(effect_card(label, effect))
    return cards, [_losses(results), _training(results)]


def _losses(results: Results) -> report.Section:
    canvas, axes = report.panel("test accuracy lost (points)", "", width=8.4, height=4.2)
    effects = [_effect(results, row.variant) for row in REPORTED[1:]]
    colors = [_color(row.variant) for row in REPORTED[1:]]
    axes.axvspan(-MARGIN, MARGIN, color=report.GREY, alpha=0.15, linewidth=0)
    axes.axvline(0, color=report.GREY, linewidth=1)
    intervals(
        axes,
        [row.label for row in REPORTED[1:]],
        [e.estimate for e in effects],
        [e.low for e in effects],
        [e.high for e in effects],
        colors,
    )
    for place, row in enumerate(REPORTED[1:]):
        if row.test is not None and REPORTED[0].test is not None:
            reported = 100 * (REPORTED[0].test - row.test)
            axes.plot(reported, place, "x", color=report.PURPLE, markersize=9, markeredgewidth=2)
    return report.Section(
        "What a missing batch norm costs",
        [
            d2l.extent(results),
            report.Figure(
                "ablation",
                [canvas],
                f"Dot and bar: mean of {len(results.seeds(*EXPERIMENT.variants))} seeds and its "
                "95 % interval, recalibrated statistics. Cross: what the reader saw in one run. "
                f"Grey: the margin of ±{MARGIN:g} points within which a batch norm can be dropped.",
                [
                    report.Key("a convolution's is missing", report.BLUE),
                    report.Key("a dense layer's is missing", report.VERMILLION),
                    report.Key("one of each", report.GREY),
                    report.Key("reported", report.PURPLE),
                ],
                columns=1,
            ),
            d2l.table(results, REPORTED),
        ],
    )


def _color(variant: str) -> str:
    if variant in DENSE:
        return report.VERMILLION
    return report.BLUE if variant in CONVOLUTIONS else report.GREY


def _training(results: Results) -> report.Section:
    seeds = results.seeds(*EXPERIMENT.variants)
    epochs = range(1, results.budget["epochs"] + 1)
    sides = (
        (ALL, report.BLUE, False),
        ("134", report.GREEN, True),
        ("12", report.VERMILLION, True),
    )
    panels = []
    for key, label in (
        ("train_accuracy", "training accuracy (%)"),
        ("test_accuracy", "test accuracy (%)"),
    ):
        canvas, axes = report.panel("epoch", label)
        axes.set(ylim=(0, 103), xlim=(1, max(len(epochs), 2)))
        for variant, color, dashed in sides:
            rows = [d2l.percent(row) for row in results.get(variant, key, seeds)]
            curves(axes, epochs, rows, color, dashed=dashed)
        panels.append(canvas)
    return report.Section(
        "On the way",
        [
            report.Figure(
                "training-curves",
                panels,
                "Accuracy by epoch, test with running averages: median over seeds, band from the "
                "lowest to the highest.",
                [report.Key(LABELS[variant], color, dashed) for variant, color, dashed in sides],
                columns=2,
            ),
        ],
    )
