"""Gradient accumulation over micro-batches.

Where a batch does not fit into memory, its loss is a sum over parts, and so is the gradient:

    ∇L = Σ n_k/n · ∇L_k        over micro-batches k of n_k images

True as long as an image's output does not depend on which other images are there. Batch norm's
does: in a micro-batch of 4 it is normalized with the statistics of 4, and the gradient flows
through those. What accumulation then sums are gradients of another function, with noisier outputs.
Besides, the running statistics move once a micro-batch instead of once a step.

    large       the batch at once: what accumulation is meant to be
    plain       micro-batches one after the other, gradients summed
    statistics  the same in `normally.accumulate`: the running statistics move once a step
    exact       `normally.accumulate(exact=True)`: all micro-batches wait at each norm and are
                normalized together, at the memory of the large batch
    small       no accumulation: a step each micro-batch, learning rate smaller in proportion

The control is layer norm, which no micro-batch can change. `exact` is another: if it trains like
the large batch, then the statistics are all that accumulation changes.

Trial runs with seeds 101 and 102 chose the learning rate's order of magnitude and the micro-batch:
with 2 images a dense layer's batch norm gives ±1 and hardly learns at all (see `batch-size`), and
with 8 the differences are smaller than with 4. The rate decays, so that running statistics which
lag (see `train-eval`) do not blur the comparison.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normally
from normally import report
from normally.lab import comparison
from normally.lab.data import Dataset
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.networks import lenet
from normally.lab.page import effect_card, number
from normally.lab.training import evaluate
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

BATCH, MICRO, RATE = 64, 4, 0.3
ERROR, DECADES, LOST = 0.1, 9.0, 1.0
# Norm, way, and images of a micro-batch.
VARIANTS = {
    "large": ("batch", "large", BATCH),
    "plain": ("batch", "plain", MICRO),
    "statistics": ("batch", "statistics", MICRO),
    "exact": ("batch", "exact", MICRO),
    "small": ("batch", "small", MICRO),
    "plain-16": ("batch", "plain", 16),
    "layer-large": ("layer", "large", BATCH),
    "layer-plain": ("layer", "plain", MICRO),
}

EXPERIMENT = Experiment(
    name="accumulation",
    title="Gradient accumulation is not a large batch",
    claim="With batch normalization, gradient accumulation over micro-batches is not the large "
    "batch: its gradient is another one, and it trains to a lower test accuracy.",
    source="Common question of users; the cause is in Ioffe & Szegedy 2015, arXiv:1502.03167, "
    "section 3: the statistics are those of what is normalized together",
    prediction=f"Accumulated over micro-batches of {MICRO}, the gradient differs by more than a "
    "tenth of its length with batch norm and by rounding with layer norm, and the trained network "
    "is worse. Normalized together, the micro-batches give the large batch's gradient.",
    protocol=[
        f"LeNet with ReLU and batch norm after its four hidden layers; {BATCH} images a step, "
        f"micro-batches of {MICRO} (16 beside it), SGD, learning rate {RATE:g} decayed to 0 along "
        f"a cosine by epoch; `small` takes a step every {MICRO} images at {MICRO}/{BATCH} of it. "
        "The same weights and the same images in the same order on all sides.",
        f"Gradient: of the first {BATCH} training images before the first step, in float64; error: "
        "length of the difference from the large batch's, over the length of that.",
        "Test accuracy after the last epoch with the running statistics; beside it after "
        "`normally.recalibrate` over the training images.",
        "Controls: layer norm, large and accumulated; micro-batches normalized together.",
    ],
    thresholds=[
        f"Plain accumulation: the gradient's error is at least {ERROR:g}.",
        f"With layer norm, and with the micro-batches normalized together, it is at least "
        f"{DECADES:g} decades below 1: two criteria.",
        f"The large batch ends at least {LOST:g} percentage points of test accuracy above plain "
        "accumulation.",
        "The claim holds if all four hold, and fails if one fails.",
    ],
    variants=list(VARIANTS),
    budgets={"quick": {"seeds": 3, "epochs": 6}, "full": {"seeds": 15, "epochs": 20}},
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """The gradient's error, then the training."""
    norm, way, micro = VARIANTS[run.variant]
    model = lenet(run.data.train_x.shape[-1], norm=norm)
    record: Record = {"train_loss": [], "test_accuracy": []}
    if way != "small":
        record["error"] = gradient_error(model, run.data, way, micro)
    batch, rate = (micro, RATE * micro / BATCH) if way == "small" else (BATCH, RATE)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for epoch in run.epochs():
        decay = (1 + math.cos(math.pi * epoch / run.budget["epochs"])) / 2
        optimizer.param_groups[0]["lr"] = rate * decay
        record["train_loss"].append(_epoch(model, optimizer, run.data, way, micro, batch))
        score = evaluate(model, run.data.test_x, run.data.test_y)
        record["test_accuracy"].append(score.accuracy)
    if norm == "batch":
        normally.recalibrate(model, run.data.train_x.split(BATCH), progress=False)
        score = evaluate(model, run.data.test_x, run.data.test_y)
    record["recalibrated"] = score.accuracy
    return record


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Dataset,
    way: str,
    micro: int,
    batch: int,
) -> float:
    """One pass over the images of whole large batches; the mean loss, infinite once it is."""
    model.train()
    order = torch.randperm(len(data.train_x))
    losses = []
    with _context(model, way, micro) as together:
        for images in order[: len(order) // BATCH * BATCH].split(batch):
            optimizer.zero_grad()
            x, y = data.train_x[images], data.train_y[images]
            losses.append(_backward(model, x, y, micro, together if way == "exact" else None))
            if not math.isfinite(losses[-1]):
                return math.inf
            optimizer.step()
    return math.fsum(losses) / len(losses)


def _context(model: nn.Module, way: str, micro: int) -> contextlib.AbstractContextManager[Any]:
    """What a training step of this way runs in."""
    if way == "statistics":
        return normally.accumulate(model, BATCH // micro)
    if way == "exact":
        return normally.accumulate(model, BATCH // micro, exact=True)
    return contextlib.nullcontext()


def _backward(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    micro: int,
    together: Callable[[list[Tensor]], Sequence[Tensor]] | None,
) -> float:
    """Leave the gradient of the mean loss over all of x, a micro-batch at a time or together."""
    parts = x.split(micro)
    if together is not None:
        loss = F.cross_entropy(torch.cat(list(together(list(parts)))), y)
        loss.backward()
        return float(loss.item())
    losses: list[float] = []
    for part, target in zip(parts, y.split(micro), strict=True):
        loss = F.cross_entropy(model(part), target) * (len(part) / len(x))
        loss.backward()
        losses.append(loss.item())
    return math.fsum(losses)


def gradient_error(model: nn.Module, data: Dataset, way: str, micro: int) -> float:
    """Of the first images' gradient in float64, from the large batch's, as a part of its length."""
    x, y = data.train_x[:BATCH].double(), data.train_y[:BATCH]
    gradients = []
    for size, kind in ((BATCH, "large"), (micro, way)):
        twin = copy.deepcopy(model).double().train()
        with _context(twin, kind, size) as together:
            _backward(twin, x, y, size, together if kind == "exact" else None)
        gradients.append(nn.utils.parameters_to_vector(_gradient(p) for p in twin.parameters()))
    large, found = gradients
    return float(((found - large).norm() / large.norm()).item())


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # after backward
    return parameter.grad


def _effects(results: Results) -> tuple[Effect, Effect, Effect, Effect]:
    seeds = results.seeds(*VARIANTS)
    nothing = [0.0] * len(seeds)
    large, plain = (comparison.final_accuracy(results, v, seeds) for v in ("large", "plain"))
    return (
        paired_effect(
            "error of the gradient, plain", results.get("plain", "error", seeds), nothing
        ),
        paired_effect(
            "layer norm: error below 1", _decades(results, "layer-plain", seeds), nothing, "decades"
        ),
        paired_effect(
            "together: error below 1", _decades(results, "exact", seeds), nothing, "decades"
        ),
        paired_effect("test accuracy, large − plain", large, plain, "points"),
    )


def _decades(results: Results, variant: str, seeds: list[int]) -> list[float]:
    """Exactly 0 counts as 1e-17, below which float64's sums know nothing."""
    return [-math.log10(max(error, 1e-17)) for error in results.get(variant, "error", seeds)]


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The four criteria of the thresholds above."""
    error, layer, together, lost = _effects(results)
    return decide(
        [
            Criterion(error, ERROR),
            Criterion(layer, DECADES),
            Criterion(together, DECADES),
            Criterion(lost, LOST),
        ],
        f"Accumulated over micro-batches of {MICRO}, the gradient is off by "
        f"{number(100 * error.estimate)} % of its length with batch norm, by "
        f"10^{number(-layer.estimate)} with layer norm, and by 10^{number(-together.estimate)} "
        "with batch norm over all micro-batches together. The large batch's test accuracy is "
        f"{number(abs(lost.estimate))} points {'higher' if lost.estimate >= 0 else 'lower'} than "
        "plain accumulation's.",
    )


SIDES = {
    "large": comparison.Side("large", f"large batch of {BATCH}", report.BLUE),
    "exact": comparison.Side("exact", "normalized together", report.GREEN, dashed=True),
    "plain": comparison.Side("plain", "plain accumulation", report.VERMILLION),
    "statistics": comparison.Side("statistics", "statistics once a step", report.PURPLE, True),
    "small": comparison.Side("small", "small batch, a step each", report.ORANGE),
}


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """Curves, then what the gradient says."""
    error, _, together, lost = _effects(results)
    cards = [
        effect_card("Error of the plain gradient", error),
        effect_card("Normalized together: error below 1", together),
        effect_card("Test accuracy, large − plain", lost),
    ]
    layer = [
        comparison.Side("layer-large", SIDES["large"].label, report.BLUE),
        comparison.Side("layer-plain", SIDES["plain"].label, report.VERMILLION),
    ]
    sixteen = comparison.Side("plain-16", SIDES["plain"].label, report.VERMILLION)
    panels = [
        (f"batch norm, micro-batches of {MICRO}", list(SIDES.values())),
        ("batch norm, of 16", [SIDES["large"], sixteen]),
        (f"layer norm, of {MICRO}", layer),
    ]
    return cards, [
        comparison.section(
            results,
            "Training with micro-batches",
            f"Every step but those of the small batch is of the same {BATCH} images. Statistics "
            "once a step: `normally.accumulate`, which repairs the running statistics and leaves "
            "the gradient as it is.",
            panels,
            bottom=_bottom(results),
        ),
        _gradient_section(results),
    ]


def _bottom(results: Results) -> float:
    """Below all accuracies but those of the first epoch, which are of no interest here."""
    rows = [row[1:] or row for v in VARIANTS for row in results.get(v, "test_accuracy")]
    return max(0.0, 100 * float(np.min(rows)) - 5)


def _gradient_section(results: Results) -> report.Section:
    labels = {
        "plain": f"batch norm, {MICRO} images",
        "plain-16": "batch norm, 16 images",
        "exact": f"batch norm, {MICRO} images, together",
        "layer-plain": f"layer norm, {MICRO} images",
    }
    colors = (report.VERMILLION, report.VERMILLION, report.GREEN, report.BLUE)
    canvas, axes = report.panel("error of the gradient (1 = its length)", "", width=6.4, height=2.6)
    for row, (variant, color) in enumerate(zip(labels, colors, strict=True)):
        errors = [max(e, 1e-17) for e in results.get(variant, "error")]
        axes.plot(errors, [row] * len(errors), "o", color=color, markersize=7, alpha=0.7)
    axes.set(xscale="log", xlim=(1e-17, 10), ylim=(len(labels) - 0.5, -0.5))
    axes.set_yticks(range(len(labels)), list(labels.values()))
    axes.grid(False, axis="y")
    rows = []
    for variant in (v for v in VARIANTS if VARIANTS[v][0] == "batch"):
        last = comparison.final_accuracy(results, variant, results.seeds(variant))
        again = [100 * value for value in results.get(variant, "recalibrated")]
        rows.append([variant, f"{np.mean(last):.1f} %", f"{np.mean(again):.1f} %"])
    return report.Section(
        "The gradient, and the running statistics",
        [
            "In float64 rounding is at 10^-16: what is far above it is another gradient.",
            report.Figure(
                "gradient-error",
                [canvas],
                f"Error of the accumulated gradient of {BATCH} images before the first step, from "
                "that of the large batch; a dot a seed, and 0 is drawn at the left edge.",
                columns=1,
            ),
            report.Table(
                ["batch norm", "running statistics", "recalibrated"],
                rows,
                "Test accuracy after the last epoch, mean over seeds. What recalibrating changes "
                "is the statistics' part; what is left is the training's.",
            ),
        ],
    )
