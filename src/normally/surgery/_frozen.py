"""What a frozen layer is: a class that stays in evaluation, and a note of what γ and β were."""

from __future__ import annotations

from typing import Any

import torch

from ..nn._origin import becoming, changed_by, go_back, origins
from ._derived import Derived, derive

VERB = "freeze"

#: By name of a parameter of the layer: whether it required a gradient before.
Memory = dict[str, bool]


class FrozenStatistics(Derived):
    """Mixed into the class of a layer that normalizes with its running statistics in every mode.

    `train()` tells it the mode as it tells every module; that is noted for the day when the layer
    is unfrozen.
    """

    #: What `convert_sync_batchnorm` asks: there are no statistics to share.
    _has_frozen_statistics = True

    def __init_subclass__(cls) -> None:
        """A lazy layer becomes the frozen form of what it would have become."""
        becomes = getattr(cls, "cls_to_become", None)
        if becomes is not None:
            cls.cls_to_become = derive(FrozenStatistics, becomes)  # type: ignore[attr-defined]

    @property
    def training(self) -> bool:
        """False, so that nothing moves the statistics."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode

    def extra_repr(self) -> str:
        """The layer's own, and that it is frozen."""
        text: str = super().extra_repr()  # type: ignore[misc]
        return f"{text}, frozen" if text else "frozen"


def is_frozen(layer: torch.nn.Module) -> bool:
    """Whether `freeze` holds anything of it."""
    return any(origin.verb == VERB for origin in origins(layer))


def has_frozen_statistics(layer: torch.nn.Module) -> bool:
    """Whether `freeze` holds its running statistics."""
    return isinstance(layer, FrozenStatistics)


def memory(layer: torch.nn.Module) -> Memory | None:
    """What of its affine part required a gradient before; None if that is not frozen."""
    found: Memory | None = layer.__dict__.get("_required_grad")
    return found


def is_undoable(layer: torch.nn.Module) -> bool:
    """Whether no other verb has changed the layer since it was frozen."""
    return not is_frozen(layer) or changed_by(layer, VERB)


def hold(layer: Any, statistics: bool, required_grad: Memory | None) -> None:
    """Let this much of the layer be frozen from now on; its parameters are the caller's affair.

    Args:
        layer: one that is not frozen.
        statistics: whether it stays in evaluation.
        required_grad: what its parameters were; None if they are not frozen.
    """
    cls = derive(FrozenStatistics, type(layer)) if statistics else type(layer)
    with becoming(layer, cls, VERB):
        if required_grad is not None:
            layer._required_grad = required_grad


def release(layer: torch.nn.Module) -> None:
    """Make the layer what it was before, but for its parameters."""
    while go_back(layer, VERB):
        pass
