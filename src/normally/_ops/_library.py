"""The `normally` operator namespace, and what registering an operator in it means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: Schemas are defined here, once; compiled libraries only add implementations.
LIBRARY = torch.library.Library("normally", "DEF")


def define(schema: str, *, fallback: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator by its schema and return its overload.

    `fallback` serves every device that nobody wrote a kernel for; a compiled kernel, registered
    for its own device, takes precedence. `fake` gives the outputs' shapes, dtypes and strides.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normally::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.normally, name).default
