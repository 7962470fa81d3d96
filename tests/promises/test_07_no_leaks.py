"""Promise 7 where there is no data at all: an empty batch changes nothing."""

from __future__ import annotations

import pytest
import torch

from tests.device.functional import batch_norm
from tests.helpers import ACTS, DTYPES, assert_same_bits

EMPTY = [(0, 3), (0, 3, 5), (4, 3, 0), (0, 3, 4, 4), (2, 3, 0, 5), (0, 3, 2, 3, 4), (0, 3, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_batch(shape: tuple[int, ...], training: bool, dtype: torch.dtype) -> None:
    parameter_dtype = dtype if dtype is torch.float64 else torch.float32
    for act in ACTS:
        buffers = {
            "running_mean": torch.tensor([0.1, -0.2, 0.3], dtype=parameter_dtype),
            "running_var": torch.tensor([1.1, 0.2, 3.3], dtype=parameter_dtype),
            "num_batches_tracked": torch.tensor(5),
            "skipped_updates": torch.tensor([0, 1, 2]),
        }
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        x = torch.empty(shape, dtype=dtype, requires_grad=True)
        residual = torch.empty(shape, dtype=dtype, requires_grad=True)
        weight = torch.ones(3, dtype=parameter_dtype, requires_grad=True)
        bias = torch.zeros(3, dtype=parameter_dtype, requires_grad=True)
        for momentum in (0.1, None):
            y = batch_norm(
                x, weight=weight, bias=bias, training=training, momentum=momentum,
                act=act, residual=residual, **buffers,
            )  # fmt: skip
            assert y.shape == shape
            assert y.dtype is dtype
            for name, buffer in buffers.items():
                assert_same_bits(buffer, before[name], name)
        gradients = torch.autograd.grad(y.sum(), [x, weight, bias, residual])
        for gradient, leaf in zip(gradients, (x, weight, bias, residual), strict=True):
            assert gradient.shape == leaf.shape
            assert gradient.dtype is leaf.dtype
            assert torch.count_nonzero(gradient) == 0


def test_no_channels() -> None:
    for shape in ((4, 0), (4, 0, 5), (0, 0)):
        x = torch.empty(shape, requires_grad=True)
        y = batch_norm(x, torch.empty(0), torch.empty(0), torch.empty(0), None, True)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape


def test_double_backward_of_an_empty_batch() -> None:
    x = torch.empty(0, 3, 4, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    y = batch_norm(x, None, None, weight, None, True, act="silu")
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    second = torch.autograd.grad(slope.square().sum(), [x, weight], allow_unused=True)
    assert second[0] is not None
    assert second[0].shape == x.shape
    assert second[1] is None or torch.count_nonzero(second[1]) == 0


def test_vmap_over_empty_batches() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    y = torch.vmap(lambda t: batch_norm(t, mean, var))(torch.empty(2, 0, 3, 4))
    assert y.shape == (2, 0, 3, 4)
