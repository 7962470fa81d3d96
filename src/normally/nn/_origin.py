"""A layer that changes its class in place, remembers what it was, and can go back.

It stays the same object: parameters (optimizers hold them), buffers, hooks, the training flag and
attributes of one's own stay as they are, and `isinstance` sees the new class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Origin(NamedTuple):
    """What a layer was before a verb of `normally` changed it."""

    verb: str
    cls: type[torch.nn.Module]
    #: Attributes and buffers that it did not have.
    added: frozenset[str]
    #: Attributes that it had with another value.
    replaced: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        """Itself: nothing of it changes, and a process group in it cannot be copied."""
        return self


def origins(layer: torch.nn.Module) -> tuple[Origin, ...]:
    """What the layer was, the oldest first; empty where it is what it was made as."""
    found: tuple[Origin, ...] = layer.__dict__.get("_origins", ())
    return found


def changed_by(layer: torch.nn.Module, verb: str) -> bool:
    """Whether this verb was the last to change the layer."""
    past = origins(layer)
    return bool(past) and past[-1].verb == verb


@contextmanager
def becoming(
    layer: Any, cls: type[torch.nn.Module], verb: str, owned: Iterable[str] = ()
) -> Iterator[None]:
    """Give the layer another class; what the block then sets is taken away by `go_back`.

    The block may set attributes and register buffers, and must not remove any. `owned` are
    attributes that the new class may set later, and that are then put back as well.
    """
    attributes, buffers = dict(layer.__dict__), set(layer._buffers)
    before = type(layer)
    layer.__class__ = cls
    yield
    added = {*layer.__dict__, *owned} - attributes.keys() | layer._buffers.keys() - buffers
    replaced = {
        name: value
        for name, value in attributes.items()
        if name in owned or layer.__dict__[name] is not value
    }
    layer._origins = (*origins(layer), Origin(verb, before, frozenset(added), replaced))


def go_back(layer: Any, verb: str) -> bool:
    """Undo what this verb did, if it was the last; bit for bit the layer that would be there."""
    if not changed_by(layer, verb):
        return False
    *past, origin = origins(layer)
    cls: Any = origin.cls
    is_lazy = issubclass(cls, torch.nn.modules.lazy.LazyModuleMixin)
    if is_lazy and "_initialize_hook" not in layer.__dict__:
        cls = cls.cls_to_become  # it has met its first input
    layer.__class__ = cls
    layer.__dict__.update(origin.replaced)
    for name in origin.added:
        layer.__dict__.pop(name, None)
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
    if past:
        layer._origins = tuple(past)
    else:
        layer.__dict__.pop("_origins", None)
    return True


#: What a subclass may define without being another layer.
_HARMLESS = {
    "__init__", "__module__", "__doc__", "__annotations__", "__annotate_func__",
    "__annotations_cache__", "__static_attributes__", "__firstlineno__", "__parameters__",
    "__qualname__",
}  # fmt: skip


def family(cls: type, known: tuple[type, ...]) -> type | None:
    """The known class that `cls` is, or is a subclass of that changes nothing of it."""
    for base in cls.__mro__:
        if base in known:
            return base
        if set(vars(base)) - _HARMLESS:
            return None
    return None


def own_members(cls: type, known: tuple[type, ...]) -> list[str]:
    """What the bases of `cls` define that none of the known classes' bases does."""
    bases = {base for each in known for base in each.__mro__}
    return sorted({name for b in cls.__mro__ if b not in bases for name in vars(b)} - _HARMLESS)
