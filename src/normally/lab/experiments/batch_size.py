"""The size of the batch.

Batch normalization estimates mean and variance of a channel from the m values that the batch has of
it. The smaller m is, the noisier is the estimate, and the noise goes into every output. In a dense
layer m is the batch size itself, and two cases are extreme:

    m = 2:   x̂ = (±1, ∓1), whatever the two values were: only which one is larger is left
    m = 1:   x̂ = (x - x) / √(0 + eps) = 0: nothing of the input is left, and nothing is learnt

torch and normally therefore refuse m = 1 in training. A convolution has m = N·H·W, so that it goes
on at N = 1; it then normalizes each image by itself in training, and with averages over images in
evaluation. Layer and group norm take their statistics from one sample and never see the batch.

All sides see the same number of images. Small batches so make more steps, and their learning rate
is smaller in proportion (Goyal et al. 2017, arXiv:1706.02677). More steps help: that a norm without
a batch in it gains as the batch shrinks is no surprise, and what counts is who loses.

The learning rates come from trial runs with seeds 101 and 102 on digits: of 0.001, 0.003, 0.01 and
0.03 times the batch size, 0.003 was best or as good as the best for batch, layer and group norm at
2, 8 and 32; at 128 layer and group norm wanted 0.001. At a batch of 2 batch norm ended between 13 %
and 38 % with each of the four. First forms, judged with trial seeds only, took too long, and
compared with a batch of 32, where layer norm had not learnt enough for a fair test of whether it
loses at 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from normally import report
from normally.lab.comparison import tuned
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves
from normally.lab.networks import ALL, lenet
from normally.lab.page import effect_card, interval, number
from normally.lab.training import evaluate, fit
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

BATCHES = (1, 2, 4, 8, 32, 128)
SMALL = 2
LARGE = 32  # from here on there are rates to choose from
# Times the batch size. The first serves every norm at small batches; large ones choose.
RATES = (0.003, 0.001, 0.01)
LOST, MARGIN, NOTHING = 5.0, 3.0, 25.0
# Norm, positions and smallest batch of a side.
SIDES = {
    "batch": ("batch", ALL, 1),
    "layer": ("layer", ALL, 1),
    "group": ("group:2", ALL, 2),
    "conv": ("batch", (1, 2), 1),
}
# What torch and normally say where a batch norm meets one value a channel.
REFUSED = "Expected more than 1 value per channel"

EXPERIMENT = Experiment(
    name="batch-size",
    title="The size of the batch",
    claim="Batch normalization degrades as the batch shrinks and learns nothing at a batch of 1, "
    "while layer and group normalization lose nothing.",
    source="Wu & He 2018, Group Normalization, arXiv:1803.08494, and common course material",
    prediction=f"At a batch of {SMALL} the network with batch norm is far below its best at larger "
    "batches, and the others are not; at 1 it is refused; layer norm trains at 1 as well.",
    protocol=[
        "LeNet with ReLU and a norm after all four hidden layers: batch, layer, or group norm with "
        "2 groups. A fourth network has batch norm after its two convolutions only, where an image "
        "gives many values a channel.",
        "Every side sees the same number of images, in the same order where the batch is the same. "
        f"Plain SGD; the learning rate is proportional to the batch: {RATES[0]:g} times its size. "
        f"From {LARGE} on every side also has {RATES[1]:g} and {RATES[2]:g}, and each seed "
        "takes the one that did best with the other seeds.",
        "A training that is refused leaves the network as it started; its test accuracy is "
        "measured all the same.",
    ],
    thresholds=[
        f"At a batch of {SMALL} batch norm loses at least {LOST:g} percentage points of final "
        "test accuracy more than layer norm does; loss: from the side's own best at a larger "
        "batch, the batch with the best mean over seeds.",
        f"At a batch of 1 batch norm in all four layers stays below {NOTHING:g} % test accuracy; "
        "guessing has 10 %.",
        f"Layer norm at a batch of 1, and group norm at {SMALL}, lose at most {MARGIN:g} points: "
        "two criteria.",
        "The claim holds if all four hold, and fails if one fails.",
    ],
    variants=[
        f"{side}-b{batch}-r{rate:g}"
        for side, (_, _, smallest) in SIDES.items()
        for batch in BATCHES
        if batch >= smallest
        for rate in (RATES if batch >= LARGE else RATES[:1])
    ],
    budgets={
        "quick": {"seeds": 3, "epochs": 2, "train_images": 800, "test_images": 1000},
        "full": {"seeds": 15, "epochs": 10, "train_images": 3600, "test_images": 10000},
    },
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train one norm with one batch size and rate."""
    side, batch, rate = _parts(run.variant)
    norm, positions, _ = SIDES[side]
    data = run.data.first(run.budget["train_images"], run.budget["test_images"])
    model = lenet(data.train_x.shape[-1], norm=norm, positions=positions)
    try:
        return fit(model, data, lr=rate * batch, epochs=run.epochs(), batch_size=batch)
    except ValueError as error:
        if REFUSED not in str(error):
            raise
        untrained = evaluate(model, data.test_x, data.test_y).accuracy
        return {
            "train_loss": [None],
            "test_accuracy": [untrained],
            "refused": str(error),
            "torch": _torchs_words(),
        }


