"""`accumulate` without `exact`: statistics collected over micro-batches, which enter once."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer
from torch.utils.hooks import RemovableHandle

from ... import distributed
from ..._ops import running_stats
from ...functional._masks import prepare_mask
from ...nn import SyncBatchNorm
from ...nn.batch_norm import _BatchNorm as OurBatchNorm
from .lockstep import refuse_second

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "_skipped_updates")


class _Lent(NamedTuple):
    """What a layer had before its buffers were replaced for one forward."""

    buffers: dict[str, Tensor | None]
    momentum: float | None
    unbiased: bool | None
    #: How many values a channel has in this process's micro-batch.
    total: int | Tensor


class _Record(NamedTuple):
    """One micro-batch of one layer: (2, C) mean and variance, and its number of values.

    The variance is biased for our layers and unbiased for torch's.
    """

    moments: Tensor
    total: Tensor


class Accumulation:
    """What `accumulate` gives: a context in which running statistics enter once a step.

    Every layer's forward is lent buffers of its own and momentum 1, so that what it leaves in them
    are the micro-batch's statistics. The layer's real buffers are touched by `flush` alone, so a
    state dict that is taken between two micro-batches is one of the last whole step.
    """

    def __init__(
        self, model: torch.nn.Module, layers: dict[str, torch.nn.Module], steps: int
    ) -> None:
        self._model = model
        self._layers = layers
        self._steps = steps
        self._handles: list[RemovableHandle] = []
        self._active = False
        self._clear()

    def _clear(self) -> None:
        self._micro_batches = 0
        self._is_inside = False  # of a forward of the model
        self._lent: dict[torch.nn.Module, _Lent] = {}
        self._records: dict[torch.nn.Module, list[_Record]] = {}
        # Of the model's forward that is running: an exception in it takes them all away.
        self._pending: list[tuple[torch.nn.Module, _Record]] = []
        self._counts: dict[torch.nn.Module, Tensor] = {}

    def __enter__(self) -> Accumulation:
        refuse_second(self._layers)
        self._clear()
        self._active = True
        self._remember_counts()
        keep, model = self._handles.append, self._model
        keep(model.register_forward_pre_hook(self._begin))
        for layer in self._layers.values():
            # After the hooks that may change the input, before those that see the output.
            keep(layer.register_forward_pre_hook(self._lend, with_kwargs=True))
            keep(layer.register_forward_hook(self._take, prepend=True, always_call=True))
            keep(layer.register_load_state_dict_post_hook(self._forget_count))
        keep(model.register_forward_hook(self._commit))
        keep(model.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._active = False
        try:
            if kind is None:
                self.flush()
        finally:
            self._clear()

    def flush(self) -> None:
        """What was collected enters now, although there may be fewer than `steps` micro-batches.

        For the last, partial step of an epoch inside of one context; without micro-batches since
        the last step it does nothing. With SyncBatchNorm every process of the group must call it.
        """
        records, self._records, self._micro_batches = self._records, {}, 0
        self._refuse_bypassed(records)
        if not records:
            return
        with torch.no_grad():
            merged = _merge(records)
            for layer, stats in merged.items():
                _update(layer, stats)
        self._remember_counts()

    def _remember_counts(self) -> None:
        for layer in self._layers.values():
            counter = layer._buffers.get("num_batches_tracked")
            if counter is not None and not isinstance(counter, UninitializedBuffer):
                self._counts[layer] = counter.detach().clone()

    def _forget_count(self, layer: torch.nn.Module, _: Any) -> None:
        """After a state dict was loaded: a count from elsewhere says nothing."""
        self._counts.pop(layer, None)

    def _begin(self, model: torch.nn.Module, args: Any) -> None:
        """Before a forward of the model."""
        if not self._active or running_stats.is_recomputation():
            return
        self._pending.clear()
        self._is_inside = True

    def _lend(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer's forward: buffers that take this micro-batch's statistics alone."""
        running_mean = layer._buffers.get("running_mean")
        tracks = layer.training and layer.track_running_stats
        if not self._active or not tracks or running_mean is None:
            return
        buffers, ours = layer._buffers, isinstance(layer, OurBatchNorm)
        own = {name: buffers[name] for name in _BUFFERS if name in buffers}
        count = _count(layer, *args, **kwargs)
        unbiased = layer.unbiased if ours else None
        self._lent[layer] = _Lent(own, layer.momentum, unbiased, count)
        with torch.no_grad():
            for name, tensor in own.items():
                # Evaluation's own values: on_single_value="running" may normalize with them.
                if name.startswith("running") and tensor is not None and ours:
                    buffers[name] = tensor.to(_wide(tensor), copy=True)
                elif tensor is not None:
                    buffers[name] = torch.zeros_like(tensor)
        layer.momentum = 1.0
        if ours:
            layer.unbiased = False

    def _take(self, layer: Any, args: Any, output: Any) -> None:
        """After a layer's forward, failed ones included: its own buffers back."""
        lent = self._lent.pop(layer, None)
        if lent is None:
            return
        left = {name: layer._buffers[name] for name in lent.buffers}
        layer._buffers.update(lent.buffers)
        layer.momentum = lent.momentum
        if lent.unbiased is not None:
            layer.unbiased = lent.unbiased
        # Without an output it failed; a checkpoint's second forward was counted in the first.
        if isinstance(output, Tensor) and not running_stats.is_recomputation():
            with torch.no_grad():
                record = _read(left, lent.total, ours=lent.unbiased is not None)
            if self._is_inside:
                self._pending.append((layer, record))
            else:
                self._records.setdefault(layer, []).append(record)

    def _commit(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        """After a forward of the model that succeeded: a micro-batch, if any layer trained."""
        if not self._is_inside or running_stats.is_recomputation():
            return
        for layer, record in self._pending:
            self._records.setdefault(layer, []).append(record)
        if self._pending:
            self._pending.clear()
            self._micro_batches += 1
            if self._micro_batches == self._steps:
                self.flush()

    def _end(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        """After any forward of the model: a failed one leaves nothing."""
        if not running_stats.is_recomputation():
            self._is_inside = False
            self._pending.clear()

    def _refuse_bypassed(self, seen: Mapping[torch.nn.Module, Any]) -> None:
        """Raise if a layer counted a batch by itself: its hooks were not called."""
        for path, layer in self._layers.items():
            counter, before = layer._buffers.get("num_batches_tracked"), self._counts.get(layer)
            if layer in seen or not layer.training or counter is None or before is None:
                continue
            if bool(counter > before):  # DistributedDataParallel writes it, too, but no higher one
                raise RuntimeError(
                    f"accumulate: {path or type(layer).__name__} updated its running statistics by "
                    "itself: code that torch.compile made before does not call the hooks of this "
                    "context. Accumulate the model that is not compiled, or call "
                    "torch.compiler.reset() before the context."
                )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _count(
    layer: torch.nn.Module,
    input: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
) -> int | Tensor:
    """How many values a channel has in a call of `layer.forward`."""
    channel_dim = getattr(layer, "channel_dim", 1)
    if not isinstance(input, Tensor) or not -input.dim() <= channel_dim < input.dim():
        return 0  # the layer itself has the words for it
    if mask is None and lengths is None:
        return input.numel() // max(1, input.shape[channel_dim])
    try:
        kept = prepare_mask(input, mask, lengths, channel_dim, "accumulate")
    except (ValueError, TypeError):
        return 0  # likewise
    assert kept is not None  # for mypy
    shape = list(input.shape)
    shape[channel_dim] = 1
    return kept.expand(shape).sum()


def _read(left: Mapping[str, Tensor | None], count: int | Tensor, ours: bool) -> _Record:
    """The statistics of a micro-batch from what it left in the lent buffers."""
    mean, var = left["running_mean"], left["running_var"]
    assert mean is not None  # `_lend` saw to it
    assert var is not None
    wide = _wide(mean)
    total = torch.as_tensor(count, device=mean.device).to(wide)
    moments = torch.stack((mean, var)).to(wide)
    if not ours:
        return _Record(moments, total)
    counter, skipped = left.get("num_batches_tracked"), left.get("_skipped_updates")
    if counter is not None:  # nothing entered: all is masked, or a single value
        total = total * (counter != 0)
    if skipped is not None:  # refused: the whole step will be, as that of the large batch
        moments = torch.where(skipped != 0, torch.nan, moments)
    return _Record(moments, total)


def _merge(records: Mapping[torch.nn.Module, list[_Record]]) -> dict[torch.nn.Module, Tensor]:
    """Per layer the (3, C) statistics of all micro-batches' values, on all processes."""
    counts = {layer: torch.stack([r.total for r in found]) for layer, found in records.items()}
    for group, layers in _groups(records).items():
        # The moments are the group's already; how many values they are of is known here alone.
        together = torch.cat([counts[layer] for layer in layers])
        torch.distributed.all_reduce(together, group=group)
        sizes = [len(counts[layer]) for layer in layers]
        counts.update(zip(layers, together.split(sizes), strict=True))
    merged = {}
    for layer, found in records.items():
        moments = torch.stack([record.moments for record in found])  # (K, 2, C)
        count = counts[layer].view(-1, 1, 1).expand(-1, 1, moments.shape[-1])
        if not isinstance(layer, OurBatchNorm):
            biased = ((count - 1) / count.clamp(min=1)).clamp(min=0)
            moments = moments * torch.cat((torch.ones_like(biased), biased), 1)
        moments = torch.where(count > 0, moments, torch.zeros_like(moments))
        merged[layer] = distributed.merge(torch.cat((moments, count), 1))
    return merged


def _groups(layers: Mapping[torch.nn.Module, Any]) -> dict[Any, list[torch.nn.Module]]:
    """The layers that share their statistics with other processes, by process group."""
    groups: dict[Any, list[torch.nn.Module]] = {}
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return groups
    for layer in layers:
        if isinstance(layer, SyncBatchNorm | torch.nn.SyncBatchNorm):
            group = layer.process_group or torch.distributed.group.WORLD
            if torch.distributed.get_world_size(group) > 1:
                groups.setdefault(group, []).append(layer)
    return groups


def _update(layer: Any, stats: Tensor) -> None:
    running_mean, running_var, counter, skipped = (layer._buffers.get(n) for n in _BUFFERS)
    if layer.momentum is None and counter is None:
        return  # as torch: there is nothing to divide by
    unbiased = getattr(layer, "unbiased", True)
    running_stats.update(
        running_mean, running_var, counter, skipped, stats, layer.momentum, unbiased
    )
    running_stats.mark_changed(running_mean, running_var)
