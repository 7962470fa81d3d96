"""Group norm against the float64 reference: shapes, groups, dtypes, layouts, what may be absent."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.device.functional import group_norm, instance_norm, layer_norm
from tests.helpers import (
    ACTS,
    BOTH_HALVES,
    DTYPES,
    checkered,
    half_of,
    lay_out,
    layouts_of,
    spread,
    values,
)
from tests.norm_helpers import check_norm, parameter_dtype, ramp

# (shape, groups): one group, a group a channel, an odd number of channels a group; 1, 2 … 9 and 49
# positions a channel; lanes of 4 to 64 and chunks of 512 to 4096 values a group, ± 1.
CASES = [
    ((3, 2), 1), ((5, 6), 3), ((2, 64), 4), ((3, 15), 5), ((2, 130), 2), ((4, 4097), 1),
    ((3, 6, 1), 2), ((2, 4, 2), 4), ((3, 9, 3), 3), ((2, 10, 4), 2), ((5, 3, 5), 1),
    ((2, 14, 6), 7), ((3, 8, 7), 4), ((2, 15, 8), 3), ((1, 6, 9), 6), ((2, 32, 17), 8),
    ((2, 33, 16), 11), ((1, 2, 512), 1), ((2, 3, 1025), 3), ((1, 6, 683), 2), ((2, 1, 4095), 1),
    ((1, 4, 1024), 1), ((1, 2, 4097), 2), ((3, 96, 5), 32), ((2, 64, 7, 7), 32), ((2, 24, 7, 7), 8),
    ((3, 5, 7, 7), 1), ((2, 16, 1, 1), 4), ((2, 6, 1, 5), 3), ((1, 12, 13, 15), 4),
    ((2, 63, 2, 4), 9), ((2, 65, 3, 3), 5), ((17, 4, 2, 2), 2), ((2, 3, 32, 33), 3),
    ((2, 6, 2, 3, 5), 3), ((1, 16, 3, 3, 3), 4), ((3, 5, 1, 4, 4), 5), ((2, 18, 2, 2, 2), 6),
]  # fmt: skip


@spread("shape groups, dtype, half", CASES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], groups: int, dtype: torch.dtype, half: int) -> None:
    """Each layout of a shape, with the activations and the absent tensors taking turns."""
    wide = parameter_dtype(dtype)
    weight, bias = ramp((shape[1],), -1.5, 1.6, wide), ramp((shape[1],), 0.7, -0.9, wide)
    turn = CASES.index((shape, groups))
    for index, layout in half_of(half, layouts_of(len(shape)), start=turn):
        check_norm(
            "group_norm",
            lay_out(values(shape, dtype, seed=index), layout),
            weight if index % 3 else None,
            bias if index % 5 else None,
            act=ACTS[index % len(ACTS)],
            gradient=("contiguous", "expanded batch", layout)[index % 3],
            num_groups=groups,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [*range(1, 10), 49])
def test_small_images(inner: int, dtype: torch.dtype) -> None:
    """Rows shorter than a vector, in every grouping of twelve channels."""
    wide = parameter_dtype(dtype)
    weight, bias = ramp((12,), -1, 2, wide), ramp((12,), 1, -1, wide)
    for groups, layout in itertools.product((1, 2, 3, 4, 6, 12), ("contiguous", "channels_last")):
        if groups == 12 and inner == 1:
            continue  # one value a group: covered by test_one_value_a_group
        x = lay_out(values((2, 12, inner), dtype, seed=inner), layout)
        check_norm("group_norm", x, weight, bias, num_groups=groups, act="silu")


AFFINE = {"both": (True, True), "weight": (True, False), "bias": (False, True), "": (False, False)}


@spread("affine, dtype, half", AFFINE, DTYPES, BOTH_HALVES)
def test_every_combination(affine: str, dtype: torch.dtype, half: int) -> None:
    """All activations with and without weight and bias, parameters of the input's dtype too."""
    has_weight, has_bias = AFFINE[affine]
    dtypes = tuple(dict.fromkeys((parameter_dtype(dtype), dtype)))
    layouts = ("contiguous", "channels_last", "strided")
    for wide, act, eps, layout in checkered(half, dtypes, ACTS, (1e-5, 0.5), layouts):
        weight, bias = ramp((6,), -1.5, 2, wide), ramp((6,), 0.25, -3, wide)
        check_norm(
            "group_norm",
            lay_out(values((3, 6, 19), dtype), layout),
            weight if has_weight else None,
            bias if has_bias else None,
            act=act,
            eps=eps,
            num_groups=2,
        )


