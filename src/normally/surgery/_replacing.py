"""What takes a norm's place: by `create_norm`'s names or a function, with what the norm had."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..nn import create_norm
from ..nn.create_norm import _ALIASES, _key
from ._dataflow.hooks import has_hooks
from ._evaluation import flag
from ._foreign import Recipe
from ._frozen import is_frozen
from ._norms import keeps_statistics
from ._pairs.folding import FoldedNorm, activation_module
from ._pairs.fusions import own_activation
from .convert import way_back

#: A name that `create_norm` knows, "none", or a function of the layer that makes another.
Replacement = str | Callable[[torch.nn.Module], torch.nn.Module]

#: Kinds that normalize over the last dimension, and those that can do so over dimension 1.
_LAST, _EITHER = ("rms",), ("layer",)


def why_not(layer: torch.nn.Module) -> str | None:
    """Why a norm cannot be replaced at all."""
    if any(map(is_lazy, _tensors(layer))):
        return "it has not met its first input, and so has no channels; call the model once"
    if has_hooks(layer):
        return "it has hooks, which would be lost; remove them, and register them on the new layer"
    if torch.nn.utils.parametrize.is_parametrized(layer):
        return "it is parametrized; torch.nn.utils.parametrize.remove_parametrizations comes first"
    if "forward" in layer.__dict__:
        return "its forward was replaced, and would be lost"
    fused = any(origin.verb == "fuse" for origin in layer.__dict__.get("_origins", ()))
    if fused or is_frozen(layer):
        return f"{way_back(layer)} comes first"
    return None


def successor(layer: Any, replacement: Replacement) -> torch.nn.Module:
    """The layer that takes its place, on its device, in its dtype and mode.

    Raises:
        ValueError: if there is none; the message says why.
        TypeError: if a function gives no module.
    """
    if callable(replacement):
        new: Any = replacement(layer)
        if not isinstance(new, torch.nn.Module):
            raise TypeError(f"the function gave no module but {type(new).__name__}")
        if new is layer:
            raise ValueError("the function gave the layer itself; leave it out by skip=")
    elif _key(replacement) in ("none", "identity"):
        new = _without_norm(layer)
    else:
        new = create_norm(replacement, channels_of(layer), **_options(layer, replacement))
    like = next((t for t in _tensors(layer) if t.is_floating_point()), None)
    if like is not None:
        new.to(like.device, like.dtype)
    if not callable(replacement):
        _carry_over(layer, new)
    made: torch.nn.Module = new.train(flag(layer))
    return made


def channels_of(layer: Any) -> int:
    """How many channels it normalizes."""
    for name in ("num_features", "num_channels"):
        if isinstance(getattr(layer, name, None), int):
            return int(getattr(layer, name))
    shape = getattr(layer, "normalized_shape", None)
    if shape is None:
        weight = getattr(layer, "weight", None)
        shape = () if weight is None else tuple(weight.shape)
    if len(shape) != 1:
        raise ValueError(f"it has no channels: it normalizes over a shape of {tuple(shape)}")
    return int(shape[0])


def channel_dim(layer: Any) -> int:
    """Where its channels are in the input: 1 or -1."""
    recipe = getattr(layer, "_recipe", None)
    if isinstance(recipe, Recipe):
        return 1 if recipe.kind not in ("layer", "rms") or recipe.dim == 1 else -1
    if hasattr(layer, "num_features") or hasattr(layer, "num_channels"):
        return int(getattr(layer, "channel_dim", 1))
    return 1 if getattr(layer, "dim", None) == 1 else -1


def _options(layer: Any, name: str) -> dict[str, Any]:
    """What the layer's place asks of the new one's constructor."""
    base, _, number = name.partition(":")
    alias, _, implied = _ALIASES.get(_key(base), _key(base)).partition(":")
    options: dict[str, Any] = {}
    first = channel_dim(layer) == 1
    if alias in ("batch", "instance"):
        found = re.search(r"([123])d", type(layer).__name__, re.IGNORECASE)
        options["dim"] = int(found[1]) if found else 2
    if alias == "layer" and first:
        options["dim"] = 1
    if alias in _LAST and first:
        raise ValueError(f"its channels are dimension 1, and {name!r} is over the last one")
    if alias not in (*_LAST, *_EITHER) and not first:
        raise ValueError(f"its channels come last, and {name!r} takes them at dimension 1")
    groups = number or implied or "32"
    if alias == "group" and groups.isdecimal():
        channels = channels_of(layer)
        if int(groups) < 1 or channels % int(groups):
            fit = ", ".join(str(n) for n in range(1, channels + 1) if channels % n == 0)
            raise ValueError(f"{groups} groups do not divide its {channels} channels; {fit} do")
    if own_activation(layer) or _has_children(layer):
        act = getattr(layer, "act", None)
        if not isinstance(act, str) or alias in ("rms", "frozen", "lrn"):
            raise ValueError(
                f"it applies an activation, which {name!r} would not; give a function of the layer"
            )
        options |= {"act": act, "act_param": layer.act_param}
    return options


def _has_children(layer: torch.nn.Module) -> bool:
    return any(type(child) is not torch.nn.Identity for child in layer.children())


def _without_norm(layer: Any) -> torch.nn.Module:
    act = activation_module(layer)
    if act is None:
        return torch.nn.Identity()
    act = copy.copy(act)
    if hasattr(act, "inplace"):  # into what was the norm's own output
        act.inplace = False  # type: ignore[assignment]
    new = FoldedNorm()
    new.act = act
    return new


def _tensors(layer: torch.nn.Module) -> list[Tensor]:
    found = (*layer._parameters.values(), *layer._buffers.values())
    return [t for t in found if t is not None]


@torch.no_grad()
def _carry_over(old: Any, new: Any) -> None:
    """γ and β, as the same parameters where that can be, and running statistics."""
    recipe = getattr(old, "_recipe", None)
    of_layer = recipe if isinstance(recipe, Recipe) else old
    shifted = getattr(of_layer, "zero_centered_weight", False)
    for name in ("weight", "bias"):
        before, after = getattr(old, name, None), getattr(new, name, None)
        if before is None or after is None or before.shape != after.shape:
            continue
        plain = not (shifted and name == "weight")
        both = name in old._parameters and name in new._parameters
        if both and plain:
            setattr(new, name, before)
        else:
            after.copy_(before if plain else before + 1)
            after.requires_grad_(before.requires_grad and name in new._parameters)
    if keeps_statistics(old) and keeps_statistics(new):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if isinstance(new._buffers.get(name), Tensor) and name in old._buffers:
                new._buffers[name].copy_(old._buffers[name])
