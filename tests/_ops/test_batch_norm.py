"""The batch norm operators by themselves: opcheck, strides, and fallback against kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from normally import _native
from normally._ops import activation
from normally._ops import batch_norm as operators
from tests.helpers import (
    ACTS,
    DTYPES,
    arithmetic,
    lay_out,
    layouts_of,
    needs_kernels,
    rounding,
    spread,
    values,
)

OP = torch.ops.normally.batch_norm.default
BACKWARD = torch.ops.normally.batch_norm_backward.default
NEED_ALL = operators.NEED_INPUT | operators.NEED_PARAMETERS | operators.NEED_RESIDUAL

# opcheck's own machinery imports torch's scripted decompositions.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning"
)


def arguments(
    x: Tensor,
    *,
    act: str | None = None,
    training: bool = True,
    with_residual: bool = False,
    with_mask: bool = False,
    affine: bool = True,
    save_bits: bool = False,
    requires_grad: bool = False,
) -> tuple[Any, ...]:
    """What the forward operator takes, by position."""
    dtype = x.dtype if x.dtype is torch.float64 else torch.float32
    channels = x.shape[1]
    weight = torch.linspace(0.5, 2, channels, dtype=dtype) if affine else None
    bias = torch.linspace(-1, 1, channels, dtype=dtype) if affine else None
    residual = values(tuple(x.shape), x.dtype, seed=2) if with_residual else None
    tensors = [x, weight, bias, residual]
    if requires_grad:
        tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    statistics: tuple[Tensor | None, ...] = (None, None)
    if not training:
        statistics = torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
    code, param = activation.encode(act, None, "test")
    mask = None
    if with_mask:
        mask = torch.rand(x[:, :1].shape, generator=torch.Generator().manual_seed(9)) > 0.3
    return (*tensors, mask, *statistics, 1e-5, 0, code, param, save_bits)


def backward_arguments(forward: tuple[Any, ...], need: int = NEED_ALL) -> tuple[Any, ...]:
    """What the backward operator takes after a forward with these arguments."""
    x, weight, bias, residual, mask, mean, _, eps, correction, act, param, _ = forward
    output, stats, bits = OP(*forward)
    has_bits = bits.numel() > 0
    if residual is None:
        need &= ~operators.NEED_RESIDUAL
    g = torch.empty_like(output).copy_(values(tuple(x.shape), x.dtype, seed=3))
    return (
        g, x.detach(), weight, bias, None if has_bits else residual, mask,
        bits if has_bits else None, stats, mean is None, eps, correction, act, param, need,
    )  # fmt: skip


QUICK = ("test_schema", "test_faketensor", "test_autograd_registration")
SHAPES = [(4, 3), (3, 2, 5), (2, 3, 4, 5), (2, 3, 2, 3, 2), (0, 3, 4), (5, 1, 3), (2, 17, 2, 2)]


@spread("shape, dtype", SHAPES, DTYPES)
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for index, layout in enumerate(layouts_of(len(shape))):
        x = (
            lay_out(values(shape, dtype), layout)
            if 0 not in shape
            else torch.empty(shape, dtype=dtype)
        )
        given = arguments(
            x, act=ACTS[(index + SHAPES.index(shape)) % len(ACTS)], training=index % 3 != 0,
            with_residual=index % 2 == 0, with_mask=index % 3 == 1, affine=index % 4 != 3,
            requires_grad=True,
        )  # fmt: skip
        # Tracing takes most of the time; its result depends on the layout by the strides alone,
        # and on the dtype hardly: each shape is traced in one.
        is_traced = index <= 1 and dtype in (torch.float64, torch.float32)
        utils = (*QUICK, "test_aot_dispatch_dynamic") if is_traced else QUICK
        torch.library.opcheck(OP, given, test_utils=utils, atol=1e-2, rtol=1e-2)


@spread("shape, dtype", SHAPES, DTYPES)
def test_opcheck_of_the_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for index, layout in enumerate(("contiguous", *layouts_of(len(shape))[-2:])):
        x = (
            lay_out(values(shape, dtype), layout)
            if 0 not in shape
            else torch.empty(shape, dtype=dtype)
        )
        forward = arguments(
            x, act=(None, "relu", "gelu")[index], training=index != 1, with_residual=index > 0
        )
        given = list(backward_arguments(forward, (NEED_ALL, 1, 3)[index]))
        for position in range(5):
            if given[position] is not None:
                given[position] = given[position].detach().requires_grad_()
        is_traced = index == 0 and dtype in (torch.float64, torch.float32)
        utils = (*QUICK, "test_aot_dispatch_dynamic") if is_traced else QUICK
        torch.library.opcheck(BACKWARD, tuple(given), test_utils=utils, atol=1e-2, rtol=1e-2)


@needs_kernels
@spread("layout, act", layouts_of(4), ("relu", "relu6", "leaky_relu"), keep=3)
def test_opcheck_with_saved_bits(layout: str, act: str) -> None:
    x = lay_out(values((3, 5, 4, 6), torch.float32), layout)
    given = arguments(x, act=act, with_residual=True, save_bits=True, requires_grad=True)
    is_traced = layout in ("contiguous", "order 0231", "strided")
    utils = (*QUICK, "test_aot_dispatch_dynamic") if is_traced else QUICK
    torch.library.opcheck(OP, given, test_utils=utils)
    plain = arguments(x, act=act, with_residual=True, save_bits=True)
    torch.library.opcheck(BACKWARD, backward_arguments(plain), test_utils=utils)


@pytest.mark.parametrize(
    "shape", [(3, 2), (3, 2, 5), (2, 3, 4, 5), (2, 3, 1, 5), (1, 3, 4, 1)], ids=str
)
def test_fake_strides_are_the_real_ones(shape: tuple[int, ...]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for layout in layouts_of(len(shape)):
        x = lay_out(values(shape, torch.float32), layout)
        forward = arguments(x, act="relu", with_residual=True)
        backward = backward_arguments(forward)
        for operator, given in ((OP, forward), (BACKWARD, backward)):
            real = operator(*given)
            with FakeTensorMode() as mode:
                fake = operator(
                    *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given)
                )
            for ours, shown in zip(real, fake, strict=True):
                assert ours.shape == shown.shape, layout
                assert strides(ours) == strides(shown), layout
                assert ours.dtype is shown.dtype, layout


def strides(x: Tensor) -> list[int]:
    """Those that mean something: along a dimension of 1 nobody walks."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """The two backends differ by float32 rounding, relative to the largest element."""
    assert actual.stride() == expected.stride(), what
    assert actual.dtype is expected.dtype, what
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    # Gradients cancel: their terms are up to some thirty times what is left.
    bound = 32 * arithmetic(dtype) * max(largest, 1.0)
    torch.testing.assert_close(
        actual, expected, rtol=2 * rounding(actual.dtype), atol=bound, msg=lambda m: f"{what}: {m}"
    )


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_kernel_equals_fallback(act: str | None, dtype: torch.dtype) -> None:
    shape = (5, 17, 3, 11)
    for index, layout in enumerate(layouts_of(4)):
        x = lay_out(values(shape, dtype), layout)
        given = arguments(
            x, act=act, training=index % 3 != 1, with_residual=index % 2 == 0,
            with_mask=index % 4 == 3, affine=index % 5 != 4,
        )  # fmt: skip
        ours, plain = OP(*given), operators._forward_fallback(*given)
        close(ours[0], plain[0], dtype, f"output {layout}")
        close(ours[1], plain[1], dtype, f"stats {layout}")
        backward = backward_arguments(given)
        results = BACKWARD(*backward), operators._backward_fallback(*backward)
        for name, a, b in zip(("input", "residual", "weight", "bias"), *results, strict=True):
            close(a, b, dtype, f"gradient of {name}, {layout}")


@needs_kernels
@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu"])
def test_there_is_a_bit_for_every_element(act: str) -> None:
    for shape in ((3, 5, 4, 6), (2, 17, 7, 7), (9, 3, 1, 1), (4, 1, 3, 3), (33, 5, 2, 2)):
        for layout in layouts_of(4):
            x = lay_out(values(shape, torch.float32), layout)
            given = arguments(x, act=act, with_residual=True, save_bits=True)
            output, _, bits = OP(*given)
            assert bits.shape == operators.bits_shape(output)
            plain = OP(*given[:9], 0, 0.0, False)[0]
            expected = (plain > 0) & (plain < 6) if act == "relu6" else plain > 0
            assert torch.equal(operators.unpack_bits(bits, output), expected), (shape, layout)


def test_the_fallback_saves_no_bits() -> None:
    given = arguments(values((3, 2, 4), torch.float32), act="relu", save_bits=True)
    with pytest.raises(RuntimeError, match="only compiled kernels save bits"):
        operators._forward_fallback(*given)


def test_a_backend_is_named() -> None:
    assert _native.loaded in (None, "default", "avx2", "avx512")
