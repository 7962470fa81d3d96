"""Larger learning rates, and fewer steps.

A step of gradient descent is safe as long as the gradient still points down where the step ends.
In a plain network a large step also makes the weights larger, with them the signals of all later
layers and the gradients of all earlier ones, and the next step is larger still. Batch
normalization breaks this chain: the layer's output is the same for a·W as for W, and the gradient
shrinks with the scale,

    BN(aWx) = BN(Wx)        ∂BN(aWx)/∂(aW) = 1/a · ∂BN(Wx)/∂W

so weights that have grown take smaller steps relative to their size.

That it *can* take a larger rate is only half of the claim: rates of networks with and without are
not in the same unit, and one that is allowed might be of no use. So the second half is tested with
each side at the rate that is best for it. A fixed small rate common to both, where the plain
network is not at its best, is what `quickstart` shows.

The protocol was tried with seeds 101 and 102, which set the grid and the goals: the ends of the
grid are rates at which both sides learn and rates at which neither does. They suggested factors of
about 6 and 4. The thresholds are the paper's own smaller numbers and were fixed before the seeds
that decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from normally import report
from normally.lab.comparison import chosen_by_others
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves
from normally.lab.networks import lenet
from normally.lab.page import effect_card, number
from normally.lab.training import evaluate
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

RATES = (0.032, 0.056, 0.1, 0.18, 0.32, 0.56, 1.0, 1.8, 3.2, 5.6, 10.0)
STEP = 10**0.25
# What counts as "trains" at the end, and the goal whose first step is counted: test accuracies that
# either side reaches at a good rate, the goal within reach of its best ones only.
TRAINS = {"digits": 0.9, "mnist": 0.9, "fashion-mnist": 0.75}
GOALS = {"digits": 0.95, "mnist": 0.95, "fashion-mnist": 0.8}
LARGER, FEWER = 5.0, 2.0

EXPERIMENT = Experiment(
    name="learning-rate",
    title="Larger learning rates, and fewer steps",
    claim="With batch normalization a network trains at learning rates at least five times as "
    "large, and, each side at its own best rate, it reaches a given accuracy in at most half "
    "the steps.",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167, section 4.2: five and thirty times the "
    "learning rate; the same accuracy in 14 times fewer steps",
    prediction="The accuracies of both sides over the learning rate are two hills; that with batch "
    "normalization reaches further to the right, and its best rate is faster than the plain "
    "network's best.",
    protocol=[
        "LeNet with ReLU and He initialization; with `normally.nn.BatchNorm1d/2d` after its four "
        "hidden layers, and without. Both start from the same weights and see the same batches of "
        "64; plain SGD with a constant rate, one thread.",
        f"Both sides train at the same {len(RATES)} rates from {RATES[0]:g} to {RATES[-1]:g}, four "
        "a decade.",
        "Test accuracy (first 1,000 test images at most) every 5 steps, in evaluation mode: early "
        "on, the running statistics lag behind, and that counts against batch normalization.",
        f"A rate trains if the median accuracy over the last quarter of the run is at least "
        f"{TRAINS['digits']:.0%} ({TRAINS['fashion-mnist']:.0%} on Fashion-MNIST).",
        f"Steps to the goal: the first at {GOALS['digits']:.0%} ({GOALS['fashion-mnist']:.0%}). A "
        "run that never gets there counts with one evaluation more than there were.",
        "Best rate of a side: that with the fewest steps to the goal (geometric mean) of the "
        "*other* seeds, so no seed is judged by a rate that it chose itself.",
    ],
    thresholds=[
        f"The largest rate that trains is at least {LARGER:g} times as large with batch "
        "normalization, the paper's smaller factor. A side that trains nowhere counts with a rate "
        "one step below the grid; nothing is decided if the plain network trains at its top.",
        f"Each at its best rate, the plain network needs at least {FEWER:g} times the steps to the "
        "goal, about the paper's factor without a larger rate (2.3). Nothing is decided if neither "
        "side gets there.",
        "The claim holds if both hold, and fails if one fails.",
    ],
    variants=[f"{side}-lr{rate:g}" for rate in RATES for side in ("norm", "plain")],
    budgets={
        "quick": {"seeds": 3, "steps": 330, "every": 5, "batch_size": 64},
        "full": {"seeds": 15, "steps": 660, "every": 5, "batch_size": 64},
    },
)

SIDES = {"plain": ("without", report.VERMILLION), "norm": ("with batch norm", report.BLUE)}


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train one side at one rate; the test accuracy every few steps."""
    side, _, rate = run.variant.partition("-lr")
    data, every = run.data.first(len(run.data.train_x), 1000), run.budget["every"]
    model = lenet(data.train_x.shape[-1], norm="batch" if side == "norm" else "none")
    optimizer = torch.optim.SGD(model.parameters(), lr=float(rate))
    accuracies = []
    for step in range(run.budget["steps"]):
        if step % (len(data.train_x) // run.budget["batch_size"]) == 0:
            batches = iter(torch.randperm(len(data.train_x)).split(run.budget["batch_size"]))
        batch = next(batches)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
        optimizer.step()
        if (step + 1) % every == 0:
            accuracies.append(evaluate(model, data.test_x, data.test_y).accuracy)
            run.advance(step + 1, run.budget["steps"])
    return {"test_accuracy": accuracies}


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """Both criteria of the thresholds above."""
    seeds = results.seeds(*EXPERIMENT.variants)
    larger, fewer = _rates_effect(results, seeds), _steps_effect(results, seeds)
    at_top = RATES[-1] in _largest(results, "plain", seeds)
    norm, plain = (_at_best(results, side, seeds)[1] for side in ("norm", "plain"))
    never = _never(results)
    nowhere = (never, never) in zip(norm, plain, strict=True)
    return decide(
        [
            Criterion(larger, LARGER, decidable=not at_top),
            Criterion(fewer, FEWER, decidable=not nowhere),
        ],
        "The largest learning rate at which the network still trains is "
        f"{number(larger.estimate)} times as large with batch normalization as without. Each side "
        f"at its own best rate, the plain network takes {number(fewer.estimate)} times as many "
        f"steps to {_percent(GOALS[results.data.name])} test accuracy.",
    )


def _final(results: Results, side: str, rate: float, seeds: Sequence[int]) -> list[float]:
    """Median test accuracy over the last quarter of the run, by seed: one jump does not count."""
    rows = results.get(f"{side}-lr{rate:g}", "test_accuracy", seeds)
    return [float(np.median(row[-math.ceil(len(row) / 4) :])) for row in rows]


def _largest(results: Results, side: str, seeds: Sequence[int]) -> list[float]:
    """The largest rate that trains, by seed; one step below the grid where none does."""
    good = TRAINS[results.data.name]
    table = np.array([_final(results, side, rate, seeds) for rate in RATES])
    return [
        max((rate for rate, final in zip(RATES, column, strict=True) if final >= good), default=0)
        or RATES[0] / STEP
        for column in table.T
    ]


def _steps(results: Results, side: str, rate: float, seeds: Sequence[int]) -> list[int]:
    """The first step at the goal, by seed."""
    goal, every = GOALS[results.data.name], results.budget["every"]
    rows = results.get(f"{side}-lr{rate:g}", "test_accuracy", seeds)
    return [
        next((every * n for n, a in enumerate(row, 1) if a >= goal), _never(results))
        for row in rows
    ]


def _never(results: Results) -> int:
    return int(results.budget["steps"] + results.budget["every"])


def _at_best(results: Results, side: str, seeds: Sequence[int]) -> tuple[list[float], list[int]]:
    """For each seed the rate that was fastest with the other seeds, and its steps to the goal."""
    table = np.array([_steps(results, side, rate, seeds) for rate in RATES])
    table = table.reshape(len(RATES), len(seeds))
    rows = chosen_by_others(-np.log(table))
    return [RATES[row] for row in rows], [int(table[row, c]) for c, row in enumerate(rows)]


def _rates_effect(results: Results, seeds: Sequence[int]) -> Effect:
    norm, plain = (_largest(results, side, seeds) for side in ("norm", "plain"))
    return paired_effect("largest rate, with BN / without", norm, plain, "×", ratio=True)


def _steps_effect(results: Results, seeds: Sequence[int]) -> Effect:
    norm, plain = (_at_best(results, side, seeds)[1] for side in ("norm", "plain"))
    goal = _percent(GOALS[results.data.name])
    name = f"steps to {goal}, without / with BN, each at its best rate"
    return paired_effect(name, plain, norm, "×", ratio=True)


def _percent(value: float) -> str:
    return f"{100 * value:g} %"


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """The two hills, the curves at the best rates, and the paper's numbers beside ours."""
    seeds = results.seeds(*EXPERIMENT.variants)
    larger, fewer = _rates_effect(results, seeds), _steps_effect(results, seeds)
    goal = _percent(GOALS[results.data.name])
    cards = [
        effect_card("Largest rate, with / without", larger),
        effect_card(f"Fewer steps to {goal}, each at its best rate", fewer),
    ]
    return cards, [_rates_section(results, seeds), _multiples_section(results, seeds)]


def _rates_section(results: Results, seeds: list[int]) -> report.Section:
    goal, trains = GOALS[results.data.name], TRAINS[results.data.name]
    never, every = _never(results), results.budget["every"]
    hill, hill_axes = report.panel("learning rate", "test accuracy (%)", "After training")
    hill_axes.set(ylim=(0, 103))
    hill_axes.axhline(100 * trains, color=report.GREY, linewidth=1)
    steps, steps_axes = report.panel("learning rate", "steps", f"Steps to {_percent(goal)}")
    steps_axes.set(yscale="log", ylim=(10, never))
    time, time_axes = report.panel("step", "test accuracy (%)", "Each side at its best rate")
    time_axes.set(ylim=(0, 103), xlim=(0, results.budget["steps"]))
    time_axes.axhline(100 * goal, color=report.GREY, linewidth=1)
    for side, (_, color) in SIDES.items():
        dashed = side == "plain"
        finals = np.array([_final(results, side, rate, seeds) for rate in RATES])
        curves(hill_axes, RATES, (100 * finals.T).tolist(), color, dashed=dashed)
        counts = np.array([_steps(results, side, rate, seeds) for rate in RATES], dtype=float)
        counts[counts == never] = np.inf
        curves(steps_axes, RATES, counts.T.tolist(), color, dashed=dashed)
        rows = [
            results.get(f"{side}-lr{rate:g}", "test_accuracy", [seed])[0]
            for rate, seed in zip(_at_best(results, side, seeds)[0], seeds, strict=True)
        ]
        lines = (100 * np.array(rows)).tolist()
        points = [every * n for n in range(1, len(lines[0]) + 1)]
        curves(time_axes, points, lines, color, dashed=dashed)
    for axes in (hill_axes, steps_axes):
        axes.set(xscale="log", xlim=(RATES[0], RATES[-1]))
    return report.Section(
        "How large a rate, and how fast",
        [
            "The same network, weights and batches; each side at every rate of the grid.",
            report.Figure(
                "rates",
                [hill, steps, time],
                f"Line: median of {len(seeds)} seeds; band: from the lowest to the highest. Grey: "
                f"what counts as trained, {_percent(trains)}, and the goal, {_percent(goal)}. A "
                "side that does not reach the goal leaves the middle picture at the top.",
                [report.Key(label, c, side == "plain") for side, (label, c) in SIDES.items()],
            ),
            report.Table(
                [
                    "batch norm",
                    "largest rate that trains",
                    "best rate",
                    f"steps to {_percent(goal)}",
                    "lowest – highest",
                ],
                [_outcome(results, side, seeds) for side in SIDES],
                "Medians; best rate: the fastest of the other seeds. The largest rate is "
                "known to a step of the grid, a factor of 1.8: for one seed the two sides can "
                "differ by 3.2 or 5.7 times, but by nothing in between.",
            ),
        ],
    )


def _outcome(results: Results, side: str, seeds: list[int]) -> list[str]:
    rates, steps = _at_best(results, side, seeds)
    return [
        SIDES[side][0],
        f"{np.median(_largest(results, side, seeds)):g}",
        f"{np.median(rates):g}",
        f"{np.median(steps):g}",
        f"{min(steps)} – {max(steps)}",
    ]


def _multiples_section(results: Results, seeds: list[int]) -> report.Section:
    """The paper's form of the test: multiples of the rate that suits the plain network."""
    base = float(np.median(_at_best(results, "plain", seeds)[0]))
    start = int(np.argmin([abs(math.log(rate / base)) for rate in RATES]))
    paper = {0: "2.3 ×", 3: "14.8 × (at 5 ×)", 6: "11.5 × (at 30 ×)"}
    own = float(np.exp(np.mean(np.log(_steps(results, "plain", RATES[start], seeds)))))
    rows = []
    for offset, reported in paper.items():
        if start + offset >= len(RATES):
            continue
        rate, cells = RATES[start + offset], []
        for side in SIDES:
            cells.append(f"{100 * np.median(_final(results, side, rate, seeds)):.1f} %")
        norm = _steps(results, "norm", rate, seeds)
        gain = own / float(np.exp(np.mean(np.log(norm))))
        missed = norm.count(_never(results))
        rows.append(
            [
                f"{rate:g} ({10 ** (offset / 4):.2g} ×)",
                *cells,
                f"goal missed by {missed} of {len(norm)}" if missed else number(gain, "×"),
                reported,
            ]
        )
    return report.Section(
        "The paper's test",
        [
            "The paper took the rate of the plain network, 5 times it and 30 times it, and "
            "counted the steps to the plain network's accuracy. The nearest rates of our grid:",
            report.Table(
                [
                    "learning rate",
                    "accuracy without",
                    "accuracy with",
                    "fewer steps, ours",
                    "fewer steps, paper",
                ],
                rows,
                "Accuracy: median over seeds at the end. Fewer steps: of the plain network at its "
                "best rate, divided by those with batch normalization at this rate (geometric "
                "means). The paper: Inception on ImageNet, 31.0 million steps to 72.2 %, with "
                "batch normalization 13.3, 2.1 and 2.7 million.",
            ),
        ],
    )
