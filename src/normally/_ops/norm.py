"""What the norms without running statistics have in common as operators.

    name(input, residual, weight, bias, mask, …settings) -> (output, sum, stats)
    name_backward(grad_output, grad_sum, input, weight, bias, mask, stats, …settings, need)
        -> (grad_input, grad_weight, grad_bias)

With a residual, `sum` is input + residual in the input's dtype, it is what is normalized, and it
takes the input's place in the backward; without one it is empty. `mask` is bool and broadcastable
to the input. `stats` is what the kernels keep for the backward, in float64.

A norm is its formula, a differentiable torch expression, and the shape of its `stats`. The rest,
from the shape functions to double backward, vmap and forward mode, follows from these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..reference import hide
from ._library import autograd_again, define, record
from .norm_autograd import (
    NEED_INPUT,
    NEED_PARAMETERS,
    Formula,
    gradients_of,
    make_differentiable,
)


class Norm(NamedTuple):
    """The operators of a norm and its autograd in three circumstances."""

    formula: Formula
    forward: Any
    backward: Any
    statistics: Callable[..., Tensor] | None
    eager: Any
    transformable: Any

    def __call__(
        self,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, Tensor]:
        """Output and sum, by the route that fits: compiled, transformed or eager.

        Without a residual the second has no meaning.
        """
        output: Tensor
        total: Tensor
        arguments = (input, residual, weight, bias, mask, *settings)
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            output, total, _ = record(self.forward, *arguments)
        elif forward_ad._current_level >= 0:
            # Operators have no forward-mode formula; the plain expression does.
            total = input if residual is None else hide(input + residual, mask)
            output = self.formula(total, weight, bias, mask, *settings)
        elif torch._C._are_functorch_transforms_active():
            output, total, _ = self.transformable.apply(*arguments)
        elif torch.is_grad_enabled() and (
            input.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            if residual is None:
                return self.eager.apply(*arguments), input
            output, total = self.eager.apply(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output, total, _ = self.forward(*arguments)
        return output, total

    def with_stats(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, Tensor]:
        """Output and `stats`, without a derivative, of a norm that has `statistics`."""
        output: Tensor
        arguments = (input, None, weight, bias, mask, *settings)
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            output, _, stats = record(self.forward, *arguments)
        elif forward_ad._current_level >= 0:
            assert self.statistics is not None
            output = self.formula(input, weight, bias, mask, *settings)
            stats = self.statistics(input.detach(), mask, *settings)
        else:
            output, _, stats = self.transformable.apply(*arguments)
        return output, stats


def define_norm(
    name: str,
    settings: str,
    *,
    formula: Formula,
    stats_shape: Callable[..., tuple[int, ...]],
    statistics: Callable[..., Tensor] | None = None,
    gpu: str | None = None,
) -> Norm:
    """Define the two operators of a norm and everything that derives from its formula.

    Args:
        name: of the forward operator.
        settings: the schema of what follows the tensors.
        formula: see `Formula`.
        stats_shape: (input, *settings) to the shape of `stats`.
        statistics: (input, mask, *settings) to `stats`, where more than our backward reads it.
        gpu: the file of `_triton` with its `forward` and `backward`.
    """
    gradients = gradients_of(formula)

    def new_stats(input: Tensor, settings: tuple[Any, ...]) -> Tensor:
        dtype = torch.float32 if input.device.type == "mps" else torch.float64
        return input.new_empty(stats_shape(input, *settings), dtype=dtype)

    def fake_forward(input: Tensor, residual: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = torch.empty_like(input)
        total = input.new_empty(0) if residual is None else torch.empty_like(output)
        return output, total, new_stats(input, rest[3:])

    def run_formula(
        input: Tensor, residual: Any, weight: Any, bias: Any, mask: Any, *settings: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, total, stats = fake_forward(input, residual, weight, bias, mask, *settings)
        if residual is not None:
            input = total.copy_(hide(input + residual, mask))
        if input.numel():
            output.copy_(formula(input, weight, bias, mask, *settings))
        if statistics is None:
            stats.zero_()  # nobody reads it
        else:
            stats.copy_(statistics(input, mask, *settings))
        return output, total, stats

    def fake_backward(
        grad_output: Tensor, grad_sum: Any, input: Tensor, weight: Any, bias: Any, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        asked = ((input, NEED_INPUT), (weight, NEED_PARAMETERS), (bias, NEED_PARAMETERS))
        need = rest[-1]
        return tuple(  # type: ignore[return-value]
            input.new_empty(0) if t is None or not need & n else torch.empty_like(t)
            for t, n in asked
        )

    def run_gradients(
        grad_output: Tensor, grad_sum: Any, input: Tensor, weight: Any, bias: Any, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask, _stats, *settings, _need = rest
        results = fake_backward(grad_output, grad_sum, input, weight, bias, *rest)
        if input.numel() == 0:
            for target in results:
                target.zero_()
            return results
        given = (input, weight, bias)
        present = [t.detach().requires_grad_() for t in given if t is not None]
        leaves = iter(present)
        with autograd_again():
            tensors = (next(leaves) if t is not None else None for t in given)
            output = formula(*tensors, mask, *settings)
            found = iter(torch.autograd.grad(output, present, grad_output))
        for target, tensor in zip(results, given, strict=True):
            gradient = next(found) if tensor is not None else None
            if gradient is not None and target.numel():
                target.copy_(gradient)
        if grad_sum is not None and results[0].numel():
            results[0].add_(hide(grad_sum, mask))
        return results

    forward = define(
        f"{name}(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mask, "
        f"{settings}) -> (Tensor output, Tensor sum, Tensor stats)",
        fallback=run_formula,
        fake=fake_forward,
        gpu=gpu and f"{gpu}.forward",
    )
    backward = define(
        f"{name}_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? weight, "
        f"Tensor? bias, Tensor? mask, Tensor stats, {settings}, int need) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
        fallback=run_gradients,
        fake=fake_backward,
        gpu=gpu and f"{gpu}.backward",
    )
    return Norm(
        formula, forward, backward, statistics,
        *make_differentiable(name, formula, stats_shape, statistics, gradients, forward, backward),
    )  # fmt: skip
