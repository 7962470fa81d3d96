"""The training loop of the experiments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normally
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


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy in nats and accuracy between 0 and 1."""

    loss: float
    accuracy: float


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Dataset,
    batch_size: int,
    watch: Callable[[Tensor, Tensor], None] | None = None,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> Score:
    """One pass over the training images in random order; the last, smaller batch is left out.

    Args:
        model: trained in place.
        optimizer: of its parameters.
        data: what it learns.
        batch_size: of every step.
        watch: is called with the images and labels of each batch before the step that takes it.
        steps: so many batches instead of one pass: a part of a pass or several.
        generator: of the order, None being torch's own; with dropout, which draws too, sides share
            the order only so.

    Returns:
        The means over the steps, each taken before its update; an infinite loss once it is not
        finite, and the pass ends there.
    """
    model.train()
    scores = []
    for batch in _batches(len(data.train_x), batch_size, steps, generator):
        images, target = data.train_x[batch], data.train_y[batch]
        if watch is not None:
            watch(images, target)
        output = model(images)
        loss = F.cross_entropy(output, target)
        hits = (output.argmax(1) == target).float().mean().item()
        scores.append(Score(loss.item(), hits))
        if not math.isfinite(scores[-1].loss):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss_sum = math.fsum(s.loss for s in scores) if math.isfinite(scores[-1].loss) else math.inf
    return Score(loss_sum / len(scores), math.fsum(s.accuracy for s in scores) / len(scores))


def _batches(
    images: int, batch_size: int, steps: int | None, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Indices of whole batches; every pass is in an order of its own."""
    whole = max(images // batch_size, 1)
    steps = whole if steps is None else steps
    while steps > 0:
        order = torch.randperm(images, generator=generator)
        yield from order[: min(whole, steps) * batch_size].split(batch_size)
        steps -= whole


def fit(
    model: nn.Module,
    data: Dataset,
    *,
    lr: float,
    epochs: Iterable[int],
    batch_size: int,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_statistics: bool = False,
    watch: Callable[[Tensor, Tensor], None] | None = None,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, list[float]]:
    """Train with SGD and score the test images after every epoch.

    A loss that stops being finite ends its epoch, not the run: the record keeps its length, with
    an infinite training loss.

    Args:
        model: trained in place.
        data: what it learns and is tested on.
        lr: constant.
        epochs: `range(n)`, or `run.epochs()`, which moves the progress bar.
        batch_size: of the training, and of the test batches below.
        momentum: of SGD.
        weight_decay: of all parameters, as torch's SGD does it.
        batch_statistics: score also with the statistics of each test batch.
        watch: as in `train_epoch`.
        steps: of an epoch; None is one pass over the training images.
        generator: of the order of the images, as in `train_epoch`.

    Returns:
        A list with a value an epoch: "train_loss" and "train_accuracy" as met on the way,
        "test_loss", "test_accuracy", "batch_loss", "batch_accuracy"; the last two are empty without
        `batch_statistics`.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    keys = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    record: dict[str, list[float]] = {key: [] for key in (*keys, "batch_loss", "batch_accuracy")}
    for _ in epochs:
        score = train_epoch(model, optimizer, data, batch_size, watch, steps, generator)
        record["train_loss"].append(score.loss)
        record["train_accuracy"].append(score.accuracy)
        score = evaluate(model, data.test_x, data.test_y)
        record["test_loss"].append(score.loss)
        record["test_accuracy"].append(score.accuracy)
        if batch_statistics:
            score = evaluate_with_batch_statistics(model, data.test_x, data.test_y, batch_size)
            record["batch_loss"].append(score.loss)
            record["batch_accuracy"].append(score.accuracy)
    return record


def few(data: Dataset, train: int, test: int) -> Dataset:
    """The first training images; all others are test images, the training set's rest first."""
    return replace(
        data,
        train_x=data.train_x[:train],
        train_y=data.train_y[:train],
        test_x=torch.cat([data.train_x[train:], data.test_x])[:test],
        test_y=torch.cat([data.train_y[train:], data.test_y])[:test],
    )


def final_scores(model: nn.Module, data: Dataset) -> dict[str, float]:
    """Score the last weights with the batch norms' statistics of all training images, set in place.

    The running averages lag behind the weights, and accuracy bounces with them.

    Returns:
        "final_train", "final_test": accuracies in evaluation, so dropout is off.
    """
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        normally.recalibrate(model, data.train_x.split(600), progress=False)
    return {
        "final_train": evaluate(model, data.train_x, data.train_y).accuracy,
        "final_test": evaluate(model, data.test_x, data.test_y).accuracy,
    }


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
