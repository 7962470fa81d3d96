"""Where the library under test runs: on NORMALLY_TEST_DEVICE, which is "cpu" by default.

The numbers of a test are made on the CPU and every expected value is computed there, so that a test
asks the same of every device. Only what the library itself does happens on DEVICE, by one of two
ways, neither of which does anything where that is the CPU:

- `tests.device.functional` has the functions of `normally.functional` for tensors of the CPU: what
  they take is moved to DEVICE, and what they give, or write in place, is moved back.
- `BornOnDevice` makes the tensors of a test on DEVICE, for the tests of layers: parameters, buffers
  and everything beside them are there, as users have it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map_only

from normally import _native, _triton

DEVICE = torch.device(os.environ.get("NORMALLY_TEST_DEVICE", "cpu"))
IS_CPU = DEVICE.type == "cpu"
CPU = torch.device("cpu")


def has_kernels(operator: str | None = None) -> bool:
    """Whether compiled kernels serve DEVICE, and not the formulas of `reference`.

    Triton's count in its interpreter, too. With the name of an operator: whether it is one of those
    that have a kernel there.
    """
    compiled = IS_CPU and _native.loaded is not None
    if not compiled and _triton.device_type != DEVICE.type:
        return False
    if operator is None:
        return True
    key = torch._C._dispatch_key_for_device(DEVICE.type)
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"normally::{operator}", key)


needs_kernels = pytest.mark.skipif(
    not has_kernels(), reason=f"no compiled kernels serve {DEVICE}; the reference does"
)
needs_native = pytest.mark.skipif(
    not IS_CPU or _native.loaded is None,
    reason="about the C++ kernels, which are not loaded" if IS_CPU else "about the C++ kernels",
)


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """For what has no meaning on another device."""
    return pytest.mark.skipif(not IS_CPU, reason=f"about the CPU alone: {reason}")


def backend() -> str:
    """What serves DEVICE, in words."""
    if not has_kernels():
        return "the reference formulas"
    if IS_CPU and _native.loaded is not None:
        return f"the C++ kernels ({_native.loaded})"
    return "the Triton kernels" + (" in the interpreter" if IS_CPU else "")


def _copied(x: Tensor, device: torch.device) -> Tensor:
    """`x` on another device with its shape, strides and offset; no part of a graph, and no view."""
    reach = 0
    if x.numel():
        last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        reach = x.storage_offset() + last + 1
    # All of the memory before and between the elements, so that nothing is aligned anew.
    memory = x.detach().as_strided((reach,), (1,), 0).to(device)
    empty = torch.empty(0, dtype=x.dtype, device=device)
    return empty.set_(memory.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def on_device(x: Tensor | None) -> Tensor | None:
    """`x` on DEVICE, detached, in the same layout: strides, offset and what is expanded.

    The memory is a copy unless DEVICE is the CPU.
    """
    if x is None:
        return None
    return x.detach() if x.device.type == DEVICE.type else _copied(x, DEVICE)


class _Move(torch.autograd.Function):
    """A copy on another device in the same layout; its derivative moves the other way."""

    @staticmethod
    def forward(x: Tensor, device: torch.device) -> Tensor:
        if torch._C._functorch.is_legacy_batchedtensor(x):  # gradcheck maps over the backward
            return x.to(device)
        return _copied(x, device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.device], output: Tensor) -> None:
        ctx.source, ctx.target = inputs[0].device, inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Move.apply(gradient, ctx.source), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Move.apply(tangent, ctx.target)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, device: Any) -> tuple[Tensor, Any]:
        return _Move.apply(x, device), in_dims[0]


#: What a function may write in place.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "skipped_updates")


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors on the CPU, run on DEVICE; itself where that is the CPU.

    Tensors of other devices are handed on, and with them alone the results stay where they are.
    """
    if IS_CPU:
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        sent: dict[str, tuple[Tensor, Tensor, int]] = {}
        for name, value in given.arguments.items():
            if isinstance(value, Tensor) and value.device == CPU:
                there = _Move.apply(value, DEVICE)
                sent[name] = value, there, there._version
                given.arguments[name] = there
        result = function(*given.args, **given.kwargs)
        for name in sent.keys() & set(BUFFERS):
            here, there, version = sent[name]
            # Kernels write counters without telling autograd, which has no use for them.
            if there._version != version or not there.is_floating_point():
                with torch.no_grad():
                    here.copy_(there)
        return tree_map_only(Tensor, fetched, result) if sent else result

    return call


def fetched(x: Tensor) -> Tensor:
    """`x` on the CPU."""
    return _Move.apply(x, CPU) if x.device.type == DEVICE.type else x


class BornOnDevice(TorchFunctionMode):
    """Inside, a tensor that is made without a device is made on the CPU and moved to DEVICE.

    So random numbers are those of the CPU; `torch.device(DEVICE)` as a context would have others,
    and no use for the CPU's generators.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function not in _device_constructors() or kwargs.get("device") is not None:
            return function(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        made = function(*args, **kwargs).to(DEVICE)
        return made.requires_grad_() if requires_grad else made
