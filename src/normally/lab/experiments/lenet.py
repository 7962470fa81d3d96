"""LeNet on Fashion-MNIST with and without batch normalization, as readers of d2l compared it.

Two readers trained the LeNet of "Dive into Deep Learning", whose units are sigmoids. One saw the
training accuracy rise from .811 to .903 with batch normalization and the test accuracy hardly at
all (.781, .783); the other saw both rise alike (+.068, +.066). Both looked at the last epoch, and
with batch normalization the test accuracy bounces from epoch to epoch. To measure the bounce apart
from learning, only falls count:

    bounce = mean over the later half of the epochs of max(0, accuracy before - accuracy now)

which is 0 while a network does nothing but improve.

The learning rates are the readers', 0.9 without and 1.0 with batch normalization. A sceptic asks
whether 0.9 was a bad choice: so the plain network also trains at 0.5, which in trial runs (seed
101; 0.5, 0.9, 1.5 and 2.5 were tried) did about as well as 0.9 and better than the larger ones.

The threshold of the bounce comes from the same trial run, in which it was 2 points; with the seeds
that decide it was less. It was not changed afterwards. The runs were made twice, as the first could
not be found again by a defect since repaired; the numbers are the same.
"""

from __future__ import annotations

import numpy as np

from normally import report
from normally.lab import comparison, d2l
from normally.lab.comparison import higher
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves
from normally.lab.page import effect_card, number
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

# The smaller of the two gains in training accuracy that were reported, halved.
TRAIN_GAIN, TEST_GAIN, BOUNCE = 3.4, 0.0, 1.0
PLAIN, NORM, CONTROL = "plain-lr0.9", "norm-lr1", "plain-lr0.5"
VARIANTS = (PLAIN, NORM, CONTROL)
REPORTED = (
    d2l.Reported(PLAIN, "without, learning rate 0.9", train=0.811, test=0.781),
    d2l.Reported(NORM, "batch normalization, 1.0", train=0.903, test=0.783),
    d2l.Reported(CONTROL, "without, 0.5 (control)"),
)

