"""`norm_param_groups`: what decays in an optimizer, and norms and biases, which do not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal, overload

import torch
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from ._norms import looks_like_a_norm
from ._report import Change, Report
from ._walk import Selection, check_model, walk

_VERB = "norm_param_groups"

#: Names of parameters, patterns of names, or a question that is asked of each (name, parameter).
Names = str | Iterable[str] | Callable[[str, Parameter], bool] | None
Groups = list[dict[str, Any]]


@overload
def norm_param_groups(
    model: torch.nn.Module,
    weight_decay: float,
    *,
    no_decay: Names = None,
    trainable_only: bool = True,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[False] = False,
) -> Groups: ...
@overload
def norm_param_groups(
    model: torch.nn.Module,
    weight_decay: float,
    *,
    no_decay: Names = None,
    trainable_only: bool = True,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[True],
) -> tuple[Groups, Report]: ...
def norm_param_groups(
    model: torch.nn.Module,
    weight_decay: float,
    *,
    no_decay: Names = None,
    trainable_only: bool = True,
    only: Selection = None,
    skip: Selection = None,
    return_report: bool = False,
) -> Groups | tuple[Groups, Report]:
    """Two parameter groups for an optimizer: the second, norms and biases, without weight decay.

    Decay pulls weights to 0, where a γ makes its channel vanish, and where a weight before a norm
    changes nothing but the effective learning rate (van Laarhoven 2017, arXiv:1706.05350).

    A norm is known by its class, by a class name with "norm" in it and a weight, or by an eps
    beside parameters of one dimension at most, so that layers of all libraries are found without
    running them; all its own parameters are meant. A bias has "bias" in its name and one dimension
    at most (`in_proj_bias`, `bias_ih_l0`). Also without decay is what `no_decay` names, and what
    the model itself names by a method `no_weight_decay()`, as timm's do.

    Every parameter is in one group, once, in the model's order; one that is shared does not decay
    if it does not in one of its places. The model stays as it is.

    Args:
        model: any module.
        weight_decay: of the first group.
        no_decay: further parameters without decay, such as position embeddings: names, paths above
            them, patterns ("pos_embed", "*.gamma"), or a function of (name, parameter).
        trainable_only: leave out what requires no gradient. False keeps it, for what will be
            unfrozen while the optimizer goes on.
        only: names, patterns or a function of (path, module) that say whose norms and biases.
        skip: the same for modules whose norms and biases decay.
        return_report: return `(groups, report)`; the report has a line a parameter.

    Returns:
        `[{"params": …, "weight_decay": weight_decay}, {"params": …, "weight_decay": 0.0}]`.

    Raises:
        ValueError: if there is no parameter, the decay is negative, or `no_decay` or `only` name
            something that there is not.
        TypeError: if `model` is no module.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    >>> groups = norm_param_groups(model, 0.05)
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    [(1, 0.05), (3, 0.0)]
    """
    check_model(model, _VERB)
    reasons = _reasons(model, only, skip, _asked(model, no_decay))
    if not weight_decay >= 0:
        raise ValueError(
            f"{_VERB}: weight_decay must be 0 or more. Got weight_decay={weight_decay}."
        )
    groups: tuple[list[Parameter], list[Parameter]] = ([], [])
    changes = []
    for name, parameter in model.named_parameters():
        kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if trainable_only and not parameter.requires_grad:
            changes.append(Change(name, kind, False, "in no group: it requires no gradient"))
            continue
        reason = reasons.get(parameter)
        groups[reason is not None].append(parameter)
        note = "decays" if reason is None else f"no decay: {reason}"
        changes.append(Change(name, kind, reason is not None, note))
    if not any(groups):
        kept = "a parameter that requires a gradient" if trainable_only else "a parameter"
        raise ValueError(f"{_VERB}: model must have {kept}. Got {type(model).__name__} with none.")
    result: Groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in zip(groups, (weight_decay, 0.0), strict=True)
    ]
    return (result, Report(_VERB, tuple(changes))) if return_report else result


def _reasons(
    model: torch.nn.Module,
    only: Selection,
    skip: Selection,
    asked: Callable[[str, Parameter], str | None],
) -> dict[Parameter, str]:
    """By parameter, why it does not decay."""
    chosen = {module: is_norm(module) for _, module in walk(model, only, skip, _VERB)}
    reasons: dict[Parameter, str] = {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        # A parametrized weight stands below its layer: weight is parametrizations.weight.original.
        name = re.sub(r"\bparametrizations\.(\w+)\.original\d*$", r"\1", full)
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        reason = None
        if chosen.get(owner, False):
            reason = "a norm's"
        elif owner in chosen and "bias" in last and _is_flat(parameter):
            reason = "a bias"
        reason = reason or asked(name, parameter)
        if reason is not None:
            reasons.setdefault(parameter, reason)
    return reasons


def is_norm(module: torch.nn.Module) -> bool:
    """Whether it is a norm by its class or name, or by what it holds: an eps, and vectors alone."""
    if looks_like_a_norm(module):
        return True
    own = [p for p in module._parameters.values() if p is not None]
    has_eps = any(isinstance(getattr(module, name, None), float) for name in _EPS_NAMES)
    return has_eps and bool(own) and all(map(_is_flat, own))


_EPS_NAMES = ("eps", "epsilon", "variance_epsilon")


def _is_flat(parameter: Parameter) -> bool:
    return is_lazy(parameter) or parameter.dim() <= 1


def _asked(model: torch.nn.Module, no_decay: Names) -> Callable[[str, Parameter], str | None]:
    """Why the caller, or the model itself, wants no decay for a parameter."""
    own = getattr(model, "no_weight_decay", None)
    of_model = set(own()) if callable(own) else set()
    if callable(no_decay):
        question = no_decay
    else:
        patterns = [no_decay] if isinstance(no_decay, str) else list(no_decay or ())
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"{_VERB}: no_decay must be a name, a pattern, several of them, or a function "
                    f"of (name, parameter). Got no_decay={no_decay!r}."
                )
            if not any(_matches(pattern, name) for name in names):
                raise ValueError(
                    f"{_VERB}: no_decay must name parameters of the model, or be a pattern of such "
                    f"names. Got {pattern!r}, which is none; model.named_parameters() lists them."
                )

        def question(name: str, _: Parameter) -> bool:
            return any(_matches(pattern, name) for pattern in patterns)

    def reason(name: str, parameter: Parameter) -> str | None:
        if question(name, parameter):
            return "no_decay names it"
        return "the model's no_weight_decay() names it" if name in of_model else None

    return reason


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern is that of a parameter's name, or of a path above it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
