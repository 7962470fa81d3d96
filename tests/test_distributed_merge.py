"""`distributed.merge`: any cut of a batch gives the whole's statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normally.distributed import merge


def statistics(x: Tensor) -> Tensor:
    """(3, C) of values (m, C): in two passes, and of no value the zeros of an empty rank."""
    if not len(x):
        return torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64).repeat(1, x.shape[1])
    near = x[0]
    mean = near + (x - near).mean(0)
    var = (x - mean).square().mean(0)
    return torch.stack((mean, var, torch.full_like(mean, len(x))))


def values(count: int, channels: int, mean: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-3, 3, channels, dtype=torch.float64)
    return torch.randn(count, channels, generator=generator, dtype=torch.float64) * spread + mean


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    exponent=st.integers(-6, 8),
    seed=st.integers(0, 1000),
)
def test_any_cut_gives_the_whole(sizes: list[int], exponent: int, seed: int) -> None:
    x = values(sum(sizes), 5, 10.0**exponent, seed)
    merged = merge(torch.stack([statistics(part) for part in x.split(sizes)]))
    mean, var, count = statistics(x)
    # A mean is as exact as its own last bit; a variance as the bits of x that its parts see:
    # each x - mean is off by half a last bit of x.
    largest = x.abs().amax(0)
    eps = torch.finfo(torch.float64).eps
    assert bool(((merged[0] - mean).abs() <= 8 * eps * largest).all())
    allowed = 64 * eps * var + 16 * eps * largest * var.sqrt() + (16 * eps * largest) ** 2
    assert bool(((merged[1] - var).abs() <= allowed).all())
    assert torch.equal(merged[2], count)


def test_equal_means_stay_what_they_are() -> None:
    """A constant channel's mean is the constant and its variance 0, whatever the counts."""
    for value in (0.1, 1e8 + 0.1, -3e-30):
        parts = [statistics(torch.full((n, 2), value, dtype=torch.float64)) for n in (3, 0, 7, 1)]
        mean, var, _ = merge(torch.stack(parts))
        assert torch.equal(mean, torch.full((2,), value, dtype=torch.float64))
        assert torch.count_nonzero(var) == 0


def test_parts_without_values_do_not_count() -> None:
    """Not even where they hold what is no number."""
    x = values(8, 3)
    whole = statistics(x)
    empty = torch.tensor([[torch.nan], [torch.inf], [0.0]], dtype=torch.float64).expand(3, 3)
    merged = merge(torch.stack((empty, whole, empty)))
    torch.testing.assert_close(merged, whole, rtol=1e-15, atol=0)
    nothing = merge(empty.expand(4, 3, 3))
    assert torch.equal(nothing, statistics(x[:0]))


def test_one_part_is_itself() -> None:
    whole = statistics(values(8, 3, 1e6))
    torch.testing.assert_close(merge(whole[None]), whole, rtol=1e-15, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_channel_harms_no_other(bad: float) -> None:
    parts = torch.stack([statistics(values(4, 3, seed=seed)) for seed in range(3)])
    clean = merge(parts)
    parts[1, 0, 1], parts[1, 1, 1] = bad, torch.nan
    merged = merge(parts)
    assert not merged[0, 1].isfinite()
    assert merged[1, 1].isnan()
    assert torch.equal(merged[:, ::2], clean[:, ::2])


def test_the_order_of_the_processes_is_all_that_decides() -> None:
    parts = torch.stack([statistics(values(n, 33, 1e3, seed=n)) for n in (5, 2, 9, 1)])
    assert torch.equal(merge(parts), merge(parts.clone()))
    # The same to rounding in any order: nobody's values weigh more.
    torch.testing.assert_close(merge(parts.flip(0)), merge(parts), rtol=1e-14, atol=1e-18)
