"""The operators of synchronized batch norm in one process: cut batch norm, and put it together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from normally import distributed
from normally._ops import batch_norm as plain
from normally._ops import sync_batch_norm as operators
from tests._ops import test_batch_norm as of_batch_norm
from tests.helpers import ACTS, DTYPES, arithmetic, lay_out, layouts_of, needs_kernels, values

STATISTICS = torch.ops.normally.channel_statistics.default
MERGE = torch.ops.normally.merge_statistics.default
SUMS = torch.ops.normally.batch_norm_gradient_sums.default
GRADIENT = torch.ops.normally.batch_norm_gradient.default
TOGETHER = torch.ops.normally.sync_batch_norm.default
TOGETHER_BACKWARD = torch.ops.normally.sync_batch_norm_backward.default
NEED_ALL = plain.NEED_INPUT | plain.NEED_PARAMETERS | plain.NEED_RESIDUAL
NEED_TENSORS = plain.NEED_INPUT | plain.NEED_RESIDUAL

pytestmark = [
    # opcheck's own machinery imports torch's scripted decompositions.
    pytest.mark.filterwarnings(
        r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning"
    ),
    # Of numpy, in Triton's interpreter: what overflows is taken again in float64.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

QUICK = ("test_schema", "test_faketensor", "test_autograd_registration")
SHAPES = [(4, 3), (3, 2, 5), (2, 3, 4, 5), (0, 3, 4), (5, 1, 3), (2, 17, 2, 2)]


@pytest.fixture
def alone() -> Iterator[str]:
    """The name of a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def given(
    x: Tensor, *, correction: int = 0, **options: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...], Tensor]:
    """What both backward operators take: (operands up to stats, config), and some means."""
    forward = list(of_batch_norm.arguments(x, **options))
    forward[8] = correction
    *operands, _, eps, correction, act, param, _ = of_batch_norm.backward_arguments(tuple(forward))
    means = torch.linspace(-1, 1, 2 * x.shape[1], dtype=torch.float64).view(2, -1)
    return tuple(operands), (eps, correction, act, param), means


