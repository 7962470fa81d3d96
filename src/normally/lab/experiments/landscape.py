"""How smooth the loss is along the way that training takes.

Santurkar et al. explain batch normalization by the shape of the loss: with it, the gradient at a
point says more about the loss further along. From the weights w with gradient g they look along

    w(t) = w - t·g,  t from half to four times the learning rate

at three numbers: how far the loss ranges, how far the gradient changes, and the effective
β-smoothness, the largest ratio of the gradient's change to the distance moved. `lab.smoothness`
measures them; for a quadratic they are known in closed form.

Three things could make a loss look smoother than its landscape is, so each has its control:

- the learning rate: both sides are compared at the same one, and each at the one tuned for it;
- the length of the gradient, which makes one side move further for the same t: the control moves
  both by the same Euclidean distances;
- how far training has come: near the minimum every loss is flat, and the faster side gets there
  first. The control compares at equal training loss.

Learning rates, epochs and distances were chosen in trial runs with the seeds 101 to 103. They
showed the plain network's loss many times rougher at equal rates. For β at tuned rates they could
not tell: β falls about as the learning rate rises, on both sides (the edge of stability, Cohen et
al. 2021, arXiv:2103.00065), so that the rates chosen make much of the ratio. The thresholds were
set after these trials and before the first run of seed 0, and not changed. That run was repeated,
with the same numbers, as a defect of the engine had lost track of it.

With sigmoid instead of ReLU the plain network of the trials did not learn at all, and a loss on
which nothing moves is smooth: that comparison would say nothing, and there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from normally import report
from normally.lab import comparison, smoothness
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves, plain_ticks
from normally.lab.networks import lenet
from normally.lab.page import effect_card, interval, number
from normally.lab.training import fit
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

RATES = (0.03, 0.1, 0.3, 1.0)
SAME = 0.1
FACTORS = (0.5, 1.0, 2.0, 4.0)
DISTANCES = (0.05, 0.1, 0.2, 0.4)
# Bins of the training loss (nats) in which the sides are compared.
LOSSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
SMOOTHER = 1.5
# What a measure counts that overflowed, or a network that diverged.
ROUGHEST = 1e6
MEASURES = {
    "loss_range": "range of the loss",
    "gradient_change": "change of the gradient",
    "beta": "effective β-smoothness",
}

EXPERIMENT = Experiment(
    name="landscape",
    title="The loss along the gradient",
    claim="Batch normalization makes the loss smoother along the way of training: along the "
    "gradient the loss ranges less, the gradient changes less, and the effective β-smoothness is "
    "smaller.",
    source="Santurkar et al. 2018, arXiv:1805.11604, section 3",
    prediction=f"All three measures are at least {SMOOTHER:g} times larger without batch "
    "normalization: at the same learning rate, at the rates tuned for each side, and, for β, also "
    "at the same distance moved and the same training loss.",
    protocol=[
        "LeNet with ReLU and He initialization, with `normally.nn.BatchNorm1d/2d` after its four "
        "hidden layers and without; the same initial weights and the same batches of 64; plain "
        "SGD, no schedule, float32, one thread.",
        f"Learning rates {', '.join(f'{rate:g}' for rate in RATES)}. Same rate: {SAME:g} for both. "
        "Tuned: for each seed the rate with the best final test accuracy of the other seeds, each "
        "side for itself.",
        "Every few steps, on the batch that the step takes and in training mode: loss and gradient "
        f"at w − t·g for t = {', '.join(f'{f:g}' for f in FACTORS)} times the learning rate, on a "
        "copy of the network. Range: largest less smallest loss, the start included.",
        f"The same at distances ‖w(t) − w‖ of {', '.join(f'{d:g}' for d in DISTANCES)} for the "
        "control.",
        "A run counts with the median of each measure over its measured steps, which an overflow "
        f"or divergence enters with {ROUGHEST:g}.",
        f"Equal loss: the measured steps of both sides at {SAME:g} are sorted into bins of the "
        f"batch's loss with the edges {', '.join(f'{loss:g}' for loss in LOSSES)} nats; the ratio "
        "is the geometric mean over the bins in which both sides have at least two steps.",
    ],
    thresholds=[
        f"At learning rate {SAME:g} each of the three measures is at least {SMOOTHER:g} times "
        "larger without batch normalization: three criteria.",
        "The same with each side at its tuned rate: three criteria.",
        f"At the same distances, at equal training loss, β is at least {SMOOTHER:g} times larger "
        "without: one criterion; where no bin has both sides nothing is decided.",
        "The claim holds if all seven hold, and fails if one fails.",
    ],
    variants=[f"{side}-lr{rate:g}" for rate in RATES for side in ("norm", "plain")],
    budgets={
        "quick": {"seeds": 3, "epochs": 15, "batch_size": 64, "every": 10},
        "full": {"seeds": 15, "epochs": 40, "batch_size": 64, "every": 10},
    },
)


# By side, the variant whose rate it takes for each seed.
Chosen = dict[str, list[str]]


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train, and look along the gradient every few steps."""
    side, _, rate = run.variant.partition("-lr")
    model = lenet(run.data.train_x.shape[-1], norm="batch" if side == "norm" else "none")
    steps = [factor * float(rate) for factor in FACTORS]
    seen: dict[str, list[float]] = {
        key: [] for key in ("step", "loss", "gradient", *MEASURES, "beta_at_distance")
    }
    count = 0

    def watch(x: Tensor, y: Tensor) -> None:
        nonlocal count
        if count % run.budget["every"] == 0:
            own = smoothness.of_network(model, x, y, steps)
            fixed = smoothness.of_network(model, x, y, DISTANCES, distances=True)
            for key in ("loss", "gradient", *MEASURES):
                seen[key].append(getattr(own, key))
            seen["beta_at_distance"].append(fixed.beta)
            seen["step"].append(count)
        count += 1

    record = fit(
        model,
        run.data,
        lr=float(rate),
        epochs=run.epochs(),
        batch_size=run.budget["batch_size"],
        watch=watch,
    )
    return {**seen, "test_accuracy": record["test_accuracy"], "train_loss": record["train_loss"]}


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The seven criteria of the thresholds above."""
    same, tuned = _same(results), _tuned(results)
    control, decidable = _at_equal_loss(results)
    ratios = ", ".join(
        f"the {MEASURES[key]} {number(same[key].estimate)} ({number(tuned[key].estimate)}) times"
        for key in MEASURES
    )
    return decide(
        [
            *(Criterion(effect, SMOOTHER) for effect in (*same.values(), *tuned.values())),
            Criterion(control, SMOOTHER, decidable=decidable),
        ],
        f"Without batch normalization, at learning rate {SAME:g} (each side at its tuned rate): "
        f"{ratios} that with it. At equal loss and distance β is "
        f"{number(control.estimate)} times as large.",
    )


def _typical(record: Record, key: str) -> float:
    """The median over a run's measured steps."""
    return float(np.median([_finite(value) for value in record[key]]))


