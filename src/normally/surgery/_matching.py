"""γ and β of new layers, so that they give what the old ones gave."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._batches import Batches
from ._dataflow.hooks import ours
from ._evaluation import evaluation
from ._replacing import channel_dim


class Fit(NamedTuple):
    """How far a new layer's output is from the old one's: √(Σ(y - ŷ)² / Σy²)."""

    before: float
    after: float


def fit(
    before: torch.nn.Module,
    model: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    old: Batches,
    new: Batches,
) -> dict[str, Fit]:
    """Fit the layers one after the other, each behind those that are fitted already.

        γ, β = argmin Σ (y - γ·x̂ - β)²   a channel, over all values of the data

    y is what the old layer gives in the old model, x̂ what the new one normalizes in the new model,
    both before the activation.

    Args:
        before: the model as it was.
        model: the model with the new layers.
        layers: the new layers by path.
        old: the data for `before`.
        new: the data for `model`.

    Returns:
        The deviations by path; of layers that the data does not come to there is none.
    """
    found = {}
    with evaluation(before), evaluation(model), torch.no_grad():
        for path in _order(before, layers, old):
            if not _can_be_fitted(layers[path]):
                continue
            sums = _sums(before.get_submodule(path), layers[path], old, new)
            if sums is not None:
                found[path] = _solve(layers[path], sums)
    return found


def _can_be_fitted(layer: Any) -> bool:
    """Whether γ and β are one number a channel, where there are any."""
    own = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    return all(t is None or (isinstance(t, Tensor) and t.dim() == 1) for t in own)


def _order(before: torch.nn.Module, layers: Mapping[str, Any], data: Batches) -> list[str]:
    """Paths in the order of first calls."""
    called: dict[str, None] = {}
    handles = [
        before.get_submodule(path).register_forward_pre_hook(
            ours(lambda *_, path=path: called.setdefault(path))
        )
        for path in layers
    ]
    try:
        for batch in data.since(0):
            data.forward(batch)
            break
    finally:
        for handle in handles:
            handle.remove()
    return list(called)


def _sums(old: Any, new: Any, olds: Batches, news: Batches) -> Tensor | None:
    """(6, C) float64: of 1, x̂, y, x̂², x̂·y and y²; None if there is nothing to add up."""
    total: Tensor | None = None
    for batch in news.since(0):  # of one pass: another may be shuffled otherwise
        with _listening(old) as ys, _listening(new, bare=True) as xs:
            olds.forward(batch)
            news.forward(batch)
        for x, y in zip(xs, ys, strict=True):
            x, y = (t.double().movedim(channel_dim(old), 0).flatten(1) for t in (x, y))
            one = torch.ones_like(x)
            sums = torch.stack([t.sum(1) for t in (one, x, y, x * x, x * y, y * y)])
            total = sums if total is None else total + sums
    return total


@contextmanager
def _listening(layer: Any, bare: bool = False) -> Iterator[list[Tensor]]:
    """What the layer gives without its activation in every call; `bare`: without γ and β too."""
    found: list[Tensor] = []

    def see(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        twin = copy.copy(module)
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        if isinstance(getattr(twin, "act", None), str):
            twin.__dict__.update(act=None, act_param=None)
        for name, fill in (("weight", 1.0), ("bias", 0.0)) if bare else ():
            for tensors in (twin._parameters, twin._buffers):
                if tensors.get(name) is not None:
                    tensors[name] = torch.full_like(tensors[name], fill)
        found.append(type(twin).forward(twin, *args, **kwargs))

    handle = layer.register_forward_hook(ours(see), with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _solve(layer: Any, sums: Tensor) -> Fit:
    """Set γ and β where the layer has them; what could not be fitted stays."""
    n, x, y, xx, xy, yy = sums
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    one, zero = torch.ones_like(n), torch.zeros_like(n)
    gamma = one if weight is None else weight.double()
    beta = zero if bias is None else bias.double()

    def distance(gamma: Tensor, beta: Tensor) -> float:
        # Σ(y - γx̂ - β)², written out
        squares = yy + gamma**2 * xx + beta**2 * n - 2 * (gamma * xy + beta * y - gamma * beta * x)
        return float((squares.clamp(min=0).sum() / yy.sum().clamp(min=1e-300)).sqrt())

    before = distance(gamma, beta)
    if weight is not None:
        mean_x, mean_y = (x / n, y / n) if bias is not None else (zero, zero)
        variance, covariance = xx - n * mean_x**2, xy - n * mean_x * mean_y
        fitted = covariance / variance
        # A channel that the new norm makes constant says nothing about γ.
        gamma = torch.where(variance > 1e-12 * n, fitted, zero if bias is not None else gamma)
        weight.copy_(gamma)
    if bias is not None:
        beta = (y - gamma * x) / n
        bias.copy_(beta)
    return Fit(before, distance(gamma, beta))
