"""Which normalization for my model and my batch size: `normally lab compare`.

An experiment like the others, but its model and data are the user's: a grid of normalization,
batch size and learning rate, put into the model by `normally.replace`. Every normalization gets
the same learning rates, and takes for each seed the one that did best with the other seeds; so it
is not judged by what it was chosen for.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import normally
import normally.nn

from . import compare_page, data
from .experiment import Experiment, Record, Run

MARGIN = 1.0  # percentage points that make a change worth while
Loaders = Callable[[int], tuple[Iterable[Any], Iterable[Any]]]


def make(
    factory: str,
    loaders: str,
    *,
    norms: Sequence[str] = ("batch", "layer", "group:8", "rms", "none"),
    batch_sizes: Sequence[int] = (4, 32, 128),
    lrs: Sequence[float] = (0.01, 0.1, 1.0),
    epochs: int = 5,
    seeds: int = 3,
) -> Experiment:
    """The experiment for a model.

    Args:
        factory: `module:function`; the function takes nothing and makes a classifier.
        loaders: the name of one of the lab's data sets, or `module:function`; the function takes
            the batch size and gives what to train on and what to test on: two iterables of
            (inputs, labels) that can be gone through again.
        norms: names that `normally.replace` knows, "none", or "own" for the model as it is. The
            first is what the others are compared with.
        batch_sizes: of the training.
        lrs: of SGD with momentum 0.9; the same grid for every norm and batch size.
        epochs: passes over the training data.
        seeds: of the weights and the order of the data.

    Raises:
        ValueError: if something is not there, or a norm cannot take the place of the model's.
    """
    if len(set(norms)) < 2 or not batch_sizes or not lrs:
        raise ValueError(
            "lab compare: norms must name two or more, batch_sizes and lrs one or more. "
            f"Got norms={list(norms)}, batch_sizes={list(batch_sizes)}, lrs={list(lrs)}."
        )
    grid = {
        compare_page.variant(norm, size, lr): {"norm": norm, "batch_size": size, "lr": lr}
        for norm, size, lr in itertools.product(norms, batch_sizes, lrs)
    }
    own = loaders not in data.NAMES
    settings = {
        "seeds": seeds,
        "epochs": epochs,
        "factory": factory,
        "loaders": loaders if own else None,
        "data": data.OWN if own else loaders,
        "grid": grid,
        "code": [_digest(name) for name in (factory, loaders) if ":" in name],
    }
    model = factory.rpartition(":")[2]
    experiment = Experiment(
        name=f"compare-{model}",
        title=f"Which normalization for {model}?",
        claim=f"Another normalization does better in this model than {norms[0]}.",
        source="asked of every model",
        prediction="None: this is a search. Batch norm usually leads where batches are large, and "
        "group or layer norm where they are small (Wu & He 2018, arXiv:1803.08494).",
        protocol=[
            f"Model: `{factory}`; its normalizations are replaced by `normally.replace`. Data: "
            f"`{loaders}`.",
            f"SGD with momentum 0.9, no weight decay, no schedule, cross-entropy; learning rates "
            f"{', '.join(f'{lr:g}' for lr in lrs)} for every normalization and batch size.",
            "For each seed a side takes the learning rate that was best with the other seeds.",
            "A model that cannot be trained, as batch norm of one value, counts as it was made.",
        ],
        thresholds=[
            f"At each batch size: the best of the others, chosen by the other seeds too, ends with "
            f"at least {MARGIN:g} percentage points more test accuracy than {norms[0]}.",
            "The claim holds if that is so at one batch size, and fails if it fails at every one.",
        ],
        variants=list(grid),
        budgets={"compare": settings},
        data=(data.OWN,) if own else (loaders,),
        command=f"normally lab compare {factory} --data {loaders} --norms {','.join(norms)} "
        f"--batch-sizes {','.join(map(str, batch_sizes))} "
        f"--lrs {','.join(f'{lr:g}' for lr in lrs)} --epochs {epochs} --seeds {seeds}",
    )
    experiment.measures(measure)
    experiment.judges(lambda results: compare_page.judge(results, MARGIN))
    experiment.presents(compare_page.present)
    return experiment


def remade(settings: Mapping[str, Any]) -> Experiment:
    """The experiment whose settings are on disk, to make its page again."""
    cells = list(settings["grid"].values())
    norms, sizes, lrs = (
        list(dict.fromkeys(cell[key] for cell in cells)) for key in ("norm", "batch_size", "lr")
    )
    return make(
        settings["factory"],
        settings["loaders"] or settings["data"],
        norms=norms,
        batch_sizes=sizes,
        lrs=lrs,
        epochs=settings["epochs"],
        seeds=settings["seeds"],
    )


def check(experiment: Experiment) -> None:
    """Make every model and one batch before hours are spent.

    Raises:
        ValueError: as `make`.
    """
    settings = experiment.budgets["compare"]
    for cell in settings["grid"].values():
        _model(settings["factory"], cell["norm"])
    if settings["loaders"] is not None:
        for size in sorted({cell["batch_size"] for cell in settings["grid"].values()}):
            train, test = _loaders(settings["loaders"], size)
            for part in (train, test):
                next(_pairs(part, settings["loaders"]))


def measure(run: Run) -> Record:
    """Train one norm at one batch size and learning rate."""
    settings, cell = run.budget, run.budget["grid"][run.variant]
    model = _model(settings["factory"], cell["norm"])
    if settings["loaders"] is None:
        train, test = _loaders_of(run.data, cell["batch_size"])
    else:
        train, test = _loaders(settings["loaders"], cell["batch_size"])
    optimizer = torch.optim.SGD(model.parameters(), lr=cell["lr"], momentum=0.9)
    record: Record = {"train_loss": [], "test_accuracy": [], "refused": ""}
    for _ in run.epochs():
        if not record["refused"]:
            try:
                loss = _epoch(model, optimizer, _pairs(train, settings["loaders"]))
            except ValueError as error:  # what a norm says of a batch that is too small
                record["refused"], loss = str(error), math.inf
        record["train_loss"].append(loss)
        record["test_accuracy"].append(_accuracy(model, _pairs(test, settings["loaders"])))
    return record


def _epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[tuple[Any, Tensor]]
) -> float:
    model.train()
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.inf
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return math.fsum(losses) / len(losses)


@torch.no_grad()
def _accuracy(model: nn.Module, batches: Iterator[tuple[Any, Tensor]]) -> float:
    model.eval()
    hits = [(model(x).argmax(1) == y).float() for x, y in batches]
    return torch.cat(hits).mean().item()


def _pairs(batches: Iterable[Any], name: str | None) -> Iterator[tuple[Any, Tensor]]:
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                f"lab compare: {name} must give batches of (inputs, labels). "
                f"Got {type(batch).__name__}."
            )
        yield batch[0], batch[1]


def _model(factory: str, norm: str) -> nn.Module:
    model = _find(factory)()
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"lab compare: {factory} must make a torch.nn.Module. Got {type(model).__name__}."
        )
    if norm == "own":
        return model
    return normally.replace(model, {"*": _rms if norm == "rms" else norm})


class ChannelsFirst(nn.Module):
    """A norm over the last dimension, for an input whose channels are dimension 1."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x."""
        output: Tensor = self.norm(x.movedim(1, -1))
        return output.movedim(-1, 1)


