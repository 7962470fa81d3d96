"""Promise 4 for the norms without running statistics.

The same bits for any number of threads, and for a sample alone as inside a batch.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import norms
from tests.device import functional
from tests.helpers import (
    ACTS,
    DTYPES,
    assert_same_bits,
    cpu_only,
    has_kernels,
    lay_out,
    needs_kernels,
    spread,
    values,
)
from tests.norms import Norm, Shape

# The formula sums with torch's own reductions, which do depend on the threads and on the batch;
# the promise is the kernels'.
pytestmark = [needs_kernels, pytest.mark.usefixtures("threads")]

# Each is larger than any grain below which a kernel would not go parallel.
LARGE = [
    (norms.LAYER, (4099, 65)), (norms.LAYER, (3, 100_003)), (norms.LAYER, (65536, 3)),
    (norms.LAYER_2, (513, 17, 23)), (norms.LAYER_3, (7, 5, 65, 129)),
    (norms.LAYER_FIRST, (64, 130, 7, 7)), (norms.LAYER_FIRST, (2, 5, 40_001)),
    (norms.LAYER_FIRST, (1, 4099, 65)), (norms.LAYER_FIRST, (3, 7, 9, 31, 67)),
    (norms.RMS, (4099, 65)), (norms.RMS, (3, 100_003)), (norms.RMS, (65536, 3)),
    (norms.RMS_2, (513, 17, 23)), (norms.RMS_LLAMA, (4099, 65)), (norms.RMS_GEMMA, (257, 1031)),
    (norms.GROUP, (64, 132, 7, 7)), (norms.GROUP, (1, 4, 100_001)), (norms.GROUP, (4099, 68)),
    (norms.GROUP, (2, 16, 101, 131)), (norms.GROUP, (3000, 16, 2, 2)),
    (norms.GROUP_1, (1, 3, 300, 331)), (norms.GROUP_1, (2, 4099, 33)),
    (norms.INSTANCE, (2, 3, 40_001)), (norms.INSTANCE, (16, 130, 9, 13)),
    (norms.INSTANCE, (2, 5, 9, 31, 67)), (norms.RESPONSE, (16, 130, 9, 13)),
]  # fmt: skip
LAYOUTS = ("contiguous", "channels_last", "strided")


@pytest.fixture
def kernel(norm: Norm) -> None:
    """Asked of compiled operators alone."""
    if not has_kernels(norm.operator):
        pytest.skip(f"normally::{norm.operator} has no kernel there")


def everything(
    norm: Norm, x: Tensor, act: str | None, mask: Tensor | None, residual: Tensor | None
) -> dict[str, Tensor]:
    """Output and all gradients of one call."""
    weight, bias = norm.parameters(tuple(x.shape), x.dtype)
    given = {"input": x, "weight": weight, "bias": bias, "residual": residual}
    leaves = {name: t.detach().requires_grad_() for name, t in given.items() if t is not None}
    arguments = leaves.get("weight"), leaves.get("bias")
    options = {"act": act} if act else {}
    if residual is None:
        outputs = [norm.ours(leaves["input"], *arguments, mask=mask, **options)]
    else:
        assert norm.adds is not None
        outputs = list(
            norm.adds(leaves["input"], leaves["residual"], *arguments, mask=mask, **options)
        )
    cotangents = [
        torch.empty_like(y).copy_(values(tuple(y.shape), y.dtype, seed=5 + i))
        for i, y in enumerate(outputs)
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {
        **{f"output {i}": y.detach() for i, y in enumerate(outputs)},
        **{f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)},
    }


@cpu_only("its threads")
@pytest.mark.usefixtures("kernel")
@spread("norm shape, dtype, layout", LARGE, DTYPES, LAYOUTS, keep=3)
def test_one_thread_equals_many(norm: Norm, shape: Shape, dtype: torch.dtype, layout: str) -> None:
    x = lay_out(values(shape, dtype), layout)
    turn = LARGE.index((norm, shape)) + LAYOUTS.index(layout)
    act = ACTS[turn % len(ACTS)] if norm.has_act else None
    # Every third by three: the cases of a dtype have turns that are 3 apart.
    mask = norm.mask(shape, whole_rows=True) if turn // 3 % 3 == 0 else None
    residual = torch.empty_like(x).copy_(x.flip(0)) if norm.adds and turn % 2 else None
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(everything(norm, x, act, mask, residual))
    for name, one in results[0].items():
        for other in results[1:]:
            assert_same_bits(other[name], one, f"{name}, {act}, {turn}")


@cpu_only("its threads")
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", [norms.INSTANCE], ids=str)
def test_running_statistics_of_instances(norm: Norm, layout: str) -> None:
    x = lay_out(values((33, 17, 49, 5), torch.float32), layout)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        mean, var = torch.zeros(17), torch.ones(17)
        functional.instance_norm(x, mean, var)
        results.append((mean, var))
    for other in results[1:]:
        assert_same_bits(other[0], results[0][0], "running_mean")
        assert_same_bits(other[1], results[0][1], "running_var")


#: Batches whose samples are looked at alone: odd sizes, so that most start at an odd address.
BATCHES = [
    (norms.LAYER, (37, 33)), (norms.LAYER, (9, 1031)), (norms.LAYER, (7, 5, 129)),
    (norms.LAYER, (33, 4099)), (norms.LAYER_2, (9, 7, 19)), (norms.LAYER_3, (6, 3, 5, 9, 7)),
    (norms.LAYER_FIRST, (9, 33, 7, 5)), (norms.LAYER_FIRST, (7, 130, 49)),
    (norms.LAYER_FIRST, (5, 257, 3, 2, 5)), (norms.LAYER_FIRST, (37, 33)),
    (norms.RMS, (37, 33)), (norms.RMS, (9, 1031)), (norms.RMS_2, (9, 7, 19)),
    (norms.RMS_LLAMA, (33, 4099)), (norms.RMS_GEMMA, (7, 5, 129)),
    (norms.GROUP, (9, 12, 7, 7)), (norms.GROUP, (7, 68, 31)), (norms.GROUP, (37, 132)),
    (norms.GROUP, (5, 8, 3, 5, 7)), (norms.GROUP, (5, 64, 33, 31)), (norms.GROUP_1, (9, 33, 7, 5)),
    (norms.INSTANCE, (9, 17, 7, 7)), (norms.INSTANCE, (7, 5, 1031)),
    (norms.INSTANCE, (5, 3, 4, 5, 6)), (norms.INSTANCE, (5, 64, 19, 31)),
    (norms.RESPONSE, (9, 17, 7, 7)), (norms.RESPONSE, (7, 130, 31)),
]  # fmt: skip


def samples_apart(ndim: int) -> list[str]:
    """Layouts in which one sample lies after the other.

    Where they interleave, a sample alone has another layout, which is summed in its own order.
    """
    layouts = norms.dense_and_not(ndim)
    names = ("contiguous", "sliced", "strided")
    return [name for name in layouts if name in names or name.startswith("order 0")]


@pytest.mark.usefixtures("kernel")
@spread("norm shape, dtype, masked", BATCHES, DTYPES, (False, True))
def test_a_sample_alone_equals_itself_in_a_batch(
    norm: Norm, shape: Shape, dtype: torch.dtype, masked: bool
) -> None:
    """Output and gradient of the input, both as a copy of its own and as a part of the batch."""
    x, cotangent = values(shape, dtype), values(shape, dtype, seed=1)
    parameters = norm.parameters(shape, dtype)
    options = {"act": "silu"} if norm.has_act else {}

    def run(x: Tensor, g: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        y = norm.ours(leaf, *parameters, mask=mask, **options)
        return y, torch.autograd.grad(y, leaf, g)[0]

    mask = norm.mask(shape, whole_rows=True) if masked else None
    for layout in samples_apart(len(shape)):
        laid = lay_out(x, layout)
        together = run(laid, cotangent, mask)
        for first, last in ((0, 1), (1, 2), (shape[0] - 2, shape[0] - 1), (1, 4)):
            part = slice(first, last)
            kept = None if mask is None else mask[part]
            for alone in (laid[part], lay_out(x[part], layout)):
                found = run(alone, cotangent[part], kept)
                what = f"{layout}, {part}, masked {masked}"
                assert_same_bits(found[0], together[0][part], f"output, {what}")
                assert_same_bits(found[1], together[1][part], f"gradient, {what}")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [norms.LAYER, norms.RMS, norms.RMS_LLAMA], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(norm: Norm, dtype: torch.dtype) -> None:
    """Other rows may hold anything, and their number may be any: this one's bits stay."""
    for n in (1, 2, 15, 16, 17, 64, 257, 4096, 4099):
        x = values((61, n), dtype)
        weight = torch.linspace(-1.5, 2, n, dtype=norm.parameters((1, 1), dtype)[0].dtype)  # type: ignore[union-attr]
        y = norm.ours(x, weight, None)
        changed = x.clone()
        changed[::2] *= 1e4
        changed[6] = float("nan")
        assert_same_bits(norm.ours(changed, weight, None)[1::2], y[1::2], f"{n}")
        for rows in (x[3:4], x[3:8], x[3:60]):
            assert_same_bits(norm.ours(rows, weight, None)[0], y[3], f"{n}, {rows.shape[0]} rows")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("norm", [norms.LAYER, norms.RMS], ids=str)
