"""Promise 3: statistics hold at any size."""

from __future__ import annotations

import pytest
import torch

from tests.device.functional import batch_norm

LARGEST = 2**25
# The promise's number, relative; a float32 buffer takes 6e-8 of it.
ERROR = 1e-6


@pytest.mark.parametrize(
    "shape",
    [(LARGEST, 1), (1, 1, LARGEST), (2**20, 2, 32), (2**23, 1, 4), (32, 1, 2**10, 2**10)],
    ids=str,
)
def test_mean_and_variance(shape: tuple[int, ...]) -> None:
    # A mean of 1 and a spread of 1: a float32 running sum stops growing at 2^24.
    x = torch.rand(shape).mul_(12**0.5).add_(1 - 3**0.5)
    channels = shape[1]
    mean, var = torch.zeros(channels), torch.zeros(channels)
    with torch.no_grad():
        y = batch_norm(x, mean, var, training=True, momentum=1.0)
    dims = [d for d in range(x.dim()) if d != 1]
    wide = x.double()
    wanted = wide.mean(dims)
    assert float(((mean - wanted) / wanted).abs().max()) <= ERROR
    wanted_var = wide.var(dims)
    assert float(((var - wanted_var) / wanted_var).abs().max()) <= ERROR
    sample = slice(None, None, max(1, x.shape[0] // 1000))
    shaped = [t.view(1, -1, *(1,) * (x.dim() - 2)) for t in (wanted, wanted_var)]
    expected = (wide[sample] - shaped[0]) / (shaped[1] + 1e-5).sqrt()
    assert float((y[sample] - expected).abs().max()) <= 2 * ERROR


def test_channels_last_of_the_largest_size() -> None:
    x = torch.rand(8, 2**11, 2**11, 1).mul_(12**0.5).add_(1 - 3**0.5).movedim(-1, 1)
    two = x.expand(8, 2, 2**11, 2**11)
    assert two.numel() == 2 * LARGEST
    mean, var = torch.zeros(2), torch.zeros(2)
    with torch.no_grad():
        batch_norm(
            two.contiguous(memory_format=torch.channels_last),
            mean,
            var,
            training=True,
            momentum=1.0,
        )
    wanted = x.double().mean()
    assert float(((mean - wanted) / wanted).abs().max()) <= ERROR
    assert float(((var - x.double().var()) / var).abs().max()) <= ERROR


def test_parameter_gradients_of_the_largest_size() -> None:
    """Sums of 2^25 ones: exact only where float32 does not accumulate them one by one."""
    x = torch.rand(1, 1, LARGEST)
    bias = torch.zeros(1, requires_grad=True)
    y = batch_norm(x, None, None, None, bias, True)
    y.sum().backward()
    assert bias.grad is not None
    assert bias.grad.item() == pytest.approx(LARGEST, rel=ERROR)
