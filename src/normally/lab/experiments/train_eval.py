"""Test accuracy that jumps from epoch to epoch.

In training batch normalization takes each batch's own statistics; in evaluation it takes averages
that it collected on the way, in torch

    running = 0.9 · running + 0.1 · batch        after every step

An exponential average of about the last ten steps. While the weights move, these are ten different
networks, of which the last is the one that is evaluated: the average *lags*. It is also of ten
batches only, and so has *sampling* noise. Both are wrong by another amount after every epoch, and a
test accuracy computed with them moves even where the network's own quality does not.

So after every epoch the same weights are evaluated four times:

    running        what training left                          lag and sampling
    frozen average the same average, collected again with      sampling
                   the weights held still
    recalibrated   mean and variance over all training images  neither
    own            those of each test batch                    neither, but others' samples

With a for the accuracy, the change from one epoch to the next of the first is that of the third and
of what lies between the two, d = a_running - a_recalibrated:

    Δa_running = Δa_recalibrated + Δd
    share of the running statistics = Σ Δa_running·Δd / Σ (Δa_running)²

The shares of both parts add to 1; a negative one, or one above 1, means that the parts oppose each
other. The fluctuation is the root mean square of Δa over the second half of the training, where the
accuracy no longer climbs.

Trial runs with seeds 101 and 102 chose 30 epochs at a batch of 64, and showed that in the network
with ReLU the accuracy moves by one or two of digits' 360 test images whichever statistics are used:
too coarse for a threshold. The sigmoid network is the one the claim was made of.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

import normally
from normally import report
from normally.lab.data import Dataset
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves
from normally.lab.networks import lenet
from normally.lab.page import effect_card, number
from normally.lab.training import (
    evaluate,
    evaluate_with_batch_statistics,
    train_epoch,
)
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

SHARE, LEFT = 0.5, 1.5
STATISTICS = ("running", "frozen", "recalibrated", "own")
# Activation, norm and learning rate.
VARIANTS = {
    "sigmoid": ("sigmoid", "batch", 1.0),
    "relu": ("relu", "batch", 1.0),
    "relu-plain": ("relu", "none", 0.1),
}
JUDGED = "sigmoid"

EXPERIMENT = Experiment(
    name="train-eval",
    title="Test accuracy that jumps from epoch to epoch",
    claim="The test accuracy of a LeNet with batch normalization fluctuates from epoch to epoch "
    "because evaluation uses moving averages; statistics taken over the training set remove that.",
    source="Readers of Dive into Deep Learning, chapter on batch normalization; the statistics: "
    "Ioffe & Szegedy 2015, arXiv:1502.03167, Algorithm 2",
    prediction="With the running statistics the accuracy moves more than with those of "
    "`normally.recalibrate`, and most of its movement is that of the statistics.",
    protocol=[
        "LeNet with sigmoid and batch norm (momentum 0.1) after its four hidden layers, SGD with "
        "learning rate 1, batches of 64, no schedule. Beside it, without a threshold: the same "
        "with ReLU, and with ReLU and no norm at learning rate 0.1.",
        "After every epoch the test images are evaluated with the running statistics; on copies "
        "with the same exponential average collected over one more epoch without changing the "
        "weights; with `normally.recalibrate` over the training images in batches of 64; and with "
        "the statistics of each test batch of 64.",
        "Fluctuation: root mean square change of the test accuracy between epochs that follow each "
        "other, in the second half of the training.",
    ],
    thresholds=[
        f"The running statistics' share in the square of the fluctuation is at least {SHARE:g}.",
        f"What is left after recalibrating is at most {LEFT:g} times the fluctuation with the test "
        "batches' own statistics, which know nothing of any average.",
        "The claim holds if both hold, and fails if one fails.",
    ],
    variants=list(VARIANTS),
    budgets={
        "quick": {"seeds": 3, "epochs": 30, "batch_size": 64},
        "full": {"seeds": 15, "epochs": 60, "batch_size": 64},
    },
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train, and after every epoch evaluate with each kind of statistics."""
    activation, norm, rate = VARIANTS[run.variant]
    kinds = kinds_of(run.variant)
    model = lenet(run.data.train_x.shape[-1], norm=norm, activation=activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    record: Record = {"train_loss": [], **{kind: [] for kind in kinds}}
    for _ in run.epochs():
        score = train_epoch(model, optimizer, run.data, run.budget["batch_size"])
        record["train_loss"].append(score.loss)
        for kind in kinds:
            accuracy = _accuracy(model, run.data, kind, run.budget["batch_size"])
            record[kind].append(accuracy)
    return record


def kinds_of(variant: str) -> tuple[str, ...]:
    """The statistics there are: a network without batch norm is evaluated once."""
    return STATISTICS if VARIANTS[variant][1] == "batch" else STATISTICS[:1]


def _accuracy(model: nn.Module, data: Dataset, kind: str, batch_size: int) -> float:
    """Test accuracy between 0 and 1 with this kind of statistics; the model stays as it is."""
    x, y = data.test_x, data.test_y
    if kind == "own":
        return evaluate_with_batch_statistics(model, x, y, batch_size).accuracy
    if kind != "running":
        model = copy.deepcopy(model)
    if kind == "recalibrated":
        normally.recalibrate(model, data.train_x.split(batch_size), progress=False)
    if kind == "frozen":
        _average_again(model, data, batch_size)
    return evaluate(model, x, y).accuracy


@torch.no_grad()
def _average_again(model: nn.Module, data: Dataset, batch_size: int) -> None:
    """One epoch of batches through the network in training mode, the weights held still."""
    model.train()
    with torch.random.fork_rng(devices=[]):  # the training's own draws stay those of every kind
        order = torch.randperm(len(data.train_x))
    for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
        model(data.train_x[batch])


def changes(row: Sequence[float]) -> np.ndarray:
    """From each epoch to the next, in percentage points, over the second half."""
    return np.diff(100 * np.asarray(row, dtype=float)[len(row) // 2 :])


def fluctuation(row: Sequence[float]) -> float:
    """Root mean square of `changes`."""
    found = changes(row)
    return float(np.sqrt(np.mean(found**2))) if found.size else 0.0


def share(running: Sequence[float], recalibrated: Sequence[float]) -> float:
    """The part of the running statistics in the square of the fluctuation; 0 without any."""
    whole = changes(running)
    total = float(np.sum(whole**2))
    part = whole - changes(recalibrated)
    return float(np.sum(whole * part)) / total if total else 0.0


def _fluctuations(results: Results, variant: str, kind: str) -> list[float]:
    return [fluctuation(row) for row in results.get(variant, kind)]


def _shares(results: Results, variant: str) -> list[float]:
    rows = (results.get(variant, kind) for kind in ("running", "recalibrated"))
    return [share(*pair) for pair in zip(*rows, strict=True)]


def _effects(results: Results) -> tuple[Effect, Effect]:
    shares = _shares(results, JUDGED)
    left, own = (_fluctuations(results, JUDGED, kind) for kind in ("recalibrated", "own"))
    # What is at most LEFT times as large, as a number that should not be negative.
    allowed = [LEFT * value for value in own]
    return (
        paired_effect("share of the running statistics", shares, [0.0] * len(shares)),
        paired_effect(f"{LEFT:g} × own − recalibrated fluctuation", allowed, left, "points"),
    )


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """Both criteria of the thresholds above."""
    part, left = _effects(results)
    seen = {k: float(np.mean(_fluctuations(results, JUDGED, k))) for k in STATISTICS}
    return decide(
        [Criterion(part, SHARE), Criterion(left, 0.0)],
        f"From epoch to epoch the test accuracy changes by {number(seen['running'])} points with "
        f"the running statistics, by {number(seen['recalibrated'])} with recalibrated ones and by "
        f"{number(seen['own'])} with the test batches' own. The running statistics' share in its "
        f"square is {number(100 * part.estimate)} %.",
    )


LOOKS = {
    "running": ("running statistics", report.VERMILLION, False),
    "frozen": ("average collected again, weights held still", report.ORANGE, True),
    "recalibrated": ("recalibrated over the training images", report.BLUE, False),
    "own": ("each test batch's own", report.GREEN, True),
}
NAMES = {
    "sigmoid": "sigmoid, batch norm",
    "relu": "ReLU, batch norm",
    "relu-plain": "ReLU, no norm",
}


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """One seed's curves, where the jumps can be seen, then the numbers of all."""
    part, _ = _effects(results)
    cards = [
        effect_card("Share of the running statistics", part),
        *(
            report.Card(
                f"Change an epoch, {LOOKS[kind][0]}",
                f"{np.mean(_fluctuations(results, JUDGED, kind)):.2f} points",
            )
            for kind in STATISTICS
            if kind != "frozen"
        ),
    ]
    return cards, [_jumps_section(results), _table_section(results)]


def _jumps_section(results: Results) -> report.Section:
    epochs = range(1, results.budget["epochs"] + 1)
    panels = []
    for seed in results.seeds(JUDGED)[:3]:
        canvas, axes = report.panel("epoch", "test accuracy (%)", f"seed {seed}")
        record = results.records[JUDGED, seed]
        lowest = min(value for kind in LOOKS for value in record[kind][len(epochs) // 4 :])
        axes.set(ylim=(max(0, 100 * lowest - 5), 101), xlim=(1, max(len(epochs), 2)))
        for kind, (_, color, dashed) in LOOKS.items():
            row = [100 * value for value in record[kind]]
            curves(axes, epochs, [row], color, dashed=dashed)
        panels.append(canvas)
    return report.Section(
        "The same weights, evaluated with four kinds of statistics",
        [
            "An average that is collected while the weights move lags behind them. Collected again "
            "with the weights held still it is as short, but no longer late: where that curve is "
            "calm, the jumps are lag and not the average's few samples.",
            report.Figure(
                "jumps",
                panels,
                "LeNet with sigmoid and batch norm, learning rate 1; one seed a panel. At each "
                "epoch the four points are of the same weights; the axis begins below the lowest "
                "point after a quarter of the training.",
                [report.Key(*look) for look in LOOKS.values()],
            ),
        ],
    )


def _table_section(results: Results) -> report.Section:
    rows = []
    for variant, name in NAMES.items():
        kinds = kinds_of(variant)
        cells = [f"{np.mean(_fluctuations(results, variant, kind)):.2f}" for kind in kinds]
        if len(kinds) == len(STATISTICS):
            cells.append(f"{np.mean(_shares(results, variant)):.2f}")
        rows.append([name, *cells, *["–"] * (len(STATISTICS) + 1 - len(cells))])
    return report.Section(
        "How much it fluctuates",
        [
            "A network without normalization has no running statistics and fluctuates as well: "
            "that part is the weights' own, and no statistics can take it away.",
            report.Table(
                [
                    "network",
                    "running",
                    "average again",
                    "recalibrated",
                    "test batch's own",
                    "share",
                ],
                rows,
                "Root mean square change of the test accuracy from epoch to epoch in percentage "
                "points, second half of the training, mean over seeds; and the running "
                "statistics' share in its square.",
            ),
        ],
    )