def _finite(value: float | None) -> float:
    """Between what float32 still tells apart and ROUGHEST, so that ratios have logarithms."""
    return ROUGHEST if value is None else min(max(value, 1e-12), ROUGHEST)


def _same(results: Results) -> dict[str, Effect]:
    """Plain / norm of each measure at the same learning rate."""
    seeds = results.seeds(*EXPERIMENT.variants)
    return _ratios(results, _at_same(seeds), f"both at {SAME:g}", seeds)


def _tuned(results: Results) -> dict[str, Effect]:
    """Plain / norm of each measure at the rates that were best for each."""
    seeds = results.seeds(*EXPERIMENT.variants)
    return _ratios(results, _chosen(results, seeds), "each at its tuned rate", seeds)


def _at_same(seeds: Sequence[int]) -> Chosen:
    return {side: [f"{side}-lr{SAME:g}"] * len(seeds) for side in ("plain", "norm")}


def _chosen(results: Results, seeds: Sequence[int]) -> Chosen:
    return {
        side: comparison.tuned(results, [f"{side}-lr{rate:g}" for rate in RATES], seeds)[0]
        for side in ("plain", "norm")
    }


def _ratios(
    results: Results, chosen: Chosen, where: str, seeds: Sequence[int]
) -> dict[str, Effect]:
    effects = {}
    for key, words in MEASURES.items():
        plain, norm = (_values(results, key, chosen[side], seeds) for side in ("plain", "norm"))
        name = f"{words}, plain / with BN, {where}"
        effects[key] = paired_effect(name, plain, norm, "×", ratio=True)
    return effects


def _values(
    results: Results, key: str, variants: Sequence[str], seeds: Sequence[int]
) -> list[float]:
    """What a run counts with, by seed."""
    pairs = zip(variants, seeds, strict=True)
    return [_typical(results.records[pair], key) for pair in pairs]


def _at_equal_loss(results: Results) -> tuple[Effect, bool]:
    """β at the same distances, plain / norm, and whether every seed could tell."""
    seeds = results.seeds(*EXPERIMENT.variants)
    ratios = []
    for seed in seeds:
        plain, norm = (
            _by_loss(results.records[f"{s}-lr{SAME:g}", seed]) for s in ("plain", "norm")
        )
        logs = [math.log(plain[b] / norm[b]) for b in plain if b in norm]
        ratios.append(math.exp(math.fsum(logs) / len(logs)) if logs else math.nan)
    known = [ratio if math.isfinite(ratio) else 1.0 for ratio in ratios]
    name = f"β at the same distance and loss, plain / with BN, both at {SAME:g}"
    effect = paired_effect(name, known, [1.0] * len(known), "×", ratio=True)
    return effect, all(map(math.isfinite, ratios))


