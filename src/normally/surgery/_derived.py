"""Classes made from a user's class at run time that can be pickled and copied.

A module gets such a class in place, keeps everything it has, and is still an instance of the class
that it had. What is pickled is that class and what it was derived for, not the derived one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch


class Derived:
    """Mixed in before the user's class; a subclass says what changes."""

    _base: ClassVar[type[torch.nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The base class, and the mixin that was put before it."""
        mixin = type(self).__mro__[1]
        return _rebuild, (mixin, self._base), self.__getstate__()


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
    return type(base.__name__, (mixin, base), members)


def _rebuild(mixin: type[Derived], base: type[torch.nn.Module]) -> Any:
    cls = derive(mixin, base)
    return cls.__new__(cls)
