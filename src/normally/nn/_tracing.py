"""The layers as leaves of `torch.fx`."""

from __future__ import annotations

from typing import Any

import torch


def traced(layer: torch.nn.Module, input: Any, **options: Any) -> Any:
    """One node for the whole layer, as symbolic tracing makes of torch's own.

    Args:
        layer: whose forward was called with a proxy.
        input: the proxy.
        options: the other arguments of that forward; None is left out.

    Raises:
        TraceError: if the layer is the root of the trace, which has no path.
    """
    tracer = input.tracer
    path = tracer.path_of_module(layer)
    if not path:
        raise torch.fx.proxy.TraceError(
            f"{type(layer).__name__} is a leaf of symbolic tracing and cannot be its root; "
            "trace a module that contains it."
        )
    given = {name: value for name, value in options.items() if value is not None}
    return tracer.create_proxy("call_module", path, (input,), given)