def _rms(old: Any) -> nn.Module:
    """RMS norm over the channels of each position, wherever they are."""
    channels = getattr(old, "num_features", getattr(old, "num_channels", None))
    if channels is None:
        return normally.nn.RMSNorm(old.normalized_shape)
    return ChannelsFirst(normally.nn.RMSNorm(channels))


def _loaders(name: str, batch_size: int) -> tuple[Iterable[Any], Iterable[Any]]:
    parts = _find(name)(batch_size)
    if not isinstance(parts, tuple | list) or len(parts) != 2:
        raise ValueError(
            f"lab compare: {name}(batch_size) must give two iterables, to train and to test."
        )
    return parts[0], parts[1]


def _loaders_of(dataset: data.Dataset, batch_size: int) -> tuple[Iterable[Any], Iterable[Any]]:
    train = TensorDataset(dataset.train_x, dataset.train_y)
    test = TensorDataset(dataset.test_x, dataset.test_y)
    return (
        DataLoader(train, batch_size, shuffle=True, drop_last=True),
        DataLoader(test, 256),
    )


def _find(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; the current folder counts, as with `python -m`."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"lab compare: {name!r} must be module:function that can be imported from here, or "
            f"data one of {', '.join(data.NAMES)}. {error}"
        ) from None
    if not callable(found):
        raise ValueError(f"lab compare: {name} must be a function. Got {type(found).__name__}.")
    result: Callable[..., Any] = found
    return result


def _digest(name: str) -> str:
    """Of the module's file: other code is another experiment."""
    module = sys.modules[_find(name).__module__]
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""
