"""Signals and gradients by depth in a random network.

A unit of a linear layer adds n products of a weight and an input. If all are independent with mean
0, the variances add up:

    D(H) = n · D(W) · D(X)

With D(W) = 1 the standard deviation grows by √n a layer; with D(W) = 1/n it stays. Batch
normalization sets it to 1 at every layer, whatever the weights. From this the course material
concludes that with batch normalization gradients neither vanish nor explode.

For a chain of linear layers the conclusion is right, and for one with ReLU it is not. Going back
through one layer of such a network, ReLU lets half of the gradient's power pass (half of the units
are on), and the normalization divides it by the variance of what ReLU put out, ½ − 1/(2π), because
ReLU's output has a mean that the normalization takes away:

    ½ / (½ − 1/(2π)) = π/(π−1) ≈ 1.467 in power, √1.467 ≈ 1.211 in size, a layer

So the gradient grows exponentially towards the first layer (Yang et al. 2019, arXiv:1902.08129),
though no weight is too large; the same network without normalization, with He's weights, has no
such growth. Both are in the test: the claim says "deep random network", and those have activations.

Trial runs (seeds 101 to 103) showed this growth before the thresholds were fixed; the thresholds
say what "neither vanish nor explode" would mean for anyone: a factor of 10 over 20 layers, either
way, where the plain linear network has a factor of 10^17.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import normally.nn
from normally import report
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves
from normally.lab.page import effect_card, number
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

CLOSE, STILL, BOUND = 0.9, 0.95, 10.0
THEORY = math.sqrt(math.pi / (math.pi - 1))
# Variance of a weight times n; ReLU; batch normalization.
NETWORKS = {
    "unit": (None, False, False),
    "scaled": (1.0, False, False),
    "norm": (None, False, True),
    "relu-he": (2.0, True, False),
    "relu-norm": (None, True, True),
}

EXPERIMENT = Experiment(
    name="variance-growth",
    title="Signals and gradients by depth in a random network",
    claim="In a deep random network the standard deviation of the signal grows by √n a layer; with "
    "batch normalization it stays at 1 and gradients neither vanish nor explode.",
    source="Common course material; Yang et al. 2019, arXiv:1902.08129, found the opposite for the "
    "gradients",
    prediction="If the claim is true, the signal grows by √n, 1 and 1 a layer with weights from "
    "N(0, 1), from N(0, 1/n), and from N(0, 1) with batch normalization; and with batch "
    f"normalization the gradient at the first layer is within a factor of {BOUND:g} of that at the "
    "last, with and without ReLU.",
    protocol=[
        "Fully connected networks before any training, n units in every layer; a batch of the "
        "training images; float64, as numbers reach 10^24.",
        "Linear with weights from N(0, 1), from N(0, 1/n), and from N(0, 1) with "
        "`normally.nn.BatchNorm1d` after every layer (training mode).",
        "With ReLU: weights from N(0, 1) with batch normalization in front of each ReLU, and as "
        "control weights from N(0, 2/n) (He et al. 2015) without.",
        "Signal: standard deviation over batch and units of each layer's output, in front of ReLU. "
        "Gradient: root mean square of the derivative of the loss by that output; the loss is the "
        "cross-entropy of ten linear outputs with N(0, 1/n) weights and the given labels.",
        "Growth a layer: from the first layer to the last, geometric mean; and over the widths.",
    ],
    thresholds=[
        f"N(0, 1): growth a layer / √n between {CLOSE:g} and 1/{CLOSE:g}: two criteria.",
        f"N(0, 1/n): growth a layer between {CLOSE:g} and 1/{CLOSE:g}: two criteria.",
        f"With batch normalization, linear and with ReLU, the layer whose standard deviation is "
        f"furthest from 1 is within {STILL:g} to 1/{STILL:g}.",
        f"With batch normalization, the gradients at the first and the last layer (the largest "
        f"width) differ by at most a factor of {BOUND:g}, either way: one criterion for the linear "
        "network, one for ReLU.",
        "The claim holds if all hold, and fails if one fails.",
    ],
    variants=list(NETWORKS),
    budgets={
        "quick": {"seeds": 3, "depth": 20, "widths": [16, 64, 256], "batch_size": 256},
        "full": {"seeds": 15, "depth": 20, "widths": [16, 64, 256], "batch_size": 256},
    },
    data=("generated", "digits", "fashion-mnist", "mnist"),
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Signal and gradient of every layer, for each width; the widths are the keys."""
    x = run.data.train_x[: run.budget["batch_size"]].flatten(1).double()
    y = run.data.train_y[: len(x)]
    record: Record = {"std": {}, "gradient": {}}
    for width in run.budget["widths"]:
        layers = _walk(x, y, width, run.budget["depth"], run.variant)
        record["std"][str(width)] = [h.detach().std().item() for h in layers]
        record["gradient"][str(width)] = [_size(h) for h in layers]
    return record


