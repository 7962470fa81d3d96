"""Batch normalization in front of the activation, or behind it.

    before:  y = f(BN(W x))        after:  y = BN(f(W x))

Ioffe & Szegedy put it before: what a layer computes linearly is nearer to a normal distribution
than what comes out of an activation, so fixing its mean and variance fixes more of it. Behind the
activation, on the other hand, the next layer gets inputs that really have mean 0 and variance 1,
while a ReLU in between leaves a positive mean. Articles say that the order matters and that before
is right. "Matters" needs a size: here one percentage point of test accuracy.

Both orders may choose their learning rate from the same three, for each seed by the other seeds.
Accuracies are of the last weights with recalibrated statistics, as those with running averages
bounce from epoch to epoch. In trial runs (seeds 101 to 103) neither order was ahead by a point at
its best rate, and at the largest rate before was ahead by 4; the claim says nothing of rates, so
its thresholds do not either, and all rates are shown.
"""

from __future__ import annotations

import numpy as np

from normally import report
from normally.lab import comparison
from normally.lab.comparison import higher, last_accuracy
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves, intervals
from normally.lab.networks import lenet
from normally.lab.page import effect_card
from normally.lab.training import final_scores, fit
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

MARGIN = 1.0
ACTIVATIONS = {"relu": "ReLU", "sigmoid": "sigmoid"}
ORDERS = {"before": report.BLUE, "after": report.VERMILLION}
RATES = (0.1, 0.5, 2.0)

