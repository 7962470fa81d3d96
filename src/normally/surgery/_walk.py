"""Which modules of a model a verb is about: the one walker of all verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch

#: Names, patterns of names, or a question that is asked of each (path, module).
Selection = str | Iterable[str] | Callable[[str, torch.nn.Module], bool] | None


def check_model(model: object, caller: str) -> None:
    """Refuse what is no module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module. Got {type(model).__name__}.")


def walk(
    model: torch.nn.Module, only: Selection, skip: Selection, caller: str
) -> list[tuple[str, torch.nn.Module]]:
    """(path, module) of all modules that `only` selects and `skip` does not, each once.

    A name or pattern ("layer4", "*.bn2", "BatchNorm2d") selects a module by its path, by a path
    above it, or by the name of its class. A module that stands in several places has the path of
    the first.

    Raises:
        TypeError: if `model` is no module, or `only` or `skip` nothing of the kind.
        ValueError: if a name or pattern of `only` is none of any module.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    >>> [path for path, _ in walk(model, "BatchNorm*", None, "convert")]
    ['1']
    """
    check_model(model, caller)
    chosen, left_out = _question(only, "only", caller), _question(skip, "skip", caller)
    modules = list(model.named_modules())
    found = [
        (path, module)
        for path, module in modules
        if (chosen is None or chosen(path, module))
        and (left_out is None or not left_out(path, module))
    ]
    if only is not None and not callable(only):
        for pattern in _patterns(only):
            if not any(matches(pattern, path, module) for path, module in modules):
                raise ValueError(
                    f"{caller}: only must name modules or classes of the model, or be a pattern of "
                    f"such names. Got {pattern!r}, which is none; model.named_modules() lists them."
                )
    return found


def _question(
    selection: Selection, name: str, caller: str
) -> Callable[[str, torch.nn.Module], bool] | None:
    if selection is None or callable(selection):
        return selection
    patterns = _patterns(selection)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"{caller}: {name} must be a name, a pattern, several of them, or a function of (path, "
            f"module). Got {name}={selection!r}."
        )
    return lambda path, module: any(matches(pattern, path, module) for pattern in patterns)


def _patterns(selection: str | Iterable[str]) -> list[str]:
    return [selection] if isinstance(selection, str) else list(selection)


def matches(pattern: str, path: str, module: torch.nn.Module) -> bool:
    """Whether a name or pattern is that of a module, of a path above it, or of its class."""
    if fnmatchcase(type(module).__name__, pattern):
        return True
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