EXPERIMENT = Experiment(
    name="lenet",
    title="LeNet on Fashion-MNIST",
    claim="Batch normalization gives d2l's LeNet several points of training accuracy and takes "
    "none of test accuracy, and the test accuracy bounces from epoch to epoch.",
    source=d2l.SOURCE,
    prediction="After ten epochs the training accuracy is higher by 7 to 9 points, the test "
    "accuracy by 0 to 7; from one epoch to the next the test accuracy falls again and again.",
    protocol=[
        *d2l.PROTOCOL,
        "Learning rates: 0.9 without and 1.0 with batch normalization, as reported. Control: 0.5 "
        "without.",
        "Training accuracy as met on the way through the last epoch; test accuracy after it, with "
        "running statistics. Bounce: mean fall of the test accuracy from one epoch to the next in "
        "the later half; an epoch that does not fall counts 0.",
    ],
    thresholds=[
        f"Training accuracy is at least {TRAIN_GAIN:g} percentage points higher with batch "
        "normalization: half of the smaller reported gain.",
        "Test accuracy is not lower than without, at the better of the two learning rates; for "
        "each seed the other seeds choose it.",
        f"With batch normalization the bounce is at least {BOUNCE:g} percentage point an epoch.",
        "The claim holds if all hold, and fails if one fails.",
    ],
    variants=VARIANTS,
    budgets={"quick": d2l.QUICK, "full": d2l.FULL},
    data=("fashion-mnist", "digits", "mnist"),
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train one side."""
    side, _, rate = run.variant.partition("-lr")
    return d2l.train(run, float(rate), norm="batch" if side == "norm" else "none")


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The three criteria of the thresholds above."""
    train, test, bounce = _effects(results)
    criteria = [Criterion(train, TRAIN_GAIN), Criterion(test, TEST_GAIN), Criterion(bounce, BOUNCE)]
    parts = ("more training accuracy", "no less test accuracy", "bouncing test accuracy")
    found = "; ".join(f"{part}: {c.status}" for part, c in zip(parts, criteria, strict=True))
    return decide(
        criteria,
        f"Of the claim's three parts: {found}. With batch normalization the training accuracy ends "
        f"{higher(train)} (reported: 9.2 and 6.8 higher) and the test accuracy {higher(test)} "
        "(reported: 0.2 and 6.6 higher). From epoch to epoch the test accuracy falls by "
        f"{number(bounce.estimate)} points on average with batch normalization, by "
        f"{number(_plain_bounce(results))} without.",
    )


def _effects(results: Results) -> tuple[Effect, Effect, Effect]:
    seeds = results.seeds(*VARIANTS)
    norm, plain = (
        d2l.percent(d2l.last(results, side, "train_accuracy", seeds)) for side in (NORM, PLAIN)
    )
    _, best = comparison.tuned(results, [PLAIN, CONTROL], seeds)
    return (
        paired_effect("training accuracy gained", norm, plain, "points"),
        paired_effect(
            "test accuracy gained, against the better rate",
            comparison.final_accuracy(results, NORM, seeds),
            best,
            "points",
        ),
        paired_effect(
            "bounce of the test accuracy with BN",
            [falls(row) for row in results.get(NORM, "test_accuracy", seeds)],
            [0.0] * len(seeds),
            "points",
        ),
    )


def falls(accuracy: list[float]) -> float:
    """Mean fall from one epoch to the next in the later half, in percentage points."""
    later = np.array(accuracy[len(accuracy) // 2 - 1 :])
    return float(100 * np.maximum(0, -np.diff(later)).mean()) if len(later) > 1 else 0.0


def _plain_bounce(results: Results) -> float:
    rows = results.get(PLAIN, "test_accuracy", results.seeds(*VARIANTS))
    return float(np.mean([falls(row) for row in rows]))


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """Training and test curves, and the readers' numbers beside ours."""
    train, test, bounce = _effects(results)
    cards = [
        effect_card("Training accuracy gained", train),
        effect_card("Test accuracy gained, against the better rate", test),
        effect_card("Mean fall of the test accuracy an epoch, with BN", bounce),
        report.Card(
            "The same without", number(_plain_bounce(results), "points"), "learning rate 0.9"
        ),
    ]
    return cards, [_curves(results), _numbers(results)]


def _curves(results: Results) -> report.Section:
    seeds = results.seeds(*VARIANTS)
    epochs = range(1, results.budget["epochs"] + 1)
    sides = (
        (NORM, "batch normalization, learning rate 1.0", report.BLUE, False),
        (PLAIN, "without, 0.9", report.VERMILLION, True),
        (CONTROL, "without, 0.5", report.ORANGE, True),
    )
    panels = []
    for key, label in (("train", "training accuracy (%)"), ("test", "test accuracy (%)")):
        canvas, axes = report.panel("epoch", label, label.partition(" ")[0].capitalize())
        axes.set(ylim=(0, 103), xlim=(1, max(len(epochs), 2)))
        for variant, _, color, dashed in sides:
            rows = results.get(variant, f"{key}_accuracy", seeds)
            curves(axes, epochs, [d2l.percent(row) for row in rows], color, dashed=dashed)
        panels.append(canvas)
    canvas, axes = report.panel("epoch", "test accuracy (%)", "Each seed, with batch norm")
    rows = [d2l.percent(row) for row in results.get(NORM, "test_accuracy", seeds)]
    for row in rows:
        axes.plot(epochs, row, color=report.BLUE, linewidth=1.4, marker="o", markersize=3.5)
    axes.set(ylim=(min(map(min, rows)) - 3, max(map(max, rows)) + 3), xlim=(0.7, len(epochs) + 0.3))
    panels.append(canvas)
    return report.Section(
        "Training and test accuracy",
        [
            d2l.extent(results),
            report.Figure(
                "accuracy",
                panels,
                f"Left and middle: median of {len(seeds)} seeds, band from the lowest to the "
                "highest. Right: the middle's batch normalization by seed, enlarged; the falls "
                "between epochs are the bounce.",
                [report.Key(label, color, dashed) for _, label, color, dashed in sides],
            ),
        ],
    )


def _numbers(results: Results) -> report.Section:
    seeds = results.seeds(*VARIANTS)
    rows = []
    for key, first, second in (
        ("train_accuracy", "+0.092", "+0.068"),
        ("test_accuracy", "+0.002", "+0.066"),
        ("train_loss", "–", "−0.177"),
    ):
        norm, plain = (np.array(d2l.last(results, side, key, seeds)) for side in (NORM, PLAIN))
        if np.isfinite([*norm, *plain]).all():
            ours = [f"{value:+.3f}".replace("-", "−") for value in (norm - plain)]
        else:
            ours = ["diverged"]
        rows.append([key.replace("_", " "), first, second, ", ".join(ours)])
    return report.Section(
        "Reported and found",
        [
            "The first reader gave the accuracies of both sides, the second their differences.",
            d2l.table(results, REPORTED),
            report.Table(
                ["with batch norm − without (0.9)", "first reader", "second reader", "our seeds"],
                rows,
                "Differences after the last epoch; accuracies between 0 and 1, losses in nats.",
            ),
        ],
    )
