"""The derivatives of the norms' operators: registered, for eager autograd, for `torch.func`.

The backward is an operator too. What it computes is the derivative of the norm's formula, and so
its own derivative is that of the same expression: nothing here treats a statistic as a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import hide
from ._library import LIBRARY, EagerFunction, map_elements, vjp

# What the backward must compute, as bits of `need`.
NEED_INPUT, NEED_PARAMETERS = 1, 2

#: (input, weight, bias, mask, *settings) -> output in the input's dtype.
Formula = Callable[..., Tensor]


def gradients_of(formula: Formula) -> Callable[..., tuple[Tensor | None, ...]]:
    """The derivative of a formula as a function that can be differentiated again."""

    def gradients(
        grad_output: Tensor,
        grad_sum: Tensor | None,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        settings: Any,
    ) -> tuple[Tensor | None, ...]:
        def of_tensors(*tensors: Tensor | None) -> Tensor:
            return formula(*tensors, mask, *settings)

        _, pull = vjp(of_tensors, (input, weight, bias))
        grad_input, *others = pull(grad_output)
        if grad_sum is not None:
            assert grad_input is not None  # there is always an input
            grad_input = grad_input + hide(grad_sum, mask)
        return (grad_input, *others)

    return gradients


def make_differentiable(
    name: str,
    formula: Formula,
    stats_shape: Callable[..., tuple[int, ...]],
    statistics: Callable[..., Tensor] | None,
    gradients: Callable[..., tuple[Tensor | None, ...]],
    forward: Any,
    backward: Any,
) -> tuple[Any, Any]:
    """Register the derivatives of a norm's two operators, and vmap.

    Returns:
        The derivative for plain eager autograd and that for the transforms of `torch.func`.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        input, residual, weight, bias, mask, *settings = inputs
        _, total, stats = outputs
        ctx.save_for_backward(input if residual is None else total, weight, bias, mask, stats)
        ctx.settings = settings
        ctx.adds = residual is not None

    def setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    def differentiate(
        ctx: Any,
        saved: tuple[Any, ...],
        grad_output: Tensor | None,
        grad_sum: Tensor | None,
        call: Callable[..., tuple[Tensor, ...]],
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        adds = ctx.adds
        if grad_output is None:  # only the sum was used
            grad_sum = None if grad_sum is None else hide(grad_sum, saved[3])
            return (grad_sum, grad_sum if adds else None, *(None,) * (len(needs) - 2))
        need = (NEED_INPUT if needs[0] or needs[1] else 0) | (
            NEED_PARAMETERS if needs[2] or needs[3] else 0
        )
        results = call(grad_output, grad_sum if adds else None, *saved, *ctx.settings, need)
        grad_input = results[0]
        return (
            grad_input if needs[0] else None,
            grad_input if needs[1] else None,
            results[1] if needs[2] else None,
            results[2] if needs[3] else None,
            *(None,) * (len(needs) - 4),
        )

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.settings = inputs[7:-1]

    def double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *primals, mask = ctx.saved_tensors

        def of_tensors(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            return tuple(g for g in gradients(*tensors, mask, ctx.settings) if g is not None)

        first, pull = vjp(of_tensors, primals)
        # What was not asked for came back empty: its cotangent is zero.
        asked = iter(zip(grads, (True, *(t is not None for t in primals[3:])), strict=True))
        cotangents = tuple(
            c.to(g.dtype) if c is not None and c.shape == g.shape else torch.zeros_like(g)
            for (c, _), g in zip((pair for pair in asked if pair[1]), first, strict=True)
        )
        return (*pull(cotangents), *(None,) * (len(ctx.needs_input_grad) - 5))

    torch.library.register_autograd(
        f"normally::{name}",
        lambda ctx, a, b, _: differentiate(ctx, ctx.saved_tensors, a, b, backward),
        setup_context=lambda ctx, inputs, output: setup_forward(ctx, inputs, output),
        lib=LIBRARY,
    )
    torch.library.register_autograd(
        f"normally::{name}_backward",
        double_backward,
        setup_context=lambda ctx, inputs, output: save_backward(ctx, inputs, output),
        lib=LIBRARY,
    )

    def plain_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The operator as torch expressions, for vmap."""
        input, residual, weight, bias, mask, *settings = arguments
        total = input.new_empty(0) if residual is None else hide(input + residual, mask)
        output = formula(input if residual is None else total, weight, bias, mask, *settings)
        if statistics is not None:
            return output, total, statistics(input, mask, *settings)
        return output, total, input.new_zeros(stats_shape(input, *settings), dtype=torch.float64)

    def plain_backward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, mask, _stats = arguments[:7]
        results = gradients(*tensors, mask, arguments[7:-1])
        return tuple(tensors[2].new_empty(0) if g is None else g for g in results)

    def map_forward(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        mapped = torch.func.vmap(plain_forward, in_dims=in_dims, randomness="error")
        return mapped(*arguments), (0, 0, 0)

    def map_backward(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        mapped = torch.func.vmap(plain_backward, in_dims=in_dims, randomness="error")
        return mapped(*arguments), (0, 0, 0)

    for suffix, operator in (("", forward), ("_backward", backward)):
        torch.library.register_vmap(
            f"normally::{name}{suffix}", map_elements(operator), lib=LIBRARY
        )

    class Eager(EagerFunction):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            """The output, and the sum where there is one."""
            with torch._C._AutoDispatchBelowAutograd():
                outputs = forward(*inputs)
            ctx.set_materialize_grads(False)
            save(ctx, inputs, outputs)
            return outputs[0] if inputs[1] is None else outputs[:2]

        @staticmethod
        def backward(
            ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None = None
        ) -> tuple[Tensor | None, ...]:
            """Differentiable itself where the caller asked for a graph."""
            # Outside of the guard below: unpacking may run a checkpointed forward, with autograd.
            saved = ctx.saved_tensors
            if torch.is_grad_enabled():
                return differentiate(ctx, saved, grad_output, grad_sum, backward)
            with torch._C._AutoDispatchBelowAutograd():
                return differentiate(ctx, saved, grad_output, grad_sum, backward)

    class TransformableBackward(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return backward(*inputs)

        setup_context = staticmethod(save_backward)
        backward = staticmethod(double_backward)
        vmap = staticmethod(map_backward)

    class Transformable(torch.autograd.Function):
        """The derivative in the form that `torch.func` transforms can take apart and nest."""

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return forward(*inputs)

        setup_context = staticmethod(setup_forward)
        vmap = staticmethod(map_forward)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            """Through a function that has a derivative under transforms, too."""
            call = TransformableBackward.apply
            return differentiate(ctx, ctx.saved_tensors, grads[0], grads[1], call)

    for kind in (Eager, Transformable, TransformableBackward):
        title = "".join(part.capitalize() for part in name.split("_"))
        kind.__name__ = kind.__qualname__ = title + kind.__name__.removeprefix("Eager")
    return Eager, Transformable
