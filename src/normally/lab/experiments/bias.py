"""A bias in front of batch normalization.

Batch normalization subtracts the batch's mean, and with it every constant that was added before:

    (x + b) - mean(x + b) = x - mean(x)

So the loss does not depend on b, the gradient of b is 0 but for rounding, and b stays where it
starts. In evaluation the running mean has learnt b as well. Layers are therefore built with
`bias=False` in front of batch norm; this experiment trains both forms.

The thresholds are those of the first run and were not changed. That run had a defect: its sides
started from different weights, as torch's constructors draw the biases too. It was repaired and
everything measured again; the verdict was the same.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from normally import report
from normally.lab import comparison
from normally.lab.experiment import Experiment, Record, Results, Run
from normally.lab.networks import lenet
from normally.lab.page import effect_card, number
from normally.lab.training import fit
from normally.lab.verdict import Criterion, Effect, Verdict, decide, paired_effect

MARGIN, DECADES = 1.5, 4.0

EXPERIMENT = Experiment(
    name="bias",
    title="A bias in front of batch normalization",
    claim="Removing the bias of the layers in front of batch normalization changes nothing.",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.2",
    prediction="The gradient of such a bias is rounding error, 10,000 times smaller than that of "
    "the weights beside it, and both networks end at the same test accuracy.",
    protocol=[
        "LeNet with `normally.nn.BatchNorm1d/2d` and ReLU after its four hidden layers; these "
        "layers with bias, drawn from N(0, 1) so that there is something to cancel, and without.",
        "Both sides start from the same weights and see the same batches of 64; plain SGD, "
        "learning rate 0.3, float32, one thread.",
        "Gradients: one batch of 64 training images before the first step; of the four hidden "
        "layers the one with the largest ratio of root mean square gradients, bias to weight.",
    ],
    thresholds=[
        f"The gradient of the bias is at least {DECADES:g} decades below that of the weight.",
        f"Final test accuracy without the bias is neither {MARGIN:g} percentage points lower nor "
        f"{MARGIN:g} higher: two criteria. Rounding takes the two sides apart, and about one "
        "image in a hundred lies at the border.",
        "The claim holds if all hold, and fails if one fails.",
    ],
    variants=["with", "without"],
    budgets={
        "quick": {"seeds": 3, "epochs": 10, "batch_size": 64},
        "full": {"seeds": 15, "epochs": 40, "batch_size": 64},
    },
)


@EXPERIMENT.measures
def measure(run: Run) -> Record:
    """Gradients first, then training."""
    batch_size = run.budget["batch_size"]
    model = lenet(run.data.train_x.shape[-1], norm="batch", bias=run.variant == "with")
    with torch.random.fork_rng(devices=[]):  # the order of the batches stays that of the other side
        for layer in _hidden(model):
            if layer.bias is not None:
                nn.init.normal_(layer.bias)
    x, y = run.data.train_x[:batch_size], run.data.train_y[:batch_size]
    F.cross_entropy(model.train()(x), y).backward()
    ratios = [
        _size(layer.bias) / _size(layer.weight)
        for layer in _hidden(model)
        if layer.bias is not None
    ]
    record = fit(model, run.data, lr=0.3, epochs=run.epochs(), batch_size=batch_size)
    return {**record, "ratios": ratios}


def _size(parameter: torch.Tensor) -> float:
    """Root mean square of its gradient."""
    assert parameter.grad is not None  # after backward
    return parameter.grad.square().mean().sqrt().item()


def _hidden(model: nn.Sequential) -> list[nn.Conv2d | nn.Linear]:
    return [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)][:-1]


@EXPERIMENT.judges
def judge(results: Results) -> Verdict:
    """The three criteria of the thresholds above."""
    decades, lost, gained = _effects(results)
    return decide(
        [Criterion(decades, DECADES), Criterion(lost, -MARGIN), Criterion(gained, -MARGIN)],
        f"The gradient of the bias is 10^{-decades.estimate:.1f} times that of the weight. Without "
        f"the bias the test accuracy is {number(abs(lost.estimate))} points "
        f"{'higher' if lost.estimate >= 0 else 'lower'}.",
    )


def _effects(results: Results) -> tuple[Effect, Effect, Effect]:
    seeds = results.seeds("with", "without")
    # Exactly 0 is better than any number; float32 knows nothing below 1e-45.
    largest = [max(*row, 1e-45) for row in results.get("with", "ratios", seeds)]
    decades = paired_effect(
        "gradient of the bias below the weight's",
        [-math.log10(value) for value in largest],
        [0.0] * len(seeds),
        "decades",
    )
    with_, without = (comparison.final_accuracy(results, v, seeds) for v in ("with", "without"))
    name = "test accuracy, "
    return (
        decades,
        paired_effect(name + "without − with bias", without, with_, "points"),
        paired_effect(name + "with − without bias", with_, without, "points"),
    )


@EXPERIMENT.presents
def present(results: Results) -> tuple[list[report.Card], list[report.Section]]:
    """Two numbers and the curves."""
    decades, lost, _ = _effects(results)
    cards = [
        effect_card("Gradient of the bias below the weight's", decades),
        effect_card("Accuracy without − with bias", lost),
    ]
    sides = [
        comparison.Side("with", "with bias", report.VERMILLION, dashed=True),
        comparison.Side("without", "without bias", report.BLUE),
    ]
    return cards, [
        comparison.section(
            results,
            "Training with and without the bias",
            "The same weights, the same batches; the biases of one side start at random values.",
            [("learning rate 0.3", sides)],
        )
    ]
