"""`convert` and `revert`: a model's normalization layers become ours, and what they were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

import torch

from ..nn._origin import becoming, family, go_back, origins
from ..nn._skipped_updates import CountsSkippedUpdates
from ..nn.batch_norm import _BatchNorm
from . import _foreign
from ._counterparts import COUNTERPARTS
from ._frozen import is_frozen
from ._norms import is_ours, looks_like_a_norm
from ._report import Change, Report
from ._walk import Selection, check_model, walk

_VERB = "convert"


@overload
def convert(
    model: torch.nn.Module,
    *,
    memory_efficient: bool = False,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[False] = False,
) -> torch.nn.Module: ...
@overload
def convert(
    model: torch.nn.Module,
    *,
    memory_efficient: bool = False,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[True],
) -> tuple[torch.nn.Module, Report]: ...
def convert(
    model: torch.nn.Module,
    *,
    memory_efficient: bool = False,
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
        memory_efficient: batch norms, those that are ours already included, keep less for the
            backward; see `normally.nn.BatchNorm2d`. Most comes of it if `fuse` is next.
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
        if change is None and _is_ours_while_frozen(module):
            kind = type(module).__name__
            change = Change(path, kind, False, "it is frozen, by our function: unfreeze first")
        if memory_efficient:
            change = _save_memory(path, module, change)
        if change is not None:
            changes.append(change)
    report = Report(_VERB, tuple(changes))
    return (model, report) if return_report else model


def _save_memory(path: str, module: Any, change: Change | None) -> Change | None:
    """Set the option of a batch norm, and say so in its line of the report."""
    if change is not None and not change.done:
        return change
    recipe = getattr(module, "_recipe", None)
    is_batch_norm = isinstance(module, _BatchNorm) or getattr(recipe, "kind", None) == "batch"
    if not is_batch_norm or is_frozen(module) or getattr(module, "memory_efficient", False):
        return change
    with becoming(module, type(module), _VERB):
        module.memory_efficient = True
    if change is None:
        return Change(path, type(module).__name__, True, "memory_efficient")
    return replace(change, note=f"{change.note}, memory_efficient")


def convert_layer(
    path: str,
    module: torch.nn.Module,
    recognized: dict[Any, _foreign.Recipe],
    verb: str = _VERB,
) -> Change | None:
    """Convert one; a line of the report, and None if it is no normalization layer, or ours already.

    `recognized` keeps what foreign layers were found to be, for the next of their kind. `verb` is
    what the layer remembers to have been changed by.
    """
    cls = type(module)
    if is_ours(module):
        return None
    known = family(cls, tuple(COUNTERPARTS))
    if known is None and not looks_like_a_norm(module):
        return None
    kind = cls.__name__
    reason = why_not(module)
    if reason is not None:
        return Change(path, kind, False, reason)
    if known is None:
        try:
            return Change(path, kind, True, _foreign.convert(module, verb, recognized))
        except ValueError as error:
            return Change(path, kind, False, str(error))
    target = COUNTERPARTS[known]
    with becoming(module, target, verb, owned=("_path",)):
        if isinstance(module, CountsSkippedUpdates):
            module._start_count()
    return Change(path, kind, True, f"normally.nn.{target.__name__}")


def _is_ours_while_frozen(module: torch.nn.Module) -> bool:
    past = origins(module)
    return is_frozen(module) and past[0].verb == "freeze" and past[0].cls is not type(module)


def why_not(module: torch.nn.Module) -> str | None:
    """Why its class must stay what it is; None if it can get another."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted, and has no class that can be changed; script the model last"
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
            changes.append(Change(path, kind, False, f"{way_back(module)} comes first"))
    report = Report("revert", tuple(changes))
    return (model, report) if return_report else model


def way_back(module: torch.nn.Module) -> str:
    """The function that undoes what was done to the module last."""
    others = {"sync": "revert_sync_batchnorm", "freeze": "unfreeze"}
    return others.get(origins(module)[-1].verb, "revert")


def _full_name(cls: type) -> str:
    return f"{cls.__module__.partition('.')[0]}'s {cls.__name__}"
