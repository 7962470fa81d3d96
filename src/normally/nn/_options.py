"""What a layer has beyond torch's, in its repr."""

from __future__ import annotations

import torch


def shown(layer: torch.nn.Module, **defaults: object) -> str:
    """`, name=value` for every option that differs from its default, which torch's repr lacks."""
    given = ((name, getattr(layer, name), default) for name, default in defaults.items())
    return "".join(f", {name}={value!r}" for name, value, default in given if value != default)
