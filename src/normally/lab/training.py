"""The training loop of the experiments."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normally.lab.data import Dataset


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


def fit(
    model: nn.Module,
    data: Dataset,
    *,
    lr: float,
    epochs: Iterable[int],
    batch_size: int,
    batch_statistics: bool = False,
) -> dict[str, list[float]]:
    """Train with plain SGD and score the test images after every epoch.

    A loss that stops being finite ends its epoch, not the run: the record keeps its length, with
    an infinite training loss.

    Args:
        model: trained in place.
        data: what it learns and is tested on.
        lr: constant.
        epochs: `range(n)`, or `run.epochs()`, which moves the progress bar.
        batch_size: of the training, and of the test batches below.
        batch_statistics: score also with the statistics of each test batch.

    Returns:
        A list with a value an epoch: "train_loss", "test_loss", "test_accuracy", "batch_loss",
        "batch_accuracy"; the last two are empty without `batch_statistics`.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    keys = ("train_loss", "test_loss", "test_accuracy", "batch_loss", "batch_accuracy")
    record: dict[str, list[float]] = {key: [] for key in keys}
    for _ in epochs:
        record["train_loss"].append(train_epoch(model, optimizer, data, batch_size))
        score = evaluate(model, data.test_x, data.test_y)
        record["test_loss"].append(score.loss)
        record["test_accuracy"].append(score.accuracy)
        if batch_statistics:
            score = evaluate_with_batch_statistics(model, data.test_x, data.test_y, batch_size)
            record["batch_loss"].append(score.loss)
            record["batch_accuracy"].append(score.accuracy)
    return record


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
