"""The scale of the initial weights.

Batch normalization divides the scale of the weights in front of it out again,

    BN(a·W x) = BN(W x)        for a > 0, up to eps

so the network computes the same whatever a is. Training is not quite the same: the gradient is 1/a
times as large and the weights a times, so a step changes them, relative to their size, by 1/a²
times as much. A layer that started far too large hardly learns any more and stays about as it was
drawn; one that started far too small jumps with its first step to a size at which it is calm.

A scale that is wrong is usually wrong everywhere: the whole network is drawn with one rule. So all
weights are scaled, those of the output layer too, behind which there is no normalization. The same
with the output layer left alone (the side "hidden") shows what the normalized layers by themselves
make of it; no threshold rests on it.

Trial runs (seeds 101 and 102) set the grid of rates and the number of epochs. They suggested that
the output layer spoils the claim at 100 times the scale. Range and thresholds had been chosen
before: two decades either way, and 3 points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from normally import report
from normally.lab import comparison
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves
from normally.lab.networks import lenet
from normally.lab.page import effect_card, number
from normally.lab.training import fit
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
RATES = (0.03, 0.3, 3.0)
HARDLY, CLEARLY = 3.0, 10.0
SIDES = {
    "plain": ("without", report.VERMILLION),
    "norm": ("with batch norm", report.BLUE),
    "hidden": ("with batch norm, output layer not scaled", report.GREEN),
}


def _name(side: str, scale: float, rate: float) -> str:
    # At scale 1 there is nothing to leave alone: the two are the same run.
    return f"{'norm' if scale == 1 and side == 'hidden' else side}-x{scale:g}-lr{rate:g}"


EXPERIMENT = Experiment(
    name="initialization",
    title="The scale of the initial weights",
    claim="With batch normalization the result hardly depends on the scale of the initial weights.",
    source="Common course material; Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.3, on the "
    "scale of the parameters",
    prediction="With batch normalization the test accuracy is the same, but for a point or two, "
    "over four decades of the scale; without it the network learns at the right scale only.",
    protocol=[
        "LeNet with ReLU and He initialization (`normally.nn.BatchNorm1d/2d` after the four hidden "
        "layers, and without); then all weights times "
        f"{', '.join(f'{s:g}' for s in SCALES)}. Biases start at 0.",
        "Beside it, for explanation: with batch normalization, all weights but those of the output "
        "layer.",
        "Plain SGD, batches of 64, one thread; learning rates "
        f"{', '.join(f'{r:g}' for r in RATES)}.",
        "Each side takes the rate that is best for it at scale 1, judged by the *other* seeds, and "
        "keeps it at all scales. As a control, each side also with the best rate for each scale.",
    ],
    thresholds=[
        f"With batch normalization the worst scale costs at most {HARDLY:g} percentage points of "
        "final test accuracy against scale 1.",
        f"Without it the worst scale costs at least {CLEARLY:g} points more than with it.",
        "The claim holds if both hold, and fails if one fails.",
    ],
    variants=list(dict.fromkeys(_name(s, x, lr) for s in SIDES for x in SCALES for lr in RATES)),
    budgets={
        "quick": {"seeds": 3, "epochs": 10, "batch_size": 64},
        "full": {"seeds": 15, "epochs": 40, "batch_size": 64},
    },
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Scale, train, and see how far the hidden layers have gone from where they started."""
    side, scale, rate = run.variant.split("-")
    model = lenet(run.data.train_x.shape[-1], norm="none" if side == "plain" else "batch")
    layers = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for layer in layers[:-1] if side == "hidden" else layers:
            layer.weight.mul_(float(scale.removeprefix("x")))
    before = [layer.weight.detach().clone() for layer in layers[:-1]]
    record = fit(
        model,
        run.data,
        lr=float(rate.removeprefix("lr")),
        epochs=run.epochs(),
        batch_size=run.budget["batch_size"],
    )
    moved = [
        ((layer.weight.detach() - start).norm() / start.norm()).item()
        for layer, start in zip(layers, before, strict=False)  # the output layer is not asked
    ]
    return {"test_accuracy": record["test_accuracy"], "moved": float(np.median(moved))}


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """Both criteria of the thresholds above."""
    seeds = results.seeds(*EXPERIMENT.variants)
    norm, hidden, both = _effects(results, seeds)
    good = [
        scale
        for scale in SCALES
        if np.mean(_accuracy(results, "norm", scale, seeds))
        >= np.mean(_accuracy(results, "norm", 1.0, seeds)) - HARDLY
    ]
    return decide(
        [Criterion(norm, -HARDLY), Criterion(both, CLEARLY)],
        f"With batch normalization the worst of the scales {SCALES[0]:g} to {SCALES[-1]:g} costs "
        f"{number(-norm.estimate)} points of test accuracy, without it "
        f"{number(both.estimate - norm.estimate)}. Within {HARDLY:g} points of scale 1 are, with "
        f"batch normalization, the scales {', '.join(f'{s:g}' for s in good)}; with the output "
        f"layer, which has no normalization, left at its scale, the worst costs "
        f"{number(-hidden.estimate)}.",
    )


