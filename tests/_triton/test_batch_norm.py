"""Batch norm's Triton kernels against the float64 reference, in one launch and in three."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from normally import reference
from normally._triton import batch_norm as kernels
from normally._triton import channel_tiles
from tests.device import functional
from tests.helpers import (
    ACTS,
    DTYPES,
    assert_same_bits,
    check_batch_norm,
    lay_out,
    permutations_of,
    spread,
    values,
)
from tests.promises.test_12_finite import check as check_finite

# Of numpy, in the interpreter: what overflows is not used, or taken again in float64.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

#: What decides the route: the shape alone. Small tiles let small tensors take them all.
LAUNCHES = {"one launch": 1 << 30, "three launches": 0}
SHAPES = [(2, 1), (1, 3, 2), (5, 9), (40, 3), (4, 3, 35), (3, 17, 5, 5), (2, 5, 2, 3, 11)]


@pytest.fixture(params=LAUNCHES)
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    limit = LAUNCHES[request.param]
    for name, size in (("_TILE", 64), ("_VECTOR_TILE", 128)):
        monkeypatch.setattr(channel_tiles, name, size)
    monkeypatch.setattr(channel_tiles, "_PROGRAMS", 4)
    for name in ("_TINY_BYTES", "_ALONE_BYTES"):
        monkeypatch.setattr(kernels, name, limit)
    monkeypatch.setattr(kernels, "_ALONE_PROGRAMS", 0)
    name: str = request.param
    return name


def parameters(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if dtype is torch.float64 else torch.float32
    return torch.linspace(-1.5, 2, channels, dtype=dtype), torch.linspace(
        1, -1, channels, dtype=dtype
    )


@spread("shape, dtype", SHAPES, DTYPES)
def test_every_shape(launches: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Layouts, activations, residuals, parameters and modes take turns."""
    turn = SHAPES.index(shape) + DTYPES.index(dtype)
    layouts = ("contiguous", "channels_last", "sliced", "expanded batch")
    for index in (turn, turn + 1):
        x = lay_out(values(shape, dtype, seed=index), layouts[index % 4])
        weight, bias = parameters(shape[1], dtype)
        check_batch_norm(
            x,
            weight if index % 5 else None,
            bias if index % 3 else None,
            values(shape, dtype, seed=9) if index % 2 else None,
            training=bool(index % 4) and shape != (2, 1),
            act=ACTS[index % len(ACTS)],
            gradient=("contiguous", "expanded batch", "channels_last")[index % 3],
        )


@pytest.mark.parametrize("layout", permutations_of(4))
def test_every_order_of_memory(launches: str, layout: str) -> None:
    x = lay_out(values((3, 5, 4, 7), torch.float32), layout)
    check_batch_norm(x, *parameters(5, torch.float32), act="relu", gradient=layout)


@spread(
    "shape, act",
    ((3, 5, 9), (3, 11, 4), (9, 13), (2, 3, 4, 4)),
    ("relu", "relu6", "leaky_relu"),
)
def test_saved_bits(launches: str, shape: tuple[int, ...], act: str) -> None:
    """With a residual the backward has one bit an element in place of it."""
    for layout in ("contiguous", "channels_last"):
        x, residual = (lay_out(values(shape, torch.float32, seed), layout) for seed in (0, 1))
        check_batch_norm(x, *parameters(shape[1], torch.float32), 3 * residual, act=act)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_masks(launches: str, layout: str, training: bool) -> None:
    """What is hidden is NaN; a sample is hidden altogether."""
    mask = torch.rand(4, 1, 5, 7) < 0.6
    mask[1] = False
    x = values((4, 3, 5, 7), torch.float32)
    hidden = lay_out(torch.where(mask, x, torch.nan), layout)
    for act, correction in ((None, 0), ("silu", 1)):
        check_batch_norm(
            hidden, *parameters(3, torch.float32), mask=mask, act=act, correction=correction,
            training=training,
        )  # fmt: skip


@pytest.mark.parametrize("ratio", [1e3, 1e6])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_mean(launches: str, layout: str, ratio: float) -> None:
    """Promise 1's number, with an outlier at the start that is no better shift."""
    x = values((6, 3, 90), torch.float32) + ratio * torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1)
    x[0, :, 0] += 1e6
    found = functional.batch_norm(lay_out(x, layout), None, None, training=True)
    expected = reference.batch_norm(x.double())
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    assert float(error.max()) <= 1e-6


@spread("layout, value", ("contiguous", "channels_last"), (0.1, -3.3e-5, 1e6 / 3, 1e37))
def test_constants_become_the_bias(launches: str, layout: str, value: float) -> None:
    x = lay_out(torch.full((7, 3, 33), value), layout)
    bias = torch.tensor([0.1, -0.2, 0.3])
    mask = torch.rand(7, 1, 33) < 0.5
    found = functional.batch_norm(x, None, None, torch.ones(3), bias, training=True)
    assert torch.equal(found, bias.view(1, 3, 1).expand(x.shape))
    found = functional.batch_norm(x, None, None, None, bias, training=True, mask=mask)
    assert torch.equal(found, torch.where(mask, bias.view(1, 3, 1), 0.0))


@spread(
    "layout, dtype, scale",
    ("contiguous", "channels_last"),
    (torch.float32, torch.bfloat16),
    (1e30, 1e19, 1e-20),
)
def test_extreme_scales(launches: str, layout: str, dtype: torch.dtype, scale: float) -> None:
    x = (values((5, 3, 40), torch.float32) * scale).to(dtype)
    check_finite(lay_out(x, layout), values(x.shape, torch.float32, 1), act="relu")


