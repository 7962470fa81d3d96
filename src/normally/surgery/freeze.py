"""`freeze` and `unfreeze`: norms whose statistics and affine parts stay as they are."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch.nn import Parameter

from . import _foreign
from ._frozen import (
    VERB,
    has_frozen_statistics,
    hold,
    is_frozen,
    is_undoable,
    memory,
    release,
)
from ._norms import is_constant, keeps_statistics, looks_like_a_norm
from ._report import Change, Report
from ._walk import Selection, walk
from .convert import convert_layer, way_back, why_not


class Parts(NamedTuple):
    """What of a layer is frozen, or to be."""

    statistics: bool
    affine: bool

    @classmethod
    def frozen(cls, layer: torch.nn.Module) -> Parts:
        """Of a layer as it is."""
        return cls(has_frozen_statistics(layer), memory(layer) is not None)

    def __or__(self, other: Parts) -> Parts:
        """Of either."""
        return Parts(self.statistics or other.statistics, self.affine or other.affine)

    def without(self, other: Parts) -> Parts:
        """Of this alone."""
        return Parts(self.statistics and not other.statistics, self.affine and not other.affine)

    def of(self, layer: torch.nn.Module) -> str:
        """In words."""
        names = ["statistics"] if self.statistics else []
        names += _affine(layer) if self.affine else []
        *first, last = names
        return f"{', '.join(first)} and {last}" if first else last


@overload
def freeze(
    model: torch.nn.Module,
    *,
    statistics: bool = True,
    affine: bool = True,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[False] = False,
) -> torch.nn.Module: ...
@overload
def freeze(
    model: torch.nn.Module,
    *,
    statistics: bool = True,
    affine: bool = True,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[True],
) -> tuple[torch.nn.Module, Report]: ...
def freeze(
    model: torch.nn.Module,
    *,
    statistics: bool = True,
    affine: bool = True,
    only: Selection = None,
    skip: Selection = None,
    return_report: bool = False,
) -> torch.nn.Module | tuple[torch.nn.Module, Report]:
    """Freeze the norms of `model`, in place: `.train()` does not undo it, `unfreeze` does.

    - Statistics: a layer with running statistics normalizes with them in every mode, and nothing
      moves them. It gets a class derived from its own whose `training` is False; what `train()`
      tells it is noted for later. It computes with normally's function, as after `convert`.
    - Affine: the norms' own parameters require no gradient; whether each did is remembered. That
      holds for all norms, those without running statistics too.

    With both, the backward needs nothing of the input's size: the layer saves its constants, and
    one bit a value if it applies a piecewise linear activation. Other activations need their input.

    Parameters stay the same objects, state dicts have the same keys, and copies, pickles and loaded
    state dicts leave a model as frozen as it is. `model.requires_grad_(True)` speaks to each
    parameter, and so makes the affine parts learn again.

    Args:
        model: any module, a norm itself included.
        statistics: freeze running statistics.
        affine: freeze γ and β.
        only: names, patterns or a function of (path, module) that say which norms.
        skip: the same for norms to leave.
        return_report: return `(model, report)`; the report has a line a layer.

    Returns:
        `model`.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if nothing is to be frozen, or `only` names something that there is not.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> model, report = freeze(model.train(), return_report=True)
    >>> print(report)
    freeze: 1 changed, 0 left as they were
      1  BatchNorm2d → frozen statistics, weight and bias
    >>> model.train()[1].training, unfreeze(model)[1].training
    (False, True)
    """
    parts = _parts(statistics, affine, VERB)
    changes = []
    recognized: dict[Any, _foreign.Recipe] = {}
    chosen = walk(model, only, skip, VERB)
    before = _remembered(model)
    for path, layer in chosen:
        kind = type(layer).__name__
        wanted = _applicable(layer, parts)
        reason = _why_left(layer, wanted)
        if reason is not None:
            changes.append(Change(path, kind, False, reason))
        elif wanted is not None and any(wanted):
            _set(layer, Parts.frozen(layer) | wanted, before, recognized)
            changes.append(Change(path, kind, True, f"frozen {Parts.frozen(layer).of(layer)}"))
    report = Report(VERB, tuple(changes))
    return (model, report) if return_report else model


def _parts(statistics: bool, affine: bool, caller: str) -> Parts:
    if not (statistics or affine):
        raise ValueError(
            f"{caller}: statistics or affine must be True: there is nothing else. Got "
            "statistics=False, affine=False."
        )
    return Parts(statistics, affine)


def _applicable(layer: torch.nn.Module, parts: Parts) -> Parts | None:
    """Those of the parts that the layer has; None if it is no norm."""
    if isinstance(layer, torch.jit.ScriptModule):
        return Parts(*parts) if layer._c.hasattr("running_mean") else None
    if not looks_like_a_norm(layer):
        return None
    own = keeps_statistics(layer) and not is_constant(layer)
    return Parts(parts.statistics and own, parts.affine and bool(_affine(layer)))


def _affine(layer: torch.nn.Module) -> dict[str, Parameter]:
    return {name: p for name, p in layer._parameters.items() if p is not None}


def _why_left(layer: torch.nn.Module, wanted: Parts | None) -> str | None:
    if wanted is None:
        return None
    if isinstance(layer, torch.jit.ScriptModule):
        return why_not(layer)
    if is_constant(layer):
        return "its statistics and affine part are constants"
    if not any(wanted):
        is_batch_norm = isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
        return "it keeps no running statistics" if is_batch_norm else None
    if wanted.without(Parts.frozen(layer)) == (False, False):
        return "it is frozen already"
    if not is_undoable(layer):
        return f"{way_back(layer)} comes first"
    reason = why_not(layer)
    return None if reason is not None and "forward" in layer.__dict__ else reason


def _set(
    layer: torch.nn.Module,
    parts: Parts,
    before: dict[Parameter, bool],
    recognized: dict[Any, _foreign.Recipe],
) -> None:
    """Freeze these parts, and no others.

    A parameter of several layers is asked once, before the first of them has frozen it.
    """
    release(layer)
    if parts.statistics:  # a layer that is none of our formulas stays in evaluation all the same
        convert_layer("", layer, recognized, VERB)
    required = None
    if parts.affine:
        own = _affine(layer)
        required = {name: before.setdefault(p, p.requires_grad) for name, p in own.items()}
        for p in own.values():
            p.requires_grad = False  # by attribute: an uninitialized one has no methods
    if any(parts):
        hold(layer, parts.statistics, required)


def _remembered(model: torch.nn.Module) -> dict[Parameter, bool]:
    """What the frozen parameters of a model were."""
    found = {}
    for layer in model.modules():
        for name, required in (memory(layer) or {}).items():
            parameter = layer._parameters.get(name)
            if parameter is not None:
                found[parameter] = required
    return found


@overload
def unfreeze(
    model: torch.nn.Module,
    *,
    statistics: bool = True,
    affine: bool = True,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[False] = False,
) -> torch.nn.Module: ...
@overload
def unfreeze(
    model: torch.nn.Module,
    *,
    statistics: bool = True,
    affine: bool = True,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[True],
) -> tuple[torch.nn.Module, Report]: ...
def unfreeze(
    model: torch.nn.Module,
    *,
    statistics: bool = True,
    affine: bool = True,
    only: Selection = None,
    skip: Selection = None,
    return_report: bool = False,
) -> torch.nn.Module | tuple[torch.nn.Module, Report]:
    """Undo `freeze`, in place.

    A layer has its class again and is in the mode that `train()` told it last; its parameters
    require gradients if they did before. Layers that were frozen otherwise (`requires_grad_(False)`
    by hand, a `FrozenBatchNorm`) stay as they are. A parameter that another layer, still frozen,
    has as well stays frozen.

    Args:
        model: any module.
        statistics: unfreeze running statistics.
        affine: unfreeze γ and β.
        only: names, patterns or a function of (path, module) that say which layers.
        skip: the same for layers to leave.
        return_report: return `(model, report)`. A layer that was fused or synchronized since is
            left, and the report says what to undo first.

    Returns:
        `model`.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if nothing is to be unfrozen, or `only` names something that there is not.

    >>> layer = freeze(torch.nn.BatchNorm2d(8))
    >>> layer.weight.requires_grad, unfreeze(layer).weight.requires_grad
    (False, True)
    """
    parts = _parts(statistics, affine, "unfreeze")
    changes = []
    recognized: dict[Any, _foreign.Recipe] = {}
    chosen = [(p, m) for p, m in walk(model, only, skip, "unfreeze") if is_frozen(m)]
    before = _remembered(model)
    released: set[Parameter] = set()
    for path, layer in chosen:
        kind, was = type(layer).__name__, Parts.frozen(layer)
        stays = was.without(parts)
        if stays == was:
            continue
        if not is_undoable(layer):
            changes.append(Change(path, kind, False, f"{way_back(layer)} comes first"))
            continue
        if was.affine and not stays.affine:
            released.update(_affine(layer).values())
        _set(layer, stays, before, recognized)
        changes.append(Change(path, kind, True, f"free {was.without(stays).of(layer)}"))
    for parameter in released - _remembered(model).keys():
        if parameter in before:  # else it has taken the place of the one that was frozen
            parameter.requires_grad = before[parameter]
    report = Report("unfreeze", tuple(changes))
    return (model, report) if return_report else model
