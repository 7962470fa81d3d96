"""What batch norms are given to normalize, and with which statistics they then do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...functional._masks import prepare_mask
from ...nn.batch_norm import _BatchNorm as OurBatchNorm
from .._foreign import ConvertedBatchNorm

#: The batch's own statistics, the layer's running ones, or this mean and variance.
Answer = Literal["batch", "running"] | tuple[Tensor, Tensor]

#: Called with a layer's path, its input as (N, C, *) and its mask; says what normalizes.
See = Callable[[str, Tensor, Tensor | None], Answer]

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "_skipped_updates")


@contextmanager
def tapped(layers: Mapping[str, torch.nn.Module], see: See) -> Iterator[set[str]]:
    """A context in which `see` is shown what each of the layers, in evaluation, normalizes.

    Nothing is written to a buffer, and nothing is said to other processes. Of our layers it is what
    they are called with; of all others it is what they hand to `torch.nn.functional.batch_norm`, so
    that whatever a class does around it does not matter.

    Yields:
        The paths of the layers that were called. One of them that `see` was not shown has a
        forward of its own.
    """
    called: set[str] = set()
    before = {path: layer.__dict__.get("forward") for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            call = _call_ours if _is_ours(layer) else _call_theirs
            layer.forward = partial(call, layer, layer.forward, partial(see, path), path, called)
        yield called
    finally:
        for path, layer in layers.items():
            replaced = before[path]
            if replaced is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = replaced


def values_of(x: Tensor, mask: Tensor | None) -> int:
    """How many values a channel of (N, C, *) has."""
    return x.numel() // x.shape[1] if mask is None else int(mask.sum())


def has_variance(layer: torch.nn.Module, values: int) -> bool:
    """Whether so many values a channel can normalize themselves: a single one cannot."""
    return values > max(1, getattr(layer, "correction", 0))


def _is_ours(layer: torch.nn.Module) -> bool:
    known = (OurBatchNorm.forward, ConvertedBatchNorm.forward)
    return "forward" not in layer.__dict__ and type(layer).forward in known


def _call_ours(
    layer: Any,
    forward: Callable[..., Tensor],
    see: Callable[[Tensor, Tensor | None], Answer],
    path: str,
    called: set[str],
    /,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    called.add(path)
    shown = _shown(layer, *args, **kwargs)
    answer: Answer = "running" if shown is None else see(*shown)
    if answer == "running":
        return forward(*args, **kwargs)
    lent: dict[str, Tensor | None] = dict.fromkeys(_BUFFERS)
    if answer != "batch":
        lent = {"running_mean": answer[0], "running_var": answer[1]}
    own = {name: layer._buffers[name] for name in lent if name in layer._buffers}
    try:
        layer._buffers.update({name: lent[name] for name in own})
        return forward(*args, **kwargs)
    finally:
        layer._buffers.update(own)


def _shown(
    layer: Any,
    input: Any = None,
    residual: Any = None,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None] | None:
    """Input and mask with the channel at dimension 1; None for what the layer will refuse."""
    channel_dim = getattr(layer, "channel_dim", 1)
    if not isinstance(input, Tensor) or not -input.dim() <= channel_dim < input.dim():
        return None
    if input.dim() < 2 or input.shape[channel_dim] != layer.running_mean.numel():
        return None
    try:
        mask = prepare_mask(input, mask, lengths, channel_dim, type(layer).__name__)
    except (ValueError, TypeError):
        return None
    moved = None if mask is None else mask.movedim(channel_dim, 1)
    return input.movedim(channel_dim, 1), moved


def _call_theirs(
    layer: Any,
    forward: Callable[..., Any],
    see: Callable[[Tensor, Tensor | None], Answer],
    path: str,
    called: set[str],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    called.add(path)
    with _Watch(layer, see):
        return forward(*args, **kwargs)


class _Watch(TorchFunctionMode):
    """Around one call of a layer: its call of torch's function is seen, and answered."""

    def __init__(self, layer: Any, see: Callable[[Tensor, Tensor | None], Answer]) -> None:
        super().__init__()
        self._layer = layer
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function, with other statistics if it is the layer's batch norm."""
        kwargs = kwargs or {}
        if func is not torch.nn.functional.batch_norm:
            return func(*args, **kwargs)
        names = ("input", "running_mean", "running_var")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given["running_mean"] is not self._layer.running_mean:
            return func(*args, **kwargs)
        answer = self._see(given["input"], None)
        if answer == "batch":
            given.update(running_mean=None, running_var=None, training=True)
        elif answer != "running":
            mean, var = answer
            own = self._layer.running_mean
            given.update(running_mean=mean.to(own), running_var=var.to(own))
        return func(**given)