def _walk(x: Tensor, y: Tensor, width: int, depth: int, network: str) -> list[Tensor]:
    """The outputs of all layers, with the gradients of the loss."""
    power, relu, norm = NETWORKS[network]
    layers: list[Tensor] = []
    for _ in range(depth):
        x = x @ _weights(width, x.shape[1], power).T
        x = normally.nn.BatchNorm1d(width, dtype=x.dtype)(x) if norm else x.requires_grad_()
        x.retain_grad()
        layers.append(x)
        x = x.relu() if relu else x
    F.cross_entropy(x @ _weights(10, width, 1.0).T, y).backward()
    return layers


def _weights(outputs: int, inputs: int, power: float | None) -> Tensor:
    """Drawn from N(0, 1), or from N(0, power / inputs)."""
    std = 1.0 if power is None else math.sqrt(power / inputs)
    return std * torch.randn(outputs, inputs, dtype=torch.float64)


def _size(layer: Tensor) -> float:
    """Root mean square of its gradient."""
    assert layer.grad is not None  # after backward
    return layer.grad.square().mean().sqrt().item()


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The criteria of the thresholds above."""
    seeds = results.seeds(*EXPERIMENT.variants)
    unit, scaled = (_growth_effect(results, network, seeds) for network in ("unit", "scaled"))
    still = _still_effect(results, seeds)
    linear, relu = (_gradient_effect(results, n, seeds) for n in ("norm", "relu-norm"))
    he = _gradient_effect(results, "relu-he", seeds)
    depth = results.budget["depth"]
    sides = [(e, CLOSE) for effect in (unit, scaled) for e in (effect, _inverse(effect))]
    gradients = [_nearness(effect) for effect in (linear, relu)]
    return decide(
        [
            *(Criterion(effect, bound) for effect, bound in sides),
            Criterion(still, STILL),
            *(Criterion(effect, 1 / BOUND) for effect in gradients),
        ],
        f"Without normalization the signal grows by {unit.estimate:.2f}·√n a layer; with batch "
        f"normalization its standard deviation is {number(still.estimate)} where it is furthest "
        f"from 1. From the last of {depth} layers to the first the gradient changes by a factor of "
        f"{number(linear.estimate)} in the linear network with batch normalization and of "
        f"{number(relu.estimate)} in the one with ReLU; with ReLU and He's weights and no batch "
        f"normalization, of {number(he.estimate)}.",
    )


def _growth(results: Results, network: str, width: int, seeds: Sequence[int]) -> list[float]:
    """Growth of the standard deviation a layer, by seed."""
    rows = [row[str(width)] for row in results.get(network, "std", seeds)]
    return [_ratio(row[-1], row[0]) ** (1 / (len(row) - 1)) for row in rows]


def _ratio(one: float | None, other: float | None) -> float:
    """One / other, where a number that is not finite (None) counts as the largest there is."""
    top, bottom = (1e300 if value is None else max(value, 1e-300) for value in (one, other))
    return min(max(top / bottom, 1e-300), 1e300)


def _growth_effect(results: Results, network: str, seeds: Sequence[int]) -> Effect:
    """Growth a layer, over √n for N(0, 1) weights; geometric mean over the widths."""
    widths = results.budget["widths"]
    table = [
        np.array(_growth(results, network, width, seeds))
        / (math.sqrt(width) if network == "unit" else 1)
        for width in widths
    ]
    means = np.exp(np.log(np.array(table)).mean(0)).tolist()
    name = "growth / √n, weights N(0, 1)" if network == "unit" else "growth, weights N(0, 1/n)"
    return _of_one(name, means)


def _still_effect(results: Results, seeds: Sequence[int]) -> Effect:
    """The standard deviation with batch norm furthest from 1, over all layers and widths."""
    worst = []
    for seed in seeds:
        rows = [results.records[n, seed]["std"].values() for n in ("norm", "relu-norm")]
        values = [value for row in rows for layers in row for value in layers]
        ratios = [_ratio(value, 1.0) for value in values]
        worst.append(min(min(ratio, 1 / ratio) for ratio in ratios))
    return _of_one("standard deviation with BN furthest from 1", worst)


def _gradient_effect(results: Results, network: str, seeds: Sequence[int]) -> Effect:
    """Gradient at the first layer / at the last, in the widest network."""
    width = str(max(results.budget["widths"]))
    rows = [row[width] for row in results.get(network, "gradient", seeds)]
    name = {"norm": "linear with BN", "relu-norm": "ReLU with BN"}.get(network, network)
    return _of_one(f"gradient, {name}, first / last layer", [_ratio(r[0], r[-1]) for r in rows])


def _of_one(name: str, values: Sequence[float]) -> Effect:
    """A factor by seed, as geometric mean."""
    return paired_effect(name, values, [1.0] * len(values), "×", ratio=True)


def _inverse(effect: Effect) -> Effect:
    return _of_one(f"1 / ({effect.name})", [1 / value for value in effect.values])


def _nearness(effect: Effect) -> Effect:
    """1 where the two are equal, below 1 to whichever side they differ."""
    values = [min(value, 1 / value) for value in effect.values]
    return _of_one(f"{effect.name}, or its inverse", values)


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """Signals forward, gradients backward, and the numbers of each width."""
    seeds = results.seeds(*EXPERIMENT.variants)
    unit = _growth_effect(results, "unit", seeds)
    linear, relu = (_gradient_effect(results, n, seeds) for n in ("norm", "relu-norm"))
    depth = results.budget["depth"]
    cards = [
        effect_card("Signal without norm, growth a layer / √n", unit),
        effect_card(f"Gradient over {depth} linear layers with batch norm", linear),
        effect_card(f"Gradient over {depth} layers with batch norm and ReLU", relu),
    ]
    return cards, [_forward(results, seeds), _backward(results, seeds)]


def _rows(
    results: Results, network: str, key: str, width: int, seeds: Sequence[int], last: bool = False
) -> list[list[float]]:
    """The layers' values, a row a seed; relative to the last layer if asked."""
    rows = [row[str(width)] for row in results.get(network, key, seeds)]
    return [[_ratio(v, row[-1] if last else 1.0) for v in row] for row in rows]


