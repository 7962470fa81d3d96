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
from ._library import LIBRARY, define

# What the backward must compute, as bits of `need`.
NEED_INPUT, NEED_PARAMETERS = 1, 2

#: (input, weight, bias, mask, *settings) -> output in the input's dtype.
Formula = Callable[..., Tensor]


class Norm(NamedTuple):
    """The operators of a norm and its autograd in three circumstances."""

    formula: Formula
    forward: Any
    backward: Any
    eager: Any
    transformable: Any
    statistics: Callable[..., Tensor] | None

    def __call__(
        self,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, Tensor]:
        """Output and sum, by the route that fits: compiled, transformed or eager."""
        output: Tensor
        total: Tensor
        arguments = (input, residual, weight, bias, mask, *settings)
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            output, total, _ = self.forward(*arguments)
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
            output, _, stats = self.forward(*arguments)
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
) -> Norm:
    """Define the two operators of a norm and everything that derives from its formula.

    Args:
        name: of the forward operator.
        settings: the schema of what follows the tensors.
        formula: see `Formula`.
        stats_shape: (input, *settings) to the shape of `stats`.
        statistics: (input, mask, *settings) to `stats`, where more than our backward reads it.
    """
    gradients = _gradients_of(formula)

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
        tensors = (grad_output, grad_sum, input, weight, bias)
        for target, gradient in zip(results, gradients(*tensors, mask, settings), strict=True):
            if target.numel():
                target.copy_(gradient)
        return results

    forward = define(
        f"{name}(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mask, "
        f"{settings}) -> (Tensor output, Tensor sum, Tensor stats)",
        fallback=run_formula,
        fake=fake_forward,
    )
    backward = define(
        f"{name}_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? weight, "
        f"Tensor? bias, Tensor? mask, Tensor stats, {settings}, int need) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
        fallback=run_gradients,
        fake=fake_backward,
    )
    return _with_autograd(
        name, formula, stats_shape, statistics, gradients, forward, backward
    )


def _gradients_of(formula: Formula) -> Callable[..., tuple[Tensor | None, ...]]:
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
        given = (input, weight, bias)
        present = [t for t in given if t is not None]

        def of_present(*tensors: Tensor) -> Tensor:
            values = iter(tensors)
            return formula(
                *(next(values) if t is not None else None for t in given), mask, *settings
            )

        _, vjp = torch.func.vjp(of_present, *present)  # type: ignore[misc]
        results = iter(vjp(grad_output))
        grad_input, *others = (next(results) if t is not None else None for t in given)
        if grad_sum is not None:
            grad_input = grad_input + hide(grad_sum, mask)
        return (grad_input, *others)

    return gradients


def _with_autograd(
    name: str,
    formula: Formula,
    stats_shape: Callable[..., tuple[int, ...]],
    statistics: Callable[..., Tensor] | None,
    gradients: Callable[..., tuple[Tensor | None, ...]],
    forward: Any,
    backward: Any,
) -> Norm:
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
        present = [t for t in primals if t is not None]

        def of_present(*tensors: Tensor) -> tuple[Tensor, ...]:
            values = iter(tensors)
            given = (next(values) if t is not None else None for t in primals)
            return tuple(g for g in gradients(*given, mask, ctx.settings) if g is not None)

        first, vjp = torch.func.vjp(of_present, *present)  # type: ignore[misc]
        # What was not asked for came back empty: its cotangent is zero.
        asked = iter(zip(grads, (True, *(t is not None for t in primals[3:])), strict=True))
        cotangents = tuple(
            c.to(g.dtype) if c is not None and c.shape == g.shape else torch.zeros_like(g)
            for (c, _), g in zip((pair for pair in asked if pair[1]), first, strict=True)
        )
        second = iter(vjp(cotangents))
        result = tuple(next(second) if t is not None else None for t in primals)
        return (*result, *(None,) * (len(ctx.needs_input_grad) - 5))

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

    torch.library.register_vmap(f"normally::{name}", map_forward, lib=LIBRARY)
    torch.library.register_vmap(f"normally::{name}_backward", map_backward, lib=LIBRARY)

    class Eager(torch.autograd.Function):
        """The derivative without the dispatcher's Python round trips, for plain eager autograd."""

        @classmethod
        def apply(cls, *args: Any) -> tuple[Tensor, Tensor]:
            """Without the base class's look for functorch, which the caller has done: 3 µs."""
            return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc,no-any-return]

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = forward(*inputs)
            ctx.set_materialize_grads(False)
            save(ctx, inputs, outputs)
            return outputs[0], outputs[1]

        @staticmethod
        def backward(
            ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None
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
    return Norm(formula, forward, backward, Eager, Transformable, statistics)
