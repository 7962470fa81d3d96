"""From batch norm to SyncBatchNorm and back, in place: a layer changes its class, nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from ._origin import becoming, changed_by, family, go_back, own_members
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm
from .lazy_batch_norm import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d

_LAZY: tuple[type, ...] = (
    LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d,
    torch.nn.LazyBatchNorm1d, torch.nn.LazyBatchNorm2d, torch.nn.LazyBatchNorm3d,
)  # fmt: skip
_PLAIN: tuple[type, ...] = (
    BatchNorm1d, BatchNorm2d, BatchNorm3d,
    torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm,
)  # fmt: skip
_KNOWN = (*_PLAIN, *_LAZY)

_VERB = "sync"


def check_group(group: Any, name: str, caller: str) -> None:
    """Refuse what is neither None nor a process group."""
    if group is None:
        return
    if not torch.distributed.is_available():
        raise RuntimeError(f"{caller}: {name} needs torch.distributed, which this torch lacks.")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"{caller}: {name} must be a torch.distributed.ProcessGroup, as new_group() makes, or "
            f"None for the default group. Got {name}={group!r}."
        )


def convert(model: torch.nn.Module, group: Any, plain: type, lazy: type) -> torch.nn.Module:
    """See `normally.convert_sync_batchnorm`; `plain` and `lazy` are what the layers become."""
    caller = "convert_sync_batchnorm"
    _check_model(model, caller)
    check_group(group, "group", caller)
    found, reasons = [], []
    for path, module in model.named_modules():
        reason = _why_not(module)
        if reason is not None:
            reasons.append(f"{path or 'the model itself'} ({type(module).__name__}): {reason}")
        elif isinstance(module, TorchBatchNorm) and not _is_frozen(module):
            found.append(module)
    if reasons:  # before anything has changed
        raise TypeError(
            f"{caller}: model must have batch norms of known classes only. Got "
            + "; ".join(reasons)
            + ". Nothing was changed. Replace these layers, or convert the parts of the model that "
            "do not contain them."
        )
    for layer in found:
        if isinstance(layer, plain):
            if group is not None:
                layer.process_group = group
        else:
            _convert(layer, group, lazy if family(type(layer), _KNOWN) in _LAZY else plain)
    return model


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """See `normally.revert_sync_batchnorm`."""
    _check_model(model, "revert_sync_batchnorm")
    for layer in model.modules():
        go_back(layer, _VERB)
    return model


def _convert(layer: Any, group: Any, target: type) -> None:
    own_group = layer.__dict__.get("process_group")
    with becoming(layer, target, _VERB, owned=("process_group", "_path")):
        layer._start_count()
        layer.process_group = own_group if group is None else group


def _why_not(module: torch.nn.Module) -> str | None:
    """Why a module cannot be converted; None if it can, or is no batch norm."""
    if isinstance(module, torch.jit.ScriptModule):
        if module._c.hasattr("running_mean"):
            return "it is scripted; convert the model first and script it then"
        return None
    if not isinstance(module, TorchBatchNorm) or changed_by(module, _VERB) or _is_frozen(module):
        return None
    cls = type(module)
    # SyncBatchNorm and its lazy form, which have no place in the lists above.
    if isinstance(module, _BatchNorm) and hasattr(cls, "convert_sync_batchnorm"):
        return None
    if family(cls, _KNOWN) is None:
        if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
            return "it is sharded by itself; convert the model first and shard it then"
        own = ", ".join(own_members(cls, _KNOWN)) or "no known class"
        return f"a subclass with methods or attributes that SyncBatchNorm would not use ({own})"
    if "forward" in module.__dict__:
        return "its forward was replaced, and SyncBatchNorm's would not be called"
    return None


def _is_frozen(module: torch.nn.Module) -> bool:
    """Whether `normally.freeze` holds its statistics, so that there is nothing to share."""
    return getattr(module, "_has_frozen_statistics", False)


def _check_model(model: torch.nn.Module, caller: str) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module. Got {type(model).__name__}.")
