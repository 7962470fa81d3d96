"""Instance norm against the float64 reference: shapes, dtypes, layouts, and what may be absent."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.device.functional import instance_norm
from tests.helpers import (
    ACTS,
    BOTH_HALVES,
    DTYPES,
    assert_same_bits,
    check_batch_norm,
    checkered,
    half_of,
    lay_out,
    layouts_of,
    spread,
    values,
)
from tests.norm_helpers import check_norm, parameter_dtype, ramp

# Positions a channel: 2 … 9, 49, primes, lanes of 4 to 64 and chunks of 512 to 4096, ± 1.
SHAPES = [
    (3, 2, 2), (2, 5, 3), (3, 1, 4), (2, 17, 5), (4, 16, 6), (1, 15, 7), (2, 64, 8), (2, 65, 9),
    (5, 3, 15), (3, 2, 16), (2, 33, 17), (2, 3, 31), (1, 130, 33), (7, 2, 63), (2, 3, 64),
    (3, 1, 65), (2, 2, 511), (1, 3, 512), (2, 2, 513), (1, 2, 1023), (2, 1, 1024), (1, 3, 1025),
    (1, 2, 4095), (2, 1, 4096), (1, 2, 4097), (1, 1, 8209), (257, 3, 4), (2, 3, 1, 2),
    (2, 17, 7, 7), (3, 64, 7, 7), (1, 3, 13, 15), (2, 8, 32, 33), (4, 6, 49, 1), (2, 130, 2, 2),
    (2, 3, 2, 3, 5), (1, 16, 3, 3, 3), (3, 1, 1, 4, 4), (2, 17, 2, 2, 2),
]  # fmt: skip


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    """Each layout of a shape, with the activations and the absent tensors taking turns."""
    wide = parameter_dtype(dtype)
    weight, bias = ramp((shape[1],), -1.5, 1.6, wide), ramp((shape[1],), 0.7, -0.9, wide)
    for index, layout in half_of(half, layouts_of(len(shape)), start=SHAPES.index(shape)):
        check_norm(
            "instance_norm",
            lay_out(values(shape, dtype, seed=index), layout),
            weight if index % 3 else None,
            bias if index % 5 else None,
            act=ACTS[index % len(ACTS)],
            gradient=("contiguous", "expanded batch", layout)[index % 3],
        )


AFFINE = {"both": (True, True), "weight": (True, False), "bias": (False, True), "": (False, False)}


@spread("affine, dtype, half", AFFINE, DTYPES, BOTH_HALVES)
def test_every_combination(affine: str, dtype: torch.dtype, half: int) -> None:
    """All activations with and without weight and bias, parameters of the input's dtype too."""
    has_weight, has_bias = AFFINE[affine]
    dtypes = tuple(dict.fromkeys((parameter_dtype(dtype), dtype)))
    layouts = ("contiguous", "channels_last", "strided")
    for wide, act, eps, layout in checkered(half, dtypes, ACTS, (1e-5, 0.5), layouts):
        weight, bias = ramp((5,), -1.5, 2, wide), ramp((5,), 0.25, -3, wide)
        check_norm(
            "instance_norm",
            lay_out(values((3, 5, 19), dtype), layout),
            weight if has_weight else None,
            bias if has_bias else None,
            act=act,
            eps=eps,
        )


@pytest.mark.parametrize("gradient", ["expanded batch", "strided", "order 0231", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "order 1023"])
def test_gradients_in_any_layout(layout: str, gradient: str) -> None:
    x = lay_out(values((4, 17, 5, 7), torch.float32), layout)
    weight, bias = ramp((17,), -1, 2, torch.float32), ramp((17,), 1, -1, torch.float32)
    for act in (None, "relu", "silu"):
        check_norm("instance_norm", x, weight, bias, act=act, gradient=gradient)


def test_channels_last_input_stays_channels_last() -> None:
    for shape, memory_format in (
        ((2, 8, 3, 5), torch.channels_last), ((2, 8, 3, 5, 2), torch.channels_last_3d)
    ):  # fmt: skip
        x = values(shape, torch.float32).to(memory_format=memory_format).requires_grad_()
        for buffers in ((None, None), (torch.zeros(8), torch.ones(8))):
            y = instance_norm(x, *buffers)
            assert y.is_contiguous(memory_format=memory_format)
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
            assert gradient.is_contiguous(memory_format=memory_format)


def test_torchs_positional_arguments() -> None:
    x = values((3, 4, 5), torch.float64)
    results = []
    for function in (instance_norm, F.instance_norm):
        generator = torch.Generator().manual_seed(0)
        mean, var, weight, bias = torch.rand(4, 4, generator=generator, dtype=torch.float64)
        y = function(x, mean, var, weight, bias, True, 0.3, 0.1)
        results.append((y, mean, var))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_with_the_running_statistics_it_is_a_batch_norm(layout: str, dtype: torch.dtype) -> None:
    """Evaluation after training with track_running_stats: no statistic of the input."""
    x = lay_out(values((3, 5, 7), dtype), layout)
    check_batch_norm(x, training=False)
    wide = parameter_dtype(dtype)
    mean, var = ramp((5,), -1, 1, wide), ramp((5,), 0.5, 2, wide)
    weight, bias = ramp((5,), -2, 2, wide), ramp((5,), 1, -1, wide)
    before = mean.clone(), var.clone()
    leaf = x.detach().requires_grad_()
    y = instance_norm(leaf, mean, var, weight, bias, use_input_stats=False, act="silu")
    plain = x.detach().double().requires_grad_()
    wanted = F.silu(
        F.instance_norm(
            plain, mean.double(), var.double(), weight.double(), bias.double(),
            use_input_stats=False,
        )
    )  # fmt: skip
    tolerance = {"rtol": 4e-7 + 2 * torch.finfo(dtype).eps, "atol": 4e-6}
    if dtype is torch.float64:
        tolerance = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y.double(), wanted, **tolerance)
    gradients = [
        torch.autograd.grad(t.sum(), s)[0].double() for t, s in ((y, leaf), (wanted, plain))
    ]
    torch.testing.assert_close(*gradients, **tolerance)
    assert_same_bits(mean, before[0])
    assert_same_bits(var, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (2, 3, 0), (0, 3, 2, 3), (2, 3, 0, 4), (0, 3, 2, 1, 2)]
)
def test_empty(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Zero gradients, and no buffer changes."""
    wide = parameter_dtype(dtype)
    buffers = {
        "running_mean": torch.tensor([0.1, -0.2, 0.3], dtype=wide),
        "running_var": torch.tensor([1.1, 0.2, 3.3], dtype=wide),
        "num_batches_tracked": torch.tensor(5),
        "skipped_updates": torch.tensor([0, 1, 2]),
    }
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    for act, momentum in itertools.product(ACTS, (0.1, None)):
        x = torch.empty(shape, dtype=dtype, requires_grad=True)
        weight, bias = (torch.ones(3, dtype=wide, requires_grad=True) for _ in range(2))
        y = instance_norm(x, weight=weight, bias=bias, act=act, momentum=momentum, **buffers)
        assert y.shape == shape
        assert y.dtype is dtype
        for gradient, leaf in zip(
            torch.autograd.grad(y.sum(), [x, weight, bias]), (x, weight, bias), strict=True
        ):
            assert gradient.shape == leaf.shape
            assert torch.count_nonzero(gradient) == 0
        for name, buffer in buffers.items():
            assert_same_bits(buffer, before[name], name)
