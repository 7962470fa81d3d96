"""`replace`: other norms in the places of a model's norms."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch.nn import Parameter

from ._batches import Batches, Forward
from ._matching import Fit, fit
from ._norms import looks_like_a_norm
from ._replacing import Replacement, successor, why_not
from ._report import Change, Report
from ._walk import Selection, matches, walk

_VERB = "replace"


@overload
def replace(
    model: torch.nn.Module,
    norms: Mapping[str, Replacement],
    *,
    match: Iterable[Any] | None = None,
    forward: Forward | None = None,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[False] = False,
) -> torch.nn.Module: ...
@overload
def replace(
    model: torch.nn.Module,
    norms: Mapping[str, Replacement],
    *,
    match: Iterable[Any] | None = None,
    forward: Forward | None = None,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[True],
) -> tuple[torch.nn.Module, Report]: ...
def replace(
    model: torch.nn.Module,
    norms: Mapping[str, Replacement],
    *,
    match: Iterable[Any] | None = None,
    forward: Forward | None = None,
    only: Selection = None,
    skip: Selection = None,
    return_report: bool = False,
) -> torch.nn.Module | tuple[torch.nn.Module, Report]:
    """Put other norms into the places of those of `model`, in place.

    The new layer has the device, dtype and mode of the old one, its activation, and its γ, β and
    running statistics where both have them in one shape. γ and β stay the same parameters then, and
    an optimizer made before holds them; others leave or come, which the report says: an optimizer
    made before does not know those that come.

    It is another function, until it is trained. With `match` the new γ and β are fitted to data:
    layer by layer in the order of execution, in evaluation,

        γ, β = argmin Σ (y - γ·x̂ - β)²

    a channel, where y is what the old layer gave in the old model, and x̂ what the new one
    normalizes behind the layers that are fitted already. It takes a pass for each layer, and a copy
    of the model. That is the best for each layer by itself; what remains adds up on the way to
    the output. An exception, Ctrl-C included, leaves the model as it was.

    Args:
        model: any module that contains norms.
        norms: by the name of a class, a path, a path above it or a pattern, of which the first that
            fits counts: a name that `create_norm` knows, "none", or a function of the old layer
            that makes the new one, whose γ and β are taken as they are.
        match: batches, as `recalibrate` takes them, that can be gone through again; a few will do.
        forward: `forward(model, batch)` calls the model for another kind of batch.
        only: names, patterns or a function of (path, module) that say which norms.
        skip: the same for norms to leave.
        return_report: return `(model, report)`; the report has a line a layer, with the relative
            deviation of its outputs, √(Σ(y - ŷ)² / Σy²), after the fit.

    Returns:
        `model`.

    Raises:
        ValueError: if a layer cannot be replaced: groups that do not divide the channels, hooks,
            activations that the new norm lacks, channels in another place, a layer that was fused
            or frozen, the model itself. The message names all of them, and nothing is changed. And
            for a name that there is not.
        TypeError: if `model` is no module, or `norms` no mapping.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64))
    >>> model, report = replace(model, {"BatchNorm2d": "group:32"}, return_report=True)
    >>> print(report)
    replace: 1 changed, 0 left as they were
      1  BatchNorm2d → GroupNorm(32, 64, eps=1e-05, affine=True, bias=True); keeps weight, bias
    """
    chosen = walk(model, only, skip, _VERB)
    _check(model, norms)
    found = {
        path: (module, norms[key])
        for path, module in chosen
        if looks_like_a_norm(module)
        for key in [next((k for k in norms if matches(k, path, module)), None)]
        if key is not None
    }
    new = _successors(found)
    before, data = None, []
    if match is not None:
        before = copy.deepcopy(model)
        repeat = "the layers are fitted one after the other"
        data = [Batches(m, match, forward, None, repeat, _VERB) for m in (before, model)]
    for path, (old, _) in found.items():
        _put(model, old, new[path])
    fits: dict[str, Fit] = {}
    if before is not None and new:
        try:
            fits = fit(before, model, new, *data)
        except BaseException:
            for path, (old, _) in found.items():
                _put(model, new[path], old)
                _set_back(old, before.get_submodule(path))
            raise
    changes = tuple(
        _line(path, old, new[path], fits.get(path), match is not None)
        for path, (old, _) in found.items()
    )
    report = Report(_VERB, changes)
    return (model, report) if return_report else model


def _check(model: torch.nn.Module, norms: Mapping[str, Replacement]) -> None:
    if not isinstance(norms, Mapping):
        raise TypeError(
            f"{_VERB}: norms must be a mapping, such as {{'BatchNorm2d': 'group:32'}}. Got "
            f"{type(norms).__name__}."
        )
    for key, value in norms.items():
        if not isinstance(value, str) and not callable(value):
            raise TypeError(
                f"{_VERB}: norms must have names that create_norm knows, 'none' or functions of a "
                f"layer. Got {value!r} for {key!r}."
            )
        if not any(
            looks_like_a_norm(m) and matches(key, path, m) for path, m in model.named_modules()
        ):
            raise ValueError(
                f"{_VERB}: norms must name norms of the model by path or class, or by a pattern of "
                f"such names. Got {key!r}, which is none; model.named_modules() lists them."
            )


def _successors(
    found: Mapping[str, tuple[torch.nn.Module, Replacement]],
) -> dict[str, torch.nn.Module]:
    """The new layers by path; ValueError for all that there cannot be."""
    new, reasons = {}, []
    for path, (layer, replacement) in found.items():
        reason = why_not(layer) if path else "no module has it, and so none can get another"
        if reason is None:
            try:
                new[path] = successor(layer, replacement)
            except (ValueError, TypeError) as error:
                reason = str(error)
        if reason is not None:
            reasons.append(f"\n  {path or 'the model itself'} ({type(layer).__name__}): {reason}")
    if reasons:
        raise ValueError(
            f"{_VERB}: model must have norms that can be replaced as norms says. Nothing was "
            f"changed; leave layers out by skip=. Got{''.join(reasons)}"
        )
    return new


def _put(model: torch.nn.Module, old: torch.nn.Module, new: torch.nn.Module) -> None:
    """In all places where the old one is."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


@torch.no_grad()
def _set_back(old: torch.nn.Module, twin: torch.nn.Module) -> None:
    """γ and β that a new layer has had as well, as they were."""
    for parameter, before in zip(old.parameters(), twin.parameters(), strict=True):
        parameter.copy_(before)


def _line(path: str, old: Any, new: Any, fitted: Fit | None, wanted: bool) -> Change:
    was, now = (dict(m.named_parameters(recurse=False)) for m in (old, new))
    kept = [name for name, p in now.items() if _holds(was, p)]
    parts = {
        "keeps": kept,
        "new:": [name for name in now if name not in kept],
        "gone:": [name for name, p in was.items() if not _holds(now, p)],
    }
    words = [f"{verb} {', '.join(names)}" for verb, names in parts.items() if names]
    if fitted is not None:
        words.append(f"fitted, from a deviation of {fitted.before:.1e}")
    elif wanted:
        words.append("not fitted: the data does not come to it, or its γ is of another kind")
    shown = repr(new) if not list(new.children()) else type(new).__name__
    note = "; ".join([shown, *words])
    return Change(path, type(old).__name__, True, note, None if fitted is None else fitted.after)


def _holds(parameters: Mapping[str, Parameter], parameter: Parameter) -> bool:
    return any(p is parameter for p in parameters.values())