def test_a_row_of_a_batch_that_exceeds_every_cache(norm: Norm) -> None:
    """Large outputs may be written past the cache; the values are the same."""
    x = torch.randn(5003, 4096)
    weight, bias = norm.parameters((1, 4096))
    y = norm.ours(x, weight, bias)
    for row in (0, 1, 2501, 5002):
        assert_same_bits(norm.ours(x[row], weight, bias), y[row])


@cpu_only("its threads")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_masked_batch_norm(layout: str) -> None:
    """Statistics, gradients and buffers of the batch norm kernels with a mask."""
    for shape in ((4099, 65), (64, 130, 7, 7), (7, 1, 65537), (3000, 16, 2, 2)):
        x = lay_out(values(shape, torch.float32), layout)
        mask = norms.GROUP.mask(shape)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [
                t.requires_grad_()
                for t in (x.detach(), torch.ones(shape[1]), torch.zeros(shape[1]))
            ]
            buffers = torch.zeros(shape[1]), torch.ones(shape[1])
            y = functional.batch_norm(leaves[0], *buffers, *leaves[1:], True, act="silu", mask=mask)
            gradients = torch.autograd.grad(y, leaves, torch.empty_like(y).copy_(x.flip(0)))
            results.append((y, *gradients, *buffers))
        for other in results[1:]:
            for index, (a, b) in enumerate(zip(other, results[0], strict=True)):
                assert_same_bits(a, b, f"{index}, {shape}")