PLAIN, SCALED, NORM, HE = report.VERMILLION, report.GREEN, report.BLUE, report.ORANGE


def _forward(results: Results, seeds: list[int]) -> report.Section:
    layers = range(1, results.budget["depth"] + 1)
    canvases, table = [], []
    for width in results.budget["widths"]:
        canvas, axes = report.panel("layer", "standard deviation", f"n = {width} units a layer")
        axes.set(yscale="log", ylim=(0.1, 10.0 ** (1 + math.ceil(len(layers) * 1.21))))
        for network, color in (("unit", PLAIN), ("scaled", SCALED), ("norm", NORM)):
            rows = _rows(results, network, "std", width, seeds)
            curves(axes, layers, rows, color, dashed=network == "unit")
        canvases.append(canvas)
        growth = [_growth(results, n, width, seeds) for n in ("unit", "scaled", "norm")]
        table.append(
            [f"{width}", f"{math.sqrt(width):g}", *(f"{np.median(g):.3f}" for g in growth)]
        )
    return report.Section(
        "The signal on its way forward",
        [
            "Three linear networks. On the logarithmic scale a straight line is exponential "
            "growth: the steeper, the wider the network.",
            report.Figure(
                "signal-by-depth",
                canvases,
                f"Line: median of {len(seeds)} seeds; band: from the lowest to the highest. The "
                "lines of N(0, 1/n) weights and of batch norm lie on each other where both stay at "
                "1.",
                [
                    report.Key("weights N(0, 1)", PLAIN, True),
                    report.Key("weights N(0, 1/n)", SCALED),
                    report.Key("weights N(0, 1) and batch norm", NORM),
                ],
            ),
            report.Table(
                ["n", "√n", "N(0, 1)", "N(0, 1/n)", "with batch norm"],
                table,
                "Growth of the standard deviation a layer, median over seeds.",
            ),
        ],
    )


