"""Training on several devices.

In data-parallel training every device has a part of the batch and a copy of the network; gradients
are averaged over the devices before each step. For most layers that gives the gradient of the whole
batch. Batch norm takes its statistics from what it has, which is the device's own part:

    whole batch of B images on D devices    →    every norm sees B/D images

However large B is, the batch that counts is B/D (see `batch-size`), and this is the gradient of
another function (see `accumulation`, where the parts come one after the other). Synchronized batch
norm exchanges sums between the devices, in the forward and in the backward, so that all normalize
with the statistics of the B images.

Here a device is a process on this machine with its own copy of the network: what is compared is
arithmetic, which does not depend on the device, and not speed. The processes are real ones, with
`torch.distributed` (gloo) and `DistributedDataParallel` between them.

Everything is in float64. In float32 rounding took the single device and the synchronized ones apart
by up to 1.7 points of test accuracy in trial runs with seeds 101 to 103, though they had started
together: that is the noise of any two trainings, and says nothing about the statistics. The trial
runs also chose the number of epochs, for the time that it takes. With 4 images a device no layer is
at the extreme of 2, where a dense layer's batch norm gives ±1. The learning rate decays, so that
running statistics that lag do not blur the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import normally
from normally import report
from normally.lab import comparison, process_group
from normally.lab.data import Dataset
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.figures import curves
from normally.lab.networks import lenet
from normally.lab.page import interval, number
from normally.lab.training import evaluate
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

DEVICES, IMAGES, RATE, STEPS = 4, 4, 0.1, 5
BATCH = DEVICES * IMAGES
ERROR, DECADES, LOST, MARGIN = 0.1, 9.0, 1.0, 1.5

EXPERIMENT = Experiment(
    name="multi-device",
    title="Batch normalization on several devices",
    claim="Training on several devices normalizes each device's part of the batch by itself, which "
    "costs accuracy where the parts are small; synchronized statistics give the result of a single "
    "device with the whole batch.",
    source="Readers of Dive into Deep Learning; common course material",
    prediction="With plain batch norm the weights differ from the single device's from the first "
    "step on, and the test accuracy is lower; with synchronized batch norm they are the same but "
    "for rounding.",
    protocol=[
        f"{DEVICES} processes with `DistributedDataParallel` over gloo, {IMAGES} images each, with "
        "normally's batch norm or, after `normally.convert_sync_batchnorm`, its synchronized one; "
        f"and one process with all {BATCH} images.",
        f"LeNet with ReLU and batch norm after its four hidden layers; SGD, learning rate "
        f"{RATE:g} decayed to 0 along a cosine by epoch; float64, one thread a process. The same "
        "weights and the same images in the same order on all sides.",
        f"First, {STEPS} steps on the first training images at the full rate: error of the "
        "weights, as length of the difference from the single device's over the length of the way "
        "these have gone.",
        "Test accuracy with the running statistics of the first device.",
    ],
    thresholds=[
        f"Plain: the error of the weights after {STEPS} steps is at least {ERROR:g}.",
        f"Synchronized: it is at least {DECADES:g} decades below 1.",
        f"A single device ends at least {LOST:g} percentage points of test accuracy above plain.",
        f"Synchronized ends neither {MARGIN:g} points below nor {MARGIN:g} above the single "
        "device: two criteria.",
        "The claim holds if all hold, and fails if one fails.",
    ],
    variants=["single", "devices"],
    budgets={
        "quick": {"seeds": 3, "epochs": 2, "train_images": 1024, "test_images": 1000},
        "full": {"seeds": 10, "epochs": 15, "train_images": 3600, "test_images": 10000},
    },
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """A single process here, or so many others, which train plain and then synchronized."""
    data = run.data.first(run.budget["train_images"], run.budget["test_images"])
    data = replace(data, train_x=data.train_x.double(), test_x=data.test_x.double())
    epochs = run.budget["epochs"]
    if run.variant == "single":
        return {"single": _train(run.seed, data, run.epochs(), epochs, False)}
    found, ways = process_group.run(DEVICES, _device, run.seed, data, epochs)[0]
    alone = _way(_model(run.seed, data, False), data)
    for side, way in ways.items():
        errors = [(a - b).norm() / b.norm() for a, b in zip(way, alone, strict=True)]
        found[side]["errors"] = [float(error.item()) for error in errors]
    return found  # type: ignore[no-any-return]


def _device(
    rank: int, seed: int, data: Dataset, epochs: int
) -> tuple[dict[str, Record], dict[str, list[Tensor]]]:
    """What each process does: records and first steps of both sides."""
    sides = {"plain": False, "synchronized": True}
    ways = {side: _way(_model(seed, data, sync), data) for side, sync in sides.items()}
    records = {
        side: _train(seed, data, range(epochs), epochs, sync) for side, sync in sides.items()
    }
    return records, ways


def _model(seed: int, data: Dataset, synchronized: bool) -> nn.Module:
    """The same weights for every side and process."""
    torch.manual_seed(seed)
    model: nn.Module = lenet(data.train_x.shape[-1], norm="batch").to(data.train_x.dtype)
    return normally.convert_sync_batchnorm(model) if synchronized else model


def _way(model: nn.Module, data: Dataset) -> list[Tensor]:
    """How far the weights are from their start after each of the first steps."""
    model.train()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    trained = _parallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    way = []
    for images in torch.arange(STEPS * BATCH).split(BATCH):
        _step(trained, optimizer, data, images)
        way.append(nn.utils.parameters_to_vector(model.parameters()).detach() - start)
    return way


def _parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if dist.is_initialized() else model


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset, images: Tensor
) -> float:
    """A step of this device's part of the batch; its loss."""
    part = images.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else images
    loss = F.cross_entropy(model(data.train_x[part]), data.train_y[part])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.item())


