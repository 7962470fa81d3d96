"""The benchmark of the sum with the residual stream and its root-mean-square normalization."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .floor import BACKWARD, FORWARD, sweeps
from .operator import Case, Operator
from .rms_norm import RMSNorm, exact
from .shapes import Shape


class TorchAddNorm(nn.Module):
    """What a pre-norm transformer does between two of its blocks."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """norm(input + residual) for the next block, and the sum for the stream."""
        total = input + residual
        return self.norm(total), total


class AddRMSNorm(Operator):
    """Ours against a sum and torch.nn.RMSNorm; both outputs are used and get a gradient each."""

    name = "add_rms_norm"
    abbreviation = "RMS"
    outputs = 2

    def variants(self, shape: Shape) -> tuple[bool, ...]:
        """The sum cannot be left out: that would be `RMSNorm`."""
        return (True,)

    def ours(self, case: Case) -> nn.Module:
        """One layer, which returns two tensors where it gets two."""
        return RMSNorm().ours(case)

    def theirs(self, case: Case) -> nn.Module:
        """The sum, then the layer of torch."""
        return TorchAddNorm(RMSNorm().theirs(case))

    def exact(self, module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The sum as its dtype holds it, and the formula of that in float64."""
        norm = module.norm if isinstance(module, TorchAddNorm) else module
        total = inputs[0] + inputs[1]
        return exact(norm, total), total.double()

    def floor_bytes(self, case: Case, cache_bytes: int) -> int:
        """4T forward (two read, two written) and 4T backward, where one gradient serves both."""
        fits = case.shape.size[-1] * case.torch_dtype.itemsize <= cache_bytes
        tensors = sweeps(FORWARD, fits) + 2
        if case.mode == "forward_backward":
            tensors += sweeps(BACKWARD, fits) + 1
        return tensors * case.tensor_bytes
