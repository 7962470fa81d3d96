"""Batch norm and layer norm on sequences of different lengths.

Batch norm takes its statistics over the samples of a batch, and sequences break that in three ways:

- in a recurrent network the state's distribution changes from step to step. One set of statistics
  for all steps is wrong at each; one set a step (Cooijmans et al. 2017, arXiv:1603.09025) has
  nothing for steps beyond those of training;
- sequences end, so at late steps only a few samples are left to take statistics over;
- where padding is not masked it enters the statistics, and the output for a sequence depends on
  how much of it there happens to be.

Layer norm takes the statistics of each step of each sample alone and knows none of this (Ba et al.
2016, arXiv:1607.06450). Three networks, one task: name the image that stands somewhere in noise.
Batch norm gets every help: masks, both kinds of statistics in the recurrent network, and the better
of the two by the other seeds.

Only the statistics differ between the masked and the unmasked form: in both the values at padded
positions are set to 0 behind the norm, and the maximum over steps is that of real steps. In
evaluation the running statistics are fixed, so the padding that a sequence has then cannot matter;
what can is the padding of training.

Rates, lengths and epochs were chosen in trial runs with the seeds 101 to 103, in which the
convolutional networks were best at 0.1 or 0.3 and the recurrent ones at 1 to 4. There layer norm
was ahead of batch norm at longer sequences, and hardly at those of training; the network without a
norm was no worse than either. The thresholds were set after these trials and before the first run
of seed 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from normally import report
from normally.lab import comparison, sequences
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves
from normally.lab.page import effect_card, interval, number
from normally.lab.training import evaluate, fit
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

RATES = {"conv": (0.1, 0.3), "gru": (1.0, 2.0, 4.0)}
SHORTEST, LONGEST, STEPS = 8, 20, 32
LENGTHS = (8, 12, 16, 20, 24, 28, 32)
MARGIN = 1.0
CHANGED, UNCHANGED = 1.0, 0.01  # percent of the outputs
WIDTH = {"conv": 24, "gru": 32}
NORMS = {
    "conv": ("none", "layer", "batch", "padded"),
    "gru": ("none", "layer", "batch", "steps"),
}
BEST_BATCH = ("batch", "steps")

EXPERIMENT = Experiment(
    name="sequence",
    title="Sequences: batch norm, layer norm, and padding",
    claim="Batch normalization suits a convolutional network and not a recurrent one, where layer "
    "normalization does better at the lengths of training and at longer ones; and padding must not "
    "enter its statistics.",
    source="Ba et al. 2016, arXiv:1607.06450, section 3; common course material",
    prediction="With batch norm the convolutional network is not behind layer norm; the recurrent "
    f"one is at least {MARGIN:g} point behind, at both kinds of length. Unmasked padding changes "
    f"the outputs by {CHANGED:g} % or more and costs at least {MARGIN:g} point.",
    protocol=[
        "Each image is read column by column, 8 steps of 8 values, and stands at a random place "
        f"in {SHORTEST} to {LONGEST} steps of standard normal noise; all sequences are padded to "
        f"{STEPS} steps with zeros (`lab.sequences`). For each test length of "
        f"{', '.join(map(str, LENGTHS))} all test images in sequences of just that length.",
        f"Convolutional: two convolutions over 5 steps with {WIDTH['conv']} channels, each with "
        "norm and ReLU, then the maximum over the real steps. Recurrent: a GRU of "
        f"{WIDTH['gru']} units, norms on the input's part of its gates and on the state's part, as "
        "in Ba et al.; its last real state is classified.",
        "Norms of `normally.nn`: none; layer norm over the channels of each step; batch norm with "
        "the mask; batch norm without it, so that padding enters the statistics (convolutional); "
        "batch norm with the mask and statistics of its own for each step (recurrent); beyond step "
        f"{LONGEST} it takes those of the last.",
        "The same initial weights and the same batches of 64; plain SGD, no schedule, float32, one "
        "thread. Learning rates: convolutional "
        + ", ".join(f"{rate:g}" for rate in RATES["conv"])
        + "; recurrent "
        + ", ".join(f"{rate:g}" for rate in RATES["gru"])
        + ". Each side counts, for each seed, at the rate that was best for it with the other "
        "seeds, by test accuracy at the lengths of training. Recurrent batch norm is the better "
        "of its two forms, chosen in the same way.",
        f"Padding: after training, the outputs for 64 test sequences padded to {STEPS} and to "
        f"{2 * STEPS} steps, in training mode; root mean square of the change over that of the "
        "outputs.",
    ],
    thresholds=[
        f"Convolutional: batch norm − layer norm is at least −{MARGIN:g} point.",
        f"Recurrent: layer norm − batch norm is at least {MARGIN:g} point at the lengths of "
        f"training, and at least {MARGIN:g} point as the mean over the lengths above {LONGEST}: "
        "two criteria.",
        f"Recurrent: layer norm − none is at least −{MARGIN:g} point at the lengths of training: "
        "what suits must not do harm.",
        f"Padding changes the outputs by at least {CHANGED:g} % without the mask, and with it by "
        f"at most {UNCHANGED:g} %: two criteria.",
        f"Convolutional: batch norm with the mask − without is at least {MARGIN:g} point.",
        "The claim holds if all seven hold, and fails if one fails.",
    ],
    variants=[
        f"{kind}-{norm}-lr{rate:g}"
        for kind in NORMS
        for rate in RATES[kind]
        for norm in NORMS[kind]
    ],
    budgets={
        "quick": {"seeds": 3, "epochs": 9, "batch_size": 64},
        "full": {"seeds": 15, "epochs": 30, "batch_size": 64},
    },
    data=("digits",),
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Train on sequences, then test other lengths and other padding."""
    kind, norm, rate = run.variant.split("-")
    data = sequences.hidden_images(
        run.data, run.seed, shortest=SHORTEST, longest=LONGEST, steps=STEPS
    )
    model: nn.Module
    if kind == "conv":
        model = sequences.Convolutional(data.train_x.shape[-1] - 1, norm, WIDTH["conv"])
    else:
        model = sequences.Recurrent(data.train_x.shape[-1] - 1, norm, WIDTH["gru"], LONGEST)
    record = fit(
        model,
        data,
        lr=float(rate.removeprefix("lr")),
        epochs=run.epochs(),
        batch_size=run.budget["batch_size"],
    )
    by_length = []
    for length in LENGTHS:
        other = sequences.hidden_images(
            run.data.first(0, len(run.data.test_x)),
            1000 * (run.seed + 1) + length,  # none of the sequences of training
            shortest=length,
            longest=length,
            steps=STEPS,
        )
        by_length.append(evaluate(model, other.test_x, other.test_y).accuracy)
    change = {
        f"change_{mode}": sequences.padding_dependence(
            model, data.test_x[:64], STEPS, training=mode == "training"
        )
        for mode in ("training", "evaluation")
    }
    keys = ("train_loss", "test_accuracy")
    return {**{key: record[key] for key in keys}, "by_length": by_length, **change}


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The seven criteria of the thresholds above."""
    found = _effects(results)
    conv, trained, longer, none, changed, unchanged, cost = found.values()
    return decide(
        [
            Criterion(conv, -MARGIN),
            Criterion(trained, MARGIN),
            Criterion(longer, MARGIN),
            Criterion(none, -MARGIN),
            Criterion(changed, CHANGED),
            Criterion(unchanged, -UNCHANGED),
            Criterion(cost, MARGIN),
        ],
        f"In the convolutional network batch norm is {_ahead(conv)} layer norm. In the recurrent "
        f"one layer norm is {_ahead(trained)} batch norm at the lengths of training, "
        f"{_ahead(longer)} it at longer ones, and {_ahead(none)} no norm. Unmasked padding changes "
        f"the outputs of batch norm in training by {number(changed.estimate)} %, masked by "
        f"{number(abs(unchanged.estimate))} %; at the end the mask is {_ahead(cost)} no mask.",
    )


def _ahead(effect: Effect) -> str:
    side = "ahead of" if effect.estimate >= 0 else "behind"
    return f"{number(abs(effect.estimate))} points {side}"


def _tuned(
    results: Results, kind: str, norms: Sequence[str], seeds: Sequence[int]
) -> tuple[list[str], list[float]]:
    """The variant chosen for each seed and its accuracy at the lengths of training."""
    variants = [f"{kind}-{norm}-lr{rate:g}" for norm in norms for rate in RATES[kind]]
    return comparison.tuned(results, variants, seeds)


def _longer(results: Results, norms: Sequence[str], seeds: Sequence[int]) -> list[float]:
    """The recurrent network's mean accuracy over the lengths above those of training."""
    chosen = _tuned(results, "gru", norms, seeds)[0]
    rows = [results.records[pair]["by_length"] for pair in zip(chosen, seeds, strict=True)]
    above = np.array(LENGTHS) > LONGEST
    return [float(100 * np.array(row)[above].mean()) for row in rows]


