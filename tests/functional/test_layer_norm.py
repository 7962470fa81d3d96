"""Layer norm against the float64 reference: shapes, dtypes, layouts, and what may be absent."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.device.functional import layer_norm
from tests.helpers import (
    ACTS,
    BOTH_HALVES,
    DTYPES,
    assert_same_bits,
    checkered,
    half_of,
    lay_out,
    layouts_of,
    spread,
    values,
)
from tests.norm_helpers import check_norm, parameter_dtype, ramp

# Row lengths: 1, primes, and what kernels block by (lanes of 4 to 64, chunks of 512 to 4096) with
# one less and one more; numbers of rows around what is shared between threads.
SHAPES = [
    (1, 1), (5, 1), (3, 2), (17, 7), (5, 15), (33, 16), (3, 17), (7, 31), (65, 33), (4, 63),
    (2, 64), (3, 65), (9, 127), (1, 511), (3, 512), (2, 513), (5, 768), (2, 1023), (1, 1024),
    (3, 1025), (2, 4095), (1, 4096), (2, 4097), (1, 8209), (1031, 3), (257, 16), (3, 5, 1),
    (2, 3, 13), (4, 16, 15), (3, 1, 64), (2, 129, 5), (2, 3, 4, 5), (1, 64, 2, 17), (2, 17, 1, 31),
    (3, 2, 7, 49), (2, 3, 2, 3, 5), (1, 2, 3, 4, 65),
]  # fmt: skip


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    """Each layout of a shape, with the activations and the absent tensors taking turns."""
    wide = parameter_dtype(dtype)
    turn = SHAPES.index(shape)
    for index, layout in half_of(half, layouts_of(len(shape)), start=turn):
        size = shape[-1 - index % (len(shape) - 1) :]  # the last, the last two, …; never all
        check_norm(
            "layer_norm",
            lay_out(values(shape, dtype, seed=index), layout),
            ramp(size, -1.5, 1.6, wide) if index % 3 else None,
            ramp(size, 0.7, -0.9, wide) if index % 5 else None,
            act=ACTS[index % len(ACTS)],
            gradient=("contiguous", "expanded batch", layout)[index % 3],
            normalized_shape=size,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "count"),
    [((7,), 1), ((4097,), 1), ((3, 5), 2), ((65, 63), 2), ((2, 3, 4), 2), ((4, 3, 5, 7), 3),
     ((4, 3, 5, 7), 4), ((2, 16, 9, 9), 3), ((2, 1, 64, 1), 3), ((2, 3, 4, 5, 6), 4)],
    ids=str,
)  # fmt: skip
def test_normalized_shape_of_several_dims(
    shape: tuple[int, ...], count: int, dtype: torch.dtype
) -> None:
    """Up to the whole input, of which there is one sample then."""
    size = shape[-count:]
    weight, bias = (ramp(size, *ends, parameter_dtype(dtype)) for ends in ((-1, 2), (1, -1)))
    base = values((1, *shape), dtype)[0] if len(shape) == 1 else values(shape, dtype)
    layouts = layouts_of(len(shape)) if len(shape) > 1 else ("contiguous",)
    for layout, act in itertools.product(layouts, (None, "silu")):
        x = lay_out(base, layout)
        check_norm("layer_norm", x, weight, bias, act=act, normalized_shape=size)


AFFINE = {"both": (True, True), "weight": (True, False), "bias": (False, True), "": (False, False)}


@spread("affine, dtype, half", AFFINE, DTYPES, BOTH_HALVES)
def test_every_combination(affine: str, dtype: torch.dtype, half: int) -> None:
    """All activations with and without weight and bias, parameters of the input's dtype too."""
    has_weight, has_bias = AFFINE[affine]
    dtypes = tuple(dict.fromkeys((parameter_dtype(dtype), dtype)))
    layouts = ("contiguous", "order 201", "strided")
    for wide, act, eps, layout in checkered(half, dtypes, ACTS, (1e-5, 0.5), layouts):
        weight, bias = ramp((19,), -1.5, 2, wide), ramp((19,), 0.25, -3, wide)
        check_norm(
            "layer_norm",
            lay_out(values((3, 5, 19), dtype), layout),
            weight if has_weight else None,
            bias if has_bias else None,
            act=act,
            eps=eps,
        )


