"""Saturated units, and gradients that vanish with depth.

The slope of the sigmoid is at most ¼ and that of tanh at most 1, both at 0; far from 0 they are
flat. A unit whose input lies there is saturated: it answers almost the same to whatever comes, and
almost no gradient passes. As the weights grow in training, the inputs spread and units saturate;
batch normalization gives them mean β and standard deviation γ.

A gradient that goes back through L layers is multiplied by L slopes. So it vanishes with depth in a
network of sigmoids even if no unit is saturated, ¼ a layer at most unless the weights make up for
it. Saturation and depth are two things, and the test keeps them apart: the share of saturated units
in the paper's network of three hidden layers, which learns on either side; the gradient in one of
eight. Each for sigmoid and for tanh, as the claim names both, and each side at its own best rate,
as any network saturates if the rate is too large.

Trial runs (seed 101) chose rates, depths and the number of epochs. They let expect what the claim
says of the sigmoid's gradients and the opposite for tanh; the claim was left as it is told.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from normally import report
from normally.lab import comparison
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves
from normally.lab.networks import ACTIVATIONS, mlp
from normally.lab.page import effect_card, number
from normally.lab.training import fit
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

FLAT = 0.1  # of the largest slope
NAMES, SHALLOW, DEEP, WIDTH = ("sigmoid", "tanh"), 3, 8, 100
RATES = (0.3, 1.0, 3.0)
PROBES = (0, 1, 2, 4, 8, 16, 32, 64)
MORE, FEW, VANISHED = 10.0, 10.0, 10.0
TINY = 1e-12
SIDES = {"plain": ("without", report.VERMILLION), "norm": ("with batch norm", report.BLUE)}


def _name(side: str, activation: str, depth: int, rate: float) -> str:
    return f"{side}-{activation}-{depth}-lr{rate:g}"


EXPERIMENT = Experiment(
    name="saturation",
    title="Saturated units, and gradients that vanish with depth",
    claim="Without batch normalization the inputs of sigmoid and tanh units drift to the flat ends "
    "in training and the gradients vanish with depth; with it they stay in the responsive range.",
    source="Common course material; Ioffe & Szegedy 2015, arXiv:1502.03167, sections 2 and 4.1",
    prediction="Without batch normalization many more units are saturated after training, and the "
    "gradient at the first of eight hidden layers is a small part of that at the last; with it few "
    "units are saturated and the gradients of all layers are of one size. For sigmoid and tanh.",
    protocol=[
        f"Fully connected networks of {SHALLOW} (as in the paper) and of {DEEP} hidden layers of "
        f"{WIDTH} units, sigmoid or tanh, Glorot initialization; `normally.nn.BatchNorm1d` in "
        "front of each activation, or none. The same weights and batches of 64 on both sides; "
        "plain SGD, one thread.",
        f"Learning rates {', '.join(f'{r:g}' for r in RATES)}; each side of each network is judged "
        "at the rate with the best final test accuracy, chosen by the *other* seeds.",
        "Before training, at some epochs in between, and after it, with 256 training images in "
        "training mode: the share of saturated units, those whose slope is below "
        f"{FLAT:g} of its largest (over units and images); and the root mean square of the "
        "gradient of each hidden layer's weights.",
        "Gradient by depth: geometric mean over all these times. A number that is not finite "
        f"counts as saturated, and as a ratio of {TINY:g}.",
    ],
    thresholds=[
        f"{SHALLOW} layers, after training: the share of saturated units, mean over layers, is at "
        f"least {MORE:g} percentage points larger without batch normalization; one criterion for "
        "sigmoid, one for tanh.",
        f"With it the share is at most {FEW:g} % in each of the four networks: one criterion for "
        "the largest.",
        f"{DEEP} layers, without: the gradient at the first is at most 1/{VANISHED:g} of that at "
        "the last; one criterion for sigmoid, one for tanh.",
        f"{DEEP} layers, with: it is at least 1/{VANISHED:g}, for sigmoid and for tanh: one "
        "criterion for the smaller.",
        "The claim holds if all hold, and fails if one fails.",
    ],
    variants=[
        _name(side, activation, depth, rate)
        for activation in NAMES
        for depth in (SHALLOW, DEEP)
        for side in SIDES
        for rate in RATES
    ],
    budgets={
        "quick": {"seeds": 3, "epochs": 20, "batch_size": 64},
        "full": {"seeds": 15, "epochs": 60, "batch_size": 64},
    },
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train, with a look into the network before, between and after."""
    side, activation, depth, rate = run.variant.split("-")
    features = run.data.train_x[0].numel()
    norm = "none" if side == "plain" else "batch"
    model = mlp(features, [WIDTH] * int(depth), norm=norm, activation=activation)
    x, y = run.data.train_x[:256], run.data.train_y[:256]
    record: Record = {"epochs": [], "saturated": [], "gradient": []}

    def look(epoch: int) -> None:
        saturated, gradient = probe(model, activation, x, y)
        record["epochs"].append(epoch)
        record["saturated"].append(saturated)
        record["gradient"].append(gradient)

    def epochs() -> Iterator[int]:
        for epoch in run.epochs():
            if epoch in PROBES:
                look(epoch)
            yield epoch
        look(run.budget["epochs"])

    curve = fit(
        model,
        run.data,
        lr=float(rate.removeprefix("lr")),
        epochs=epochs(),
        batch_size=run.budget["batch_size"],
    )
    return {**record, "test_accuracy": curve["test_accuracy"]}