def _change(results: Results, norm: str, seeds: Sequence[int]) -> list[float]:
    """Percent of the outputs that more padding changes, in training mode."""
    chosen = _tuned(results, "conv", [norm], seeds)[0]
    changes = [results.records[p]["change_training"] for p in zip(chosen, seeds, strict=True)]
    return [100.0 if change is None else 100 * change for change in changes]


def _effects(results: Results) -> dict[str, Effect]:
    seeds = results.seeds(*EXPERIMENT.variants)
    accuracy = {
        (kind, norms): _tuned(results, kind, norms, seeds)[1]
        for kind in NORMS
        for norms in [*((norm,) for norm in NORMS[kind]), *([BEST_BATCH] * (kind == "gru"))]
    }
    zeros = [0.0] * len(seeds)
    recurrent, points = "recurrent, layer − batch", "points"
    return {
        "conv": paired_effect(
            "convolutional, batch − layer",
            accuracy["conv", ("batch",)],
            accuracy["conv", ("layer",)],
            points,
        ),
        "trained": paired_effect(
            f"{recurrent}, lengths of training",
            accuracy["gru", ("layer",)],
            accuracy["gru", BEST_BATCH],
            points,
        ),
        "longer": paired_effect(
            f"{recurrent}, longer",
            _longer(results, ["layer"], seeds),
            _longer(results, BEST_BATCH, seeds),
            points,
        ),
        "none": paired_effect(
            "recurrent, layer − none",
            accuracy["gru", ("layer",)],
            accuracy["gru", ("none",)],
            points,
        ),
        "changed": paired_effect(
            "outputs changed by padding, no mask", _change(results, "padded", seeds), zeros, "%"
        ),
        "unchanged": paired_effect(
            "the same with the mask, negative", zeros, _change(results, "batch", seeds), "%"
        ),
        "cost": paired_effect(
            "convolutional, with mask − without",
            accuracy["conv", ("batch",)],
            accuracy["conv", ("padded",)],
            points,
        ),
    }


