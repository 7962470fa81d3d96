"""Promise 4: the same bits for any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.device.functional import batch_norm
from tests.helpers import (
    ACTS,
    DTYPES,
    assert_same_bits,
    cpu_only,
    lay_out,
    needs_kernels,
    spread,
    values,
)

# The reference backend sums with torch's own reductions, which do depend on the threads; the
# promise is the kernels'.
pytestmark = [needs_kernels, pytest.mark.usefixtures("threads")]

# Each is larger than any grain below which a kernel would not go parallel.
SHAPES = [
    (65536, 3), (4099, 65), (7, 1, 65537), (1, 1, 300_000), (2, 3, 40_001), (513, 300, 2),
    (64, 130, 7, 7), (16, 17, 33, 31), (2, 1, 400, 401), (3000, 16, 2, 2), (2, 5, 9, 31, 67),
]  # fmt: skip
LAYOUTS = ("contiguous", "channels_last", "strided")


def everything(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    act: str | None,
    training: bool,
) -> dict[str, Tensor]:
    leaves = [
        None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)
    ]
    running_mean, running_var = torch.zeros_like(weight), torch.ones_like(weight)
    y = batch_norm(
        leaves[0], running_mean, running_var, leaves[1], leaves[2], training,
        act=act, residual=leaves[3],
    )  # fmt: skip
    g = torch.empty_like(y).copy_(values(tuple(y.shape), y.dtype, seed=5))
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(y, present, g)
    names = [f"gradient {i}" for i, leaf in enumerate(leaves) if leaf is not None]
    return {
        "output": y.detach(), "running_mean": running_mean, "running_var": running_var,
        **dict(zip(names, gradients, strict=True)),
    }  # fmt: skip


@cpu_only("its threads")
@spread("shape, dtype, layout", SHAPES, DTYPES, LAYOUTS, keep=3)
def test_one_thread_equals_many(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    parameter_dtype = dtype if dtype is torch.float64 else torch.float32
    weight = torch.linspace(-1, 2, shape[1], dtype=parameter_dtype)
    bias = torch.linspace(1, -1, shape[1], dtype=parameter_dtype)
    x = lay_out(values(shape, dtype), layout)
    turn = SHAPES.index(shape) + LAYOUTS.index(layout)
    act = ACTS[turn % len(ACTS)]
    residual = torch.empty_like(x).copy_(x.flip(0)) if turn % 2 else None
    for training in (True, False):
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(everything(x, weight, bias, residual, act, training))
        for name, one in results[0].items():
            for other in results[1:]:
                assert_same_bits(other[name], one, f"{name}, {act}, {training}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_channel_does_not_depend_on_the_others(layout: str) -> None:
    """Other channels may hold anything; this one's bits stay."""
    x = values((33, 17, 49), torch.float32)
    y = batch_norm(lay_out(x, layout), None, None, training=True)
    changed = x.clone()
    changed[:, ::2] *= 1e6
    z = batch_norm(lay_out(changed, layout), None, None, training=True)
    assert_same_bits(z[:, 1::2], y[:, 1::2])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_in_evaluation_a_sample_does_not_depend_on_its_batch(layout: str) -> None:
    x = values((9, 17, 7, 7), torch.float32)
    mean, var = torch.randn(17), torch.rand(17) + 0.5
    together = batch_norm(lay_out(x, layout), mean, var, act="silu")
    for n in range(9):
        alone = batch_norm(lay_out(x[n : n + 1], layout), mean, var, act="silu")
        assert_same_bits(alone, together[n : n + 1])
