"""How an output is computed again, to the same bits, from what is kept anyway."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .._ops import batch_norm as ops


class Operand(Protocol):
    """A tensor that is there, or that is computed again."""

    #: Passes over memory that `compute` takes.
    cost: int

    def compute(self) -> Tensor:
        """The tensor, without a graph."""
        ...


class Kept:
    """A tensor as it was: if it is written to later, it is refused as autograd refuses it."""

    cost = 0

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()  # the version stays that of the tensor
        self._version = version_of(tensor)

    def compute(self) -> Tensor:
        """The tensor itself."""
        version = version_of(self._tensor)
        if version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{self._tensor.type()} {list(self._tensor.shape)}], from "
                "which the output of a memory-efficient batch norm is computed again, is at "
                f"version {version}; expected version {self._version} instead."
            )
        return self._tensor


class Recipe:
    """What can be computed again; what it gives is recognized by its place and version."""

    def __init__(self, address: int, version: int, cost: int) -> None:
        self.address = address
        self.version = version
        self.cost = cost
        self._held: Kept | None = None

    def hold(self, result: Tensor) -> None:
        """Keep the result after all, because another recipe needs it and is long enough."""
        self._held = Kept(result)
        self.cost = 0

    def compute(self) -> Tensor:
        """The result again."""
        if self._held is not None:
            return self._held.compute()
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            return self._compute()

    def _compute(self) -> Tensor:
        raise NotImplementedError


class NormRecipe(Recipe):
    """The output of batch norm: `settings` are what the operator takes after the mask.

    Weight and bias are copies: whether a parameter has been written to since, or is in memory at
    all (FSDP), matters in the norm's own backward, and not in that of what follows.
    """

    def __init__(
        self,
        output: Tensor,
        input: Operand,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Operand | None,
        mask: Tensor | None,
        settings: tuple[Any, ...],
    ) -> None:
        cost = 1 + input.cost + (0 if residual is None else residual.cost)
        super().__init__(output.data_ptr(), version_of(output), cost)
        self.input = input
        self.residual = residual
        self._weight = None if weight is None else weight.detach().clone()
        self._bias = None if bias is None else bias.detach().clone()
        self._mask = None if mask is None else Kept(mask)
        self._settings = settings

    def _compute(self) -> Tensor:
        output: Tensor = ops.forward(
            self.input.compute(),
            self._weight,
            self._bias,
            None if self.residual is None else self.residual.compute(),
            None if self._mask is None else self._mask.compute(),
            *self._settings,
        )[0]
        return output


class ReluRecipe(Recipe):
    """A norm's output after a ReLU in place, as `torch.nn.ReLU(inplace=True)` is."""

    def __init__(self, norm: Recipe) -> None:
        super().__init__(norm.address, norm.version + 1, norm.cost + 1)
        self._norm = norm

    def _compute(self) -> Tensor:
        return self._norm.compute().relu()


def version_of(tensor: Tensor) -> int:
    """How often it was written to; a tensor of inference mode does not count that."""
    return 0 if tensor.is_inference() else tensor._version
