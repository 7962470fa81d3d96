"""Where γ and β end.

After normalizing, a layer scales by γ and shifts by β, and both are learnt. Readers who looked at
the numbers of a trained LeNet report that in the deeper layers β settles near 0 and γ between 1 and
2.

They start at γ = 1 and β = 0. So before asking why they come there one has to ask whether they come
at all, or stay near their start. To settle is to end at a place that does not depend on the start:
the test trains the same network also from a γ anywhere between ¼ and 4 and a β anywhere between −1
and 1, drawn for each channel.

For a network with ReLU there is a reason not to expect a settling: ReLU(a·z) = a·ReLU(z) for
positive a, and the next layer's normalization divides a out again, so only the ratio of γ and β has
a meaning and nothing pulls on their common size (the last hidden layer, with no normalization
behind it, excepted). Weight decay does pull, but γ towards 0. Both are reported beside the test, as
"relu" and "decay"; no threshold rests on them.

A trial run (seed 101) set the number of epochs; it showed what the claim says from the usual start,
and not from the other. "Near 0" and "most" are our words for what the source leaves open, chosen
before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from normally import report
from normally.lab.comparison import final_accuracy
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import spread
from normally.lab.networks import lenet
from normally.lab.page import interval, number
from normally.lab.training import fit
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

LOW, HIGH, NEAR, MOST = 1.0, 2.0, 0.25, 75.0
# Activation, start elsewhere, weight decay.
FORMS = {
    "usual": ("sigmoid", False, 0.0),
    "elsewhere": ("sigmoid", True, 0.0),
    "decay": ("sigmoid", False, 1e-3),
    "relu": ("relu", False, 0.0),
    "relu-elsewhere": ("relu", True, 0.0),
}
LABELS = {
    "usual": "usual start: γ = 1, β = 0",
    "elsewhere": "start elsewhere",
    "decay": "usual start, weight decay 0.001",
    "relu": "ReLU, usual start",
    "relu-elsewhere": "ReLU, start elsewhere",
}
COLORS = {"usual": report.BLUE, "elsewhere": report.VERMILLION, "decay": report.GREEN}
SYMBOLS = {"gamma": "γ", "beta": "β"}
LAYERS = ("conv 1", "conv 2", "dense 1", "dense 2")

EXPERIMENT = Experiment(
    name="gamma-beta",
    title="Where γ and β end",
    claim="With depth β settles near 0 and γ between 1 and 2.",
    source="Discussion of batch normalization in Dive into Deep Learning (d2l.ai)",
    prediction=f"In the last of the four normalized layers at least {MOST:g} % of all γ end "
    f"between {LOW:g} and {HIGH:g} and at least {MOST:g} % of all β within ±{NEAR:g}, "
    "from the usual start and from any other; and β is smaller in the last layer than in the "
    "first.",
    protocol=[
        "LeNet as in the source: sigmoid, average pooling, `normally.nn.BatchNorm1d/2d` after its "
        "four hidden layers; plain SGD, learning rate 1, batches of 64, no weight decay, one "
        "thread. Glorot initialization.",
        "Two starts with the same weights and batches: γ = 1, β = 0; and for every channel ln γ "
        "uniform between ln ¼ and ln 4, β uniform between −1 and 1, where a quarter of all γ and "
        "of all β are in the claimed ranges from the beginning.",
        f"β is called near 0 within ±{NEAR:g}, a quarter of the normalized standard deviation.",
        "Beside it, for explanation: weight decay of 0.001; and ReLU in place of the sigmoid (He "
        "initialization) from both starts.",
    ],
    thresholds=[
        f"Usual start, last layer: at least {MOST:g} % of γ in {LOW:g} to {HIGH:g}, and at least "
        f"{MOST:g} % of β within ±{NEAR:g}: two criteria.",
        "Usual start: the mean of |β| in the last layer is at most that in the first.",
        f"Start elsewhere, last layer: at least {MOST:g} % of γ and of β in the same ranges: two "
        "criteria.",
        "The claim holds if all hold, and fails if one fails.",
    ],
    variants=list(FORMS),
    budgets={
        "quick": {"seeds": 3, "epochs": 50, "batch_size": 64},
        "full": {"seeds": 15, "epochs": 110, "batch_size": 64},
    },
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train; γ and β of every layer before and after."""
    activation, elsewhere, decay = FORMS[run.variant]
    model = lenet(run.data.train_x.shape[-1], norm="batch", activation=activation)
    norms = [layer for layer in model if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if elsewhere:
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # the batches stay the same
            for norm in norms:
                norm.weight.copy_(4 ** (2 * torch.rand_like(norm.weight) - 1))
                norm.bias.uniform_(-1, 1)
    before = _parameters(norms)
    record = fit(
        model,
        run.data,
        lr=1.0,
        epochs=run.epochs(),
        batch_size=run.budget["batch_size"],
        weight_decay=decay,
    )
    return {
        "test_accuracy": record["test_accuracy"],
        "before": before,
        "after": _parameters(norms),
    }


def _parameters(norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> dict[str, list[list[float]]]:
    """A list a layer, with a value a channel."""
    return {
        name: [[round(value, 5) for value in parameter.tolist()] for parameter in parameters]
        for name, parameters in (
            ("gamma", [norm.weight for norm in norms]),
            ("beta", [norm.bias for norm in norms]),
        )
    }


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The five criteria of the thresholds above."""
    seeds = results.seeds(*EXPERIMENT.variants)
    shares = {
        (form, name): _share_effect(results, form, name, seeds)
        for form in ("usual", "elsewhere")
        for name in ("gamma", "beta")
    }
    depth = _depth_effect(results, seeds)
    text = {key: f"{number(effect.estimate)} %" for key, effect in shares.items()}
    start = {name: _mean_share(results, "elsewhere", name, seeds, "before") for name in RANGES}
    return decide(
        [*(Criterion(effect, MOST) for effect in shares.values()), Criterion(depth, 1.0)],
        f"From the usual start {text['usual', 'gamma']} of the last layer's γ end between {LOW:g} "
        f"and {HIGH:g} and {text['usual', 'beta']} of its β within ±{NEAR:g}. From a start "
        f"elsewhere {text['elsewhere', 'gamma']} and {text['elsewhere', 'beta']} do, where "
        f"{number(start['gamma'])} % and {number(start['beta'])} % were there before training.",
    )


RANGES = {"gamma": (LOW, HIGH), "beta": (-NEAR, NEAR)}


def _inside(values: Sequence[float | None], name: str) -> float:
    """Share of the values in the claimed range, in percent; what is no number is not in it."""
    low, high = RANGES[name]
    return 100 * float(np.mean([v is not None and low <= v <= high for v in values]))


def _share(
    results: Results, form: str, name: str, seeds: Sequence[int], when: str = "after"
) -> list[float]:
    """Share of the last layer's values in the claimed range, by seed."""
    return [_inside(results.records[form, seed][when][name][-1], name) for seed in seeds]


def _mean_share(
    results: Results, form: str, name: str, seeds: Sequence[int], when: str = "after"
) -> float:
    return float(np.mean(_share(results, form, name, seeds, when)))


def _share_effect(results: Results, form: str, name: str, seeds: Sequence[int]) -> Effect:
    low, high = RANGES[name]
    return paired_effect(
        f"{LABELS[form]}; {SYMBOLS[name]} in {low:g} to {high:g}",
        _share(results, form, name, seeds),
        [0.0] * len(seeds),
        "%",
    )


def _depth_effect(results: Results, seeds: Sequence[int]) -> Effect:
    first, last = (
        [_size(results.records["usual", seed]["after"]["beta"][layer]) for seed in seeds]
        for layer in (0, -1)
    )
    return paired_effect("usual start; |β|, first / last layer", first, last, "×", ratio=True)


def _size(values: Sequence[float | None]) -> float:
    """Mean of |value|, never 0; what is no number counts as very large."""
    return max(float(np.mean([1e6 if v is None else abs(v) for v in values])), 1e-9)


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """γ and β by depth, where each channel went, and the shares of all forms."""
    seeds = results.seeds(*EXPERIMENT.variants)
    effects = {
        f"{symbol} in the claimed range, {words}": _share_effect(results, form, name, seeds)
        for form, words in (("usual", "usual start"), ("elsewhere", "start elsewhere"))
        for name, symbol in SYMBOLS.items()
    }
    cards = [report.Card(t, number(e.estimate, "%"), interval(e)) for t, e in effects.items()]
    return cards, [_depth_section(results, seeds), _channels_section(results, seeds)]


def _values(
    results: Results, form: str, when: str, name: str, layer: int, seeds: Sequence[int]
) -> list[float]:
    """All channels of all seeds; those that are no number are left to the table."""
    rows = [results.records[form, seed][when][name][layer] for seed in seeds]
    return [float("nan") if v is None else v for row in rows for v in row]


def _depth_section(results: Results, seeds: list[int]) -> report.Section:
    canvases = []
    for name, symbol in SYMBOLS.items():
        canvas, axes = report.panel("", symbol, f"{symbol} after training", width=4.6)
        axes.axhspan(*RANGES[name], color=report.GREY, alpha=0.2, linewidth=0)
        for offset, (form, color) in enumerate(COLORS.items()):
            for layer in range(len(LAYERS)):
                values = _values(results, form, "after", name, layer, seeds)
                spread(axes, layer + 0.2 * (offset - 1), values, color)
        axes.set_xticks(range(len(LAYERS)), LAYERS)
        axes.grid(False, axis="x")
        canvases.append(canvas)
    rows = []
    for form, label in LABELS.items():
        cells = [
            f"{_mean_share(results, form, name, seeds, when):.0f} %"
            for name in SYMBOLS
            for when in ("before", "after")
        ]
        accuracy = np.median(final_accuracy(results, form, seeds))
        rows.append([label, *cells, f"{accuracy:.1f} %"])
    return report.Section(
        "γ and β by depth",
        [
            "The same network from two starts, and with weight decay.",
            report.Figure(
                "gamma-beta",
                canvases,
                f"All channels of {len(seeds)} seeds. Dot: median; bar: from the 5th to the 95th "
                "percentile; grey: the claimed range.",
                [report.Key(LABELS[form], color) for form, color in COLORS.items()],
                columns=2,
            ),
            report.Table(
                [
                    "last hidden layer",
                    "γ in 1–2, before",
                    "after",
                    f"β in ±{NEAR:g}, before",
                    "after",
                    "test accuracy",
                ],
                rows,
                "Share of the channels, mean over seeds; accuracy: median over seeds.",
            ),
        ],
    )


def _channels_section(results: Results, seeds: list[int]) -> report.Section:
    canvases = []
    for name, symbol in SYMBOLS.items():
        canvas, axes = report.panel(
            f"{symbol} before training",
            f"{symbol} after training",
            f"{symbol} of the last hidden layer",
            width=4.6,
            height=3.4,
        )
        axes.axhspan(*RANGES[name], color=report.GREY, alpha=0.2, linewidth=0)
        limits = (0.2, 5.0) if name == "gamma" else (-1.5, 1.5)
        axes.plot(limits, limits, color=report.GREY, linewidth=1)
        for form in ("elsewhere", "usual"):
            ends = [_values(results, form, w, name, -1, seeds) for w in ("before", "after")]
            axes.plot(*ends, "o", color=COLORS[form], markersize=3.5, alpha=0.5, markeredgewidth=0)
        if name == "gamma":
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_ticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
                axis.set_ticks([], minor=True)
        axes.set(xlim=limits, ylim=limits)
        canvases.append(canvas)
    return report.Section(
        "Where each channel went",
        [
            "If γ and β settled, the points would lie in a level band whatever their start; if "
            "they stay where they begin, on the diagonal.",
            report.Figure(
                "start-and-end",
                canvases,
                f"Each point is a channel of the last hidden layer; {len(seeds)} seeds. Line: the "
                "value it started with; grey: the claimed range.",
                [report.Key(LABELS[form], COLORS[form]) for form in ("usual", "elsewhere")],
                columns=2,
            ),
        ],
    )