def made(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    return lay_out(values(shape, dtype), layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layouts = layouts_of(len(shape))
    for index, layout in enumerate(layouts):
        x = made(shape, dtype, layout)
        operands, config, means = given(
            x, act=ACTS[(index + SHAPES.index(shape)) % len(ACTS)], with_residual=index % 2 == 0,
            with_mask=index % 3 == 1, affine=index % 4 != 3, correction=index % 2,
        )  # fmt: skip
        need = (NEED_TENSORS, plain.NEED_INPUT, plain.NEED_RESIDUAL)[index % 3]
        if operands[4] is None:
            need &= ~plain.NEED_RESIDUAL
        torch.library.opcheck(STATISTICS, (x, operands[5]), test_utils=QUICK)
        torch.library.opcheck(SUMS, (*operands, *config), test_utils=QUICK)
        torch.library.opcheck(GRADIENT, (*operands, means, *config, need), test_utils=QUICK)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_kernel_equals_fallback(act: str | None, dtype: torch.dtype) -> None:
    for index, layout in enumerate(layouts_of(4)):
        x = lay_out(values((5, 17, 3, 11), dtype), layout)
        operands, config, means = given(
            x, act=act, with_residual=index % 2 == 0, with_mask=index % 4 == 3,
            affine=index % 5 != 4, correction=index % 3,
        )  # fmt: skip
        mask = operands[5]
        need = NEED_TENSORS if operands[4] is not None else plain.NEED_INPUT
        of_batch_norm.close(
            STATISTICS(x, mask), operators._statistics_fallback(x, mask), dtype, f"stats {layout}"
        )
        arguments = (*operands, *config)
        of_batch_norm.close(
            SUMS(*arguments), operators._sums_fallback(*arguments), dtype, f"sums {layout}"
        )
        arguments = (*operands, means, *config, need)
        results = GRADIENT(*arguments), operators._gradient_fallback(*arguments)
        for name, a, b in zip(("input", "residual"), *results, strict=True):
            of_batch_norm.close(a, b, dtype, f"gradient of {name}, {layout}")


@pytest.mark.parametrize("channels", [0, 1, 3, 17])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merge_of_messages(parts: int, channels: int) -> None:
    """Kernel and formula; a process without values has a message like the others."""
    messages = torch.randn(parts, 2 * channels + 2, dtype=torch.float64)
    messages[:, channels : 2 * channels].square_()
    messages[:, 2 * channels] = torch.tensor([7.0, 0.0, 1.0, 30.0, 2.0])[:parts]
    messages[:, -1] = 12345
    messages[1:2, : 2 * channels] = torch.nan
    torch.library.opcheck(MERGE, (messages,), test_utils=QUICK)
    merged = MERGE(messages)
    formula = distributed.merge_messages(messages)
    # Sums of at most five terms of order 1, in another order.
    torch.testing.assert_close(merged, formula, rtol=1e-14, atol=1e-15)
    messages[-1, -1] += 1  # another call
    assert bool(MERGE(messages).isnan().all()) == (parts > 1 or channels == 0)


def parts_of(tensor: Tensor | None, sizes: tuple[int, ...]) -> list[Tensor | None]:
    """The samples of each process. Of a mask or a saved bit there are as many."""
    return [None] * len(sizes) if tensor is None else list(tensor.split(sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_parts_make_the_whole(act: str | None, with_mask: bool, dtype: torch.dtype) -> None:
    """What the three operators give of parts of a batch is batch norm of all of it."""
    sizes = (4, 0, 1, 6)
    for correction in (0, 1):
        x = values((11, 5, 3, 4), dtype)
        forward = list(of_batch_norm.arguments(x, act=act, with_residual=True, with_mask=with_mask))
        forward[8] = correction
        whole = of_batch_norm.backward_arguments(tuple(forward), NEED_ALL)
        output, stats, _ = plain.forward(*forward)
        g, _, weight, bias, residual, mask, *_ = whole
        config = whole[9:13]
        eps, _, code, param = config
        shares = list(zip(*(parts_of(t, sizes) for t in (g, x, residual, mask)), strict=True))

        merged = distributed.merge(torch.stack([STATISTICS(x, m) for _, x, _, m in shares]))
        near(merged[:2], stats[:2], dtype, "statistics")
        assert torch.equal(merged[2], stats[2])
        var = operators.normalizing_variance(merged, correction)
        outputs = [
            plain.forward(x, weight, bias, r, m, merged[0], var, eps, 0, code, param, False)[0]
            for _, x, r, m in shares
        ]
        near(torch.cat(outputs), output, dtype, "output")

        operands = [(g, x, weight, bias, r, m, None, merged) for g, x, r, m in shares]
        sums = torch.stack([SUMS(*o, *config) for o in operands]).sum(0)
        expected = plain.backward(*whole)
        near(sums[1], expected[2].double(), dtype, "weight")
        near(sums[0], expected[3].double(), dtype, "bias")
        means = operators._means(sums, merged, correction)
        gradients = [GRADIENT(*o, means, *config, NEED_TENSORS) for o in operands]
        near(torch.cat([a for a, _ in gradients]), expected[0], dtype, "input")
        near(torch.cat([b for _, b in gradients]), expected[1], dtype, "residual")


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Equal to the rounding of sums that were taken in another order, and of one cast."""
    bound = 32 * arithmetic(dtype) * max(1.0, float(expected.double().abs().max()))
    cast = 2 * torch.finfo(expected.dtype if what != "weight" else dtype).eps
    torch.testing.assert_close(
        actual, expected, rtol=cast, atol=bound, msg=lambda m: f"{what}: {m}"
    )


@needs_kernels
@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu"])
def test_saved_bits_replace_the_residual(act: str) -> None:
    for layout in layouts_of(4):
        x = lay_out(values((3, 5, 4, 6), torch.float32), layout)
        saved, config, means = given(x, act=act, with_residual=True, save_bits=True)
        assert saved[6] is not None
        kept, _, _ = given(x, act=act, with_residual=True)
        of_batch_norm.close(SUMS(*saved, *config), SUMS(*kept, *config), x.dtype, "sums")
        for a, b in zip(
            GRADIENT(*saved, means, *config, NEED_TENSORS),
            GRADIENT(*kept, means, *config, NEED_TENSORS),
            strict=True,
        ):
            of_batch_norm.close(a, b, x.dtype, f"{act} {layout}")


def test_values_beyond_float32() -> None:
    """Channels whose squares float32 does not hold, beside one that it does."""
    x = values((6, 3, 5), torch.float32)
    x[:, 1] *= 1e30
    operands, config, means = given(x, act="silu")
    of_batch_norm.close(
        STATISTICS(x, None)[:, 1:2] / 1e30,
        operators._statistics_fallback(x, None)[:, 1:2] / 1e30,
        torch.float32,
        "stats",
    )
    arguments = (*operands, means, *config, plain.NEED_INPUT)
    ours, fallback = GRADIENT(*arguments)[0], operators._gradient_fallback(*arguments)[0]
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, fallback, rtol=1e-4, atol=1e-6)


def test_a_batch_without_values() -> None:
    """Empty or wholly masked: no NaN that would reach the others, and sums of 0."""
    empty = torch.empty(0, 3, 4)
    masked = torch.full((2, 3, 4), torch.nan)
    for x, mask in ((empty, None), (masked, torch.zeros(2, 1, 4, dtype=torch.bool))):
        stats = STATISTICS(x, mask)
        assert torch.equal(stats, torch.tensor([[0.0], [1.0], [0.0]]).double().expand(3, 3))
        operands = (torch.ones_like(x), x, None, None, None, mask, None, stats)
        assert torch.count_nonzero(SUMS(*operands, 1e-5, 0, 0, 0.0)) == 0
        means = torch.ones(2, 3, dtype=torch.float64)
        gradient, _ = GRADIENT(*operands, means, 1e-5, 0, 0, 0.0, plain.NEED_INPUT)
        assert gradient.shape == x.shape
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("act", [None, "relu", "gelu"])
def test_together_in_a_group_of_one(alone: str, act: str | None) -> None:
    """The operators that communicate: their schemas, shapes and derivatives."""
    for index, layout in enumerate(layouts_of(4)[::3]):
        x = lay_out(values((3, 2, 4, 5), torch.float64), layout)
        one = of_batch_norm.arguments(
            x, act=act, with_residual=index % 2 == 0, with_mask=index == 1, requires_grad=True
        )
        arguments = (*one[:5], *one[7:], alone, "a layer")
        utils = QUICK if index else (*QUICK, "test_aot_dispatch_dynamic")
        torch.library.opcheck(TOGETHER, arguments, test_utils=utils, atol=1e-9, rtol=1e-9)
        backward = list(of_batch_norm.backward_arguments(one))
        backward[8:14] = [alone, *backward[9:13], "a layer", backward[13]]
        torch.library.opcheck(TOGETHER_BACKWARD, tuple(backward), test_utils=QUICK)
        for ours, plains in zip(TOGETHER(*arguments), plain.forward(*one), strict=True):
            torch.testing.assert_close(ours, plains, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [
    {}, {"act": "silu"}, {"act": "gelu", "with_residual": True}, {"with_mask": True},
    {"affine": False, "act": "tanh"}, {"correction": 1, "act": "silu"},
], ids=str)  # fmt: skip
def test_derivatives_in_a_group_of_one(alone: str, options: dict[str, Any]) -> None:
    """Both derivatives: gradcheck differentiates the operator, gradgradcheck its backward."""
    correction = options.pop("correction", 0)
    x = values((3, 2, 4), torch.float64)
    one = list(of_batch_norm.arguments(x, **options, requires_grad=True))
    one[8] = correction

    def function(*tensors: Tensor) -> Any:
        present = iter(tensors)
        operands = [None if t is None else next(present) for t in one[:4]]
        return TOGETHER(*operands, one[4], *one[7:], alone, "a layer")[0]

    leaves = tuple(t for t in one[:4] if t is not None)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_one_value_per_channel_is_refused(alone: str) -> None:
    with pytest.raises(ValueError, match=r"Expected more than 1 value.*a layer divides"):
        TOGETHER(torch.ones(1, 2), *(None,) * 4, 1e-5, 0, 0, 0.0, False, alone, "a layer")
    with pytest.raises(operators.SingleValueError, match="3 per channel in all processes"):
        TOGETHER(torch.ones(3, 2), *(None,) * 4, 1e-5, 3, 0, 0.0, False, alone, "a layer")