SIDES = {
    "none": ("no norm", report.GREY, True),
    "layer": ("layer norm", report.GREEN, False),
    "batch": ("batch norm, masked", report.BLUE, False),
    "steps": ("batch norm, masked, a set a step", report.PURPLE, False),
    "padded": ("batch norm, padding enters", report.VERMILLION, True),
}
KINDS = {"gru": "Recurrent", "conv": "Convolutional"}


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """Accuracy by length, and what padding does."""
    effects = _effects(results)
    labels = {
        "conv": "Convolutional, batch − layer",
        "trained": "Recurrent, layer − batch, lengths of training",
        "longer": "Recurrent, layer − batch, longer",
        "cost": "Convolutional, mask − no mask",
    }
    cards = [
        report.Card(label, number(effects[key].estimate, "points"), interval(effects[key]))
        for key, label in labels.items()
    ]
    changed = effects["changed"]
    cards.insert(
        3,
        effect_card("Outputs changed by padding, no mask", changed),
    )
    return cards, [_lengths_section(results), _training_section(results)]


def _lengths_section(results: Results) -> report.Section:
    seeds = results.seeds(*EXPERIMENT.variants)
    rows = [
        [KINDS[kind], SIDES[norm][0], *_row(results, kind, norm, seeds)]
        for kind in KINDS
        for norm in NORMS[kind]
    ]
    return report.Section(
        "Accuracy at each length",
        [
            f"Trained on lengths from {SHORTEST} to {LONGEST}, the grey area; tested there and "
            "beyond. Each norm at its tuned rate.",
            report.Figure(
                "lengths",
                [_lengths_panel(results, kind, seeds) for kind in KINDS],
                f"Line: median of {len(seeds)} seeds; band: from the lowest to the highest.",
                [report.Key(*side) for side in SIDES.values()],
                columns=2,
            ),
            report.Table(
                [
                    "network",
                    "norm",
                    "rate",
                    "accuracy",
                    f"above {LONGEST} steps",
                    "padding, training",
                    "padding, evaluation",
                ],
                rows,
                "Medians over seeds at the tuned rate: test accuracy at the lengths of training "
                "and above, and how much of the outputs changes when the padding grows from "
                f"{STEPS} − length to {2 * STEPS} − length steps, by the mode.",
                text_columns=2,
            ),
        ],
    )


