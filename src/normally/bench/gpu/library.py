"""Another library of GPU kernels as a contender, where it can be imported."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

from torch import Tensor, nn

from ..contender import Contender
from ..measure import Step
from ..operator import Case, Operator
from .steps import make_step


class Library(Contender):
    """One whose layers take and return torch's tensors, so its steps are made as ours."""

    package: str  # as it is installed
    modules: tuple[str, ...]  # as they are imported: all that its layers need

    def describe(self) -> str:
        """Name and version.

        Raises:
            ValueError: where it cannot be imported, with the reason.
        """
        try:
            for module in self.modules:
                importlib.import_module(module)
        except Exception as error:  # a missing extension or another torch raises anything
            raise ValueError(f"{self.name}: {type(error).__name__}: {error}") from error
        try:
            return f"{self.name} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            return self.name

    def make_step(
        self, module: nn.Module, inputs: Sequence[Tensor], mode: str, grads: Sequence[Tensor]
    ) -> Step:
        """As ours."""
        return make_step(module, inputs, mode, grads)

    def get(self, path: str) -> Any:
        """Something of one of its modules, "module:name"."""
        module, _, name = path.partition(":")
        return getattr(importlib.import_module(module), name)


def usable(libraries: Iterable[Library]) -> tuple[list[Library], dict[str, str], list[str]]:
    """Those that can be imported, what they are, and why the others cannot."""
    found, versions, reasons = [], {}, []
    for library in libraries:
        try:
            versions[library.name] = library.describe()
        except ValueError as error:
            reasons.append(str(error))
        else:
            found.append(library)
    return found, versions, reasons


def eps_of(operator: Operator, case: Case) -> float:
    """What torch's layer adds, so that no error comes from another eps."""
    from ... import reference

    eps = getattr(_norm(operator.theirs(case)), "eps", None)
    return reference.default_eps(case.torch_dtype) if eps is None else float(eps)


def _norm(module: nn.Module) -> nn.Module:
    norm = getattr(module, "norm", module)
    assert isinstance(norm, nn.Module)
    return norm
