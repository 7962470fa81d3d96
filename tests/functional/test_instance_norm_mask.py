"""Masked instance norm, and the running statistics of what is kept."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.device.functional import instance_norm
from tests.functional.test_batch_norm_property import views
from tests.helpers import (
    ACTS,
    BOTH_HALVES,
    DTYPES,
    assert_same_bits,
    half_of,
    lay_out,
    layouts_of,
    spread,
    values,
)
from tests.mask_checks import (
    check_compacted,
    check_forms,
    check_gradients,
    check_lengths,
    check_nothing_kept,
    check_padding_is_not_read,
    random_mask,
)
from tests.norm_helpers import check_norm, parameter_dtype, ramp

NAME = "instance_norm"
SHAPES = [
    (5, 3, 2), (4, 3, 7), (3, 16, 17), (2, 65, 9), (3, 2, 33), (2, 2, 513), (1, 3, 4097),
    (2, 3, 4, 5), (3, 17, 7, 7), (2, 64, 3, 3), (2, 4, 2, 3, 5),
]  # fmt: skip


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    """Output and gradients, with NaN in the padding and in the gradients that come to it."""
    wide = parameter_dtype(dtype)
    weight, bias = ramp((shape[1],), -1.5, 1.6, wide), ramp((shape[1],), 0.7, -0.9, wide)
    for index, layout in half_of(half, layouts_of(len(shape)), start=SHAPES.index(shape)):
        x = lay_out(values(shape, dtype, seed=index), layout)
        mask = random_mask(NAME, x, keep=(0.6, 0.1, 0.95)[index % 3], seed=index)
        check_norm(
            NAME,
            x
            if "expanded" in layout
            else torch.empty_like(x).copy_(torch.where(mask, x, math.nan)),
            weight if index % 4 else None,
            bias if index % 5 else None,
            mask=mask,
            hidden_gradient=math.nan if index % 2 else None,
            act=ACTS[index % len(ACTS)],
            gradient=("contiguous", "expanded batch", layout)[index % 3],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "order 1023"])
def test_compacted(layout: str, dtype: torch.dtype) -> None:
    wide = parameter_dtype(dtype)
    weight, bias = ramp((6,), -1, 2, wide), ramp((6,), 1, -1, wide)
    for act, keep in itertools.product((None, "silu"), (0.3, 0.7, 1.1)):
        x = lay_out(values((4, 6, 5, 7), dtype), layout)
        mask = random_mask(NAME, x, keep=keep)
        mask[2] = False
        check_compacted(NAME, x, weight, bias, mask, act=act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_padding_is_not_read(layout: str, dtype: torch.dtype) -> None:
    x = lay_out(values((4, 6, 33), dtype), layout)
    for act in (None, "silu"):
        check_padding_is_not_read(NAME, x, None, None, random_mask(NAME, x), act=act)


def test_forms_and_lengths() -> None:
    x = values((4, 6, 5, 7), torch.float32)
    check_forms(NAME, x, random_mask(NAME, x), 1)
    check_lengths(NAME, values((4, 6, 17), torch.float32), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_kept(dtype: torch.dtype) -> None:
    """Zeros, gradients of 0, and every buffer's bits as they were."""
    wide = parameter_dtype(dtype)
    weight = ramp((5,), 1, 2, wide)
    buffers = {
        "running_mean": ramp((5,), -1, 1, wide), "running_var": ramp((5,), 0.5, 2, wide),
        "num_batches_tracked": torch.tensor(3), "skipped_updates": torch.arange(5),
    }  # fmt: skip
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    for act, layout, momentum in itertools.product(
        ACTS, ("contiguous", "channels_last"), (0.1, None)
    ):
        x = lay_out(values((3, 5, 7), dtype), layout)
        check_nothing_kept(NAME, x, weight, weight, act=act, momentum=momentum, **buffers)
    for name, buffer in buffers.items():
        assert_same_bits(buffer, before[name], name)