@pytest.mark.parametrize("gradient", ["expanded batch", "strided", "order 201", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "order 102"])
def test_gradients_in_any_layout(layout: str, gradient: str) -> None:
    x = lay_out(values((4, 17, 33), torch.float32), layout)
    weight, bias = ramp((33,), -1, 2, torch.float32), ramp((33,), 1, -1, torch.float32)
    for act in (None, "relu", "silu"):
        check_norm("layer_norm", x, weight, bias, act=act, gradient=gradient)


@pytest.mark.parametrize("act", ACTS)
def test_gradient_of_a_sum(act: str | None) -> None:
    """`y.sum().backward()` hands in one number with strides of 0."""
    for layout in ("contiguous", "channels_last"):
        x = lay_out(values((3, 5, 4, 6), torch.float32), layout)
        results = []
        for expand in (True, False):
            leaf = x.detach().requires_grad_()
            y = layer_norm(leaf, (6,), act=act)
            ones = torch.ones((), dtype=y.dtype).expand(y.shape)
            results.append(torch.autograd.grad(y, leaf, ones if expand else ones.contiguous())[0])
        torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [None, 1])
def test_only_what_needs_a_gradient_gets_one(dim: int | None) -> None:
    shape = (4, 5, 3) if dim is None else (4, 3, 5)
    tensors = (values(shape, torch.float32), torch.tensor([1.0, -2.0, 0.5]), torch.ones(3))
    for act, needed in itertools.product((None, "gelu"), itertools.product((0, 1), repeat=3)):
        leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip(tensors, needed, strict=True)]
        full = [t.clone().requires_grad_() for t in tensors]
        for given in (leaves, full):
            y = layer_norm(given[0], (3,), *given[1:], act=act, dim=dim)
            if y.requires_grad:
                (y * y).sum().backward()
        for need, leaf, other in zip(needed, leaves, full, strict=True):
            assert (leaf.grad is not None) == bool(need)
            if need:
                torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_normalized_shape_may_be_an_integer_or_a_list() -> None:
    x = values((3, 4, 5), torch.float32)
    assert_same_bits(layer_norm(x, 5), layer_norm(x, (5,)))
    assert_same_bits(layer_norm(x, [4, 5]), layer_norm(x, torch.Size((4, 5))))


def test_torchs_positional_arguments() -> None:
    x, weight, bias = (
        values((3, 4, 5), torch.float64),
        torch.rand(5).double(),
        torch.rand(5).double(),
    )
    ours = layer_norm(x, (5,), weight, bias, 0.1)
    torch.testing.assert_close(ours, F.layer_norm(x, (5,), weight, bias, 0.1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "size"), [((0, 5), (5,)), ((3, 0), (0,)), ((2, 0, 5), (5,)), ((2, 3, 0), (3, 0))]
)
def test_empty(shape: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Nothing to normalize: parameters get gradients of 0."""
    for act in ACTS:
        wide = parameter_dtype(dtype)
        x = torch.empty(shape, dtype=dtype, requires_grad=True)
        weight, bias = (torch.ones(size, dtype=wide, requires_grad=True) for _ in range(2))
        y = layer_norm(x, size, weight, bias, act=act)
        assert y.shape == shape
        assert y.dtype is dtype
        for gradient, leaf in zip(
            torch.autograd.grad(y.sum(), [x, weight, bias]), (x, weight, bias), strict=True
        ):
            assert gradient.shape == leaf.shape
            assert gradient.dtype is leaf.dtype
            assert torch.count_nonzero(gradient) == 0


def test_one_value_a_row_is_the_bias() -> None:
    """Its difference from its own mean is exactly 0; its gradient is 0 but for rounding."""
    x = values((7, 1), torch.float32).requires_grad_()
    y = layer_norm(x, (1,), torch.tensor([3.0]), torch.tensor([0.25]))
    assert torch.equal(y, torch.full((7, 1), 0.25))
    y.sum().backward()
    assert x.grad is not None
    # What cancels are two terms of weight/√eps.
    torch.testing.assert_close(x.grad, torch.zeros(7, 1), rtol=0, atol=1e-6 * 3 / 1e-5**0.5)
