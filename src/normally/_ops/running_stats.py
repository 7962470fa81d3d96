"""`normally::update_running_stats_`: the only operator that writes to a buffer.

It is apart from the normalization, in place and never differentiated, so that CUDA graphs,
functionalization and `torch.func` see one plain mutation. The count of batches, the cumulative
average's factor and the check for finite statistics all stay on the device: no synchronization.

`stats` is (3, C): mean, biased variance and number of values. A channel without values is left as
it is, and a batch that has values in none is not counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define


def _update_fallback(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    skipped_updates: Tensor | None,
    stats: Tensor,
    momentum: float | None,
    unbiased: bool,
) -> None:
    mean, var, count = stats.unbind()
    has_values = count > 0
    if unbiased:
        var = var * (count / (count - 1))
    pairs = [(r, b) for r, b in ((running_mean, mean), (running_var, var)) if r is not None]
    sound = has_values
    for running, batch in pairs:
        sound = sound & batch.to(running.dtype).isfinite()
    if num_batches_tracked is not None:
        num_batches_tracked += has_values.any()
    if skipped_updates is not None:
        skipped_updates += has_values & ~sound
    factor: float | Tensor
    if momentum is None:
        assert num_batches_tracked is not None  # functional.batch_norm refuses this
        entered = num_batches_tracked - (0 if skipped_updates is None else skipped_updates)
        factor = 1.0 / entered.clamp(min=1).to(mean.dtype)
    else:
        factor = momentum
    for running, batch in pairs:
        new = running.to(batch.dtype) * (1 - factor) + batch * factor
        running.copy_(torch.where(sound, new, running))


def _update_fake(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    skipped_updates: Tensor | None,
    stats: Tensor,
    momentum: float | None,
    unbiased: bool,
) -> None:
    return None


update = define(
    "update_running_stats_(Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor(d!)? skipped_updates, Tensor stats, float? momentum, "
    "bool unbiased) -> ()",
    fallback=_update_fallback,
    fake=_update_fake,
    gpu="running_stats.update",
)


def mark_changed(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Tell autograd that the buffers were written to: the compiled kernel works below it.

    A graph that saved one of them then raises in its backward instead of using the new values.
    """
    if not torch.compiler.is_compiling():
        for buffer in (running_mean, running_var):
            if buffer is not None and not buffer.is_inference():
                torch._C._increment_version((buffer,))


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward: an activation checkpoint's second one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def are_fixed() -> bool:
    """Whether this forward leaves the running statistics alone.

    It does where it is a checkpoint's second one, and where it becomes ONNX, whose constants they
    are then.
    """
    return is_recomputation() or torch.onnx.is_in_onnx_export()