def _rates(results: Results, side: str, scale: float, seeds: Sequence[int]) -> list[float]:
    """For each seed the rate that was best for this side and scale with the other seeds."""
    chosen, _ = comparison.tuned(results, [_name(side, scale, rate) for rate in RATES], seeds)
    return [float(variant.rpartition("lr")[2]) for variant in chosen]


def _accuracy(
    results: Results, side: str, scale: float, seeds: Sequence[int], *, tuned: bool = False
) -> list[float]:
    """Final test accuracy in percent, at the rate chosen for scale 1, or for this scale."""
    return [
        comparison.final_accuracy(results, _name(side, scale, rate), [seed])[0]
        for seed, rate in zip(
            seeds, _rates(results, side, scale if tuned else 1.0, seeds), strict=True
        )
    ]


def _lost(results: Results, side: str, seeds: Sequence[int]) -> list[float]:
    """Accuracy at the worst scale minus that at scale 1, by seed."""
    table = np.array([_accuracy(results, side, scale, seeds) for scale in SCALES])
    return [float(value) for value in table.min(0) - table[SCALES.index(1.0)]]


def _effects(results: Results, seeds: Sequence[int]) -> tuple[Effect, Effect, Effect]:
    zeros = [0.0] * len(seeds)
    plain, norm, hidden = (_lost(results, side, seeds) for side in SIDES)
    name = "accuracy at the worst scale − at scale 1, with BN"
    return (
        paired_effect(name, norm, zeros, "points"),
        paired_effect(f"{name}, output layer not scaled", hidden, zeros, "points"),
        paired_effect("what the worst scale costs, without BN − with", norm, plain, "points"),
    )


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """Accuracy over the scale, at one rate and at the best for each scale."""
    seeds = results.seeds(*EXPERIMENT.variants)
    norm, hidden, both = _effects(results, seeds)
    cards = [
        effect_card("Worst scale, with batch norm", norm),
        effect_card("The same, output layer not scaled", hidden),
        effect_card("What batch norm saves at the worst scale", both),
    ]
    titles = {False: "At the rate that is best at scale 1", True: "At the best rate for each scale"}
    canvases, rows = [], []
    for tuned, title in titles.items():
        canvas, axes = report.panel(
            "scale of the initial weights (He's = 1)", "test accuracy (%)", title, width=4.9
        )
        axes.set(ylim=(0, 103))
        for side, (_, color) in SIDES.items():
            lines = np.array([_accuracy(results, side, x, seeds, tuned=tuned) for x in SCALES])
            curves(axes, SCALES, lines.T.tolist(), color, dashed=side == "plain")
        axes.set(xscale="log", xlim=(SCALES[0], SCALES[-1]))
        canvases.append(canvas)
    for scale in SCALES:
        for side, (label, _) in SIDES.items():
            kept, best = (_accuracy(results, side, scale, seeds, tuned=t) for t in titles)
            rates = _rates(results, side, 1.0, seeds)
            moved = [
                results.get(_name(side, scale, rate), "moved", [seed])[0]
                for rate, seed in zip(rates, seeds, strict=True)
            ]
            distance = float(np.median([np.inf if m is None else m for m in moved]))
            rows.append(
                [
                    f"{scale:g}",
                    label,
                    f"{np.median(kept):.1f} %",
                    f"{np.median(best):.1f} %",
                    "infinite" if np.isinf(distance) else number(distance),
                ]
            )
    return cards, [
        report.Section(
            "Accuracy over the scale",
            [
                "All weights of the network times one factor before training.",
                report.Figure(
                    "scales",
                    canvases,
                    f"Line: median of {len(seeds)} seeds; band: from the lowest to the highest. "
                    "10 % is chance. Right: whether another learning rate of the grid makes up for "
                    "a wrong scale.",
                    [report.Key(label, c, side == "plain") for side, (label, c) in SIDES.items()],
                    columns=2,
                ),
                report.Table(
                    ["scale", "batch norm", "accuracy", "at the best rate", "weights moved"],
                    rows,
                    "Medians over seeds. Weights moved: distance of a hidden layer's weights from "
                    "their start, divided by their size then (median over the four layers), at the "
                    "rate of the first accuracy.",
                    text_columns=2,
                ),
            ],
        )
    ]
