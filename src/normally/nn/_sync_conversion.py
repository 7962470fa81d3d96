"""From batch norm to SyncBatchNorm and back, in place: a layer changes its class, nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm
from .lazy_batch_norm import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d

_LAZY: tuple[type, ...] = (
    LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d,
    torch.nn.LazyBatchNorm1d, torch.nn.LazyBatchNorm2d, torch.nn.LazyBatchNorm3d,
)  # fmt: skip
_PLAIN: tuple[type, ...] = (
    BatchNorm1d, BatchNorm2d, BatchNorm3d,
    torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm,
)  # fmt: skip

#: What a subclass may define without being another layer.
_HARMLESS = {
    "__init__", "__module__", "__doc__", "__annotations__", "__annotate_func__",
    "__annotations_cache__", "__static_attributes__", "__firstlineno__", "__parameters__",
    "__qualname__",
}  # fmt: skip


class _Origin(NamedTuple):
    """What a converted layer was."""

    cls: type[torch.nn.Module]
    #: What the conversion gave to the layer: attributes, and torch's layers a buffer.
    added: frozenset[str]
    process_group: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> _Origin:
        """Itself: nothing of it can change, and a process group cannot be copied."""
        return self


def check_group(group: Any, name: str, caller: str) -> None:
    """Refuse what is neither None nor a process group."""
    if group is None:
        return
    if not torch.distributed.is_available():
        raise RuntimeError(f"{caller}: {name} needs torch.distributed, which this torch lacks.")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"{caller}: {name} must be a torch.distributed.ProcessGroup, as new_group() makes, or "
            f"None for the default group. Got {name}={group!r}."
        )


def convert(model: torch.nn.Module, group: Any, plain: type, lazy: type) -> torch.nn.Module:
    """See `normally.convert_sync_batchnorm`; `plain` and `lazy` are what the layers become."""
    caller = "convert_sync_batchnorm"
    _check_model(model, caller)
    check_group(group, "group", caller)
    found, reasons = [], []
    for path, module in model.named_modules():
        reason = _why_not(module)
        if reason is not None:
            reasons.append(f"{path or 'the model itself'} ({type(module).__name__}): {reason}")
        elif isinstance(module, TorchBatchNorm):
            found.append(module)
    if reasons:  # before anything has changed
        raise TypeError(
            f"{caller}: model must have batch norms of known classes only. Got "
            + "; ".join(reasons)
            + ". Nothing was changed. Replace these layers, or convert the parts of the model that "
            "do not contain them."
        )
    for layer in found:
        if isinstance(layer, plain):
            if group is not None:
                layer.process_group = group
        else:
            _convert(layer, group, lazy if _family(type(layer)) in _LAZY else plain)
    return model


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """See `normally.revert_sync_batchnorm`."""
    _check_model(model, "revert_sync_batchnorm")
    for layer in model.modules():
        origin: _Origin | None = layer.__dict__.get("_origin")
        if origin is None:
            continue
        cls = origin.cls
        if _family(cls) in _LAZY and "_initialize_hook" not in layer.__dict__:
            cls = cls.cls_to_become  # type: ignore[attr-defined]  # it has met its first input
        layer.process_group = origin.process_group
        for name in origin.added:
            layer.__dict__.pop(name, None)
            layer._buffers.pop(name, None)
            layer._non_persistent_buffers_set.discard(name)
        layer.__class__ = cls
    return model


def _convert(layer: Any, group: Any, target: type) -> None:
    before = {*layer.__dict__, *layer._buffers}
    origin_class, own_group = type(layer), layer.__dict__.get("process_group")
    is_ours = isinstance(layer, _BatchNorm)
    layer.__class__ = target
    if not is_ours:  # what torch's layers do, said in our options
        layer._configure(None, None, 1, True, 0, "error", False)
        layer._count_skipped_updates()
    layer.process_group = own_group if group is None else group
    added = frozenset({*layer.__dict__, *layer._buffers, "_origin", "_path"} - before)
    layer._origin = _Origin(origin_class, added, own_group)


def _family(cls: type) -> type | None:
    """The known class that `cls` is, or is a subclass of that changes nothing of it."""
    for base in cls.__mro__:
        if base in _PLAIN or base in _LAZY:
            return base
        if set(vars(base)) - _HARMLESS:
            return None
    return None


def _why_not(module: torch.nn.Module) -> str | None:
    """Why a module cannot be converted; None if it can, or is no batch norm."""
    if isinstance(module, torch.jit.ScriptModule):
        if module._c.hasattr("running_mean"):
            return "it is scripted; convert the model first and script it then"
        return None
    if not isinstance(module, TorchBatchNorm) or "_origin" in module.__dict__:
        return None
    cls = type(module)
    # SyncBatchNorm and its lazy form, which have no place in the lists above.
    if isinstance(module, _BatchNorm) and hasattr(cls, "convert_sync_batchnorm"):
        return None
    if _family(cls) is None:
        bases = cls.__mro__[: cls.__mro__.index(TorchBatchNorm)]
        if any(base.__name__ == "FSDPModule" for base in bases):
            return "it is sharded by itself; convert the model first and shard it then"
        known = {base for cls in (*_PLAIN, *_LAZY) for base in cls.__mro__}
        changed = {name for base in bases if base not in known for name in vars(base)}
        own = ", ".join(sorted(changed - _HARMLESS)) or "no known class"
        return f"a subclass with methods or attributes that SyncBatchNorm would not use ({own})"
    if "forward" in module.__dict__:
        return "its forward was replaced, and SyncBatchNorm's would not be called"
    return None


def _check_model(model: torch.nn.Module, caller: str) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module. Got {type(model).__name__}.")