def _parts(variant: str) -> tuple[str, int, float]:
    side, batch, rate = variant.split("-")
    return side, int(batch[1:]), float(rate[1:])


def _torchs_words() -> str:
    """What torch's own layer says to one sample; empty if it takes it."""
    try:
        nn.BatchNorm1d(120)(torch.zeros(1, 120))
    except ValueError as error:
        return str(error)
    return ""


def _seeds(results: Results) -> list[int]:
    return results.seeds(*EXPERIMENT.variants)


def _accuracy(results: Results, side: str, batch: int) -> list[float]:
    """Final test accuracy in percent by seed, at the rate that the other seeds choose."""
    variants = [v for v in EXPERIMENT.variants if v.startswith(f"{side}-b{batch}-")]
    return tuned(results, variants, _seeds(results))[1]


def _kept(results: Results, side: str, batch: int) -> Effect:
    """Accuracy at this batch, less the side's own at the larger batch that was best for it."""
    larger = [_accuracy(results, side, other) for other in BATCHES if other > batch]
    name = f"{side} norm, batch {batch} − its best larger batch"
    return paired_effect(
        name, _accuracy(results, side, batch), max(larger, key=lambda a: sum(a)), "points"
    )


def _effects(results: Results) -> tuple[Effect, Effect, Effect, Effect]:
    batch, layer = (_kept(results, side, SMALL) for side in ("batch", "layer"))
    name = f"lost at batch {SMALL}, batch − layer norm"
    alone = _accuracy(results, "batch", 1)
    return (
        paired_effect(name, layer.values, batch.values, "points"),
        paired_effect(
            f"batch 1, batch norm: below {NOTHING:g} %", [NOTHING] * len(alone), alone, "points"
        ),
        _kept(results, "layer", 1),
        _kept(results, "group", SMALL),
    )


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The four criteria of the thresholds above."""
    lost, alone, layer, group = _effects(results)
    accuracy = float(np.mean(_accuracy(results, "batch", 1)))
    return decide(
        [
            Criterion(lost, LOST),
            Criterion(alone, 0.0),
            Criterion(layer, -MARGIN),
            Criterion(group, -MARGIN),
        ],
        f"At a batch of {SMALL}, batch norm loses {number(abs(lost.estimate))} points of test "
        "accuracy "
        f"{'more' if lost.estimate >= 0 else 'less'} than layer norm. At a batch of 1 it has "
        f"{number(accuracy)} %. Against its own best at a larger batch, layer norm has "
        f"{_points(layer)} at 1, and group norm {_points(group)} at {SMALL}.",
    )


def _points(effect: Effect) -> str:
    return f"{number(abs(effect.estimate))} points {'more' if effect.estimate >= 0 else 'less'}"


LOOKS = {
    "batch": ("batch norm", report.VERMILLION, False),
    "layer": ("layer norm", report.BLUE, False),
    "group": ("group norm, 2 groups", report.GREEN, True),
    "conv": ("batch norm after the convolutions only", report.ORANGE, True),
}


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """Accuracy over the batch size, the table, and the words of the refusal."""
    lost, _, layer, group = _effects(results)
    cards = [
        effect_card(f"Lost at a batch of {SMALL}, batch − layer norm", lost),
        report.Card(
            "Batch norm at a batch of 1", f"{np.mean(_accuracy(results, 'batch', 1)):.1f} %"
        ),
        *(
            report.Card(e.name.capitalize(), number(e.estimate, "points"), interval(e))
            for e in (layer, group)
        ),
    ]
    return cards, [_curves_section(results), _refusal_section(results)]


def _curves_section(results: Results) -> report.Section:
    canvas, axes = report.panel("batch size (images)", "test accuracy (%)", width=6.4, height=3.6)
    axes.set(ylim=(0, 103), xlim=(-0.15, len(BATCHES) - 0.85))
    rows = []
    for side, (label, color, dashed) in LOOKS.items():
        places = [place for place, batch in enumerate(BATCHES) if batch >= SIDES[side][2]]
        by_batch = [_accuracy(results, side, BATCHES[place]) for place in places]
        curves(axes, places, np.transpose(by_batch).tolist(), color, dashed=dashed)
        missing = ["not run"] * (len(BATCHES) - len(places))
        rows.append([label, *missing, *(f"{np.median(values):.1f} %" for values in by_batch)])
    axes.set_xticks(range(len(BATCHES)), [str(batch) for batch in BATCHES])
    images = results.budget["epochs"] * min(
        results.budget["train_images"], len(results.data.train_x)
    )
    return report.Section(
        "Accuracy over the batch size",
        [
            f"Every network has seen {images:,} images, in more steps where the batch is smaller. "
            "Compare the norms at one batch size: more steps help them all, and at the largest "
            "batch there are few.",
            report.Figure(
                "batch-size",
                [canvas],
                f"Line: median of {len(_seeds(results))} seeds; band: all seeds. At a batch of 1 "
                "the network with batch norm in all layers was "
                f"{'refused and is untrained' if _refusals(results) else 'trained'}.",
                [report.Key(*look) for look in LOOKS.values()],
            ),
            report.Table(
                ["norm", *(f"batch {batch}" for batch in BATCHES)],
                rows,
                f"Final test accuracy, median over seeds; from {LARGE} on at the learning "
                "rate that the other seeds choose.",
            ),
        ],
    )


def _refusals(results: Results) -> Sequence[Record]:
    records = [results.records[f"batch-b1-r{RATES[0]:g}", seed] for seed in _seeds(results)]
    return [record for record in records if record.get("refused")]


def _refusal_section(results: Results) -> report.Section:
    refusals = _refusals(results)
    content: list[str | report.Items] = [
        "In a dense layer a batch of 1 leaves one value a channel. Its mean is the value itself, "
        "so every output would be β. A convolution has the values of all positions, and goes on: "
        "each image is normalized by itself in training, but with averages over many images in "
        "evaluation."
    ]
    if refusals:
        words = [f"normally: {refusals[0]['refused']}"]
        words += [f"torch: {refusals[0]['torch']}"] if refusals[0]["torch"] else []
        content += [
            f"With batch norm in the dense layers {len(refusals)} of {len(_seeds(results))} runs "
            "were refused:",
            report.Items(words),
        ]
    return report.Section("A batch of one", content)
