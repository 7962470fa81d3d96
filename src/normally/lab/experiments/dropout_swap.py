"""Dropout in LeNet's dense part instead of batch normalization.

Dropout zeroes each unit of a layer with probability p in training and scales the others by
1/(1 - p) (Srivastava et al. 2014). It is a regularizer, as batch normalization is said to be in
passing, and it does nothing for the scale of what a layer gets. A reader of d2l put dropout 0.5
into the dense part of LeNet in the place of batch normalization and reported a loss of .486, .827
training and .763 test accuracy; with batch normalization it had been .268, .901 and .861.

The reported training numbers do not compare like with like: they were taken on the way, where
dropout is on and half of the units are missing. So here the trained networks are scored once more
on the training images, dropout off.

It was not said whether the convolutions kept their batch norms. Both readings are run; the
thresholds are for the milder one, in which they did. A control has neither dropout nor batch
normalization in the dense part: it tells what dropout does from what the missing batch norms do.
In trial runs (seed 101) the learning rate 1.0 was better for the swapped network than 0.3 and 2.0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from normally import report
from normally.lab import d2l
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves, intervals
from normally.lab.page import effect_card, number
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

# Half of the reported differences, in percentage points.
TRAIN_GAIN, TEST_GAIN = 3.7, 4.9
NORM, SWAP, CONTROL, DROPOUT = "norm", "swap", "control", "dropout-alone"
CONVOLUTIONS = (1, 2)
NETWORKS: dict[str, dict[str, Any]] = {
    NORM: {"positions": (1, 2, 3, 4)},
    SWAP: {"positions": CONVOLUTIONS, "dropout": 0.5},
    CONTROL: {"positions": CONVOLUTIONS},
    DROPOUT: {"positions": (), "dropout": 0.5},
}
REPORTED = (
    d2l.Reported(NORM, "batch norm everywhere", 0.268, 0.901, 0.861),
    d2l.Reported(SWAP, "dropout for the dense batch norms", 0.486, 0.827, 0.763),
    d2l.Reported(CONTROL, "neither in the dense part (control)"),
    d2l.Reported(DROPOUT, "dropout, no batch norm at all"),
)
LABELS = {row.variant: row.label for row in REPORTED}

EXPERIMENT = Experiment(
    name="dropout-swap",
    title="Dropout instead of batch normalization",
    claim="In the dense part of d2l's LeNet dropout does not replace batch normalization: the "
    "network ends with less training accuracy and with less test accuracy.",
    source=d2l.SOURCE,
    prediction="With dropout 0.5 in place of the dense layers' batch norms the network is about "
    "7 points worse on the training images and 10 on the test images.",
    protocol=[
        *d2l.PROTOCOL,
        "Learning rate 1.0 on all sides. The quick budget has 8 epochs, 896 steps.",
        "Dropout 0.5 behind the sigmoid of each of the two dense hidden layers, in place of their "
        "batch norms; the convolutions keep theirs. Beside it: dropout and no batch norm at all. "
        "Control: no dropout either.",
        "Judged by accuracies of the last weights in evaluation, dropout off, with recalibrated "
        "statistics (mean and variance of all training images).",
    ],
    thresholds=[
        f"With batch normalization the accuracy on the training images is at least {TRAIN_GAIN:g} "
        "percentage points higher than with dropout in its place: half of the reported difference.",
        f"On the test images it is at least {TEST_GAIN:g} points higher: half of it as well.",
        "The claim holds if both hold, and fails if one fails.",
    ],
    variants=list(NETWORKS),
    budgets={"quick": {**d2l.QUICK, "epochs": 8}, "full": d2l.FULL},
    data=("fashion-mnist", "digits", "mnist"),
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train one side."""
    return d2l.train(run, 1.0, **NETWORKS[run.variant])


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The two criteria of the thresholds above."""
    train, test = _effect(results, "train", NORM, SWAP), _effect(results, "test", NORM, SWAP)
    control = _effect(results, "test", SWAP, CONTROL)
    return decide(
        [Criterion(train, TRAIN_GAIN), Criterion(test, TEST_GAIN)],
        f"With dropout in place of the dense layers' batch norms the network ends "
        f"{_worse(train)} on the training images (reported: 7.4 worse) and {_worse(test)} on the "
        f"test images (reported: 9.8 worse). Against neither, dropout makes the test accuracy "
        f"{number(abs(control.estimate))} points {'higher' if control.estimate >= 0 else 'lower'}.",
    )


def _effect(results: Results, part: str, side: str, other: str) -> Effect:
    seeds = results.seeds(*NETWORKS)
    ours, theirs = (d2l.percent(results.get(v, f"final_{part}", seeds)) for v in (side, other))
    return paired_effect(
        f"accuracy on {part} images, {LABELS[side]} − {LABELS[other]}", ours, theirs, "points"
    )


def _worse(gain: Effect) -> str:
    return f"{number(abs(gain.estimate))} points {'worse' if gain.estimate >= 0 else 'better'}"


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """The sides on the way and at the end, and what was reported."""
    cards = [
        effect_card(label, effect)
        for label, effect in (
            ("Training accuracy, batch norm − dropout", _effect(results, "train", NORM, SWAP)),
            ("Test accuracy, batch norm − dropout", _effect(results, "test", NORM, SWAP)),
            ("Test accuracy, dropout − neither", _effect(results, "test", SWAP, CONTROL)),
        )
    ]
    return cards, [_training(results), _numbers(results)]


COLORS = {
    NORM: (report.BLUE, False),
    SWAP: (report.VERMILLION, True),
    CONTROL: (report.GREEN, False),
    DROPOUT: (report.ORANGE, True),
}


def _training(results: Results) -> report.Section:
    seeds = results.seeds(*NETWORKS)
    epochs = range(1, results.budget["epochs"] + 1)
    panels = []
    for part, title in (("train", "Training, as met on the way"), ("test", "Test")):
        canvas, axes = report.panel("epoch", "accuracy (%)", title)
        axes.set(ylim=(0, 103), xlim=(1, max(len(epochs), 2)))
        for variant, (color, dashed) in COLORS.items():
            rows = results.get(variant, f"{part}_accuracy", seeds)
            curves(axes, epochs, [d2l.percent(row) for row in rows], color, dashed=dashed)
        panels.append(canvas)
    canvas, axes = report.panel("training − test accuracy (points)", "", "Gap at the end")
    gaps = [_gap(results, variant) for variant in COLORS]
    intervals(
        axes,
        ["batch norm", "dropout", "neither", "dropout,\nno norm"],
        [gap.estimate for gap in gaps],
        [gap.low for gap in gaps],
        [gap.high for gap in gaps],
        [color for color, _ in COLORS.values()],
    )
    axes.axvline(0, color=report.GREY, linewidth=1)
    return report.Section(
        "With batch normalization, with dropout, with neither",
        [
            d2l.extent(results),
            report.Figure(
                "accuracy",
                [*panels, canvas],
                f"Left and middle: median of {len(seeds)} seeds, band from the lowest to the "
                "highest; with dropout the training accuracy is that of a network that lacks half "
                "of its dense units. Right: what the last weights have more on training than on "
                "test images, dropout off; mean over seeds and 95 % interval.",
                [report.Key(LABELS[v], color, dashed) for v, (color, dashed) in COLORS.items()],
            ),
        ],
    )


def _gap(results: Results, variant: str) -> Effect:
    seeds = results.seeds(*NETWORKS)
    train, test = (
        d2l.percent(results.get(variant, f"final_{part}", seeds)) for part in ("train", "test")
    )
    return paired_effect("gap", train, test, "points")


def _numbers(results: Results) -> report.Section:
    seeds = results.seeds(*NETWORKS)
    rows = []
    for variant, label in LABELS.items():
        train = d2l.last(results, variant, "train_accuracy", seeds)
        scored = results.get(variant, "final_train", seeds)
        test = results.get(variant, "final_test", seeds)
        rows.append(
            [label, *(f"{100 * np.median(values):.1f} %" for values in (train, scored, test))]
        )
    return report.Section(
        "Reported and found",
        [
            d2l.table(results, REPORTED),
            report.Table(
                ["side", "training, on the way", "training, dropout off", "test"],
                rows,
                "Accuracy, medians over seeds. The first column is what the reader compared; the "
                "other two are of the last weights in evaluation with recalibrated statistics.",
            ),
        ],
    )
