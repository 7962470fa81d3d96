"""Whether somebody listens to a module."""

from __future__ import annotations

from typing import Any

import torch

#: Of all kinds that are called where the module is.
_NAMES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks of others would be called with the module, or see what it takes and gives."""
    hooks = (hook for name in _NAMES for hook in (getattr(module, name, None) or {}).values())
    return any(not getattr(hook, "_is_normallys", False) for hook in hooks)


def ours(hook: Any) -> Any:
    """The hook, marked as one that is there for a moment only."""
    hook._is_normallys = True
    return hook


def forget_hooks(module: torch.nn.Module) -> torch.nn.Module:
    """Take all hooks from a copy that is only computed with; those for state dicts stay."""
    for part in module.modules():
        for name in _NAMES:
            getattr(part, name).clear()
    return module
