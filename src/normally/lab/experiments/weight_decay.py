"""Does batch normalization need less weight decay?

Weight decay adds λ·w to the gradient of every weight and so holds the weights small; a function
with small weights cannot bend far, and cannot learn every label by heart. In the network of the
paper on batch normalization λ could be a fifth of what it was before, with more accuracy on new
images.

In front of batch normalization small weights hold nothing back: the layer's output is the same for
a·W as for W. What the decay changes there is the size of a step against the size of the weights,

    effective learning rate = η / ‖W‖²

(van Laarhoven 2017, arXiv:1706.05350): smaller weights turn faster. So a weaker decay could be
enough because batch normalization itself regularizes, which is the claim, or because decay is of
another kind there, and no amount of it does the old work.

For decay to have work to do there must be something that should not be learnt. Here the labels of
30 % of the training images are drawn at random: a network that learns all of them by heart pays for
it on new images, whose labels are right.

Trial runs with the seeds 101 to 103 came before. On digits with right labels the decay was worth
0.2 points at most, to either side, and could not have shown anything: hence the random labels. With
them the best decay of a grid up to 0.05 was 0.05 for the plain network, worth 15 points, so the
grid was extended to 0.25. They also showed that with batch normalization a fifth of it is worth
little. The thresholds are the claim's words with margins of 2 points, and were written after these
trials and before the first run of seed 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from normally import report
from normally.lab import comparison
from normally.lab.data import Dataset
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.networks import mlp
from normally.lab.page import interval, number
from normally.lab.training import final_scores, fit
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

WIDTHS, BATCH = (256, 256), 32
RATES = (0.1, 0.3)
DECAYS = (0.0, 0.002, 0.01, 0.05, 0.25)  # each a fifth of the next, as in the paper
RANDOM = 0.3
MARGIN = 2.0
PLAIN, NORM = "none", "batch"
LABELS = {PLAIN: "without batch norm", NORM: "with batch norm"}
COLORS = {PLAIN: report.VERMILLION, NORM: report.BLUE}


def _name(side: str, decay: float, rate: float) -> str:
    return f"{side}-wd{decay:g}-lr{rate:g}"


EXPERIMENT = Experiment(
    name="weight-decay",
    title="Weight decay with and without batch normalization",
    claim="With batch normalization a fifth of the weight decay that the plain network needs is "
    "enough.",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167, section 4.2.1; van Laarhoven 2017, "
    "arXiv:1706.05350",
    prediction="At a fifth of the plain network's best decay the network with batch normalization "
    "is as accurate as the plain one at its best, and no less than with all of it.",
    protocol=[
        f"A perceptron with two hidden layers of {WIDTHS[0]} units, ReLU, He initialization; with "
        "`normally.nn.BatchNorm1d` in front of ReLU, and without.",
        f"Few training images; {100 * RANDOM:g} % of their labels are drawn anew at random, the "
        "same on all sides. The data set's other images, with their own labels, are the test.",
        f"SGD in batches of {BATCH}; float32, one thread; the same weights and batches on all "
        "sides.",
        f"Weight decay {', '.join(f'{decay:g}' for decay in DECAYS)}, of all parameters, as "
        "torch's SGD has it.",
        f"Learning rates {' and '.join(f'{rate:g}' for rate in RATES)}, chosen for every side, "
        "decay and seed by the other seeds; so is the plain network's best decay.",
        "Test accuracy of the last weights, with the batch norms' statistics of all training "
        "images.",
    ],
    thresholds=[
        "With batch normalization a fifth of the plain network's best decay costs less than "
        f"{MARGIN:g} percentage points of test accuracy against all of it.",
        f"With it, the network is less than {MARGIN:g} points below the plain one at its best "
        "decay.",
        f"Nothing is decided where the plain network's best decay wins it less than {MARGIN:g} "
        "points over none: then there is nothing to reduce.",
        "The claim holds if both hold, and fails if one fails.",
    ],
    variants=[_name(side, decay, rate) for side in LABELS for decay in DECAYS for rate in RATES],
    budgets={
        "quick": {"seeds": 3, "epochs": 40, "train_images": 768, "test_images": 2000},
        "full": {"seeds": 15, "epochs": 120, "train_images": 768, "test_images": 10_000},
    },
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train one side with one decay and rate."""
    side, decay, rate = run.variant.split("-")
    data = run.data.few(run.budget["train_images"], run.budget["test_images"])
    data = with_random_labels(data, RANDOM, run.seed)
    model = mlp(data.train_x[0].numel(), WIDTHS, norm=side)
    record = fit(
        model,
        data.first(len(data.train_x), BATCH),  # scored on the way by a glance, at the end by all
        lr=float(rate.removeprefix("lr")),
        epochs=run.epochs(),
        batch_size=BATCH,
        weight_decay=float(decay.removeprefix("wd")),
    )
    layers = [layer for layer in model if isinstance(layer, nn.Linear)][:-1]
    size = sum(layer.weight.detach().square().sum().item() for layer in layers) ** 0.5
    return {
        **final_scores(model, data),
        "train_loss": record["train_loss"][-1:],
        "weights": size,
    }


