"""Entropy minimization over γ and β with batch statistics (Tent)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._batches import Batches
from ._evaluation import evaluation
from ._statistics.tap import Answer, has_variance, tapped, values_of


class Descent(NamedTuple):
    """What a minimization came to."""

    steps: int
    #: Mean entropy of the predictions of the first and of the last step, in nats.
    first: float
    last: float


def minimize_entropy(
    model: torch.nn.Module,
    layers: Mapping[str, Any],
    batches: Batches,
    lr: float,
    steps: int,
    caller: str,
) -> Descent:
    """Let γ and β of the layers go down the entropy of the predictions, `steps` times a batch."""
    affine = [p for layer in layers.values() for p in (layer.weight, layer.bias)]
    learned = list(dict.fromkeys(p for p in affine if p is not None))  # layers may share them
    if not learned:
        raise ValueError(
            f"{caller}: model must have batch norms with a weight or a bias for method='tent', "
            "which learns them. Got none; method='adabn' needs none."
        )

    def see(path: str, x: Tensor, mask: Tensor | None) -> Answer:
        return "batch" if has_variance(layers[path], values_of(x, mask)) else "running"

    optimizer = torch.optim.Adam(learned, lr=lr)
    entropies: list[float] = []
    with evaluation(model), _learning(model, learned), tapped(layers, see), torch.enable_grad():
        for batch in batches.since(0):
            for _ in range(steps):
                loss = _entropy(batches.forward(batch), caller)
                gradients = torch.autograd.grad(loss, learned, allow_unused=True)
                for parameter, gradient in zip(learned, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                entropies.append(loss.item())
    if not entropies:
        raise ValueError(f"{caller}: data must have at least one batch. Got none.")
    return Descent(len(entropies), entropies[0], entropies[-1])


def _entropy(output: Any, caller: str) -> Tensor:
    """The mean entropy of the distributions whose logits are along dimension 1, in nats."""
    logits = _logits(output)
    if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.shape[1] < 2:
        raise TypeError(
            f"{caller}: model must give logits (N, classes, *) for method='tent'. "
            f"Got {tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__}; "
            "forward=lambda model, batch: ... can pick them."
        )
    logarithms = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    entropy = -(logarithms.exp() * logarithms).sum(1).mean()
    if not entropy.isfinite():
        raise ValueError(f"{caller}: model must give finite logits. Got an entropy of {entropy}.")
    return entropy


def _logits(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("logits")
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple | list) and output else output


@contextmanager
def _learning(model: torch.nn.Module, learned: list[Any]) -> Iterator[None]:
    """These parameters alone require a gradient; then all flags and gradients are as before."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    gradients = [(p, p.grad) for p in learned]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in learned:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
