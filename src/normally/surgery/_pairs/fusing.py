"""What `fuse` does to the module around a norm and its activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...nn._origin import becoming
from .._dataflow.trace import UntraceableError
from .._derived import derive
from .._foreign import Recipe
from .carry_out import Group
from .fusions import Fusion
from .generated import Generated, write

VERB = "fuse"


class FusedActivation(torch.nn.Identity):
    """What an activation is that its norm applies: it passes on what it gets.

    Its attributes are those of the module that it was, and `normally.revert` makes it that again.
    """

    _fused: tuple[str, str]

    def extra_repr(self) -> str:
        """Which activation, and whose."""
        return " of ".join(self._fused)


def plan(group: Group[Fusion]) -> Callable[[torch.nn.Module], None]:
    """What does the fusions of a group to its owner, or to a copy of it.

    Raises:
        UntraceableError: if the owner needs another forward and none can be written.
    """
    settings = [f for f in group.findings if _is_setting(f, group.findings)]
    others = [f for f in group.findings if f not in settings]
    forward = None
    if others:
        if isinstance(group.owner.module, Generated):
            raise UntraceableError("its forward was written anew before; revert the model first")
        forward = write(group, others)

    def change(owner: Any) -> None:
        for fusion in settings:
            norm = owner.get_submodule(group.inside(fusion.path))
            _set(norm, owner.get_submodule(group.inside(fusion.act_path)), fusion)
        if forward is not None:
            with becoming(owner, derive(Generated, type(owner)), VERB):
                owner._plan = forward

    return change


def _is_setting(fusion: Fusion, together: Sequence[Fusion]) -> bool:
    """Whether the norm can have the activation as a setting, and its module pass on.

    The module must be the activation of nothing but such norms.
    """
    if fusion.add is not None or fusion.act_module is None:
        return False
    same = [f for f in together if f.act_module is fusion.act_module]
    return fusion.act_sites == len(same) and all(f.add is None for f in same)


def _set(norm: Any, act: Any, fusion: Fusion) -> None:
    activation = fusion.activation
    assert activation is not None  # for mypy
    with becoming(norm, type(norm), VERB):
        recipe = getattr(norm, "_recipe", None)
        if isinstance(recipe, Recipe):
            child = type(norm._modules.get("act"))
            norm._recipe = replace(recipe, act=activation, act_class=child)
        else:
            norm.act, norm.act_param = activation
    if type(act) is not FusedActivation:  # of another norm as well
        with becoming(act, FusedActivation, VERB):
            act._fused = (str(activation), fusion.path)