def with_random_labels(data: Dataset, share: float, seed: int) -> Dataset:
    """The same images, so many of the training labels drawn anew from all classes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(int(data.train_y.max()) + 1, data.train_y.shape, generator=generator)
    changed = torch.rand(data.train_y.shape, generator=generator) < share
    return replace(data, train_y=torch.where(changed, drawn, data.train_y))


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """Both criteria of the thresholds above."""
    need, cost, level = _effects(results)
    there = need.low >= MARGIN
    best = sorted({f"{decay:g}" for decay in _best(results)}, key=float)
    return decide(
        [
            Criterion(cost, -MARGIN, decidable=there),
            Criterion(level, -MARGIN, decidable=there),
        ],
        f"The plain network's best weight decay ({' or '.join(best)}) wins it "
        f"{number(need.estimate)} points of test accuracy over none. With batch normalization a "
        f"fifth of it is {_points(cost)} than all of it, and {_points(level)} than the plain "
        "network at its best." + ("" if there else " That is too little to reduce anything."),
    )


def _points(effect: Effect) -> str:
    return f"{number(abs(effect.estimate))} points {'better' if effect.estimate >= 0 else 'worse'}"


def _seeds(results: Results) -> list[int]:
    return results.seeds(*EXPERIMENT.variants)


def final_accuracy(results: Results, variant: str, seeds: Sequence[int]) -> list[float]:
    """Test accuracy in percent, by seed."""
    return [100 * value for value in results.get(variant, "final_test", seeds)]


def _tuned(results: Results, side: str, decay: float) -> tuple[list[str], list[float]]:
    """The variant of the rate that the other seeds chose, and its test accuracy."""
    names = [_name(side, decay, rate) for rate in RATES]
    return comparison.tuned(results, names, _seeds(results), final_accuracy)


def _table(results: Results, side: str) -> np.ndarray:
    """Test accuracy by decay and seed."""
    return np.array([_tuned(results, side, decay)[1] for decay in DECAYS])


def _best(results: Results) -> list[float]:
    """For each seed the plain network's best decay but none, by the other seeds."""
    rows = comparison.chosen_by_others(_table(results, PLAIN)[1:])
    return [DECAYS[1:][row] for row in rows]


