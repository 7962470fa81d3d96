"""How far the layers of a network move under each other: their inputs, and their gradients.

Two measures of internal covariate shift: of the name's own meaning, the distance between the
distributions of a layer's inputs, and of Santurkar et al. 2018 (arXiv:1805.11604, definition 2.1),
the change of a layer's gradient when the layers before it step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QUANTILES = 100


def _weighted(model: nn.Sequential) -> list[int]:
    """Where the layers with weights are."""
    return [k for k, layer in enumerate(model) if isinstance(layer, nn.Conv2d | nn.Linear)]


def gradient_shift(model: nn.Sequential, x: Tensor, y: Tensor, lr: float) -> dict[str, list[float]]:
    """How the gradient of each layer's weight changes when all layers before it step by SGD.

    On a copy in training mode. The first layer has none before it and is left out.

    Returns:
        A value a layer: "relative" ‖G' − G‖ / ‖G‖, "absolute" ‖G' − G‖, and the "cosine" of the
        angle between the two.
    """
    model = copy.deepcopy(model).train()
    places = _weighted(model)
    F.cross_entropy(model(x), y).backward()
    shifts: dict[str, list[float]] = {"relative": [], "absolute": [], "cosine": []}
    for before, place in pairwise(places):
        with torch.no_grad():  # what lies before `before` has stepped already
            for parameter in model[before:place].parameters():
                assert parameter.grad is not None  # after backward
                parameter.sub_(parameter.grad, alpha=lr)
        weight = cast(Tensor, model[place].weight)
        gradient = cast(Tensor, weight.grad)
        (after,) = torch.autograd.grad(F.cross_entropy(model(x), y), [weight])
        change = (after - gradient).norm().item()
        shifts["absolute"].append(change)
        shifts["relative"].append(change / max(gradient.norm().item(), 1e-30))
        cosine = F.cosine_similarity(after.flatten(), gradient.flatten(), dim=0)
        shifts["cosine"].append(cosine.item())
    return shifts


@torch.no_grad()
def layer_inputs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Quantiles of each unit's values as the layers after the first get them, (quantiles, units).

    In training mode, on a copy: with the batch's statistics and the noise of training.
    """
    model = copy.deepcopy(model).train()
    places, inputs = _weighted(model)[1:], []
    levels = (torch.arange(QUANTILES) + 0.5) / QUANTILES
    for place, layer in enumerate(model):
        if place in places:
            values = x.transpose(0, 1).flatten(1).sort(1).values
            inputs.append(values[:, (levels * values.shape[1]).long()].T.contiguous())
        x = layer(x)
    return inputs


def moved(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """`earth_mover` of each layer between two results of `layer_inputs`."""
    return [earth_mover(a, b) for a, b in zip(before, after, strict=True)]


def earth_mover(a: Tensor, b: Tensor) -> float:
    """Mean first Wasserstein distance of the units, in units of their spread in both.

    Args:
        a: quantiles by unit, `(quantiles, units)`.
        b: the same of the other. The spread is the root mean square of the standard deviation,
            over units and over both.
    """
    spread = torch.cat([a.var(0, unbiased=False), b.var(0, unbiased=False)]).mean().sqrt()
    return ((a - b).abs().mean() / spread.clamp_min(1e-30)).item()
