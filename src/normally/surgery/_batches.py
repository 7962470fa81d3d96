"""The batches of unlabelled data, and how a model is called with one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

#: Called with the model and a batch on its device; what the model is given is its affair.
Forward = Callable[[torch.nn.Module, Any], Any]


class Batches:
    """An iterable of batches that a model is called with, one after the other.

    Of a tuple or list the first element is the input. Of a mapping the model gets those entries, by
    name, that its forward takes; the first entry alone if it takes none of them.

    Args:
        model: it.
        data: an iterable of batches.
        forward: how the model is called with one; None is as above.
        steps: at most so many.
        repeat: the reason why the data is gone through more than once; None if it is not.
        caller: whom the errors name.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data: Iterable[Any],
        forward: Forward | None,
        steps: int | None,
        repeat: str | None,
        caller: str,
    ) -> None:
        if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
            _refuse_kind(data, caller)
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool)):
            raise TypeError(f"{caller}: steps must be an integer or None. Got steps={steps!r}.")
        if steps is not None and steps < 1:
            raise ValueError(f"{caller}: steps must be 1 or more. Got steps={steps}.")
        if repeat is not None and isinstance(data, Iterator):
            raise ValueError(
                f"{caller}: data must be something to go through again, as a list or a DataLoader "
                f"is: {repeat}. Got {type(data).__name__}, which gives every batch once."
            )
        self._model, self._data, self.steps = model, data, steps
        self._forward = forward
        self._taken = _taken(model)  # now: layers get other forwards while they are measured
        self._caller = caller
        self._device = _device(model)

    @property
    def count(self) -> int | None:
        """How many there are; None where the data does not say."""
        if not isinstance(self._data, Sized):
            return self.steps
        try:
            length = len(self._data)
        except TypeError:  # a DataLoader of an iterable without a length
            return self.steps
        return length if self.steps is None else min(length, self.steps)

    def since(self, start: int) -> Iterator[Any]:
        """All batches but the first `start`."""
        batches = islice(self._data, self.steps)
        for done in range(start):
            if next(batches, self) is self:
                raise ValueError(
                    f"{self._caller}: data must have the {start} batches that are counted in the "
                    f"file of resume, and more. Got {done} batches; give the same data again."
                )
        return batches

    def forward(self, batch: Any) -> Any:
        """The model's output for one batch, which is moved to its device."""
        batch = _moved(batch, self._device)
        if self._forward is not None:
            return self._forward(self._model, batch)
        batch = _input(batch)
        if not isinstance(batch, Mapping):
            return self._model(batch)
        taken = {k: v for k, v in batch.items() if self._taken is None or k in self._taken}
        return self._model(**taken) if taken else self._model(next(iter(batch.values())))


def _input(batch: Any) -> Any:
    """The input in a batch of the usual forms, as in `torch.optim.swa_utils.update_bn`."""
    if isinstance(batch, tuple | list | Mapping) and not batch:
        raise ValueError(f"a batch must have an input. Got an empty {type(batch).__name__}.")
    return batch[0] if isinstance(batch, tuple | list) else batch


def _taken(model: Any) -> set[str] | None:
    """The names of what the model's forward takes; None if it takes any."""
    while isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):  # that of torch.compile
        model = model.module if isinstance(model, _WRAPPERS) else model._orig_mod
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}


_WRAPPERS = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


def _device(model: torch.nn.Module) -> torch.device | None:
    """Where the model is; None if it is in several places, and so the input's place is unknown."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def _moved(batch: Any, device: torch.device | None) -> Any:
    if device is None:
        return batch
    if isinstance(batch, Mapping) and not isinstance(batch, dict):
        batch = dict(batch)  # a BatchEncoding, of which tree_map knows nothing
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)


def _refuse_kind(data: object, caller: str) -> None:
    kind = type(data).__name__
    hint = f" One batch is data=[{'x' if isinstance(data, Tensor) else 'batch'}]."
    raise TypeError(
        f"{caller}: data must be an iterable of batches, such as a DataLoader or a list of "
        f"tensors. Got {kind}." + (hint if isinstance(data, Tensor | Mapping) else "")
    )