@pytest.mark.parametrize("gradient", ["expanded batch", "strided", "order 0231", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "order 1023"])
def test_gradients_in_any_layout(layout: str, gradient: str) -> None:
    x = lay_out(values((4, 18, 5, 7), torch.float32), layout)
    weight, bias = ramp((18,), -1, 2, torch.float32), ramp((18,), 1, -1, torch.float32)
    for act, groups in itertools.product((None, "relu", "silu"), (1, 6, 18)):
        check_norm("group_norm", x, weight, bias, act=act, num_groups=groups, gradient=gradient)


@pytest.mark.parametrize("act", ACTS)
def test_gradient_of_a_sum(act: str | None) -> None:
    """`y.sum().backward()` hands in one number with strides of 0."""
    for layout in ("contiguous", "channels_last"):
        x = lay_out(values((3, 6, 4, 5), torch.float32), layout)
        results = []
        for expand in (True, False):
            leaf = x.detach().requires_grad_()
            y = group_norm(leaf, 3, act=act)
            ones = torch.ones((), dtype=y.dtype).expand(y.shape)
            results.append(torch.autograd.grad(y, leaf, ones if expand else ones.contiguous())[0])
        torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one() -> None:
    tensors = (values((4, 6, 5), torch.float32), torch.linspace(-1, 2, 6), torch.ones(6))
    for act, needed in itertools.product((None, "gelu"), itertools.product((0, 1), repeat=3)):
        leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip(tensors, needed, strict=True)]
        full = [t.clone().requires_grad_() for t in tensors]
        for given in (leaves, full):
            y = group_norm(given[0], 3, *given[1:], act=act)
            if y.requires_grad:
                (y * y).sum().backward()
        for need, leaf, other in zip(needed, leaves, full, strict=True):
            assert (leaf.grad is not None) == bool(need)
            if need:
                torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_its_ends_are_layer_and_instance_norm() -> None:
    """One group is layer norm over (C, *), a group a channel instance norm."""
    for shape in ((3, 6, 5), (2, 4, 3, 7)):
        x = values(shape, torch.float64)
        one = group_norm(x, 1)
        torch.testing.assert_close(one, layer_norm(x, shape[1:]), rtol=1e-12, atol=1e-12)
        each = group_norm(x, shape[1])
        torch.testing.assert_close(each, instance_norm(x), rtol=1e-12, atol=1e-12)


def test_torchs_positional_arguments() -> None:
    x, weight, bias = (
        values((3, 4, 5), torch.float64),
        torch.rand(4).double(),
        torch.rand(4).double(),
    )
    ours = group_norm(x, 2, weight, bias, 0.1)
    torch.testing.assert_close(ours, F.group_norm(x, 2, weight, bias, 0.1))


def test_channels_last_input_stays_channels_last() -> None:
    """Also where torch returns contiguous, in three spatial dimensions."""
    for shape, memory_format in (
        ((2, 8, 3, 5), torch.channels_last), ((2, 8, 3, 5, 2), torch.channels_last_3d)
    ):  # fmt: skip
        x = values(shape, torch.float32).to(memory_format=memory_format).requires_grad_()
        y = group_norm(x, 4, act="silu")
        assert y.is_contiguous(memory_format=memory_format)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0), (0, 4, 2, 3), (2, 4, 3, 0)])
def test_empty(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for act in ACTS:
        wide = parameter_dtype(dtype)
        x = torch.empty(shape, dtype=dtype, requires_grad=True)
        weight, bias = (torch.ones(4, dtype=wide, requires_grad=True) for _ in range(2))
        y = group_norm(x, 2, weight, bias, act=act)
        assert y.shape == shape
        assert y.dtype is dtype
        for gradient, leaf in zip(
            torch.autograd.grad(y.sum(), [x, weight, bias]), (x, weight, bias), strict=True
        ):
            assert gradient.shape == leaf.shape
            assert gradient.dtype is leaf.dtype
            assert torch.count_nonzero(gradient) == 0


def test_one_value_a_group() -> None:
    """It becomes the bias; torch, which leaves 2e-5 of it, refuses it for a batch of one only."""
    x, bias = values((3, 4, 1), torch.float32), torch.tensor([0.0, 1.0, -2.0, 3.0])
    y = group_norm(x, 4, None, bias)
    assert torch.equal(y, bias.view(1, 4, 1).expand(3, 4, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        group_norm(x[:1], 4)