def _by_loss(record: Record) -> dict[int, float]:
    """Median β at the same distances by bin of the loss; bins with two steps or more."""
    found: dict[int, list[float]] = {}
    for loss, beta in zip(record["loss"], record["beta_at_distance"], strict=True):
        place = int(np.searchsorted(LOSSES, _finite(loss)))
        if 0 < place < len(LOSSES):
            found.setdefault(place - 1, []).append(_finite(beta))
    return {place: float(np.median(b)) for place, b in found.items() if len(b) >= 2}


SIDES = (("norm", "with batch norm", report.BLUE), ("plain", "without", report.VERMILLION))


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """The three measures on the way, their ratios, and the control."""
    same, tuned, (control, _) = _same(results), _tuned(results), _at_equal_loss(results)
    cards = [
        report.Card(
            f"{MEASURES['loss_range'].capitalize()}, plain / with BN, both at {SAME:g}",
            number(same["loss_range"].estimate, "×"),
            interval(same["loss_range"]),
        ),
        report.Card(
            f"Effective β, plain / with BN, both at {SAME:g}",
            number(same["beta"].estimate, "×"),
            interval(same["beta"]),
        ),
        report.Card(
            "Effective β, plain / with BN, each at its tuned rate",
            number(tuned["beta"].estimate, "×"),
            interval(tuned["beta"]),
        ),
        effect_card("Effective β at equal distance and loss", control),
    ]
    return cards, [_way_section(results), _control_section(results)]


def _way_section(results: Results) -> report.Section:
    seeds = results.seeds(*EXPERIMENT.variants)
    chosen = _chosen(results, seeds)
    keys = [report.Key(label, color, side == "plain") for side, label, color in SIDES]
    figures = []
    for name, where, variants in (
        ("same-rate", f"both at {SAME:g}", _at_same(seeds)),
        ("tuned-rates", "tuned rates", chosen),
    ):
        panels = [_panel(results, key, where, variants, seeds) for key in MEASURES]
        used = {s: ", ".join(sorted({v.rpartition("lr")[2] for v in variants[s]})) for s in chosen}
        caption = (
            f"Learning rate {used['norm']} with batch norm, {used['plain']} without. Line: median "
            f"of {len(seeds)} seeds; band: from the lowest to the highest. Logarithmic scales."
        )
        figures.append(report.Figure(name, panels, caption, keys))
    return report.Section(
        "Along the gradient, during training",
        [
            "At every measured step the network looks ahead along its gradient, from half to four "
            "times the step that it will take. The further the loss and the gradient change on "
            "that short way, the less the gradient is worth. Lower is smoother.",
            figures[0],
            "The same with each side at the learning rate tuned for it, and the way ahead scaled "
            "with that rate.",
            figures[1],
            report.Table(
                ["measure", "comparison", "with BN", "without", "ratio"],
                _rows(results, seeds, chosen),
                "Medians over measured steps, then over seeds; the ratio is the geometric mean "
                "over seeds. Range in nats; gradient and β in units of the weights.",
                text_columns=2,
            ),
        ],
    )


def _panel(
    results: Results, key: str, where: str, variants: Chosen, seeds: Sequence[int]
) -> Canvas:
    units = {"loss_range": "range of the loss (nats)", "beta": "effective β"}
    label = units.get(key, "change of the gradient (l2)")
    title = f"{MEASURES[key].capitalize()}, {where}"
    canvas, axes = report.panel("training step", label, title.replace("Effective β-s", "β-s"))
    values = {
        side: [
            [_finite(value) for value in results.records[variant, seed][key]]
            for variant, seed in zip(variants[side], seeds, strict=True)
        ]
        for side in variants
    }
    every = np.concatenate([np.ravel(rows) for rows in values.values()])
    axes.set(yscale="log", ylim=(np.quantile(every, 0.005) / 2, np.quantile(every, 0.995) * 3))
    plain_ticks(axes.yaxis)
    steps = results.records[variants["norm"][0], seeds[0]]["step"]
    for side, _, color in SIDES:
        curves(axes, steps, values[side], color, dashed=side == "plain")
    return canvas


def _rows(results: Results, seeds: Sequence[int], chosen: Chosen) -> list[list[str]]:
    rows = []
    for key, words in MEASURES.items():
        for where, variants, effects in (
            (f"both at {SAME:g}", _at_same(seeds), _same(results)),
            ("tuned rates", chosen, _tuned(results)),
        ):
            values = [
                number(float(np.median(_values(results, key, variants[side], seeds))))
                for side in ("norm", "plain")
            ]
            rows.append([words, where, *values, number(effects[key].estimate, "×")])
    return rows