def test_the_largest_numbers(launches: str) -> None:
    """Neither the sum nor the difference of two is finite in float32."""
    largest = torch.finfo(torch.float32).max
    x = torch.where(torch.rand(9, 3, 35) < 0.5, -largest, largest)
    found = functional.batch_norm(x, None, None, training=True)
    expected = reference.batch_norm(x.double())
    assert float((found.double() - expected).abs().max()) <= 1e-5


def test_a_bad_channel_is_alone(launches: str) -> None:
    """Its running statistics stay and are counted; the others do not notice."""
    x = values((6, 4, 33), torch.float32)
    bad = x.clone()
    bad[2, 1, 3], bad[0, 3, 7] = torch.nan, torch.inf
    results = []
    for batch in (x, bad):
        buffers = [torch.zeros(4), torch.ones(4), torch.tensor(0), torch.zeros(4).long()]
        y = functional.batch_norm(
            batch, buffers[0], buffers[1], training=True, num_batches_tracked=buffers[2],
            skipped_updates=buffers[3],
        )  # fmt: skip
        results.append([y, *buffers])
    for clean, other in zip(results[0][:1], results[1][:1], strict=True):
        assert_same_bits(clean[:, ::2], other[:, ::2])
        assert not other[:, 1::2].isfinite().all()
    for clean, other in zip(results[0][1:3], results[1][1:3], strict=True):
        assert_same_bits(clean[::2], other[::2])
    assert results[1][1].tolist()[1::2] == [0, 0]
    assert results[1][2].tolist()[1::2] == [1, 1]
    assert results[1][3] == 1
    assert results[1][4].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("momentum", "unbiased"), [(0.1, False), (None, True), (1.0, True)])
def test_running_statistics(launches: str, momentum: float | None, unbiased: bool) -> None:
    """Over three batches, one of them bad for one channel; in the buffers' own dtype."""
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(5, 3, 21, generator=generator) + i for i in range(3)]
    batches[1][0, 2, 0] = torch.nan
    buffers = [torch.zeros(3), torch.ones(3), torch.tensor(0), torch.zeros(3).long()]
    expected = [torch.zeros(3).double(), torch.ones(3).double()]
    entered = torch.zeros(3)
    for x in batches:
        functional.batch_norm(
            x, buffers[0], buffers[1], training=True, momentum=momentum, unbiased=unbiased,
            num_batches_tracked=buffers[2], skipped_updates=buffers[3],
        )  # fmt: skip
        sound = x.isfinite().all(dim=2).all(dim=0)
        entered += sound
        factor = 1 / entered.double().clamp(min=1) if momentum is None else momentum
        batch = x.double().mean((0, 2)), x.double().var((0, 2), unbiased=unbiased)
        for k in range(2):
            new = expected[k] * (1 - factor) + batch[k] * factor
            expected[k] = torch.where(sound, new, expected[k])
    for found, wanted in zip(buffers[:2], expected, strict=True):
        # Each of three updates rounds once to float32; the statistics are of unit scale.
        assert float((found.double() - wanted).abs().max()) <= 3e-6
    assert buffers[2] == 3
    assert buffers[3].tolist() == [0, 0, 1]


def test_buffers_that_are_views() -> None:
    """Running statistics at a stride are moved where they are."""
    base = torch.zeros(2, 6)
    mean, var = base[0, ::2], base[1, ::2]
    x = values((8, 3), torch.float32)
    functional.batch_norm(x, mean, var, training=True, momentum=1.0)
    assert float((mean - x.mean(0)).abs().max()) <= 1e-6
    assert float((var - x.var(0)).abs().max()) <= 1e-6


def test_no_buffer_moves_for_an_empty_batch(launches: str) -> None:
    mean, var, count = torch.zeros(3), torch.ones(3), torch.tensor(0)
    y = functional.batch_norm(
        torch.empty(0, 3, 4), mean, var, training=True, num_batches_tracked=count
    )
    assert y.shape == (0, 3, 4)
    assert mean.tolist() == [0, 0, 0]
    assert count == 0


def test_the_same_bits_again(launches: str) -> None:
    x, g = (values((9, 5, 40), torch.float32, seed) for seed in (0, 1))
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = functional.batch_norm(leaf, None, None, training=True, act="silu")
        y.backward(g)
        results.append((y.detach(), leaf.grad))  # type: ignore[union-attr]
    for first, second in zip(*results, strict=True):
        assert_same_bits(first, second)


def test_only_what_is_asked_for(launches: str) -> None:
    """Gradients of some arguments alone are those of all."""
    x, weight, bias = values((6, 3, 20), torch.float32), *parameters(3, torch.float32)
    g = values((6, 3, 20), torch.float32, 1)
    residual = values((6, 3, 20), torch.float32, 2)

    def gradients(*asked: bool) -> list[Tensor | None]:
        given = [
            t.clone().requires_grad_(wanted)
            for t, wanted in zip((x, weight, bias, residual), asked, strict=True)
        ]
        y = functional.batch_norm(
            given[0], None, None, *given[1:3], training=True, act="silu", residual=given[3]
        )
        y.backward(g)
        return [None if t.grad is None else t.grad for t in given]

    complete = gradients(True, True, True, True)
    for asked in itertools.product((True, False), repeat=4):
        if sum(asked) in (1, 3):  # each alone, and all but each
            for wanted, found, is_asked in zip(complete, gradients(*asked), asked, strict=True):
                assert_same_bits(found, wanted if is_asked else None)
