"""The benchmark of instance normalization in volumes, as 3-D U-Nets have it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .. import nn as ours_nn
from .. import reference
from . import floor
from .operator import Case, Operator, Target
from .torch_block import parts


class InstanceNorm(Operator):
    """Ours against torch.nn.InstanceNorm3d, with γ and β and without running statistics."""

    name = "instance_norm"
    abbreviation = "IN"
    targets = tuple(Target("shape 7", 4.0, (7,), dtype=dtype) for dtype in ("float32", "bfloat16"))

    def ours(self, case: Case) -> nn.Module:
        """One layer."""
        return ours_nn.InstanceNorm3d(
            case.shape.size[1], affine=True, act=case.act, dtype=case.parameter_dtype
        )

    def theirs(self, case: Case) -> nn.Module:
        """The layer of torch."""
        return nn.InstanceNorm3d(case.shape.size[1], affine=True, dtype=case.parameter_dtype)

    def exact(self, module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """The formula in float64: a group a channel."""
        norm, _ = parts(module)
        assert isinstance(norm, nn.modules.instancenorm._InstanceNorm)
        x = inputs[0].double()
        return reference.group_norm(x, x.shape[1], norm.weight, norm.bias, norm.eps)

    def floor_bytes(self, case: Case, cache_bytes: int) -> int:
        """2T forward and 3T backward, where the positions of a channel of a sample fit."""
        return floor.bytes_of(case, math.prod(case.shape.size[2:]), cache_bytes)