def _control_section(results: Results) -> report.Section:
    seeds = results.seeds(*EXPERIMENT.variants)
    by_loss, bins = _by_loss_panel(results, seeds)
    by_rate, rates = _by_rate_panel(results, seeds)
    return report.Section(
        "At equal loss, over equal distances, and at each learning rate",
        [
            "Near its minimum every loss is flat, and a network that learns faster is there "
            "earlier. Here both sides move the same distances in weight space, and their steps are "
            f"compared where the batch's loss is the same. Both trained at {SAME:g}.",
            "The learning rate shapes the way too: gradient descent is drawn to where β is about 2 "
            "/ learning rate (the dotted line), as beyond it steps overshoot. So β at different "
            "rates also compares the rates.",
            report.Figure(
                "equal-loss",
                [by_loss, by_rate],
                "Left: β at equal distances by the loss of the batch; training goes from left to "
                f"right. Right: β by learning rate, {FACTORS[0]:g} to {FACTORS[-1]:g} steps ahead. "
                "Line: median over seeds; band: all seeds.",
                [report.Key(label, color, side == "plain") for side, label, color in SIDES],
                columns=2,
            ),
            report.Table(
                ["training loss", *(label for _, label, _ in SIDES)],
                bins,
                "Median β over seeds in each bin of the batch's loss; – where no seed has two "
                "steps.",
            ),
            report.Table(
                [
                    "learning rate",
                    *(f"{what}, {label}" for what in ("β", "accuracy") for _, label, _ in SIDES),
                ],
                rates,
                "Median β over steps, then over seeds; beside it the median test accuracy after "
                "the last epoch, which tunes the rates.",
            ),
        ],
    )


def _by_loss_panel(results: Results, seeds: Sequence[int]) -> tuple[Canvas, list[list[str]]]:
    canvas, axes = report.panel("training loss of the batch (nats)", "effective β", "At equal loss")
    axes.set(xscale="log", yscale="log")
    middles = np.sqrt(np.array(LOSSES[:-1]) * np.array(LOSSES[1:]))
    rows = [[f"{a:g} – {b:g} nats"] for a, b in pairwise(LOSSES)]
    for side, _, color in SIDES:
        tables = [_by_loss(results.records[f"{side}-lr{SAME:g}", seed]) for seed in seeds]
        groups = [[t[p] for t in tables if p in t] for p in range(len(middles))]
        for row, group in zip(rows, groups, strict=True):
            row.append(number(float(np.median(group))) if group else "–")
        known = [p for p, group in enumerate(groups) if group]
        _band(axes, middles[known], [groups[p] for p in known], color, dashed=side == "plain")
    axes.set_xlim(LOSSES[-1], LOSSES[0])
    axes.set_xticks(LOSSES, [f"{loss:g}" for loss in LOSSES])
    axes.minorticks_off()
    plain_ticks(axes.yaxis)
    return canvas, rows


def _by_rate_panel(results: Results, seeds: Sequence[int]) -> tuple[Canvas, list[list[str]]]:
    canvas, axes = report.panel("learning rate", "effective β", "At each learning rate")
    axes.set(xscale="log", yscale="log")
    axes.plot(RATES, [2 / rate for rate in RATES], ":", color=report.GREY)
    rows = [[f"{rate:g}"] for rate in RATES]
    for side, _, color in SIDES:
        variants = [f"{side}-lr{rate:g}" for rate in RATES]
        groups = [[_typical(results.records[v, seed], "beta") for seed in seeds] for v in variants]
        for row, group in zip(rows, groups, strict=True):
            row.append(number(float(np.median(group))))
        _band(axes, RATES, groups, color, dashed=side == "plain")
    for side, _, _ in SIDES:
        for row, rate in zip(rows, RATES, strict=True):
            accuracy = comparison.final_accuracy(results, f"{side}-lr{rate:g}", seeds)
            row.append(f"{np.median(accuracy):.1f} %")
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.minorticks_off()
    plain_ticks(axes.yaxis)
    return canvas, rows


def _band(
    axes: Axes,
    x: Sequence[float],
    groups: Sequence[Sequence[float]],
    color: str,
    *,
    dashed: bool,
) -> None:
    """Like `curves`, where each place has its own number of seeds."""
    style = (0, (5, 2)) if dashed else "-"
    axes.plot(x, [np.median(g) for g in groups], marker="o", color=color, linestyle=style)
    low, high = [min(g) for g in groups], [max(g) for g in groups]
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
