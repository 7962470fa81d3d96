"""What a layer has beyond torch's: in its repr, and for one call."""

from __future__ import annotations

from typing import Any

import torch


def shown(layer: torch.nn.Module, **defaults: object) -> str:
    """`, name=value` for every option that differs from its default, which torch's repr lacks."""
    given = ((name, getattr(layer, name), default) for name, default in defaults.items())
    return "".join(f", {name}={value!r}" for name, value, default in given if value != default)


def activation_of(
    layer: Any, act: str | None, act_param: float | None
) -> tuple[str | None, float | None]:
    """The activation of a call: the layer's, or the given one for a layer that has none."""
    if act is None:
        return layer.act, layer.act_param
    if layer.act is not None:
        raise ValueError(
            f"{type(layer).__name__}: act must be None in a call of a layer that has one. "
            f"Got act={act!r} for a layer with act={layer.act!r}."
        )
    return act, act_param
