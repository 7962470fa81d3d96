"""The benchmark of layer normalization over the last dimension, as in transformers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import nn as ours_nn
from .. import reference
from . import floor
from .operator import Case, Operator, Target


class LayerNorm(Operator):
    """Ours against torch.nn.LayerNorm."""

    name = "layer_norm"
    abbreviation = "LN"
    # With the one row of shape 12, whose time is the call itself, and without it.
    targets = tuple(
        Target(label, 1.5, numbers, dtype=dtype)
        for dtype in ("float32", "bfloat16")
        for label, numbers in (("shapes 10 and 12", (10, 12)), ("shape 10", (10,)))
    )

    def ours(self, case: Case) -> nn.Module:
        """One layer."""
        return ours_nn.LayerNorm(case.shape.size[-1], dtype=case.parameter_dtype)

    def theirs(self, case: Case) -> nn.Module:
        """The layer of torch."""
        return nn.LayerNorm(case.shape.size[-1], dtype=case.parameter_dtype)

    def exact(self, module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """The formula in float64, on the input as it was rounded."""
        assert isinstance(module, nn.LayerNorm)
        shape = [int(size) for size in module.normalized_shape]
        return reference.layer_norm(
            inputs[0].double(), shape, module.weight, module.bias, module.eps
        )

    def floor_bytes(self, case: Case, cache_bytes: int) -> int:
        """2T forward and 3T backward; a row always fits."""
        return floor.bytes_of(case, case.shape.size[-1], cache_bytes)