EXPERIMENT = Experiment(
    name="placement",
    title="In front of the activation or behind it",
    claim="The order matters, and batch normalization belongs in front of the activation: behind "
    "it the network is less accurate.",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.2; common course material",
    prediction="With ReLU as with sigmoid, batch normalization in front of the activation ends "
    "with at least one percentage point more test accuracy, each order at its own learning rate.",
    protocol=[
        "LeNet with `normally.nn.BatchNorm1d/2d` at its four hidden layers, in front of the "
        "activation or behind it, with ReLU (He initialization) and with sigmoid (Glorot).",
        "Both orders start from the same weights and see the same batches of 64; plain SGD, "
        f"learning rates {', '.join(f'{rate:g}' for rate in RATES)}, float32, one thread.",
        "Each order's learning rate is chosen for each seed by the other seeds.",
        "Test accuracy of the last weights with recalibrated statistics (mean and variance of all "
        "training images).",
    ],
    thresholds=[
        f"With ReLU the test accuracy is at least {MARGIN:g} percentage point higher with batch "
        "normalization in front of the activation.",
        "With sigmoid as well.",
        "The claim holds if both hold, and fails if one fails.",
    ],
    variants=[f"{a}-{order}-lr{rate:g}" for a in ACTIVATIONS for rate in RATES for order in ORDERS],
    budgets={
        "quick": {
            "seeds": 3,
            "epochs": 15,
            "batch_size": 64,
            "train_images": 3600,
            "test_images": 1000,
        },
        "full": {
            "seeds": 15,
            "epochs": 30,
            "batch_size": 64,
            "train_images": 60_000,
            "test_images": 10_000,
        },
    },
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train one order of one activation at one learning rate."""
    activation, order, rate = run.variant.split("-")
    data = run.data.first(run.budget["train_images"], run.budget["test_images"])
    model = lenet(data.train_x.shape[-1], activation=activation, after_activation=order == "after")
    record = fit(
        model,
        data,
        lr=float(rate.removeprefix("lr")),
        epochs=run.epochs(),
        batch_size=run.budget["batch_size"],
    )
    return {**record, **final_scores(model, data)}


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The two criteria of the thresholds above."""
    effects = {activation: _tuned_effect(results, activation) for activation in ACTIVATIONS}
    return decide(
        [Criterion(effect, MARGIN) for effect in effects.values()],
        "In front of the activation, each order at its own learning rate, test accuracy is "
        + " and ".join(
            f"{higher(effect)} with {ACTIVATIONS[name]}" for name, effect in effects.items()
        )
        + f" than behind it. At the learning rate {max(RATES):g} on both sides it is "
        + " and ".join(
            f"{higher(_effect(results, name, max(RATES)))} with {label}"
            for name, label in ACTIVATIONS.items()
        )
        + ".",
    )


def _tuned(results: Results, activation: str, order: str) -> tuple[list[str], list[float]]:
    sides = [f"{activation}-{order}-lr{rate:g}" for rate in RATES]
    return comparison.tuned(results, sides, results.seeds(*EXPERIMENT.variants), last_accuracy)


def _tuned_effect(results: Results, activation: str) -> Effect:
    before, after = (_tuned(results, activation, order)[1] for order in ORDERS)
    name = f"test accuracy, before − after, {ACTIVATIONS[activation]}, tuned rates"
    return paired_effect(name, before, after, "points")


def _effect(results: Results, activation: str, rate: float) -> Effect:
    seeds = results.seeds(*EXPERIMENT.variants)
    before, after = (
        last_accuracy(results, f"{activation}-{order}-lr{rate:g}", seeds) for order in ORDERS
    )
    name = f"test accuracy, before − after, {ACTIVATIONS[activation]}, {rate:g}"
    return paired_effect(name, before, after, "points")


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """The difference at every learning rate, and the curves behind it."""
    cards = [
        effect_card(f"Before − after, {label}", effect)
        for label, effect in (
            ("ReLU, tuned rates", _tuned_effect(results, "relu")),
            ("sigmoid, tuned rates", _tuned_effect(results, "sigmoid")),
            (f"ReLU, learning rate {max(RATES):g}", _effect(results, "relu", max(RATES))),
            (f"sigmoid, learning rate {max(RATES):g}", _effect(results, "sigmoid", max(RATES))),
        )
    ]
    return cards, [_differences(results), _training(results)]


def _differences(results: Results) -> report.Section:
    panels, rows = [], []
    seeds = results.seeds(*EXPERIMENT.variants)
    for activation, label in ACTIVATIONS.items():
        tuned = _tuned_effect(results, activation)
        effects = [*(_effect(results, activation, rate) for rate in RATES), tuned]
        canvas, axes = report.panel("test accuracy, before − after (points)", "", label)
        axes.axvspan(-MARGIN, MARGIN, color=report.GREY, alpha=0.15, linewidth=0)
        axes.axvline(0, color=report.GREY, linewidth=1)
        intervals(
            axes,
            [*(f"{rate:g}" for rate in RATES), "each its own"],
            [e.estimate for e in effects],
            [e.low for e in effects],
            [e.high for e in effects],
            [*[report.BLUE] * len(RATES), report.GREEN],
        )
        axes.set_ylabel("learning rate")
        panels.append(canvas)
        for order in ORDERS:
            by_rate = [
                np.mean(last_accuracy(results, f"{activation}-{order}-lr{rate:g}", seeds))
                for rate in RATES
            ]
            own = np.mean(_tuned(results, activation, order)[1])
            rows.append([label, order, *(f"{value:.1f} %" for value in (*by_rate, own))])
    return report.Section(
        "What the order is worth",
        [
            "The same network, weights and batches; only the order of batch normalization and "
            "activation differs.",
            report.Figure(
                "difference",
                panels,
                f"Right of 0: in front of the activation is better. Mean of {len(seeds)} seeds and "
                f"95 % interval; grey: less than {MARGIN:g} point either way.",
                [
                    report.Key("the same learning rate on both sides", report.BLUE),
                    report.Key("each order at its own", report.GREEN),
                ],
                columns=2,
            ),
            report.Table(
                ["activation", "norm", *(f"at {rate:g}" for rate in RATES), "at its own"],
                rows,
                "Test accuracy of the last weights, recalibrated; mean over seeds.",
                text_columns=2,
            ),
        ],
    )


def _training(results: Results) -> report.Section:
    seeds = results.seeds(*EXPERIMENT.variants)
    epochs = range(1, results.budget["epochs"] + 1)
    panels = []
    for activation, label in ACTIVATIONS.items():
        for rate in RATES:
            title = f"{label}, learning rate {rate:g}"
            canvas, axes = report.panel("epoch", "training loss (nats)", title)
            axes.set(yscale="log", ylim=(1e-3, 5), xlim=(1, max(len(epochs), 2)))
            for order, color in ORDERS.items():
                rows = results.get(f"{activation}-{order}-lr{rate:g}", "train_loss", seeds)
                curves(axes, epochs, rows, color, dashed=order == "after")
            panels.append(canvas)
    return report.Section(
        "Training loss on the way",
        [
            report.Figure(
                "training-loss",
                panels,
                f"Median of {len(seeds)} seeds; band from the lowest to the highest.",
                [
                    report.Key(f"batch norm {order} the activation", color, order == "after")
                    for order, color in ORDERS.items()
                ],
            )
        ],
    )
