"""Classes made from a user's class at run time that can be pickled and copied.

A module gets such a class in place, keeps everything it has, and is still an instance of the class
that it had. What is pickled is that class and what it was derived for, not the derived one. Classes
can be derived from derived ones.
"""

from __future__ import annotations

import copyreg
import functools
from typing import Any, ClassVar

import torch


class Derived:
    """Mixed in before the user's class; a subclass says what changes."""

    _base: ClassVar[type[torch.nn.Module]]


_classes: dict[tuple[type, type], Any] = {}


def derive(mixin: type[Derived], base: type[torch.nn.Module]) -> Any:
    """The class of `base`'s name that is both; the same one for the same two."""
    if (mixin, base) not in _classes:
        _classes[mixin, base] = _make(mixin, base)
    return _classes[mixin, base]


def _make(mixin: type, base: type) -> type:
    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_base": base,
    }
    # What is derived already has the class that its own class needs.
    of_base: Any = type(base)
    kind = of_base if issubclass(base, Derived) else _metaclass(of_base)
    return kind(base.__name__, (mixin, base), members)  # type: ignore[no-any-return]


@functools.cache
def _metaclass(of_base: Any) -> Any:
    """Of classes that are pickled by what they were derived from: `pickle` asks a class's class."""
    metaclass: Any = type(f"Derived{of_base.__name__}", (of_base,), {})
    copyreg.pickle(metaclass, _reduce)
    return metaclass


def _reduce(cls: Any) -> tuple[Any, ...]:
    return derive, (cls.__mro__[1], cls._base)
