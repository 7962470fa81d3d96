"""What a step keeps for its backward, and the most that it holds at once."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .measure import Step

# Kineto announces every start and stop on stderr unless told not to before its first use.
_QUIET = {"KINETO_LOG_LEVEL": "99"}


def saved_bytes(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Bytes of the storages saved for backward, each once, parameters and buffers not counted.

    >>> x = torch.ones(3, 4, requires_grad=True)
    >>> saved_bytes(nn.ReLU(), [x])  # its output
    48
    """
    owned = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    # Holding each tensor keeps its address from being given to another.
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*inputs)
    total = sum(
        tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in owned
    )
    del output
    return total


def peak_bytes(step: Step) -> int | None:
    """The most that `step` has allocated at one time, beyond what existed before it.

    From the allocator's own events, so temporaries inside an operator count. None where torch was
    built without its profiler.
    """
    if not torch.profiler.kineto_available():
        return None
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    results = profile.kineto_results
    if results is None:
        return None
    changes = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
