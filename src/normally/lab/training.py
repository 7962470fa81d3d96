"""The small network of the experiments and its training loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normally.nn
from normally.lab.data import Dataset


def lenet(image_size: int, *, norm: bool, classes: int = 10) -> nn.Sequential:
    """LeNet (LeCun et al. 1998) with ReLU, with or without batch normalization.

    Convolution and linear layers are drawn as He et al. 2015 do for ReLU, biases are 0. Batch
    normalization draws nothing: from the same seed both forms start with the same weights. The
    biases in front of it stay for that reason; they cancel.

    Args:
        image_size: height and width of the grey images, divisible by 4.
        norm: put `normally.nn.BatchNorm` with fused ReLU in place of each ReLU.
        classes: number of outputs.
    """

    def activation(
        features: int, kind: type[normally.nn.BatchNorm1d] | type[normally.nn.BatchNorm2d]
    ) -> nn.Module:
        return kind(features, act="relu") if norm else nn.ReLU()

    flat = 16 * (image_size // 4) ** 2
    batch_norm_1d, batch_norm_2d = normally.nn.BatchNorm1d, normally.nn.BatchNorm2d
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        activation(6, batch_norm_2d),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5, padding=2),
        activation(16, batch_norm_2d),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(flat, 120),
        activation(120, batch_norm_1d),
        nn.Linear(120, 84),
        activation(84, batch_norm_1d),
        nn.Linear(84, classes),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return model


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one core: so small a network loses more to waiting threads than it gains."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset, batch_size: int
) -> float:
    """One pass over the training images in random order; the last, smaller batch is left out.

    Returns:
        The mean of the training loss over the steps, in nats; infinite once it is not finite.
    """
    model.train()
    order = torch.randperm(len(data.train_x))
    losses = []
    for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
        loss = F.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
        if not torch.isfinite(loss):
            return math.inf
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return math.fsum(losses) / len(losses)


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy in nats and accuracy between 0 and 1."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> Score:
    """Evaluation mode: batch normalization uses its running statistics."""
    model.eval()
    return _score(model(x), y)


@torch.no_grad()
def evaluate_with_batch_statistics(
    model: nn.Module, x: Tensor, y: Tensor, batch_size: int
) -> Score:
    """Training mode on a copy: each batch is normalized with its own statistics."""
    model = copy.deepcopy(model).train()
    outputs = [model(batch) for batch in x.split(batch_size)]
    return _score(torch.cat(outputs), y)


def _score(output: Tensor, y: Tensor) -> Score:
    hits = (output.argmax(1) == y).float().mean().item()
    return Score(F.cross_entropy(output, y).item(), hits)
