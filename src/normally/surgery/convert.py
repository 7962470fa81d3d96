"""`convert` and `revert`: a model's normalization layers become ours, and what they were."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from ..nn._origin import becoming, changed_by, family, go_back, origins
from ..nn._skipped_updates import CountsSkippedUpdates
from . import _foreign
from ._counterparts import COUNTERPARTS, OURS
from ._report import Change, Report
from ._walk import Selection, check_model, walk

_VERB = "convert"


@overload
def convert(
    model: torch.nn.Module,
    *,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[False] = False,
) -> torch.nn.Module: ...
@overload
def convert(
    model: torch.nn.Module,
    *,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[True],
) -> tuple[torch.nn.Module, Report]: ...
def convert(
    model: torch.nn.Module,
    *,
    only: Selection = None,
    skip: Selection = None,
    return_report: bool = False,
) -> torch.nn.Module | tuple[torch.nn.Module, Report]:
    """Make the normalization layers of `model` ours, in place; the numbers stay the same.

    A layer stays the same object and changes its class. Parameters (an optimizer made before still
    holds them), buffers, state dict keys, hooks, the training flag and attributes of one's own
    stay, lazy layers stay lazy. `revert` takes it back, bit for bit.

    torch's layers become those of the same name. Layers of other libraries (timm's norms with an
    activation, layer norms over dimension 1, the RMS norms of Hugging Face's models) are recognized
    by what they compute: one that agrees with a formula of ours on random inputs, in the dtypes
    that it takes, gets a class derived from its own whose forward is ours. All others are left as
    they are, and the report says why.

    Args:
        model: any module, a normalization layer itself included.
        only: names, patterns ("layer4", "*.bn2", "BatchNorm2d") or a function of (path, module)
            that say which layers; a name selects what is inside of it, too.
        skip: the same for layers to leave.
        return_report: return `(model, report)`; the report has a line a layer.

    Returns:
        `model`.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if `only` names something that there is not.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> model, report = convert(model, return_report=True)
    >>> print(report)
    convert: 1 changed, 0 left as they were
      1  BatchNorm2d → normally.nn.BatchNorm2d
    """
    changes = []
    recognized: dict[Any, _foreign.Recipe] = {}
    for path, module in walk(model, only, skip, _VERB):
        change = convert_layer(path, module, recognized)
        if change is not None:
            changes.append(change)
    report = Report(_VERB, tuple(changes))
    return (model, report) if return_report else model


def convert_layer(
    path: str, module: torch.nn.Module, recognized: dict[Any, _foreign.Recipe]
) -> Change | None:
    """Convert one; a line of the report, and None if it is no normalization layer, or ours already.

    `recognized` keeps what foreign layers were found to be, for the next of their kind.
    """
    cls = type(module)
    if isinstance(module, OURS) or changed_by(module, _VERB):
        return None
    known = family(cls, tuple(COUNTERPARTS))
    if known is None and not _looks_like_a_norm(module):
        return None
    kind = cls.__name__
    reason = _why_not(module)
    if reason is not None:
        return Change(path, kind, False, reason)
    if known is None:
        try:
            return Change(path, kind, True, _foreign.convert(module, _VERB, recognized))
        except ValueError as error:
            return Change(path, kind, False, str(error))
    target = COUNTERPARTS[known]
    with becoming(module, target, _VERB, owned=("_path",)):
        if isinstance(module, CountsSkippedUpdates):
            module._start_count()
    return Change(path, kind, True, f"normally.nn.{target.__name__}")


def _looks_like_a_norm(module: torch.nn.Module) -> bool:
    """Whether it is worth a line in the report."""
    if isinstance(module, tuple(COUNTERPARTS)):
        return True
    if "norm" not in type(module).__name__.lower():
        return False
    return "weight" in {*module._parameters, *module._buffers}


def _why_not(module: torch.nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted; convert the model first and script it then"
    if "forward" in module.__dict__:
        return "its forward was replaced, and ours would not be called"
    bases = {base.__name__ for base in type(module).__mro__}
    if "FSDPModule" in bases:
        return "it is sharded by itself; convert the model first and shard it then"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized, and its class belongs to the parametrization"
    return None


@overload
def revert(
    model: torch.nn.Module,
    *,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[False] = False,
) -> torch.nn.Module: ...
@overload
def revert(
    model: torch.nn.Module,
    *,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[True],
) -> tuple[torch.nn.Module, Report]: ...
def revert(
    model: torch.nn.Module,
    *,
    only: Selection = None,
    skip: Selection = None,
    return_report: bool = False,
) -> torch.nn.Module | tuple[torch.nn.Module, Report]:
    """Give what `convert` and `fuse` changed its class back, in place.

    The classes are those from before, and what was added is gone: bit for bit the model that would
    be there, with the parameters and statistics that it has learned since. Layers that were made as
    ours stay what they are. A layer that another verb has changed since (synchronized, frozen) is
    left, and the report says what to undo first.

    Args:
        model: any module.
        only: as in `convert`.
        skip: as in `convert`.
        return_report: return `(model, report)`.

    Returns:
        `model`.

    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    >>> type(revert(convert(model))[0])
    <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    check_model(model, "revert")
    changes = []
    for path, module in walk(model, only, skip, "revert"):
        kind = type(module).__name__
        done = False
        while any(go_back(module, verb) for verb in ("fuse", _VERB)):
            done = True
        if done:
            changes.append(Change(path, kind, True, _full_name(type(module))))
        elif any(origin.verb in ("fuse", _VERB) for origin in origins(module)):
            undo = {"sync": "revert_sync_batchnorm", "freeze": "unfreeze"}
            last = origins(module)[-1].verb
            changes.append(Change(path, kind, False, f"{undo.get(last, last)} comes first"))
    report = Report("revert", tuple(changes))
    return (model, report) if return_report else model


def _full_name(cls: type) -> str:
    return f"{cls.__module__.partition('.')[0]}'s {cls.__name__}"
