"""Masked group norm: each sample's statistics over what is kept of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device.functional import group_norm
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

NAME = "group_norm"
CASES = [
    ((5, 6), 3), ((4, 6, 7), 2), ((3, 15, 17), 5), ((2, 64, 9), 32), ((3, 5, 33), 1),
    ((2, 2, 513), 2), ((1, 3, 4097), 1), ((2, 6, 4, 5), 3), ((3, 16, 7, 7), 4), ((2, 9, 3, 3), 3),
    ((2, 4, 2, 3, 5), 2),
]  # fmt: skip


@spread("shape groups, dtype, half", CASES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], groups: int, dtype: torch.dtype, half: int) -> None:
    """Output and gradients, with NaN in the padding and in the gradients that come to it."""
    wide = parameter_dtype(dtype)
    weight, bias = ramp((shape[1],), -1.5, 1.6, wide), ramp((shape[1],), 0.7, -0.9, wide)
    for index, layout in half_of(half, layouts_of(len(shape)), start=CASES.index((shape, groups))):
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
            num_groups=groups,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "order 1023"])
def test_compacted(layout: str, dtype: torch.dtype) -> None:
    wide = parameter_dtype(dtype)
    weight, bias = ramp((6,), -1, 2, wide), ramp((6,), 1, -1, wide)
    for groups, act, keep in itertools.product((1, 2, 6), (None, "silu"), (0.2, 0.7, 1.1)):
        x = lay_out(values((4, 6, 5, 7), dtype), layout)
        mask = random_mask(NAME, x, keep=keep)
        mask[2] = False
        mask[:2].view(-1)[:35:5] = True  # more than one value of a group
        check_compacted(NAME, x, weight, bias, mask, act=act, num_groups=groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_padding_is_not_read(layout: str, dtype: torch.dtype) -> None:
    x = lay_out(values((4, 6, 33), dtype), layout)
    for groups, act in itertools.product((1, 3, 6), (None, "silu")):
        check_padding_is_not_read(
            NAME, x, None, None, random_mask(NAME, x), num_groups=groups, act=act
        )


def test_forms_and_lengths() -> None:
    x = values((4, 6, 5, 7), torch.float32)
    check_forms(NAME, x, random_mask(NAME, x), 1, num_groups=3)
    check_lengths(NAME, values((4, 6, 17), torch.float32), 1, num_groups=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_kept(dtype: torch.dtype) -> None:
    weight = ramp((6,), 1, 2, parameter_dtype(dtype))
    for act, layout, groups in itertools.product(ACTS, ("contiguous", "channels_last"), (1, 3, 6)):
        x = lay_out(values((3, 6, 7), dtype), layout)
        check_nothing_kept(NAME, x, weight, weight, act=act, num_groups=groups)


def test_a_whole_sample_hidden_among_others() -> None:
    """A mask of samples alone, as for a last batch that was filled up."""
    x = values((3, 4, 5, 7), torch.float32)
    samples = torch.tensor([True, False, True])
    for layout in ("contiguous", "channels_last"):
        y = group_norm(lay_out(x, layout), 2, bias=torch.ones(4), mask=samples.view(3, 1, 1))
        assert torch.count_nonzero(y[1]) == 0
        # The kernels do not promise the bits of another way through the data.
        plain = group_norm(lay_out(x, layout), 2, bias=torch.ones(4))
        torch.testing.assert_close(y[samples], plain[samples], rtol=1e-6, atol=1e-6)


def test_a_sample_with_a_mask_does_not_depend_on_its_batch() -> None:
    x = values((4, 6, 5, 7), torch.float32)
    mask = random_mask(NAME, x)
    for layout in ("contiguous", "channels_last"):
        together = group_norm(lay_out(x, layout), 3, mask=mask)
        for n in range(4):
            alone = group_norm(lay_out(x[n : n + 1], layout), 3, mask=mask[n : n + 1])
            assert_same_bits(alone, together[n : n + 1])


@spread("groups, act", (1, 2, 4), (None, "silu"))
def test_gradcheck(groups: int, act: str | None) -> None:
    mask = random_mask(NAME, torch.empty(2, 4, 3))
    mask[:, :, :2] = True
    check_gradients(NAME, (2, 4, 3), 4, mask, act=act, num_groups=groups)


@settings(max_examples=80)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), act=st.sampled_from(ACTS))
def test_any_view(data: st.DataObject, dtype: torch.dtype, act: str | None) -> None:
    x = data.draw(views(dtype))
    channels = x.shape[1]
    groups = data.draw(st.sampled_from([n for n in range(1, channels + 1) if channels % n == 0]))
    if x.numel() == groups:
        groups = 1  # one value a group in a batch of one is refused
    keep, seed = data.draw(st.floats(0, 1), label="keep"), data.draw(st.integers(0, 99))
    mask = random_mask(NAME, x, keep=keep, seed=seed)
    check_norm(
        NAME,
        torch.empty_like(x).copy_(torch.where(mask, x, math.nan)),
        ramp((channels,), -2, 1.5, parameter_dtype(dtype)),
        None,
        mask=mask,
        act=act,
        num_groups=groups,
    )
