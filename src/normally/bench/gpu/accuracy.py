"""`bench.accuracy` on the device, on whole tensors: a GPU has the memory and the float64 for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from ..accuracy import RATIOS, _as_tuple, _largest_error, sample_size
from ..operator import Case, Operator
from .steps import make_inputs

_FEWEST_CHANNELS = 16
Errors = dict[str, dict[str, float | None]]  # by contender, then by mean/std


def errors(
    operator: Operator,
    case: Case,
    builds: Mapping[str, Callable[[], nn.Module]],
    device: torch.device,
    limit: int,
) -> Errors:
    """For each contender the largest |output - exact| of a training forward at `RATIOS`.

    As `bench.accuracy.errors`. A contender that raises has no errors: its time says why. Tensors
    of more than `limit` elements are cut to fewer samples or channels.
    """
    fewest = case.shape.options.get("num_groups", _FEWEST_CHANNELS)
    size = sample_size(case.shape.size, limit, fewest)
    case = replace(case, shape=replace(case.shape, size=size))
    norm = operator.theirs(case).to(device).train()  # fresh: it has everybody's parameters
    found: Errors = {}
    for ratio in RATIOS:
        key = "1" if ratio == 1 else f"{ratio:.0e}"
        inputs = make_inputs(case, device, seed=int(ratio), mean=ratio)
        if not all(tensor.isfinite().all() for tensor in inputs):
            found = {name: {**found.get(name, {}), key: None} for name in builds}
            continue
        with torch.no_grad():
            exact = _as_tuple(operator.exact(norm, inputs))
            for name, build in builds.items():
                try:
                    outputs = _as_tuple(build().to(device).train()(*inputs))
                    error = _largest_error(outputs, exact)
                except Exception:
                    continue
                found.setdefault(name, {})[key] = error
    return found
