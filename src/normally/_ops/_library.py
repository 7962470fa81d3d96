"""The `normally` operator namespace, and what registering an operator in it means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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


def map_elements(operator: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A vmap rule that calls `operator` once for every element of the mapped dimension.

    For operators that are called as such: inside their rules torch takes no further vmap.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            operator(
                *(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


@contextmanager
def autograd_again() -> Iterator[None]:
    """Autograd inside an operator's implementation, which torch runs below it."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
        if excluded.has(key):
            excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
