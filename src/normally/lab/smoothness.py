"""How smooth a loss is along its own gradient (Santurkar et al. 2018, arXiv:1805.11604, section 3).

From the weights w, with the gradient g of the loss L there, for step lengths t

    w(t) = w - t·g

- the range of the loss: the largest less the smallest L(w(t)), the start included;
- the change of the gradient: the largest ‖∇L(w(t)) - g‖;
- the effective β-smoothness: the largest ‖∇L(w(t)) - g‖ / ‖w(t) - w‖, a lower bound of the
  gradient's Lipschitz constant. For L = ½ wᵀAw it is ‖Ag‖/‖g‖ whatever the step lengths.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Smoothness:
    """The loss at the start, the gradient's length there, and the three measures.

    All are infinite where a loss or a gradient on the way is not finite.
    """

    loss: float
    gradient: float
    loss_range: float
    gradient_change: float
    beta: float


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Euclidean, between two lists of tensors taken as one vector each; summed in float64."""
    return length([p.detach().double() - q.double() for p, q in zip(a, b, strict=True)])


def length(a: Sequence[Tensor]) -> float:
    """Euclidean, of a list of tensors taken as one vector; summed in float64."""
    return torch.stack([p.double().square().sum() for p in a]).sum().sqrt().item()


def along_gradient(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    steps: Sequence[float],
    *,
    distances: bool = False,
) -> Smoothness:
    """Move against the gradient by each step length in turn, and come back.

    Args:
        loss: of the parameters as they are.
        parameters: leaves that require a gradient; moved in place, and put back bit for bit.
        steps: what the gradient is multiplied by, above 0.
        distances: the steps are lengths in weight space instead, whatever the gradient's.
    """
    start = [p.detach().clone() for p in parameters]
    value = loss()
    gradient = torch.autograd.grad(value, list(parameters))
    losses, changes, slopes = [value.item()], [], []
    unit = length(gradient) if distances else 1.0
    for step in [step / unit if unit else 0.0 for step in steps]:
        _put(parameters, [p - step * g for p, g in zip(start, gradient, strict=True)])
        value = loss()
        there = torch.autograd.grad(value, list(parameters))
        losses.append(value.item())
        changes.append(distance(there, gradient))
        # What was moved in floating point, not step · ‖g‖: they differ for tiny steps.
        moved = distance(parameters, start)
        slopes.append(changes[-1] / moved if moved else 0.0)
    _put(parameters, start)
    if not all(map(math.isfinite, [*losses, *changes, *slopes])):
        return Smoothness(math.inf, math.inf, math.inf, math.inf, math.inf)
    return Smoothness(
        losses[0], length(gradient), max(losses) - min(losses), max(changes), max(slopes)
    )


def of_network(
    model: nn.Module, x: Tensor, y: Tensor, steps: Sequence[float], *, distances: bool = False
) -> Smoothness:
    """`along_gradient` of the cross-entropy of one batch in training mode.

    On a copy: batch norm's running statistics do not see what was only tried.
    """
    model = copy.deepcopy(model).train()
    return along_gradient(
        lambda: F.cross_entropy(model(x), y),
        [p for p in model.parameters() if p.requires_grad],
        steps,
        distances=distances,
    )


@torch.no_grad()
def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