def _effects(results: Results) -> tuple[Effect, Effect, Effect]:
    plain, norm = _table(results, PLAIN), _table(results, NORM)
    rows = [DECAYS.index(decay) for decay in _best(results)]
    columns = range(len(rows))
    # The step of the grid is the factor; below the smallest decay there is none.
    at_best = [float(plain[row, c]) for c, row in zip(columns, rows, strict=True)]
    fifth = [float(norm[row - 1, c]) for c, row in zip(columns, rows, strict=True)]
    whole = [float(norm[row, c]) for c, row in zip(columns, rows, strict=True)]
    return (
        paired_effect("plain: best decay − none", at_best, plain[0].tolist(), "points"),
        paired_effect("with BN: a fifth of it − all of it", fifth, whole, "points"),
        paired_effect("with BN at a fifth − plain at its best", fifth, at_best, "points"),
    )


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """Accuracy, what is learnt by heart, and the size of the weights, over the decay."""
    need, cost, level = _effects(results)
    cards = [
        report.Card(label, number(effect.estimate, "points"), interval(effect))
        for label, effect in (
            ("Plain: best decay − none", need),
            ("With batch norm: a fifth − all of it", cost),
            ("Batch norm at a fifth − plain at its best", level),
        )
    ]
    return cards, [_section(results)]


def _section(results: Results) -> report.Section:
    seeds = _seeds(results)
    panels = []
    for key, label, title, scale in (
        ("final_test", "test accuracy (%)", "New images", 100),
        ("final_train", "labels of training reproduced (%)", "Learnt by heart", 100),
        ("weights", "‖W‖ of the hidden layers", "Size of the weights", 1),
    ):
        canvas, axes = report.panel("weight decay", label, title)
        for side, color in COLORS.items():
            rows = np.array([_at_own_rate(results, side, decay, key) for decay in DECAYS]) * scale
            style = (0, (5, 2)) if side == PLAIN else "-"
            places = range(len(DECAYS))
            axes.fill_between(
                places, rows.min(1), rows.max(1), color=color, alpha=0.18, linewidth=0
            )
            axes.plot(places, np.median(rows, 1), color=color, linestyle=style, marker="o")
        axes.set_xticks(range(len(DECAYS)), [f"{decay:g}" for decay in DECAYS])
        if key == "weights":
            axes.set(yscale="log", ylim=(1, 100))
        panels.append(canvas)
    return report.Section(
        "Accuracy over the weight decay",
        [
            f"{results.budget['train_images']:,} training images, {100 * RANDOM:g} % of them with "
            "a random label. Whoever reproduces all labels has learnt the wrong ones too.",
            report.Figure(
                "weight-decay",
                panels,
                f"Each side and decay at its own learning rate. Line: median of {len(seeds)} "
                "seeds; band: from the lowest to the highest. At a decay so strong "
                "that nothing is learnt the weights are 0 and leave the picture.",
                [
                    report.Key(label, COLORS[side], dashed=side == PLAIN)
                    for side, label in LABELS.items()
                ],
            ),
            _numbers(results),
        ],
    )


def _numbers(results: Results) -> report.Table:
    rows = []
    for side, label in LABELS.items():
        for decay in DECAYS:
            names, accuracy = _tuned(results, side, decay)
            sizes = _at_own_rate(results, side, decay, "weights")
            own = [float(name.rpartition("-lr")[2]) for name in names]
            train = 100 * float(np.median(_at_own_rate(results, side, decay, "final_train")))
            turning = float(
                np.median([r / s**2 if s else np.inf for r, s in zip(own, sizes, strict=True)])
            )
            rows.append(
                [
                    label,
                    f"{decay:g}",
                    f"{np.median(accuracy):.1f} %",
                    f"{train:.1f} %",
                    " or ".join(f"{rate:g}" for rate in sorted(set(own))),
                    number(float(np.median(sizes))),
                    "infinite" if np.isinf(turning) else number(turning),
                ]
            )
    return report.Table(
        [
            "side",
            "decay",
            "test accuracy",
            "labels reproduced",
            "learning rate",
            "‖W‖",
            "η / ‖W‖²",
        ],
        rows,
        "Medians over seeds, last weights. ‖W‖: of the two hidden layers together.",
        text_columns=2,
    )


def _at_own_rate(results: Results, side: str, decay: float, key: str) -> list[float]:
    names, _ = _tuned(results, side, decay)
    values = [
        results.records[name, seed][key] for name, seed in zip(names, _seeds(results), strict=True)
    ]
    return [float("inf") if value is None else float(value) for value in values]