def _backward(results: Results, seeds: list[int]) -> report.Section:
    depth, width = results.budget["depth"], max(results.budget["widths"])
    layers = range(1, depth + 1)
    groups = {
        "Linear": [("scaled", SCALED, True), ("norm", NORM, False)],
        "With ReLU": [("relu-he", HE, True), ("relu-norm", NORM, False)],
    }
    canvases = []
    for title, group in groups.items():
        canvas, axes = report.panel("layer", "gradient / that of the last layer", title, width=4.6)
        axes.set(yscale="log", ylim=(0.1, 100))
        if title == "With ReLU":
            theory = [THEORY ** (depth - layer) for layer in layers]
            axes.plot(layers, theory, color=report.GREY, linewidth=8, alpha=0.35)
        for network, color, dashed in group:
            rows = _rows(results, network, "gradient", width, seeds, last=True)
            curves(axes, layers, rows, color, dashed=dashed)
        canvases.append(canvas)
    rates = {
        network: float(np.median([row[0] ** (1 / (depth - 1)) for row in rows]))
        for network in NETWORKS
        for rows in [_rows(results, network, "gradient", width, seeds, last=True)]
    }
    words = {
        "unit": ("linear, N(0, 1)", f"√n = {math.sqrt(width):g}"),
        "scaled": ("linear, N(0, 1/n)", "1"),
        "norm": ("linear, batch norm", "1"),
        "relu-he": ("ReLU, N(0, 2/n)", "1"),
        "relu-norm": ("ReLU, batch norm", f"√(π/(π−1)) = {THEORY:.3f}"),
    }
    return report.Section(
        "The gradient on its way back",
        [
            "Read from right to left, as the gradient goes; a level line means that it neither "
            "vanishes nor explodes.",
            report.Figure(
                "gradient-by-depth",
                canvases,
                f"n = {width}. Line: median of {len(seeds)} seeds; band: from the lowest to the "
                f"highest. Broad grey line: {THEORY:.3f} a layer, as derived in the experiment's "
                "text.",
                [
                    report.Key("batch norm, weights N(0, 1)", NORM),
                    report.Key("no norm, N(0, 1/n)", SCALED, True),
                    report.Key("no norm, N(0, 2/n)", HE, True),
                ],
                columns=2,
            ),
            report.Table(
                ["network", "growth a layer", "expected"],
                [[words[n][0], f"{rate:.3f}", words[n][1]] for n, rate in rates.items()],
                f"Growth of the gradient a layer towards the input, n = {width}, median over "
                "seeds.",
            ),
        ],
    )
