"""Which batch norms of a model have running statistics that a verb can measure anew."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from .._evaluation import flag
from .._report import Change
from .._walk import Selection, walk


class BatchNorms(NamedTuple):
    """The layers by path, and a line for each that has statistics and is left."""

    layers: dict[str, torch.nn.Module]
    left: tuple[Change, ...]


def batch_norms(
    model: torch.nn.Module, only: Selection, skip: Selection, caller: str
) -> BatchNorms:
    """The batch norms that `only` and `skip` select and that move their statistics in training.

    Raises:
        ValueError: if there is none, or if a part of the model has not met its first input.
        TypeError: if `model` is no module.
    """
    layers: dict[str, torch.nn.Module] = {}
    left = []
    for path, module in walk(model, only, skip, caller):
        reason = _why_not(module, model.training)
        if reason is not None:
            left.append(Change(path, type(module).__name__, False, reason))
        elif isinstance(module, _BatchNorm):
            layers[path] = module
    _refuse_lazy(model, caller)
    if not layers:
        listed = "".join(f"\n  {change}" for change in left)
        raise ValueError(
            f"{caller}: model must have a batch norm with running statistics. Got "
            f"{type(model).__name__} with none" + (f" but{listed}" if left else ".")
        )
    return BatchNorms(layers, tuple(left))


def _why_not(module: torch.nn.Module, model_trains: bool) -> str | None:
    """Why statistics are left as they are; None for what has none or may be measured."""
    if isinstance(module, torch.jit.ScriptModule):
        scripted = module._c.hasattr("running_mean")
        return "it is scripted, and what it gets cannot be seen" if scripted else None
    if not isinstance(module, _BatchNorm):
        if not {"running_mean", "running_var"} <= module._buffers.keys():
            return None
        if not isinstance(module, _NormBase):
            return "it is frozen: its statistics are constants"
        tracks = module.running_mean is not None
        return "instance norm's are averages over samples, not over values" if tracks else None
    if module.running_mean is None or module.running_var is None:
        return "it keeps no running statistics"
    if model_trains and not module.training:
        return "it is frozen: it is in evaluation while the model is in training"
    if _stays_in_evaluation(module):
        return "it is frozen: train() leaves it in evaluation"
    return None


def _stays_in_evaluation(layer: torch.nn.Module) -> bool:
    flags = [(module, flag(module)) for module in layer.modules()]
    layer.train()
    stays = not layer.training
    for module, told in flags:
        module.training = told
    return stays


def _refuse_lazy(model: torch.nn.Module, caller: str) -> None:
    for path, module in model.named_modules():
        if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(
                f"{caller}: model must have met its first input. Got {path or 'the model itself'} "
                f"({type(module).__name__}), whose parameters are not made yet; call the model "
                "with one batch first."
            )
