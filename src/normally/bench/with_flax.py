"""Flax's layers, compiled by JAX for the CPU.

Flax normalizes channels in the last dimension, so images and volumes are there in channels_last
alone. XLA's threads are as many as the process may use cores, and nothing sets them later, so only
cases with all of them are compared.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from .. import reference
from .contender import Contender
from .measure import Step
from .operator import Case, Operator

_TASKS = Path("/proc/self/task")
_POOL = "tf_XLAEigen"  # what XLA calls the threads of its pool


class FlaxBlock(nn.Module):
    """Norm, sum and activation with Flax's own defaults, but torch's eps; from torch to torch."""

    def __init__(self, operator: str, case: Case) -> None:
        super().__init__()
        import jax
        from jax import numpy as jnp

        self.norm, act = _norm(operator, case), _act(case.act)
        channels = case.shape.size[1]
        one = jnp.zeros((1,) * (len(case.shape.size) - 1) + (channels,))
        self.variables = self.norm.init(jax.random.key(0), one)
        self.two_outputs = operator == "add_rms_norm"

        def block(variables: Any, x: Any, residual: Any = None) -> Any:
            if self.two_outputs:
                total = x + residual
                return (self.norm.apply(variables, total), total), {}
            # The new running statistics are the second output.
            y, updated = self.norm.apply(variables, x, mutable=["batch_stats"])
            return act(y if residual is None else y + residual), updated

        def both(variables: Any, inputs: Any, grads: Any) -> Any:
            state = {name: value for name, value in variables.items() if name != "params"}

            def trained(params: Any, *inputs: Any) -> Any:
                return block({"params": params, **state}, *inputs)

            y, pull, updated = jax.vjp(trained, variables["params"], *inputs, has_aux=True)
            # The output too: without it the compiler would leave out what a network goes on with.
            return y, pull(grads), updated

        self.compiled: Callable[..., Any] = jax.jit(block)
        self.compiled_both: Callable[..., Any] = jax.jit(both)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Outputs in torch's order of dimensions."""
        outputs, _ = self.compiled(self.variables, *(_to_jax(x) for x in inputs))
        if self.two_outputs:
            return tuple(_to_torch(y) for y in outputs)
        return _to_torch(outputs)


class Flax(Contender):
    """flax.linen's norms under jax.jit, the gradients by jax.vjp."""

    name = "flax"

    def describe(self) -> str:
        """Versions and the size of XLA's pool, which is counted where the system shows threads."""
        if any(importlib.util.find_spec(name) is None for name in ("jax", "flax")):
            raise ValueError(
                "bench: also must name what is installed. Got 'flax', which is not; install it "
                'with: pip install "normally[bench]"'
            )
        # It is the CPU's layers that are compared.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax

        jax.devices()  # which starts the pool
        threads = _pool_size()
        counted = f"{threads} threads" if threads else "threads not counted"
        return f"flax {version('flax')}, jax {version('jax')}, XLA's pool of {counted}"

    def has(self, operator: Operator, case: Case) -> bool:
        """Training, as in the shape's network, in Flax's layout, with as many threads as XLA's."""
        return (
            case.fused
            and case.mode != "evaluation"
            and case.dtype in ("float32", "bfloat16", "float16")
            and case.layout == operator.layouts(case.shape)[-1]
            and case.threads == (_pool_size() or case.threads)
        )

    def build(self, operator: Operator, case: Case) -> nn.Module:
        """Compiled at its first call."""
        return FlaxBlock(operator.name, case)

    def make_step(
        self, module: nn.Module, inputs: Sequence[Tensor], mode: str, grads: Sequence[Tensor]
    ) -> Step:
        """One compiled call, over when its results are there."""
        import jax

        block = cast(FlaxBlock, module)
        given = [_to_jax(x) for x in inputs]
        if mode == "forward":
            return lambda: jax.block_until_ready(block.compiled(block.variables, *given))
        own = [_to_jax(grad) for grad in grads]
        cotangents = tuple(own) if block.two_outputs else own[0]
        return lambda: jax.block_until_ready(
            block.compiled_both(block.variables, given, cotangents)
        )


def _norm(operator: str, case: Case) -> Any:
    from flax import linen
    from jax import numpy as jnp

    # Without a dtype Flax would widen a half output to the parameters' float32.
    dtype = jnp.dtype(case.dtype)
    if operator in ("rms_norm", "add_rms_norm"):
        eps = reference.default_eps(case.torch_dtype)
        return linen.RMSNorm(epsilon=eps, dtype=dtype, param_dtype=dtype)
    common = {"epsilon": 1e-5, "dtype": dtype}
    if operator == "batch_norm":
        return linen.BatchNorm(use_running_average=False, momentum=0.9, **common)
    if operator == "group_norm":
        return linen.GroupNorm(num_groups=case.shape.options["num_groups"], **common)
    return {"instance_norm": linen.InstanceNorm, "layer_norm": linen.LayerNorm}[operator](**common)


def _act(name: str | None) -> Callable[[Any], Any]:
    import jax

    if name is None:
        return lambda x: x
    names = {"hardswish": "hard_swish"}
    return cast(Callable[[Any], Any], getattr(jax.nn, names.get(name, name)))


def _to_jax(x: Tensor) -> Any:
    import jax

    return jax.dlpack.from_dlpack(x.detach().movedim(1, -1).contiguous())


def _to_torch(array: Any) -> Tensor:
    return from_dlpack(array).movedim(-1, 1)


def _pool_size() -> int | None:
    """How many threads XLA has; None where the system does not show them."""
    names = []
    for task in _TASKS.glob("*/comm"):
        try:
            names.append(task.read_text(encoding="utf-8").strip())
        except OSError:  # it has ended meanwhile
            continue
    return sum(name.startswith(_POOL) for name in names) or None
