"""The running statistics of instance norm: torch's, and what torch's momentum=None does not do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.device.functional import instance_norm
from tests.helpers import DTYPES, assert_same_bits, lay_out, values
from tests.norm_helpers import parameter_dtype


def expected(batch: Tensor) -> tuple[Tensor, Tensor]:
    """The averages over the samples of their means and unbiased variances."""
    x = batch.double().flatten(2)
    return x.mean(2).mean(0), x.var(2).mean(0)


def buffers(channels: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "running_mean": torch.linspace(-1, 1, channels, dtype=dtype),
        "running_var": torch.linspace(0.5, 2, channels, dtype=dtype),
        "num_batches_tracked": torch.tensor(0),
        "skipped_updates": torch.zeros(channels, dtype=torch.int64),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(
    "shape", [(3, 4, 7), (2, 17, 5, 3), (2, 3, 2, 3, 5), (1, 2, 1025)], ids=str
)
def test_three_batches_as_in_torch(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    wide = parameter_dtype(dtype)
    own = buffers(shape[1], wide)
    mean, var = (own[name].clone().double() for name in ("running_mean", "running_var"))
    for seed in range(3):
        x = values(shape, dtype, seed=seed)
        y = instance_norm(lay_out(x, layout), momentum=0.3, **own)
        assert_same_bits(y, instance_norm(lay_out(x, layout)))  # the buffers change no output
        F.instance_norm(x.double(), mean, var, momentum=0.3)
    # Three updates of values up to 4: float32 rounds each to 3e-7.
    tolerance = (
        {"rtol": 1e-6, "atol": 1e-6} if wide is torch.float32 else {"rtol": 1e-13, "atol": 1e-13}
    )
    torch.testing.assert_close(own["running_mean"].double(), mean, **tolerance)
    torch.testing.assert_close(own["running_var"].double(), var, **tolerance)
    assert own["num_batches_tracked"].item() == 3
    assert torch.count_nonzero(own["skipped_updates"]) == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_momentum_none_accumulates(layout: str) -> None:
    """The plain average over all batches; torch's layer silently updates nothing then."""
    own = buffers(3)
    batches = [values((4, 3, 5, 6), torch.float32, seed=seed) for seed in range(5)]
    for count, batch in enumerate(batches, start=1):
        instance_norm(lay_out(batch, layout), momentum=None, **own)
        wanted = [torch.stack(s).mean(0) for s in zip(*map(expected, batches[:count]), strict=True)]
        # Five float32 updates of values up to 3.
        torch.testing.assert_close(own["running_mean"].double(), wanted[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own["running_var"].double(), wanted[1], rtol=1e-6, atol=1e-6)
        assert own["num_batches_tracked"].item() == count


def test_momentum_none_needs_a_counter() -> None:
    own = buffers(3)
    del own["num_batches_tracked"]
    with pytest.raises(ValueError, match="num_batches_tracked"):
        instance_norm(values((2, 3, 4), torch.float32), momentum=None, **own)


def test_a_constant_channel_has_a_running_variance_of_zero() -> None:
    own = buffers(3)
    for constant in (0.1, 1e7, 1e15):
        instance_norm(torch.full((2, 3, 50), constant), momentum=1.0, **own)
        assert torch.equal(own["running_mean"], torch.full((3,), constant))
        assert torch.equal(own["running_var"], torch.zeros(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_channel_that_is_not_finite_is_skipped_and_counted(bad: float) -> None:
    own = buffers(3)
    before = {name: buffer.clone() for name, buffer in own.items()}
    x = values((4, 3, 5), torch.float32)
    x[2, 1, 3] = bad
    instance_norm(x, **own)
    assert own["skipped_updates"].tolist() == [0, 1, 0]
    for name in ("running_mean", "running_var"):
        assert_same_bits(own[name][1], before[name][1], name)
        assert own[name].isfinite().all()
    mean, var = expected(x)
    for channel in (0, 2):
        wanted = 0.9 * before["running_mean"][channel].double() + 0.1 * mean[channel]
        assert own["running_mean"][channel].item() == pytest.approx(wanted.item(), abs=1e-6)
        wanted = 0.9 * before["running_var"][channel].double() + 0.1 * var[channel]
        assert own["running_var"][channel].item() == pytest.approx(wanted.item(), abs=1e-6)


def test_gradients_do_not_depend_on_tracking() -> None:
    x = values((3, 4, 7), torch.float32)
    results = []
    for given in (buffers(4), {}):
        leaf = x.clone().requires_grad_()
        weight = torch.linspace(-1, 2, 4).requires_grad_()
        y = instance_norm(leaf, weight=weight, act="silu", **given)
        results.append(torch.autograd.grad(y.square().sum(), [leaf, weight]))
    for tracked, plain in zip(*results, strict=True):
        assert_same_bits(tracked, plain)


def test_running_statistics_of_half_precision_buffers() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        own = buffers(3, dtype)
        mean, var = (own[name].clone().double() for name in ("running_mean", "running_var"))
        x = values((4, 3, 9), torch.bfloat16)
        instance_norm(x, momentum=0.25, **own)
        batch_mean, batch_var = expected(x)
        tolerance = {"rtol": max(torch.finfo(dtype).eps, 1e-6), "atol": 1e-6}
        torch.testing.assert_close(
            own["running_mean"].double(), 0.75 * mean + 0.25 * batch_mean, **tolerance
        )
        torch.testing.assert_close(
            own["running_var"].double(), 0.75 * var + 0.25 * batch_var, **tolerance
        )
