"""Does batch normalization reduce the need for weight decay?

Weight decay takes η λ w from every weight w at each step of learning rate η. That keeps weights
small, and with them the function smooth. Ioffe & Szegedy, when they added batch normalization to
Inception, reduced the decay five-fold and found that to help. (They also raised the learning rate,
in one of their networks five-fold, so that η λ stayed there what it was.)

In front of a batch norm the weights have no size that matters: BN(a w x) = BN(w x) for a > 0. There
decay cannot smooth the function. But the gradient for the weights a w is 1/a of that for w, so that
a step turns their direction by an amount that goes with

    effective learning rate = η / ‖w‖².

Decay makes ‖w‖ smaller and this larger: it still does something, as a learning rate (van Laarhoven
2017, arXiv:1706.05350). The weights behind the last batch norm, and γ and β, decay as ever. To tell
the two apart, a third network decays only the weights in front of a batch norm.

The need has to be there before it can be reduced. With 384 digits whose labels are right, decay
gained nobody more than 0.4 points in trial runs (seeds 101 to 103), 384 images of Fashion-MNIST
likewise. So a fifth of the labels is wrong here, and the network can learn them by heart or leave
them. In trial runs with these, the plain network lost 3 points with a fifth of its best decay, the
one with batch normalization 3.3 with the same fifth, so which way the verdict would fall could be
expected. The learning rates 0.02 and 0.1 are fixed by the same trials; the best at 0.5 was worse
than the best at 0.02 on both sides. Another form of this experiment, with 768 images of which 30 %
had a random label, was thought of and run by someone else at the same time: a fifth of the plain
network's best decay was 11 points worse with batch normalization than all of it, the same verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from normally import report
from normally.lab import comparison
from normally.lab.comparison import higher, last_accuracy
from normally.lab.data import Dataset
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves
from normally.lab.networks import mlp
from normally.lab.page import effect_card, number
from normally.lab.training import final_scores, train_epoch
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEED, COST = 1.0, 1.0
WIDTHS, BATCH, WRONG = (128, 128), 32, 0.2
RATES = (0.02, 0.1)
LOWEST = 60  # % that the figures show
# Each a fifth of the next, but for 0.
DECAYS = (0.0, 0.002, 0.01, 0.05, 0.25)
PLAIN, NORM, HIDDEN = "plain", "norm", "hidden"
LABELS = {
    PLAIN: "plain",
    NORM: "batch normalization",
    HIDDEN: "batch normalization, decay only in front of it",
}
COLORS = {PLAIN: report.VERMILLION, NORM: report.BLUE, HIDDEN: report.GREEN}


def cell(side: str, decay: float, rate: float) -> str:
    """The variant's name; without decay it does not matter what would decay."""
    return f"{NORM if side == HIDDEN and not decay else side}-wd{decay:g}-lr{rate:g}"


