"""What the tests of `recalibrate` and `adapt` share: models, and statistics by plain sums."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from normally import nn
from tests.helpers import assert_same_bits

FAMILIES = pytest.mark.parametrize("family", [torch.nn, nn], ids=["torch", "ours"])


def network(family: Any, dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    """Three batch norms in a row, with dropout between, on images (N, 3, 8, 8)."""
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), family.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(0.5),
        torch.nn.Conv2d(8, 8, 3), family.BatchNorm2d(8), torch.nn.Flatten(),
        torch.nn.Linear(8 * 16, 5), family.BatchNorm1d(5),
    ).to(dtype)  # fmt: skip


def images(n: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sorted by brightness: batches of neighbours differ."""
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return (x + torch.linspace(-2, 3, n).view(-1, 1, 1, 1)).to(dtype)


def rows(x: Tensor) -> Tensor:
    """(N, C, *) as float64 (values, C)."""
    return x.detach().double().movedim(1, -1).reshape(-1, x.shape[1])


def inputs(
    model: torch.nn.Module,
    batches: Iterable[Any],
    forward: Callable[[torch.nn.Module, Any], Any] = lambda model, x: model(x),
) -> dict[str, Tensor]:
    """All values that each batch norm gets, (values, C); the model is run as it is."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for path, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):

            def see(_: Any, args: tuple[Tensor, ...], path: str = path) -> None:
                found.setdefault(path, []).append(rows(args[0]))

            handles.append(layer.register_forward_pre_hook(see))
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(values) for path, values in found.items()}


def assert_population(layer: Any, values: Tensor, unbiased: bool = True) -> None:
    """The running statistics are those of the values, to the promise's 1e-6.

    Of the variance that is relative; the mean of values of both signs is relative to their size.
    """
    mean, var = values.mean(0), values.var(0, unbiased=unbiased)
    size = values.square().mean(0).sqrt()
    dtype = layer.running_mean.dtype
    allowed = max(1e-6, torch.finfo(dtype).eps)  # a half buffer rounds
    error = (layer.running_mean.double() - mean).abs() / size
    assert error.max() <= allowed, error
    error = (layer.running_var.double() - var).abs() / var
    assert error.max() <= allowed, error


def assert_own_population(model: torch.nn.Module, batches: Iterable[Any], **options: Any) -> None:
    """In evaluation every batch norm gets values whose statistics its running ones are."""
    model = copy.deepcopy(model).eval()
    found = inputs(model, batches, **options)
    assert found
    for path, values in found.items():
        assert_population(model.get_submodule(path), values)


class State:
    """Every bit of a model that a verb might touch."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._tensors = {
            name: (tensor, tensor.detach().clone())
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        self._attributes = {path: self._of(module) for path, module in model.named_modules()}

    @staticmethod
    def _of(module: torch.nn.Module) -> dict[str, Any]:
        plain = {n: v for n, v in vars(module).items() if not isinstance(v, dict)}
        return plain | {"hooks": len(module._forward_hooks) + len(module._forward_pre_hooks)}

    def assert_unchanged(self, but: tuple[str, ...] = ()) -> None:
        """The same tensors with the same bits, and the same attributes."""
        now = dict((*self._model.named_parameters(), *self._model.named_buffers()))
        assert now.keys() == self._tensors.keys()
        for name, (tensor, bits) in self._tensors.items():
            assert now[name] is tensor, name
            if not name.endswith(but or ("no name",)):
                assert_same_bits(tensor, bits, name)
        for path, module in self._model.named_modules():
            assert self._of(module) == self._attributes[path], path
