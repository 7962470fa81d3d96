"""What the experiments on the LeNet of "Dive into Deep Learning" (d2l) share.

Readers of d2l's chapter on batch normalization trained its LeNet on Fashion-MNIST and compared
notes: batches of 256, 10 epochs of 235 steps, sigmoid units, plain SGD, learning rate 0.9 without
and 1.0 with batch normalization. Their numbers stand beside ours. An epoch here is a number of
steps, so that a subset of the images can be trained as long as the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from normally import report
from normally.lab.experiment import Record, Results, Run
from normally.lab.networks import lenet
from normally.lab.page import number
from normally.lab.training import final_scores, fit

SOURCE = "Readers' results in the discussion of Dive into Deep Learning, d2l.ai, section 8.5"
PROTOCOL = (
    "LeNet as d2l has it: 5×5 convolutions with 6 and 16 channels, each followed by 2×2 average "
    "pooling, then 120, 84 and 10 units; sigmoid; Glorot initialization; cross-entropy. The second "
    "convolution has no padding on 28×28 images and padding 2 on 8×8, where nothing would be left.",
    "Batch normalization is `normally.nn.BatchNorm1d/2d` between layer and sigmoid, torch's "
    "defaults. All sides start from the same weights and see the same batches in the same order.",
    "Plain SGD, constant learning rate, no momentum, no weight decay; one thread.",
    "An epoch is a fixed number of steps, whatever passes over the images these are. The reports "
    "had 235 steps of 256 images an epoch, 60,000 images and 10,000 to test. The quick budget has "
    "112 of 32, which is one pass over 3,600 images: 1,120 steps in all instead of 2,350. The "
    "smaller batch was chosen in trial runs: 10 passes in batches of 256 are 140 steps, in which "
    "the network without batch normalization does not begin to learn.",
)
QUICK = {
    "seeds": 3,
    "epochs": 10,
    "steps": 112,
    "batch_size": 32,
    "train_images": 3600,
    "test_images": 1000,
}
FULL = {
    "seeds": 5,
    "epochs": 10,
    "steps": 235,
    "batch_size": 256,
    "train_images": 60_000,
    "test_images": 10_000,
}


def train(run: Run, lr: float, **network: Any) -> Record:
    """Train d2l's LeNet; what `fit` records, and the last weights scored once more.

    "final_train" and "final_test" are of `training.final_scores`.

    Args:
        run: its budget is `QUICK` or `FULL`, or has their keys.
        lr: learning rate.
        **network: of `networks.lenet`.
    """
    data = run.data.first(run.budget["train_images"], run.budget["test_images"])
    image_size = data.train_x.shape[-1]
    model = lenet(image_size, activation="sigmoid", padding=2 if image_size < 28 else 0, **network)
    record = fit(
        model,
        data,
        lr=lr,
        epochs=run.epochs(),
        batch_size=run.budget["batch_size"],
        steps=run.budget["steps"],
        generator=torch.Generator().manual_seed(run.seed),
    )
    return {**record, **final_scores(model, data)}


def extent(results: Results) -> str:
    """How many images and steps there were here, and how many in the reports."""
    budget, data = results.budget, results.data
    images = min(budget["train_images"], len(data.train_x))
    tests = min(budget["test_images"], len(data.test_x))
    steps = budget["epochs"] * budget["steps"]
    passes = steps * budget["batch_size"] / images
    if data.name != "fashion-mnist":
        which = "**This is not the reports' data:** they had 60,000 images of Fashion-MNIST, "
    elif images < 60_000:
        which = "**This is a subset:** the reports had 60,000 images of Fashion-MNIST, "
    else:
        which = "The reports had the same images, "
    return (
        f"Trained on {images:,} images and tested on {tests:,}, {budget['epochs']} epochs of "
        f"{budget['steps']} steps of {budget['batch_size']}: {steps:,} steps, {passes:.0f} passes "
        f"over the images. {which}10 passes and 2,350 steps of 256. Compare the order of the sides "
        "and their differences rather than the numbers."
    )


@dataclass(frozen=True)
class Reported:
    """What a reader wrote down for a variant: the last epoch; None where nothing was said."""

    variant: str
    label: str
    loss: float | None = None
    train: float | None = None
    test: float | None = None


def table(results: Results, rows: Sequence[Reported]) -> report.Table:
    """The reported numbers of each side beside ours."""
    seeds = results.seeds(*(row.variant for row in rows))
    return report.Table(
        [
            "side",
            "train loss reported",
            "ours",
            "train accuracy reported",
            "ours",
            "test accuracy reported",
            "ours",
            "recalibrated",
        ],
        [
            [
                row.label,
                _fraction(row.loss),
                _median(last(results, row.variant, "train_loss", seeds)),
                _fraction(row.train),
                _median(last(results, row.variant, "train_accuracy", seeds)),
                _fraction(row.test),
                _median(last(results, row.variant, "test_accuracy", seeds)),
                _median(results.get(row.variant, "final_test", seeds)),
            ]
            for row in rows
        ],
        f"Ours: medians of {len(seeds)} seeds after the last epoch; losses in nats, accuracies "
        "between 0 and 1 as in the reports. Train: as met on the way through the epoch. "
        "Recalibrated: the last weights once more, normalized with the mean and variance of all "
        "training images (`normally.recalibrate`) instead of the running averages.",
    )


def last(results: Results, variant: str, key: str, seeds: Sequence[int]) -> list[float]:
    """The value of the last epoch by seed; a loss that is not finite is infinite."""
    rows = results.get(variant, key, seeds)
    return [float("inf") if row[-1] is None else float(row[-1]) for row in rows]


def percent(values: Sequence[float]) -> list[float]:
    """Fractions as percentages."""
    return [100 * value for value in values]


def _fraction(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _median(values: Sequence[float]) -> str:
    value = float(np.median(values))
    return "infinite" if np.isinf(value) else f"{value:.3f}" if value < 10 else number(value)