def _train(
    seed: int, data: Dataset, each: Iterable[int], epochs: int, synchronized: bool
) -> Record:
    """Train from the seed's weights; all devices draw the same order and take their part of it."""
    model = _model(seed, data, synchronized)
    trained = _parallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    record: Record = {"train_loss": [], "test_accuracy": []}
    for epoch in each:
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * epoch / epochs)) / 2
        trained.train()
        order = torch.randperm(len(data.train_x))
        losses = [
            _step(trained, optimizer, data, images)
            for images in order[: len(order) // BATCH * BATCH].split(BATCH)
        ]
        record["train_loss"].append(_mean_of_devices(math.fsum(losses) / len(losses)))
        # On one device alone: the others wait for it at the next step.
        if not dist.is_initialized() or dist.get_rank() == 0:
            record["test_accuracy"].append(evaluate(model, data.test_x, data.test_y).accuracy)
    return record


def _mean_of_devices(value: float) -> float:
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total.item()) / dist.get_world_size()


def _sides(results: Results) -> Results:
    """A variant each side, where the processes' records hold two."""
    records = {
        (side, seed): record
        for (variant, seed), sides in results.records.items()
        for side, record in sides.items()
    }
    return replace(results, records=records)


def _effects(results: Results) -> tuple[Effect, ...]:
    """Of a result with a variant a side."""
    seeds = results.seeds("single", "plain", "synchronized")
    nothing = [0.0] * len(seeds)
    plain, synchronized = (
        [row[-1] for row in results.get(v, "errors", seeds)] for v in ("plain", "synchronized")
    )
    # Exactly 0 counts as 1e-17, below which float64's sums know nothing.
    decades = [-math.log10(max(error, 1e-17)) for error in synchronized]
    alone, apart, together = (
        comparison.final_accuracy(results, v, seeds) for v in ("single", "plain", "synchronized")
    )
    name = "test accuracy, "
    return (
        paired_effect("plain: error of the weights", plain, nothing),
        paired_effect("synchronized: error below 1", decades, nothing, "decades"),
        paired_effect(name + "single − plain", alone, apart, "points"),
        paired_effect(name + "synchronized − single", together, alone, "points"),
        paired_effect(name + "single − synchronized", alone, together, "points"),
    )


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The five criteria of the thresholds above."""
    effects = _effects(_sides(results))
    error, decades, lost, kept, _ = effects
    at_least = (ERROR, DECADES, LOST, -MARGIN, -MARGIN)
    return decide(
        [Criterion(*pair) for pair in zip(effects, at_least, strict=True)],
        f"After {STEPS} steps the weights of plain batch norm on {DEVICES} devices are off by "
        f"{number(100 * error.estimate)} % of their way, those of the synchronized one by "
        f"10^{number(-decades.estimate)} of it. The single device's test accuracy is "
        f"{number(abs(lost.estimate))} points {'higher' if lost.estimate >= 0 else 'lower'} than "
        f"plain's; synchronized is {number(abs(kept.estimate))} points "
        f"{'higher' if kept.estimate >= 0 else 'lower'} than the single device.",
    )


SIDES = (
    comparison.Side("single", "single device, whole batch", report.BLUE),
    comparison.Side("synchronized", f"{DEVICES} devices, synchronized", report.GREEN, True),
    comparison.Side("plain", f"{DEVICES} devices, plain", report.VERMILLION),
)


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """Curves, then the weights of the first steps."""
    results = _sides(results)
    error, decades, lost, kept, _ = _effects(results)
    labels = (
        "Plain: error of the weights",
        "Synchronized: error below 1",
        "Test accuracy, single − plain",
        "Test accuracy, synchronized − single",
    )
    cards = [
        report.Card(label, number(effect.estimate, effect.unit), interval(effect))
        for label, effect in zip(labels, (error, decades, lost, kept), strict=True)
    ]
    rows = [row for side in SIDES for row in results.get(side.variant, "test_accuracy")]
    training = comparison.section(
        results,
        "Training on one device and on several",
        f"All sides take the same {BATCH} images a step. On {DEVICES} devices each has {IMAGES} of "
        "them.",
        [(f"{BATCH} images a step", SIDES)],
        bottom=max(0.0, 100 * float(np.min(rows)) - 5),
    )
    return cards, [training, _weights_section(results)]


def _weights_section(results: Results) -> report.Section:
    canvas, axes = report.panel("step", "error of the weights", width=5.6)
    axes.set(yscale="log", ylim=(1e-17, 1e2))
    steps = range(1, STEPS + 1)
    for side in SIDES[1:]:
        lines = [[max(e, 1e-17) for e in row] for row in results.get(side.variant, "errors")]
        curves(axes, steps, lines, side.color, dashed=side.dashed)
    return report.Section(
        "The first steps",
        [
            "Rounding in float64 is at 10^-16. What is far above it is another training.",
            report.Figure(
                "weights",
                [canvas],
                "Distance of the weights from those of a single device with the whole batch, over "
                f"the way these have gone. Line: median of {len(results.seeds('plain'))} seeds; "
                "band: all.",
                [report.Key(side.label, side.color, side.dashed) for side in SIDES[1:]],
                columns=1,
            ),
        ],
    )