def _lengths_panel(results: Results, kind: str, seeds: Sequence[int]) -> Canvas:
    canvas, axes = report.panel("length of the sequence (steps)", "test accuracy (%)", KINDS[kind])
    axes.axvspan(SHORTEST, LONGEST, color=report.GREY, alpha=0.12, linewidth=0)
    lines = {}
    for norm in NORMS[kind]:
        chosen = _tuned(results, kind, [norm], seeds)[0]
        pairs = zip(chosen, seeds, strict=True)
        lines[norm] = [[100 * a for a in results.records[pair]["by_length"]] for pair in pairs]
    lowest = min(min(row) for rows in lines.values() for row in rows)
    axes.set_ylim(max(0, lowest - 3), 101)
    for norm, by_seed in lines.items():
        _, color, dashed = SIDES[norm]
        curves(axes, LENGTHS, by_seed, color, dashed=dashed)
    axes.set_xticks(LENGTHS)
    return canvas


def _row(results: Results, kind: str, norm: str, seeds: Sequence[int]) -> list[str]:
    chosen, accuracy = _tuned(results, kind, [norm], seeds)
    records = [results.records[pair] for pair in zip(chosen, seeds, strict=True)]
    above = np.array(LENGTHS) > LONGEST
    longer = [100 * np.array(record["by_length"])[above].mean() for record in records]
    changes = [
        [100.0 if r[key] is None else 100 * r[key] for r in records]
        for key in ("change_training", "change_evaluation")
    ]
    return [
        ", ".join(sorted({variant.rpartition("lr")[2] for variant in chosen})),
        f"{np.median(accuracy):.1f} %",
        f"{np.median(longer):.1f} %",
        *(number(float(np.median(change)), "%") for change in changes),
    ]


def _training_section(results: Results) -> report.Section:
    seeds = results.seeds(*EXPERIMENT.variants)
    epochs = range(1, results.budget["epochs"] + 1)
    panels = []
    for kind, title in KINDS.items():
        canvas, axes = report.panel("epoch", "test accuracy (%)", title)
        axes.set(ylim=(0, 103), xlim=(1, max(len(epochs), 2)))
        for norm in NORMS[kind]:
            _, color, dashed = SIDES[norm]
            pairs = zip(_tuned(results, kind, [norm], seeds)[0], seeds, strict=True)
            rows = [results.records[pair]["test_accuracy"] for pair in pairs]
            curves(axes, epochs, [[100 * a for a in row] for row in rows], color, dashed=dashed)
        panels.append(canvas)
    return report.Section(
        "Training",
        [
            report.Figure(
                "training",
                panels,
                "At the lengths of training, each norm at its tuned rate. Line: median over "
                "seeds; band: all seeds.",
                [report.Key(*side) for side in SIDES.values()],
                columns=2,
            )
        ],
    )
