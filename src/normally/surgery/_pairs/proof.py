"""The proof of a change: two copies of a module, changed and not, computed with in float64.

What passes has been shown to give the same outputs, gradients and buffers on the example, to
rounding. In float64 a wrong wire shows, however many layers blur the last bits of float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._dataflow.flow import CONVOLUTIONS
from .._dataflow.hooks import forget_hooks

#: By dtype: how far two results may be apart, relative to the largest value. torch's derivatives of
#: hardswish and hardsigmoid have 1/6 in float32 (3e-8); a batch norm's eps of 1e-5 that got lost is
#: 5e-6, gelu's tanh form 1e-3, a wrong wire of order 1.
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-4}


class ProofError(Exception):
    """Why a change was not kept."""


def prove(
    module: torch.nn.Module,
    change: Callable[[torch.nn.Module], None],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    modes: Sequence[bool],
    gradients: bool,
) -> float:
    """Change a copy of the module and compare it with another copy.

    Args:
        module: what is changed; itself stays as it is.
        change: changes the copy that it gets.
        args: what the module is called with on the example.
        kwargs: likewise.
        modes: the modes to compare in: True is training.
        gradients: compare the gradients of inputs and parameters, and the buffers, as well. Those
            of convolutions and linear layers are left out: they follow from the gradients around.

    Returns:
        The largest deviation, relative to the largest value of its kind.

    Raises:
        ProofError: if the two differ by more than rounding.
    """
    reason: Exception | None = None
    for dtype, tolerance, call in _attempts(args, kwargs):
        try:
            before = _copy(module, dtype)
        except Exception as error:
            raise ProofError(f"it cannot be copied ({type(error).__name__}: {error})") from error
        try:
            expected = [_run(before, call, mode, gradients) for mode in modes]
        except Exception as error:  # something in it insists on another dtype, or on more samples
            reason = error
            continue
        try:
            after = _copy(module, dtype)
            change(after)
            found = [_run(after, call, mode, gradients) for mode in modes]
        except Exception as error:
            raise ProofError(f"changed, it raises {type(error).__name__}: {error}") from error
        deviation = max(map(_deviation, expected, found), default=0.0)
        if not deviation <= tolerance:
            raise ProofError(f"it changed the result, by {deviation:.1e} of its largest value")
        return deviation
    raise ProofError(f"the example cannot be computed with ({reason})")


def _attempts(
    args: Sequence[Any], kwargs: dict[str, Any]
) -> Iterator[tuple[torch.dtype, float, Any]]:
    """Dtype, tolerance and call: two samples in float64 if that is possible."""
    for dtype, tolerance in _TOLERANCES.items():
        call = _cast((list(args), dict(kwargs)), dtype)
        few = _first_two(call)
        if few is not None:
            yield dtype, tolerance, few
        yield dtype, tolerance, call


def _first_two(call: Any) -> Any:
    """The call with two samples in place of more, if the first sizes of its tensors agree."""
    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, Tensor) and t.dim() > 0]
    sizes = {len(t) for t in tensors}
    if len(sizes) != 1 or max(sizes) <= 2:
        return None
    return pytree.tree_map(lambda t: t[:2] if isinstance(t, Tensor) and t.dim() > 0 else t, call)


def _copy(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    twin = forget_hooks(copy.deepcopy(module)).to(dtype)
    for part in twin.modules():
        if isinstance(part, CONVOLUTIONS):  # half the time, for what the other gradients show
            part.requires_grad_(False)
    return twin


def _cast(call: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            is_float = value.is_floating_point()
            return value.detach().to(dtype if is_float else value.dtype, copy=True)
        return value

    return pytree.tree_map(cast, call)


def _run(module: torch.nn.Module, call: Any, training: bool, gradients: bool) -> list[list[Tensor]]:
    """Outputs, buffers and gradients, each a list of tensors."""
    module.train(training)
    leaves, (args, kwargs) = _fresh(call, gradients)
    with torch.random.fork_rng(), torch.set_grad_enabled(gradients):
        torch.manual_seed(0)
        try:
            output = module(*args, **kwargs)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            leaves, (args, kwargs) = _fresh(_doubled(call), gradients)
            output = module(*args, **kwargs)
    outputs = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    groups = [[t.detach() for t in outputs]]
    if gradients:
        groups.append([b.detach().clone() for b in module.buffers()])
        groups.append(_gradients(outputs, [*leaves, *module.parameters()]))
    return groups


def _fresh(call: Any, gradients: bool) -> tuple[list[Tensor], Any]:
    """The tensors of a call as leaves of autograd, and the call with copies of them.

    Copies, because a module may write into what it gets, and must not into a leaf.
    """
    leaves = []

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        leaf = value.detach().clone().requires_grad_(gradients and value.is_floating_point())
        leaves.append(leaf)
        return leaf.clone()

    return leaves, pytree.tree_map(fresh, call)


def _doubled(call: Any) -> Any:
    """Two samples in place of one, which batch norm cannot train with."""
    generator = torch.Generator().manual_seed(0)

    def double(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        other = value
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            other = value + noise.to(value)
        return torch.cat((value, other))

    return pytree.tree_map(double, call)


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    wanted = [t for t in inputs if t.requires_grad]
    differentiable = [t for t in outputs if t.requires_grad]
    if not wanted or not differentiable:
        return []
    cotangents = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in differentiable
    ]
    found = torch.autograd.grad(differentiable, wanted, cotangents, allow_unused=True)
    return [
        torch.zeros_like(t) if gradient is None else gradient
        for t, gradient in zip(wanted, found, strict=True)
    ]


def _deviation(expected: list[list[Tensor]], found: list[list[Tensor]]) -> float:
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        if [t.shape for t in one] != [t.shape for t in other]:
            return math.inf
        pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if a.numel()]
        scales = [a.abs().max().item() for a, _ in pairs]
        # Against its own largest value, or a thousandth of the kind's: a gradient that is 0 but for
        # rounding, as that of a bias before a batch norm, says nothing.
        least = 1e-3 * max(scales, default=0.0)
        for (a, b), scale in zip(pairs, scales, strict=True):
            if torch.equal(a, b):
                continue
            apart = (a - b).abs().max().item()
            if not math.isfinite(apart):  # the same infinities and NaN are no difference
                if not torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0)):
                    return math.inf
                continue
            largest = max(largest, apart / max(scale, least))
    return largest
