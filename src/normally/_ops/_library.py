"""The `normally` operator namespace, and what registering an operator in it means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import _triton

#: Schemas are defined here, once; compiled libraries only add implementations.
LIBRARY = torch.library.Library("normally", "DEF")

_fakes: dict[Any, Callable[..., Any]] = {}
_decompositions: dict[Any, Callable[..., Any]] = {}


def define(
    schema: str,
    *,
    fallback: Callable[..., Any],
    fake: Callable[..., Any],
    gpu: str | None = None,
) -> Any:
    """Define an operator by its schema and return its overload.

    `fallback` serves every device that nobody wrote a kernel for; a compiled kernel, registered
    for its own device, takes precedence. `fake` gives the outputs' shapes, dtypes and strides.
    `gpu` names the function of `_triton` that fills them, "file.function".
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    if gpu is not None and _triton.device_type is not None:
        LIBRARY.impl(name, _triton.implement(gpu, fake), _triton.device_type.upper())
    torch.library.register_fake(f"normally::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.normally, name).default
    _fakes[operator] = fake
    return operator


def register_decomposition(operator: Any, decomposition: Callable[..., Any]) -> None:
    """Say what an operator is in torch's own, for exporters that know no others."""
    _decompositions[operator] = decomposition
    torch._decomp.register_decomposition(operator)(decomposition)
    # Where sizes are symbols, torch takes shapes and strides from a decomposition, unless there is
    # a function for just that.
    torch._decomp.register_decomposition(operator, type="meta")(_fakes[operator])


def record(operator: Any, *arguments: Any) -> Any:
    """Call an operator where something writes the calls down: a compiler or a tracer.

    ONNX' older exporter, a tracer, has no table of decompositions.
    """
    if torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export():
        return _decompositions[operator](*arguments)
    return operator(*arguments)


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


class EagerFunction(torch.autograd.Function):
    """A derivative without the dispatcher's Python round trips, for plain eager autograd."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Without the base class's look for functorch, which the caller has done: 3 µs."""
        # mypy takes the two-argument super for a static call of an abstract method.
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def vjp(
    function: Callable[..., Any], primals: Sequence[Tensor | None]
) -> tuple[Any, Callable[[Any], tuple[Tensor | None, ...]]]:
    """`torch.func.vjp` of a function some of whose arguments may be None, as their gradients are.

    What it gives can be differentiated again.
    """

    def fill(present: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
        given = iter(present)
        return tuple(next(given) if t is not None else None for t in primals)

    # Where has_aux is False the result is a pair; torch's annotation leaves it open.
    outputs, pull = torch.func.vjp(  # type: ignore[misc]
        lambda *present: function(*fill(present)), *(t for t in primals if t is not None)
    )
    return outputs, lambda cotangents: fill(pull(cotangents))


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
