"""The benchmark of root-mean-square normalization, as in language models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import nn as ours_nn
from .. import reference
from . import floor
from .operator import Case, Operator, Target


class RMSNorm(Operator):
    """Ours against torch.nn.RMSNorm.

    The weight has the input's dtype: language models are bfloat16 as a whole, and torch warns of
    a float32 weight on a bfloat16 input.
    """

    name = "rms_norm"
    abbreviation = "RMS"
    targets = tuple(
        Target("shape 11", 8.0, (11,), dtype=dtype) for dtype in ("float32", "bfloat16")
    )

    def ours(self, case: Case) -> nn.Module:
        """One layer."""
        return ours_nn.RMSNorm(case.shape.size[-1], dtype=case.torch_dtype)

    def theirs(self, case: Case) -> nn.Module:
        """The layer of torch."""
        return nn.RMSNorm(case.shape.size[-1], dtype=case.torch_dtype)

    def exact(self, module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """The formula in float64, on the input as it was rounded."""
        return exact(module, inputs[0])

    def floor_bytes(self, case: Case, cache_bytes: int) -> int:
        """2T forward and 3T backward; a row always fits."""
        return floor.bytes_of(case, case.shape.size[-1], cache_bytes)


def exact(norm: nn.Module, input: Tensor) -> Tensor:
    """The formula in float64 with the eps that the norm takes for the input's own dtype."""
    assert isinstance(norm, nn.RMSNorm)
    eps = reference.default_eps(input.dtype) if norm.eps is None else norm.eps
    shape = [int(size) for size in norm.normalized_shape]
    return reference.rms_norm(input.double(), shape, norm.weight, eps)