def kept_of(x: Tensor, mask: Tensor) -> list[Tensor]:
    """The kept positions of each sample that has some, (C, positions) in float64."""
    return [s[:, m].double() for s, m in zip(x, mask[:, 0], strict=True) if m.any()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_of_what_is_kept(
    momentum: float | None, layout: str, dtype: torch.dtype
) -> None:
    """Every kept value counts once: Σx / M and Σ(x - mean_n)² / (M - K) of M values in K samples.

    With as many in every sample that is torch's average of the samples' statistics.
    """
    wide = parameter_dtype(dtype)
    x = values((4, 5, 33), dtype)
    ragged = random_mask(NAME, x)
    ragged[2] = False
    even = torch.zeros(4, 1, 33, dtype=torch.bool)
    for n, positions in enumerate(torch.argsort(torch.rand(4, 33), dim=1)[:, :9]):
        even[n, 0, positions] = n != 1
    for mask in (ragged, even):
        mean, var = torch.zeros(5, dtype=wide), torch.ones(5, dtype=wide)
        count = torch.tensor(1)
        instance_norm(
            torch.where(mask, lay_out(x, layout), math.nan), mean, var, momentum=momentum,
            mask=mask, num_batches_tracked=count,
        )  # fmt: skip
        samples = kept_of(x, mask)
        total = sum(s.shape[1] for s in samples)
        wanted_mean = torch.cat(samples, 1).sum(1) / total
        squares = sum((s - s.mean(1, keepdim=True)).square().sum(1) for s in samples)
        wanted_var = squares / (total - len(samples))
        if mask is even:
            torch.testing.assert_close(
                wanted_mean, torch.stack([s.mean(1) for s in samples]).mean(0)
            )
            torch.testing.assert_close(wanted_var, torch.stack([s.var(1) for s in samples]).mean(0))
        new = 0.3 if momentum else 0.5
        tolerance = 1e-13 if wide is torch.float64 else 1e-6
        tolerances = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(mean.double(), new * wanted_mean, **tolerances)
        torch.testing.assert_close(var.double(), 1 - new + new * wanted_var, **tolerances)
        assert count.item() == 2


def test_with_the_running_statistics() -> None:
    """Evaluation: no statistic to leave anything out of, but still zeros in the padding."""
    x = values((3, 4, 7), torch.float32)
    mask = random_mask(NAME, x)
    mean, var = ramp((4,), -1, 1, torch.float32), ramp((4,), 0.5, 2, torch.float32)
    hidden = torch.where(mask, x, math.nan).requires_grad_()
    y = instance_norm(hidden, mean, var, use_input_stats=False, mask=mask)
    plain = instance_norm(x, mean, var, use_input_stats=False)
    assert_same_bits(y, torch.where(mask, plain, 0.0))
    (gradient,) = torch.autograd.grad(y.sum(), hidden)
    assert gradient.isfinite().all()
    assert torch.count_nonzero(torch.where(mask, 0.0, gradient)) == 0


@pytest.mark.parametrize("act", [None, "silu"])
def test_gradcheck(act: str | None) -> None:
    mask = random_mask(NAME, torch.empty(2, 3, 5))
    mask[:, :, :2] = True
    check_gradients(NAME, (2, 3, 5), 3, mask, act=act)


@settings(max_examples=70)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), act=st.sampled_from(ACTS))
def test_any_view(data: st.DataObject, dtype: torch.dtype, act: str | None) -> None:
    x = data.draw(views(dtype))
    assume(math.prod(x.shape[2:]) > 1)
    keep, seed = data.draw(st.floats(0, 1), label="keep"), data.draw(st.integers(0, 99))
    mask = random_mask(NAME, x, keep=keep, seed=seed)
    check_norm(
        NAME,
        torch.empty_like(x).copy_(torch.where(mask, x, math.nan)),
        ramp((x.shape[1],), -2, 1.5, parameter_dtype(dtype)),
        None,
        mask=mask,
        act=act,
    )
