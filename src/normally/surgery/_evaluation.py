"""A model in evaluation for a while, run as it is: neither compiled, nor in several replicas."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def evaluation(model: torch.nn.Module) -> Iterator[None]:
    """A context in which the whole model is in evaluation; then all flags are what they were.

    DistributedDataParallel does not send the buffers of rank 0 around at each forward, as processes
    may have different numbers of batches, and DataParallel runs its one module.
    """
    # Not by eval(): a model may override it, to freeze layers or to merge weights.
    flags = [(module, "training", flag(module), False) for module in model.modules()]
    for module in model.modules():
        for kind, name, value in _WRAPPERS:
            if isinstance(module, kind):
                flags.append((module, name, getattr(module, name), value))
    try:
        for module, name, _, value in flags:
            setattr(module, name, value)
        # Code compiled before would not call what is put in a layer's place now.
        with _as_written():
            yield
    finally:
        for module, name, before, _ in flags:
            setattr(module, name, before)


def flag(module: torch.nn.Module) -> bool:
    """What a module was last told by `train()`, which a frozen one keeps to itself."""
    told: bool = module.__dict__.get("training", module.training)
    return told


_WRAPPERS: tuple[tuple[type, str, Any], ...] = (
    (torch.nn.DataParallel, "device_ids", []),
    (torch.nn.parallel.DistributedDataParallel, "require_forward_param_sync", False),
    (torch.nn.parallel.DistributedDataParallel, "require_backward_grad_sync", False),
)


def _as_written() -> Any:
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
