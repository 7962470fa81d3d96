"""`normally::group_norm` and its backward; instance norm is the same with a group a channel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from . import activation
from .norm import define_norm


def _formula(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    num_groups: int,
    eps: float,
    act: int,
    act_param: float,
) -> Tensor:
    return reference.group_norm(
        input, num_groups, weight, bias, eps, mask=mask, **activation.decode(act, act_param)
    )


def _statistics(input: Tensor, mask: Tensor | None, num_groups: int, *_: Any) -> Tensor:
    return reference.group_statistics(input, num_groups, mask)


group_norm = define_norm(
    "group_norm",
    "int num_groups, float eps, int act, float act_param",
    formula=_formula,
    gpu="group_norm",
    # Mean, biased variance and number of values of every sample and group.
    stats_shape=lambda input, num_groups, *_: (3, input.shape[0], num_groups),
    statistics=_statistics,
)