def probe(
    model: nn.Sequential, activation: str, x: Tensor, y: Tensor
) -> tuple[list[float], list[float]]:
    """Share of saturated units and size of the weights' gradient, by hidden layer.

    Args:
        model: of linear layers, norms and activations; it is copied, not changed.
        activation: "sigmoid" or "tanh".
        x: images.
        y: labels.
    """
    model = copy.deepcopy(model).train()
    inputs: list[Tensor] = []
    for layer in model:
        if isinstance(layer, ACTIVATIONS[activation]):
            layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    gradients = [layer.weight.grad for layer in model if isinstance(layer, nn.Linear)][:-1]
    # Not "slope < FLAT": what is not a number shall count as saturated.
    saturated = [1 - (_slope(z, activation) >= FLAT).float().mean().item() for z in inputs]
    return saturated, [g.square().mean().sqrt().item() for g in gradients if g is not None]


def _slope(z: Tensor, activation: str) -> Tensor:
    """Of the activation at z, divided by its largest."""
    # σ'(z) = (1 − tanh²(z/2)) / 4
    return 1 - (z / 2 if activation == "sigmoid" else z).tanh().square()


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The six criteria of the thresholds above."""
    seeds = results.seeds(*EXPERIMENT.variants)
    share, few, vanished, kept = _effects(results, seeds)
    words = [
        f"With {name}, {number(_mean(results, 'plain', name, seeds))} % of the units are saturated "
        f"after training without batch normalization and "
        f"{number(_mean(results, 'norm', name, seeds))} % with it ({SHALLOW} layers); at the first "
        f"of {DEEP} layers the gradient is {_times(results, 'plain', name, seeds)} that at the "
        f"last without and {_times(results, 'norm', name, seeds)} with it."
        for name in NAMES
    ]
    return decide(
        [
            *(Criterion(effect, MORE) for effect in share),
            Criterion(few, -FEW),
            *(Criterion(effect, VANISHED) for effect in vanished),
            Criterion(kept, 1 / VANISHED),
        ],
        " ".join(words),
    )


def _mean(results: Results, side: str, name: str, seeds: Sequence[int]) -> float:
    return float(np.mean(_share(results, side, name, SHALLOW, seeds)))


def _times(results: Results, side: str, name: str, seeds: Sequence[int]) -> str:
    ratios = np.log(_ratios(results, side, name, seeds))
    return number(float(np.exp(ratios.mean())), "×")


def _chosen(
    results: Results, side: str, activation: str, depth: int, seeds: Sequence[int]
) -> list[str]:
    """For each seed the variant at the rate that was best with the other seeds."""
    variants = [_name(side, activation, depth, rate) for rate in RATES]
    return comparison.tuned(results, variants, seeds)[0]


def _records(
    results: Results, side: str, activation: str, depth: int, seeds: Sequence[int]
) -> list[Record]:
    chosen = _chosen(results, side, activation, depth, seeds)
    return [results.records[v, seed] for v, seed in zip(chosen, seeds, strict=True)]


def _share(
    results: Results, side: str, activation: str, depth: int, seeds: Sequence[int]
) -> list[float]:
    """Saturated units after training in percent, mean over layers, by seed."""
    records = _records(results, side, activation, depth, seeds)
    return [100 * float(np.mean(record["saturated"][-1])) for record in records]


def _relative(record: Record) -> list[float]:
    """Gradient of each layer / that of the last, geometric mean over training."""
    table = np.array(
        [[np.nan if g is None else max(g, 1e-30) for g in row] for row in record["gradient"]]
    )
    logs = np.log(table / table[:, -1:])
    logs = np.where(np.isnan(logs), np.log(TINY), np.maximum(logs, np.log(TINY)))
    return [float(value) for value in np.exp(logs.mean(0))]


def _ratios(results: Results, side: str, activation: str, seeds: Sequence[int]) -> list[float]:
    """Gradient at the first of the eight layers / at the last, by seed."""
    return [_relative(r)[0] for r in _records(results, side, activation, DEEP, seeds)]


def _effects(
    results: Results, seeds: Sequence[int]
) -> tuple[list[Effect], Effect, list[Effect], Effect]:
    share = [
        paired_effect(
            f"{name}: saturated units, without − with BN",
            _share(results, "plain", name, SHALLOW, seeds),
            _share(results, "norm", name, SHALLOW, seeds),
            "points",
        )
        for name in NAMES
    ]
    with_norm = [
        _share(results, "norm", name, depth, seeds) for name in NAMES for depth in (SHALLOW, DEEP)
    ]
    largest = [max(values) for values in zip(*with_norm, strict=True)]
    few = paired_effect(
        "− saturated units with BN, largest share", [0.0] * len(seeds), largest, "%"
    )
    ones = [1.0] * len(seeds)
    vanished = [
        paired_effect(
            f"{name}: gradient, last / first of {DEEP} layers, without BN",
            ones,
            _ratios(results, "plain", name, seeds),
            "×",
            ratio=True,
        )
        for name in NAMES
    ]
    smaller = [
        min(v) for v in zip(*(_ratios(results, "norm", n, seeds) for n in NAMES), strict=True)
    ]
    kept = paired_effect(
        f"gradient, first / last of {DEEP} layers, with BN", smaller, ones, "×", ratio=True
    )
    return share, few, vanished, kept


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """Saturation over time, gradients over depth, and all networks at all rates."""
    seeds = results.seeds(*EXPERIMENT.variants)
    share, _, vanished, _ = _effects(results, seeds)
    cards = [
        *(
            effect_card(f"Saturated {name} units, without − with batch norm", effect)
            for name, effect in zip(NAMES, share, strict=True)
        ),
        *(
            effect_card(f"Gradient lost over {DEEP} layers of {name} without batch norm", effect)
            for name, effect in zip(NAMES, vanished, strict=True)
        ),
    ]
    return cards, [
        _gradient_section(results, seeds),
        _saturation_section(results, seeds),
        _table_section(results, seeds),
    ]


KEYS = [report.Key(label, color, side == "plain") for side, (label, color) in SIDES.items()]


def _saturation_section(results: Results, seeds: list[int]) -> report.Section:
    middle, large = RATES[1:]
    canvases = []
    for name, rate in ((NAMES[0], None), (NAMES[1], None), (NAMES[0], large), (NAMES[1], middle)):
        words = "each at its best rate" if rate is None else f"both at rate {rate:g}"
        canvas, axes = report.panel("epoch", "saturated units (%)", f"{name}, {words}", width=4.6)
        axes.set(ylim=(0, 100))
        for side, (_, color) in SIDES.items():
            records = (
                _records(results, side, name, SHALLOW, seeds)
                if rate is None
                else [results.records[_name(side, name, SHALLOW, rate), seed] for seed in seeds]
            )
            rows = [[100 * float(np.mean(s)) for s in record["saturated"]] for record in records]
            curves(axes, records[0]["epochs"], rows, color, dashed=side == "plain")
        axes.set_xlim(0, results.budget["epochs"])
        canvases.append(canvas)
    return report.Section(
        "Saturated units in training",
        [
            f"A unit is saturated for an image if its slope there is below {100 * FLAT:g} % of the "
            "largest: an input beyond ±3.6 for the sigmoid, ±1.8 for tanh. Of standard normal "
            "inputs 0.03 % and 6.9 % are.",
            report.Figure(
                "saturation",
                canvases,
                f"The networks of {SHALLOW} hidden layers, mean over these. Above what the verdict "
                "is drawn from; below the same large rate on both sides, which need not be one "
                f"that suits the plain network. Line: median of {len(seeds)} seeds; band: from the "
                "lowest to the highest.",
                KEYS,
                columns=2,
            ),
        ],
    )


def _gradient_section(results: Results, seeds: list[int]) -> report.Section:
    canvases = []
    for name in NAMES:
        canvas, axes = report.panel(
            "hidden layer", "gradient / that of the last layer", f"{name}, {DEEP} layers", width=4.6
        )
        axes.set(yscale="log", ylim=(1e-5, 100))
        for side, (_, color) in SIDES.items():
            rows = [_relative(r) for r in _records(results, side, name, DEEP, seeds)]
            curves(axes, range(1, DEEP + 1), rows, color, dashed=side == "plain")
        canvases.append(canvas)
    return report.Section(
        "The gradient by depth",
        [
            "The gradient of each layer's weights, read from right to left as it goes back; a "
            "level line means that all layers learn at one pace.",
            report.Figure(
                "gradient-by-depth",
                canvases,
                f"Each side at its own best rate; geometric mean over training. Line: median of "
                f"{len(seeds)} seeds; band: from the lowest to the highest.",
                KEYS,
                columns=2,
            ),
        ],
    )


def _table_section(results: Results, seeds: list[int]) -> report.Section:
    rows = []
    for activation in NAMES:
        for depth in (SHALLOW, DEEP):
            for side, (label, _) in SIDES.items():
                chosen = _chosen(results, side, activation, depth, seeds)
                for rate in RATES:
                    variant = _name(side, activation, depth, rate)
                    records = [results.records[variant, seed] for seed in seeds]
                    shares = [100 * np.mean(record["saturated"][-1]) for record in records]
                    ratios = [_relative(record)[0] for record in records]
                    accuracy = comparison.final_accuracy(results, variant, seeds)
                    rows.append(
                        [
                            f"{activation}, {depth} layers",
                            label,
                            f"{rate:g}",
                            f"{chosen.count(variant)} of {len(seeds)}",
                            f"{np.median(accuracy):.1f} %",
                            f"{np.median(shares):.1f} %",
                            number(float(np.median(ratios)), "×"),
                        ]
                    )
    return report.Section(
        "All networks at all rates",
        [
            report.Table(
                [
                    "network",
                    "batch norm",
                    "rate",
                    "its best for",
                    "test accuracy",
                    "saturated",
                    "gradient, first / last layer",
                ],
                rows,
                "Medians over seeds: accuracy and saturated units after training, the gradient as "
                "geometric mean over it. Its best for: how many seeds are judged at this rate.",
                text_columns=2,
            )
        ],
    )
