"""Internal covariate shift: is it what batch normalization takes away, and is that why it helps?

Ioffe & Szegedy named the idea: a layer learns on the outputs of the layers before it, which learn
too, so its inputs move under it; batch normalization holds their mean and variance and "reduces
internal covariate shift". Santurkar et al. tested it in three ways, and so does this experiment:

- how far the distribution of a layer's inputs moves from one epoch to the next: the earth mover's
  (first Wasserstein) distance of each unit's values on the same images, in units of their spread;
- what the move does to the layer's task: the change of its gradient when the layers before it have
  taken their step;
- a network in which the shift is put back: behind each batch normalization the values of each unit
  are multiplied and moved by noise whose mean and spread are drawn anew at every step. If less
  shift is why batch normalization helps, this network must lose the benefit.

With W_i the weights of layer i and G_i the gradient of the loss by W_i, the second is

    shift of layer i = ‖G_i(W_1', …, W_{i-1}', W_i, …) - G_i(W_1, …, W_i, …)‖ / ‖G_i‖

They use the numerator alone. We divide by the length of the gradient, as it differs between the
sides, and show the numerator beside it.

The claim below is the original one. In the literature it is contested: Santurkar et al. found the
first measure unimportant, the second not reduced, and the benefit alive under noise. The verdict is
about the claim; which of its parts hold and which fail is the finding.

Rates, epochs and the noise were tried with the seeds 101 and 102: both shifts were several times
larger in the plain network, the paper's noise moved the inputs further than they move there, and
the noisy network kept most of the benefit. The thresholds were written after these trials and
before the first run of seed 0. With ReLU, noise costs test accuracy, as the running statistics are
those of the noisy inputs; so the comparison is of training, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

import normally.nn
from normally import report
from normally.lab import comparison, shift
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves, plain_ticks
from normally.lab.networks import lenet
from normally.lab.page import effect_card, interval, number
from normally.lab.training import fit
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

RATES = (0.03, 0.1, 0.3)
SAME = 0.1
LESS = 1.25
PROBES = 256  # training images whose layer inputs are followed
# The noise of Santurkar et al.: ranges of a unit's mean and spread, and of a value's around them.
MEAN, SPREAD, AROUND = 0.5, 1.25, 0.1
LAYERS = ("conv 2", "dense 1", "dense 2", "output")

EXPERIMENT = Experiment(
    name="covariate-shift",
    title="Internal covariate shift",
    claim="Batch normalization helps because it reduces internal covariate shift: with it the "
    "inputs of a layer move less, the layer's gradient changes less when the layers before it "
    "step, and where the shift is put back the benefit is lost.",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167, section 2; contested by Santurkar et al. 2018, "
    "arXiv:1805.11604, section 2",
    prediction=f"Both shifts are at least {LESS:g} times larger without batch normalization, and "
    "with noise behind it the network loses at least half of what batch normalization gains in "
    "training accuracy.",
    protocol=[
        "LeNet with ReLU and He initialization; plain, with `normally.nn.BatchNorm1d/2d` after its "
        "four hidden layers, and with noise between each of these and its ReLU. The same initial "
        "weights and the same batches of 64; plain SGD, no schedule, float32, one thread.",
        f"Noise, in training only: at each step each unit draws a mean from U(−{MEAN:g}, {MEAN:g}) "
        f"and a spread from U(1, {SPREAD:g}); each value is multiplied by a number from N(spread, "
        f"{AROUND:g}²) and moved by one from U(mean − {AROUND:g}, mean + {AROUND:g}).",
        f"Movement: after each epoch the first {PROBES} training images pass in training mode, "
        f"noise on; of the inputs of {', '.join(LAYERS)} {shift.QUANTILES} quantiles a unit. "
        "Distance to the epoch before: mean over quantiles and units of their difference, divided "
        "by the root mean square over units of the standard deviation. A run counts with the mean "
        "over layers and epochs.",
        "Shift of the gradient: every few steps, on the batch that the step takes; in the noisy "
        "network both gradients see noise of their own, as two steps of training do. A run counts "
        "with the median over steps of the mean over layers.",
        f"Both shifts are compared at the learning rate {SAME:g} for all. Training is compared at "
        f"tuned rates: of {', '.join(f'{r:g}' for r in RATES)}, for each seed the one that was "
        "best for this side with the other seeds.",
        "Training: accuracy on the training batches as met on the way (noise on), mean over all "
        "epochs, so that learning faster counts.",
    ],
    thresholds=[
        f"The inputs move at least {LESS:g} times as far without batch normalization.",
        f"The gradient shifts at least {LESS:g} times as far without.",
        "Of the training accuracy that batch normalization gains, the noisy network loses half or "
        "more: points lost less half the points gained are 0 or more. Decided only if for every "
        "seed there is a gain to lose and the noise moves the inputs further than they move in "
        "the plain network.",
        "The claim holds if all three hold, and fails if one fails.",
    ],
    variants=[f"{side}-lr{rate:g}" for rate in RATES for side in ("plain", "norm", "noisy")],
    budgets={
        "quick": {"seeds": 3, "epochs": 15, "batch_size": 64, "every": 15},
        "full": {"seeds": 15, "epochs": 40, "batch_size": 64, "every": 15},
    },
)


class Noise(nn.Module):
    """x · s + m in training, with s and m from distributions that each call draws anew.

    Santurkar et al. 2018, section 2.1 and appendix A: one mean and one spread a unit.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        # Its own source: the order of the batches stays that of the other sides.
        self.source = np.random.default_rng(seed)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, *)`."""
        if not self.training:
            return x
        unit, draw = (1, x.shape[1], *[1] * (x.dim() - 2)), self.source
        mean, spread = draw.uniform(-MEAN, MEAN, unit), draw.uniform(1, SPREAD, unit)
        shift = mean + draw.uniform(-AROUND, AROUND, x.shape)
        scale = spread + AROUND * draw.standard_normal(x.shape)
        return x * torch.from_numpy(scale).to(x) + torch.from_numpy(shift).to(x)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train; follow the layers' inputs by epoch and the gradients' shift by step."""
    side, _, rate = run.variant.partition("-lr")
    model = lenet(run.data.train_x.shape[-1], norm="none" if side == "plain" else "batch")
    if side == "noisy":
        model = noisy(model, run.seed)
    shifts: dict[str, list[list[float]]] = {"relative": [], "absolute": [], "cosine": []}
    count = 0

    def watch(x: Tensor, y: Tensor) -> None:
        nonlocal count
        if count % run.budget["every"] == 0:
            for key, values in shift.gradient_shift(model, x, y, float(rate)).items():
                shifts[key].append(values)
        count += 1

    seen: list[list[Tensor]] = []
    record = fit(
        model,
        run.data,
        lr=float(rate),
        epochs=_watched(run, model, seen),
        batch_size=run.budget["batch_size"],
        watch=watch,
    )
    keys = ("train_accuracy", "train_loss", "test_accuracy")
    return {
        **{key: record[key] for key in keys},
        "shift": [float(np.mean(row)) for row in shifts["relative"]],
        **{key: np.median(rows, axis=0).tolist() for key, rows in shifts.items()},
        "moved": [shift.moved(before, after) for before, after in pairwise(seen)],
        "from_end": [shift.moved(inputs, seen[-1]) for inputs in seen],
    }


def _watched(run: Run, model: nn.Sequential, seen: list[list[Tensor]]) -> Iterator[int]:
    """The run's epochs; before the first and after each the layers' inputs go into `seen`."""
    seen.append(shift.layer_inputs(model, run.data.train_x[:PROBES]))
    for epoch in run.epochs():
        yield epoch
        seen.append(shift.layer_inputs(model, run.data.train_x[:PROBES]))


def noisy(model: nn.Sequential, seed: int) -> nn.Sequential:
    """The network with noise between each batch normalization and its ReLU."""
    parts: list[nn.Module] = []
    for layer in model:
        if isinstance(layer, normally.nn.BatchNorm1d | normally.nn.BatchNorm2d):
            source = 1000 * seed + len(parts)
            parts += [type(layer)(layer.num_features), Noise(source), nn.ReLU()]
        else:
            parts.append(layer)
    return nn.Sequential(*parts)


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The three criteria of the thresholds above."""
    moved, shifted = (_larger(results, key, words) for key, words in SHIFTS.items())
    lost, share, decidable = _lost(results)
    return decide(
        [Criterion(moved, LESS), Criterion(shifted, LESS), Criterion(lost, 0.0, decidable)],
        "Without batch normalization the inputs of the layers move "
        f"{number(moved.estimate)} times as far and the gradients shift {number(shifted.estimate)} "
        "times as far. With noise that puts the shift back, the network "
        f"{'loses' if share >= 0 else 'adds'} {abs(share):.0%} of what batch normalization gains "
        f"in training accuracy{'' if decidable else ', which decides nothing here'}.".replace(
            "%", " %"
        ),
    )


# What is measured of a run, and its name.
SHIFTS = {"moved": "movement of the layers' inputs", "shift": "shift of the gradient"}
# What a network that diverged counts with: more than any that trains.
FARTHEST = 10.0


def _run_value(record: Record, key: str) -> float:
    """What a run counts with; see the protocol."""
    if key == "moved":
        return float(np.mean([_finite(value) for row in record["moved"] for value in row]))
    return float(np.median([_finite(value) for value in record[key]]))


def _finite(value: float | None) -> float:
    return FARTHEST if value is None else min(max(value, 1e-9), FARTHEST)


def _values(results: Results, side: str, key: str, seeds: Sequence[int]) -> list[float]:
    return [_run_value(results.records[f"{side}-lr{SAME:g}", seed], key) for seed in seeds]


def _larger(results: Results, key: str, words: str) -> Effect:
    """Plain / with batch normalization, at the same learning rate."""
    seeds = results.seeds(*EXPERIMENT.variants)
    plain, norm = (_values(results, side, key, seeds) for side in ("plain", "norm"))
    name = f"{words}, plain / with BN, both at {SAME:g}"
    return paired_effect(name, plain, norm, "×", ratio=True)


def _lost(results: Results) -> tuple[Effect, float, bool]:
    """Points that noise costs less half of what BN gains; the share lost; whether it decides."""
    seeds = results.seeds(*EXPERIMENT.variants)
    plain, norm, noise = (np.array(_tuned(results, side, seeds)[1]) for side, *_ in SIDES)
    gained, lost = norm - plain, norm - noise
    effect = paired_effect(
        "training accuracy lost with noise − half of BN's gain, tuned rates",
        lost.tolist(),
        (gained / 2).tolist(),
        "points",
    )
    put_back = np.greater(
        _values(results, "noisy", "moved", seeds), _values(results, "plain", "moved", seeds)
    )
    decidable = bool((gained > 0).all() and put_back.all())
    share = float(lost.mean() / gained.mean()) if gained.mean() else math.nan
    return effect, share, decidable


def _tuned(results: Results, side: str, seeds: Sequence[int]) -> tuple[list[str], list[float]]:
    variants = [f"{side}-lr{rate:g}" for rate in RATES]
    return comparison.tuned(results, variants, seeds, _training)


def _training(results: Results, variant: str, seeds: Sequence[int]) -> list[float]:
    """Training accuracy in percent, mean over all epochs, by seed."""
    return [100 * float(np.mean(row)) for row in results.get(variant, "train_accuracy", seeds)]


SIDES = (
    ("plain", "without", report.VERMILLION, True),
    ("norm", "batch norm", report.BLUE, False),
    ("noisy", "batch norm and noise", report.PURPLE, False),
)
KEYS = [report.Key(label, color, dashed) for _, label, color, dashed in SIDES]


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """The three parts side by side, then layer by layer."""
    moved, shifted = (_larger(results, key, words) for key, words in SHIFTS.items())
    lost, share, _ = _lost(results)
    cards = [
        effect_card("Inputs move, plain / with BN", moved),
        effect_card("Gradients shift, plain / with BN", shifted),
        report.Card(
            "Of BN's gain in training accuracy, lost with noise",
            f"{share:.0%}".replace("%", " %"),
            f"points lost − half the gain: {interval(lost)}",
        ),
    ]
    return cards, [_parts_section(results), _layers_section(results)]


def _parts_section(results: Results) -> report.Section:
    seeds = results.seeds(*EXPERIMENT.variants)
    panels = [
        _panel(results, seeds, "moved", "epoch", "moved in an epoch (spreads)"),
        _panel(results, seeds, "shift", "training step", "‖G′ − G‖ / ‖G‖"),
        _panel(results, seeds, "train_accuracy", "epoch", "training accuracy (%)"),
    ]
    rows = []
    for side, label, *_ in SIDES:
        chosen, accuracy = _tuned(results, side, seeds)
        tests = [
            100 * results.records[variant, seed]["test_accuracy"][-1]
            for variant, seed in zip(chosen, seeds, strict=True)
        ]
        rates = sorted({variant.rpartition("lr")[2] for variant in chosen})
        rows.append(
            [
                label,
                *(number(float(np.median(_values(results, side, key, seeds)))) for key in SHIFTS),
                *(_detail(results, side, key, seeds) for key in ("absolute", "cosine")),
                ", ".join(rates),
                f"{np.median(accuracy):.1f} %",
                f"{np.median(tests):.1f} %",
            ]
        )
    return report.Section(
        "The shift, its effect on the gradient, and training",
        [
            "Noise behind batch normalization puts back a shift of the layers' inputs. If less "
            "shift is what helps, the third panel has to follow the first two.",
            report.Figure(
                "shift-and-training",
                panels,
                f"All at learning rate {SAME:g}, means over layers. Line: median of {len(seeds)} "
                "seeds; band: from the lowest to the highest.",
                KEYS,
            ),
            report.Table(
                [
                    "",
                    "inputs move",
                    "gradient shifts",
                    "‖G′ − G‖",
                    "cosine",
                    "tuned rate",
                    "training accuracy",
                    "test accuracy",
                ],
                rows,
                f"Medians over seeds. Shifts at learning rate {SAME:g}: movement in spreads an "
                "epoch; the gradient's relative, then Santurkar et al.'s absolute difference and "
                "the cosine between the two gradients. Accuracy at the tuned rate: training, mean "
                "over all epochs; test, after the last. The noisy network is tested without noise "
                "but with running statistics that saw it, which costs test accuracy.",
            ),
        ],
    )


def _detail(results: Results, side: str, key: str, seeds: Sequence[int]) -> str:
    rows = results.get(f"{side}-lr{SAME:g}", key, seeds)
    values = [np.mean([np.nan if v is None else v for v in row]) for row in rows]
    return number(float(np.median(values)))


def _panel(results: Results, seeds: Sequence[int], key: str, xlabel: str, ylabel: str) -> Canvas:
    title = {**SHIFTS, "train_accuracy": "training"}[key].capitalize()
    canvas, axes = report.panel(xlabel, ylabel, title)
    lines = {}
    for side, *_ in SIDES:
        rows = results.get(f"{side}-lr{SAME:g}", key, seeds)
        if key == "moved":
            rows = [[np.mean([_finite(v) for v in layers]) for layers in row] for row in rows]
        scale = 100 if key == "train_accuracy" else 1
        lines[side] = [[scale * _finite(v) for v in row] for row in rows]
    if key == "train_accuracy":
        axes.set_ylim(0, 103)
    elif key == "moved":
        every = np.concatenate([np.ravel(rows) for rows in lines.values()])
        axes.set(yscale="log", ylim=(every.min() / 1.3, every.max() * 1.3))
        plain_ticks(axes.yaxis)
    else:
        axes.set_ylim(0, 1.6)
    count = len(lines["plain"][0])
    steps = range(0, count * results.budget["every"], results.budget["every"])
    x = steps if key == "shift" else range(1, count + 1)
    for side, _, color, dashed in SIDES:
        curves(axes, x, lines[side], color, dashed=dashed)
    return canvas


def _layers_section(results: Results) -> report.Section:
    seeds = results.seeds(*EXPERIMENT.variants)
    panels, rows = [], []
    for place, layer in enumerate(LAYERS):
        canvas, axes = report.panel("epoch", "distance from the end (spreads)", layer)
        row = [layer]
        axes.set_ylim(0, 1.5)
        for side, _, color, dashed in SIDES:
            found = results.get(f"{side}-lr{SAME:g}", "from_end", seeds)
            lines = [[_finite(layers[place]) for layers in epochs] for epochs in found]
            curves(axes, range(len(lines[0])), lines, color, dashed=dashed)
            shifts = [r[place] for r in results.get(f"{side}-lr{SAME:g}", "relative", seeds)]
            row.append(number(float(np.median([_finite(value) for value in shifts]))))
        panels.append(canvas)
        rows.append(row)
    return report.Section(
        "Layer by layer",
        [
            "How far the inputs of each layer are from those that it has at the end of training.",
            report.Figure(
                "from-the-end",
                panels,
                f"Learning rate {SAME:g}; epoch 0 is before training. Line: median over seeds; "
                "band: all seeds.",
                KEYS,
                columns=2,
            ),
            report.Table(
                ["shift of the gradient", *(label for _, label, *_ in SIDES)],
                rows,
                f"‖G′ − G‖ / ‖G‖ at learning rate {SAME:g}, median over steps, then over seeds.",
            ),
        ],
    )