EXPERIMENT = Experiment(
    name="weight-decay",
    title="Does batch normalization reduce the need for weight decay?",
    claim="Batch normalization reduces the need for weight decay: with it, a fifth of the decay "
    "that a plain network needs is enough.",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167, section 4.2.1",
    prediction="The plain network loses test accuracy with a fifth of its best weight decay; the "
    "network with batch normalization has with this fifth what it has with its own best decay.",
    protocol=[
        f"A perceptron with two hidden layers of {WIDTHS[0]} units, ReLU, He initialization, with "
        "batch normalization in front of ReLU or without.",
        f"Few training images, a fifth of them with a wrong label drawn at random ({WRONG:g} of "
        "them, other images and labels with each seed); the rest of the data set's training images "
        "join the test images, whose labels are right.",
        f"Plain SGD, batches of {BATCH}, float32, one thread; all sides start from the same "
        "weights and see the same batches. Weight decay as SGD has it, of all parameters: "
        f"{', '.join(f'{decay:g}' for decay in DECAYS)}.",
        f"Learning rates {' and '.join(f'{rate:g}' for rate in RATES)}, chosen for each side, "
        "decay and seed by the other seeds; the best decay is chosen by them too.",
        "Beside it, for explanation: batch normalization with decay only of the weights in front "
        "of it.",
        "Accuracies are of the last weights in evaluation, with the statistics of all training "
        "images.",
    ],
    thresholds=[
        f"There is a need: at its best decay the plain network's test accuracy is at least "
        f"{NEED:g} percentage point higher than without decay, and than with a fifth of it "
        "(the next smaller one of the list). Otherwise the claim stays undecided.",
        "It is reduced: with batch normalization, at a fifth of the plain network's best decay, "
        f"test accuracy is at most {COST:g} point lower than at its own best decay.",
    ],
    variants=[
        *(cell(side, wd, rate) for side in (PLAIN, NORM) for wd in DECAYS for rate in RATES),
        *(cell(HIDDEN, decay, rate) for decay in DECAYS[1:] for rate in RATES),
    ],
    budgets={
        "quick": {"seeds": 3, "epochs": 50, "train_images": 384, "test_images": 2000},
        "full": {"seeds": 15, "epochs": 150, "train_images": 384, "test_images": 10_000},
    },
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train one side with one decay at one learning rate, and score it."""
    side, decay, rate = run.variant.split("-")
    data = run.data.few(run.budget["train_images"], run.budget["test_images"])
    data = mislabelled(data, WRONG, run.seed)
    model = mlp(data.train_x[0].numel(), WIDTHS, norm="none" if side == PLAIN else "batch")
    dense = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    decayed: Sequence[Tensor] = dense[:-1] if side == HIDDEN else list(model.parameters())
    optimizer = sgd(model, decayed, float(rate[2:]), float(decay[2:]))
    order = torch.Generator().manual_seed(run.seed)
    for _ in run.epochs():
        train_epoch(model, optimizer, data, BATCH, generator=order)
    return {
        **final_scores(model, data),
        "weight_norms": [float(weight.detach().norm()) for weight in dense],
    }


def mislabelled(data: Dataset, share: float, seed: int) -> Dataset:
    """The same training images; of this share the label is another one of the ten."""
    generator = torch.Generator().manual_seed(seed)
    labels = data.train_y.clone()
    hit = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    labels[hit] = (labels[hit] + torch.randint(1, 10, (len(hit),), generator=generator)) % 10
    return replace(data, train_y=labels)


def sgd(
    model: nn.Module, decayed: Sequence[Tensor], rate: float, decay: float
) -> torch.optim.Optimizer:
    """Plain SGD for all parameters, with weight decay for some."""
    chosen = {id(parameter) for parameter in decayed}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    optimizer = torch.optim.SGD(decayed, lr=rate, weight_decay=decay)
    if others:
        optimizer.add_param_group({"params": others, "weight_decay": 0.0})
    return optimizer


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """Is there a need, and is a fifth enough with batch normalization?"""
    none, fifth, kept = _effects(results)
    there = all(Criterion(effect, NEED).status == "holds" for effect in (none, fifth))
    own = loss(results, NORM, 0)
    return decide(
        [
            Criterion(none, NEED, decidable=there),
            Criterion(fifth, NEED, decidable=there),
            Criterion(kept, -COST, decidable=there),
        ],
        f"The plain network at its best weight decay (most often {_usual(results, PLAIN):g}) has "
        f"test accuracy {higher(none)} than without and {higher(fifth)} than with a fifth. With "
        f"batch normalization the test accuracy at this fifth is {higher(kept)} than at its own "
        f"best decay (most often {_usual(results, NORM):g}), and without decay "
        f"{number(abs(own.estimate))} points {'lower' if own.estimate >= 0 else 'higher'}. "
        "Where only the weights in front of the norms decay, with what is best for the plain "
        f"network, test accuracy is {higher(in_front(results))} than without decay.",
    )


def best_decay(results: Results, side: str) -> tuple[list[float], list[float]]:
    """For each seed the decay that did best with the others, and the test accuracy with it."""
    cells = {cell(side, decay, rate): decay for decay in DECAYS for rate in RATES}
    seeds = results.seeds(*EXPERIMENT.variants)
    chosen, accuracy = comparison.tuned(results, list(cells), seeds, last_accuracy)
    return [cells[variant] for variant in chosen], accuracy


def at_decay(results: Results, side: str, decay: float) -> tuple[list[str], list[float]]:
    """For each seed the learning rate that did best with the others, and the test accuracy."""
    cells = [cell(side, decay, rate) for rate in RATES]
    return comparison.tuned(results, cells, results.seeds(*EXPERIMENT.variants), last_accuracy)


def loss(results: Results, side: str, share: float) -> Effect:
    """Test accuracy at the side's best decay − at this share (0 or 1/5) of the *plain* one's."""
    needed, _ = best_decay(results, PLAIN)
    _, best = best_decay(results, side)
    smaller = [DECAYS[max(DECAYS.index(decay) - 1, 0)] if share else 0.0 for decay in needed]
    less = [at_decay(results, side, decay)[1][place] for place, decay in enumerate(smaller)]
    where = "a fifth of plain's best" if share else "none"
    return paired_effect(
        f"test accuracy, {LABELS[side]}, best decay − {where}", best, less, "points"
    )


def in_front(results: Results) -> Effect:
    """Test accuracy with the plain network's best decay, in front of the norms only, − none."""
    needed, _ = best_decay(results, PLAIN)
    some = [at_decay(results, HIDDEN, decay)[1][place] for place, decay in enumerate(needed)]
    return paired_effect(
        f"test accuracy, {LABELS[HIDDEN]} − none", some, at_decay(results, NORM, 0.0)[1], "points"
    )


def _effects(results: Results) -> tuple[Effect, Effect, Effect]:
    """What the plain network gains over none and over a fifth; what is lost with a fifth, < 0."""
    cost = loss(results, NORM, 1 / 5)
    kept = paired_effect(
        f"test accuracy, {LABELS[NORM]}, a fifth of plain's best decay − own best",
        [0.0] * len(cost.values),
        cost.values,
        "points",
    )
    return loss(results, PLAIN, 0), loss(results, PLAIN, 1 / 5), kept


def _usual(results: Results, side: str) -> float:
    decays, _ = best_decay(results, side)
    return max(DECAYS, key=decays.count)


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """Accuracy by decay on all sides, and what decay does in front of a batch norm."""
    losses = [(side, loss(results, side, 1 / 5)) for side in (PLAIN, NORM)]
    front = in_front(results)
    more = paired_effect("loss", losses[1][1].values, losses[0][1].values, "points")
    cards = [
        *(
            effect_card(f"Lost with a fifth of the decay, {LABELS[side]}", effect)
            for side, effect in losses
        ),
        effect_card("The second − the first", more),
        effect_card("Gained by decay only in front of the norms", front),
    ]
    return cards, [_section(results)]


def _section(results: Results) -> report.Section:
    seeds = results.seeds(*EXPERIMENT.variants)
    panels = []
    for part, key in (("test", "final_test"), ("training", "final_train")):
        label = f"{part} accuracy (%)"
        canvas, axes = report.panel("weight decay", label, f"On {part} images")
        axes.set(ylim=(LOWEST, 101))
        for side in LABELS:
            _by_decay(axes, side, [100 * _at_own_rate(results, side, d, key) for d in DECAYS])
        panels.append(canvas)
    panels[1].axes[0].axhline(100 * (1 - WRONG), color=report.GREY, linewidth=1)
    canvas, axes = report.panel("weight decay", "η / ‖w‖²", "Effective learning rate")
    axes.set(yscale="log", ylim=(3e-5, 1))
    for side in (NORM, HIDDEN):
        _by_decay(axes, side, [effective_rate(results, side, decay) for decay in DECAYS])
    budget = results.budget
    return report.Section(
        "What weight decay is worth",
        [
            f"{budget['train_images']:,} training images, {100 * WRONG:g} % of them with a wrong "
            f"label; {budget['epochs']} epochs.",
            report.Figure(
                "decay",
                [*panels, canvas],
                f"Median of {len(seeds)} seeds, band from the lowest to the highest. Left and "
                "middle: at each decay's own learning rate, from 60 % on; above the grey line "
                "wrong labels must have been learned. Right: of the second hidden layer's weights "
                f"after training at learning rate {RATES[0]:g}. Decay in front of a batch norm "
                "cannot restrict the function; what it does, it does through this rate.",
                [report.Key(label, COLORS[side], side == HIDDEN) for side, label in LABELS.items()],
            ),
            _table(results),
        ],
    )


def _by_decay(axes: Axes, side: str, rows: Sequence[np.ndarray]) -> None:
    curves(axes, range(len(DECAYS)), np.array(rows).T.tolist(), COLORS[side], dashed=side == HIDDEN)
    axes.set_xticks(range(len(DECAYS)), [f"{decay:g}" for decay in DECAYS])


def _at_own_rate(results: Results, side: str, decay: float, key: str) -> np.ndarray:
    seeds = results.seeds(*EXPERIMENT.variants)
    chosen, _ = at_decay(results, side, decay)
    cells = zip(chosen, seeds, strict=True)
    return np.array([results.records[place][key] for place in cells], dtype=float)


def effective_rate(results: Results, side: str, decay: float) -> np.ndarray:
    """η / ‖w‖² of the second hidden layer at the smaller learning rate, by seed."""
    seeds = results.seeds(*EXPERIMENT.variants)
    norms = results.get(cell(side, decay, RATES[0]), "weight_norms", seeds)
    known = [np.inf if row[1] is None else row[1] for row in norms]  # it diverged
    return RATES[0] / np.maximum(np.square(known), 1e-30)


def _table(results: Results) -> report.Table:
    seeds = results.seeds(*EXPERIMENT.variants)
    rows = []
    for side, label in LABELS.items():
        for decay in DECAYS:
            cells = [cell(side, decay, rate) for rate in RATES]
            accuracies = [np.mean(last_accuracy(results, name, seeds)) for name in cells]
            norms = np.array(results.get(cells[0], "weight_norms", seeds), dtype=float)
            middle = np.median(norms[:, 1:], axis=0)
            rows.append(
                [
                    label,
                    f"{decay:g}",
                    *(f"{accuracy:.1f} %" for accuracy in accuracies),
                    f"{100 * _at_own_rate(results, side, decay, 'final_train').mean():.1f} %",
                    *(number(value) if np.isfinite(value) else "infinite" for value in middle),
                ]
            )
    return report.Table(
        [
            "side",
            "decay",
            *(f"test accuracy at {rate:g}" for rate in RATES),
            "training accuracy",
            "‖w‖, second hidden",
            "‖w‖, output",
        ],
        rows,
        "Accuracies: means over seeds; of the training images with their given labels, at each "
        f"decay's own learning rate. Norms: medians at learning rate {RATES[0]:g}.",
    )
