"""Further contenders beside ours and torch's: other libraries, where they are installed.

They are timed after the interleaved rounds and by themselves, so that their threads, which wait
actively for a while after each call, neither disturb ours and torch's nor are disturbed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from .measure import Step
from .operator import Case, Operator


class Contender(ABC):
    """Another library's layers: which cases it has, and how a step of it is made."""

    name: str

    @abstractmethod
    def describe(self) -> str:
        """Version and threads, as the results say them.

        Raises:
            ValueError: where it is not installed, with what installs it.
        """

    @abstractmethod
    def has(self, operator: Operator, case: Case) -> bool:
        """Whether the library has the case, in the layout that is its own."""

    @abstractmethod
    def build(self, operator: Operator, case: Case) -> nn.Module:
        """From torch's tensors to torch's tensors, for the error against float64."""

    @abstractmethod
    def make_step(
        self, module: nn.Module, inputs: Sequence[Tensor], mode: str, grads: Sequence[Tensor]
    ) -> Step:
        """One step on the library's own tensors, as `measure.make_step`."""
