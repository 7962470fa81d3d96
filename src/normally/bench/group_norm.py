"""The benchmark of group normalization with SiLU, as in the U-Nets of diffusion models."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .. import nn as ours_nn
from .. import reference
from . import floor
from .operator import Case, Operator, Target
from .torch_block import compose, parts


class GroupNorm(Operator):
    """Ours against torch.nn.GroupNorm and torch.nn.SiLU."""

    name = "group_norm"
    abbreviation = "GN"
    targets = tuple(Target("shape 9", 2.5, (9,), dtype=dtype) for dtype in ("float32", "bfloat16"))

    def ours(self, case: Case) -> nn.Module:
        """One fused layer."""
        groups, channels = case.shape.options["num_groups"], case.shape.size[1]
        return ours_nn.GroupNorm(groups, channels, act=case.act, dtype=case.parameter_dtype)

    def theirs(self, case: Case) -> nn.Module:
        """The norm of torch, then its activation, not in place."""
        groups, channels = case.shape.options["num_groups"], case.shape.size[1]
        return compose(nn.GroupNorm(groups, channels, dtype=case.parameter_dtype), case)

    def exact(self, module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """The formula in float64, on the input as it was rounded."""
        norm, act = parts(module)
        assert isinstance(norm, nn.GroupNorm)
        return reference.group_norm(
            inputs[0].double(), norm.num_groups, norm.weight, norm.bias, norm.eps, act=act
        )

    def floor_bytes(self, case: Case, cache_bytes: int) -> int:
        """2T forward and 3T backward, where a group of a sample fits; the activation is free."""
        _, channels, *positions = case.shape.size
        together = channels // case.shape.options["num_groups"] * math.prod(positions)
        return floor.bytes_of(case, together, cache_bytes)
