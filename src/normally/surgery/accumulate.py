"""`accumulate`: batch norm under gradient accumulation."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch.nn.modules.batchnorm import _NormBase

from ..nn import SyncBatchNorm
from ..nn.batch_norm import _BatchNorm as OurBatchNorm
from ._frozen import has_frozen_statistics
from ._lockstep.collect import Accumulation
from ._lockstep.lockstep import Lockstep

__all__ = ["Accumulation", "Lockstep", "accumulate"]

#: The forwards that leave the batch's statistics in the buffers where momentum is 1.
_KNOWN_FORWARDS = (
    torch.nn.modules.batchnorm._BatchNorm.forward,
    torch.nn.SyncBatchNorm.forward,
    OurBatchNorm.forward,
    SyncBatchNorm.forward,
)


@overload
def accumulate(
    model: torch.nn.Module, steps: int, exact: Literal[False] = False
) -> Accumulation: ...
@overload
def accumulate(model: torch.nn.Module, steps: int, exact: Literal[True]) -> Lockstep: ...
def accumulate(model: torch.nn.Module, steps: int, exact: bool = False) -> Accumulation | Lockstep:
    """A context for gradient accumulation: `steps` micro-batches are one step of batch norm, too.

    By itself each micro-batch moves the running statistics: `steps` times an optimizer step, and a
    small last one as much as the others. Inside of this context what is collected enters once a
    step, weighted by the numbers of values (Chan et al. 1979, the parallel update):

        n = Σ n_k    mean = Σ n_k mean_k / n    var = Σ n_k (var_k + (mean_k - mean)²) / n

    that is mean and variance of all values of the step; `running_var` takes n/(n-1)·var, and
    `num_batches_tracked` counts 1. For a model of one batch norm, these are the running statistics
    of the large batch. In a deeper one they are not quite, as each micro-batch is still normalized
    with its own statistics. `exact=True` closes this gap: the object is then called with all
    micro-batches of a step, runs them in step, and every batch norm normalizes all of them
    together; outputs, gradients and buffers are those of the large batch, and so is the memory.

    A micro-batch is a forward of `model` in training in which a batch norm updates its statistics;
    evaluation inside of the context counts for nothing. Every `steps`-th one ends a step. On
    leaving the context a partial step enters with its own weight; `flush()` does so earlier, as at
    the end of an epoch. Where parts of the model are called instead of `model` itself, nothing
    counts them: `flush()` is then the end of a step. When an exception leaves the context the
    unfinished step is dropped, and a forward that fails and is caught leaves nothing.

    In state dicts and to whoever reads the buffers the statistics are those of the last whole step.
    SyncBatchNorm is collected over all processes, by one small collective more a step.

    Args:
        model: what is trained, its DistributedDataParallel included or not.
        steps: micro-batches an optimizer step, 1 or more.
        exact: normalize all micro-batches of a step together.

    Returns:
        A context manager; what it gives is `Accumulation`, with `flush()`, or `Lockstep`, which is
        called.

    Raises:
        ValueError: if `steps` is below 1.
        TypeError: for running statistics that cannot be collected; the message names the layers:
            classes with a `forward` of their own, instance norm that tracks statistics, scripted
            and compiled modules. With `exact`, forwards of any kind are run as they are.

    >>> layer = torch.nn.BatchNorm1d(1, momentum=1.0)
    >>> with accumulate(layer, steps=2):
    ...     for micro_batch in ([[1.0], [2.0]], [[3.0], [4.0], [5.0]]):
    ...         _ = layer(torch.tensor(micro_batch))
    >>> layer.running_mean, layer.running_var, layer.num_batches_tracked  # of 1, 2, 3, 4, 5
    (tensor([3.]), tensor([2.5000]), tensor(1))
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"accumulate: model must be a torch.nn.Module. Got {type(model).__name__}.")
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"accumulate: steps must be an integer. Got steps={steps!r}.")
    if steps < 1:
        raise ValueError(f"accumulate: steps must be 1 or more. Got steps={steps}.")
    layers = _layers(model, exact)
    if exact:
        return Lockstep(model, layers, steps)
    return Accumulation(model, layers, steps)


def _layers(model: torch.nn.Module, exact: bool) -> dict[str, torch.nn.Module]:
    """The batch norms of the model by path; TypeError for what holds statistics and is no such."""
    layers: dict[str, torch.nn.Module] = {}
    reasons = []
    for path, module in model.named_modules():
        if has_frozen_statistics(module):
            continue  # nothing moves them, whatever its forward is
        reason = _why_not(module, exact)
        if reason is not None:
            reasons.append(f"{path or 'the model itself'} ({type(module).__name__}): {reason}")
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            layers[path] = module
    if reasons:
        raise TypeError(
            "accumulate: model must have running statistics in batch norms of known classes only. "
            "Got " + "; ".join(reasons) + "."
        )
    return layers


def _why_not(module: torch.nn.Module, exact: bool) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        scripted = module._c.hasattr("running_mean")
        return "it is scripted; accumulate the model that is not" if scripted else None
    if isinstance(module, torch.nn.DataParallel):
        return "its replicas keep no statistics; use DistributedDataParallel"
    # Not by isinstance: that would import the compiler.
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    if compiled or type(module).__name__ == "OptimizedModule":
        return "compiled code does not call later hooks; accumulate the model that is not compiled"
    if exact and any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
        return "fully_shard gathers parameters for one forward at a time; exact=True runs several"
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        if exact:
            return None
        replaced = "forward" in module.__dict__ or type(module).forward not in _KNOWN_FORWARDS
        return "a forward of its own may use other buffers or momenta" if replaced else None
    if isinstance(module, _NormBase) and module.track_running_stats:
        return "instance norm's running statistics are averages over samples, not over values"
    return None
