"""Is batch normalization a regularizer?

In training an image is normalized with the mean and variance of its batch, so what the network
computes for it depends on which images happen to stand beside it. Over the epochs the neighbours
change: the image sees noise, as if through dropout. So batch normalization is said to replace
dropout. It is also said that its purpose is another one and that a network with it still overfits.

To tell the noise from everything else that batch normalization does, only the batch of the
*statistics* is changed here. Every step has a loss over 32 images on all sides. Their statistics
are those of groups of 8 within the 32, of the 32 themselves, or of all training images: these are
sent through the network as well, gradients included, but do not enter the loss. With all of them
the neighbours are always the same, and there is no noise left; the layer is otherwise the same.

How much noise there is is measured on the trained network: the logits of every training image under
30 draws of neighbours,

    noise = variance over draws, mean over images / variance over images of the mean over draws.

Fixed after trial runs (seeds 101 to 104, digits): two hidden layers of 256 units, 384 images, 50
epochs, the learning rates 0.1 and 0.3. There dropout won 0.4 points over the plain network; the
noise has to win half of that. With the seeds that decide dropout won nothing in the quick budget,
so that to be as good as dropout was no feat.

Weight decay, which batch normalization is also said to replace in part, is tested in
`weight-decay`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normally import report
from normally.lab import comparison
from normally.lab.comparison import higher, last_accuracy
from normally.lab.data import Dataset
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import intervals
from normally.lab.networks import mlp
from normally.lab.page import effect_card, number
from normally.lab.training import evaluate, final_scores
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

NOISE_GAIN, DROPOUT_MARGIN, GAP_SHARE = 0.2, 0.5, 0.5
WIDTHS, BATCH, GROUP, EVERY = (256, 256), 32, 8, 1_000_000
RATES = (0.1, 0.3)
PLAIN, DROPOUT, NOISY, NORM, SILENT = "plain", "dropout", "norm8", "norm32", "normall"
NETWORKS: dict[str, dict[str, Any]] = {
    PLAIN: {"norm": "none"},
    DROPOUT: {"norm": "none", "dropout": 0.5},
    NOISY: {"norm": "batch"},
    NORM: {"norm": "batch"},
    SILENT: {"norm": "batch"},
}
STATISTICS = {PLAIN: BATCH, DROPOUT: BATCH, NOISY: GROUP, NORM: BATCH, SILENT: EVERY}
LABELS = {
    PLAIN: "plain",
    DROPOUT: "dropout 0.5",
    NOISY: "BN, statistics of 8",
    NORM: "BN, of the batch of 32",
    SILENT: "BN, of all images",
}
COLORS = {
    PLAIN: report.GREY,
    DROPOUT: report.VERMILLION,
    NOISY: report.PURPLE,
    NORM: report.BLUE,
    SILENT: report.GREEN,
}

EXPERIMENT = Experiment(
    name="regularization",
    title="Is batch normalization a regularizer?",
    claim="The noise of the batch's statistics regularizes, so that batch normalization can "
    "replace dropout; but the gap between training and test accuracy stays large.",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.4; common course material",
    prediction="With the statistics of its batch the network is more accurate on new images than "
    "with those of all training images, and as accurate as a plain one with dropout; the gap is "
    "more than half of the plain network's.",
    protocol=[
        f"A perceptron with two hidden layers of {WIDTHS[0]} units, ReLU, He initialization, so "
        "few training images that it learns all of them; the rest of the data set's training "
        "images join the test images.",
        f"Every step has a loss over {BATCH} images; plain SGD without weight decay; float32, one "
        "thread. All sides start from the same weights and see the same batches.",
        f"Batch normalization in front of ReLU, with the statistics of groups of {GROUP} of the "
        f"{BATCH} images, of all {BATCH}, and of all training images, which then go through the "
        "network beside them, gradients included, and do not enter the loss.",
        f"Learning rates {' and '.join(f'{rate:g}' for rate in RATES)}, chosen for each side and "
        "seed by the other seeds.",
        "Accuracies are of the last weights in evaluation, dropout off, with the statistics of all "
        "training images on every side that has any. Gap: training − test accuracy.",
    ],
    thresholds=[
        f"With the statistics of the {BATCH} images test accuracy is at least {NOISE_GAIN:g} "
        "percentage points higher than with those of all training images.",
        f"It is less than {DROPOUT_MARGIN:g} points below that of the plain network with dropout.",
        f"The gap is at least {GAP_SHARE:g} times the plain network's, or it would be closed.",
        "The claim holds if all hold, and fails if one fails.",
    ],
    variants=[f"{side}-lr{rate:g}" for side in NETWORKS for rate in RATES],
    budgets={
        "quick": {"seeds": 3, "epochs": 50, "train_images": 384, "test_images": 2000},
        "full": {"seeds": 15, "epochs": 150, "train_images": 384, "test_images": 10_000},
    },
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train one side at one learning rate and score it."""
    side, _, rate = run.variant.partition("-lr")
    data = run.data.few(run.budget["train_images"], run.budget["test_images"])
    model = mlp(data.train_x[0].numel(), WIDTHS, **NETWORKS[side])
    optimizer = torch.optim.SGD(model.parameters(), lr=float(rate))
    order = torch.Generator().manual_seed(run.seed)
    for _ in run.epochs():
        train_epoch(model, optimizer, data, STATISTICS[side], order)
    disturbed = noise(model, data.train_x, STATISTICS[side]) if "norm" in side else 0.0
    scores = final_scores(model, data)
    test = evaluate(model, data.test_x, data.test_y)
    return {**scores, "test_loss": test.loss, "noise": disturbed}


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Dataset,
    statistics: int,
    generator: torch.Generator,
) -> None:
    """One pass in batches whose norms take the statistics of so many images."""
    model.train()
    order = torch.randperm(len(data.train_x), generator=generator)
    for start in range(0, len(order) // BATCH * BATCH, BATCH):
        images = order.roll(-start)  # the batch, and behind it the others
        output = forward(model, data.train_x[images], statistics)
        loss = F.cross_entropy(output, data.train_y[images[:BATCH]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def forward(model: nn.Module, images: Tensor, statistics: int) -> Tensor:
    """Outputs for the first `BATCH` images, normalized in groups of `statistics` or among more."""
    if statistics > BATCH:
        output: Tensor = model(images[:statistics])
        return output[:BATCH]
    return torch.cat([model(group) for group in images[:BATCH].split(statistics)])


@torch.no_grad()
def noise(model: nn.Module, images: Tensor, statistics: int, draws: int = 30) -> float:
    """How much an image's logits depend on its neighbours, relative to what images differ by."""
    model = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(0)
    whole = len(images) // statistics * statistics or len(images)
    results = []
    for _ in range(draws):
        order = torch.randperm(whole, generator=generator)
        outputs = torch.cat([model(images[group]) for group in order.split(statistics)])
        results.append(outputs[order.argsort()].double())
    stacked = torch.stack(results)
    between = stacked.mean(0).var(0, correction=0).mean()
    return float(stacked.var(0).mean() / between)


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The three criteria of the thresholds above."""
    gain, dropout, gap = _effects(results)
    alone = _gain(results, DROPOUT, PLAIN)
    plain = float(np.mean(_gaps(results, PLAIN)))
    norm = float(np.mean(_gaps(results, NORM)))
    return decide(
        [Criterion(gain, NOISE_GAIN), Criterion(dropout, -DROPOUT_MARGIN), Criterion(gap, 0.0)],
        f"With the statistics of the batch of {BATCH} test accuracy is {higher(gain)} than with "
        f"those of all training images, which are without noise, and {higher(dropout)} than that "
        f"of the plain network with dropout, which is itself {higher(alone)} than that without. "
        f"Training accuracy is {number(norm)} points above test accuracy with batch normalization "
        f"and {number(plain)} without.",
    )


def _tuned(results: Results, side: str) -> tuple[list[str], list[float]]:
    """The variant of the learning rate that the other seeds chose, and its test accuracy."""
    rates = [f"{side}-lr{rate:g}" for rate in RATES]
    return comparison.tuned(results, rates, results.seeds(*EXPERIMENT.variants), last_accuracy)


def _at_own_rate(results: Results, side: str, key: str) -> list[float]:
    seeds = results.seeds(*EXPERIMENT.variants)
    values = [
        results.records[variant, seed][key]
        for variant, seed in zip(_tuned(results, side)[0], seeds, strict=True)
    ]
    return [float("inf") if value is None else float(value) for value in values]


def _gaps(results: Results, side: str) -> list[float]:
    train, test = (_at_own_rate(results, side, key) for key in ("final_train", "final_test"))
    return [100 * (a - b) for a, b in zip(train, test, strict=True)]


def _gain(results: Results, side: str, control: str) -> Effect:
    name = f"test accuracy, {LABELS[side]} − {LABELS[control]}"
    return paired_effect(name, _tuned(results, side)[1], _tuned(results, control)[1], "points")


def _effects(results: Results) -> tuple[Effect, Effect, Effect]:
    share = [GAP_SHARE * gap for gap in _gaps(results, PLAIN)]
    return (
        _gain(results, NORM, SILENT),
        _gain(results, NORM, DROPOUT),
        paired_effect(
            f"gap with BN − {GAP_SHARE:g} × gap of plain", _gaps(results, NORM), share, "points"
        ),
    )


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """What each side gains, the gap that is left, and the noise."""
    noisier = _gain(results, NOISY, SILENT)
    gain, dropout, _ = _effects(results)
    cards = [
        effect_card(label, effect)
        for label, effect in (
            (f"Test accuracy won by the noise of a batch of {BATCH}", gain),
            (f"By the noise of groups of {GROUP}", noisier),
            ("Batch normalization − dropout", dropout),
            ("Dropout − plain", _gain(results, DROPOUT, PLAIN)),
        )
    ]
    return cards, [_section(results)]


def _section(results: Results) -> report.Section:
    seeds = results.seeds(*EXPERIMENT.variants)
    sides = [side for side in NETWORKS if side != PLAIN]
    gains = [_gain(results, side, PLAIN) for side in sides]
    gaps = [
        paired_effect("gap", _gaps(results, side), [0.0] * len(seeds), "points")
        for side in NETWORKS
    ]
    left, axes = report.panel("test accuracy above plain (points)", "", "Against the plain network")
    axes.axvline(0, color=report.GREY, linewidth=1)
    _rows(axes, sides, gains)
    middle, axes = report.panel("training − test accuracy (points)", "", "The gap")
    _rows(axes, list(NETWORKS), gaps)
    axes.set_xlim(left=0 if min(gap.low for gap in gaps) >= 0 else None)
    right, axes = report.panel("images in the statistics", "noise (% of variance)", "The noise")
    for place, side in enumerate((NOISY, NORM, SILENT)):
        values = [100 * value for value in _at_own_rate(results, side, "noise")]
        axes.plot([place] * len(values), values, "o", color=COLORS[side], markersize=7)
    axes.set_xlim(-0.5, 2.5)
    axes.set_xticks(range(3), [str(GROUP), str(BATCH), "all"])
    axes.set_ylim(bottom=0)
    budget, images = results.budget, results.data
    tests = min(
        budget["test_images"], len(images.train_x) + len(images.test_x) - budget["train_images"]
    )
    return report.Section(
        "What the noise is worth",
        [
            f"{budget['train_images']:,} training images, {tests:,} others to test, "
            f"{budget['epochs']} epochs.",
            report.Figure(
                "noise",
                [left, middle, right],
                f"Left and middle: mean of {len(seeds)} seeds and 95 % interval. Right: how far "
                "the logits of a training image vary with its neighbours in training mode, as a "
                "share of what images differ by; a dot a seed.",
            ),
            _table(results, seeds),
        ],
    )


def _rows(axes: Any, sides: Sequence[str], effects: Sequence[Effect]) -> None:
    intervals(
        axes,
        [LABELS[side].replace(", ", ",\n") for side in sides],
        [e.estimate for e in effects],
        [e.low for e in effects],
        [e.high for e in effects],
        [COLORS[side] for side in sides],
    )


def _table(results: Results, seeds: Sequence[int]) -> report.Table:
    rows = []
    for side, label in LABELS.items():
        accuracies = [
            f"{np.mean(last_accuracy(results, f'{side}-lr{rate:g}', seeds)):.1f} %"
            for rate in RATES
        ]
        own = float(np.mean(_tuned(results, side)[1]))
        train = 100 * float(np.mean(_at_own_rate(results, side, "final_train")))
        loss = float(np.mean(_at_own_rate(results, side, "test_loss")))
        rows.append(
            [
                label,
                *accuracies,
                f"{own:.1f} %",
                f"{train:.1f} %",
                "infinite" if np.isinf(loss) else number(loss),
            ]
        )
    return report.Table(
        [
            "side",
            *(f"test accuracy at {rate:g}" for rate in RATES),
            "at its own rate",
            "training accuracy",
            "test loss",
        ],
        rows,
        "Means over seeds, last weights; training accuracy in evaluation and test loss in nats, at "
        "each side's own learning rate.",
    )
