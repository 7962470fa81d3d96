"""How the modules of a model are called on an example: the pattern of each call, and how often."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._evaluation import flag


class Given:
    """Stands for a tensor in a pattern."""


class Pattern(NamedTuple):
    """The arguments of a call: `Given` where a tensor is, else the plain value itself."""

    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Pattern | None:
        """The pattern of a call; None where an argument is neither a tensor nor plain."""
        pattern = cls(tuple(map(_entry, args)), tuple((k, _entry(v)) for k, v in kwargs.items()))
        return None if _Opaque in (*pattern.args, *(v for _, v in pattern.kwargs)) else pattern

    @property
    def tensors(self) -> int:
        """How many there are."""
        return sum(entry is Given for entry in (*self.args, *(v for _, v in self.kwargs)))

    def take(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """The tensors of a call of this pattern; None if the call has another."""
        if len(args) != len(self.args) or len(kwargs) != len(self.kwargs):
            return None
        found = []
        for entry, value in zip(self.args, args, strict=True):
            if entry is Given and isinstance(value, Tensor | torch.fx.Proxy):
                found.append(value)
            elif not _same(entry, value):
                return None
        for name, entry in self.kwargs:
            value = kwargs.get(name, _Opaque)
            if entry is Given and isinstance(value, Tensor | torch.fx.Proxy):
                found.append(value)
            elif not _same(entry, value):
                return None
        return found

    def fill(self, tensors: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call of this pattern with these tensors."""
        rest = iter(tensors)
        args = [next(rest) if entry is Given else entry for entry in self.args]
        return args, {k: next(rest) if entry is Given else entry for k, entry in self.kwargs}


class _Opaque:
    """Stands for what no pattern can have."""


_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


def _entry(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Given
    is_plain = isinstance(value, _PLAIN) or (
        isinstance(value, tuple) and all(isinstance(item, _PLAIN) for item in value)
    )
    return value if is_plain else _Opaque


def _same(entry: Any, value: Any) -> bool:
    return entry is value or (entry is not Given and type(entry) is type(value) and entry == value)


class Calls(NamedTuple):
    """What was seen while a model ran."""

    #: By module: how often it was called.
    counts: dict[torch.nn.Module, int]
    #: By module: how it was called, or why there is no one pattern.
    patterns: dict[torch.nn.Module, Pattern | str]
    #: The modules that were called.
    paths: dict[str, torch.nn.Module]
    #: What the model returned.
    output: Any


def as_call(example_inputs: Any, caller: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that `example_inputs` are: a tensor, a sequence of arguments, or keywords.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TypeError(
        f"{caller}: example_inputs must be a tensor, a tuple of arguments, or a dict of keyword "
        f"arguments. Got {type(example_inputs).__name__}."
    )


def observe(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Calls:
    """Run the model once in evaluation mode, without gradients, and see who is called how."""
    counts: dict[torch.nn.Module, int] = {}
    patterns: dict[torch.nn.Module, Pattern | str] = {}

    def see(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        counts[module] = counts.get(module, 0) + 1
        pattern = Pattern.of(args, kwargs) or "it takes more than tensors and plain values"
        if patterns.setdefault(module, pattern) != pattern:
            patterns[module] = "it is called in several ways"

    handles = [m.register_forward_pre_hook(see, with_kwargs=True) for m in model.modules()]
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng():
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    paths = {path: module for path, module in model.named_modules() if module in counts}
    return Calls(counts, patterns, paths, output)


@contextmanager
def evaluating(model: torch.nn.Module, training: bool = False) -> Iterator[None]:
    """All modules in one mode; each one's own afterwards."""
    flags = [(module, flag(module)) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, told in flags:
            module.training = told
