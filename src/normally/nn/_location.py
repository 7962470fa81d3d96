"""Where in the user's model an error happened."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def path_of(layer: torch.nn.Module) -> str | None:
    """The layer's dotted path in the outermost module whose forward is running, if any.

    A layer does not know its own name. On the way to an error the time does not matter, so the
    call stack is searched for the modules that are being called, and the outermost one asked.
    """
    if torch.compiler.is_compiling():
        return None  # a compiler cannot trace the search
    path = None
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module) and module is not layer:
            for name, child in module.named_modules():
                if child is layer:
                    path = f"{name} of {type(module).__name__}"
                    break
        frame = frame.f_back  # type: ignore[assignment]
    return path


def located(error: Exception, layer: torch.nn.Module) -> Exception:
    """The same error with the layer's kind and path in the message."""
    path = path_of(layer)
    where = f"{type(layer).__name__} at {path}" if path else type(layer).__name__
    return type(error)(f"{error} [in {where}]")


def dims_error(expected: str, input: Tensor) -> ValueError:
    """Another number of dimensions than a layer takes, in torch's words."""
    return ValueError(
        f"expected {expected} input (got {input.dim()}D input), input size {tuple(input.shape)}"
    )
