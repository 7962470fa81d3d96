"""The benchmark of batch normalization: 1d, 2d and 3d, with residual and activation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import nn as ours_nn
from .. import reference
from .floor import BACKWARD, FORWARD, sweeps
from .operator import Case, Operator, Target
from .torch_block import compose, parts

# By the input's rank.
_OURS = {
    2: ours_nn.BatchNorm1d,
    3: ours_nn.BatchNorm1d,
    4: ours_nn.BatchNorm2d,
    5: ours_nn.BatchNorm3d,
}
_THEIRS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class BatchNorm(Operator):
    """Ours against torch.nn.BatchNorm1d, 2d and 3d."""

    name = "batch_norm"
    abbreviation = "BN"
    targets = (
        Target("shapes 1-7", 3.0, (1, 2, 3, 4, 5, 6, 7)),
        Target("shapes 1-7, contiguous", 4.0, (1, 2, 3, 4, 5, 6, 7), ("contiguous",)),
        Target("shapes 1-7, channels_last", 2.2, (1, 2, 3, 4, 5, 6, 7), ("channels_last",)),
    )

    def ours(self, case: Case) -> nn.Module:
        """One fused layer."""
        size = case.shape.size
        return _OURS[len(size)](size[1], act=case.act, dtype=case.parameter_dtype)

    def theirs(self, case: Case) -> nn.Module:
        """The norm of torch, its sum and its activation, none of them in place."""
        size = case.shape.size
        return compose(_THEIRS[len(size)](size[1], dtype=case.parameter_dtype), case)

    def exact(self, module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """The formula in float64, on the inputs as they were rounded."""
        norm, act = _batch_norm(module), parts(module)[1]
        mean, var = (None, None) if module.training else (norm.running_mean, norm.running_var)
        return reference.batch_norm(
            inputs[0].double(), mean, var, norm.weight, norm.bias, norm.eps,
            residual=inputs[1] if len(inputs) > 1 else None, act=act,
        )  # fmt: skip

    def fit(self, module: nn.Module, input: Tensor) -> None:
        """Running statistics are those of `input`, rounded to the buffers' dtype."""
        norm = _batch_norm(module)
        dims = [d for d in range(input.dim()) if d != 1]
        mean, var = reference.moments(input.double(), dims)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean.flatten())
        norm.running_var.copy_(var.flatten())

    def floor_bytes(self, case: Case, cache_bytes: int) -> int:
        """Tensors read and written once, or twice where a channel's slab leaves the cache.

        Forward reads x (again for the output if the slab is gone) and writes y; backward reads x
        and dy (each again) and writes dx. A residual adds one tensor to each, and one bit an
        element for the activation's mask.
        """
        elements = case.tensor_bytes // case.torch_dtype.itemsize
        fits = case.tensor_bytes // case.shape.size[1] <= cache_bytes
        residual = 1 if case.has_residual else 0
        if case.mode == "evaluation":
            return (2 + residual) * case.tensor_bytes
        forward = (sweeps(FORWARD, fits) + residual) * case.tensor_bytes
        if case.mode == "forward":
            return forward
        backward = (sweeps(BACKWARD, fits) + residual) * case.tensor_bytes
        mask = elements // 8 if case.has_residual and case.act else 0
        return forward + backward + mask


def _batch_norm(module: nn.Module) -> nn.modules.batchnorm._BatchNorm:
    norm, _ = parts(module)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return norm
