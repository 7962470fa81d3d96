"""What a benchmark is made of: the operator under test, and the cases that its shapes unfold into.

A further operator is one file with one subclass of `Operator`, entered in `OPERATORS` of
`normally.bench`. Timing, memory, errors and pages are shared.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .shapes import Shape, select

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
LAYOUTS = ("contiguous", "channels_last")
MODES = ("forward", "forward_backward", "evaluation")


@dataclass(frozen=True)
class Case:
    """One thing to time: a shape in one layout and dtype, one mode, one number of threads."""

    shape: Shape
    layout: str
    dtype: str
    fused: bool  # as in its network, with what the shape has of activation and residual
    mode: str = "forward"
    threads: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of input, residual and outputs."""
        dtype: torch.dtype = DTYPES[self.dtype]
        return dtype

    @property
    def has_residual(self) -> bool:
        """Whether a second input is added here."""
        return self.fused and self.shape.residual

    @property
    def act(self) -> str | None:
        """The activation of this case."""
        return self.shape.act if self.fused else None

    @property
    def parameter_dtype(self) -> torch.dtype:
        """float32 for half inputs, as under autocast; float64 layers are float64 throughout."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def tensor_bytes(self) -> int:
        """T: the size of one tensor, in bytes."""
        return math.prod(self.shape.size) * self.torch_dtype.itemsize

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout as torch names it for this rank."""
        if self.layout == "contiguous":
            return torch.contiguous_format
        return torch.channels_last if len(self.shape.size) == 4 else torch.channels_last_3d


@dataclass(frozen=True)
class Target:
    """A speed-up to reach: the geometric mean over some shapes, as in their networks.

    It is of forward+backward, in one dtype.
    """

    label: str
    goal: float
    numbers: tuple[int, ...]
    layouts: tuple[str, ...] = LAYOUTS
    dtype: str = "float32"


class Operator(ABC):
    """A normalization under test: how to build ours, theirs and the exact result."""

    name: str
    abbreviation: str  # where there is little room, as in "BN+relu"
    targets: tuple[Target, ...] = ()
    outputs: int = 1  # tensors that a module returns; more than one as a tuple

    @abstractmethod
    def ours(self, case: Case) -> nn.Module:
        """Our module for the case, taking the input and, where there is one, the residual."""

    @abstractmethod
    def theirs(self, case: Case) -> nn.Module:
        """The same composition as people write it with torch."""

    @abstractmethod
    def exact(self, module: nn.Module, inputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The float64 result for `module`'s parameters, buffers and training flag."""

    @abstractmethod
    def floor_bytes(self, case: Case, cache_bytes: int) -> int:
        """The fewest bytes that can move through memory, given the last-level cache's size."""

    def fit(self, module: nn.Module, input: Tensor) -> None:  # noqa: B027 - most norms have none
        """Give `module` the running statistics of `input`, if it has such."""

    def layouts(self, shape: Shape) -> tuple[str, ...]:
        """The layouts that the shape exists in."""
        return LAYOUTS if len(shape.size) in (4, 5) else LAYOUTS[:1]

    def variants(self, shape: Shape) -> tuple[bool, ...]:
        """The values of `Case.fused`: whole, and the norm alone where something can be left out."""
        return (True, False) if shape.fusion else (True,)

    def groups(
        self, shapes: Sequence[Shape], dtypes: Sequence[str], layouts: Sequence[str]
    ) -> Iterator[list[Case]]:
        """The cases that share their tensors, in the order of measuring; mode and threads open."""
        for shape in shapes:
            for layout in self.layouts(shape):
                for dtype in dtypes:
                    if layout in layouts:
                        yield [Case(shape, layout, dtype, f) for f in self.variants(shape)]

    def count(self, target: Target) -> int:
        """How many cases the target is a mean over."""
        return sum(
            layout in target.layouts
            for shape in select(self.name)
            if shape.number in target.numbers
            for layout in self.layouts(shape)
        )
