"""Batch norm against the float64 reference: shapes, dtypes, layouts, and what may be absent."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.helpers import (
    ACTS,
    BOTH_HALVES,
    DTYPES,
    check_batch_norm,
    checkered,
    half_of,
    lay_out,
    layouts_of,
    spread,
    values,
)

# Spatial sizes and channel counts: 1, primes, and what kernels block by (lanes of 4 to 32, blocks
# of 64 to 4096) with one less and one more.
SHAPES = [
    (2, 1), (3, 2), (5, 3), (17, 8), (64, 15), (33, 16), (31, 17), (2, 513), (4, 1000),
    (3, 5, 1), (2, 3, 2), (7, 2, 4), (4, 16, 15), (3, 8, 16), (2, 24, 17), (5, 3, 31),
    (1, 2, 5000), (2, 1, 4095), (1, 1, 4096), (3, 2, 4097), (2, 3, 1023), (1, 3, 1024),
    (2, 2, 1025), (3, 5, 195), (2, 17, 196), (2, 65, 33), (3, 130, 5), (257, 3, 4), (1031, 2, 3),
    (2, 3, 1, 2), (1, 64, 2, 2), (4, 50, 7, 7), (2, 300, 4, 4), (3, 17, 4, 8), (2, 15, 3, 11),
    (1, 3, 14, 14), (2, 8, 5, 39), (3, 2, 1, 197), (4, 6, 49, 1), (2, 3, 13, 15), (9, 130, 1, 1),
    (2, 1, 32, 33), (2, 3, 2, 3, 5), (1, 16, 3, 3, 3), (3, 1, 1, 4, 4), (2, 17, 2, 2, 2),
]  # fmt: skip


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    """Each layout of a shape, with the activations and the absent tensors taking turns."""
    parameter_dtype = dtype if dtype is torch.float64 else torch.float32
    channels = shape[1]
    weight = torch.linspace(-1.5, 1.5, channels + 1, dtype=parameter_dtype)[1:]
    bias = torch.linspace(0.7, -0.9, channels, dtype=parameter_dtype)
    # The turns have lengths without a common divisor, so every pair meets in some shape.
    turn = SHAPES.index(shape)
    for index, layout in half_of(half, layouts_of(len(shape)), start=turn):
        x = lay_out(values(shape, dtype, seed=index), layout)
        check_batch_norm(
            x,
            weight if index % 3 else None,
            bias if index % 4 else None,
            values(shape, dtype, seed=index + 1) if index % 5 < 2 else None,
            training=index % 7 != 0,
            act=ACTS[index % len(ACTS)],
            gradient=("contiguous", "expanded batch", layout)[index % 3],
        )


SMALL = (5, 3, 7)
AFFINE = {"both": (True, True), "weight": (True, False), "bias": (False, True), "": (False, False)}


@spread("affine, training, dtype, half", AFFINE, (True, False), DTYPES, BOTH_HALVES)
def test_every_combination(affine: str, training: bool, dtype: torch.dtype, half: int) -> None:
    """All residuals times all activations, for rows (inner 21) and for channels innermost."""
    parameter_dtype = dtype if dtype is torch.float64 else torch.float32
    has_weight, has_bias = AFFINE[affine]
    weight = torch.tensor([1.5, -0.75, 4.0], dtype=parameter_dtype) if has_weight else None
    bias = torch.tensor([0.25, -2.0, 3.0], dtype=parameter_dtype) if has_bias else None
    layouts = ("contiguous", "channels_last")
    for layout, residual_kind, act in checkered(half, layouts, RESIDUALS, ACTS):
        x = lay_out(values(SMALL, dtype), layout)
        check_batch_norm(x, weight, bias, residual_of(residual_kind, x), training=training, act=act)


RESIDUALS = ("none", "same layout", "other layout", "broadcast", "other dtype")


def residual_of(kind: str, x: torch.Tensor) -> torch.Tensor | None:
    fresh = values(tuple(x.shape), x.dtype, seed=99)
    if kind == "none":
        return None
    if kind == "same layout":
        return torch.empty_like(x).copy_(fresh)
    if kind == "other layout":
        return fresh.movedim(1, -1).contiguous().movedim(-1, 1) if x.is_contiguous() else fresh
    if kind == "broadcast":
        return fresh[:1, :, :1]
    other = torch.float32 if x.dtype is not torch.float32 else torch.float64
    return fresh.to(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_parameters_of_the_half_input_dtype(dtype: torch.dtype, training: bool) -> None:
    x = values((6, 5, 9), dtype)
    weight = torch.linspace(0.5, 2.0, 5).to(dtype)
    bias = torch.linspace(-1.0, 1.0, 5).to(dtype)
    for act in ACTS:
        check_batch_norm(x, weight, bias, None, training=training, act=act)
        check_batch_norm(x, weight, None, x.flip(0), training=training, act=act)


@pytest.mark.parametrize("gradient", ["expanded", "strided", "order 201", "flipped C", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_gradients_in_any_layout(layout: str, gradient: str) -> None:
    x = lay_out(values((4, 17, 33), torch.float32), layout)
    weight, bias = torch.linspace(-1, 2, 17), torch.linspace(1, -1, 17)
    kind = "expanded batch" if gradient == "expanded" else gradient
    for act, residual in itertools.product((None, "relu", "silu"), (None, x.flip(0))):
        check_batch_norm(x, weight, bias, residual, act=act, gradient=kind)


@pytest.mark.parametrize("act", ACTS)
def test_gradient_of_a_sum(act: str | None) -> None:
    """`y.sum().backward()` hands in one number with strides of 0."""
    from tests.device.functional import batch_norm

    for layout in ("contiguous", "channels_last"):
        x = lay_out(values((3, 5, 4, 6), torch.float32), layout)
        residual = values((3, 5, 4, 6), torch.float32, seed=1)
        for other in (None, residual):
            results = []
            for expand in (True, False):
                leaf = x.detach().requires_grad_()
                y = batch_norm(leaf, None, None, training=True, act=act, residual=other)
                ones = torch.ones((), dtype=y.dtype).expand(y.shape)
                (gradient,) = torch.autograd.grad(y, leaf, ones if expand else ones.contiguous())
                results.append(gradient)
            torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one() -> None:
    from tests.device.functional import batch_norm

    names = ("input", "weight", "bias", "residual")
    tensors = (
        values((4, 3, 5), torch.float32),
        torch.ones(3),
        torch.zeros(3),
        torch.randn(4, 3, 5),
    )
    for act, needed in itertools.product(
        (None, "relu", "gelu"), itertools.product((False, True), repeat=4)
    ):
        if not any(needed):
            continue
        leaves = [t.clone().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        all_leaves = [t.clone().requires_grad_() for t in tensors]
        for given in (leaves, all_leaves):
            input, weight, bias, residual = given
            y = batch_norm(input, None, None, weight, bias, True, residual=residual, act=act)
            (y * y).sum().backward()
        for name, need, leaf, full in zip(names, needed, leaves, all_leaves, strict=True):
            if need:
                torch.testing.assert_close(leaf.grad, full.grad, rtol=1e-5, atol=1e-6, msg=name)
            else:
                assert leaf.grad is None, name
